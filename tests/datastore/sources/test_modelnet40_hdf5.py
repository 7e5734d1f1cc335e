"""ModelNet40 in HDF5: its lists, labels, names and order, and what is said where files contradict each other.

What is shared by all HDF5 formats (damage, shapes, types, reading row by row) is tested here.
"""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import h5py
import numpy as np
import pytest

from datastore.errors import SourceError
from datastore.shape import PointCloud
from datastore.sources import ReadingOptions, ShapeError, Source
from datastore.sources.files import SourceFiles
from datastore.sources.modelnet40_hdf5 import ModelNet40Hdf5

CLASS_NAMES = ("airplane", "chair", "night_stand")
PARTIAL = ReadingOptions(partial=True)
NUM_POINTS = 64


def write_file(path: Path, num_rows: int, seed: int = 0, **changes: Any) -> None:
    """A file as the data set has it, in chunks across rows; `None` leaves an array out."""
    random = np.random.default_rng(seed)
    data = random.normal(size=(num_rows, NUM_POINTS, 3)).astype(np.float32)
    arrays = {"data": data, "label": (np.arange(num_rows) % 3).astype(np.uint8)[:, None]} | changes
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            if array is not None:
                file.create_dataset(name, data=array, compression="gzip")


def write_tree(folder: Path, **changes: Any) -> Path:
    """Two training files and one for test, with the lists of the original repository and names for one file."""
    folder.mkdir(exist_ok=True)
    (folder / "shape_names.txt").write_text("\n".join(CLASS_NAMES) + "\n")
    for split, numbers in (("train", (1, 0)), ("test", (0,))):
        lines = [f"data/modelnet40_ply_hdf5_2048/ply_data_{split}{number}.h5" for number in numbers]
        (folder / f"{split}_files.txt").write_text("\n".join(lines))
        for number in numbers:
            write_file(folder / f"ply_data_{split}{number}.h5", 4, seed=number, **changes)
    names = [f"{CLASS_NAMES[row % 3]}/{CLASS_NAMES[row % 3]}_{row:04d}.ply" for row in range(4)]
    (folder / "ply_data_train_0_id2file.json").write_text(json.dumps(names))
    return folder


def opened(folder: Path, options: ReadingOptions = PARTIAL) -> ModelNet40Hdf5:
    return ModelNet40Hdf5.open(SourceFiles(folder), options)


def cloud_of(source: Source, index: int) -> PointCloud:
    geometry = source.load(source.listing.shapes[index]).geometry
    assert isinstance(geometry, PointCloud)
    return geometry


def test_shapes_are_listed_by_the_numbers_of_their_files_with_their_own_names(tmp_path: Path) -> None:
    source = opened(write_tree(tmp_path / "set"))
    listing = source.listing
    assert [(shape.id, shape.label, shape.split) for shape in listing.shapes] == [
        ("airplane/airplane_0000", 0, "train"),
        ("chair/chair_0001", 1, "train"),
        ("night_stand/night_stand_0002", 2, "train"),
        ("airplane/airplane_0003", 0, "train"),
        *((f"ply_data_train1/{row}", row % 3, "train") for row in range(4)),
        *((f"ply_data_test0/{row}", row % 3, "test") for row in range(4)),
    ]
    assert (listing.class_names, listing.splits) == (CLASS_NAMES, ("train", "test"))
    assert (listing.geometry, listing.num_points, listing.with_normals) == ("points", NUM_POINTS, False)
    for index, (path, row) in enumerate([("ply_data_train0.h5", 0), ("ply_data_train0.h5", 1)]):
        with h5py.File(tmp_path / "set" / path) as file:
            assert np.array_equal(cloud_of(source, index).points, file["data"][row])


def test_rows_of_several_files_may_be_read_in_any_order(tmp_path: Path) -> None:
    source = opened(write_tree(tmp_path / "set"))
    forward = [cloud_of(source, index).points for index in range(12)]
    for index in (11, 0, 7, 3, 8, 1):
        assert np.array_equal(cloud_of(source, index).points, forward[index])
    assert len({points.tobytes() for points in forward}) == 8  # train0 and test0 were made with one seed


def test_labels_of_one_axis_and_other_types_mean_the_same(tmp_path: Path) -> None:
    labels = np.arange(4, dtype=np.int64) % 3
    one, other = (
        opened(write_tree(tmp_path / name, label=values))
        for name, values in (("one", labels), ("other", labels.astype(np.float32)[:, None]))
    )
    assert [shape.label for shape in one.listing.shapes] == [shape.label for shape in other.listing.shapes]


