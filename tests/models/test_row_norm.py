"""Tests of models/row_norm.py."""

import pytest
import torch
from torch import nn

from models.row_norm import RowNorm


def test_every_slot_before_the_last_axis_is_a_row() -> None:
    torch.manual_seed(0)
    features, norm, plain = torch.randn(2, 5, 3), RowNorm(3), nn.BatchNorm1d(3)
    torch.testing.assert_close(norm(features), plain(features.flatten(0, 1)).view(2, 5, 3))
    assert torch.equal(norm.running_var, plain.running_var) and int(norm.num_batches_tracked) == 1


@pytest.mark.parametrize("num_rows", [0, 1])
def test_fewer_rows_than_have_statistics_take_the_running_ones(num_rows: int) -> None:
    torch.manual_seed(0)
    norm = RowNorm(3)
    norm(torch.randn(8, 3) * 4 + 1)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    rows = torch.randn(num_rows, 3, requires_grad=True)
    found = norm(rows)
    found.sum().backward()
    assert norm.weight.grad is not None and norm.weight.grad.isfinite().all()
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    torch.testing.assert_close(found, norm.eval()(rows))


@pytest.mark.parametrize("shape", [(8, 3), (2, 5, 3)])
def test_an_activation_may_overwrite_what_it_returns_without_a_copy(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    features, norm = torch.randn(shape, requires_grad=True), RowNorm(3)
    found = torch.relu_(norm(features))
    assert "Relu" in type(found.grad_fn).__name__, "and not CopySlices"
    found.square().sum().backward()
    expected = features.grad
    features.grad = None
    torch.relu(RowNorm(3)(features)).square().sum().backward()
    torch.testing.assert_close(features.grad, expected)
