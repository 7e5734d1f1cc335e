"""Where fields lie below a store's URL; creating and opening a store.

A store is a zarr v3 group with sharded arrays, axis 0 of each the rows:

    zarr.json                                attributes: {"viewpoint": StoreAttributes, "viewpoint_fields": [names]}
    <field>/c/<shard>/0/...                  one object a shard
    teachers/<name>@<hash8>/<field>/...      a teacher's word on the views; attributes {"viewpoint_teacher": ...}
    _viewpoint/commits/<scope>/<block>.json  one a finished block; scope is "ingest" or "teachers/<name>@<hash8>"
    _viewpoint/manifests/<number>.json       the blocks of all scopes that are complete; the newest is the store

A block is `block_rows` rows of all fields of a scope, and what one writer finishes at a time. A reader opens one
manifest and sees that one: shards that it does not name do not exist, whatever lies in the folders.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, Final, Literal, TypeVar

import numpy as np
import zarr
from crc32c import crc32c
from jaxtyping import Int64, Integer, UInt8
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.storage import FsspecStore, LocalStore, MemoryStore

from datastore import schema
from datastore.beside import beside_each_other
from datastore.cameras import CameraRig
from datastore.errors import MissingField, StoreError
from datastore.objects import BOOKKEEPING_FOLDER, ObjectFolder
from datastore.weights_file import WeightsFile

INGEST: Final = "ingest"
"""The scope of everything that `viewpoint ingest` writes. The others are teachers: `teachers/<name>@<hash8>`."""

_ATTRIBUTES_KEY: Final = "viewpoint"
_FIELDS_KEY: Final = "viewpoint_fields"
_TEACHER_KEY: Final = "viewpoint_teacher"
_CHECKSUM_KEY: Final = "viewpoint_crc32c"  # of a group's attributes that are Viewpoint's
_SEAL: Final = b'{"crc32c":"%08x",'  # how a document begins that carries the checksum of the rest of it
_READ_ATTEMPTS: Final = 5
_TEACHERS_AT_ONCE: Final = 8
_TEACHERS_FOLDER: Final = "teachers"
_COMMITS_FOLDER: Final = f"{BOOKKEEPING_FOLDER}/commits"
_MANIFESTS_FOLDER: Final = f"{BOOKKEEPING_FOLDER}/manifests"
_FILL_VALUES: Final[Mapping[str, int]] = {"split": schema.QUARANTINED, "label": -1, "part_labels": -1}
Model = TypeVar("Model", bound=BaseModel)
T = TypeVar("T")

_CACHED_SHARD_BYTES: Final = 256 * 2**20
"""At most, so that a shard is written and fetched in one piece: tokens take a hundred times as much as features."""
_ZSTD_LEVEL: Final = 3
_LZ4_LEVEL: Final = 5


ViewsFrom = Literal["rays", "point splats", "source"]
VisibilityFrom = Literal["rays", "hidden-point removal", "source", "nothing"]
PointOrder = Literal["farthest", "source"]


class StoreAttributes(BaseModel, extra="forbid", frozen=True):
    """What is true of the whole store, fixed when it is created."""

    schema_version: int = schema.SCHEMA_VERSION
    num_rows: PositiveInt
    points_per_shape: PositiveInt
    block_rows: PositiveInt
    class_names: tuple[str, ...]
    part_names: tuple[str, ...] = ()
    splits: tuple[str, ...]  # the field `split` indexes into these
    num_views: PositiveInt
    image_size: PositiveInt
    views_from: ViewsFrom
    visibility_from: VisibilityFrom
    rig: CameraRig | None = None  # None: the views are the source's own, and so are their cameras
    depth_near: float | None = None  # the field `depth` is scaled to this range, in ball radii from the camera
    depth_far: float | None = None
    extra_views: PositiveInt | None = None  # at most so many of a shape
    extra_image_size: PositiveInt | None = None
    geometry: Literal["mesh", "points"] = "mesh"  # what the points were sampled from
    point_order: PointOrder = "farthest"
    up_axis: Literal["+Y"] = "+Y"
    source_up_axis: str = "+Y"  # what was up in the source, and was turned to +Y
    normalisation: Literal["unit ball"] = "unit ball"
    units: str = "unknown"  # of the source's coordinates, which `centre` and `scale` lead back to
    source_url: str
    source_format: str
    source_hash: str  # of the list of shapes that the source holds: another list is another store
    licence: str = "unknown"

    @model_validator(mode="after")
    def _is_consistent(self) -> "StoreAttributes":
        if self.block_rows & (self.block_rows - 1):
            raise ValueError(
                f"block_rows must be a power of two, so that shards divide blocks; it is {self.block_rows}"
            )
        if self.rig is not None and (self.rig.num_views, self.rig.image_size) != (self.num_views, self.image_size):
            raise ValueError(
                f"{self.num_views} views of {self.image_size} pixels, but the rig has {self.rig.num_views} of "
                f"{self.rig.image_size}"
            )
        if len(self.splits) >= schema.QUARANTINED:
            raise ValueError(f"{len(self.splits)} splits: at most {schema.QUARANTINED - 1} fit the field")
        return self


class TeacherAttributes(BaseModel, extra="forbid", frozen=True):
    """Who wrote a set of cached fields."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]*$")  # it is a folder's name
    # Hexadecimal, of all that decides what the teacher says: weights, network, input size, normalisation, precision. Its
    # first eight digits tell teachers of one name apart
    weights_hash: str = Field(min_length=8)
    image_size: PositiveInt
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fields: dict[str, tuple[PositiveInt, ...]]  # sizes of one row's axes
    dim: PositiveInt  # width of view_features, or of view_tokens where there are none
    num_tokens: NonNegativeInt = 0  # of a view
    precision: Literal["float32", "bf16"] = "float32"  # that it was run in; what it says is kept in float16 either way
    network: str = ""  # kind and trunk
    training: dict[str, str] = {}  # what made the weights, where they say so: job, config_hash, split, source_hash
    options: str = ""  # of `viewpoint cache`, to write the same again
    weights_files: tuple[WeightsFile, ...] = ()  # that lay on the disk of who wrote them

    def command(self, url: str) -> str:
        """What writes these fields into a store."""
        return f"viewpoint cache {url} --teacher {self.name}" + (f" {self.options}" if self.options else "")

    @property
    def key(self) -> str:
        """`name@hash8`: what tells this teacher from every other in a store."""
        return f"{self.name}@{self.weights_hash[:8]}"

    @model_validator(mode="after")
    def _is_consistent(self) -> "TeacherAttributes":
        if unknown := set(self.fields) - set(schema.TEACHER_FIELDS):
            raise ValueError(f"a teacher does not write {sorted(unknown)}, only {', '.join(schema.TEACHER_FIELDS)}")
        for name, sizes in self.fields.items():
            if len(sizes) != len(schema.FIELDS[name].axes):
                raise ValueError(f"{name} has axes {schema.FIELDS[name].axes}, not {sizes}")
        return self


