"""Stores as readers see them."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import fsspec
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

import datastore
from datastore import schema
from datastore.errors import EXIT_DO_NOT_RETRY, MissingField, StoreError
from datastore.layout import (
    CorpusFacts,
    QuarantinedRow,
    Rows,
    Store,
    TeacherAttributes,
    as_runs,
    create_store,
    create_teacher,
    default_block_rows,
    from_runs,
    open_store,
)
from datastore.objects import ObjectFolder
from datastore.write import BlockWriter, publish, verify
from tests.stores import sample_arrays, small_attributes, small_teacher, write_blocks, write_small_store


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A complete store of 70 rows; the last block has 6."""
    location = str(tmp_path_factory.mktemp("corpus") / "shapes.zarr")
    write_small_store(location)
    return location


@pytest.fixture
def memory_url() -> Iterator[str]:
    yield "memory://layout/shapes.zarr"
    fsspec.filesystem("memory").rm("/layout", recursive=True)


def add_teacher(store: Store, name: str = "teacher", weights_hash: str = "feedc0de0001") -> None:
    scope = create_teacher(store, small_teacher(name, weights_hash))
    write_blocks(store, BlockWriter(store, scope).pending(), scope)
    publish(store)


# Reading


@pytest.mark.parametrize("field", schema.INGEST_FIELDS)
def test_every_field_reads_back_bit_for_bit(url: str, field: str) -> None:
    store = open_store(url)
    expected = sample_arrays(store)[field]
    everything = store.read(field, np.arange(len(store)))
    assert everything.dtype == expected.dtype
    assert everything.shape == expected.shape
    assert (everything == expected).all()


@pytest.mark.parametrize("rows", [[5], [69, 0, 31, 32], [3, 3, 3], [], list(range(10, 50))[::-1]])
@pytest.mark.parametrize("field", ["points", "visibility", "label", "id"])
def test_rows_come_in_the_order_asked_for(url: str, field: str, rows: list[int]) -> None:
    store = open_store(url)
    found = store.read(field, rows)
    expected = sample_arrays(store)[field][rows]
    assert found.shape == expected.shape and (found == expected).all()


@pytest.mark.parametrize("num_views", [1, 7, 8, 9, 12])
def test_visibility_of_any_number_of_views_round_trips(tmp_path: Path, num_views: int) -> None:
    rig = small_attributes().rig.model_copy(
        update={"azimuths": (0.0,) * num_views, "elevations": (0.0,) * num_views, "name": "test"}
    )
    write_small_store(str(tmp_path), small_attributes(rig=rig, num_views=num_views), ("visibility", "split", "id"))
    store = open_store(tmp_path)
    found, expected = store.read("visibility", np.arange(70)), sample_arrays(store)["visibility"]
    assert found.dtype == np.bool_ and found.shape == (70, 20, num_views)
    assert (found == expected).all()


def test_plain_zarr_reads_the_store(url: str) -> None:
    group = zarr.open_group(url, mode="r")
    expected = sample_arrays(open_store(url))
    assert (group["points"][:] == expected["points"]).all()
    assert (group["id"][60:] == expected["id"][60:]).all()
    packed = group["visibility"]
    axis = packed.attrs["bit_packed"]
    unpacked = np.unpackbits(packed[:], axis=-1, count=axis["count"], bitorder=axis["bit_order"])
    assert (unpacked == expected["visibility"]).all()
    assert group.attrs["viewpoint"]["class_names"] == ["chair", "table", "lamp"]
    assert packed.attrs["axes"] == ["row", "p", "v"]
    assert "farthest-point" in group["points"].attrs["meaning"]


def test_a_store_in_memory_reads_like_one_on_disk(memory_url: str) -> None:
    write_small_store(memory_url)
    store = datastore.open_store(memory_url)
    for field, expected in sample_arrays(store).items():
        assert (store.read(field, np.arange(70)) == expected).all(), field
    assert store.is_complete()


def test_splits_select_rows(url: str) -> None:
    store = open_store(url)
    assert (store.rows("test") == np.arange(2, 70, 3)).all()
    assert (store.rows() == np.arange(70)).all()
    assert store.rows().dtype == np.int64
    assert len(store.rows("train")) + len(store.rows("test")) == len(store) == 70
    with pytest.raises(StoreError, match=r"no split 'validation'. It has train, test"):
        store.rows("validation")