def test_normals_are_given_where_every_file_has_them(tmp_path: Path) -> None:
    normals = np.tile(np.float64([0, 0, 1]), (4, NUM_POINTS, 1))
    source = opened(write_tree(tmp_path / "set", normal=normals, faceId=np.zeros((4, NUM_POINTS), np.int32)))
    assert source.listing.with_normals
    cloud = cloud_of(source, 3)
    assert cloud.normals is not None
    assert cloud.normals.dtype == np.float32
    assert np.array_equal(cloud.normals, normals[0])
    write_file(tmp_path / "set/ply_data_test0.h5", 4)
    source = opened(tmp_path / "set")
    assert not source.listing.with_normals
    assert cloud_of(source, 0).normals is None


def test_files_are_found_without_lists(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "set")
    with_lists = opened(folder).listing.hash
    for split in ("train", "test"):
        (folder / f"{split}_files.txt").unlink()
    assert opened(folder).listing.hash == with_lists


def test_the_official_numbers_are_asked_for_and_can_be_waived(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "set")
    with pytest.raises(SourceError, match=r"3 found, and the data set has 40.*--partial"):
        opened(folder, ReadingOptions())
    (folder / "shape_names.txt").write_text("\n".join([*CLASS_NAMES, *(f"z{number}" for number in range(37))]))
    with pytest.raises(SourceError, match=r"train shapes in .*set: 8 found, and the data set has 9,840.*--partial"):
        opened(folder, ReadingOptions())


def test_a_source_travels_without_its_open_file(tmp_path: Path) -> None:
    source = opened(write_tree(tmp_path / "set"))
    before = len(pickle.dumps(source))
    expected = cloud_of(source, 5).points
    shapes = source.listing.shapes
    assert len(pickle.dumps(source)) == before < 3_000
    copy = pickle.loads(pickle.dumps(source))
    assert np.array_equal(copy.load(shapes[5]).geometry.points, expected)


def test_a_remote_data_set_is_read_like_a_local_one(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "set")
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/modelnet-hdf5/{path.name}", path.read_bytes())
    remote = ModelNet40Hdf5.open(SourceFiles("memory://modelnet-hdf5"), PARTIAL)
    local = opened(folder)
    assert remote.listing.hash == local.listing.hash
    assert np.array_equal(cloud_of(remote, 9).points, cloud_of(local, 9).points)


def test_nothing_is_written_and_nothing_is_locked(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "set")
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    for path in folder.iterdir():
        path.chmod(0o444)
    with h5py.File(folder / "ply_data_train0.h5", "r"):  # which locks the file for readers that lock too
        cloud_of(opened(folder), 0)
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before


def test_other_clouds_behind_the_same_names_are_another_list(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "set")
    before = opened(folder).listing.hash
    write_file(folder / "ply_data_train1.h5", 4, seed=5)
    assert opened(folder).listing.hash != before


def test_it_is_recognised_and_shapenetpart_is_not_taken_for_it(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "set")
    assert ModelNet40Hdf5.recognises(SourceFiles(folder))
    write_file(folder / "ply_data_val0.h5", 1)
    assert not ModelNet40Hdf5.recognises(SourceFiles(folder))
    assert not ModelNet40Hdf5.recognises(SourceFiles(tmp_path))


# --- what is wrong with a file


