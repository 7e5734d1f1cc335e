"""Any timm network with what it says of each part of an image: patch tokens, and how much its class token attends to each."""

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from math import isqrt
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from pydantic import PositiveInt
from torch import Tensor, nn

from models.image_models.teacher import ImageNetworkConfig, ImageTeacher
from models.image_models.trunk import as_images, build_trunk

# Each thread has its own: several may run one network at a time, each on its own images
_ATTENTION: ContextVar[list[Tensor] | None] = ContextVar("_ATTENTION", default=None)


class TokenTrunkConfig(ImageNetworkConfig, frozen=True):
    """A trunk, its tokens, and what becomes of them."""

    kind: Literal["tokens"] = "tokens"
    tokens: PositiveInt | Literal["native"] = (
        "native"  # so many a side of the image: an average of those that fall into each
    )
    # Width that the network's last linear layer, without a bias, gives features and tokens: 512 for CLIP ViT-B/16, whose
    # published networks are timm's `vit_base_patch16_clip_quickgelu_224.openai` and its like. None: there is no such layer
    projection: PositiveInt | None = None

    def build(self) -> "TokenTrunk":
        """The network, with the trunk's weights from where they come from, or random."""
        return TokenTrunk(self)


@dataclass(frozen=True)
class ImageWords:
    """What a network says of images."""

    features: Float[Tensor, "r d"]
    tokens: Float[Tensor, "r t d"]  # row by row, from the top left
    saliency: Float[Tensor, "r t"] | None  # sums to less than one: the class token attends to itself, too


