"""Trees of one file a shape, whose folders name class and split: what a path says, whatever the files hold."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Final

from datastore.sources.files import File

SPLIT_ORDER: Final = ("train", "val", "test")
_SPLIT_OF_FOLDER: Final = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}


def class_and_split(place: str) -> tuple[str, str]:
    """Both from the folders above a file: a split is known by its name, and the class is the first of the others.

    Without a class it is "", and without a split it is for training.
    """
    folders = PurePosixPath(place).parts[:-1]
    splits = [_SPLIT_OF_FOLDER[name.lower()] for name in folders if name.lower() in _SPLIT_OF_FOLDER]
    classes = [name for name in folders if name.lower() not in _SPLIT_OF_FOLDER]
    return (classes[0] if classes else ""), (splits[0] if splits else "train")


def ids_of(places: Sequence[str]) -> list[str]:
    """The paths without their suffixes, but for those that would then be the same."""
    bare = [str(PurePosixPath(place).with_suffix("")) for place in places]
    times = Counter(bare)
    return [name if times[name] == 1 else place for name, place in zip(bare, places, strict=True)]


def sizes_of(listed: Sequence[File]) -> str:
    """Changes when the size of one of the files does."""
    return hashlib.sha256(" ".join(str(file.size) for file in listed).encode()).hexdigest()
