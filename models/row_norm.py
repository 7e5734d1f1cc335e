"""Batch normalisation over the last axis, whatever stands before it."""

from jaxtyping import Float
from torch import Tensor, nn


class RowNorm(nn.BatchNorm1d):
    """BatchNorm1d for networks that keep channels last: each slot of the axes before is a row of its own.

    What papers write as 1x1 convolutions with BatchNorm2d over [b, c, n, k] is Linear and this over [b, n, k, c].
    """

    def forward(self, features: Float[Tensor, "... c"]) -> Float[Tensor, "... c"]:
        """The normalised features, in the same layout."""
        normalised: Tensor = super().forward(features.flatten(0, -2)).view(features.shape)
        return normalised
