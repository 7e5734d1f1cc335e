"""Tests of models/ops/interpolation.py."""

import pytest
import torch
from torch import Tensor

from models.ops.interpolation import interpolate_from_three


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def dense(features: Tensor, known: Tensor, targets: Tensor) -> Tensor:
    squared = (targets[:, :, None] - known[:, None]).square().sum(-1)
    nearest, indices = squared.topk(min(3, known.shape[1]), largest=False)
    weights = torch.zeros_like(squared).scatter(2, indices, 1 / (nearest + 1e-8))
    return (weights / weights.sum(-1, keepdim=True)).to(features.dtype) @ features


@pytest.mark.parametrize("num_known", [1, 2, 3, 20])
def test_values_are_those_of_the_dense_formula(num_known: int) -> None:
    features, known, targets = random(2, num_known, 5), random(2, num_known, 3, seed=1), random(2, 30, 3, seed=2)
    torch.testing.assert_close(interpolate_from_three(features, known, targets), dense(features, known, targets))


def test_a_known_place_has_the_known_features() -> None:
    features, known = random(2, 20, 5), random(2, 20, 3, seed=1)
    torch.testing.assert_close(interpolate_from_three(features, known, known), features, rtol=0, atol=1e-4)


def test_equal_features_stay_equal_wherever_the_places_are() -> None:
    constant = torch.full((2, 20, 5), 0.7)
    for known in (random(2, 20, 3), torch.zeros(2, 20, 3), random(2, 20, 3) * 1e12):
        torch.testing.assert_close(
            interpolate_from_three(constant, known, random(2, 30, 3, seed=2)), torch.full((2, 30, 5), 0.7)
        )


def test_the_gradient_reaches_features_alone_and_agrees_with_finite_differences() -> None:
    known, targets = random(2, 6, 3, seed=1), random(2, 7, 3, seed=2)
    features = random(2, 6, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda values: interpolate_from_three(values, known, targets), features)
    places = known.requires_grad_()
    assert not interpolate_from_three(features.detach(), places, places).requires_grad


def test_weights_are_float32_under_autocast() -> None:
    features, known, targets = random(2, 20, 5), random(2, 20, 3, seed=1) + 100, random(2, 30, 3, seed=2) + 100
    expected = interpolate_from_three(features, known, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(interpolate_from_three(features, known, targets), expected)
