"""Tests of models/students/pointmlp.py; what holds of every student is in test_every_student.py."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.students.pointmlp import (
    PointMLP,
    PointMLPConfig,
    Residual,
    Stage,
    StageConfig,
    neighbourhood_spread,
    pointmlp_head,
)

SMALL = PointMLPConfig(
    embedding_channels=4,
    stages=(StageConfig(num_points=16, channels=6), StageConfig(num_points=7, channels=10)),
    num_neighbours=5,
)


def cloud(b: int = 3, n: int = 40, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(b, n, 3, generator=torch.Generator().manual_seed(3)).to(dtype)


def num_parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def convolution(linear: nn.Linear, norm: nn.BatchNorm1d, features: Tensor) -> Tensor:
    """A 1x1 convolution over [b, c, m, k], without activation."""
    features = F.conv2d(features, linear.weight[:, :, None, None])
    return F.batch_norm(
        features, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, norm.momentum
    )


def residual(block: Residual, features: Tensor) -> Tensor:
    first, norm, _, second, second_norm = block.layers
    inner = convolution(first, norm, features).relu()
    return (features + convolution(second, second_norm, inner)).relu()


def farthest(points: Tensor, count: int) -> Tensor:
    chosen = [0]
    while len(chosen) < count:
        distances = torch.stack([(points - points[each]).square().sum(dim=1) for each in chosen]).amin(dim=0)
        chosen.append(int(distances.argmax()))
    return torch.tensor(chosen)


def literal(network: PointMLP, points: Tensor) -> tuple[Tensor, Tensor]:
    """The final features as the paper writes them down, and the places of the points that are left."""
    batch = torch.arange(len(points))[:, None]
    indices = torch.arange(points.shape[1]).expand(points.shape[:2])
    linear, norm, _ = network.embedding
    features = convolution(linear, norm, points.transpose(1, 2)[..., None]).relu().squeeze(3).transpose(1, 2)
    for stage in network.stages:
        assert isinstance(stage, Stage)
        chosen = torch.stack([farthest(each, stage.num_points) for each in points])
        centres, of_centres = points[batch, chosen], features[batch, chosen]
        distances = (centres[:, :, None] - points[:, None]).square().sum(dim=3)
        members = distances.argsort(dim=2)[..., : stage.num_neighbours]
        differences = features[batch[..., None], members] - of_centres[:, :, None]
        spread = torch.stack([each.std() for each in differences])
        normalised = stage.scale * differences / (spread[:, None, None, None] + 1e-5) + stage.shift
        pairs = torch.cat([normalised, of_centres[:, :, None].expand_as(differences)], dim=3).permute(0, 3, 1, 2)
        pairs = convolution(stage.transfer, stage.norm, pairs).relu()
        for block in stage.before:
            pairs = residual(block, pairs)
        left = pairs.amax(dim=3, keepdim=True)
        for block in stage.after:
            left = residual(block, left)
        features = left.squeeze(3).transpose(1, 2)
        points, indices = centres, indices.gather(1, chosen)
    return features, indices


def test_it_has_as_many_parameters_as_the_paper_s() -> None:
    student = PointMLPConfig().build()
    total = num_parameters(student, pointmlp_head(student.pooled_dim, 40))
    assert round(total / 1e6, 2) == 13.24 and total == 13_238_504


@pytest.mark.parametrize("training", [True, False])
def test_it_equals_convolutions_on_written_down_neighbourhoods(training: bool) -> None:
    torch.manual_seed(0)
    network = SMALL.build().double().train(training)
    for name, parameter in network.named_parameters():
        if name.endswith(("scale", "shift", "norm.weight")):
            nn.init.normal_(parameter)
    reference = copy.deepcopy(network)
    points = cloud(dtype=torch.float64)

    encoding, (per_point, indices) = network(points), literal(reference, points)
    assert encoding.indices is not None and torch.equal(encoding.indices, indices)
    torch.testing.assert_close(encoding.per_point, per_point)
    torch.testing.assert_close(encoding.pooled, per_point.amax(dim=1))
    for name, statistic in reference.named_buffers():
        if "num_batches" not in name:
            torch.testing.assert_close(dict(network.named_buffers())[name], statistic)

    encoding.per_point.sin().sum().backward()
    per_point.sin().sum().backward()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(dict(network.named_parameters())[name].grad, parameter.grad, msg=name)


def test_the_spread_is_exact_in_float32_too_and_has_a_gradient_where_it_is_zero() -> None:
    features = torch.randn(2, 30, 4) + 50
    chosen = torch.arange(8).expand(2, 8)
    members = torch.rand(2, 8, 30).argsort(dim=2)[..., :6]
    batch = torch.arange(2)[:, None]
    differences = features[batch[..., None], members].double() - features[batch, chosen][:, :, None]
    spread = neighbourhood_spread(features, features[batch, chosen], members)
    torch.testing.assert_close(spread, differences.flatten(1).std(dim=1).float(), rtol=1e-5, atol=0)

    equal = torch.ones(2, 30, 4, requires_grad=True)
    spread = neighbourhood_spread(equal, equal[:, :8], members)
    spread.sum().backward()
    assert spread.max() < 1e-9 and equal.grad is not None and equal.grad.isfinite().all()


def test_indices_name_the_survivors_and_levels_hold_all_that_came_before() -> None:
    network = SMALL.build()
    points = cloud()
    encoding = network(points)
    assert encoding.indices is not None and encoding.indices.shape == (3, 7)
    assert [level.features.shape[1:] for level in encoding.levels] == [(40, 4), (16, 6), (7, 10)]
    assert network.level_dims == (4, 6, 10) and (network.per_point_dim, network.pooled_dim) == (10, 10)
    left = torch.take_along_dim(points, encoding.indices[..., None], dim=1)
    assert torch.equal(left, encoding.levels[-1].points)
    assert (encoding.per_point >= 0).all()
