"""ModelNet40 with normals: its lists and lines, and the pickles that its loader leaves behind."""

import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from datastore.errors import AskedWrongly, SourceError
from datastore.shape import PointCloud
from datastore.sources import ReadingOptions, ShapeError, Source, open_source

PARTIAL = ReadingOptions(partial=True)
PICKLES = ReadingOptions(partial=True, allow_pickle=True)
CLASS_NAMES = ("chair", "night_stand")
SHAPES = {"train": ("night_stand_0002", "chair_0001"), "test": ("chair_0890",)}
NUM_POINTS = 10_000


def write_cloud(path: Path, seed: int, num_points: int = NUM_POINTS) -> np.ndarray:
    """Whole numbers, which are quick to write and to compare."""
    values = np.random.default_rng(seed).integers(-9, 10, size=(num_points, 6))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in values.tolist()))
    return values


def write_lists(folder: Path, subset: str = "modelnet40") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{subset}_shape_names.txt").write_text("\n".join(CLASS_NAMES) + "\n")
    for split, names in SHAPES.items():
        (folder / f"{subset}_{split}.txt").write_text("\r\n".join(names) + "\r\n")
    return folder


def write_tree(folder: Path) -> Path:
    write_lists(folder)
    for seed, name in enumerate([*SHAPES["train"], *SHAPES["test"]]):
        write_cloud(folder / name.rpartition("_")[0] / f"{name}.txt", seed)
    return folder


def cloud_of(source: Source, index: int) -> PointCloud:
    geometry = source.load(source.listing.shapes[index]).geometry
    assert isinstance(geometry, PointCloud)
    assert geometry.normals is not None
    return geometry


def test_shapes_keep_the_order_of_the_lists_with_their_normals(tmp_path: Path) -> None:
    source = open_source(str(write_tree(tmp_path / "set")), options=PARTIAL)
    listing = source.listing
    assert source.FORMAT == "modelnet40_resampled"
    assert [(shape.id, shape.label, shape.split, shape.place) for shape in listing.shapes] == [
        ("night_stand_0002", 1, "train", "night_stand/night_stand_0002.txt"),
        ("chair_0001", 0, "train", "chair/chair_0001.txt"),
        ("chair_0890", 0, "test", "chair/chair_0890.txt"),
    ]
    assert (listing.class_names, listing.splits) == (CLASS_NAMES, ("train", "test"))
    assert (listing.geometry, listing.num_points, listing.with_normals) == ("points", NUM_POINTS, True)
    expected = np.random.default_rng(1).integers(-9, 10, size=(NUM_POINTS, 6))
    cloud = cloud_of(source, 1)
    assert np.array_equal(cloud.points, expected[:, :3])
    assert np.array_equal(cloud.normals, expected[:, 3:])


def test_the_official_numbers_are_asked_for_and_can_be_waived(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "set")
    with pytest.raises(SourceError, match=r"modelnet40_shape_names\.txt: 2 found, and the data set has 40.*--partial"):
        open_source(str(folder))
    (folder / "modelnet40_shape_names.txt").write_text(
        "\n".join([*CLASS_NAMES, *(f"z{number}" for number in range(38))])
    )
    with pytest.raises(SourceError, match=r"modelnet40_train\.txt: 2 found, and the data set has 9,843.*--partial"):
        open_source(str(folder))


def test_modelnet10_is_chosen_by_its_name(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "set")
    write_lists(folder, "modelnet10")
    assert len(open_source(str(folder), options=PARTIAL).listing.shapes) == 3
    with pytest.raises(SourceError, match=r"modelnet10_shape_names\.txt: 2 found, and the data set has 10"):
        open_source(str(folder), options=ReadingOptions(variant="modelnet10"))
    with pytest.raises(AskedWrongly, match="no variant 'modelnet20'; it has modelnet40, modelnet10"):
        open_source(str(folder), options=ReadingOptions(variant="modelnet20"))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda f: (f / "modelnet40_shape_names.txt").unlink(),
            r"shape_names\.txt is missing: it says what the labels",
        ),
        (
            lambda f: (f / "modelnet40_train.txt").unlink(),
            r"modelnet40_train\.txt is missing: it lists the train shapes",
        ),
        (
            lambda f: (f / "modelnet40_train.txt").write_text("chair_0001\nstool_0001\n"),
            r"modelnet40_train\.txt, line 2: 'stool_0001' is of class 'stool', which is none of the 2",
        ),
        (lambda f: (f / "modelnet40_train.txt").write_text("chair_0890\n"), r"2 shapes are named 'chair_0890'"),
    ],
)
def test_lists_that_contradict_themselves_are_refused(
    tmp_path: Path, break_it: Callable[[Path], object], message: str
) -> None:
    folder = write_tree(tmp_path / "set")
    break_it(folder)
    with pytest.raises(SourceError, match=message):
        open_source(str(folder), options=PARTIAL)


