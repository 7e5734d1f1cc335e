"""Any timm network as a teacher, as it is: nothing trained on top."""

from collections.abc import Mapping, Sequence
from typing import Literal, cast

from jaxtyping import Shaped
from torch import Tensor

from models.image_models.teacher import ImageNetworkConfig, ImageTeacher
from models.image_models.trunk import as_images, build_trunk


class PooledTrunkConfig(ImageNetworkConfig, frozen=True):
    """A trunk and no more."""

    kind: Literal["pooled"] = "pooled"

    def build(self) -> "PooledTrunk":
        """The network, with the trunk's weights from its file or random."""
        return PooledTrunk(self)


class PooledTrunk(ImageTeacher):
    """Says of each view what the trunk's pooled features are."""

    def __init__(self, config: PooledTrunkConfig) -> None:
        super().__init__(config)
        self.trunk = build_trunk(config.trunk)

    def field_sizes(self, num_views: int) -> Mapping[str, tuple[int, ...]]:
        return {"view_features": (num_views, cast(int, self.trunk.head_hidden_size))}

    def teach(self, inputs: Shaped[Tensor, "b ..."], fields: Sequence[str]) -> Mapping[str, Shaped[Tensor, "b ..."]]:
        features = self.trunk(as_images(inputs.flatten(0, 1), self.image_size, self.mean, self.std))
        described: Tensor = features.unflatten(0, inputs.shape[:2])
        return {"view_features": described}
