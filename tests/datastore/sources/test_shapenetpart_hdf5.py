"""ShapeNetPart in HDF5: splits, parts, and which folder it is. What all HDF5 formats share is in test_modelnet40_hdf5.py."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from datastore.errors import SourceError
from datastore.shape import PointCloud
from datastore.sources import ReadingOptions, ShapeError, open_source
from datastore.sources.files import SourceFiles
from datastore.sources.shapenetpart_hdf5 import ShapeNetPartHdf5

PARTIAL = ReadingOptions(partial=True)
NUM_POINTS = 32
FIRST_PARTS = {0: 0, 4: 12, 15: 47}
NUM_FILES = {"train": 2, "val": 1, "test": 1}


def write_tree(folder: Path, **changes: Any) -> Path:
    """Three shapes a file, an airplane, a chair and a table, each point of the first or the second part."""
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    labels = np.array(list(FIRST_PARTS), np.uint8)[:, None]
    firsts = np.array(list(FIRST_PARTS.values()))[:, None]
    for split, count in NUM_FILES.items():
        for number in range(count):
            arrays = {
                "data": random.normal(size=(3, NUM_POINTS, 3)).astype(np.float32),
                "label": labels,
                "pid": (firsts + np.arange(NUM_POINTS) % 2).astype(np.uint8),
            }
            with h5py.File(folder / f"ply_data_{split}{number}.h5", "w") as file:
                for name, array in (arrays | changes).items():
                    if array is not None:
                        file[name] = array
    return folder


def test_shapes_keep_their_splits_categories_and_parts(tmp_path: Path) -> None:
    source = open_source(str(write_tree(tmp_path / "set")), options=PARTIAL)
    listing = source.listing
    assert source.FORMAT == "shapenetpart_hdf5"
    assert [shape.id for shape in listing.shapes] == [
        f"ply_data_{split}{number}/{row}"
        for split, count in NUM_FILES.items()
        for number in range(count)
        for row in range(3)
    ]
    assert [shape.split for shape in listing.shapes] == ["train"] * 6 + ["val"] * 3 + ["test"] * 3
    assert [listing.class_names[shape.label] for shape in listing.shapes] == ["Airplane", "Chair", "Table"] * 4
    assert (listing.geometry, listing.num_points, listing.splits) == ("points", NUM_POINTS, ("train", "val", "test"))
    for index, expected in (
        (0, ["Airplane/0", "Airplane/1"]),
        (7, ["Chair/0", "Chair/1"]),
        (11, ["Table/0", "Table/1"]),
    ):
        cloud = source.load(listing.shapes[index]).geometry
        assert isinstance(cloud, PointCloud)
        assert cloud.part_labels is not None
        assert [listing.part_names[part] for part in cloud.part_labels[:2]] == expected
        path, _, row = listing.shapes[index].place.partition("#")
        with h5py.File(tmp_path / "set" / path) as file:
            assert np.array_equal(cloud.points, file["data"][int(row)])


def test_the_official_numbers_are_asked_for_and_can_be_waived(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"train shapes in .*: 6 found, and the data set has 12,137.*--partial"):
        open_source(str(write_tree(tmp_path / "set")))


def test_a_shape_with_a_part_of_another_category_is_broken(tmp_path: Path) -> None:
    parts = np.repeat([[0], [4], [47]], NUM_POINTS, axis=1).astype(np.uint8)
    source = open_source(str(write_tree(tmp_path / "set", pid=parts)), options=PARTIAL)
    with pytest.raises(ShapeError, match=r"train0\.h5, row 1: point 0 is of part 4, and Chair has parts 12 to 15"):
        source.load(source.listing.shapes[1])
    source.load(source.listing.shapes[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pid": None}, r"train0\.h5 has no array pid; it holds data, label"),
        ({"pid": np.zeros((3, 31), np.uint8)}, r"train0\.h5: array 'pid' is \(3, 31\)"),
        ({"label": np.full((3, 1), 16)}, r"train0\.h5: labels are whole numbers from 0 to 15"),
    ],
)
def test_a_file_that_breaks_its_promise_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = write_tree(tmp_path / "set", **changes)
    with pytest.raises(SourceError, match=message):
        open_source(str(folder), options=PARTIAL)


def test_a_listed_file_that_is_missing_is_asked_for(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "set")
    (folder / "train_hdf5_file_list.txt").write_text("ply_data_train0.h5\nply_data_train1.h5\nply_data_train2.h5\n")
    with pytest.raises(SourceError, match=r"ply_data_train2\.h5 is missing, and train_hdf5_file_list.txt lists it"):
        open_source(str(folder))
    assert len(open_source(str(folder), options=PARTIAL).listing.shapes) == 12


def test_a_part_of_it_without_what_tells_it_apart_can_be_named(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "set")
    (folder / "ply_data_val0.h5").unlink()
    assert not ShapeNetPartHdf5.recognises(SourceFiles(folder))
    assert len(open_source(str(folder), "shapenetpart_hdf5", PARTIAL).listing.shapes) == 9
    (folder / "all_object_categories.txt").write_text("Airplane\t02691156\n")
    assert ShapeNetPartHdf5.recognises(SourceFiles(folder))


def test_a_folder_without_any_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="has no ply_data_train"):
        open_source(str(tmp_path), "shapenetpart_hdf5", PARTIAL)
