"""Tests of trainer/augment.py."""

import zlib

import pytest
import torch

from trainer.augment import scale_and_shift, uniform

SEEDS = torch.tensor([0, 1, -1, 2**62 + 12345, -(2**63), 42])
WORD = 2**64 - 1


def finalise(state: int) -> int:
    """splitmix64 as published, on whole numbers without a sign."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & WORD
    return state ^ (state >> 31)


def slow_uniform(seed: int, count: int, purpose: str) -> list[float]:
    key = finalise((seed & WORD) ^ finalise(zlib.crc32(purpose.encode())))
    return [(finalise(key + i * 0x9E3779B97F4A7C15 & WORD) >> 40) / 2**24 for i in range(1, count + 1)]


def clouds(b: int = 6, n: int = 10) -> torch.Tensor:
    return torch.randn(b, n, 3, generator=torch.Generator().manual_seed(0))


def test_random_numbers_are_those_of_a_loop_over_seeds_and_counters() -> None:
    expected = torch.tensor([slow_uniform(seed, 9, "masks") for seed in SEEDS.tolist()])
    assert torch.equal(uniform(SEEDS, 9, "masks"), expected)


def test_random_numbers_fill_the_interval_evenly_even_for_neighbouring_seeds() -> None:
    random = uniform(torch.arange(2000), 50, "test")
    assert random.min() >= 0 and random.max() < 1
    counts = torch.histc(random, 20, 0, 1)
    assert ((counts - 5000).abs() < 5 * 5000**0.5).all()
    for other in (random[1:, 0], random[:-1, 1]):  # the next seed, the next counter
        assert abs(torch.corrcoef(torch.stack([random[:-1, 0], other]))[0, 1]) < 0.1


def test_another_purpose_gives_other_numbers() -> None:
    assert not torch.isclose(uniform(SEEDS, 4, "scale"), uniform(SEEDS, 4, "shift")).any()


def test_more_numbers_begin_with_the_same_ones() -> None:
    assert torch.equal(uniform(SEEDS, 9, "masks")[:, :4], uniform(SEEDS, 4, "masks"))


def test_a_sample_is_augmented_alike_in_any_batch() -> None:
    points = clouds()
    together = scale_and_shift(points, SEEDS, (2 / 3, 3 / 2), 0.2)
    order = [5, 2, 0]
    assert torch.equal(scale_and_shift(points[order], SEEDS[order], (2 / 3, 3 / 2), 0.2), together[order])


def test_each_axis_of_a_cloud_has_one_scale_and_one_shift() -> None:
    points = clouds()
    augmented = scale_and_shift(points, SEEDS, (2 / 3, 3 / 2), 0.2)
    scale = (augmented[:, 1] - augmented[:, 0]) / (points[:, 1] - points[:, 0])
    shift = augmented[:, 0] - scale * points[:, 0]
    torch.testing.assert_close(augmented, points * scale[:, None] + shift[:, None], rtol=1e-4, atol=1e-5)
    assert scale.flatten().unique().numel() == scale.numel() and shift.flatten().unique().numel() == shift.numel()


def test_scales_and_shifts_fill_their_ranges() -> None:
    corners = torch.tensor([[0.0, 0, 0], [1, 1, 1]]).expand(5000, 2, 3)
    augmented = scale_and_shift(corners, torch.arange(5000), (2 / 3, 3 / 2), 0.2)
    shift, scale = augmented[:, 0], augmented[:, 1] - augmented[:, 0]
    for values, low, high in ((shift, -0.2, 0.2), (scale, 2 / 3, 3 / 2)):
        assert low - 1e-6 <= values.min() < low + 0.01 and high - 0.01 < values.max() <= high + 1e-6
        torch.testing.assert_close(values.mean(dim=0), torch.full((3,), (low + high) / 2), atol=0.02, rtol=0)


def test_points_stay_float32_and_seeds_can_leave_them_as_they_are() -> None:
    points = clouds()
    augmented = scale_and_shift(points, SEEDS, (1.0, 1.0), 0.0)
    assert augmented.dtype == torch.float32 and torch.equal(augmented, points)


@pytest.mark.gpu
def test_a_gpu_draws_the_same_numbers() -> None:
    assert torch.equal(uniform(SEEDS.cuda(), 9, "masks").cpu(), uniform(SEEDS, 9, "masks"))
