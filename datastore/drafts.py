"""Micro-batches on their way: what is read goes straight to its places in all of them.

The samples of a unit are spread over the micro-batches in which a lane comes by it. It is read when all of those have
memory: its rows then go from the socket, the file or the decoder to where a batch has them, without a copy between.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Int64

from datastore.batch import Batch
from datastore.buffers import Buffers, rounded
from datastore.errors import AskedWrongly
from datastore.layout import Rows
from datastore.order import Lanes, Order, drawn_views
from datastore.plans import Plan, Run, Shares, span_of
from datastore.shards import ShardReader, rows_as_bytes

_WINDOWS_AHEAD: Final = 4  # that a lane will come to are asked for, if there is memory for them
_GIB: Final = 2**30

BatchT = TypeVar("BatchT", bound=Batch)


class Samples:
    """Samples that a run reads: number i of the order is row `rows[i]` of the store."""

    def __init__(self, rows: Rows, readers: dict[str, ShardReader], order: Order) -> None:
        self.rows, self.readers, self.order = rows, readers, order

    def span(self, unit: int) -> tuple[int, int]:
        """First sample of a unit, and the one after its last."""
        first = unit * self.order.unit_samples
        return first, min(first + self.order.unit_samples, len(self.rows))

    def bytes_while_read(self, reader: ShardReader) -> int:
        """Memory that a unit of one field takes beside that of its rows in batches, until they are there, about."""
        first, last = self.rows.at(0), self.rows.at(len(self.rows) - 1)
        spread = (last - first + 1) / len(self.rows)
        unit_samples, chunk_rows = self.order.unit_samples, reader.chunk_rows
        decoded = rounded(unit_samples * reader.row_bytes)
        if spread == 1 and reader.lies_as_in_memory:
            # rows that this process does not need: where a lane begins or ends, or is another's too
            is_aligned = not first % chunk_rows and not unit_samples % chunk_rows
            return decoded if is_aligned else decoded + 2 * chunk_rows * reader.row_bytes
        if chunk_rows == 1:  # of many rows that are small
            return decoded + math.ceil(unit_samples * spread * reader.encoded_row_bytes)
        # beside what comes one chunk, unpacked; and chunks that are not of one unit alone, and rows of other splits in between
        is_aligned = spread == 1 and not first % chunk_rows and not unit_samples % chunk_rows
        num_rows = unit_samples if is_aligned else unit_samples * spread + 2 * chunk_rows
        return math.ceil(num_rows * reader.encoded_row_bytes) + chunk_rows * reader.stored_row_bytes

    def stretch_of(self, unit: int) -> tuple[int, int] | None:
        """The first row of a unit, and how many there are, if they are neighbours in the store."""
        start, end = self.span(unit)
        first = self.rows.at(start)
        return (first, end - start) if self.rows.at(end - 1) - first == end - 1 - start else None

    def rows_of(self, unit: int) -> Int64[np.ndarray, " r"]:
        """Rows of the store that a unit's samples are."""
        return self.rows[np.arange(*self.span(unit), dtype=np.int64)]


class FieldRows:
    """A field of a micro-batch, to be filled with rows as they lie in the store."""

    def __init__(
        self, rows: np.ndarray, tensor: torch.Tensor, views: Int64[np.ndarray, "m k"] | None, places: list[memoryview]
    ) -> None:
        self.rows, self.tensor = rows, tensor  # the same memory
        self.views = views  # of each row's first axis, only these
        self.places = places  # the rows' bytes, where rows are read straight into them


class Read:
    """A read that many drafts wait for, one after the other: all but the first find that it is over without a lock."""

    def __init__(self, answer: Future[None]) -> None:
        self._answer: Future[None] | None = answer

    def wait(self) -> None:
        """Returns when it is over; raises what went wrong."""
        if self._answer is not None:
            self._answer.result()
            self._answer = None


