"""Tests of models/students/dgcnn.py; what holds of every student is in test_every_student.py."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.heads import Projection, classification_head, contrastive_head, part_segmentation_head
from models.students.dgcnn import (
    CROSSPOINT,
    CROSSPOINT_SEGMENTATION,
    DGCNN,
    SEGMENTATION,
    DGCNNConfig,
    EdgeLayers,
    InputTransform,
)


def small(config: DGCNNConfig) -> DGCNNConfig:
    return config.model_copy(update={"width": 1 / 16, "num_neighbours": 6})


def cloud(b: int = 3, n: int = 30, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(b, n, 3, generator=torch.Generator().manual_seed(3)).to(dtype)


def num_parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def scramble(network: nn.Module) -> None:
    """Norms with scales of both signs, and nothing that is zero to begin with."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.weight)
        if isinstance(module, InputTransform):
            nn.init.normal_(module.matrix.weight, std=0.3)


def convolution(linear: nn.Linear, norm: nn.BatchNorm1d, slope: float, features: Tensor) -> Tensor:
    """A 1x1 convolution over [b, c, n, k]."""
    features = F.conv2d(features, linear.weight[:, :, None, None])
    features = F.batch_norm(
        features, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, norm.momentum
    )
    return F.leaky_relu(features, slope)


def edge_layers(layers: EdgeLayers, features: Tensor) -> Tensor:
    """With [neighbour - point, point] written down for every edge."""
    distances = (features[:, :, None] - features[:, None]).square().sum(dim=3)
    neighbours = distances.argsort(dim=2)[..., : layers.num_neighbours]
    ends = features[torch.arange(len(features))[:, None, None], neighbours]
    starts = features[:, :, None].expand_as(ends)
    edges = torch.cat([ends - starts, starts], dim=3).permute(0, 3, 1, 2)
    for linear, norm in zip(layers.linears, layers.norms, strict=True):
        edges = convolution(linear, norm, 0.2, edges)
    return edges.amax(dim=3).transpose(1, 2)


def embedding(layers: nn.Sequential, features: Tensor) -> Tensor:
    for linear, norm, activation in zip(layers[::3], layers[1::3], layers[2::3], strict=True):
        features = features.transpose(1, 2)[..., None]
        features = convolution(linear, norm, activation.negative_slope, features).squeeze(3).transpose(1, 2)
    return features


def literal(network: DGCNN, points: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings and what is pooled of them."""
    features = points
    if network.transform is not None:
        transform = network.transform
        pooled = embedding(transform.embedding, edge_layers(transform.edges, points)).amax(dim=1)
        hidden = embedding(transform.layers, pooled[:, None]).squeeze(1)
        features = points @ F.linear(hidden, transform.matrix.weight, transform.matrix.bias).view(-1, 3, 3)
    of_graphs = []
    for layers in network.edges:
        features = edge_layers(layers, features)
        of_graphs.append(features)
    per_point = embedding(network.embedding, torch.cat(of_graphs, dim=2))
    pooled = [per_point.amax(dim=1)]
    if network.pooling == "max_and_mean":
        pooled.append(per_point.mean(dim=1))
    return per_point, torch.cat(pooled, dim=1)


@pytest.mark.parametrize(
    ("config", "count", "per_point_dim", "pooled_dim"),
    [
        (DGCNNConfig(), 617_856, 1024, 1024),
        (SEGMENTATION, 224_256, 1024, 1024),
        (CROSSPOINT, 617_856, 1024, 2048),
        (CROSSPOINT_SEGMENTATION, 1_025_545, 1024, 1024),  # without the official code's four unused norms, 1,408 more
    ],
)
def test_encoders_have_as_many_parameters_as_the_papers(
    config: DGCNNConfig, count: int, per_point_dim: int, pooled_dim: int
) -> None:
    network = config.build()
    assert num_parameters(network) == count
    assert (network.per_point_dim, network.pooled_dim) == (per_point_dim, pooled_dim)


def test_crosspoint_s_alignment_and_heads_have_as_many_parameters_as_the_paper_s() -> None:
    segmentation = CROSSPOINT_SEGMENTATION.build()
    assert segmentation.transform is not None and num_parameters(segmentation.transform) == 801_289
    assert num_parameters(contrastive_head(CROSSPOINT.build().pooled_dim)) == 2_362_624
    assert num_parameters(contrastive_head(segmentation.pooled_dim)) == 1_314_048


def test_pointmcd_s_models_have_as_many_parameters_as_the_paper_s() -> None:
    student = DGCNNConfig().build()
    head = classification_head(student.pooled_dim, 40)
    assert num_parameters(student, head) == 1_163_648
    assert num_parameters(student, head, Projection(student.per_point_dim, 512)) == 1_688_960

    student = SEGMENTATION.build()
    head = part_segmentation_head(student, 16, 50)
    assert num_parameters(student, head) == 659_072
    assert num_parameters(student, head, Projection(student.per_point_dim, 512)) == 1_184_384


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("config", [DGCNNConfig(), SEGMENTATION, CROSSPOINT, CROSSPOINT_SEGMENTATION])
def test_it_equals_convolutions_on_edges(config: DGCNNConfig, training: bool) -> None:
    torch.manual_seed(0)
    network = small(config).build().double().train(training)
    scramble(network)
    reference = copy.deepcopy(network)
    points = cloud(dtype=torch.float64)

    encoding, (per_point, pooled) = network(points), literal(reference, points)
    torch.testing.assert_close(encoding.per_point, per_point)
    torch.testing.assert_close(encoding.pooled, pooled)
    for name, statistic in reference.named_buffers():
        if "num_batches" not in name:
            torch.testing.assert_close(dict(network.named_buffers())[name], statistic)

    (encoding.pooled.square().sum() + encoding.per_point.sin().sum()).backward()
    (pooled.square().sum() + per_point.sin().sum()).backward()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(dict(network.named_parameters())[name].grad, parameter.grad, msg=name)


def test_only_with_the_final_relu_is_no_embedding_negative() -> None:
    assert (small(DGCNNConfig()).build()(cloud()).per_point >= 0).all()
    assert (small(CROSSPOINT).build()(cloud()).per_point < 0).any()


def test_local_features_are_those_of_all_graphs() -> None:
    network = small(DGCNNConfig()).build()
    (level,) = network(cloud()).levels
    assert network.level_dims == (32,) and level.features.shape == (3, 30, 32)
    assert torch.equal(level.points, cloud())


def test_the_alignment_begins_as_the_identity() -> None:
    transform = small(CROSSPOINT_SEGMENTATION).build().transform
    assert transform is not None
    assert torch.equal(transform(cloud()), torch.eye(3).expand(3, 3, 3))


def test_too_few_points_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"20.*12"):
        DGCNNConfig(width=0.1).build()(cloud(n=12))
