"""ScanObjectNN: which variants lie in a folder, their masks and labels, and the raw files."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from datastore.errors import AskedWrongly, SourceError
from datastore.shape import PointCloud
from datastore.sources import ReadingOptions, ShapeError, Source, open_source
from datastore.sources.files import SourceFiles
from datastore.sources.scanobjectnn import CLASS_NAMES, ScanObjectNN

PARTIAL = ReadingOptions(partial=True)
NUM_POINTS = 32
ROWS = {"training": 3, "test": 2}


def write_files(folder: Path, kind: str = "", rows: dict[str, int] = ROWS, **changes: Any) -> Path:
    """Both files of a variant; `None` leaves an array out."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, num_rows) in enumerate(rows.items()):
        random = np.random.default_rng(seed)
        arrays = {
            "data": random.normal(size=(num_rows, NUM_POINTS, 3)).astype(np.float32),
            "label": np.arange(num_rows, dtype=np.int32) + 13 * seed,
            "mask": np.tile(np.int32([-1, 7, 9, -1]), (num_rows, NUM_POINTS // 4)),
        }
        name = f"{split}_objectdataset{kind}.h5" if kind != "renamed" else f"{split.removesuffix('ing')}.h5"
        with h5py.File(folder / name, "w") as file:
            for array_name, array in (arrays | changes).items():
                if array is not None:
                    file[array_name] = array
    return folder


def options(variant: str) -> ReadingOptions:
    return ReadingOptions(partial=True, variant=variant)


def cloud_of(source: Source, index: int) -> PointCloud:
    geometry = source.load(source.listing.shapes[index]).geometry
    assert isinstance(geometry, PointCloud)
    return geometry


def test_rows_keep_their_labels_and_splits_and_masks_become_parts(tmp_path: Path) -> None:
    source = open_source(str(write_files(tmp_path / "main_split")), options=PARTIAL)
    listing = source.listing
    assert source.FORMAT == "scanobjectnn"
    assert [(shape.id, listing.class_names[shape.label], shape.split) for shape in listing.shapes] == [
        ("training_objectdataset/0", "bag", "train"),
        ("training_objectdataset/1", "bin", "train"),
        ("training_objectdataset/2", "box", "train"),
        ("test_objectdataset/0", "sofa", "test"),
        ("test_objectdataset/1", "toilet", "test"),
    ]
    assert (listing.geometry, listing.num_points, listing.up_axis) == ("points", NUM_POINTS, "+Y")
    assert listing.part_names == ("background", "object")
    cloud = cloud_of(source, 4)
    assert cloud.part_labels is not None
    assert cloud.part_labels.dtype == np.int16
    assert np.array_equal(cloud.part_labels[:4], [0, 1, 1, 0])
    with h5py.File(tmp_path / "main_split/test_objectdataset.h5") as file:
        assert np.array_equal(cloud.points, file["data"][1])


def test_files_without_masks_have_no_parts(tmp_path: Path) -> None:
    source = open_source(str(write_files(tmp_path / "main_split", mask=None)), options=PARTIAL)
    assert source.listing.part_names == ()
    assert cloud_of(source, 0).part_labels is None


def write_everything(folder: Path) -> Path:
    for split in ("main_split", "main_split_nobg", "split1", "split4_nobg"):
        for kind in ("", "_augmented25_norot", "_augmented25rot", "_augmentedrot", "_augmentedrot_scale75"):
            write_files(folder / split, kind)
    return folder


@pytest.mark.parametrize(
    ("variant", "first_place"),
    [
        ("main_split", "main_split/training_objectdataset.h5#0"),
        ("OBJ_BG", "main_split/training_objectdataset.h5#0"),
        ("obj_only", "main_split_nobg/training_objectdataset.h5#0"),
        ("PB_T25", "main_split/training_objectdataset_augmented25_norot.h5#0"),
        ("PB_T25_R", "main_split/training_objectdataset_augmented25rot.h5#0"),
        ("PB_T50_R", "main_split/training_objectdataset_augmentedrot.h5#0"),
        ("PB_T50_RS", "main_split/training_objectdataset_augmentedrot_scale75.h5#0"),
        ("split4_nobg_augmentedrot", "split4_nobg/training_objectdataset_augmentedrot.h5#0"),
    ],
)
@pytest.mark.parametrize("above", ["", "h5_files/"])
def test_each_variant_is_found_by_its_name_and_by_the_papers(
    tmp_path: Path, variant: str, first_place: str, above: str
) -> None:
    write_everything(tmp_path / "set" / above)
    listing = open_source(str(tmp_path / "set"), options=options(variant)).listing
    assert listing.shapes[0].place == above + first_place
    assert len(listing.shapes) == 5


def test_without_a_choice_among_several_they_are_listed(tmp_path: Path) -> None:
    folder = write_everything(tmp_path / "set")
    with pytest.raises(
        AskedWrongly, match=r"20 variants of .*main_split \(OBJ_BG\), .*, split4_nobg.*Say which with --variant"
    ):
        open_source(str(folder), options=PARTIAL)
    with pytest.raises(AskedWrongly, match=r"no variant 'PB_T75' of ScanObjectNN; it has main_split \(OBJ_BG\)"):
        open_source(str(folder), options=options("PB_T75"))


def test_one_split_folder_alone_has_the_same_names(tmp_path: Path) -> None:
    write_everything(tmp_path / "set")
    listing = open_source(str(tmp_path / "set/main_split"), options=options("PB_T50_RS")).listing
    assert listing.shapes[0].place == "training_objectdataset_augmentedrot_scale75.h5#0"
    listing = open_source(str(tmp_path / "set/main_split_nobg"), options=options("OBJ_ONLY")).listing
    assert listing.shapes[0].place == "training_objectdataset.h5#0"
    (tmp_path / "set/main_split").rename(tmp_path / "set/mine")
    listing = open_source(str(tmp_path / "set/mine"), options=options("PB_T50_RS")).listing
    assert listing.shapes[0].place == "training_objectdataset_augmentedrot_scale75.h5#0"


def test_the_copy_with_other_names_is_read(tmp_path: Path) -> None:
    listing = open_source(str(write_files(tmp_path / "ScanObjectNN", "renamed")), options=PARTIAL).listing
    assert [shape.place for shape in listing.shapes] == [
        "train.h5#0",
        "train.h5#1",
        "train.h5#2",
        "test.h5#0",
        "test.h5#1",
    ]
    assert [shape.split for shape in listing.shapes] == ["train"] * 3 + ["test"] * 2


def rows_of(train: int, test: int) -> dict[str, int]:
    return {"training": train, "test": test}


@pytest.mark.parametrize(
    ("folder", "kind", "promised"),
    [
        ("main_split", "", 2_309),
        ("main_split_nobg", "", 2_309),
        ("main_split", "_augmentedrot_scale75", 11_416),
        ("anywhere", "renamed", 2_309),
    ],
)
def test_the_official_numbers_are_asked_for_and_can_be_waived(
    tmp_path: Path, folder: str, kind: str, promised: int
) -> None:
    path = write_files(tmp_path / folder, kind)
    with pytest.raises(SourceError, match=rf"3 found, and the data set has {promised:,}.*--partial"):
        open_source(str(path))


def test_whole_files_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datastore.sources.scanobjectnn._PLAIN", {"train": 3, "test": 2})
    monkeypatch.setattr("datastore.sources.scanobjectnn._PERTURBED", {"train": 4, "test": 3})
    monkeypatch.setattr("datastore.sources.scanobjectnn._NUM_POINTS", NUM_POINTS)
    for rows in (rows_of(3, 2), rows_of(4, 3)):  # whichever of the two the renamed copy is of
        folder = write_files(tmp_path / "copy", "renamed", rows, label=None)
        for name in ("train.h5", "test.h5"):
            with h5py.File(folder / name, "a") as file:
                file["label"] = np.zeros(len(file["data"]), np.int64)
        assert len(open_source(str(folder)).listing.shapes) == sum(rows.values())
    # no number is known of the other perturbations, and of the other splits
    for folder in (write_files(tmp_path / "main_split", "_augmentedrot"), write_files(tmp_path / "split2")):
        assert len(open_source(str(folder)).listing.shapes) == 5


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda f: write_files(f, label=np.int64([0, 1, 15]), rows={"training": 3}),
            "labels are whole numbers from 0 to 14",
        ),
        (lambda f: write_files(f, mask=np.zeros((3, 31)), rows={"training": 3}), r"array 'mask' is \(3, 31\)"),
        (lambda f: write_files(f, mask=None, rows={"training": 3}), "one file of variant main_split has a mask"),
        (lambda f: write_files(f, data=None, rows={"training": 3}), "has no array 'data'; it holds label, mask"),
        (
            lambda f: (f / "training_objectdataset.h5").write_bytes(b"\x89HDF"),
            "training_objectdataset.h5 is no HDF5 file",
        ),
    ],
)
def test_a_file_that_breaks_its_promise_is_refused(
    tmp_path: Path, break_it: Callable[[Path], object], message: str
) -> None:
    folder = write_files(tmp_path / "main_split")
    break_it(folder)
    with pytest.raises(SourceError, match=message):
        open_source(str(folder), options=PARTIAL)


