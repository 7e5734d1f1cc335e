"""Sample ids to reads to batches. Its whole state is one integer: how many samples were seen.

Order positions [k*G, (k+1)*G) of an epoch are global batch k, for any world. What an epoch has left after its last
whole batch is dropped, other samples each time. Of batch k, rank r takes [k*G + (j*world + r)*m, +m) in micro-step j:
the ranks' micro-batches of one micro-step are neighbours.

Threads read whole shards, since random single rows over a network reach a hundredth of its rate. The shards of the
window that the order is in stay in memory, decoded; those of the next are fetched meanwhile, as far as the bound on
memory allows. One more thread, a few batches ahead of the consumer, gathers rows into tensors.
"""

import itertools
import time
from collections import OrderedDict, deque
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Generic, NamedTuple, Self, TypeVar

import numpy as np
import torch
from jaxtyping import Int64
from pydantic import BaseModel, PositiveFloat, PositiveInt

from datastore.batch import Batch
from datastore.errors import AskedWrongly, StoreError
from datastore.layout import CorpusFacts, Store, open_store
from datastore.order import Order, sample_seeds, say_worlds
from datastore.schema import FIELDS
from datastore.shards import ShardReader

_READER_THREADS: Final = 8  # also how many encoded shards are in memory at once, beside the decoded ones
_PLANNED_POSITIONS: Final = 4096  # looked up in the order at a time: numpy's cost of a call is then 1/4096 a sample
_GIB: Final = 2**30

BatchT = TypeVar("BatchT", bound=Batch)


class StreamConfig(BaseModel, extra="forbid", frozen=True):
    """Which samples a run reads, and how far ahead."""

    store_url: str | None = None  # `--data` fills it in
    split: str = "train"
    num_points: PositiveInt | None = None  # of a shape, the first so many: they are in farthest-point order. None: all
    # Samples are shuffled over so many shards at a time. More mix better and take more memory: four of 64 shards keep
    # 0.8 of the distance between neighbours that a full permutation has, sixteen 0.97.
    window_shards: PositiveInt = 4
    prefetch_batches: PositiveInt = 4  # micro-batches ready ahead of the consumer
    memory_gib: PositiveFloat = 4.0  # decoded shards that a process holds at most


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
) -> "Stream[BatchT]":
    """This rank's batches from sample `start` on. What can be asked wrongly is found here, not at the first batch."""
    if config.store_url is None:
        raise AskedWrongly("No store to read from: name one with `--data URL`, or as data.store_url in the recipe.")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}")
    shares = _Shares(global_batch, micro_batch, rank, world_size)
    shares.check(start)
    store = open_store(config.store_url)
    readers = _readers(store, config, batch_type, teacher)
    rows = store.rows(config.split)
    if not len(rows):
        raise StoreError(
            f"{store.url} has no complete shape in split {config.split!r}. Choose another with data.split "
            f"({', '.join(store.splits)}), or let `viewpoint ingest` finish."
        )
    if global_batch > len(rows):
        raise AskedWrongly(
            f"A global batch of {global_batch} is more than the {len(rows)} shapes in split {config.split!r} of "
            f"{store.url}. Lower global_batch."
        )
    # the smallest shards set the window: whoever reads images holds few of them, and points lie beside
    shard_rows = min((reader.stored.shard_rows for reader in readers.values()), default=store.attributes.block_rows)
    samples = _Samples(rows, readers, Order(len(rows), shard_rows, config.window_shards, seed))
    _check_memory(samples, config)
    return Stream(store, config, batch_type, samples, shares, seed, start)


