"""PointMCD's trees, and that points, views and visibility still belong together in the store."""

from pathlib import Path

import numpy as np
import pytest

from datastore.cameras import rig_by_name
from datastore.contact_sheet import draw_contact_sheet
from datastore.errors import AskedWrongly, SourceError
from datastore.ingest import ingest
from datastore.inspect import describe, facts_of, verify_store
from datastore.layout import open_store
from datastore.shape import Images, PointCloud
from datastore.sources import ReadingOptions, ShapeError, Source, open_source
from tests.pictures import number_seen, write_picture

PARTIAL = ReadingOptions(partial=True)
CLASSES = [f"class{number:02d}" for number in range(38)] + ["airplane", "night_stand"]
CATEGORIES = [
    "airplane", "bag", "cap", "car", "chair", "earphone", "guitar", "knife", "lamp", "laptop", "motorbike", "mug",
    "pistol", "rocket", "skateboard", "table",
]  # fmt: skip
MODELNET = {"train": ["airplane_0001", "night_stand_0001"], "test": ["airplane_0627"]}
PARTS = {"train": ["table_0001"], "test": ["bag_0002", "airplane_0003"]}


def points_of(name: str, count: int) -> np.ndarray:
    points = np.random.default_rng(list(name.encode())).normal(size=(count, 3))
    return np.round(points, 6).astype(np.float32)


def visible(points: np.ndarray, num_views: int) -> np.ndarray:
    """A rule by which a point's row can be recognised wherever it went."""
    views = np.arange(num_views)
    return np.sin(points[:, :1] * 7 + points[:, 1:2] * 3 * (views + 1)) > 0


def write_lists(root: Path, classes: list[str], names: dict[str, list[str]]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "class_list.txt").write_text("".join(f"{name}\n" for name in classes))
    for split, of_split in names.items():
        (root / f"{split}_list.txt").write_text("".join(f"{name}\n" for name in of_split))


def write_numbers(path: Path, values: np.ndarray, form: str, separator: str = " ") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savetxt(path, values, form, delimiter=separator)


def write_modelnet(root: Path) -> Path:
    write_lists(root, CLASSES, MODELNET)
    for name in (name for names in MODELNET.values() for name in names):
        points, below = points_of(name, 1024), f"{name[:-5]}/{name}"
        write_numbers(root / f"point_cloud_1024/{below}.xyz", points, "%.6f")
        write_numbers(root / f"mv_visibility_1024x12/{below}_mvv.xyz", visible(points, 12), "%d")
        for view in range(1, 13):
            write_picture(root / f"mv_image_12/{below}_{view:02d}.jpg", view)
    return root


def parts_of(name: str) -> np.ndarray:
    first, end = {"table": (47, 50), "bag": (4, 6), "airplane": (0, 4)}[name[:-5]]
    return first + np.arange(2048) % (end - first)


def write_parts(root: Path, by_class: bool = False) -> Path:
    write_lists(root, CATEGORIES, PARTS)
    for name in (name for names in PARTS.values() for name in names):
        points, below = points_of(name, 2048), f"{name[:-5]}/{name}" if by_class else name
        table = np.column_stack([points, parts_of(name)])
        write_numbers(root / f"point_cloud_labeled_2048/{below}.txt", table, "%.6f", ";")
        write_numbers(root / f"mv_visibility_2048x16/{below}_mvv.xyz", visible(points, 16), "%d")
        for elevation in (1, 2):
            for azimuth in range(1, 9):
                path = root / f"mv_image_16/{below}_{elevation}_{azimuth}.jpg"
                write_picture(path, 8 * (elevation - 1) + azimuth - 1)
    return root


def load(source: Source, number: int) -> tuple[PointCloud, Images]:
    shape = source.load(source.listing.shapes[number])
    assert isinstance(shape.geometry, PointCloud) and shape.images is not None
    return shape.geometry, shape.images


def test_modelnet40_is_listed_and_loaded_with_12_views_and_their_visibility(tmp_path: Path) -> None:
    source = open_source(str(write_modelnet(tmp_path)), options=PARTIAL)
    listing = source.listing
    assert (source.FORMAT, listing.class_names) == ("pointmcd", tuple(CLASSES))
    assert [(shape.id, shape.label, shape.split) for shape in listing.shapes] == [
        ("airplane_0001", 38, "train"),
        ("night_stand_0001", 39, "train"),
        ("airplane_0627", 38, "test"),
    ]
    assert listing.images is not None
    assert (listing.images.num_views, listing.images.image_size, listing.images.with_visibility) == (12, 16, True)
    for number, reference in enumerate(listing.shapes):
        cloud, images = load(source, number)
        assert np.array_equal(cloud.points, points_of(reference.id, 1024))
        assert cloud.part_labels is None
        assert [number_seen(view, 14) for view in images.views] == list(range(1, 13))
        assert images.visibility is not None and images.visibility.dtype == np.bool_
        assert np.array_equal(images.visibility, visible(cloud.points, 12))


