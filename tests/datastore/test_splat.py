"""What is drawn of a cloud, against the surface that it was taken from."""

import numpy as np
import pytest
import trimesh

from datastore.cameras import rig_by_name
from datastore.mesh import Mesh
from datastore.render import BACKGROUND, NEUTRAL_GREY, Rendering, decode_depth, pixels_of, render
from datastore.sample import SurfaceSamples, sample_surface
from datastore.shape import PointCloud
from datastore.splat import render_cloud

PROJECTIONS = pytest.mark.parametrize("rig_name", ["angles?at=20/30,130/-10", "axes3"])


def torus() -> Mesh:
    shape = trimesh.creation.torus(0.7, 0.25)
    return Mesh(np.asarray(shape.vertices, np.float32), np.asarray(shape.faces, np.int32))


def samples_on(mesh: Mesh, count: int) -> SurfaceSamples:
    return sample_surface(mesh.vertices, mesh.faces, count, seed=3)


@PROJECTIONS
@pytest.mark.parametrize("with_normals", [True, False])
def test_views_and_depth_are_close_to_those_of_the_surface(rig_name: str, with_normals: bool) -> None:
    rig, mesh = rig_by_name(rig_name, 64), torus()
    samples = samples_on(mesh, 2048)
    cloud = PointCloud(samples.points, samples.normals if with_normals else None)
    drawn = render_cloud(cloud, np.arange(500), rig)
    exact = render(mesh, samples.points[:500], samples.normals[:500], rig)
    hit, hit_exactly = drawn.depth > 0, exact.depth > 0
    assert (hit & hit_exactly).sum() / hit_exactly.sum() > 0.995  # no holes
    assert (hit & hit_exactly).sum() / (hit | hit_exactly).sum() > 0.9  # discs reach over edges by half a pixel
    both = hit & hit_exactly
    apart = np.abs(decode_depth(drawn.depth[both], rig) - decode_depth(exact.depth[both], rig))
    assert np.median(apart) < 0.02
    shades_apart = np.abs(drawn.views.astype(int) - exact.views)[both]
    assert np.median(shades_apart) < 12
    assert np.array_equal(drawn.pixels, exact.pixels)
    assert (drawn.visibility == exact.visibility).mean() > 0.85


@PROJECTIONS
def test_a_pixel_has_depth_exactly_if_it_shows_something(rig_name: str) -> None:
    rig = rig_by_name(rig_name, 48)
    points = samples_on(torus(), 600).points
    drawn = render_cloud(PointCloud(points), np.arange(10), rig)
    assert np.array_equal(drawn.depth == 0, (drawn.views == BACKGROUND).all(axis=-1))


def test_the_nearest_point_wins_and_colours_are_the_clouds_own() -> None:
    rig = rig_by_name("angles?at=0/0,180/0", 32)
    across = np.random.default_rng(0).uniform(-0.5, 0.5, (400, 2))
    points = np.concatenate([np.column_stack([across, np.full(400, z)]) for z in (0.4, -0.4)]).astype(np.float32)
    colours = np.repeat(np.array([[200, 0, 0], [0, 0, 200]], np.uint8), 400, axis=0)
    views = render_cloud(PointCloud(points, colours=colours), np.arange(10), rig).views
    front, rear = views[:, 16, 16].astype(int)
    assert front[0] > 100 and front[2] == 0
    assert rear[2] > 100 and rear[0] == 0
    assert np.abs(front[0] - rear[2]) <= 1


def test_a_cloud_without_colours_is_grey() -> None:
    views = render_cloud(PointCloud(samples_on(torus(), 300).points), np.arange(10), rig_by_name("axes3", 32)).views
    assert np.ptp(views.astype(int), axis=-1).max() == 0
    assert views[views < BACKGROUND].min() > 0.3 * NEUTRAL_GREY


@PROJECTIONS
def test_permuting_the_points_permutes_what_is_known_of_them(rig_name: str) -> None:
    rig, points = rig_by_name(rig_name, 48), samples_on(torus(), 400).points
    order = np.random.default_rng(1).permutation(400)
    straight = render_cloud(PointCloud(points), np.arange(400), rig)
    permuted = render_cloud(PointCloud(points[order]), np.arange(400), rig)
    assert np.array_equal(permuted.visibility, straight.visibility[order])
    assert np.array_equal(permuted.pixels, straight.pixels[order])
    assert np.array_equal(permuted.depth, straight.depth)
    assert np.abs(permuted.views.astype(int) - straight.views).max() <= 1  # sums in another order


def line(count: int) -> np.ndarray:
    return np.linspace([-0.5, -0.5, -0.5], [0.5, 0.5, 0.5], count, dtype=np.float32)


@PROJECTIONS
@pytest.mark.parametrize(
    "points",
    [
        np.zeros((1, 3), np.float32),
        np.full((50, 3), 0.2, np.float32),
        line(2),
        line(3),
        line(60),
        np.column_stack([samples_on(torus(), 80).points[:, :2], np.zeros(80, np.float32)]),
        np.repeat(samples_on(torus(), 30).points, 12, axis=0),
    ],
    ids=["one", "all in one place", "two", "three", "in a line", "in a plane", "each many times"],
)
def test_clouds_without_volume_are_drawn_too(points: np.ndarray, rig_name: str) -> None:
    rig = rig_by_name(rig_name, 32)
    drawn: Rendering = render_cloud(PointCloud(points), np.arange(len(points)), rig)
    assert drawn.visibility.any(axis=0).all()
    column, row = pixels_of(points[:1], rig)[0].T
    assert (drawn.depth[np.arange(rig.num_views), row, column] > 0).all()


def test_a_normal_of_no_length_or_of_another_length_does_no_harm() -> None:
    samples = samples_on(torus(), 300)
    lengths = np.linspace(0, 7, 300, dtype=np.float32)[:, None]
    drawn = render_cloud(PointCloud(samples.points, samples.normals * lengths), np.arange(5), rig_by_name("axes3", 32))
    unit = render_cloud(PointCloud(samples.points, samples.normals), np.arange(5), rig_by_name("axes3", 32))
    assert np.abs(drawn.views.astype(int) - unit.views).mean() < 2
