"""ShapeNetPart as text: points with normals and parts, some thousand a shape, and the split lists as JSON."""

import json
from typing import ClassVar, Final, Self

from datastore.errors import SourceError
from datastore.shape import PointCloud, Shape
from datastore.sources import Listing, ReadingOptions, ShapeError, ShapeReference, require_count
from datastore.sources.files import SourceFiles
from datastore.sources.shape_file import as_normals, as_points, read_numbers
from datastore.sources.shapenet_names import (
    NUM_SHAPENETPART_SHAPES,
    PART_CATEGORIES,
    PART_NAMES,
    SHAPENET_LICENCE,
    checked_parts,
)

_CATEGORIES: Final = "synsetoffset2category.txt"
_LISTS: Final = "train_test_split"
_NUM_COLUMNS: Final = 7  # x, y, z, the normal, the part
_ARCHIVE: Final = "shapenetcore_partanno_segmentation_benchmark_v0_normal.zip"


class ShapeNetPartTxt:
    """`<synset>/<id>.txt`, named by `train_test_split/shuffled_{train,val,test}_file_list.json`."""

    FORMAT: ClassVar[str] = "shapenetpart_txt"
    LOOKS_LIKE: ClassVar[str] = (
        f"shapenetcore_partanno_segmentation_benchmark_v0_normal: {_CATEGORIES}, {_LISTS}, <synset>/<id>.txt"
    )

    def __init__(self, url: str, listing: Listing) -> None:
        self.url = url
        self.listing = listing
        self._files = SourceFiles(url)

    @classmethod
    def recognises(cls, files: SourceFiles) -> bool:
        """Whether the file that names its categories is there."""
        return _CATEGORIES in files.entries()

    @classmethod
    def open(cls, files: SourceFiles, options: ReadingOptions) -> Self:
        """The data set in the order of its lists: training shapes, then those for validation and test."""
        label_of = _labels(files, options)
        sizes = {file.path: file.size for file in files.walk([".txt"])}
        shapes: list[ShapeReference] = []
        for split, promised in NUM_SHAPENETPART_SHAPES.items():
            path = f"{_LISTS}/shuffled_{split}_file_list.json"
            listed = _read_list(files, path, label_of)
            require_count(f"shapes in {files.where(path)}", len(listed), promised, options)
            of_split = [ShapeReference(name, label_of[name.partition("/")[0]], split, f"{name}.txt") for name in listed]
            absent = [shape.place for shape in of_split if shape.place not in sizes]
            if absent and not options.partial:
                raise SourceError(
                    f"{files.where(absent[0])} is missing, and {path} lists it; {len(absent):,} such files. Fetch them, or say "
                    f"--partial to take what is there."
                )
            shapes += [shape for shape in of_split if shape.place in sizes]
        listing = Listing(
            shapes=shapes,
            class_names=PART_CATEGORIES,
            splits=tuple(NUM_SHAPENETPART_SHAPES),
            geometry="points",
            part_names=PART_NAMES,
            with_normals=True,
            licence=SHAPENET_LICENCE,
            content=" ".join(str(sizes[shape.place]) for shape in shapes),
        )
        return cls(files.url, listing)

    def load(self, shape: ShapeReference) -> Shape:
        """One file. ShapeError where a point is of a part that another category has."""
        files = self._files
        where = files.where(shape.place)
        values = read_numbers(files, shape.place)
        if values.shape[1] != _NUM_COLUMNS:
            raise ShapeError(
                f"{where} has {values.shape[1]} numbers a line, and {_NUM_COLUMNS} are needed: x y z, normal, part"
            )
        return Shape(
            PointCloud(
                as_points(values[:, :3], where),
                normals=as_normals(values[:, 3:6]),
                part_labels=checked_parts(values[:, 6], shape.label, where),
            )
        )


def _labels(files: SourceFiles, options: ReadingOptions) -> dict[str, int]:
    """Which synset is which category. Categories are in the order of their file, which is that of the parts' numbers."""
    where = files.where(_CATEGORIES)
    pairs = [line.split() for line in files.lines(_CATEGORIES)]
    if odd := [pair for pair in pairs if len(pair) != 2 or pair[0] not in PART_CATEGORIES]:
        raise SourceError(
            f"{where}: {' '.join(odd[0])!r} is not one of the 16 categories and its synset. Take it from {_ARCHIVE}."
        )
    found = [category for category, _ in pairs]
    require_count(f"categories in {where}", len(found), len(PART_CATEGORIES), options)
    if found != sorted(set(found)):
        raise SourceError(f"{where}: categories are out of order, or twice. Take it from {_ARCHIVE}.")
    return {synset: PART_CATEGORIES.index(category) for category, synset in pairs}


def _read_list(files: SourceFiles, path: str, label_of: dict[str, int]) -> list[str]:
    """The names `<synset>/<id>` of one split, whose list has them below `shape_data`."""
    where = files.where(path)
    if not files.exists(path):
        raise SourceError(f"{where} is missing: it says which shapes are in the split. Take it from {_ARCHIVE}.")
    try:
        items = json.loads(files.text(path))
    except ValueError as error:
        raise SourceError(f"{where} is no JSON, or only a part of it ({error}). Fetch it again.") from error
    if not isinstance(items, list):
        raise SourceError(f"{where} is no list of names. Fetch it again.")
    for item in items:
        folders = item.split("/") if isinstance(item, str) else []
        if len(folders) != 3 or folders[0] != "shape_data" or folders[1] not in label_of or not folders[2]:
            raise SourceError(
                f"{where}: {item!r} is no shape_data/<synset>/<id> with a synset of {_CATEGORIES}. Take both from {_ARCHIVE}."
            )
    return [item.removeprefix("shape_data/") for item in items]
