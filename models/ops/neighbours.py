"""The nearest points, the points within a radius, and the features of whichever points an index names."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.ops.checks import check_clouds, check_count, check_indices, check_no_nan, check_same_clouds
from models.ops.opaque import opaque
from models.ops.tiers import implementation


@dataclass(frozen=True)
class Neighbours:
    """For each query its nearest points, nearest first."""

    indices: Int64[Tensor, "b m k"]
    squared_distances: Float32[Tensor, "b m k"]


def nearest_neighbours(queries: Float[Tensor, "b m d"], points: Float[Tensor, "b n d"], k: int) -> Neighbours:
    """The k nearest points of each query, ascending by distance, of equals the lowest index first. No gradient.

    Distances are sums of squared differences in float32, whatever comes in and also under autocast.
    """
    check_clouds("queries", queries, None)
    check_clouds("points", points, None)
    check_same_clouds("queries", queries, "points", points)
    if queries.shape[-1] != points.shape[-1]:
        raise ValueError(
            f"queries is {tuple(queries.shape)} and points is {tuple(points.shape)}: the last axis, features, must agree."
        )
    check_count("k", k, "points", points.shape[1])
    indices, squared = _nearest_neighbours(queries.detach().float(), points.detach().float(), k)
    return Neighbours(indices, squared)


def ball_query(
    centres: Float[Tensor, "b m 3"], points: Float[Tensor, "b n 3"], radius: float, k: int
) -> Int64[Tensor, "b m k"]:
    """The first k points, in their own order, that lie nearer to each centre than the radius; the first of them again
    and again where they are fewer. A centre with none gets its nearest point. No gradient.
    """
    check_clouds("centres", centres)
    check_clouds("points", points)
    check_same_clouds("centres", centres, "points", points)
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1.")
    if not radius > 0:
        raise ValueError(f"radius is {radius}; expected more than 0.")
    indices: Tensor = _ball_query(centres.detach().float(), points.detach().float(), radius**2, k)
    return indices


def gather(features: Float[Tensor, "b n c"], indices: Int64[Tensor, "b *s"]) -> Float[Tensor, "b *s c"]:
    """Row `indices[b, ...]` of cloud b's features, for each index. The gradient is summed in the same order each time."""
    rows = _rows_of_all_clouds(features, indices)
    gathered: Tensor = _Gather.apply(features.flatten(0, 1), rows.flatten())
    return gathered.view(*indices.shape, features.shape[-1])


def weighted_sum(
    features: Float[Tensor, "b n c"], indices: Int64[Tensor, "b m j"], weights: Float[Tensor, "b m j"]
) -> Float[Tensor, "b m c"]:
    """The sum of rows `indices[b, m]` of cloud b's features times their weights, without the rows in memory.

    Gradients reach the features, in a fixed order of summation, and not the weights.
    """
    if weights.shape != indices.shape:
        raise ValueError(f"weights is {tuple(weights.shape)}; expected {tuple(indices.shape)}, one for each index.")
    rows = _rows_of_all_clouds(features, indices).flatten(0, 1)
    weights = weights.detach().flatten(0, 1).to(features.dtype)
    summed: Tensor = _WeightedSum.apply(features.flatten(0, 1), rows, weights)
    return summed.view(*indices.shape[:2], features.shape[-1])


def _rows_of_all_clouds(features: Tensor, indices: Tensor) -> Tensor:
    """Indices into the features of all clouds, one after the other."""
    check_clouds("features", features, None)
    check_same_clouds("features", features, "indices", indices)
    check_indices("indices", indices, "features", features.shape[1])
    first_rows = torch.arange(len(features), device=features.device) * features.shape[1]
    return indices + first_rows.view(-1, *[1] * (indices.ndim - 1))


class _Gather(torch.autograd.Function):
    """Rows of a matrix [n, c] by index [r]."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.num_rows = len(features)
        return features.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return _sum_by_row(gradient, rows, None, ctx.num_rows), None


class _WeightedSum(torch.autograd.Function):
    """Sums of a matrix's rows [n, c] by index [r, j] times weights [r, j]."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.num_rows = len(features)
        return torch.nn.functional.embedding_bag(rows, features, mode="sum", per_sample_weights=weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        rows, weights = ctx.saved_tensors
        return _sum_by_row(gradient, rows, weights, ctx.num_rows), None, None


def _sum_by_row(gradient: Tensor, rows: Tensor, weights: Tensor | None, num_rows: int) -> Tensor:
    """Adds gradient [r, c] times weights [r, j] to rows [r, j] of zeros [num_rows, c].

    Sorted by row, every sum has one writer and one order; on CPUs and GPUs that also beats adding to scattered rows.
    """
    width = rows.shape[1] if rows.ndim == 2 else 1
    order = rows.flatten().argsort(stable=True)
    counts = torch.bincount(rows.flatten(), minlength=num_rows)
    return torch.nn.functional.embedding_bag(
        order // width if width > 1 else order,
        gradient.contiguous(),
        counts.cumsum(0) - counts,
        mode="sum",
        per_sample_weights=None if weights is None else weights.flatten()[order],
    )


@opaque(
    "nearest_neighbours(Tensor queries, Tensor points, int k) -> (Tensor, Tensor)",
    like=lambda queries, points, k: (
        queries.new_empty(*queries.shape[:2], k, dtype=torch.int64),
        queries.new_empty(*queries.shape[:2], k),
    ),
)
def _nearest_neighbours(queries: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    check_no_nan(queries=queries, points=points)
    indices, squared = implementation(queries, points).nearest_neighbours(queries, points, k)
    return indices, squared


@opaque(
    "ball_query(Tensor centres, Tensor points, float squared_radius, int k) -> Tensor",
    like=lambda centres, points, squared_radius, k: centres.new_empty(*centres.shape[:2], k, dtype=torch.int64),
)
def _ball_query(centres: Tensor, points: Tensor, squared_radius: float, k: int) -> Tensor:
    check_no_nan(centres=centres, points=points)
    indices: Tensor = implementation(centres, points).ball_query(centres, points, squared_radius, k)
    return indices
