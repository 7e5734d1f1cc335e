"""One epoch of a payload by one system, in a process of its own: how fast, at what cost, and whether all samples came.

    python -m readers.epochs ours plain        then one {"run": ..., "environment": ...} a line on standard input

Each system is a function that yields batches (ids, tensor); `SYSTEMS` lists them. Every one reads as its documentation
says, with its own defaults for what is not named here, and shuffles. The program imports the systems named, then forks a
process for each run, so that imports cost neither the figures nor the one who waits.
"""

import contextlib
import gc
import http.client
import importlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn
from urllib.parse import urlsplit

import numpy as np
import psutil

from readers.memory import PeakMemory
from readers.payloads import BATCH, PAYLOADS, Payload, folder_of, samples, with_samples

PART_BYTES: Final = 8 * 2**20
_SHUFFLE_SAMPLES: Final = 1000
"""webdataset's buffer; our 16 lanes mix as many."""
_MIB: Final = 2**20
_WARMING: Final = 1 / 4  # of an epoch, before the clock starts

Batches = Iterator[tuple[Any, Any]]

_fetched: list[Callable[[], int]] = []
"""Says how many bytes came from the files so far, where a system knows."""


@dataclass(frozen=True)
class Run:
    """What one process does."""

    folder: str
    payload: str
    num_samples: int
    system: str
    workers: int
    scratch: str  # an empty folder, for caches of what came from the server
    server_url: str = ""  # empty: the files are read from the disk
    step_seconds: float = 0.0  # what a batch is computed on; 0: nothing
    batch: int = BATCH
    connections: int = 8  # of the plain reader
    epochs: int = 1  # of ours and of the plain reader; from the second on they are measured
    limit_seconds: float = math.inf  # a run is measured for so long at most, and its figures are of what came
    settings: str = "{}"  # of our StreamConfig

    @property
    def what(self) -> Payload:
        """The payload, as many samples as were written."""
        return with_samples(PAYLOADS[self.payload], self.num_samples)

    @property
    def files(self) -> Path:
        """Where the system's files lie on the disk."""
        return folder_of(Path(self.folder), self.payload, "ours" if self.system == "plain" else self.system)

    @property
    def url(self) -> str:
        """Where a system with an S3 client finds them."""
        return f"s3://{self.files.relative_to(self.folder)}" if self.server_url else str(self.files)


@contextmanager
def _ours(run: Run) -> Iterator[Batches]:
    from datastore.stream import StreamConfig, open_stream

    config = StreamConfig(store_url=run.url, **json.loads(run.settings))
    teacher = "teacher" if run.payload == "features" else None
    with open_stream(
        config, _batch_type(run.what.field), teacher=teacher, global_batch=run.batch, micro_batch=run.batch, rank=0,
        world_size=1, seed=0,
    ) as stream:  # fmt: skip
        # one batch more than whole epochs: between the first and the last, exactly those were read, ahead of both alike
        _fetched.append(lambda: stream.bytes_read)
        steps = stream.steps(run.epochs * stream.steps_per_epoch + 1)
        yield ((batch.ids, getattr(batch, run.what.field)) for step in steps for batch in step)


def _batch_type(field: str) -> Any:
    from dataclasses import make_dataclass

    from torch import Tensor

    from datastore.batch import Batch

    return make_dataclass("PayloadBatch", [(field, Tensor)], bases=(Batch,), frozen=True)


@contextmanager
def _mosaicml(run: Run) -> Iterator[Batches]:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    clean_stale_shared_memory()
    where = {"remote": run.url, "local": run.scratch} if run.server_url else {"local": run.url}
    dataset = StreamingDataset(**where, shuffle=True, batch_size=run.batch)
    loader = DataLoader(dataset, batch_size=run.batch, num_workers=run.workers)
    yield ((batch["id"], batch[run.what.field]) for batch in loader)


