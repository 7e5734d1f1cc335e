"""From one shape of a source to one row of a store. Runs in worker processes; imports nothing that stores."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeVar

import numpy as np
from jaxtyping import Float32, Float64, Int16, Int64

from datastore.layout import StoreAttributes
from datastore.mesh import Mesh
from datastore.render import colours_at, render
from datastore.sample import farthest_point_order, sample_surface, seed_of
from datastore.schema import QUARANTINED
from datastore.shape import NUM_CAMERA_VALUES, Images, PointCloud
from datastore.sources import Axis, ShapeError, ShapeReference, Source
from datastore.splat import render_cloud

Value = TypeVar("Value")

Row = dict[str, np.ndarray]
"""One row by field, each array as a reader receives it."""

_TURNED: Final[dict[Axis, tuple[tuple[int, int], ...]]] = {
    "+X": ((1, -1), (0, 1), (2, 1)),
    "-X": ((1, 1), (0, -1), (2, 1)),
    "+Y": ((0, 1), (1, 1), (2, 1)),
    "-Y": ((0, 1), (1, -1), (2, -1)),
    "+Z": ((0, 1), (2, 1), (1, -1)),
    "-Z": ((0, 1), (2, -1), (1, 1)),
}
"""For each axis that may be up: the source's axis, and its sign, that becomes x, y and z. All are rotations."""


@dataclass(frozen=True)
class Broken:
    """A shape that cannot be used, and why."""

    reason: str


@dataclass(frozen=True)
class RowMaker:
    """Makes rows of one store from shapes of one source; what it needs to travel to another process is its fields."""

    source: Source
    attributes: StoreAttributes
    fields: Sequence[str]

    def __call__(self, shape: ShapeReference) -> Row | Broken:
        """The shape's row, or why there is none."""
        try:
            return self._row(shape)
        except ShapeError as error:
            return Broken(str(error))
        except MemoryError:
            return Broken(
                "needs more memory than --limit-gib-per-worker allows (mend: raise it, with --retry-quarantined)"
            )

    def _row(self, reference: ShapeReference) -> Row:
        shape = self.source.load(reference)
        turned = turned_up(shape.geometry, self.source.listing.up_axis)
        row = self._from_mesh(turned, reference) if isinstance(turned, Mesh) else self._from_cloud(turned, shape.images)
        row |= self._labels(reference, self.source.listing.splits.index(reference.split))
        if "extra_views" in self.fields:
            row |= self._extra_views(shape.extra_views)
        return {name: row[name] for name in self.fields}

    def _from_mesh(self, mesh: Mesh, reference: ShapeReference) -> Row:
        mesh, centre, scale = mesh_into_unit_ball(mesh)
        num_points, rig = self.attributes.points_per_shape, self.attributes.rig
        assert rig is not None, "images in place of views come with clouds"
        try:
            samples = sample_surface(mesh.vertices, mesh.faces, num_points, seed_of(reference.id))
        except ValueError as error:
            raise ShapeError(str(error)) from error
        rendering = render(mesh, samples.points, samples.normals, rig)
        row = vars(rendering) | {
            "points": samples.points,
            "normals": samples.normals.astype(np.float16),
            "centre": centre,
            "scale": np.asarray(scale),
        }
        if "colours" in self.fields:
            row["colours"] = (colours_at(mesh, samples.faces, samples.barycentric) + 0.5).astype(np.uint8)
        if "part_labels" in self.fields:
            row["part_labels"] = _unknown(num_points) if mesh.face_parts is None else mesh.face_parts[samples.faces]
        return row

    def _from_cloud(self, cloud: PointCloud, images: Images | None) -> Row:
        cloud, centre, scale = cloud_into_unit_ball(cloud)
        chosen = self._chosen(cloud)
        row: Row = {"points": cloud.points[chosen], "centre": centre, "scale": np.asarray(scale)}
        if "normals" in self.fields:
            normals = _unit_rows(_required(cloud.normals, "normals"), cloud.points)
            row["normals"] = normals[chosen].astype(np.float16)
        if "colours" in self.fields:
            row["colours"] = _required(cloud.colours, "colours")[chosen]
        if "part_labels" in self.fields:
            unknown = _unknown(len(cloud.points))
            row["part_labels"] = (unknown if cloud.part_labels is None else cloud.part_labels)[chosen]
        if self.attributes.rig is not None:
            return row | vars(render_cloud(cloud, chosen, self.attributes.rig))
        return row | self._source_views(_required(images, "images"), chosen)

    def _chosen(self, cloud: PointCloud) -> Int64[np.ndarray, " p"]:
        """Which of a cloud's points become the row's, in their order. A cloud with fewer repeats them from the first."""
        wanted = self.attributes.points_per_shape
        if self.attributes.point_order == "source":
            order = np.arange(min(wanted, len(cloud.points)))
        else:
            order = farthest_point_order(cloud.points, min(wanted, len(cloud.points)))
        return np.resize(order, wanted)

    def _source_views(self, images: Images, chosen: Int64[np.ndarray, " p"]) -> Row:
        facts = self.attributes
        expected = (facts.num_views, facts.image_size, facts.image_size, 3)
        if images.views.shape != expected:
            raise ShapeError(f"its images are {images.views.shape}, and this source's are {expected}")
        row: Row = {"views": images.views}
        if "visibility" in self.fields:
            row["visibility"] = _required(images.visibility, "visibility")[chosen]
        if "cameras" in self.fields:
            row["cameras"] = _required(images.cameras, "cameras").astype(np.float32)
        return row

    def _extra_views(self, found: np.ndarray | None) -> Row:
        most, size = self.attributes.extra_views or 0, self.attributes.extra_image_size or 0
        views = np.zeros((most, size, size, 3), np.uint8)
        if found is not None:
            if len(found) > most or found.shape[1:] != views.shape[1:]:
                raise ShapeError(f"its extra images are {found.shape}, and this source's are up to {views.shape}")
            views[: len(found)] = found
        return {"extra_views": views, "num_extra_views": np.array(0 if found is None else len(found), np.int64)}

    def empty_row(self, shape: ShapeReference) -> Row:
        """What stands in the place of a broken shape: its id, and the split that says that nothing is here."""
        facts = self.attributes
        points, views, size = facts.points_per_shape, facts.num_views, facts.image_size
        row = self._labels(shape, QUARANTINED) | {
            "points": np.zeros((points, 3), np.float32),
            "normals": np.zeros((points, 3), np.float16),
            "colours": np.zeros((points, 3), np.uint8),
            "part_labels": _unknown(points),
            "views": np.zeros((views, size, size, 3), np.uint8),
            "depth": np.zeros((views, size, size), np.uint16),
            "visibility": np.zeros((points, views), np.bool_),
            "pixels": np.zeros((points, views, 2), np.int16),
            "cameras": np.full((views, NUM_CAMERA_VALUES), np.nan, np.float32),
            "centre": np.zeros(3, np.float32),
            "scale": np.zeros((), np.float32),
        }
        row |= self._extra_views(None)
        return {name: row[name] for name in self.fields}

    def _labels(self, shape: ShapeReference, split: int) -> Row:
        return {
            "id": np.array(shape.id),
            "label": np.array(shape.label, np.int64),
            "split": np.array(split, np.uint8),
            "licence": np.array(shape.licence or "unknown"),  # only where shapes have licences of their own
        }


