"""The one face of every student: points in, an `Encoding` out."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Float, Int64
from torch import Tensor, nn


@dataclass(frozen=True)
class Level:
    """Features of some of the points, which a decoder of per-point outputs looks back at."""

    points: Float[Tensor, "b m 3"]
    features: Float[Tensor, "b m d"]


@dataclass(frozen=True)
class Encoding:
    """What a point encoder says of a batch of clouds."""

    per_point: Float[
        Tensor, "b m d"
    ]  # before the global pooling; m = n, or the surviving points of a hierarchical encoder
    pooled: Float[Tensor, "b e"]
    indices: Int64[Tensor, "b m"] | None = None  # which of the n points survive; None: all, in order
    penalty: Float[Tensor, ""] | None = None  # a regulariser that the method may add to its loss (PointNet's transform)
    levels: tuple[Level, ...] = ()  # finest first, the first of all points; none: `per_point` is all there is


class PointEncoder(nn.Module, ABC):
    """A student. `per_point_dim`, `pooled_dim` and `level_dims` are the widths of what it returns."""

    per_point_dim: int
    pooled_dim: int
    level_dims: tuple[int, ...] = ()

    @abstractmethod
    def forward(self, points: Float[Tensor, "b n 3"]) -> Encoding:
        """Encodes clouds; gradients reach every parameter that takes part."""