@pytest.mark.parametrize("by_class", [False, True])
def test_shapenetpart_has_parts_and_views_by_elevation_and_then_azimuth(tmp_path: Path, by_class: bool) -> None:
    source = open_source(str(write_parts(tmp_path, by_class)), options=PARTIAL)
    listing = source.listing
    assert [(shape.id, shape.label, shape.split) for shape in listing.shapes] == [
        ("table_0001", 15, "train"),
        ("bag_0002", 1, "test"),
        ("airplane_0003", 0, "test"),
    ]
    assert (len(listing.part_names), listing.num_points) == (50, 2048)
    assert listing.images is not None and listing.images.num_views == 16
    for number, reference in enumerate(listing.shapes):
        cloud, images = load(source, number)
        assert cloud.part_labels is not None and cloud.part_labels.dtype == np.int16
        assert np.array_equal(cloud.part_labels, parts_of(reference.id))
        assert [number_seen(view, 16) for view in images.views] == list(range(16))
        assert images.visibility is not None
        assert np.array_equal(images.visibility, visible(cloud.points, 16))


def test_both_trees_below_one_folder_are_told_apart_by_the_variant(tmp_path: Path) -> None:
    write_modelnet(tmp_path / "ModelNet40")
    write_parts(tmp_path / "ShapeNetPart")
    with pytest.raises(AskedWrongly, match="holds ModelNet40 and ShapeNetPart: say which with --variant"):
        open_source(str(tmp_path), options=PARTIAL)
    with pytest.raises(AskedWrongly, match="holds ModelNet40 and ShapeNetPart, not 'ShapeNetCore'"):
        open_source(str(tmp_path), options=ReadingOptions(partial=True, variant="ShapeNetCore"))
    for variant, count in (("ModelNet40", 1024), ("ShapeNetPart", 2048)):
        source = open_source(str(tmp_path), options=ReadingOptions(partial=True, variant=variant))
        assert source.listing.num_points == count
        load(source, 0)


def test_shapenetcore_whose_tree_has_images_alone_is_refused_with_another_way(tmp_path: Path) -> None:
    write_picture(tmp_path / "mv_image_16/02691156_0001_1_1.jpg", 0)
    with pytest.raises(SourceError, match=r"there are views, but no clouds.*--rig ring16 instead"):
        open_source(str(tmp_path))


def change(path: Path, text: str | None) -> None:
    if text is None:
        path.unlink()
    else:
        path.write_text(text)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("class_list.txt", "airplane\n", r"class_list\.txt names 1 classes in 1 lines, and ModelNet40 has 40"),
        ("class_list.txt", "airplane\n" * 40, r"class_list\.txt names 1 classes in 40 lines"),
        ("class_list.txt", None, r"class_list\.txt is missing"),
        ("train_list.txt", None, r"train_list\.txt is missing"),
        ("train_list.txt", "airplane_0001\nairplane_0001\n", "2 shapes are named 'airplane_0001'"),
        ("test_list.txt", "airplane_0001\n", "2 shapes are named 'airplane_0001'"),
        ("class_list.txt", "\n".join([*CLASSES[:39], "sofa"]), r"train_list\.txt: 'night_stand_0001' is of class"),
    ],
)
def test_lists_that_contradict_themselves_or_are_missing_are_refused(
    tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    change(write_modelnet(tmp_path) / name, text)
    with pytest.raises(SourceError, match=message):
        open_source(str(tmp_path), options=PARTIAL)


def test_what_is_missing_is_refused_or_left_out_where_a_part_is_asked_for(tmp_path: Path) -> None:
    root = write_modelnet(tmp_path)
    with pytest.raises(SourceError, match=r"train_list\.txt: 2 found, and the data set has 9,843\. .*say --partial"):
        open_source(str(root))
    (root / "point_cloud_1024/night_stand/night_stand_0001.xyz").unlink()
    with pytest.raises(SourceError, match=r"train_list\.txt names 1 shapes .*night_stand_0001 first.*--partial"):
        open_source(str(root))
    assert [shape.id for shape in open_source(str(root), options=PARTIAL).listing.shapes] == [
        "airplane_0001",
        "airplane_0627",
    ]
    (root / "mv_visibility_1024x12").rename(root / "hidden")
    with pytest.raises(SourceError, match="mv_visibility_1024x12 is missing: fetch it"):
        open_source(str(root), options=PARTIAL)


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        (
            "point_cloud_1024/airplane/airplane_0001.xyz",
            ["0 0 1"] * 1023,
            "1,023 rows of 3 numbers instead of 1,024 of 3",
        ),
        ("point_cloud_1024/airplane/airplane_0001.xyz", ["0 0 1 1"] * 1024, "1,024 rows of 4 numbers instead of 1,024"),
        ("point_cloud_1024/airplane/airplane_0001.xyz", ["0 0 nan"] * 1024, "some coordinates are not finite"),
        ("point_cloud_1024/airplane/airplane_0001.xyz", ["0 0 1", "0 0"], "is no table of numbers"),
        ("point_cloud_1024/airplane/airplane_0001.xyz", [], "is empty; fetch it again"),
        ("mv_visibility_1024x12/airplane/airplane_0001_mvv.xyz", ["1 " * 12] * 1000, "1,000 rows of 12 numbers"),
        ("mv_visibility_1024x12/airplane/airplane_0001_mvv.xyz", ["2 " * 12] * 1024, "visibility is 0 or 1"),
        ("mv_visibility_1024x12/airplane/airplane_0001_mvv.xyz", None, "is missing"),
        ("mv_image_12/airplane/airplane_0001_12.jpg", None, "1 of its 12 images are missing"),
    ],
)
def test_what_is_wrong_with_one_shape_breaks_it_alone_and_names_the_file(
    tmp_path: Path, name: str, lines: list[str] | None, message: str
) -> None:
    source = open_source(str(write_modelnet(tmp_path)), options=PARTIAL)
    change(tmp_path / name, None if lines is None else "".join(f"{line}\n" for line in lines))
    with pytest.raises(ShapeError, match=rf"{name.rpartition('/')[2]}.*{message}|{message}.*{name.rpartition('/')[2]}"):
        load(source, 0)
    load(source, 1)


