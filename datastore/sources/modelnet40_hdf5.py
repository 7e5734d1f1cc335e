"""ModelNet40 as PointNet's authors sampled it: 2,048 points a shape in HDF5 files, five for training and two for test."""

import json
import re
from pathlib import PurePosixPath
from typing import ClassVar, Final, Self

from datastore.errors import SourceError
from datastore.shape import PointCloud, Shape
from datastore.sources import Listing, ReadingOptions, ShapeReference, require_count
from datastore.sources.files import SourceFiles
from datastore.sources.hdf5 import CloudFile, RowReader, common_num_points, look_at_clouds, numbered_files
from datastore.sources.shape_file import as_normals, as_points

MODELNET_LICENCE: Final = "academic research only; the models belong to their authors"

_NAMES: Final = "shape_names.txt"
_NUM_CLASSES: Final = 40
_NUM_POINTS: Final = 2048
_NUM_SHAPES: Final = {"train": 9_840, "test": 2_468}  # of the 9,843 and 2,468 of the official split
_DATA_FILE: Final = re.compile(r"ply_data_(train|test)\d+\.h5")
_SHAPENETPART: Final = re.compile(r"ply_data_val\d+\.h5|all_object_categories\.txt|.*_hdf5_file_list\.txt")


class ModelNet40Hdf5:
    """`modelnet40_ply_hdf5_2048`. Shapes are listed as the files are numbered, whatever order a disk lists them in."""

    FORMAT: ClassVar[str] = "modelnet40_hdf5"
    LOOKS_LIKE: ClassVar[str] = f"modelnet40_ply_hdf5_2048: ply_data_train0.h5 ..., ply_data_test0.h5 ..., {_NAMES}"

    def __init__(self, url: str, listing: Listing) -> None:
        self.url = url
        self.listing = listing
        self._files = SourceFiles(url)
        self._rows = RowReader(self._files)

    @classmethod
    def recognises(cls, files: SourceFiles) -> bool:
        """Whether such files are there and no sign of ShapeNetPart, whose files have the same names."""
        names = files.entries()
        return any(map(_DATA_FILE.fullmatch, names)) and not any(map(_SHAPENETPART.fullmatch, names))

    @classmethod
    def open(cls, files: SourceFiles, options: ReadingOptions) -> Self:
        """The data set, listed: names from the JSON files beside the arrays where there are some, else file and row."""
        if not files.exists(_NAMES):
            raise SourceError(
                f"{files.where(_NAMES)} is missing: it says what the labels mean. Take it from modelnet40_ply_hdf5_2048.zip."
            )
        class_names = tuple(files.lines(_NAMES))
        require_count(f"classes in {files.where(_NAMES)}", len(class_names), _NUM_CLASSES, options)
        found: list[CloudFile] = []
        shapes: list[ShapeReference] = []
        for split, promised in _NUM_SHAPES.items():
            of_split = [
                look_at_clouds(files, path, num_classes=len(class_names), beside={"normal": (3,)})
                for path in numbered_files(files, split, f"{split}_files.txt", options)
            ]
            require_count(
                f"{split} shapes in {files.url}", sum(len(file.labels) for file in of_split), promised, options
            )
            for file in of_split:
                shapes += [
                    ShapeReference(name, int(label), split, f"{file.path}#{row}")
                    for row, (name, label) in enumerate(zip(_ids(files, file, class_names), file.labels, strict=True))
                ]
            found += of_split
        if not found:
            raise SourceError(f"{files.url} has no ply_data_train*.h5 and no ply_data_test*.h5.")
        num_points = common_num_points(found, files)
        require_count(f"points of a cloud in {files.url}", num_points, _NUM_POINTS, options)
        listing = Listing(
            shapes=shapes,
            class_names=class_names,
            splits=tuple(split for split in _NUM_SHAPES if any(shape.split == split for shape in shapes)),
            geometry="points",
            num_points=num_points,
            with_normals=all("normal" in file.arrays for file in found),
            units="unit sphere",
            licence=MODELNET_LICENCE,
            content=" ".join(file.content for file in found),
        )
        return cls(files.url, listing)

    def load(self, shape: ShapeReference) -> Shape:
        """One row of one file."""
        path, _, row = shape.place.rpartition("#")
        names = ("data", "normal") if self.listing.with_normals else ("data",)
        where = f"{self._files.where(path)}, row {row}"
        points, *normals = self._rows.row(path, int(row), names)
        return Shape(PointCloud(as_points(points, where), normals=as_normals(normals[0]) if normals else None))


def _ids(files: SourceFiles, file: CloudFile, class_names: tuple[str, ...]) -> list[str]:
    """The name of each row: of the model it was sampled from, where that is known."""
    stem = PurePosixPath(file.path).stem
    path = re.sub(r"(\d+)$", r"_\1_id2file.json", stem)
    if not files.exists(path):
        return [f"{stem}/{row}" for row in range(len(file.labels))]
    where = files.where(path)
    try:
        names = json.loads(files.text(path))
    except ValueError as error:
        raise SourceError(f"{where} is no JSON, or only a part of it ({error}). Fetch it again.") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SourceError(f"{where} is no list of file names. Fetch it again.")
    if len(names) != len(file.labels):
        raise SourceError(
            f"{where} names {len(names):,} shapes, and {file.path} has {len(file.labels):,}. Take both from one archive."
        )
    for row, (name, label) in enumerate(zip(names, file.labels, strict=True)):
        folder, slash, _ = name.rpartition("/")
        if slash and folder.rpartition("/")[2] != class_names[label]:
            raise SourceError(
                f"{where} says that row {row} is {name!r}, and {file.path} labels it {class_names[label]!r}. "
                f"Take both, and {_NAMES}, from one archive."
            )
    return [name.removesuffix(".ply") for name in names]
