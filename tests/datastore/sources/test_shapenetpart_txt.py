"""ShapeNetPart as text: its categories, its lists, its lines."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from datastore.cameras import rig_by_name
from datastore.errors import SourceError
from datastore.ingest import ingest
from datastore.layout import open_store
from datastore.shape import PointCloud
from datastore.sources import ReadingOptions, ShapeError, open_source
from datastore.sources.shapenet_names import PART_CATEGORIES
from datastore.write import verify

PARTIAL = ReadingOptions(partial=True)
SYNSETS = {name: f"0{2_000_000 + number}" for number, name in enumerate(PART_CATEGORIES)}
SHAPES = {"train": ["Mug/m1", "Airplane/a1"], "val": ["Airplane/a2"], "test": ["Table/t1"]}
FIRST_PARTS = {"Mug": 36, "Airplane": 0, "Table": 47}


def lines_of(category: str, num_points: int) -> str:
    """As the data set writes them: six decimals, the part too."""
    points = np.random.default_rng(num_points).normal(size=(num_points, 6))
    parts = FIRST_PARTS[category] + np.arange(num_points) % 2
    return "".join(
        " ".join(f"{value:.6f}" for value in (*row, part)) + "\n" for row, part in zip(points, parts, strict=True)
    )


def write_list(folder: Path, split: str, items: list[str]) -> None:
    path = folder / f"train_test_split/shuffled_{split}_file_list.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(items))


def write_tree(folder: Path) -> Path:
    folder.mkdir()
    (folder / "synsetoffset2category.txt").write_text(
        "".join(f"{name}\t{synset}\n" for name, synset in SYNSETS.items())
    )
    for split, names in SHAPES.items():
        write_list(folder, split, [f"shape_data/{SYNSETS[name.split('/')[0]]}/{name.split('/')[1]}" for name in names])
        for number, name in enumerate(names):
            category, shape_id = name.split("/")
            path = folder / SYNSETS[category] / f"{shape_id}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text(lines_of(category, 20 + number))
    return folder


def test_shapes_keep_the_order_of_the_lists_with_their_normals_and_parts(tmp_path: Path) -> None:
    source = open_source(str(write_tree(tmp_path / "set")), options=PARTIAL)
    listing = source.listing
    assert source.FORMAT == "shapenetpart_txt"
    assert [(shape.id, listing.class_names[shape.label], shape.split) for shape in listing.shapes] == [
        (f"{SYNSETS['Mug']}/m1", "Mug", "train"),
        (f"{SYNSETS['Airplane']}/a1", "Airplane", "train"),
        (f"{SYNSETS['Airplane']}/a2", "Airplane", "val"),
        (f"{SYNSETS['Table']}/t1", "Table", "test"),
    ]
    assert (listing.geometry, listing.num_points, listing.with_normals) == ("points", None, True)
    assert "non-commercial" in listing.licence
    for shape, num_points, part in zip(
        listing.shapes, (20, 21, 20, 20), ("Mug/1", "Airplane/1", "Airplane/1", "Table/1"), strict=True
    ):
        cloud = source.load(shape).geometry
        assert isinstance(cloud, PointCloud)
        expected = np.random.default_rng(num_points).normal(size=(num_points, 6)).round(6)
        assert np.allclose(cloud.points, expected[:, :3], atol=1e-6)
        assert cloud.normals is not None
        assert np.allclose(cloud.normals, expected[:, 3:], atol=1e-6)
        assert cloud.part_labels is not None
        assert listing.part_names[cloud.part_labels[1]] == part


def test_the_official_numbers_are_asked_for_and_can_be_waived(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"shuffled_train_file_list\.json: 2 found, and .* 12,137.*--partial"):
        open_source(str(write_tree(tmp_path / "set")))


CATEGORIES = "synsetoffset2category.txt"
TRAIN_LIST = "train_test_split/shuffled_train_file_list.json"


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / TRAIN_LIST).unlink(), r"shuffled_train_file_list\.json is missing: it says which shapes"),
        (lambda f: (f / TRAIN_LIST).write_text('["shape_data/'), r"shuffled_train_file_list\.json is no JSON"),
        (lambda f: (f / TRAIN_LIST).write_text("{}"), r"shuffled_train_file_list\.json is no list of names"),
        (lambda f: write_list(f, "train", ["02000000/a1"]), "'02000000/a1' is no shape_data/<synset>/<id>"),
        (lambda f: write_list(f, "train", ["shape_data/09/a1"]), "'shape_data/09/a1' is no shape_data/<synset>/<id>"),
        (lambda f: write_list(f, "train", [3]), "train_file_list.json: 3 is no shape_data"),  # type: ignore[list-item]
        (lambda f: write_list(f, "train", ["shape_data/02000000/a2"]), r"2 shapes are named '02000000/a2'"),
        (lambda f: (f / CATEGORIES).write_text("Plane\t02000000\n"), f"{CATEGORIES}: 'Plane 02000000' is not one of"),
        (lambda f: (f / CATEGORIES).write_text("Airplane\n"), f"{CATEGORIES}: 'Airplane' is not one of"),
        (lambda f: (f / CATEGORIES).write_text("Bag\t1\nAirplane\t2\n"), f"{CATEGORIES}: categories are out of order"),
        (
            lambda f: (f / CATEGORIES).write_text("Bag\t1\nBag\t2\n"),
            f"{CATEGORIES}: categories are out of order, or twice",
        ),
    ],
)
def test_lists_that_contradict_themselves_are_refused(
    tmp_path: Path, break_it: Callable[[Path], object], message: str
) -> None:
    folder = write_tree(tmp_path / "set")
    break_it(folder)
    with pytest.raises(SourceError, match=message):
        open_source(str(folder), options=PARTIAL)


def test_fewer_categories_are_a_part_of_the_data_set(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "set")
    (folder / CATEGORIES).write_text("".join(f"{name}\t{SYNSETS[name]}\n" for name in sorted(FIRST_PARTS)))
    with pytest.raises(SourceError, match=rf"categories in .*{CATEGORIES}: 3 found, and the data set has 16"):
        open_source(str(folder))
    listing = open_source(str(folder), options=PARTIAL).listing
    assert listing.class_names == PART_CATEGORIES
    assert [listing.class_names[shape.label] for shape in listing.shapes] == ["Mug", "Airplane", "Airplane", "Table"]


def test_a_listed_shape_without_a_file_is_asked_for_and_can_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tree(tmp_path / "set")
    monkeypatch.setattr("datastore.sources.shapenetpart_txt.NUM_SHAPENETPART_SHAPES", {"train": 2, "val": 1, "test": 1})
    assert len(open_source(str(folder)).listing.shapes) == 4
    (folder / SYNSETS["Mug"] / "m1.txt").unlink()
    with pytest.raises(
        SourceError, match=r"m1\.txt is missing, and .*train_file_list\.json lists it; 1 such files.*--partial"
    ):
        open_source(str(folder))
    assert len(open_source(str(folder), options=PARTIAL).listing.shapes) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"m1\.txt is empty"),
        (b"0 0 0 1 0 0 36\n0 0 0 1 0", r"m1\.txt is no table of numbers, or only a part of one"),
        (b"0 0 0 36\n", r"m1\.txt has 4 numbers a line, and 7 are needed"),
        (b"0 0 nan 1 0 0 36\n", r"m1\.txt: some coordinates are not finite"),
        (b"0 0 0 1 0 0 36\n0 0 0 1 0 0 35\n", r"m1\.txt: point 1 is of part 35, and Mug has parts 36 to 37"),
        (b"0 0 0 1 0 0 36.5\n", r"m1\.txt: point 0 is of part 36\.5"),
    ],
)
def test_a_file_that_is_no_such_shape_breaks_it_alone(tmp_path: Path, content: bytes, message: str) -> None:
    folder = write_tree(tmp_path / "set")
    (folder / SYNSETS["Mug"] / "m1.txt").write_bytes(content)
    source = open_source(str(folder), options=PARTIAL)
    with pytest.raises(ShapeError, match=message):
        source.load(source.listing.shapes[0])
    source.load(source.listing.shapes[1])


def test_an_ingest_keeps_names_splits_labels_parts_and_points(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "set")
    (folder / SYNSETS["Airplane"] / "a1.txt").write_text("0 0 0 0 1 0 47\n1 1 1 0 1 0 47\n")
    source = open_source(str(folder), options=PARTIAL)
    rig = rig_by_name("azimuth12", image_size=16)
    summary = ingest(source, str(tmp_path / "store.zarr"), rig=rig, num_points=32, num_workers=1)
    (broken,) = summary.quarantine
    assert (broken.row, broken.id) == (1, f"{SYNSETS['Airplane']}/a1")
    assert "point 0 is of part 47, and Airplane has parts 0 to 3" in broken.reason
    store = open_store(str(tmp_path / "store.zarr"))
    verify(store)
    assert {"normals", "part_labels", "views", "depth", "visibility", "pixels"} <= set(store.ingest_fields)
    row = 3
    read = {
        name: store.read(name, [row])[0]
        for name in ("id", "label", "split", "points", "part_labels", "centre", "scale")
    }
    shape = source.listing.shapes[row]
    assert read["id"] == shape.id == f"{SYNSETS['Table']}/t1"
    assert store.class_names[read["label"]] == "Table"
    assert store.attributes.splits[read["split"]] == "test"
    # 20 points fill 32 places: each is one of the source's, with its own part, and each of those is there
    cloud = source.load(shape).geometry
    assert isinstance(cloud, PointCloud)
    assert cloud.part_labels is not None
    back = read["points"] * read["scale"] + read["centre"]
    nearest = np.linalg.norm(back[:, None] - cloud.points, axis=2).argmin(axis=1)
    assert np.allclose(back, cloud.points[nearest], atol=1e-5)
    assert set(nearest) == set(range(20))
    assert np.array_equal(read["part_labels"], cloud.part_labels[nearest])
    assert store.part_names[read["part_labels"][0]].startswith("Table/")
