"""Labels: what a store lacks for a protocol is known before an encoder is."""

from pathlib import Path

import numpy as np
import pytest

from datastore.layout import Store, create_store, open_store
from datastore.schema import INGEST_FIELDS
from datastore.write import BlockWriter, publish
from tests.stores import sample_arrays, small_attributes, write_blocks, write_small_store
from trainer.evaluate import labels as labels_module
from trainer.evaluate.labels import unmet_needs

CHOOSES_C, PRESET = ["svm@heldout"], ["svm@recon"]


def labelled(folder: Path, *, train: list[int], test: list[int]) -> Store:
    """A store whose splits have these labels, train first."""
    attributes = small_attributes(num_rows=len(train + test), block_rows=16)
    store = create_store(str(folder / "shapes.zarr"), attributes, INGEST_FIELDS)
    arrays = sample_arrays(store)
    arrays["label"][:] = train + test
    arrays["split"][:] = [0] * len(train) + [1] * len(test)
    BlockWriter(store).write(0, arrays)
    publish(store)
    return open_store(store.url)


@pytest.mark.parametrize(
    ("train", "test", "lacks"),
    [
        ([0, 0, 1], [1], []),
        ([0, 0, 1], [-1, -1], ["split 'test' has no labelled shape; the store has 'train' 3, 'test' 2"]),
        ([0, 0, 1], [], ["split 'test' has no labelled shape; the store has 'train' 3, 'test' 0"]),
        ([2, 2, -1], [1], ["split 'train' has no labelled shapes of two classes; the store has 'train' 3, 'test' 1"]),
        (
            [0, 1, 2],
            [1],
            ["split 'train' has no two shapes of one class, so that none can be held out to choose C"],
        ),
    ],
)
def test_what_labels_lack_is_said(tmp_path: Path, train: list[int], test: list[int], lacks: list[str]) -> None:
    assert unmet_needs(labelled(tmp_path, train=train, test=test), CHOOSES_C) == lacks


def test_a_preset_holds_no_shape_out(tmp_path: Path) -> None:
    assert unmet_needs(labelled(tmp_path, train=[0, 1, 2], test=[1]), PRESET) == []


def test_labels_are_read_until_they_suffice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels_module, "_ROWS_AT_A_TIME", 2)
    store = labelled(tmp_path, train=[-1, -1, 0, 0, 1, 0], test=[-1, 1, -1, -1])
    read: list[list[int]] = []
    whole = store.read

    def noted(path: str, rows: np.ndarray) -> np.ndarray:
        read.append(rows.tolist())
        return whole(path, rows)

    monkeypatch.setattr(store, "read", noted)
    assert unmet_needs(store, PRESET) == []
    assert read == [[6, 7], [0, 1], [2, 3], [4, 5]]


def test_a_store_without_classes_or_splits_is_told_from_its_attributes(tmp_path: Path) -> None:
    no_test = write_small_store(str(tmp_path / "a.zarr"), small_attributes(splits=("train",)))
    assert unmet_needs(no_test, PRESET) == ["it has no split 'test'; it has 'train' 70"]
    unlabelled = small_attributes(class_names=())
    store = create_store(str(tmp_path / "b.zarr"), unlabelled, INGEST_FIELDS)
    write_blocks(store, [0])
    publish(store)
    assert unmet_needs(open_store(store.url), PRESET) == [
        "its shapes are of 0 classes, and a classifier tells two or more apart"
    ]
    assert unmet_needs(no_test, []) == []


def test_rows_that_are_still_to_come_may_have_labels(tmp_path: Path) -> None:
    store = create_store(str(tmp_path / "s.zarr"), small_attributes(num_rows=70), INGEST_FIELDS)
    arrays = sample_arrays(store)
    arrays["label"][:] = -1
    BlockWriter(store).write(0, {name: array[:32] for name, array in arrays.items()})
    publish(store)
    assert unmet_needs(open_store(store.url), CHOOSES_C) == []
