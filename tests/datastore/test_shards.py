"""A shard read by hand gives what plain zarr gives, and nothing that differs from its manifest gets through."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datastore.errors import StoreError
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
def test_every_shard_of_every_field_is_what_plain_zarr_reads(store: Store, field: str) -> None:
    reader = ShardReader(store, store.field(field))
    for shard in range(reader.stored.num_shards):
        first = shard * BLOCK_ROWS
        rows = np.arange(first, min(first + BLOCK_ROWS, NUM_ROWS))
        found = reader.stored.decode(reader.read(shard, rows))
        expected = store.read(field, rows)
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected)
    assert reader.shards_read == reader.stored.num_shards
    assert reader.bytes_read == sum(store.manifest.scope(reader.stored.scope).shards[reader.stored.field.name].sizes)


@given(
    st.sampled_from(NAMES),
    st.integers(0, 4),
    st.sets(st.integers(0, BLOCK_ROWS - 1)),
    st.none() | st.integers(1, NUM_POINTS),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rows_and_any_first_points_of_a_shard_can_be_asked_for(
    store: Store, field: str, shard: int, places: set[int], num_points: int | None
) -> None:
    reader = ShardReader(store, store.field(field), num_points)
    rows = shard * BLOCK_ROWS + np.array(sorted(places), dtype=np.int64)
    rows = rows[rows < NUM_ROWS]
    found = reader.stored.decode(reader.read(shard, rows))
    expected = store.read(field, rows)
    if "p" in reader.stored.field.axes:
        expected = expected[:, :num_points]
    assert np.array_equal(found, expected)
    assert found.shape[1:-1] == reader.row_shape[:-1]
    assert reader.row_bytes * len(rows) == reader.read(shard, rows).nbytes


def test_a_field_without_points_ignores_how_many_are_asked_for(store: Store) -> None:
    assert ShardReader(store, store.field("views"), num_points=2).row_shape == store.field("views").row_shape


def _flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "found"),
    [(_flip_a_byte, r"bytes with checksum"), (_cut_short, r"bytes with checksum"), (Path.unlink, "it is missing")],
)
def test_a_damaged_shard_is_named_with_what_was_found_and_what_was_expected(
    tmp_path: Path, damage: object, found: str
) -> None:
    assert callable(damage)
    store = points_store(tmp_path / "store")
    reader = ShardReader(store, store.field("points"))
    damage(tmp_path / "store" / "points" / "c" / "2" / "0" / "0")
    expected = store.manifest.scope("ingest").shards["points"].crc32c[2]
    with pytest.raises(
        StoreError, match=rf"points/c/2/0/0 \(rows 64 to 95 .*{found}.*in 2 reads.*{expected:08x}.*inspect"
    ):
        reader.read(2, np.array([64]))
    assert np.array_equal(reader.read(1, np.array([33])), store.read("points", [33]))


def test_a_transfer_that_goes_wrong_once_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = points_store(tmp_path / "store")
    reader = ShardReader(store, store.field("points"))
    whole = store.folder.read
    answers = iter([lambda name: whole(name)[:-5], whole])
    monkeypatch.setattr(store.folder, "read", lambda name: next(answers)(name))
    assert np.array_equal(reader.read(0, np.array([3])), store.read("points", [3]))
    assert reader.shards_read == 2


def test_a_remote_store_reads_like_a_local_one(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}"
    store = points_store(url)
    reader = ShardReader(store, store.field("points"))
    rows = np.arange(32, 64)
    assert np.array_equal(reader.stored.decode(reader.read(1, rows)), store.read("points", rows))
