"""What fine-tuning puts behind the masked transformer: a classifier, and a network that labels each point's part."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from models.encoding import Encoding
from models.layers import row_layers
from models.ops.interpolation import interpolate_from_three
from models.row_norm import RowNorm


def token_classifier(in_features: int, num_classes: int, hidden_features: int = 256) -> nn.Sequential:
    """I2P-MAE's head on the pooled embedding: two hidden layers, each with dropout.

    With the encoder and the norm of its last stage 12,921,935 parameters for ScanObjectNN's 15 classes and 12,830,056
    for ModelNet40's 40.
    """
    return nn.Sequential(
        *row_layers(in_features, (hidden_features,), bias=True),
        nn.Dropout(0.5),
        *row_layers(hidden_features, (hidden_features,), bias=True),
        nn.Dropout(0.5),
        nn.Linear(hidden_features, num_classes),
    )


class TokenPartHead(nn.Module):
    """Part logits of every point from the tokens of all scales, as Point-M2AE (NeurIPS 2022) does for ShapeNetPart.

    Which parts a category has is not looked at here: whoever takes the largest logit may leave other parts out.
    """

    def __init__(
        self,
        level_features: Sequence[int],  # as the encoding's levels: the first is of the points themselves
        num_categories: int = 16,
        num_parts: int = 50,
        *,
        point_widths: tuple[int, int] = (1536, 1024),  # of the layers on each scale's tokens, interpolated to points
        category_width: int = 64,
        widths: tuple[int, int, int] = (1024, 512, 256),
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.num_categories = num_categories
        self.interpolated = nn.ModuleList(
            row_layers(width + 3, point_widths, bias=True) for width in level_features[1:]
        )
        # The spec leaves the layer on the category open: like those of other part-segmentation networks
        self.category = row_layers(num_categories, (category_width,))
        self.local_features = point_widths[-1] * len(self.interpolated)
        self.first = nn.Linear(2 * self.local_features + category_width, widths[0])  # on [point ‖ cloud ‖ category]
        self.layers = nn.Sequential(
            RowNorm(widths[0]),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            *row_layers(widths[0], widths[1:], bias=True),
            nn.Linear(widths[-1], num_parts),
        )

    def forward(self, encoding: Encoding, category: Int64[Tensor, " b"]) -> Float[Tensor, "b n q"]:
        """Logits of all parts of all categories."""
        points = encoding.levels[0].points
        local = []
        for level, layers in zip(encoding.levels[1:], self.interpolated, strict=True):
            at_points = interpolate_from_three(level.features, level.points, points)
            local.append(layers(torch.cat([at_points, points], dim=2)))
        of_points = torch.cat(local, dim=2)
        one_hot = F.one_hot(category, self.num_categories).to(of_points.dtype)
        of_cloud = torch.cat([of_points.amax(dim=1) + of_points.mean(dim=1), self.category(one_hot)], dim=1)
        # What a cloud says of itself is multiplied once a cloud and not once a point
        weight = self.first.weight
        from_cloud = F.linear(of_cloud, weight[:, self.local_features :], self.first.bias)
        from_points = F.linear(of_points, weight[:, : self.local_features])
        logits: Tensor = self.layers(from_points + from_cloud[:, None])
        return logits
