"""What the folders above a file say of its shape."""

import pytest

from datastore.sources.class_folders import classes_and_splits, ids_of


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (["chair/train/a.off", "chair/Test/b.off"], [("chair", "train"), ("chair", "test")]),
        (["valid/chair/a.off", "test/chair/b.off"], [("chair", "val"), ("chair", "test")]),
        (["chair/a.off", "table/round/b.off"], [("chair", "train"), ("table", "train")]),
        (["train/a.off", "test/b.off"], [("", "train"), ("", "test")]),
        (["a.off", "test/b.off"], [("", "train"), ("", "test")]),
        (["chair/a.off", "chair/test/b.off"], [("chair", "train"), ("chair", "test")]),
        # a class of trains
        (["car/train/a.off", "train/test/b.off"], [("car", "train"), ("train", "test")]),
        (["train/car/a.off", "test/train/b.off"], [("car", "train"), ("train", "test")]),
        (["train/train/a.off", "train/test/b.off"], [("train", "train"), ("train", "test")]),
    ],
)
def test_class_and_split_are_folders_in_either_order(places: list[str], expected: list[tuple[str, str]]) -> None:
    assert classes_and_splits(places) == expected


def test_names_that_differ_in_their_suffix_alone_keep_it() -> None:
    assert ids_of(["a/b.off", "a/b.ply", "a/c.d.off"]) == ["a/b.off", "a/b.ply", "a/c.d"]
