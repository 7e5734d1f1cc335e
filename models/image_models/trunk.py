"""Trunks of image networks: any timm model up to its pooled features, its weights, and how views are made ready for it.

Nothing here downloads. Weights come from a local file or are random, which whoever builds the model says aloud.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from pydantic import BaseModel, PositiveFloat, PositiveInt
from torch import Tensor, nn


class TrunkConfig(BaseModel, extra="forbid", frozen=True):
    """A timm network and how images are made ready for it."""

    name: str  # timm's
    image_size: PositiveInt  # views of another size are resized
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)  # PointMCD does not normalise, not even for ImageNet weights
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (1.0, 1.0, 1.0)
    weights: str | None = None  # a safetensors or torch file of this timm model; None: random


def as_images(
    views: UInt8[Tensor, "r h w 3"], image_size: int, mean: Float[Tensor, "3 1 1"], std: Float[Tensor, "3 1 1"]
) -> Float[Tensor, "r 3 s s"]:
    """Views as a network takes them: channels first, resized, normalised."""
    images = views.permute(0, 3, 1, 2).float() / 255
    if images.shape[-2:] != (image_size, image_size):
        images = F.interpolate(images, (image_size, image_size), mode="bilinear", antialias=True)
    normalised: Tensor = (images - mean) / std
    return normalised


def build_trunk(config: TrunkConfig) -> nn.Module:
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
