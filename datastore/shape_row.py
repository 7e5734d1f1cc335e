"""From one shape of a source to one row of a store. Runs in worker processes; imports nothing that stores."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32

from datastore.cameras import CameraRig
from datastore.mesh import Mesh
from datastore.render import colours_at, render
from datastore.sample import sample_surface, seed_of
from datastore.schema import QUARANTINED
from datastore.sources import ShapeError, ShapeReference, Source

Row = dict[str, np.ndarray]
"""One row by field, each array as a reader receives it."""


@dataclass(frozen=True)
class Broken:
    """A shape that cannot be used, and why."""

    reason: str


@dataclass(frozen=True)
class RowMaker:
    """Makes rows of one store from shapes of one source; what it needs to travel to another process is its fields."""

    source: Source
    rig: CameraRig
    num_points: int
    fields: Sequence[str]

    def __call__(self, shape: ShapeReference) -> Row | Broken:
        """The shape's row, or why there is none."""
        try:
            return self._row(shape)
        except ShapeError as error:
            return Broken(str(error))
        except MemoryError:
            return Broken("the shape does not fit into memory")

    def _row(self, shape: ShapeReference) -> Row:
        mesh, centre, scale = into_unit_ball(self.source.load(shape))
        try:
            samples = sample_surface(mesh.vertices, mesh.faces, self.num_points, seed_of(shape.id))
        except ValueError as error:
            raise ShapeError(str(error)) from error
        rendering = render(mesh, samples.points, samples.normals, self.rig)
        row = self._labels(shape, self.source.listing.splits.index(shape.split)) | {
            "points": samples.points,
            "normals": samples.normals.astype(np.float16),
            "views": rendering.views,
            "depth": rendering.depth,
            "visibility": rendering.visibility,
            "pixels": rendering.pixels,
            "centre": centre,
            "scale": np.asarray(scale),
        }
        if "colours" in self.fields:
            row["colours"] = (colours_at(mesh, samples.faces, samples.barycentric) + 0.5).astype(np.uint8)
        if "part_labels" in self.fields:
            unknown = np.full(self.num_points, -1, dtype=np.int16)
            row["part_labels"] = unknown if mesh.face_parts is None else mesh.face_parts[samples.faces]
        return row

    def empty_row(self, shape: ShapeReference) -> Row:
        """What stands in the place of a broken shape: its id, and the split that says that nothing is here."""
        points, views, size = self.num_points, self.rig.num_views, self.rig.image_size
        row = self._labels(shape, QUARANTINED) | {
            "points": np.zeros((points, 3), np.float32),
            "normals": np.zeros((points, 3), np.float16),
            "colours": np.zeros((points, 3), np.uint8),
            "part_labels": np.full(points, -1, np.int16),
            "views": np.zeros((views, size, size, 3), np.uint8),
            "depth": np.zeros((views, size, size), np.uint16),
            "visibility": np.zeros((points, views), np.bool_),
            "pixels": np.zeros((points, views, 2), np.int16),
            "centre": np.zeros(3, np.float32),
            "scale": np.zeros((), np.float32),
        }
        return {name: row[name] for name in self.fields}

    @staticmethod
    def _labels(shape: ShapeReference, split: int) -> Row:
        return {
            "id": np.array(shape.id),
            "label": np.array(shape.label, np.int64),
            "split": np.array(split, np.uint8),
        }


def into_unit_ball(mesh: Mesh) -> tuple[Mesh, Float32[np.ndarray, " 3"], np.float32]:
    """The mesh around the origin, its farthest corner at distance 1, and centre and scale that lead back.

    Corners that no face uses are dropped: they would stretch the ball around nothing. ShapeError for what has no
    faces, no extent, or coordinates that are not numbers.
    """
    if len(mesh.faces) == 0:
        raise ShapeError("the mesh has no faces")
    if mesh.faces.min() < 0 or mesh.faces.max() >= len(mesh.vertices):
        raise ShapeError(f"a face names vertex {mesh.faces.max()}, and there are {len(mesh.vertices)}")
    used = np.zeros(len(mesh.vertices), dtype=bool)
    used[mesh.faces] = True
    vertices = mesh.vertices[used].astype(np.float64)
    if not np.isfinite(vertices).all():
        raise ShapeError("some coordinates are not finite")
    # the middle of the bounding box, not the mean of the corners: that one moves with the tessellation
    centre = ((vertices.min(axis=0) + vertices.max(axis=0)) / 2).astype(np.float32)
    vertices -= centre
    scale = np.float32(np.sqrt((vertices**2).sum(axis=1).max()))
    if not 0 < scale < np.inf:
        raise ShapeError("the mesh has no extent")
    new_number = np.cumsum(used) - 1
    inside = replace(
        mesh,
        vertices=(vertices / scale).astype(np.float32),
        faces=new_number[mesh.faces].astype(np.int32),
        vertex_colours=None if mesh.vertex_colours is None else mesh.vertex_colours[used],
    )
    return inside, centre, scale
