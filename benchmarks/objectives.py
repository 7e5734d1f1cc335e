"""A training step of each objective at its paper's sizes: samples/s, peak memory, and where the time goes.

    python benchmarks/objectives.py [--jobs pointcmt crosspoint ...] [--device cpu] [--batch 4] [--steps 2] [--repeats 3]
                                    [--check] [--json FILE]

Settings are those of the recipes: networks, points, views, augmentation, optimizer. On a GPU the batch is the paper's,
in float32 and in bf16; on a CPU it is smaller, in float32. A step is that of a run: a batch from a store on a local disk
through the stream, forward, backward, update by the engine at ZeRO stage 1. Beside each objective stands the same student
trained on labels alone, on as many clouds: both take turns, and medians count. Each objective has a process of its own.

Shapes are surfaces of ellipsoids, and what a teacher said of them is random. Teachers that work in the step have random
weights of the published sizes (I2P-MAE's CLIP ViT-B/16, PointCMT's generator): that costs as much and teaches nothing.
Memory is the peak in a step, above what the process held before it built the objective; on a GPU, all that torch allocated.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from datastore.layout import Store, StoreAttributes, TeacherAttributes, create_store, create_teacher, open_store
from datastore.stream import Stream, open_stream
from datastore.write import BlockWriter, publish
from models.exported import save_exported
from models.point_generator import PointGeneratorConfig
from trainer.config import RunConfig, load_recipe
from trainer.distributed import joined, uses_gpu
from trainer.engine import Engine, build_engine, split_batch
from trainer.metrics import Bucket, TimeAccount
from trainer.numerics import exact_float32
from trainer.pretrain import build_objective, train_step

ROOT: Final = Path(__file__).parents[1]
MEGABYTE: Final = 1 << 20
NUM_CLASSES, IMAGE_SIZE = 40, 224
PHASES: Final[tuple[Bucket, ...]] = ("data_wait", "forward", "backward", "optimizer")
DATA_WAIT_SHARE: Final = 0.02
GENERATOR = "GENERATOR"  # stands for the folder of one


@dataclass(frozen=True)
class Job:
    """A recipe, what a store must hold for it, and how many clouds a step on a CPU has."""

    recipe: str
    cpu_batch: int
    fields: tuple[str, ...]  # beside points and labels
    num_points: int  # that a shape is stored with
    num_views: int = 1
    taught: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    baseline_points: int | None = None  # that the student sees; None: as the recipe says


TOKENS: Final = {"view_tokens": (3, 196, 512), "view_saliency": (3, 196), "view_pixels": (8192, 3, 2)}
JOBS: Final = {
    "pointcmt": Job(
        "pointcmt", 8, (), 1024, 20, {"view_features": (20, 512)}, (f"objective.generator={GENERATOR}",)
    ),
    "pointmcd": Job("pointmcd", 16, ("visibility",), 1024, 12, {"view_features": (12, 512)}),
    "i2p_mae": Job(
        "i2p_mae", 4, (), 8192, baseline_points=2048,
        settings=("objective.image_model.trunk.weights=null", "objective.random_teacher=true"),
    ),
    "i2p_mae_cached": Job(
        "i2p_mae", 4, (), 8192, taught=TOKENS, baseline_points=2048,
        settings=("objective.image_model=null", "objective.teacher_mode=cached", "objective.teacher=teacher"),
    ),
    "crosspoint": Job("crosspoint", 4, ("views",), 2048, 12),
}  # fmt: skip


def make_store(url: str, job: Job, num_shapes: int) -> Store:
    """Ellipsoids, and views that are grey discs on white, which compress about as well as renderings do."""
    attributes = StoreAttributes(
        num_rows=num_shapes, points_per_shape=job.num_points, block_rows=1024,
        class_names=tuple(f"class {number}" for number in range(NUM_CLASSES)), splits=("train",),
        num_views=job.num_views, image_size=IMAGE_SIZE, views_from="rays", visibility_from="rays",
        source_url="memory://ellipsoids", source_format="benchmark", source_hash="ellipsoids",
    )  # fmt: skip
    store = create_store(url, attributes, ("points", "label", *job.fields, "split", "id"))
    random = np.random.default_rng(0)
    write(store, {
        "points": ellipsoids(num_shapes, job.num_points, random),
        "label": random.integers(0, NUM_CLASSES, num_shapes),
        "visibility": random.random((num_shapes, job.num_points, job.num_views)) < 0.4,
        "views": discs(num_shapes, job.num_views, random) if "views" in job.fields else None,
        "split": np.zeros(num_shapes, np.uint8),
        "id": np.array([f"ellipsoid-{row}" for row in range(num_shapes)], np.dtypes.StringDType()),
    })  # fmt: skip
    publish(store)
    if job.taught:
        said = {name: random.random((num_shapes, *sizes), np.float32) for name, sizes in job.taught.items()}
        if "view_pixels" in said:
            said["view_pixels"] *= IMAGE_SIZE
        teacher = TeacherAttributes(
            name="teacher", weights_hash="0" * 12, image_size=IMAGE_SIZE, mean=(0.5,) * 3, std=(0.5,) * 3,
            fields=dict(job.taught), dim=512,
        )  # fmt: skip
        write(open_store(url), said, create_teacher(open_store(url), teacher))
        publish(open_store(url))
    return open_store(url)


def write(store: Store, arrays: Mapping[str, Any], scope: str | None = None) -> None:
    """All blocks of a scope."""
    writer = BlockWriter(store) if scope is None else BlockWriter(store, scope)
    wanted = {stored.field.name: stored.field.dtype for stored in store.fields_of(writer.scope)}
    for block in writer.pending():
        rows = slice(*store.block_range(block))
        writer.write(
            block, {n: arrays[n][rows] if t == "string" else arrays[n][rows].astype(t) for n, t in wanted.items()}
        )


def ellipsoids(count: int, num_points: int, random: np.random.Generator) -> np.ndarray:
    """[count, num_points, 3] in the unit ball."""
    directions = random.standard_normal((count, num_points, 3), np.float32)
    directions /= np.linalg.norm(directions, axis=2, keepdims=True)
    return directions * random.uniform(0.3, 1, (count, 1, 3)).astype(np.float32)


def discs(count: int, num_views: int, random: np.random.Generator) -> np.ndarray:
    """[count, num_views, size, size, 3]."""
    views = np.full((count, num_views, IMAGE_SIZE, IMAGE_SIZE, 3), 255, np.uint8)
    rows, columns = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE] / IMAGE_SIZE - 0.5
    for view in views.reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3):
        place, radius = random.uniform(-0.1, 0.1, 2), random.uniform(0.2, 0.4)
        inside = (rows - place[0]) ** 2 + (columns - place[1]) ** 2 < radius**2
        view[inside] = (200 * (rows - columns + 1) / 2)[inside, None] + random.integers(0, 8, (inside.sum(), 1))
    return views


def exported_generator(folder: str) -> str:
    """A generator of the published size, with random weights."""
    config = PointGeneratorConfig(in_features=512)
    described = {"kind": "point_generator", "point_generator": config.model_dump(mode="json")}
    save_exported(folder, described, config.build(), "", {})
    return folder


class Synchronised(TimeAccount):
    """An account that waits for the device before it changes the bucket."""

    def enter(self, bucket: Bucket) -> None:
        """From now on, time is spent on this."""
        if uses_gpu():
            torch.cuda.synchronize()
        super().enter(bucket)


class Training:
    """A run without checkpoints and reports, one step at a time."""

    def __init__(self, config: RunConfig, store: Store, closing: ExitStack, world: Any) -> None:
        split = split_batch(config.global_batch, 1, config.engine.max_micro_batch)
        self.engine: Engine = build_engine(build_objective(config, store).train(), config.engine, world, split)
        self._stream: Stream[Any] = closing.enter_context(
            open_stream(
                config.data, self.engine.module.batch_type, teacher=config.teacher,  # type: ignore[arg-type]
                global_batch=config.global_batch, micro_batch=split.micro_batch, rank=0, world_size=1, seed=0,
                pin_memory=uses_gpu(),
            )
        )  # fmt: skip
        self._steps = self._stream.steps(1 << 30)
        self._account = Synchronised()
        self._account.phases()

    def seconds(self, num_steps: int) -> dict[str, float]:
        """What each phase of so many steps took, a step."""
        self._account.enter("other")
        self._account.phases()
        for _ in range(num_steps):
            self._account.enter("data_wait")
            train_step(self.engine, next(self._steps), self._account)
        spent = self._account.phases()
        return {phase: spent.get(phase, 0.0) / num_steps for phase in PHASES}


def measure(name: str, precision: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Figures of one objective in this process."""
    torch.set_num_threads(arguments.threads)
    exact_float32()
    job = JOBS[name]
    batch = arguments.batch or (job.cpu_batch if arguments.device == "cpu" else None)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as closing:
        generator = exported_generator(f"{folder}/generator")
        engine = [
            f"engine.precision={precision}",
            *([f"global_batch={batch}", f"engine.max_micro_batch={batch}"] if batch else []),
        ]
        settings = [setting.replace(GENERATOR, generator) for setting in (*job.settings, *engine)]
        if "view_features" in job.taught:
            settings.append("objective.teacher=teacher")
        url = f"{folder}/shapes.zarr"
        config = load_recipe(job.recipe, demo=False, assignments=settings, store_url=url)
        baseline = supervised(config, job)
        store = make_store(url, job, max(32, 4 * config.global_batch))
        world = closing.enter_context(joined(600))
        before = resident("VmRSS")
        method = Training(config, store, closing, world)
        method.seconds(1)
        reset_peak()
        method.seconds(2)
        memory = torch.cuda.max_memory_allocated() if uses_gpu() else resident("VmHWM") - before
        labels = Training(baseline, store, closing, world)
        labels.seconds(1)
        times: dict[str, list[dict[str, float]]] = {"method": [], "labels": []}
        for _ in range(arguments.repeats):
            for key, training in (("method", method), ("labels", labels)):
                times[key].append(training.seconds(arguments.steps))
        labels.engine.close()
    phases = {phase: statistics.median(each[phase] for each in times["method"]) for phase in PHASES}
    seconds = {key: statistics.median(sum(each.values()) for each in found) for key, found in times.items()}
    return {
        "precision": precision,
        "batch": config.global_batch,
        "samples_per_second": config.global_batch / seconds["method"],
        "labels_alone_samples_per_second": config.global_batch / seconds["labels"],
        "times_as_long_as_labels_alone": seconds["method"] / seconds["labels"],
        "peak_mib": memory / MEGABYTE,
        "shares": {phase: each / sum(phases.values()) for phase, each in phases.items()},
    }


