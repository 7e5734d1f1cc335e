"""PointNet++: points are grouped around ever fewer centres, and each group is described by a small PointNet.

Qi et al., NeurIPS 2017. By default the multi-scale network that PointCMT (NeurIPS 2022) trains; with its head and 40
classes 1,621,512 parameters. `SINGLE_SCALE` groups once around each centre. Embeddings are those of the centres that
are left before the last pooling (128 of 1024 points), nowhere negative, as PointMCD needs them.

Differs from the papers' code: points near the origin can be chosen as centres like any other, unless `origin_last`.
"""

from itertools import pairwise
from typing import Final, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from models.encoding import Encoding, Level, PointEncoder
from models.grouped_layers import grouped_max
from models.layers import row_layers
from models.ops.neighbours import ball_query, gather
from models.ops.sampling import farthest_points
from models.ops.view_pooling import max_over_points

Widths = tuple[PositiveInt, ...]


class BallConfig(BaseModel, extra="forbid", frozen=True):
    """One scale: the ball around a centre, and the layers for what lies in it."""

    radius: PositiveFloat
    num_neighbours: PositiveInt  # at most; the first ones in the cloud's order
    widths: Widths = Field(min_length=1)


class AbstractionConfig(BaseModel, extra="forbid", frozen=True):
    """One step to fewer points."""

    num_points: PositiveInt  # that are left
    balls: tuple[BallConfig, ...] = Field(min_length=1)


def _step(num_points: int, *balls: tuple[float, int, Widths]) -> AbstractionConfig:
    return AbstractionConfig(
        num_points=num_points,
        balls=tuple(BallConfig(radius=radius, num_neighbours=k, widths=widths) for radius, k, widths in balls),
    )


class PointNet2Config(BaseModel, extra="forbid", frozen=True):
    """Sizes of a PointNet++."""

    kind: Literal["pointnet2"] = "pointnet2"
    width: PositiveFloat = 1.0  # multiplies every width below
    steps: tuple[AbstractionConfig, ...] = Field(
        default=(
            _step(512, (0.1, 16, (32, 32, 64)), (0.2, 32, (64, 64, 128)), (0.4, 128, (64, 96, 128))),
            _step(128, (0.2, 32, (64, 64, 128)), (0.4, 64, (128, 128, 256)), (0.8, 128, (128, 128, 256))),
        ),
        min_length=1,
    )
    widths: Widths = Field(default=(256, 512, 1024), min_length=1)  # on the points left; the last is the embedding's
    origin_last: bool = False  # centres as the papers' kernels choose them: `models.ops.sampling.farthest_points`

    def build(self) -> "PointNet2":
        """A new network with random weights."""
        return PointNet2(self)

    def scaled(self, widths: Widths) -> Widths:
        """These widths times `width`."""
        return tuple(max(1, round(self.width * each)) for each in widths)


SINGLE_SCALE: Final = PointNet2Config(
    steps=(_step(512, (0.2, 32, (64, 64, 128))), _step(128, (0.4, 64, (128, 128, 256))))
)


class PointNet2(PointEncoder):
    """Embeds the centres that are left at the end, and takes the maximum."""

    def __init__(self, config: PointNet2Config) -> None:
        super().__init__()
        self.origin_last = config.origin_last
        steps, num_features, level_dims = [], 0, [3]
        for step in config.steps:
            steps.append(SetAbstraction(num_features, step, config))
            num_features = steps[-1].out_features
            level_dims.append(num_features)
        self.steps = nn.ModuleList(steps)
        self.layers = row_layers(3 + num_features, config.scaled(config.widths))
        self.per_point_dim = self.pooled_dim = config.scaled(config.widths)[-1]
        self.level_dims = tuple(level_dims)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, points: Float[Tensor, "b n 3"]) -> Encoding:
        """Embeddings of the centres that are left, nowhere negative, with their places among the points given."""
        levels = [Level(points, points)]
        features = indices = None
        for step in self.steps:
            assert isinstance(step, SetAbstraction)
            chosen = farthest_points(points, step.num_points, origin_last=self.origin_last)
            centres = gather(points, chosen)
            features = step(points, features, centres)
            levels.append(Level(centres, features))
            points, indices = centres, chosen if indices is None else indices.gather(1, chosen)
        per_point = self.layers(torch.cat([points, levels[-1].features], dim=2))
        return Encoding(per_point, max_over_points(per_point), indices, levels=tuple(levels))


class SetAbstraction(nn.Module):
    """Features of centres from the points around them, at one or more scales side by side."""

    def __init__(self, in_features: int, step: AbstractionConfig, config: PointNet2Config) -> None:
        super().__init__()
        self.num_points = step.num_points
        self.balls = nn.ModuleList(BallLayers(in_features, ball, config.scaled(ball.widths)) for ball in step.balls)
        self.out_features = sum(config.scaled(ball.widths)[-1] for ball in step.balls)

    def forward(
        self,
        points: Float[Tensor, "b n 3"],
        features: Float[Tensor, "b n c"] | None,
        centres: Float[Tensor, "b m 3"],
    ) -> Float[Tensor, "b m d"]:
        """Features of the centres. Points without features are described by their places alone."""
        return torch.cat([ball(points, features, centres) for ball in self.balls], dim=2)


class BallLayers(nn.Module):
    """A PointNet on each ball, its points' coordinates relative to the centre."""

    def __init__(self, in_features: int, ball: BallConfig, widths: Widths) -> None:
        super().__init__()
        self.radius, self.num_neighbours = ball.radius, ball.num_neighbours
        sizes = (3 + in_features, *widths)  # [coordinates, features]
        self.linears = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for width in widths)

    def forward(
        self,
        points: Float[Tensor, "b n 3"],
        features: Float[Tensor, "b n c"] | None,
        centres: Float[Tensor, "b m 3"],
    ) -> Float[Tensor, "b m d"]:
        """The maximum over each ball."""
        first, *others = self.linears
        assert isinstance(first, nn.Linear)
        members = ball_query(centres, points, self.radius, self.num_neighbours)
        # Coordinates stay float32 also where the layers compute in less: what counts are small differences of theirs
        with torch.autocast(points.device.type, enabled=False):
            origin = points.mean(dim=1, keepdim=True)  # cancels between the two ends; near it the differences are exact
            of_points = F.linear(points - origin, first.weight[:, :3])
            of_centres = F.linear(origin - centres, first.weight[:, :3])
            if features is not None:
                of_points = of_points + F.linear(features.to(points.dtype), first.weight[:, 3:])
        return grouped_max(of_points, of_centres, members, self.norms, others, padded=True)
