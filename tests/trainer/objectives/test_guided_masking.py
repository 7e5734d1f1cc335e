"""Tests of trainer/objectives/guided_masking.py."""

import math

import pytest
import torch
from torch import Tensor

from trainer.objectives.guided_masking import draw_visible, entropy, log_weights, num_masked

TOKENS, VISIBLE, TRIALS = 64, 13, 4000
SEEDS = torch.arange(TRIALS)


def frequencies(saliency: Tensor) -> Tensor:
    """How often each token is visible."""
    weights = log_weights(saliency.expand(TRIALS, -1))
    return draw_visible(weights, SEEDS, VISIBLE).double().mean(dim=0)


def test_a_fifth_of_the_tokens_stays_visible() -> None:
    assert num_masked(TOKENS, 0.8) == 51 == TOKENS - VISIBLE
    assert num_masked(12, 0.8) == 9


@pytest.mark.parametrize(
    "saliency",
    [
        torch.zeros(3, TOKENS),
        torch.full((3, TOKENS), 1e30),
        torch.randn(3, TOKENS, generator=torch.Generator().manual_seed(0)) * 1e20,
        torch.eye(3, TOKENS) * 3e38,
        -torch.eye(3, TOKENS) * 3e38,
        torch.linspace(0, 0.01, TOKENS).expand(3, -1),
    ],
)
def test_exactly_51_of_64_are_masked_whatever_the_saliency(saliency: Tensor) -> None:
    for temperature, standardise in ((1.0, False), (1e-3, False), (1.0, True)):
        weights = log_weights(saliency, temperature, standardise=standardise)
        visible = draw_visible(weights, torch.arange(3), VISIBLE)
        assert ((~visible).sum(dim=1) == 51).all()
        assert entropy(weights).isfinite()


def test_constant_saliency_masks_every_token_equally_often() -> None:
    deviation = math.sqrt(13 / 64 * 51 / 64 / TRIALS)
    frequency = frequencies(torch.full((TOKENS,), 0.3))
    assert (frequency - 13 / 64).abs().max() < 4.5 * deviation


def test_a_token_of_high_saliency_is_visible_more_often() -> None:
    saliency = torch.zeros(TOKENS)
    saliency[17] = 5
    frequency = frequencies(saliency)
    assert frequency[17] > 0.99 and frequency.argmax() == 17


def test_the_first_token_is_drawn_with_its_weight() -> None:
    saliency = torch.log(torch.tensor([1.0, 2.0, 5.0]))
    weights = log_weights(saliency.expand(TRIALS, -1))
    drawn = draw_visible(weights, SEEDS, 1).double().mean(dim=0)
    torch.testing.assert_close(drawn, torch.tensor([1 / 8, 2 / 8, 5 / 8], dtype=torch.float64), rtol=0, atol=0.03)
    # of two without replacement: those pairs' probabilities, whichever of the two came first
    absent = 1 - draw_visible(weights, SEEDS, 2).double().mean(dim=0)
    expected = [2 / 8 * 5 / 6 + 5 / 8 * 2 / 3, 1 / 8 * 5 / 7 + 5 / 8 * 1 / 3, 1 / 8 * 2 / 7 + 2 / 8 * 1 / 6]
    torch.testing.assert_close(absent, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=0.03)


def test_as_published_the_weights_are_a_softmax_and_nearly_equal() -> None:
    """An extreme difference of attention, averaged over three views, changes a weight by a tenth."""
    weights = log_weights(torch.tensor([[0.0, 0.1]])).exp()
    assert float(weights[0, 1] / weights[0, 0]) == pytest.approx(math.exp(0.1))
    attention = torch.full((1, TOKENS), 1 / 196)
    attention[0, :5] = 0.1
    assert math.log(TOKENS) - float(entropy(log_weights(attention))) < 1e-3
    # what guides more is asked for by name
    assert float(entropy(log_weights(attention, 0.01))) < 0.9 * math.log(TOKENS)
    assert float(entropy(log_weights(attention, standardise=True))) < 0.9 * math.log(TOKENS)


def test_the_entropy_of_equal_weights_is_the_logarithm_of_their_number() -> None:
    assert float(entropy(log_weights(torch.zeros(2, TOKENS)))) == pytest.approx(math.log(TOKENS))
    assert float(entropy(log_weights(torch.eye(2, TOKENS) * 1e9))) == 0.0


def test_a_cloud_is_masked_alike_in_any_batch_and_anew_at_each_visit() -> None:
    saliency = torch.rand(6, TOKENS, generator=torch.Generator().manual_seed(1))
    seeds = torch.tensor([5, -3, 2**62, 8, 0, 1])
    weights = log_weights(saliency)
    together = draw_visible(weights, seeds, VISIBLE)
    assert torch.equal(draw_visible(weights[2:3], seeds[2:3], VISIBLE), together[2:3])
    assert not torch.equal(draw_visible(weights, seeds + 1, VISIBLE), together)
