"""The nearest points, the points within a radius, and the features of whichever points an index names."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from models.ops.checks import check_clouds, check_count, check_indices, check_no_nan, check_same_clouds


@dataclass(frozen=True)
class Neighbours:
    """For each query its nearest points, nearest first."""

    indices: Int64[Tensor, "b m k"]
    squared_distances: Float32[Tensor, "b m k"]


def nearest_neighbours(queries: Float[Tensor, "b m d"], points: Float[Tensor, "b n d"], k: int) -> Neighbours:
    """The k nearest points of each query, ascending by distance, of equals the lowest index first. No gradient.

    Distances are float32 whatever comes in and also under autocast. In up to three dimensions they are sums of squared
    differences; in feature spaces they are taken from a matrix product, which costs some of the last digits.
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
    indices: Tensor = _ball_query(centres.detach().float(), points.detach().float(), radius, k)
    return indices


def gather(features: Float[Tensor, "b n c"], indices: Int64[Tensor, "b *s"]) -> Float[Tensor, "b *s c"]:
    """Row `indices[b, ...]` of cloud b's features, for each index. The gradient is summed in the same order each time."""
    check_clouds("features", features, None)
    check_same_clouds("features", features, "indices", indices)
    check_indices("indices", indices, "features", features.shape[1])
    offsets = torch.arange(len(features), device=features.device) * features.shape[1]
    rows = indices.flatten(1) + offsets[:, None]
    return features.flatten(0, 1).index_select(0, rows.flatten()).view(*indices.shape, -1)


@torch.library.custom_op("viewpoint::nearest_neighbours", mutates_args=())
def _nearest_neighbours(queries: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    check_no_nan(queries=queries, points=points)
    return smallest(squared_distances(queries, points), k)


@_nearest_neighbours.register_fake
def _(queries: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (*queries.shape[:2], k)
    return queries.new_empty(shape, dtype=torch.int64), queries.new_empty(shape)


@torch.library.custom_op("viewpoint::ball_query", mutates_args=())
def _ball_query(centres: Tensor, points: Tensor, radius: float, k: int) -> Tensor:
    check_no_nan(centres=centres, points=points)
    squared = squared_distances(centres, points)
    within = squared < radius**2
    num_points = points.shape[1]
    order = torch.where(within, torch.arange(num_points, device=points.device), num_points)
    found = order.sort(dim=-1).values[..., :k]
    if k > num_points:
        found = torch.cat([found, found.new_full((*found.shape[:2], k - num_points), num_points)], dim=-1)
    first = torch.where(within.any(dim=-1), found[..., 0], squared.argmin(dim=-1))
    return torch.where(found == num_points, first[..., None], found)


@_ball_query.register_fake
def _(centres: Tensor, points: Tensor, radius: float, k: int) -> Tensor:
    return centres.new_empty((*centres.shape[:2], k), dtype=torch.int64)


def squared_distances(queries: Tensor, points: Tensor) -> Tensor:
    """From each query to each point, float32 [b, m, n]."""
    if queries.shape[-1] <= 3:
        total = torch.zeros((), device=points.device)
        for query, point in zip(queries.unbind(-1), points.unbind(-1), strict=True):
            total = total + (query[:, :, None] - point[:, None, :]).square()
        return total
    with torch.autocast(queries.device.type, enabled=False):
        centre = points.mean(dim=1, keepdim=True)
        queries, points = queries - centre, points - centre
        squares = queries.square().sum(-1)[:, :, None] + points.square().sum(-1)[:, None, :]
        return torch.baddbmm(squares, queries, points.transpose(1, 2), alpha=-2).clamp_min_(0)


def smallest(distances: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices and values of the k smallest entries of each row, ascending, of equals the lowest index first.

    Non-negative floats order like the integers with the same bits; with the index in the low half no two are equal.
    """
    keys = distances.view(torch.int32).long() << 32 | torch.arange(distances.shape[-1], device=distances.device)
    found = keys.topk(k, dim=-1, largest=False, sorted=True).values
    return found & 0xFFFFFFFF, (found >> 32).int().view(torch.float32)
