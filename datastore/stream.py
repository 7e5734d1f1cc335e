"""Sample ids to reads to batches. Its whole state is one integer: how many samples were seen.

Global batch k of an epoch holds the samples that `order.py` puts there, for any world: rank r of w takes the r-th w-th
of it, and cuts that into micro-batches. Every place in a batch belongs to a lane of the order, so a rank reads only the
lanes of its share, and all ranks together read each sample about once an epoch.

What is read, held and dropped as one is a unit: some megabytes of neighbouring samples, in all the fields that the batch
asks for. Random single rows over a network reach a hundredth of its rate, whole shards would be mostly other ranks'. A
plan of the coming micro-batches says which units are needed next; threads fetch and decode them as far ahead as the
bound on memory allows, and one more thread gathers rows into tensors, a few batches ahead of the consumer.
"""

import logging
import math
import os
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Final, Generic, NamedTuple, Self, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Int64
from pydantic import BaseModel, PositiveFloat, PositiveInt

from datastore.batch import Batch
from datastore.buffers import Buffers, rounded
from datastore.disk_cache import DiskCache
from datastore.errors import AskedWrongly, StoreError, ViewpointError
from datastore.fetch import FetchConfig, Fetcher, FetchFailed
from datastore.layout import CorpusFacts, Rows, Store, manifest_name, newest_manifest, open_store
from datastore.objects import ObjectFolder
from datastore.order import Lanes, Order, Remainder, drawn_views, sample_seeds, say_worlds
from datastore.schema import FIELDS
from datastore.shards import LoadedRows, ShardReader

# Threads that wait for bytes and decode them. For a disk as many as there are cores, within bounds: more of them only get
# into each other's way (a third of the rate was lost with 8 on 2 cores), fewer would leave a mounted file system waiting.
# Those of a server wait for its latency, and its requests are bounded by themselves (data.fetch).
_FEWEST_LOCAL_READERS, _MOST_LOCAL_READERS = 2, 8
_REMOTE_READERS: Final = 32
_WINDOWS_AHEAD: Final = 4  # that a lane will come to are asked for, if there is memory for them
_UNIT_BYTES: Final = 4 * 2**20
_LARGEST_UNIT_BYTES: Final = 64 * 2**20
_MOST_UNIT_SAMPLES: Final = 256
_LABELS_AT_ONCE: Final = 2**13
_PLANNED_PLACES: Final = 4096  # looked up in the order at a time: numpy's cost of a call is then 1/4096 a sample
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
    # the reading; each holds a window of its own in memory.
    lanes: PositiveInt = 16
    window_units: PositiveInt = 1  # units that a lane shuffles over
    # Neighbouring samples that are read as one; the order depends on it. None: as many as `unit_samples_of` says.
    unit_samples: PositiveInt | None = None
    remainder: Remainder = "drop"  # what an epoch has left after its last whole batch, or "pad"
    prefetch_batches: PositiveInt = 4  # micro-batches ready ahead of the consumer, if there is memory for them
    memory_gib: PositiveFloat = 4.0  # a process holds at most so much: decoded, being read, and in batches
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
    shares = _Shares(global_batch, micro_batch, rank, world_size)
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
        samples = _Samples(rows, readers, order)
        cores = len(os.sched_getaffinity(0))
        local_readers = max(_FEWEST_LOCAL_READERS, min(cores, _MOST_LOCAL_READERS))
        num_readers = local_readers if fetcher.is_local else _REMOTE_READERS
        memory = _Memory.of(samples, shares, lanes, config, _batch_row_bytes(readers.values(), batch_type), num_readers)
        stream = Stream(store, fetcher, batch_type, samples, shares, lanes, memory, seed, start, pin_memory)
        on_error.pop_all()
    return stream


