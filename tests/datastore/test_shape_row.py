"""Turning, normalisation, and rows that fit the store: from meshes, from clouds, and with a source's own images."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import pytest
import trimesh

from datastore import schema
from datastore.hidden_points import visibility_of_points
from datastore.layout import StoreAttributes
from datastore.mesh import Mesh
from datastore.shape import Images, PointCloud, Shape
from datastore.shape_row import Broken, Row, RowMaker, cloud_into_unit_ball, mesh_into_unit_ball, turned_up
from datastore.sources import AXES, Axis, Listing, ReadingOptions, ShapeError, ShapeReference
from datastore.sources.files import SourceFiles
from tests.stores import small_attributes

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
class OneShape:
    """A source with a single shape."""

    FORMAT: ClassVar[str] = "one"
    LOOKS_LIKE: ClassVar[str] = "one shape"
    shape: Shape
    url: str = "memory://one"
    listing: Listing = LISTING

    @classmethod
    def recognises(cls, files: SourceFiles) -> bool:
        return False

    @classmethod
    def open(cls, files: SourceFiles, options: ReadingOptions) -> Self:
        raise NotImplementedError

    def load(self, shape: ShapeReference) -> Shape:
        return self.shape


RENDERED_FIELDS = tuple(
    name for name in schema.INGEST_FIELDS if name not in ("cameras", "extra_views", "num_extra_views")
)


def row_of(
    shape: Shape, attributes: StoreAttributes | None = None, fields: tuple[str, ...] = RENDERED_FIELDS, **listing: Any
) -> Row:
    """The shape's row."""
    source = OneShape(shape, listing=replace(LISTING, **listing))
    row = RowMaker(source, attributes or small_attributes(points_per_shape=32), fields)(LISTING.shapes[0])
    assert isinstance(row, dict), row
    return row


def reason_for(
    shape: Shape, attributes: StoreAttributes | None = None, fields: tuple[str, ...] = RENDERED_FIELDS
) -> str:
    """Why there is no row."""
    found = RowMaker(OneShape(shape), attributes or small_attributes(), fields)(LISTING.shapes[0])
    assert isinstance(found, Broken)
    return found.reason


