"""Tests of models/ops/distances.py. Property 2 is that of PointCMT's specification, section 6, and 7 that of I2P-MAE's."""

import pytest
import torch
from torch import Tensor

from models.ops import tiers
from models.ops.distances import (
    chamfer_distance,
    earth_movers_distance,
    exact_assignment,
    match_by_auction,
    matched_distance,
)
from tests.models.ops import oracles

CLOUDS = oracles.clouds()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tier", ["reference", "cpu"])
@pytest.mark.parametrize("name", CLOUDS)
def test_chamfer_distances_are_the_least_of_all(tier: tiers.Setting, name: str) -> None:
    a = CLOUDS[name]
    b = a.flip(1)[:, : (a.shape[1] + 1) // 2] * 1.01
    with tiers.use(tier):
        found = chamfer_distance(a, b)
    squared = torch.from_numpy(oracles.squared_distances(a, b))
    for distances, expected in zip(found, (squared.amin(2), squared.amin(1)), strict=True):
        torch.testing.assert_close(distances, expected)


def test_chamfer_gradients_agree_with_finite_differences() -> None:
    a, b = (random(1, n, 3, seed=n).double().requires_grad_() for n in (3, 4))
    assert torch.autograd.gradcheck(chamfer_distance, (a, b))
    assert torch.autograd.gradcheck(lambda a, b: chamfer_distance(a, b, squared=False), (a, b))


def test_chamfer_gradients_are_those_of_the_full_matrix() -> None:
    a, b = (random(3, n, 3, seed=n).requires_grad_() for n in (90, 120))
    again_a, again_b = (each.detach().clone().requires_grad_() for each in (a, b))
    sum(each.mean() for each in chamfer_distance(a, b)).backward()  # type: ignore[union-attr]
    squared = (again_a[:, :, None] - again_b[:, None]).square().sum(-1)
    (squared.amin(2).mean() + squared.amin(1).mean()).backward()
    torch.testing.assert_close(a.grad, again_a.grad)
    torch.testing.assert_close(b.grad, again_b.grad)


def test_chamfer_is_zero_for_the_same_points_in_any_order_and_only_then() -> None:  # property 7
    a = random(4, 8, 3)
    permuted = a[:, torch.randperm(8, generator=torch.Generator().manual_seed(1))]
    assert not any(each.any() for each in chamfer_distance(a, permuted))
    moved = permuted.clone()
    moved[:, 0] += 0.5
    there, back = chamfer_distance(a, moved)
    assert there.sum() > 0 and back.sum() > 0 and (there >= 0).all() and (back >= 0).all()


def test_distances_do_not_change_when_both_clouds_move_and_grow_with_them() -> None:
    a, b = (
        torch.randint(-50, 50, (2, 60, 3), generator=torch.Generator().manual_seed(seed)).float() for seed in (1, 2)
    )
    there, back = chamfer_distance(a, b)
    matched = matched_distance(a, b, match_by_auction(a, b, epsilon=0.5))
    for one, other, factor in ((a + 64, b + 64, 1), (8 * a, 8 * b, 8)):
        for found, expected in zip(chamfer_distance(one, other), (there, back), strict=True):
            assert torch.equal(found, factor**2 * expected)
        again = matched_distance(one, other, match_by_auction(one, other, epsilon=0.5 * factor))
        torch.testing.assert_close(again, factor * matched)


def test_roots_of_chamfer_distances_have_finite_gradients_where_points_coincide() -> None:
    a = random(2, 20, 3).requires_grad_()
    there, back = chamfer_distance(a, a.detach().clone(), squared=False)
    (there.sum() + back.sum()).backward()
    assert a.grad is not None and not a.grad.any() and there.max() < 1e-5


def test_chamfer_pairs_are_found_in_float32_under_autocast() -> None:
    a, b = random(2, 50, 3) + 10, random(2, 60, 3, seed=1) + 10
    expected = chamfer_distance(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = chamfer_distance(a, b)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("num_points", [1, 2, 17, 256])
def test_an_auction_matches_one_to_one_and_nearly_as_well_as_can_be(num_points: int) -> None:  # property 2
    predicted, target = random(3, num_points, 3), random(3, num_points, 3, seed=1)
    for epsilon in (0.05, 0.005):
        matching = match_by_auction(predicted, target, epsilon=epsilon)
        assert torch.equal(matching.sort(dim=1).values, torch.arange(num_points).expand(3, -1))
        cost = matched_distance(predicted, target, matching)
        best = matched_distance(predicted, target, exact_assignment(predicted, target))
        assert (cost <= best + epsilon).all() and (cost >= best - 1e-6).all()


@pytest.mark.parametrize("name", ["all points equal", "every point many times", "on a grid", "far from the origin"])
def test_an_auction_ends_on_degenerate_clouds(name: str) -> None:
    cloud = CLOUDS[name]
    matching = match_by_auction(cloud, cloud.flip(1))
    assert torch.equal(matching.sort(dim=1).values, torch.arange(cloud.shape[1]).expand(len(cloud), -1))
    excess = matched_distance(cloud, cloud.flip(1), matching)
    assert (excess <= 0.05 + 1e-5).all()  # the best is 0


def test_a_cloud_is_nowhere_from_itself_and_the_gradient_is_finite() -> None:  # property 2
    cloud = random(2, 200, 3).requires_grad_()
    distance = earth_movers_distance(cloud, cloud.detach().clone())
    distance.sum().backward()
    assert distance.max() < 2e-6 and cloud.grad is not None and torch.isfinite(cloud.grad).all()


def test_the_gradient_reaches_the_prediction_alone_and_agrees_with_finite_differences() -> None:  # property 2
    predicted, target = (random(2, 6, 3, seed=seed).double().requires_grad_() for seed in (0, 1))
    earth_movers_distance(predicted, target).sum().backward()
    assert target.grad is None and predicted.grad is not None and predicted.grad.any()
    matching = match_by_auction(predicted, target)
    fixed = target.detach()
    assert torch.autograd.gradcheck(lambda values: matched_distance(values, fixed, matching), predicted)


def test_the_best_distance_does_not_depend_on_the_order_of_points() -> None:  # property 2
    predicted, target = random(2, 40, 3), random(2, 40, 3, seed=1)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    best = matched_distance(predicted, target, exact_assignment(predicted, target))
    for one, other in ((predicted[:, order], target), (predicted, target[:, order])):
        torch.testing.assert_close(matched_distance(one, other, exact_assignment(one, other)), best)


def test_points_left_over_when_rounds_run_out_take_what_they_would_bid_for() -> None:
    predicted = torch.tensor([[[0.0, 0, 0], [0.1, 0, 0], [0.2, 0, 0]]])
    target = torch.tensor([[[0.0, 0, 0], [5.0, 0, 0], [9.0, 0, 0]]])
    assert match_by_auction(predicted, target, max_rounds=0).tolist() == [[0, 0, 0]]
    # the first row's bid of 5.05 takes the first column; with that price the second is cheaper for both others
    assert match_by_auction(predicted, target, max_rounds=1).tolist() == [[0, 1, 1]]
    assert sorted(match_by_auction(predicted, target)[0].tolist()) == [0, 1, 2]


def test_a_matching_does_not_depend_on_the_batch_and_is_the_same_every_time() -> None:
    predicted, target = random(3, 60, 3), random(3, 60, 3, seed=1)
    together = match_by_auction(predicted, target)
    assert torch.equal(together, match_by_auction(predicted, target))
    alone = [match_by_auction(one[None], other[None]) for one, other in zip(predicted, target, strict=True)]
    assert torch.equal(torch.cat(alone), together)


def test_the_distance_is_float32_under_autocast() -> None:
    predicted, target = random(2, 40, 3) + 10, random(2, 40, 3, seed=1) + 10
    expected = earth_movers_distance(predicted, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(earth_movers_distance(predicted, target), expected)


def test_half_precision_points_have_float32_distances() -> None:
    a, b = (random(2, 40, 3, seed=seed).bfloat16().requires_grad_() for seed in (0, 1))
    for found, expected in (
        (chamfer_distance(a, b)[0], chamfer_distance(a.float(), b.float())[0]),
        (earth_movers_distance(a, b), earth_movers_distance(a.float(), b.float())),
    ):
        assert found.dtype == torch.float32 and torch.equal(found, expected)