def unit_samples_of(readers: Iterable[ShardReader]) -> int:
    """How many neighbouring samples are read as one: a power of two that makes about 4 MiB of these fields.

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
        batch_type: type[BatchT],
        samples: "_Samples",
        shares: "_Shares",
        lanes: Lanes,
        memory: "_Memory",
        seed: int,
        start: int,
        pin_memory: bool,
    ) -> None:
        self.store = store
        self.num_samples = len(samples.rows)
        self.steps_per_epoch = lanes.num_batches
        self.samples_seen = start
        self.data_wait_seconds = 0.0
        self._fetcher = fetcher
        self._batch_type = batch_type
        self._samples = samples
        self._shares = shares
        self._seed = seed
        self._epoch = start // shares.global_batch // lanes.num_batches
        self._pin_memory = pin_memory
        self._prefetch_batches = memory.batches_ahead
        plans = _plans(samples.order, lanes, shares, first_step=start // shares.global_batch)
        self._units = _UnitMemory(
            samples, memory, plans, _WINDOWS_AHEAD * _plans_of_a_window(samples.order, shares, lanes)
        )
        # one thread, so that batches are finished in order and `_units` has one user
        self._assembler = ThreadPoolExecutor(1, thread_name_prefix="stream-batches")
        self._ahead: deque[Future[BatchT]] = deque()
        self._closed = False

    @property
    def corpus(self) -> CorpusFacts:
        """What sizes a network."""
        return self.store.corpus_facts

    @property
    def rows_digest(self) -> str:
        """Tells what is read from what another choice of samples, or another store, would have read."""
        return self._samples.rows.digest

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
        return self._units.units_read

    @property
    def batches_ready(self) -> int:
        """Micro-batches that could be taken without waiting."""
        return sum(batch.done() for batch in self._ahead)

    @property
    def memory_bytes(self) -> int:
        """Memory for samples: units, what is being read, batches that somebody still holds, and what is kept for the next."""
        return self._fetcher.buffers.allocated_bytes

    @property
    def resident_bytes(self) -> int:
        """Memory that decoded units take now; those that are on their way count."""
        return self._units.resident_bytes

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
        self._units.cancel()
        self._assembler.shutdown(wait=True, cancel_futures=True)
        self._units.close()
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
        plan = self._units.enter_next_plan()
        if plan.epoch != self._epoch and self._shares.rank == 0:
            self._units.also(self._say_whether_the_store_has_grown)
        self._epoch = plan.epoch
        ids = self._samples.rows[plan.samples]
        seeds = sample_seeds(self._seed, plan.epoch, ids)
        fields = {name: self._gather(name, plan.samples, seeds) for name in self._samples.readers}
        return self._batch_type(ids=torch.from_numpy(ids), seeds=torch.from_numpy(seeds), **fields)

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

    def _gather(self, name: str, samples: Int64[np.ndarray, " m"], seeds: Int64[np.ndarray, " m"]) -> torch.Tensor:
        """One field of a micro-batch."""
        reader, num_drawn = self._samples.readers[name], self._batch_type.views_drawn
        if num_drawn is None or "v" not in reader.stored.field.axes:
            return self._gather_rows(name, samples, reader.row_shape, None)
        axis = reader.stored.field.axes.index("v")
        views = drawn_views(seeds, self.corpus.num_views, num_drawn)
        if axis == 0:
            return self._gather_rows(name, samples, (num_drawn, *reader.row_shape[1:]), views)
        # rows whose views are not one after the other, bit-packed or small
        whole = self._gather_rows(name, samples, reader.row_shape, None)
        index = torch.from_numpy(views).view(len(samples), *[1] * axis, num_drawn, *[1] * (whole.ndim - axis - 2))
        drawn = whole.take_along_dim(index, dim=axis + 1)
        return drawn.pin_memory() if self._pin_memory else drawn

    def _gather_rows(
        self,
        name: str,
        samples: Int64[np.ndarray, " m"],
        row_shape: tuple[int, ...],
        views: Int64[np.ndarray, "m k"] | None,
    ) -> torch.Tensor:
        """Rows of a field, or some views of each."""
        stored = self._samples.readers[name].stored
        shape = (len(samples), *row_shape)
        if self._pin_memory and not stored.field.bit_packed:
            dtype = torch.from_numpy(np.empty(0, stored.stored_dtype)).dtype
            gathered = torch.empty(shape, dtype=dtype, pin_memory=True)  # torch uses such memory again, too
        else:
            gathered = torch.from_numpy(self._fetcher.buffers.empty(shape, stored.stored_dtype))
        self._units.gather(name, samples, gathered, views)
        if not stored.field.bit_packed:
            return gathered
        unpacked = torch.from_numpy(stored.decode(gathered.numpy()))
        return unpacked.pin_memory() if self._pin_memory else unpacked


@dataclass(frozen=True)
class _Shares:
    """How ranks share a global batch."""

    global_batch: int
    micro_batch: int
    rank: int
    world_size: int

    @property
    def accumulation(self) -> int:
        return self.global_batch // (self.micro_batch * self.world_size)

    def check(self, start: int) -> None:
        if self.global_batch % self.micro_batch:
            raise AskedWrongly(
                f"A global batch of {self.global_batch} cannot be cut into micro-batches of {self.micro_batch}. Choose "
                f"a micro-batch that divides it."
            )
        num_micro_batches = self.global_batch // self.micro_batch
        if num_micro_batches % self.world_size:
            worlds = [world for world in range(1, num_micro_batches + 1) if num_micro_batches % world == 0]
            raise AskedWrongly(
                f"A global batch of {self.global_batch} in micro-batches of {self.micro_batch} cannot be shared evenly "
                f"by {self.world_size} processes. {say_worlds(worlds)}"
            )
        if start % self.global_batch or start < 0:
            raise AskedWrongly(
                f"{start} samples seen are no whole number of global batches of {self.global_batch}: this run was "
                f"started with another global_batch. Go on with that one, or start a new run."
            )

    @property
    def offsets(self) -> Int64[np.ndarray, "a m"]:
        """This rank's places in a global batch, by micro-batch: neighbours, so that they lie in few lanes."""
        mine = self.accumulation * self.micro_batch
        return (self.rank * mine + np.arange(mine, dtype=np.int64)).reshape(self.accumulation, self.micro_batch)


