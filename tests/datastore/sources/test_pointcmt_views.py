"""PointCMT's 20 views beside ModelNet40's re-sampled clouds."""

from pathlib import Path

import numpy as np
import pytest

from datastore.errors import SourceError
from datastore.shape import PointCloud
from datastore.sources import ReadingOptions, ShapeError, open_source
from tests.pictures import number_seen, write_picture

NAMES = {"train": ["airplane_0001", "night_stand_0002"], "test": ["night_stand_0300"]}
PARTIAL = ReadingOptions(partial=True)


def write_tree(root: Path) -> Path:
    clouds = root / "modelnet40_normal_resampled"
    clouds.mkdir(parents=True)
    (clouds / "modelnet40_shape_names.txt").write_text("airplane\nnight_stand\n")
    row = 0
    for split, names in NAMES.items():
        (clouds / f"modelnet40_{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            class_name = name[:-5]
            (clouds / class_name).mkdir(exist_ok=True)
            lines = "".join(f"{point / 10_000:.4f},{row},0.5,0,-1,0\n" for point in range(10_000))
            (clouds / class_name / f"{name}.txt").write_text(lines)
            row += 1
            for view in range(1, 21):
                write_picture(root / f"ModelNet40_mv_20view/{class_name}/{split}/{name}_{view:03d}.png", view)
    return root


def test_views_and_clouds_are_paired_by_name(tmp_path: Path) -> None:
    source = open_source(str(write_tree(tmp_path)), options=PARTIAL)
    listing = source.listing
    assert (source.FORMAT, listing.class_names) == ("pointcmt", ("airplane", "night_stand"))
    assert [(shape.id, shape.label, shape.split) for shape in listing.shapes] == [
        ("airplane_0001", 0, "train"),
        ("night_stand_0002", 1, "train"),
        ("night_stand_0300", 1, "test"),
    ]
    assert (listing.num_points, listing.with_normals) == (10_000, True)
    assert listing.images is not None
    assert (listing.images.num_views, listing.images.image_size) == (20, 16)
    for row in (0, 2):
        shape = source.load(listing.shapes[row])
        assert isinstance(shape.geometry, PointCloud) and shape.images is not None
        assert shape.geometry.points[17] == pytest.approx([0.0017, row, 0.5])
        assert shape.geometry.normals is not None and shape.geometry.normals[17].tolist() == [0, -1, 0]
        assert [number_seen(view, 22) for view in shape.images.views] == list(range(1, 21))
        assert np.isfinite(shape.geometry.points).all()


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    with pytest.raises(SourceError, match=r"the data set has 40.*--partial"):
        open_source(str(root))
    source = open_source(str(root), options=PARTIAL)
    (root / "ModelNet40_mv_20view/airplane/train/airplane_0001_020.png").unlink()
    with pytest.raises(ShapeError, match=r"1 of its 20 images are missing: .*airplane_0001_020\.png"):
        source.load(source.listing.shapes[0])
    (root / "modelnet40_normal_resampled").rename(root / "elsewhere")
    with pytest.raises(SourceError, match="modelnet40_normal_resampled is missing: the views are of the shapes in it"):
        open_source(str(root), options=PARTIAL)