class Stream(Generic[BatchT]):
    """Batches in order. Close it, or use it in a `with`; an error on its way closes it too."""

    def __init__(
        self,
        store: Store,
        config: StreamConfig,
        batch_type: type[BatchT],
        samples: "_Samples",
        shares: "_Shares",
        seed: int,
        start: int,
    ) -> None:
        self.store = store
        self.num_samples = len(samples.rows)
        self.steps_per_epoch = self.num_samples // shares.global_batch
        self.samples_seen = start
        self.data_wait_seconds = 0.0
        self._batch_type = batch_type
        self._samples = samples
        self._shares = shares
        self._seed = seed
        self._prefetch_batches = config.prefetch_batches
        last_position = self.steps_per_epoch * shares.global_batch - 1
        self._shards = _ShardMemory(samples, int(config.memory_gib * _GIB), last_position)
        self._plans = _plans(samples.order, shares, first_step=start // shares.global_batch)
        # one thread, so that batches are finished in order and `_shards` and `_plans` have one user
        self._assembler = ThreadPoolExecutor(1, thread_name_prefix="stream-batches")
        self._ahead: deque[Future[BatchT]] = deque()
        self._closed = False

    @property
    def corpus(self) -> CorpusFacts:
        """What sizes a network."""
        return self.store.corpus_facts

    @property
    def bytes_read(self) -> int:
        """Bytes that came from the store so far."""
        return sum(reader.bytes_read for reader in self._samples.readers.values())

    @property
    def shards_read(self) -> int:
        """Shard objects that came from the store so far."""
        return sum(reader.shards_read for reader in self._samples.readers.values())

    @property
    def batches_ready(self) -> int:
        """Micro-batches that could be taken without waiting."""
        return sum(batch.done() for batch in self._ahead)

    @property
    def resident_bytes(self) -> int:
        """Memory that decoded shards take now; those that are on their way count."""
        return self._shards.resident_bytes

    def steps(self, count: int) -> Iterator[list[BatchT]]:
        """This rank's micro-batches of each of the next `count` optimizer steps."""
        for _ in range(count):
            step = [self._next() for _ in range(self._shares.accumulation)]
            self.samples_seen += self._shares.global_batch
            yield step

    def close(self) -> None:
        """Ends the threads and frees the memory; reads under way are waited for."""
        self._closed = True
        self._shards.cancel()
        self._assembler.shutdown(wait=True, cancel_futures=True)
        self._shards.close()
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
        plan = next(self._plans)
        readers = self._samples.readers
        gathered = {
            name: np.empty((len(plan.samples), *reader.row_shape), dtype=reader.stored.stored_dtype)
            for name, reader in readers.items()
        }
        # window after window, so that a batch that lies across two does not need both in memory
        for start, end in _runs(plan.windows):
            self._shards.enter(plan.epoch, int(plan.windows[start]))
            for name in readers:
                self._shards.gather(name, plan.samples[start:end], gathered[name][start:end])
        ids = self._samples.rows[plan.samples]
        fields = {name: torch.from_numpy(reader.stored.decode(gathered[name])) for name, reader in readers.items()}
        seeds = sample_seeds(self._seed, plan.epoch, ids)
        return self._batch_type(ids=torch.from_numpy(ids), seeds=torch.from_numpy(seeds), **fields)


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

    def positions(self, batches: Int64[np.ndarray, " s"]) -> Int64[np.ndarray, "s a m"]:
        """Order positions of this rank's micro-batches, by the numbers of global batches in their epoch."""
        micro_batches = np.arange(self.accumulation, dtype=np.int64) * self.world_size + self.rank
        offsets = micro_batches[:, None] * self.micro_batch + np.arange(self.micro_batch, dtype=np.int64)
        positions: Int64[np.ndarray, "s a m"] = batches[:, None, None] * self.global_batch + offsets
        return positions


class _Plan(NamedTuple):
    """One micro-batch, before anything is read."""

    epoch: int
    samples: Int64[np.ndarray, " m"]
    windows: Int64[np.ndarray, " m"]  # of the epoch's order, in which the samples lie; ascending


def _plans(order: Order, shares: _Shares, first_step: int) -> Iterator[_Plan]:
    """This rank's micro-batches from an optimizer step on, without end."""
    steps_per_epoch = order.num_samples // shares.global_batch
    steps_at_once = max(1, _PLANNED_POSITIONS // (shares.micro_batch * shares.accumulation))
    step = first_step
    while True:
        epoch, batch = divmod(step, steps_per_epoch)
        end = min(batch + steps_at_once, steps_per_epoch)
        positions = shares.positions(np.arange(batch, end, dtype=np.int64)).reshape(-1, shares.micro_batch)
        samples, windows = order.samples(epoch, positions), order.windows(epoch, positions)
        yield from (_Plan(epoch, *micro_batch) for micro_batch in zip(samples, windows, strict=True))
        step += end - batch


def _runs(values: Int64[np.ndarray, " m"]) -> Iterator[tuple[int, int]]:
    """Start and end of each run of equal values."""
    bounds = [0, *(np.flatnonzero(np.diff(values)) + 1), len(values)]
    return itertools.pairwise(int(bound) for bound in bounds)


class _Piece(NamedTuple):
    """What is read, held and dropped as one: the samples of a split that lie in one shard of one field."""

    field: str
    shard: int


class _Samples:
    """Samples of a split: number i of the order is row `rows[i]` of the store."""

    def __init__(self, rows: Int64[np.ndarray, " s"], readers: dict[str, ShardReader], order: Order) -> None:
        self.rows, self.readers, self.order = rows, readers, order

    def span(self, piece: _Piece) -> tuple[int, int]:
        """First sample of a piece, and the one after its last: rows ascend, so a shard's samples are neighbours."""
        shard_rows = self.readers[piece.field].stored.shard_rows
        first, end = np.searchsorted(self.rows, [piece.shard * shard_rows, (piece.shard + 1) * shard_rows])
        return int(first), int(end)

    def num_bytes(self, piece: _Piece) -> int:
        """Memory that a decoded piece takes."""
        first, end = self.span(piece)
        return (end - first) * self.readers[piece.field].row_bytes

    def read(self, piece: _Piece) -> np.ndarray:
        """A piece's samples."""
        first, end = self.span(piece)
        return self.readers[piece.field].read(piece.shard, self.rows[first:end])

    def window(self, epoch: int, window: int) -> list[_Piece]:
        """Pieces that hold a window's samples."""
        pieces: dict[_Piece, None] = {}  # a set that keeps its order, so that the fields of a shard come together
        for shard in self.order.window_shards(epoch, window):
            rows = self.rows[shard * self.order.shard_rows : (shard + 1) * self.order.shard_rows]
            for name, reader in self.readers.items():
                pieces.update(
                    (_Piece(name, int(stored)), None) for stored in np.unique(rows // reader.stored.shard_rows)
                )
        return list(pieces)

    def largest_window_bytes(self) -> int:
        """Memory that a window can take at most, whichever shards the order puts together."""
        starts = np.arange(self.order.num_shards, dtype=np.int64) * self.order.shard_rows
        first = self.rows[starts]
        last = self.rows[np.minimum(starts + self.order.shard_rows, len(self.rows)) - 1]
        num_bytes = np.zeros(len(starts), dtype=np.int64)
        for reader in self.readers.values():
            shard_rows = reader.stored.shard_rows
            end = np.searchsorted(self.rows, (last // shard_rows + 1) * shard_rows)
            num_bytes += (end - np.searchsorted(self.rows, first // shard_rows * shard_rows)) * reader.row_bytes
        return int(np.sort(num_bytes)[-self.order.largest_window :].sum())


@dataclass(frozen=True)
class _Held:
    """A piece in memory, or on its way there."""

    content: Future[np.ndarray]
    first_sample: int
    num_bytes: int


class _ShardMemory:
    """Decoded pieces within a bound: of the window entered last, then of the one after it, then any used lately."""

    def __init__(self, samples: _Samples, limit_bytes: int, last_position: int) -> None:
        self.resident_bytes = 0
        self._samples = samples
        self._limit_bytes = limit_bytes
        self._last_position = last_position  # of an epoch, that is not dropped
        self._held: OrderedDict[_Piece, _Held] = OrderedDict()
        self._entered: tuple[int, int] | None = None
        self._pool = ThreadPoolExecutor(_READER_THREADS, thread_name_prefix="stream-shards")

    def enter(self, epoch: int, window: int) -> None:
        """Starts to load a window's pieces, all of them, and as many of the next window's as there is room for."""
        if self._entered == (epoch, window):
            return
        self._entered = epoch, window
        needed = self._samples.window(epoch, window)
        soon = self._samples.window(*self._after(epoch, window))
        kept = set(needed)
        for piece in needed:
            self._make_room(piece, kept)
            self._load(piece)
        kept.update(soon)
        for piece in soon:
            if not self._make_room(piece, kept):
                break
            self._load(piece)

    def gather(self, field: str, samples: Int64[np.ndarray, " m"], target: np.ndarray) -> None:
        """Copies samples of the window entered last to `target`; waits for those that are on their way."""
        shards = self._samples.rows[samples] // self._samples.readers[field].stored.shard_rows
        for shard in np.unique(shards):
            held = self._held[_Piece(field, int(shard))]
            here = np.flatnonzero(shards == shard)
            target[here] = held.content.result()[samples[here] - held.first_sample]

    def cancel(self) -> None:
        """Gives up reads that have not begun; whoever waits for one gets a CancelledError."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Waits for reads under way, and frees everything."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._held.clear()
        self.resident_bytes = 0

    def _after(self, epoch: int, window: int) -> tuple[int, int]:
        if self._samples.order.window_start(epoch, window + 1) > self._last_position:
            return epoch + 1, 0
        return epoch, window + 1

    def _load(self, piece: _Piece) -> None:
        if piece in self._held:
            self._held.move_to_end(piece)
            return
        num_bytes = self._samples.num_bytes(piece)
        content = self._pool.submit(self._samples.read, piece)
        self._held[piece] = _Held(content, self._samples.span(piece)[0], num_bytes)
        self.resident_bytes += num_bytes

    def _make_room(self, piece: _Piece, kept: Collection[_Piece]) -> bool:
        """Drops what was used longest ago until one more piece fits; whether it does."""
        room_bytes = 0 if piece in self._held else self._samples.num_bytes(piece)
        droppable = (held for held in list(self._held) if held not in kept)
        while self.resident_bytes + room_bytes > self._limit_bytes:
            oldest = next(droppable, None)
            if oldest is None:
                return False
            dropped = self._held.pop(oldest)
            dropped.content.cancel()
            self.resident_bytes -= dropped.num_bytes
        return True


def _readers(
    store: Store, config: StreamConfig, batch_type: type[Batch], teacher: str | None
) -> dict[str, ShardReader]:
    """A reader for every field of the batch."""
    points_stored = store.attributes.points_per_shape
    if config.num_points is not None and config.num_points > points_stored:
        raise AskedWrongly(
            f"data.num_points is {config.num_points}, but {store.url} holds {points_stored} points of each shape. "
            f"Lower it, or ingest the source again with more points."
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
        readers[name] = ShardReader(store, stored, config.num_points)
    return readers


def _check_memory(samples: _Samples, config: StreamConfig) -> None:
    """Refuses a window that does not fit: it would be read again and again, a thousand times slower."""
    needed_gib = samples.largest_window_bytes() / _GIB
    if needed_gib > config.memory_gib:
        raise AskedWrongly(
            f"A window of {samples.order.largest_window} shards of {samples.order.shard_rows} samples takes up to "
            f"{needed_gib:.3g} GiB of memory ({', '.join(samples.readers)}), and data.memory_gib allows "
            f"{config.memory_gib:g}. Raise data.memory_gib, or lower data.window_shards or data.num_points."
        )
