"""The files of single shapes, read so that what is wrong with one of them concerns that shape alone."""

import io
from collections.abc import Sequence

import numpy as np

from datastore.errors import SourceError
from datastore.sources import ShapeError
from datastore.sources.files import SourceFiles


def read_shape_file(files: SourceFiles, path: str) -> bytes:
    """The file, whole. ShapeError where it is missing, cannot be read, or is empty."""
    try:
        content = files.read(path)
    except SourceError as error:
        raise ShapeError(str(error).rstrip(".")) from error
    if not content:
        raise ShapeError(f"{files.where(path)} is empty; fetch it again")
    return content


def read_numbers(files: SourceFiles, path: str, delimiter: str | None = None) -> np.ndarray:
    """A text file of numbers as rows and columns, n by m, float64. `None` separates by blanks."""
    return parse_numbers(read_shape_file(files, path), files.where(path), delimiter)


def parse_numbers(
    content: bytes, where: str, delimiter: str | None = None, columns: Sequence[int] | None = None
) -> np.ndarray:
    """The same for what was read already, or some of its columns. ShapeError where a line is no row of numbers or lacks some."""
    if not content.strip():
        raise ShapeError(f"{where} holds no points")
    try:
        return np.loadtxt(
            io.BytesIO(content), np.float64, delimiter=delimiter, usecols=columns, ndmin=2, encoding="utf-8"
        )
    except ValueError as error:
        raise ShapeError(f"{where} is no table of numbers, or only a part of one ({error})") from error


def read_array(files: SourceFiles, path: str) -> np.ndarray:
    """The array in an .npy file. ShapeError where it is truncated or holds anything but numbers."""
    content = read_shape_file(files, path)
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ShapeError(f"{files.where(path)} is no .npy array, or only a part of one ({error})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise ShapeError(f"{files.where(path)} holds no single array of numbers")
    return array


def as_points(values: np.ndarray, where: str) -> np.ndarray:
    """Coordinates as float32. ShapeError where one of them is no finite number."""
    with np.errstate(over="ignore"):  # what is too large for 32 bits becomes infinite, and is refused as such
        narrow = np.ascontiguousarray(values, dtype=np.float32)
    is_finite = np.isfinite(narrow).all(axis=-1)
    if not is_finite.all():
        raise ShapeError(
            f"{where}: some coordinates are not finite, the first of them in row {int(np.argmin(is_finite))}"
        )
    return narrow


def as_normals(values: np.ndarray) -> np.ndarray:
    """Normals as float32. Some without a direction, as real files have, take their neighbours' when rows are made."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values, dtype=np.float32)


def as_colours(values: np.ndarray, where: str) -> np.ndarray:
    """RGB as uint8, from 0 to 255 or, as floats that never exceed 1, from 0 to 1. ShapeError for anything else."""
    if not np.isfinite(values).all() or values.min(initial=0) < 0 or values.max(initial=0) > 255:
        raise ShapeError(f"{where}: its colours are neither within 0 to 1 nor within 0 to 255")
    is_fraction = values.dtype.kind == "f" and values.max(initial=0) <= 1
    colours: np.ndarray = np.rint(values * 255 if is_fraction else values).astype(np.uint8)
    return colours