def damage(path: Path) -> None:
    """Compressed data become noise; the file's structure stays."""
    with h5py.File(path) as file:
        chunk = file["data"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    path.write_bytes(content)


Damage = Callable[[Path], object]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "shape_names.txt").unlink(), "shape_names.txt is missing: it says what the labels mean"),
        (
            lambda f: write_file(f / "ply_data_train1.h5", 4, data=None),
            r"train1\.h5 has no array 'data'; it holds label",
        ),
        (
            lambda f: write_file(f / "ply_data_train1.h5", 4, label=None),
            r"train1\.h5 has no array 'label'; it holds data",
        ),
        (
            lambda f: write_file(f / "ply_data_train1.h5", 4, data=np.zeros((4, 3), np.float32)),
            r"train1\.h5: array 'data' is \(4, 3\), and \(n, p, 3\) is needed",
        ),
        (
            lambda f: write_file(f / "ply_data_train1.h5", 4, data=np.zeros((4, 64, 2), np.float32)),
            r"train1\.h5: array 'data' is \(4, 64, 2\), and \(n, p, 3\)",
        ),
        (
            lambda f: write_file(f / "ply_data_train1.h5", 4, data=np.full((4, 64, 3), b"x")),
            r"train1\.h5: array 'data' is of \|S1, and numbers are needed",
        ),
        (
            lambda f: write_file(f / "ply_data_train1.h5", 4, data=np.zeros((4, 32, 3), np.float32)),
            r"train1\.h5 has clouds of 32 points, and ply_data_train0\.h5 of 64",
        ),
        (
            lambda f: write_file(f / "ply_data_train1.h5", 4, label=np.zeros((3, 1), np.uint8)),
            r"train1\.h5: array 'label' is \(3, 1\), and 'data' has 4 rows",
        ),
        (
            lambda f: write_file(f / "ply_data_train1.h5", 4, label=np.uint8([[0], [1], [2], [3]])),
            r"train1\.h5: labels are whole numbers from 0 to 2, .* from 0 to 3",
        ),
        (
            lambda f: write_file(f / "ply_data_train1.h5", 4, label=np.int8([[0], [1], [2], [-1]])),
            r"train1\.h5: labels are whole numbers .* from -1 to 2",
        ),
        (
            lambda f: write_file(f / "ply_data_train1.h5", 4, label=np.float32([[0], [1], [2], [0.5]])),
            r"train1\.h5: labels are whole numbers .* from 0.0 to 2.0",
        ),
        (
            lambda f: write_file(f / "ply_data_train1.h5", 4, normal=np.zeros((4, 63, 3))),
            r"train1\.h5: array 'normal' is \(4, 63, 3\), and one value a point",
        ),
        (lambda f: truncate(f / "ply_data_train1.h5", 100), r"train1\.h5 is no HDF5 file, or only a part of one"),
        (lambda f: truncate(f / "ply_data_train1.h5", 3000), r"train1\.h5 is no HDF5 file, or only a part of one"),
        (lambda f: (f / "ply_data_train1.h5").write_bytes(b""), r"train1\.h5 is no HDF5 file"),
        (lambda f: damage(f / "ply_data_train1.h5"), r"train1\.h5 is damaged .*Fetch it again"),
        (
            lambda f: (f / "ply_data_train_0_id2file.json").write_text('["airplane/a.ply"'),
            r"train_0_id2file\.json is no JSON",
        ),
        (
            lambda f: (f / "ply_data_train_0_id2file.json").write_text('{"a": 1}'),
            r"train_0_id2file\.json is no list of file names",
        ),
        (
            lambda f: (f / "ply_data_train_0_id2file.json").write_text('["airplane/a.ply"]'),
            r"train_0_id2file\.json names 1 shapes, and ply_data_train0\.h5 has 4",
        ),
        (
            lambda f: (f / "ply_data_train_0_id2file.json").write_text('["a/a.ply", "b", "c", "d"]'),
            r"train_0_id2file\.json says that row 0 is 'a/a\.ply', and ply_data_train0\.h5 labels it 'airplane'",
        ),
        (
            lambda f: (f / "ply_data_train_0_id2file.json").write_text('["b", "b", "c", "d"]'),
            r"2 shapes are named 'b' \(at ply_data_train0\.h5#0, ply_data_train0\.h5#1\)",
        ),
    ],
)
def test_a_file_that_breaks_its_promise_is_refused(tmp_path: Path, break_it: Damage, message: str) -> None:
    folder = write_tree(tmp_path / "set")
    break_it(folder)
    with pytest.raises(SourceError, match=f"(?s){message}"):
        opened(folder)


def truncate(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def test_a_listed_file_that_is_missing_may_be_left_out(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "set")
    (folder / "ply_data_train0.h5").unlink()
    (folder / "shape_names.txt").write_text("\n".join([*CLASS_NAMES, *(f"z{number}" for number in range(37))]))
    with pytest.raises(SourceError, match=r"ply_data_train0\.h5 is missing, and train_files.txt lists it.*--partial"):
        opened(folder, ReadingOptions())
    assert len(opened(folder).listing.shapes) == 8
    for path in folder.glob("*.h5"):
        path.unlink()
    with pytest.raises(SourceError, match="has no ply_data_train"):
        opened(folder)


def test_a_coordinate_that_is_not_finite_breaks_its_shape_alone(tmp_path: Path) -> None:
    data = np.ones((4, NUM_POINTS, 3), np.float32)
    data[2, 7, 1] = np.nan
    source = opened(write_tree(tmp_path / "set", data=data))
    with pytest.raises(ShapeError, match=r"ply_data_train0\.h5, row 2: some coordinates are not finite, .* in row 7"):
        cloud_of(source, 2)
    assert np.isfinite(cloud_of(source, 1).points).all()


def test_what_happens_to_a_file_after_the_listing_breaks_its_shapes_alone(tmp_path: Path) -> None:
    source = opened(write_tree(tmp_path / "set"))
    write_file(tmp_path / "set/ply_data_train1.h5", 1)
    (tmp_path / "set/ply_data_test0.h5").unlink()
    with pytest.raises(ShapeError, match=r"ply_data_train1\.h5, row 2 cannot be read"):
        cloud_of(source, 6)
    with pytest.raises(ShapeError, match=r"ply_data_test0\.h5 is missing"):
        cloud_of(source, 9)
    assert len(cloud_of(source, 0).points) == NUM_POINTS
