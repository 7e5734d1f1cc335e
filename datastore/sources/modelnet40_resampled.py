"""ModelNet40 as PointNet++'s authors sampled it anew, with normals: 10,000 points a shape in text files.

Their loader leaves pickles behind, of the first points in farthest-point order. Those are read where there is nothing
else or they are asked for, and only with --allow-pickle (`restricted_pickle.py` says what is read of them then).
"""

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Self

import numpy as np

from datastore.errors import AskedWrongly, SourceError
from datastore.shape import PointCloud, Shape
from datastore.sources import Listing, ReadingOptions, ShapeError, ShapeReference, require_count
from datastore.sources.files import SourceFiles
from datastore.sources.modelnet40_hdf5 import MODELNET_LICENCE
from datastore.sources.restricted_pickle import PickledArray, load_pickle
from datastore.sources.shape_file import as_normals, as_points, read_numbers

_NUM_POINTS: Final = 10_000
_NUM_COLUMNS: Final = 6  # x, y, z and the normal
_SPLITS: Final = ("train", "test")
_CACHE: Final = re.compile(
    r"(?P<name>(?P<subset>modelnet(?:10|40))_(?P<split>train|test)_(?P<kind>\d+pts(?:_fps)?))\.dat"
)


@dataclass(frozen=True)
class _Subset:
    name: str
    num_classes: int
    num_shapes: dict[str, int]

    def list_file(self, what: str) -> str:
        return f"{self.name}_{what}.txt"


_SUBSETS: Final = (
    _Subset("modelnet40", 40, {"train": 9_843, "test": 2_468}),
    _Subset("modelnet10", 10, {"train": 3_991, "test": 908}),
)


