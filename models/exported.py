"""Networks that leave the project: a folder with `model.json`, `model.safetensors` and a model card, both ways."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from models.encoding import PointEncoder
from models.image_models import ImageModelConfig
from models.image_models.teacher import ImageTeacher
from models.point_generator import PointGenerator, PointGeneratorConfig
from models.students import StudentConfig, build_student

CONFIG_FILE: Final = "model.json"
WEIGHTS_FILE: Final = "model.safetensors"
CARD_FILE: Final = "README.md"


class ExportedStudent(BaseModel, extra="allow", frozen=True):
    """`model.json` of a point encoder; what else stands there is for people."""

    kind: Literal["student"] = "student"
    student: StudentConfig

    def build(self) -> PointEncoder:
        """The encoder, with random weights."""
        return build_student(self.student)


class ExportedImageModel(BaseModel, extra="allow", frozen=True):
    """`model.json` of an image network."""

    kind: Literal["image_model"] = "image_model"
    image_model: ImageModelConfig

    def build(self) -> ImageTeacher:
        """The network, with random weights."""
        return self.image_model.without_weights().build()


class ExportedPointGenerator(BaseModel, extra="allow", frozen=True):
    """`model.json` of a point generator."""

    kind: Literal["point_generator"] = "point_generator"
    point_generator: PointGeneratorConfig

    def build(self) -> PointGenerator:
        """The generator, with random weights."""
        return self.point_generator.build()


Exported = ExportedStudent | ExportedImageModel | ExportedPointGenerator
Network = PointEncoder | ImageTeacher | PointGenerator

_ADAPTER: TypeAdapter[Exported] = TypeAdapter(Annotated[Exported, Field(discriminator="kind")])


class ExportedEncoder:
    """A trained point encoder, ready to use: eval mode, no gradients."""

    def __init__(self, network: PointEncoder, description: Mapping[str, Any]) -> None:
        self.network = network.eval().requires_grad_(False)
        self.description = description  # all of model.json

    @torch.no_grad()
    def encode(
        self, points: Float[Tensor, "b p 3"] | Float[np.ndarray, "b p 3"], *, batch_size: int = 64
    ) -> Float[Tensor, "b d"]:
        """One embedding a cloud of any number of points, place and size: it is first brought to the unit ball."""
        points = torch.as_tensor(points)
        device = next(self.network.parameters()).device
        if len(points) == 0:
            return torch.empty(0, self.network.pooled_dim, device=device)
        clouds = (to_unit_ball(part.to(device, torch.float32)) for part in points.split(batch_size))
        return torch.cat([self.network(cloud).pooled for cloud in clouds])


def to_unit_ball(points: Float[Tensor, "b p 3"]) -> Float[Tensor, "b p 3"]:
    """Each cloud with the middle of its bounding box in the origin and its farthest point at distance 1."""
    points = points - (points.amax(dim=1, keepdim=True) + points.amin(dim=1, keepdim=True)) / 2
    radius: Tensor = points.norm(dim=2).amax(dim=1).clamp(min=torch.finfo(points.dtype).tiny)
    return points / radius[:, None, None]


def save_exported(
    folder: Path | str, module_config: Mapping[str, Any], module: nn.Module, card_text: str, extra: Mapping[str, Any]
) -> None:
    """Writes the folder.

    `module_config` is `{"kind": "student", "student": {...}}`, `{"kind": "image_model", "image_model": {...}}` or the like
    of a point generator; `extra` (versions, scores, where it came from) stands beside it in `model.json`.
    """
    from safetensors.torch import save_file

    description = {**extra, **module_config}
    _ADAPTER.validate_python(description)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CARD_FILE).write_text(card_text)
    (folder / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n")  # last: it makes the folder a model


def build_described(description: Mapping[str, Any]) -> Network:
    """The network that a `model.json` describes, with random weights."""
    return _ADAPTER.validate_python(description).build()


def load(folder: Path | str) -> ExportedEncoder | ImageTeacher | PointGenerator:
    """The model in an exported folder, in eval mode and without gradients.

    A point encoder has `.encode(points)`, an image network `.describe(views)`; a point generator is called with features.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    config_path, weights_path = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    for path in (config_path, weights_path):
        if not path.is_file():
            raise ValueError(
                f"{folder} is not an exported model: it has no {path.name}. `viewpoint export RUN {folder}` writes one."
            )
    try:
        description = json.loads(config_path.read_text())
        network = build_described(description)
        network.load_state_dict(load_file(weights_path))
    except (json.JSONDecodeError, ValidationError, SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{folder} holds a model that this version does not understand: {error}. Export it again with this version."
        ) from error
    if isinstance(network, PointEncoder):
        return ExportedEncoder(network, description)
    return network.eval().requires_grad_(False)
