"""Tests of models/students/pointnet.py and of the students' union."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from models.students import build_student
from models.students.pointnet import CROSSPOINT, PLAIN, PointNet, PointNetConfig, TransformNet, orthogonality_penalty

SMALL = PointNetConfig(width=0.125)


def cloud(b: int = 3, n: int = 40, seed: int = 0) -> Tensor:
    return torch.randn(b, n, 3, generator=torch.Generator().manual_seed(seed))


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def small(seed: int = 0) -> PointNet:
    torch.manual_seed(seed)
    return SMALL.build()


def convolutions(layers: nn.Sequential, features: Tensor) -> Tensor:
    """The same layers as 1x1 convolutions over [b, c, n], which is how papers write them."""
    for layer in layers:
        if isinstance(layer, nn.Linear):
            features = F.conv1d(features, layer.weight[..., None], layer.bias)
        else:
            features = nn.BatchNorm1d.forward(layer, features) if isinstance(layer, nn.BatchNorm1d) else layer(features)
    return features


def transform_by_convolutions(network: TransformNet, features: Tensor) -> Tensor:
    pooled = convolutions(network.point_layers, features).amax(dim=2)
    matrices = network.matrix(network.layers(pooled)).view(len(features), network.num_features, network.num_features)
    return matrices + torch.eye(network.num_features)


def test_the_encoder_has_as_many_parameters_as_the_paper_s() -> None:
    assert num_parameters(PointNetConfig().build()) == 499_209
    assert num_parameters(CROSSPOINT.build()) == 150_336


def test_the_original_network_is_a_matter_of_widths() -> None:
    def layers(*widths: int) -> int:
        return sum(a * b + 3 * b for a, b in pairwise(widths))

    transforms = sum(layers(k, 64, 128, 1024, 512, 256) + 257 * k * k for k in (3, 64))
    assert num_parameters(PLAIN.build()) == transforms + layers(3, 64, 64) + layers(64, 64, 128, 1024)


@pytest.mark.parametrize("training", [True, False])
def test_matrix_products_on_rows_are_the_paper_s_convolutions(training: bool) -> None:
    network, reference = (small().double().train(training) for _ in range(2))
    points = cloud().double()
    encoding = network(points)
    assert reference.input_transform is not None and reference.feature_transform is not None

    features = (points @ transform_by_convolutions(reference.input_transform, points.transpose(1, 2))).transpose(1, 2)
    features = convolutions(reference.stem, features)
    matrices = transform_by_convolutions(reference.feature_transform, features)
    features = (features.transpose(1, 2) @ matrices).transpose(1, 2)
    per_point = convolutions(reference.layers, features).transpose(1, 2)

    torch.testing.assert_close(encoding.per_point, per_point)
    torch.testing.assert_close(encoding.pooled, per_point.amax(dim=1))
    distance = matrices @ matrices.transpose(1, 2) - torch.eye(matrices.shape[1])
    penalty = distance.square().sum(dim=(1, 2)).sqrt().mean()
    torch.testing.assert_close(encoding.penalty, penalty.float())
    for name, statistic in reference.named_buffers():
        torch.testing.assert_close(dict(network.named_buffers())[name], statistic)


def test_embeddings_are_nowhere_negative_and_many_are_positive() -> None:
    encoding = small()(cloud())
    assert (encoding.per_point >= 0).all() and (encoding.per_point > 0).float().mean() > 0.2
    assert (PLAIN.model_copy(update={"width": 0.125}).build()(cloud()).per_point < 0).any()


def test_permuting_points_permutes_embeddings_and_leaves_the_pooled_one() -> None:
    network = small().eval()
    points, order = cloud(), torch.randperm(40, generator=torch.Generator().manual_seed(1))
    encoding, permuted = network(points), network(points[:, order])
    torch.testing.assert_close(permuted.per_point, encoding.per_point[:, order])
    torch.testing.assert_close(permuted.pooled, encoding.pooled)


def test_a_cloud_is_encoded_alike_in_any_batch_in_eval_mode() -> None:
    network = small().eval()
    points = cloud()
    torch.testing.assert_close(network(points[1:2]).pooled, network(points).pooled[1:2])


def test_widths_scale_together() -> None:
    network = PointNetConfig(width=0.25).build()
    assert (network.per_point_dim, network.pooled_dim) == (256, 256)
    encoding = network(cloud())
    assert encoding.per_point.shape == (3, 40, 256) and encoding.pooled.shape == (3, 256)
    assert encoding.indices is None


def test_without_transforms_there_is_no_penalty() -> None:
    network = PointNetConfig(width=0.125, transforms=False).build()
    assert network(cloud()).penalty is None
    assert num_parameters(network) < num_parameters(small())


def test_the_penalty_is_zero_for_rotations_and_the_norm_of_what_is_left_for_others() -> None:
    rotations, _ = torch.linalg.qr(torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(orthogonality_penalty(rotations), torch.tensor(0.0), atol=1e-5, rtol=0)
    doubled = 2 * torch.eye(4).expand(3, 4, 4)  # 2 * 2 - 1 on each of four diagonal places
    torch.testing.assert_close(orthogonality_penalty(doubled), torch.tensor(6.0))


def test_coordinates_stay_float32_under_autocast() -> None:
    network = small().eval()
    assert network.input_transform is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoding = network(cloud() + 100)
    assert encoding.per_point.dtype == torch.bfloat16 and encoding.penalty is not None
    assert encoding.penalty.dtype == torch.float32


def test_a_student_is_built_from_its_config_or_from_a_mapping() -> None:
    torch.manual_seed(0)
    first = build_student({"kind": "pointnet", "width": 0.125})
    for name, parameter in small().named_parameters():
        assert torch.equal(dict(first.named_parameters())[name], parameter)
    assert isinstance(build_student(SMALL), PointNet)


@pytest.mark.parametrize("config", [{"kind": "pointnet", "with": 1}, {"kind": "resnet"}, {"width": 0}])
def test_an_unknown_student_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        build_student(config)
