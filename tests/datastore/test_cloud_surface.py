"""The surface through a cloud's points, against triangulations and surfaces that are known."""

import numpy as np
import pytest
import trimesh
from scipy.spatial import Delaunay, cKDTree

from datastore.cloud_surface import CloudSurface, surface_through
from datastore.shape import PointCloud

PIXEL = 0.01


def in_plane(count: int, seed: int = 0) -> np.ndarray:
    """Spread by chance over a square that lies askew in space."""
    flat = np.random.default_rng(seed).uniform(-0.5, 0.5, (count, 2))
    return (flat @ np.array([[0.8, 0.0, 0.6], [0.0, 1.0, 0.0]])).astype(np.float32)


def sphere(count: int) -> np.ndarray:
    """Spread evenly along a spiral."""
    height = 1 - (2 * np.arange(count) + 1) / count
    angle = np.pi * (1 + np.sqrt(5)) * np.arange(count)
    across = np.sqrt(1 - height**2)
    return np.stack([across * np.cos(angle), height, across * np.sin(angle)], axis=1).astype(np.float32)


def fans(surface: CloudSurface, num_points: int) -> np.ndarray:
    """The triangles between points; others belong to spindles."""
    faces: np.ndarray = surface.mesh.faces[(surface.mesh.faces < num_points).all(axis=1)]
    return faces


def num_spindles(surface: CloudSurface, num_points: int) -> int:
    return (len(surface.mesh.vertices) - num_points) // 6


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_in_a_plane_fans_hold_the_delaunay_triangulation(seed: int) -> None:
    points = in_plane(700, seed)
    surface = surface_through(PointCloud(points), PIXEL)
    vertices = surface.mesh.vertices[:700]
    flat = vertices[:, :2].astype(np.float64) / [0.8, 1]
    found = {tuple(face) for face in fans(surface, 700)}
    middles = flat[(exact := np.sort(Delaunay(flat).simplices, axis=1))].mean(axis=1)
    inside = exact[(np.abs(middles) < 0.4).all(axis=1)]  # beside the rim, triangles are too large to be surface
    assert len(inside) > 500
    assert [face for face in map(tuple, inside) if face not in found] == []


def test_a_sphere_is_closed_and_goes_through_the_points() -> None:
    points = sphere(500)
    surface = surface_through(PointCloud(points), PIXEL)
    assert num_spindles(surface, 500) == 0
    assert np.array_equal(np.unique(surface.mesh.vertices, axis=0), np.unique(points, axis=0))
    directions = np.random.default_rng(0).normal(size=(3000, 3))
    # from the middle, a direction that is a sum of a face's corners with no negative weight passes through the face
    to_weights = np.linalg.inv(surface.mesh.vertices[surface.mesh.faces].astype(np.float64))
    weights = np.einsum("dc,mck->dmk", directions, to_weights)
    assert (weights.min(axis=2).max(axis=1) > -1e-6).all()


def test_normals_of_a_face_point_to_one_side_and_are_those_of_the_surface() -> None:
    surface = surface_through(PointCloud(sphere(500)), PIXEL)
    first, second, third = surface.corner_normals.transpose(1, 0, 2)
    assert ((first * second).sum(axis=1) > 0).all() and ((first * third).sum(axis=1) > 0).all()
    corners = surface.mesh.vertices[surface.mesh.faces]
    assert np.abs((surface.corner_normals * corners).sum(axis=2)).min() > 0.99


def test_normals_of_the_cloud_hold_except_where_they_have_no_length() -> None:
    points, tilted = sphere(300), np.roll(sphere(300), 1, axis=1) * np.float32(3)
    tilted[points[:, 1] > 0.5] = 0
    surface = surface_through(PointCloud(points, tilted), PIXEL)
    corners = surface.mesh.vertices[surface.mesh.faces]
    has_own = corners[..., 1] <= 0.5
    own = np.roll(corners, 1, axis=2)
    assert np.abs((surface.corner_normals * own).sum(axis=2))[has_own].min() > 0.999
    assert np.abs((surface.corner_normals * corners).sum(axis=2))[~has_own].min() > 0.99


def test_what_lies_well_apart_stays_apart() -> None:
    tree = cKDTree(points := in_plane(400))
    spacing = float(np.median(tree.query(points, k=6)[0][:, 5]))
    apart = np.concatenate([points, points + np.float32([0, 1 + 5 * spacing, 0])])
    surface = surface_through(PointCloud(apart), PIXEL)
    right = surface.mesh.vertices[fans(surface, 800)][..., 1] > 0.5 + 2 * spacing
    assert (right.all(axis=1) | ~right.any(axis=1)).all()


def test_both_sides_of_a_plate_are_tied_to_themselves() -> None:
    sheet = in_plane(600)
    plate = np.concatenate([sheet, in_plane(600, seed=1) + np.float32([-0.6, 0, 0.8]) * np.float32(0.2)])
    surface = surface_through(PointCloud(plate), PIXEL)
    above = (surface.mesh.vertices @ np.float32([-0.6, 0, 0.8]) > 0.1)[fans(surface, 1200)]
    assert (above.all(axis=1) | ~above.any(axis=1)).mean() > 0.999


def test_a_stray_point_is_a_dot() -> None:
    points = np.concatenate([sphere(400) * np.float32(0.5), np.float32([[0, 0, 0.95]])])
    surface = surface_through(PointCloud(points), PIXEL)
    assert num_spindles(surface, 401) == 1
    corners = surface.mesh.vertices[401:]
    lengths = np.linalg.norm(corners - points[-1], axis=1)
    assert lengths == pytest.approx(np.full(6, lengths[0]), rel=1e-5)
    assert PIXEL < lengths[0] < 0.05


def test_a_rod_is_as_thick_as_its_points_say() -> None:
    angle = np.random.default_rng(0).uniform(0, 2 * np.pi, 150)
    along = np.linspace(-0.8, 0.8, 150)
    rod = np.column_stack([0.01 * np.cos(angle), 0.01 * np.sin(angle), along]).astype(np.float32)
    surface = surface_through(PointCloud(rod), PIXEL / 10)
    assert num_spindles(surface, 150) > 140
    radii = np.linalg.norm(surface.mesh.vertices[:, :2], axis=1)
    assert 0.008 < np.quantile(radii, 0.75) < 0.012
    assert radii.max() < 0.03


def test_colours_go_with_their_points() -> None:
    points = np.concatenate([sphere(300) * np.float32(0.5), np.float32([[0, 0, 0.95]])])
    colours = np.column_stack([np.arange(301) % 250, np.arange(301) // 250, np.full(301, 7)]).astype(np.uint8)
    mesh = surface_through(PointCloud(points, colours=colours), PIXEL).mesh
    assert mesh.vertex_colours is not None
    _, point_of_vertex = cKDTree(points).query(mesh.vertices)
    assert np.array_equal(mesh.vertex_colours, colours[point_of_vertex])


def test_the_order_of_the_points_changes_nothing() -> None:
    points = np.asarray(trimesh.creation.torus(0.7, 0.25).vertices, np.float32)  # many of them equally far apart
    points = np.concatenate([points, points[:20]])
    order = np.random.default_rng(0).permutation(len(points))
    straight, permuted = (surface_through(PointCloud(cloud), PIXEL) for cloud in (points, points[order]))
    assert np.array_equal(straight.mesh.vertices, permuted.mesh.vertices)
    assert np.array_equal(straight.mesh.faces, permuted.mesh.faces)
    assert np.array_equal(straight.corner_normals, permuted.corner_normals)
