"""Stage: writes a run's encoder as a folder that loads without Viewpoint's trainer: config, safetensors, model card.

A finished training run writes the same folder to RUN/export, from the weights that it has at hand.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from datastore.errors import EXIT_DONE, AskedWrongly

if TYPE_CHECKING:
    from torch import nn

    from trainer.config import RunConfig
    from trainer.runfolder import Record, RunFolder

HELP = "write a run's encoder as safetensors with a model card"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The stage's options."""
    parser.add_argument("run", metavar="RUN", help="the run's folder, or its name in ./runs")
    parser.add_argument("destination", metavar="DIR", help="folder to write, local or object storage")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step (default: the newest)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Writes the folder and says how to use it."""
    from trainer.runfolder import find_run

    training = export_run(find_run(arguments.run), arguments.step, arguments.destination)
    if arguments.json:
        print(json.dumps({"exported": arguments.destination, **training}), flush=True)
    else:
        origin = f"job {training['job']}, step {training['step']:,}"
        print(f"Wrote {arguments.destination}: {origin}. Its README.md says how to load it.")
    return EXIT_DONE


def export_run(run_folder: "RunFolder", checkpoint_step: int | None, destination: str) -> dict[str, Any]:
    """Writes the encoder of a run's checkpoint, the newest by default; returns what the folder says of its training."""
    from datastore.objects import ObjectFolder
    from trainer.commits import committed_steps
    from trainer.encoders import find_encoder

    run_folder.config()  # an error that says so where there is no run
    url = run_folder.url
    if checkpoint_step is not None:
        steps = committed_steps(ObjectFolder(run_folder.checkpoints_url))
        if checkpoint_step not in steps:
            raise AskedWrongly(
                f"{run_folder.url} has no checkpoint of step {checkpoint_step}. It has those of steps "
                f"{', '.join(map(str, steps)) or '(none)'}."
            )
        url = f"{run_folder.checkpoints_url}/step-{checkpoint_step:08d}"
    found = find_encoder(url)
    assert found.config is not None and found.step is not None, "a run's checkpoint has both"
    return write_export(found.encoder, found.config, found.step, destination, run_folder.records(), run_folder.name)


def write_export(
    encoder: "nn.Module",
    config: "RunConfig",
    step: int,
    destination: str,
    records: "Mapping[str, Record] | None" = None,
    run_name: str | None = None,
) -> dict[str, Any]:
    """Writes an encoder that is at hand; returns what the folder says of its training."""
    from datastore.objects import ObjectFolder
    from models.exported import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, save_exported
    from trainer.machine import library_versions

    training = {
        "job": config.job,
        "run": run_name,
        "step": step,
        "config_hash": config.hash(),
        "seed": config.seed,
        "num_points": config.data.num_points,
        "split": config.data.split,
        "store_url": config.data.store_url,
        "teacher": getattr(config.objective, "teacher", None),
    }
    store = _store_facts(config.data.store_url)
    scores = {
        name: {"accuracy": record["accuracy"], "num_test": record["num_test"]}
        for name, record in (records or {}).items()
    }
    extra = {"training": training, "store": store, "scores": scores, "versions": library_versions()}
    module_config = network_description(encoder, config)
    card = model_card(module_config, config, training, store, records or {}, destination)
    with tempfile.TemporaryDirectory(prefix="viewpoint-export-") as folder:
        save_exported(folder, module_config, encoder, card, extra)
        target = ObjectFolder(destination)
        for name in (WEIGHTS_FILE, CARD_FILE, CONFIG_FILE):  # the config last: it makes the folder a model
            target.put(name, (Path(folder) / name).read_bytes())
    return training


def network_description(encoder: "nn.Module", config: "RunConfig") -> dict[str, Any]:
    """What `models.load` builds the network from."""
    from models.image_models.teacher import ImageTeacher
    from models.point_generator import PointGenerator

    if config.student is not None:
        return {"kind": "student", "student": config.student.model_dump(mode="json")}
    if isinstance(encoder, PointGenerator):
        return {"kind": encoder.exported_as, encoder.exported_as: encoder.config.model_dump(mode="json")}
    assert isinstance(encoder, ImageTeacher), "an objective without a student trains an image network or a generator"
    # the file that the trunk started from is not needed any more, and its path says something of a machine
    return {"kind": encoder.exported_as, encoder.exported_as: encoder.config.without_weights().model_dump(mode="json")}


def _store_facts(store_url: str | None) -> dict[str, Any]:
    """What the card says of the data; nothing where the store is not within reach any more."""
    from datastore.errors import StoreError
    from datastore.layout import open_store

    if store_url is None:
        return {}
    try:
        attributes = open_store(store_url).attributes
    except StoreError:
        return {}
    return {
        "source_url": attributes.source_url,
        "source_hash": attributes.source_hash,
        "num_shapes": attributes.num_rows,
        "num_classes": len(attributes.class_names),
        "points_per_shape": attributes.points_per_shape,
        "num_views": attributes.num_views,
        "image_size": attributes.image_size,
        "licence": attributes.licence,
    }


