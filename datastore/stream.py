"""Sample ids to reads to batches. Its whole state is one integer: how many samples were seen.

Global batch k of an epoch holds the samples that `order.py` puts there, for any world: rank r of w takes the r-th w-th
of it, and cuts that into micro-batches. Every place in a batch belongs to a lane of the order, so a rank reads only the
lanes of its share, and all ranks together read each sample about once an epoch.

What is read, held and dropped as one is a unit: some megabytes of neighbouring samples, in all the fields that the batch
asks for. Random single rows over a network reach a hundredth of its rate, whole shards would be mostly other ranks'. A
plan of the coming micro-batches (`plans.py`) says which units are needed next; threads read and decode them straight into
those batches (`drafts.py`), as far ahead as the bound on memory allows, and one more thread finishes batches in order.
"""

import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Generic, Self, TypeVar

import numpy as np
from jaxtyping import Bool, Int64
from pydantic import BaseModel, PositiveFloat, PositiveInt

from datastore.batch import Batch
from datastore.buffers import Buffers
from datastore.disk_cache import DiskCache
from datastore.drafts import Drafts, Form, Memory, Samples
from datastore.errors import AskedWrongly, StoreError, ViewpointError
from datastore.fetch import FetchConfig, Fetcher, FetchFailed
from datastore.layout import CorpusFacts, Rows, Store, manifest_name, newest_manifest, open_store
from datastore.objects import ObjectFolder
from datastore.order import Lanes, Order, Remainder
from datastore.plans import Shares, plans_of
from datastore.schema import FIELDS
from datastore.shards import ShardReader

# Threads that wait for bytes and decode them. For a disk as many as there are cores, within bounds: more of them only get
# into each other's way (a third of the rate was lost with 8 on 2 cores), fewer would leave a mounted file system waiting.
# Those of a server wait for its latency, and its requests are bounded by themselves (data.fetch).
_FEWEST_LOCAL_READERS, _MOST_LOCAL_READERS = 2, 8
_REMOTE_READERS: Final = 32
_UNIT_BYTES: Final = 8 * 2**20
_LARGEST_UNIT_BYTES: Final = 64 * 2**20
_MOST_UNIT_SAMPLES: Final = 256
_LABELS_AT_ONCE: Final = 2**13
_GIB: Final = 2**30

_logger = logging.getLogger("datastore.stream")

BatchT = TypeVar("BatchT", bound=Batch)


class StreamConfig(BaseModel, extra="forbid", frozen=True):
    """Which samples a run reads, in what mixture, and how far ahead."""

    store_url: str | None = None  # `--data` fills it in
    split: str = "train"
    classes: tuple[str, ...] | None = None  # only shapes of these; None: all, unlabelled ones too
    shapes_url: str | None = None  # a text file of ids, one a line: only these of the shapes above
    every: PositiveInt = 1  # only each so-manyth of the shapes above
    num_points: PositiveInt | None = None  # of a shape, the first so many: they are in farthest-point order. None: all
    # A batch takes its samples from so many places of the corpus at a time. More mix better and let more processes share
    # the reading, and spread a unit over more batches, which all take memory from its read on.
    lanes: PositiveInt = 16
    window_units: PositiveInt = 1  # units that a lane shuffles over
    # Neighbouring samples that are read as one; the order depends on it. None: as many as `unit_samples_of` says.
    unit_samples: PositiveInt | None = None
    remainder: Remainder = "drop"  # what an epoch has left after its last whole batch, or "pad"
    prefetch_batches: PositiveInt = 4  # micro-batches ready ahead of the consumer, if there is memory for them
    memory_gib: PositiveFloat = 4.0  # a process holds at most so much: in batches, and being read
    fetch: FetchConfig = FetchConfig()
    # A folder on this node's disk that keeps what was read from a remote store; its processes share it. None: nothing is
    # kept, as the pages of a local store already are by the system.
    cache_path: str | None = None
    cache_gib: PositiveFloat = 50.0  # that the folder takes at most


