"""Rows of one field, straight from its shard objects: ranges of bytes, checked, and decoded without zarr's machinery.

zarr-python delivers a tenth to a quarter of the rate at which the same bytes can be fetched. A shard of this store is
simple enough to take apart by hand: chunks of a few rows one after the other, each with its checksum behind it, then an
index of (offset, length) pairs, then that index's checksum. Neighbouring chunks are one request, so a reader that wants
a stretch of rows asks once for the index, which it keeps, and once for the stretch. `Store.read` gives the same rows by
plain zarr; a test holds the two against each other.
"""

import math
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Final

import numpy as np
from crc32c import crc32c
from jaxtyping import Int64, Shaped
from numcodecs import blosc, zstd

from datastore.errors import StoreError, Unavailable
from datastore.fetch import Budget, Fetcher, FetchFailed
from datastore.layout import Store, StoredField
from datastore.pieces import Pieces
from datastore.schema import Codec

_INDEX_ENTRY: Final = np.dtype([("offset", "<u8"), ("length", "<u8")])
_CHECKSUM_BYTES: Final = 4
_KEPT_BYTES: Final = 16 * 2**20
"""Of indices, and of chunks so small that a thousand rows share one: they are asked for again and again."""
_SMALL_CHUNK_BYTES: Final = 2**16
_NEAR_BYTES: Final = 2**20  # between chunks come along with them: they take less time than another request
_NEVER: Final = 0
"""When a checksum lets other threads have Python. A row takes some microseconds; to get Python back can take milliseconds."""

_DECOMPRESS: Final[dict[Codec, Callable[[memoryview, np.ndarray], object]]] = {
    "lz4": blosc.decompress,
    "zstd": zstd.decompress,
}


