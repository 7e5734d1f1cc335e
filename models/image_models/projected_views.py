"""I2P-MAE's teacher: an image network that looks at three depth images of a cloud, drawn from its points alone.

"Learning 3D Representations from 2D Pre-trained Models via Image-to-Point Masked Autoencoders" (CVPR 2023): CLIP
ViT-B/16, whose image tower with its projection has 86,192,640 parameters. Each point keeps its pixel in each image, so
that what the network says of patches can be read at points.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from jaxtyping import Float, Float32, Int64, Shaped
from pydantic import PositiveInt
from torch import Tensor, nn

from models.depth_projection import NUM_VIEWS, depth_sums, frame_clouds, grey_images, pixels_of
from models.image_models.teacher import ImageNetworkConfig, ImageTeacher
from models.image_models.trunk import TrunkConfig
from models.image_models.vision_transformer import ImageWords, TokenTrunkConfig
from models.unit_sphere import to_unit_sphere

# The published teacher is shown images normalised as ImageNet's, and not as CLIP's own
IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)


class ProjectedViewsConfig(ImageNetworkConfig, frozen=True):
    """The published teacher, or any vision transformer with a class token."""

    kind: Literal["projected_views"] = "projected_views"
    trunk: TrunkConfig = TrunkConfig(
        name="vit_base_patch16_clip_quickgelu_224.openai", image_size=224, mean=IMAGENET_MEAN, std=IMAGENET_STD
    )
    projection: PositiveInt | None = (
        512  # width of features and tokens, by the network's own last layer; None: as they are
    )
    # Images for a store are drawn from so many of a shape's points, the first, as many as in training: depths are summed,
    # so more points make other images. None: all
    num_drawn: PositiveInt | None = 2048
    num_classes: PositiveInt | None = None  # of a classifier that trains the network; None: there is none

    def build(self) -> "ProjectedViews":
        """The network, with the trunk's weights from where they come from, or random."""
        return ProjectedViews(self)


@dataclass(frozen=True)
class ProjectedWords:
    """What the network says of three images of each cloud, and where in them points are."""

    tokens: Float[Tensor, "b 3 t d"]  # row by row, from the top left
    saliency: Float[Tensor, "b 3 t"]  # the class token's attention
    pixels: Int64[Tensor, "b n 3 2"]  # column, row


class ProjectedViews(ImageTeacher):
    """Says of three images of a cloud what their patches are; with a classifier, names the cloud."""

    reads = "points"

    def __init__(self, config: ProjectedViewsConfig) -> None:
        super().__init__(config)
        self.tower = TokenTrunkConfig(trunk=config.trunk, projection=config.projection).build()
        self._sizes = self.tower.field_sizes(NUM_VIEWS)
        if "view_saliency" not in self._sizes:
            raise ValueError(
                f"timm's {config.trunk.name} has no class token that attends to patches, and I2P-MAE masks by it. Take a "
                f"vision transformer with one, such as vit_base_patch16_clip_quickgelu_224.openai."
            )
        self._num_drawn = config.num_drawn
        self.classifier = None
        if config.num_classes is not None:
            self.classifier = nn.Linear(self._sizes["view_features"][-1], config.num_classes)

    @property
    def num_features(self) -> int:
        """Width of a token."""
        return self._sizes["view_tokens"][-1]

    def look(self, points: Float[Tensor, "b n 3"]) -> ProjectedWords:
        """What the network says of images of these clouds as they are."""
        frame = frame_clouds(points, self.image_size)
        words = self._words(depth_sums(points, frame))
        assert words.saliency is not None, "the constructor refuses networks without it"
        tokens, saliency = words.tokens.unflatten(0, (-1, NUM_VIEWS)), words.saliency.unflatten(0, (-1, NUM_VIEWS))
        return ProjectedWords(tokens, saliency, pixels_of(points, frame))

    def forward(self, points: Float[Tensor, "b n 3"]) -> Float[Tensor, "b 3 k"]:
        """Class logits of each image, from its class token and the mean of its patch tokens: both learn."""
        assert self.classifier is not None, "there is no classifier without num_classes"
        words = self._words(depth_sums(points, frame_clouds(points, self.image_size)))
        logits = self.classifier(words.features + words.tokens.mean(dim=1))
        by_cloud: Tensor = logits.unflatten(0, (-1, NUM_VIEWS))
        return by_cloud

    def field_sizes(self, num_views: int) -> Mapping[str, tuple[int, ...]]:
        return self._sizes

    def teach(self, inputs: Shaped[Tensor, "b ..."], fields: Sequence[str]) -> Mapping[str, Shaped[Tensor, "b ..."]]:
        """What it says of the canonical clouds: stored points, moved and scaled to the unit sphere of those drawn."""
        points = to_unit_sphere(inputs, self._num_drawn)
        drawn = points[:, : self._num_drawn]
        frame = frame_clouds(drawn, self.image_size)
        said = {}
        if "view_pixels" in fields:
            said["view_pixels"] = pixels_of(points, frame).to(torch.int16)
        if set(fields) - {"view_pixels"}:
            words = self._words(depth_sums(drawn, frame))
            by_field = {"view_features": words.features, "view_tokens": words.tokens, "view_saliency": words.saliency}
            for field in fields:
                if (value := by_field.get(field)) is not None:
                    said[field] = value.unflatten(0, (-1, NUM_VIEWS))
        return said

    def _words(self, sums: Float32[Tensor, "b 3 s s"]) -> ImageWords:
        words: ImageWords = self.tower(grey_images(sums, self.mean, self.std).flatten(0, 1))
        return words
