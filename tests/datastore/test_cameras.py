"""Camera rigs: where they stand, and where points fall, against a slow projection written out."""

import math
import re

import numpy as np
import pytest
from pydantic import ValidationError

from datastore.cameras import RIG_NAMES, CameraRig, camera_frames, pixel_rays, project, rig_by_name
from datastore.errors import AskedWrongly

WITH_PARAMETERS = [
    "azimuth12?distance=2.5&fov=50",
    "azimuth12?projection=orthographic",
    "ring?views=5&elevations=30,-20&distance=4",
    "angles?at=0/30,45/-10",
]
RIGS = pytest.mark.parametrize("name", [*RIG_NAMES, *WITH_PARAMETERS])


def ball_points(count: int) -> np.ndarray:
    random = np.random.default_rng(0)
    points = random.standard_normal((count, 3))
    points *= random.random((count, 1)) / np.linalg.norm(points, axis=1, keepdims=True)
    return points.astype(np.float32)


def slow_project(point: np.ndarray, rig: CameraRig, view: int) -> tuple[float, float, float]:
    """Column, row and depth, from a camera placed by its angles and turned by what "up" means."""
    azimuth, elevation = math.radians(rig.azimuths[view]), math.radians(rig.elevations[view])
    position = rig.distance * np.array(
        [math.cos(elevation) * math.sin(azimuth), math.sin(elevation), math.cos(elevation) * math.cos(azimuth)]
    )
    forward = -position / np.linalg.norm(position)
    right = np.cross(forward, [0.0, 1.0, 0.0])
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    offset = point.astype(np.float64) - position
    depth = float(offset @ forward)
    shown_at = depth if rig.projection == "perspective" else rig.distance
    half_width = math.tan(math.radians(rig.field_of_view / 2)) * shown_at  # of what the image shows at this depth
    column = (float(offset @ right) / half_width + 1) / 2 * rig.image_size - 0.5
    row = (float(offset @ down) / half_width + 1) / 2 * rig.image_size - 0.5
    return column, row, depth


@RIGS
def test_projection_agrees_with_the_formula_written_out(name: str) -> None:
    rig, points = rig_by_name(name, 224), ball_points(50)
    pixels, depth = project(points, rig)
    for view, elevation in enumerate(rig.elevations):
        if abs(elevation) == 90:
            continue  # the reference cannot tell which way is up from there
        for index, point in enumerate(points):
            column, row, expected_depth = slow_project(point, rig, view)
            assert pixels[index, view] == pytest.approx((column, row), abs=1e-4)
            assert depth[index, view] == pytest.approx(expected_depth, abs=1e-6)


@RIGS
def test_axes_are_a_right_handed_frame_that_looks_at_the_origin(name: str) -> None:
    rig = rig_by_name(name, 64)
    positions, rotations = camera_frames(rig)
    assert np.allclose(rotations @ rotations.transpose(0, 2, 1), np.eye(3), atol=1e-12)
    assert np.allclose(np.linalg.det(rotations), 1)
    assert np.allclose(positions + rig.distance * rotations[:, 2], 0, atol=1e-12)
    assert (rotations[:, 1, 1] <= 1e-12).all(), "down must not point up"


@RIGS
@pytest.mark.parametrize("image_size", [32, 224])
def test_the_whole_unit_ball_is_in_every_view(name: str, image_size: int) -> None:
    rig = rig_by_name(name, image_size)
    surface = ball_points(4000)
    surface /= np.linalg.norm(surface, axis=1, keepdims=True)
    pixels, depth = project(surface, rig)
    assert pixels.min() > 0 and pixels.max() < image_size - 1
    near, far = rig.depth_range
    assert near - 1e-6 <= depth.min() and depth.max() <= far + 1e-6


def test_the_first_camera_stands_on_plus_z_with_x_to_its_right() -> None:
    rig = rig_by_name("simple6", 101)
    pixels, depth = project(np.array([[0, 0, 0], [0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5]], np.float32), rig)
    centre, right, above, nearer = pixels[:, 0]
    assert np.allclose(centre, [50, 50], atol=1e-4)
    assert right[0] > 50 and right[1] == pytest.approx(50, abs=1e-4)
    assert above[1] < 50 and above[0] == pytest.approx(50, abs=1e-4)
    assert np.allclose(nearer, [50, 50], atol=1e-4) and depth[3, 0] < depth[0, 0]


