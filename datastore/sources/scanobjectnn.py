"""ScanObjectNN: scans of real objects, with their background or cut out, as they are or perturbed; HDF5, or raw.

Every point says whether it belongs to the object: in HDF5 by the mask, whose -1 is background, and in raw files by its
semantic label, where the object is what most points are, floor and walls aside. Both become part labels.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import ClassVar, Final, Self

import numpy as np
from jaxtyping import Int16

from datastore.errors import AskedWrongly, SourceError
from datastore.shape import PointCloud, Shape
from datastore.sources import Axis, Listing, ReadingOptions, ShapeError, ShapeReference, require_count
from datastore.sources.files import SourceFiles
from datastore.sources.hdf5 import RowReader, common_num_points, look_at_clouds
from datastore.sources.shape_file import as_colours, as_normals, as_points, read_shape_file

CLASS_NAMES: Final = (
    "bag", "bin", "box", "cabinet", "chair", "desk", "display", "door", "shelf", "table", "bed", "pillow", "sink",
    "sofa", "toilet",
)  # fmt: skip
PART_NAMES: Final = ("background", "object")

_UP: Final[Axis] = "+Y"
_LICENCE: Final = "MIT; the scans are of SceneNN and ScanNet"
_NUM_POINTS: Final = 2048
_SPLITS: Final = ("train", "test")

_SPLIT_FOLDER: Final = re.compile(r"(main_split|split[1-4])(_nobg)?")
_DATA_FILE: Final = re.compile(r"(?P<split>training|test)_objectdataset(?P<kind>.*)\.h5")
_RENAMED: Final = {"train": "train.h5", "test": "test.h5"}  # as CrossPoint's authors hand them out
_RENAMED_KIND: Final = "renamed"
_FOLDERS_ABOVE: Final = ("h5_files", "")

_PLAIN: Final = {"train": 2_309, "test": 581}
_PERTURBED: Final = {"train": 11_416, "test": 2_882}
_NUM_SHAPES: Final = {"": _PLAIN, "_augmentedrot_scale75": _PERTURBED}  # of the main split; what is known for certain
_PAPER_NAMES: Final = {
    "main_split": "OBJ_BG",
    "main_split_nobg": "OBJ_ONLY",
    "main_split_augmented25_norot": "PB_T25",
    "main_split_augmented25rot": "PB_T25_R",
    "main_split_augmentedrot": "PB_T50_R",
    "main_split_augmentedrot_scale75": "PB_T50_RS",
}

_RAW_LIST: Final = "split_new.txt"
_RAW_FOLDER: Final = "object_dataset"
_NUM_RAW: Final = 2_902
_RAW_COLUMNS: Final = 11  # x y z, normal, r g b, instance, semantic label
_NO_OBJECT: Final = (0, 1, 2)  # semantic labels: none, wall, floor


@dataclass(frozen=True)
class _Variant:
    """One of the data sets that may lie side by side."""

    name: str
    folder: str  # below the root
    kind: str  # what follows `objectdataset` in the names of its files

    @property
    def is_raw(self) -> bool:
        return self.kind == "raw"

    @property
    def paper_name(self) -> str:
        # a folder of another name than the authors' is taken for the main split
        return _PAPER_NAMES.get(self.name) or _PAPER_NAMES.get(f"main_split_{self.name}", "")

    def data_file(self, split: str) -> str:
        if self.kind == _RENAMED_KIND:
            return _below(self.folder, _RENAMED[split])
        return _below(self.folder, f"{'training' if split == 'train' else split}_objectdataset{self.kind}.h5")


class ScanObjectNN:
    """One variant: `<split folder>/{training,test}_objectdataset<kind>.h5`, `{train,test}.h5`, or a tree of .bin files."""

    FORMAT: ClassVar[str] = "scanobjectnn"
    LOOKS_LIKE: ClassVar[str] = (
        "h5_files, main_split or main_split_nobg with training_objectdataset*.h5 (or train.h5, test.h5), or "
        f"object_dataset with {_RAW_LIST}; --variant where several lie together, as PB_T50_RS"
    )

    def __init__(self, url: str, listing: Listing) -> None:
        self.url = url
        self.listing = listing
        self._files = SourceFiles(url)
        self._rows = RowReader(self._files)

    @classmethod
    def recognises(cls, files: SourceFiles) -> bool:
        """Whether one of its variants is there."""
        return next(_variants(files), None) is not None

    @classmethod
    def open(cls, files: SourceFiles, options: ReadingOptions) -> Self:
        """The variant asked for, or the only one, in the order of its files: training shapes first."""
        variant = _chosen(files, options)
        listing = _listed_raw(files, variant, options) if variant.is_raw else _listed(files, variant, options)
        return cls(files.url, listing)

    def load(self, shape: ShapeReference) -> Shape:
        """One row of a file, or one raw file."""
        path, is_row, row = shape.place.partition("#")
        if not is_row:
            return Shape(_raw_cloud(self._files, path))
        names = ("data", "mask") if self.listing.part_names else ("data",)
        points, *masks = self._rows.row(path, int(row), names)
        points = as_points(points, f"{self._files.where(path)}, row {row}")
        return Shape(PointCloud(points, part_labels=(masks[0] != -1).astype(np.int16) if masks else None))


def _variants(files: SourceFiles) -> Iterator[_Variant]:
    """Every variant at the root, in a folder of a split below it, or in `h5_files`; and the raw objects."""
    root_name = PurePosixPath(files.url).name
    names = files.entries()
    yield from _variants_in("", root_name if _SPLIT_FOLDER.fullmatch(root_name) else "", names)
    for above in _FOLDERS_ABOVE:
        for name in files.entries(above) if above in ("", *names) else ():
            if _SPLIT_FOLDER.fullmatch(name):
                folder = _below(above, name)
                yield from _variants_in(folder, name, files.entries(folder))
    if _RAW_FOLDER in names and _RAW_LIST in files.entries(_RAW_FOLDER):
        yield _Variant(_RAW_FOLDER, _RAW_FOLDER, "raw")


def _variants_in(folder: str, prefix: str, names: list[str]) -> Iterator[_Variant]:
    kinds = sorted({match["kind"] for match in map(_DATA_FILE.fullmatch, names) if match})
    for kind in kinds:
        yield _Variant((prefix + kind).strip("_") or "plain", folder, kind)
    if set(_RENAMED.values()) <= set(names):
        yield _Variant(f"{prefix}_{_RENAMED_KIND}".strip("_"), folder, _RENAMED_KIND)
    if _RAW_LIST in names:
        yield _Variant(_RAW_FOLDER, folder, "raw")


def _chosen(files: SourceFiles, options: ReadingOptions) -> _Variant:
    found = list(_variants(files))
    if not found:
        raise SourceError(
            f"{files.url} has no training_objectdataset*.h5, no train.h5 and test.h5, and no {_RAW_LIST}, here or in main_split."
        )
    wanted = options.variant
    named = [f"{variant.name} ({variant.paper_name})" if variant.paper_name else variant.name for variant in found]
    if wanted is None:
        if len(found) > 1:
            raise AskedWrongly(
                f"{files.url} holds {len(found)} variants of ScanObjectNN: {', '.join(named)}. Say which with --variant."
            )
        return found[0]
    for variant in found:
        if wanted.lower() in (variant.name.lower(), variant.paper_name.lower()):
            return variant
    raise AskedWrongly(f"{files.url} has no variant {wanted!r} of ScanObjectNN; it has {', '.join(named)}.")


def _listed(files: SourceFiles, variant: _Variant, options: ReadingOptions) -> Listing:
    """The rows of both files. Their labels are indices into the 15 classes, in the authors' order."""
    found, shapes = [], []
    for split in _SPLITS:
        path = variant.data_file(split)
        if not files.exists(path):
            if options.partial:
                continue
            raise SourceError(
                f"{files.where(path)} is missing: variant {variant.name} has a file for each split. Fetch it, or say --partial to "
                f"take what is there."
            )
        file = look_at_clouds(files, path, num_classes=len(CLASS_NAMES), beside={"mask": ()})
        stem = path.rpartition("/")[2].removesuffix(".h5")
        shapes += [
            ShapeReference(f"{stem}/{row}", int(label), split, f"{path}#{row}") for row, label in enumerate(file.labels)
        ]
        promised = _promised(variant, len(file.labels), split)
        if promised is not None:
            require_count(f"shapes in {files.where(path)}", len(file.labels), promised, options)
        found.append(file)
    if len({"mask" in file.arrays for file in found}) > 1:
        raise SourceError(
            f"{files.url}: one file of variant {variant.name} has a mask, and the other none. Fetch both again."
        )
    num_points = common_num_points(found, files)
    require_count(f"points of a cloud in {files.where(found[0].path)}", num_points, _NUM_POINTS, options)
    return Listing(
        shapes=shapes,
        class_names=CLASS_NAMES,
        splits=tuple(split for split in _SPLITS if any(shape.split == split for shape in shapes)),
        geometry="points",
        num_points=num_points,
        part_names=PART_NAMES if "mask" in found[0].arrays else (),
        up_axis=_UP,
        licence=_LICENCE,
        content=" ".join(file.content for file in found),
    )


