"""What holds of every student. A new one adds a line to STUDENTS."""

import copy
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.encoding import Encoding, PointEncoder
from models.ops import tiers
from models.students import build_student
from models.students.dgcnn import CROSSPOINT, CROSSPOINT_SEGMENTATION, DGCNN, SEGMENTATION, DGCNNConfig
from models.students.pointnet import PLAIN

NUM_POINTS = 48


def small_dgcnn(config: DGCNNConfig) -> dict[str, Any]:
    return {**config.model_dump(), "width": 1 / 16, "num_neighbours": 8}


# Balls take in all that lies in them: which of the points comes first then makes no difference
_WIDE_BALL = {"radius": 1.5, "num_neighbours": 64, "widths": (8, 8)}
_BALL = {"radius": 0.8, "num_neighbours": 64, "widths": (6, 8, 12)}
STUDENTS: dict[str, dict[str, Any]] = {
    "pointnet": {"kind": "pointnet", "width": 1 / 8},
    "pointnet, plain": {**PLAIN.model_dump(), "width": 1 / 16},
    "pointnet2, one scale": {
        "kind": "pointnet2",
        "steps": ({"num_points": 20, "balls": (_BALL,)}, {"num_points": 8, "balls": (_WIDE_BALL,)}),
        "widths": (24, 32),
    },
    "pointnet2": {
        "kind": "pointnet2",
        "steps": ({"num_points": 20, "balls": (_BALL, _WIDE_BALL)}, {"num_points": 8, "balls": (_WIDE_BALL, _BALL)}),
        "widths": (24, 32),
    },
    "dgcnn": small_dgcnn(DGCNNConfig()),
    "dgcnn, segmentation": small_dgcnn(SEGMENTATION),
    "dgcnn, crosspoint": small_dgcnn(CROSSPOINT),
    "dgcnn, crosspoint segmentation": small_dgcnn(CROSSPOINT_SEGMENTATION),
    "pointmlp": {
        "kind": "pointmlp",
        "embedding_channels": 8,
        "stages": ({"num_points": 24, "channels": 16}, {"num_points": 10, "channels": 24}),
        "num_neighbours": 8,
    },
    "curvenet": {
        "kind": "curvenet",
        "stem_channels": 8,
        "num_neighbours": 8,
        "blocks": (
            # Balls without neighbours, for the same reason
            {"num_points": 48, "radius": 1e-3, "channels": 16, "bottleneck": 2, "num_curves": 6},
            {"num_points": 16, "radius": 1e-3, "channels": 24, "bottleneck": 2},
        ),
        "curve_length": 3,
        "embedding_channels": 32,
    },
    "masked_transformer": {
        "kind": "masked_transformer",
        "num_groups": (24, 16, 12),
        "group_sizes": (8, 4, 4),
        "widths": (8, 16, 24),
        "embedding_widths": (8, 16),
        "depths": (1, 1, 1),
        "num_heads": 2,
        "drop_path": 0.0,
        "stage_norms": "last",  # the others are not read by embeddings
    },
}
every_student = pytest.mark.parametrize("name", STUDENTS)


def student(name: str) -> PointEncoder:
    torch.manual_seed(0)
    network = build_student(STUDENTS[name])
    if isinstance(network, DGCNN) and network.transform is not None:  # it begins at zero, and passes no gradient on
        torch.nn.init.normal_(network.transform.matrix.weight, std=0.1)
    return network


def clouds(b: int = 4, seed: int = 1) -> Tensor:
    """Points on ellipsoids inside the unit ball."""
    generator = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(b, NUM_POINTS, 3, generator=generator), dim=2)
    return directions * (0.4 + 0.6 * torch.rand(b, 1, 3, generator=generator))


def learn(network: PointEncoder, points: Tensor) -> Encoding:
    encoding = network(points)
    total = encoding.pooled.float().square().sum() + encoding.per_point.float().sin().sum()
    if encoding.penalty is not None:
        total = total + encoding.penalty
    total.backward()
    return encoding


