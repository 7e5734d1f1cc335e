"""Memory of a process by ZeRO stage beside what the stage promises; a student of 300 million parameters that needs it.

    python benchmarks/memory.py [--parameters 48e6] [--ranks 4] [--limit 3.5] [--only-large] [--check] [--json FILE]

What counts is the most that a process held in its second step, less what it held after training something tiny: weights,
gradients, float32 masters, Adam's moments, and what deepspeed lays beside them for a moment: gradients and weights that are
on their way between processes, some hundred megabytes. The large student trains in processes
that may take so many GiB each and no more (a limit that the kernel keeps, set after the imports): four together under
ZeRO-3, and one alone without it, which must fail. All in all that takes some 11 GiB for a minute.
"""

import argparse
import ctypes
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from datastore.batch import Batch
from models.students.masked_transformer import MaskedTransformerConfig
from trainer.distributed import World
from trainer.engine import EngineConfig, build_engine, split_batch

WIDTH = 1000
ROWS = 2  # of each process
POINTS = 64
LARGE = MaskedTransformerConfig(width=5, num_heads=12, num_groups=(16, 8, 4), group_sizes=(8, 4, 4))
EXIT_NO_MEMORY = 3
GIB = 2**30
MOST_BESIDE = 600e6  # bytes


@dataclass(frozen=True)
class NoiseBatch(Batch):
    values: Tensor


