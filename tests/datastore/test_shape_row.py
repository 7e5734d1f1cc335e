"""Normalisation, and rows that fit the store."""

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import pytest
import trimesh

from datastore import schema
from datastore.cameras import rig_by_name
from datastore.mesh import Mesh
from datastore.shape_row import Broken, RowMaker, into_unit_ball
from datastore.sources import Listing, ShapeError, ShapeReference

TRIANGLE = np.array([[0, 1, 2]], np.int32)


def mesh_of(shape: trimesh.Trimesh) -> Mesh:
    return Mesh(np.asarray(shape.vertices, np.float32), np.asarray(shape.faces, np.int32))


LISTING = Listing(
    shapes=[ShapeReference("thing", 1, "test", "")],
    class_names=("chair", "table"),
    splits=("train", "test"),
    part_names=("leg", "top"),
    coloured=True,
)


@dataclass
class OneMesh:
    """A source with a single shape."""

    FORMAT: ClassVar[str] = "one"
    LOOKS_LIKE: ClassVar[str] = "one mesh"
    mesh: Mesh
    url: str = "memory://one"
    listing: Listing = LISTING

    @classmethod
    def recognises(cls, url: str) -> bool:
        return False

    @classmethod
    def open(cls, url: str) -> Self:
        raise NotImplementedError

    def load(self, shape: ShapeReference) -> Mesh:
        return self.mesh


def row_maker(mesh: Mesh) -> RowMaker:
    return RowMaker(OneMesh(mesh), rig_by_name("simple6", image_size=16), 32, schema.INGEST_FIELDS)


def test_the_unit_ball_holds_the_mesh_and_touches_its_farthest_corner() -> None:
    mesh = mesh_of(trimesh.creation.box(extents=[3, 4, 12]))
    moved = Mesh(mesh.vertices + np.float32([100, -50, 7]), mesh.faces)
    inside, centre, scale = into_unit_ball(moved)
    assert np.allclose(centre, [100, -50, 7])
    assert scale == pytest.approx(6.5)
    assert np.linalg.norm(inside.vertices, axis=1).max() == pytest.approx(1, abs=1e-6)
    assert np.allclose(inside.vertices * scale + centre, moved.vertices, atol=1e-4)


def test_corners_that_no_face_uses_do_not_stretch_the_ball() -> None:
    mesh = mesh_of(trimesh.creation.box())
    colours = np.arange(9 * 3, dtype=np.uint8).reshape(9, 3)
    stray = np.float32([[1e6, np.nan, 0]])
    with_stray = Mesh(np.vstack([stray, mesh.vertices]), mesh.faces + 1, vertex_colours=colours)
    inside, centre, _ = into_unit_ball(with_stray)
    assert np.allclose(centre, 0)
    assert len(inside.vertices) == 8
    assert np.array_equal(inside.faces, mesh.faces)
    assert np.array_equal(inside.vertex_colours, colours[1:])


@pytest.mark.parametrize(
    ("vertices", "faces", "reason"),
    [
        (np.zeros((3, 3)), np.zeros((0, 3)), "no faces"),
        ([[0, 0, 0], [1, 0, 0], [0, np.nan, 0]], TRIANGLE, "not finite"),
        ([[0, 0, 0], [1, 0, 0], [0, np.inf, 0]], TRIANGLE, "not finite"),
        ([[2, 2, 2], [2, 2, 2], [2, 2, 2]], TRIANGLE, "no extent"),
        ([[0, 0, 0], [1, 0, 0]], TRIANGLE, "names vertex 2, and there are 2"),
    ],
)
def test_what_is_no_shape_is_refused_with_a_reason(vertices: np.ndarray, faces: np.ndarray, reason: str) -> None:
    with pytest.raises(ShapeError, match=reason):
        into_unit_ball(Mesh(np.asarray(vertices, np.float32), np.asarray(faces, np.int32)))


def test_a_mesh_without_area_becomes_a_broken_shape() -> None:
    maker = row_maker(Mesh(np.float32([[0, 0, 0], [1, 0, 0], [2, 0, 0]]), TRIANGLE))
    assert maker(maker.source.listing.shapes[0]) == Broken("the mesh has no area")


def test_a_row_and_an_empty_row_have_the_same_fields_shapes_and_types() -> None:
    maker = row_maker(mesh_of(trimesh.creation.box()))
    shape = maker.source.listing.shapes[0]
    row, empty = maker(shape), maker.empty_row(shape)
    assert isinstance(row, dict)
    assert set(row) == set(empty) == set(schema.INGEST_FIELDS)
    for name in schema.INGEST_FIELDS:
        assert row[name].shape == empty[name].shape, name
        if name != "id":
            assert row[name].dtype == empty[name].dtype == schema.FIELDS[name].dtype, name
    assert (row["label"], row["split"], row["id"]) == (1, 1, "thing")
    assert (empty["label"], empty["split"], empty["id"]) == (1, schema.QUARANTINED, "thing")


def test_parts_and_colours_of_points_are_those_of_their_faces() -> None:
    mesh = mesh_of(trimesh.creation.box())
    top = trimesh.creation.box().face_normals[:, 1] > 0.5
    painted = Mesh(
        mesh.vertices,
        mesh.faces,
        face_parts=top.astype(np.int16),
        face_colours=np.where(top[:, None], np.uint8([250, 10, 20]), np.uint8([0, 0, 0])).astype(np.uint8),
    )
    maker = row_maker(painted)
    row = maker(maker.source.listing.shapes[0])
    assert isinstance(row, dict)
    on_top = row["normals"][:, 1] > 0.5
    assert 0 < on_top.sum() < len(on_top)
    assert np.array_equal(row["part_labels"], on_top)
    assert np.array_equal(row["colours"], np.where(on_top[:, None], [250, 10, 20], [0, 0, 0]))


def test_parts_that_a_mesh_lacks_are_unknown() -> None:
    maker = row_maker(mesh_of(trimesh.creation.box()))
    row = maker(maker.source.listing.shapes[0])
    assert isinstance(row, dict)
    assert (row["part_labels"] == -1).all()
