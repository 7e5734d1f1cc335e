"""Trunks of image networks: any timm model up to its pooled features, its weights, and how views are made ready for it.

Weights come from timm's hub, from a file or from an object's URL. Where none are named they are random, which whoever
builds the model says aloud; weights that are named and cannot be had are an error, and never random ones instead.
"""

import io
import pickle
import sys
from typing import Any, Final

import fsspec
import torch
import torch.nn.functional as F
from fsspec.implementations.local import LocalFileSystem
from jaxtyping import Float, UInt8
from pydantic import BaseModel, PositiveFloat, PositiveInt
from torch import Tensor, nn

HUB: Final = "hub"
"""Instead of a file: the weights that timm has for the model, from its cache or the network."""


class TrunkConfig(BaseModel, extra="forbid", frozen=True):
    """A timm network and how images are made ready for it."""

    name: str  # timm's
    image_size: PositiveInt  # views of another size are resized
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)  # PointMCD does not normalise, not even for ImageNet weights
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (1.0, 1.0, 1.0)
    weights: str | None = None  # "hub", or path or URL of a safetensors or torch file of this timm model; None: random


def as_images(
    views: UInt8[Tensor, "r h w 3"], image_size: int, mean: Float[Tensor, "3 1 1"], std: Float[Tensor, "3 1 1"]
) -> Float[Tensor, "r 3 s s"]:
    """Views as a network takes them: channels first, resized, normalised."""
    images = views.permute(0, 3, 1, 2).float().div_(255)  # in place: memory is what this costs
    if images.shape[-2:] != (image_size, image_size):
        images = F.interpolate(images, (image_size, image_size), mode="bilinear", antialias=True)
    return images.sub_(mean).div_(std)


def build_trunk(config: TrunkConfig, projection: int | None = None) -> nn.Module:
    """The timm network up to its pooled features, `head_hidden_size` wide.

    With a projection, its last linear layer stays, without a bias, and makes so many features of them, as CLIP's does.
    """
    import timm  # takes two seconds, and configs are read where no network is built

    pretrained_config = timm.get_pretrained_cfg(config.name) if timm.is_model(config.name) else None
    if pretrained_config is None:
        known = timm.list_models(f"*{config.name.split('_')[0].split('.')[0]}*")[:8]
        hint = f" Names like it: {', '.join(known)}." if known else ""
        raise ValueError(f"timm {timm.__version__} has no model {config.name!r}.{hint} timm.list_models() lists all.")
    sized: dict[str, Any] = {"img_size": config.image_size} if pretrained_config.fixed_input_size else {}
    trunk: nn.Module = timm.create_model(config.name, pretrained=False, num_classes=projection or 0, **sized)
    classifier = pretrained_config.classifier
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    if projection is not None:
        last = trunk.get_submodule(heads[0]) if len(heads) == 1 else None
        if not isinstance(last, nn.Linear):
            raise ValueError(f"timm's {config.name} does not end in one linear layer, so it has no projection.")
        trunk.set_submodule(heads[0], nn.Linear(last.in_features, projection, bias=False))
    if config.weights is not None:
        from_hub = config.weights == HUB
        found = _read_hub(config.name, sized) if from_hub else read_weights(config.weights)
        where = f"timm's hub ({config.name})" if from_hub else config.weights
        _load_trunk(trunk, found, where, config.name, heads, projection)
    return trunk


def _read_hub(name: str, sized: dict[str, Any]) -> dict[str, Tensor]:
    """The weights that timm publishes for a model, with its classifier."""
    import timm

    try:
        # with as many classes as the weights have: timm then loads all of them or fails
        published: dict[str, Tensor] = timm.create_model(name, pretrained=True, **sized).state_dict()
    except Exception as error:  # of timm, of the hub's client, or of the HTTP client below that
        reason = next(filter(None, str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"timm's weights of {name} cannot be had from its hub: {reason} Where the hub cannot be reached, fetch the "
            f"file elsewhere and name it: `--weights FILE` of `viewpoint cache`, `trunk.weights` of a config. It may be "
            f"a local path or an object's URL."
        ) from error
    return published


def _load_trunk(
    trunk: nn.Module,
    found: dict[str, Tensor],
    where: str,
    name: str,
    heads: tuple[str, ...],
    projection: int | None,
) -> None:
    """Loads a checkpoint of the whole timm model or of the trunk alone: every weight of the trunk must be in it."""
    if _problems(trunk, _without_heads(found, heads, projection, where)):
        # what timm reads it converts: other projects' names, and position embeddings for another input size
        convert = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
        if convert is not None:
            found = convert(found, trunk)
    found = _without_heads(found, heads, projection, where)
    if problems := _problems(trunk, found):
        more = f" and {len(problems) - 3} more such problems" if len(problems) > 3 else ""
        raise ValueError(
            f"{where} does not hold weights of timm's {name}: it has {', '.join(problems[:3])}{more}. "
            f"Give the file that timm publishes for this model, or the model's name that the file belongs to."
        )
    trunk.load_state_dict(found)


def _without_heads(
    found: dict[str, Tensor], heads: tuple[str, ...], projection: int | None, where: str
) -> dict[str, Tensor]:
    """The weights without those of classifiers; a projection stays, which has no bias or one of zeros."""
    if projection is None:
        return {key: value for key, value in found.items() if not key.startswith(tuple(f"{head}." for head in heads))}
    bias = f"{heads[0]}.bias"
    if bias in found and found[bias].any():
        raise ValueError(f"{where} ends in a layer with a bias ({bias}): it is a classifier and no projection.")
    return {key: value for key, value in found.items() if key != bias}


def _problems(trunk: nn.Module, found: dict[str, Tensor]) -> list[str]:
    """How weights differ from those that a trunk takes."""
    wanted = trunk.state_dict()
    return [
        *(f"no {key}" for key in wanted if key not in found),
        *(f"an unknown {key}" for key in found if key not in wanted),
        *(
            f"{key} of shape {tuple(found[key].shape)} instead of {tuple(value.shape)}"
            for key, value in wanted.items()
            if key in found and found[key].shape != value.shape
        ),
    ]


def read_weights(url: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a torch checkpoint that holds a state dict (EMA weights first)."""
    from safetensors import SafetensorError
    from safetensors.torch import load, load_file

    filesystem, path = fsspec.core.url_to_fs(url)
    try:
        if isinstance(filesystem, LocalFileSystem):
            if not filesystem.isfile(path):
                raise FileNotFoundError(path)
            source: Any = path
        else:
            source = filesystem.cat_file(path)
    except FileNotFoundError as error:
        raise ValueError(f"There is no weights file {url}. Give a safetensors file or a torch checkpoint.") from error
    try:
        if path.endswith(".safetensors"):
            loaded: Any = load_file(source) if source is path else load(source)
        else:
            loaded = torch.load(source if source is path else io.BytesIO(source), "cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{url} cannot be read as weights: {str(error).splitlines()[0]} "
            f"A file ending in .safetensors must be one; any other must be a torch checkpoint of tensors alone."
        ) from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{url} holds no mapping of names to tensors, neither alone nor as 'state_dict' or 'model'.")
    return {key.removeprefix("module."): value for key, value in loaded.items()}
