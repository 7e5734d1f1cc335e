"""Batch normalisation over the last axis, whatever stands before it."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class RowNorm(nn.BatchNorm1d):
    """BatchNorm1d for networks that keep channels last: each slot of the axes before is a row of its own.

    What papers write as 1x1 convolutions with BatchNorm2d over [b, c, n, k] is Linear and this over [b, n, k, c].
    Fewer than two rows have no statistics: the running ones are used then, and left alone. With no rows at all, every
    weight still has a gradient, zero.
    """

    def forward(self, features: Float[Tensor, "... c"]) -> Float[Tensor, "... c"]:
        """The normalised features, in the same layout."""
        rows = features.flatten(0, -2)
        if len(rows) > 1:
            normalised: Tensor = super().forward(rows)
        else:
            normalised = F.batch_norm(rows, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        # Not a view: an activation that overwrites one would copy it, and its gradient, as a whole
        reshaped: Tensor = torch.ops.aten._unsafe_view(normalised, features.shape)
        return reshaped
