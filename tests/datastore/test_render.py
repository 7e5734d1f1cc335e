"""What rays say of a shape, against geometry that can be written down."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import trimesh

from datastore.cameras import RIG_NAMES, CameraRig, camera_frames, pixel_rays, rig_by_name
from datastore.errors import DoNotRetry
from datastore.mesh import Mesh
from datastore.render import BACKGROUND, NEUTRAL_GREY, decode_depth, encode_depth, face_normals, render
from datastore.sample import SurfaceSamples, sample_surface

RIGS = [*RIG_NAMES, "ring?views=5&elevations=20&distance=2", "angles?at=10/35,70/-80&projection=orthographic"]
HALF = 0.5  # of the box's sides


def mesh_of(shape: trimesh.Trimesh) -> Mesh:
    return Mesh(np.asarray(shape.vertices, np.float32), np.asarray(shape.faces, np.int32))


def box() -> Mesh:
    return mesh_of(trimesh.creation.box(extents=[2 * HALF] * 3))


def turned_inside_out(mesh: Mesh) -> Mesh:
    return replace(mesh, faces=np.ascontiguousarray(mesh.faces[:, ::-1]))


def square(z: float, half: float) -> Mesh:
    """A sheet without thickness that faces +Z."""
    corners = np.array([[-half, -half, z], [half, -half, z], [half, half, z], [-half, half, z]], np.float32)
    return Mesh(corners, np.array([[0, 1, 2], [0, 2, 3]], np.int32))


def together(*meshes: Mesh) -> Mesh:
    starts = np.cumsum([0, *(len(mesh.vertices) for mesh in meshes)])
    return Mesh(
        np.concatenate([mesh.vertices for mesh in meshes]),
        np.concatenate([mesh.faces + start for mesh, start in zip(meshes, starts, strict=False)]).astype(np.int32),
    )


def samples_on(mesh: Mesh, count: int = 4000) -> SurfaceSamples:
    return sample_surface(mesh.vertices, mesh.faces, count, seed=7)


def visibility(mesh: Mesh, samples: SurfaceSamples, rig: CameraRig) -> np.ndarray:
    return render(mesh, samples.points, samples.normals, rig).visibility


def faces_camera(samples: SurfaceSamples, rig: CameraRig) -> np.ndarray:
    """For a convex shape: exactly the points whose outward normal has the camera on its side are seen."""
    positions, _ = camera_frames(rig)
    points = samples.points[:, None].astype(np.float64)
    towards = positions[None] - (points if rig.projection == "perspective" else np.zeros_like(points))
    return np.einsum("pvc,pc->pv", towards, samples.normals.astype(np.float64)) > 1e-6 * rig.distance


@pytest.mark.parametrize("rig_name", RIGS)
def test_visibility_of_a_box_is_right_to_the_last_point(rig_name: str) -> None:
    rig = rig_by_name(rig_name, image_size=8)
    mesh = box()
    samples = samples_on(mesh)
    assert np.array_equal(visibility(mesh, samples, rig), faces_camera(samples, rig))


@pytest.mark.parametrize("rig_name", RIGS)
def test_visibility_of_a_polyhedral_sphere_is_right_to_the_last_point(rig_name: str) -> None:
    rig = rig_by_name(rig_name, image_size=8)
    mesh = mesh_of(trimesh.creation.icosphere(4))
    samples = samples_on(mesh)
    assert np.array_equal(visibility(mesh, samples, rig), faces_camera(samples, rig))


def test_visibility_of_a_sphere_agrees_with_its_formula_beyond_the_facets_at_its_rim() -> None:
    rig = rig_by_name("azimuth12", image_size=8)
    mesh = mesh_of(trimesh.creation.icosphere(4))
    samples = samples_on(mesh)
    directions = samples.points / np.linalg.norm(samples.points, axis=1, keepdims=True)
    # a point of the unit sphere is seen from c exactly if p . c > 1
    above_rim = directions @ camera_frames(rig)[0].T - 1
    clear = np.abs(above_rim) > 0.15  # a facet spans 4.6 degrees, times the camera's distance
    assert clear.mean() > 0.9
    assert np.array_equal(visibility(mesh, samples, rig)[clear], above_rim[clear] > 0)


def test_a_square_hides_exactly_the_points_whose_sight_line_crosses_it() -> None:
    rig = CameraRig(name="front", azimuths=(0.0, 20.0), elevations=(0.0, 10.0), image_size=8)
    wall, behind = square(0.3, 0.2), square(-0.3, 0.6)
    samples = samples_on(behind)
    seen = visibility(together(wall, behind), samples, rig)
    positions, _ = camera_frames(rig)
    points = samples.points[:, None].astype(np.float64)
    share = (0.3 - points[..., 2]) / (positions[:, 2] - points[..., 2])
    crossing = points + share[..., None] * (positions - points)
    from_edge = np.abs(crossing[..., :2]).max(axis=-1) - 0.2
    clear = np.abs(from_edge) > 1e-5
    assert clear.mean() > 0.999
    assert np.array_equal(seen[clear], from_edge[clear] > 0)
    assert 0.05 < seen.mean() < 0.95


def test_a_sheet_without_thickness_is_seen_from_both_sides() -> None:
    rig = CameraRig(name="both", azimuths=(0.0, 180.0), elevations=(0.0, 0.0), image_size=32)
    mesh = square(0.0, 0.5)
    samples = samples_on(mesh, 100)
    rendering = render(mesh, samples.points, samples.normals, rig)
    assert rendering.visibility.all()
    assert np.array_equal(rendering.depth[0] > 0, rendering.depth[1] > 0)
    assert (rendering.views[1] < BACKGROUND).any()


def test_two_faces_in_one_place_do_not_hide_each_other() -> None:
    rig = rig_by_name("simple6", image_size=8)
    mesh = box()
    doubled = together(mesh, turned_inside_out(mesh))
    samples = samples_on(mesh, 500)
    assert np.array_equal(visibility(doubled, samples, rig), faces_camera(samples, rig))


def test_the_order_of_a_faces_corners_changes_nothing() -> None:
    rig = rig_by_name("azimuth12", image_size=32)
    mesh = box()
    samples = samples_on(mesh, 300)
    inside_out = turned_inside_out(mesh)
    as_is = render(mesh, samples.points, samples.normals, rig)
    reversed_ = render(inside_out, samples.points, -samples.normals, rig)
    assert np.array_equal(as_is.visibility, reversed_.visibility)
    assert np.array_equal(as_is.depth, reversed_.depth)
    assert np.abs(as_is.views.astype(int) - reversed_.views).max() <= 1


def test_permuting_the_points_permutes_what_is_known_of_them() -> None:
    rig = rig_by_name("azimuth12", image_size=32)
    mesh = mesh_of(trimesh.creation.torus(0.7, 0.25))
    samples = samples_on(mesh, 500)
    order = np.random.default_rng(0).permutation(500)
    straight = render(mesh, samples.points, samples.normals, rig)
    permuted = render(mesh, samples.points[order], samples.normals[order], rig)
    assert np.array_equal(permuted.visibility, straight.visibility[order])
    assert np.array_equal(permuted.pixels, straight.pixels[order])
    assert np.array_equal(permuted.views, straight.views)


@pytest.mark.parametrize("rig_name", RIGS)
def test_depth_of_a_box_agrees_with_a_ray_by_ray_reference(rig_name: str) -> None:
    rig = rig_by_name(rig_name, image_size=24)
    samples = samples_on(box(), 10)
    rendering = render(box(), samples.points, samples.normals, rig)
    depth = decode_depth(rendering.depth, rig)
    for view in range(rig.num_views):
        origins, directions = pixel_rays(rig, view)
        forward = camera_frames(rig)[1][view, 2]
        for row in range(rig.image_size):
            for column in range(rig.image_size):
                expected, margin = box_depth(origins[row, column], directions[row, column].astype(np.float64), forward)
                if margin > 1e-5:  # a ray along an edge may go either way
                    assert depth[view, row, column] == pytest.approx(expected, abs=4e-5)
    assert np.array_equal(rendering.depth == 0, (rendering.views == BACKGROUND).all(axis=-1))


def box_depth(origin: np.ndarray, direction: np.ndarray, forward: np.ndarray) -> tuple[float, float]:
    """Depth at which a ray enters the box, infinity if it does not; and by what length it hits or misses."""
    with np.errstate(divide="ignore"):
        first, second = (-HALF - origin) / direction, (HALF - origin) / direction
    enter, leave = np.minimum(first, second).max(), np.maximum(first, second).min()
    depth = enter * direction @ forward if enter < leave else np.inf
    return float(depth), float(abs(leave - enter))


def test_depth_survives_the_store_to_half_a_step() -> None:
    rig = rig_by_name("azimuth12", image_size=8)
    near, far = rig.depth_range
    depth = np.append(np.linspace(near, far, 1000, dtype=np.float32), np.float32(np.inf))
    encoded = encode_depth(depth, rig)
    assert encoded[0] == 1
    assert encoded[-2] == 65535
    assert encoded[-1] == 0
    decoded = decode_depth(encoded, rig)
    assert np.abs(decoded[:-1] - depth[:-1]).max() <= 0.5001 * (far - near) / 65534 + 3e-7
    assert decoded[-1] == np.inf


def test_colours_of_faces_and_of_vertices_reach_the_image_and_grey_stands_in_for_none() -> None:
    rig = CameraRig(name="front", azimuths=(0.0,), elevations=(0.0,), image_size=33)
    sheet = square(0.0, 0.5)
    samples = samples_on(sheet, 4)

    def middle(mesh: Mesh) -> np.ndarray:
        return render(mesh, samples.points, samples.normals, rig).views[0, 16, 16].astype(int)

    light = middle(sheet) / NEUTRAL_GREY
    assert np.ptp(light) == 0
    assert 0.5 < light[0] <= 1
    red = np.array([[200, 40, 0]] * 2, np.uint8)
    assert np.abs(middle(replace(sheet, face_colours=red)) - light * red[0]).max() <= 1.5
    corners = np.array([[0, 0, 0], [100, 0, 0], [200, 200, 0], [100, 200, 240]], np.uint8)
    blended = middle(replace(sheet, vertex_colours=corners))
    assert np.abs(blended - light * [100, 100, 0]).max() <= 3  # the middle of the first face's diagonal edge


def test_light_never_leaves_the_range_of_a_colour() -> None:
    rig = rig_by_name("dodecahedron20", image_size=48)
    white = np.full((len(trimesh.creation.icosphere(3).faces), 3), 255, np.uint8)
    mesh = replace(mesh_of(trimesh.creation.icosphere(3)), face_colours=white)
    samples = samples_on(mesh, 4)
    shaded = render(mesh, samples.points, samples.normals, rig)
    inside = shaded.views[shaded.depth > 0]
    assert inside.min() > 80  # a wrapped byte would be dark
    assert inside.max() > 230


def test_a_visible_point_lies_at_the_depth_of_its_pixel() -> None:
    rig = rig_by_name("azimuth12", image_size=96)
    mesh = mesh_of(trimesh.creation.icosphere(5))
    samples = samples_on(mesh, 500)
    rendering = render(mesh, samples.points, samples.normals, rig)
    depth = decode_depth(rendering.depth, rig)
    for view, position in enumerate(camera_frames(rig)[0]):
        # away from the rim, where depth changes fast from pixel to pixel
        frontal = samples.points @ position / rig.distance > 0.6
        assert rendering.visibility[frontal, view].all()
        column, row = rendering.pixels[frontal, view].T
        own = rig.distance - samples.points[frontal] @ position / rig.distance
        assert np.abs(depth[view, row, column] - own).max() < 0.04


def test_normals_have_unit_length_except_where_there_is_no_face() -> None:
    mesh = replace(box(), faces=np.vstack([box().faces, [[0, 0, 1]]]).astype(np.int32))
    lengths = np.linalg.norm(face_normals(mesh), axis=1)
    assert np.allclose(lengths[:-1], 1)
    assert lengths[-1] == 0


def test_without_the_ray_caster_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "embreex.mesh_construction", None)
    samples = samples_on(box(), 4)
    with pytest.raises(DoNotRetry, match=r"pip install embreex.*Linux on x86-64, macOS on arm64 and Windows"):
        render(box(), samples.points, samples.normals, rig_by_name("simple6", image_size=8))