class ShardReader:
    """Reads rows of one field. `num_points`: only the first so many along the axis p, where the field has one."""

    def __init__(self, store: Store, stored: StoredField, fetcher: Fetcher, num_points: int | None = None) -> None:
        self.stored = stored
        self._url = store.url
        self._fetcher = fetcher
        self._sums = store.manifest.scope(stored.scope).shards[stored.field.name]
        self._kept = stored.stored_row_shape
        if num_points is not None and "p" in stored.field.axes:
            axis = stored.field.axes.index("p")
            assert axis == 0, f"{stored.path} has points on axis {axis} of a row"
            self._kept = (num_points, *stored.stored_row_shape[1:])
        self._item_bytes = np.dtype(stored.stored_dtype).itemsize
        self._indices = _Kept(_KEPT_BYTES)
        self._small_chunks = _Kept(_KEPT_BYTES)
        # looked up for every read
        self.row_bytes: Final = math.prod(self._kept) * self._item_bytes  # memory that one row takes
        self.takes_whole_rows: Final = self._kept == stored.stored_row_shape  # whether all of a row is kept
        self.stored_row_bytes: Final = math.prod(stored.stored_row_shape) * self._item_bytes  # and all of it
        chunk_bytes = stored.chunk_rows * self.stored_row_bytes
        # neighbours that are decoded together whether asked for or not; 1 where that costs nothing
        self.chunk_rows: Final = stored.chunk_rows if chunk_bytes > _SMALL_CHUNK_BYTES else 1
        # whether neighbours can be read straight to where they belong
        self.lies_as_in_memory: Final = stored.field.codec == "none" and self.takes_whole_rows and self.chunk_rows > 1

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of a row that `read` returns: as it lies in the store, bit-packed where it is."""
        return self._kept

    @property
    def _dtype(self) -> "np.dtype[Any]":
        return np.dtype(self.stored.stored_dtype).newbyteorder("<")

    @property
    def encoded_row_bytes(self) -> float:
        """What a row takes as it lies, about: as in the first shard that is there."""
        size = next(filter(None, self._sums.sizes), 0)
        return size / min(self.stored.shard_rows, self.stored.num_rows)

    def read(self, rows: Int64[np.ndarray, " r"]) -> Shaped[np.ndarray, "r ..."]:
        """The given rows, ascending, as they lie in the store.

        StoreError where they are damaged or missing, Unavailable where they cannot be had for now.
        """
        with self._fetcher.turn():
            result = self._fetcher.buffers.empty((len(rows), *self._kept), self._dtype)
            if self.lies_as_in_memory and len(rows) and int(rows[-1] - rows[0]) + 1 == len(rows):
                self.read_into(int(rows[0]), rows_as_bytes(result))
                return result
            for shard, start, end in self._by_shard(rows):
                self._read_shard(shard, rows[start:end] - shard * self.stored.shard_rows, result[start:end])
        return result

    def read_into(self, first_row: int, places: Sequence[memoryview | None]) -> None:
        """As `read`, of neighbours that lie as in memory, each into memory of its own; None: it is not needed."""
        shard_rows = self.stored.shard_rows
        with self._fetcher.turn():
            start = 0
            while start < len(places):
                shard, in_shard = divmod(first_row + start, shard_rows)
                end = min(len(places), start + shard_rows - in_shard)
                self._read_into(shard, in_shard, places[start:end])
                start = end

    def _by_shard(self, rows: Int64[np.ndarray, " r"]) -> Iterator[tuple[int, int, int]]:
        """Each shard that holds some of the rows, with the first of them and the one after its last."""
        for start, end in _runs(rows // self.stored.shard_rows):
            yield int(rows[start] // self.stored.shard_rows), start, end

    def read_by_chunk(
        self, rows: Int64[np.ndarray, " r"]
    ) -> Iterator[tuple[int, Shaped[np.ndarray, "c ..."], list[int]]]:
        """As `read`, chunk by chunk, each unpacked to the same memory: how many of the rows came before, the chunk, and the
        places in it of those that come with it.
        """
        with self._fetcher.turn():
            decoded = self._fetcher.buffers.empty((self.stored.chunk_rows, *self.stored.stored_row_shape), self._dtype)
            for shard, first, end in self._by_shard(rows):
                in_shard = rows[first:end] - shard * self.stored.shard_rows
                for content, start, places in self._chunks_of(shard, in_shard):
                    self._decode(content, decoded)
                    yield (
                        first + start,
                        decoded if self.takes_whole_rows else decoded[:, : self._kept[0]],
                        places.tolist(),
                    )

    def _read_shard(self, shard: int, rows: Int64[np.ndarray, " r"], result: np.ndarray) -> None:
        """Rows by their place in one shard. Only chunks that hold one of them are fetched and decoded."""
        for content, start, places in self._chunks_of(shard, rows):
            end = start + len(places)
            if self.takes_whole_rows and len(places) == self.stored.chunk_rows:
                self._decode(content, result[start:end])
                continue
            decoded = self._fetcher.buffers.empty((self.stored.chunk_rows, *self.stored.stored_row_shape), self._dtype)
            self._decode(content, decoded)
            result[start:end] = (decoded if self.takes_whole_rows else decoded[:, : self._kept[0]])[places]

    def _chunks_of(
        self, shard: int, rows: Int64[np.ndarray, " r"]
    ) -> Iterator[tuple[memoryview, int, Int64[np.ndarray, " c"]]]:
        """Chunks of a shard that hold some of the rows: encoded, the number of the first of those, and their places in it."""
        chunk_of_row, places = np.divmod(rows, self.stored.chunk_rows)
        wanted = list(_runs(chunk_of_row))
        encoded = self._encoded(shard, [int(chunk_of_row[start]) for start, _ in wanted])
        for content, (start, end) in zip(encoded, wanted, strict=True):
            yield content, start, places[start:end]

    def _read_into(self, shard: int, first_row: int, places: Sequence[memoryview | None]) -> None:
        """Neighbouring rows of one shard. Chunks that they share with others come whole, as their checksums need all of it."""
        chunk_rows, name = self.stored.chunk_rows, self.stored.shard_name(shard)
        first, last = first_row // chunk_rows, (first_row + len(places) - 1) // chunk_rows
        num_chunks = last + 1 - first
        before = first_row - first * chunk_rows
        every = [*[None] * before, *places, *[None] * (num_chunks * chunk_rows - before - len(places))]
        rows = self._with_spare_memory(every)
        sums = memoryview(bytearray(_CHECKSUM_BYTES * num_chunks))
        pieces: list[memoryview] = []
        for chunk in range(num_chunks):
            pieces += rows[chunk * chunk_rows : (chunk + 1) * chunk_rows]
            pieces.append(sums[_CHECKSUM_BYTES * chunk : _CHECKSUM_BYTES * (chunk + 1)])

        def problem() -> str | None:
            for chunk, expected in enumerate(np.frombuffer(sums, "<u4").tolist()):
                found = 0
                for row in rows[chunk * chunk_rows : (chunk + 1) * chunk_rows]:
                    found = crc32c(row, found, _NEVER)
                if found != expected:
                    return _say_checksums(found, expected)
            return None

        with self._naming(shard, name):
            budget = self._fetcher.budget()
            start = self._start_of_raw(shard, self._index(shard, name, budget), first, last)
            self._fetcher.fill(Pieces(pieces), name, start, problem, self._version(shard), budget)

    def _start_of_raw(self, shard: int, index: memoryview, first: int, last: int) -> int:
        """Where the first of some neighbouring chunks lies that have nothing between them, and are not packed.

        Without numpy, as there may be many of them a second.
        """
        num_chunks, size = last + 1 - first, self.stored.chunk_rows * self.row_bytes + _CHECKSUM_BYTES
        found = struct.unpack_from(f"<{2 * num_chunks}Q", index, first * _INDEX_ENTRY.itemsize)
        start: int = found[0]
        if (
            found[0::2] != tuple(range(start, start + num_chunks * size, size))
            or found[1::2] != (size,) * num_chunks
            or start + num_chunks * size > self._sums.sizes[shard]
        ):
            raise _displaced(first, last)
        return start

    def _with_spare_memory(self, places: Sequence[memoryview | None]) -> list[memoryview]:
        """Places for rows, those that nobody needs too."""
        found = [place for place in places if place is not None]
        if len(found) == len(places):
            return found
        spare = self._fetcher.buffers.empty(((len(places) - len(found)) * self.row_bytes,), np.uint8).data
        starts = iter(range(0, len(spare), self.row_bytes))
        found = []
        for place in places:
            if place is None:
                start = next(starts)
                place = spare[start : start + self.row_bytes]
            found.append(place)
        return found

    def _encoded(self, shard: int, chunks: list[int]) -> list[memoryview]:
        """Chunks of a shard, ascending, as they lie there, each checked."""
        name = self.stored.shard_name(shard)
        with self._naming(shard, name):
            budget = self._fetcher.budget()  # for trouble with the index and the chunks together
            index = self._index(shard, name, budget)
            entries = np.frombuffer(index, _INDEX_ENTRY, len(index) // _INDEX_ENTRY.itemsize)[chunks]
            begins, ends = entries["offset"], entries["offset"] + entries["length"]
            if (ends > self._sums.sizes[shard]).any() or (ends < begins + np.uint64(_CHECKSUM_BYTES)).any():
                raise _displaced(chunks[0], chunks[-1])
            encoded: list[memoryview] = []
            for stretch in _stretches(list(zip(begins.tolist(), ends.tolist(), strict=True))):
                encoded += self._chunks(shard, name, stretch, budget)
        return encoded

    @contextmanager
    def _naming(self, shard: int, name: str) -> Iterator[None]:
        """Says of what cannot be fetched where it lies, and what to do."""
        stored = self.stored
        try:
            yield
        except FetchFailed as error:
            first = shard * stored.shard_rows
            last = min(first + stored.shard_rows, stored.num_rows) - 1
            failure = f"{self._url}/{name} (rows {first} to {last} of {stored.path!r}) cannot be read: {error}"
            if error.may_pass:
                raise Unavailable(
                    f"{failure}. Check the network and the server, then start the run again: it goes on from its last "
                    f"checkpoint. data.fetch.retry_seconds is how long such trouble is waited out."
                ) from error
            raise StoreError(
                f"{failure}. `viewpoint inspect {self._url} --verify` lists everything that is damaged."
            ) from error

    def _index(self, shard: int, name: str, budget: Budget) -> memoryview:
        """Where each chunk of a shard lies, and a checksum."""
        found = self._indices.get(shard)
        if found is None:
            size = self._sums.sizes[shard]
            num_chunks = self.stored.shard_rows // self.stored.chunk_rows
            start = size - _CHECKSUM_BYTES - num_chunks * _INDEX_ENTRY.itemsize
            found = self._fetcher.fetch(name, start, size, _checksum_problem, self._version(shard), budget)
            self._indices.put(shard, found)
        return found

    def _chunks(self, shard: int, name: str, bounds: list[tuple[int, int]], budget: Budget) -> list[memoryview]:
        """Chunks that lie near each other, as they are encoded, each checked; they come in one request."""
        start, end = bounds[0][0], bounds[-1][1]
        places = [(first - start, last - start) for first, last in bounds]
        key = (shard, tuple(bounds))  # what lies between them is not checked
        content = self._small_chunks.get(key)
        if content is None:

            def problem(found: memoryview) -> str | None:
                return next(filter(None, (_checksum_problem(found[first:last]) for first, last in places)), None)

            content = self._fetcher.fetch(name, start, end, problem, self._version(shard), budget)
            if len(content) <= _SMALL_CHUNK_BYTES:
                self._small_chunks.put(key, content)
        return [content[first : last - _CHECKSUM_BYTES] for first, last in places]

    def _version(self, shard: int) -> str:
        """What tells a shard from another one that had its name before."""
        return f"{self._sums.sizes[shard]}-{self._sums.crc32[shard]:08x}"

    def _decode(self, encoded: memoryview, target: np.ndarray) -> None:
        if self.stored.field.codec == "none":
            target[...] = np.frombuffer(encoded, target.dtype).reshape(target.shape)
        else:
            _DECOMPRESS[self.stored.field.codec](encoded, target)


def rows_as_bytes(rows: np.ndarray) -> list[memoryview]:
    """The memory of each row."""
    content, size = rows.reshape(-1).view(np.uint8).data, rows.nbytes // len(rows)
    return [content[at : at + size] for at in range(0, len(content), size)]


class _Kept:
    """Contents by key, within a bound; what was used longest ago goes first. Threads share it."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._num_bytes = 0
        self._contents: OrderedDict[object, memoryview] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: object) -> memoryview | None:
        """What was put, if it is still there."""
        with self._lock:
            found = self._contents.get(key)
            if found is not None:
                self._contents.move_to_end(key)
            return found

    def put(self, key: object, content: memoryview) -> None:
        """Keeps it for now."""
        with self._lock:
            if key in self._contents:
                return
            self._contents[key] = content
            self._num_bytes += len(content)
            while self._num_bytes > self._limit_bytes:
                _, dropped = self._contents.popitem(last=False)
                self._num_bytes -= len(dropped)


