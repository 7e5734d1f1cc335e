"""A shard read by hand gives what plain zarr gives, and nothing that differs from its manifest gets through."""

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from crc32c import crc32c
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datastore.errors import StoreError
from datastore.fetch import Fetcher
from datastore.layout import Store, create_teacher, open_store
from datastore.schema import FIELDS, INGEST_FIELDS
from datastore.shards import ShardReader
from datastore.write import publish
from tests.stores import small_attributes, small_teacher, write_blocks, write_small_store

NUM_ROWS, BLOCK_ROWS, NUM_POINTS = 150, 32, 20  # the last shard has 22 rows: one whole chunk and a part of one
FEATURES = "teachers/teacher@feedc0de/view_features"
NAMES = [*(name for name in INGEST_FIELDS if FIELDS[name].dtype != "string"), FEATURES]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    url = str(tmp_path_factory.mktemp("shards") / "store")
    store = write_small_store(url, small_attributes(NUM_ROWS, block_rows=BLOCK_ROWS))
    write_blocks(store, range(store.num_blocks), create_teacher(store, small_teacher()))
    publish(store)
    return open_store(url)


def points_store(url: str | Path) -> Store:
    write_small_store(str(url), small_attributes(NUM_ROWS, block_rows=BLOCK_ROWS), ["points", "split", "id"])
    return open_store(url)


@pytest.mark.parametrize("field", NAMES)
def test_every_row_of_every_field_is_what_plain_zarr_reads(store: Store, field: str) -> None:
    reader = ShardReader(store, store.field(field), Fetcher(store.folder))
    rows = np.arange(NUM_ROWS)
    found = reader.stored.decode(reader.read(rows))
    expected = store.read(field, rows)
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected, equal_nan=True)


