"""Whether the stream should read with threads of the training process, as it does, or in a process of its own.

    python benchmarks/reader_threads.py [--repeats 3] [--folder FOLDER] [--check] [--json FILE]

Both read the same shuffled points (8,192 x 3 float32, batches of 64) from a server on loopback: once the stream itself, once
the stream in a worker process of torch's DataLoader, which hands its batches over in shared memory. First as fast as they
come. Then beside a computation of about 25 ms a batch, of some hundred small operations as a network's step has them: what it
and the wait for the next batch take is a step. The same computation without any reading is the baseline. Each run is a
process of its own, in turns. About a minute and a half, and a minute more to write the points, which --folder keeps.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

REPOSITORY: Final = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY))

from torch import Tensor  # noqa: E402

from datastore.batch import Batch  # noqa: E402

READERS: Final = ("threads", "process")
PAYLOAD: Final = "points"
BATCH: Final = 64
FLAT_OUT_BATCHES: Final = 512
STEPS: Final = 200
STEP_SECONDS: Final = 0.025
MATRIX: Final = 160
MEMORY_GIB: Final = 0.7
BESIDE_PROCESS: Final = 1.0
RUN_TIMEOUT_SECONDS: Final = 120


@dataclass(frozen=True)
class PointsBatch(Batch):
    """What is read."""

    points: Tensor


@contextmanager
def batches(reader: str, url: str) -> Iterator[Iterator[Tensor]]:
    """Points without end."""
    from torch.utils.data import DataLoader, IterableDataset

    from datastore.stream import StreamConfig, open_stream

    def stream() -> Any:
        config = StreamConfig(store_url=url, memory_gib=MEMORY_GIB)
        return open_stream(
            config, PointsBatch, teacher=None, global_batch=BATCH, micro_batch=BATCH, rank=0, world_size=1, seed=0
        )

    class Streamed(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            with stream() as own:
                yield from (step[0].points for step in own.steps(10**9))

    if reader == "process":
        yield iter(DataLoader(Streamed(), batch_size=None, num_workers=1, prefetch_factor=4))
    else:
        with stream() as own:
            yield (step[0].points for step in own.steps(10**9))


def products_a_step() -> int:
    """How many products of matrices take about as long as a step."""
    import torch

    torch.set_num_threads(1)
    matrix, durations = torch.randn(MATRIX, MATRIX), []
    for _ in range(100):
        start = time.perf_counter()
        _ = matrix @ matrix
        durations.append(time.perf_counter() - start)
    return max(1, round(STEP_SECONDS / statistics.median(durations)))


def measure(asked: dict[str, Any]) -> dict[str, float]:
    """In a process of its own."""
    import psutil
    import torch

    torch.set_num_threads(1)
    left, right = torch.randn(MATRIX, MATRIX), torch.randn(MATRIX, MATRIX)
    products = asked["products"]

    def compute() -> float:
        """Seconds of a step: many small operations, as those of a network are."""
        start = time.perf_counter()
        for _ in range(products):
            left @ right
        return time.perf_counter() - start

    def cpu_seconds() -> float:
        own = psutil.Process()
        times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
        return sum(each.user + each.system for each in times)

    if asked["reader"] == "none":
        steps = [compute() for _ in range(STEPS)]
        return {"step_seconds": statistics.median(steps), "slow_step_seconds": sorted(steps)[int(0.99 * STEPS)]}
    with batches(asked["reader"], asked["url"]) as coming:
        for _ in range(FLAT_OUT_BATCHES // 4):  # connections are made, memory is there
            next(coming)
        start, cpu = time.perf_counter(), cpu_seconds()
        for _ in range(FLAT_OUT_BATCHES):
            next(coming)
        seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
        steps, waited = [], 0.0
        for _ in range(STEPS):
            waiting = time.perf_counter()
            next(coming)
            waited += time.perf_counter() - waiting
            steps.append(compute())
        samples = FLAT_OUT_BATCHES * BATCH
        return {
            "samples_per_second": samples / seconds,
            "cpu_microseconds_a_sample": 1e6 * cpu / samples,
            "step_seconds": statistics.median(steps),
            "slow_step_seconds": sorted(steps)[int(0.99 * STEPS)],
            "wait_seconds_a_step": waited / STEPS,
        }


def run(reader: str, url: str, products: int) -> dict[str, float]:
    """What a process of its own measured."""
    where = {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
    environment = (
        os.environ | where | {"AWS_DEFAULT_REGION": "us-east-1", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
    )
    asked = json.dumps({"reader": reader, "url": f"s3://bucket/{PAYLOAD}/ours", "products": products})
    command = [sys.executable, __file__, "--measure", asked]
    answer = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment, timeout=RUN_TIMEOUT_SECONDS
    ).stdout
    found: dict[str, float] = json.loads(answer.splitlines()[-1])
    return found


def main() -> int:
    """Measures, prints a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the points here for the next time (1 GB)")
    parser.add_argument("--check", action="store_true", help="exit with 1 unless every target holds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the last line to a file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(json.loads(arguments.measure))), flush=True)
        os._exit(0)  # not after a worker that reads without end
    from readers.object_server import running_server
    from readers.payloads import PAYLOADS, make_shapes, write

    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    with ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        make_shapes(folder)
        write(folder, PAYLOADS[PAYLOAD], "ours")
        url = stack.enter_context(running_server(folder))
        products = products_a_step()
        for _ in range(arguments.repeats):
            for reader in ("none", *READERS):
                found[reader].append(run(reader, url, products))
    table = {
        reader: {name: statistics.median(each[name] for each in runs) for name in runs[0]}
        for reader, runs in found.items()
    }
    print(f"{'reader':<10}{'samples/s':>12}{'CPU us/sample':>15}{'step ms':>10}{'99th':>8}{'wait ms':>9}")
    for reader, row in table.items():
        flat_out = (row.get("samples_per_second", 0), row.get("cpu_microseconds_a_sample", 0))
        step = [1e3 * row.get(name, 0.0) for name in ("step_seconds", "slow_step_seconds", "wait_seconds_a_step")]
        print(f"{reader:<10}{flat_out[0]:>12,.0f}{flat_out[1]:>15.0f}{step[0]:>10.1f}{step[1]:>8.1f}{step[2]:>9.2f}")
    steps = {reader: row["step_seconds"] + row.get("wait_seconds_a_step", 0.0) for reader, row in table.items()}
    values = {
        "processor_of_threads_beside_a_process": (
            table["threads"]["cpu_microseconds_a_sample"] / table["process"]["cpu_microseconds_a_sample"]
        ),
        "step_beside_threads_to_one_beside_a_process": steps["threads"] / steps["process"],
    }
    targets = {
        name: {"value": value, "target": BESIDE_PROCESS, "better": "lower", "ok": value <= BESIDE_PROCESS}
        for name, value in values.items()
    }
    result = {
        "benchmark": "reader_threads", "date": time.strftime("%Y-%m-%d"),
        "device": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "versions": {"torch": version("torch")}, "readers": table, "targets": targets,
    }  # fmt: skip
    line = json.dumps(result)
    if arguments.json:
        arguments.json.write_text(line + "\n")
    print(line)
    return int(arguments.check and not all(each["ok"] for each in targets.values()))


if __name__ == "__main__":
    sys.exit(main())