def ball(num_points: int = 200, seed: int = 0) -> PointCloud:
    """Points on a sphere away from the origin, with everything that a cloud can have."""
    random = np.random.default_rng(seed)
    directions = random.normal(size=(num_points, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return PointCloud(
        points=(2 * directions + [5, 0, 0]).astype(np.float32),
        normals=(3 * directions).astype(np.float32),
        colours=random.integers(0, 256, (num_points, 3)).astype(np.uint8),
        part_labels=(directions[:, 1] > 0).astype(np.int16),
    )


def test_the_unit_ball_holds_the_mesh_and_touches_its_farthest_corner() -> None:
    mesh = mesh_of(trimesh.creation.box(extents=[3, 4, 12]))
    moved = Mesh(mesh.vertices + np.float32([100, -50, 7]), mesh.faces)
    inside, centre, scale = mesh_into_unit_ball(moved)
    assert np.allclose(centre, [100, -50, 7])
    assert scale == pytest.approx(6.5)
    assert np.linalg.norm(inside.vertices, axis=1).max() == pytest.approx(1, abs=1e-6)
    assert np.allclose(inside.vertices * scale + centre, moved.vertices, atol=1e-4)


def test_corners_that_no_face_uses_do_not_stretch_the_ball() -> None:
    mesh = mesh_of(trimesh.creation.box())
    colours = np.arange(9 * 3, dtype=np.uint8).reshape(9, 3)
    stray = np.float32([[1e6, np.nan, 0]])
    with_stray = Mesh(np.vstack([stray, mesh.vertices]), mesh.faces + 1, vertex_colours=colours)
    inside, centre, _ = mesh_into_unit_ball(with_stray)
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
        mesh_into_unit_ball(Mesh(np.asarray(vertices, np.float32), np.asarray(faces, np.int32)))


def test_a_mesh_without_area_becomes_a_broken_shape() -> None:
    flat = Mesh(np.float32([[0, 0, 0], [1, 0, 0], [2, 0, 0]]), TRIANGLE)
    assert reason_for(Shape(flat)) == "the mesh has no area"


@pytest.mark.parametrize("geometry", ["mesh", "cloud", "images"])
def test_a_row_and_an_empty_row_have_the_same_fields_shapes_and_types(geometry: str) -> None:
    attributes, fields = small_attributes(points_per_shape=32, extra_views=3, extra_image_size=4), schema.INGEST_FIELDS
    shape = Shape(mesh_of(trimesh.creation.box()) if geometry == "mesh" else ball())
    if geometry == "images":
        attributes = attributes.model_copy(update={"rig": None, "views_from": "source"})
        images = Images(np.zeros((12, 8, 8, 3), np.uint8), np.ones((200, 12), np.bool_), np.zeros((12, 8), np.float32))
        shape = replace(shape, images=images, extra_views=np.ones((2, 4, 4, 3), np.uint8))
        fields = tuple(name for name in fields if name not in ("depth", "pixels"))
    else:
        fields = tuple(name for name in fields if name != "cameras")
    maker = RowMaker(OneShape(shape), attributes, fields)
    row, empty = maker(LISTING.shapes[0]), maker.empty_row(LISTING.shapes[0])
    assert isinstance(row, dict), row
    assert set(row) == set(empty) == set(fields)
    for name in fields:
        assert row[name].shape == empty[name].shape, name
        if schema.FIELDS[name].dtype != "string":
            assert row[name].dtype == empty[name].dtype == schema.FIELDS[name].dtype, name
    assert (row["label"], row["split"], row["id"]) == (1, 1, "thing")
    assert (empty["label"], empty["split"], empty["id"]) == (1, schema.QUARANTINED, "thing")
    assert row["num_extra_views"] == (2 if geometry == "images" else 0)


def test_parts_and_colours_of_points_are_those_of_their_faces() -> None:
    mesh = mesh_of(trimesh.creation.box())
    top = trimesh.creation.box().face_normals[:, 1] > 0.5
    painted = Mesh(
        mesh.vertices,
        mesh.faces,
        face_parts=top.astype(np.int16),
        face_colours=np.where(top[:, None], np.uint8([250, 10, 20]), np.uint8([0, 0, 0])).astype(np.uint8),
    )
    row = row_of(Shape(painted))
    on_top = row["normals"][:, 1] > 0.5
    assert 0 < on_top.sum() < len(on_top)
    assert np.array_equal(row["part_labels"], on_top)
    assert np.array_equal(row["colours"], np.where(on_top[:, None], [250, 10, 20], [0, 0, 0]))


def test_parts_that_a_mesh_lacks_are_unknown() -> None:
    assert (row_of(Shape(mesh_of(trimesh.creation.box())))["part_labels"] == -1).all()


@pytest.mark.parametrize("axis", AXES)
def test_what_is_up_in_the_source_is_up_in_the_store(axis: Axis) -> None:
    up = np.zeros(3, np.float32)
    up["XYZ".index(axis[1])] = 1 if axis[0] == "+" else -1
    random = np.random.default_rng(0)
    points = random.normal(size=(3, 3)).astype(np.float32)
    cloud = turned_up(PointCloud(np.vstack([up, points]), normals=np.vstack([up, points])), axis)
    assert isinstance(cloud, PointCloud)
    assert cloud.normals is not None
    assert np.array_equal(cloud.points[0], [0, 1, 0])
    assert np.array_equal(cloud.normals, cloud.points)
    # a rotation, not a mirror image
    assert np.linalg.det(cloud.points[1:]) == pytest.approx(np.linalg.det(points), abs=1e-5)
    mesh = turned_up(Mesh(points, TRIANGLE), axis)
    assert isinstance(mesh, Mesh)
    assert np.array_equal(mesh.vertices, cloud.points[1:])


def test_a_clouds_points_keep_what_belongs_to_them() -> None:
    cloud = ball()
    row = row_of(Shape(cloud))
    assert row["scale"] == pytest.approx(2, rel=0.02)
    back = row["points"] * row["scale"] + row["centre"]
    apart = np.linalg.norm(back[:, None] - cloud.points, axis=2)
    source = apart.argmin(axis=1)
    assert apart.min(axis=1).max() < 1e-5
    assert cloud.normals is not None
    assert np.allclose(row["normals"], cloud.normals[source] / 3, atol=1e-3)
    assert np.array_equal(row["colours"], cloud.colours[source])  # type: ignore[index]
    assert np.array_equal(row["part_labels"], cloud.part_labels[source])  # type: ignore[index]
    attributes = small_attributes()
    assert attributes.rig is not None
    assert np.array_equal(row["visibility"], visibility_of_points(row["points"], attributes.rig))


def test_points_may_stay_in_the_sources_order() -> None:
    cloud = ball()
    inside, _, _ = cloud_into_unit_ball(cloud)
    as_they_were = row_of(Shape(cloud), small_attributes(points_per_shape=32, point_order="source"))
    assert np.array_equal(as_they_were["points"], inside.points[:32])
    farthest = row_of(Shape(cloud), small_attributes(points_per_shape=32))["points"]
    gaps = [
        np.linalg.norm(p[:, None] - p[None], axis=2)[~np.eye(32, dtype=bool)].min()
        for p in (inside.points[:32], farthest)
    ]
    assert gaps[1] > 2 * gaps[0]


def test_a_cloud_with_too_few_points_repeats_them_from_the_first() -> None:
    row = row_of(Shape(ball(num_points=20)), small_attributes(points_per_shape=50))
    assert np.array_equal(row["points"][20:40], row["points"][:20])
    assert np.array_equal(row["points"][40:], row["points"][:10])
    assert len(np.unique(row["points"], axis=0)) == 20


def test_a_normal_without_direction_takes_its_neighbours() -> None:
    cloud = ball()
    assert cloud.normals is not None
    normals = cloud.normals.copy()
    normals[7] = 0
    nearest = np.linalg.norm(cloud.points - cloud.points[7], axis=1).argsort()[1]
    keep_all = small_attributes(points_per_shape=200, point_order="source")
    row = row_of(Shape(replace(cloud, normals=normals)), keep_all)
    assert np.array_equal(row["normals"][7], row["normals"][nearest])
    assert reason_for(Shape(replace(cloud, normals=0 * normals))) == "not one of its normals has a direction"


def test_a_sources_images_follow_its_points() -> None:
    cloud, random = ball(), np.random.default_rng(1)
    visibility = random.random((200, 3)) < 0.5
    views = random.integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    cameras = np.full((3, 8), np.nan, np.float32)
    attributes = small_attributes(points_per_shape=64, rig=None, num_views=3, views_from="source")
    fields = (*(name for name in RENDERED_FIELDS if name not in ("depth", "pixels")), "cameras")
    row = row_of(Shape(cloud, Images(views, visibility, cameras)), attributes, fields)
    assert np.array_equal(row["views"], views)
    assert np.array_equal(row["cameras"], cameras, equal_nan=True)
    back = row["points"] * row["scale"] + row["centre"]
    source = np.linalg.norm(back[:, None] - cloud.points, axis=2).argmin(axis=1)
    assert np.array_equal(row["visibility"], visibility[source])
    assert "its images are (2, 8, 8, 3)" in reason_for(Shape(cloud, Images(views[:2])), attributes, fields)
    assert reason_for(Shape(cloud), attributes, fields).startswith("it has no images")


@pytest.mark.parametrize(
    ("cloud", "reason"),
    [
        (PointCloud(np.zeros((0, 3), np.float32)), "the cloud has no points"),
        (PointCloud(np.float32([[0, 0, 0], [0, np.nan, 0]])), "some coordinates are not finite"),
        (PointCloud(np.ones((4, 3), np.float32)), "the cloud has no extent"),
        (replace(ball(), normals=None), "it has no normals, which this source promises"),
    ],
)
def test_what_is_no_cloud_is_refused_with_a_reason(cloud: PointCloud, reason: str) -> None:
    assert reason in reason_for(Shape(cloud))
