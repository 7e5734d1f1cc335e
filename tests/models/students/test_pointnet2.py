"""Tests of models/students/pointnet2.py; what holds of every student is in test_every_student.py."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.heads import classification_head
from models.students.pointnet2 import (
    SINGLE_SCALE,
    AbstractionConfig,
    BallConfig,
    PointNet2,
    PointNet2Config,
    SetAbstraction,
)

SMALL = PointNet2Config(
    steps=(
        AbstractionConfig(
            num_points=20,
            balls=(
                BallConfig(radius=0.6, num_neighbours=6, widths=(4, 5)),
                BallConfig(radius=1.2, num_neighbours=12, widths=(4, 6, 5)),
            ),
        ),
        AbstractionConfig(num_points=8, balls=(BallConfig(radius=1.5, num_neighbours=10, widths=(6, 7, 8)),)),
    ),
    widths=(12, 16),
)


def cloud(b: int = 3, n: int = 60, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(b, n, 3, generator=torch.Generator().manual_seed(3)).to(dtype)


def num_parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def farthest(points: Tensor, count: int) -> Tensor:
    """One cloud's samples, from the definition."""
    chosen = [0]
    while len(chosen) < count:
        distances = torch.stack([(points - points[each]).square().sum(dim=1) for each in chosen]).amin(dim=0)
        chosen.append(int(distances.argmax()))
    return torch.tensor(chosen)


def in_ball(centre: Tensor, points: Tensor, radius: float, k: int) -> Tensor:
    found = [number for number, point in enumerate(points) if (point - centre).square().sum() < radius**2][:k]
    return torch.tensor((found + [found[0]] * k)[:k])


def convolution(linear: nn.Linear, norm: nn.BatchNorm1d, features: Tensor) -> Tensor:
    features = F.conv2d(features, linear.weight[:, :, None, None])
    return F.batch_norm(
        features, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, norm.momentum
    ).relu()


def abstraction(step: SetAbstraction, points: Tensor, features: Tensor, chosen: Tensor) -> Tensor:
    """As the paper writes it: grouped tensors [b, c, m, k] and convolutions on them."""
    batch = torch.arange(len(points))[:, None]
    centres = points[batch, chosen]
    scales = []
    for ball in step.balls:
        members = torch.stack(
            [
                torch.stack([in_ball(centre, cloud, ball.radius, ball.num_neighbours) for centre in its_centres])
                for its_centres, cloud in zip(centres, points, strict=True)
            ]
        )
        relative = points[batch[..., None], members] - centres[:, :, None]
        grouped = torch.cat([relative, features[batch[..., None], members]], dim=3).permute(0, 3, 1, 2)
        for linear, norm in zip(ball.linears, ball.norms, strict=True):
            grouped = convolution(linear, norm, grouped)
        scales.append(grouped.amax(dim=3).transpose(1, 2))
    return torch.cat(scales, dim=2)


def literal(network: PointNet2, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, their maximum, and the places of the points that are left."""
    features, indices = points[..., :0], torch.arange(points.shape[1]).expand(points.shape[:2])
    for step in network.steps:
        chosen = torch.stack([farthest(each, step.num_points) for each in points])
        features = abstraction(step, points, features, chosen)
        points, indices = points[torch.arange(len(points))[:, None], chosen], indices.gather(1, chosen)
    features = torch.cat([points, features], dim=2).transpose(1, 2)[..., None]
    for linear, norm in zip(network.layers[::3], network.layers[1::3], strict=True):
        features = convolution(linear, norm, features)
    per_point = features.squeeze(3).transpose(1, 2)
    return per_point, per_point.amax(dim=1), indices


def test_pointcmt_s_student_has_as_many_parameters_as_the_paper_s() -> None:
    student = PointNet2Config().build()
    assert (student.per_point_dim, student.pooled_dim) == (1024, 1024)
    assert num_parameters(student, classification_head(student.pooled_dim, 40, bias=True)) == 1_621_512


def test_one_scale_is_a_matter_of_balls() -> None:
    def layers(*widths: int) -> int:
        return sum(a * b + 2 * b for a, b in pairwise(widths))

    expected = layers(3, 64, 64, 128) + layers(131, 128, 128, 256) + layers(259, 256, 512, 1024)
    assert num_parameters(SINGLE_SCALE.build()) == expected


@pytest.mark.parametrize("training", [True, False])
def test_it_equals_grouped_convolutions(training: bool) -> None:
    torch.manual_seed(0)
    network = SMALL.build().double().train(training)
    for module in network.modules():  # scales of both signs: the maximum before the activation has to know
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.weight)
    reference = copy.deepcopy(network)
    points = cloud(dtype=torch.float64)

    encoding = network(points)
    per_point, pooled, indices = literal(reference, points)
    assert encoding.indices is not None and torch.equal(encoding.indices, indices)
    torch.testing.assert_close(encoding.per_point, per_point)
    torch.testing.assert_close(encoding.pooled, pooled)
    for name, statistic in reference.named_buffers():
        if "num_batches" not in name:
            torch.testing.assert_close(dict(network.named_buffers())[name], statistic)

    (encoding.pooled.square().sum() + encoding.per_point.sin().sum()).backward()
    (pooled.square().sum() + per_point.sin().sum()).backward()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(dict(network.named_parameters())[name].grad, parameter.grad, msg=name)


def test_indices_name_the_survivors_and_levels_hold_all_that_came_before() -> None:
    network = SMALL.build()
    points = cloud()
    encoding = network(points)
    assert encoding.indices is not None and encoding.indices.shape == (3, 8)
    assert [level.features.shape[1:] for level in encoding.levels] == [(60, 3), (20, 10), (8, 8)]
    assert network.level_dims == (3, 10, 8)
    left = torch.take_along_dim(points, encoding.indices[..., None], dim=1)
    assert torch.equal(left, encoding.levels[-1].points)


def test_embeddings_are_nowhere_negative() -> None:
    encoding = SMALL.build()(cloud())
    assert (encoding.per_point >= 0).all() and encoding.per_point.any()


def test_shifting_a_cloud_far_away_changes_no_ball() -> None:
    torch.manual_seed(0)
    network = SMALL.build().eval()
    points = (cloud() * 2**10).round() / 2**10  # so that shifting rounds nothing away
    near, far = network(points).levels[-1], network(points + 2**12).levels[-1]
    torch.testing.assert_close(far.features, near.features)


def test_weights_start_as_the_paper_s() -> None:
    weight = PointNet2Config().build().layers[3].weight
    torch.testing.assert_close(weight.std().item(), (2 / weight.shape[1]) ** 0.5, rtol=0.02, atol=0)


def test_widths_scale_together() -> None:
    small = PointNet2Config(width=0.25).build()
    assert (small.per_point_dim, small.level_dims) == (256, (3, 80, 160))


def test_too_few_points_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"512.*100"):
        PointNet2Config(width=0.1).build()(cloud(n=100))
