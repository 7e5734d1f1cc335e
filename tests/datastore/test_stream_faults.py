"""Whatever the network, the server or a disk does, a stream delivers every sample once, in order and bit-equal, or says why not."""

import itertools
import json
import logging
import multiprocessing
import os
import random
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pytest
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from datastore import disk_cache, shards
from datastore.batch import Batch
from datastore.errors import EXIT_UNAVAILABLE, StoreError, ViewpointError
from datastore.fetch import FetchConfig
from datastore.layout import create_teacher
from datastore.objects import ObjectFolder
from datastore.stream import Stream, StreamConfig, open_stream
from datastore.write import publish
from tests.fault_proxy import FAULTS, Fault, FaultProxy, Trouble
from tests.s3_server import new_bucket, s3_means
from tests.stores import small_attributes, small_teacher, write_blocks, write_small_store

pytestmark = pytest.mark.s3

NUM_STEPS = 12  # of 9 an epoch
SHARDS = "/c/"  # in the path of every shard object, and of nothing else
CLOSING_SECONDS = 2.0
# parts so small that most ranges take several; nothing waits long
FETCH = FetchConfig(part_mib=2**-9, timeout_seconds=2.0, hedge_least_seconds=0.3, retry_seconds=60.0)

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.datastore.test_stream_faults"])


@dataclass(frozen=True)
class WholeBatch(Batch):
    points: Float[Tensor, "b p 3"]
    visibility: Bool[Tensor, "b p v"]
    views: UInt8[Tensor, "b v h w 3"]
    label: Int64[Tensor, " b"]
    view_features: Float[Tensor, "b v d"]


@dataclass(frozen=True)
class Stores:
    """The same store twice, and what a stream delivers of it."""

    local_url: str
    s3_url: str
    batches: list[WholeBatch]


@pytest.fixture(scope="module", params=["copied", "straight to their places"])
def stores(
    request: pytest.FixtureRequest, s3_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stores]:
    """Rows are copied to batches, as packed ones are, or go straight to their places there, as large raw ones do."""
    goes_straight = request.param != "copied"
    local_url = str(tmp_path_factory.mktemp("faults") / "store")
    fields = ("points", "views", "visibility", "label", "split", "id")
    splits = ("train",) if goes_straight else ("train", "test")
    store = write_small_store(local_url, small_attributes(320, block_rows=16, splits=splits), fields)
    write_blocks(store, range(store.num_blocks), create_teacher(store, small_teacher()))
    publish(store)
    with s3_means(s3_server):
        s3_url = f"{new_bucket()}/store"
        fsspec.filesystem("s3").put(local_url, s3_url, recursive=True)
    with stream_of(local_url) as stream:
        expected = read(stream)
    with pytest.MonkeyPatch.context() as patch:
        if goes_straight:
            patch.setattr("datastore.shards._SMALL_CHUNK_BYTES", 0)
        yield Stores(local_url, s3_url, expected)


@dataclass(frozen=True)
class Found:
    """What a reader in a process of its own tells when it is done."""

    bytes_read: int
    cache_hits: int
    warnings: list[str]


def stream_of(url: str, **changes: Any) -> Stream[WholeBatch]:
    """A stream whose units are read again in every epoch: memory holds few of them."""
    settings = {"store_url": url, "unit_samples": 16, "lanes": 2, "memory_gib": 6e-4, "fetch": FETCH} | changes
    return open_stream(
        StreamConfig(**settings),
        WholeBatch,
        teacher="teacher",
        global_batch=24,
        micro_batch=12,
        rank=0,
        world_size=1,
        seed=0,
    )


def read(stream: Stream[WholeBatch], num_steps: int = NUM_STEPS) -> list[WholeBatch]:
    return [batch for step in stream.steps(num_steps) for batch in step]


def assert_same(found: Sequence[WholeBatch], expected: Sequence[WholeBatch]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("ids", "seeds", *WholeBatch.store_fields()):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


@pytest.fixture
def proxy(s3_server: str, stores: Stores) -> Iterator[FaultProxy]:
    """Stands before the server, and s3:// means it."""
    with FaultProxy(s3_server) as proxy, s3_means(proxy.url):
        yield proxy


def request_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("stream-")]


# The way to the server


@pytest.mark.parametrize("rate", [0.01, 0.1])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_sample_comes_once_in_order_and_bit_equal(
    stores: Stores, proxy: FaultProxy, fault: Fault, rate: float
) -> None:
    with stream_of(stores.s3_url) as stream:
        proxy.trouble = Trouble({fault: rate}, path_part=SHARDS)
        assert_same(read(stream), stores.batches)
    assert proxy.faults[fault] >= 0.5 * rate * proxy.num_requests > 0


