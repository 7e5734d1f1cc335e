"""How fast `viewpoint ingest` turns meshes into a store: shapes a second and core, the share of each step, memory, scaling.

    python benchmarks/ingest.py [--shapes 96] [--repeats 3] [--check] [--json FILE]

The meshes are made here: smooth blobs, knotted tubes, furniture and crowds of boxes, of 5, 10 and 20 thousand faces each, as
OFF, OBJ, PLY and GLB files. Each becomes 8,192 points and 12 views of 224 x 224 with depth, visibility and pixels, by the real
ingest on a local disk: everything from reading to the last manifest, on one core with one worker process and on two cores with
two, in turns. What starting up takes is measured with a short run, printed, and left out of the rates. The shares come from one
more run with the work in this process, where clocks can be put around the steps.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import trimesh

import datastore.ingest
import datastore.render
import datastore.shape_row
import datastore.write
from datastore.cameras import rig_by_name
from datastore.objects import ObjectFolder
from datastore.sources import open_source

SHAPES_PER_SECOND_AND_CORE = 4.0
TWO_TO_ONE = 1.8
PEAK_GIB = 1.5

NUM_POINTS = 8192
FACES = (5_000, 10_000, 20_000)
SUFFIXES = ("off", "obj", "ply", "glb")


def grid_faces(rows: int, columns: int) -> np.ndarray:
    """Of a closed ring of `rows` closed rings of `columns` vertices."""
    row, column = (grid.reshape(-1) for grid in np.indices((rows, columns)))
    corner = row * columns + column
    right = row * columns + (column + 1) % columns
    below, across = (corner + columns) % (rows * columns), (right + columns) % (rows * columns)
    return np.concatenate([np.stack([corner, right, across], 1), np.stack([corner, across, below], 1)])


def knot(num_faces: int, random: np.random.Generator) -> trimesh.Trimesh:
    """A tube around a knotted line."""
    columns = 24
    rows = num_faces // (2 * columns)
    turns, twists = random.choice([(2, 3), (3, 4), (2, 5)])
    along = np.linspace(0, 2 * np.pi, rows, endpoint=False)[:, None]
    around = np.linspace(0, 2 * np.pi, columns, endpoint=False)

    def middle(t: np.ndarray) -> np.ndarray:
        ring = 1 + 0.4 * np.cos(twists * t)
        return np.stack([ring * np.cos(turns * t), ring * np.sin(turns * t), 0.4 * np.sin(twists * t)], axis=-1)

    forward = middle(along + 1e-4) - middle(along)
    side = np.cross(forward, middle(along))
    side /= np.linalg.norm(side, axis=-1, keepdims=True)
    up = np.cross(side, forward)
    up /= np.linalg.norm(up, axis=-1, keepdims=True)
    radius = random.uniform(0.1, 0.2)
    vertices = middle(along) + radius * (np.cos(around)[:, None] * side + np.sin(around)[:, None] * up)
    return trimesh.Trimesh(vertices.reshape(-1, 3), grid_faces(rows, columns), process=False)


def blob(num_faces: int, random: np.random.Generator) -> trimesh.Trimesh:
    """A ball with soft bumps: little of the image is empty, and every face is small."""
    side = round((num_faces / 2) ** 0.5)
    shape = trimesh.creation.uv_sphere(count=[side, side])
    vertices = np.asarray(shape.vertices)
    for _ in range(5):
        direction = random.standard_normal(3)
        vertices = vertices * (1 + 0.08 * np.sin(3 * vertices @ direction))[:, None]
    return trimesh.Trimesh(vertices, shape.faces, process=False)


def furniture(num_faces: int, random: np.random.Generator) -> trimesh.Trimesh:
    """A top, a back and round legs: thin parts, flat faces, much background."""
    width, depth, height = random.uniform(0.6, 1.2, 3)
    parts = [trimesh.creation.box([width, 0.06, depth]), trimesh.creation.box([width, height, 0.05])]
    parts[1].apply_translation([0, height / 2, -depth / 2])
    for x in (-1, 1):
        for z in (-1, 1):
            leg = trimesh.creation.cylinder(0.04, height, sections=48)
            leg.apply_transform(trimesh.transformations.rotation_matrix(np.pi / 2, [1, 0, 0]))
            leg.apply_translation([0.45 * x * width, -height / 2, 0.45 * z * depth])
            parts.append(leg)
    shape = trimesh.util.concatenate(parts)
    while len(shape.faces) < num_faces:
        longest = np.argsort(shape.area_faces)[-min(len(shape.faces), -(-(num_faces - len(shape.faces)) // 3)) :]
        shape = shape.subdivide(longest)
    return shape


def crowd(num_faces: int, random: np.random.Generator) -> trimesh.Trimesh:
    """Boxes through each other: many edges, and most of the surface hidden inside."""
    boxes = []
    for _ in range(num_faces // 12):
        box = trimesh.creation.box(random.uniform(0.05, 0.5, 3))
        box.apply_translation(random.uniform(-0.5, 0.5, 3))
        boxes.append(box)
    return trimesh.util.concatenate(boxes)


KINDS = (blob, knot, furniture, crowd)


def write_meshes(folder: Path, count: int) -> None:
    """`count` files, no two alike, kinds and sizes and formats in turn."""
    for number in range(count):
        kind, num_faces = KINDS[number % 4], FACES[number // 4 % 3]
        suffix = SUFFIXES[(number // 12 + number) % 4]
        shape = kind(num_faces, np.random.default_rng(number))
        path = folder / kind.__name__ / "train" / f"{kind.__name__}_{number:04d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape.export(path)


def run_ingest(source: Path, store: Path, num_workers: int) -> dict[str, float]:
    """In this process, whose cores are those that it may use: wall seconds, processor seconds, peak of a worker."""
    summary = datastore.ingest.ingest(
        open_source(str(source)),
        str(store),
        rig=rig_by_name("azimuth12", 224),
        num_points=NUM_POINTS,
        num_workers=num_workers,
        strict=True,
    )
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "seconds": summary.seconds,
        "processor_seconds": sum(usage.ru_utime + usage.ru_stime for usage in used),
        "peak_gib": used[1].ru_maxrss / 2**20,  # the largest of the workers; Linux counts in KiB
    }


def pinned_ingest(source: Path, num_workers: int, cores: list[int]) -> dict[str, float]:
    """`run_ingest` in a process of its own, on as many cores as workers."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, "--one", str(source), f"{folder}/store", str(num_workers)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        finished = subprocess.run(
            words,
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            preexec_fn=lambda: os.sched_setaffinity(0, cores[:num_workers]),
        )
    measured: dict[str, float] = json.loads(finished.stdout)
    return measured