def test_a_variant_without_one_of_its_files_is_a_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_files(tmp_path / "main_split")
    (folder / "training_objectdataset.h5").unlink()
    assert open_source(str(folder), options=PARTIAL).listing.splits == ("test",)
    with pytest.raises(
        SourceError, match=r"training_objectdataset\.h5 is missing: variant main_split has a file for each"
    ):
        open_source(str(folder))


def test_other_folders_are_not_taken_for_it(tmp_path: Path) -> None:
    assert not ScanObjectNN.recognises(SourceFiles(tmp_path))
    (tmp_path / "train.h5").write_bytes(b"")
    assert not ScanObjectNN.recognises(SourceFiles(tmp_path))
    with pytest.raises(SourceError, match="has no training_objectdataset"):
        open_source(str(tmp_path), "scanobjectnn")


# --- raw files


def raw_cloud(num_points: int = 8) -> np.ndarray:
    """Half of the points on a wall and the floor, the others on a chair but for one."""
    rows = np.random.default_rng(num_points).normal(size=(num_points, 11)).astype(np.float32)
    rows[:, 6:9] = np.arange(num_points)[:, None] * 30
    rows[:, 9] = 4
    rows[:, 10] = np.resize([1, 2, 5, 5, 5, 39, 0, 5], num_points)
    return rows


