"""PointMCD's image networks for part segmentation and for training without labels: a VGG-11 trunk with attention.

The trunk alone is the teacher without labels. It learns by reproducing its input (`ViewAutoencoder`), and goes on to
learn which part each pixel shows (`ViewSegmenter`). Either way, a view's descriptor is the mean of the last map.
"""

from collections.abc import Mapping, Sequence
from typing import Final, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped, UInt8
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from models.image_models.teacher import ImageNetworkConfig, ImageTeacher
from models.image_models.trunk import as_images, read_weights
from models.row_norm import RowNorm

_TIMM_NAME: Final = "vgg11_bn"
_GRID: Final = 32  # pixels of the image for each place of the decoders' first map


class AttentionVggConfig(ImageNetworkConfig, frozen=True):
    """What the three networks share. Only VGG-11 with batch normalisation is built, of any width."""

    width: PositiveFloat = 1.0  # multiplies every width


class Maps(NamedTuple):
    """What the four stages of the trunk say of images, finest first."""

    first: Float[Tensor, "r c h w"]
    second: Float[Tensor, "r c h w"]
    third: Float[Tensor, "r c h w"]
    fourth: Float[Tensor, "r c h w"]


class AttentionVgg(nn.Module):
    """VGG-11's convolutions without the last pooling, cut at activations, with attention; 9,357,204 parameters."""

    def __init__(self, config: AttentionVggConfig) -> None:
        super().__init__()
        if config.trunk.name != _TIMM_NAME:
            raise ValueError(
                f"The attention trunk is timm's {_TIMM_NAME}, not {config.trunk.name!r}: set trunk.name to {_TIMM_NAME}."
            )
        if config.trunk.image_size % _GRID:
            raise ValueError(
                f"trunk.image_size is {config.trunk.image_size}, and must be a multiple of {_GRID}: decoders double a "
                f"small map five times."
            )
        self.widths = tuple(round(config.width * width) for width in (64, 128, 256, 256, 512, 512, 512, 512))
        one, two, three, four, five, six, seven, self.width = self.widths
        # one sequence, as timm numbers it, so that its weights fit by name
        self.features = nn.Sequential(
            *_convolution(3, one), nn.MaxPool2d(2),
            *_convolution(one, two), nn.MaxPool2d(2),
            *_convolution(two, three), *_convolution(three, four), nn.MaxPool2d(2),
            *_convolution(four, five), *_convolution(five, six), nn.MaxPool2d(2),
            *_convolution(six, seven), *_convolution(seven, self.width),
        )  # fmt: skip
        self.first_attention, self.second_attention = SpatialAttention(7), SpatialAttention(5)
        self.third_attention, self.fourth_attention = ChannelAttention(six), ChannelAttention(self.width)
        if config.trunk.weights is not None:
            self._load(config.trunk.weights)

    def forward(self, images: Float[Tensor, "r 3 s s"]) -> Maps:
        """The maps of all stages."""
        first = self.first_attention(self.features[:7](images))
        second = self.second_attention(self.features[7:14](first))
        third = self.third_attention(self.features[14:21](second))
        return Maps(first, second, third, self.fourth_attention(self.features[21:](third)))

    def _load(self, weights: str) -> None:
        """Loads the convolutions of timm's network; attention has no published weights and stays random."""
        wanted = {f"features.{name}": value.shape for name, value in self.features.state_dict().items()}
        found = {name: value for name, value in read_weights(weights).items() if name in wanted}
        wrong = [name for name, shape in wanted.items() if name not in found or found[name].shape != shape]
        if wrong:
            raise ValueError(
                f"{weights} does not hold weights of timm's {_TIMM_NAME} in these widths: {wrong[0]} is missing or of another "
                f"shape. Give the file that timm publishes for it, with width 1, or none."
            )
        self.features.load_state_dict({name.removeprefix("features."): value for name, value in found.items()})


class SpatialAttention(nn.Module):
    """Raises the places of a map that its mean and maximum over channels point at."""

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.weigh = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, map_: Float[Tensor, "r c h w"]) -> Float[Tensor, "r c h w"]:
        """The map, each place multiplied by one plus its weight."""
        seen = torch.cat([map_.mean(dim=1, keepdim=True), map_.amax(dim=1, keepdim=True)], dim=1)
        return map_ * (1 + torch.sigmoid(self.weigh(seen)))