def _checksum_problem(content: memoryview) -> str | None:
    """What is wrong with bytes that end in their own crc32c."""
    expected = int.from_bytes(content[-_CHECKSUM_BYTES:], "little")
    found = crc32c(content[:-_CHECKSUM_BYTES])
    return None if found == expected else _say_checksums(found, expected)


def _say_checksums(found: int, expected: int) -> str:
    return f"its bytes have checksum {found:08x} and say {expected:08x}"


def _displaced(first: int, last: int) -> FetchFailed:
    return FetchFailed(
        f"its index has no chunks {first} to {last} in their places, which its manifest promises", may_pass=False
    )


def _runs(values: Int64[np.ndarray, " r"]) -> list[tuple[int, int]]:
    """Start and end of each run of equal values."""
    bounds = [0, *(np.flatnonzero(np.diff(values)) + 1), len(values)]
    return [(int(start), int(end)) for start, end in pairwise(bounds) if end > start]


def _stretches(bounds: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Chunks by first byte and the one after the last, cut where the next is far away, or lies before."""
    found: list[list[tuple[int, int]]] = []
    for begin, end in bounds:
        if found and 0 <= begin - found[-1][-1][1] <= _NEAR_BYTES:
            found[-1].append((begin, end))
        else:
            found.append([(begin, end)])
    return found
