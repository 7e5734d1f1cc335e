"""PointMLP: residual layers on ever fewer neighbourhoods, each brought to a common scale before.

Ma et al., ICLR 2022; with its own head and 40 classes 13,238,504 parameters. Embeddings are those of the points that
are left at the end (64 of 1024), nowhere negative. PointCMT taps the pooled embedding as it does PointNet++'s.

The scale of a stage is one standard deviation for each cloud; the first release took it over the whole batch, which
made a cloud's result depend on its neighbours in the batch.
"""

from typing import Final, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from pydantic import BaseModel, Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from models.encoding import Encoding, Level, PointEncoder
from models.layers import row_layers
from models.ops.neighbours import gather, nearest_neighbours
from models.ops.sampling import farthest_points
from models.ops.view_pooling import max_over_points
from models.row_norm import RowNorm

_AVOIDS_DIVISION_BY_ZERO: Final = 1e-5
_SMALLEST_VARIANCE: Final = 1e-20  # the square root has no gradient at zero


class StageConfig(BaseModel, extra="forbid", frozen=True):
    """One step to fewer points and wider features."""

    num_points: PositiveInt  # that are left
    channels: PositiveInt


class PointMLPConfig(BaseModel, extra="forbid", frozen=True):
    """Sizes of a PointMLP."""

    kind: Literal["pointmlp"] = "pointmlp"
    width: PositiveFloat = 1.0  # multiplies all channels
    embedding_channels: PositiveInt = 64
    stages: tuple[StageConfig, ...] = Field(
        default=(
            StageConfig(num_points=512, channels=128),
            StageConfig(num_points=256, channels=256),
            StageConfig(num_points=128, channels=512),
            StageConfig(num_points=64, channels=1024),
        ),
        min_length=1,
    )
    num_neighbours: PositiveInt = 24
    blocks_before_pooling: NonNegativeInt = 2  # residual ones, on every neighbour
    blocks_after_pooling: NonNegativeInt = 2  # and on what is left of a neighbourhood

    def build(self) -> "PointMLP":
        """A new network with random weights."""
        return PointMLP(self)

    def scaled(self, channels: int) -> int:
        """These channels times `width`."""
        return max(1, round(self.width * channels))


class PointMLP(PointEncoder):
    """Embeds the points that are left at the end, and takes the maximum."""

    def __init__(self, config: PointMLPConfig) -> None:
        super().__init__()
        channels = config.scaled(config.embedding_channels)
        self.embedding = row_layers(3, (channels,))
        level_dims, stages = [channels], []
        for stage in config.stages:
            stages.append(Stage(channels, stage, config))
            channels = config.scaled(stage.channels)
            level_dims.append(channels)
        self.stages = nn.ModuleList(stages)
        self.per_point_dim = self.pooled_dim = channels
        self.level_dims = tuple(level_dims)

    def forward(self, points: Float[Tensor, "b n 3"]) -> Encoding:
        """Embeddings of the points that are left, nowhere negative, with their places among the points given."""
        indices = None
        features = self.embedding(points)
        levels = [Level(points, features)]
        for stage in self.stages:
            assert isinstance(stage, Stage)
            chosen = farthest_points(points, stage.num_points)
            centres = gather(points, chosen)
            members = nearest_neighbours(centres, points, stage.num_neighbours).indices
            features = stage(features, chosen, members)
            levels.append(Level(centres, features))
            points, indices = centres, chosen if indices is None else indices.gather(1, chosen)
        return Encoding(features, max_over_points(features), indices, levels=tuple(levels))


class Stage(nn.Module):
    """Features of centres from those of the points around them."""

    def __init__(self, in_channels: int, stage: StageConfig, config: PointMLPConfig) -> None:
        super().__init__()
        channels = config.scaled(stage.channels)
        self.num_points, self.num_neighbours = stage.num_points, config.num_neighbours
        self.scale, self.shift = nn.Parameter(torch.ones(in_channels)), nn.Parameter(torch.zeros(in_channels))
        self.transfer = nn.Linear(2 * in_channels, channels, bias=False)  # [difference from the centre, centre]
        self.norm = RowNorm(channels)
        self.before = nn.Sequential(*(Residual(channels) for _ in range(config.blocks_before_pooling)))
        self.after = nn.Sequential(*(Residual(channels) for _ in range(config.blocks_after_pooling)))

    def forward(
        self, features: Float[Tensor, "b n c"], chosen: Int64[Tensor, "b m"], members: Int64[Tensor, "b m k"]
    ) -> Float[Tensor, "b m d"]:
        """Features of the chosen points."""
        # In float32: what counts are small differences. The layer is linear, so it is applied to points, not to pairs
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(self.scale.dtype)
            centres = gather(features, chosen)
            spread = neighbourhood_spread(features, centres, members)[:, None, None] + _AVOIDS_DIVISION_BY_ZERO
            of_difference, of_centre = self.transfer.weight.chunk(2, dim=1)
            transferred = F.linear(features, of_difference * self.scale) / spread
            constant = F.linear(centres, of_centre) + F.linear(self.shift, of_difference) - gather(transferred, chosen)
            pairs = gather(transferred, members) + constant[:, :, None]
        pooled: Tensor = self.before(F.relu(self.norm(pairs), inplace=True)).amax(dim=2)
        left: Tensor = self.after(pooled)
        return left


class Residual(nn.Module):
    """Two layers beside a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *row_layers(channels, (channels,)), nn.Linear(channels, channels, bias=False), RowNorm(channels)
        )

    def forward(self, rows: Float[Tensor, "... c"]) -> Float[Tensor, "... c"]:
        """The rows after them."""
        return F.relu(self.layers(rows) + rows, inplace=True)


def neighbourhood_spread(
    features: Float[Tensor, "b n c"], centres: Float[Tensor, "b m c"], members: Int64[Tensor, "b m k"]
) -> Float[Tensor, " b"]:
    """One standard deviation a cloud, of neighbour less centre over all centres, neighbours and channels.

    From sums over each neighbourhood, so that the differences need not be written down.
    """
    num_clouds, num_points, num_channels = features.shape
    k = members.shape[2]
    origin = features.detach().mean(dim=1, keepdim=True)  # cancels; near it little is lost to rounding
    features, centres = features - origin, centres - origin
    rows = members + num_points * torch.arange(num_clouds, device=members.device)[:, None, None]
    sums = F.embedding_bag(rows.flatten(0, 1), features.flatten(0, 1), mode="sum").view_as(centres)
    times = torch.zeros(features.shape[:2], dtype=features.dtype, device=features.device)
    times.scatter_add_(1, members.flatten(1), times.new_ones(()).expand(num_clouds, members[0].numel()))
    total = (sums - k * centres).sum(dim=(1, 2))
    squares = (times[..., None] * features.square()).sum(dim=(1, 2))
    squares = squares + (centres * (k * centres - 2 * sums)).sum(dim=(1, 2))
    count = members[0].numel() * num_channels
    return ((squares - total.square() / count) / (count - 1)).clamp_min(_SMALLEST_VARIANCE).sqrt()


def pointmlp_head(in_features: int, num_classes: int) -> nn.Sequential:
    """PointMLP's own classifier on the pooled embedding; PointCMT's and PointMCD's are in `models/heads.py`."""
    layers: list[nn.Module] = []
    for width in (512, 256):
        layers += [nn.Linear(in_features, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True), nn.Dropout(0.5)]
        in_features = width
    return nn.Sequential(*layers, nn.Linear(in_features, num_classes))
