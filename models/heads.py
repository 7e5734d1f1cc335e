"""Small networks behind an encoder: projections, classification heads, and decoders of part labels for every point."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from models.encoding import Encoding, Level, PointEncoder
from models.layers import row_layers
from models.ops.interpolation import interpolate_from_three
from models.row_norm import RowNorm


class Projection(nn.Module):
    """A linear layer, batch normalisation and ReLU: what it returns is nowhere negative."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.norm = RowNorm(out_features)

    def forward(self, rows: Float[Tensor, "r c"]) -> Float[Tensor, "r d"]:
        """The projected rows; there may be none."""
        return F.relu(self.norm(self.linear(rows)), inplace=True)


def classification_head(
    in_features: int, num_classes: int, hidden_features: int = 512, *, bias: bool = False
) -> nn.Sequential:
    """PointMCD's head on the pooled embedding: one projection, then a linear layer. With a bias there, PointCMT's:
    the first part then returns what is aligned with images, and the second is what classifies either."""
    return nn.Sequential(Projection(in_features, hidden_features), nn.Linear(hidden_features, num_classes, bias=bias))


def contrastive_head(
    in_features: int, hidden_features: int = 1024, out_features: int = 256, *, bias: bool = True
) -> nn.Sequential:
    """CrossPoint's projection of a pooled embedding. Its image branch has 512 hidden features and no bias."""
    return nn.Sequential(
        Projection(in_features, hidden_features, bias=bias), nn.Linear(hidden_features, out_features, bias=bias)
    )


class PartHead(nn.Module):
    """Part logits of every point from its own features and its cloud's: for encoders that keep every point.

    The defaults are DGCNN's, which PointMCD and CrossPoint both use. In the first layer, what a cloud says of itself is
    multiplied once a cloud and not once a point.
    """

    def __init__(
        self,
        local_features: int,
        pooled_features: int,
        num_categories: int,
        num_parts: int,
        *,
        widths: Sequence[int] = (256, 256, 128),
        category_width: int = 64,  # of a layer on the one-hot category; 0: none
        negative_slope: float = 0.2,
        dropouts: Sequence[float] = (0.5, 0.5, 0.0),  # after each width
    ) -> None:
        super().__init__()
        self.num_categories = num_categories
        self.category = None
        if category_width:
            self.category = row_layers(num_categories, (category_width,), negative_slope=negative_slope)
        self.first = nn.Linear(
            local_features + pooled_features + (category_width or num_categories), widths[0], bias=False
        )
        self.local_features = local_features
        layers: list[nn.Module] = []
        for number, (width, dropout) in enumerate(zip(widths, dropouts, strict=True)):
            if number > 0:
                layers.append(nn.Linear(widths[number - 1], width, bias=False))
            layers += [RowNorm(width), nn.LeakyReLU(negative_slope, inplace=True)]
            if dropout:
                layers.append(nn.Dropout(dropout))
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], num_parts, bias=False))

    def forward(self, encoding: Encoding, category: Int64[Tensor, " b"]) -> Float[Tensor, "b n q"]:
        """Logits of all parts of all categories. Features are the encoding's first level, or its embeddings."""
        if encoding.indices is not None and not encoding.levels:
            raise ValueError(
                "The encoding holds only the points that survived, so there is nothing to give every point a part from: "
                "the encoder must fill `Encoding.levels` and declare `level_dims`, as PointNet++ does."
            )
        local = encoding.levels[0].features if encoding.levels else encoding.per_point
        of_category = F.one_hot(category, self.num_categories).to(encoding.pooled.dtype)
        if self.category is not None:
            of_category = self.category(of_category)
        of_cloud = torch.cat([encoding.pooled, of_category], dim=1)
        weight = self.first.weight
        of_points = F.linear(local, weight[:, : self.local_features])
        logits: Tensor = self.layers(of_points + F.linear(of_cloud, weight[:, self.local_features :])[:, None])
        return logits


class PropagationHead(nn.Module):
    """Part logits of every point from ever finer levels: for encoders that thin points out. PointNet++'s decoder.

    Each level adds what the coarser ones say there, interpolated from three points, to its own features.
    """

    def __init__(
        self,
        level_features: Sequence[int],  # finest first, as the encoding's levels
        pooled_features: int,
        num_categories: int,
        num_parts: int,
        *,
        widths: Sequence[Sequence[int]] = (
            (128, 128, 128),
            (256, 128),
            (256, 256),
        ),  # finest first; the last for all more
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.num_categories = num_categories
        steps, carried = [], pooled_features
        for number in reversed(range(len(level_features))):
            step_widths = widths[min(number, len(widths) - 1)]
            own = level_features[number] + (num_categories if number == 0 else 0)
            steps.append(PropagationStep(carried, own, step_widths))
            carried = step_widths[-1]
        self.steps = nn.ModuleList(steps)  # coarsest first
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(carried, num_parts))

    def forward(self, encoding: Encoding, category: Int64[Tensor, " b"]) -> Float[Tensor, "b n q"]:
        """Logits of all parts of all categories."""
        finest, *coarser = encoding.levels
        one_hot = F.one_hot(category, self.num_categories).to(finest.features.dtype)
        with_category = torch.cat([finest.features, one_hot[:, None].expand(-1, finest.features.shape[1], -1)], dim=2)
        known: Level | None = None
        features = encoding.pooled[:, None]
        for step, level in zip(self.steps, [*reversed(coarser), Level(finest.points, with_category)], strict=True):
            features = step(features, known.points if known else None, level)
            known = level
        logits: Tensor = self.classifier(features)
        return logits


class PropagationStep(nn.Module):
    """From a coarser level's features, and a level's own, to new ones of that level."""

    def __init__(self, coarse_features: int, own_features: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.coarse_features = coarse_features
        self.first = nn.Linear(coarse_features + own_features, widths[0], bias=False)
        self.layers = nn.Sequential(RowNorm(widths[0]), nn.ReLU(inplace=True), *row_layers(widths[0], widths[1:]))

    def forward(
        self, coarse: Float[Tensor, "b m c"], coarse_points: Float[Tensor, "b m 3"] | None, level: Level
    ) -> Float[Tensor, "b n d"]:
        """The new features. Without coarse points, `coarse` is one row that holds everywhere."""
        # The first layer comes before the interpolation, on fewer rows: the two are linear and commute
        carried = F.linear(coarse, self.first.weight[:, : self.coarse_features])
        if coarse_points is not None:
            carried = interpolate_from_three(carried, coarse_points, level.points)
        features: Tensor = self.layers(carried + F.linear(level.features, self.first.weight[:, self.coarse_features :]))
        return features


def part_segmentation_head(encoder: PointEncoder, num_categories: int, num_parts: int) -> PartHead | PropagationHead:
    """The decoder that fits an encoder: it takes the encoding and each cloud's category.

    Hierarchical encoders get PointNet++'s, those with local features of every point DGCNN's, others PointMCD's of PointNet.
    """
    if len(encoder.level_dims) > 1:
        return PropagationHead(encoder.level_dims, encoder.pooled_dim, num_categories, num_parts)
    if encoder.level_dims:
        return PartHead(encoder.level_dims[0], encoder.pooled_dim, num_categories, num_parts)
    return PartHead(
        encoder.per_point_dim,
        encoder.pooled_dim,
        num_categories,
        num_parts,
        widths=(512, 256, 128),
        category_width=0,
        negative_slope=0.0,
        dropouts=(0.0, 0.0, 0.0),
    )
