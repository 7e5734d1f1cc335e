"""Features at new places from those at known ones."""

from jaxtyping import Float
from torch import Tensor

from models.ops.checks import check_no_nan
from models.ops.neighbours import nearest_neighbours, weighted_sum

_AVOIDS_DIVISION_BY_ZERO = 1e-8


def interpolate_from_three(
    features: Float[Tensor, "b m c"], known: Float[Tensor, "b m 3"], targets: Float[Tensor, "b n 3"]
) -> Float[Tensor, "b n c"]:
    """At each target the mean of its three nearest known points' features, weighted by 1 / (squared distance + 1e-8).

    Gradients reach the features, not the places. With fewer than three known points all of them count.
    """
    if features.shape[:2] != known.shape[:2]:
        raise ValueError(
            f"features is {tuple(features.shape)} and known is {tuple(known.shape)}: clouds and points must agree."
        )
    check_no_nan(known=known, targets=targets)
    nearest = nearest_neighbours(targets, known, min(3, known.shape[1]))
    weights = 1 / (nearest.squared_distances + _AVOIDS_DIVISION_BY_ZERO)
    return weighted_sum(features, nearest.indices, weights / weights.sum(dim=-1, keepdim=True))
