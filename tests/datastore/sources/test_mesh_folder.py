"""Trees of mesh files: what their folders say, ModelNet's among them, and what is said where they do not add up."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import fsspec
import numpy as np
import pytest
import trimesh

from datastore.cameras import rig_by_name
from datastore.errors import AskedWrongly, SourceError
from datastore.ingest import ingest
from datastore.layout import open_store
from datastore.mesh import Mesh
from datastore.sources import Listing, ReadingOptions, Source, open_source
from datastore.sources.files import SourceFiles
from datastore.sources.mesh_folder import MeshFolder

BOX = trimesh.creation.box(extents=[1, 2, 3])
PARTIAL = ReadingOptions(partial=True)
MODELNET = ("chair/train/chair_0001", "chair/test/chair_0890", "night_stand/train/night_stand_0001")


def write_boxes(folder: Path, places: Sequence[str], suffix: str = ".off") -> None:
    for place in places:
        path = folder / f"{place}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        BOX.export(path)


def described(listing: Listing) -> list[tuple[str, str, str]]:
    names = (*listing.class_names, "")
    return [(shape.id, names[shape.label], shape.split) for shape in listing.shapes]


def load_only(source: Source) -> Mesh:
    (shape,) = source.listing.shapes
    mesh = source.load(shape).geometry
    assert isinstance(mesh, Mesh)
    return mesh


def test_class_and_split_come_from_the_folders_in_either_order(tmp_path: Path) -> None:
    write_boxes(
        tmp_path,
        ("chair/train/a", "chair/test/b", "Test/night_stand/c", "night_stand/valid/d", "sofa/e", "sofa/sub/deeper/f"),
    )
    write_boxes(tmp_path, ("chair/train/.a", "__MACOSX/chair/g"))
    (tmp_path / "chair/train/notes.txt").write_text("")
    listing = open_source(str(tmp_path)).listing
    assert listing.class_names == ("chair", "night_stand", "sofa")
    assert listing.splits == ("train", "val", "test")
    assert listing.up_axis == "+Y"
    assert described(listing) == [
        ("Test/night_stand/c", "night_stand", "test"),
        ("chair/test/b", "chair", "test"),
        ("chair/train/a", "chair", "train"),
        ("night_stand/valid/d", "night_stand", "val"),
        ("sofa/e", "sofa", "train"),
        ("sofa/sub/deeper/f", "sofa", "train"),
    ]


def test_files_without_folders_are_unlabelled_and_for_training(tmp_path: Path) -> None:
    write_boxes(tmp_path, "ab", ".stl")
    listing = open_source(str(tmp_path)).listing
    assert (listing.class_names, listing.coloured) == ((), False)
    assert {(shape.label, shape.split) for shape in listing.shapes} == {(-1, "train")}


def test_files_that_differ_only_in_their_suffix_keep_it(tmp_path: Path) -> None:
    write_boxes(tmp_path, ("chair/a", "chair/b"))
    write_boxes(tmp_path, ("chair/a",), ".obj")
    assert [shape.id for shape in open_source(str(tmp_path)).listing.shapes] == [
        "chair/a.obj",
        "chair/a.off",
        "chair/b",
    ]


def test_a_file_that_changes_its_size_changes_the_list(tmp_path: Path) -> None:
    write_boxes(tmp_path, "a")
    before = open_source(str(tmp_path)).listing.hash
    with (tmp_path / "a.off").open("a") as file:
        file.write("# \n")
    assert open_source(str(tmp_path)).listing.hash != before


def test_a_folder_behind_a_url_is_read_as_one_on_a_disk() -> None:
    memory = fsspec.filesystem("memory")
    try:
        with memory.open("/corpus/chair/train/a.stl", "wb") as file:
            file.write(BOX.export(file_type="stl"))
        source = open_source("memory://corpus")
        assert described(source.listing) == [("chair/train/a", "chair", "train")]
        assert len(load_only(source).faces) == 12
    finally:
        memory.rm("/corpus", recursive=True)


# --- recognising


class CountingFiles(SourceFiles):
    looked = 0

    def entries(self, folder: str = "") -> list[str]:
        self.looked += 1
        return super().entries(folder)


def test_a_wide_tree_is_recognised_by_its_first_folders(tmp_path: Path) -> None:
    for folder in range(200):
        (tmp_path / f"{folder:03d}/train").mkdir(parents=True)
    write_boxes(tmp_path, ("000/train/a",))
    files = CountingFiles(str(tmp_path))
    assert MeshFolder.recognises(files)
    assert files.looked < 50
    shutil.rmtree(tmp_path / "000/train")
    assert not MeshFolder.recognises(CountingFiles(str(tmp_path)))


def test_a_folder_of_other_files_is_not_recognised(tmp_path: Path) -> None:
    (tmp_path / "sub.d").mkdir()
    for name in ("notes.txt", "sub.d/more.txt"):
        (tmp_path / name).write_text("")
    assert not MeshFolder.recognises(SourceFiles(tmp_path))
    with pytest.raises(SourceError, match=r"(?s)the folder holds notes.txt, sub.d.* class/split/name"):
        open_source(str(tmp_path))
    with pytest.raises(SourceError, match=r"No file below it ends in \.off"):
        open_source(str(tmp_path), "mesh_folder")


# --- ModelNet


@pytest.mark.parametrize("top", ["", "ModelNet10/"])
def test_modelnet_is_recognised_by_its_names(tmp_path: Path, top: str) -> None:
    write_boxes(tmp_path, [top + place for place in MODELNET])
    listing = open_source(str(tmp_path), options=PARTIAL).listing
    assert (listing.up_axis, len(listing.class_names), listing.class_names[6]) == ("+Z", 10, "night_stand")
    assert described(listing) == [
        (f"{top}chair/test/chair_0890", "chair", "test"),
        (f"{top}chair/train/chair_0001", "chair", "train"),
        (f"{top}night_stand/train/night_stand_0001", "night_stand", "train"),
    ]


def test_a_class_that_only_modelnet40_has_makes_it_modelnet40(tmp_path: Path) -> None:
    write_boxes(tmp_path, (*MODELNET, "airplane/train/airplane_0001"))
    with pytest.raises(
        SourceError, match=r"train shapes of modelnet40: 3 found, and the data set has 9,843.*--partial"
    ):
        open_source(str(tmp_path))
    listing = open_source(str(tmp_path), options=PARTIAL).listing
    assert (listing.class_names[0], listing.class_names[-1], len(listing.class_names)) == ("airplane", "xbox", 40)
    assert list(listing.class_names) == sorted(listing.class_names)


def test_which_modelnet_it_is_can_be_said(tmp_path: Path) -> None:
    write_boxes(tmp_path, MODELNET)
    partial40 = ReadingOptions(partial=True, variant="modelnet40")
    assert len(open_source(str(tmp_path), options=partial40).listing.class_names) == 40
    with pytest.raises(AskedWrongly, match="modelnet10 or modelnet40, not 'modelnet'"):
        open_source(str(tmp_path), options=ReadingOptions(variant="modelnet"))
    write_boxes(tmp_path, ("spoon/train/spoon_0001",))
    assert len(open_source(str(tmp_path)).listing.class_names) == 3  # an ordinary folder
    with pytest.raises(SourceError, match="modelnet40 has no class spoon"):
        open_source(str(tmp_path), options=partial40)


def test_modelnet_goes_into_a_store_with_its_top_up(tmp_path: Path) -> None:
    write_boxes(tmp_path / "source", MODELNET)
    (tmp_path / "source/chair/train/chair_0001.off").write_text(BOX.export(file_type="off").replace("OFF\n", "OFF"))
    (tmp_path / "source/chair/test/chair_0890.off").write_text("OFF\n")
    source = open_source(str(tmp_path / "source"), options=PARTIAL)
    summary = ingest(source, str(tmp_path / "store"), rig=rig_by_name("azimuth12", 16), num_points=32, num_workers=1)
    assert [(entry.id, entry.reason.split(":")[0]) for entry in summary.quarantine] == [
        ("chair/test/chair_0890", "off")
    ]
    store = open_store(str(tmp_path / "store"))
    rows = {name: store.read(name, range(3)) for name in ("id", "label", "points", "centre", "scale")}
    assert [str(name) for name in rows["id"]] == [shape.id for shape in source.listing.shapes]
    assert rows["label"].tolist() == [2, 2, 6]
    points = rows["points"][1] * rows["scale"][1] + rows["centre"][1]
    # the box is 1 x 2 x 3 with z up: with y up it is 1 x 3 x 2, and every point lies on one of its sides
    assert np.allclose(np.abs(points / [0.5, 1.5, 1]).max(axis=1), 1, atol=1e-5)
