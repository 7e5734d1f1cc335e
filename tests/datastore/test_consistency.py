"""Fields that contradict each other are noticed, each kind by its own message."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from datastore.consistency import find_contradictions
from datastore.layout import INGEST, create_store, open_store
from datastore.write import BlockWriter, publish

Arrays = dict[str, np.ndarray]
ROW = 3


@pytest.fixture(scope="module")
def arrays(demo_store_url: str) -> Arrays:
    """The first 16 rows of a good store."""
    store = open_store(demo_store_url)
    return {name: store.read(name, range(16)) for name in store.ingest_fields}


def contradictions(arrays: Arrays, like: str, url: Path) -> list[str]:
    """What is found in a store of these rows."""
    original = open_store(like)
    attributes = original.attributes.model_copy(update={"num_rows": 16, "block_rows": 16})
    store = create_store(url, attributes, original.ingest_fields)
    BlockWriter(store, INGEST).write(0, arrays)
    publish(store)
    return find_contradictions(open_store(url))


def change(field: str, index: object, value: object) -> Callable[[Arrays], None]:
    def apply(arrays: Arrays) -> None:
        arrays[field][index] = value

    return apply


def give_another_shapes_visibility(arrays: Arrays) -> None:
    arrays["visibility"][ROW] = ~arrays["visibility"][ROW]


def move_pixels(arrays: Arrays) -> None:
    arrays["pixels"][ROW] += 2


def dirty_background(arrays: Arrays) -> None:
    arrays["views"][ROW, 0, 0, 0] = 7


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("points", (ROW, 5, 1), np.nan), "some points are not finite"),
        (change("points", (ROW, 5), [0, 1.2, 0]), "a point lies at distance 1.200, outside the unit ball"),
        (change("normals", (ROW, 5), 0), "normals have lengths from 0.000"),
        (change("scale", ROW, 0), "scale 0.0 lead back to nowhere"),
        (change("centre", (ROW, 1), np.inf), "lead back to nowhere"),
        (change("label", ROW, 22), "label 22, with 22 classes"),
        (change("split", ROW, 2), "split 2, with 2 splits"),
        (change("part_labels", (ROW, 7), 3000), "part labels up to 3000"),
        (move_pixels, "pixels differ from where the cameras see the points, by up to 2"),
        (dirty_background, "a view shows something where its depth says that nothing was hit"),
        (give_another_shapes_visibility, "visibility and depth contradict each other"),
    ],
)
def test_a_contradiction_is_found_in_its_row(
    arrays: Arrays, demo_store_url: str, tmp_path: Path, damage: Callable[[Arrays], None], message: str
) -> None:
    damaged = {name: array.copy() for name, array in arrays.items()}
    damage(damaged)
    found = contradictions(damaged, demo_store_url, tmp_path / "s")
    assert found
    assert all(problem.startswith(f"row {ROW} ({arrays['id'][ROW]}): ") for problem in found)
    assert any(message in problem for problem in found)


def test_two_rows_of_one_id_are_found(arrays: Arrays, demo_store_url: str, tmp_path: Path) -> None:
    damaged = {name: array.copy() for name, array in arrays.items()}
    damaged["id"][4] = damaged["id"][9]
    assert contradictions(damaged, demo_store_url, tmp_path / "s") == [f"2 rows have the id '{arrays['id'][9]}'"]


def test_a_good_store_has_none_and_every_row_is_looked_at(demo_store_url: str) -> None:
    seen: list[int] = []
    assert find_contradictions(open_store(demo_store_url), seen.append) == []
    assert seen == [16, 24]


def test_a_store_that_is_wrong_throughout_is_not_listed_without_end(
    arrays: Arrays, demo_store_url: str, tmp_path: Path
) -> None:
    damaged = {name: array.copy() for name, array in arrays.items()}
    damaged["label"][:] = 99
    damaged["normals"][:] = 0
    damaged["scale"][:] = 0
    damaged["views"][:] = 0
    found = contradictions(damaged, demo_store_url, tmp_path / "s")
    assert len(found) == 51
    assert found[-1] == "... and more; stopped looking after row 15"