def model_card(
    module_config: Mapping[str, Any],
    config: "RunConfig",
    training: Mapping[str, Any],
    store: Mapping[str, Any],
    records: "Mapping[str, Record]",
    destination: str,
) -> str:
    """README.md: what the model is, what made it, what it reaches, how to load it."""
    is_student = module_config["kind"] == "student"
    what, usage = _TEXTS.get(module_config["kind"], (_IMAGE_NETWORK, _IMAGE_USAGE))
    folder = json.dumps(destination)
    return _CARD.format(
        name=training["run"] or training["job"],
        what=what,
        network=_network(module_config),
        usage=usage.format(
            folder=folder,
            size=store.get("image_size", 224),
            width=module_config.get("point_generator", {}).get("in_features"),
        ),
        training=_training_line(config, training),
        data=_data_line(store),
        results=_result_lines(records, is_student=is_student),
        recipe=config.to_yaml(),
    )


_CARD: Final = """\
---
library_name: viewpoint
tags: [point-cloud, 3d, knowledge-distillation]
---

# {name}

{what} Network: {network}.

{usage}
## Training

{training}

## Data

{data}

## Results

{results}

## Recipe

```yaml
{recipe}```
"""

_POINT_ENCODER: Final = "A point-cloud encoder, taught by an image network that looked at the same shapes."

_POINT_USAGE: Final = """\
## Use

```python
import models, torch
encoder = models.load({folder})
points = torch.rand(8, 1024, 3)       # [b, p, 3], any number of points, +Y up
features = encoder.encode(points)     # [b, d]
```

`encode` brings each cloud to the unit ball, as the training shapes were: the middle of its bounding box in the origin,
its farthest point at distance 1.
"""

_IMAGE_NETWORK: Final = "An image network over rendered views of shapes, a teacher for point-cloud encoders."

_IMAGE_USAGE: Final = """\
## Use

```python
import models, torch
teacher = models.load({folder})
views = torch.zeros(8, 12, {size}, {size}, 3, dtype=torch.uint8)
features = teacher.describe(views)    # [b, v, d]
```

`describe` takes 8-bit RGB views on white ground, of any size, and resizes and normalises them itself.
"""

_POINT_GENERATOR: Final = "A network that decodes an image network's features of a shape into a cloud, for PointCMT."

_GENERATOR_USAGE: Final = """\
## Use

```python
import models, torch
generator = models.load({folder})
features = torch.rand(8, {width})  # [b, d], the maximum over a shape's views
points = generator(features)  # [b, n, 3]
```
"""

_TEXTS: Final = {  # of each kind that is no image network: what it is, and how it is used
    "student": (_POINT_ENCODER, _POINT_USAGE),
    "point_generator": (_POINT_GENERATOR, _GENERATOR_USAGE),
}


def _network(module_config: Mapping[str, Any]) -> str:
    """`pointnet, width 0.5`: what a person asks for first."""
    if module_config["kind"] == "point_generator":
        generator = module_config["point_generator"]
        return f"point generator, {generator['in_features']} features to {generator['num_points']:,} points"
    if module_config["kind"] == "image_model":
        image_model = module_config["image_model"]
        trunk, classes = image_model["trunk"], image_model.get("num_classes")
        return f"{trunk['name']}, {trunk['image_size']} px" + (f", {classes} classes" if classes else "")
    student = module_config["student"]
    return f"{student['kind']}, width {student['width']:g}" if "width" in student else str(student["kind"])


def _training_line(config: "RunConfig", training: Mapping[str, Any]) -> str:
    points = f" of {training['num_points']:,} points" if training["num_points"] else ""
    teacher = f" Teacher: `{training['teacher']}`." if training["teacher"] else ""
    return (
        f"Job `{training['job']}`, objective `{config.objective.kind}`: {training['step']:,} steps of "
        f"{config.global_batch} shapes{points}, split `{training['split']}`, seed {training['seed']}, config hash "
        f"`{training['config_hash']}`.{teacher}"
    )


def _data_line(store: Mapping[str, Any]) -> str:
    if not store:
        return "The store that it was trained on was not within reach when this card was written."
    return (
        f"{store['num_shapes']:,} shapes of {store['num_classes']} classes from `{store['source_url']}` (list hash "
        f"`{store['source_hash']}`), {store['points_per_shape']:,} points and {store['num_views']} views of "
        f"{store['image_size']} px each. Licence of the data: {store['licence']}."
    )


def _result_lines(records: "Mapping[str, Record]", *, is_student: bool) -> str:
    if not is_student:
        return "The protocols judge encoders of points; a teacher is judged by what its students learn."
    if not records:
        return (
            "None was recorded before this card was written. `viewpoint evaluate RUN --protocol NAME --data STORE` "
            "records one; `viewpoint export RUN DIR` then writes a new card."
        )
    lines = ["| protocol | weights | accuracy | test shapes | C |", "|---|---|---|---|---|"]
    for record in records.values():
        checkpoint = record["checkpoint"]
        weights = "random" if checkpoint["is_random"] else f"step {checkpoint['step']:,}"
        accuracy = f"{100 * record['accuracy']:.1f} %"
        lines.append(f"| {record['protocol']} | {weights} | {accuracy} | {record['num_test']:,} | {record['c']:g} |")
    return "\n".join(lines)
