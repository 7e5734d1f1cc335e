"""Tests of trainer/objectives/means.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer import distributed
from trainer.objectives.means import rank_share, smoothed_cross_entropy


def make(rows: int = 6, classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(rows, classes, generator=generator), torch.randint(0, classes, (rows,), generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.05, 0.2])
def test_the_loss_is_the_paper_s_formula(smoothing: float) -> None:
    logits, labels = make()
    total = 0.0
    for row, label in zip(logits.double(), labels.tolist(), strict=True):
        for k, probability in enumerate(row.softmax(dim=0)):
            target = 1 - smoothing if k == label else smoothing / (len(row) - 1)
            total -= target * probability.log().item()
    assert smoothed_cross_entropy(logits, labels, smoothing).item() == pytest.approx(total / len(logits), rel=1e-6)


@pytest.mark.parametrize(("classes", "smoothing", "torch_smoothing"), [(40, 0.2, 0.205128), (50, 0.05, 0.051020)])
def test_torch_s_smoothing_is_another_number_for_the_same_loss(
    classes: int, smoothing: float, torch_smoothing: float
) -> None:
    logits, labels = make(classes=classes)
    assert smoothing * classes / (classes - 1) == pytest.approx(torch_smoothing, abs=1e-6)
    expected = F.cross_entropy(logits, labels, label_smoothing=smoothing * classes / (classes - 1))
    torch.testing.assert_close(smoothed_cross_entropy(logits, labels, smoothing), expected)


def test_rows_without_a_label_do_not_count() -> None:
    logits, labels = make()
    labels[[1, 4]] = -1
    logits.requires_grad_()
    loss = smoothed_cross_entropy(logits, labels, 0.2)
    kept = [0, 2, 3, 5]
    torch.testing.assert_close(loss, smoothed_cross_entropy(logits[kept], labels[kept], 0.2))
    loss.backward()
    assert logits.grad is not None and not logits.grad[[1, 4]].any() and logits.grad[kept].any()


def test_without_any_label_the_loss_and_its_gradient_are_zero() -> None:
    logits, labels = make()
    logits.requires_grad_()
    loss = smoothed_cross_entropy(logits, torch.full_like(labels, -1), 0.2)
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and not logits.grad.any()


def test_the_loss_of_half_precision_logits_is_float32() -> None:
    logits, labels = make()
    assert smoothed_cross_entropy(logits.bfloat16(), labels, 0.2).dtype == torch.float32


def test_in_a_world_of_one_a_mean_is_a_mean() -> None:
    assert rank_share(torch.tensor(7)) == 1 and rank_share(torch.tensor(0)) == 0


def test_shares_make_the_mean_of_means_the_mean_over_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [torch.tensor([1.0, 2.0]), torch.tensor([6.0]), torch.tensor([])]
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda _: torch.tensor(3.0))
    terms = [rank_share(torch.tensor(len(part))) * part.sum() / max(len(part), 1) for part in rows]
    assert torch.stack(terms).mean().item() == pytest.approx(3.0)
