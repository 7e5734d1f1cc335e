"""Farthest-point sampling: a few points of a cloud that lie as far from each other as can be."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from models.ops.checks import check_clouds, check_count, check_indices, check_no_nan
from models.ops.opaque import opaque
from models.ops.tiers import implementation


def farthest_points(
    points: Float[Tensor, "b n 3"],
    num_samples: int,
    start: int | Int64[Tensor, " b"] = 0,
    *,
    origin_last: bool = False,
) -> Int64[Tensor, "b m"]:
    """Indices of `num_samples` different points of each cloud, in the order chosen: first `start`, then whichever is
    farthest from all before it, of equals the one with the lowest index. No gradient.

    `origin_last` takes points within 0.0316 of the origin (squared norm below 1e-3) after all others, by their index. The
    papers' CUDA kernels never take them, an accident of how they mark padding, and repeat a point where no other is left.
    Off by default: where a cloud passes through its centre, that leaves a hole in it.
    """
    check_clouds("points", points)
    check_count("num_samples", num_samples, "points", points.shape[1])
    if isinstance(start, int):
        if not 0 <= start < points.shape[1]:
            raise ValueError(f"start is {start}; expected 0 to {points.shape[1] - 1}, a point of points.")
        start = torch.full((len(points),), start, device=points.device)
    if start.shape != (len(points),):
        raise ValueError(f"start is {tuple(start.shape)}; expected one index for each of {len(points)} clouds.")
    check_indices("start", start, "points", points.shape[1])
    indices: Tensor = _farthest_points(points.detach().float(), start, num_samples, origin_last)
    return indices


@opaque(
    "farthest_points(Tensor points, Tensor start, int num_samples, bool origin_last) -> Tensor",
    like=lambda points, start, num_samples, origin_last: start.new_empty(len(points), num_samples),
)
def _farthest_points(points: Tensor, start: Tensor, num_samples: int, origin_last: bool) -> Tensor:
    check_no_nan(points=points)
    indices: Tensor = implementation(points).farthest_points(points, start, num_samples, origin_last)
    return indices
