"""Frozen teachers by what somebody names: an exported folder, or a timm model with weights; and who each one is.

A teacher is known by a hash over all that decides what it says: weights, network, input size, normalisation, precision.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, cast

from datastore.errors import AskedWrongly, DoNotRetry, ViewpointError

if TYPE_CHECKING:
    from datastore.layout import Store, TeacherAttributes
    from models.image_models.teacher import ImageTeacher

Precision = Literal["float32", "bf16"]
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class TimmOptions:
    """How a timm model looks at shapes. What is None is as the model was made for."""

    model: str
    image_size: int | None = None
    mean: Triple | None = None
    std: Triple | None = None
    projection: int | None = None  # None: no last layer
    tokens: int | Literal["native"] | None = None  # a side; None: pooled features alone
    from_points: bool = False  # draws its images itself, as I2P-MAE does


def load_teacher(weights: str | None, options: TimmOptions) -> tuple["ImageTeacher", Mapping[str, str]]:
    """The teacher in an exported folder, or a timm model with weights from the hub or a file (None: a fixed seed's).

    With it comes what an exported folder says of its training, so that a report can tell what the teacher has seen.
    """
    import torch

    from models.image_models.trunk import HUB

    try:
        if weights is None:
            # each process builds its own: without a seed, they would write different teachers
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return _timm_teacher(None, options), {}
        if weights == HUB or not _is_folder(weights):
            return _timm_teacher(weights, options), {}
        return _exported_teacher(weights, options)
    except ValueError as error:
        raise DoNotRetry(str(error)) from error
    except OSError as error:
        raise ViewpointError(
            f"--weights {weights} cannot be fetched: {error}. The same command tries again."
        ) from error


def _is_folder(url: str) -> bool:
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(url)
    if not filesystem.exists(path):
        raise AskedWrongly(
            f"--weights {url}: nothing is there. Give an exported folder, a weights file, or 'hub' for timm's own."
        )
    return bool(filesystem.isdir(path))


def _exported_teacher(url: str, options: TimmOptions) -> tuple["ImageTeacher", Mapping[str, str]]:
    from models.exported import CONFIG_FILE, load
    from models.image_models.teacher import ImageTeacher
    from trainer.fetched import fetched

    with fetched(url) as path:
        if not (path / CONFIG_FILE).is_file():
            raise AskedWrongly(
                f"--weights {url} is a folder without {CONFIG_FILE}, so it is no exported model. Give what `viewpoint "
                f"export RUN DIR` wrote, or a weights file of a timm model."
            )
        teacher = load(path)
        training = _training_facts(json.loads((path / CONFIG_FILE).read_text()))
    if not isinstance(teacher, ImageTeacher):
        raise AskedWrongly(
            f"--weights {url} holds a point encoder, which does not describe views. Give the export of an image model, "
            f"such as that of job pointmcd_teacher."
        )
    if options.image_size not in (None, teacher.image_size):
        raise AskedWrongly(
            f"--weights {url} was trained on {teacher.image_size} pixels: leave --image-size {options.image_size} out."
        )
    asked = {"--mean": options.mean, "--std": options.std, "--projection": options.projection}
    asked |= {"--from-points": options.from_points or None}
    if changed := [option for option, value in asked.items() if value is not None]:
        raise AskedWrongly(f"--weights {url} is an exported model, which is taken as it is: leave {changed[0]} out.")
    if options.tokens not in (None, "native", getattr(teacher.config, "tokens", None)):
        raise AskedWrongly(f"--weights {url} is an exported model, whose tokens are what they are: leave --tokens out.")
    return teacher, training


def _training_facts(description: Mapping[str, Any]) -> Mapping[str, str]:
    """What does not change when the same weights are exported again."""
    training, store = description.get("training", {}), description.get("store", {})
    facts = {key: training.get(key) for key in ("job", "config_hash", "split")}
    facts["source_hash"] = store.get("source_hash")
    return {key: value for key, value in facts.items() if value is not None}


def _timm_teacher(weights: str | None, options: TimmOptions) -> "ImageTeacher":
    """A timm model with the input size and normalisation that it was made for, unless others are asked for."""
    import timm

    from models.image_models import build_image_model

    try:
        made_for = timm.get_pretrained_cfg(options.model)
    except RuntimeError:  # of a known network, but with an unknown tag
        made_for = None
    if made_for is None:
        raise AskedWrongly(
            f"timm {timm.__version__} has no model {options.model!r}. --model names one, and --teacher where there is no "
            f"--model, unless --weights is the folder of an exported model."
        )
    trunk: dict[str, Any] = {
        "name": options.model,
        "image_size": options.image_size or made_for.input_size[-1],
        "mean": options.mean or made_for.mean,
        "std": options.std or made_for.std,
        "weights": weights,
    }
    config: dict[str, Any] = {"kind": "pooled", "trunk": trunk}
    if options.from_points:
        # the published teacher is shown images normalised as ImageNet's, and not as CLIP's own
        trunk["mean"] = options.mean or timm.data.IMAGENET_DEFAULT_MEAN
        trunk["std"] = options.std or timm.data.IMAGENET_DEFAULT_STD
        config |= {"kind": "projected_views", "projection": options.projection}
    elif options.tokens is not None or options.projection is not None:
        config |= {"kind": "tokens", "projection": options.projection, "tokens": options.tokens or "native"}
    return build_image_model(config).eval().requires_grad_(False)


def fields_offered(store: "Store", teacher: "ImageTeacher") -> Mapping[str, tuple[int, ...]]:
    """What a teacher can say of each shape of a store: names of fields, with the sizes of one row's array."""
    try:
        sizes = dict(teacher.field_sizes(store.attributes.num_views))
    except ValueError as error:
        raise AskedWrongly(str(error)) from error
    if teacher.reads == "points":
        # the images are its own, so only it knows where in them each point lies
        num_views = next(iter(sizes.values()))[0]
        sizes["view_pixels"] = (store.attributes.points_per_shape, num_views, 2)
    return sizes


def teacher_attributes(
    store: "Store",
    teacher: "ImageTeacher",
    name: str,
    fields: tuple[str, ...] | None = None,
    training: Mapping[str, str] = MappingProxyType({}),
    precision: Precision = "float32",
    options: str = "",
) -> "TeacherAttributes":
    """Who this teacher is, in the words of the store. `fields` None: the first that it offers."""
    from pydantic import ValidationError

    from datastore.layout import TeacherAttributes

    sizes = fields_offered(store, teacher)
    fields = fields or tuple(sizes)[:1]
    if lacking := [field for field in fields if field not in sizes]:
        reason = " Saliency is the attention of a class token, which only vision transformers have." * (
            "view_saliency" in lacking
        )
        raise AskedWrongly(
            f"Teacher {name!r} ({_network(teacher)}) has no {' and no '.join(lacking)}, only {', '.join(sizes)}.{reason}"
        )
    try:
        return TeacherAttributes(
            name=name,
            weights_hash=_hash(teacher, precision),
            image_size=teacher.image_size,
            mean=teacher.config.trunk.mean,
            std=teacher.config.trunk.std,
            fields={field: sizes[field] for field in fields},
            dim=sizes["view_features" if "view_features" in sizes else "view_tokens"][-1],
            num_tokens=sizes["view_tokens"][1] if {"view_tokens", "view_saliency"} & set(fields) else 0,
            precision=precision,
            network=_network(teacher),
            training=dict(training),
            options=options,
        )
    except ValidationError as error:
        raise AskedWrongly(
            f"--teacher {name!r} cannot be a folder's name: use letters, digits, '_', '.' and '-'."
        ) from error


def _network(teacher: "ImageTeacher") -> str:
    return f"{_kind(teacher)} {teacher.config.trunk.name}"


def _kind(teacher: "ImageTeacher") -> str:
    return cast(str, teacher.config.model_dump()["kind"])


def _hash(teacher: "ImageTeacher", precision: Precision) -> str:
    """SHA-256 over the network's config, where weights came from left out, and names, shapes and values of the weights.

    Settings at their defaults are left out, so that a new one does not make every cache stale.
    """
    trunk = teacher.config.trunk.model_dump(mode="json", exclude={"weights"}, exclude_defaults=True)
    trunk["name"] = trunk["name"].partition(".")[0]  # timm's tags name weights
    rest = teacher.config.model_dump(mode="json", exclude={"trunk"}, exclude_defaults=True)
    facts = {**rest, "kind": _kind(teacher), "trunk": trunk} | ({} if precision == "float32" else {"in": precision})
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(teacher.state_dict().items()):
        values = tensor.detach().cpu().contiguous().numpy()
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()
