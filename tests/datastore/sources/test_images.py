"""Images of shapes: transparency, modes, sizes, and what is said of damaged ones."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datastore.errors import SourceError
from datastore.sources import ShapeError
from datastore.sources.files import SourceFiles
from datastore.sources.images import first_image_size, read_views
from tests.pictures import colour_of, number_seen, write_picture


def test_views_come_in_the_order_of_their_paths_from_any_format(tmp_path: Path) -> None:
    names = ["b.png", "a.jpg", "c.webp"]
    for number, name in enumerate(names):
        write_picture(tmp_path / name, number)
    views = read_views(SourceFiles(tmp_path), names, 16)
    assert (views.shape, views.dtype) == ((3, 16, 16, 3), np.uint8)
    assert (views[0] == colour_of(0)).all()
    assert [number_seen(view, 3) for view in views] == [0, 1, 2]


def test_transparent_pixels_are_composited_on_white(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 4), np.uint8)  # transparent black, as renderers leave it
    pixels[0, 0] = (200, 100, 0, 255)
    pixels[0, 1] = (200, 100, 0, 51)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "rgba.png")
    Image.fromarray(pixels[..., [0, 3]], "LA").save(tmp_path / "grey.png")
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([10, 20, 30, 0, 0, 0])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "palette.png", transparency=1)
    rgba, grey, indexed = read_views(SourceFiles(tmp_path), ["rgba.png", "grey.png", "palette.png"], 4)
    assert rgba[0, 0].tolist() == [200, 100, 0]
    assert rgba[0, 1].tolist() == [244, 224, 204]
    assert grey[0, 0].tolist() == [200, 200, 200]
    assert indexed[0, 0].tolist() == [10, 20, 30]
    for view in (rgba, grey, indexed):
        assert (view[1:] == 255).all()


def test_grey_images_become_grey_colours_and_16_bit_ones_are_refused(tmp_path: Path) -> None:
    Image.new("L", (4, 4), 90).save(tmp_path / "grey.png")
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "deep.png")
    files = SourceFiles(tmp_path)
    assert (read_views(files, ["grey.png"], 4) == 90).all()
    with pytest.raises(ShapeError, match=r"deep\.png holds pixels of mode 'I;16'"):
        read_views(files, ["deep.png"], 4)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_a_truncated_image_is_named_at_any_length(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    Image.fromarray(noise).save(path)
    content = path.read_bytes()
    for length in {0, 1, 7, 30, 60, len(content) // 4, len(content) // 2}:
        path.write_bytes(content[:length])
        with pytest.raises(ShapeError, match=rf"{name} is .*fetch it again"):
            read_views(SourceFiles(tmp_path), [name], 24)


def test_damage_inside_an_image_is_named(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[60:80] = bytes(20)
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ShapeError, match=r"a\.png is damaged"):
        read_views(SourceFiles(tmp_path), ["a.png"], 24)


def test_missing_images_are_counted_and_the_first_of_them_named(tmp_path: Path) -> None:
    for number in (0, 2):
        write_picture(tmp_path / f"{number}.png", number)
    with pytest.raises(ShapeError, match=r"4 of its 6 images are missing: .*/1\.png, .*/3\.png, .*/4\.png and 1 more"):
        read_views(SourceFiles(tmp_path), [f"{number}.png" for number in range(6)], 16)


def test_an_image_of_another_size_is_not_resized_but_named(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png", 0, size=16)
    write_picture(tmp_path / "b.png", 0, size=17)
    with pytest.raises(ShapeError, match=r"b\.png has 17 x 17 pixels, and the first image has 16 x 16"):
        read_views(SourceFiles(tmp_path), ["a.png", "b.png"], 16)


def test_the_size_is_that_of_the_first_image_that_can_be_opened(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(b"no image")
    write_picture(tmp_path / "c.png", 0, size=12)
    files = SourceFiles(tmp_path)
    assert first_image_size(files, ["a.png", "b.png", "c.png"]) == 12
    with pytest.raises(SourceError, match=r"a\.png and the images after it cannot be read"):
        first_image_size(files, ["a.png", "b.png"])
    Image.new("RGB", (8, 6)).save(tmp_path / "wide.png")
    with pytest.raises(SourceError, match=r"wide\.png has 8 x 6 pixels\. A store keeps square views"):
        first_image_size(files, ["wide.png"])
