"""`viewpoint doctor`: whether this machine, a store and a recipe are fit for a run, one line each."""

import argparse
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import psutil

from datastore.errors import EXIT_DO_NOT_RETRY, EXIT_DONE, DoNotRetry, ViewpointError

HELP = "check this machine, and a store or a recipe if you name one"

EXAMPLES = """\
examples:
  viewpoint doctor
  viewpoint doctor --data s3://bucket/shapes.zarr --recipe my_run.yaml

Every line says ok, or what is wrong and how to mend it. Exit code 0 when all is well, 64 otherwise.
"""

NEEDED_MEMORY_GIB: Final = 3.0  # the demo on one node; each further node takes about 0.9
NEEDED_DISK_GIB: Final = 2.0
_GIB: Final = 2**30
_PACKAGES: Final = ("torch", "torchvision", "deepspeed", "timm", "embreex", "trimesh", "zarr", "sklearn", "s3fs")
_IMPORT_TIMEOUT_SECONDS: Final = 180

_IMPORT_SCRIPT: Final = """
import importlib, json, sys
for name in sys.argv[1:]:
    try:
        module = importlib.import_module(name)
        print("viewpoint " + json.dumps([name, getattr(module, "__version__", ""), ""]), flush=True)
    except (ImportError, OSError, RuntimeError) as error:
        print("viewpoint " + json.dumps([name, "", f"{type(error).__name__}: {error}"]), flush=True)
"""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    ok: bool
    detail: str  # what was found; of a problem, also how to mend it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `viewpoint doctor`."""
    parser.add_argument("--data", metavar="URL", help="also check that this store can be read")
    parser.add_argument("--recipe", metavar="FILE", help="also check this recipe; a known job's name works too")
    parser.add_argument("--runs", default="runs", metavar="FOLDER", help="where runs shall lie (default: ./runs)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def run(arguments: argparse.Namespace) -> int:
    """0 when everything is fit, 64 otherwise."""
    all_ok = True
    for finding in examine(arguments.data, arguments.recipe, Path(arguments.runs)):
        all_ok &= finding.ok
        if arguments.json:
            print(json.dumps(asdict(finding)), flush=True)
        else:
            print(f"{'ok' if finding.ok else 'PROBLEM':<8} {finding.name:<12} {finding.detail}", flush=True)
    return EXIT_DONE if all_ok else EXIT_DO_NOT_RETRY


def examine(data_url: str | None, recipe: str | None, runs: Path) -> Iterator[Finding]:
    """Every finding, as soon as it is known."""
    yield _python()
    broken = False
    for finding in _packages():
        broken |= not finding.ok
        yield finding
    yield _machine()
    yield _memory()
    yield _disk(runs)
    yield _loopback()
    if broken:
        yield Finding("further", False, "rays, collectives, store and recipe are not checked while packages are broken")
        return
    yield _guarded("rays", _one_ray)
    yield _guarded("collectives", _one_all_reduce)
    named = []
    if data_url is not None:
        named.append(_guarded("store", lambda: _store(data_url)))
        yield named[-1]
    if recipe is not None:
        named.append(_guarded("recipe", lambda: _recipe(recipe, demo=data_url is None)))
        yield named[-1]
    if data_url is not None and recipe is not None and all(finding.ok for finding in named):
        yield _guarded("shapes", lambda: _recipe_on_store(recipe, data_url))


def _guarded(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, check())
    except (ViewpointError, OSError, RuntimeError, ValueError, ImportError) as error:
        return Finding(name, False, str(error))


def _python() -> Finding:
    return Finding("python", True, f"{platform.python_version()} in {sys.prefix}")


def _packages() -> Iterator[Finding]:
    """Imports each package in a process of its own: their noise and their crashes stay there."""
    try:
        imported = subprocess.run(
            [sys.executable, "-c", _IMPORT_SCRIPT, *_PACKAGES],
            capture_output=True, text=True, check=False, timeout=_IMPORT_TIMEOUT_SECONDS,
            env=os.environ | {"DS_ACCELERATOR": "cpu"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        yield Finding(
            "packages",
            False,
            f"importing them took over {_IMPORT_TIMEOUT_SECONDS} s: the drive that they lie on may be slow",
        )
        return
    lines = [
        json.loads(line.removeprefix("viewpoint "))
        for line in imported.stdout.splitlines()
        if line.startswith("viewpoint ")
    ]
    mend = "`make install`, or `python -m pip install -c constraints.txt -e .`"
    for name, _, problem in lines:
        if problem:
            hint = "; torch and torchvision must be versions of one pair" if name == "torchvision" else ""
            yield Finding("package", False, f"{name} does not import ({problem}){hint}. Mend it with {mend}")
    for name in _PACKAGES[len(lines) :]:
        yield Finding(
            "package", False, f"{name}: importing it ended Python with code {imported.returncode}. Mend it with {mend}"
        )
        break
    healthy = [f"{name} {known or _installed(name)}" for name, known, problem in lines if not problem]
    yield Finding("packages", True, ", ".join(healthy))


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _machine() -> Finding:
    from launcher.local import this_machine

    machine = this_machine()
    gpus = f"{machine.gpus} CUDA GPU{'s' * (machine.gpus > 1)}" if machine.gpus else "no CUDA GPU: runs use the CPU"
    return Finding("machine", True, f"{machine.cores} core{'s' * (machine.cores > 1)}, {gpus}")


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    limit = _memory_limit()
    available = min(memory.available, limit) / _GIB
    if available < NEEDED_MEMORY_GIB:
        return Finding(
            "memory", False,
            f"{available:.1f} GiB are available, the demo on one node needs about {NEEDED_MEMORY_GIB:.0f}. Close other "
            f"programs, or raise the container's limit",
        )  # fmt: skip
    return Finding(
        "memory", True, f"{available:.1f} GiB available; the demo takes about {NEEDED_MEMORY_GIB:.0f} on one node"
    )


def _memory_limit() -> float:
    """Bytes that this container may use, or infinity."""
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            return float(text)
    return float("inf")


def _disk(runs: Path) -> Finding:
    here = runs.absolute()
    while not here.exists():
        here = here.parent
    free = shutil.disk_usage(here).free / _GIB
    if not os.access(here, os.W_OK):
        return Finding("disk", False, f"{here} cannot be written to. Choose another folder with --runs")
    if free < NEEDED_DISK_GIB:
        return Finding(
            "disk",
            False,
            f"{free:.1f} GiB are free in {here}, the demo needs {NEEDED_DISK_GIB:.0f}. Make room, or choose another "
            f"folder with --runs",
        )
    return Finding("disk", True, f"{free:.0f} GiB free in {here}")


def _loopback() -> Finding:
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname(), timeout=5),
        ):
            return Finding("loopback", True, "nodes on this machine can meet")
    except OSError as error:
        return Finding(
            "loopback",
            False,
            f"no connection over 127.0.0.1 ({error}). A firewall, or a container without a loopback interface, is in "
            "the way",
        )


def _one_ray() -> str:
    import numpy as np

    from datastore.cameras import CameraRig
    from datastore.mesh import Mesh
    from datastore.render import render

    rig = CameraRig(name="front", azimuths=(0.0,), elevations=(0.0,), image_size=9)
    triangle = Mesh(
        np.array([[-0.5, -0.5, 0], [0.5, -0.5, 0], [0, 0.5, 0]], np.float32), np.array([[0, 1, 2]], np.int32)
    )
    middle, towards_camera = np.zeros((1, 3), np.float32), np.array([[0, 0, 1]], np.float32)
    rendering = render(triangle, middle, towards_camera, rig)
    hit, missed = rendering.depth[0, 4, 4] > 0, rendering.depth[0, 0, 0] == 0
    if not (hit and missed and rendering.visibility[0, 0]):
        raise ViewpointError(
            "rays cast at a triangle do not hit it where they must. Reinstall the ray caster: `pip install "
            "--force-reinstall embreex`"
        )
    return "Embree hits a triangle, and misses beside it"


def _one_all_reduce() -> str:
    import torch
    import torch.distributed as dist
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    from launcher.command import loopback_interface

    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback_interface())
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        tensor = torch.ones(4)
        dist.all_reduce(tensor)
    finally:
        dist.destroy_process_group()
    return f"gloo works on {os.environ['GLOO_SOCKET_IFNAME']}"