def test_slow_requests_are_overtaken_by_second_ones(stores: Stores, proxy: FaultProxy) -> None:
    with stream_of(stores.s3_url, fetch=FETCH.model_copy(update={"timeout_seconds": 60.0})) as stream:
        proxy.trouble = Trouble({"slow": 0.02}, slow_seconds=60.0, path_part=SHARDS)
        started = time.monotonic()
        assert_same(read(stream), stores.batches)
        assert time.monotonic() - started < 60.0, "nobody waited for a slow one"
        assert stream.retries == 0, "nor did one have to fail first"
    assert proxy.faults["slow"] > 3


def test_all_faults_at_once_on_a_slow_way_harm_nothing(stores: Stores, proxy: FaultProxy) -> None:
    with stream_of(stores.s3_url) as stream:
        proxy.trouble = Trouble(
            dict.fromkeys(FAULTS, 0.03), latency_seconds=0.01, bytes_per_second=1e6, path_part=SHARDS
        )
        assert_same(read(stream), stores.batches)
    assert set(proxy.faults) == set(FAULTS)


@pytest.mark.parametrize("fault", ["unavailable", "throttled", "reset"])
def test_a_store_opens_in_spite_of_trouble(stores: Stores, proxy: FaultProxy, fault: Fault) -> None:
    proxy.trouble = Trouble({fault: 0.1})
    for _ in range(3):
        with stream_of(stores.s3_url) as stream:
            assert_same(read(stream, 1), stores.batches[:2])
    assert proxy.faults[fault] > 0


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("unavailable", "the server answers HTTP 503 Slow Down"),
        ("throttled", "the server answers HTTP 429 Too Many Requests"),
        ("reset", "ConnectionResetError|RemoteDisconnected|the answer broke off"),
        ("truncated", "the answer broke off after"),
        ("flipped", "its bytes come damaged: its bytes have checksum"),
        ("hung", "TimeoutError"),
    ],
)
def test_trouble_without_end_is_an_error_with_shard_and_cause_within_the_budget(
    stores: Stores, proxy: FaultProxy, fault: Fault, cause: str
) -> None:
    budget = FETCH.model_copy(update={"retry_seconds": 1.0, "timeout_seconds": 0.5})
    stream = stream_of(stores.s3_url, fetch=budget)
    steps = stream.steps(NUM_STEPS)
    next(steps)
    proxy.trouble = Trouble({fault: 1.0}, path_part=SHARDS)
    started = time.monotonic()
    with pytest.raises(
        ViewpointError,
        match=rf"{stores.s3_url}/.*/c/\d+.* \(rows \d+ to \d+ of '.*'\) cannot be read: .*({cause}).*"
        rf"; \d+ attempts within [12] s went like this\. Check the network",
    ) as raised:
        list(steps)
    assert time.monotonic() - started < 1.0 + 2 * 0.5 + CLOSING_SECONDS
    assert raised.value.exit_code == EXIT_UNAVAILABLE, "starting the run again makes sense"
    assert request_threads() == []