def test_a_listed_shape_without_a_file_is_asked_for_and_can_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tree(tmp_path / "set")
    monkeypatch.setattr("datastore.sources.modelnet40_resampled.require_count", lambda *_: None)
    (folder / "chair/chair_0001.txt").unlink()
    with pytest.raises(
        SourceError, match=r"chair/chair_0001\.txt is missing, and modelnet40_train\.txt lists it\. .*--partial"
    ):
        open_source(str(folder))
    assert len(open_source(str(folder), options=PARTIAL).listing.shapes) == 2


def cut_a_line(path: Path) -> None:
    path.write_text(path.read_text()[:-5])


def add_nan(path: Path) -> None:
    path.write_text("nan,0,0,0,0,0\n" + path.read_text().partition("\n")[2])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (cut_a_line, "is no table of numbers, or only a part of one"),
        (lambda path: write_cloud(path, 0, 9_000), r"has 9,000 lines of 6 numbers, and this data set has 10,000 of 6"),
        (lambda path: path.write_text("1,2,3\n" * NUM_POINTS), r"has 10,000 lines of 3 numbers"),
        (lambda path: path.write_text("1 2 3 4 5 6\n" * NUM_POINTS), "is no table of numbers"),
        (lambda path: path.write_text(""), "is empty"),
        (lambda path: path.unlink(), "is missing"),
        (add_nan, "some coordinates are not finite, the first of them in row 0"),
    ],
)
def test_a_file_that_is_no_such_shape_breaks_it_alone(
    tmp_path: Path, break_it: Callable[[Path], object], message: str
) -> None:
    source = open_source(str(write_tree(tmp_path / "set")), options=PARTIAL)
    break_it(tmp_path / "set/chair/chair_0001.txt")
    with pytest.raises(ShapeError, match=rf"chair_0001\.txt:? {message}"):
        source.load(source.listing.shapes[1])


# --- caches

CACHED = {
    "train": [np.random.default_rng(seed).normal(size=(300, 6)).astype(np.float32) for seed in range(2)],
    "test": [np.random.default_rng(5).normal(size=(300, 6)).astype(np.float32)],
}
LABELS = {"train": [1, 0], "test": [0]}


def write_caches(folder: Path, kind: str = "8192pts_fps", **changes: Any) -> Path:
    """The pairs of lists that the loader pickles; `train` or `test` puts something else in the place of one."""
    folder.mkdir(exist_ok=True)
    (folder / "modelnet40_shape_names.txt").write_text("\n".join(CLASS_NAMES))
    for split, clouds in CACHED.items():
        content = changes.get(split, [clouds, [np.array([label], np.int32) for label in LABELS[split]]])
        (folder / f"modelnet40_{split}_{kind}.dat").write_bytes(
            content if isinstance(content, bytes) else pickle.dumps(content)
        )
    return folder


def test_caches_are_read_where_pickles_are_allowed(tmp_path: Path) -> None:
    folder = write_caches(tmp_path / "set")
    with pytest.raises(SourceError, match=r"train_8192pts_fps\.dat is a pickle, .* Say --allow-pickle to read it"):
        open_source(str(folder), options=PARTIAL)
    source = open_source(str(folder), options=PICKLES)
    listing = source.listing
    assert [(shape.id, shape.label, shape.split) for shape in listing.shapes] == [
        ("modelnet40_train_8192pts_fps/0", 1, "train"),
        ("modelnet40_train_8192pts_fps/1", 0, "train"),
        ("modelnet40_test_8192pts_fps/0", 0, "test"),
    ]
    assert (listing.num_points, listing.with_normals) == (300, True)
    for index, expected in enumerate([*CACHED["train"], *CACHED["test"]]):
        cloud = cloud_of(source, index)
        assert np.array_equal(cloud.points, expected[:, :3])
        assert np.array_equal(cloud.normals, expected[:, 3:])


def test_caches_take_names_from_the_lists_that_they_were_written_by(tmp_path: Path) -> None:
    folder = write_lists(write_caches(tmp_path / "set"))
    listing = open_source(str(folder), options=PICKLES).listing
    assert [shape.id for shape in listing.shapes] == [*SHAPES["train"], *SHAPES["test"]]
    (folder / "modelnet40_train.txt").write_text("\n".join(reversed(SHAPES["train"])))
    with pytest.raises(SourceError, match=r"their labels are not those of the 2 that modelnet40_train\.txt lists"):
        open_source(str(folder), options=PICKLES)


