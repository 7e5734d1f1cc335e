"""What is drawn of a cloud, against the surface that it was taken from."""

import numpy as np
import pytest
import trimesh

from datastore import splat
from datastore.cameras import rig_by_name
from datastore.cloud_surface import surface_through
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
    assert (hit & hit_exactly).sum() / hit_exactly.sum() > 0.99  # no holes
    assert (hit & hit_exactly).sum() / (hit | hit_exactly).sum() > 0.985
    both = hit & hit_exactly
    apart = np.abs(decode_depth(drawn.depth[both], rig) - decode_depth(exact.depth[both], rig))
    assert np.median(apart) < 0.002
    shades_apart = np.abs(drawn.views.astype(int) - exact.views)[both]
    assert np.median(shades_apart) <= 3
    assert np.array_equal(drawn.pixels, exact.pixels)
    assert (drawn.visibility == exact.visibility).mean() > 0.85


def test_a_sheet_is_closed_whether_its_points_are_spread_by_chance_or_lie_on_a_grid() -> None:
    rig = rig_by_name("angles?at=0/0", 64)
    grid = np.stack(np.meshgrid(*[np.linspace(-0.6, 0.6, 25)] * 2), axis=-1).reshape(-1, 2)
    for across in (grid, np.random.default_rng(0).uniform(-0.6, 0.6, (600, 2))):
        points = np.column_stack([across, np.zeros(len(across))]).astype(np.float32)
        depth = render_cloud(PointCloud(points), np.arange(5), rig).depth[0]
        reached = np.flatnonzero(depth.any(axis=0))
        inside = slice(reached[0] + 3, reached[-1] - 2)
        assert reached[-1] - reached[0] > 30
        assert (depth[inside, inside] > 0).all()


def test_a_thin_rod_is_drawn_from_end_to_end() -> None:
    angle = np.random.default_rng(0).uniform(0, 2 * np.pi, 60)
    rod = np.column_stack([0.004 * np.cos(angle), np.linspace(-0.9, 0.1, 60), 0.004 * np.sin(angle)])
    ball = 0.3 * np.asarray(trimesh.creation.icosphere(3).vertices) + [0, 0.4, 0]
    points = np.concatenate([rod, ball]).astype(np.float32)
    drawn = render_cloud(PointCloud(points), np.arange(len(points)), rig_by_name("angles?at=30/10,120/0", 128))
    for view in range(2):
        rows = drawn.pixels[:60, view, 1]
        assert (drawn.depth[view, rows.min() : rows.max() + 1].max(axis=1) > 0).all()


def test_a_scan_of_more_points_than_images_show_is_drawn_by_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, mesh = rig_by_name("angles?at=20/30", 64), torus()
    samples = samples_on(mesh, 6000)
    colours = np.where(samples.points[:, :1] > 0, np.uint8([[200, 0, 0]]), np.uint8([[0, 0, 200]]))
    cloud = PointCloud(samples.points, samples.normals, colours)
    whole = render_cloud(cloud, np.arange(6000), rig)
    monkeypatch.setattr(splat, "_MOST_POINTS", 3000)
    drawn_points = []
    monkeypatch.setattr(
        splat, "surface_through", lambda cloud, pixel: drawn_points.append(cloud) or surface_through(cloud, pixel)
    )
    thinned = render_cloud(cloud, np.arange(6000), rig)
    assert 700 < len(drawn_points[0].points) < 3000
    assert np.array_equal(thinned.visibility, whole.visibility) and np.array_equal(thinned.pixels, whole.pixels)
    assert ((thinned.depth > 0) == (whole.depth > 0)).mean() > 0.99
    assert np.abs(thinned.views.astype(int) - whole.views).mean() < 3


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
    assert np.array_equal(permuted.views, straight.views)


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
    for view, (column, row) in enumerate(pixels_of(points[:1], rig)[0]):
        assert drawn.depth[view, row - 1 : row + 2, column - 1 : column + 2].any()
        assert (drawn.views[view] < BACKGROUND).any()
