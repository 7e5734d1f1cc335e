"""What the teachers' stages learn on the demo corpus: each trained through the launcher, then judged on its test split.

    python benchmarks/teachers.py [--nodes 2] [--runs runs] [--check] [--json FILE]

PointCMT's MVCNN and PointMCD's view classifier name unseen shapes; PointCMT's generator and PointMCD's autoencoder are judged
by their distances, beside those of the same network as it was initialised. What is trained already is not trained again.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import models
from datastore.layout import Store, open_store
from models.exported import build_described
from trainer.config import RunConfig
from trainer.objectives.cloud_distance import cloud_distance
from trainer.objectives.image_to_points import of_shape
from trainer.objectives.view_autoencoder import reconstruction_error
from trainer.runfolder import RunFolder

CLASSIFIERS = {"pointcmt_teacher": "PointCMT's MVCNN", "pointmcd_teacher": "PointMCD's view classifier"}
TIMES_CHANCE = 5.0  # a wide margin
HALVED = 0.5
BATCH = 32


def trained(job: str, runs: Path, nodes: int) -> RunFolder:
    """The finished demo run of a job."""
    name = f"teachers-{job}"
    command = [str(Path(sys.executable).parent / "viewpoint"), "launch", job, "--nodes", str(nodes)]
    subprocess.run([*command, "--runs", str(runs), "--run", name], check=True, stdout=sys.stderr)
    return RunFolder(f"{runs}/{name}")


def network_of(run: RunFolder) -> nn.Module:
    """The trained network."""
    loaded = models.load(run.export_url)
    assert isinstance(loaded, nn.Module)
    return loaded


def untrained(run: RunFolder) -> nn.Module:
    """The same network with random weights."""
    torch.manual_seed(run.config().seed)
    return build_described(run.network()).eval()


def store_of(config: RunConfig) -> Store:
    """The demo corpus that a run read."""
    assert config.data.store_url is not None
    return open_store(config.data.store_url)


def test_batches(store: Store, *fields: str) -> Iterator[list[Tensor]]:
    """The fields of all test shapes, some at a time."""
    rows = store.rows("test")
    for first in range(0, len(rows), BATCH):
        chosen = np.asarray(rows[first : first + BATCH])
        yield [torch.from_numpy(store.read(field, chosen)) for field in fields]


@torch.inference_mode()
def accuracy(run: RunFolder) -> float:
    """The share of unseen shapes that an image network names right from their views."""
    network, right = network_of(run), []
    for views, label in test_batches(store_of(run.config()), "views", "label"):
        right.append(network(views).global_logits.argmax(dim=1) == label)
    return torch.cat(right).double().mean().item()


@torch.inference_mode()
def generator_distances(run: RunFolder) -> tuple[float, float]:
    """The earth mover's distance of unseen shapes, of the generator as initialised and as trained."""
    config = run.config()
    objective: Any = config.objective
    store = store_of(config)
    field = f"teachers/{store.resolve_teacher(objective.teacher)}/view_features"
    found = []
    for network in (untrained(run), network_of(run)):
        distances = [
            cloud_distance(network(of_shape(features)), points[:, : config.data.num_points], objective.distance)
            for points, features in test_batches(store, "points", field)
        ]
        found.append(torch.cat(distances).mean().item())
    return found[0], found[1]


def first_and_last(run: RunFolder) -> tuple[float, float]:
    """The loss of the first step, and the mean over the last tenth of training."""
    losses = [record["loss"] for record in run.metrics()]
    return losses[0], float(np.mean(losses[-max(1, len(losses) // 10) :]))


@torch.inference_mode()
def autoencoder_errors(run: RunFolder) -> tuple[float, float]:
    """The mean error over pixels of unseen shapes' views, of the autoencoder as initialised and as trained."""
    found = []
    for network in (untrained(run), network_of(run)):
        errors = []
        for (views,) in test_batches(store_of(run.config()), "views"):
            images = network.images(views.flatten(0, 1))  # type: ignore[operator]
            errors.append(reconstruction_error(network(images), images))
        found.append(torch.stack(errors).mean().item())
    return found[0], found[1]


def target(value: float, bound: float, better: str) -> dict[str, Any]:
    """One line of the result."""
    return {
        "value": value,
        "target": bound,
        "better": better,
        "ok": value >= bound if better == "higher" else value <= bound,
    }


def main() -> int:
    """Trains and judges every teacher, prints the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs lie (default: runs)")
    parser.add_argument("--check", action="store_true", help="exit with 1 unless every target holds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the last line to a file")
    arguments = parser.parse_args()

    targets: dict[str, Any] = {}
    lines = []
    for job, name in CLASSIFIERS.items():
        run = trained(job, arguments.runs, arguments.nodes)
        chance = 1 / len(store_of(run.config()).class_names)
        right = accuracy(run)
        lines.append(f"{name}: {100 * right:.1f} % of unseen shapes named right, chance {100 * chance:.1f} %")
        targets[f"{job}_times_chance"] = target(right / chance, TIMES_CHANCE, "higher")
    generator = trained("pointcmt_generator", arguments.runs, arguments.nodes)
    first, last = first_and_last(generator)
    before, after = generator_distances(generator)
    lines.append(
        f"PointCMT's generator: earth mover's distance (times its weight) {first:.2f} at the first step, {last:.2f} at the end; "
        f"of unseen shapes {before:.3f} as initialised, {after:.3f} trained"
    )
    targets["pointcmt_generator_distance_left"] = target(last / first, HALVED, "lower")
    autoencoder = trained("pointmcd_autoencoder", arguments.runs, arguments.nodes)
    before, after = autoencoder_errors(autoencoder)
    lines.append(
        f"PointMCD's autoencoder: mean error a pixel of unseen shapes' views {before:.3f} as initialised, {after:.3f} trained"
    )
    targets["pointmcd_autoencoder_error_left"] = target(after / before, HALVED, "lower")
    print("\n".join(lines))
    result = {
        "benchmark": "teachers",
        "device": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": {package: version(package) for package in ("torch", "deepspeed", "timm")},
        "targets": targets,
    }
    line = json.dumps(result)
    print(line)
    if arguments.json:
        arguments.json.write_text(line + "\n")
    return 0 if all(each["ok"] for each in targets.values()) or not arguments.check else 1


if __name__ == "__main__":
    sys.exit(main())