def supervised(config: RunConfig, job: Job) -> RunConfig:
    """The same student and optimizer, on labels alone."""
    tree = config.model_dump(mode="json")
    tree["objective"] = {"kind": "supervised"}
    if job.baseline_points is not None:
        tree["data"]["num_points"] = job.baseline_points
    return RunConfig.model_validate(tree)


def reset_peak() -> None:
    if uses_gpu():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def resident(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def in_a_process(name: str, precision: str, device: str) -> dict[str, Any]:
    """The same figures, measured in a fresh process with this one's options."""
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", name, precision]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment |= {"DS_ACCELERATOR": device}
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


def main() -> int:
    """Measures every objective, prints the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS), metavar="JOB", help=", ".join(JOBS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, help="clouds in a step (default: the paper's on a GPU, fewer on a CPU)")
    parser.add_argument("--steps", type=int, default=2, help="in a repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--check", action="store_true", help="exit with 1 unless every target holds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the last line to a file")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure, arguments)))
        return 0

    precisions = ("float32",) if arguments.device == "cpu" else ("float32", "bf16")
    print("Teachers and generators have random weights of the published sizes.")
    print(
        f"{'':>15} {'precision':>9} {'batch':>5} {'samples/s':>9} {'peak MiB':>9}  {'data wait':>9} {'forward':>7} "
        f"{'backward':>8} {'optimizer':>9}  {'labels alone/s':>14}"
    )
    found: dict[str, Any] = {}
    for name in arguments.jobs:
        for precision in precisions:
            figures = found[f"{name} {precision}"] = in_a_process(name, precision, arguments.device)
            shares = figures["shares"]
            print(
                f"{name:>15} {precision:>9} {figures['batch']:>5} {figures['samples_per_second']:>9.2f} "
                f"{figures['peak_mib']:>9,.0f}  {shares['data_wait']:>9.1%} {shares['forward']:>7.1%} "
                f"{shares['backward']:>8.1%} {shares['optimizer']:>9.1%}  "
                f"{figures['labels_alone_samples_per_second']:>14.2f}",
                flush=True,
            )
    worst = max(figures["shares"]["data_wait"] for figures in found.values())
    cuda = {"value": None, "target": DATA_WAIT_SHARE, "better": "lower", "ok": None, "reason": "this run was on cpu"}
    targets: dict[str, Any] = {
        f"{arguments.device}_largest_share_of_data_wait": {
            "value": worst, "target": DATA_WAIT_SHARE, "better": "lower", "ok": worst <= DATA_WAIT_SHARE,
        }
    }  # fmt: skip
    if arguments.device == "cpu":
        targets["cuda_largest_share_of_data_wait"] = cuda
    result = {
        "benchmark": "objectives",
        "device": torch.cuda.get_device_name()
        if arguments.device == "cuda"
        else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        "versions": {package: version(package) for package in ("torch", "deepspeed", "timm")},
        "steps": found,
        "targets": targets,
    }
    line = json.dumps(result)
    print(line)
    if arguments.json:
        arguments.json.write_text(line + "\n")
    return 1 if arguments.check and any(target["ok"] is False for target in targets.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
