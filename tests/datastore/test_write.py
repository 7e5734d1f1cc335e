"""Writing stores: bit for bit, from several processes, and through kills, full disks and damage."""

import hashlib
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import fsspec
import numpy as np
import pytest
import zarr
from zarr.storage import MemoryStore

from datastore import schema
from datastore.errors import EXIT_DO_NOT_RETRY, AskedWrongly, StoreError, ViewpointError
from datastore.layout import INGEST, FieldStatistics, QuarantinedRow, Store, create_store, create_teacher, open_store
from datastore.objects import DRAFTS_FOLDER, ObjectFolder
from datastore.write import BlockWriter, find_damage, publish, verify, withdraw
from tests.stores import sample_arrays, small_attributes, small_teacher, write_blocks, write_small_store
from tests.writers import FEW_FIELDS, running, write_part, write_part_and_die, write_with_file_limit

ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a store."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shard_path(store: Store, field: str, shard: int) -> Path:
    return store.folder.local_path / store.field(field).shard_name(shard)


# Bit for bit


@pytest.mark.parametrize(("num_rows", "block_rows"), [(70, 32), (600, 512), (5, 16), (3, 1)])
def test_shards_are_what_zarr_itself_would_write(tmp_path: Path, num_rows: int, block_rows: int) -> None:
    attributes = small_attributes(num_rows=num_rows, block_rows=block_rows)
    store = write_small_store(str(tmp_path), attributes)
    for field, rows in sample_arrays(store).items():
        stored = store.field(field)
        assert stored.shard_rows == min(block_rows, schema.FIELDS[field].shard_rows)
        objects: dict[str, object] = {}
        array = zarr.create_array(
            MemoryStore(objects),
            shape=(num_rows, *stored.stored_row_shape),
            dtype=stored.stored_dtype,
            shards=(stored.shard_rows, *stored.stored_row_shape),
            chunks=(stored.chunk_rows, *stored.stored_row_shape),
            compressors=stored.compressors() or None,
            fill_value=stored.fill_value,
            config={"write_empty_chunks": True},
        )
        for first in range(0, num_rows, stored.shard_rows):
            array[first : first + stored.shard_rows] = stored.encode(rows[first : first + stored.shard_rows])
        for shard in range(stored.num_shards):
            ours = shard_path(store, field, shard).read_bytes()
            theirs = objects["/".join(["c", str(shard), *("0" for _ in stored.row_shape)])].to_bytes()
            assert ours == theirs, f"{field}, shard {shard}"


@pytest.mark.parametrize("piece_rows", [1, 7, 100])
def test_rows_may_come_in_pieces_and_in_memory_that_is_used_again(tmp_path: Path, piece_rows: int) -> None:
    attributes = small_attributes(num_rows=150, block_rows=128)
    whole = write_small_store(str(tmp_path / "whole"), attributes)
    store = create_store(tmp_path / "pieces", attributes, schema.INGEST_FIELDS)
    writer, arrays = BlockWriter(store), sample_arrays(store)
    for block in range(store.num_blocks):
        opened = writer.open_block(block)
        first, end = store.block_range(block)
        for start in range(first, end, piece_rows):
            piece = {name: array[start : min(start + piece_rows, end)].copy() for name, array in arrays.items()}
            opened.append(piece)
            for array in piece.values():
                array[:] = "spoilt" if array.dtype.kind == "T" else 1
        opened.commit()
    publish(store)
    assert contents(tmp_path / "pieces") == contents(whole.folder.local_path)


def test_values_that_equal_the_fill_value_are_written_too(tmp_path: Path) -> None:
    store = create_store(tmp_path, small_attributes(num_rows=16), ("points", "split", "id"))
    arrays = sample_arrays(store) | {"points": np.zeros((16, 20, 3), np.float32)}
    BlockWriter(store).write(0, arrays)
    publish(store)
    assert shard_path(open_store(tmp_path), "points", 0).is_file()
    assert not open_store(tmp_path).read("points", range(16)).any()


# Several writers


def test_two_processes_write_two_parts_of_one_store(tmp_path: Path) -> None:
    attributes = small_attributes(num_rows=150, block_rows=16)
    alone, together = tmp_path / "alone", tmp_path / "together"
    write_part(str(alone), attributes, schema.INGEST_FIELDS)
    arguments = (write_part, str(together), attributes, schema.INGEST_FIELDS)
    with running(*arguments, (0, 2)) as first, running(*arguments, (1, 2)) as second:
        for process in (first, second):
            process.join()
            assert process.exitcode == 0
    store = open_store(together)
    assert store.is_complete() and not verify(store)
    assert store.manifest.scopes == open_store(alone).manifest.scopes
    assert without_manifests(together) == without_manifests(alone)


