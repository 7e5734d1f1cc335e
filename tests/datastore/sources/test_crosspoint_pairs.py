"""CrossPoint's pairs: both sets of renders, their cameras, and what is said where something is missing."""

import math
import pickle
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from datastore.cameras import rig_by_name
from datastore.errors import AskedWrongly, SourceError
from datastore.ingest import ingest
from datastore.inspect import verify_store
from datastore.layout import open_store
from datastore.shape import Images, PointCloud
from datastore.sources import ReadingOptions, ShapeError, Source, open_source
from tests.pictures import number_seen, write_picture

NUM_POINTS = 48
AIRPLANE, CHAIR = "02691156", "03001627"


def points_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(NUM_POINTS, 3)).astype(np.float32)


def write_ply(path: Path, points: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    properties = "".join(f"property float {axis}\n" for axis in "xyz")
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\n{properties}end_header\n"
    path.write_bytes(header.encode() + points.astype("<f4").tobytes())


def r2n2_line(view: int) -> str:
    return f"{15.5 * view} {25 + view / 10} 0 {0.6 + view / 100} 25\n"


def disn_line(view: int, shift: float = 0.0) -> str:
    # as the files have it: blanks and a comma after each, and angles that pass a full turn
    return f"[{10.5 * view},{20 + view / 10},0,{0.6 + view / 100},35,32,1.75,{shift},{shift / 2},{-shift}], \n"


def write_r2n2(folder: Path, first: int = 0) -> None:
    for view in range(24):
        write_picture(folder / f"rendering/{view:02d}.png", first + view)
    (folder / "rendering/rendering_metadata.txt").write_text("".join(map(r2n2_line, range(24))))
    (folder / "rendering/renderings.txt").write_text("".join(f"{view:02d}.png\n" for view in range(24)))


def write_disn(folder: Path, variants: tuple[str, ...] = ("easy", "hard")) -> None:
    for variant in variants:
        for view in range(36):
            write_picture(folder / variant / f"{view:02d}.png", view + (variant == "hard"), size=8)
        shift = 0.1 if variant == "hard" else 0.0
        lines = "".join(disn_line(view, shift) for view in range(36))
        (folder / variant / "rendering_metadata.txt").write_text(lines)


def write_pairs(root: Path, write_renders: Any = write_r2n2) -> Path:
    for seed, name in enumerate((f"{AIRPLANE}/a1", f"{AIRPLANE}/b2", f"{CHAIR}/c3")):
        write_ply(root / f"ShapeNet/{name}.ply", points_of(seed))
        write_renders(root / f"ShapeNetRendering/{name}")
    return root


def opened(root: Path, **options: Any) -> Source:
    return open_source(str(root), options=ReadingOptions(partial=True, **options))


def load(source: Source, number: int = 0) -> tuple[PointCloud, Images]:
    shape = source.load(source.listing.shapes[number])
    assert isinstance(shape.geometry, PointCloud) and shape.images is not None
    return shape.geometry, shape.images


def test_r2n2_pairs_are_listed_by_synset_and_model_and_loaded(tmp_path: Path) -> None:
    source = opened(write_pairs(tmp_path / "data").parent)  # the folder that holds data/ will do
    listing = source.listing
    assert source.FORMAT == "crosspoint_pairs"
    assert listing.class_names == ("airplane", "chair")
    assert [(shape.id, shape.label, shape.split) for shape in listing.shapes] == [
        (f"{AIRPLANE}/a1", 0, "train"),
        (f"{AIRPLANE}/b2", 0, "train"),
        (f"{CHAIR}/c3", 1, "train"),
    ]
    assert (listing.geometry, listing.num_points, listing.up_axis) == ("points", NUM_POINTS, "+Y")
    assert listing.images is not None
    assert (listing.images.num_views, listing.images.image_size, listing.images.with_cameras) == (24, 16, True)
    cloud, images = load(source, 2)
    assert np.array_equal(cloud.points, points_of(2))
    assert [number_seen(view, 24) for view in images.views] == list(range(24))
    assert images.visibility is None


def test_a_source_that_travelled_to_another_process_loads_the_same(tmp_path: Path) -> None:
    source = opened(write_pairs(tmp_path))
    reference = source.listing.shapes[1]
    travelled: Source = pickle.loads(pickle.dumps(source))
    assert len(travelled.listing.shapes) == 0
    shape, again = source.load(reference), travelled.load(reference)
    assert shape.images is not None and again.images is not None
    assert np.array_equal(shape.images.views, again.images.views)


def test_r2n2_cameras_are_turned_into_this_projects_angles(tmp_path: Path) -> None:
    _, images = load(opened(write_pairs(tmp_path)))
    cameras = images.cameras
    assert cameras is not None
    assert (cameras.shape, cameras.dtype) == ((24, 8), np.float32)
    # the files say 25 degrees; a focal length of 2.1875 half widths is what the images show
    field_of_view = 2 * math.degrees(math.atan(1 / 2.1875))
    assert cameras[0, :5].tolist() == pytest.approx([90, 25, 0, 0.6 * 1.75, field_of_view])
    assert cameras[10, :5].tolist() == pytest.approx([(90 - 155) % 360, 26, 0, 0.7 * 1.75, field_of_view])
    assert np.isnan(cameras[:, 5:]).all()  # it says nothing of a shift


@pytest.mark.parametrize("variant", [None, "easy", "hard"])
def test_disn_has_easy_and_hard_views_and_cameras_with_shifts(tmp_path: Path, variant: str | None) -> None:
    source = opened(write_pairs(tmp_path, write_disn), variant=variant)
    images_listed = source.listing.images
    assert images_listed is not None
    assert (images_listed.num_views, images_listed.image_size) == (36, 8)
    _, images = load(source)
    hard = variant == "hard"
    assert [number_seen(view, 40) for view in images.views] == [view + hard for view in range(36)]
    assert images.cameras is not None
    field_of_view = 2 * math.degrees(math.atan(16 / 35))
    shift = [0.1, -0.1, -0.05] if hard else [0, 0, 0]  # x, z and -y of a world with +Z up
    assert images.cameras[35].tolist() == pytest.approx(
        [(90 - 367.5) % 360, 23.5, 0, 0.95 * 1.75, field_of_view, *shift], abs=1e-5
    )


def test_cameras_stand_where_the_renderers_own_projection_has_them(tmp_path: Path) -> None:
    """The renderer's world has +Z up and its camera at azimuth 0 on +X, turning towards -Y as azimuth grows."""
    _, images = load(opened(write_pairs(tmp_path, write_disn), variant="hard"))
    assert images.cameras is not None
    for view, camera in enumerate(images.cameras):
        azimuth, elevation = math.radians(10.5 * view), math.radians(20 + view / 10)
        in_renderer = np.array([math.cos(azimuth), -math.sin(azimuth), 0]) * math.cos(elevation)
        in_renderer[2] = math.sin(elevation)
        as_shapenet = [in_renderer[0], in_renderer[2], -in_renderer[1]]
        ours, lift = math.radians(camera[0]), math.radians(camera[1])
        place = [math.sin(ours) * math.cos(lift), math.sin(lift), math.cos(ours) * math.cos(lift)]
        assert place == pytest.approx(as_shapenet, abs=1e-5)


def test_albedo_depth_and_normal_images_are_not_mistaken_for_views(tmp_path: Path) -> None:
    """Wherever copies of the data have them: beside `image`, beside the views' folder, or in it under other names."""
    write_pairs(tmp_path / "a", lambda folder: None)
    for kind in ("image", "albedo", "depth", "normal"):
        write_disn(tmp_path / f"a/ShapeNetRendering/{kind}/{AIRPLANE}/a1")
    beside = write_pairs(tmp_path / "b", write_disn)
    for kind in ("albedo", "depth", "normal"):
        write_disn(beside / f"ShapeNetRendering/{AIRPLANE}/a1/{kind}")
        write_picture(beside / f"ShapeNetRendering/{AIRPLANE}/a1/easy/00_{kind}.png", 50, size=4)
    for root in (tmp_path / "a", beside):
        _, images = load(opened(root))
        assert [number_seen(view, 36) for view in images.views] == list(range(36))


def test_disn_renders_in_the_folder_rendering_are_told_by_their_columns(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        write_disn(folder, ("easy",))
        (folder / "easy").rename(folder / "rendering")

    source = opened(write_pairs(tmp_path, write))
    assert source.listing.images is not None and source.listing.images.num_views == 36
    with pytest.raises(AskedWrongly, match=r"come in one variant \(DISN\).*leave out --variant hard"):
        opened(tmp_path, variant="hard")
    with pytest.raises(AskedWrongly, match="easy and hard, not 'middling'"):
        opened(tmp_path, variant="middling")


def test_a_variant_that_is_not_there_is_refused_with_the_one_that_is(tmp_path: Path) -> None:
    write_pairs(tmp_path, lambda folder: write_disn(folder, ("hard",)))
    with pytest.raises(SourceError, match="has no easy renders: fetch them, or say --variant hard"):
        opened(tmp_path)


def test_renders_without_metadata_are_told_by_their_number_and_have_no_cameras(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        write_r2n2(folder)
        (folder / "rendering/rendering_metadata.txt").unlink()

    source = opened(write_pairs(tmp_path, write))
    assert source.listing.images is not None and not source.listing.images.with_cameras
    assert load(source)[1].cameras is None


def test_renders_that_tell_neither_way_are_refused(tmp_path: Path) -> None:
    write_pairs(tmp_path, lambda folder: write_picture(folder / "rendering/00.png", 0))
    with pytest.raises(SourceError, match=r"hold no renders: .*3D-R2N2 has 24 of them, DISN 36"):
        opened(tmp_path)


def test_fewer_shapes_than_the_data_set_has_are_refused_unless_a_part_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"clouds in ShapeNet: 3 found, and the data set has 43,783\. .*--partial"):
        open_source(str(write_pairs(tmp_path)))


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("rendering/05.png", None, r"1 of its 24 images are missing: .*a1/rendering/05\.png"),
        ("rendering/rendering_metadata.txt", None, r"rendering_metadata\.txt is missing"),
        ("rendering/rendering_metadata.txt", r2n2_line(0) * 23, "23 cameras of 5 numbers; 3D-R2N2 has 24 of 5"),
        ("rendering/rendering_metadata.txt", disn_line(0) * 24, "24 cameras of 10 numbers; 3D-R2N2 has 24 of 5"),
        ("rendering/rendering_metadata.txt", "a b c d e\n" * 24, "line 1, is no camera"),
        ("rendering/rendering_metadata.txt", "0 1 nan 1 1\n" * 24, "line 1, is no camera: a value is not finite"),
    ],
)
def test_renders_that_are_not_whole_break_their_shape_alone(
    tmp_path: Path, path: str, content: str | None, message: str
) -> None:
    source = opened(write_pairs(tmp_path))
    file = tmp_path / f"ShapeNetRendering/{AIRPLANE}/a1" / path
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    with pytest.raises(ShapeError, match=message):
        load(source)
    load(source, 1)


