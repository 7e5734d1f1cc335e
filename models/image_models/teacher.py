"""The one face of every image network that teaches: a shape's views in, the store's teacher fields out."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Shaped, UInt8
from pydantic import BaseModel
from torch import Tensor, nn

from models.image_models.trunk import TrunkConfig


class ImageNetworkConfig(BaseModel, ABC, extra="forbid", frozen=True):
    """What every image network has: a trunk. Each kind adds a field `kind`, its sizes, and `build`."""

    trunk: TrunkConfig

    @abstractmethod
    def build(self) -> "ImageTeacher":
        """The network, with the trunk's weights from its file or all random."""

    def without_weights(self) -> "ImageNetworkConfig":
        """The same network for weights from elsewhere: the file that it started from is not needed any more."""
        return self.model_copy(update={"trunk": self.trunk.model_copy(update={"weights": None})})


class ImageTeacher(nn.Module, ABC):
    """An image network that says something of each view of a shape, from that view alone in eval mode."""

    exported_as: ClassVar[str] = "image_model"
    reads: ClassVar[Literal["views", "points"]] = "views"  # the store field that it looks at
    config: ImageNetworkConfig  # complete: it builds this network again
    mean: Tensor
    std: Tensor

    def __init__(self, config: ImageNetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size = config.trunk.image_size
        # Not part of the weights: they belong to the config, and two names for one fact could disagree
        self.register_buffer("mean", torch.tensor(config.trunk.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.trunk.std).view(3, 1, 1), persistent=False)

    @abstractmethod
    def field_sizes(self, num_views: int) -> Mapping[str, tuple[int, ...]]:
        """What it can say of a shape: names of store fields, with the sizes of one row's array. The first is the default."""

    @abstractmethod
    def teach(self, inputs: Shaped[Tensor, "b ..."], fields: Sequence[str]) -> Mapping[str, Shaped[Tensor, "b ..."]]:
        """The fields asked for, of shapes given by the store field that it reads.

        One that reads points draws its own views, and can also say `view_pixels`: where in them each point lies.
        """

    def describe(self, views: UInt8[Tensor, "b v h w 3"]) -> Float[Tensor, "b v d"]:
        """The features of each view."""
        return self.teach(views, ("view_features",))["view_features"]