class TokenTrunk(ImageTeacher):
    """Pooled features, tokens and saliency of each view; CLIP ViT-B/16 with its projection has 86,192,640 parameters."""

    def __init__(self, config: TokenTrunkConfig) -> None:
        super().__init__(config)
        self.trunk = build_trunk(config.trunk, config.projection)
        # Called as a module, and not by its parts: ZeRO stage 3 gathers a module's own weights around its call alone
        self.trunk.forward = partial(_found_and_features, self.trunk)
        self._tokens = config.tokens
        self._is_projected = config.projection is not None
        self._num_prefix_tokens: int | None = getattr(self.trunk, "num_prefix_tokens", None)
        self.has_saliency = self._watch_last_attention()

    def field_sizes(self, num_views: int) -> Mapping[str, tuple[int, ...]]:
        words = self._words_of_nothing()
        sizes: dict[str, tuple[int, ...]] = {
            "view_features": (num_views, words.features.shape[-1]),
            "view_tokens": (num_views, *words.tokens.shape[1:]),
        }
        return sizes | ({"view_saliency": (num_views, words.tokens.shape[1])} if self.has_saliency else {})

    def teach(self, inputs: Shaped[Tensor, "b ..."], fields: Sequence[str]) -> Mapping[str, Shaped[Tensor, "b ..."]]:
        if "view_saliency" in fields:
            self._refuse_no_saliency()
        words = self(as_images(inputs.flatten(0, 1), self.image_size, self.mean, self.std))
        said = {"view_features": words.features, "view_tokens": words.tokens, "view_saliency": words.saliency}
        return {field: said[field].unflatten(0, inputs.shape[:2]) for field in fields}

    def tokens_and_saliency(
        self, images: Float[Tensor, "r 3 s s"]
    ) -> tuple[Float[Tensor, "r t d"], Float[Tensor, "r t"]]:
        """Tokens of images that are made ready for the network, and its class token's attention to each."""
        self._refuse_no_saliency()
        words = self(images)
        return words.tokens, words.saliency

    def forward(self, images: Float[Tensor, "r 3 s s"]) -> ImageWords:
        """All that the network says of images that are made ready for it."""
        attention: list[Tensor] = []
        listening = _ATTENTION.set(attention if self.has_saliency else None)
        try:
            found, features = self.trunk(images)
        finally:
            _ATTENTION.reset(listening)
        grid = self._as_grid(found)
        saliency = None
        if self.has_saliency:
            # the class token is the first of the prefix tokens; the mean is over heads
            to_patches = attention[0][:, :, 0, -(grid.shape[1] * grid.shape[2]) :].mean(dim=1)
            saliency = self._pooled(to_patches.unflatten(1, grid.shape[1:3])[..., None])[..., 0]
        tokens = self._pooled(grid)
        if self._is_projected:
            tokens = self.trunk.get_classifier()(tokens)  # type: ignore[operator]
        return ImageWords(features, tokens, saliency)

    def _watch_last_attention(self) -> bool:
        """Whether the last block has attention of a class token, which `forward` then hears of.

        Fused kernels do not tell their weights, so this one block computes them one by one: a thousandth of the time.
        """
        blocks, class_token = getattr(self.trunk, "blocks", None), getattr(self.trunk, "cls_token", None)
        attention: Any = (
            getattr(blocks[-1], "attn", None) if isinstance(blocks, nn.Sequential | nn.ModuleList) else None
        )
        # those without a scale attend from channel to channel
        attends = hasattr(attention, "fused_attn") and hasattr(attention, "attn_drop") and hasattr(attention, "scale")
        if class_token is None or not self._num_prefix_tokens or not attends:
            return False
        attention.fused_attn = False
        attention.attn_drop.register_forward_pre_hook(_hear)
        return True

    def _refuse_no_saliency(self) -> None:
        if not self.has_saliency:
            raise ValueError(
                f"timm's {self.config.trunk.name} has no class token that attends to patches in its last block, so it "
                f"has no view_saliency. Ask for view_features and view_tokens alone, or take a vision transformer."
            )

    def _as_grid(self, found: Tensor) -> Float[Tensor, "r h w d"]:
        """A network's last map or tokens as a grid over the image."""
        name = self.config.trunk.name
        if found.ndim == 4:
            channels_first = bool(found.shape[1] == self.trunk.num_features)
            return found.permute(0, 2, 3, 1) if channels_first else found
        if found.ndim != 3:
            raise ValueError(f"timm's {name} says nothing of the parts of an image: it has view_features alone.")
        side = isqrt(found.shape[1] - (self._num_prefix_tokens or 0))
        num_prefix_tokens = found.shape[1] - side * side
        if self._num_prefix_tokens is not None and num_prefix_tokens != self._num_prefix_tokens:
            raise ValueError(
                f"timm's {name} has {found.shape[1]} tokens, which make no square: take view_features alone."
            )
        grid: Tensor = found[:, num_prefix_tokens:].unflatten(1, (side, side))
        return grid

    def _pooled(self, grid: Float[Tensor, "r h w d"]) -> Float[Tensor, "r t d"]:
        """The grid, or averages over its cells where fewer are asked for."""
        side, fewer = grid.shape[1], self._tokens
        if fewer == "native" or fewer == side:
            return grid.flatten(1, 2)
        if fewer > side or side % fewer:
            raise ValueError(
                f"timm's {self.config.trunk.name} has {side} x {side} tokens of an image of {self.image_size} pixels; "
                f"they cannot be made {fewer} x {fewer}. Choose a divisor of {side}, or 'native'."
            )
        averages: Tensor = F.avg_pool2d(grid.permute(0, 3, 1, 2), side // fewer)
        return averages.permute(0, 2, 3, 1).flatten(1, 2)

    def _words_of_nothing(self) -> ImageWords:
        """Of one empty image: how large everything is."""
        was_training = self.training
        self.eval()
        with torch.no_grad():
            words: ImageWords = self(self.mean.new_zeros(1, 3, self.image_size, self.image_size))
        self.train(was_training)
        return words


def _found_and_features(trunk: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """A network's last map or tokens, and what it makes of them: its own forward pass returns the latter alone."""
    found = trunk.forward_features(images)
    return found, trunk.forward_head(found)


def _hear(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Keeps the attention that a block's dropout is given, for who listens in this thread."""
    heard = _ATTENTION.get()
    if heard is not None:
        heard.append(inputs[0])
