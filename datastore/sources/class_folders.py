"""Trees of one file a shape, whose folders name class and split: what a path says, whatever the files hold."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Final

from datastore.sources.files import File

SPLIT_ORDER: Final = ("train", "val", "test")
_SPLIT_OF_FOLDER: Final = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}


def classes_and_splits(places: Sequence[str]) -> list[tuple[str, str]]:
    """Both for each file, from the folders above it: a split is known by its name, and the class is the first of the others.

    Without a class it is "", and without a split it is for training. A class may be named like a split (trains are
    vehicles too): where all files have a split's name at one level, that level is the split, of several the lowest.
    """
    folders = [PurePosixPath(place).parts[:-1] for place in places]
    shallowest = min(map(len, folders), default=0)
    levels = [
        level for level in range(shallowest) if all(above[level].lower() in _SPLIT_OF_FOLDER for above in folders)
    ]
    return [_class_and_split(above, levels[-1] if levels else None) for above in folders]


def _class_and_split(folders: Sequence[str], level: int | None) -> tuple[str, str]:
    if level is None:
        level = next((place for place, name in enumerate(folders) if name.lower() in _SPLIT_OF_FOLDER), None)
    if level is None:
        return (folders[0] if folders else ""), "train"
    others = [*folders[:level], *folders[level + 1 :]]
    return (others[0] if others else ""), _SPLIT_OF_FOLDER[folders[level].lower()]


def ids_of(places: Sequence[str]) -> list[str]:
    """The paths without their suffixes, but for those that would then be the same."""
    bare = [str(PurePosixPath(place).with_suffix("")) for place in places]
    times = Counter(bare)
    return [name if times[name] == 1 else place for name, place in zip(bare, places, strict=True)]


def sizes_of(listed: Sequence[File]) -> str:
    """Changes when the size of one of the files does."""
    return hashlib.sha256(" ".join(str(file.size) for file in listed).encode()).hexdigest()
