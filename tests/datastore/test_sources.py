"""Sources as a whole: which format a URL is taken for, and what a listing may hold."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import trimesh

from datastore.errors import AskedWrongly, SourceError
from datastore.sources import Listing, ReadingOptions, ShapeReference, open_source
from datastore.sources.files import SourceFiles

BOX = trimesh.creation.box(extents=[1, 2, 3])


def write_bundle(folder: Path) -> None:
    """One box, as index.csv and meshes.npz."""
    folder.mkdir()
    with (folder / "index.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "class", "split", "path"), ("a", "box", "train", "a.off")])
    np.savez(
        folder / "meshes.npz",
        vertices=BOX.vertices.astype(np.float32),
        faces=BOX.faces.astype(np.int32),
        vptr=np.array([0, 8]),
        fptr=np.array([0, 12]),
    )


def test_an_unknown_format_lists_the_known_ones(tmp_path: Path) -> None:
    BOX.export(tmp_path / "a.off")
    with pytest.raises(AskedWrongly, match=r"(?s)no format 'fbx'.*demo .*mesh_bundle .*mesh_folder "):
        open_source(str(tmp_path), "fbx")


def test_a_format_that_is_named_is_not_guessed(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle")
    BOX.export(tmp_path / "bundle/a.off")
    assert open_source(str(tmp_path / "bundle")).FORMAT == "mesh_bundle"
    for name in ("mesh_folder", "mesh_index", "mesh_bundle"):
        assert name == open_source(str(tmp_path / "bundle"), name).FORMAT


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "nothing is there"),
        (lambda path: path.mkdir(), "the folder is empty"),
        (lambda path: (path.mkdir(), (path / "a.fbx").write_text("")), "the folder holds a.fbx"),
        (lambda path: path.write_text(""), "this is a file"),
    ],
)
def test_what_is_no_source_is_described(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    make(tmp_path / "source")
    with pytest.raises(SourceError, match=f"{message}(?s:.*)class/split/name"):
        open_source(str(tmp_path / "source"))


def test_a_source_stands_on_the_axis_that_was_named(tmp_path: Path) -> None:
    BOX.export(tmp_path / "a.off")
    assert open_source(str(tmp_path)).listing.up_axis == "+Y"
    assert open_source(str(tmp_path), options=ReadingOptions(up_axis="-Z")).listing.up_axis == "-Z"


def test_a_url_of_a_file_has_its_folder_as_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "list.csv").write_text("path\n")
    files = SourceFiles(tmp_path / "list.csv")
    assert (files.single_file, files.where("a.off")) == ("list.csv", f"{tmp_path}/a.off")
    assert files.text("list.csv") == "path\n"
    monkeypatch.chdir(tmp_path)
    files = SourceFiles("list.csv")
    assert (files.where("a.off"), files.where(""), files.text("list.csv")) == ("a.off", "", "path\n")


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([], "no shapes"),
        ([ShapeReference("a", 2, "train", "")], "label 2, but there are 2 classes"),
        ([ShapeReference("a", 0, "dev", "")], "split 'dev'"),
        ([ShapeReference("caf\udce9", 0, "train", "")], r"'caf\\udce9' is the name of a file in another encoding than"),
    ],
)
def test_a_listing_that_contradicts_itself_is_refused(shapes: list[ShapeReference], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        Listing(shapes=shapes, class_names=("chair", "table"), splits=("train",))


def test_the_order_of_shapes_belongs_to_the_list() -> None:
    shapes = [ShapeReference(name, 0, "train", "") for name in "ab"]
    forward, backward = (Listing(order, ("chair",), ("train",)) for order in (shapes, shapes[::-1]))
    assert forward.hash != backward.hash
