"""Hidden-point removal against shapes whose visible side can be written down, and against sets without a solid hull."""

import numpy as np
import pytest

from datastore.cameras import CameraRig, camera_frames, rig_by_name
from datastore.hidden_points import visibility_of_points

FRONT = CameraRig(name="front", azimuths=(0.0,), elevations=(0.0,), image_size=8)
FRONT_ORTHOGRAPHIC = FRONT.model_copy(update={"projection": "orthographic"})
BOTH = pytest.mark.parametrize("rig", [FRONT, FRONT_ORTHOGRAPHIC], ids=["perspective", "orthographic"])


def sphere(count: int) -> np.ndarray:
    """Spread evenly along a spiral."""
    height = 1 - (2 * np.arange(count) + 1) / count
    angle = np.pi * (1 + np.sqrt(5)) * np.arange(count)
    across = np.sqrt(1 - height**2)
    return np.stack([across * np.cos(angle), height, across * np.sin(angle)], axis=1)


@pytest.mark.parametrize("rig_name", ["azimuth12", "axes3"])
def test_all_that_is_seen_of_a_sphere_is_found_and_little_more(rig_name: str) -> None:
    rig, points = rig_by_name(rig_name, 8), sphere(1024)
    positions, _ = camera_frames(rig)
    towards = positions[None] - (points[:, None] if rig.projection == "perspective" else 0)
    cosines = np.einsum("pvc,pc->pv", towards / np.linalg.norm(towards, axis=2, keepdims=True), points)
    seen = visibility_of_points(points, rig)
    assert seen[cosines > 0].all()
    assert (seen & (cosines <= 0)).mean(axis=0).max() < 0.06
    assert cosines[seen].min() > np.cos(np.radians(100))


@BOTH
def test_of_two_sheets_the_front_one_hides_the_rear_one(rig: CameraRig) -> None:
    across = np.random.default_rng(0).uniform(-0.5, 0.5, (512, 2))
    front, rear = (np.column_stack([across, np.full(512, z)]) for z in (0.5, -0.5))
    seen = visibility_of_points(np.concatenate([front, 0.9 * rear]), rig)[:, 0]
    assert seen[:512].all()
    assert not seen[512:].any()


@pytest.mark.parametrize("rig_name", ["azimuth12", "axes3"])
def test_permuting_the_points_permutes_their_visibility(rig_name: str) -> None:
    random = np.random.default_rng(1)
    points = random.uniform(-0.5, 0.5, (300, 3)).astype(np.float32)
    points[:40] = points[40:80]  # some of them twice
    order = random.permutation(300)
    rig = rig_by_name(rig_name, 8)
    assert np.array_equal(visibility_of_points(points[order], rig), visibility_of_points(points, rig)[order])


@BOTH
def test_points_in_one_place_are_seen_together(rig: CameraRig) -> None:
    assert visibility_of_points(np.full((5, 3), 0.3), rig).all()
    doubled = np.concatenate([sphere(200), sphere(200)])
    seen = visibility_of_points(doubled, rig)
    assert np.array_equal(seen[:200], seen[200:])
    assert 0.3 < seen.mean() < 0.7


@BOTH
@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_points_that_do_not_hide_each_other_are_all_seen(rig: CameraRig, count: int) -> None:
    points = np.array([[0.0, 0.0, 0.0], [0.5, 0.0, 0.3], [0.0, 0.5, -0.4]])[:count]
    assert visibility_of_points(points, rig).all()


@BOTH
def test_of_points_in_line_with_the_camera_the_nearest_is_seen(rig: CameraRig) -> None:
    points = np.column_stack([np.zeros(7), np.zeros(7), np.linspace(-0.9, 0.9, 7)])
    assert visibility_of_points(points, rig)[:, 0].tolist() == [False] * 6 + [True]


@BOTH
def test_a_line_across_the_view_is_seen_whole(rig: CameraRig) -> None:
    points = np.column_stack([np.linspace(-0.9, 0.9, 50), np.zeros(50), np.zeros(50)])
    assert visibility_of_points(points, rig).all()


@BOTH
def test_a_circle_in_a_plane_through_the_camera_is_seen_from_its_near_side(rig: CameraRig) -> None:
    angle = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    points = 0.9 * np.column_stack([np.sin(angle), np.zeros(90), np.cos(angle)])
    seen = visibility_of_points(points, rig)[:, 0]
    assert seen[points[:, 2] > 0.35].all()
    assert not seen[points[:, 2] < -0.2].any()


@BOTH
def test_a_flat_sheet_that_faces_the_camera_is_seen_whole(rig: CameraRig) -> None:
    grid = np.stack(np.meshgrid(np.linspace(-0.6, 0.6, 15), np.linspace(-0.6, 0.6, 15), [0.1]), axis=-1).reshape(-1, 3)
    assert visibility_of_points(grid, rig).all()