def without_manifests(folder: Path) -> dict[str, bytes]:
    """Every file but the manifests, whose number depends on who came first."""
    return {name: content for name, content in contents(folder).items() if "/manifests/" not in name}


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_parts_share_the_blocks_out_whatever_their_number(tmp_path: Path, count: int) -> None:
    store = create_store(tmp_path, small_attributes(block_rows=16), FEW_FIELDS)
    writer = BlockWriter(store)
    parts = [writer.pending((index, count)) for index in range(count)]
    assert sorted(chain(*parts)) == list(range(store.num_blocks))
    write_blocks(store, [1, 3])
    assert sorted(chain(*(writer.pending((index, count)) for index in range(count)))) == [0, 2, 4]


@pytest.mark.parametrize("part", [(2, 2), (-1, 2), (0, 0)])
def test_a_part_that_does_not_exist_is_refused(tmp_path: Path, part: tuple[int, int]) -> None:
    writer = BlockWriter(create_store(tmp_path, small_attributes(), FEW_FIELDS))
    with pytest.raises(AskedWrongly, match="There is no part"):
        writer.pending(part)


def test_two_writers_of_one_block_with_one_result_do_no_harm(tmp_path: Path) -> None:
    store = create_store(tmp_path, small_attributes(), FEW_FIELDS)
    arrays = {name: array[:32] for name, array in sample_arrays(store).items()}
    slow = BlockWriter(store).open_block(0)
    slow.append(arrays)
    write_blocks(store, [0, 1, 2])
    slow.commit()
    publish(store)
    assert not verify(open_store(tmp_path))


def test_a_late_writer_with_another_result_leaves_a_finished_block_as_it_is(tmp_path: Path) -> None:
    store = create_store(tmp_path, small_attributes(), FEW_FIELDS)
    slow = BlockWriter(store).open_block(0)
    write_blocks(store, [0, 1, 2])
    before = contents(tmp_path)
    slow.append({name: array[:32] for name, array in sample_arrays(store, seed=1).items()})
    slow.commit()
    assert contents(tmp_path) == before


def test_a_block_that_two_writers_mixed_is_done_again(tmp_path: Path) -> None:
    store = create_store(tmp_path, small_attributes(), FEW_FIELDS)
    slow = BlockWriter(store).open_block(0)
    write_blocks(store, [0, 1, 2])
    assert publish(store).scope(INGEST).blocks == [0, 1, 2]
    # the one order of events that nothing prevents: a put that began before the other's commit, and ends after it
    record = tmp_path / "_viewpoint/commits/ingest/00000000.json"
    hidden = record.rename(tmp_path / "hidden")
    slow.append({name: array[:32] for name, array in sample_arrays(store, seed=1).items()})
    hidden.rename(record)
    with pytest.raises(
        ViewpointError, match=r"Two writers with different results.*block 0.*the same command redoes it"
    ):
        slow.commit()
    assert open_store(tmp_path).manifest.scope(INGEST).blocks == [1, 2]
    assert BlockWriter(store).pending() == [0]
    write_blocks(store, [0])
    publish(store)
    assert open_store(tmp_path).is_complete() and not verify(open_store(tmp_path))


def test_a_block_that_was_withdrawn_while_a_late_writer_left_it_alone_is_not_vouched_for(tmp_path: Path) -> None:
    store = create_store(tmp_path, small_attributes(), FEW_FIELDS)
    slow = BlockWriter(store).open_block(0)
    write_blocks(store, [0])
    slow.append({name: array[:32] for name, array in sample_arrays(store, seed=1).items()})
    withdraw(store, INGEST, [0])
    with pytest.raises(ViewpointError, match=r"finished block 0 .*withdrawn.*the same command redoes it"):
        slow.commit()
    assert BlockWriter(store).pending() == [0, 1, 2]