def test_rows_outside_the_store_are_refused(url: str) -> None:
    store = open_store(url)
    for rows in ([70], [-1]):
        with pytest.raises(StoreError, match="has rows 0 to 69"):
            store.read("points", rows)


def test_a_store_knows_what_sizes_a_network(url: str) -> None:
    assert open_store(url).corpus_facts == CorpusFacts(("chair", "table", "lamp"), 12, 8, ())


def test_fields_say_how_they_lie(url: str) -> None:
    fields = open_store(url).fields
    assert list(fields) == list(schema.INGEST_FIELDS)
    visibility, points, label = fields["visibility"], fields["points"], fields["label"]
    assert (visibility.row_shape, visibility.stored_row_shape, visibility.stored_dtype) == ((20, 12), (20, 2), "uint8")
    assert (points.shard_rows, points.chunk_rows, points.num_shards) == (32, 16, 3)
    assert points.shard_name(2) == "points/c/2/0/0"
    assert (label.row_shape, label.shard_name(0)) == ((), "label/c/0")


# Only what a manifest says exists


def test_blocks_that_nobody_finished_do_not_exist(tmp_path: Path) -> None:
    store = create_store(tmp_path, small_attributes(), schema.INGEST_FIELDS)
    write_blocks(store, [1])
    publish(store)
    partial = open_store(tmp_path)
    assert (partial.rows() == np.arange(32, 64)).all()
    assert not partial.is_complete()
    assert (partial.read("points", [40]) == sample_arrays(store)["points"][[40]]).all()
    with pytest.raises(StoreError, match=r"rows 0 and following of 'points' are not written yet in manifest 1"):
        partial.read("points", [40, 5])


def test_an_open_store_does_not_change_while_others_go_on(tmp_path: Path) -> None:
    store = create_store(tmp_path, small_attributes(), schema.INGEST_FIELDS)
    write_blocks(store, [0])
    publish(store)
    early = open_store(tmp_path)
    write_blocks(store, [1, 2])
    publish(store)
    late = open_store(tmp_path)
    assert (early.manifest.number, late.manifest.number) == (1, 2)
    assert len(early.rows()) == 32 and len(late.rows()) == 70
    with pytest.raises(StoreError, match="not written yet in manifest 1"):
        early.read("points", [33])


def test_quarantined_rows_are_listed_and_never_delivered(tmp_path: Path) -> None:
    store = create_store(tmp_path, small_attributes(num_rows=20), ("points", "split", "id"))
    arrays = sample_arrays(store)
    arrays["split"][[3, 7, 9]] = schema.QUARANTINED
    reasons = {3: "no faces", 7: "NaN in vertices", 9: "no faces"}
    BlockWriter(store).write(0, arrays, [QuarantinedRow(row, arrays["id"][row], why) for row, why in reasons.items()])
    assert publish(store).scope("ingest").quarantine == {"NaN in vertices": (7,), "no faces": (3, 9)}
    opened = open_store(tmp_path)
    assert opened.quarantine == [QuarantinedRow(row, f"shape-0-{row}-é", why) for row, why in reasons.items()]
    assert set(opened.rows()) == set(range(20)) - {3, 7, 9}


# Errors that say what to do


def test_nothing_there_says_how_to_write_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no store.*Nothing is there.*`viewpoint ingest SOURCE .*missing`") as caught:
        open_store(tmp_path / "missing")
    assert caught.value.exit_code == EXIT_DO_NOT_RETRY


def test_another_folder_is_described(tmp_path: Path) -> None:
    for name in ("chair", "lamp", "index.csv"):
        (tmp_path / name).touch()
    with pytest.raises(StoreError, match=r"no zarr.json. It holds chair, index.csv, lamp. Write a store with"):
        open_store(tmp_path)


def test_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "mesh.off").touch()
    with pytest.raises(StoreError, match="is no store"):
        open_store(tmp_path / "mesh.off")
    with pytest.raises(StoreError, match="is a file"):
        create_store(tmp_path / "mesh.off", small_attributes(), schema.INGEST_FIELDS)


