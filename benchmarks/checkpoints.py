"""What saving costs a run: stall, slow-down while uploading, bytes a parameter; and what metrics cost.

    python benchmarks/checkpoints.py [--parameters 50e6] [--saves 5] [--check] [--json FILE]

50 million parameters are 600 MB on one rank: float32 masters and Adam's two moments. Steps beside an upload and steps
without one take turns; medians count. On a busy machine times are upper bounds.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datastore.batch import Batch
from datastore.objects import ObjectFolder
from trainer.checkpoint import Identity, Position, start
from trainer.commits import CheckpointConfig
from trainer.distributed import World, joined
from trainer.engine import Engine, EngineConfig, build_engine, split_batch
from trainer.metrics import Bucket, Exporter, Means, MetricsConfig, StepFigures, TimeAccount
from trainer.runfolder import RunFolder
from trainer.saving import Saver

WIDTH = 1000
DEMO_STEP_SECONDS = 0.2


@dataclass(frozen=True)
class NoiseBatch(Batch):
    points: Tensor


class Layers(nn.Module):
    """Square layers, so that a step is matrix products and Adam, as of a transformer."""

    def __init__(self, num_parameters: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(num_parameters // WIDTH**2))

    def forward(self, batch: NoiseBatch) -> dict[str, Tensor]:
        hidden = batch.points
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return {"square": hidden.square().mean()}


def step(engine: Engine, rows: int) -> float:
    """Seconds of one step."""
    began = time.perf_counter()
    ids = torch.arange(rows)
    engine.backward(engine(NoiseBatch(ids, ids, torch.rand(rows, WIDTH)).to(engine.device)))
    engine.step()
    return time.perf_counter() - began


def measure_saves(num_parameters: int, saves: int, rows: int) -> dict[str, float]:
    """Stall, slow-down and size, with steps between the saves."""
    stalls, alone, beside = [], [], []
    with (
        tempfile.TemporaryDirectory() as folder,
        joined(60) as world,
        build_engine(Layers(num_parameters), EngineConfig(zero_stage=0), world, split_batch(rows, 1, rows)) as engine,
    ):
        objects = ObjectFolder(folder)
        identity, config = Identity("benchmark", ""), CheckpointConfig()
        with Saver(engine, objects, start(engine, objects), config, identity) as saver:
            step(engine, rows)
            saver.prepare()
            for number in range(saves):
                alone += [step(engine, rows) for _ in range(3)]
                saver.begin(Position(number + 1, rows), {})
                stalls.append(saver.stall_seconds)
                while saver.in_flight is not None:
                    beside.append(step(engine, rows))
                    saver.poll()
            saver.finish()
            num_bytes = saver.bytes_written / saves
    return {
        "stall": statistics.median(stalls),
        "first_stall": stalls[0],
        "slowdown": statistics.median(beside) / statistics.median(alone) - 1,
        "bytes_a_parameter": num_bytes / (num_parameters // WIDTH**2 * WIDTH**2),
        "gigabytes": num_bytes / 1e9,
        "step": statistics.median(alone),
    }


def measure_metrics(steps: int = 2000) -> float:
    """Seconds of processor time that all figures of one step cost: account, means, exporter, line of metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        run, account, means = RunFolder(folder), TimeAccount(), Means()
        exporter = Exporter(MetricsConfig(), World(), "benchmark", account)
        terms = {"task": 1.0, "alignment": 2.0, "transform_penalty": 3.0}
        buckets: tuple[Bucket, ...] = ("forward", "backward", "optimizer", "data_wait", "other")
        began = time.process_time()
        for number in range(steps):
            for bucket in buckets:
                account.enter(bucket)
            means.add({"loss": 6.0, **terms})
            figures = StepFigures(step=number, loss=6.0, terms=terms, phases=account.phases())
            exporter.observe(figures, number)
            seconds = {name: round(spent, 3) for name, spent in account.seconds.items()}
            run.append_metrics(figures.record() | {"account": seconds})
        return (time.process_time() - began) / steps


def target(value: float, limit: float) -> dict[str, Any]:
    return {"value": round(value, 6), "target": limit, "better": "lower", "ok": value <= limit}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parameters", type=float, default=50e6)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--rows", type=int, default=256, help="of a batch: how long a step takes")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--check", action="store_true", help="fail where a target is missed")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(arguments.threads or os.cpu_count() or 1)
    metrics = measure_metrics()
    saves = measure_saves(int(arguments.parameters), arguments.saves, arguments.rows)
    stall_of_600_mb = saves["stall"] * 0.6 / saves["gigabytes"]
    interval = CheckpointConfig().every_seconds or float("inf")
    rows: list[tuple[str, Callable[[], str]]] = [
        (
            "one save",
            lambda: f"{1000 * saves['gigabytes']:,.0f} MB, {saves['bytes_a_parameter']:.3f} bytes a parameter",
        ),
        ("stall", lambda: f"{saves['stall']:.3f} s, the first {saves['first_stall']:.3f} s"),
        (
            "stall of 600 MB",
            lambda: f"{stall_of_600_mb:.3f} s, {100 * stall_of_600_mb / interval:.2f} % of {interval:.0f} s",
        ),
        ("step", lambda: f"{saves['step']:.3f} s, beside an upload {100 * saves['slowdown']:+.1f} %"),
        (
            "metrics",
            lambda: (
                f"{1e6 * metrics:.0f} us a step, {100 * metrics / DEMO_STEP_SECONDS:.3f} % of {DEMO_STEP_SECONDS} s"
            ),
        ),
    ]
    for title, text in rows:
        print(f"{title:<18}{text()}")
    record: dict[str, Any] = {
        "benchmark": "checkpoints",
        "device": "cpu",
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "deepspeed")}},
        "targets": {
            "stall of 600 MB, s": target(stall_of_600_mb, 0.25),
            "stall, share of wall time": target(stall_of_600_mb / interval, 0.01),
            "slow-down while uploading": target(saves["slowdown"], 0.05),
            "bytes a parameter": target(saves["bytes_a_parameter"], 12.1),
            "metrics, share of a step": target(metrics / DEMO_STEP_SECONDS, 0.005),
        },
    }
    print(json.dumps(record))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(arguments.check and not all(each["ok"] for each in record["targets"].values()))


if __name__ == "__main__":
    sys.exit(main())
