"""The plain torch tier, for any device: the definition of what every index operation returns, to the bit.

A squared distance is float32: differences, squared, summed in pairs of neighbouring axes, again and again, (x² + y²) + z²
in three dimensions. That order is kept by every tier, so that two distances tie in all of them or in none.
"""

from typing import Final

import torch
from torch import Tensor

_CHUNK: Final = 1 << 25  # squared differences in memory at a time

NEAR_ORIGIN: Final = 1e-3  # as float32, the squared norm below which the papers' kernels do not sample a point
TAKEN: Final = -1.0  # in place of a sample's distance: below every other
TAKEN_LAST: Final = -0.5  # below every distance


def farthest_points(points: Tensor, start: Tensor, num_samples: int, origin_last: bool = False) -> Tensor:
    """Indices [b, m]; one step a sample, over all clouds at once."""
    x, y, z = points.unbind(-1)
    nearest = torch.full_like(x, torch.inf)
    if origin_last:
        nearest[(x.square() + y.square()) + z.square() < NEAR_ORIGIN] = TAKEN_LAST
    chosen = [start[:, None]]
    for _ in range(num_samples - 1):
        last = chosen[-1]
        squared = (x - x.gather(1, last)).square()
        squared += (y - y.gather(1, last)).square()
        squared += (z - z.gather(1, last)).square()
        nearest = torch.minimum(nearest, squared).scatter(1, last, TAKEN)
        chosen.append(nearest.argmax(dim=1, keepdim=True))
    return torch.cat(chosen, dim=1)


def nearest_neighbours(queries: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices and squared distances [b, m, k], ascending, of equals the lowest index first.

    Non-negative floats order like the integers with the same bits; with the index in the low half no two keys are equal.
    """
    bits = squared_distances(queries, points).view(torch.int32)
    keys = bits.long() << 32 | torch.arange(points.shape[1], device=points.device)
    found = keys.topk(k, dim=-1, largest=False, sorted=True).values
    return found & 0xFFFFFFFF, (found >> 32).int().view(torch.float32)


def ball_query(centres: Tensor, points: Tensor, squared_radius: float, k: int) -> Tensor:
    """Indices [b, m, k] of the first points within the radius, padded with the first; else of the nearest."""
    squared = squared_distances(centres, points)
    num_points = points.shape[1]
    within = torch.where(squared < squared_radius, torch.arange(num_points, device=points.device), num_points)
    found = within.sort(dim=-1).values[..., :k]
    first = torch.where(found[..., :1] < num_points, found[..., :1], squared.argmin(dim=-1, keepdim=True))
    found = torch.where(found < num_points, found, first)
    return torch.cat([found, first.expand(-1, -1, k - found.shape[-1])], dim=-1)


def squared_distances(queries: Tensor, points: Tensor) -> Tensor:
    """From each query to each point, [b, m, n]."""
    if queries.shape[-1] <= 3:
        axes = zip(queries.unbind(-1), points.unbind(-1), strict=True)
        terms = ((query[:, :, None] - point[:, None, :]).square() for query, point in axes)
        return sum(terms, start=torch.zeros((), device=points.device))
    queries, points = pad_to_power_of_two(queries), pad_to_power_of_two(points)
    num_rows = max(1, _CHUNK // points.numel())
    return torch.cat([_pairwise_sums(rows, points) for rows in queries.split(num_rows, dim=1)], dim=1)


def pad_to_power_of_two(features: Tensor) -> Tensor:
    """The features with zeros after the last, so that pairs always find a partner."""
    width = features.shape[-1]
    return torch.nn.functional.pad(features, (0, (1 << (width - 1).bit_length()) - width))


def _pairwise_sums(queries: Tensor, points: Tensor) -> Tensor:
    sums = (queries[:, :, None] - points[:, None]).square_()
    while sums.shape[-1] > 1:
        sums = sums[..., ::2] + sums[..., 1::2]
    return sums.squeeze(-1)