def _promised(variant: _Variant, found: int, split: str) -> int | None:
    """How many shapes there must be, where that is known."""
    if variant.kind == _RENAMED_KIND:  # whichever of the two it is a copy of
        return found if found == _PERTURBED[split] else _PLAIN[split]
    if re.match(r"split\d", variant.name):
        return None
    return _NUM_SHAPES.get(variant.kind, {}).get(split)


def _listed_raw(files: SourceFiles, variant: _Variant, options: ReadingOptions) -> Listing:
    """What the list names: `<file>`, the class' number, and `t` where it is for test, with tabs between."""
    list_file = _below(variant.folder, _RAW_LIST)
    sizes = {file.path: file.size for file in files.walk([".bin"], variant.folder)}
    shapes, absent = [], []
    lines = files.lines(list_file)
    for number, line in enumerate(lines, start=1):
        name, *facts = line.split("\t")
        where = f"{files.where(list_file)}, line {number}"
        if not name.endswith(".bin") or not facts or not facts[0].isdecimal() or facts[1:] not in ([], [""], ["t"]):
            raise SourceError(
                f"{where}: {line!r} is not a file's name, a class' number, and t or nothing, with tabs between."
            )
        label = int(facts[0])
        if label >= len(CLASS_NAMES):
            raise SourceError(
                f"{where}: label {label}, and there are {len(CLASS_NAMES)} classes, 0 to {len(CLASS_NAMES) - 1}."
            )
        shape_id = f"{CLASS_NAMES[label]}/{name.removesuffix('.bin')}"
        place = _below(variant.folder, f"{shape_id}.bin")
        if place in sizes:
            shapes.append(ShapeReference(shape_id, label, "test" if facts[1:] == ["t"] else "train", place))
        else:
            absent.append(place)
    require_count(f"shapes in {files.where(list_file)}", len(lines), _NUM_RAW, options)
    if absent and not options.partial:
        raise SourceError(
            f"{files.where(absent[0])} is missing, and {_RAW_LIST} lists it; {len(absent):,} such files. Fetch them, or say --partial "
            f"to take what is there."
        )
    return Listing(
        shapes=shapes,
        class_names=CLASS_NAMES,
        splits=_SPLITS,
        geometry="points",
        part_names=PART_NAMES,
        coloured=True,
        with_normals=True,
        up_axis=_UP,
        licence=_LICENCE,
        content=" ".join(str(sizes[shape.place]) for shape in shapes),
    )