def test_what_a_teacher_said_of_a_block_is_withdrawn_with_it(tmp_path: Path) -> None:
    store = write_small_store(str(tmp_path), fields=FEW_FIELDS)
    scope = create_teacher(store, small_teacher())
    write_blocks(store, [0, 1, 2], scope)
    publish(store)
    assert withdraw(store, INGEST, [1]).scope(scope).blocks == [0, 2]
    assert withdraw(store, scope, [0]).scope(scope).blocks == [2]
    assert open_store(tmp_path).manifest.scope(INGEST).blocks == [0, 2]


def test_manifests_lose_nothing_when_many_publish_at_once(tmp_path: Path) -> None:
    store = create_store(tmp_path, small_attributes(num_rows=128, block_rows=16), FEW_FIELDS)

    def write_and_publish(block: int) -> None:
        write_blocks(store, [block])
        published = publish(store)
        assert block in published.scope(INGEST).blocks

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write_and_publish, range(8)))
    assert open_store(tmp_path).is_complete()
    names = store.folder.names("_viewpoint/manifests")
    assert names == [f"{number:08d}.json" for number in range(1, len(names) + 1)]


def test_publishing_nothing_new_makes_no_manifest(tmp_path: Path) -> None:
    store = write_small_store(str(tmp_path), fields=FEW_FIELDS)
    assert publish(store) == publish(store) == store.manifest
    assert store.manifest.number == 1


@pytest.fixture(params=["memory", pytest.param("s3", marks=pytest.mark.s3)])
def listing_url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty folder whose listings tell digests, as a server's do."""
    if request.param == "s3":
        yield f"{request.getfixturevalue('s3_bucket')}/store"
        return

    def listed(folder: ObjectFolder, below: str = "") -> dict[str, str | None]:
        return {name: hashlib.md5(folder.read(f"{below}/{name}")).hexdigest() for name in folder.names(below)}

    monkeypatch.setattr(ObjectFolder, "listed", listed)
    yield "memory://listing"
    fsspec.filesystem("memory").rm("/listing", recursive=True)


