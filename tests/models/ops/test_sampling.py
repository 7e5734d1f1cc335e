"""Tests of models/ops/sampling.py, in the tiers that need no GPU; the Triton kernels' are in test_triton_kernels.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.ops import tiers
from models.ops.sampling import farthest_points
from tests.models.ops import oracles

CLOUDS = oracles.clouds()
TIERS: tuple[tiers.Setting, ...] = ("reference", "cpu")


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", CLOUDS)
def test_samples_are_the_oracles(tier: tiers.Setting, name: str) -> None:
    points = CLOUDS[name]
    num_points = points.shape[1]
    start = torch.randint(0, num_points, (len(points),), generator=torch.Generator().manual_seed(1))
    for num_samples in {1, (num_points + 1) // 2, num_points}:
        for origin_last in (False, True):
            with tiers.use(tier):
                chosen = farthest_points(points, num_samples, start, origin_last=origin_last)
            assert torch.equal(chosen, oracles.farthest_points(points, num_samples, start, origin_last))


@pytest.mark.parametrize("tier", TIERS)
@given(num_clouds=st.integers(1, 4), coordinates=st.lists(st.integers(-2, 2), min_size=3, max_size=60), data=st.data())
@settings(max_examples=40, deadline=None)
def test_ties_go_to_the_lowest_index(
    tier: tiers.Setting, num_clouds: int, coordinates: list[int], data: st.DataObject
) -> None:
    num_points = len(coordinates) // 3
    points = torch.tensor(coordinates[: 3 * num_points]).view(1, -1, 3).float().repeat(num_clouds, 1, 1)
    num_samples, start = data.draw(st.integers(1, num_points)), data.draw(st.integers(0, num_points - 1))
    with tiers.use(tier):
        chosen = farthest_points(points, num_samples, start)
    expected = oracles.farthest_points(points, num_samples, torch.full((num_clouds,), start))
    assert torch.equal(chosen, expected)


@pytest.mark.parametrize("tier", TIERS)
def test_points_at_the_origin_come_last_where_asked_as_in_the_papers_kernels(tier: tiers.Setting) -> None:
    """Those whose squared norm is at most 1e-3, by their index, and each once."""
    limit = torch.tensor(1e-3)  # as float32 a little more than 1e-3
    just_below = torch.nextafter(limit, torch.tensor(0.0)).sqrt().item()
    points = torch.tensor([[0.0, 0, 0], [0.5, 0, 0], [0, just_below, 0], [0, 0, 0.0317], [0.01, 0, 0], [-0.5, 0, 0]])[
        None
    ]
    assert float(points[0, 2].square().sum().double()) <= 1e-3
    with tiers.use(tier):
        assert farthest_points(points, 6, 1).tolist() == [[1, 5, 3, 2, 4, 0]]
        assert farthest_points(points, 6, 1, origin_last=True).tolist() == [[1, 5, 3, 0, 2, 4]]
        assert farthest_points(points, 3, 0, origin_last=True).tolist() == [[0, 1, 5]]  # the start is honoured


@pytest.mark.parametrize("tier", TIERS)
def test_every_point_is_chosen_once_even_among_copies(tier: tiers.Setting) -> None:
    points = torch.ones(2, 7, 3)
    with tiers.use(tier):
        assert farthest_points(points, 7, 3).tolist() == [[3, 0, 1, 2, 4, 5, 6]] * 2


def test_the_first_samples_are_those_of_a_shorter_run() -> None:
    points = CLOUDS["random"]
    assert torch.equal(farthest_points(points, 100)[:, :10], farthest_points(points, 10))


def test_neither_moving_nor_enlarging_a_cloud_changes_its_samples() -> None:
    points = torch.randint(-50, 50, (2, 100, 3), generator=torch.Generator().manual_seed(3)).float()
    expected = farthest_points(points, 30)
    assert torch.equal(farthest_points(points + 64, 30), expected)
    assert torch.equal(farthest_points(points * 8, 30), expected)


def test_clouds_do_not_depend_on_their_batch_nor_on_the_number_of_threads() -> None:
    points = CLOUDS["random"]
    together = farthest_points(points, 20)
    assert torch.equal(torch.cat([farthest_points(cloud[None], 20) for cloud in points]), together)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(farthest_points(points, 20), together)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_sampled_as_their_float32(dtype: torch.dtype) -> None:
    points = CLOUDS["random"].to(dtype)
    assert torch.equal(farthest_points(points, 20), farthest_points(points.float(), 20))
