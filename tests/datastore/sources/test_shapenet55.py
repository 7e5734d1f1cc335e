"""ShapeNet-55: its lists, wherever people put them, its names with dashes, and ReCon's images."""

import io
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from datastore.errors import AskedWrongly, SourceError
from datastore.shape import PointCloud
from datastore.sources import ReadingOptions, ShapeError, Source, open_source
from datastore.sources.files import SourceFiles
from datastore.sources.shapenet55 import ShapeNet55

PARTIAL = ReadingOptions(partial=True)
LISTS = {"train": ["03001627-b2", "02691156-a-1-x"], "test": ["04554684-c3"]}
NUM_POINTS = 8_192


def points_of(name: str) -> np.ndarray:
    return np.random.default_rng(len(name)).normal(size=(NUM_POINTS, 3)).astype(np.float32)


def write_lists(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, names in LISTS.items():
        (folder / f"{split}.txt").write_text("".join(f"{name}.npy\n" for name in names))


def write_tree(folder: Path, lists: str = "ShapeNet-55") -> Path:
    (folder / "shapenet_pc").mkdir(parents=True)
    for names in LISTS.values():
        for name in names:
            np.save(folder / f"shapenet_pc/{name}.npy", points_of(name))
    write_lists(folder / lists)
    return folder


def cloud_of(source: Source, index: int) -> PointCloud:
    geometry = source.load(source.listing.shapes[index]).geometry
    assert isinstance(geometry, PointCloud)
    return geometry


@pytest.mark.parametrize("lists", ["ShapeNet-55", "ShapeNet-35", ""])
def test_lists_are_found_where_people_put_them(tmp_path: Path, lists: str) -> None:
    source = open_source(str(write_tree(tmp_path / "set", lists)), options=PARTIAL)
    listing = source.listing
    assert source.FORMAT == "shapenet55"
    assert [(shape.id, listing.class_names[shape.label], shape.split) for shape in listing.shapes] == [
        ("03001627-b2", "chair", "train"),
        ("02691156-a-1-x", "airplane", "train"),
        ("04554684-c3", "washer", "test"),
    ]
    assert [shape.label for shape in listing.shapes] == [18, 0, 54]
    assert (listing.geometry, listing.num_points, listing.images) == ("points", NUM_POINTS, None)
    assert np.array_equal(cloud_of(source, 1).points, points_of("02691156-a-1-x"))


def test_the_official_numbers_are_asked_for_and_can_be_waived(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"train\.txt: 2 found, and the data set has 41,952.*--partial"):
        open_source(str(write_tree(tmp_path / "set")))


def test_other_lists_beside_it_are_chosen_by_their_folder(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "set")
    write_lists(folder / "ShapeNet-34")
    write_lists(folder / "ShapeNet-unseen21")
    (folder / "ShapeNet-unseen21/train.txt").unlink()
    assert len(open_source(str(folder), options=ReadingOptions(variant="ShapeNet-34")).listing.shapes) == 3
    unseen = open_source(str(folder), options=ReadingOptions(variant="ShapeNet-unseen21")).listing
    assert (unseen.splits, len(unseen.shapes)) == (("test",), 1)
    with pytest.raises(
        AskedWrongly, match="no variant 'ShapeNet-99'; it has ShapeNet-55, ShapeNet-34, ShapeNet-unseen21"
    ):
        open_source(str(folder), options=ReadingOptions(variant="ShapeNet-99"))


LIST = "ShapeNet-55/train.txt"


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda f: [(f / f"ShapeNet-55/{split}.txt").unlink() for split in LISTS],
            r"ShapeNet-55/train\.txt is missing: .* not in the archive of the clouds: take .* from the Point-BERT repository",
        ),
        (lambda f: (f / LIST).unlink(), r"ShapeNet-55/train\.txt is missing, and its counterpart is there.*Point-BERT"),
        (lambda f: (f / LIST).write_text("03001627\n"), r"train\.txt, line 1: '03001627' is no <synset>-<model>\.npy"),
        (
            lambda f: (f / LIST).write_text("00000001-a.npy\n"),
            r"train\.txt, line 1: .* is of synset 00000001, which is none",
        ),
        (lambda f: (f / LIST).write_text("04554684-c3.npy\n"), "2 shapes are named '04554684-c3'"),
        (lambda f: (f / LIST).write_bytes(b"\xff\xfe"), r"train\.txt is not UTF-8 text"),
    ],
)
def test_lists_that_are_missing_or_contradict_themselves_are_refused(
    tmp_path: Path, break_it: Callable[[Path], object], message: str
) -> None:
    folder = write_tree(tmp_path / "set")
    break_it(folder)
    with pytest.raises(SourceError, match=message):
        open_source(str(folder), options=PARTIAL)