def test_another_zarr_is_no_store(tmp_path: Path) -> None:
    zarr.create_group(tmp_path)
    with pytest.raises(StoreError, match="is a zarr group, but not a store of Viewpoint's"):
        open_store(tmp_path)


def test_a_damaged_group_document_is_named(tmp_path: Path) -> None:
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "attri')
    with pytest.raises(StoreError, match=r"zarr.json is damaged"):
        open_store(tmp_path)


def test_an_unknown_schema_version_is_refused(tmp_path: Path) -> None:
    write_small_store(str(tmp_path), fields=("split", "id"))
    document = json.loads((tmp_path / "zarr.json").read_text())
    document["attributes"]["viewpoint"] |= {"schema_version": 99, "something_new": True}
    del document["attributes"]["viewpoint_crc32c"]
    (tmp_path / "zarr.json").write_text(json.dumps(document))
    for call in (
        lambda: open_store(tmp_path),
        lambda: create_store(tmp_path, small_attributes(), ("split", "id")),
    ):
        with pytest.raises(
            StoreError, match=rf"has schema version 99; this Viewpoint reads version {schema.SCHEMA_VERSION}\. Use"
        ):
            call()


def flipped_digits(content: bytes) -> list[bytes]:
    """The document with one digit changed, for each: most of these still parse."""
    begin = max(0, content.find(b'"attributes"'))  # of a group; what is before is zarr's
    digits = [at for at in range(begin, len(content)) if content[at : at + 1].isdigit()]
    return [content[:at] + (b"%d" % ((content[at] - ord("0") + 1) % 10)) + content[at + 1 :] for at in digits]


@pytest.mark.parametrize(
    "name", ["zarr.json", "_viewpoint/manifests/00000001.json", "teachers/teacher@feedc0de/zarr.json"]
)
def test_a_digit_that_flips_on_the_way_is_read_again_and_one_in_the_store_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    store = write_small_store(tmp_path / "shapes.zarr")
    if name.startswith("teachers"):
        add_teacher(store)
    expected = open_store(tmp_path / "shapes.zarr")
    path = tmp_path / "shapes.zarr" / name
    whole, read = path.read_bytes(), ObjectFolder.read
    for damaged in flipped_digits(whole)[::7]:
        on_the_way = [damaged]
        monkeypatch.setattr(
            ObjectFolder, "read",
            lambda folder, asked, way=on_the_way: way.pop() if asked == name and way else read(folder, asked),
        )  # fmt: skip
        found = open_store(tmp_path / "shapes.zarr")
        assert on_the_way == []
        assert (found.attributes, found.manifest, found.teachers) == (
            expected.attributes, expected.manifest, expected.teachers,
        )  # fmt: skip
        monkeypatch.undo()
    for damaged in flipped_digits(whole)[::17]:
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match=rf"{name} (is|is damaged|has schema version)"):
            open_store(tmp_path / "shapes.zarr")
    path.write_bytes(whole)


def test_a_store_of_an_older_version_without_checksums_is_read(tmp_path: Path) -> None:
    expected = write_small_store(tmp_path / "shapes.zarr")
    group = tmp_path / "shapes.zarr" / "zarr.json"
    document = json.loads(group.read_text())
    del document["attributes"]["viewpoint_crc32c"]
    group.write_text(json.dumps(document))
    manifest = tmp_path / "shapes.zarr" / "_viewpoint" / "manifests" / "00000001.json"
    content = json.loads(manifest.read_text())
    del content["crc32c"]
    manifest.write_text(json.dumps(content))
    assert open_store(tmp_path / "shapes.zarr").manifest == open_store(expected.url).manifest


def test_a_store_without_a_manifest_says_to_go_on(tmp_path: Path) -> None:
    store = create_store(tmp_path, small_attributes(), schema.INGEST_FIELDS)
    write_blocks(store, [0])
    with pytest.raises(StoreError, match=r"nothing is complete yet.*the same command again"):
        open_store(tmp_path)


def test_a_field_that_the_source_lacks_is_explained(tmp_path: Path) -> None:
    write_small_store(str(tmp_path), fields=("points", "split", "id"))
    store = open_store(tmp_path)
    with pytest.raises(MissingField, match=r"no field 'views'.*It holds points, split, id.*`viewpoint ingest"):
        store.read("views", [0])
    with pytest.raises(MissingField, match=r"There is no field 'veiws'"):
        store.read("veiws", [0])


