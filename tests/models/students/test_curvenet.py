"""Tests of models/students/curvenet.py."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from models.heads import part_segmentation_head
from models.students.curvenet import (
    CurveAggregation,
    CurveBlock,
    CurveBlockConfig,
    CurveNet,
    CurveNetConfig,
    CurveWalks,
    LocalAggregation,
    curvenet_head,
    edge_geometry,
)

SMALL = CurveNetConfig(
    stem_channels=8,
    num_neighbours=6,
    blocks=(
        CurveBlockConfig(num_points=64, radius=0.3, channels=16, bottleneck=2, num_curves=5),
        CurveBlockConfig(num_points=64, radius=0.3, channels=16, bottleneck=4, num_curves=5),
        CurveBlockConfig(num_points=24, radius=0.5, channels=24, bottleneck=2),
        CurveBlockConfig(num_points=12, radius=1.0, channels=32, bottleneck=4),
    ),
    embedding_channels=20,
)


def cloud(b: int = 2, n: int = 48, seed: int = 0) -> Tensor:
    return torch.randn(b, n, 3, generator=torch.Generator().manual_seed(seed))


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def small(seed: int = 0) -> CurveNet:
    torch.manual_seed(seed)
    return SMALL.build()


def convolutions(layers: nn.Sequential, features: Tensor) -> Tensor:
    """The same layers as 1x1 convolutions over [b, c, n, k], which is how papers write them."""
    for layer in layers:
        if isinstance(layer, nn.Linear):
            features = F.conv2d(features, layer.weight[..., None, None], layer.bias)
        elif isinstance(layer, nn.BatchNorm1d):
            features = F.batch_norm(features, None, None, layer.weight, layer.bias, training=True)
        else:
            features = layer(features.clone())
    return features


def on_points(layers: nn.Sequential, features: Tensor) -> Tensor:
    """The same on [b, n, c]."""
    return convolutions(layers, features.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)


def local_by_convolutions(layer: LocalAggregation, points: Tensor, features: Tensor, neighbours: Tensor) -> Tensor:
    geometry = convolutions(layer.geometry, edge_geometry(points, neighbours).permute(0, 3, 1, 2))
    batch = torch.arange(len(points))[:, None, None]
    edges = (features[batch, neighbours] - features[:, :, None]).permute(0, 3, 1, 2)
    return convolutions(layer.layers, F.leaky_relu(edges + geometry, 0.2)).mean(dim=3).transpose(1, 2)


def walks_one_by_one(walks: CurveWalks, features: Tensor, neighbours: Tensor) -> Tensor:
    """Curve after curve, pairs written down; norms need all curves of a step, so steps are the outer loop."""
    gate = torch.sigmoid(features @ walks.gate.weight[0])
    num_clouds = len(features)
    features = gate[..., None] * features
    starts = gate.argsort(dim=1, descending=True)[:, : walks.num_curves].tolist()
    paths = [[[place] for place in row] for row in starts]
    curves = [[features[b, place] for place in starts[b]] for b in range(num_clouds)]
    for step in range(1, walks.curve_length):
        if step > 1:
            pairs = torch.stack(
                [
                    torch.cat([features[b, paths[b][q][-1]], curves[b][q]])
                    for b in range(num_clouds)
                    for q in range(walks.num_curves)
                ]
            )
            shares = torch.softmax(walks.momentum_norm(walks.momentum(pairs)), dim=1)
            shares = shares.view(num_clouds, walks.num_curves, 2)
            for b in range(num_clouds):
                for q in range(walks.num_curves):
                    now, before = shares[b, q]
                    curves[b][q] = now * features[b, paths[b][q][-1]] + before * curves[b][q]
        pairs = torch.stack(
            [
                torch.cat([curves[b][q], features[b, candidate]])
                for b in range(num_clouds)
                for q in range(walks.num_curves)
                for candidate in neighbours[b, paths[b][q][-1]]
            ]
        )
        scores = walks.agent_norm(pairs @ walks.agent.weight.T).view(num_clouds, walks.num_curves, -1)
        for b in range(num_clouds):
            for q in range(walks.num_curves):
                here = paths[b][q][-1]
                best, best_score = -1, -torch.inf
                for rank, candidate in enumerate(neighbours[b, here].tolist()):
                    score = scores[b, q, rank]
                    if step > 1:
                        way, behind = features[b, candidate] - features[b, here], features[b, here] - curves[b][q]
                        cosine = way @ behind / (way.norm() * behind.norm()).clamp(min=1e-8)
                        score = score * (1 + cosine).clamp(0, 1)
                    if score.item() > best_score:
                        best, best_score = candidate, score.item()
                paths[b][q].append(best)
    return torch.stack([features[b][torch.tensor(paths[b])] for b in range(num_clouds)])


def aggregation_by_loops(layer: CurveAggregation, features: Tensor, curves: Tensor) -> Tensor:
    learned = torch.empty(*features.shape[:2], 2 * layer.query.out_features, dtype=features.dtype)
    for b in range(len(features)):
        attention = curves[b] @ layer.attention.weight[0]
        by_curve = [attention[q].softmax(0) @ curves[b, q] for q in range(curves.shape[1])]
        by_position = [attention[:, i].softmax(0) @ curves[b, :, i] for i in range(curves.shape[2])]
        whole = torch.stack(by_curve) @ layer.curve_key.weight.T
        positions = torch.stack(by_position) @ layer.position_key.weight.T
        for n in range(features.shape[1]):
            query = layer.query.weight @ features[b, n]
            first = (whole @ query).softmax(0) @ (whole @ layer.curve_value.weight.T)
            second = (positions @ query).softmax(0) @ (positions @ layer.position_value.weight.T)
            learned[b, n] = torch.cat([first, second])
    return F.leaky_relu(features + on_points(layer.output, learned), 0.2)


def test_the_classifier_has_as_many_parameters_as_the_paper_s() -> None:
    network = CurveNetConfig().build()
    assert (network.per_point_dim, network.pooled_dim) == (1024, 2048)
    assert num_parameters(network) + num_parameters(curvenet_head(2048, 40)) == 2_140_672


def test_points_survive_as_the_paper_has_it() -> None:
    with torch.no_grad():
        encoding = CurveNetConfig(width=0.125).build().eval()(cloud(1, 1024))
    assert encoding.per_point.shape == (1, 64, 128) and encoding.pooled.shape == (1, 256)
    assert encoding.indices is not None and len(encoding.indices.unique()) == 64


def test_local_aggregation_on_rows_is_the_paper_s_convolutions() -> None:
    torch.manual_seed(0)
    layer = LocalAggregation(8).double()
    points, features = cloud().double(), torch.randn(2, 48, 8, dtype=torch.float64)
    neighbours = torch.cdist(points, points).topk(5, largest=False).indices
    expected = local_by_convolutions(layer, points, features, neighbours)
    torch.testing.assert_close(layer(points, features, neighbours), expected)


@pytest.mark.parametrize("training", [True, False])
def test_walks_all_at_once_are_the_walks_one_by_one(training: bool) -> None:
    torch.manual_seed(0)
    walks = CurveWalks(8, num_curves=7, curve_length=5).double().train(training)
    points, features = cloud().double(), torch.randn(2, 48, 8, dtype=torch.float64)
    neighbours = torch.cdist(points, points).topk(6, largest=False).indices[..., 1:]
    with torch.no_grad():
        curves = walks(features, neighbours)
        assert curves.shape == (2, 7, 5, 8)
        torch.testing.assert_close(curves, walks_one_by_one(walks, features, neighbours))


def test_aggregation_of_curves_is_the_paper_s_formula() -> None:
    torch.manual_seed(0)
    layer = CurveAggregation(6).double()
    features, curves = torch.randn(2, 9, 6, dtype=torch.float64), torch.randn(2, 4, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(features, curves), aggregation_by_loops(layer, features, curves))


def test_each_step_of_a_curve_goes_to_a_neighbour_of_the_last_point() -> None:
    torch.manual_seed(0)
    walks = CurveWalks(4, num_curves=5, curve_length=6)
    features = torch.randn(1, 30, 4)
    neighbours = torch.cdist(cloud(1, 30), cloud(1, 30)).topk(5, largest=False).indices[..., 1:]
    gated = torch.sigmoid(walks.gate(features)) * features
    for path in walks(features, neighbours)[0]:
        places = torch.cdist(path, gated[0]).argmin(dim=1).tolist()
        torch.testing.assert_close(gated[0, places], path)
        assert all(after in neighbours[0, before] for before, after in pairwise(places))


def test_survivors_are_points_of_the_cloud_and_embeddings_nowhere_negative() -> None:
    encoding = small()(cloud())
    assert encoding.indices is not None
    assert encoding.per_point.shape == (2, 12, 20) and encoding.pooled.shape == (2, 40)
    assert all(len(row.unique()) == 12 and row.min() >= 0 and row.max() < 48 for row in encoding.indices)
    assert (encoding.per_point >= 0).all() and (encoding.per_point > 0).float().mean() > 0.2
    torch.testing.assert_close(encoding.pooled[:, :20], encoding.per_point.amax(dim=1))
    torch.testing.assert_close(encoding.pooled[:, 20:], encoding.per_point.mean(dim=1))


def test_permuting_all_points_but_the_first_changes_nothing() -> None:
    # Balls of which nothing is left out: of a fuller one, the first points in their order take part
    blocks = tuple(block.model_copy(update={"radius": 0.01}) for block in SMALL.blocks)
    torch.manual_seed(0)
    network = SMALL.model_copy(update={"blocks": blocks}).build().eval()
    points = cloud()
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(47)])
    encoding, permuted = network(points), network(points[:, order])
    assert encoding.indices is not None and permuted.indices is not None
    torch.testing.assert_close(order[permuted.indices], encoding.indices)
    torch.testing.assert_close(permuted.per_point, encoding.per_point)
    torch.testing.assert_close(permuted.pooled, encoding.pooled)


def test_a_cloud_is_encoded_alike_each_time_and_in_any_batch_in_eval_mode() -> None:
    network = small().eval()
    points = cloud()
    together = network(points)
    assert torch.equal(network(points).pooled, together.pooled)
    torch.testing.assert_close(network(points[1:2]).pooled, together.pooled[1:2])


def test_the_gradient_reaches_every_parameter() -> None:
    network = small()
    encoding = network(cloud())
    (encoding.pooled * torch.randn_like(encoding.pooled)).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_cloud_of_one_place_has_finite_embeddings_and_gradients() -> None:
    network = small()
    encoding = network(torch.ones(2, 48, 3))
    encoding.pooled.sum().backward()
    assert encoding.pooled.isfinite().all()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in network.parameters())


def test_geometry_stays_float32_under_autocast() -> None:
    network = small().eval()
    seen: list[torch.dtype] = []
    for block in network.blocks:
        assert isinstance(block, CurveBlock)
        block.local.geometry.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
    points = cloud()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoding = network(points)
        encoding.pooled.float().sum().backward()
    assert set(seen) == {torch.float32} and encoding.indices is not None
    assert torch.equal(encoding.indices, network(points).indices)
    assert encoding.pooled.isfinite().all()


def test_a_larger_cloud_is_thinned_before_the_first_block() -> None:
    encoding = small().eval()(cloud(1, 100))
    assert encoding.indices is not None and encoding.indices.max() > 48


def test_a_cloud_with_too_few_neighbours_is_refused() -> None:
    with pytest.raises(ValueError, match="6 neighbours of each point, but is left with 6 points"):
        small()(cloud(1, 6))


def test_a_cloud_with_fewer_points_than_curves_is_refused() -> None:
    blocks = (SMALL.blocks[0].model_copy(update={"num_curves": 20}),)
    network = SMALL.model_copy(update={"blocks": blocks}).build()
    with pytest.raises(ValueError, match="20 curves need as many points to start from, but the cloud has 15"):
        network(cloud(1, 15))


def test_widths_scale_together() -> None:
    network = CurveNetConfig(width=0.25).build()
    assert (network.per_point_dim, network.pooled_dim) == (256, 512)


@pytest.mark.parametrize("values", [{"curve_length": 1}, {"blocks": ()}, {"curves": 3}, {"num_neighbours": 0}])
def test_a_config_that_makes_no_sense_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        CurveNetConfig.model_validate(values)


def test_every_point_gets_part_logits_from_the_levels() -> None:
    network = small()
    head = part_segmentation_head(network, num_categories=3, num_parts=7)
    logits = head(network(cloud()), torch.tensor([0, 2]))
    assert logits.shape == (2, 48, 7)
    logits.square().sum().backward()
    for name, parameter in [*network.stem.named_parameters(), *network.blocks.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.any(), name
