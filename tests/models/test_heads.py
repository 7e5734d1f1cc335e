"""Tests of models/heads.py."""

import torch
from torch import nn

from models.heads import Projection, classification_head
from models.students.pointnet import PointNetConfig


def num_parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def test_the_whole_model_has_as_many_parameters_as_the_paper_s() -> None:
    student = PointNetConfig().build()
    head, projection = classification_head(student.pooled_dim, 40), Projection(student.per_point_dim, 512)
    assert num_parameters(student, head) == 1_045_001
    assert num_parameters(student, head, projection) == 1_570_313


def test_a_projection_is_nowhere_negative_and_normalises_over_rows() -> None:
    torch.manual_seed(0)
    projection = Projection(6, 4)
    rows = torch.randn(50, 6)
    projected = projection(rows)
    linear = rows @ projection.linear.weight.T
    expected = (linear - linear.mean(dim=0)) / (linear.var(dim=0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(projected, expected.relu())


def test_without_rows_statistics_stay_and_gradients_are_zero() -> None:
    projection = Projection(6, 4)
    assert projection.norm.running_mean is not None and projection.norm.num_batches_tracked is not None
    projection(torch.empty(0, 6)).sum().backward()
    assert projection.norm.num_batches_tracked.item() == 0 and not projection.norm.running_mean.any()
    for name, parameter in projection.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
