"""Objaverse 1.0 as its own tool lays it out: a GLB file an object, lists that name them, labels from LVIS, licences."""

import gzip
import hashlib
import json
import zlib
from pathlib import PurePosixPath
from typing import Any, ClassVar, Final, Self

from datastore.errors import SourceError
from datastore.shape import Shape
from datastore.sources import Listing, ReadingOptions, ShapeReference, require_count
from datastore.sources.files import SourceFiles
from datastore.sources.mesh_files import read_mesh

_PATHS: Final = "object-paths.json.gz"
_LABELS: Final = "lvis-annotations.json.gz"
_METADATA: Final = "metadata"
_GLBS: Final = "glbs"
_FETCH: Final = "Fetch it again, for example with the objaverse package"

# as Sketchfab, where the objects are from, shortens the licences it offers
_LICENCES: Final = {
    "by": "CC-BY-4.0",
    "by-sa": "CC-BY-SA-4.0",
    "by-nd": "CC-BY-ND-4.0",
    "by-nc": "CC-BY-NC-4.0",
    "by-nc-sa": "CC-BY-NC-SA-4.0",
    "by-nc-nd": "CC-BY-NC-ND-4.0",
    "cc0": "CC0-1.0",
}


class Objaverse:
    """`glbs/000-000/<uid>.glb`; an object of two LVIS categories counts for the first, by the alphabet."""

    FORMAT: ClassVar[str] = "objaverse"
    LOOKS_LIKE: ClassVar[str] = f"a folder with {_PATHS}, {_GLBS}/000-000/ and on, {_LABELS} and {_METADATA}/*.json.gz"

    def __init__(self, url: str, listing: Listing) -> None:
        self.url = url
        self.listing = listing
        self._files = SourceFiles(url)

    @classmethod
    def recognises(cls, files: SourceFiles) -> bool:
        """Whether its list of paths, or its folder of objects and its labels, are there."""
        names = set(files.entries())
        return _PATHS in names or {_GLBS, _LABELS} <= names

    @classmethod
    def open(cls, files: SourceFiles, options: ReadingOptions) -> Self:
        """All objects in the order of their list; without it, and with --partial, those that are there."""
        sizes = {file.path: file.size for file in files.walk([".glb"], _GLBS)}
        if files.exists(_PATHS):
            places = _read_paths(files)
        elif options.partial:
            places = {PurePosixPath(path).stem: path for path in sizes}
        else:
            raise SourceError(
                f"{files.where(_PATHS)} is missing: it lists the objects, so that missing ones are noticed. {_FETCH}, or "
                f"say --partial to take what is there."
            )
        there = {uid: path for uid, path in places.items() if path in sizes}
        require_count(f"{files.where(_GLBS)}: objects that {_PATHS} lists", len(there), len(places), options)
        categories = _read_labels(files, set(places), options)
        label_of = {uid: label for label, uids in reversed(list(enumerate(categories.values()))) for uid in uids}
        licence_of = _read_licences(files, there)
        listing = Listing(
            shapes=[
                ShapeReference(uid, label_of.get(uid, -1), "train", path, licence_of.get(uid, ""))
                for uid, path in there.items()
            ],
            class_names=tuple(categories),
            splits=("train",),
            coloured=True,
            up_axis="+Y",
            licence="unknown",
            content=hashlib.sha256(" ".join(str(sizes[path]) for path in there.values()).encode()).hexdigest(),
        )
        return cls(files.url, listing)

    def load(self, shape: ShapeReference) -> Shape:
        """One object, in its rest pose."""
        return Shape(read_mesh(self._files, shape.place))


def _read_paths(files: SourceFiles) -> dict[str, str]:
    paths = _read_json(files, _PATHS)
    if not all(isinstance(path, str) and path.endswith(".glb") for path in paths.values()):
        raise SourceError(f"{files.where(_PATHS)} should give a path ending in .glb for each uid. {_FETCH}.")
    return paths


def _read_labels(files: SourceFiles, known: set[str], options: ReadingOptions) -> dict[str, list[str]]:
    """The uids of each category, by the alphabet; empty where there is no such list."""
    if not files.exists(_LABELS):
        return {}
    categories = _read_json(files, _LABELS)
    for category, uids in categories.items():
        if not isinstance(uids, list):
            raise SourceError(f"{files.where(_LABELS)}: category {category!r} has no list of uids. {_FETCH}.")
    labelled = {uid for uids in categories.values() for uid in uids}
    if labelled - known and not options.partial:
        raise SourceError(
            f"{files.where(_LABELS)} labels {len(labelled - known):,} objects that {_PATHS} does not list, "
            f"{min(labelled - known)} for one: the two are of different releases. {_FETCH}, or say --partial."
        )
    return dict(sorted(categories.items()))


def _read_licences(files: SourceFiles, there: dict[str, str]) -> dict[str, str]:
    """The licence of each object whose metadata is there; the file is named as the object's folder is."""
    folders = {PurePosixPath(path).parent.name for path in there.values()}
    licences: dict[str, str] = {}
    for name in files.entries(_METADATA):
        if name.removesuffix(".json.gz") not in folders:
            continue
        # one at a time: together they are gigabytes
        for uid, facts in _read_json(files, f"{_METADATA}/{name}").items():
            if uid in there and isinstance(facts, dict) and facts.get("license"):
                licences[uid] = _LICENCES.get(str(facts["license"]), str(facts["license"]))
    return licences


def _read_json(files: SourceFiles, path: str) -> dict[str, Any]:
    try:
        found = json.loads(gzip.decompress(files.read(path)))
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise SourceError(f"{files.where(path)} is damaged ({error}). {_FETCH}.") from error
    if not isinstance(found, dict):
        raise SourceError(f"{files.where(path)} should be one JSON object. {_FETCH}.")
    return found