def turned_up(geometry: Mesh | PointCloud, up_axis: Axis) -> Mesh | PointCloud:
    """The same geometry with +Y up."""
    if up_axis == "+Y":
        return geometry
    axes, signs = zip(*_TURNED[up_axis], strict=True)
    sign = np.array(signs, np.float32)
    if isinstance(geometry, Mesh):
        return replace(geometry, vertices=geometry.vertices[:, axes] * sign)
    normals = None if geometry.normals is None else geometry.normals[:, axes] * sign
    return replace(geometry, points=geometry.points[:, axes] * sign, normals=normals)


def mesh_into_unit_ball(mesh: Mesh) -> tuple[Mesh, Float32[np.ndarray, " 3"], np.float32]:
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
    vertices, centre, scale = _into_unit_ball(mesh.vertices[used], "mesh")
    new_number = np.cumsum(used) - 1
    inside = replace(
        mesh,
        vertices=vertices,
        faces=new_number[mesh.faces].astype(np.int32),
        vertex_colours=None if mesh.vertex_colours is None else mesh.vertex_colours[used],
        vertex_uv=None if mesh.vertex_uv is None else mesh.vertex_uv[used],
    )
    return inside, centre, scale


def cloud_into_unit_ball(cloud: PointCloud) -> tuple[PointCloud, Float32[np.ndarray, " 3"], np.float32]:
    """The cloud around the origin, its farthest point at distance 1, and centre and scale that lead back."""
    if len(cloud.points) == 0:
        raise ShapeError("the cloud has no points")
    points, centre, scale = _into_unit_ball(cloud.points, "cloud")
    return replace(cloud, points=points), centre, scale


def _into_unit_ball(
    points: Float32[np.ndarray, "n 3"], what: str
) -> tuple[Float32[np.ndarray, "n 3"], Float32[np.ndarray, " 3"], np.float32]:
    inside: Float64[np.ndarray, "n 3"] = points.astype(np.float64)
    if not np.isfinite(inside).all():
        raise ShapeError("some coordinates are not finite")
    # the middle of the bounding box, not the mean of the corners: that one moves with the tessellation
    centre = ((inside.min(axis=0) + inside.max(axis=0)) / 2).astype(np.float32)
    inside -= centre
    scale = np.float32(np.sqrt((inside**2).sum(axis=1).max()))
    if not 0 < scale < np.inf:
        raise ShapeError(f"the {what} has no extent")
    return (inside / scale).astype(np.float32), centre, scale


def _required(value: Value | None, what: str) -> Value:
    if value is None:
        raise ShapeError(f"it has no {what}, which this source promises for every shape")
    return value


def _unit_rows(normals: Float32[np.ndarray, "n 3"], points: Float32[np.ndarray, "n 3"]) -> Float32[np.ndarray, "n 3"]:
    """The normals at length 1. A point whose normal has no direction, as real files have, takes its neighbour's."""
    lengths = np.linalg.norm(normals.astype(np.float64), axis=1)
    good = np.isfinite(lengths) & (lengths > 0)
    if not good.any():
        raise ShapeError("not one of its normals has a direction")
    unit: Float32[np.ndarray, "n 3"] = np.divide(
        normals, lengths[:, None], where=good[:, None], out=np.zeros_like(normals)
    )
    if not good.all():
        from scipy.spatial import cKDTree

        _, nearest = cKDTree(points[good]).query(points[~good])
        unit[~good] = unit[good][nearest]
    return unit


def _unknown(num_points: int) -> Int16[np.ndarray, " p"]:
    return np.full(num_points, -1, dtype=np.int16)