# Creating


def test_creating_again_with_the_same_attributes_opens(tmp_path: Path) -> None:
    write_small_store(str(tmp_path))
    again = create_store(tmp_path, small_attributes(), schema.INGEST_FIELDS)
    assert again.is_complete()


def test_creating_with_other_attributes_says_what_differs(tmp_path: Path) -> None:
    create_store(tmp_path, small_attributes(), schema.INGEST_FIELDS)
    with pytest.raises(StoreError, match=r"already holds another store \(points_per_shape: 20 there, 30 asked for\)"):
        create_store(tmp_path, small_attributes(points_per_shape=30), schema.INGEST_FIELDS)
    with pytest.raises(StoreError, match=r"source_hash.*choose another URL"):
        create_store(tmp_path, small_attributes(source_hash="other"), schema.INGEST_FIELDS)
    with pytest.raises(StoreError, match=r"fields: points, .* there, points, split, id asked for"):
        create_store(tmp_path, small_attributes(), ("points", "split", "id"))


def test_a_folder_with_other_things_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "chair").mkdir()
    with pytest.raises(StoreError, match=r"not empty: it holds chair.*`viewpoint ingest SOURCE STORE`"):
        create_store(tmp_path, small_attributes(), schema.INGEST_FIELDS)
    assert [path.name for path in tmp_path.iterdir()] == ["chair"]


def test_an_interrupted_creation_is_completed(tmp_path: Path) -> None:
    create_store(tmp_path, small_attributes(), schema.INGEST_FIELDS)
    for lost in ("points", "id"):
        (tmp_path / lost / "zarr.json").unlink()
    write_small_store(str(tmp_path))
    store = open_store(tmp_path)
    assert (store.read("points", [69]) == sample_arrays(store)["points"][[69]]).all()


@pytest.mark.parametrize(
    ("num_rows", "block_rows"), [(1, 16), (256, 16), (257, 32), (640, 64), (3937, 256), (12311, 1024), (10**6, 1024)]
)
def test_blocks_are_about_a_sixteenth_of_a_small_corpus(num_rows: int, block_rows: int) -> None:
    assert default_block_rows(num_rows) == block_rows


# Teachers


def test_a_teachers_fields_lie_under_its_name_and_hash(tmp_path: Path) -> None:
    add_teacher(write_small_store(str(tmp_path)))
    store = open_store(tmp_path)
    assert store.resolve_teacher("teacher") == store.resolve_teacher("teacher@feedc0de") == "teacher@feedc0de"
    assert store.teachers == {"teacher@feedc0de": small_teacher()}
    path = "teachers/teacher@feedc0de/view_features"
    assert path in store.fields
    expected = sample_arrays(store, "teachers/teacher@feedc0de")["view_features"]
    assert (store.read(path, np.arange(70)) == expected).all()
    assert (zarr.open_group(tmp_path, mode="r")[path][:] == expected).all()


def test_an_absent_teacher_says_which_command_writes_it(tmp_path: Path) -> None:
    add_teacher(write_small_store(str(tmp_path)))
    store = open_store(tmp_path)
    with pytest.raises(
        MissingField, match=r"no fields of teacher 'clip'. It holds teacher@feedc0de. .*--teacher clip --weights URL`"
    ):
        store.resolve_teacher("clip")
    with pytest.raises(MissingField, match=r"wrote view_features, but not 'view_tokens'"):
        store.read("teachers/teacher@feedc0de/view_tokens", [0])
    with pytest.raises(MissingField, match=r"its name here is teachers/NAME@HASH/view_features. It is here for: "):
        store.read("view_features", [0])


def test_two_teachers_of_one_name_must_be_told_apart(tmp_path: Path) -> None:
    store = write_small_store(str(tmp_path))
    add_teacher(store)
    add_teacher(store, weights_hash="badc0ffee002")
    with pytest.raises(StoreError, match=r"2 teachers named 'teacher'.*teacher@badc0ffe \(8 px.*teacher@feedc0de \("):
        open_store(tmp_path).resolve_teacher("teacher")
    assert open_store(tmp_path).resolve_teacher("teacher@badc0ffe") == "teacher@badc0ffe"