class Draft:
    """A micro-batch whose rows are on their way."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.fields: dict[str, FieldRows] = {}  # from the first read on
        self.reads: list[Read] = []


class Form(Generic[BatchT]):
    """What the micro-batches of a run are made of."""

    def __init__(
        self, batch_type: type[BatchT], samples: Samples, buffers: Buffers, num_views: int, pin_memory: bool
    ) -> None:
        self._batch_type = batch_type
        self._samples = samples
        self._buffers = buffers
        self._num_views = num_views
        self._pin_memory = pin_memory

    def takes_as_it_lies(self, reader: ShardReader) -> bool:
        """Whether rows can be read straight to their places."""
        return reader.lies_as_in_memory and not draws_while_copied(reader, self._batch_type)

    def allocate(self, draft: "Draft", name: str) -> None:
        """Gives one field of a micro-batch its memory."""
        reader = self._samples.readers[name]
        shape, views, stored_dtype = reader.row_shape, None, reader.stored.stored_dtype
        if draws_while_copied(reader, self._batch_type):
            views = self._drawn(draft)
            shape = (views.shape[1], *shape[1:])
        shape = (len(draft.plan.ids), *shape)
        if self._pin_memory and not reader.stored.field.bit_packed:
            dtype = torch.from_numpy(np.empty(0, stored_dtype)).dtype
            tensor = torch.empty(shape, dtype=dtype, pin_memory=True)  # torch uses such memory again, too
            rows = tensor.numpy()
            self._buffers.count(tensor, rows.nbytes)
        else:
            rows = self._buffers.empty(shape, stored_dtype)
            tensor = torch.from_numpy(rows)
        # Made once: threads that read touch no tensor, as each such touch lets go of Python and waits to have it again.
        places = rows_as_bytes(rows) if self.takes_as_it_lies(reader) else []
        draft.fields[name] = FieldRows(rows, tensor, views, places)

    def finished(self, draft: "Draft") -> BatchT:
        """The micro-batch, when all its rows are there."""
        plan, fields = draft.plan, {name: self._finished(draft, name) for name in self._samples.readers}
        return self._batch_type(ids=torch.from_numpy(plan.ids), seeds=torch.from_numpy(plan.seeds), **fields)

    def _finished(self, draft: "Draft", name: str) -> torch.Tensor:
        stored, field = self._samples.readers[name].stored, draft.fields[name]
        tensor = field.tensor
        if stored.field.bit_packed:
            tensor = torch.from_numpy(stored.decode(field.rows))
        if field.views is None and self._batch_type.views_drawn is not None and "v" in stored.field.axes:
            # rows whose views are not one after the other, bit-packed or small
            axis = stored.field.axes.index("v") + 1
            drawn = torch.from_numpy(self._drawn(draft))
            index = drawn.view(len(tensor), *[1] * (axis - 1), drawn.shape[1], *[1] * (tensor.ndim - axis - 1))
            tensor = tensor.take_along_dim(index, dim=axis)
        return tensor.pin_memory() if self._pin_memory else tensor

    def _drawn(self, draft: "Draft") -> Int64[np.ndarray, "m k"]:
        assert self._batch_type.views_drawn is not None
        return drawn_views(draft.plan.seeds, self._num_views, self._batch_type.views_drawn)


class Visit(NamedTuple):
    """One use of a unit: its samples in the micro-batches of the lane that it is in."""

    unit: int
    runs: list[tuple[Draft, Run]]


class Drafts:
    """Micro-batches on their way, within a bound. What is read goes straight to its places in all of them.

    The samples of a unit are spread over `span` micro-batches. So it is sent for when all of those are planned and have
    memory; how many do is all that has to be bounded.
    """

    def __init__(
        self,
        samples: Samples,
        memory: "Memory",
        plans: Iterator[Plan],
        form: Form[Any],
    ) -> None:
        self.units_read = 0
        self._samples = samples
        self._memory = memory
        self._plans = plans
        self._form = form
        self._coming: deque[Draft] = deque()
        self._num_sent = 0  # of those, whose units were sent for
        self._first = 0  # number of the first of those
        # by unit, who waits for samples of it: number of the draft, draft, places
        self._waiting: dict[int, deque[tuple[int, Draft, Run]]] = {}
        self._kept: dict[tuple[str, int], Future[np.ndarray]] = {}
        self._after_the_first: list[tuple[str, Visit]] = []
        self._failure: BaseException | None = None  # of a micro-batch: none comes after it
        self._pool = ThreadPoolExecutor(memory.num_readers, thread_name_prefix="stream-units")

    def next(self) -> Draft:
        """The next micro-batch, when all its rows are there; those after it are on their way, as far as there is room."""
        if self._failure is not None:
            raise self._failure
        # nothing shall share the machine with what the first batch waits for
        reach = self._memory.reach if self._first else self._memory.span
        while len(self._coming) < reach:
            self._expect(next(self._plans))
        self._send(reach - self._memory.span + 1)
        draft = self._coming.popleft()
        self._first += 1
        self._num_sent -= 1
        for read in draft.reads:
            try:
                read.wait()
            except BaseException as error:
                self._failure = error
                raise
        while self._after_the_first:
            self._begin(*self._after_the_first.pop())
        return draft

    def also(self, task: Callable[[], None]) -> None:
        """Runs it on a thread that reads."""
        self._pool.submit(task)

    def cancel(self) -> None:
        """Gives up reads that have not begun; whoever waits for one gets a CancelledError."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Waits for reads under way, and frees everything."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._coming.clear()
        self._waiting.clear()
        self._kept.clear()
        self._after_the_first.clear()

    def _expect(self, plan: Plan) -> None:
        draft, number = Draft(plan), self._first + len(self._coming)
        self._coming.append(draft)
        for run in plan.runs:
            self._waiting.setdefault(run.unit, deque()).append((number, draft, run))

    def _send(self, num_drafts: int) -> None:
        """Sends for the units of the first so many drafts that were not sent for yet."""
        while self._num_sent < num_drafts:
            number = self._first + self._num_sent
            for unit in dict.fromkeys(run.unit for run in self._coming[self._num_sent].plan.runs):
                waiting = self._waiting.get(unit)
                if waiting and waiting[0][0] == number:  # else it came with those before
                    self._read(self._visit(unit, number + self._memory.span))
            self._num_sent += 1

    def _visit(self, unit: int, end: int) -> Visit:
        """All who wait for a unit before a number: a lane that comes by much later reads it again."""
        waiting, runs = self._waiting[unit], []
        while waiting and waiting[0][0] < end:
            _, draft, run = waiting.popleft()
            runs.append((draft, run))
        if not waiting:
            del self._waiting[unit]
        return Visit(unit, runs)

    def _read(self, visit: Visit) -> None:
        is_new = False
        for name, reader in self._samples.readers.items():
            for draft, _ in visit.runs:
                if name not in draft.fields:
                    self._form.allocate(draft, name)
            if self._memory.keeps_all:
                if (name, visit.unit) not in self._kept:
                    is_new = True
                    rows = self._samples.rows_of(visit.unit)
                    self._kept[name, visit.unit] = self._pool.submit(reader.read, rows)
                # begun after the read of it, so that thread is there that it waits for
                self._await(self._pool.submit(self._copy_kept, name, visit), visit)
                continue
            is_new = True
            if self._first or reader.stored.field.codec == "none":
                self._begin(name, visit)
                continue
            # What is packed is small on its way: it is read twice, so that the first batch need not wait until what is
            # unpacked for those after it has found memory.
            first = self._coming[0]
            self._begin(name, Visit(visit.unit, [run for run in visit.runs if run[0] is first]))
            if after_it := [run for run in visit.runs if run[0] is not first]:
                self._after_the_first.append((name, Visit(visit.unit, after_it)))
        self.units_read += is_new

    def _begin(self, name: str, visit: Visit) -> None:
        self._await(self._pool.submit(self._read_field, name, visit), visit)

    def _await(self, answer: Future[None], visit: Visit) -> None:
        read = Read(answer)
        for draft in {id(draft): draft for draft, _ in visit.runs}.values():
            draft.reads.append(read)

    def _copy_kept(self, name: str, visit: Visit) -> None:
        self._copy(self._kept[name, visit.unit].result(), name, visit)

    def _read_field(self, name: str, visit: Visit) -> None:
        reader = self._samples.readers[name]
        stretch = self._samples.stretch_of(visit.unit) if self._form.takes_as_it_lies(reader) else None
        if stretch is not None:
            self._read_into_places(name, visit, *stretch)
        elif reader.chunk_rows > 1:
            self._copy_by_chunk(name, visit, self._samples.rows_of(visit.unit))
        else:
            self._copy(reader.read(self._samples.rows_of(visit.unit)), name, visit)

    def _copy_by_chunk(self, name: str, visit: Visit, rows: Int64[np.ndarray, " r"]) -> None:
        """Rows to their places, without memory for all of them on the way."""
        wanted: dict[int, list[tuple[FieldRows, int]]] = {}
        for draft, run in visit.runs:
            for place, row in enumerate(draft.plan.rows[run.start : run.end], start=run.start):
                wanted.setdefault(row, []).append((draft.fields[name], place))
        chosen = sorted(wanted)
        for first, chunk, places in self._samples.readers[name].read_by_chunk(rows[chosen]):
            for row, place_in_chunk in zip(chosen[first:], places, strict=False):
                for field, place in wanted[row]:
                    content = chunk[place_in_chunk]
                    field.rows[place] = content if field.views is None else content[field.views[place]]

    def _copy(self, content: np.ndarray, name: str, visit: Visit) -> None:
        """Rows of a unit to their places."""
        for draft, run in visit.runs:
            field, rows = draft.fields[name], np.array(draft.plan.rows[run.start : run.end])
            target = field.rows[run.start : run.end]
            if field.views is None:  # with another mode numpy would copy twice
                content.take(rows, axis=0, out=target, mode="clip")
            else:
                target[...] = content[rows[:, None], field.views[run.start : run.end]]

    def _read_into_places(self, name: str, visit: Visit, first_row: int, num_rows: int) -> None:
        places: list[memoryview | None] = [None] * num_rows
        num_wanted = 0
        for draft, run in visit.runs:
            wanted = slice(run.start, run.end)
            num_wanted += run.end - run.start
            for row, place in zip(draft.plan.rows[wanted], draft.fields[name].places[wanted], strict=True):
                places[row] = place
        again: list[tuple[int, memoryview]] = []
        if num_rows - places.count(None) < num_wanted:  # a padded epoch may have samples twice
            for draft, run in visit.runs:
                wanted = slice(run.start, run.end)
                of_run = zip(draft.plan.rows[wanted], draft.fields[name].places[wanted], strict=True)
                again += [(row, place) for row, place in of_run if place is not places[row]]
        self._samples.readers[name].read_into(first_row, places)
        for row, place in again:
            first = places[row]
            assert first is not None
            place[:] = first