class Layers(nn.Module):
    """Square layers: next to nothing but parameters."""

    def __init__(self, num_parameters: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(num_parameters // WIDTH**2))

    def forward(self, batch: NoiseBatch) -> dict[str, Tensor]:
        hidden = batch.values
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return {"square": hidden.square().mean()}


class LargeStudent(nn.Module):
    """A student as recipes have it, on clouds of a few points: what it takes is its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.student = LARGE.build()

    def forward(self, batch: NoiseBatch) -> dict[str, Tensor]:
        return {"square": self.student(batch.values).pooled.square().mean()}


class Measured(NamedTuple):
    """Of one stage, in bytes a parameter unless said."""

    most: float  # of a process, in its second step
    num_parameters: int
    losses: list[float]
    seconds: float  # of the second step


def promised(stage: int, ranks: int) -> float:
    """Bytes a parameter that a process must hold in a step, all in float32."""
    weights, gradients, state = 4.0, 4.0, 8.0
    masters = 0.0 if stage == 0 else 4.0 / ranks  # stage 0 updates the weights themselves
    return {
        0: weights + gradients + state,
        1: weights + gradients + masters + state / ranks,
        2: weights + gradients / ranks + masters + state / ranks,
        3: (weights + gradients + state) / ranks + masters,
    }[stage]


def measure(stage: int, ranks: int, num_parameters: int, limit_gib: float = 0.0) -> Measured | None:
    """What a process of that many takes; None where it does not get it. No number of parameters: the large student."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, "--as-rank", f"{stage},{num_parameters},{limit_gib},{folder}"]
        processes = [
            subprocess.Popen(
                words,
                env=os.environ | {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        printed = [process.communicate()[0] for process in processes]
    codes = [process.returncode for process in processes]
    if EXIT_NO_MEMORY in codes:
        return None
    if any(codes):
        raise RuntimeError(f"ZeRO stage {stage} on {ranks} processes ended with {codes}")
    found = [json.loads(text.splitlines()[-1]) for text in printed]
    return Measured(
        statistics.median(each["bytes"] / each["parameters"] for each in found),
        found[0]["parameters"],
        found[0]["losses"],
        max(each["seconds"] for each in found),
    )


def be_a_rank(words: str) -> None:
    """Two steps; prints by how many bytes this process had grown at most during the second one."""
    stage_text, parameters_text, limit_gib, folder = words.split(",")
    stage, num_parameters = int(stage_text), int(parameters_text)
    torch.set_num_threads(1)
    train(Layers(2 * WIDTH**2), stage, f"{folder}/first")  # so that all is there that comes with the first engine
    _forget_the_peak()
    before = _status("VmRSS")
    if float(limit_gib):
        most = _status("VmData") + int(float(limit_gib) * GIB)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    module: nn.Module = Layers(num_parameters) if num_parameters else LargeStudent()
    count = sum(parameter.numel() for parameter in module.parameters())
    losses, seconds, most = train(module, stage, f"{folder}/second")
    print(json.dumps({"bytes": most - before, "parameters": count, "losses": losses, "seconds": seconds}), flush=True)


def train(module: nn.Module, stage: int, rendezvous: str) -> tuple[list[float], float, int]:
    """The losses of two steps, the seconds of the second, and the most bytes that this process held in it."""
    import torch.distributed as dist

    world, losses, seconds = World.from_env(), [], 0.0
    shape = (ROWS, POINTS, 3) if isinstance(module, LargeStudent) else (ROWS, WIDTH)
    store = dist.FileStore(rendezvous, world.size)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)
    split = split_batch(world.size * ROWS, world.size, ROWS)
    with build_engine(module, EngineConfig.model_validate({"zero_stage": stage}), world, split) as engine:
        for number in range(2):
            _forget_the_peak()
            began = time.perf_counter()
            ids = torch.arange(ROWS)
            terms = engine(NoiseBatch(ids, ids, torch.rand(shape, generator=torch.Generator().manual_seed(number))))
            engine.backward(terms)
            engine.step()
            seconds = time.perf_counter() - began
            losses.append(float(terms["square"].detach()))
        most = _status("VmHWM")
        dist.barrier()
    return losses, seconds, most


def _status(name: str) -> int:
    """Bytes, as the kernel counts them for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _forget_the_peak() -> None:
    """From now on, VmHWM counts anew; what was freed goes back first."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def target(value: float, limit: float) -> dict[str, Any]:
    return {"value": round(value, 3), "target": limit, "better": "lower", "ok": value <= limit}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parameters", type=float, default=48e6)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--limit", type=float, default=3.5, metavar="GIB", help="of each process of the large student")
    parser.add_argument("--only-large", action="store_true")
    parser.add_argument("--check", action="store_true", help="fail where a target is missed")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if arguments.as_rank:
        try:
            be_a_rank(arguments.as_rank)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
                raise
            print(f"no memory: {str(error).splitlines()[0] if str(error) else error!r}", file=sys.stderr, flush=True)
            os._exit(EXIT_NO_MEMORY)  # at once: whatever else were to run would find no memory either
        return 0
    ranks = arguments.ranks
    targets: dict[str, dict[str, Any]] = {}
    table: dict[str, dict[str, float]] = {}
    if not arguments.only_large:
        print(f"{arguments.parameters / 1e6:.0f} million parameters, float32 with Adam, on each of {ranks} processes")
        print(f"{'ZeRO stage':<12}{'bytes a parameter':>18}{'promised':>10}")
        for stage in range(4):
            measured = measure(stage, ranks, int(arguments.parameters))
            assert measured is not None, "there is no limit"
            print(f"{stage:<12}{measured.most:>18.1f}{promised(stage, ranks):>10.1f}", flush=True)
            beside = (measured.most - promised(stage, ranks)) * measured.num_parameters
            targets[f"stage {stage}, MB beside what is promised"] = target(beside / 1e6, MOST_BESIDE / 1e6)
            table[f"stage {stage}"] = {"measured": round(measured.most, 2), "promised": promised(stage, ranks)}
    alone, together = measure(0, 1, 0, arguments.limit), measure(3, ranks, 0, arguments.limit)
    print(f"\nMaskedTransformer(width=5), at most {arguments.limit} GiB for each process")
    print(f"{'one process':<24}{'does not fit' if alone is None else 'fits'}")
    what = "does not fit"
    if together is not None:
        what = (
            f"{together.num_parameters / 1e6:.0f} million parameters, {together.most:.1f} bytes each where "
            f"{promised(3, ranks):.1f} are promised, {together.seconds:.0f} s a step, losses "
            f"{' '.join(f'{loss:.4g}' for loss in together.losses)}"
        )
    print(f"{f'ZeRO-3 over {ranks} processes':<24}{what}")
    fits = alone is None and together is not None
    targets["300 million parameters fit when sharded, and only then"] = {
        "value": int(fits), "target": 1, "better": "higher", "ok": fits
    }  # fmt: skip
    record = {
        "benchmark": "memory",
        "device": "cpu",
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "deepspeed")}},
        "bytes_a_parameter": table,
        "targets": targets,
    }
    print(json.dumps(record))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(arguments.check and not all(each["ok"] for each in targets.values()))


if __name__ == "__main__":
    sys.exit(main())