def test_a_teacher_that_has_changed_is_noticed_and_the_way_back_is_told(tmp_path: Path) -> None:
    add_teacher(write_small_store(str(tmp_path)))
    with pytest.raises(
        MissingField,
        match=r"no fields of teacher 'teacher@badc0ffe'.* other weights, or another input size, normalisation or precision: "
        r"teacher@feedc0de \(8 px, mean 0\.5/0\.5/0\.5, deviation .*float32, by `viewpoint cache .* --weights clip"
        r"\.safetensors`\)\. Write .* again with `viewpoint cache .* or name one that is here .*teacher@feedc0de\)",
    ):
        open_store(tmp_path).resolve_teacher("teacher@badc0ffe")


def test_a_half_written_teacher_is_not_readable(tmp_path: Path) -> None:
    store = write_small_store(str(tmp_path))
    scope = create_teacher(store, small_teacher())
    write_blocks(store, [0, 2], scope)
    publish(store)
    opened = open_store(tmp_path)
    assert f"{scope}/view_features" not in opened.fields
    with pytest.raises(MissingField, match=r"2 of 3 blocks of teacher 'teacher@feedc0de'. Write the others with"):
        opened.resolve_teacher("teacher")
    write_blocks(opened, BlockWriter(opened, scope).pending(), scope)
    publish(opened)
    assert open_store(tmp_path).resolve_teacher("teacher") == "teacher@feedc0de"


def test_a_teacher_whose_folder_was_removed_is_gone_and_can_be_written_again(tmp_path: Path) -> None:
    store = write_small_store(str(tmp_path))
    add_teacher(store)
    shutil.rmtree(tmp_path / "teachers/teacher@feedc0de")
    opened = open_store(tmp_path)
    assert opened.teachers == {}
    assert verify(opened) == ["teachers/teacher@feedc0de is missing, and its manifest says that it is there"]
    add_teacher(opened)
    assert open_store(tmp_path).resolve_teacher("teacher") == "teacher@feedc0de"
    assert verify(open_store(tmp_path)) == []


def test_a_teachers_folder_without_its_document_is_none_and_so_is_a_file(tmp_path: Path) -> None:
    add_teacher(write_small_store(str(tmp_path)))
    (tmp_path / "teachers" / "begun@12345678").mkdir()
    (tmp_path / "teachers" / "notes@home").write_text("a file")
    assert list(open_store(tmp_path).teachers) == ["teacher@feedc0de"]


def test_the_same_weights_from_a_training_with_other_settings_are_the_same_teacher(tmp_path: Path) -> None:
    store = write_small_store(str(tmp_path / "store"))
    facts = {"job": "teacher", "config_hash": "0123", "split": "train"}
    first = small_teacher().model_copy(update={"training": facts})
    scope = create_teacher(store, first)
    assert create_teacher(store, first.model_copy(update={"training": facts | {"config_hash": "4567"}})) == scope
    with pytest.raises(StoreError, match="other properties"):
        create_teacher(store, first.model_copy(update={"training": facts | {"split": "test"}}))


def test_a_teacher_with_the_same_weights_and_other_properties_is_refused(tmp_path: Path) -> None:
    store = write_small_store(str(tmp_path))
    create_teacher(store, small_teacher())
    create_teacher(store, small_teacher())
    create_teacher(store, small_teacher().model_copy(update={"options": "--weights the/same/elsewhere"}))
    with pytest.raises(StoreError, match=r"other properties \(.*dim: 6 there, 9 asked for"):
        create_teacher(store, small_teacher(dim=9))


def teacher_with(fields: dict[str, tuple[int, ...]]) -> TeacherAttributes:
    return TeacherAttributes(**(small_teacher().model_dump() | {"fields": fields}))