class ModelNet40Resampled:
    """`modelnet40_normal_resampled`: `<class>/<class>_<number>.txt`, listed by `modelnet40_{shape_names,train,test}.txt`."""

    FORMAT: ClassVar[str] = "modelnet40_resampled"
    LOOKS_LIKE: ClassVar[str] = (
        "modelnet40_normal_resampled: class/class_0001.txt and modelnet40_{shape_names,train,test}.txt; "
        "--variant modelnet10, or one of its .dat caches with --allow-pickle"
    )

    def __init__(self, url: str, listing: Listing) -> None:
        self.url = url
        self.listing = listing
        self._files = SourceFiles(url)
        self._caches: dict[str, list[PickledArray]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # what was read of a cache stays here: another process reads it for itself
        return type(self), (self.url, self.listing)

    @classmethod
    def recognises(cls, files: SourceFiles) -> bool:
        """Whether one of its lists or caches is there."""
        lists = {subset.list_file(what) for subset in _SUBSETS for what in ("shape_names", *_SPLITS)}
        return any(name in lists or _CACHE.fullmatch(name) for name in files.entries())

    @classmethod
    def open(cls, files: SourceFiles, options: ReadingOptions) -> Self:
        """The data set in the order of its lists, training shapes first."""
        variant = _chosen_variant(files, options)
        subset = next(subset for subset in _SUBSETS if variant.startswith(subset.name))
        names = subset.list_file("shape_names")
        if not files.exists(names):
            raise SourceError(
                f"{files.where(names)} is missing: it says what the labels mean. Take it from modelnet40_normal_resampled.zip."
            )
        class_names = tuple(files.lines(names))
        require_count(f"classes in {files.where(names)}", len(class_names), subset.num_classes, options)
        if variant == subset.name:
            return cls(files.url, _listed(files, subset, class_names, options))
        return cls(files.url, _listed_cache(files, subset, variant, class_names, options))

    def load(self, shape: ShapeReference) -> Shape:
        """One shape's points and normals."""
        path, is_row, row = shape.place.partition("#")
        where = f"{self._files.where(path)}, row {row}" if is_row else self._files.where(path)
        values = self._cached(path, int(row)) if is_row else read_numbers(self._files, path, ",")
        num_points = self.listing.num_points
        if values.shape != (num_points, _NUM_COLUMNS):
            raise ShapeError(
                f"{where} has {values.shape[0]:,} lines of {values.shape[1]} numbers, and this data set has "
                f"{num_points:,} of {_NUM_COLUMNS}; fetch it again"
            )
        return Shape(PointCloud(as_points(values[:, :3], where), normals=as_normals(values[:, 3:])))

    def _cached(self, path: str, row: int) -> np.ndarray:
        if path not in self._caches:
            self._caches[path] = _read_cache(self._files, path)[0]
        with self._files.open(path) as file:
            return self._caches[path][row].read(file)


def _chosen_variant(files: SourceFiles, options: ReadingOptions) -> str:
    """The subset, or the cache, that was asked for; else the largest subset whose clouds are there, else the cache."""
    there = files.entries()
    subsets = [
        subset.name for subset in _SUBSETS if subset.list_file("train") in there or subset.list_file("test") in there
    ]
    caches = sorted({f"{match['subset']}_{match['kind']}" for match in map(_CACHE.fullmatch, there) if match})
    if options.variant is not None:
        if options.variant not in subsets + caches:
            raise AskedWrongly(
                f"{files.url} has no variant {options.variant!r}; it has {', '.join(subsets + caches) or 'none'}."
            )
        return options.variant
    names = _SUBSETS[0].list_file("shape_names")
    is_tree = names in there and not set(there).isdisjoint(files.lines(names))
    if subsets and (is_tree or not caches):
        return subsets[0]
    if len(caches) > 1:
        raise AskedWrongly(f"{files.url} has several caches: say which with --variant {' or '.join(caches)}.")
    if caches:
        return caches[0]
    expected = _SUBSETS[0].list_file("train")
    raise SourceError(
        f"{files.where(expected)} is missing: it lists the training shapes. Take it from modelnet40_normal_resampled.zip."
    )


def _listed(files: SourceFiles, subset: _Subset, class_names: tuple[str, ...], options: ReadingOptions) -> Listing:
    """What the lists name, checked against the tree."""
    sizes = {file.path: file.size for file in files.walk([".txt"])}
    shapes = []
    for split in _SPLITS:
        list_file = subset.list_file(split)
        if not files.exists(list_file):
            raise SourceError(
                f"{files.where(list_file)} is missing: it lists the {split} shapes. Take it from modelnet40_normal_resampled.zip."
            )
        labels = _labels_of_list(files, list_file, class_names)
        require_count(f"shapes in {files.where(list_file)}", len(labels), subset.num_shapes[split], options)
        of_split = [ShapeReference(name, label, split, f"{class_names[label]}/{name}.txt") for name, label in labels]
        absent = [shape.place for shape in of_split if shape.place not in sizes]
        if absent and not options.partial:
            raise SourceError(
                f"{files.where(absent[0])} is missing, and {list_file} lists it{_and_more(len(absent) - 1)}. Fetch what is missing, "
                f"or say --partial to take what is there."
            )
        shapes += [shape for shape in of_split if shape.place in sizes]
    return Listing(
        shapes=shapes,
        class_names=class_names,
        splits=_SPLITS,
        geometry="points",
        num_points=_NUM_POINTS,
        with_normals=True,
        licence=MODELNET_LICENCE,
        content=" ".join(str(sizes[shape.place]) for shape in shapes),
    )


def _labels_of_list(files: SourceFiles, list_file: str, class_names: tuple[str, ...]) -> list[tuple[str, int]]:
    """Each name of a list with its label: classes contain underscores, so the class is all before the last one."""
    label_of = {name: label for label, name in enumerate(class_names)}
    labels = []
    for number, name in enumerate(files.lines(list_file), start=1):
        class_name = name.rpartition("_")[0]
        if class_name not in label_of:
            raise SourceError(
                f"{files.where(list_file)}, line {number}: {name!r} is of class {class_name!r}, which is none of the "
                f"{len(class_names)}. Take the lists from one archive."
            )
        labels.append((name, label_of[class_name]))
    return labels


def _listed_cache(
    files: SourceFiles, subset: _Subset, variant: str, class_names: tuple[str, ...], options: ReadingOptions
) -> Listing:
    """What a pair of caches holds. They were written in the order of the lists: where those are there, names come from them."""
    kind = variant.removeprefix(f"{subset.name}_")
    shapes: list[ShapeReference] = []
    clouds: list[PickledArray] = []
    content = []
    for split in _SPLITS:
        path = f"{subset.name}_{split}_{kind}.dat"
        if not files.exists(path):
            if options.partial:
                continue
            raise SourceError(
                f"{files.where(path)} is missing, and its counterpart is there. Fetch it, or say --partial to take what is there."
            )
        if not options.allow_pickle:
            raise SourceError(
                f"{files.where(path)} is a pickle, and a pickle can be a program. Say --allow-pickle to read it: only numpy "
                f"arrays, numbers, strings and containers are taken from it, and nothing that it names is run."
            )
        of_split, labels = _read_cache(files, path)
        require_count(f"shapes in {files.where(path)}", len(labels), subset.num_shapes[split], options)
        if labels and not 0 <= min(labels) <= max(labels) < len(class_names):
            raise SourceError(
                f"{files.where(path)}: labels reach from {min(labels)} to {max(labels)}, and there are {len(class_names)} classes."
            )
        names = _names_of_cache(files, subset.list_file(split), path, labels, class_names)
        shapes += [
            ShapeReference(name, label, split, f"{path}#{row}")
            for row, (name, label) in enumerate(zip(names, labels, strict=True))
        ]
        clouds += of_split
        content.append(f"{path}:{files.size(path)}")
    for shape, cloud in zip(shapes, clouds, strict=True):
        if (
            cloud.shape != clouds[0].shape
            or len(cloud.shape) != 2
            or cloud.shape[1] != _NUM_COLUMNS
            or cloud.dtype.kind != "f"
        ):
            raise SourceError(
                f"{files.where(shape.place)} is {cloud.dtype} {cloud.shape}; every cloud of a cache is float32 (n, {_NUM_COLUMNS}) "
                f"with one n. Let its loader write it again."
            )
    return Listing(
        shapes=shapes,
        class_names=class_names,
        splits=tuple(split for split in _SPLITS if any(shape.split == split for shape in shapes)),
        geometry="points",
        num_points=clouds[0].shape[0] if clouds else None,
        with_normals=True,
        licence=MODELNET_LICENCE,
        content=" ".join(content),
    )


def _read_cache(files: SourceFiles, path: str) -> tuple[list[PickledArray], list[int]]:
    """Its clouds, still in the file, and its labels."""
    where = files.where(path)
    with files.open(path) as file:
        found = load_pickle(file, where)
        is_pair = isinstance(found, list | tuple) and len(found) == 2 and all(isinstance(part, list) for part in found)
        if not is_pair or len(found[0]) != len(found[1]):
            raise SourceError(
                f"{where} is no pair of lists, clouds and labels, of one length. Let its loader write it again."
            )
        clouds, labels = found
        if not all(isinstance(array, PickledArray) for array in clouds + labels):
            raise SourceError(f"{where} holds other things than arrays. Let its loader write it again.")
        if not all(array.shape in ((), (1,)) and array.dtype.kind in "iu" for array in labels):
            raise SourceError(f"{where}: labels are arrays of one integer each. Let its loader write it again.")
        return clouds, [int(array.read(file).reshape(())) for array in labels]


def _names_of_cache(
    files: SourceFiles, list_file: str, path: str, labels: list[int], class_names: tuple[str, ...]
) -> list[str]:
    if not files.exists(list_file):
        return [f"{path.removesuffix('.dat')}/{row}" for row in range(len(labels))]
    listed = _labels_of_list(files, list_file, class_names)
    if [label for _, label in listed] != labels:
        raise SourceError(
            f"{files.where(path)} has {len(labels):,} shapes, and their labels are not those of the {len(listed):,} that {list_file} "
            f"lists in this order. Take both from one place, or remove the list: then shapes are named by file and row."
        )
    return [name for name, _ in listed]


def _and_more(count: int) -> str:
    return f", and {count:,} more" if count else ""