@given(
    st.sampled_from(NAMES),
    st.sets(st.integers(0, NUM_ROWS - 1)),
    st.none() | st.integers(1, NUM_POINTS),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rows_and_any_first_points_can_be_asked_for(
    store: Store, field: str, chosen: set[int], num_points: int | None
) -> None:
    reader = ShardReader(store, store.field(field), Fetcher(store.folder), num_points)
    rows = np.array(sorted(chosen), dtype=np.int64)
    found = reader.stored.decode(reader.read(rows))
    expected = store.read(field, rows)
    if "p" in reader.stored.field.axes:
        expected = expected[:, :num_points]
    assert np.array_equal(found, expected, equal_nan=True)
    assert found.shape[1:-1] == reader.row_shape[:-1]
    assert reader.row_bytes * len(rows) == reader.read(rows).nbytes


@given(first=st.integers(0, NUM_ROWS - 1), count=st.integers(1, NUM_ROWS), needless=st.sets(st.integers(0, NUM_ROWS)))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_neighbouring_rows_go_straight_to_their_places(
    store: Store, first: int, count: int, needless: set[int]
) -> None:
    rows = np.arange(first, min(first + count, NUM_ROWS))
    with patch("datastore.shards._SMALL_CHUNK_BYTES", 0):  # these are
        for field in ("points", FEATURES):
            reader = ShardReader(store, store.field(field), Fetcher(store.folder))
            assert reader.lies_as_in_memory
            found = np.zeros((len(rows), *reader.row_shape), reader.stored.stored_dtype)
            places = [row.reshape(-1).view(np.uint8).data for row in found[::-1]]  # anywhere
            reader.read_into(first, [None if place in needless else at for place, at in enumerate(places)])
            expected = store.read(field, rows)
            for place in range(len(rows)):
                wanted = 0 if place in needless else expected[place]
                assert np.array_equal(found[len(rows) - 1 - place], np.broadcast_to(wanted, reader.row_shape))
        assert not ShardReader(store, store.field("views"), Fetcher(store.folder)).lies_as_in_memory
        few = ShardReader(store, store.field("points"), Fetcher(store.folder), num_points=2)
        assert not few.lies_as_in_memory


def test_rows_that_come_damaged_on_their_way_to_their_places_are_named(tmp_path: Path) -> None:
    store = points_store(tmp_path / "store")
    _flip_a_byte(tmp_path / "store" / "points" / "c" / "2" / "0" / "0")
    with patch("datastore.shards._SMALL_CHUNK_BYTES", 0):
        reader = ShardReader(store, store.field("points"), Fetcher(store.folder))
        found = np.zeros((32, *reader.row_shape), np.float32)
        with pytest.raises(StoreError, match=r"points/c/2/0/0 \(rows 64 to 95 .*its bytes have checksum.*inspect"):
            reader.read_into(64, [row.reshape(-1).view(np.uint8).data for row in found])


def _missing(entries: np.ndarray, size: int) -> None:
    entries[1] = (2**64 - 1, 2**64 - 1)  # as zarr says that nothing was written


def _other_length(entries: np.ndarray, size: int) -> None:
    entries["length"][1] -= 1


def _beyond_the_end(entries: np.ndarray, size: int) -> None:
    entries["offset"] += size


def _swapped(entries: np.ndarray, size: int) -> None:
    entries[:] = entries[::-1].copy()


@pytest.mark.parametrize("change", [_missing, _other_length, _beyond_the_end, _swapped])
@pytest.mark.parametrize("smallest", [0, 2**16])
def test_an_index_that_names_other_places_than_the_writers_is_an_error_and_never_other_rows(
    tmp_path: Path, change: Callable[[np.ndarray, int], None], smallest: int
) -> None:
    store = points_store(tmp_path / "store")
    expected = store.read("points", range(32))
    path = tmp_path / "store" / "points" / "c" / "0" / "0" / "0"
    content = bytearray(path.read_bytes())
    start = len(content) - 4 - 2 * 16  # of two chunks
    entries = np.frombuffer(content, [("offset", "<u8"), ("length", "<u8")], 2, start)
    change(entries, len(content))
    content[-4:] = crc32c(bytes(content[start:-4])).to_bytes(4, "little")
    path.write_bytes(content)
    with patch("datastore.shards._SMALL_CHUNK_BYTES", smallest):
        reader = ShardReader(store, store.field("points"), Fetcher(store.folder))
        if change is _swapped and smallest:  # which is where they are
            found = reader.read(np.arange(32))
            assert np.array_equal(found, np.roll(expected, 16, axis=0))
        else:
            with pytest.raises(StoreError, match=r"points/c/0/0/0.*inspect"):
                reader.read(np.arange(32))


def test_chunks_that_lie_near_each_other_come_in_one_request_and_those_between_are_left_alone(tmp_path: Path) -> None:
    write_small_store(str(tmp_path), small_attributes(256, block_rows=128), ["points", "split", "id"])
    store = open_store(tmp_path)
    expected = store.read("points", range(128))
    path = tmp_path / "points" / "c" / "0" / "0" / "0"
    content = bytearray(path.read_bytes())
    content[20 * expected[0].nbytes] ^= 1  # in the second chunk
    path.write_bytes(content)
    fetcher = Fetcher(store.folder)
    reader = ShardReader(store, store.field("points"), fetcher, num_points=2)
    rows = np.array([3, 40, 41, 127])
    with patch.object(fetcher, "fetch", wraps=fetcher.fetch) as fetch:
        assert np.array_equal(reader.read(rows), expected[rows, :2])
        assert fetch.call_count == 2  # the index, and these chunks
        with pytest.raises(StoreError, match="checksum"):
            reader.read(np.arange(128))
        with patch("datastore.shards._NEAR_BYTES", 1):
            assert np.array_equal(reader.read(np.array([3, 40])), expected[[3, 40], :2])
        assert fetch.call_count == 5


def test_neighbouring_rows_are_one_request_and_an_index_is_asked_for_once(store: Store) -> None:
    fetcher = Fetcher(store.folder)
    reader = ShardReader(store, store.field("points"), fetcher)
    with patch.object(fetcher, "fetch", wraps=fetcher.fetch) as fetch:
        reader.read(np.arange(0, 32))
        assert fetch.call_count == 2  # the index of a shard, and both of its chunks
        reader.read(np.arange(3, 9))
        assert fetch.call_count == 3  # the first chunk
        reader.read(np.arange(10, 40))  # into the next shard: one stretch here, and there an index and a stretch
        assert fetch.call_count == 5


def test_a_field_without_points_ignores_how_many_are_asked_for(store: Store) -> None:
    assert (
        ShardReader(store, store.field("views"), Fetcher(store.folder), num_points=2).row_shape
        == store.field("views").row_shape
    )


def _flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (_flip_a_byte, r"its bytes have checksum"),
        (_cut_short, r"bytes .* were asked for and .* came"),
        (Path.unlink, "it is missing"),
    ],
)
def test_a_damaged_shard_is_named_with_what_was_found(tmp_path: Path, damage: object, found: str) -> None:
    assert callable(damage)
    store = points_store(tmp_path / "store")
    reader = ShardReader(store, store.field("points"), Fetcher(store.folder))
    damage(tmp_path / "store" / "points" / "c" / "2" / "0" / "0")
    with pytest.raises(StoreError, match=rf"points/c/2/0/0 \(rows 64 to 95 .*{found}.*inspect"):
        reader.read(np.arange(64, 96))
    assert np.array_equal(reader.read(np.array([33])), store.read("points", [33]))


def test_a_remote_store_reads_like_a_local_one(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}"
    store = points_store(url)
    reader = ShardReader(store, store.field("points"), Fetcher(store.folder))
    rows = np.arange(32, 64)
    assert np.array_equal(reader.stored.decode(reader.read(rows)), store.read("points", rows))