def open_stream(
    config: StreamConfig,
    batch_type: type[BatchT],
    *,
    teacher: str | None,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world_size: int,
    seed: int,
    start: int = 0,
    manifest: int | None = None,
    pin_memory: bool = False,
) -> "Stream[BatchT]":
    """This rank's batches from sample `start` on. What can be asked wrongly is found here, not at the first batch.

    `manifest`: what all ranks and starts of a run see of a store that grows; None: the newest. `pin_memory`: batches lie
    where a GPU fetches them from while it computes.
    """
    if config.store_url is None:
        raise AskedWrongly("No store to read from: name one with `--data URL`, or as data.store_url in the recipe.")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}")
    shares = Shares(global_batch, micro_batch, rank, world_size)
    shares.check(start)
    store = open_store(config.store_url, manifest)
    fetcher = Fetcher(store.folder, config.fetch, _cache(store, config), Buffers(int(config.memory_gib * _GIB)))
    with ExitStack() as on_error:
        on_error.callback(fetcher.close)
        rows = _chosen_rows(store, config, fetcher)
        if global_batch > len(rows):
            raise AskedWrongly(
                f"A global batch of {global_batch} is more than the {len(rows)} shapes in {_say_choice(config)} of "
                f"{store.url}. Lower global_batch."
            )
        readers = _readers(store, fetcher, config, batch_type, teacher)
        order = Order(len(rows), config.unit_samples or unit_samples_of(readers.values()), config.window_units, seed)
        lanes = Lanes(len(rows), global_batch, config.lanes, config.remainder)
        samples = Samples(rows, readers, order)
        cores = len(os.sched_getaffinity(0))
        local_readers = max(_FEWEST_LOCAL_READERS, min(cores, _MOST_LOCAL_READERS))
        num_readers = local_readers if fetcher.is_local else _REMOTE_READERS
        memory = Memory.of(samples, shares, lanes, batch_type, config.memory_gib, config.prefetch_batches, num_readers)
        form = Form(batch_type, samples, fetcher.buffers, store.attributes.num_views, pin_memory)
        stream = Stream(store, fetcher, samples, shares, lanes, memory, form, start)
        on_error.pop_all()
    return stream


def unit_samples_of(readers: Iterable[ShardReader]) -> int:
    """How many neighbouring samples are read as one: a power of two that makes about 8 MiB of these fields.

    The order of a run depends on it, so it follows from nothing but the layout of the fields that the batch asks for: it is
    the same on any world, whatever is written to the store later.
    """
    readers = list(readers)
    row_bytes = max(1, sum(reader.row_bytes for reader in readers))
    wanted = 1 << max(0, round(math.log2(_UNIT_BYTES / row_bytes)))
    # Rows of a split need not begin where a chunk does: units of one chunk would decode two each.
    chunk_rows = max((reader.chunk_rows for reader in readers), default=1)
    least = 2 * chunk_rows if 2 * chunk_rows * row_bytes <= _LARGEST_UNIT_BYTES else chunk_rows
    return max(least, min(wanted, _MOST_UNIT_SAMPLES))