def test_part_numbers_outside_of_their_category_break_the_shape(tmp_path: Path) -> None:
    source = open_source(str(write_parts(tmp_path)), options=PARTIAL)
    table = np.column_stack([points_of("bag_0002", 2048), parts_of("table_0001")])
    write_numbers(tmp_path / "point_cloud_labeled_2048/bag_0002.txt", table, "%.6f", ";")
    with pytest.raises(ShapeError, match=r"bag_0002\.txt: point 0 is of part 47, and Bag has parts 4 to 5"):
        load(source, 1)


def test_points_views_parts_and_visibility_still_belong_together_in_the_store(tmp_path: Path) -> None:
    """Farthest-point order moves the points, and a part of them stays behind: each one's row has to go with it."""
    source = open_source(str(write_parts(tmp_path / "source")), options=PARTIAL)
    (tmp_path / "source/mv_image_16/bag_0002_2_8.jpg").unlink()  # which goes into quarantine
    url = str(tmp_path / "store.zarr")
    rig = rig_by_name("azimuth12", image_size=16)
    summary = ingest(source, url, rig=rig, num_points=96, num_workers=1)
    assert [(entry.row, entry.id) for entry in summary.quarantine] == [(1, "bag_0002")]
    store = open_store(url)
    assert store.attributes.views_from == store.attributes.visibility_from == "source"
    assert store.attributes.rig is None
    assert {"points", "views", "visibility", "part_labels"} <= set(store.ingest_fields)
    assert not {"depth", "pixels", "cameras"} & set(store.ingest_fields)

    rows = [0, 2]
    fields = {name: store.read(name, rows) for name in store.ingest_fields}
    assert fields["id"].tolist() == ["table_0001", "airplane_0003"]
    assert [store.attributes.splits[split] for split in fields["split"]] == ["train", "test"]
    assert [store.class_names[label] for label in fields["label"]] == ["table", "airplane"]
    for place, name in enumerate(fields["id"].tolist()):
        original = points_of(name, 2048)
        found = fields["points"][place] * fields["scale"][place] + fields["centre"][place]
        distances = np.linalg.norm(original[:, None] - found, axis=2)
        nearest = distances.argmin(axis=0)
        assert distances.min(axis=0).max() < 1e-5
        assert len(set(nearest.tolist())) == 96
        assert nearest.tolist() != sorted(nearest.tolist())  # they were moved
        assert np.array_equal(fields["visibility"][place], visible(original, 16)[nearest])
        assert np.array_equal(fields["part_labels"][place], parts_of(name)[nearest])
        assert [number_seen(view, 16) for view in fields["views"][place]] == list(range(16))

    assert verify_store(store) == []
    assert "the source's own" in describe(facts_of(store))
    assert draw_contact_sheet(store, rows).width > 0


def test_views_can_be_rendered_instead_of_taken_from_the_source(tmp_path: Path) -> None:
    source = open_source(str(write_modelnet(tmp_path / "source")), options=PARTIAL)
    url = str(tmp_path / "store.zarr")
    rig = rig_by_name("simple6", image_size=24)
    assert ingest(source, url, rig=rig, num_points=64, views="rendered", num_workers=1).quarantine == []
    store = open_store(url)
    assert (store.attributes.views_from, store.attributes.num_views) == ("point splats", 6)
    assert store.read("views", [0]).shape == (1, 6, 24, 24, 3)
    assert verify_store(store) == []