def test_clouds_that_differ_from_the_first_break_their_shape_alone(tmp_path: Path) -> None:
    source = opened(write_pairs(tmp_path))
    place = tmp_path / f"ShapeNet/{CHAIR}/c3.ply"
    write_ply(place, points_of(0)[:-1])
    with pytest.raises(ShapeError, match=r"c3\.ply has 47 points, and the first cloud has 48"):
        load(source, 2)
    place.write_bytes(place.read_bytes()[:-40])
    with pytest.raises(ShapeError, match=r"c3\.ply ends after 43 of its 47 vertices: fetch it again"):
        load(source, 2)
    write_ply(place, np.full((NUM_POINTS, 3), np.nan))
    with pytest.raises(ShapeError, match=r"c3\.ply: vertex 0 has coordinates that are not finite"):
        load(source, 2)


def test_a_cloud_that_lies_elsewhere_is_refused(tmp_path: Path) -> None:
    write_ply(write_pairs(tmp_path) / "ShapeNet/loose.ply", points_of(0))
    with pytest.raises(SourceError, match=r"loose\.ply is out of place"):
        opened(tmp_path)


def test_the_hash_changes_with_the_sizes_of_clouds_and_with_the_variant(tmp_path: Path) -> None:
    write_pairs(tmp_path, write_disn)
    easy, hard = opened(tmp_path).listing.hash, opened(tmp_path, variant="hard").listing.hash
    write_ply(tmp_path / f"ShapeNet/{CHAIR}/c3.ply", points_of(0)[:-1])
    assert len({easy, hard, opened(tmp_path).listing.hash}) == 3