def _raw_cloud(files: SourceFiles, path: str) -> PointCloud:
    """A file's points: their number first, then eleven values each, all as 32-bit floats."""
    content = read_shape_file(files, path)
    where = files.where(path)
    values = np.frombuffer(content[: len(content) // 4 * 4], "<f4")
    count = values[0] if len(values) else np.float32(0)
    expected = 4 * (1 + _RAW_COLUMNS * int(count)) if np.isfinite(count) else 0
    if len(content) != expected or count == 0:
        raise ShapeError(
            f"{where} has {len(content):,} bytes, and its {count:,.0f} points need {expected:,}: it is damaged; fetch it again"
        )
    rows = values[1:].reshape(-1, _RAW_COLUMNS)
    return PointCloud(
        as_points(rows[:, :3], where),
        normals=as_normals(rows[:, 3:6]),
        colours=as_colours(rows[:, 6:9], where),
        part_labels=_object_or_background(rows[:, 10]),
    )


def _object_or_background(semantic_labels: np.ndarray) -> Int16[np.ndarray, " n"]:
    """1 for points of the object, 0 for its background; -1 for all where nothing but floor and walls is labelled."""
    kinds, counts = np.unique(semantic_labels[~np.isin(semantic_labels, _NO_OBJECT)], return_counts=True)
    if len(kinds) == 0:
        return np.full(len(semantic_labels), -1, np.int16)
    is_object: np.ndarray = semantic_labels == kinds[counts.argmax()]
    return is_object.astype(np.int16)


def _below(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