def _store(url: str) -> str:
    from datastore.layout import open_store

    store = open_store(url)
    rows = store.rows()
    store.read("points", rows[:1])
    complete = "complete" if store.is_complete() else "incomplete: `viewpoint ingest` has not finished"
    teachers = ", ".join(store.teachers) or "none"
    return f"{url}: {len(rows):,} shapes, {complete}; teachers' features: {teachers}"


def _recipe(recipe: str, *, demo: bool) -> str:
    from launcher.spec import worlds_for
    from trainer.config import load_recipe

    config = load_recipe(recipe, demo=demo)
    worlds = ", ".join(map(str, worlds_for(config.global_batch)))
    batch = f"global batch {config.global_batch}, divided evenly by {worlds} processes"
    return f"{config.job}: objective {config.objective.kind}, {batch}"


def _recipe_on_store(recipe: str, url: str) -> str:
    from datastore.layout import open_store
    from launcher.suitable_store import num_available, say_shortage
    from trainer.config import load_recipe
    from trainer.evaluate.labels import unmet_needs

    config, store = load_recipe(recipe, demo=False), open_store(url)
    available = num_available(config, store)
    if config.global_batch > available:
        raise DoNotRetry(
            f"{say_shortage(config, available)}. Ingest more shapes, or launch with --set global_batch={available}"
        )
    lacks = unmet_needs(store, config.evaluation.protocols) if config.student is not None else []
    if lacks:
        raise DoNotRetry(
            f"{'; '.join(lacks)}, so that {' and '.join(config.evaluation.protocols)} cannot judge what is trained. Ingest "
            f"shapes with classes and splits, or launch with --set 'evaluation.protocols=[]'"
        )
    return f"split {config.data.split!r} has {available:,}, {available // config.global_batch:,} steps an epoch"