Runs = tuple[tuple[NonNegativeInt, PositiveInt], ...]
"""Numbers that repeat: (value, how many times), one after the other."""


def as_runs(values: Integer[np.ndarray, " n"]) -> Runs:
    """The values as runs of equal ones."""
    starts = np.flatnonzero(np.diff(values.astype(np.int64), prepend=-1))
    return tuple(zip(values[starts].tolist(), np.diff(starts, append=len(values)).tolist(), strict=True))


def from_runs(runs: Runs) -> UInt8[np.ndarray, " n"]:
    """The values, each by itself."""
    values, counts = np.array(runs, np.int64).reshape(-1, 2).T
    return np.repeat(values.astype(np.uint8), counts)


class Rows:
    """Ascending row numbers, kept as ranges: a corpus of a thousand million rows in a few splits takes no memory."""

    def __init__(self, ranges: Int64[np.ndarray, "k 2"], step: int = 1) -> None:
        self.ranges = ranges
        self._step = step  # only each so-manyth of the ranges' rows
        self._starts = ranges[:, 0]
        self._reached = np.cumsum(ranges[:, 1] - ranges[:, 0])

    @classmethod
    def of(cls, rows: Int64[np.ndarray, " r"]) -> "Rows":
        """These rows, which ascend."""
        first = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
        last = np.append(first[1:], len(rows)) - 1
        return cls(np.stack([rows[first], rows[last] + 1], axis=1) if len(rows) else np.empty((0, 2), np.int64))

    def __len__(self) -> int:
        return -(-int(self._reached[-1]) // self._step) if len(self._reached) else 0

    def __getitem__(self, places: Int64[np.ndarray, " p"]) -> Int64[np.ndarray, " p"]:
        """The rows at these places in the list."""
        places = places * self._step
        found = np.searchsorted(self._reached, places, side="right")
        before = self._reached[found - 1] * (found > 0)
        rows: Int64[np.ndarray, " p"] = self._starts[found] + places - before
        return rows

    def at(self, place: int) -> int:
        """The row at one place."""
        place *= self._step
        found = int(self._reached.searchsorted(place, side="right"))
        return int(self._starts[found]) + place - (int(self._reached[found - 1]) if found else 0)

    def every(self, step: int) -> "Rows":
        """The first of these rows, and each so-manyth after it."""
        return Rows(self.ranges, self._step * step)

    @property
    def digest(self) -> str:
        """Tells these rows from others."""
        return f"{crc32c(self.ranges.astype('<i8').tobytes()):08x}/{self._step}"

    def all(self) -> Int64[np.ndarray, " r"]:
        """Every row, as one array."""
        return self[np.arange(len(self), dtype=np.int64)]


class ShardSums(BaseModel, extra="forbid", frozen=True):
    """Size and checksum of every shard object of one field; size 0 where a shard is not complete."""

    sizes: tuple[NonNegativeInt, ...]
    crc32: tuple[NonNegativeInt, ...]


class FieldStatistics(BaseModel, extra="forbid", frozen=True):
    """What a teacher's values are like, those of rows without a shape left out."""

    total: float
    largest: float
    count: NonNegativeInt  # of values

    @property
    def mean(self) -> float:
        """Of all values; 0 where there is none."""
        return self.total / self.count if self.count else 0.0


class ScopeManifest(BaseModel, extra="forbid", frozen=True):
    """What is complete of one scope."""

    block_ranges: tuple[tuple[int, int], ...] = ()  # first block, and the one after the last
    shards: dict[str, ShardSums] = {}  # by field
    quarantine: dict[str, tuple[int, ...]] = {}  # rows that hold no shape, by reason
    splits: Runs = ()  # of ingest: the field `split` over the complete blocks
    statistics: dict[str, tuple[FieldStatistics, ...]] = {}  # of a teacher: by field, one a complete block

    @property
    def blocks(self) -> list[int]:
        """Numbers of the complete blocks."""
        return [block for first, end in self.block_ranges for block in range(first, end)]


class Manifest(BaseModel, extra="forbid", frozen=True):
    """What is complete of a store at one moment. Number 0 is the store before anything was published."""

    number: NonNegativeInt = 0
    scopes: dict[str, ScopeManifest] = {}

    def scope(self, name: str) -> ScopeManifest:
        """What is complete of a scope, which may be nothing."""
        return self.scopes.get(name, ScopeManifest())

    @property
    def stored_bytes(self) -> int:
        """Size of all shards together."""
        return sum(sum(sums.sizes) for scope in self.scopes.values() for sums in scope.shards.values())


@dataclass(frozen=True)
class StoredField:
    """One array of a store: how its rows look to a reader, and how they lie."""

    field: schema.Field
    path: str  # below the store's URL, and the name that `Store.read` takes
    scope: str
    num_rows: int
    row_shape: tuple[int, ...]  # as a reader receives it
    shard_rows: int
    chunk_rows: int

    @property
    def stored_row_shape(self) -> tuple[int, ...]:
        """Shape of a row as it lies: of a bit-packed field, the last axis holds eight values a byte."""
        return (*self.row_shape[:-1], math.ceil(self.row_shape[-1] / 8)) if self.field.bit_packed else self.row_shape

    @property
    def stored_dtype(self) -> str:
        """Type of the values as they lie."""
        return "uint8" if self.field.bit_packed else self.field.dtype

    @property
    def num_shards(self) -> int:
        """How many objects the array has when it is complete."""
        return math.ceil(self.num_rows / self.shard_rows)

    @property
    def fill_value(self) -> int | str:
        """What a plain zarr reader sees where nothing is written."""
        return "" if self.field.dtype == "string" else _FILL_VALUES.get(self.field.name, 0)

    def shard_name(self, shard: int) -> str:
        """The object that holds a shard."""
        return "/".join([self.path, "c", str(shard), *("0" for _ in self.row_shape)])

    def compressors(self) -> tuple[BytesBytesCodec, ...]:
        """The codecs behind `field.codec`, and a checksum of each chunk, which any zarr reader verifies."""
        if self.field.codec == "none":
            return (Crc32cCodec(),)
        if self.field.codec == "zstd":
            return ZstdCodec(level=_ZSTD_LEVEL), Crc32cCodec()
        item_bytes = np.dtype(self.stored_dtype).itemsize
        blosc = BloscCodec(cname="lz4", clevel=_LZ4_LEVEL, shuffle="bitshuffle", typesize=item_bytes)
        return blosc, Crc32cCodec()

    def metadata_document(self) -> bytes:
        """The array's `zarr.json`: the same bytes whoever writes it."""
        objects: dict[str, Any] = {}
        attributes: dict[str, Any] = {"meaning": self.field.meaning, "axes": ["row", *self.field.axes]}
        if self.field.bit_packed:
            attributes["bit_packed"] = {"axis": self.field.axes[-1], "count": self.row_shape[-1], "bit_order": "little"}
        zarr.create_array(
            MemoryStore(objects),
            shape=(self.num_rows, *self.stored_row_shape),
            dtype=self.stored_dtype,
            shards=(self.shard_rows, *self.stored_row_shape),
            chunks=(self.chunk_rows, *self.stored_row_shape),
            compressors=self.compressors(),
            fill_value=self.fill_value,
            attributes=attributes,
        )
        document: bytes = objects["zarr.json"].to_bytes()
        return document

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """Rows as a reader receives them, from rows as they lie."""
        if not self.field.bit_packed:
            return stored
        unpacked = np.unpackbits(stored, axis=-1, count=self.row_shape[-1], bitorder="little")
        return unpacked.view(np.bool_)

    def encode(self, rows: np.ndarray) -> np.ndarray:
        """Rows as they lie, from rows as a reader receives them."""
        return np.packbits(rows, axis=-1, bitorder="little") if self.field.bit_packed else rows


@dataclass(frozen=True)
class CorpusFacts:
    """What sizes a network."""

    class_names: tuple[str, ...]
    num_views: int
    image_size: int
    part_names: tuple[str, ...]


@dataclass(frozen=True)
class QuarantinedRow:
    """A shape of the source that could not be used."""

    row: int
    id: str
    reason: str


def default_block_rows(num_rows: int) -> int:
    """Rows a writer finishes at a time: about a sixteenth of a small corpus, so that a stop loses little work."""
    sixteenth = math.ceil(num_rows / 16)
    return min(1024, max(16, 1 << (sixteenth - 1).bit_length()))


class Store:
    """A store as one manifest shows it; it does not change while others go on writing."""

    def __init__(
        self,
        folder: ObjectFolder,
        attributes: StoreAttributes,
        ingest_fields: Sequence[str],
        teachers: Mapping[str, TeacherAttributes],
        manifest: Manifest,
    ) -> None:
        self.folder = folder
        self.attributes = attributes
        self.ingest_fields = tuple(ingest_fields)
        self.manifest = manifest
        self._every_teacher = dict(teachers)

    def __len__(self) -> int:
        return self.attributes.num_rows

    def __repr__(self) -> str:
        return f"<Store {self.url}: {len(self)} rows, manifest {self.manifest.number}>"

    @property
    def url(self) -> str:
        """Where the store lies."""
        return self.folder.url

    @property
    def class_names(self) -> tuple[str, ...]:
        """What `label` indexes into."""
        return self.attributes.class_names

    @property
    def part_names(self) -> tuple[str, ...]:
        """What `part_labels` indexes into."""
        return self.attributes.part_names

    @property
    def splits(self) -> tuple[str, ...]:
        """What `split` indexes into."""
        return self.attributes.splits

    @property
    def corpus_facts(self) -> CorpusFacts:
        """What sizes a network."""
        return CorpusFacts(self.class_names, self.attributes.num_views, self.attributes.image_size, self.part_names)

    @property
    def num_blocks(self) -> int:
        """How many blocks a complete scope has."""
        return math.ceil(len(self) / self.attributes.block_rows)

    def block_range(self, block: int) -> tuple[int, int]:
        """First row of a block, and the one after its last."""
        first = block * self.attributes.block_rows
        return first, min(first + self.attributes.block_rows, len(self))

    def statistics(self, teacher: str) -> dict[str, FieldStatistics]:
        """Of each float16 field of a teacher (`name@hash`), over all its complete rows."""
        return {
            field: FieldStatistics(
                total=math.fsum(each.total for each in of_blocks),
                largest=max((each.largest for each in of_blocks if each.count), default=0.0),
                count=sum(each.count for each in of_blocks),
            )
            for field, of_blocks in self.manifest.scope(f"{_TEACHERS_FOLDER}/{teacher}").statistics.items()
        }

    @cached_property
    def fields(self) -> dict[str, StoredField]:
        """The arrays that are readable now: those of every scope whose blocks cover what is ingested."""
        readable = [INGEST] if self.manifest.scope(INGEST).block_ranges else []
        readable += [f"{_TEACHERS_FOLDER}/{key}" for key in self.teachers]
        return {stored.path: stored for scope in readable for stored in self.fields_of(scope)}

    @cached_property
    def teachers(self) -> dict[str, TeacherAttributes]:
        """Teachers whose cached fields cover every ingested row, by `name@hash`."""
        ingested = set(self.manifest.scope(INGEST).blocks)
        return {
            key: teacher
            for key, teacher in self._every_teacher.items()
            if ingested and ingested <= set(self.manifest.scope(f"{_TEACHERS_FOLDER}/{key}").blocks)
        }

    def fields_of(self, scope: str) -> list[StoredField]:
        """The arrays that a writer of a scope fills, readable or not."""
        if scope == INGEST:
            return [self._stored_field(name, name, scope, self._ingest_row_shape(name)) for name in self.ingest_fields]
        key = scope.removeprefix(f"{_TEACHERS_FOLDER}/")
        # a teacher may have been added since this manifest was opened
        teacher = self._every_teacher.get(key) or _read_teacher(self.folder, key)
        return [self._stored_field(name, f"{scope}/{name}", scope, sizes) for name, sizes in teacher.fields.items()]

    def resolve_teacher(self, teacher: str) -> str:
        """`name@hash` of the one teacher meant; an error that says what to run where there is none."""
        if teacher in self.teachers:
            return teacher
        matching = [key for key in self.teachers if key.partition("@")[0] == teacher]
        if len(matching) == 1:
            self._refuse_changed_weights(matching[0])
            return matching[0]
        if matching:
            raise StoreError(
                f"{self.url} holds {len(matching)} teachers named {teacher!r}, from different weights, input sizes or "
                f"normalisations: {self._describe_teachers(matching)}. Name the one you mean in full, or remove the "
                f"others' folders in {self.url}/{_TEACHERS_FOLDER}."
            )
        name = teacher.partition("@")[0]
        command = f"`viewpoint cache {self.url} --teacher {name} --weights URL`"
        for key, unfinished in self._every_teacher.items():
            if teacher in (key, key.partition("@")[0]):
                command = f"`{unfinished.command(self.url)}`"
                done, needed = (
                    len(self.manifest.scope(f"{_TEACHERS_FOLDER}/{key}").blocks),
                    len(self.manifest.scope(INGEST).blocks),
                )
                raise MissingField(
                    f"{self.url} holds {done} of {needed} blocks of teacher {key!r}. Write the others with {command}."
                )
        others = [key for key in self.teachers if key.partition("@")[0] == name]
        if others:  # asked for by its hash
            raise MissingField(
                f"{self.url} has no fields of teacher {teacher!r}. What it has of that name is from other weights, or another "
                f"input size, normalisation or precision: {self._describe_teachers(others)}. Write those of the teacher "
                f"asked for again with {command} and its own weights, or name one that is here "
                f"(objective.teacher: {others[-1]})."
            )
        known = f"It holds {', '.join(self.teachers)}." if self.teachers else "It holds no teacher's fields."
        raise MissingField(f"{self.url} has no fields of teacher {teacher!r}. {known} Write them with {command}.")

    def _refuse_changed_weights(self, key: str) -> None:
        written = self.teachers[key]
        if changed := [file.path for file in written.weights_files if file.has_changed()]:
            raise StoreError(
                f"Teacher {key} of {self.url} was written by the weights in {changed[0]}, which have changed since. Write its "
                f"fields anew with `{written.command(self.url)}`, or name {key} in full (`--set objective.teacher={key}`) "
                f"to go on with those that are here."
            )

    def _describe_teachers(self, keys: Sequence[str]) -> str:
        """What tells teachers apart, and how each was made."""
        return "; ".join(
            f"{key} ({each.image_size} px, mean {_triple(each.mean)}, deviation {_triple(each.std)}, {each.precision}, by "
            f"`{each.command(self.url)}`)"
            for key in keys
            for each in [self._every_teacher[key]]
        )

    def field(self, name: str) -> StoredField:
        """One readable array; an error that says how it is written where there is none."""
        if name in self.fields:
            return self.fields[name]
        base = name.rpartition("/")[2]
        if base not in schema.FIELDS:
            raise MissingField(f"There is no field {name!r}. {self.url} holds {', '.join(self.fields)}.")
        if schema.FIELDS[base].writer == "ingest":
            raise MissingField(
                f"{self.url} has no field {name!r} ({schema.FIELDS[base].meaning}): its source has none, or it was "
                f"ingested without. It holds {', '.join(self.fields)}. Write a store that has it with "
                f"`viewpoint ingest SOURCE NEW_STORE`."
            )
        if "/" not in name:
            holders = [path for path in self.fields if path.endswith(f"/{name}")]
            held = f" It is here for: {', '.join(holders)}." if holders else ""
            raise MissingField(
                f"{self.url}: {name!r} belongs to a teacher, so its name here is teachers/NAME@HASH/{name}.{held} "
                f"Write it with `viewpoint cache {self.url} --teacher NAME`."
            )
        key = self.resolve_teacher(name.removeprefix(f"{_TEACHERS_FOLDER}/").rpartition("/")[0])
        raise MissingField(
            f"{self.url}: teacher {key!r} wrote {', '.join(self.teachers[key].fields)}, but not {base!r}. Write it "
            f"with `viewpoint cache {self.url} --teacher NAME` and a teacher that has it."
        )

    def read(self, field: str, rows: Iterable[int] | Int64[np.ndarray, " r"]) -> np.ndarray:
        """The given rows of a field, in the given order, as a reader receives them."""
        stored = self.field(field)
        wanted = np.asarray(rows if isinstance(rows, np.ndarray) else list(rows), dtype=np.int64)
        self._check_rows(stored, wanted)
        self._check_shards(stored, wanted)
        array = self._arrays.get(field)
        if array is None:
            array = self._arrays[field] = zarr.open_array(self._zarr_store, path=stored.path, mode="r")
        result = np.empty(
            (len(wanted), *stored.row_shape),
            dtype=array.dtype if stored.field.dtype == "string" else stored.field.dtype,
        )
        order = np.argsort(wanted, kind="stable")
        # neighbouring chunks of one shard are read together: one request for a run of rows instead of one a row
        chunks = wanted[order] // stored.chunk_rows
        same_run = (np.diff(chunks) <= 1) & (np.diff(wanted[order] // stored.shard_rows) == 0)
        bounds = [0, *(np.flatnonzero(~same_run) + 1), len(order)]
        for start, end in pairwise(bounds):
            positions = order[start:end]
            if not len(positions):
                continue
            first, last = int(wanted[positions[0]]), int(wanted[positions[-1]])
            result[positions] = stored.decode(np.asarray(array[first : last + 1]))[wanted[positions] - first]
        return result

    def rows(self, split: str | None = None) -> Int64[np.ndarray, " r"]:
        """Row numbers of the shapes that are complete and not in quarantine: of one split, or all."""
        return self.row_ranges(split).all()

    def row_ranges(self, split: str | None = None) -> Rows:
        """The same as ranges, whose size does not grow with the corpus. The manifest knows them: nothing is read."""
        if split is not None and split not in self.splits:
            raise StoreError(f"{self.url} has no split {split!r}. It has {', '.join(self.splits)}.")
        ingested, block_rows = self.manifest.scope(INGEST), self.attributes.block_rows
        chosen: list[tuple[int, int]] = []
        runs = iter(ingested.splits)
        value, left = 0, 0
        for first_block, end_block in ingested.block_ranges:
            row, end = first_block * block_rows, min(end_block * block_rows, len(self))
            while row < end:
                if left == 0:
                    value, left = next(runs)
                taken = min(left, end - row)
                if value != schema.QUARANTINED if split is None else value == self.splits.index(split):
                    chosen.append((row, row + taken))
                row, left = row + taken, left - taken
        return Rows(np.array(chosen, np.int64).reshape(-1, 2))

    @cached_property
    def quarantine(self) -> list[QuarantinedRow]:
        """Shapes of the source that could not be used, and why."""
        reasons = {row: reason for reason, rows in self.manifest.scope(INGEST).quarantine.items() for row in rows}
        rows = sorted(reasons)
        if not rows:
            return []
        return [
            QuarantinedRow(row, str(name), reasons[row]) for row, name in zip(rows, self.read("id", rows), strict=True)
        ]

    def is_complete(self, scope: str = INGEST) -> bool:
        """Whether every block of a scope is there."""
        return len(self.manifest.scope(scope).blocks) == self.num_blocks

    def _check_shards(self, stored: StoredField, rows: np.ndarray) -> None:
        """Refuses shards that are gone or cut short: zarr would read them as rows of zeros."""
        sizes = self.manifest.scope(stored.scope).shards[stored.field.name].sizes
        for shard in np.unique(rows // stored.shard_rows):
            name = stored.shard_name(int(shard))
            if name in self._sound_shards:
                continue
            found = self.folder.size(name)
            if found != sizes[shard]:
                there = "is missing" if found is None else f"has {found:,} bytes"
                raise StoreError(
                    f"{self.url}/{name} {there}, and its manifest says {sizes[shard]:,}. `viewpoint inspect {self.url} "
                    f"--verify` lists everything that is damaged; restore it from a copy, or ingest again."
                )
            self._sound_shards.add(name)

    @cached_property
    def _sound_shards(self) -> set[str]:
        return set()

    def _check_rows(self, stored: StoredField, rows: np.ndarray) -> None:
        if not len(rows):
            return
        if rows.min() < 0 or rows.max() >= len(self):
            raise StoreError(
                f"{self.url} has rows 0 to {len(self) - 1}; asked for {rows.min()} to {rows.max()} of {stored.path!r}."
            )
        ranges = self.manifest.scope(stored.scope).block_ranges
        blocks = np.unique(rows // self.attributes.block_rows)
        missing = [int(block) for block in blocks if not any(first <= block < end for first, end in ranges)]
        if missing:
            raise StoreError(
                f"{self.url}: rows {self.block_range(missing[0])[0]} and following of {stored.path!r} are not written "
                f"yet in manifest {self.manifest.number}. `Store.rows()` lists those that are."
            )

    @cached_property
    def _arrays(self) -> dict[str, zarr.Array[Any]]:
        return {}

    @cached_property
    def _zarr_store(self) -> LocalStore | FsspecStore:
        if self.folder.is_local:
            return LocalStore(self.folder.local_path, read_only=True)
        return FsspecStore.from_url(self.url, read_only=True)

    def _ingest_row_shape(self, name: str) -> tuple[int, ...]:
        facts = self.attributes
        sizes = {"p": facts.points_per_shape, "v": facts.num_views, "h": facts.image_size, "w": facts.image_size}
        sizes |= {"e": facts.extra_views or 0, "s": facts.extra_image_size or 0}
        return tuple(sizes[axis] if axis in sizes else int(axis) for axis in schema.FIELDS[name].axes)

    def _stored_field(self, name: str, path: str, scope: str, row_shape: tuple[int, ...]) -> StoredField:
        field = schema.FIELDS[name]
        shard_rows = min(field.shard_rows, self.attributes.block_rows)
        if field.writer == "cache":
            fitting = _CACHED_SHARD_BYTES // (math.prod(row_shape) * np.dtype(field.dtype).itemsize)
            shard_rows = min(
                shard_rows, 1 << max(fitting.bit_length() - 1, 0)
            )  # a power of two, so that it divides a block
        return StoredField(field, path, scope, len(self), row_shape, shard_rows, min(field.chunk_rows, shard_rows))


def open_store(url: str | os.PathLike[str], manifest: int | None = None) -> Store:
    """The store at a URL, as its newest manifest shows it, or the one with this number."""
    store = _open(ObjectFolder(url), manifest)
    if store.manifest.number == 0:
        raise StoreError(
            f"{store.url} is a store in which nothing is complete yet. Wait for `viewpoint ingest` to finish, or run "
            f"the same command again: it goes on where it stopped."
        )
    return store


def create_store(url: str | os.PathLike[str], attributes: StoreAttributes, fields: Sequence[str]) -> Store:
    """A store with these attributes and ingest fields: a new one, or the one that is there if it has the same."""
    folder = ObjectFolder(url)
    fields = tuple(name for name in schema.INGEST_FIELDS if name in set(fields))
    if not {"split", "id"} <= set(fields):
        raise StoreError(f"{folder.url}: every store has the fields split and id; asked for {', '.join(fields)}.")
    if folder.is_local and folder.local_path.is_file():
        raise StoreError(f"{folder.url} is a file; a store is a folder. The order is `viewpoint ingest SOURCE STORE`.")
    # another creator's group is there before its arrays are, so a listing without it is not of a store in the making
    present = set(folder.names()) - {BOOKKEEPING_FOLDER}
    if present and "zarr.json" not in present:
        raise StoreError(
            f"{folder.url} is no store and not empty: it holds {_listing(sorted(present))}. Name a new folder for the "
            f"store. The order is `viewpoint ingest SOURCE STORE`."
        )
    document = _group_document({_ATTRIBUTES_KEY: attributes.model_dump(mode="json"), _FIELDS_KEY: list(fields)})
    # the group is created first and says everything: whoever comes second, or after a kill, completes the same arrays
    if not folder.create("zarr.json", document):
        found, found_fields = _read_attributes(folder)
        _refuse_difference(folder.url, found, attributes, found_fields, fields)
    store = _open(folder)
    _write_array_documents(store, INGEST)
    return store


def create_teacher(store: Store, teacher: TeacherAttributes) -> str:
    """The scope for a teacher's fields: a new one, or the one that is there if it is the same teacher's."""
    points = store.attributes.points_per_shape
    for name, sizes in teacher.fields.items():
        axes = schema.FIELDS[name].axes
        if "p" in axes and sizes[axes.index("p")] != points:
            raise StoreError(
                f"{name} of teacher {teacher.key} is of {sizes} points; {store.url} has {points} of each shape."
            )
    scope = f"{_TEACHERS_FOLDER}/{teacher.key}"
    store.folder.create(f"{_TEACHERS_FOLDER}/zarr.json", _group_document({}))
    document = _group_document({_TEACHER_KEY: teacher.model_dump(mode="json")})
    if not store.folder.exists(f"{scope}/zarr.json"):
        # someone removed the teacher's folder: the records of what lay there must not vouch for what comes now
        for block in commit_numbers(store.folder, scope):
            store.folder.remove(commit_name(scope, block))
    if not store.folder.create(f"{scope}/zarr.json", document):
        found = _read_teacher(store.folder, teacher.key)
        # the same weights may lie elsewhere by now
        # and trainings whose settings differ in what does not count, such as a time-out, end with the same weights
        training = teacher.training | {key: found.training[key] for key in {"job", "config_hash"} & set(found.training)}
        same = {"options": found.options, "weights_files": found.weights_files, "training": training}
        if differences := _differences(found, teacher.model_copy(update=same)):
            raise StoreError(
                f"{store.url}/{scope} was written by this teacher with other properties ({differences}). Ask for all "
                f"fields at once and remove that folder, or give the teacher another name."
            )
    _write_array_documents(store, scope)
    return scope


def present_scopes(folder: ObjectFolder) -> list[str]:
    """Every scope that the store has now, whoever added it since it was opened."""
    return [INGEST, *(f"{_TEACHERS_FOLDER}/{key}" for key in _teacher_keys(folder))]


def commit_name(scope: str, block: int) -> str:
    """The object that says a block is complete."""
    return f"{_COMMITS_FOLDER}/{scope}/{block:08d}.json"


def commit_numbers(folder: ObjectFolder, scope: str) -> list[int]:
    """Blocks of a scope that have such an object, published or not."""
    return _numbers(folder.names(f"{_COMMITS_FOLDER}/{scope}"))


def commits_listed(folder: ObjectFolder, scope: str) -> dict[int, str | None]:
    """The same blocks, and the MD5 of each one's object where the listing tells it."""
    listed = folder.listed(f"{_COMMITS_FOLDER}/{scope}")
    return {number: listed.get(f"{number:08d}.json") for number in _numbers(listed)}


def manifest_name(number: int) -> str:
    """The object that holds a manifest."""
    return f"{_MANIFESTS_FOLDER}/{number:08d}.json"


def newest_manifest(folder: ObjectFolder) -> Manifest:
    """What a reader that opens the store now sees."""
    numbers = _numbers(folder.names(_MANIFESTS_FOLDER))
    if not numbers:
        return Manifest()
    name = manifest_name(numbers[-1])
    mend = "Remove it: the one before it counts then, and the next `viewpoint ingest` or `cache` writes a new one."
    return _read_again_if_damaged(
        folder, name, lambda content: parse_document(Manifest, content, f"{folder.url}/{name}", mend)
    )


def _manifest_numbered(folder: ObjectFolder, number: int) -> Manifest:
    name = manifest_name(number)
    mend = "Restore it from a copy, or start a new run, which sees the newest."
    try:
        return _read_again_if_damaged(
            folder, name, lambda content: parse_document(Manifest, content, f"{folder.url}/{name}", mend)
        )
    except FileNotFoundError:
        raise StoreError(f"{folder.url} has no {name} any more, which this run began with. {mend}") from None


def parse_document(model: type[Model], content: bytes, where: str, mend: str) -> Model:
    """The object that a JSON document describes; an error that names the document and how to mend it."""
    seal, rest = content[: len(_SEAL % 0)], b"{" + content[len(_SEAL % 0) :]
    if seal[:10] == _SEAL[:10]:  # documents of older versions have none
        if seal != _SEAL % crc32c(rest):
            raise StoreError(f"{where} is damaged (its checksum is another). {mend}")
        content = rest
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        problem = ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))
        raise StoreError(f"{where} is damaged or from another version of Viewpoint ({problem}). {mend}") from error


def as_document(model: BaseModel) -> bytes:
    """What `parse_document` takes, with a checksum of itself: a digit that flips on the way is noticed."""
    content = model.model_dump_json().encode()
    seal: bytes = _SEAL % crc32c(content)
    return seal + content[1:]


def _read_again_if_damaged(folder: ObjectFolder, name: str, parse: Callable[[bytes], T]) -> T:
    """What an object's content means. The error is of the store's own bytes: they came twice the same."""
    before: set[bytes] = set()
    while True:
        content = folder.read(name)
        try:
            return parse(content)
        except StoreError:
            if content in before or len(before) == _READ_ATTEMPTS:
                raise
        before.add(content)


def _triple(values: Sequence[float]) -> str:
    return "/".join(f"{value:.4g}" for value in values)


def _numbers(names: Iterable[str]) -> list[int]:
    return sorted(int(name.removesuffix(".json")) for name in names if name.removesuffix(".json").isdecimal())


def _open(folder: ObjectFolder, manifest: int | None = None) -> Store:
    seen = newest_manifest if manifest is None else partial(_manifest_numbered, number=manifest)
    # far from the store, each of these is a round trip or two
    (attributes, fields), teachers, found = beside_each_other(
        [partial(read, folder) for read in (_read_attributes, _read_teachers, seen)]
    )
    return Store(folder, attributes, fields, teachers, found)


def _read_teachers(folder: ObjectFolder) -> dict[str, TeacherAttributes]:
    """Every teacher, by `name@hash`."""

    def of(key: str) -> TeacherAttributes | None:
        try:
            return _read_teacher(folder, key)
        except (FileNotFoundError, NotADirectoryError):
            return None

    keys = _teacher_folders(folder)
    teachers: list[TeacherAttributes | None] = []
    for start in range(0, len(keys), _TEACHERS_AT_ONCE):
        teachers += beside_each_other([partial(of, key) for key in keys[start : start + _TEACHERS_AT_ONCE]])
    return {key: teacher for key, teacher in zip(keys, teachers, strict=True) if teacher is not None}


def _teacher_keys(folder: ObjectFolder) -> list[str]:
    return [key for key in _teacher_folders(folder) if folder.exists(f"{_TEACHERS_FOLDER}/{key}/zarr.json")]


def _teacher_folders(folder: ObjectFolder) -> list[str]:
    """Of every teacher. One without its document is being made, or was removed."""
    return [name for name in folder.names(_TEACHERS_FOLDER) if "@" in name]


def _read_attributes(folder: ObjectFolder) -> tuple[StoreAttributes, tuple[str, ...]]:
    command = f"Write a store with `viewpoint ingest SOURCE {folder.url}`."
    try:
        document = _read_group(folder, "zarr.json", f"Restore it from a copy, or remove the folder. {command}")
    except (FileNotFoundError, NotADirectoryError):
        names = folder.names()
        found = f"It holds {_listing(names)}." if names else "Nothing is there."
        raise StoreError(f"{folder.url} is no store: it has no zarr.json. {found} {command}") from None
    found_attributes = document.get("attributes", {})
    if _ATTRIBUTES_KEY not in found_attributes:
        raise StoreError(
            f"{folder.url} is a zarr {document.get('node_type', 'object')}, but not a store of Viewpoint's. {command}"
        )
    version = found_attributes[_ATTRIBUTES_KEY].get("schema_version")
    if version != schema.SCHEMA_VERSION:
        raise StoreError(
            f"{folder.url} has schema version {version}; this Viewpoint reads version {schema.SCHEMA_VERSION}. Use the "
            f"Viewpoint that wrote it, or ingest the source again into a new store."
        )
    content = json.dumps(found_attributes[_ATTRIBUTES_KEY]).encode()
    mend = "Restore it from a copy, or ingest the source again into a new store."
    attributes = parse_document(StoreAttributes, content, f"{folder.url}/zarr.json", mend)
    return attributes, tuple(found_attributes[_FIELDS_KEY])


def _read_teacher(folder: ObjectFolder, key: str) -> TeacherAttributes:
    name = f"{_TEACHERS_FOLDER}/{key}/zarr.json"
    mend = f"Remove {_TEACHERS_FOLDER}/{key} and run `viewpoint cache {folder.url} --teacher {key.partition('@')[0]}`."
    document = _read_group(folder, name, mend)
    found = json.dumps(document["attributes"].get(_TEACHER_KEY, {})).encode()
    return parse_document(TeacherAttributes, found, f"{folder.url}/{name}", mend)


def _write_array_documents(store: Store, scope: str) -> None:
    for stored in store.fields_of(scope):
        if not store.folder.exists(f"{stored.path}/zarr.json"):
            store.folder.create(f"{stored.path}/zarr.json", stored.metadata_document())


def _group_document(attributes: Mapping[str, Any]) -> bytes:
    sealed = {_CHECKSUM_KEY: _attributes_checksum(attributes), **attributes} if attributes else {}
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": sealed}, indent=2).encode()


def _attributes_checksum(attributes: Mapping[str, Any]) -> str:
    """Of what is Viewpoint's: others may add attributes of their own."""
    ours = {key: attributes[key] for key in (_ATTRIBUTES_KEY, _FIELDS_KEY, _TEACHER_KEY) if key in attributes}
    return f"{crc32c(json.dumps(ours, sort_keys=True).encode()):08x}"


def _read_group(folder: ObjectFolder, name: str, mend: str) -> dict[str, Any]:
    """A group's document."""

    def parse(content: bytes) -> dict[str, Any]:
        try:
            document: dict[str, Any] = json.loads(content)
        except ValueError as error:
            raise StoreError(f"{folder.url}/{name} is damaged ({error}). {mend}") from error
        attributes = document.get("attributes", {})
        expected = attributes.get(_CHECKSUM_KEY)  # groups of older versions have none
        is_damaged = expected is not None and expected != _attributes_checksum(attributes)
        known = {_ATTRIBUTES_KEY, _FIELDS_KEY, _TEACHER_KEY, _CHECKSUM_KEY}
        if is_damaged or any(key.startswith(_ATTRIBUTES_KEY) and key not in known for key in attributes):
            raise StoreError(f"{folder.url}/{name} is damaged (its checksum is another). {mend}")
        return document

    return _read_again_if_damaged(folder, name, parse)


def _refuse_difference(
    url: str, found: StoreAttributes, asked: StoreAttributes, found_fields: Sequence[str], asked_fields: Sequence[str]
) -> None:
    # a source may be reached by another path, or from another machine: its hash says whether it is the same
    differences = _differences(found, asked.model_copy(update={"source_url": found.source_url}))
    if tuple(found_fields) != tuple(asked_fields):
        differences = "; ".join(
            filter(None, [differences, f"fields: {', '.join(found_fields)} there, {', '.join(asked_fields)} asked for"])
        )
    if differences:
        raise StoreError(
            f"{url} already holds another store ({differences}). Go on with the options it was started with, choose "
            f"another URL, or remove it."
        )


def _differences(found: BaseModel, asked: BaseModel) -> str:
    """`name: this there, that asked for`, for each property that differs."""
    there, wanted = found.model_dump(mode="json"), asked.model_dump(mode="json")
    return "; ".join(
        f"{name}: {_shortened(there[name])} there, {_shortened(wanted[name])} asked for"
        for name in there
        if there[name] != wanted[name]
    )


def _listing(names: Sequence[str], length: int = 5) -> str:
    return ", ".join(names[:length]) + (f" and {len(names) - length} more" if len(names) > length else "")


def _shortened(value: object, length: int = 80) -> str:
    text = json.dumps(value)
    return text if len(text) <= length else text[: length - 3] + "..."
