"""Tests of trainer/augment.py."""

import zlib

import pytest
import torch

from datastore.errors import DoNotRetry
from trainer.augment import (
    distort,
    drop_out_points,
    in_random_order,
    jitter,
    normal,
    rotate_about_y,
    scale,
    scale_and_shift,
    shift_by_extent,
    some_points,
    uniform,
)

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


def test_normal_numbers_have_mean_zero_deviation_one_and_an_end() -> None:
    random = normal(torch.arange(1000), 200, "test")
    assert abs(random.mean()) < 0.01 and abs(random.std() - 1) < 0.01
    assert abs((random.abs() < 1).float().mean() - 0.6827) < 0.005
    assert random.abs().max() < 5.5 and random.isfinite().all()


def test_points_come_in_an_order_that_belongs_to_the_sample() -> None:
    points = torch.arange(40.0)[None, :, None].expand(6, 40, 3).contiguous()
    ordered = in_random_order(points, SEEDS, "order")[..., 0]
    assert torch.equal(ordered.sort(dim=1).values, points[..., 0])
    assert len({tuple(row) for row in ordered.tolist()}) == 6
    assert torch.equal(in_random_order(points[[4, 1]], SEEDS[[4, 1]], "order")[..., 0], ordered[[4, 1]])
    rows = in_random_order(clouds(), SEEDS, "order")
    assert torch.equal(rows[0].sort(dim=0).values, clouds()[0].sort(dim=0).values)


def test_a_cloud_is_scaled_by_one_number() -> None:
    factors = scale(clouds(2000), torch.arange(2000), (0.5, 2.0), "test") / clouds(2000)
    torch.testing.assert_close(factors, factors[:, :1, :1].expand_as(factors), rtol=1e-5, atol=0)
    assert 0.5 <= factors.min() < 0.51 and 1.99 < factors.max() <= 2.0 + 1e-5


def test_a_turn_about_the_vertical_axis_keeps_heights_and_distances_to_it() -> None:
    points, seeds = clouds(2000), torch.arange(2000)
    turned = rotate_about_y(points, seeds, "test")
    assert torch.equal(turned[..., 1], points[..., 1])
    torch.testing.assert_close(turned[..., ::2].norm(dim=2), points[..., ::2].norm(dim=2))
    torch.testing.assert_close(torch.cdist(turned, turned), torch.cdist(points, points), atol=1e-3, rtol=1e-3)
    ahead = torch.tensor([0.0, 0.0, 1.0]).expand(2000, 1, 3)
    x, _, z = rotate_about_y(ahead, seeds, "test")[:, 0].T
    angles = torch.atan2(x, z) % (2 * torch.pi)  # right-handed: z turns towards x
    torch.testing.assert_close(angles, 2 * torch.pi * uniform(seeds, 1, "test")[:, 0], atol=1e-5, rtol=1e-5)


def test_shifts_are_shares_of_each_axis_extent() -> None:
    points = clouds(2000) * torch.tensor([1.0, 10.0, 0.1])
    moved = shift_by_extent(points, torch.arange(2000), 0.5, "test") - points
    torch.testing.assert_close(moved, moved[:, :1].expand_as(moved), rtol=1e-2, atol=1e-5)
    shares = moved[:, 0] / (points.amax(dim=1) - points.amin(dim=1))
    assert ((shares.amin(dim=0) > -0.501) & (shares.amin(dim=0) < -0.49)).all()
    assert ((shares.amax(dim=0) > 0.49) & (shares.amax(dim=0) < 0.501)).all()


def test_jitter_is_normal_and_cut_at_the_limit() -> None:
    moved = jitter(torch.zeros(500, 100, 3), torch.arange(500), 0.01, 0.02, "test")
    assert moved.abs().max() == torch.tensor(0.02)
    assert abs((moved.abs() < 0.01).float().mean() - 0.6827) < 0.005
    assert abs((moved.abs() == moved.abs().max()).float().mean() - 0.0455) < 0.003


def test_dropped_points_become_the_first_one() -> None:
    points = clouds(400, 200)
    dropped = drop_out_points(points, torch.arange(400), 0.875, "test")
    replaced = (dropped != points).any(dim=2)
    assert torch.equal(dropped[replaced], points[:, :1].expand_as(points)[replaced]) and not replaced[:, 0].any()
    ratios = replaced.float().mean(dim=1)
    assert ratios.min() < 0.02 and 0.8 < ratios.max() < 0.96 and abs(ratios.mean() - 0.4375) < 0.04


def test_a_distortion_is_smooth_and_of_the_size_asked_for() -> None:
    points = clouds(300, 50)
    near = points + 1e-3
    moved = distort(points, torch.arange(300), 0.1, "test") - points
    assert 0.02 < moved.std() < 0.1
    assert (distort(near, torch.arange(300), 0.1, "test") - near - moved).abs().max() < 1e-3
    assert torch.equal(distort(points, torch.arange(300), 0.0, "test"), points)
    assert distort(torch.ones(2, 5, 3), torch.arange(2), 0.1, "test").isfinite().all()


AUGMENTATIONS = {
    "scale": lambda points, seeds, purpose: scale(points, seeds, (0.5, 2.0), purpose),
    "rotate": rotate_about_y,
    "shift": lambda points, seeds, purpose: shift_by_extent(points, seeds, 0.5, purpose),
    "jitter": lambda points, seeds, purpose: jitter(points, seeds, 0.01, 0.05, purpose),
    "drop out": lambda points, seeds, purpose: drop_out_points(points, seeds, 0.875, purpose),
    "distort": lambda points, seeds, purpose: distort(points, seeds, 0.1, purpose),
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_augmentation_belongs_to_sample_and_purpose_and_leaves_its_input_alone(name: str) -> None:
    augment, points = AUGMENTATIONS[name], clouds(6, 100)
    before = points.clone()
    together = augment(points, SEEDS, "one")
    assert torch.equal(points, before) and together.shape == points.shape and together.dtype == torch.float32
    order = [5, 2, 0]
    assert torch.equal(augment(points[order], SEEDS[order], "one"), together[order])
    assert not torch.equal(augment(points, SEEDS, "two"), together)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment(points, SEEDS, "one"), together)


@pytest.mark.gpu
def test_a_gpu_draws_the_same_numbers() -> None:
    assert torch.equal(uniform(SEEDS.cuda(), 9, "masks").cpu(), uniform(SEEDS, 9, "masks"))


def test_each_visit_takes_a_fresh_subset_that_belongs_to_the_seed() -> None:
    seeds = torch.tensor([3, 4, 3])
    chosen = some_points(seeds, 100, 40)
    assert all(len(set(row.tolist())) == 40 for row in chosen)
    assert torch.equal(chosen[0], chosen[2]) and not torch.equal(chosen[0], chosen[1])
    assert torch.equal(some_points(seeds[1:2], 100, 40), chosen[1:2])
    firsts = some_points(torch.arange(2000), 10, 1)
    assert torch.bincount(firsts.flatten(), minlength=10).min() > 140
    with pytest.raises(DoNotRetry, match=r"objective\.num_points is 40"):
        some_points(seeds, 32, 40)
