"""CurveNet: local aggregation, and curves that walk over the cloud and tell each point of places far from it.

"Walk in the Cloud: Learning Curves for Point Clouds Shape Analysis" (ICCV 2021), classification; with its head and 40
classes 2,140,672 parameters. As PointMCD uses it, embeddings are those of the points that survive before the last
pooling (64 of 1024), nowhere negative. For labels of points, `levels` are what the stem and the last block on each
set of points say.

Curves start at the points that a gate rates highest. At each step a small network picks one neighbour of where the
curve is; the choice is hard, its gradient that of the softmax (no Gumbel noise, so that a cloud has one encoding).
"""

from typing import Final, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from pydantic import BaseModel, Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from models.encoding import Encoding, Level, PointEncoder
from models.heads import Projection
from models.layers import row_layers
from models.ops.neighbours import ball_query, gather, nearest_neighbours
from models.ops.sampling import farthest_points
from models.ops.view_pooling import max_over_points
from models.pair_linear import PairLinear
from models.row_norm import RowNorm

SLOPE: Final = 0.2  # of LeakyReLU


class CurveBlockConfig(BaseModel, extra="forbid", frozen=True):
    """One residual block."""

    num_points: PositiveInt  # that survive; a cloud that has fewer keeps them all
    radius: PositiveFloat  # around a survivor, where points are pooled when their number falls
    channels: PositiveInt
    bottleneck: PositiveInt  # the block works on its input's width divided by this
    num_curves: NonNegativeInt = 0


PAPER_BLOCKS: Final = (
    CurveBlockConfig(num_points=1024, radius=0.05, channels=64, bottleneck=2, num_curves=100),
    CurveBlockConfig(num_points=1024, radius=0.05, channels=64, bottleneck=4, num_curves=100),
    CurveBlockConfig(num_points=1024, radius=0.05, channels=128, bottleneck=2, num_curves=100),
    CurveBlockConfig(num_points=1024, radius=0.1, channels=128, bottleneck=4, num_curves=100),
    CurveBlockConfig(num_points=256, radius=0.1, channels=256, bottleneck=2),
    CurveBlockConfig(num_points=256, radius=0.2, channels=256, bottleneck=4),
    CurveBlockConfig(num_points=64, radius=0.2, channels=512, bottleneck=2),
    CurveBlockConfig(num_points=64, radius=0.4, channels=512, bottleneck=4),
)


class CurveNetConfig(BaseModel, extra="forbid", frozen=True):
    """Sizes of a CurveNet."""

    kind: Literal["curvenet"] = "curvenet"
    width: PositiveFloat = 1.0  # multiplies the stem's, the blocks' and the embedding's channels
    num_neighbours: PositiveInt = 20
    stem_channels: PositiveInt = 32
    blocks: tuple[CurveBlockConfig, ...] = Field(PAPER_BLOCKS, min_length=1)
    curve_length: int = Field(5, ge=2)  # points, the starting one included
    embedding_channels: PositiveInt = 1024

    def build(self) -> "CurveNet":
        """A new network with random weights."""
        return CurveNet(self)

    def scaled(self, channels: int) -> int:
        """These channels times `width`."""
        return max(1, round(self.width * channels))


class CurveNet(PointEncoder):
    """Embeddings of the points that survive, and their maximum and mean side by side."""

    def __init__(self, config: CurveNetConfig) -> None:
        super().__init__()
        self.num_neighbours = config.num_neighbours
        channels = config.scaled(config.stem_channels)
        self.stem = Stem(channels)
        blocks, level_dims = [], [channels]
        following = [block.num_points for block in config.blocks[1:]] + [0]
        for block, num_points_after in zip(config.blocks, following, strict=True):
            scaled = block.model_copy(update={"channels": config.scaled(block.channels)})
            ends_level = num_points_after != block.num_points
            blocks.append(CurveBlock(channels, scaled, config.curve_length, ends_level))
            channels = scaled.channels
            level_dims += [channels] * ends_level
        self.blocks = nn.ModuleList(blocks)
        self.level_dims = tuple(level_dims)
        self.per_point_dim = config.scaled(config.embedding_channels)
        self.pooled_dim = 2 * self.per_point_dim
        self.embedding = row_layers(channels, (self.per_point_dim,))

    def forward(self, points: Float[Tensor, "b n 3"]) -> Encoding:
        """Embeddings of the survivors, nowhere negative, with their places among the points given."""
        neighbours = self.neighbours(points)
        features = self.stem(points, neighbours[..., :-1])
        indices = torch.arange(points.shape[1], device=points.device).expand(points.shape[:2])
        levels = [Level(points, features)]
        for block in self.blocks:
            assert isinstance(block, CurveBlock)
            if block.num_points < points.shape[1]:
                chosen = farthest_points(points, block.num_points)
                centres = gather(points, chosen)
                # The spec leaves open how many points of a ball take part: as many as a point has neighbours
                members = ball_query(centres, points, block.radius, min(self.num_neighbours, points.shape[1]))
                features = gather(features, members).amax(dim=2)
                indices, points = indices.gather(1, chosen), centres
                neighbours = self.neighbours(points)  # blocks on the same points share them
            features = block(points, features, neighbours)
            if block.ends_level:
                levels.append(Level(points, features))
        per_point = self.embedding(features)
        pooled = torch.cat([max_over_points(per_point), per_point.mean(dim=1)], dim=1)
        return Encoding(per_point, pooled, indices, levels=tuple(levels))

    def neighbours(self, points: Float[Tensor, "b n 3"]) -> Int64[Tensor, "b n _"]:
        """Each point's nearest points, itself first: one more than `num_neighbours`, for walks do without itself."""
        if points.shape[1] <= self.num_neighbours:
            raise ValueError(
                f"CurveNet looks at {self.num_neighbours} neighbours of each point, but is left with {points.shape[1]} "
                f"points: give it larger clouds, a smaller num_neighbours, or blocks with more num_points."
            )
        return nearest_neighbours(points, points, self.num_neighbours + 1).indices


