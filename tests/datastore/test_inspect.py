"""What `viewpoint inspect` says, and its page of pictures."""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datastore import inspect as stage
from datastore import schema
from datastore.contact_sheet import contact_sheet, draw_contact_sheet, varied_rows
from datastore.errors import StoreError
from datastore.inspect import describe, facts_of
from datastore.layout import FieldStatistics, create_store, create_teacher, open_store
from datastore.write import BlockWriter, publish, withdraw
from tests.stores import small_attributes, small_teacher, write_blocks, write_small_store


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit code and what was printed."""
    parser = argparse.ArgumentParser()
    stage.add_arguments(parser)
    code = stage.run(parser.parse_args(words))
    return code, capsys.readouterr().out


@pytest.fixture
def damaged_url(demo_store_url: str, tmp_path: Path) -> str:
    """A copy in which one byte of one shard of views is another."""
    shutil.copytree(demo_store_url, tmp_path / "damaged.zarr")
    shard = tmp_path / "damaged.zarr/views/c/0/0/0/0/0"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    return str(tmp_path / "damaged.zarr")


def test_people_read_what_a_store_holds(demo_store_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, demo_store_url)
    assert code == 0
    for expected in (
        "demo://shapes?count=24&seed=0 (demo)",
        "6 of 48 x 48 px, rendered by rays, rig simple6",
        "v=6 x h=48 x w=48 x 3",
        "Apache-2.0",
    ):
        assert expected in text
    lines = [line.split() for line in text.splitlines()]
    assert ["train", "test"] in lines
    assert ["aeroplane", "1", "1"] in lines  # 24 shapes of 22 classes: the first two classes have two
    assert ["all", "22", "2"] in lines


def test_programs_read_the_same_as_json(demo_store_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, demo_store_url, "--json", "--verify")
    record = json.loads(text)
    assert code == 0
    assert (record["num_rows"], record["num_written"], record["problems"], record["quarantine"]) == (24, 24, [], [])
    assert record["counts"]["test"] == {"aeroplane": 1, "bed": 1}
    views = next(field for field in record["fields"] if field["name"] == "views")
    assert views["row_shape"] == [6, 48, 48, 3]
    assert 0 < views["stored_bytes"] < 24 * 6 * 48 * 48 * 3


def test_verify_passes_a_whole_store(demo_store_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, demo_store_url, "--verify")
    assert code == 0
    assert "every checksum is right, and the fields agree" in text


def test_verify_finds_a_flipped_bit_and_says_how_to_mend(damaged_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, damaged_url, "--verify")
    assert code == 64
    assert "1 problem:\n  views/c/0/" in text
    assert "checksum" in text
    assert "ingest again into a new store" in text
    code, text = run(capsys, damaged_url, "--verify", "--json")
    assert code == 64
    assert len(json.loads(text)["problems"]) == 1


def test_what_is_no_store_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StoreError, match="is no store"):
        run(capsys, str(tmp_path))


def test_teachers_quarantine_and_missing_blocks_are_told(tmp_path: Path) -> None:
    store = create_store(str(tmp_path / "s"), small_attributes(), schema.INGEST_FIELDS)
    write_blocks(store, [0, 1])
    scope = create_teacher(store, small_teacher())
    publish(store)
    store = open_store(store.url)
    write_blocks(store, [0], scope)
    opened = BlockWriter(store, scope).open_block(1)
    opened.append({"view_features": np.ones((32, 12, 6), np.float16)})
    opened.commit()
    publish(store)
    assert "view_features 12 x 6" in describe(facts_of(open_store(store.url))), "of those that know no statistics, too"
    for block in (0, 1):
        withdraw(store, scope, [block])
        opened = BlockWriter(store, scope).open_block(block)
        opened.append({"view_features": np.ones((32, 12, 6), np.float16)})
        opened.commit(statistics={"view_features": FieldStatistics(total=32 * 72, largest=1, count=32 * 72)})
    publish(store)
    text = describe(facts_of(open_store(store.url)))
    assert "float32  view_features 12 x 6 (mean 1, largest 1)" in text
    assert "64, and 6 not written yet" in text
    assert "teacher@feedc0de" in text
    assert "view_features 12 x 6" in text


def test_labels_of_minus_one_are_counted_apart(tmp_path: Path) -> None:
    store = write_small_store(str(tmp_path / "s"))
    counts = facts_of(store).counts
    labels = store.read("label", store.rows("train"))
    assert counts["train"]["(unlabelled)"] == np.count_nonzero(labels == -1)
    assert sum(counts["train"].values()) == len(labels)


def test_the_contact_sheet_has_a_line_a_shape(demo_store_url: str, tmp_path: Path) -> None:
    store = open_store(demo_store_url)
    out = tmp_path / "new/folder/sheet.png"
    contact_sheet(store, [0, 5, 9], out)
    with Image.open(out) as three:
        three.load()
    one = draw_contact_sheet(store, [0])
    two = draw_contact_sheet(store, [0, 5])
    assert three.width == one.width
    assert three.height - two.height == two.height - one.height > 100
    # the same rows give the same picture, and other rows another
    assert np.array_equal(np.asarray(three)[: one.height - 40], np.asarray(one)[: one.height - 40])
    assert not np.array_equal(np.asarray(draw_contact_sheet(store, [1])), np.asarray(one))


def test_the_contact_sheet_shows_the_stored_views(demo_store_url: str) -> None:
    store = open_store(demo_store_url)
    page = np.asarray(draw_contact_sheet(store, [0])).reshape(-1, 3)
    view = store.read("views", [0])[0, 0]
    colours, counts = np.unique(view.reshape(-1, 3), axis=0, return_counts=True)
    surface = colours[np.argsort(-counts)[1]]  # after the background, the commonest colour of the shape
    assert (np.abs(page.astype(int) - surface).max(axis=1) <= 2).sum() > 20


def test_the_contact_sheet_needs_neither_parts_nor_colours_nor_many_views(tmp_path: Path) -> None:
    fields = [name for name in schema.INGEST_FIELDS if name not in ("colours", "part_labels")]
    store = write_small_store(str(tmp_path / "s"), fields=fields)
    assert draw_contact_sheet(store, [0, 1]).height > 300


def test_rows_for_the_contact_sheet_come_from_many_classes(demo_store_url: str) -> None:
    store = open_store(demo_store_url)
    rows = varied_rows(store, 8)
    labels = store.read("label", rows)
    assert len(rows) == len(set(labels.tolist())) == 8
    assert np.ptp(labels) == 21
    assert varied_rows(store, 100) == list(range(24))


def test_inspect_writes_the_contact_sheet(
    demo_store_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = run(capsys, demo_store_url, "--contact-sheet", str(tmp_path / "sheet.png"))
    assert code == 0
    assert str(tmp_path / "sheet.png") in text
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