@every_student
def test_widths_and_levels_are_as_declared(name: str) -> None:
    network = student(name)
    encoding = network(clouds())
    assert encoding.pooled.shape == (4, network.pooled_dim)
    assert encoding.per_point.shape[2] == network.per_point_dim
    num_left = NUM_POINTS if encoding.indices is None else encoding.indices.shape[1]
    assert encoding.per_point.shape[1] == num_left
    assert tuple(level.features.shape[2] for level in encoding.levels) == network.level_dims
    if encoding.levels:
        assert torch.equal(encoding.levels[0].points, clouds())
        left = encoding.levels[-1].points
        if encoding.indices is not None:
            assert torch.equal(torch.take_along_dim(clouds(), encoding.indices[..., None], dim=1), left)


@every_student
def test_the_order_of_points_does_not_matter(name: str) -> None:
    network = student(name).eval()
    order = torch.cat(
        [torch.zeros(1, dtype=torch.long), 1 + torch.randperm(NUM_POINTS - 1)]
    )  # sampling starts at row 0
    encoding, permuted = network(clouds()), network(clouds()[:, order])
    torch.testing.assert_close(permuted.pooled, encoding.pooled, rtol=1e-4, atol=1e-5)
    if encoding.indices is None:
        torch.testing.assert_close(permuted.per_point, encoding.per_point[:, order], rtol=1e-4, atol=1e-5)
    else:
        assert permuted.indices is not None and torch.equal(order[permuted.indices], encoding.indices)
        torch.testing.assert_close(permuted.per_point, encoding.per_point, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in STUDENTS if name.startswith("pointnet")])
def test_repeating_points_changes_nothing_where_only_maxima_are_taken(name: str) -> None:
    network = student(name).eval()
    points = clouds()
    repeated = torch.cat([points, points[:, :5], points[:, 3:4].expand(-1, 4, -1)], dim=1)
    torch.testing.assert_close(network(repeated).pooled, network(points).pooled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["pointnet2", "masked_transformer"])
def test_centres_keep_away_from_the_origin_where_asked(name: str) -> None:
    points = clouds()
    points[:, 7:12] = 0.01 * points[:, 7:12] / points[:, 7:12].norm(dim=2, keepdim=True)
    chosen = []
    for origin_last in (False, True):
        indices = build_student({**STUDENTS[name], "origin_last": origin_last}).eval()(points).indices
        assert indices is not None
        chosen.append(((indices >= 7) & (indices < 12)).any().item())
    assert chosen == [True, False]


@every_student
def test_gradients_reach_every_parameter(name: str) -> None:
    network = student(name)
    learn(network, clouds())
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", [name for name in STUDENTS if name != "curvenet"])  # its steps' gradient is another's
def test_gradients_agree_with_finite_differences(name: str) -> None:
    """Along one random direction of all parameters, in float64."""
    network, generator = student(name).double(), torch.Generator().manual_seed(2)
    points, parameters = clouds().double(), list(network.parameters())
    directions = [torch.randn(each.shape, generator=generator, dtype=torch.float64) for each in parameters]
    before = copy.deepcopy(network.state_dict())

    def loss(step: float) -> Tensor:
        network.load_state_dict(before)
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += step * direction
        encoding = network(points)
        return encoding.pooled.square().mean() + encoding.per_point.sin().mean()

    gradients = torch.autograd.grad(loss(0), parameters)
    along = sum(((one * other).sum() for one, other in zip(gradients, directions, strict=True)), start=torch.zeros(()))
    with torch.no_grad():
        difference = (loss(1e-9) - loss(-1e-9)) / 2e-9
    torch.testing.assert_close(difference, along.double(), rtol=1e-4, atol=1e-5)