@pytest.fixture
def records_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Numbers of the commit records that are read from now on."""
    read: list[str] = []
    read_all = ObjectFolder.read_all

    def watched(folder: ObjectFolder, names: Sequence[str]) -> dict[str, bytes]:
        read.extend(Path(name).stem.lstrip("0") or "0" for name in names)
        return read_all(folder, names)

    monkeypatch.setattr(ObjectFolder, "read_all", watched)
    return read


def quarantined(store: Store) -> tuple[dict[str, np.ndarray], list[QuarantinedRow]]:
    """All rows, of which some are broken for reasons that a document has to escape or shorten."""
    arrays = sample_arrays(store)
    reasons = {3: 'a "quoted" reason, é', 4: "x" * 1000, 40: 'a "quoted" reason, é'}
    for row in reasons:
        arrays["split"][row] = schema.QUARANTINED
    return arrays, [QuarantinedRow(row, str(arrays["id"][row]), reason) for row, reason in reasons.items()]


def test_publishing_reads_only_the_records_that_are_new(listing_url: str, records_read: list[str]) -> None:
    store = create_store(listing_url, small_attributes(num_rows=150), FEW_FIELDS)
    arrays, quarantine = quarantined(store)
    for block in range(5):
        first, end = store.block_range(block)
        rows = {name: array[first:end] for name, array in arrays.items()}
        BlockWriter(store).write(block, rows, [entry for entry in quarantine if first <= entry.row < end])
        publish(store)
        assert records_read == [str(block)]
        records_read.clear()
    published = publish(store)
    assert records_read == [] and open_store(listing_url).is_complete() and not verify(open_store(listing_url))
    assert sorted(row for rows in published.scope(INGEST).quarantine.values() for row in rows) == [3, 4, 40]
    for name in store.folder.names("_viewpoint/manifests"):
        store.folder.remove(f"_viewpoint/manifests/{name}")
    assert publish(store).scopes == published.scopes, "what is taken over is what reading everything gives"


def test_a_block_that_was_done_again_with_another_result_is_read_again(
    listing_url: str, records_read: list[str]
) -> None:
    store = create_store(listing_url, small_attributes(), FEW_FIELDS)
    write_blocks(store, [0, 1, 2])
    publish(store)
    records_read.clear()
    # withdrawn by a process that was killed before it published, and done again: no manifest says that it was away
    store.folder.remove("_viewpoint/commits/ingest/00000001.json")
    write_blocks(store, [1], seed=1)
    publish(store)
    assert records_read == ["1"]
    assert open_store(listing_url).is_complete() and not verify(open_store(listing_url))
    records_read.clear()
    assert withdraw(store, INGEST, [0, 2]).scope(INGEST).blocks == [1]
    assert records_read == []


def test_what_a_teacher_s_values_are_like_is_kept_by_block_and_added_up(
    listing_url: str, records_read: list[str]
) -> None:
    store = create_store(listing_url, small_attributes(), FEW_FIELDS)
    write_blocks(store, range(3))
    publish(store)
    store = open_store(listing_url)
    scope = create_teacher(store, small_teacher())
    values = sample_arrays(store, scope)["view_features"]
    records_read.clear()
    for block in (0, 2, 1):
        first, end = store.block_range(block)
        opened = BlockWriter(store, scope).open_block(block)
        opened.append({"view_features": values[first:end]})
        total = float(values[first:end].sum(dtype=np.float64))
        found = FieldStatistics(total=total, largest=values[first:end].max(), count=values[first:end].size)
        opened.commit(statistics={"view_features": found})
        publish(store)
    assert records_read == ["0", "2", "1"], "each once: what is known of others is taken over"
    together = open_store(listing_url).statistics("teacher@feedc0de")["view_features"]
    assert together.mean == pytest.approx(values.mean(dtype=np.float64))
    assert (together.largest, together.count) == (values.max(), values.size)


def test_writing_again_writes_nothing(tmp_path: Path) -> None:
    attributes = small_attributes()
    write_part(str(tmp_path), attributes, FEW_FIELDS)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    write_part(str(tmp_path), attributes, FEW_FIELDS)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


# Kills


def assert_sound(folder: Path) -> None:
    """A reader finds no store, one without anything complete, or one whose every row is right."""
    try:
        store = open_store(folder)
    except StoreError as error:
        assert "no store" in str(error) or "nothing is complete yet" in str(error)
        return
    assert verify(store) == []
    for field, expected in sample_arrays(store).items():
        assert (store.read(field, store.rows()) == expected[store.rows()]).all()


def test_a_writer_killed_before_any_file_operation_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    attributes, fields = small_attributes(num_rows=20, block_rows=16), ("split", "id")
    write_part(str(tmp_path / "undisturbed"), attributes, fields)
    expected = contents(tmp_path / "undisturbed")

    folders = {operation: tmp_path / f"killed-{operation}" for operation in range(1, 49)}
    exit_codes: list[int | None] = []
    for batch in range(1, 49, 8):
        with ExitStack() as stack:
            processes = [
                stack.enter_context(running(write_part_and_die, str(folders[operation]), attributes, fields, operation))
                for operation in range(batch, batch + 8)
            ]
            for process in processes:
                process.join()
                exit_codes.append(process.exitcode)
    for operation, folder in folders.items():
        assert_sound(folder)
        write_part(str(folder), attributes, fields)
        assert contents(folder) == expected, f"killed before operation {operation}"
    survived = exit_codes.index(0)
    assert set(exit_codes[:survived]) == {-9} and set(exit_codes[survived:]) == {0}
    assert survived > 30, "each of 10 objects takes several operations"


def test_a_writer_killed_at_random_moments_ends_up_bit_equal(tmp_path: Path) -> None:
    attributes, fields = small_attributes(num_rows=96, block_rows=16), (*FEW_FIELDS, "views", "visibility")
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    write_part(str(undisturbed), attributes, fields)
    moments, kills_in_the_middle = random.Random(0), 0
    for _ in range(8):
        with running(write_part, str(killed), attributes, fields) as process:
            # by what is written, not by the clock: a busy machine would be killed before it began
            awaited = len(list(killed.rglob("*"))) + moments.randint(1, 12)
            while process.is_alive() and len(list(killed.rglob("*"))) < awaited:
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.003))
            process.kill()
            process.join()
            kills_in_the_middle += process.exitcode == -9
        assert_sound(killed)
    write_part(str(killed), attributes, fields)
    assert kills_in_the_middle > 0
    assert contents(killed) == contents(undisturbed)
    assert not list((killed / DRAFTS_FOLDER).iterdir())


def test_an_unfinished_block_is_done_again_and_a_finished_one_is_not(tmp_path: Path) -> None:
    store = create_store(tmp_path, small_attributes(), FEW_FIELDS)
    write_blocks(store, [0])
    unfinished = BlockWriter(store).open_block(1)
    unfinished.append({name: array[32:64] for name, array in sample_arrays(store, seed=7).items()})  # never committed
    assert (tmp_path / "points/c/1/0/0").is_file()
    publish(store)
    assert len(open_store(tmp_path).rows()) == 32
    assert BlockWriter(store).pending() == [1, 2]


# No room


def test_a_file_that_may_not_grow_stops_the_run_with_what_to_do(
    tmp_path: Path,
) -> None:
    attributes = small_attributes(num_rows=64, points_per_shape=500)
    folder = tmp_path / "store"
    with running(write_with_file_limit, str(folder), attributes, FEW_FIELDS, 64_000) as process:
        process.join()
        assert process.exitcode == EXIT_DO_NOT_RETRY
    message = (tmp_path / "store.error").read_text()
    assert f"No room for {folder}/points/c/0/0/0" in message
    assert "File too large. What was committed is safe." in message
    assert not list((folder / DRAFTS_FOLDER).iterdir())
    write_part(str(folder), attributes, FEW_FIELDS)
    assert open_store(folder).is_complete() and not verify(open_store(folder))


def test_a_full_disk_stops_the_run_and_the_same_call_goes_on_once_there_is_room(tmp_path: Path) -> None:
    namespace = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*namespace, "mount", "-t", "tmpfs", "tmpfs", tmp_path], capture_output=True).returncode != 0:
        pytest.skip("this machine allows no small disk to be mounted")
    code = "import sys; from tests.writers import fill_small_disk; fill_small_disk(sys.argv[1])"
    command = [*namespace, sys.executable, "-W", "error", "-c", code, str(tmp_path)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "No room for" in finished.stdout and "run the same command again" in finished.stdout
    assert "are free): No space left on device" in finished.stdout


# Damage


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (flip_a_byte, r"points/c/1/0/0 \(rows 32 to 63\) has checksum [0-9a-f]{8}, its manifest says [0-9a-f]{8}"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"rows 32 to 63\) has [\d,]+ bytes, its manifest says"),
        (lambda path: path.unlink(), r"points/c/1/0/0 \(rows 32 to 63\) is missing"),
    ],
)
def test_verifying_finds_a_damaged_shard_and_withdrawing_it_mends_the_store(
    tmp_path: Path, damage: Callable[[Path], None], problem: str
) -> None:
    store = write_small_store(str(tmp_path))
    assert verify(store) == []
    before = contents(tmp_path)
    damage(shard_path(store, "points", 1))
    (line,) = verify(store)
    assert re.search(problem, line)
    (found,) = find_damage(store)
    assert (found.scope, found.block, found.problem) == (INGEST, 1, line)

    withdraw(store, INGEST, [1])
    assert open_store(tmp_path).manifest.scope(INGEST).blocks == [0, 2]
    write_blocks(store, BlockWriter(store).pending())
    publish(store)
    after = contents(tmp_path)
    assert {name: after[name] for name in before if "/manifests/" not in name} == without_manifests(tmp_path)
    assert verify(open_store(tmp_path)) == []


def test_verifying_tells_whole_shards_of_one_size_from_each_other(tmp_path: Path) -> None:
    """Chunks end in their own checksums: one of the same kind over the shard would be the same for all of one size."""
    stores = []
    for seed in (0, 1):
        store = write_small_store(str(tmp_path / str(seed)), small_attributes(num_rows=32), FEW_FIELDS, seed=seed)
        scope = create_teacher(store, small_teacher())
        write_blocks(store, BlockWriter(store, scope).pending(), scope, seed)
        publish(store)
        stores.append(open_store(store.url))
    features = next(name for name in stores[0].fields if name.endswith("view_features"))
    for name in (features, "id"):
        ours, theirs = (shard_path(store, name, 0) for store in stores)
        assert ours.stat().st_size == theirs.stat().st_size and ours.read_bytes() != theirs.read_bytes()
        ours.write_bytes(theirs.read_bytes())
    assert [problem.partition(" ")[0] for problem in verify(stores[0])] == [
        stores[0].field(name).shard_name(0) for name in ("id", features)
    ]


def test_verifying_checks_the_description_of_arrays(tmp_path: Path) -> None:
    store = write_small_store(str(tmp_path), fields=FEW_FIELDS)
    (tmp_path / "id/zarr.json").unlink()
    document = tmp_path / "points/zarr.json"
    document.write_text(document.read_text().replace('"float32"', '"float64"'))
    assert verify(store) == ["points/zarr.json is not what this store's attributes ask for", "id/zarr.json is missing"]


def test_verifying_tells_how_far_it_is(tmp_path: Path) -> None:
    store = write_small_store(str(tmp_path))
    heard: list[int] = []
    verify(store, heard.append)
    assert heard == sorted(heard) and heard[-1] == store.manifest.stored_bytes


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    store = write_small_store(str(tmp_path), fields=FEW_FIELDS)
    (tmp_path / "_viewpoint/commits/ingest/00000001.json").write_text('{"shards": {"points"')
    with pytest.raises(StoreError, match=r"ingest/00000001.json is damaged.*Remove it and run"):
        publish(store)


# What a block takes


def test_a_block_of_which_a_shard_could_not_be_put_is_never_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last rows may be on their way already when the store refuses one put, and take the ones after it."""
    store = create_store(tmp_path, small_attributes(num_rows=80, block_rows=64), schema.INGEST_FIELDS)
    arrays = sample_arrays(store)
    opened = BlockWriter(store).open_block(0)
    put, refused = store.folder.put, list[str]()

    def refuses_once(name: str, content: bytes) -> None:
        if not refused:
            refused.append(name)
            raise TimeoutError("the server did not answer")
        put(name, content)

    monkeypatch.setattr(store.folder, "put", refuses_once)
    opened.append({name: array[:48] for name, array in arrays.items()})
    with pytest.raises(TimeoutError):
        opened.append({name: array[48:64] for name, array in arrays.items()})
    given_up = r"block 0 of 'ingest' in .* was given up when one of its shards"
    with pytest.raises(ViewpointError, match=given_up):
        opened.append({name: array[:0] for name, array in arrays.items()})
    with pytest.raises(ViewpointError, match=given_up):
        opened.commit()
    assert BlockWriter(store).pending() == [0, 1]