@contextmanager
def _litdata(run: Run) -> Iterator[Batches]:
    import litdata.streaming.downloader
    from litdata import StreamingDataLoader, StreamingDataset

    # its S3 client refuses servers without TLS and has no setting for that; what it does otherwise stays
    litdata.streaming.downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = "true"
    options = {
        "endpoint_url": run.server_url,
        "aws_access_key_id": os.environ.get("AWS_ACCESS_KEY_ID"),
        "aws_secret_access_key": os.environ.get("AWS_SECRET_ACCESS_KEY"),
    }
    remote = {"storage_options": options, "cache_dir": run.scratch} if run.server_url else {}
    dataset = StreamingDataset(run.url, shuffle=True, **remote)
    loader = StreamingDataLoader(dataset, batch_size=run.batch, num_workers=run.workers)
    yield ((batch["id"], batch[run.what.field]) for batch in loader)


@contextmanager
def _webdataset(run: Run) -> Iterator[Batches]:
    import io

    import webdataset
    import zstd

    def decoded(sample: dict[str, Any]) -> tuple[int, np.ndarray]:
        content = sample["npy"] if "npy" in sample else zstd.decompress(sample["npy.zst"])
        return int(sample["__key__"]), np.load(io.BytesIO(content))

    names = sorted(str(path) for path in run.files.glob("*.tar"))
    if run.server_url:
        names = [f"{run.server_url}/{Path(name).relative_to(run.folder)}" for name in names]
    # its own splitter refuses more workers than tar files
    dataset = webdataset.WebDataset(names, shardshuffle=len(names), empty_check=False)
    dataset = dataset.shuffle(_SHUFFLE_SAMPLES).map(decoded).batched(run.batch)
    yield iter(webdataset.WebLoader(dataset, batch_size=None, num_workers=run.workers))


@contextmanager
def _plain(run: Run) -> Iterator[Batches]:
    """The bytes of our files by parallel ranged GETs, or reads, and nothing done with them: as fast as they come."""
    parts = []
    field = run.what.field
    for path in sorted(run.files.rglob("*")):
        if f"{field}/c" in path.as_posix() and path.is_file():
            size = path.stat().st_size
            parts += [(path, start, min(start + PART_BYTES, size)) for start in range(0, size, PART_BYTES)]
    own = threading.local()

    def read(part: tuple[Path, int, int]) -> None:
        path, start, end = part
        if not hasattr(own, "content"):
            own.content = memoryview(bytearray(PART_BYTES))
            if run.server_url:
                own.connection = http.client.HTTPConnection(urlsplit(run.server_url).netloc)
        content, filled = own.content[: end - start], 0
        if run.server_url:
            own.connection.request(
                "GET", f"/{path.relative_to(run.folder)}", headers={"Range": f"bytes={start}-{end - 1}"}
            )
            with own.connection.getresponse() as response:
                while filled < len(content) and (count := response.readinto(content[filled:])):
                    filled += count
        else:
            with path.open("rb", buffering=0) as file:
                filled = os.preadv(file.fileno(), [content], start)
        assert filled == end - start, f"{filled} bytes of {end - start} came"

    def batches() -> Batches:
        bounds = np.linspace(0, run.num_samples, len(parts) + 1).astype(int)
        fetched = 0
        _fetched.append(lambda: fetched)
        yield np.zeros(0), None  # the clock starts
        with ThreadPoolExecutor(run.connections) as pool:
            for number, _ in enumerate(pool.map(read, run.epochs * parts)):
                place = number % len(parts)
                fetched += parts[place][2] - parts[place][1]
                yield np.arange(bounds[place], bounds[place + 1]), None

    yield batches()


SYSTEMS: Final[dict[str, Callable[[Run], Any]]] = {
    "ours": _ours,
    "mosaicml": _mosaicml,
    "litdata": _litdata,
    "webdataset": _webdataset,
    "plain": _plain,
}

_IMPORTS: Final = {
    "ours": ("torch", "s3fs", "zarr", "datastore.stream"),
    "mosaicml": ("torch", "boto3", "boto3.s3.transfer", "streaming"),
    "litdata": ("torch", "boto3", "litdata"),
    "webdataset": ("torch", "webdataset", "zstd"),
    "plain": (),
}