def test_pairs_are_read_from_any_file_system(tmp_path: Path) -> None:
    write_pairs(tmp_path / "data")
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "data"), "/pairs/data", recursive=True)
    try:
        source = open_source("memory://pairs", options=ReadingOptions(partial=True))
        cloud, images = load(source, 2)
        memory.rm("/pairs/data/ShapeNetRendering/03001627/c3/rendering/23.png")
        with pytest.raises(ShapeError, match=r"1 of its 24 images are missing: memory://pairs/.*/23\.png"):
            load(source, 2)
    finally:
        memory.rm("/pairs", recursive=True)
    assert np.array_equal(cloud.points, points_of(2))
    assert number_seen(images.views[23], 24) == 23


def test_a_store_keeps_the_sources_views_and_cameras_and_points_lead_back_to_the_clouds(tmp_path: Path) -> None:
    source = opened(write_pairs(tmp_path / "source", write_disn), variant="hard")
    (tmp_path / f"source/ShapeNetRendering/{AIRPLANE}/b2/hard/20.png").unlink()
    url = str(tmp_path / "store.zarr")
    summary = ingest(source, url, rig=rig_by_name("azimuth12", 16), num_points=32, num_workers=1)
    assert [entry.id for entry in summary.quarantine] == [f"{AIRPLANE}/b2"]
    store = open_store(url)
    assert "cameras" in store.ingest_fields
    assert "visibility" not in store.ingest_fields
    rows = [0, 2]
    points, centre, scale, cameras, views = (
        store.read(name, rows) for name in ("points", "centre", "scale", "cameras", "views")
    )
    for place, seed in enumerate(rows):
        _, images = load(source, seed)
        assert images.cameras is not None
        assert np.array_equal(cameras[place], images.cameras)
        assert np.array_equal(views[place], images.views)
        found = points[place] * scale[place] + centre[place]
        distances = np.linalg.norm(points_of(seed)[:, None] - found, axis=2)
        assert distances.min(axis=0).max() < 1e-5
        assert len(set(distances.argmin(axis=0).tolist())) == 32
    assert store.read("id", rows).tolist() == [f"{AIRPLANE}/a1", f"{CHAIR}/c3"]
    assert verify_store(store) == []