def test_rows_that_do_not_fit_the_fields_are_refused(tmp_path: Path) -> None:
    store = create_store(tmp_path, small_attributes(), FEW_FIELDS)
    right = {name: array[:32] for name, array in sample_arrays(store).items()}
    wrong: list[tuple[dict[str, np.ndarray], str]] = [
        ({name: right[name] for name in ("points", "split")}, "id is missing or too many"),
        (right | {"views": right["points"]}, "views is missing or too many"),
        (right | {"points": right["points"][:, :5]}, r"a row of points has shape \(20, 3\), not \(5, 3\)"),
        (right | {"points": right["points"].astype(np.float64)}, "points is float32, not float64"),
        (right | {"split": right["split"][:31]}, r"different numbers of rows, \[31, 32\]"),
        ({name: array[:40] for name, array in sample_arrays(store).items()}, "rows 0 to 31; got rows up to 39"),
        ({name: array[:31] for name, array in right.items()}, "rows 0 to 31; got 31"),
    ]
    for arrays, message in wrong:
        with pytest.raises(StoreError, match=message):
            BlockWriter(store).write(0, arrays)
    assert BlockWriter(store).pending() == [0, 1, 2]


def test_a_quarantined_row_needs_a_reason_and_a_reason_a_row(tmp_path: Path) -> None:
    store = create_store(tmp_path, small_attributes(num_rows=20), FEW_FIELDS)
    arrays = sample_arrays(store)
    with pytest.raises(StoreError, match=r"rows \[4\] are in quarantine by their split or by"):
        BlockWriter(store).write(0, arrays, [QuarantinedRow(4, "shape-0-4-é", "broken")])
    arrays["split"][4] = schema.QUARANTINED
    with pytest.raises(StoreError, match=r"rows \[4\] are in quarantine"):
        BlockWriter(store).write(0, arrays)
    with pytest.raises(StoreError, match=r"row 4 is 'shape-0-4-é' by the field id, but 'other'"):
        BlockWriter(store).write(0, arrays, [QuarantinedRow(4, "other", "broken")])
    BlockWriter(store).write(0, arrays, [QuarantinedRow(4, "shape-0-4-é", "broken")])


def test_a_teacher_cannot_be_cached_before_anything_is_ingested(tmp_path: Path) -> None:
    store = create_store(tmp_path, small_attributes(), FEW_FIELDS)
    writer = BlockWriter(store, create_teacher(store, small_teacher()))
    with pytest.raises(StoreError, match="had nothing ingested when it was opened"):
        writer.pending()
