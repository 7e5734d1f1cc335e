"""Small networks behind an encoder: projections and classification heads, without dropout, as PointMCD has them."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Projection(nn.Module):
    """A linear layer without bias, batch normalisation and ReLU: what it returns is nowhere negative."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False)
        self.norm = nn.BatchNorm1d(out_features)

    def forward(self, rows: Float[Tensor, "r c"]) -> Float[Tensor, "r d"]:
        """The projected rows. No rows leave the statistics alone, and every weight still has a gradient, zero."""
        projected = self.linear(rows)
        if len(rows) > 0:
            return F.relu(self.norm(projected), inplace=True)
        norm = self.norm
        return F.batch_norm(projected, norm.running_mean, norm.running_var, norm.weight, norm.bias)


def classification_head(in_features: int, num_classes: int, hidden_features: int = 512) -> nn.Sequential:
    """PointMCD's head on the pooled embedding: one projection, then a linear layer without bias."""
    return nn.Sequential(Projection(in_features, hidden_features), nn.Linear(hidden_features, num_classes, bias=False))
