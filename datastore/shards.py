"""Rows of one shard, straight from its object: checked against the manifest, and decoded without zarr's machinery.

zarr-python delivers a tenth to a quarter of the rate at which the same bytes can be fetched. A shard of this store is
simple enough to take apart by hand: chunks of a few rows one after the other, then an index of (offset, length) pairs,
then that index's checksum. `Store.read` gives the same rows by plain zarr; a test holds the two against each other.
"""

import math
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Final

import google_crc32c
import numpy as np
from jaxtyping import Int64, Shaped
from numcodecs import blosc, zstd

from datastore.errors import StoreError
from datastore.layout import Store, StoredField
from datastore.schema import Codec

_INDEX_ENTRY: Final = np.dtype([("offset", "<u8"), ("length", "<u8")])
_CHECKSUM_BYTES: Final = 4
_READS: Final = 2
"""Transfers go wrong more often than disks do: what does not match its checksum is read once more before it counts."""

_DECOMPRESS: Final[dict[Codec, Callable[[memoryview, np.ndarray], object]]] = {
    "lz4": blosc.decompress,
    "zstd": zstd.decompress,
}


class ShardReader:
    """Reads shards of one field. `num_points`: only the first so many along the axis p, where the field has one."""

    def __init__(self, store: Store, stored: StoredField, num_points: int | None = None) -> None:
        self.stored = stored
        self.bytes_read = 0
        self.shards_read = 0
        self._counting = threading.Lock()  # threads share a reader
        self._folder = store.folder
        self._sums = store.manifest.scope(stored.scope).shards[stored.field.name]
        self._kept = stored.stored_row_shape
        if num_points is not None and "p" in stored.field.axes:
            axis = stored.field.axes.index("p")
            assert axis == 0, f"{stored.path} has points on axis {axis} of a row"
            self._kept = (num_points, *stored.stored_row_shape[1:])

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of a row that `read` returns: as it lies in the store, bit-packed where it is."""
        return self._kept

    @property
    def row_bytes(self) -> int:
        """Memory that one row takes."""
        return math.prod(self._kept) * np.dtype(self.stored.stored_dtype).itemsize

    def read(self, shard: int, rows: Int64[np.ndarray, " r"]) -> Shaped[np.ndarray, "r ..."]:
        """The given rows, ascending and all of this shard, as they lie in the store."""
        content = self._verified(shard)
        return self._decode(content, rows - shard * self.stored.shard_rows, self.stored.shard_name(shard))

    def _verified(self, shard: int) -> bytes:
        """A shard's object as the manifest knows it."""
        name = self.stored.shard_name(shard)
        expected_bytes, expected_sum = self._sums.sizes[shard], self._sums.crc32c[shard]
        found = ""
        for _ in range(_READS):
            try:
                content = self._folder.read(name)
            except FileNotFoundError:
                found = "it is missing"
                continue
            with self._counting:
                self.bytes_read += len(content)
                self.shards_read += 1
            found_sum = int(google_crc32c.value(content))
            if (len(content), found_sum) == (expected_bytes, expected_sum):
                return content
            found = f"it has {len(content):,} bytes with checksum {found_sum:08x}"
        first = shard * self.stored.shard_rows
        last = min(first + self.stored.shard_rows, self.stored.num_rows) - 1
        raise StoreError(
            f"{self._folder.url}/{name} (rows {first} to {last} of {self.stored.path!r}) is damaged: {found}, in "
            f"{_READS} reads; its manifest says {expected_bytes:,} bytes with checksum {expected_sum:08x}. "
            f"`viewpoint inspect {self._folder.url} --verify` lists everything that is damaged."
        )

    def _decode(self, content: bytes, rows: Int64[np.ndarray, " r"], name: str) -> Shaped[np.ndarray, "r ..."]:
        """Rows by their place in the shard. Only chunks that hold one of them are decoded."""
        stored = self.stored
        dtype = np.dtype(stored.stored_dtype).newbyteorder("<")
        result = np.empty((len(rows), *self._kept), dtype=dtype)
        whole_rows = self._kept == stored.stored_row_shape
        index = self._index(content)
        chunks, starts = np.unique(rows // stored.chunk_rows, return_index=True)
        for chunk, (start, end) in zip(chunks, pairwise([*starts, len(rows)]), strict=True):
            offset, length = (int(number) for number in index[chunk])
            if offset + length > len(content):  # also how the index marks a chunk that is not there
                raise StoreError(
                    f"{self._folder.url}/{name} holds no rows {chunk * stored.chunk_rows} and following, which its "
                    f"manifest says it does. Ingest the source again into a new store."
                )
            # the chunk's own checksum, its last bytes, repeats what the whole object's has shown
            encoded = memoryview(content)[offset : offset + length - _CHECKSUM_BYTES]
            if whole_rows and end - start == stored.chunk_rows:
                self._decode_chunk(encoded, result[start:end])
                continue
            decoded = np.empty((stored.chunk_rows, *stored.stored_row_shape), dtype=dtype)
            self._decode_chunk(encoded, decoded)
            wanted = rows[start:end] - chunk * stored.chunk_rows
            result[start:end] = (decoded if whole_rows else decoded[:, : self._kept[0]])[wanted]
        return result

    def _index(self, content: bytes) -> np.ndarray:
        num_chunks = self.stored.shard_rows // self.stored.chunk_rows
        start = len(content) - _CHECKSUM_BYTES - num_chunks * _INDEX_ENTRY.itemsize
        return np.frombuffer(content, _INDEX_ENTRY, num_chunks, offset=start)

    def _decode_chunk(self, encoded: memoryview, target: np.ndarray) -> None:
        if self.stored.field.codec == "none":
            target[...] = np.frombuffer(encoded, target.dtype).reshape(target.shape)
        else:
            _DECOMPRESS[self.stored.field.codec](encoded, target)