class Steps:
    """Processor seconds by step, of everything at once: what runs beside a step counts for it.

    A step inside another counts for itself alone.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inner = 0.0

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Counts what happens inside."""
        outer, self._inner = self._inner, 0.0
        began = time.process_time()
        try:
            yield
        finally:
            taken = time.process_time() - began
            self.seconds[name] += taken - self._inner
            self._inner = outer + taken

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, counted."""

        @wraps(function)
        def counted(*arguments: Any, **options: Any) -> Any:
            with self.step(name):
                return function(*arguments, **options)

        return counted

    def around_rays(self, ray_caster: Callable[..., Any]) -> Callable[..., Any]:
        """`_ray_caster`, whose rays count for the images or, from points to cameras, for visibility."""

        def counted(mesh: Any) -> Any:
            with self.step("build tree"):
                cast = ray_caster(mesh)

            def counted_cast(*arguments: Any, **options: Any) -> Any:
                with self.step("visibility" if options.get("query") == "OCCLUDED" else "rays"):
                    return cast(*arguments, **options)

            return counted_cast

        return counted


class InThisProcess:
    """Stands in for the pool of worker processes."""

    def __class_getitem__(cls, _: Any) -> type["InThisProcess"]:
        return cls

    def __init__(self, work: Callable[[Any], Any], *_: Any) -> None:
        self._work = work
        self._done: list[tuple[int, Any]] = []

    def __enter__(self) -> "InThisProcess":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def offer(self, key: int, task: Any) -> bool:
        """Does it at once, if nothing waits to be fetched."""
        if self._done:
            return False
        self._done.append((key, self._work(task)))
        return True

    def results(self, _: float) -> list[tuple[int, Any]]:
        """What was done."""
        done, self._done = self._done, []
        return done


class OnThisThread(Executor):
    """Stands in for the thread that writes, so that steps come one after the other."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        """Does it at once."""
        done: Future[Any] = Future()
        done.set_result(function(*arguments, **options))
        return done


def shares(source: Path) -> dict[str, float]:
    """Processor seconds of each step of an ingest, and of all the rest."""
    steps = Steps()
    opened = open_source(str(source))
    rows, images, writing = datastore.shape_row, datastore.render, datastore.write
    with ExitStack() as patches, tempfile.TemporaryDirectory() as folder:
        for owner, name, step in (
            (type(opened), "load", "load"),
            (rows, "mesh_into_unit_ball", "load"),
            (rows, "sample_surface", "sample"),
            (images, "_images", "shade"),
            (images, "_visibility", "visibility"),
            (images, "pixels_of", "pixels"),
            (writing._ShardBuilder, "_encode_chunk", "encode"),
            (writing._ShardBuilder, "_close_shard", "encode"),
            (ObjectFolder, "put", "write"),
            (ObjectFolder, "create", "write"),
        ):
            patches.enter_context(patch.object(owner, name, steps.around(step, getattr(owner, name))))
        patches.enter_context(patch.object(images, "_ray_caster", steps.around_rays(images._ray_caster)))
        patches.enter_context(patch.object(datastore.ingest, "ProcessPool", InThisProcess))
        patches.enter_context(patch.object(datastore.ingest, "ThreadPoolExecutor", OnThisThread))
        began = time.process_time()
        run_ingest(source, Path(folder) / "store", num_workers=1)
        whole = time.process_time() - began
    steps.seconds["rest"] = whole - sum(steps.seconds.values())
    return dict(steps.seconds)


def measured_rates(all_meshes: Path, few_meshes: Path, num_shapes: int, num_few: int, repeats: int) -> dict[str, Any]:
    """Medians over interleaved repeats, for one and for two workers where there are two cores."""
    cores = sorted(os.sched_getaffinity(0))
    rates: dict[int, list[float]] = {1: [], 2: []}
    processor, start, peaks = [], [], []
    for _ in range(repeats):
        for num_workers in (1, 2)[: len(cores)]:
            whole, short = (pinned_ingest(source, num_workers, cores) for source in (all_meshes, few_meshes))
            more_shapes = num_shapes - num_few
            rates[num_workers].append(more_shapes / (whole["seconds"] - short["seconds"]))
            peaks.append(whole["peak_gib"])
            if num_workers == 1:
                spent = (whole["processor_seconds"] - short["processor_seconds"]) / more_shapes
                processor.append(spent)
                start.append(short["seconds"] - num_few / rates[1][-1])
    return {
        "shapes_per_second": {workers: statistics.median(values) for workers, values in rates.items() if values},
        "processor_seconds_per_shape": statistics.median(processor),
        "start_seconds": statistics.median(start),
        "peak_worker_gib": max(peaks),
        "two_to_one": statistics.median(two / one for one, two in zip(*rates.values(), strict=True))
        if rates[2]
        else None,
    }


def main() -> int:
    """Measures, prints the tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=int, default=96, help="in the long runs; 24 or more (default: 96)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="exit with 1 unless every target holds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the last line to a file")
    parser.add_argument("--one", nargs=3, metavar=("SOURCE", "STORE", "WORKERS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        source, store, num_workers = arguments.one
        print(json.dumps(run_ingest(Path(source), Path(store), int(num_workers))))
        return 0
    if arguments.shapes < 24 or arguments.repeats < 1:
        parser.error("--shapes must be 24 or more, and --repeats 1 or more")

    num_few = len(KINDS) * len(FACES)
    with tempfile.TemporaryDirectory() as folder:
        all_meshes, few_meshes = Path(folder) / "all", Path(folder) / "few"
        write_meshes(all_meshes, arguments.shapes)
        write_meshes(few_meshes, num_few)
        by_step = shares(few_meshes)
        measured = measured_rates(all_meshes, few_meshes, arguments.shapes, num_few, arguments.repeats)

    print(f"{arguments.shapes} meshes of 5 to 20 thousand faces; {NUM_POINTS:,} points, 12 views of 224 x 224\n")
    print(f"{'step':<12}{'ms a shape':>12}{'share':>8}")
    whole = sum(by_step.values())
    for name, seconds in sorted(by_step.items(), key=lambda item: -item[1]):
        print(f"{name:<12}{1e3 * seconds / num_few:>12.1f}{seconds / whole:>8.0%}")
    print(f"{'all':<12}{1e3 * whole / num_few:>12.1f}\n")
    rates = measured["shapes_per_second"]
    for workers, rate in rates.items():
        print(f"{workers} worker{'s' if workers > 1 else ''} on as many cores: {rate:.2f} shapes/s")
    print(f"processor time of one shape, all processes: {1e3 * measured['processor_seconds_per_shape']:.0f} ms")
    print(f"starting and ending, once a run: {measured['start_seconds']:.1f} s")
    print(f"largest worker: {measured['peak_worker_gib']:.2f} GiB")

    def target(value: float | None, wanted: float, better: str) -> dict[str, Any]:
        if value is None:
            return {"value": None, "target": wanted, "better": better, "ok": None, "reason": "needs two cores"}
        ok = value >= wanted if better == "higher" else value <= wanted
        return {"value": value, "target": wanted, "better": better, "ok": ok}

    targets = {
        "shapes_per_second_and_core": target(rates[1], SHAPES_PER_SECOND_AND_CORE, "higher"),
        "two_processes_to_one": target(measured["two_to_one"], TWO_TO_ONE, "higher"),
        "peak_worker_gib": target(measured["peak_worker_gib"], PEAK_GIB, "lower"),
    }
    result = {
        "benchmark": "ingest",
        "device": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": {package: version(package) for package in ("numpy", "embreex", "trimesh", "fpsample", "zarr")},
        "shapes": arguments.shapes,
        "repeats": arguments.repeats,
        "milliseconds_by_step": {name: 1e3 * seconds / num_few for name, seconds in by_step.items()},
        "processor_seconds_per_shape": measured["processor_seconds_per_shape"],
        "start_seconds": measured["start_seconds"],
        "shapes_per_second_by_workers": {str(workers): rate for workers, rate in rates.items()},
        "targets": targets,
    }
    line = json.dumps(result)
    print(line)
    if arguments.json:
        arguments.json.write_text(line + "\n")
    return 1 if arguments.check and any(entry["ok"] is False for entry in targets.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
