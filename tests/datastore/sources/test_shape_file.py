"""Tables, arrays and colours of single shapes: what is read, and what breaks the one shape."""

from pathlib import Path

import numpy as np
import pytest

from datastore.sources import ShapeError
from datastore.sources.files import SourceFiles
from datastore.sources.shape_file import as_colours, as_normals, as_points, read_array, read_numbers, read_shape_file


@pytest.mark.parametrize(("content", "delimiter"), [(b"1 2 3\n4 5 6e0\n", None), (b"1,2,3\r\n 4, 5,6", ",")])
def test_numbers_are_read_line_by_line(tmp_path: Path, content: bytes, delimiter: str | None) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    assert np.array_equal(read_numbers(SourceFiles(tmp_path), "a.txt", delimiter), [[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "a.txt is missing"),
        (b"", "a.txt is empty; fetch it again"),
        (b" \n\n", "a.txt holds no points"),
        (b"1 2 3\n4 5", "a.txt is no table of numbers, or only a part of one"),
        (b"1 2 three", "a.txt is no table of numbers"),
        (b"\xff\xfe1 2", "a.txt is no table of numbers"),
    ],
)
def test_a_file_that_holds_no_table_breaks_its_shape(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ShapeError, match=message):
        read_numbers(SourceFiles(tmp_path), "a.txt")


def test_arrays_are_read_without_pickles(tmp_path: Path) -> None:
    files = SourceFiles(tmp_path)
    np.save(tmp_path / "a.npy", np.arange(6.0).reshape(2, 3))
    assert read_array(files, "a.npy").shape == (2, 3)
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    np.save(tmp_path / "text.npy", np.array(["a"]))
    np.savez(tmp_path / "many.npy.npz", a=np.zeros(2))
    (tmp_path / "many.npy.npz").rename(tmp_path / "many.npy")
    (tmp_path / "short.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-8])
    for name in ("objects", "text", "many", "short"):
        with pytest.raises(ShapeError, match=rf"{name}\.npy (is no \.npy array|holds no single array)"):
            read_array(files, f"{name}.npy")


def test_a_folder_in_the_place_of_a_file_breaks_its_shape(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(ShapeError, match=r"a\.txt"):
        read_shape_file(SourceFiles(tmp_path), "a.txt")


def test_coordinates_that_are_not_finite_are_refused_with_their_row() -> None:
    assert as_points(np.array([[1, 2, 3]]), "a").dtype == np.float32
    with pytest.raises(ShapeError, match="a: some coordinates are not finite, the first of them in row 1"):
        as_points(np.array([[0.0, 0, 0], [0, np.nan, 0], [np.inf, 0, 0]]), "a")


def test_coordinates_that_are_too_large_for_32_bits_are_refused() -> None:
    with pytest.raises(ShapeError, match="not finite"):
        as_points(np.array([[0.0, 1e300, 0]]), "a")


def test_normals_without_a_direction_are_no_reason_to_refuse_a_shape() -> None:
    normals = as_normals(np.array([[0, 0, 0], [np.nan, 0, 1], [1e300, 0, 0]]))
    assert normals.dtype == np.float32
    assert np.isnan(normals[1, 0])


def test_colours_from_0_to_1_and_from_0_to_255_are_the_same() -> None:
    of_bytes = np.array([[0, 128, 255]], np.uint8)
    for values in (of_bytes, of_bytes.astype(np.float32), of_bytes / 255):
        assert np.array_equal(as_colours(values, "a"), of_bytes)
    assert np.array_equal(as_colours(np.array([[0, 1, 1]], np.uint8), "a"), [[0, 1, 1]])
    for wrong in (-1.0, 256.0, np.nan):
        with pytest.raises(ShapeError, match="a: its colours are neither"):
            as_colours(np.array([[0, 0, wrong]]), "a")