@every_student
def test_every_tier_of_operations_gives_the_same_bits(name: str) -> None:
    network = student(name).eval()
    encodings = []
    for tier in ("reference", "cpu"):
        with torch.no_grad(), tiers.use(tier):
            encodings.append(network(clouds()))
    assert torch.equal(encodings[0].per_point, encodings[1].per_point)
    assert torch.equal(encodings[0].pooled, encodings[1].pooled)


@every_student
def test_a_step_is_the_same_every_time(name: str) -> None:
    first, second = student(name), student(name)
    one, other = learn(first, clouds()), learn(second, clouds())
    assert torch.equal(one.per_point, other.per_point) and torch.equal(one.pooled, other.pooled)
    for (parameter_name, parameter), twin in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(parameter.grad, twin.grad), parameter_name


@every_student
def test_statistics_move_in_training_and_stay_in_evaluation(name: str) -> None:
    network = student(name)
    before = copy.deepcopy(dict(network.named_buffers()))
    with torch.no_grad():
        network.eval()(clouds())
    assert all(torch.equal(buffer, before[key]) for key, buffer in network.named_buffers())
    network.train()(clouds())
    for key, buffer in network.named_buffers():
        assert not torch.equal(buffer, before[key]), key


@every_student
def test_a_cloud_is_encoded_alike_in_any_batch(name: str) -> None:
    network = student(name).eval()
    alone, together = network(clouds()[1:2]), network(clouds())
    torch.testing.assert_close(alone.per_point, together.per_point[1:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone.pooled, together.pooled[1:2], rtol=1e-4, atol=1e-5)


@every_student
def test_evaluation_without_gradients_gives_the_same(name: str) -> None:
    network = student(name).eval()
    with torch.no_grad():
        without = network(clouds())
    torch.testing.assert_close(without.pooled, network(clouds()).pooled)


@every_student
def test_bfloat16_changes_little_and_no_neighbourhood_of_points(name: str) -> None:
    network = student(name)
    exact = copy.deepcopy(network)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoding = learn(network, clouds())
    expected = learn(exact, clouds())
    assert F.cosine_similarity(encoding.pooled.float(), expected.pooled, dim=1).min() > 0.98
    if expected.indices is not None:
        assert encoding.indices is not None and torch.equal(encoding.indices, expected.indices)
    for key, parameter in network.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.grad is not None and parameter.grad.isfinite().all(), key


@every_student
def test_a_cloud_that_is_one_point_again_and_again_passes(name: str) -> None:
    network = student(name)
    encoding = learn(network, torch.full((2, NUM_POINTS, 3), 0.3))
    assert encoding.pooled.isfinite().all()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key


COMPILED = """
import json, sys, torch
from models.students import build_student

torch.manual_seed(0)
network = build_student(json.loads(sys.argv[1]))
points = torch.randn(4, 48, 3)
results = []
for encode in (network, torch.compile(network, fullgraph=True)):
    network.zero_grad()
    encoding = encode(points)
    (encoding.pooled.square().sum() + encoding.per_point.sin().sum()).backward()
    results.append([encoding.pooled.detach(), encoding.per_point.detach(), *(each.grad for each in network.parameters())])
norms = [torch.linalg.vector_norm(eager) for eager in results[0]]
rounding = 1e-5 * max(norms)  # the gradient of a bias before a norm is nothing else
for eager, compiled, norm in zip(*results, norms, strict=True):
    assert torch.linalg.vector_norm(eager - compiled) <= 1e-2 * norm + rounding + 1e-4
"""


@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute on a machine that does nothing else
@pytest.mark.parametrize(
    "name", ["pointnet", "pointnet2, one scale", "dgcnn", "pointmlp", "curvenet", "masked_transformer"]
)
def test_compiled_it_does_the_same_in_one_graph(name: str) -> None:
    """In a process of its own: the compiler does not look into the checks that tests put around every function."""
    subprocess.run([sys.executable, "-c", COMPILED, json.dumps(STUDENTS[name])], check=True)
