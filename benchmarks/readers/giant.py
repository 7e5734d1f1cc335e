"""Opening and seeking a stream of a thousand million samples: seconds and memory at several positions.

    python -m readers.giant

Measured is everything of a stream that could grow with the corpus or the position, from the list of rows on: the order,
the lanes, the plans, and the first batch out of the threads. Values come from memory, not from a store of a hundred
terabytes. What a manifest of so many shards takes to parse is a figure of its own.
"""

import json
import statistics
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
from torch import Tensor

from datastore.batch import Batch
from datastore.buffers import Buffers
from datastore.drafts import Form, Memory, Samples
from datastore.layout import Manifest, Rows, ScopeManifest, ShardSums
from datastore.order import Lanes, Order
from datastore.plans import Shares
from datastore.schema import FIELDS
from datastore.stream import Stream, StreamConfig, unit_samples_of
from readers.memory import PeakMemory
from readers.payloads import BATCH

NUM_SAMPLES: Final = 10**9
_REPEATS: Final = 5
_SHARD_ROWS: Final = 1024


@dataclass(frozen=True)
class LabelBatch(Batch):
    """Numbers that say which row they belong to."""

    label: Tensor


class RowNumbers:
    """Reads a field that holds each row's own number, from nowhere."""

    stored = SimpleNamespace(field=FIELDS["label"], stored_dtype="int64")
    row_shape = ()
    row_bytes = stored_row_bytes = encoded_row_bytes = 8
    chunk_rows = 1
    takes_whole_rows, lies_as_in_memory = True, False

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The rows."""
        return rows


def open_at(start: int) -> float:
    """Seconds from the list of rows to the first batch."""
    config = StreamConfig()
    began = time.perf_counter()
    rows = Rows(np.array([[0, NUM_SAMPLES]], dtype=np.int64))
    readers: dict[str, Any] = {"label": RowNumbers()}
    order = Order(len(rows), unit_samples_of(readers.values()), config.window_units, seed=0)
    lanes, shares = Lanes(len(rows), BATCH, config.lanes), Shares(BATCH, BATCH, 0, 1)
    samples = Samples(rows, readers, order)
    fetcher: Any = SimpleNamespace(close=lambda: None, bytes_fetched=0, buffers=Buffers(2**20))
    memory = Memory.of(samples, shares, lanes, LabelBatch, config.memory_gib, config.prefetch_batches, num_readers=4)
    form = Form(LabelBatch, samples, fetcher.buffers, num_views=0, pin_memory=False)
    store: Any = None
    with Stream(store, fetcher, samples, shares, lanes, memory, form, start) as stream:
        ((batch,),) = stream.steps(1)
        taken = time.perf_counter() - began
    assert (batch.label == batch.ids).all() and len(batch.ids.unique()) == BATCH
    return taken


def measure() -> dict[str, Any]:
    """Figures of opening at the beginning, inside, and many epochs later."""
    positions = [position // BATCH * BATCH for position in (0, 10**6, NUM_SAMPLES // 2, 7 * NUM_SAMPLES)]
    with PeakMemory() as memory:
        seconds = {position: [open_at(position) for _ in range(_REPEATS)] for position in positions}
    num_shards = NUM_SAMPLES // _SHARD_ROWS
    sums = ShardSums(sizes=(85_000_000,) * num_shards, crc32=(2_000_000_000,) * num_shards)
    scope = ScopeManifest(block_ranges=((0, num_shards),), shards={"points": sums}, splits=((0, NUM_SAMPLES),))
    document = Manifest(number=1, scopes={"ingest": scope}).model_dump_json()
    began = time.perf_counter()
    Manifest.model_validate_json(document)
    return {
        "seconds_by_position": {str(position): statistics.median(taken) for position, taken in seconds.items()},
        "first_seconds": seconds[0][0],
        "peak_mb": memory.peak_bytes / 1e6,
        "manifest_mb": len(document) / 1e6,
        "manifest_seconds": time.perf_counter() - began,
    }


if __name__ == "__main__":
    print(json.dumps(measure()))
