"""Linear layers with normalisation and activation, on rows: what papers write as 1x1 convolutions and as fully connected."""

from collections.abc import Sequence

from torch import nn

from models.row_norm import RowNorm


def row_layers(
    in_features: int,
    widths: Sequence[int],
    *,
    bias: bool = False,
    negative_slope: float = 0.0,
    final_negative_slope: float | None = None,
) -> nn.Sequential:
    """Linear, batch normalisation, leaky ReLU for each width; slope 0 is a ReLU, and the last one may have its own."""
    layers: list[nn.Module] = []
    for number, width in enumerate(widths, start=1):
        slope = negative_slope
        if number == len(widths) and final_negative_slope is not None:
            slope = final_negative_slope
        layers += [nn.Linear(in_features, width, bias=bias), RowNorm(width), nn.LeakyReLU(slope, inplace=True)]
        in_features = width
    return nn.Sequential(*layers)