class ChannelAttention(nn.Module):
    """Raises the channels of a map that their means and maxima point at."""

    def __init__(self, channels: int, ratio: int = 8) -> None:
        super().__init__()
        hidden = max(channels // ratio, 1)
        self.weigh = nn.Sequential(
            nn.Linear(channels, hidden, bias=False), nn.ReLU(inplace=True), nn.Linear(hidden, channels, bias=False)
        )

    def forward(self, map_: Float[Tensor, "r c h w"]) -> Float[Tensor, "r c h w"]:
        """The map, each channel multiplied by one plus its weight."""
        weights = torch.sigmoid(self.weigh(map_.mean(dim=(2, 3))) + self.weigh(map_.amax(dim=(2, 3))))
        return map_ * (1 + weights[:, :, None, None])


class AttentionTeacher(ImageTeacher):
    """What teaches is the trunk: each view's descriptor is the mean of its last map, nowhere negative."""

    def __init__(self, config: AttentionVggConfig) -> None:
        super().__init__(config)
        self.trunk = AttentionVgg(config)

    def field_sizes(self, num_views: int) -> Mapping[str, tuple[int, ...]]:
        return {"view_features": (num_views, self.trunk.width)}

    def teach(self, inputs: Shaped[Tensor, "b ..."], fields: Sequence[str]) -> Mapping[str, Shaped[Tensor, "b ..."]]:
        maps = self.trunk(self.images(inputs.flatten(0, 1)))
        return {"view_features": maps.fourth.mean(dim=(2, 3)).unflatten(0, inputs.shape[:2])}

    def images(self, views: UInt8[Tensor, "r h w 3"]) -> Float[Tensor, "r 3 s s"]:
        """Views as the trunk takes them."""
        return as_images(views, self.image_size, self.mean, self.std)


class ViewAutoencoderConfig(AttentionVggConfig, frozen=True):
    """Reproduces views from their descriptors."""

    kind: Literal["view_autoencoder"] = "view_autoencoder"

    def build(self) -> "ViewAutoencoder":
        """The network."""
        return ViewAutoencoder(self)


class ViewAutoencoder(AttentionTeacher):
    """The trunk and a decoder of its descriptor; 16,783,540 parameters."""

    def __init__(self, config: ViewAutoencoderConfig) -> None:
        super().__init__(config)
        self.grid = config.trunk.image_size // _GRID
        self.widths = [round(config.width * width) for width in (256, 256, 128, 64, 32)]
        self.spread = nn.Sequential(
            nn.Linear(self.trunk.width, self.widths[0] * self.grid**2, bias=False),
            RowNorm(self.widths[0] * self.grid**2),
            nn.ReLU(inplace=True),
        )
        self.decoder = nn.ModuleList(
            _unit(before, after, 3) for before, after in zip(self.widths[:-1], self.widths[1:], strict=True)
        )
        self.to_image = nn.Conv2d(self.widths[-1], 3, 3, padding=1, bias=False)

    def forward(self, images: Float[Tensor, "r 3 s s"]) -> Float[Tensor, "r 3 s s"]:
        """The images as their descriptors remember them."""
        map_ = self.spread(self.trunk(images).fourth.mean(dim=(2, 3))).view(-1, self.widths[0], self.grid, self.grid)
        for unit in self.decoder:
            map_ = unit(_doubled(map_))
        image: Tensor = self.to_image(_doubled(map_))
        return image


class ViewSegmenterConfig(AttentionVggConfig, frozen=True):
    """Names the part that each pixel of a view shows."""

    kind: Literal["view_segmenter"] = "view_segmenter"
    num_categories: PositiveInt | None = None  # None: as many as the corpus has classes
    num_parts: PositiveInt | None = None  # None: as many as the corpus has

    def build(self) -> "ViewSegmenter":
        """The network."""
        return ViewSegmenter(self)


class ViewSegmenter(AttentionTeacher):
    """The trunk and a decoder of all its maps, told each shape's category; 16,796,500 parameters with 16 and 50."""

    def __init__(self, config: ViewSegmenterConfig) -> None:
        super().__init__(config)
        if config.num_categories is None or config.num_parts is None:
            raise ValueError("ViewSegmenterConfig.num_categories and num_parts: whoever knows the corpus sets them.")
        self.num_categories = config.num_categories
        trunk = self.trunk
        category, common, half, low, last = (round(config.width * width) for width in (64, 128, 256, 128, 64))
        self.of_category = _fully_connected(config.num_categories, category)
        self.of_view = _fully_connected(trunk.width + category, common)
        _, first, _, second, _, third, _, fourth = trunk.widths
        self.fourth_unit = _unit(fourth + common, fourth, 1)
        self.third_unit = _unit(fourth + third, third, 3)
        self.second_unit = _unit(third + second, half, 3)
        self.first_unit = _unit(half + first, low, 3)
        self.last_unit = _unit(low, last, 3)
        self.to_parts = nn.Conv2d(last, config.num_parts + 1, 3, padding=1, bias=False)  # the last one is background

    def forward(self, images: Float[Tensor, "r 3 s s"], category: Int64[Tensor, " r"]) -> Float[Tensor, "r q s s"]:
        """Logits of each part and of the background, for each pixel. A category below zero is unknown."""
        maps = self.trunk(images)
        one_hot = F.one_hot(category.clamp(min=0), self.num_categories) * (category >= 0)[:, None]
        told = self.of_category(one_hot.to(images.dtype))
        common = self.of_view(torch.cat([maps.fourth.mean(dim=(2, 3)), told], dim=1))
        spread = common[:, :, None, None].expand(-1, -1, *maps.fourth.shape[2:])
        map_ = self.fourth_unit(torch.cat([maps.fourth, spread], dim=1))
        map_ = self.third_unit(torch.cat([_doubled(map_), maps.third], dim=1))
        map_ = self.second_unit(torch.cat([_doubled(map_), maps.second], dim=1))
        map_ = self.first_unit(torch.cat([_doubled(map_), maps.first], dim=1))
        logits: Tensor = self.to_parts(self.last_unit(_doubled(map_)))
        return logits


def _convolution(before: int, after: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(before, after, 3, padding=1)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True)


def _unit(before: int, after: int, kernel_size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, kernel_size, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(inplace=True),
    )


def _fully_connected(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(before, after, bias=False), RowNorm(after), nn.ReLU(inplace=True))


def _doubled(map_: Float[Tensor, "r c h w"]) -> Float[Tensor, "r c h2 w2"]:
    return F.interpolate(map_, scale_factor=2, mode="bilinear", align_corners=True)
