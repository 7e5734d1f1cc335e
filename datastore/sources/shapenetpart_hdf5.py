"""ShapeNetPart as PointNet's authors sampled it: 2,048 points a shape in HDF5 files, each with the number of its part."""

import re
from pathlib import PurePosixPath
from typing import ClassVar, Final, Self

from datastore.errors import SourceError
from datastore.shape import PointCloud, Shape
from datastore.sources import Listing, ReadingOptions, ShapeReference, require_count
from datastore.sources.files import SourceFiles
from datastore.sources.hdf5 import CloudFile, RowReader, common_num_points, look_at_clouds, numbered_files
from datastore.sources.shape_file import as_points
from datastore.sources.shapenet_names import (
    NUM_SHAPENETPART_SHAPES,
    PART_CATEGORIES,
    PART_NAMES,
    SHAPENET_LICENCE,
    checked_parts,
)

_NUM_POINTS: Final = 2048
_DATA_FILE: Final = re.compile(r"ply_data_(train|val|test)\d+\.h5")
_TELLING: Final = re.compile(r"ply_data_val\d+\.h5|all_object_categories\.txt|(train|val|test)_hdf5_file_list\.txt")


class ShapeNetPartHdf5:
    """`hdf5_data`: `ply_data_{train0..5,val0,test0..1}.h5`. Shapes have no names of their own: file and row name them."""

    FORMAT: ClassVar[str] = "shapenetpart_hdf5"
    LOOKS_LIKE: ClassVar[str] = (
        "ShapeNetPart's hdf5_data: ply_data_train0.h5 ..., ply_data_val0.h5, ply_data_test0.h5 ..."
    )

    def __init__(self, url: str, listing: Listing) -> None:
        self.url = url
        self.listing = listing
        self._files = SourceFiles(url)
        self._rows = RowReader(self._files)

    @classmethod
    def recognises(cls, files: SourceFiles) -> bool:
        """Whether such files are there, and what ModelNet40, whose files have the same names, does not have."""
        names = files.entries()
        return any(map(_DATA_FILE.fullmatch, names)) and any(map(_TELLING.fullmatch, names))

    @classmethod
    def open(cls, files: SourceFiles, options: ReadingOptions) -> Self:
        """The data set, as its files are numbered: training shapes, then those for validation and test."""
        found: list[CloudFile] = []
        shapes: list[ShapeReference] = []
        for split, promised in NUM_SHAPENETPART_SHAPES.items():
            of_split = [
                look_at_clouds(files, path, num_classes=len(PART_CATEGORIES), beside={"pid": ()}, required=("pid",))
                for path in numbered_files(files, split, f"{split}_hdf5_file_list.txt", options)
            ]
            require_count(
                f"{split} shapes in {files.url}", sum(len(file.labels) for file in of_split), promised, options
            )
            shapes += [
                ShapeReference(f"{PurePosixPath(file.path).stem}/{row}", int(label), split, f"{file.path}#{row}")
                for file in of_split
                for row, label in enumerate(file.labels)
            ]
            found += of_split
        if not found:
            raise SourceError(f"{files.url} has no ply_data_train*.h5, ply_data_val*.h5 or ply_data_test*.h5.")
        num_points = common_num_points(found, files)
        require_count(f"points of a cloud in {files.url}", num_points, _NUM_POINTS, options)
        listing = Listing(
            shapes=shapes,
            class_names=PART_CATEGORIES,
            splits=tuple(split for split in NUM_SHAPENETPART_SHAPES if any(shape.split == split for shape in shapes)),
            geometry="points",
            num_points=num_points,
            part_names=PART_NAMES,
            licence=SHAPENET_LICENCE,
            content=" ".join(file.content for file in found),
        )
        return cls(files.url, listing)

    def load(self, shape: ShapeReference) -> Shape:
        """One row of one file. ShapeError where a point is of a part that another category has."""
        path, _, row = shape.place.rpartition("#")
        where = f"{self._files.where(path)}, row {row}"
        points, parts = self._rows.row(path, int(row), ("data", "pid"))
        return Shape(PointCloud(as_points(points, where), part_labels=checked_parts(parts, shape.label, where)))
