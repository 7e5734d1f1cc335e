"""What rays say of a shape, against geometry that can be written down."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import trimesh

from datastore.cameras import RIG_NAMES, CameraRig, camera_frames, pixel_rays, rig_by_name
from datastore.errors import DoNotRetry
from datastore.mesh import Mesh
from datastore.render import BACKGROUND, NEUTRAL_GREY, colours_at, decode_depth, encode_depth, render, smooth_images
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
    assert (rendering.views[rendering.depth > 0] < BACKGROUND).any(axis=-1).all()


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


@pytest.mark.parametrize("rig_name", ["azimuth12", "axes3"])
def test_only_pixels_beside_an_outline_show_a_surface_that_their_middle_misses(rig_name: str) -> None:
    rig = rig_by_name(rig_name, image_size=64)
    mesh = mesh_of(trimesh.creation.torus(0.7, 0.25))
    samples = samples_on(mesh, 4)
    rendering = render(mesh, samples.points, samples.normals, rig)
    hit, shown = rendering.depth > 0, (rendering.views < BACKGROUND).any(axis=-1)
    beside = hit.copy()
    beside[:, 1:] |= hit[:, :-1]
    beside[:, :-1] |= hit[:, 1:]
    beside[:, :, 1:] |= hit[:, :, :-1]
    beside[:, :, :-1] |= hit[:, :, 1:]
    assert shown[hit].all()
    assert not shown[~beside].any()
    assert (shown & ~hit).sum() > 20 * rig.num_views


def test_an_outline_is_as_dark_as_the_share_of_the_pixel_that_it_covers() -> None:
    rig = CameraRig(name="front", azimuths=(0.0,), elevations=(0.0,), projection="orthographic", image_size=65)
    shares = []
    for shift in np.linspace(0, 0.1, 40):
        corners = square(0.0, 0.5)
        sheet = replace(corners, vertices=corners.vertices + np.float32([shift, 0, 0]))
        view = (
            render(sheet, np.zeros((1, 3), np.float32), np.float32([[0, 0, 1]]), rig).views[0, 32, :, 0].astype(float)
        )
        covered = (BACKGROUND - view) / (BACKGROUND - view[32])
        assert covered.sum() == pytest.approx(rig.focal_length / rig.distance, abs=0.5)
        shares += covered[(covered > 0.01) & (covered < 0.99)].tolist()
    assert np.unique(np.rint(4 * np.array(shares))).tolist() == [1, 2, 3], "quarters of a pixel, all of them"
    assert np.allclose(4 * np.array(shares), np.rint(4 * np.array(shares)), atol=0.05)


def textured_square(texture: np.ndarray) -> Mesh:
    """A square that shows the texture once, as it lies, to a camera in front."""
    uv = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)
    return replace(
        square(0.0, 0.5), textures=(texture,), face_textures=np.zeros(2, np.int16), vertex_uv=uv, face_colours=None
    )


def test_a_textures_first_row_is_on_top_and_its_texels_lie_where_their_middles_are() -> None:
    texture = np.random.default_rng(0).integers(0, 255, (4, 6, 3)).astype(np.uint8)
    mesh = textured_square(texture)
    for row in range(4):
        for column in range(6):
            u, v = (column + 0.5) / 6, 1 - (row + 0.5) / 4
            # on the face of corners 0, 1, 2: uv = (b1 + b2, b2); on that of 0, 2, 3: uv = (b1, b1 + b2)
            face, weights = (0, (1 - u, u - v, v)) if u >= v else (1, (1 - v, u, v - u))
            colour = colours_at(mesh, np.array([face]), np.array([weights], np.float32))[0]
            assert np.abs(colour - texture[row, column]).max() < 0.01


def test_between_texels_a_texture_is_blended_and_beyond_its_edge_it_repeats() -> None:
    texture = np.array([[[0, 0, 0], [200, 100, 40]]], np.uint8)
    mesh = textured_square(texture)
    first_corner = np.array([[1, 0, 0]], np.float32)
    for u, expected in ((0.5, 0.5), (0.25, 0), (0.75, 1), (1.0, 0.5), (-0.25, 1), (7.375, 0.25), (-1e9, 0.5)):
        shifted = replace(mesh, vertex_uv=np.tile(np.float32([u, 0.3]), (4, 1)))
        colour = colours_at(shifted, np.array([0]), first_corner)[0]
        assert np.abs(colour - expected * texture[0, 1]).max() < 0.1, u


def test_faces_without_a_texture_keep_their_own_colour_and_broken_coordinates_do_no_harm() -> None:
    texture = np.full((2, 2, 3), 50, np.uint8)
    mesh = replace(textured_square(texture), face_textures=np.array([0, -1], np.int16))
    middle = np.full((2, 3), 1 / 3, np.float32)
    both = np.array([0, 1])
    assert np.allclose(colours_at(mesh, both, middle), [[50] * 3, [NEUTRAL_GREY] * 3])
    coloured = replace(mesh, vertex_colours=np.full((4, 3), 9, np.uint8))
    assert np.allclose(colours_at(coloured, both, middle), [[50] * 3, [9] * 3])
    broken = replace(mesh, vertex_uv=np.full((4, 2), np.nan, np.float32))
    assert np.allclose(colours_at(broken, both, middle), [[50] * 3, [NEUTRAL_GREY] * 3])


def test_a_texture_reaches_the_image_the_right_way_round() -> None:
    rig = CameraRig(name="front", azimuths=(0.0,), elevations=(0.0,), image_size=65)
    texture = np.zeros((2, 2, 3), np.uint8)
    texture[0, 0, 0] = texture[0, 1, 1] = texture[1, 0, 2] = 250  # red, green; blue, black
    view = render(textured_square(texture), np.zeros((1, 3), np.float32), np.float32([[0, 0, 1]]), rig).views[0]
    corner = rig.focal_length / rig.distance * 0.25
    low, high = round(32 - corner), round(32 + corner)
    assert view[low, low].argmax() == 0 and view[low, high].argmax() == 1 and view[high, low].argmax() == 2
    assert view[high, high].max() < 40


def test_a_texture_finer_than_the_pixels_is_seen_as_its_mean() -> None:
    rig = CameraRig(name="front", azimuths=(0.0,), elevations=(0.0,), image_size=33)
    board = np.indices((511, 512)).sum(axis=0) % 2 * 200
    texture = np.repeat(board[..., None], 3, axis=2).astype(np.uint8)
    view = render(textured_square(texture), np.zeros((1, 3), np.float32), np.float32([[0, 0, 1]]), rig).views[0]
    inside = view[12:21, 12:21].astype(int)
    assert np.ptp(inside) <= 2
    assert 80 < inside.mean() <= 107  # under the light that it faces


def test_normals_at_corners_make_a_coarse_ball_look_as_a_fine_one() -> None:
    rig = rig_by_name("angles?at=20/30,140/-40", 96)
    coarse, fine = (mesh_of(trimesh.creation.icosphere(subdivisions)) for subdivisions in (2, 5))
    samples = samples_on(coarse, 10)
    smooth, depth = smooth_images(coarse, coarse.vertices[coarse.faces], rig)
    flat, exact = (render(mesh, samples.points, samples.normals, rig) for mesh in (coarse, fine))
    assert np.array_equal(depth, flat.depth)
    both = (depth > 0) & (exact.depth > 0)
    apart, flat_apart = (np.abs(views.astype(int) - exact.views)[both].mean() for views in (smooth, flat.views))
    assert apart < 2 < 4 < flat_apart  # outlines stay coarse


@pytest.mark.parametrize("rig_name", ["angles?at=20/30", "axes3"])
def test_with_the_faces_own_normals_at_their_corners_nothing_changes(rig_name: str) -> None:
    rig, mesh = rig_by_name(rig_name, 64), box()
    first, second, third = mesh.vertices[mesh.faces].transpose(1, 0, 2)
    normals = np.repeat(np.cross(second - first, third - first)[:, None], 3, axis=1)
    samples = samples_on(mesh, 10)
    views, _ = smooth_images(mesh, normals, rig)
    assert np.abs(views.astype(int) - render(mesh, samples.points, samples.normals, rig).views).max() <= 1


def test_without_the_ray_caster_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "embreex.mesh_construction", None)
    samples = samples_on(box(), 4)
    with pytest.raises(DoNotRetry, match=r"pip install embreex.*Linux on x86-64, macOS on arm64 and Windows"):
        render(box(), samples.points, samples.normals, rig_by_name("simple6", image_size=8))


@pytest.mark.parametrize("name", ["azimuth12", "simple6", "axes3", "dodecahedron20"])
def test_a_flat_shape_is_rendered_from_its_side_too(name: str) -> None:
    corners = np.float32([[-0.5, -0.5, 0], [0.5, -0.5, 0], [0.5, 0.5, 0], [-0.5, 0.5, 0]])
    for axes in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        quad = Mesh(np.ascontiguousarray(corners[:, axes]), np.int32([[0, 1, 2], [0, 2, 3]]))
        normals = np.roll(np.float32([[0, 0, 1]]), axes.index(2) - 2, axis=1)
        rendering = render(quad, np.zeros((1, 3), np.float32), normals, rig_by_name(name, 24))
        assert (rendering.depth > 0).any()
        assert (rendering.views[rendering.depth > 0] < BACKGROUND).any()
