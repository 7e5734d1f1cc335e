"""The stream delivers each sample once an epoch, the same for any world and after any resume, within its memory."""

import dataclasses
import itertools
import json
import math
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Bool, Float, Int16, Int64, UInt8
from torch import Tensor

from datastore import stream as stream_module
from datastore.batch import Batch
from datastore.drafts import Drafts, Memory, Visit
from datastore.errors import AskedWrongly, MissingField, StoreError
from datastore.fetch import Fetcher, FetchFailed
from datastore.layout import Rows, TeacherAttributes, create_store, create_teacher, open_store
from datastore.order import Lanes, Order, drawn_views, sample_seeds
from datastore.plans import Shares, plans_of
from datastore.schema import FIELDS as SCHEMA
from datastore.shards import ShardReader
from datastore.stream import Stream, StreamConfig, open_stream, unit_samples_of
from datastore.write import publish
from tests.stores import small_attributes, small_teacher, write_blocks, write_small_store

NUM_ROWS = 230  # blocks of 16 rows; two thirds are in split `train`, scattered over all blocks
GLOBAL_BATCH = 24
FIELDS = ("points", "views", "visibility", "label", "split", "id")
SPLITS = ("train", "test", "validation")
TEACHER = "teachers/teacher@feedc0de"
GIB = 2**30


@dataclass(frozen=True)
class IdBatch(Batch):
    """Nothing but ids and seeds."""


@dataclass(frozen=True)
class LabelBatch(Batch):
    label: Int64[Tensor, " b"]


@dataclass(frozen=True)
class PointsBatch(Batch):
    points: Float[Tensor, "b p 3"]


@dataclass(frozen=True)
class ViewsBatch(Batch):
    views: UInt8[Tensor, "b v h w 3"]


@dataclass(frozen=True)
class WholeBatch(Batch):
    points: Float[Tensor, "b p 3"]
    visibility: Bool[Tensor, "b p v"]
    views: UInt8[Tensor, "b v h w 3"]
    label: Int64[Tensor, " b"]
    view_features: Float[Tensor, "b v d"]


@dataclass(frozen=True)
class DrawnBatch(Batch):
    points: Float[Tensor, "b p 3"]
    view_pixels: Int16[Tensor, "b p v 2"]
    view_tokens: Float[Tensor, "b v t d"]


@dataclass(frozen=True)
class IdTextBatch(Batch):
    id: Tensor


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("stream") / "store")
    write_small_store(folder, small_attributes(NUM_ROWS, block_rows=16, splits=SPLITS), FIELDS)
    add_teacher(folder)
    return folder


def add_teacher(url: str, weights_hash: str = "feedc0de0001") -> None:
    store = open_store(url)
    write_blocks(store, range(store.num_blocks), create_teacher(store, small_teacher(weights_hash=weights_hash)))
    publish(store)


def stream_of(url: str | None, batch_type: type[Batch] = LabelBatch, **changes: Any) -> Stream[Any]:
    # units as small as the store's blocks, and fewer lanes than a batch has places
    settings = {"unit_samples": 16, "lanes": 5}
    settings |= {name: changes.pop(name) for name in set(changes) & set(StreamConfig.model_fields)}
    arguments: dict[str, Any] = {
        "teacher": None, "global_batch": GLOBAL_BATCH, "micro_batch": 4, "rank": 0, "world_size": 1, "seed": 0,
    }  # fmt: skip
    return open_stream(StreamConfig(store_url=url, **settings), batch_type, **(arguments | changes))


def ids_of(url: str, num_steps: int, **changes: Any) -> np.ndarray:
    """Ids by step and place in what one rank reads."""
    with stream_of(url, **changes) as stream:
        steps = [torch.cat([batch.ids for batch in step]).numpy() for step in stream.steps(num_steps)]
    return np.stack(steps)


def global_ids(url: str, num_steps: int, world_size: int, micro_batch: int, **changes: Any) -> np.ndarray:
    """Ids by step and place in the global batch, put together from what every rank reads."""
    ranks = [
        ids_of(url, num_steps, rank=rank, world_size=world_size, micro_batch=micro_batch, **changes)
        for rank in range(world_size)
    ]
    return np.concatenate(ranks, axis=1)  # each rank has its part of every batch


@pytest.mark.parametrize(
    ("world_size", "micro_batch"), [(1, 24), (2, 12), (2, 3), (3, 8), (3, 2), (4, 6), (6, 2), (6, 4)]
)
def test_a_global_batch_holds_the_same_samples_in_the_same_order_for_any_world(
    url: str, world_size: int, micro_batch: int
) -> None:
    alone = ids_of(url, 15)  # two epochs and a half
    assert np.array_equal(global_ids(url, 15, world_size, micro_batch), alone)


def test_an_epoch_delivers_every_sample_once_but_for_the_last_incomplete_batch(url: str) -> None:
    train = open_store(url).rows("train")
    with stream_of(url) as stream:
        assert stream.num_samples == len(train)
        assert stream.steps_per_epoch == len(train) // GLOBAL_BATCH
        num_steps = stream.steps_per_epoch
    epochs = ids_of(url, 40 * num_steps).reshape(40, -1)
    for ids in epochs:
        assert len(np.unique(ids)) == num_steps * GLOBAL_BATCH
        assert set(ids) <= set(train)
    assert len(train) % GLOBAL_BATCH
    assert set(epochs.ravel()) == set(train), "what one epoch drops, another delivers"
    assert all((epochs[0] != ids).any() for ids in epochs[1:])


