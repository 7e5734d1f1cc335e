"""The cache stage beside the bare network, and a training step of I2P-MAE with cached features beside one with its teacher.

    python benchmarks/cache.py [--only images step] [--device cpu] [--models mobilenetv2_100 resnet18] [--shapes 24]
                               [--batch 4] [--repeats 3] [--check] [--json FILE]

`images`: images/s of `viewpoint cache`, from a store on disk to a committed teacher in it, start and hash included; beside
the same network over the same images in memory, made ready for it, in batches of the size that suits it best. The store,
twelve views of 224 pixels of each shape, is made here. `step`: forward, backward and update of the published student with
batches in memory, the teacher being CLIP's ViT-B/16 in its published size with random weights. Both pairs run in turns;
medians count. On a busy machine `--threads 1 --cpu-time` counts processor time instead.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datastore.cameras import rig_by_name
from datastore.layout import Store, StoreAttributes, create_store, open_store
from datastore.write import BlockWriter, publish
from models.image_models.teacher import ImageTeacher
from models.image_models.trunk import as_images
from trainer.cache import cache
from trainer.objectives.base import Corpus, TaughtFields
from trainer.teachers import TimmOptions, load_teacher

NUM_VIEWS, IMAGE_SIZE = 12, 224
STORED_POINTS = 8192
IMAGES_TARGET = {"cpu": 0.9, "cuda": 0.8}
STEP_TARGET = 3.0
BATCHES = {"cpu": (1, 12, 48), "cuda": (96, 256)}  # images


def make_store(url: str, num_shapes: int) -> Store:
    """Grey discs on white, which compress about as well as renderings do."""
    rig = rig_by_name("azimuth12", image_size=IMAGE_SIZE)
    attributes = StoreAttributes(
        num_rows=num_shapes, points_per_shape=1, block_rows=1024, class_names=(), splits=("train",), rig=rig,
        num_views=NUM_VIEWS, image_size=IMAGE_SIZE, views_from="rays", visibility_from="rays",
        source_url="memory://discs", source_format="benchmark", source_hash="discs",
    )  # fmt: skip
    store = create_store(url, attributes, ("views", "split", "id"))
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE] / IMAGE_SIZE - 0.5
    for block in range(store.num_blocks):
        first, end = store.block_range(block)
        opened = BlockWriter(store).open_block(block)
        for row in range(first, end):
            views = np.full((1, NUM_VIEWS, IMAGE_SIZE, IMAGE_SIZE, 3), 255, np.uint8)
            for view in views[0]:
                place, radius = random.uniform(-0.1, 0.1, 2), random.uniform(0.2, 0.4)
                inside = (rows - place[0]) ** 2 + (columns - place[1]) ** 2 < radius**2
                view[inside] = (200 * (rows - columns + 1) / 2)[inside, None] + random.integers(0, 8, (inside.sum(), 1))
            split, name = np.zeros(1, np.uint8), np.array([f"disc-{row}"], np.dtypes.StringDType())
            opened.append({"views": views, "split": split, "id": name})
        opened.commit()
    publish(store)
    return open_store(url)


def finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def medians(
    variants: dict[str, Callable[[], object]], repeats: int, device: str, clock: Callable[[], float]
) -> dict[str, float]:
    """Seconds of each, measured in turns."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, function in variants.items():
            began = clock()
            function()
            finish(device)
            times[name].append(clock() - began)
    return {name: statistics.median(each) for name, each in times.items()}


def bare_forward(teacher: ImageTeacher, images: Tensor, batch: int) -> None:
    with torch.inference_mode():
        for first in range(0, len(images), batch):
            teacher.trunk(images[first : first + batch])


def best_batch(teacher: ImageTeacher, images: Tensor, device: str, clock: Callable[[], float]) -> int:
    """The number of images at which the bare network is fastest; this warms it up, too."""
    few = images[: max(BATCHES[device])]
    variants = {str(batch): lambda batch=batch: bare_forward(teacher, few, batch) for batch in BATCHES[device]}
    medians(variants, 1, device, clock)
    times = medians(variants, 2, device, clock)
    return int(min(times, key=lambda name: times[name]))


def measure_images(
    store: Store, model: str, repeats: int, device: str, clock: Callable[[], float]
) -> tuple[float, float, int]:
    """Images/s of the stage and of the bare network, and the batch of the latter."""
    teacher, _ = load_teacher(None, TimmOptions(model, image_size=IMAGE_SIZE))
    views = torch.from_numpy(store.read("views", range(len(store)))).flatten(0, 1)
    images = as_images(views, IMAGE_SIZE, teacher.mean, teacher.std).to(device)
    teacher.to(device)
    batch = best_batch(teacher, images, device, clock)
    runs = iter(range(repeats + 1))
    where = "cuda:0" if device == "cuda" else "cpu"

    def stage() -> None:
        cache(open_store(store.url), teacher, f"{model}-{next(runs)}", device=where)

    stage()
    found = medians({"stage": stage, "bare": lambda: bare_forward(teacher, images, batch)}, repeats, device, clock)
    return len(images) / found["stage"], len(images) / found["bare"], batch