class _Plan(NamedTuple):
    """One micro-batch, before anything is read."""

    epoch: int
    samples: Int64[np.ndarray, " m"]
    windows: dict[int, list[int]]  # of the epoch's order, in which the samples lie, and their units


def _plans(order: Order, lanes: Lanes, shares: _Shares, first_step: int) -> Iterator[_Plan]:
    """This rank's micro-batches from an optimizer step on, without end."""
    offsets = shares.offsets
    steps_at_once = max(1, _PLANNED_PLACES // offsets.size)
    step = first_step
    while True:
        epoch, batch = divmod(step, lanes.num_batches)
        end = min(batch + steps_at_once, lanes.num_batches)
        batches = np.arange(batch, end, dtype=np.int64)[:, None, None]
        positions = lanes.positions(batches, offsets).reshape(-1, shares.micro_batch)
        samples, windows = order.samples(epoch, positions), order.windows(epoch, positions)
        every = np.unique(windows)
        units = dict(
            zip(every.tolist(), (found.tolist() for found in order.units_of_windows(epoch, every)), strict=True)
        )
        for ours, theirs in zip(samples, windows.tolist(), strict=True):
            yield _Plan(epoch, ours, {window: units[window] for window in sorted(set(theirs))})
        step += end - batch


def _plans_of_a_window(order: Order, shares: _Shares, lanes: Lanes) -> int:
    """How many micro-batches of this rank it takes until a lane has used up a window."""
    samples_of_a_lane = max(1, lanes.global_batch // lanes.num_lanes)
    batches = -(-order.largest_window * order.unit_samples // samples_of_a_lane)
    return min(batches, lanes.num_batches) * shares.accumulation


class _Samples:
    """Samples that a run reads: number i of the order is row `rows[i]` of the store."""

    def __init__(self, rows: Rows, readers: dict[str, ShardReader], order: Order) -> None:
        self.rows, self.readers, self.order = rows, readers, order

    def span(self, unit: int) -> tuple[int, int]:
        """First sample of a unit, and the one after its last."""
        first = unit * self.order.unit_samples
        return first, min(first + self.order.unit_samples, len(self.rows))

    def num_bytes(self, unit: int) -> int:
        """Memory that a decoded unit takes."""
        rows = self._rows_of(unit)
        return sum(reader.loaded_bytes(rows) for reader in self.readers.values())

    def bytes_while_read(self, reader: ShardReader) -> int:
        """Memory that a unit of one field takes until it is decoded, about."""
        first, last = map(int, self.rows[np.array([0, len(self.rows) - 1], dtype=np.int64)])
        spread = (last - first + 1) / len(self.rows)
        unit_samples, chunk_rows = self.order.unit_samples, reader.chunk_rows
        if spread == 1 and reader.loads_in_place(np.arange(first, first + unit_samples, dtype=np.int64)):
            return 0
        if spread == 1 and not first % chunk_rows and not unit_samples % chunk_rows and reader.takes_whole_rows:
            return math.ceil(unit_samples * reader.encoded_row_bytes)
        # chunks that are not of one unit alone, and rows of other splits in between; such chunks are unpacked by themselves
        num_rows = unit_samples * spread + 2 * chunk_rows
        return math.ceil(num_rows * reader.encoded_row_bytes) + chunk_rows * reader.row_bytes

    def load(self, field: str, unit: int) -> LoadedRows:
        """One field of a unit."""
        return self.readers[field].load(self._rows_of(unit))

    def _rows_of(self, unit: int) -> Int64[np.ndarray, " r"]:
        return self.rows[np.arange(*self.span(unit), dtype=np.int64)]


@dataclass(frozen=True)
class _Held:
    """A unit in memory, or on its way there."""

    fields: dict[str, Future[LoadedRows]]
    first_sample: int
    num_bytes: int


class _UnitMemory:
    """Decoded units within a bound: those of the micro-batch entered last, then those that coming ones need, in order."""

    def __init__(self, samples: _Samples, memory: "_Memory", plans: Iterator[_Plan], plans_ahead: int) -> None:
        self.resident_bytes = 0
        self.units_read = 0
        self._samples = samples
        self._limit_bytes = memory.units_bytes
        self._plans = plans
        self._plans_ahead = plans_ahead
        self._coming: deque[_Plan] = deque()
        self._entered: _Plan | None = None
        # how many of the plans from the entered one on need a window, and how many of those windows a unit
        self._needed_windows: Counter[tuple[int, int]] = Counter()
        self._needed: Counter[int] = Counter()
        self._to_load: deque[int] = deque()  # units, in the order in which they are needed
        self._held: dict[int, _Held] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # held, and no plan needs them; longest unused first
        self._pool = ThreadPoolExecutor(memory.num_readers, thread_name_prefix="stream-units")

    def enter_next_plan(self) -> _Plan:
        """The next micro-batch; its units are on their way, and so are as many of those after it as there is room for."""
        before: set[tuple[int, int]] = set()
        is_first = self._entered is None
        if self._entered is not None:
            before = {(self._entered.epoch, window) for window in self._entered.windows}
            self._release(self._entered)
        while len(self._coming) <= self._plans_ahead:
            plan = next(self._plans)
            self._expect(plan)
            self._coming.append(plan)
        entered = self._entered = self._coming.popleft()
        for window, units in entered.windows.items():
            if (entered.epoch, window) not in before:
                for unit in units:
                    loaded = unit in self._held or self._load(unit, must=True)
                    assert loaded, "_Memory saw to it that the units of one micro-batch fit"
        if is_first:
            return entered  # nothing shall share the machine with what the first batch waits for
        while self._to_load and (
            self._to_load[0] in self._held
            or not self._needed[self._to_load[0]]
            or self._load(self._to_load[0], must=False)
        ):
            self._to_load.popleft()
        return entered

    def _expect(self, plan: _Plan) -> None:
        for window, units in plan.windows.items():
            self._needed_windows[plan.epoch, window] += 1
            if self._needed_windows[plan.epoch, window] > 1:
                continue
            for unit in units:
                self._needed[unit] += 1
                self._idle.pop(unit, None)
                if self._needed[unit] == 1 and unit not in self._held:
                    self._to_load.append(unit)

    def _release(self, plan: _Plan) -> None:
        for window, units in plan.windows.items():
            self._needed_windows[plan.epoch, window] -= 1
            if self._needed_windows[plan.epoch, window]:
                continue
            del self._needed_windows[plan.epoch, window]
            for unit in units:
                self._needed[unit] -= 1
                if not self._needed[unit]:
                    del self._needed[unit]
                    if unit in self._held:
                        self._idle[unit] = None

    def gather(
        self,
        field: str,
        samples: Int64[np.ndarray, " m"],
        target: torch.Tensor,
        views: Int64[np.ndarray, "m k"] | None = None,
    ) -> None:
        """Copies samples of the micro-batch entered last to `target`; waits for those that are on their way.

        `views`: only these places of each sample's first axis.
        """
        units = samples // self._samples.order.unit_samples
        # samples of one lane are neighbours in a batch, and mostly of one unit
        bounds = [0, *(np.flatnonzero(np.diff(units)) + 1).tolist(), len(units)]
        array, large = target.numpy(), list[torch.Tensor]()
        for start, end in pairwise(bounds):
            held = self._held[int(units[start])]
            content, rows = held.fields[field].result(), samples[start:end] - held.first_sample
            drawn = None if views is None else views[start:end]
            if content.are_large:
                large += content.found(rows, drawn)
            else:
                content.take(rows, array[start:end], drawn)
        if large:
            torch.stack(large, out=target if views is None else target.flatten(0, 1))

    def also(self, task: Callable[[], None]) -> None:
        """Runs it on a thread that reads."""
        self._pool.submit(task)

    def cancel(self) -> None:
        """Gives up reads that have not begun; whoever waits for one gets a CancelledError."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Waits for reads under way, and frees everything."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._held.clear()
        self._idle.clear()
        self.resident_bytes = 0

    def _load(self, unit: int, *, must: bool) -> bool:
        """Sends for a unit; whether there was room."""
        num_bytes = self._samples.num_bytes(unit)
        if not self._make_room(num_bytes, must):
            return False
        fields = {name: self._pool.submit(self._samples.load, name, unit) for name in self._samples.readers}
        self._held[unit] = _Held(fields, self._samples.span(unit)[0], num_bytes)
        self.resident_bytes += num_bytes
        self.units_read += 1
        return True

    def _make_room(self, num_bytes: int, must: bool) -> bool:
        """Drops what no plan needs, longest unused first; if it `must`, then also what coming plans need, last come first."""
        while self._idle and self.resident_bytes + num_bytes > self._limit_bytes:
            self._drop(self._idle.popitem(last=False)[0])
        if must and self.resident_bytes + num_bytes > self._limit_bytes:
            assert self._entered is not None
            entered = {unit for units in self._entered.windows.values() for unit in units}
            for unit in [unit for unit in reversed(self._held) if unit not in entered]:
                if self.resident_bytes + num_bytes <= self._limit_bytes:
                    break
                self._to_load.appendleft(unit)
                self._drop(unit)
        return self.resident_bytes + num_bytes <= self._limit_bytes

    def _drop(self, unit: int) -> None:
        dropped = self._held.pop(unit)
        for content in dropped.fields.values():
            if not content.cancel():
                wait([content])  # what is under way takes its memory
        self.resident_bytes -= dropped.num_bytes


def _batch_row_bytes(readers: Iterable[ShardReader], batch_type: type[Batch]) -> int:
    """Memory that a sample takes in a batch."""
    found = 0
    for reader in readers:
        shape = reader.row_shape
        if batch_type.views_drawn is not None and reader.stored.field.axes[:1] == ("v",):
            shape = (batch_type.views_drawn, *shape[1:])
        packed = 8 if reader.stored.field.bit_packed else 1
        found += math.prod(shape) * packed * np.dtype(reader.stored.stored_dtype).itemsize
    return found


@dataclass(frozen=True)
class _Memory:
    """How the bound on memory is shared out."""

    units_bytes: int  # decoded units
    num_readers: int  # each holds what it fetched until it is decoded
    batches_ahead: int

    @classmethod
    def of(
        cls, samples: _Samples, shares: _Shares, lanes: Lanes, config: StreamConfig, row_bytes: int, num_readers: int
    ) -> "_Memory":
        """Room for the units that a micro-batch may need at once; the rest in thirds, for what is being read, for batches
        and for more units. Refuses windows that do not fit: their units would be read again and again.

        Of batches there are those that are ready, one that is being gathered, and the consumer's: a step's, and those of
        the step before, which it lets go when it has the next.
        `row_bytes`: of a sample in a batch.
        """
        order, whole = samples.order, int(config.memory_gib * _GIB)
        num_lanes = len(np.unique(lanes.lane_of(shares.offsets)))
        # a micro-batch takes some samples of each of its lanes, which may begin anywhere in a window
        of_a_lane = min(shares.micro_batch, -(-lanes.global_batch // lanes.num_lanes))
        windows = 1 + -(-of_a_lane // (order.largest_window * order.unit_samples))
        num_units = min(windows * num_lanes * order.largest_window, order.num_units)
        units = num_units * samples.num_bytes(0)
        beside = 1 + 2 * shares.accumulation
        batch = rounded(shares.micro_batch * row_bytes)
        reading = max((samples.bytes_while_read(reader) for reader in samples.readers.values()), default=0)
        needed = units + (beside + 1) * batch + reading
        if needed > whole:
            raise AskedWrongly(
                f"{num_lanes} lanes with windows of {order.largest_window} units of {order.unit_samples} samples take up "
                f"to {needed / _GIB:.3g} GiB of memory ({', '.join(samples.readers)}), batches of {shares.micro_batch} "
                f"included, and data.memory_gib allows {config.memory_gib:g}. Raise data.memory_gib, or lower data.lanes, "
                f"data.window_units, data.unit_samples or data.num_points."
            )
        third = (whole - units) // 3
        # a step is taken whole: what of it is not ready then, the device waits for
        ahead = max(1, min(max(config.prefetch_batches, shares.accumulation), third // max(1, batch) - beside))
        readers = max(1, min(num_readers, third // max(1, reading)))
        return cls(whole - (ahead + beside) * batch - readers * reading, readers, ahead)


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
