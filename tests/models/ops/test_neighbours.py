"""Tests of models/ops/neighbours.py, in the tiers that need no GPU; the Triton kernels' are in test_triton_kernels.py."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.ops import tiers
from models.ops.neighbours import Neighbours, ball_query, gather, nearest_neighbours, weighted_sum
from tests.models.ops import oracles

CLOUDS = oracles.clouds()
TIERS: tuple[tiers.Setting, ...] = ("reference", "cpu")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same(found: Neighbours, expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found.indices, expected[0]) and torch.equal(found.squared_distances, expected[1])


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", CLOUDS)
def test_neighbours_are_the_oracles(tier: tiers.Setting, name: str) -> None:
    points = CLOUDS[name]
    num_points = points.shape[1]
    queries = points.flip(1)[:, : (num_points + 1) // 2]
    for k in {1, min(num_points, 20), num_points}:
        with tiers.use(tier):
            assert_same(nearest_neighbours(queries, points, k), oracles.nearest_neighbours(queries, points, k))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("num_features", [1, 2, 4, 7, 8, 9, 64, 100])
def test_neighbours_in_feature_space_are_the_oracles(tier: tiers.Setting, num_features: int) -> None:
    features = random(2, 90, num_features)
    with_copies = features[:, torch.randint(0, 30, (90,), generator=torch.Generator().manual_seed(1))]
    mostly_zero = features.relu() * (torch.rand(2, 90, 1, generator=torch.Generator().manual_seed(2)) < 0.2)
    for points in (features, with_copies, mostly_zero, features + 1e3, torch.zeros(2, 90, num_features)):
        with tiers.use(tier):
            assert_same(nearest_neighbours(points, points, 20), oracles.nearest_neighbours(points, points, 20))


@pytest.mark.parametrize("tier", TIERS)
@given(data=st.data(), num_features=st.sampled_from([1, 3, 9]), num_points=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_ties_go_to_the_lowest_index(
    tier: tiers.Setting, data: st.DataObject, num_features: int, num_points: int
) -> None:
    size = num_points * num_features
    values = data.draw(st.lists(st.sampled_from([-1.0, -0.0, 0.0, 1.0, 3e20]), min_size=size, max_size=size))
    points = torch.tensor(values).view(1, num_points, num_features)
    queries = points[:, : data.draw(st.integers(1, num_points))]
    k = data.draw(st.integers(1, num_points))
    with tiers.use(tier):
        assert_same(nearest_neighbours(queries, points, k), oracles.nearest_neighbours(queries, points, k))
        if num_features == 3:
            for radius in (0.5, 1.0, 1.5):
                assert torch.equal(
                    ball_query(queries, points, radius, k), oracles.ball_query(queries, points, radius, k)
                )


def test_blocks_of_the_fast_path_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    from models.ops import cpu

    monkeypatch.setattr(cpu, "_BLOCK", 1000)
    before = torch.get_num_threads()
    for num_threads, num_clouds, num_points in ((1, 2, 150), (3, 5, 70), (2, 40, 9), (1, 1, 8000)):
        coordinates, features = random(num_clouds, num_points, 3), random(num_clouds, num_points, 16)
        try:
            torch.set_num_threads(num_threads)
            for points in (coordinates, features):
                queries = points[:, :60]
                found = nearest_neighbours(queries, points, 5)
                assert_same(found, oracles.nearest_neighbours(queries, points, 5))
            found_within = ball_query(coordinates[:, :60], coordinates, 0.3, 5)
            assert torch.equal(found_within, oracles.ball_query(coordinates[:, :60], coordinates, 0.3, 5))
        finally:
            torch.set_num_threads(before)


def test_numpys_matrix_products_get_their_threads_back() -> None:
    from threadpoolctl import threadpool_info, threadpool_limits

    points = random(2, 20, 3)
    with threadpool_limits(2, user_api="blas"):
        before = threadpool_info()
        nearest_neighbours(points, points, 3)
        assert threadpool_info() == before


@pytest.mark.parametrize("tier", TIERS)
def test_distances_are_float32_also_under_autocast(tier: tiers.Setting) -> None:
    points = random(2, 50, 16)
    with tiers.use(tier), torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(nearest_neighbours(points, points, 10), oracles.nearest_neighbours(points, points, 10))
        low = points.bfloat16()
        assert_same(nearest_neighbours(low, low, 10), oracles.nearest_neighbours(low.float(), low.float(), 10))


def test_neighbours_have_no_gradient() -> None:
    points = random(2, 50, 3).requires_grad_()
    found = nearest_neighbours(points, points, 10)
    assert not found.squared_distances.requires_grad and not ball_query(points, points, 1.0, 4).requires_grad


def test_a_point_is_its_own_first_neighbour_at_distance_zero() -> None:
    for points in (CLOUDS["random"], CLOUDS["far from the origin"].unique(dim=1), random(2, 80, 64)):
        found = nearest_neighbours(points, points, 3)
        assert not found.squared_distances[..., 0].any()
        assert torch.equal(found.indices[..., 0], torch.arange(points.shape[1]).expand(len(points), -1))


def test_permuted_points_give_permuted_neighbours() -> None:
    points = CLOUDS["random"]
    order = torch.randperm(points.shape[1], generator=torch.Generator().manual_seed(4))
    found, permuted = nearest_neighbours(points, points, 8), nearest_neighbours(points, points[:, order], 8)
    assert torch.equal(order[permuted.indices], found.indices)


def test_neither_moving_nor_enlarging_a_cloud_changes_who_is_near() -> None:
    points = torch.randint(-50, 50, (2, 100, 3), generator=torch.Generator().manual_seed(3)).float()
    found, within = nearest_neighbours(points, points, 8), ball_query(points, points, 20.0, 8)
    for changed, factor in ((points + 64, 1), (points * 8, 8)):
        again = nearest_neighbours(changed, changed, 8)
        assert_same(again, (found.indices, factor**2 * found.squared_distances))
        assert torch.equal(ball_query(changed, changed, 20.0 * factor, 8), within)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", CLOUDS)
def test_points_within_a_radius_are_the_oracles(tier: tiers.Setting, name: str) -> None:
    points = CLOUDS[name]
    centres = points[:, : (points.shape[1] + 2) // 3] + 0.01
    for radius in (1e-3, 0.3, 1.0):
        for k in (1, 8, points.shape[1] + 3):
            with tiers.use(tier):
                found = ball_query(centres, points, radius, k)
            assert torch.equal(found, oracles.ball_query(centres, points, radius, k))


@pytest.mark.parametrize("tier", TIERS)
def test_a_point_on_the_sphere_is_not_within_it(tier: tiers.Setting) -> None:
    points = torch.tensor([[[2.0, 0, 0], [0.5, 0, 0], [0, 1.0, 0], [0, 0, 0.25]]])
    with tiers.use(tier):
        assert ball_query(torch.zeros(1, 1, 3), points, 1.0, 3).tolist() == [[[1, 3, 1]]]
        assert ball_query(torch.zeros(1, 1, 3), points, 0.25, 3).tolist() == [[[3, 3, 3]]]  # none: the nearest


@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (2, 3, 2), (0,)])
def test_gathered_rows_and_their_gradient_are_those_of_indexing(shape: tuple[int, ...]) -> None:
    features, again = (random(3, 10, 6).requires_grad_() for _ in range(2))
    indices = torch.randint(0, 10, (3, *shape), generator=torch.Generator().manual_seed(5))
    gathered = gather(features, indices)
    expected = again[torch.arange(3).view(-1, *[1] * len(shape)), indices]
    assert torch.equal(gathered, expected)
    weights = random(*gathered.shape, seed=6)
    (gathered * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(features.grad, again.grad)


def test_weighted_sums_are_those_of_gathered_rows() -> None:
    features, again = (random(3, 10, 6).requires_grad_() for _ in range(2))
    indices = torch.randint(0, 10, (3, 7, 4), generator=torch.Generator().manual_seed(5))
    weights = random(3, 7, 4, seed=7)
    summed, expected = (
        weighted_sum(features, indices, weights),
        (gather(again, indices) * weights[..., None]).sum(dim=2),
    )
    torch.testing.assert_close(summed, expected)
    summed.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(features.grad, again.grad)


def test_gradients_agree_with_finite_differences() -> None:
    features = random(2, 6, 3).double().requires_grad_()
    indices = torch.randint(0, 6, (2, 4, 3), generator=torch.Generator().manual_seed(8))
    weights = random(2, 4, 3, seed=9).double()
    assert torch.autograd.gradcheck(lambda values: gather(values, indices), features)
    assert torch.autograd.gradcheck(lambda values: weighted_sum(values, indices, weights), features)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_features_keep_their_precision(dtype: torch.dtype) -> None:
    features = random(2, 30, 8).to(dtype).requires_grad_()
    indices = torch.randint(0, 30, (2, 40), generator=torch.Generator().manual_seed(5))
    total = gather(features, indices).sum() + weighted_sum(features, indices[..., None], torch.ones(2, 40, 1)).sum()
    total.backward()
    counts = torch.stack([row.bincount(minlength=30) for row in indices])
    assert total.dtype == dtype and features.grad is not None
    assert torch.equal(features.grad, (2 * counts)[..., None].expand(-1, -1, 8).to(dtype))


def repeated(run: Callable[[], Tensor]) -> bool:
    first = run()
    return all(torch.equal(first, run()) for _ in range(3))


def test_repeated_runs_give_the_same_bits() -> None:
    points, features = CLOUDS["random"], random(3, 150, 32)

    def gradient() -> Tensor:
        leaf = features.clone().requires_grad_()
        (gather(leaf, nearest_neighbours(points, points, 16).indices) * random(3, 150, 16, 32, seed=1)).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    assert repeated(gradient) and repeated(lambda: nearest_neighbours(features, features, 16).squared_distances)


COMPILED = """
import torch
from models.ops.distances import chamfer_distance, earth_movers_distance
from models.ops.interpolation import interpolate_from_three
from models.ops.neighbours import ball_query, gather, nearest_neighbours
from models.ops.sampling import farthest_points

def function(points):
    centres = gather(points, farthest_points(points, 10))
    grouped = gather(points, ball_query(centres, points, 0.2, 4)) + gather(points, nearest_neighbours(centres, points, 4).indices)
    spread = interpolate_from_three(grouped.amax(dim=2), centres, points)
    distances = (*chamfer_distance(spread, points), earth_movers_distance(spread, points))
    return spread.square().sum() + sum(each.sum() for each in distances)

points = torch.rand(2, 50, 3, requires_grad=True)
compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
torch.testing.assert_close(compiled(points), function(points))
gradients = [torch.autograd.grad(each(points), points)[0] for each in (compiled, function)]
torch.testing.assert_close(*gradients)
"""


@pytest.mark.slow
def test_a_compiled_function_runs_operations_without_a_break() -> None:
    """In a process of its own, where nothing checks shapes: the compiler does not look into those checks."""
    subprocess.run([sys.executable, "-c", COMPILED], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