def step_of(teacher_mode: str, batch_size: int, device: str) -> Callable[[], None]:
    """One optimizer step of I2P-MAE as published, on a batch that is at hand."""
    from models.image_models.projected_views import ProjectedViewsConfig
    from models.students.masked_transformer import MaskedTransformerConfig
    from trainer.objectives.i2p_mae import TEACHER_FIELDS, CachedI2PMAEBatch, I2PMAEBatch, I2PMAEConfig

    directions = torch.randn(batch_size, STORED_POINTS, 3, generator=torch.Generator().manual_seed(0))
    points = F.normalize(directions, dim=2) * torch.tensor([1.0, 0.6, 0.3])
    ids = torch.arange(batch_size)
    torch.manual_seed(0)
    student = MaskedTransformerConfig().build()
    looker = ProjectedViewsConfig()
    if teacher_mode == "online":
        config = I2PMAEConfig(image_model=looker, random_teacher=True)
        batch = I2PMAEBatch(ids, ids, points)
        corpus = Corpus((), 1, IMAGE_SIZE)
    else:
        config = I2PMAEConfig(teacher_mode="cached", teacher="clip")
        teacher = looker.build().eval()
        with torch.inference_mode():
            said = teacher.teach(points, TEACHER_FIELDS)
        kept = {name: (value.half() if value.is_floating_point() else value).clone() for name, value in said.items()}
        batch = CachedI2PMAEBatch(ids, ids, points, **kept)
        sizes = {name: tuple(value.shape[1:]) for name, value in kept.items()}
        corpus = Corpus((), 1, IMAGE_SIZE, teachers={"clip": TaughtFields(looker.trunk.image_size, sizes)})
    objective = config.build(student, corpus).to(device).train()
    batch = batch.to(torch.device(device))
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3, weight_decay=0.05)

    def step() -> None:
        sum(objective(batch).values()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_step(batch_size: int, repeats: int, device: str, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds of a step with cached features, and with the teacher at work in it."""
    steps = {mode: step_of(mode, batch_size, device) for mode in ("cached", "online")}
    medians(steps, 1, device, clock)
    found = medians(steps, repeats, device, clock)
    return found["cached"], found["online"]


def target(value: float, bound: float) -> dict[str, Any]:
    return {"value": value, "target": bound, "better": "higher", "ok": value >= bound}


def elsewhere(bound: float, device: str) -> dict[str, Any]:
    reason = f"this run was on {device}, or did not measure it"
    return {"value": None, "target": bound, "better": "higher", "ok": None, "reason": reason}


def measure_all(arguments: argparse.Namespace, clock: Callable[[], float]) -> dict[str, Any]:
    """Every target, with what was measured; prints a line of each as it comes."""
    device = arguments.device
    targets = {f"{each}_cache_part_of_bare_forward": elsewhere(bound, device) for each, bound in IMAGES_TARGET.items()}
    targets["cpu_i2p_mae_step_cached_times_faster"] = elsewhere(STEP_TARGET, device)
    if "images" in arguments.only:
        parts: Sequence[float] = []
        with tempfile.TemporaryDirectory() as folder:
            store = make_store(f"{folder}/discs.zarr", arguments.shapes)
            for model in arguments.models:
                stage, bare, batch = measure_images(store, model, arguments.repeats, device, clock)
                parts = [*parts, stage / bare]
                print(
                    f"{model:>20}: stage {stage:8.1f} images/s, bare network {bare:8.1f} (in batches of {batch}), "
                    f"part {stage / bare:.2f}",
                    flush=True,
                )
        targets[f"{device}_cache_part_of_bare_forward"] = target(min(parts), IMAGES_TARGET[device])
    if "step" in arguments.only:
        cached, online = measure_step(arguments.batch, arguments.repeats, device, clock)
        print(
            f"{'I2P-MAE step':>20}: cached {cached:8.2f} s, online {online:8.2f} s, batch {arguments.batch}: "
            f"{online / cached:.1f} times faster",
            flush=True,
        )
        if device == "cpu":
            targets["cpu_i2p_mae_step_cached_times_faster"] = target(online / cached, STEP_TARGET)
    return targets


def main() -> int:
    """Measures, prints the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=["images", "step"], default=["images", "step"])
    parser.add_argument("--models", nargs="+", default=["mobilenetv2_100", "resnet18"], metavar="NAME")
    parser.add_argument("--shapes", type=int, help="in the store (default: 24 on a CPU, 1024 on a GPU)")
    parser.add_argument("--batch", type=int, default=4, help="clouds in a training step")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="count processor time, for busy machines")
    parser.add_argument("--check", action="store_true", help="exit with 1 unless every target holds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the last line to a file")
    arguments = parser.parse_args()
    arguments.shapes = arguments.shapes or (24 if arguments.device == "cpu" else 1024)
    torch.set_num_threads(arguments.threads)
    targets = measure_all(arguments, time.process_time if arguments.cpu_time else time.perf_counter)
    result = {
        "benchmark": "cache",
        "device": torch.cuda.get_device_name()
        if arguments.device == "cuda"
        else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        "clock": "processor" if arguments.cpu_time else "wall",
        "versions": {package: version(package) for package in ("torch", "timm", "zarr")},
        "targets": targets,
    }
    line = json.dumps(result)
    print(line)
    if arguments.json:
        arguments.json.write_text(line + "\n")
    missed = [name for name, found in targets.items() if found["ok"] is False]
    return 1 if arguments.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
