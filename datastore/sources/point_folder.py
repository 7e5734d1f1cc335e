"""A tree of point clouds, one file a shape, whose folders name class and split.

Columns of text and arrays are told by a header line; without one there are 3 (x y z), 6 (and a normal or a colour) or
9 (both): three columns of length 1 are a normal, three others a colour. A PLY with faces is a mesh, and its folder one
of meshes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import ClassVar, Final, Self

import numpy as np

from datastore.errors import AskedWrongly, SourceError
from datastore.shape import PointCloud, Shape
from datastore.sources import Listing, ReadingOptions, ShapeError, ShapeReference
from datastore.sources.class_folders import SPLIT_ORDER, classes_and_splits, ids_of, sizes_of
from datastore.sources.files import File, SourceFiles
from datastore.sources.ply_cloud import read_ply_cloud, read_ply_header
from datastore.sources.shape_file import as_colours, as_normals, as_points, parse_numbers, read_array, read_shape_file

POINT_SUFFIXES: Final = (".ply", ".xyz", ".txt", ".pts", ".npy", ".csv")
_TEXT_SUFFIXES: Final = (".txt", ".csv")  # which may hold lists and notes as well
_OF_MESHES_ALONE: Final = (".off", ".obj", ".stl", ".glb", ".gltf")
_LEVELS_LOOKED_AT: Final = 4
_FOLDERS_LOOKED_AT: Final = 8  # of each level
_FILES_LOOKED_AT: Final = 16
_BEGINNING: Final = 2**16  # bytes, in which a header ends

_POINT_NAMES: Final = ("x", "y", "z")
_NORMAL_NAMES: Final = (("nx", "ny", "nz"), ("normal_x", "normal_y", "normal_z"))
_COLOUR_NAMES: Final = (("r", "g", "b"), ("red", "green", "blue"))
_SEPARATORS: Final = re.compile(r"[,;\s]+")
_NUMBER: Final = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|[-+]?(nan|inf|infinity)", re.IGNORECASE)
_FACES: Final = re.compile(rb"^element\s+face\s+0*[1-9]", re.MULTILINE)
_INTENSITY: Final = {".pts": (4, 7)}  # scanners write one after x y z
_UNIT: Final = 0.05  # how far from 1 the length of a normal may be
_MOSTLY: Final = 0.9  # of a cloud's points have one of that length


class PointFolder:
    """`class/split/name.ply` and its kin: `class/name.xyz`, `split/class/name.npy`, and bare files without a class."""

    FORMAT: ClassVar[str] = "point_folder"
    LOOKS_LIKE: ClassVar[str] = (
        f"a folder tree class/split/name, split/class/name, class/name or name with clouds {' '.join(POINT_SUFFIXES)}"
    )

    def __init__(self, url: str, listing: Listing) -> None:
        self.url = url
        self.listing = listing
        self._files = SourceFiles(url)

    @classmethod
    def recognises(cls, files: SourceFiles) -> bool:
        """Whether the first file that tells, in the first folders of a level, is a cloud."""
        level = [""]
        for _ in range(_LEVELS_LOOKED_AT):
            below: list[str] = []
            for folder in level[:_FOLDERS_LOOKED_AT]:
                names = files.entries(folder)
                places = [f"{folder}/{name}".lstrip("/") for name in names]
                told = [place for place in places if place.lower().endswith(POINT_SUFFIXES + _OF_MESHES_ALONE)]
                for place in told[:_FILES_LOOKED_AT]:
                    is_cloud = _is_cloud(files, place)
                    if is_cloud is not None:
                        return is_cloud
                below += [place for place in places if place not in told][:_FOLDERS_LOOKED_AT]
            level = below
        return False

    @classmethod
    def open(cls, files: SourceFiles, options: ReadingOptions) -> Self:
        """The folder, listed in the order of its sorted paths. The first clouds say whether there are normals and colours."""
        if options.variant is not None:
            raise AskedWrongly(f"A folder of clouds has no variants; leave out --variant {options.variant}.")
        listed = _without_lists(files.walk(POINT_SUFFIXES))
        if not listed:
            raise SourceError(f"{files.url}: {files.describe()} No file below it ends in {' '.join(POINT_SUFFIXES)}.")
        places = [file.path for file in listed]
        first = _first_cloud(files, places)
        facts = classes_and_splits(places)
        class_names = tuple(sorted({class_name for class_name, _ in facts} - {""}))
        label_of = {"": -1} | {name: label for label, name in enumerate(class_names)}
        splits = {split for _, split in facts}
        listing = Listing(
            shapes=[
                ShapeReference(shape_id, label_of[class_name], split, place)
                for shape_id, (class_name, split), place in zip(ids_of(places), facts, places, strict=True)
            ],
            class_names=class_names,
            splits=tuple(name for name in SPLIT_ORDER if name in splits),
            geometry="points",
            coloured=first.colours is not None,
            with_normals=first.normals is not None,
            content=sizes_of(listed),
        )
        return cls(files.url, listing)

    def load(self, shape: ShapeReference) -> Shape:
        """One file as one cloud."""
        return Shape(_read(self._files, shape.place))


def _is_cloud(files: SourceFiles, place: str) -> bool | None:
    """Whether a file is one of a cloud (True), or of a mesh (False); None where it does not tell."""
    suffix = PurePosixPath(place).suffix.lower()
    if suffix in _OF_MESHES_ALONE:
        return False
    if suffix not in (".ply", *_TEXT_SUFFIXES):
        return True
    try:
        with files.open(place) as file:
            beginning = file.read(_BEGINNING)
        if suffix == ".ply":
            read_ply_header(beginning, place)
            return not _has_faces(beginning)
        _read_head(beginning, place)
    except SourceError:
        return None
    return True


def _has_faces(content: bytes) -> bool:
    return _FACES.search(content.partition(b"end_header")[0]) is not None


def _without_lists(listed: Sequence[File]) -> list[File]:
    """All but the lists and notes that lie at the top of a tree."""
    if not any("/" in file.path for file in listed):
        return list(listed)
    return [file for file in listed if "/" in file.path or not file.path.lower().endswith(_TEXT_SUFFIXES)]


def _first_cloud(files: SourceFiles, places: Sequence[str]) -> PointCloud:
    """The first one that can be read. SourceError where the first few cannot."""
    reason = ""
    for place in islice(places, _FILES_LOOKED_AT):
        try:
            return _read(files, place)
        except ShapeError as error:
            reason = reason or str(error)
    raise SourceError(f"{reason}. Nor can the files after it be read")


def _read(files: SourceFiles, place: str) -> PointCloud:
    """One file as one cloud, by its suffix."""
    where = files.where(place)
    suffix = PurePosixPath(place).suffix.lower()
    if suffix == ".npy":
        values = read_array(files, place)
        if values.ndim != 2:
            raise ShapeError(f"{where} is an array {values.shape}, and a cloud is (n, 3), (n, 6) or (n, 9)")
        return _by_place(values, where)
    content = read_shape_file(files, place)
    if suffix == ".ply":
        if _has_faces(content):
            raise ShapeError(f"{where} has faces: keep meshes in a folder of their own")
        return read_ply_cloud(content, where)
    head = _read_head(content, where)
    values = parse_numbers(content[head.begins :], where, head.separator, head.columns)
    if head.num_points not in (None, len(values)):
        raise ShapeError(f"{where} announces {head.num_points:,} points and has {len(values):,}; fetch it again")
    if head.names:
        return _by_name(values, head.names, where)
    if values.shape[1] in _INTENSITY.get(suffix, ()):
        values = np.delete(values, 3, axis=1)
    return _by_place(values, where)


@dataclass(frozen=True)
class _Head:
    """What the first lines of a text file say."""

    begins: int  # bytes before the first point
    separator: str | None
    num_points: int | None  # announced
    names: tuple[str, ...]  # of the columns that are read; empty without a header line
    columns: tuple[int, ...] | None


def _read_head(content: bytes, where: str) -> _Head:
    """A number of points, then names of columns, both optional. ShapeError where no row of numbers follows."""
    begins, num_points = 0, None
    line, length = _line_at(content, begins)
    if line.isdecimal():
        num_points, begins = int(line), length
        line, length = _line_at(content, begins)
    separator = next((sign for sign in ",;" if sign in line), None)
    words = [word.strip("\"'") for word in _SEPARATORS.split(line.strip().lstrip("#/").strip()) if word]
    if len(words) >= len(_POINT_NAMES) and all(map(_NUMBER.fullmatch, words)):
        return _Head(begins, separator, num_points, (), None)
    found = tuple(word.lower() for word in words)
    wanted = [_POINT_NAMES, *(names for names in (*_NORMAL_NAMES, *_COLOUR_NAMES) if set(names) <= set(found))]
    if not set(_POINT_NAMES) <= set(found):
        raise ShapeError(
            f"{where} begins with {line[:60]!r}, which is neither a row of numbers nor a header with columns x, y and z"
        )
    names = tuple(name for group in wanted for name in group)
    return _Head(begins + length, separator, num_points, names, tuple(found.index(name) for name in names))


def _line_at(content: bytes, begins: int) -> tuple[str, int]:
    """A line, and how many bytes it takes."""
    end = content.find(b"\n", begins) + 1 or len(content)
    return content[begins:end].decode("latin-1").strip(), end - begins


def _by_name(values: np.ndarray, names: Sequence[str], where: str) -> PointCloud:
    def of(groups: Sequence[Sequence[str]]) -> np.ndarray | None:
        group = next((group for group in groups if set(group) <= set(names)), None)
        return None if group is None else values[:, [names.index(name) for name in group]]

    normals, colours = of(_NORMAL_NAMES), of(_COLOUR_NAMES)
    return PointCloud(
        as_points(values[:, :3], where),
        normals=None if normals is None else as_normals(normals),
        colours=None if colours is None else as_colours(colours, where),
    )


def _by_place(values: np.ndarray, where: str) -> PointCloud:
    """Columns without names: x y z first, then triples that are told apart by their lengths."""
    if values.shape[1] not in (3, 6, 9) or len(values) == 0:
        raise ShapeError(
            f"{where} has {len(values):,} points of {values.shape[1]} numbers, and 3, 6 or 9 are known: x y z, a normal, a colour. "
            f"Name the columns in a first line, as in x y z nx ny nz r g b"
        )
    points = as_points(values[:, :3], where)
    normals = colours = None
    for triple in np.split(values[:, 3:], (values.shape[1] - 3) // 3, axis=1) if values.shape[1] > 3 else ():
        if normals is None and _are_normals(triple):
            normals = as_normals(triple)
        elif colours is None:
            colours = as_colours(triple, where)
        else:
            raise ShapeError(f"{where}: columns 4 to 9 hold two colours and no normal of length 1")
    return PointCloud(points, normals=normals, colours=colours)


def _are_normals(triple: np.ndarray) -> bool:
    lengths = np.linalg.norm(triple.astype(np.float64), axis=1)
    return bool((np.abs(lengths - 1) < _UNIT).mean() >= _MOSTLY)