def test_a_listed_cloud_without_a_file_is_asked_for_and_can_be_left_out(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "set")
    write_lists(folder / "ShapeNet-34")
    (folder / "shapenet_pc/03001627-b2.npy").unlink()
    with pytest.raises(SourceError, match=r"03001627-b2\.npy is missing, and ShapeNet-34/train\.txt lists it; 1 such"):
        open_source(str(folder), options=ReadingOptions(variant="ShapeNet-34"))
    assert len(open_source(str(folder), options=PARTIAL).listing.shapes) == 2


def with_nan() -> np.ndarray:
    points = np.zeros((NUM_POINTS, 3), np.float32)
    points[5] = np.nan
    return points


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2048, 3)), r"is \(2048, 3\), and clouds of ShapeNet-55 are \(8192, 3\)"),
        (np.zeros((NUM_POINTS, 3), dtype="U1"), "holds no single array of numbers"),
        (with_nan(), "some coordinates are not finite, the first of them in row 5"),
        (None, r"is no \.npy array, or only a part of one"),
    ],
)
def test_a_file_that_is_no_such_cloud_breaks_it_alone(tmp_path: Path, array: np.ndarray | None, message: str) -> None:
    folder = write_tree(tmp_path / "set")
    path = folder / "shapenet_pc/03001627-b2.npy"
    if array is None:
        path.write_bytes(path.read_bytes()[:-1])
    else:
        np.save(path, array)
    source = open_source(str(folder), options=PARTIAL)
    with pytest.raises(ShapeError, match=rf"03001627-b2\.npy:? {message}"):
        source.load(source.listing.shapes[0])
    cloud_of(source, 1)


def test_images_of_recon_are_taken_and_its_own_lists_with_them(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "set")
    (folder / "shapenet_img").mkdir()
    for number, name in enumerate(name for names in LISTS.values() for name in names):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(folder / f"shapenet_img/{name}.png")
    source = open_source(str(folder))  # the number of its shapes is not ShapeNet-55's
    images = source.listing.images
    assert images is not None
    assert (images.num_views, images.image_size, images.with_cameras) == (1, 16, False)
    for number, shape in enumerate(source.listing.shapes):
        loaded = source.load(shape).images
        assert loaded is not None
        assert np.array_equal(loaded.views, np.tile(np.uint8([number, 0, 0]), (1, 16, 16, 1)))
    (folder / "shapenet_img/04554684-c3.png").unlink()
    with pytest.raises(ShapeError, match=r"04554684-c3\.png"):
        source.load(source.listing.shapes[2])


def test_a_remote_data_set_is_read_like_a_local_one(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for split, names in LISTS.items():
        memory.pipe_file(f"/shapenet55/ShapeNet-55/{split}.txt", "\n".join(f"{name}.npy" for name in names).encode())
        for name in names:
            content = io.BytesIO()
            np.save(content, points_of(name))
            memory.pipe_file(f"/shapenet55/shapenet_pc/{name}.npy", content.getvalue())
    remote = open_source("memory://shapenet55", options=PARTIAL)
    local = open_source(str(write_tree(tmp_path / "set")), options=PARTIAL)
    assert remote.listing.hash == local.listing.hash
    assert np.array_equal(cloud_of(remote, 2).points, cloud_of(local, 2).points)


def test_another_size_of_a_file_is_another_list(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "set")
    before = open_source(str(folder), options=PARTIAL).listing.hash
    np.save(folder / "shapenet_pc/03001627-b2.npy", np.zeros((1, 3)))
    assert open_source(str(folder), options=PARTIAL).listing.hash != before


def test_the_same_clouds_with_renders_are_another_format(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "set")
    assert ShapeNet55.recognises(SourceFiles(folder))
    (folder / "rendered_images").mkdir()
    assert not ShapeNet55.recognises(SourceFiles(folder))