def test_views_from_the_poles_keep_x_to_the_right() -> None:
    rig = rig_by_name("simple6", 101)
    pixels, _ = project(np.array([[0.5, 0, 0], [0, 0, 0.5]], np.float32), rig)
    from_top, from_below = 4, 5
    assert pixels[0, from_top, 0] > 50 and pixels[0, from_below, 0] > 50
    assert pixels[1, from_top, 1] > 50, "from above, what is towards +Z lies at the bottom of the image"
    assert pixels[1, from_below, 1] < 50


def test_rigs_have_the_views_that_their_names_promise() -> None:
    counts = {name: rig_by_name(name, 32).num_views for name in RIG_NAMES}
    assert counts == {"azimuth12": 12, "ring16": 16, "dodecahedron20": 20, "simple6": 6, "axes3": 3}
    azimuth12 = rig_by_name("azimuth12", 32)
    assert set(azimuth12.elevations) == {30.0} and np.allclose(np.diff(azimuth12.azimuths), 30)
    ring16 = rig_by_name("ring16", 32)
    assert ring16.elevations == (30.0,) * 8 + (-30.0,) * 8


def test_dodecahedron_cameras_are_its_corners() -> None:
    positions, _ = camera_frames(rig_by_name("dodecahedron20", 32))
    directions = positions / 3.0
    cosines = directions @ directions.T
    # every corner of a dodecahedron has three neighbours, at the arc whose cosine is sqrt(5) / 3
    assert (np.isclose(cosines, math.sqrt(5) / 3).sum(axis=1) == 3).all()
    assert np.allclose(np.sort(cosines, axis=1)[:, 0], -1), "each has one opposite"


@RIGS
def test_a_ray_through_a_points_pixel_passes_the_point(name: str) -> None:
    rig = rig_by_name(name, 401)  # so fine that rounding to a pixel turns a ray by a thousandth at most
    point = np.array([[0.3, -0.4, 0.2]], np.float32)
    pixels, _ = project(point, rig)
    for view in (0, rig.num_views - 1):
        column, row = np.rint(pixels[0, view]).astype(int)
        origins, directions = pixel_rays(rig, view)
        to_point = point[0] - origins[row, column]
        to_point /= np.linalg.norm(to_point)
        assert to_point @ directions[row, column] > 1 - 1e-6


@RIGS
def test_rays_start_in_the_plane_from_which_depth_is_counted(name: str) -> None:
    rig = rig_by_name(name, 16)
    positions, rotations = camera_frames(rig)
    for view in range(rig.num_views):
        origins, directions = pixel_rays(rig, view)
        assert origins.shape == directions.shape == (16, 16, 3)
        assert np.allclose((origins - positions[view]) @ rotations[view, 2], 0, atol=1e-12)
        assert np.allclose(np.linalg.norm(directions, axis=-1), 1, atol=1e-6)


def test_an_orthographic_camera_shows_near_and_far_alike() -> None:
    rig = rig_by_name("axes3", 101)
    pixels, depth = project(np.array([[0.9, 0.3, -0.2], [-0.9, 0.3, -0.2]], np.float32), rig)
    from_plus_x = 0
    assert np.array_equal(pixels[0, from_plus_x], pixels[1, from_plus_x])
    assert depth[:, from_plus_x] == pytest.approx([2.1, 3.9])


def test_the_three_axes_look_along_x_y_and_z() -> None:
    rotations = camera_frames(rig_by_name("axes3", 32))[1]
    assert np.allclose(rotations[:, 2], -np.eye(3), atol=1e-12)