class Stream(Generic[BatchT]):
    """Batches in order. Close it, or use it in a `with`; an error on its way closes it too."""

    def __init__(
        self,
        store: Store,
        fetcher: Fetcher,
        samples: Samples,
        shares: Shares,
        lanes: Lanes,
        memory: Memory,
        form: Form[BatchT],
        start: int,
    ) -> None:
        self.store = store
        self.num_samples = len(samples.rows)
        self.steps_per_epoch = lanes.num_batches
        self.samples_seen = start
        self.data_wait_seconds = 0.0
        self._fetcher = fetcher
        self._rows, self._unit_samples = samples.rows, samples.order.unit_samples
        self._shares = shares
        self._form = form
        self._epoch = start // shares.global_batch // lanes.num_batches
        self._prefetch_batches = memory.batches_ahead
        plans = plans_of(samples.rows, samples.order, lanes, shares, first_step=start // shares.global_batch)
        self._drafts = Drafts(samples, memory, plans, form)
        # one thread, so that batches are finished in order and `_drafts` has one user
        self._assembler = ThreadPoolExecutor(1, thread_name_prefix="stream-batches")
        self._ahead: deque[Future[BatchT]] = deque()
        self._closed = False

    @property
    def corpus(self) -> CorpusFacts:
        """What sizes a network."""
        return self.store.corpus_facts

    @property
    def rows_digest(self) -> str:
        """Tells what is read, and its order, from what another choice of samples, store or size of units would give."""
        return f"{self._rows.digest}/{self._unit_samples}"

    @property
    def bytes_read(self) -> int:
        """Bytes that came from the store so far."""
        return self._fetcher.bytes_fetched

    @property
    def retries(self) -> int:
        """Requests to the store that had to be repeated."""
        return self._fetcher.retries

    @property
    def cache_hits(self) -> int:
        """Ranges that the local cache had."""
        return self._fetcher.cache_hits

    @property
    def units_read(self) -> int:
        """Units that were read so far; as many as the corpus has, after an epoch of one process with memory enough."""
        return self._drafts.units_read

    @property
    def batches_ready(self) -> int:
        """Micro-batches that could be taken without waiting."""
        return sum(batch.done() for batch in self._ahead)

    @property
    def memory_bytes(self) -> int:
        """Memory for samples: batches, also those that somebody still holds, what is being read, and what is kept for the next."""
        return self._fetcher.buffers.allocated_bytes

    def newer_manifest(self) -> int | None:
        """The number of the store's newest manifest, if it is newer than the one that this stream goes on with.

        A stream sees the manifest that it opened, whatever is written meanwhile; opening another one sees the newer.
        """
        newest = newest_manifest(self.store.folder).number
        return newest if newest > self.store.manifest.number else None

    def steps(self, count: int) -> Iterator[list[BatchT]]:
        """This rank's micro-batches of each of the next `count` optimizer steps."""
        for _ in range(count):
            step = [self._next() for _ in range(self._shares.accumulation)]
            self.samples_seen += self._shares.global_batch
            yield step

    def close(self) -> None:
        """Ends the threads and frees the memory; what is under way is given up."""
        self._closed = True
        self._fetcher.close()
        self._drafts.cancel()
        self._assembler.shutdown(wait=True, cancel_futures=True)
        self._drafts.close()
        self._ahead.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _next(self) -> BatchT:
        if self._closed:
            raise ValueError("this stream is closed")
        # the batch that is about to be handed over, and those behind it
        while len(self._ahead) < self._prefetch_batches + 1:
            self._ahead.append(self._assembler.submit(self._assemble))
        waiting = time.perf_counter()
        with ExitStack() as on_error:
            on_error.callback(self.close)
            batch = self._ahead.popleft().result()
            on_error.pop_all()
        self.data_wait_seconds += time.perf_counter() - waiting
        return batch

    def _assemble(self) -> BatchT:
        """The next micro-batch."""
        draft = self._drafts.next()
        if draft.plan.epoch != self._epoch and self._shares.rank == 0:
            self._drafts.also(self._say_whether_the_store_has_grown)
        self._epoch = draft.plan.epoch
        return self._form.finished(draft)

    def _say_whether_the_store_has_grown(self) -> None:
        """Once an epoch. Manifests are numbered without gaps, so one question tells."""
        opened = self.store.manifest.number
        try:
            has_grown = self._fetcher.exists(manifest_name(opened + 1))
        except (FetchFailed, ViewpointError) as error:  # it is no part of the run
            _logger.info("%s: whether it has grown could not be asked (%s)", self.store.url, error)
            return
        if has_grown:
            _logger.warning(
                "%s has grown since this run opened it (manifest %d). The run goes on with the %d samples that it "
                "opened; one that is started now sees more.", self.store.url, opened, self.num_samples,
            )  # fmt: skip


def _chosen_rows(store: Store, config: StreamConfig, fetcher: Fetcher) -> Rows:
    """The rows that a run reads."""
    chosen = store.row_ranges(config.split)
    if config.classes is not None:
        if unknown := sorted(set(config.classes) - set(store.class_names)):
            raise AskedWrongly(
                f"{store.url} has no class {', '.join(unknown)} (data.classes). It has {', '.join(store.class_names)}."
            )
        labels = [store.class_names.index(name) for name in config.classes]
        chosen = _rows_labelled(chosen, labels, ShardReader(store, store.field("label"), fetcher))
    if config.shapes_url is not None:
        chosen = _rows_listed(chosen, config, store)
    if config.every > 1:
        chosen = chosen.every(config.every)
    if not len(chosen):
        raise StoreError(
            f"{store.url} has no complete shape in {_say_choice(config)}. Choose another with data.split "
            f"({', '.join(store.splits)}), or let `viewpoint ingest` finish."
        )
    return chosen


def _rows_labelled(rows: Rows, labels: list[int], reader: ShardReader) -> Rows:
    """Those of the rows whose label is one of these. Every label is read."""
    return _rows_where(rows, lambda part: np.isin(reader.read(part), labels))


def _rows_listed(rows: Rows, config: StreamConfig, store: Store) -> Rows:
    """Those of the rows whose id is in the list. Every id is read."""
    assert config.shapes_url is not None
    listed = _lines(config.shapes_url)
    seen: set[str] = set()

    def is_listed(part: Int64[np.ndarray, " r"]) -> Bool[np.ndarray, " r"]:
        ids = store.read("id", part).tolist()
        seen.update(listed.intersection(ids))
        return np.array([shape_id in listed for shape_id in ids])

    chosen = _rows_where(rows, is_listed)
    if missing := sorted(listed - seen):
        raise AskedWrongly(
            f"{config.shapes_url} lists {len(missing)} ids that are not in {_say_choice(config)} of {store.url}, such as "
            f"{', '.join(missing[:3])}. Take them out, or choose another data.split. `viewpoint inspect {store.url}` shows ids."
        )
    return chosen


def _lines(url: str) -> set[str]:
    """The lines of a text file that say something."""
    folder, _, name = url.rpartition("/")
    try:
        content = ObjectFolder(folder or ".").read(name)
    except FileNotFoundError:
        raise AskedWrongly(f"There is no {url} (data.shapes_url): a text file of ids, one a line.") from None
    return {line.strip() for line in content.decode().splitlines() if line.strip()}


def _rows_where(rows: Rows, is_chosen: Callable[[Int64[np.ndarray, " r"]], Bool[np.ndarray, " r"]]) -> Rows:
    """Some of the rows. They are looked at in pieces; runs of rows are kept."""

    def chosen(first: int) -> Int64[np.ndarray, "k 2"]:
        part = rows[np.arange(first, min(first + _LABELS_AT_ONCE, len(rows)), dtype=np.int64)]
        return Rows.of(part[is_chosen(part)]).ranges

    with ThreadPoolExecutor(_REMOTE_READERS, thread_name_prefix="stream-labels") as pool:
        found = list(pool.map(chosen, range(0, len(rows), _LABELS_AT_ONCE)))
    return Rows(np.concatenate([*found, np.empty((0, 2), np.int64)]))


def _say_choice(config: StreamConfig) -> str:
    """Which shapes are read, for people."""
    classes = "" if config.classes is None else f", classes {', '.join(config.classes)}"
    every = "" if config.every == 1 else f", every {config.every}th"
    listed = "" if config.shapes_url is None else f", listed in {config.shapes_url}"
    return f"split {config.split!r}{classes}{listed}{every}"


def _cache(store: Store, config: StreamConfig) -> DiskCache | None:
    """The local cache of a remote store, where one is asked for."""
    if config.cache_path is None:
        return None
    if store.folder.is_local:
        _logger.info("%s lies on this machine's disk: nothing of it is kept in data.cache_path", store.url)
        return None
    return DiskCache(Path(config.cache_path).expanduser(), int(config.cache_gib * _GIB))


def _readers(
    store: Store, fetcher: Fetcher, config: StreamConfig, batch_type: type[Batch], teacher: str | None
) -> dict[str, ShardReader]:
    """A reader for every field of the batch."""
    points_stored = store.attributes.points_per_shape
    if config.num_points is not None and config.num_points > points_stored:
        raise AskedWrongly(
            f"data.num_points is {config.num_points}, but {store.url} holds {points_stored} points of each shape. "
            f"Lower it, or ingest the source again with more points."
        )
    num_views, num_drawn = store.attributes.num_views, batch_type.views_drawn
    if num_drawn is not None and not 0 < num_drawn <= num_views:
        raise AskedWrongly(
            f"{batch_type.__name__} draws {num_drawn} views of each shape, and {store.url} has {num_views}. Draw fewer, or "
            f"ingest the source again with a rig of more views."
        )
    readers: dict[str, ShardReader] = {}
    for name in batch_type.store_fields():
        if name not in FIELDS:
            raise AskedWrongly(
                f"{batch_type.__name__} reads {name!r}, which is no field. A store may have {', '.join(FIELDS)}."
            )
        path = name
        if FIELDS[name].writer == "cache":
            if teacher is None:
                raise AskedWrongly(f"{batch_type.__name__} reads {name!r}, which a teacher wrote: name the teacher.")
            path = f"teachers/{store.resolve_teacher(teacher)}/{name}"
        stored = store.field(path)
        if stored.field.dtype == "string":
            raise ValueError(f"{batch_type.__name__} reads {name!r}, which is text: no tensor holds it")
        if (
            num_drawn is not None
            and dict(zip(stored.field.axes, stored.row_shape, strict=True)).get("v", num_views) != num_views
        ):
            raise ValueError(
                f"{path} has {stored.row_shape} of axes {stored.field.axes}, and the store has {num_views} views"
            )
        readers[name] = ShardReader(store, stored, fetcher, config.num_points)
    return readers
