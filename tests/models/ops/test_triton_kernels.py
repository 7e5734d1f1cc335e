"""Tests of models/ops/triton_kernels.py: interpreted and compiled without a GPU, and on one where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.ops import reference, tiers
from tests.models.ops import oracles

CLOUDS = oracles.clouds()
ROOT = Path(__file__).parents[3]

INTERPRETED = """
import torch
from models.ops import reference, triton_kernels
from tests.models.ops import oracles

clouds = oracles.clouds()
clouds["in feature space"] = torch.randn(1, 12, 20, generator=torch.Generator().manual_seed(0))
clouds["many blocks"] = torch.rand(1, 600, 3, generator=torch.Generator().manual_seed(0))
for name, points in clouds.items():
    points = points[:2]
    if name != "many blocks":
        points = points[:, :40]
    queries, num_points = points[:, -2:], points.shape[1]
    k = min(num_points, 5)
    expected = reference.nearest_neighbours(queries, points, k)
    found = triton_kernels.nearest_neighbours(queries, points, k)
    assert all(torch.equal(one, other) for one, other in zip(found, expected)), name
    if points.shape[-1] > 3:
        continue
    for squared_radius in (1e-6, 0.05, 1.0):
        expected = reference.ball_query(queries + 0.01, points, squared_radius, 7)
        assert torch.equal(triton_kernels.ball_query(queries + 0.01, points, squared_radius, 7), expected), name
    start = torch.full((len(points),), num_points // 2)
    for origin_last in (False, True):
        arguments = (points, start, min(num_points, 15), origin_last)
        expected = reference.farthest_points(*arguments)
        assert torch.equal(triton_kernels.farthest_points(*arguments), expected), name
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from models.ops import triton_kernels as kernels

FLOATS, INTEGERS, NUMBER = "*fp32", "*i64", "i32"
SIGNATURES = {
    kernels._farthest_points_kernel: (
        [FLOATS, INTEGERS, INTEGERS, NUMBER, NUMBER],
        [{"block_size": 2048, "origin_last": True}, {"block_size": 2048, "origin_last": False}],
    ),
    kernels._select_kernel: ([FLOATS, INTEGERS, FLOATS, NUMBER, NUMBER], [{"block_size": 1}, {"block_size": 1024}]),
    kernels._squared_distances_kernel: (
        [FLOATS, FLOATS, FLOATS, NUMBER, NUMBER],
        [{"width": 4, "levels": 2, "block_size": 1024}, {"width": 128, "levels": 7, "block_size": 32}],
    ),
    kernels._ball_query_kernel: (
        [FLOATS, FLOATS, FLOATS, INTEGERS, NUMBER, NUMBER, NUMBER], [{"block_size": 256, "num_slots": 32}]
    ),
}
for kernel, (types, sizes) in SIGNATURES.items():
    for constants in sizes:
        signature = dict(zip(kernel.arg_names, types + ["constexpr"] * len(constants), strict=True))
        source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): size for name, size in constants.items()})
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
        assert "fma.rn" not in compiled.asm["ptx"], kernel
        assert len(compiled.asm["cubin"]) > 0
"""


def run(program: str, **environment: str) -> None:
    path = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, **path, **environment})


@pytest.mark.slow
def test_interpreted_kernels_equal_the_reference() -> None:
    run(INTERPRETED, TRITON_INTERPRET="1")


@pytest.mark.slow
def test_kernels_compile_for_a_gpu_and_fuse_no_products_with_sums(tmp_path: Path) -> None:
    run(COMPILED, TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CLOUDS)
def test_on_a_gpu_every_operation_equals_the_reference(name: str) -> None:
    from models.ops.neighbours import ball_query, nearest_neighbours
    from models.ops.sampling import farthest_points

    points = CLOUDS[name]
    num_points = points.shape[1]
    device_points = points.cuda()
    assert tiers.choose(device_points) == "triton"
    k = min(num_points, 20)
    found = nearest_neighbours(device_points, device_points, k)
    expected = reference.nearest_neighbours(points, points, k)
    assert torch.equal(found.indices.cpu(), expected[0]) and torch.equal(found.squared_distances.cpu(), expected[1])
    for radius in (1e-3, 0.3, 1.0):
        within = ball_query(device_points + 0.01, device_points, radius, 9)
        assert torch.equal(within.cpu(), reference.ball_query((device_points + 0.01).cpu(), points, radius**2, 9))
    start = torch.full((len(points),), num_points - 1)
    for origin_last in (False, True):
        samples = farthest_points(device_points, num_points, num_points - 1, origin_last=origin_last)
        assert torch.equal(samples.cpu(), reference.farthest_points(points, start, num_points, origin_last))


@pytest.mark.gpu
@pytest.mark.parametrize("num_features", [2, 3, 16, 64, 100, 1024])
@pytest.mark.parametrize("num_points", [100, 1024, 5000, 9000])
def test_on_a_gpu_neighbours_in_feature_space_equal_the_reference(num_features: int, num_points: int) -> None:
    points = torch.randn(2, num_points, num_features, generator=torch.Generator().manual_seed(0)).cuda()
    queries = points[:, :50]
    with tiers.use("triton"):
        from models.ops.neighbours import nearest_neighbours

        found = nearest_neighbours(queries, points, 20)
    expected = reference.nearest_neighbours(queries.cpu(), points.cpu(), 20)
    assert torch.equal(found.indices.cpu(), expected[0]) and torch.equal(found.squared_distances.cpu(), expected[1])


@pytest.mark.gpu
def test_on_a_gpu_gradients_and_matchings_are_those_of_the_cpu_and_the_same_every_time() -> None:
    from models.ops.distances import chamfer_distance, match_by_auction
    from models.ops.neighbours import gather

    a, b = (torch.rand(4, 300, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    results = []
    for device in ("cpu", "cuda", "cuda", "cuda"):
        one, other = a.to(device).requires_grad_(), b.to(device).requires_grad_()
        distances = sum(each.sum() for each in chamfer_distance(one, other))
        gathered = gather(one, match_by_auction(one, other)).square().sum()
        (distances + gathered).backward()  # type: ignore[union-attr]
        assert one.grad is not None and other.grad is not None
        results.append((one.grad.cpu(), other.grad.cpu()))
    torch.testing.assert_close(results[0], results[1])
    assert all(torch.equal(x, y) for result in results[2:] for x, y in zip(result, results[1], strict=True))
