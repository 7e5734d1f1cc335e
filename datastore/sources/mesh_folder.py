"""A tree of mesh files, one a shape, whose folders name class and split. ModelNet's OFF files are such a tree."""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import ClassVar, Final, Self

from datastore.errors import AskedWrongly, SourceError
from datastore.shape import Shape
from datastore.sources import Axis, Listing, ReadingOptions, ShapeReference, require_count
from datastore.sources.class_folders import SPLIT_ORDER, classes_and_splits, ids_of, sizes_of
from datastore.sources.files import SourceFiles
from datastore.sources.mesh_files import COLOURED_SUFFIXES, MESH_SUFFIXES, read_mesh

_LEVELS_LOOKED_AT: Final = 6
_FOLDERS_LOOKED_AT: Final = 32  # of each level

_MODELNET10: Final = (
    "bathtub", "bed", "chair", "desk", "dresser", "monitor", "night_stand", "sofa", "table", "toilet",
)  # fmt: skip
_MODELNET40: Final = (
    "airplane", "bathtub", "bed", "bench", "bookshelf", "bottle", "bowl", "car", "chair", "cone", "cup", "curtain",
    "desk", "door", "dresser", "flower_pot", "glass_box", "guitar", "keyboard", "lamp", "laptop", "mantel", "monitor",
    "night_stand", "person", "piano", "plant", "radio", "range_hood", "sink", "sofa", "stairs", "stool", "table",
    "tent", "toilet", "tv_stand", "vase", "wardrobe", "xbox",
)  # fmt: skip
_MODELNETS: Final = {"modelnet10": (_MODELNET10, 3991, 908), "modelnet40": (_MODELNET40, 9843, 2468)}
"""Class names, and how many shapes are for training and for testing."""

_MODELNET_PLACE: Final = re.compile(r"(?:.*/)?(?P<name>[^/]+)/(?:train|test)/(?P=name)_\d{4}\.off", re.IGNORECASE)


class MeshFolder:
    """`class/split/name.off` and its kin: `class/name.off`, `split/class/name.off`, and bare files without a class."""

    FORMAT: ClassVar[str] = "mesh_folder"
    LOOKS_LIKE: ClassVar[str] = (
        f"a folder tree class/split/name, split/class/name, class/name or name with files {' '.join(MESH_SUFFIXES)}"
    )

    def __init__(self, url: str, listing: Listing) -> None:
        self.url = url
        self.listing = listing
        self._files = SourceFiles(url)

    @classmethod
    def recognises(cls, files: SourceFiles) -> bool:
        """Whether there is a mesh file in one of the first folders of a level."""
        level = [""]
        for _ in range(_LEVELS_LOOKED_AT):
            below = []
            for folder in level[:_FOLDERS_LOOKED_AT]:
                names = files.entries(folder)
                if any(name.lower().endswith(MESH_SUFFIXES) for name in names):
                    return True
                # a file's suffix is no proof: folders have points in their names too
                below += [f"{folder}/{name}".lstrip("/") for name in names[:_FOLDERS_LOOKED_AT]]
            level = below
        return False

    @classmethod
    def open(cls, files: SourceFiles, options: ReadingOptions) -> Self:
        """The folder, listed in the order of its sorted paths."""
        if options.variant not in (None, *_MODELNETS):
            raise AskedWrongly(f"--variant of a mesh folder is {' or '.join(_MODELNETS)}, not {options.variant!r}.")
        listed = files.walk(MESH_SUFFIXES)
        if not listed:
            raise SourceError(f"{files.url}: {files.describe()} No file below it ends in {' '.join(MESH_SUFFIXES)}.")
        places = [file.path for file in listed]
        variant = options.variant or _modelnet_of(places)
        # ModelNet's archives unpack into folders of their names, which are no classes
        found = classes_and_splits(places if variant is None else ["/".join(place.split("/")[-3:]) for place in places])
        class_of, split_of = [class_name for class_name, _ in found], [split for _, split in found]
        if variant is None:
            class_names = tuple(sorted(set(class_of) - {""}))
        else:
            class_names, num_train, num_test = _MODELNETS[variant]
            if strange := sorted(set(class_of) - set(class_names)):
                raise SourceError(f"{files.url}: {variant} has no class {', '.join(strange[:6])}")
            for split, promised in (("train", num_train), ("test", num_test)):
                require_count(f"{files.url}: {split} shapes of {variant}", split_of.count(split), promised, options)
        label_of = {"": -1} | {name: label for label, name in enumerate(class_names)}
        up_axis: Axis = "+Y" if variant is None else "+Z"
        listing = Listing(
            shapes=[
                ShapeReference(shape_id, label_of[class_name], split, place)
                for shape_id, class_name, split, place in zip(ids_of(places), class_of, split_of, places, strict=True)
            ],
            class_names=class_names,
            splits=tuple(name for name in SPLIT_ORDER if name in split_of),
            coloured=any(PurePosixPath(place).suffix.lower() in COLOURED_SUFFIXES for place in places),
            up_axis=up_axis,
            content=sizes_of(listed),
        )
        return cls(files.url, listing)

    def load(self, shape: ShapeReference) -> Shape:
        """One file as one mesh: all parts of its scene, each where the scene puts it."""
        return Shape(read_mesh(self._files, shape.place))


def _modelnet_of(places: Sequence[str]) -> str | None:
    """Which ModelNet the files are of, or a part of; None where one of them is not named as ModelNet's are."""
    matches = [_MODELNET_PLACE.fullmatch(place) for place in places]
    names = {match["name"] for match in matches if match is not None}
    if not all(matches):
        return None
    return next((variant for variant, (known, _, _) in _MODELNETS.items() if names <= set(known)), None)