@given(st.integers(0, 40), st.sampled_from([1, 2, 3, 4, 6]), st.integers(1, 4), st.integers(1, 30))
@settings(max_examples=15, deadline=None)
def test_resuming_at_any_step_with_any_world_goes_on_where_the_run_stopped(
    url: str, step: int, world_size: int, window_units: int, lanes: int
) -> None:
    mixture = {"window_units": window_units, "lanes": lanes}
    straight = ids_of(url, step + 3, **mixture)
    resumed = global_ids(url, 3, world_size, 4 if world_size < 4 else 2, start=step * GLOBAL_BATCH, **mixture)
    assert np.array_equal(resumed, straight[step:])


EVERY_WORLD = (1, 2, 3, 4, 7, 16)
SHARED_BATCH = 336  # each of them has an equal part of it, which can be cut into one, three or seven micro-batches


@given(
    st.sampled_from(EVERY_WORLD),
    st.sampled_from([1, 3, 7]),
    st.integers(SHARED_BATCH, 10**6),
    st.integers(0, 10**9),
    st.integers(1, 300),
    st.integers(1, 5),
    st.integers(1, 400),
    st.sampled_from(["drop", "pad"]),
    st.integers(0, 2**40),
)
@settings(max_examples=1000, deadline=None)
def test_at_any_position_every_world_plans_the_same_samples_in_the_same_order(
    world: int, accumulation: int, num_samples: int, step: int, unit_samples: int, window_units: int, num_lanes: int,
    remainder: Any, seed: int,
) -> None:  # fmt: skip
    order = Order(num_samples, unit_samples, window_units, seed)
    lanes = Lanes(num_samples, SHARED_BATCH, num_lanes, remainder)
    epoch, batch = divmod(step, lanes.num_batches)
    alone = order.samples(epoch, lanes.positions(np.array(batch), np.arange(SHARED_BATCH)))
    assert len(np.unique(alone)) == SHARED_BATCH or lanes.num_batches * SHARED_BATCH > num_samples
    rank = seed % world
    if SHARED_BATCH // world % accumulation:
        accumulation = 1
    shares = Shares(SHARED_BATCH, SHARED_BATCH // world // accumulation, rank, world)
    with pytest.MonkeyPatch.context() as patch:  # fewer at a time: it looks ahead, and the test does not
        patch.setattr("datastore.plans._PLANNED_PLACES", 1)
        plans = list(
            itertools.islice(plans_of(Rows(np.array([[0, num_samples]])), order, lanes, shares, step), accumulation)
        )
    mine = slice(rank * SHARED_BATCH // world, (rank + 1) * SHARED_BATCH // world)
    assert np.array_equal(np.concatenate([plan.ids for plan in plans]), alone[mine])
    assert {plan.epoch for plan in plans} == {epoch}


@dataclass(frozen=True)
class ShapeBatch(Batch):
    points: Float[Tensor, "b p 3"]
    visibility: Bool[Tensor, "b p v"]
    label: Int64[Tensor, " b"]


@pytest.fixture(scope="module")
def shapes_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """More rows than a batch for sixteen processes."""
    folder = str(tmp_path_factory.mktemp("shapes") / "store")
    fields = ["points", "visibility", "label", "split", "id"]
    write_small_store(folder, small_attributes(900, block_rows=64), fields)
    return folder


@contextmanager
def reading_into_places() -> Iterator[None]:
    """Within the block, rows go from the store straight to their places in batches, as those of large corpora do."""

    def counted(*arguments: Any) -> None:
        nonlocal times
        times += 1
        read_into(*arguments)

    read_into, times = ShardReader.read_into, 0
    with reading_anew(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("datastore.shards._SMALL_CHUNK_BYTES", 0)
        patch.setattr(ShardReader, "read_into", counted)
        yield
    assert times, "there were such rows"


@contextmanager
def reading_anew() -> Iterator[None]:
    """Within the block, nothing is kept from one visit to the next, as in large corpora."""

    def of(*arguments: Any) -> Memory:
        return dataclasses.replace(memory_of(*arguments), keeps_all=False)

    memory_of = Memory.of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Memory, "of", of)
        yield


@pytest.fixture(scope="module")
def neighbours_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same as `shapes_url`, of one split: its rows lie side by side."""
    folder = str(tmp_path_factory.mktemp("neighbours") / "store")
    fields = ("points", "visibility", "label", "split", "id")
    write_small_store(folder, small_attributes(900, block_rows=64, splits=("train",)), fields)
    return folder


@pytest.mark.parametrize("remainder", ["drop", "pad"])
@pytest.mark.parametrize(("lanes", "window_units"), [(1, 1), (5, 1), (3, 4)])
@pytest.mark.parametrize("world", [1, 3])
def test_rows_that_go_straight_to_their_places_are_those_of_the_store(
    neighbours_url: str, world: int, lanes: int, window_units: int, remainder: str
) -> None:
    stored = {name: open_store(neighbours_url).read(name, range(900)) for name in ("points", "visibility", "label")}
    settings = {"global_batch": 42, "micro_batch": 7, "lanes": lanes, "window_units": window_units, "unit_samples": 24}
    for start in (0, (10**6 + 7) * 42):
        with reading_into_places(), ExitStack() as stack:
            where = {"world_size": world, "start": start, "remainder": remainder}
            streams = [
                stack.enter_context(stream_of(neighbours_url, ShapeBatch, rank=rank, **where, **settings))
                for rank in range(world)
            ]
            parts = [[batch for step in stream.steps(30) for batch in step] for stream in streams]
        ids = [torch.cat([batch.ids for batch in part]) for part in parts]
        with stream_of(neighbours_url, ShapeBatch, start=start, remainder=remainder, **settings) as kept:
            alone = torch.stack([torch.cat([batch.ids for batch in step]) for step in kept.steps(30)])
        assert torch.equal(torch.cat([part.view(30, -1) for part in ids], dim=1), alone)
        for part in parts:
            for batch in part:
                for name, rows in stored.items():
                    assert np.array_equal(getattr(batch, name), rows[batch.ids]), name


@given(
    st.sampled_from(EVERY_WORLD),
    st.integers(0, 10**6),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 99),
)
@settings(max_examples=12, deadline=None)
def test_whatever_world_and_threads_read_on_from_any_position_the_bytes_are_the_same(
    shapes_url: str, world: int, step: int, num_readers: int, prefetch: int, seed: int
) -> None:
    store = open_store(shapes_url)
    stored = {name: store.read(name, range(900)) for name in ("points", "visibility", "label")}

    def part(rank: int, world: int) -> list[ShapeBatch]:
        settings = {"prefetch_batches": prefetch, "global_batch": SHARED_BATCH, "micro_batch": SHARED_BATCH // world}
        where = {"rank": rank, "world_size": world, "seed": seed, "start": step * SHARED_BATCH}
        with stream_of(shapes_url, ShapeBatch, **where, **settings) as stream:
            return [batch for step in stream.steps(2) for batch in step]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_module, "_FEWEST_LOCAL_READERS", num_readers)
        patch.setattr(stream_module, "_MOST_LOCAL_READERS", num_readers)
        alone, shared = part(0, 1), [part(rank, world) for rank in range(world)]
    for number, whole in enumerate(alone):
        for name in ("ids", "seeds", *stored):
            parts = torch.cat([getattr(batches[number], name) for batches in shared])
            assert torch.equal(parts, getattr(whole, name))
        for name, rows in stored.items():
            assert np.array_equal(getattr(whole, name), rows[whole.ids])


def test_a_thousand_million_samples_open_and_seek_in_little_memory_at_any_position() -> None:
    def opened(step: int) -> float:
        began = time.process_time()
        rows = Rows(np.array([[0, 10**9 + 5]], dtype=np.int64))
        order, lanes = Order(len(rows), 64, 1, seed=0), Lanes(len(rows), 64, 16)
        plan = next(plans_of(rows, order, lanes, Shares(64, 64, 0, 1), step))
        assert len(np.unique(plan.ids)) == 64
        return time.process_time() - began

    opened(0)
    tracemalloc.start()
    first, far = min(opened(0) for _ in range(5)), min(opened(step) for step in (10**7, 10**9, 10**11, 7))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 5e6
    assert far < 3 * first + 0.01
    assert far < 0.5


def test_a_step_far_away_costs_what_the_first_costs(url: str) -> None:
    started = time.perf_counter()
    ids = ids_of(url, 2, start=GLOBAL_BATCH * 10**12)
    assert ids.shape == (2, GLOBAL_BATCH)
    assert time.perf_counter() - started < 5


def test_batches_hold_what_the_store_holds(url: str) -> None:
    store = open_store(url)
    paths = {name: name if name in store.fields else f"{TEACHER}/{name}" for name in WholeBatch.store_fields()}
    stored = {name: store.read(path, range(NUM_ROWS)) for name, path in paths.items()}
    with stream_of(url, WholeBatch, teacher="teacher", seed=7) as stream:
        assert stream.corpus == store.corpus_facts
        for number, step in enumerate(stream.steps(2 * stream.steps_per_epoch + 1)):
            for batch in step:
                ids = batch.ids.numpy()
                assert np.array_equal(batch.seeds, sample_seeds(7, number // stream.steps_per_epoch, ids))
                for name, rows in stored.items():
                    found = getattr(batch, name).numpy()
                    assert found.dtype == rows.dtype
                    assert np.array_equal(found, rows[ids])


@pytest.mark.parametrize("name", [name for name, field in SCHEMA.items() if field.dtype != "string"])
def test_every_field_and_codec_streams_what_plain_zarr_reads(whole_url: str, name: str) -> None:
    batch_type = make_dataclass("FieldBatch", [(name, Tensor)], bases=(Batch,), frozen=True)
    path = name if SCHEMA[name].writer == "ingest" else f"{TEACHER}/{name}"
    array = zarr.open_group(whole_url, mode="r")[path]
    assert isinstance(array, zarr.Array)
    plain = np.asarray(array[:])
    if packed := array.attrs.get("bit_packed"):
        plain = np.unpackbits(plain, axis=-1, count=packed["count"], bitorder="little").astype(bool)
    settings = {"remainder": "pad", "unit_samples": None, "micro_batch": GLOBAL_BATCH}
    with stream_of(whole_url, batch_type, teacher="teacher", **settings) as stream:
        seen = set()
        for (batch,) in stream.steps(stream.steps_per_epoch):
            found = getattr(batch, name).numpy()
            assert found.dtype == plain.dtype
            assert np.array_equal(found, plain[batch.ids.numpy()], equal_nan=found.dtype.kind == "f")
            seen |= set(batch.ids.tolist())
    assert len(seen) == stream.num_samples


@pytest.fixture(scope="module")
def whole_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with every field of the schema."""
    folder = str(tmp_path_factory.mktemp("whole") / "store")
    store = write_small_store(folder, small_attributes(70, block_rows=16, splits=SPLITS))
    fields = {"view_features": (12, 6), "view_tokens": (12, 4, 6), "view_saliency": (12, 4), "view_pixels": (20, 12, 2)}
    teacher = small_teacher().model_copy(update={"fields": fields, "num_tokens": 4})
    write_blocks(store, range(store.num_blocks), create_teacher(store, teacher))
    publish(store)
    return folder


def test_units_are_a_few_megabytes_whatever_the_field() -> None:
    def units(*fields: tuple[int, int]) -> int:
        return unit_samples_of([SimpleNamespace(row_bytes=row, chunk_rows=chunk) for row, chunk in fields])  # type: ignore[misc]

    points, views, features, labels = (98_304, 16), (12 * 224 * 224 * 3, 16), (18_432, 64), (8, 1)
    assert units(points) == units(points, labels) == 64
    assert units(features) == units(labels) == 256
    assert units(views) == units(points, views) == 32, "two chunks: rows of a split need not begin where a chunk does"
    assert units(points, features) == 128
    assert units((12 * 196 * 768 * 2, 64)) == 64, "one chunk where two are too large"
    assert units() == 256


# Views drawn


@dataclass(frozen=True)
class FewViewsBatch(Batch):
    views: UInt8[Tensor, "b v h w 3"]
    visibility: Bool[Tensor, "b p v"]
    pixels: Tensor
    label: Int64[Tensor, " b"]
    view_features: Float[Tensor, "b v d"]


def test_a_batch_may_draw_a_few_views_of_each_sample_by_its_seed(whole_url: str) -> None:
    store = open_store(whole_url)
    drawn_at_all = set()
    with stream_of(
        whole_url, FewViewsBatch.drawing(2), teacher="teacher", remainder="pad", micro_batch=GLOBAL_BATCH
    ) as stream:
        for (batch,) in stream.steps(4 * stream.steps_per_epoch):
            rows = batch.ids.numpy()
            views = drawn_views(batch.seeds.numpy(), 12, 2)
            drawn_at_all |= set(views.ravel().tolist())
            each, number = np.arange(len(rows))[:, None], views
            assert np.array_equal(batch.views, store.read("views", rows)[each, number])
            assert np.array_equal(batch.view_features, store.read(f"{TEACHER}/view_features", rows)[each, number])
            visibility, pixels = store.read("visibility", rows), store.read("pixels", rows)
            assert np.array_equal(batch.visibility, np.take_along_axis(visibility, views[:, None], axis=2))
            assert np.array_equal(batch.pixels, np.take_along_axis(pixels, views[:, None, :, None], axis=2))
            assert np.array_equal(batch.label, store.read("label", rows))
    assert drawn_at_all == set(range(12))


def test_drawn_views_differ_within_a_sample_and_are_alike_likely() -> None:
    seeds = sample_seeds(0, 0, np.arange(24_000))
    drawn = drawn_views(seeds, 12, 3)
    assert drawn.shape == (24_000, 3)
    assert all(len(set(row)) == 3 for row in drawn.tolist())
    assert np.abs(np.bincount(drawn[:, 0]) - 2000).max() < 5 * np.sqrt(2000)
    assert np.array_equal(drawn_views(seeds[100:], 12, 3), drawn[100:])
    assert np.array_equal(drawn_views(seeds, 12, 1), drawn[:, :1])
    assert np.array_equal(np.sort(drawn_views(seeds[:50], 12, 12)), np.tile(np.arange(12), (50, 1)))


def test_more_views_than_there_are_cannot_be_drawn(whole_url: str) -> None:
    with pytest.raises(AskedWrongly, match=r"FewViewsBatch draws 13 views of each shape, and .* has 12"):
        stream_of(whole_url, FewViewsBatch.drawing(13), teacher="teacher")


def test_fewer_points_are_the_first_points(url: str) -> None:
    store = open_store(url)
    with stream_of(url, WholeBatch, teacher="teacher", num_points=7) as stream:
        (step,) = stream.steps(1)
        rows = step[0].ids.numpy()
        assert np.array_equal(step[0].points, store.read("points", rows)[:, :7])
        assert np.array_equal(step[0].visibility, store.read("visibility", rows)[:, :7])
        assert np.array_equal(step[0].views, store.read("views", rows))


def test_a_remote_store_streams_like_a_local_one(url: str, tmp_path: Path) -> None:
    remote = f"memory://{tmp_path.name}"
    write_small_store(remote, small_attributes(NUM_ROWS, block_rows=16), ["label", "split", "id"])
    assert np.array_equal(ids_of(remote, 10), ids_of(url, 10))


def test_the_stream_sees_the_manifest_that_it_opened(tmp_path: Path) -> None:
    growing = str(tmp_path / "store")
    write_small_store(growing, small_attributes(100, block_rows=16), ["label", "split", "id"])
    with stream_of(growing) as stream:
        before = stream.num_samples
        add_teacher(growing)
        assert len(list(stream.steps(2 * stream.steps_per_epoch))) == 2 * (before // GLOBAL_BATCH)


def test_a_store_that_grows_is_read_as_it_was_opened_and_the_stream_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    growing = str(tmp_path / "store")
    store = create_store(growing, small_attributes(200, block_rows=16), ["label", "split", "id"])
    write_blocks(store, range(7))
    publish(store)
    alone = ids_of(growing, 8)  # two epochs
    with stream_of(growing) as stream:
        assert stream.steps_per_epoch == 3
        steps = stream.steps(9)
        seen = [next(steps)]
        assert stream.newer_manifest() is None
        for block in range(7, 13):
            write_blocks(store, [block])
            publish(store)
            seen += [next(steps)]
        assert stream.newer_manifest() == store.manifest.number + 7
        seen += list(steps)
    ids = np.stack([torch.cat([batch.ids for batch in step]).numpy() for step in seen])
    assert np.array_equal(ids[:8], alone)
    assert ids.max() < 7 * 16
    # at the beginning of the second epoch, of the third, and perhaps of the one whose batches were ready at the end
    assert 2 <= caplog.text.count("has grown since this run opened it (manifest 1)") <= 3
    with stream_of(growing) as stream:
        assert stream.num_samples > alone.max()


def test_whether_a_store_has_grown_may_stay_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = str(tmp_path / "store")
    write_small_store(folder, small_attributes(100, block_rows=16), ["label", "split", "id"])

    def refused(fetcher: Fetcher, name: str) -> bool:
        raise FetchFailed("access is refused", may_pass=False)

    monkeypatch.setattr(Fetcher, "exists", refused)
    with caplog.at_level("INFO"), stream_of(folder) as stream:
        list(stream.steps(3 * stream.steps_per_epoch))
    assert "whether it has grown could not be asked (access is refused)" in caplog.text


# Memory


def row_bytes(url: str) -> int:
    """What a row of a WholeBatch takes in memory."""
    store = open_store(url)
    fetcher = Fetcher(store.folder)
    paths = [name if name in store.fields else f"{TEACHER}/{name}" for name in WholeBatch.store_fields()]
    return sum(ShardReader(store, store.field(path), fetcher).row_bytes for path in paths)


@pytest.mark.parametrize(("lanes", "window_units"), [(1, 1), (1, 4), (3, 1)])
def test_units_are_read_about_once_an_epoch_where_memory_is_short(url: str, lanes: int, window_units: int) -> None:
    # global batches that a unit's samples are spread over
    spread = 1 + math.ceil(lanes * window_units * 16 / GLOBAL_BATCH)
    # beside them a unit that is being read; of batches of four one ahead, one that is finished, and the consumer's two steps'
    rows = spread * GLOBAL_BATCH + 3 * 16 + (2 + 2 * 6) * 4
    settings = {"memory_gib": 1.2 * rows * row_bytes(url) / GIB, "lanes": lanes, "window_units": window_units}
    with stream_of(url, WholeBatch, teacher="teacher", **settings) as stream:
        num_units = -(-stream.num_samples // 16)
        list(stream.steps(3 * stream.steps_per_epoch))
        # where a lane ends within a window, the next one begins there much later
        assert stream.units_read <= 3 * (num_units + lanes * window_units)
        assert stream.bytes_read > 0


def test_a_corpus_that_fits_into_memory_is_read_once(url: str) -> None:
    with stream_of(url, WholeBatch, teacher="teacher") as stream:
        list(stream.steps(4 * stream.steps_per_epoch))
        assert stream.units_read == -(-stream.num_samples // 16)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_reading(tmp_path: Path, world_size: int) -> None:
    folder = str(tmp_path / "store")
    write_small_store(folder, small_attributes(1600, block_rows=64), ["label", "split", "id"])
    settings = {"lanes": 8, "world_size": world_size, "micro_batch": 3}
    read = []
    for rank in range(world_size):
        with stream_of(folder, rank=rank, **settings) as stream:
            list(stream.steps(3 * stream.steps_per_epoch))
            read.append(stream.units_read)
            num_units = -(-stream.num_samples // 16)
    # where a lane begins or ends, its neighbour reads too; and each rank has begun with the next epoch, some windows a lane
    assert sum(read) <= 3 * (num_units + 2 * 8) + 4 * 8
    assert max(read) <= 3 * (num_units / world_size + 8) + 4 * 8 / world_size


def test_only_some_classes_or_every_so_manyth_shape_can_be_read(url: str) -> None:
    store = open_store(url)
    rows = store.rows("train")
    lamps = rows[store.read("label", rows) == store.class_names.index("lamp")]
    with stream_of(url, classes=("lamp",), every=2, global_batch=4) as stream:
        seen = [batch.ids for step in stream.steps(stream.steps_per_epoch) for batch in step]
    assert len(seen) == len(lamps[::2]) // 4
    assert set(torch.cat(seen).tolist()) <= set(lamps[::2].tolist())
    with stream_of(url, every=3, global_batch=4, remainder="pad") as stream:
        seen = [batch.ids for step in stream.steps(stream.steps_per_epoch) for batch in step]
    assert set(torch.cat(seen).tolist()) == set(rows[::3].tolist())


def test_only_listed_shapes_can_be_read(url: str, tmp_path: Path) -> None:
    store = open_store(url)
    chosen = store.rows("train")[5:120:3]
    listed = tmp_path / "shapes.txt"
    listed.write_text("\n".join(["", *reversed(store.read("id", chosen).tolist()), ""]))
    with stream_of(url, shapes_url=str(listed), global_batch=4, remainder="pad") as stream:
        assert stream.num_samples == len(chosen)
        seen = [batch.ids for step in stream.steps(stream.steps_per_epoch) for batch in step]
    assert set(torch.cat(seen).tolist()) == set(chosen.tolist())


def test_a_list_that_cannot_be_followed_is_refused(url: str, tmp_path: Path) -> None:
    listed = tmp_path / "shapes.txt"
    with pytest.raises(AskedWrongly, match=r"There is no .*shapes.txt \(data.shapes_url\)"):
        stream_of(url, shapes_url=str(listed))
    store = open_store(url)
    listed.write_text(
        f"{store.read('id', store.rows('test')[:1])[0]}\n{store.read('id', store.rows('train')[:1])[0]}\nno such"
    )
    with pytest.raises(AskedWrongly, match=r"lists 2 ids that are not in split 'train', .*, such as .*no such"):
        stream_of(url, shapes_url=str(listed))


def test_labels_are_looked_through_in_pieces(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(url)
    rows = store.rows("train")
    chosen = rows[np.isin(store.read("label", rows), [0, 2])]
    monkeypatch.setattr(stream_module, "_LABELS_AT_ONCE", 37)
    with stream_of(url, classes=("lamp", "chair"), global_batch=4, remainder="pad") as stream:
        seen = [batch.ids for step in stream.steps(stream.steps_per_epoch) for batch in step]
    assert set(torch.cat(seen).tolist()) == set(chosen.tolist())


def test_an_unknown_class_is_refused(url: str) -> None:
    with pytest.raises(AskedWrongly, match=r"no class lump \(data.classes\). It has chair, table, lamp"):
        stream_of(url, classes=("lump",))


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_padded_epoch_ends_with_a_whole_batch_that_repeats_a_few(url: str, world_size: int) -> None:
    train = open_store(url).rows("train")
    num_batches = -(-len(train) // GLOBAL_BATCH)
    assert num_batches * GLOBAL_BATCH > len(train)
    ids = global_ids(url, 2 * num_batches, world_size, 4, remainder="pad").reshape(2, -1)
    for epoch in ids:
        found, times = np.unique(epoch, return_counts=True)
        assert np.array_equal(found, train)
        assert times.sum() - len(train) == (times - 1).sum() == num_batches * GLOBAL_BATCH - len(train)
        assert times.max() == 2


def test_a_process_reads_within_its_bound_where_the_system_gives_no_more(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    attributes = small_attributes(600, block_rows=64, points_per_shape=12_288, splits=("train",))
    write_small_store(str(folder), attributes, fields=["points", "split", "id"])  # 88 MB
    program = tmp_path / "read.py"
    program.write_text(READ_UNDER_A_LIMIT)

    def read(bound_mib: int, allowed_mib: int) -> "subprocess.CompletedProcess[str]":
        arguments = json.dumps({"store": str(folder), "bound_mib": bound_mib, "allowed_mib": allowed_mib})
        return subprocess.run([sys.executable, program, arguments], capture_output=True, text=True, timeout=100)

    # beside samples: what Python, threads and their heaps take while they work
    within = read(bound_mib=48, allowed_mib=56)
    assert within.returncode == 0, within.stderr
    read_rows, held_bytes = map(int, within.stdout.split())
    assert read_rows == 2 * (len(open_store(folder).rows("train")) // 16) * 16
    assert held_bytes > 30 << 20, "much of it is in use"
    beyond = read(bound_mib=160, allowed_mib=56)  # where there is room for all, all is kept
    assert beyond.returncode != 0 and "MemoryError" in beyond.stderr, "this limit stops a stream that takes more"


READ_UNDER_A_LIMIT = """
import json, resource, sys, threading, time
from dataclasses import dataclass
from torch import Tensor
from datastore.batch import Batch
from datastore.stream import StreamConfig, open_stream

@dataclass(frozen=True)
class PointsBatch(Batch):
    points: Tensor

asked = json.loads(sys.argv[1])
threading.stack_size(2**18)

def opened(bound_mib):
    config = StreamConfig(store_url=asked["store"], lanes=2, unit_samples=16, memory_gib=bound_mib / 1024)
    return open_stream(
        config, PointsBatch, teacher=None, global_batch=16, micro_batch=16, rank=0, world_size=1, seed=0
    )

with opened(32) as stream:  # whatever is loaded and allocated once
    list(stream.steps(3))
data_kib = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
limit = (data_kib << 10) + (asked["allowed_mib"] << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
with opened(asked["bound_mib"]) as stream:
    steps = stream.steps(2 * stream.steps_per_epoch)
    read = sum(len(batch.ids) for batch in next(steps))
    held = 0
    while stream.memory_bytes != held:  # until readers have taken all that they may
        held = stream.memory_bytes
        time.sleep(0.5)
    read += sum(len(batch.ids) for step in steps for batch in step)
    assert 0 < stream.memory_bytes <= asked["bound_mib"] << 20, stream.memory_bytes
print(read, held)
"""


def test_all_memory_for_samples_is_counted_and_stays_within_the_bound(tmp_path: Path) -> None:
    folder = str(tmp_path / "store")
    write_small_store(
        folder, small_attributes(600, block_rows=64, points_per_shape=2048), fields=["points", "split", "id"]
    )
    limit_bytes = 600 * 2048 * 12 / 2
    settings = {"lanes": 2, "unit_samples": 16, "memory_gib": limit_bytes / GIB}
    with stream_of(folder, PointsBatch, micro_batch=3, **settings) as stream:
        tracemalloc.start()
        highest = 0
        for _ in stream.steps(2 * stream.steps_per_epoch):  # holds each step until it has the next one
            highest = max(highest, stream.memory_bytes)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert 0 < highest <= limit_bytes
    # beside samples there are indices of shards, plans, and Python's own objects
    assert peak_bytes < limit_bytes + 800_000


def test_a_micro_batch_that_crosses_several_windows_of_a_lane_finds_room_for_all(url: str) -> None:
    settings = {"lanes": 1, "unit_samples": 4, "micro_batch": 24}
    needed = 0.0
    for _ in range(20):  # as little memory as is not refused
        try:
            with stream_of(url, WholeBatch, teacher="teacher", memory_gib=needed / GIB or 1e-6, **settings) as stream:
                ids = [batch.ids for step in stream.steps(stream.steps_per_epoch) for batch in step]
            break
        except AskedWrongly:
            needed = max(1.2 * needed, 20_000.0)
    assert len(torch.cat(ids).unique()) == len(ids) * 24


def test_nothing_is_read_beside_what_the_first_batch_needs_until_it_is_there(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on, loaded = threading.Event(), []

    def slow(reader: ShardReader, rows: Any) -> Any:
        loaded.append(rows[0])
        may_go_on.wait(20)
        return read(reader, rows)

    read = ShardReader.read
    monkeypatch.setattr(ShardReader, "read", slow)
    monkeypatch.setattr(stream_module, "_FEWEST_LOCAL_READERS", 8)
    with stream_of(url, lanes=2, micro_batch=24) as stream:
        batches = threading.Thread(target=lambda: next(stream.steps(1)))
        batches.start()
        time.sleep(0.2)
        needed = set(loaded)
        may_go_on.set()
        batches.join()
        assert 2 <= len(needed) <= 4  # a unit a lane, or two where a batch crosses from one to the next
        deadline = time.monotonic() + 20
        while len(loaded) <= 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(loaded) > 4


def test_the_first_batch_does_not_wait_for_what_is_unpacked_for_those_after_it(
    whole_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on, others = threading.Event(), []

    def copied(drafts: Drafts, name: str, visit: Visit, rows: Any) -> None:
        numbers = {int(draft.plan.ids[0]) for draft, _ in visit.runs}
        assert numbers, "nobody waits for what is read"
        if numbers != {first_id}:
            others.append(numbers)
            assert may_go_on.wait(20)
        copy(drafts, name, visit, rows)

    first_id = int(ids_of(whole_url, 1, micro_batch=24)[0, 0])
    copy = Drafts._copy_by_chunk
    monkeypatch.setattr("datastore.shards._SMALL_CHUNK_BYTES", 0)
    monkeypatch.setattr(Drafts, "_copy_by_chunk", copied)
    store = open_store(whole_url)
    with reading_anew(), stream_of(whole_url, ViewsBatch, micro_batch=24) as stream:
        ((first,),) = stream.steps(1)
        assert first.ids[0] == first_id
        may_go_on.set()
        batches = [first, *(batch for (batch,) in stream.steps(2))]
    for batch in batches:
        ascending, places = np.unique(batch.ids, return_inverse=True)
        assert np.array_equal(batch.views, store.read("views", ascending)[places])
    assert others


def test_units_that_the_first_batch_uses_up_are_read_once(whole_url: str) -> None:
    visits: list[int] = []

    def copied(drafts: Drafts, name: str, visit: Visit, rows: Any) -> None:
        visits.append(len(visit.runs))
        copy(drafts, name, visit, rows)

    copy = Drafts._copy_by_chunk
    with pytest.MonkeyPatch.context() as patch, reading_anew():
        patch.setattr("datastore.shards._SMALL_CHUNK_BYTES", 0)
        patch.setattr(Drafts, "_copy_by_chunk", copied)
        with stream_of(whole_url, ViewsBatch, global_batch=24, micro_batch=24, lanes=3, unit_samples=8) as stream:
            list(stream.steps(1))
            assert stream.units_read >= 3
    assert visits
    assert all(visits)


def test_micro_batches_of_a_whole_step_are_made_ready_ahead(url: str) -> None:
    with stream_of(url, micro_batch=1, prefetch_batches=1) as stream:  # 24 of them a step
        next(stream.steps(1))
        deadline = time.monotonic() + 20
        while stream.batches_ready < GLOBAL_BATCH and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stream.batches_ready >= GLOBAL_BATCH


@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_and_later_starts_see_the_manifest_that_they_are_told(tmp_path: Path, world_size: int) -> None:
    growing = str(tmp_path / "store")
    store = create_store(growing, small_attributes(200, block_rows=16), ["label", "split", "id"])
    write_blocks(store, range(7))
    publish(store)
    number = open_store(growing).manifest.number
    alone = ids_of(growing, 8)
    write_blocks(store, range(7, 13))
    publish(store)
    again = {"manifest": number, "world_size": world_size}
    parts = [ids_of(growing, 5, rank=rank, start=3 * GLOBAL_BATCH, **again) for rank in range(world_size)]
    assert np.array_equal(np.concatenate(parts, axis=1), alone[3:])
    assert not np.array_equal(ids_of(growing, 5, start=3 * GLOBAL_BATCH), alone[3:])
    with pytest.raises(StoreError, match=r"has no .*00000099.json any more, which this run began with"):
        ids_of(growing, 1, manifest=99)


def test_windows_that_do_not_fit_are_refused_with_what_would(url: str) -> None:
    with pytest.raises(
        AskedWrongly, match=r"5 lanes with windows of 1 units of 16 samples take up to .* data.memory_gib allows 1e-05"
    ):
        stream_of(url, memory_gib=1e-5, batch_type=WholeBatch, teacher="teacher")


# Trouble


def damaged_copy(tmp_path: Path, shard: int = 3) -> str:
    folder = str(tmp_path / "store")
    write_small_store(folder, small_attributes(NUM_ROWS, block_rows=16), ["label", "split", "id"])
    path = Path(folder) / "label" / "c" / str(shard)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    return folder


def test_a_damaged_shard_stops_the_consumer_with_its_name_and_leaves_no_thread(tmp_path: Path) -> None:
    damaged = damaged_copy(tmp_path)
    stream = stream_of(damaged)
    with pytest.raises(StoreError, match=r"label/c/3 \(rows 48 to 63 .* cannot be read"):
        list(stream.steps(stream.steps_per_epoch))
    assert stream_threads() == []
    with pytest.raises(ValueError, match="closed"):
        next(stream.steps(1))


def test_steps_before_a_damaged_shard_are_still_delivered(tmp_path: Path, url: str) -> None:
    straight = ids_of(url, 2, lanes=1)
    untouched = set(range(15)) - set((straight // 16).ravel().tolist())
    damaged = damaged_copy(tmp_path, shard=untouched.pop())
    with stream_of(damaged, lanes=1) as stream:
        steps = stream.steps(stream.steps_per_epoch)
        for ids in straight:
            assert torch.cat([batch.ids for batch in next(steps)]).tolist() == ids.tolist()
        with pytest.raises(StoreError, match="cannot be read"):
            list(steps)


def stream_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("stream-")]


def test_closing_leaves_no_thread_whatever_was_under_way(url: str) -> None:
    for num_steps in (0, 1, 5):
        stream = stream_of(url, WholeBatch, teacher="teacher")
        for _ in stream.steps(num_steps):
            pass
        stream.close()
        stream.close()
        assert stream_threads() == []


def test_an_error_of_the_consumer_leaves_no_thread(url: str) -> None:
    with pytest.raises(KeyError, match="not finite"), stream_of(url) as stream:
        for _ in stream.steps(3):
            raise KeyError("not finite")
    assert stream_threads() == []


def test_a_stream_that_is_forgotten_ends_its_threads(url: str) -> None:
    stream = stream_of(url)
    next(stream.steps(1))
    assert stream_threads()
    del stream
    deadline = time.monotonic() + 10
    while stream_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert stream_threads() == []


def test_stopping_between_steps_and_going_on_misses_nothing(url: str) -> None:
    straight = ids_of(url, 6)
    with stream_of(url) as stream:
        found = []
        for count in (1, 0, 2, 3):
            steps: Iterator[Any] = stream.steps(count)
            found += [torch.cat([batch.ids for batch in step]).numpy() for step in steps]
        for step in stream.steps(2):  # a consumer that breaks off has taken this one
            assert len(step) == 6
            break
        assert stream.samples_seen == 7 * GLOBAL_BATCH
    assert np.array_equal(np.stack(found), straight)


def test_waiting_for_data_is_counted(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with stream_of(url) as stream:
        whole = ShardReader.read

        def slow(reader: ShardReader, rows: np.ndarray) -> np.ndarray:
            time.sleep(0.1)
            return whole(reader, rows)

        monkeypatch.setattr(ShardReader, "read", slow)
        next(stream.steps(1))
        assert stream.data_wait_seconds >= 0.1
        waited = stream.data_wait_seconds
        while stream.batches_ready < 4:
            time.sleep(0.01)
        next(stream.steps(1))
        assert stream.data_wait_seconds < waited + 1


def test_of_what_a_teacher_says_of_points_the_first_are_read_as_of_the_points(tmp_path: Path) -> None:
    store = write_small_store(str(tmp_path), small_attributes(block_rows=16), ("points", "split", "id"))
    fields = {"view_tokens": (3, 4, 6), "view_pixels": (20, 3, 2)}
    scope = create_teacher(store, TeacherAttributes(**(small_teacher().model_dump() | {"fields": fields})))
    write_blocks(store, range(store.num_blocks), scope)
    publish(store)
    with stream_of(store.url, DrawnBatch, teacher="teacher", num_points=9) as stream:
        batch = next(stream.steps(1))[0]
    store = open_store(store.url)
    assert batch.points.shape[1] == 9 and batch.view_pixels.dtype == torch.int16
    assert np.array_equal(batch.view_pixels, store.read(f"{scope}/view_pixels", batch.ids.numpy())[:, :9])
    assert np.array_equal(batch.view_tokens, store.read(f"{scope}/view_tokens", batch.ids.numpy()))


# Asked wrongly


def test_a_world_that_does_not_divide_the_batch_names_those_that_do(url: str) -> None:
    with pytest.raises(AskedWrongly, match=r"24 in micro-batches of 4 .* by 5 processes. Use 1, 2, 3 or 6 processes"):
        stream_of(url, world_size=5)
    with pytest.raises(AskedWrongly, match=r"24 cannot be cut into micro-batches of 7"):
        stream_of(url, micro_batch=7)


def test_a_batch_larger_than_the_split_is_refused(url: str) -> None:
    with pytest.raises(AskedWrongly, match=r"global batch of 1000 is more than the 154 shapes in split 'train'"):
        stream_of(url, global_batch=1000)


def test_a_split_without_shapes_is_refused(url: str) -> None:
    with pytest.raises(StoreError, match=r"no complete shape in split 'validation'. .*train, test, validation"):
        stream_of(url, split="validation")
    with pytest.raises(StoreError, match=r"no split 'tran'. It has train, test, validation"):
        stream_of(url, split="tran")


def test_more_points_than_stored_are_refused(url: str) -> None:
    with pytest.raises(AskedWrongly, match=r"num_points is 1024, but .* holds 20 points"):
        stream_of(url, num_points=1024)


def test_a_missing_field_names_the_command_that_writes_it(tmp_path: Path) -> None:
    folder = str(tmp_path / "store")
    write_small_store(folder, fields=["points", "split", "id"])
    with pytest.raises(MissingField, match=r"no field 'label' .* `viewpoint ingest"):
        stream_of(folder)


def test_a_missing_teacher_names_the_command_that_writes_its_fields(url: str) -> None:
    with pytest.raises(MissingField, match=r"`viewpoint cache .* --teacher vit --weights URL`"):
        stream_of(url, WholeBatch, teacher="vit")
    with pytest.raises(AskedWrongly, match=r"WholeBatch reads 'view_features', which a teacher wrote"):
        stream_of(url, WholeBatch)


def test_a_batch_of_a_field_that_does_not_exist_names_those_that_do(url: str) -> None:
    misspelt = make_dataclass("MisspeltBatch", [("lable", Tensor)], bases=(Batch,), frozen=True)
    with pytest.raises(AskedWrongly, match=r"MisspeltBatch reads 'lable', which is no field. .*label"):
        stream_of(url, misspelt)


def test_text_cannot_be_streamed(url: str) -> None:
    with pytest.raises(ValueError, match=r"IdTextBatch reads 'id', which is text"):
        stream_of(url, IdTextBatch)


def test_a_stream_needs_a_store_and_a_start_on_a_whole_batch(url: str) -> None:
    with pytest.raises(AskedWrongly, match=r"`--data URL`"):
        stream_of(None)
    with pytest.raises(AskedWrongly, match=r"25 samples seen are no whole number of global batches of 24"):
        stream_of(url, start=25)


def test_ids_alone_need_no_read_of_any_field(url: str) -> None:
    with stream_of(url, IdBatch) as stream:
        list(stream.steps(stream.steps_per_epoch))
        assert stream.bytes_read == 0
