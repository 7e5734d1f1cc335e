"""Objaverse's tree: lists, labels and licences, and what is said where they do not fit."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh

from datastore.errors import SourceError
from datastore.mesh import Mesh
from datastore.sources import ReadingOptions, open_source
from datastore.sources.objaverse import Objaverse

PARTIAL = ReadingOptions(partial=True)
PLACES = {"c0ffee": "000-001", "0ddba11": "000-000", "decade": "000-001"}
LABELS = {"mug": ["c0ffee"], "ball": ["0ddba11", "c0ffee"], "zebra": []}
LICENCES = {"000-000": {"0ddba11": {"license": "by"}}, "000-001": {"c0ffee": {"license": "cc0"}, "decade": {}}}


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(json.dumps(content).encode()))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for size, (uid, folder) in enumerate(PLACES.items(), start=1):
        path = tmp_path / f"glbs/{folder}/{uid}.glb"
        path.parent.mkdir(parents=True, exist_ok=True)
        trimesh.creation.box(extents=[size, 2, 3]).export(path)
    write_json(tmp_path / "object-paths.json.gz", {uid: f"glbs/{place}/{uid}.glb" for uid, place in PLACES.items()})
    write_json(tmp_path / "lvis-annotations.json.gz", LABELS)
    for folder, objects in LICENCES.items():
        write_json(tmp_path / f"metadata/{folder}.json.gz", objects)
    write_json(tmp_path / "metadata/000-159.json.gz", {"elsewhere": {"license": "by"}})
    return tmp_path


def test_objects_come_in_the_order_of_their_list_with_labels_and_licences(tree: Path) -> None:
    source = open_source(str(tree))
    assert isinstance(source, Objaverse)
    listing = source.listing
    assert (listing.class_names, listing.splits, listing.up_axis) == (("ball", "mug", "zebra"), ("train",), "+Y")
    assert [(shape.id, shape.label, shape.licence) for shape in listing.shapes] == [
        ("c0ffee", 0, "CC0-1.0"),  # in two categories: the first by the alphabet
        ("0ddba11", 0, "CC-BY-4.0"),
        ("decade", -1, ""),
    ]
    mesh = source.load(listing.shapes[1]).geometry
    assert isinstance(mesh, Mesh)
    assert np.allclose(np.ptp(mesh.vertices, axis=0), [2, 2, 3])


def test_without_labels_and_metadata_shapes_are_unlabelled(tree: Path) -> None:
    (tree / "lvis-annotations.json.gz").unlink()
    for path in (tree / "metadata").iterdir():
        path.unlink()
    assert {(shape.label, shape.licence) for shape in open_source(str(tree)).listing.shapes} == {(-1, "")}


def test_objects_that_were_not_fetched_are_left_out_when_a_part_will_do(tree: Path) -> None:
    (tree / "glbs/000-001/decade.glb").unlink()
    with pytest.raises(SourceError, match=r"object-paths.json.gz lists: 2 found, and the data set has 3.*--partial"):
        open_source(str(tree))
    assert [shape.id for shape in open_source(str(tree), options=PARTIAL).listing.shapes] == ["c0ffee", "0ddba11"]


def test_without_its_list_only_a_part_can_be_taken(tree: Path) -> None:
    (tree / "object-paths.json.gz").unlink()
    with pytest.raises(SourceError, match=r"object-paths.json.gz is missing.*--partial"):
        open_source(str(tree))
    assert {shape.id for shape in open_source(str(tree), options=PARTIAL).listing.shapes} == set(PLACES)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda tree: cut(tree / "object-paths.json.gz"), r"object-paths.json.gz is damaged.*Fetch it again"),
        (lambda tree: (tree / "metadata/000-000.json.gz").write_bytes(b"not gzip"), "000-000.json.gz is damaged"),
        (lambda tree: write_json(tree / "object-paths.json.gz", ["a"]), "should be one JSON object"),
        (lambda tree: write_json(tree / "object-paths.json.gz", {"a": "a.obj"}), "a path ending in .glb"),
        (lambda tree: write_json(tree / "lvis-annotations.json.gz", {"mug": "c0ffee"}), "'mug' has no list"),
        (lambda tree: write_json(tree / "lvis-annotations.json.gz", {"mug": ["x"]}), "1 objects .* x for one"),
    ],
)
def test_lists_that_are_damaged_or_do_not_fit_are_refused(
    tree: Path, break_it: Callable[[Path], object], message: str
) -> None:
    break_it(tree)
    with pytest.raises(SourceError, match=message):
        open_source(str(tree))


def test_an_object_that_changes_its_size_changes_the_list(tree: Path) -> None:
    before = open_source(str(tree)).listing.hash
    trimesh.creation.icosphere(1).export(tree / "glbs/000-001/decade.glb")
    assert open_source(str(tree)).listing.hash != before
