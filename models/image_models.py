"""Image networks from timm over rendered views: PointMCD's multi-view classifier, its teacher for classification.

Nothing here downloads. Weights come from a local file or are random, which whoever builds the model says aloud.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from pydantic import BaseModel, PositiveFloat, PositiveInt
from torch import Tensor, nn

from models.heads import Projection

DESCRIPTOR_WIDTH = 512


class ImageModelConfig(BaseModel, extra="forbid", frozen=True):
    """A timm network and how images are made ready for it."""

    name: str  # timm's
    image_size: PositiveInt  # views of another size are resized
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)  # PointMCD does not normalise, not even for ImageNet weights
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (1.0, 1.0, 1.0)
    weights: str | None = None  # a safetensors or torch file of this timm model; None: random


@dataclass(frozen=True)
class ViewPredictions:
    """What a multi-view classifier says of a batch of shapes."""

    descriptors: Float[Tensor, "b v d"]
    global_logits: Float[Tensor, "b k"]
    view_logits: Float[Tensor, "b v k"]


class MultiViewClassifier(nn.Module):
    """Classifies a shape from its views and from each alone; 3,163,904 parameters with MobileNetV2 and 40 classes."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ImageModelConfig, num_classes: int) -> None:
        super().__init__()
        self.trunk = build_trunk(config)
        self.to_descriptor = Projection(cast(int, self.trunk.head_hidden_size), DESCRIPTOR_WIDTH)
        self.to_global = Projection(DESCRIPTOR_WIDTH, DESCRIPTOR_WIDTH)
        self.classifier = nn.Linear(DESCRIPTOR_WIDTH, num_classes, bias=False)
        self.image_size = config.image_size
        self.descriptor_width = DESCRIPTOR_WIDTH
        # Not part of the weights: they belong to the config, and two names for one fact could disagree
        self.register_buffer("mean", torch.tensor(config.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(3, 1, 1), persistent=False)

    def forward(self, views: UInt8[Tensor, "b v h w 3"]) -> ViewPredictions:
        """Descriptors, and logits of the shape (from the maximum over views) and of each view, by one classifier."""
        descriptors = self.describe(views)
        shape = self.to_global(descriptors.amax(dim=1))
        return ViewPredictions(descriptors, self.classifier(shape), self.classifier(descriptors))

    def describe(self, views: UInt8[Tensor, "b v h w 3"]) -> Float[Tensor, "b v d"]:
        """PointMCD's T_v, nowhere negative: 512 numbers a view, from that view alone in eval mode."""
        features = self.trunk(self._images(views.flatten(0, 1)))
        descriptors: Tensor = self.to_descriptor(features).unflatten(0, views.shape[:2])
        return descriptors

    def _images(self, views: UInt8[Tensor, "r h w 3"]) -> Float[Tensor, "r 3 s s"]:
        return as_images(views, self.image_size, self.mean, self.std)


class PooledTrunk(nn.Module):
    """Any timm network as a teacher: its own pooled features of each view, nothing trained on top."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ImageModelConfig) -> None:
        super().__init__()
        self.trunk = build_trunk(config)
        self.image_size = config.image_size
        self.descriptor_width = cast(int, self.trunk.head_hidden_size)
        self.register_buffer("mean", torch.tensor(config.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(3, 1, 1), persistent=False)

    def describe(self, views: UInt8[Tensor, "b v h w 3"]) -> Float[Tensor, "b v d"]:
        """The features of each view, from that view alone in eval mode."""
        features = self.trunk(as_images(views.flatten(0, 1), self.image_size, self.mean, self.std))
        described: Tensor = features.unflatten(0, views.shape[:2])
        return described


def as_images(
    views: UInt8[Tensor, "r h w 3"], image_size: int, mean: Float[Tensor, "3 1 1"], std: Float[Tensor, "3 1 1"]
) -> Float[Tensor, "r 3 s s"]:
    """Views as a network takes them: channels first, resized, normalised."""
    images = views.permute(0, 3, 1, 2).float() / 255
    if images.shape[-2:] != (image_size, image_size):
        images = F.interpolate(images, (image_size, image_size), mode="bilinear", antialias=True)
    normalised: Tensor = (images - mean) / std
    return normalised


def build_trunk(config: ImageModelConfig) -> nn.Module:
    """The timm network up to its pooled features, `head_hidden_size` wide."""
    import timm  # takes two seconds, and configs are read where no network is built

    pretrained_config = timm.get_pretrained_cfg(config.name) if timm.is_model(config.name) else None
    if pretrained_config is None:
        known = timm.list_models(f"*{config.name.split('_')[0].split('.')[0]}*")[:8]
        hint = f" Names like it: {', '.join(known)}." if known else ""
        raise ValueError(f"timm {timm.__version__} has no model {config.name!r}.{hint} timm.list_models() lists all.")
    sized: dict[str, Any] = {"img_size": config.image_size} if pretrained_config.fixed_input_size else {}
    trunk: nn.Module = timm.create_model(config.name, pretrained=False, num_classes=0, global_pool="avg", **sized)
    if config.weights is not None:
        classifier = pretrained_config.classifier
        heads = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
        _load_trunk(trunk, Path(config.weights), config.name, heads)
    return trunk


def _load_trunk(trunk: nn.Module, path: Path, name: str, heads: tuple[str, ...]) -> None:
    """Loads a checkpoint of the whole timm model or of the trunk alone: every weight of the trunk must be in it."""
    dropped = tuple(f"{head}." for head in heads)
    found = {key: value for key, value in read_weights(path).items() if not key.startswith(dropped)}
    wanted = trunk.state_dict()
    problems = [f"no {key}" for key in wanted if key not in found]
    problems += [f"an unknown {key}" for key in found if key not in wanted]
    problems += [
        f"{key} of shape {tuple(found[key].shape)} instead of {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in found and found[key].shape != value.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more such problems" if len(problems) > 3 else ""
        raise ValueError(
            f"{path} does not hold weights of timm's {name}: it has {', '.join(problems[:3])}{more}. "
            f"Give the file that timm publishes for this model, or the model's name that the file belongs to."
        )
    trunk.load_state_dict(found)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a torch checkpoint that holds a state dict (EMA weights first)."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(f"There is no weights file {path}. Give a safetensors file or a torch checkpoint.")
    try:
        loaded: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} cannot be read as weights: {str(error).splitlines()[0]} "
            f"A file ending in .safetensors must be one; any other must be a torch checkpoint of tensors alone."
        ) from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{path} holds no mapping of names to tensors, neither alone nor as 'state_dict' or 'model'.")
    return {key.removeprefix("module."): value for key, value in loaded.items()}