def _cpu_seconds() -> float:
    """Of this process, its children, and theirs that have ended."""
    whole = 0.0
    own = psutil.Process()
    for process in [own, *own.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            whole += times.user + times.system + times.children_user + times.children_system
    return whole


def _bytes_fetched() -> int:
    return sum(count() for count in _fetched)


def measure(run: Run) -> dict[str, Any]:
    """Figures of one epoch, or several. Rates are of all but the first one or, of one, of its first quarter, in which memory
    and workers are still cold."""
    gc.collect()
    cold = run.num_samples * (_WARMING if run.epochs == 1 else 1)
    with ExitStack() as stack, PeakMemory() as memory:
        began = time.perf_counter()
        batches = stack.enter_context(SYSTEMS[run.system.split()[0]](run))
        ids, values = next(batches)
        first_at = time.perf_counter()
        seen, came = [np.asarray(ids)], len(ids)
        warm, is_whole = None, True
        while True:
            if warm is None and came >= cold:
                warm = _Mark(time.perf_counter(), _cpu_seconds(), came, _bytes_fetched())
                waited = 0.0
            if run.step_seconds:
                time.sleep(run.step_seconds)  # a GPU computes
            waiting = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                break
            last_at = time.perf_counter()
            ids, values = batch
            seen.append(np.asarray(ids))
            came += len(ids)
            if warm is not None:
                waited += last_at - waiting
            # counted from there, or what lay ready at that moment would be all that is counted
            if warm is not None and last_at - warm.at > run.limit_seconds:
                is_whole = False
                break
        last_cpu, last_bytes = _cpu_seconds(), _bytes_fetched()
        stack.close()
    if values is not None:  # not by plain GETs
        _check(run, seen, values, is_whole)
    counted, seconds = came - warm.came, last_at - warm.at
    return {
        "samples_per_second": counted / seconds,
        "bytes_per_second": (last_bytes - warm.fetched) / seconds,
        "cpu_microseconds_a_sample": 1e6 * (last_cpu - warm.cpu) / counted,
        "first_batch_seconds": first_at - began,
        "data_wait_share": waited / seconds,
        "peak_mib": memory.peak_bytes / _MIB,
        "seconds": seconds,
        "is_whole": is_whole,
    }


class _Mark(NamedTuple):
    """Where a run stood when the clock started."""

    at: float
    cpu: float
    came: int
    fetched: int


def _check(run: Run, seen: list[np.ndarray], last: Any, is_whole: bool) -> None:
    """Every sample came once, and the last batch is what was written.

    A peer may leave out or repeat what makes its workers' shares equal, less than a batch each.
    """
    ids = np.concatenate(seen)[: run.num_samples]
    missing = (run.num_samples if is_whole else len(ids)) - len(np.unique(ids))
    if missing > (0 if run.system in ("ours", "plain") else run.batch * max(1, run.workers)):
        raise SystemExit(f"{run.system} delivered all but {missing} of {run.num_samples} samples")
    expected = samples(Path(run.folder), run.what, seen[-1][:4])
    if not np.array_equal(np.asarray(last[:4]), expected):
        raise SystemExit(f"{run.system} delivered other values than were written")


def serve(systems: list[str]) -> None:
    """Answers each line of standard input, {"run": ..., "environment": ...}, with a line of figures or an error."""
    for module in dict.fromkeys(module for system in systems for module in _IMPORTS[system]):
        importlib.import_module(module)
    gc.freeze()
    for line in sys.stdin:
        asked = json.loads(line)
        process = os.fork()
        if not process:
            os.setsid()  # so that its workers end with it
            _answer(Run(**asked["run"]), asked["environment"])
        deadline = time.monotonic() + asked["timeout_seconds"]
        ended = 0
        while not ended and time.monotonic() < deadline:
            ended, status = os.waitpid(process, os.WNOHANG)
            time.sleep(0.01)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
        if not ended:
            os.waitpid(process, 0)
            print(json.dumps({"error": f"took more than {asked['timeout_seconds']} s"}), flush=True)
        elif status:
            print(json.dumps({"error": f"ended with status {os.waitstatus_to_exitcode(status)}"}), flush=True)


def _answer(run: Run, environment: dict[str, str]) -> NoReturn:
    """In a process of its own."""
    os.environ.update(environment)
    # whatever a reader prints is not the answer
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        figures = measure(run)
    except BaseException as error:  # noqa: BLE001 - told to whoever asked
        figures = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    answers.write(json.dumps(figures) + "\n")
    answers.flush()
    os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1:])
