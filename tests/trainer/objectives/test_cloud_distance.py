"""Tests of trainer/objectives/cloud_distance.py. Numbers of properties are those of the specification, section 6."""

import pytest
import torch
from torch import Tensor

from trainer.objectives.cloud_distance import BoxNormalisation, CloudDistanceConfig, box_normalised, cloud_distance

KINDS: tuple[BoxNormalisation, BoxNormalisation] = ("official", "intended")
EXACT = CloudDistanceConfig(matching="exact")


def clouds(b: int = 3, n: int = 20, seed: int = 0) -> Tensor:
    return torch.randn(b, n, 3, generator=torch.Generator().manual_seed(seed)) * torch.tensor([1.0, 3.0, 0.5])


def slow_official(points: Tensor) -> Tensor:
    """A cloud after the other, an axis after the other, as the specification writes it."""
    result = torch.empty_like(points)
    for cloud, normalised in zip(points, result, strict=True):
        extents = [(cloud[:, axis].max() - cloud[:, axis].min()) for axis in range(3)]
        longest = max(extents)
        for axis in range(3):
            c = (cloud[:, axis].min() - (longest - extents[axis])) / 2
            normalised[:, axis] = (cloud[:, axis] - c) / longest - 0.5
    return result


def test_the_official_box_is_the_one_that_the_code_computes() -> None:
    torch.testing.assert_close(box_normalised(clouds(), "official"), slow_official(clouds()))
    centred = box_normalised(torch.tensor([[[-1.0, -2, 0], [1, 2, 0]]]), "official")
    torch.testing.assert_close(centred[0, :, 1], torch.tensor([-0.75, 0.25]))


def test_the_intended_box_has_its_middle_in_the_origin() -> None:  # property 3
    boxes = box_normalised(clouds(), "intended")
    torch.testing.assert_close(boxes.amax(dim=1), -boxes.amin(dim=1))
    torch.testing.assert_close(boxes.amax(dim=(1, 2)), torch.full((3,), 0.5))


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_a_cloud_does_not_matter(kind: BoxNormalisation) -> None:  # property 3
    points = clouds()
    for factor in (0.01, 3.0, 500.0):
        torch.testing.assert_close(box_normalised(factor * points, kind), box_normalised(points, kind))


def test_half_of_a_shift_stays_in_the_official_box_and_nothing_in_the_intended() -> None:  # property 3, trap 17
    points, shift = clouds(), torch.tensor([0.3, -2.0, 1.0])
    longest = (points.amax(dim=1) - points.amin(dim=1)).amax(dim=1)[:, None, None]
    moved = box_normalised(points + shift, "official") - box_normalised(points, "official")
    torch.testing.assert_close(moved, (shift / (2 * longest)).expand_as(moved), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(box_normalised(points + shift, "intended"), box_normalised(points, "intended"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_box_has_the_gradient_of_its_extent_too(kind: BoxNormalisation) -> None:
    points = clouds(b=2, n=6).double().requires_grad_()
    weights = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(1))
    (box_normalised(points, kind) * weights).sum().backward()
    assert points.grad is not None
    step = 1e-2
    for index in ((0, 0, 0), (0, 3, 1), (1, 2, 1), (1, 5, 2)):
        with torch.no_grad():
            lower, upper = points.clone(), points.clone()
            lower[index] -= step
            upper[index] += step
            slope = ((box_normalised(upper, kind) - box_normalised(lower, kind)) * weights).sum() / (2 * step)
        torch.testing.assert_close(points.grad[index].float(), slope, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cloud_of_one_place_comes_to_the_origin(kind: BoxNormalisation) -> None:
    points = torch.full((1, 8, 3), 0.4, requires_grad=True)
    torch.testing.assert_close(box_normalised(points, kind), torch.zeros(1, 8, 3))
    for predicted, target in ((points, clouds(b=1, n=8)), (points, points), (clouds(b=1, n=8), points)):
        distance = cloud_distance(predicted.requires_grad_(), target, CloudDistanceConfig(box_normalisation=kind))
        (gradient,) = torch.autograd.grad(distance.sum(), predicted)
        assert distance < 2, "as far as any other cloud, and no farther"
        assert torch.isfinite(gradient).all() and gradient.abs().max() < 2


@pytest.mark.parametrize("matching", ["auction", "exact"])
def test_a_cloud_is_at_no_distance_from_itself_with_a_finite_gradient(matching: str) -> None:  # property 2, trap 13
    points = clouds().requires_grad_()
    distance = cloud_distance(points, points, CloudDistanceConfig.model_validate({"matching": matching}))
    torch.testing.assert_close(distance, torch.zeros(3), atol=2e-6, rtol=0)
    distance.sum().backward()
    assert points.grad is not None and torch.isfinite(points.grad).all()


def test_points_may_come_in_any_order_on_both_sides() -> None:  # property 2
    a, b = clouds(), clouds(seed=1)
    expected = cloud_distance(a, b, EXACT)
    order, other = (torch.randperm(20, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3))
    torch.testing.assert_close(cloud_distance(a[:, order], b[:, other], EXACT), expected)


@pytest.mark.parametrize("num_points", [32, 200])
def test_an_auction_is_within_its_epsilon_of_the_exact_matching(num_points: int) -> None:  # property 2
    a, b = clouds(n=num_points), clouds(n=num_points, seed=1)
    exact, auctioned = cloud_distance(a, b, EXACT), cloud_distance(a, b, CloudDistanceConfig())
    assert (auctioned >= exact - 1e-5).all() and (auctioned <= exact + 0.05).all()


def test_gradients_reach_the_prediction_alone() -> None:  # property 2
    predicted, target = clouds().requires_grad_(), clouds(seed=1).requires_grad_()
    cloud_distance(predicted, target, CloudDistanceConfig()).sum().backward()
    assert target.grad is None and predicted.grad is not None and predicted.grad.any()


def test_it_is_float32_whatever_surrounds_it() -> None:  # trap 16
    a, b = clouds(), clouds(seed=1)
    expected = cloud_distance(a, b, EXACT)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cloud_distance(a, b, EXACT), expected)
    assert cloud_distance(a.bfloat16(), b.bfloat16(), EXACT).dtype == torch.float32