def _batch_bytes(readers: Iterable[ShardReader], batch_type: type[Batch], num_samples: int) -> int:
    """Memory that a micro-batch takes."""
    found = 0
    for reader in readers:
        stored, shape = reader.stored, reader.row_shape
        if draws_while_copied(reader, batch_type):
            shape = (batch_type.views_drawn or 0, *shape[1:])
        row_bytes = math.prod(shape) * np.dtype(stored.stored_dtype).itemsize
        found += rounded(num_samples * row_bytes)
        if stored.field.bit_packed:
            found += rounded(8 * num_samples * row_bytes)
    return found


def draws_while_copied(reader: ShardReader, batch_type: type[Batch]) -> bool:
    """Whether only the drawn views of a row are copied: they lie one after the other."""
    return batch_type.views_drawn is not None and reader.stored.field.axes[:1] == ("v",)


@dataclass(frozen=True)
class Memory:
    """How the bound on memory is shared out."""

    span: int  # micro-batches that the samples of a unit are spread over
    reach: int  # micro-batches that may have memory before they are whole
    batches_ahead: int  # that are whole, and nobody took yet
    num_readers: int
    keeps_all: bool  # there is room for the whole corpus: nothing is read twice

    @classmethod
    def of(
        cls,
        samples: Samples,
        shares: Shares,
        lanes: Lanes,
        batch_type: type[Batch],
        bound_gib: float,
        prefetch_batches: int,
        num_readers: int,
    ) -> "Memory":
        """Room for the micro-batches that a unit is spread over; the rest in thirds, for what readers hold, for batches
        that are ready and for more that are on their way. Refuses windows that are spread over more than there is room for.

        Beside those there are the batches of the consumer: a step's, and those of the step before, which it lets go when
        it has the next.
        """
        order, whole, readers = samples.order, int(bound_gib * _GIB), list(samples.readers.values())
        span = span_of(order, shares, lanes)
        in_use = 1 + 2 * shares.accumulation
        batch = max(1, _batch_bytes(readers, batch_type, shares.micro_batch))
        reading = max(map(samples.bytes_while_read, readers), default=0)
        needed = (span + in_use + 1) * batch + reading
        if needed > whole:
            num_lanes = len(np.unique(lanes.lane_of(shares.offsets)))
            raise AskedWrongly(
                f"{num_lanes} lanes with windows of {order.largest_window} units of {order.unit_samples} samples take up "
                f"to {needed / _GIB:.3g} GiB of memory ({', '.join(samples.readers)}), batches of {shares.micro_batch} "
                f"included, and data.memory_gib allows {bound_gib:g}. Raise data.memory_gib, or lower data.lanes, "
                f"data.window_units, data.unit_samples or data.num_points."
            )
        third = (whole - needed) // 3
        # a step is taken whole: what of it is not ready then, the device waits for
        ahead = min(max(prefetch_batches, shares.accumulation), 1 + third // batch)
        num_readers = min(num_readers, 1 + third // max(1, reading))
        left = whole - (ahead + in_use) * batch - num_readers * reading
        corpus = order.num_units * sum(rounded(order.unit_samples * reader.row_bytes) for reader in readers)
        keeps_all = corpus + span * batch <= left
        reach = min((left - corpus * keeps_all) // batch, (1 + _WINDOWS_AHEAD) * span)
        return cls(span, reach, ahead, num_readers, keeps_all)
