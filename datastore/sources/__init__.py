"""Where shapes come from: one file a format, all with one face. A new one is a file and a line in `_formats`."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Literal, Protocol, Self, get_args

from botocore.exceptions import BotoCoreError  # type: ignore[import-untyped]

from datastore.errors import AskedWrongly, SourceError
from datastore.shape import Shape
from datastore.sources.files import SourceFiles

Axis = Literal["+X", "-X", "+Y", "-Y", "+Z", "-Z"]
AXES: Final[tuple[Axis, ...]] = get_args(Axis)
_NAMED_LICENCES: Final = 8


@dataclass(frozen=True, slots=True)
class ShapeReference:
    """One shape of a source, by name: light enough to list millions and to hand to another process."""

    id: str  # the source's own name
    label: int  # index into class_names; -1 unlabelled
    split: str
    place: str  # where the source finds it: a path below its root, a row
    licence: str = ""  # of this shape, where the source says; else the listing's


@dataclass(frozen=True)
class SourceImages:
    """The images that a source has of each of its shapes, all of one size."""

    num_views: int
    image_size: int  # they are square
    with_visibility: bool = False  # which points of the cloud each one sees
    with_cameras: bool = False


@dataclass(frozen=True)
class Listing:
    """What a source holds, in its own order. SourceError where it contradicts itself."""

    shapes: Sequence[ShapeReference]
    class_names: tuple[str, ...]
    splits: tuple[str, ...]
    geometry: Literal["mesh", "points"] = "mesh"  # what `load` gives of every shape
    num_points: int | None = None  # of each cloud, where all have the same number
    part_names: tuple[str, ...] = ()
    coloured: bool = False
    with_normals: bool = False  # the clouds have; meshes always do
    images: SourceImages | None = None  # every shape has them, in place of rendered views
    extra_views: SourceImages | None = None  # shapes have up to so many, beside rendered views
    up_axis: Axis = "+Y"
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
            if not shape.id.isascii() and any("\ud800" <= letter <= "\udfff" for letter in shape.id):
                raise SourceError(
                    f"{shape.id!r} is the name of a file in another encoding than UTF-8, and a store keeps text: rename it"
                )
            if not -1 <= shape.label < len(self.class_names):
                raise SourceError(
                    f"{shape.id!r} has label {shape.label}, but there are {len(self.class_names)} classes"
                )
            if shape.split not in self.splits:
                raise SourceError(
                    f"{shape.id!r} is in split {shape.split!r}, which is none of {', '.join(self.splits)}"
                )

    def __getstate__(self) -> dict[str, Any]:
        # worker processes get their shapes one by one; a list of millions would fill each one's memory
        return {**self.__dict__, "shapes": ()}

    @property
    def hash(self) -> str:
        """Tells this list from every other: names, order, labels, splits and what is known of the content."""
        digest = hashlib.sha256(json.dumps([self.class_names, self.part_names, self.splits, self.content]).encode())
        for shape in self.shapes:
            digest.update(json.dumps([shape.id, shape.label, shape.split, shape.place]).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class ReadingOptions:
    """What a person may say about a source, whatever its format."""

    partial: bool = False  # fewer shapes than the format promises are fine
    allow_pickle: bool = False  # read pickles, with an unpickler that knows arrays and lists only
    variant: str | None = None  # which of several data sets that lie in one folder
    up_axis: Axis | None = None  # instead of the format's own


class Source(Protocol):
    """A set of shapes. It is sent to worker processes, so it pickles small and opens files when they are needed."""

    FORMAT: ClassVar[str]  # what --format takes
    LOOKS_LIKE: ClassVar[str]  # for people: what such a source looks like

    url: str
    listing: Listing

    @classmethod
    def recognises(cls, files: SourceFiles) -> bool:
        """Whether what lies at the URL looks like this format; a glance, not a check."""
        ...

    @classmethod
    def open(cls, files: SourceFiles, options: ReadingOptions) -> Self:
        """The source at a URL, listed. SourceError where it is not what its format promises."""
        ...

    def load(self, shape: ShapeReference) -> Shape:
        """One shape. ShapeError where it cannot be read."""
        ...


class ShapeError(SourceError):
    """One shape cannot be used; the message says why, and whoever asked knows which. The others may be fine."""


def open_source(url: str, format_name: str | None = None, options: ReadingOptions | None = None) -> Source:
    """The source at a URL, in the format named, or in the first that recognises it."""
    options = options or ReadingOptions()
    files = SourceFiles(url)
    try:
        source = _chosen_format(files, format_name).open(files, options)
    except SourceError as error:
        # messages of a listing do not know where it came from
        raise error if url in str(error) else SourceError(f"{url}: {error}.") from error
    except PermissionError as error:
        raise SourceError(
            f"{url}: access is refused ({error}). Check the permissions, or the credentials in the environment."
        ) from error
    except BotoCoreError as error:
        raise SourceError(
            f"{url} cannot be reached: {error}. Check the network, the credentials in the environment and "
            f"AWS_ENDPOINT_URL; a public bucket is read with FSSPEC_S3_ANON=true."
        ) from error
    if options.up_axis is not None:
        source.listing = replace(source.listing, up_axis=options.up_axis)
    return source


def _chosen_format(files: SourceFiles, format_name: str | None) -> type[Source]:
    formats = _formats()
    if format_name is not None:
        by_name = {source.FORMAT: source for source in formats}
        if format_name not in by_name:
            raise AskedWrongly(f"There is no format {format_name!r}. Known formats:\n{_table(formats)}")
        return by_name[format_name]
    found = next((source for source in formats if source.recognises(files)), None)
    if found is None:
        raise SourceError(
            f"{files.url}: {files.describe()} Known formats:\n{_table(formats)}\n--format F skips this guess."
        )
    return found


def listed_licence(licences: Iterable[str]) -> str:
    """What to say of a source whose shapes have these licences, which each shape keeps for itself."""
    known = sorted({licence for licence in licences if licence})
    if len(known) > _NAMED_LICENCES:
        return f"{len(known)} licences, one a shape"
    return ", ".join(known) or "unknown"


def require_count(what: str, found: int, promised: int, options: ReadingOptions) -> None:
    """SourceError where a data set of a known size is not whole, unless a part of it was asked for."""
    if found != promised and not options.partial:
        raise SourceError(
            f"{what}: {found:,} found, and the data set has {promised:,}. Fetch what is missing, or say --partial to take what is there"
        )


def _formats() -> tuple[type[Source], ...]:
    """Every format, in the order in which they are tried: those with a telling file first, bare folders last."""
    from datastore.sources.crosspoint_pairs import CrossPointPairs
    from datastore.sources.demo import DemoSource
    from datastore.sources.mesh_bundle import MeshBundle
    from datastore.sources.mesh_folder import MeshFolder
    from datastore.sources.mesh_index import MeshIndex
    from datastore.sources.modelnet40_hdf5 import ModelNet40Hdf5
    from datastore.sources.modelnet40_resampled import ModelNet40Resampled
    from datastore.sources.objaverse import Objaverse
    from datastore.sources.point_folder import PointFolder
    from datastore.sources.pointcmt_views import PointCmtViews
    from datastore.sources.pointmcd_tree import PointMcdTree
    from datastore.sources.scanobjectnn import ScanObjectNN
    from datastore.sources.shapenet55 import ShapeNet55
    from datastore.sources.shapenetpart_hdf5 import ShapeNetPartHdf5
    from datastore.sources.shapenetpart_txt import ShapeNetPartTxt
    from datastore.sources.ulip import Ulip

    return (
        DemoSource,
        ModelNet40Hdf5,
        ShapeNetPartHdf5,
        ShapeNetPartTxt,
        ScanObjectNN,
        CrossPointPairs,
        Ulip,
        ShapeNet55,
        PointMcdTree,
        PointCmtViews,
        ModelNet40Resampled,
        MeshBundle,
        Objaverse,
        MeshIndex,
        PointFolder,
        MeshFolder,
    )


def format_table() -> str:
    """Every format and what it looks like, for people."""
    return _table(_formats())


def _table(formats: Sequence[type[Source]]) -> str:
    width = max(len(source.FORMAT) for source in formats)
    return "\n".join(f"  {source.FORMAT:<{width}}  {source.LOOKS_LIKE}" for source in formats)