def test_parameters_say_how_a_rig_differs_and_the_word_stays_its_name() -> None:
    word = "ring?views=8&elevations=30,-30&distance=2.5&fov=50"
    rig = rig_by_name(word, 64)
    assert rig.name == word
    assert rig.azimuths == rig_by_name("ring16", 64).azimuths
    assert rig.elevations == rig_by_name("ring16", 64).elevations
    assert (rig.distance, rig.field_of_view, rig.projection) == (2.5, 50.0, "perspective")
    angles = rig_by_name("angles?at=0/30,45/-10", 64)
    assert (angles.azimuths, angles.elevations) == ((0.0, 45.0), (30.0, -10.0))
    assert rig_by_name("simple6?projection=orthographic", 64).projection == "orthographic"
    assert rig_by_name("axes3?projection=perspective", 64).projection == "perspective"


def test_without_a_field_of_view_the_ball_keeps_its_margin_at_any_distance() -> None:
    images = [rig_by_name(f"axes3?distance={distance}&projection=perspective", 200) for distance in (2, 3, 10)]
    images += [rig_by_name(f"axes3?distance={distance}", 200) for distance in (2, 3, 10)]
    rim = [
        rig.focal_length / (math.sqrt(rig.distance**2 - 1) if rig.projection == "perspective" else rig.distance)
        for rig in images
    ]
    assert rim == pytest.approx([rim[1]] * 6)
    assert 0.9 < rim[0] / 100 < 0.98


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("ring", "lacks 'views'.*ring\\?views=8&elevations=30,-30"),
        ("angles", "lacks 'at'.*angles\\?at=0/30,45/-10"),
        ("azimuth12?", "no parameter ''.*distance, fov, projection"),
        ("azimuth12?views=4", "no parameter 'views'.*distance, fov, projection"),
        ("ring?views=4&dist=3", "no parameter 'dist'.*views, elevations, distance, fov, projection"),
        ("ring?views=4&views=5", "gives 'views' twice"),
        ("ring?views=none", "whole number above zero, not 'none'"),
        ("ring?views=0", "whole number above zero"),
        ("ring?views=4&elevations=30,high", "elevations takes numbers, and 'high' is none"),
        ("ring?views=4&elevations=", "'elevations' has no value"),
        ("ring?views=4&elevations=95", "between -90 and 90"),
        ("angles?at=30", "'30' is no azimuth/elevation"),
        ("angles?at=30/inf", "at takes numbers, and 'inf' is none"),
        ("azimuth12?distance=1.5", "distance 1.5 is too close.*2 or more"),
        ("azimuth12?distance=near", "distance takes numbers"),
        ("azimuth12?fov", "'fov' has no value"),
        ("azimuth12?fov=30", "cuts the unit ball off: 38.9 degrees or more"),
        ("axes3?fov=30", "cuts the unit ball off: 36.9 degrees or more"),
        ("azimuth12?fov=190", "field_of_view: .*less than 180"),
        ("azimuth12?projection=fisheye", "perspective or orthographic, not 'fisheye'"),
    ],
)
def test_each_mistake_in_a_rigs_word_says_what_is_wrong(word: str, message: str) -> None:
    with pytest.raises(AskedWrongly, match=f"Camera rig '{re.escape(word)}'.*{message}"):
        rig_by_name(word, 224)


def test_an_unknown_rig_lists_the_known_ones() -> None:
    with pytest.raises(AskedWrongly, match=r"no camera rig 'azimuth13'.*axes3, azimuth12, .*ring, ring16, simple6"):
        rig_by_name("azimuth13", 224)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distance": 1.5}, "greater than or equal to 2"),
        ({"field_of_view": 20.0}, "cuts the unit ball off"),
        ({"elevations": (0.0,)}, "12 azimuths but 1 elevations"),
        ({"elevations": (120.0,) * 12}, "between -90 and 90"),
        ({"azimuths": (math.nan,) * 12}, "finite"),
        ({"lens": "fisheye"}, "Extra inputs"),
    ],
)
def test_a_rig_that_cannot_show_the_shape_is_refused(changes: dict[str, object], message: str) -> None:
    facts = rig_by_name("azimuth12", 224).model_dump()
    with pytest.raises(ValidationError, match=message):
        CameraRig(**(facts | changes))
