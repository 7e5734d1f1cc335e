"""PointCMT's multi-view classifier, an MVCNN: its teacher."""

from collections.abc import Mapping, Sequence
from typing import Literal, cast

from jaxtyping import Shaped, UInt8
from pydantic import PositiveInt
from torch import Tensor, nn

from models.image_models.multi_view import ViewPredictions
from models.image_models.teacher import ImageNetworkConfig, ImageTeacher
from models.image_models.trunk import as_images, build_trunk


class MVCNNConfig(ImageNetworkConfig, frozen=True):
    """ResNet-18 as published, or any trunk."""

    kind: Literal["mvcnn"] = "mvcnn"
    num_classes: PositiveInt | None = None  # None: as many as the corpus has

    def build(self) -> "MVCNN":
        """The network, with the trunk's weights from its file or all random."""
        return MVCNN(self)


class MVCNN(ImageTeacher):
    """Classifies a shape from the maximum over its views' features; 11,197,032 parameters with ResNet-18 and 40 classes.

    That maximum, before the linear layer, is PointCMT's F_img. A store keeps the features of each view, and whoever
    reads them takes the maximum: it is the same in float16, and the views' own features serve other methods as well.
    """

    def __init__(self, config: MVCNNConfig) -> None:
        super().__init__(config)
        if config.num_classes is None:
            raise ValueError("MVCNNConfig.num_classes is not set: whoever knows the corpus sets it.")
        self.trunk = build_trunk(config.trunk)
        self.classifier = nn.Linear(cast(int, self.trunk.head_hidden_size), config.num_classes)

    def forward(self, views: UInt8[Tensor, "b v h w 3"]) -> ViewPredictions:
        """Features of each view, and logits of the shape; single views are not classified."""
        features = self.describe(views)
        return ViewPredictions(features, self.classifier(features.amax(dim=1)))

    def field_sizes(self, num_views: int) -> Mapping[str, tuple[int, ...]]:
        return {"view_features": (num_views, self.classifier.in_features)}

    def teach(self, inputs: Shaped[Tensor, "b ..."], fields: Sequence[str]) -> Mapping[str, Shaped[Tensor, "b ..."]]:
        """The trunk's pooled features of each view: nowhere negative where the trunk ends in a ReLU, as ResNets do."""
        features = self.trunk(as_images(inputs.flatten(0, 1), self.image_size, self.mean, self.std))
        described: Tensor = features.unflatten(0, inputs.shape[:2])
        return {"view_features": described}