def test_the_tree_goes_before_its_caches_unless_one_is_asked_for(tmp_path: Path) -> None:
    folder = write_caches(write_tree(tmp_path / "set"))
    assert open_source(str(folder), options=PICKLES).listing.num_points == NUM_POINTS
    asked = ReadingOptions(partial=True, allow_pickle=True, variant="modelnet40_8192pts_fps")
    assert open_source(str(folder), options=asked).listing.num_points == 300


def test_one_of_several_caches_is_to_be_named(tmp_path: Path) -> None:
    folder = write_caches(write_caches(tmp_path / "set"), "1024pts")
    with pytest.raises(
        AskedWrongly, match="several caches: say which with --variant modelnet40_1024pts or modelnet40_8192pts_fps"
    ):
        open_source(str(folder), options=PICKLES)


def test_a_cache_travels_and_lies_anywhere(tmp_path: Path) -> None:
    folder = write_caches(tmp_path / "set")
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/modelnet-cache/{path.name}", path.read_bytes())
    source = open_source("memory://modelnet-cache", options=PICKLES)
    before = len(pickle.dumps(source))
    assert np.array_equal(cloud_of(source, 1).points, CACHED["train"][1][:, :3])
    assert len(pickle.dumps(source)) == before < 2_000
    shapes: Sequence[Any] = source.listing.shapes
    assert np.array_equal(pickle.loads(pickle.dumps(source)).load(shapes[2]).geometry.points, CACHED["test"][0][:, :3])


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_a_malicious_cache_is_refused_by_the_name_of_what_it_would_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    folder = write_caches(tmp_path / "set", train=[[Malicious(trace)], [np.array([1], np.int32)]])
    with pytest.raises(SourceError, match=r"modelnet40_train_8192pts_fps\.dat holds a \w+\.system"):
        open_source(str(folder), options=PICKLES)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([CACHED["train"], [np.array([0], np.int32)]], r"train_8192pts_fps\.dat is no pair of lists"),
        ({"clouds": 1}, r"train_8192pts_fps\.dat is no pair of lists"),
        ([CACHED["train"], [0, 1]], r"train_8192pts_fps\.dat holds other things than arrays"),
        (
            [CACHED["train"], [np.array([0.5]), np.array([1.0])]],
            r"train_8192pts_fps\.dat: labels are arrays of one integer",
        ),
        ([CACHED["train"], [np.array([0]), np.array([2])]], r"train_8192pts_fps\.dat: labels reach from 0 to 2"),
        ([[np.zeros((300, 3)), *CACHED["test"]], [np.array([0])] * 2], r"train_8192pts_fps\.dat.* float64 \(300, 3\)"),
        (
            [[np.zeros((299, 6)), *CACHED["test"]], [np.array([0])] * 2],
            r"train_8192pts_fps\.dat#1 is float32 \(300, 6\)",
        ),
        (pickle.dumps(CACHED["train"])[:-100], r"train_8192pts_fps\.dat is no pickle of arrays, or only a part of one"),
    ],
)
def test_a_cache_that_breaks_its_promise_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    folder = write_caches(tmp_path / "set", train=content)
    with pytest.raises(SourceError, match=message):
        open_source(str(folder), options=PICKLES)


def test_a_cache_without_its_counterpart_is_a_part_of_the_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_caches(tmp_path / "set")
    (folder / "modelnet40_test_8192pts_fps.dat").unlink()
    assert open_source(str(folder), options=PICKLES).listing.splits == ("train",)
    monkeypatch.setattr("datastore.sources.modelnet40_resampled.require_count", lambda *_: None)
    with pytest.raises(SourceError, match=r"test_8192pts_fps\.dat is missing, and its counterpart is there.*--partial"):
        open_source(str(folder), options=ReadingOptions(allow_pickle=True))


def test_a_cached_coordinate_that_is_not_finite_breaks_its_shape_alone(tmp_path: Path) -> None:
    broken = CACHED["train"][0].copy()
    broken[3, 1] = np.inf
    content = [[broken, CACHED["train"][1]], [np.array([1]), np.array([0])]]
    source = open_source(str(write_caches(tmp_path / "set", train=content)), options=PICKLES)
    with pytest.raises(
        ShapeError, match=r"fps\.dat, row 0: some coordinates are not finite, the first of them in row 3"
    ):
        source.load(source.listing.shapes[0])
    cloud_of(source, 1)