def test_access_that_is_withdrawn_is_an_error_at_once(
    stores: Stores, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_means(s3_server), stream_of(stores.s3_url) as stream:
        sign = ObjectFolder.signed_url
        monkeypatch.setattr(
            ObjectFolder, "signed_url", lambda *arguments: str(sign(*arguments)).replace("Signature=", "Signature=0")
        )
        with pytest.raises(StoreError, match=r"/c/.* access is refused \(HTTP 403\); check the credentials"):
            read(stream)


def test_a_shard_that_is_damaged_in_the_store_is_an_error_that_names_it(stores: Stores, proxy: FaultProxy) -> None:
    copy = f"{new_bucket()}/store"
    filesystem = fsspec.filesystem("s3")
    filesystem.put(stores.local_url, copy, recursive=True)
    name = f"{copy}/points/c/3/0/0"
    content = bytearray(filesystem.cat_file(name))
    content[40] ^= 1
    filesystem.pipe_file(name, bytes(content))
    with (
        stream_of(copy) as stream,
        pytest.raises(StoreError, match=r"points/c/3/0/0 \(rows 48 to 63 of 'points'\) cannot be read: it is damaged"),
    ):
        read(stream)


# Closing


@pytest.mark.parametrize("fault", ["hung", "unavailable"])
def test_a_stream_closes_within_two_seconds_in_the_middle_of_trouble(
    stores: Stores, proxy: FaultProxy, fault: Fault
) -> None:
    stream = stream_of(stores.s3_url, fetch=FETCH.model_copy(update={"timeout_seconds": 60.0}))
    next(stream.steps(1))
    proxy.trouble = Trouble({fault: 1.0}, path_part=SHARDS)
    asked = proxy.num_requests
    with pytest.raises(ViewpointError, match="the stream was closed"), stream:
        threading.Timer(1.0, stream.close).start()  # while the consumer waits
        list(stream.steps(NUM_STEPS))
    started = time.monotonic()
    stream.close()
    assert time.monotonic() - started < CLOSING_SECONDS
    assert proxy.num_requests > asked
    assert request_threads() == []


def test_an_interrupted_reader_ends_within_two_seconds(stores: Stores, proxy: FaultProxy) -> None:
    with reader_of(stores, None, num_epochs=100) as reader:
        proxy.trouble = Trouble({"hung": 1.0}, path_part=SHARDS)
        time.sleep(0.5)
        assert reader.pid is not None
        os.kill(reader.pid, signal.SIGINT)
        started = time.monotonic()
        reader.join(30)
        assert time.monotonic() - started < CLOSING_SECONDS
        assert reader.exitcode == 1


# The local cache


def test_the_next_epoch_and_the_next_run_read_from_the_local_cache(
    stores: Stores, proxy: FaultProxy, tmp_path: Path
) -> None:
    proxy.trouble = Trouble(path_part=SHARDS)
    with stream_of(stores.s3_url, cache_path=str(tmp_path)) as stream:
        assert_same(read(stream), stores.batches)
        read(stream, 3 * stream.steps_per_epoch)
    asked = proxy.num_requests
    assert asked > 100
    with stream_of(stores.s3_url, cache_path=str(tmp_path)) as stream:
        assert_same(read(stream), stores.batches)
        assert stream.bytes_read == 0
    assert proxy.num_requests == asked


def test_a_local_store_is_not_cached(stores: Stores, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), stream_of(stores.local_url, cache_path=str(tmp_path / "cache")) as stream:
        assert_same(read(stream), stores.batches)
    assert not (tmp_path / "cache").exists()
    assert "nothing of it is kept in data.cache_path" in caplog.text


def test_damaged_entries_are_fetched_again(stores: Stores, proxy: FaultProxy, tmp_path: Path) -> None:
    with stream_of(stores.s3_url, cache_path=str(tmp_path)) as stream:
        assert_same(read(stream), stores.batches)
    damage = random.Random(0)
    entries = [path for path in sorted(tmp_path.glob("??/*")) if path.is_file()]
    for path in entries[::2]:
        content = bytearray(path.read_bytes())
        if damage.random() < 0.5:
            content[damage.randrange(len(content))] ^= 1 << damage.randrange(8)
        else:
            del content[damage.randrange(len(content)) :]
        path.write_bytes(content)
    proxy.trouble = Trouble(path_part=SHARDS)
    with stream_of(stores.s3_url, cache_path=str(tmp_path)) as stream:
        assert_same(read(stream), stores.batches)
    assert proxy.num_requests >= len(entries) // 2
    with stream_of(stores.s3_url, cache_path=str(tmp_path)) as stream:
        assert_same(read(stream), stores.batches)
        assert stream.bytes_read == 0


def test_a_cache_smaller_than_the_corpus_stays_within_its_bound(
    stores: Stores, proxy: FaultProxy, tmp_path: Path
) -> None:
    limit_bytes = 2**19
    with stream_of(stores.s3_url, cache_path=str(tmp_path), cache_gib=limit_bytes / 2**30) as stream:
        assert_same(read(stream), stores.batches)
    taken = sum(512 * path.stat().st_blocks for path in tmp_path.glob("??/*"))
    assert 0 < taken <= limit_bytes


def test_a_full_cache_disk_is_a_word_and_no_more(
    stores: Stores, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, written = disk_cache.write_whole, 0

    def filling(descriptor: int, content: bytes | memoryview) -> None:
        nonlocal written
        written += len(content)
        if written > 50_000:
            raise OSError(28, "No space left on device")
        whole(descriptor, content)

    monkeypatch.setattr(disk_cache, "write_whole", filling)
    with stream_of(stores.s3_url, cache_path=str(tmp_path)) as stream:
        assert_same(read(stream), stores.batches)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "No space left on device" in caplog.text


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_processes_share_a_cache_that_evicts(stores: Stores, proxy: FaultProxy, tmp_path: Path, rate: float) -> None:
    proxy.trouble = Trouble(dict.fromkeys(("unavailable", "flipped", "reset"), rate / 3), path_part=SHARDS)
    limit_bytes = 2**19
    settings = {"num_epochs": 6, "cache_gib": limit_bytes / 2**30}
    with reader_of(stores, tmp_path, **settings) as one, reader_of(stores, tmp_path, **settings) as two:
        for reader in (one, two):
            reader.join(60)
            assert reader.exitcode == 0
    found = [Found(**json.loads(path.read_text())) for path in sorted(tmp_path.glob("found-*"))]
    assert len(found) == 2
    assert sum(reader.bytes_read for reader in found) > limit_bytes, "more was put than there is room for"
    taken = sum(512 * path.stat().st_blocks for path in tmp_path.glob("??/*"))
    assert limit_bytes / 2 < taken <= limit_bytes
    for reader in found:
        assert reader.cache_hits > 0
        assert reader.warnings == [], "the cache did not turn itself off"


@pytest.mark.parametrize("number", [1, 7, 40])
def test_a_reader_killed_within_a_write_leaves_nothing_behind_and_the_next_run_is_fine(
    stores: Stores, proxy: FaultProxy, tmp_path: Path, number: int
) -> None:
    with reader_of(stores, tmp_path, num_epochs=100, killed_at_write=number) as reader:
        reader.join(60)
        assert reader.exitcode == -signal.SIGKILL
    (half_written,) = (tmp_path / "drafts").iterdir()
    assert half_written.read_bytes()[: len(b"VPRANGE1")] == b"VPRANGE1"
    proxy.trouble = Trouble(path_part=SHARDS)
    with stream_of(stores.s3_url, cache_path=str(tmp_path)) as stream:
        assert list((tmp_path / "drafts").iterdir()) == []
        assert_same(read(stream), stores.batches)
        assert stream.cache_hits >= number - 1 > 0 or number == 1, "what was whole is used"


def test_a_reader_has_no_processes_and_no_shared_memory_that_a_kill_could_leave(
    stores: Stores, proxy: FaultProxy, tmp_path: Path
) -> None:
    with reader_of(stores, tmp_path, num_epochs=100) as reader:
        assert reader.pid is not None
        process = psutil.Process(reader.pid)
        assert process.children(recursive=True) == []
        assert shared_memory_of(process) == []


def shared_memory_of(process: psutil.Process) -> list[str]:
    """Files in shared memory that a process has open or mapped."""
    paths = [file.path for file in process.open_files()] + [region.path for region in process.memory_maps()]
    return [path for path in paths if path.startswith("/dev/shm/")]


@contextmanager
def reader_of(
    stores: Stores, cache_path: Path | None, *, num_epochs: int, killed_at_write: int = 0, **settings: Any
) -> Iterator[BaseProcess]:
    """A process that reads both stores again and again and fails where they differ; it has its first batch."""
    begun = Path(stores.local_url).parent / f"begun-{uuid.uuid4().hex}"
    settings |= {"cache_path": None if cache_path is None else str(cache_path)}
    # the environment goes along: the server of processes was started in another one
    arguments = (replace(stores, batches=[]), settings, dict(os.environ), num_epochs, killed_at_write, begun)
    process = _processes.Process(target=_read, args=arguments)
    process.start()
    try:
        deadline = time.monotonic() + 60
        while not begun.exists() and process.is_alive():
            assert time.monotonic() < deadline, "the reader does not begin"
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.join()


def _read(
    stores: Stores,
    settings: dict[str, Any],
    environment: dict[str, str],
    num_epochs: int,
    killed_at_write: int,
    begun: Path,
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("datastore").addHandler(handler)
    shards._KEPT_BYTES = 2**12  # chunks of these small shapes would all be remembered
    if killed_at_write:
        disk_cache.write_whole = _deadly(disk_cache.write_whole, killed_at_write)
    with stream_of(stores.s3_url, **settings) as stream, stream_of(stores.local_url) as local_stream:
        num_steps = num_epochs * stream.steps_per_epoch
        for found, expected in zip(stream.steps(num_steps), local_stream.steps(num_steps), strict=True):
            begun.touch()
            assert_same(found, expected)
        report = json.dumps(asdict(Found(stream.bytes_read, stream.cache_hits, warnings)))
    if settings["cache_path"] is not None:
        (Path(settings["cache_path"]) / f"found-{os.getpid()}").write_text(report)


def _deadly(write: Callable[[int, Any], None], number: int) -> Callable[[int, Any], None]:
    """Writes, but of the so-manyth entry half; then the process is gone."""
    entries = itertools.count(1)

    def half(descriptor: int, content: Any) -> None:
        if len(content) > 200 and next(entries) == number:  # no head
            write(descriptor, memoryview(content)[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write(descriptor, content)

    return half
