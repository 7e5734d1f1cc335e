"""PointMCD's multi-view classifier: its teacher for classification."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, cast

from jaxtyping import Float, Shaped, UInt8
from pydantic import PositiveInt
from torch import Tensor, nn

from models.heads import Projection
from models.image_models.teacher import ImageNetworkConfig, ImageTeacher
from models.image_models.trunk import as_images, build_trunk

DESCRIPTOR_WIDTH: Final = 512


class MultiViewClassifierConfig(ImageNetworkConfig, frozen=True):
    """MobileNetV2 as published, or any trunk."""

    kind: Literal["multi_view_classifier"] = "multi_view_classifier"
    num_classes: PositiveInt | None = None  # None: as many as the corpus has

    def build(self) -> "MultiViewClassifier":
        """The network, with the trunk's weights from its file or all random."""
        return MultiViewClassifier(self)


@dataclass(frozen=True)
class ViewPredictions:
    """What a multi-view classifier says of a batch of shapes."""

    descriptors: Float[Tensor, "b v d"]
    global_logits: Float[Tensor, "b k"]
    view_logits: Float[Tensor, "b v k"] | None = None  # of classifiers that name single views too


class MultiViewClassifier(ImageTeacher):
    """Classifies a shape from its views and from each alone; 3,163,904 parameters with MobileNetV2 and 40 classes."""

    def __init__(self, config: MultiViewClassifierConfig) -> None:
        super().__init__(config)
        if config.num_classes is None:
            raise ValueError("MultiViewClassifierConfig.num_classes is not set: whoever knows the corpus sets it.")
        self.trunk = build_trunk(config.trunk)
        self.to_descriptor = Projection(cast(int, self.trunk.head_hidden_size), DESCRIPTOR_WIDTH)
        self.to_global = Projection(DESCRIPTOR_WIDTH, DESCRIPTOR_WIDTH)
        self.classifier = nn.Linear(DESCRIPTOR_WIDTH, config.num_classes, bias=False)

    def forward(self, views: UInt8[Tensor, "b v h w 3"]) -> ViewPredictions:
        """Descriptors, and logits of the shape (from the maximum over views) and of each view, by one classifier."""
        descriptors = self.describe(views)
        shape = self.to_global(descriptors.amax(dim=1))
        return ViewPredictions(descriptors, self.classifier(shape), self.classifier(descriptors))

    def field_sizes(self, num_views: int) -> Mapping[str, tuple[int, ...]]:
        return {"view_features": (num_views, DESCRIPTOR_WIDTH)}

    def teach(self, inputs: Shaped[Tensor, "b ..."], fields: Sequence[str]) -> Mapping[str, Shaped[Tensor, "b ..."]]:
        """PointMCD's T_v, nowhere negative: 512 numbers a view."""
        features = self.trunk(as_images(inputs.flatten(0, 1), self.image_size, self.mean, self.std))
        descriptors: Tensor = self.to_descriptor(features).unflatten(0, inputs.shape[:2])
        return {"view_features": descriptors}
