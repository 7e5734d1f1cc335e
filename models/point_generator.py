"""PointCMT's cross-modal point generator (CMPG): from the features of a shape's images or of its points, a cloud."""

from itertools import pairwise
from typing import ClassVar

from jaxtyping import Float
from pydantic import BaseModel, Field, PositiveInt
from torch import Tensor, nn


class PointGeneratorConfig(BaseModel, extra="forbid", frozen=True):
    """Sizes of a generator."""

    in_features: PositiveInt | None = None  # None: as many as the teacher's features have
    num_points: PositiveInt = 1024
    # Differs from the paper, which describes three layers without their widths: as in its code there is one, which its
    # author says works as well. Each width here adds a layer with a bias and a ReLU before it.
    hidden_widths: tuple[PositiveInt, ...] = ()
    dropout: float = Field(default=0.5, ge=0, lt=1)  # on what it reads, while it is trained

    def build(self) -> "PointGenerator":
        """A new generator with random weights."""
        return PointGenerator(self)


class PointGenerator(nn.Module):
    """Decodes a shape's features into points; 1,572,864 parameters as published."""

    exported_as: ClassVar[str] = "point_generator"

    def __init__(self, config: PointGeneratorConfig) -> None:
        super().__init__()
        if config.in_features is None:
            raise ValueError("PointGeneratorConfig.in_features is not set: whoever knows the teacher sets it.")
        self.config = config  # complete: it builds this network again
        self.in_features = config.in_features
        widths = (config.in_features, *config.hidden_widths)
        layers: list[nn.Module] = [nn.Dropout(config.dropout)]
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], 3 * config.num_points, bias=False))

    def forward(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b n 3"]:
        """The points, in no unit of their own: twice the features are, with one layer, a cloud of twice the size."""
        points: Tensor = self.layers(features).unflatten(1, (-1, 3))
        return points
