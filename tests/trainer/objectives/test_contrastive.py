"""Tests of trainer/objectives/contrastive.py. Numbers of properties are those of CrossPoint's specification, section 6."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.objectives.contrastive import nt_xent


def vectors(r: int = 5, d: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(r, d, generator=generator), torch.randn(r, d, generator=generator)


def slow_nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """As it is written down, one row and one other vector at a time."""
    rows = [row / row.norm() for row in (*first, *second)]
    losses = []
    for a, row in enumerate(rows):
        partner = (a + len(first)) % len(rows)
        others = [row @ rows[b] / temperature for b in range(len(rows)) if b != a]
        losses.append(-(row @ rows[partner]) / temperature + torch.stack(others).exp().sum().log())
    return torch.stack(losses).mean()


def test_it_is_the_loss_of_its_definition_in_value_and_gradient() -> None:  # property 2
    first, second = (each.double().requires_grad_() for each in vectors())
    expected = slow_nt_xent(first, second, 0.1)
    wanted = torch.autograd.grad(expected, (first, second))
    found = nt_xent(first, second, 0.1)
    torch.testing.assert_close(found, expected.float())
    for gradient, want in zip(torch.autograd.grad(found, (first, second)), wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-6)


def test_it_is_a_cross_entropy_over_logits_without_the_diagonal() -> None:  # property 2
    first, second = vectors()
    rows = F.normalize(torch.cat([first, second]))
    logits = (rows @ rows.T / 0.1)[~torch.eye(10, dtype=torch.bool)].view(10, 9)
    partner = torch.tensor([a + 4 if a < 5 else a - 5 for a in range(10)])  # one to the left behind the diagonal
    torch.testing.assert_close(nt_xent(first, second, 0.1), F.cross_entropy(logits, partner))


def test_the_gradient_is_that_of_finite_differences() -> None:  # property 2
    first, second = (each.requires_grad_() for each in vectors(3, 4))
    (gradient,) = torch.autograd.grad(nt_xent(first, second, 0.5), first)
    step = 1e-2
    for index in [(0, 0), (1, 3), (2, 1)]:
        shift = torch.zeros_like(first)
        shift[index] = step
        above, below = nt_xent(first + shift, second, 0.5), nt_xent(first - shift, second, 0.5)
        torch.testing.assert_close(gradient[index], (above - below) / (2 * step), rtol=2e-2, atol=1e-4)


def test_the_two_lists_may_change_places() -> None:  # property 1
    first, second = vectors()
    torch.testing.assert_close(nt_xent(first, second, 0.1), nt_xent(second, first, 0.1))


def test_lengths_of_vectors_and_the_order_of_pairs_do_not_matter() -> None:  # property 1
    first, second = vectors()
    expected = nt_xent(first, second, 0.1)
    lengths = torch.tensor([1e-20, 0.5, 3, 1e4, 1e30])[:, None]
    torch.testing.assert_close(nt_xent(first * lengths, second * lengths.flip(0), 0.1), expected)
    order = [3, 0, 4, 1, 2]
    torch.testing.assert_close(nt_xent(first[order], second[order], 0.1), expected)


@pytest.mark.parametrize("num_pairs", [1, 2, 20])
def test_equal_vectors_give_the_logarithm_of_the_number_of_others(num_pairs: int) -> None:  # property 1
    row = torch.tensor([0.3, -2.0, 5.0]).expand(num_pairs, 3)
    assert nt_xent(row, row, 0.1).item() == pytest.approx(math.log(2 * num_pairs - 1), abs=1e-6)


def test_negatives_come_from_both_lists() -> None:
    first, second = vectors()
    (gradient,) = torch.autograd.grad(nt_xent(first, second.requires_grad_(), 0.1, slice(0, 1)), second)
    assert gradient.any(dim=1).all()
    (gradient,) = torch.autograd.grad(nt_xent(first.requires_grad_(), second.detach(), 0.1, slice(0, 1)), first)
    assert gradient.any(dim=1).all()


def test_opposite_and_equal_vectors_in_bf16_are_finite() -> None:  # property 2
    first = torch.tensor([[1.0, 1], [-1, -1], [1, 1]], dtype=torch.bfloat16, requires_grad=True)
    second = -first.detach().clone()
    loss = nt_xent(first, second, 0.1)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert loss.item() == pytest.approx(20 + math.log(2), abs=1e-4)  # two others lie where each row does
    assert first.grad is not None and first.grad.isfinite().all()


def test_autocast_does_not_round_similarities() -> None:
    first, second = vectors()
    expected = nt_xent(first, second, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nt_xent(first, second, 0.1), expected)


@pytest.mark.parametrize("length", [0.0, 1e-30, 1e30])
def test_vectors_of_any_length_have_finite_gradients(length: float) -> None:
    first, second = vectors()
    first = (first * length).requires_grad_()
    loss = nt_xent(first, second, 0.1)
    (gradient,) = torch.autograd.grad(loss, first)
    assert loss.isfinite() and gradient.isfinite().all()


def test_the_mean_over_equal_shares_of_the_pairs_is_the_whole() -> None:  # property 8
    first, second = (each.requires_grad_() for each in vectors(12))
    whole = nt_xent(first, second, 0.1)
    expected = torch.autograd.grad(whole, (first, second))
    for ranks in (1, 2, 3, 4):
        share = 12 // ranks
        losses = [nt_xent(first, second, 0.1, slice(rank * share, (rank + 1) * share)) for rank in range(ranks)]
        mean = torch.stack(losses).mean()
        torch.testing.assert_close(mean, whole)
        for found, wanted in zip(torch.autograd.grad(mean, (first, second)), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