def test_a_teacher_that_draws_its_own_views_says_where_every_stored_point_lies(tmp_path: Path) -> None:
    store = write_small_store(str(tmp_path))
    with pytest.raises(
        StoreError, match=r"view_pixels of teacher teacher@feedc0de is of \(7, 3, 2\) points; .* has 20"
    ):
        create_teacher(store, teacher_with({"view_pixels": (7, 3, 2)}))
    scope = create_teacher(store, teacher_with({"view_tokens": (3, 4, 6), "view_pixels": (20, 3, 2)}))
    write_blocks(store, BlockWriter(store, scope).pending(), scope)
    publish(store)
    store = open_store(tmp_path)
    pixels = store.read(f"{scope}/view_pixels", range(70))
    assert pixels.dtype == np.int16 and (pixels == sample_arrays(store, scope)["view_pixels"]).all()
    assert verify(store) == []


def test_large_cached_rows_lie_in_small_shards_that_divide_blocks(tmp_path: Path) -> None:
    attributes = small_attributes(num_rows=5000, block_rows=1024, points_per_shape=8192)
    store = create_store(str(tmp_path), attributes, ("points", "split", "id"))
    clip = {"view_features": (12, 512), "view_tokens": (3, 196, 512), "view_pixels": (8192, 3, 2)}
    scope = create_teacher(store, teacher_with(clip))
    sizes = {stored.field.name: (stored.shard_rows, stored.chunk_rows) for stored in store.fields_of(scope)}
    assert sizes == {"view_features": (1024, 64), "view_tokens": (256, 16), "view_pixels": (1024, 16)}
    huge = {"view_tokens": (64, 4096, 1024)}
    other = TeacherAttributes(**(small_teacher("huge").model_dump() | {"fields": huge}))
    assert [(each.shard_rows, each.chunk_rows) for each in store.fields_of(create_teacher(store, other))] == [(1, 1)]


def test_importing_datastore_costs_no_zarr() -> None:
    code = "import sys, datastore; assert 'zarr' not in sys.modules; assert callable(datastore.open_store)"
    subprocess.run([sys.executable, "-c", code], check=True)


@given(st.lists(st.integers(0, 255).map(lambda number: number // 100)))
def test_runs_and_values_lead_to_each_other(values: list[int]) -> None:
    array = np.array(values, np.uint8)
    runs = as_runs(array)
    assert np.array_equal(from_runs(runs), array)
    assert all(one[0] != another[0] for one, another in pairwise(runs))


@given(st.sets(st.integers(0, 300)))
def test_rows_kept_as_ranges_are_the_rows(chosen: set[int]) -> None:
    rows = np.array(sorted(chosen), np.int64)
    ranges = Rows.of(rows)
    assert len(ranges) == len(rows)
    assert np.array_equal(ranges.all(), rows)
    places = np.arange(len(rows))[::-2]
    assert np.array_equal(ranges[places], rows[places])
    assert [ranges.at(place) for place in range(len(rows))] == rows.tolist()
    assert [ranges.every(3).at(place) for place in range(len(rows[::3]))] == rows[::3].tolist()


def test_a_manifest_knows_the_splits_of_complete_blocks(tmp_path: Path) -> None:
    attributes = small_attributes(num_rows=200, block_rows=16, splits=("train", "test"))
    store = create_store(str(tmp_path), attributes, ("split", "id", "label"))
    write_blocks(store, [1, 4, 5, 12], "ingest")
    publish(store)
    opened = open_store(tmp_path)
    complete = np.concatenate([np.arange(*opened.block_range(block)) for block in (1, 4, 5, 12)])
    split = opened.read("split", complete)
    assert set(split.tolist()) >= {0, 1}
    for number, name in enumerate(opened.splits):
        assert np.array_equal(opened.rows(name), complete[split == number])
    assert np.array_equal(opened.rows(), complete[split != schema.QUARANTINED])


@pytest.mark.parametrize("content", [None, b""])
def test_a_shard_that_is_gone_or_empty_is_no_row_of_zeros(tmp_path: Path, content: bytes | None) -> None:
    write_small_store(str(tmp_path))
    shard = tmp_path / "points/c/1/0/0"
    shard.unlink() if content is None else shard.write_bytes(content)
    store = open_store(tmp_path)
    assert len(store.read("points", [3])) == 1
    with pytest.raises(StoreError, match=r"points/c/1/0/0 (is missing|has 0 bytes), and its manifest says .*--verify"):
        store.read("points", [3, 40])