class CurveBlock(nn.Module):
    """A bottleneck of curves and local aggregation beside a shortcut."""

    def __init__(self, in_channels: int, config: CurveBlockConfig, curve_length: int, ends_level: bool) -> None:
        super().__init__()
        self.num_points, self.radius = config.num_points, config.radius
        self.ends_level = ends_level  # the next block works on fewer points, or there is none
        channels = max(1, in_channels // config.bottleneck)
        self.reduce = row_layers(in_channels, (channels,), negative_slope=SLOPE)
        self.walks = self.curves = None
        if config.num_curves > 0:
            self.walks = CurveWalks(channels, config.num_curves, curve_length)
            self.curves = CurveAggregation(channels)
        self.local = LocalAggregation(channels)
        self.expand = nn.Sequential(nn.Linear(channels, config.channels, bias=False), RowNorm(config.channels))
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != config.channels:
            self.shortcut = nn.Sequential(nn.Linear(in_channels, config.channels, bias=False), RowNorm(config.channels))

    def forward(
        self, points: Float[Tensor, "b n 3"], features: Float[Tensor, "b n c"], neighbours: Int64[Tensor, "b n k"]
    ) -> Float[Tensor, "b n d"]:
        """New features of the same points. The first neighbour of a point is the point itself."""
        reduced = self.reduce(features)
        if self.walks is not None and self.curves is not None:
            reduced = self.curves(reduced, self.walks(reduced, neighbours[..., 1:]))
        expanded = self.expand(self.local(points, reduced, neighbours[..., :-1]))
        return F.leaky_relu(expanded + self.shortcut(features), SLOPE)


class Stem(nn.Module):
    """The first features: from each neighbourhood's geometry, the maximum over neighbours."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = row_layers(9, (channels,), negative_slope=SLOPE)

    def forward(self, points: Float[Tensor, "b n 3"], neighbours: Int64[Tensor, "b n k"]) -> Float[Tensor, "b n d"]:
        """Features of each point."""
        with torch.autocast(points.device.type, enabled=False):
            features: Tensor = self.layers(edge_geometry(points, neighbours)).amax(dim=2)
        return features


class LocalAggregation(nn.Module):
    """The mean over neighbours of what a layer makes of feature difference and geometry together."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.geometry = nn.Sequential(nn.Linear(9, channels, bias=False), RowNorm(channels))
        self.layers = row_layers(channels, (channels,), negative_slope=SLOPE)

    def forward(
        self, points: Float[Tensor, "b n 3"], features: Float[Tensor, "b n c"], neighbours: Int64[Tensor, "b n k"]
    ) -> Float[Tensor, "b n c"]:
        """New features of each point, as wide as the old ones."""
        with torch.autocast(points.device.type, enabled=False):
            geometry = self.geometry(edge_geometry(points, neighbours))
        edges = gather(features, neighbours) - features[:, :, None] + geometry
        mean: Tensor = self.layers(F.leaky_relu(edges, SLOPE)).mean(dim=2)
        return mean


class CurveWalks(nn.Module):
    """Grows curves: starts where a gate is highest, and moves to a neighbour at each step."""

    def __init__(self, channels: int, num_curves: int, curve_length: int) -> None:
        super().__init__()
        self.num_curves, self.curve_length = num_curves, curve_length
        self.gate = nn.Linear(channels, 1, bias=False)
        self.agent = PairLinear(channels, channels, 1, bias=False)  # [the curve so far, a candidate] -> how good a step
        self.agent_norm = RowNorm(1)
        self.momentum = nn.Linear(2 * channels, 2, bias=False)  # [the point reached, the curve before] -> their shares
        self.momentum_norm = RowNorm(2)

    def forward(self, features: Float[Tensor, "b n c"], neighbours: Int64[Tensor, "b n k"]) -> Float[Tensor, "b q l c"]:
        """The features along each curve, the starting point's first."""
        if features.shape[1] < self.num_curves:
            raise ValueError(
                f"{self.num_curves} curves need as many points to start from, but the cloud has {features.shape[1]}: "
                f"give CurveNet larger clouds, or blocks with fewer num_curves."
            )
        gate = torch.sigmoid(self.gate(features))
        place = gate.squeeze(2).topk(self.num_curves, dim=1).indices
        features = gate * features  # so the gate learns although the choice of starts has no gradient
        reached = gather(features, place)
        curve = reached  # a running summary of the points so far
        path = [reached]
        for step in range(1, self.curve_length):
            candidate_places = torch.take_along_dim(neighbours, place[..., None], dim=1)
            candidates = gather(features, candidate_places)
            if step > 1:
                both = torch.stack([reached, curve], dim=2)
                shares = torch.softmax(self.momentum_norm(self.momentum(both.flatten(2))), dim=2)
                curve = (shares[..., None] * both).sum(dim=2)
            score = self.agent_norm(self.agent(curve, candidates))
            if step > 1:
                # The spec leaves open which direction a curve has: from its summary to the point reached
                ahead = F.cosine_similarity((reached - curve)[:, :, None], candidates - reached[:, :, None], dim=3)
                score = score * (1 + ahead).clamp(0, 1)[..., None]  # turning back is made less likely
            soft = torch.softmax(score.squeeze(3), dim=2)
            choice = soft.argmax(dim=2, keepdim=True)
            hard = torch.zeros_like(soft).scatter(2, choice, 1.0)
            weights = hard + soft - soft.detach()  # the value of one candidate, the gradient of all
            reached = (weights[..., None] * candidates).sum(dim=2)
            place = candidate_places.gather(2, choice).squeeze(2)
            path.append(reached)
        return torch.stack(path, dim=2)


class CurveAggregation(nn.Module):
    """Tells every point of the curves: of whole curves, and of what lies at each position along them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(1, channels // 2)
        self.attention = nn.Linear(channels, 1, bias=False)
        self.curve_key = nn.Linear(channels, inner, bias=False)
        self.position_key = nn.Linear(channels, inner, bias=False)
        self.query = nn.Linear(channels, inner, bias=False)
        self.curve_value = nn.Linear(inner, inner, bias=False)
        self.position_value = nn.Linear(inner, inner, bias=False)
        self.output = nn.Sequential(nn.Linear(2 * inner, channels, bias=False), RowNorm(channels))

    def forward(self, features: Float[Tensor, "b n c"], curves: Float[Tensor, "b q l c"]) -> Float[Tensor, "b n c"]:
        """The points' features with what they learned from the curves added."""
        attention = self.attention(curves)
        whole = self.curve_key((curves * attention.softmax(dim=2)).sum(dim=2))
        positions = self.position_key((curves * attention.softmax(dim=1)).sum(dim=1))
        queries = self.query(features)
        from_curves = (queries @ whole.transpose(1, 2)).softmax(dim=2) @ self.curve_value(whole)
        from_positions = (queries @ positions.transpose(1, 2)).softmax(dim=2) @ self.position_value(positions)
        learned = self.output(torch.cat([from_curves, from_positions], dim=2))
        return F.leaky_relu(features + learned, SLOPE)


def curvenet_head(in_features: int, num_classes: int, hidden_features: int = 512) -> nn.Sequential:
    """CurveNet's classifier on the pooled embedding; PointMCD's own differs (no dropout, no bias at the end)."""
    return nn.Sequential(
        Projection(in_features, hidden_features), nn.Dropout(0.5), nn.Linear(hidden_features, num_classes)
    )


def edge_geometry(points: Float[Tensor, "b n 3"], neighbours: Int64[Tensor, "b n k"]) -> Float[Tensor, "b n k 9"]:
    """Point, neighbour, and the way from one to the other."""
    ends = gather(points, neighbours)
    starts = points[:, :, None].expand_as(ends)
    return torch.cat([starts, ends, ends - starts], dim=3)