def write_raw(folder: Path, names: str = "scene0000_00_00003.bin\t4\t\nscene0001_00_00001.bin\t0\tt\n") -> Path:
    for class_name, name in (("chair", "scene0000_00_00003"), ("bag", "scene0001_00_00001")):
        (folder / class_name).mkdir(parents=True, exist_ok=True)
        rows = raw_cloud()
        (folder / class_name / f"{name}.bin").write_bytes(struct.pack("<f", len(rows)) + rows.tobytes())
        (folder / class_name / f"{name}_indices.bin").write_bytes(b"")
    (folder / "split_new.txt").write_text(names)
    return folder


@pytest.mark.parametrize("below", ["", "object_dataset"])
def test_raw_objects_keep_normals_colours_and_what_is_background(tmp_path: Path, below: str) -> None:
    write_raw(tmp_path / "set" / below)
    source = open_source(str(tmp_path / "set"), options=PARTIAL)
    listing = source.listing
    assert [(shape.id, shape.label, shape.split) for shape in listing.shapes] == [
        ("chair/scene0000_00_00003", CLASS_NAMES.index("chair"), "train"),
        ("bag/scene0001_00_00001", CLASS_NAMES.index("bag"), "test"),
    ]
    assert (listing.coloured, listing.with_normals, listing.num_points) == (True, True, None)
    cloud, rows = cloud_of(source, 0), raw_cloud()
    assert np.array_equal(cloud.points, rows[:, :3])
    assert np.array_equal(cloud.normals, rows[:, 3:6])
    assert np.array_equal(cloud.colours, rows[:, 6:9])
    assert np.array_equal(cloud.part_labels, [0, 0, 1, 1, 1, 0, 0, 1])


def test_a_raw_object_with_nothing_but_walls_has_unknown_parts(tmp_path: Path) -> None:
    folder = write_raw(tmp_path / "set")
    rows = raw_cloud()
    rows[:, 10] = 1
    (folder / "bag/scene0001_00_00001.bin").write_bytes(struct.pack("<f", len(rows)) + rows.tobytes())
    assert set(cloud_of(open_source(str(folder), options=PARTIAL), 1).part_labels) == {-1}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("scene0000_00_00003.bin\t15\n", r"split_new\.txt, line 1: label 15, and there are 15 classes"),
        ("scene0000_00_00003.bin 4\n", r"split_new\.txt, line 1: 'scene0000_00_00003\.bin 4' is not a file's name"),
        ("scene0000_00_00003.bin\t4\ttest\n", r"split_new\.txt, line 1"),
        ("scene0000_00_00003.bin\t4\n" * 2, "2 shapes are named 'chair/scene0000_00_00003'"),
        ("scene0009.bin\t4\n", "lists no shapes"),
    ],
)
def test_a_list_that_contradicts_itself_is_refused(tmp_path: Path, names: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        open_source(str(write_raw(tmp_path / "set", names)), options=PARTIAL)


def test_raw_objects_are_counted_and_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_raw(tmp_path / "set")
    with pytest.raises(SourceError, match=r"split_new\.txt: 2 found, and the data set has 2,902"):
        open_source(str(folder))
    monkeypatch.setattr("datastore.sources.scanobjectnn._NUM_RAW", 2)
    assert len(open_source(str(folder)).listing.shapes) == 2
    (folder / "bag/scene0001_00_00001.bin").unlink()
    with pytest.raises(SourceError, match=r"bag/scene0001_00_00001\.bin is missing, and split_new\.txt lists it"):
        open_source(str(folder))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\0\0", "has 2 bytes, and its 0 points need 4"),
        (struct.pack("<f", 9) + raw_cloud().tobytes(), "has 356 bytes, and its 9 points need 400"),
        (struct.pack("<f", 8) + raw_cloud().tobytes()[:-2], "has 354 bytes, and its 8 points need 356"),
        (struct.pack("<f", np.nan) + raw_cloud().tobytes(), "has 356 bytes, and its nan points"),
        (struct.pack("<12f", 1, np.nan, *[0] * 10), "some coordinates are not finite"),
        (struct.pack("<12f", 1, *[0] * 6, -5, *[0] * 4), "its colours are neither within"),
    ],
)
def test_a_raw_file_that_is_no_object_breaks_it_alone(tmp_path: Path, content: bytes, message: str) -> None:
    folder = write_raw(tmp_path / "set")
    (folder / "bag/scene0001_00_00001.bin").write_bytes(content)
    source = open_source(str(folder), options=PARTIAL)
    with pytest.raises(ShapeError, match=rf"bag/scene0001_00_00001\.bin:? {message}"):
        source.load(source.listing.shapes[1])
    cloud_of(source, 0)
