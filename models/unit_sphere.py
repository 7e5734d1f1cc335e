"""Clouds brought to the unit sphere, as most papers' code does it: around the mean of their points."""

from typing import Final

from jaxtyping import Float
from torch import Tensor

_AVOIDS_DIVISION_BY_ZERO: Final = 1e-30


def to_unit_sphere(points: Float[Tensor, "b n 3"], num_measured: int | None = None) -> Float[Tensor, "b n 3"]:
    """The clouds with their centroid in the origin and their farthest point at distance 1.

    `num_measured`: centroid and distance are those of the first so many points, and others may lie farther out.
    """
    measured = points[:, :num_measured]
    centroid = measured.mean(dim=1, keepdim=True)
    radius = (measured - centroid).norm(dim=2).amax(dim=1)[:, None, None]
    scaled: Tensor = (points - centroid) / radius.clamp(min=_AVOIDS_DIVISION_BY_ZERO)
    return scaled
