"""Where shapes come from: one file a format, all with one face. A new one is a file and a line in `open_source`."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol, Self

from datastore.errors import AskedWrongly, SourceError
from datastore.mesh import Mesh


@dataclass(frozen=True)
class ShapeReference:
    """One shape of a source, by name: light enough to list millions and to hand to another process."""

    id: str  # the source's own name
    label: int  # index into class_names; -1 unlabelled
    split: str
    place: str  # where the source finds it: a path below its root, a row


@dataclass(frozen=True)
class Listing:
    """What a source holds, in its own order. SourceError where it contradicts itself."""

    shapes: Sequence[ShapeReference]
    class_names: tuple[str, ...]
    splits: tuple[str, ...]
    part_names: tuple[str, ...] = ()
    coloured: bool = False
    units: str = "unknown"
    licence: str = "unknown"
    content: str = (
        ""  # changes when the shapes behind the same names change: sizes or checksums, as far as they are cheap
    )

    def __post_init__(self) -> None:
        if not self.shapes:
            raise SourceError("the source lists no shapes")
        most_common, times = Counter(shape.id for shape in self.shapes).most_common(1)[0]
        if times > 1:
            places = [shape.place for shape in self.shapes if shape.id == most_common]
            raise SourceError(
                f"{times} shapes are named {most_common!r} (at {', '.join(places[:3])}): give each a name of its own"
            )
        for shape in self.shapes:
            if not -1 <= shape.label < len(self.class_names):
                raise SourceError(
                    f"{shape.id!r} has label {shape.label}, but there are {len(self.class_names)} classes"
                )
            if shape.split not in self.splits:
                raise SourceError(
                    f"{shape.id!r} is in split {shape.split!r}, which is none of {', '.join(self.splits)}"
                )

    @property
    def hash(self) -> str:
        """Tells this list from every other: names, order, labels, splits and what is known of the content."""
        digest = hashlib.sha256(json.dumps([self.class_names, self.part_names, self.splits, self.content]).encode())
        for shape in self.shapes:
            digest.update(json.dumps([shape.id, shape.label, shape.split, shape.place]).encode())
        return digest.hexdigest()


class Source(Protocol):
    """A set of shapes. It is sent to worker processes, so it pickles small and opens files when they are needed."""

    FORMAT: ClassVar[str]  # what --format takes
    LOOKS_LIKE: ClassVar[str]  # for people: what such a source looks like

    url: str
    listing: Listing

    @classmethod
    def recognises(cls, url: str) -> bool:
        """Whether what lies at the URL looks like this format; a glance, not a check."""
        ...

    @classmethod
    def open(cls, url: str) -> Self:
        """The source at a URL, listed. SourceError where it is not what its format promises."""
        ...

    def load(self, shape: ShapeReference) -> Mesh:
        """One shape. ShapeError where it cannot be read."""
        ...


class ShapeError(SourceError):
    """One shape cannot be used; the message says why, and whoever asked knows which. The others may be fine."""


def open_source(url: str, format_name: str | None = None) -> Source:
    """The source at a URL, in the format named, or in the first that recognises it."""
    from datastore.sources.demo import DemoSource
    from datastore.sources.mesh_bundle import MeshBundle
    from datastore.sources.mesh_folder import MeshFolder

    # the folder comes last: it takes whatever holds a mesh file somewhere
    formats: tuple[type[Source], ...] = (DemoSource, MeshBundle, MeshFolder)
    if format_name is not None:
        by_name = {source.FORMAT: source for source in formats}
        if format_name not in by_name:
            raise AskedWrongly(f"There is no format {format_name!r}. Known formats:\n{_table(formats)}")
        return by_name[format_name].open(url)
    for source in formats:
        if source.recognises(url):
            return source.open(url)
    raise SourceError(f"{url}: {_what_lies_at(url)} Known formats:\n{_table(formats)}\n--format F skips this guess.")


def local_folder(url: str) -> Path | None:
    """The folder that a URL names; None where it names none on a local disk."""
    if "://" in url and not url.startswith("file://"):
        return None
    path = Path(url.removeprefix("file://"))
    return path if path.is_dir() else None


def require_local_folder(url: str) -> Path:
    """The folder that a URL names. SourceError where it names none on a local disk."""
    folder = local_folder(url)
    if folder is None:
        raise SourceError(f"{url}: {_what_lies_at(url)} This format is a folder on a local disk.")
    return folder


def _what_lies_at(url: str) -> str:
    """A sentence about what is there, for somebody who expected something else."""
    if "://" in url and not url.startswith("file://"):
        return "sources are read from local disk, and this is a remote URL; copy it here or mount it."
    path = Path(url.removeprefix("file://"))
    if not path.exists():
        parent = next(parent for parent in path.absolute().parents if parent.exists())
        return f"nothing is there (the path exists up to {parent})."
    if path.is_file():
        return "this is a file; a source is the folder that holds the shapes."
    names = sorted(entry.name for entry in path.iterdir())
    if not names:
        return "the folder is empty."
    return (
        f"no known format; the folder holds {', '.join(names[:6])}{f' and {len(names) - 6} more' if names[6:] else ''}."
    )


def _table(formats: Sequence[type[Source]]) -> str:
    return "\n".join(f"  {source.FORMAT:<12} {source.LOOKS_LIKE}" for source in formats)
