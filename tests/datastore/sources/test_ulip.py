"""ULIP's renders beside ShapeNet-55's clouds, and what is said where something is missing."""

import json
from pathlib import Path

import numpy as np
import pytest

from datastore.errors import SourceError
from datastore.shape import PointCloud
from datastore.sources import ReadingOptions, ShapeError, Source, open_source
from tests.pictures import number_seen, write_picture

PARTIAL = ReadingOptions(partial=True)
# one model's name has a hyphen of its own
TRAIN = ["03001627-c1", "02691156-10155655850468db78d106ce0a280f87", "03001627-u-2a-9f"]
TEST = ["02691156-a2"]


def cloud_of(name: str) -> np.ndarray:
    return np.random.default_rng(list(name.encode())).normal(size=(8192, 3)).astype(np.float32)


def write_ulip(root: Path, lists: str = "") -> Path:
    (root / "shapenet_pc").mkdir(parents=True)
    (root / lists).mkdir(exist_ok=True)
    for name in TRAIN + TEST:
        np.save(root / f"shapenet_pc/{name}.npy", cloud_of(name))
        for view in range(30):
            stem = root / f"rendered_images/{name}/{name}_r_{12 * view:03d}"
            write_picture(stem.with_name(f"{stem.name}.png"), view)
            if name in TEST:
                for kind in ("albedo", "depth", "id", "normal"):
                    write_picture(stem.with_name(f"{stem.name}_{kind}0001.png"), 39, size=8)
    for split, names in (("train", TRAIN), ("test", TEST)):
        (root / lists / f"{split}.txt").write_text("".join(f"{name}.npy\n" for name in names))
    taxonomy = [
        {"synsetId": "02691156", "name": "airplane,aeroplane,plane", "children": ["02690373"], "numInstances": 4045},
        {"synsetId": "03001627", "name": "stool,chair", "children": [], "numInstances": 6778},
        {"synsetId": "02690373", "name": "airliner", "children": [], "numInstances": 1490},
    ]
    (root / "taxonomy.json").write_text(json.dumps(taxonomy))
    return root


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source(str(write_ulip(tmp_path_factory.mktemp("ulip"))), options=PARTIAL)


def test_shapes_are_listed_as_the_lists_have_them_with_the_taxonomys_names(source: Source) -> None:
    listing = source.listing
    assert source.FORMAT == "ulip"
    assert len(listing.class_names) == 55
    assert [(shape.id, listing.class_names[shape.label], shape.split) for shape in listing.shapes] == [
        *((name, "airplane" if name.startswith("02") else "stool", "train") for name in TRAIN),
        *((name, "airplane", "test") for name in TEST),
    ]
    assert (listing.num_points, listing.splits, listing.coloured) == (8192, ("train", "test"), False)
    assert listing.images is not None
    assert (listing.images.num_views, listing.images.image_size) == (30, 16)


@pytest.mark.parametrize("number", range(4))
def test_each_shape_has_its_cloud_and_30_views_by_rising_angle_without_the_depth_maps(
    source: Source, number: int
) -> None:
    reference = source.listing.shapes[number]
    shape = source.load(reference)
    assert isinstance(shape.geometry, PointCloud) and shape.images is not None
    assert np.array_equal(shape.geometry.points, cloud_of(reference.id))
    assert [number_seen(view, 40) for view in shape.images.views] == list(range(30))


def test_lists_may_lie_in_the_folder_that_they_come_in_and_the_data_set_below_its_own(tmp_path: Path) -> None:
    write_ulip(tmp_path / "shapenet-55", lists="ShapeNet-55")
    source = open_source(str(tmp_path), options=PARTIAL)
    assert [shape.id for shape in source.listing.shapes] == TRAIN + TEST
    assert source.load(source.listing.shapes[0]).images is not None


def test_a_taxonomy_that_is_a_mapping_says_the_same_and_shared_names_get_their_synset(tmp_path: Path) -> None:
    write_ulip(tmp_path)
    taxonomy = {"02691156": ["thing", "airplane"], "03001627": "thing,chair"}
    (tmp_path / "taxonomy.json").write_text(json.dumps(taxonomy))
    names = open_source(str(tmp_path), options=PARTIAL).listing.class_names
    assert [name for name in names if "thing" in name] == ["thing (02691156)", "thing (03001627)"]
    (tmp_path / "taxonomy.json").unlink()  # then the names are those that everybody's taxonomy has
    assert {"airplane", "chair"} < set(open_source(str(tmp_path), options=PARTIAL).listing.class_names)


def refuse(root: Path, message: str, options: ReadingOptions = PARTIAL) -> None:
    with pytest.raises(SourceError, match=message):
        open_source(str(root), options=options)


def test_what_contradicts_the_format_is_refused_with_the_file_and_the_way_out(tmp_path: Path) -> None:
    root = write_ulip(tmp_path)
    refuse(root, r"train\.txt: 3 found, and the data set has 41,952\. .*say --partial", ReadingOptions())
    files: list[tuple[str, str | None, str]] = [
        ("train.txt", f"{TRAIN[0]}.npy\n{TRAIN[0]}.npy\n", f"2 shapes are named '{TRAIN[0]}'"),
        ("train.txt", "chair.npy\n", r"train\.txt.* 'chair\.npy' is no <synset>-<model>"),
        ("taxonomy.json", "{", r"taxonomy\.json does not map synsets to names"),
        ("taxonomy.json", "[{}]", r"taxonomy\.json does not map synsets to names"),
        ("taxonomy.json", '{"02691156": 7}', r"taxonomy\.json does not map synsets to names"),
        ("test.txt", None, r"test\.txt is missing"),
    ]
    for name, text, message in files:
        before = (root / name).read_text()
        if text is None:
            (root / name).unlink()
        else:
            (root / name).write_text(text)
        refuse(root, message)
        (root / name).write_text(before)
    open_source(str(root), options=PARTIAL)
    (root / "shapenet_pc").rename(root / "clouds")
    with pytest.raises(SourceError, match="shapenet_pc is missing: fetch ShapeNet-55's clouds"):
        open_source(str(root), "ulip", PARTIAL)


def test_what_is_wrong_with_one_shape_breaks_it_alone(tmp_path: Path) -> None:
    root = write_ulip(tmp_path)
    source = open_source(str(root), options=PARTIAL)
    first, name = source.listing.shapes[0], TRAIN[0]
    cloud = root / f"shapenet_pc/{name}.npy"

    def breaks(message: str) -> None:
        with pytest.raises(ShapeError, match=message):
            source.load(first)

    whole = cloud.read_bytes()
    cloud.write_bytes(whole[:5000])
    breaks(rf"{name}\.npy is no \.npy array")
    np.save(cloud, np.zeros((8191, 3), np.float32))
    breaks(rf"{name}\.npy is \(8191, 3\)")
    np.save(cloud, np.full((8192, 3), np.nan, np.float32))
    breaks(rf"{name}\.npy: some coordinates are not finite")
    cloud.write_bytes(whole)
    (root / f"rendered_images/{name}/{name}_r_348.png").unlink()
    breaks(rf"1 of its 30 images are missing: .*{name}_r_348\.png")
    write_picture(root / f"rendered_images/{name}/{name}_r_348.png", 0, size=8)
    breaks(rf"{name}_r_348\.png has 8 x 8 pixels, and the first image has 16 x 16")
    source.load(source.listing.shapes[1])
