"""Fills a store block by block, so that a writer may be killed at any moment and any number may work at once.

A writer encodes the shards of a block in memory, puts each as one whole object, and creates the block's commit record
last. The record carries size and CRC-32 of every shard. (Not CRC-32C: the chunks of a shard end in theirs, and what ends
in its own checksum leaves no trace in a longer one of the same kind. All shards of one size would have the same.)
Nothing else tells a finished block from an unfinished one: what a killed writer left has no record and is overwritten by
whoever does the block next. `publish` gathers the records into the next manifest, which is what readers see.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import zarr
from crc32c import crc32c
from numpy.dtypes import StringDType
from pydantic import BaseModel, NonNegativeInt
from zarr.storage import MemoryStore

from datastore import schema
from datastore.errors import AskedWrongly, StoreError, ViewpointError
from datastore.layout import (
    INGEST,
    FieldStatistics,
    Manifest,
    QuarantinedRow,
    Runs,
    ScopeManifest,
    ShardSums,
    Store,
    StoredField,
    as_document,
    as_runs,
    commit_name,
    commit_numbers,
    commits_listed,
    from_runs,
    manifest_name,
    newest_manifest,
    parse_document,
    present_scopes,
)
from datastore.objects import ObjectFolder

_EMPTY_CHUNK: Final = 2**64 - 1
"""Offset and length by which a shard's index marks a chunk that is not there (zarr's sharding codec)."""

_VERIFY_PIECE_BYTES: Final = 8 * 2**20
_VERIFY_THREADS: Final = 4
_LONGEST_REASON: Final = 300


class CommitRecord(BaseModel, extra="forbid", frozen=True):
    """What a finished block consists of."""

    shards: dict[str, tuple[tuple[NonNegativeInt, NonNegativeInt], ...]]  # by field: size and crc32 of each shard
    quarantine: dict[str, tuple[int, ...]] = {}  # rows that hold no shape, by reason
    splits: Runs = ()  # of ingest: the field `split`, as (value, how many rows in a row)
    statistics: dict[str, FieldStatistics] = {}  # of a teacher: by field


class BlockWriter:
    """Writes blocks of one scope. Any number of writers may work on one store, best on different parts."""

    def __init__(self, store: Store, scope: str = INGEST) -> None:
        self.store = store
        self.scope = scope
        self.fields = store.fields_of(scope)
        store.folder.remove_abandoned_drafts()

    def pending(self, part: tuple[int, int] = (0, 1)) -> list[int]:
        """Blocks of part i of n that nobody has finished. A teacher's are those that are ingested."""
        index, count = part
        if not 0 <= index < count:
            raise AskedWrongly(f"There is no part {index} of {count}: parts are 0/{count} to {count - 1}/{count}.")
        blocks = list(range(self.store.num_blocks))
        if self.scope != INGEST:
            blocks = self.store.manifest.scope(INGEST).blocks
            if not blocks:
                raise StoreError(
                    f"{self.store.url} had nothing ingested when it was opened, with manifest "
                    f"{self.store.manifest.number}. Finish `viewpoint ingest` first, or open it again."
                )
        committed = set(commit_numbers(self.store.folder, self.scope))
        return [block for block in blocks if block % count == index and block not in committed]

    def open_block(self, block: int) -> "OpenBlock":
        """A block to be filled a few rows at a time, which keeps little in memory."""
        return OpenBlock(self, block)

    def write(self, block: int, arrays: Mapping[str, np.ndarray], quarantine: Sequence[QuarantinedRow] = ()) -> None:
        """Writes and commits a block whose rows are all at hand."""
        opened = self.open_block(block)
        opened.append(arrays)
        opened.commit(quarantine)


class OpenBlock:
    """A block while it is written: `append` rows in order, then `commit`. Abandoned before that, it leaves no trace."""

    def __init__(self, writer: BlockWriter, block: int) -> None:
        self._store, self._scope, self._block = writer.store, writer.scope, block
        self._folder = writer.store.folder
        self._where = f"block {block} of {writer.scope!r} in {writer.store.url}"
        self._record_name = commit_name(writer.scope, block)
        self._first, self._end = writer.store.block_range(block)
        assert 0 <= self._first < self._end, f"there is no {self._where}"
        self._shards = {stored.field.name: _ShardBuilder(stored, self._first, self._end) for stored in writer.fields}
        self._sums: dict[str, list[tuple[int, int]]] = {name: [] for name in self._shards}
        self._next_row = self._first
        self._is_broken = False  # a shard of it could not be put
        self._yielded = False  # a shard was left to another writer, who had finished the block
        self._kept: dict[str, list[np.ndarray]] = {name: [] for name in ("split", "id") if name in self._shards}

    def append(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes the next rows of every field, and puts the shards that they complete."""
        self._refuse_broken()
        lengths = self._checked_lengths(arrays)
        self._next_row += lengths
        if self._next_row > self._end:
            raise StoreError(
                f"{self._where} has rows {self._first} to {self._end - 1}; got rows up to {self._next_row - 1}."
            )
        for name, kept in self._kept.items():
            kept.append(arrays[name].copy())
        self._is_broken = True
        for name, builder in self._shards.items():
            for shard_name, content in builder.add(arrays[name]):
                self._put_shard(name, shard_name, content)
        self._is_broken = False

    def commit(
        self, quarantine: Sequence[QuarantinedRow] = (), statistics: Mapping[str, FieldStatistics] | None = None
    ) -> None:
        """Says that the block is complete. `quarantine` names every row whose split is QUARANTINED, and why.

        `statistics`: of fields that a teacher wrote.
        """
        self._refuse_broken()
        if self._next_row != self._end:
            raise StoreError(
                f"{self._where} has rows {self._first} to {self._end - 1}; got {self._next_row - self._first}."
            )
        if self._kept:
            self._check_quarantine(quarantine)
        record = CommitRecord(
            shards={name: tuple(sums) for name, sums in self._sums.items()},
            quarantine=_rows_by_reason((entry.row, entry.reason) for entry in quarantine),
            splits=as_runs(np.concatenate(self._kept["split"])) if "split" in self._kept else (),
            statistics=dict(statistics or {}),
        )
        # a record of ours would vouch for shards that the other wrote, and theirs may have been withdrawn since
        if self._yielded or not self._folder.create(self._record_name, as_document(record)):
            self._yield_to_other(record)

    def _refuse_broken(self) -> None:
        """Whoever queues rows hears of a failure late: what was queued behind it must not make a record for what is not there."""
        if self._is_broken:
            raise ViewpointError(
                f"{self._where} was given up when one of its shards could not be written. It counts as unfinished: the "
                f"same command redoes it."
            )

    def _check_quarantine(self, quarantine: Sequence[QuarantinedRow]) -> None:
        """Rows without a shape and the list of reasons must agree: readers go by the one, people by the other."""
        split, ids = np.concatenate(self._kept["split"]), np.concatenate(self._kept["id"])
        empty = {self._first + int(offset) for offset in np.flatnonzero(split == schema.QUARANTINED)}
        if differing := sorted(empty ^ {entry.row for entry in quarantine}):
            raise StoreError(
                f"{self._where}: rows {differing[:5]} are in quarantine by their split or by the list of reasons, but "
                f"not by both."
            )
        for entry in quarantine:
            if entry.id != ids[entry.row - self._first]:
                raise StoreError(
                    f"{self._where}: row {entry.row} is {ids[entry.row - self._first]!r} by the field id, but "
                    f"{entry.id!r} in quarantine."
                )

    def _put_shard(self, field: str, shard_name: str, content: bytes) -> None:
        self._sums[field].append((len(content), zlib.crc32(content)))
        # another writer may have finished the block meanwhile: what it vouched for stays as it is
        if self._folder.exists(self._record_name):
            self._yielded = True
        else:
            self._folder.put(shard_name, content)

    def _yield_to_other(self, ours: CommitRecord) -> None:
        """Another writer committed the block first. Its result stands, unless a late shard of ours went over it."""
        try:
            content = self._folder.read(self._record_name)
        except FileNotFoundError:
            raise ViewpointError(
                f"Another writer finished {self._where}, and that was withdrawn while this one worked on it. The block "
                f"counts as unfinished: the same command redoes it."
            ) from None
        theirs = _parse_record(content, f"{self._folder.url}/{self._record_name}")
        if theirs.shards == ours.shards:
            return
        damaged = [
            name
            for field, sums in theirs.shards.items()
            for name, expected in zip(self._shards[field].shard_names, sums, strict=True)
            if _size_and_crc32(self._folder, name) != expected
        ]
        if damaged:
            withdraw(self._store, self._scope, [self._block])
            raise ViewpointError(
                f"Two writers with different results worked on {self._where}, and one wrote over the other "
                f"({damaged[0]}). The block counts as unfinished again: the same command redoes it. Give every process "
                f"a part of its own (`--part i/n`)."
            )

    def _checked_lengths(self, arrays: Mapping[str, np.ndarray]) -> int:
        if arrays.keys() != self._shards.keys():
            wrong = sorted(arrays.keys() ^ self._shards.keys())
            raise StoreError(
                f"{self._where} takes {', '.join(self._shards)}; {', '.join(wrong)} is missing or too many."
            )
        for name, array in arrays.items():
            stored = self._shards[name].stored
            if array.shape[1:] != stored.row_shape:
                raise StoreError(f"{self._where}: a row of {name} has shape {stored.row_shape}, not {array.shape[1:]}.")
            if array.dtype.kind not in "TOU" if stored.field.dtype == "string" else array.dtype != stored.field.dtype:
                raise StoreError(f"{self._where}: {name} is {stored.field.dtype}, not {array.dtype}.")
        lengths = {len(array) for array in arrays.values()}
        if len(lengths) != 1:
            raise StoreError(f"{self._where}: fields came with different numbers of rows, {sorted(lengths)}.")
        return lengths.pop()


class _ShardBuilder:
    """Turns rows of one field into shard objects, chunk by chunk: what waits for its shard is encoded already."""

    def __init__(self, stored: StoredField, first_row: int, end_row: int) -> None:
        self.stored = stored
        self._next_shard = first_row // stored.shard_rows
        self._rows_left = end_row - first_row
        self._remainder = np.empty((0, *stored.row_shape), dtype=self._dtype)
        self._chunks: list[bytes] = []
        self.shard_names = [
            stored.shard_name(shard) for shard in range(self._next_shard, -(-end_row // stored.shard_rows))
        ]

    def add(self, rows: np.ndarray) -> Iterator[tuple[str, bytes]]:
        """Name and content of each shard that these rows complete."""
        self._rows_left -= len(rows)
        waiting = np.concatenate([self._remainder, rows], dtype=self._dtype) if len(self._remainder) else rows
        chunk_rows = self.stored.chunk_rows
        end = len(waiting) if self._rows_left == 0 else len(waiting) // chunk_rows * chunk_rows
        for start in range(0, end, chunk_rows):
            self._chunks.append(self._encode_chunk(waiting[start : start + chunk_rows]))
            is_last = self._rows_left == 0 and start + chunk_rows >= end
            if is_last or len(self._chunks) == self.stored.shard_rows // chunk_rows:
                yield self.stored.shard_name(self._next_shard), self._close_shard()
        self._remainder = waiting[end:].astype(self._dtype)  # a copy: the caller may use its memory for the next rows

    @property
    def _dtype(self) -> np.dtype[Any]:
        dtype: np.dtype[Any] = (
            StringDType() if self.stored.field.dtype == "string" else np.dtype(self.stored.field.dtype)
        )
        return dtype

    @cached_property
    def _chunk_array(self) -> tuple[zarr.Array[Any], dict[str, Any]]:
        """A zarr array of one chunk, encoded like those inside our shards, and the objects that it keeps."""
        objects: dict[str, Any] = {}
        shape = (self.stored.chunk_rows, *self.stored.stored_row_shape)
        array = zarr.create_array(
            MemoryStore(objects),
            shape=shape,
            dtype=self.stored.stored_dtype,
            chunks=shape,
            compressors=self.stored.compressors(),
            fill_value=self.stored.fill_value,
            # a chunk of nothing but fill values is data too: left out, it could not be told from a lost one
            config={"write_empty_chunks": True},
        )
        return array, objects

    def _encode_chunk(self, rows: np.ndarray) -> bytes:
        """One chunk as zarr encodes it. The last chunk of an array is filled up, as zarr does."""
        array, objects = self._chunk_array
        array[: len(rows)] = self.stored.encode(rows)
        content: bytes = objects.pop("/".join(["c", *("0" for _ in array.shape)])).to_bytes()
        return content

    def _close_shard(self) -> bytes:
        """The shard object: the chunks one after the other, then where each lies, then the checksum of that index."""
        lengths = np.array([len(chunk) for chunk in self._chunks], dtype="<u8")
        index = np.full((self.stored.shard_rows // self.stored.chunk_rows, 2), _EMPTY_CHUNK, dtype="<u8")
        index[: len(lengths), 0] = np.cumsum(lengths) - lengths
        index[: len(lengths), 1] = lengths
        index_bytes = index.tobytes()
        content = b"".join([*self._chunks, index_bytes, crc32c(index_bytes).to_bytes(4, "little")])
        self._chunks = []
        self._next_shard += 1
        return content


def publish(store: Store) -> Manifest:
    """The manifest of everything that is committed by now: a new one, or the newest if it already says so."""
    while True:
        # the order matters: what a lower number saw committed, a higher number, which looked later, sees too
        newest = newest_manifest(store.folder)
        scopes = {scope: _gather(store, scope, newest.scope(scope)) for scope in present_scopes(store.folder)}
        scopes = {scope: gathered for scope, gathered in scopes.items() if gathered.block_ranges}
        if scopes == newest.scopes:
            return newest
        manifest = Manifest(number=newest.number + 1, scopes=scopes)
        if store.folder.create(manifest_name(manifest.number), as_document(manifest)):
            return manifest


def withdraw(store: Store, scope: str, blocks: Sequence[int]) -> Manifest:
    """The manifest without the given blocks: they count as unfinished, and the next writer does them again.

    What teachers said of ingested blocks goes with them. It goes first: a kill in between leaves no word on other shapes.
    """
    derived = [other for other in present_scopes(store.folder) if other != INGEST] if scope == INGEST else []
    for each in (*derived, scope):
        for block in set(blocks) & set(commit_numbers(store.folder, each)):
            store.folder.remove(commit_name(each, block))
    return publish(store)


@dataclass(frozen=True)
class Damage:
    """A shard that is not what the manifest says."""

    scope: str
    block: int
    problem: str


def find_damage(store: Store, on_checked: Callable[[int], None] | None = None) -> list[Damage]:
    """Every shard that is missing or has a wrong size or checksum. `on_checked` hears how many bytes are done."""
    shards = list(_published_shards(store))
    damages: list[Damage] = []
    checked_bytes = 0
    with ThreadPoolExecutor(_VERIFY_THREADS) as pool:
        problems = pool.map(lambda shard: _shard_problem(store.folder, shard), shards)
        for shard, problem in zip(shards, problems, strict=True):
            checked_bytes += shard.size
            if on_checked is not None:
                on_checked(checked_bytes)
            if problem:
                damages.append(Damage(shard.scope, shard.block, problem))
    return damages


def verify(store: Store, on_checked: Callable[[int], None] | None = None) -> list[str]:
    """What is wrong with the store's objects, one line each; empty if all are as they were written."""
    problems = [damage.problem for damage in find_damage(store, on_checked)]
    present = present_scopes(store.folder)
    for scope in store.manifest.scopes:
        if scope not in present:
            problems.append(f"{scope} is missing, and its manifest says that it is there")
            continue
        for stored in store.fields_of(scope):
            name = f"{stored.path}/zarr.json"
            if not store.folder.exists(name):
                problems.append(f"{name} is missing")
            elif json.loads(store.folder.read(name)) != json.loads(stored.metadata_document()):
                problems.append(f"{name} is not what this store's attributes ask for")
    return problems


@dataclass(frozen=True)
class _PublishedShard:
    scope: str
    block: int
    name: str
    rows: tuple[int, int]
    size: int
    crc32: int


def _published_shards(store: Store) -> Iterator[_PublishedShard]:
    for scope in present_scopes(store.folder):
        published = store.manifest.scope(scope)
        for stored in store.fields_of(scope) if published.block_ranges else ():
            sums = published.shards[stored.field.name]
            for shard, (size, crc32) in enumerate(zip(sums.sizes, sums.crc32, strict=True)):
                if size:
                    first = shard * stored.shard_rows
                    rows = first, min(first + stored.shard_rows, stored.num_rows)
                    block = first // store.attributes.block_rows
                    yield _PublishedShard(scope, block, stored.shard_name(shard), rows, size, crc32)


def _shard_problem(folder: ObjectFolder, shard: _PublishedShard) -> str | None:
    where = f"{shard.name} (rows {shard.rows[0]} to {shard.rows[1] - 1})"
    found = _size_and_crc32(folder, shard.name)
    if found is None:
        return f"{where} is missing"
    size, crc32 = found
    if size != shard.size:
        return f"{where} has {size:,} bytes, its manifest says {shard.size:,}"
    if crc32 != shard.crc32:
        return f"{where} has checksum {crc32:08x}, its manifest says {shard.crc32:08x}"
    return None


def _size_and_crc32(folder: ObjectFolder, name: str) -> tuple[int, int] | None:
    size, crc32 = 0, 0
    try:
        for piece in folder.pieces(name, _VERIFY_PIECE_BYTES):
            size += len(piece)
            crc32 = zlib.crc32(piece, crc32)
    except FileNotFoundError:
        return None
    return size, crc32


def _gather(store: Store, scope: str, published: ScopeManifest) -> ScopeManifest:
    """What the commit records of a scope say together, those that the newest manifest took up already included."""
    fields = store.fields_of(scope)
    listed = commits_listed(store.folder, scope)
    records = _records_known(store, fields, published, listed)
    names = {commit_name(scope, block): block for block in listed if block not in records}
    for name, content in store.folder.read_all(list(names)).items():
        records[names[name]] = _parse_record(content, f"{store.url}/{name}")
    records = dict(sorted(records.items()))
    if not records:
        return ScopeManifest()
    shards: dict[str, ShardSums] = {}
    for stored in fields:
        sizes, sums = [0] * stored.num_shards, [0] * stored.num_shards
        for block, record in records.items():
            first = block * store.attributes.block_rows // stored.shard_rows
            first_row, end_row = store.block_range(block)
            if len(record.shards.get(stored.field.name, ())) != -(-(end_row - first_row) // stored.shard_rows):
                raise StoreError(
                    f"{store.url}/{commit_name(scope, block)} does not name every shard of {stored.field.name!r}. Remove "
                    f"it and run the command that wrote it again: it redoes that block."
                )
            for offset, (size, crc32) in enumerate(record.shards[stored.field.name]):
                sizes[first + offset], sums[first + offset] = size, crc32
        shards[stored.field.name] = ShardSums(sizes=tuple(sizes), crc32=tuple(sums))
    quarantine = _rows_by_reason(
        (row, reason) for record in records.values() for reason, rows in record.quarantine.items() for row in rows
    )
    splits = as_runs(np.concatenate([from_runs(record.splits) for record in records.values()]))
    described = set.intersection(*(set(record.statistics) for record in records.values()))
    statistics = {
        stored.field.name: tuple(record.statistics[stored.field.name] for record in records.values())
        for stored in fields
        if stored.field.name in described
    }
    return ScopeManifest(
        block_ranges=_as_ranges(sorted(records)),
        shards=shards,
        quarantine=quarantine,
        splits=splits,
        statistics=statistics,
    )


def _records_known(
    store: Store, fields: Sequence[StoredField], published: ScopeManifest, listed: Mapping[int, str | None]
) -> dict[int, CommitRecord]:
    """Records that need no reading: their MD5, where the listing tells it, is that of what the manifest says.

    At ten thousand blocks this makes a publishing ten requests instead of as many as there are blocks. It trusts no
    order of events: a block that was withdrawn and done again with another result has another MD5.
    """
    if not any(listed.values()) or {stored.field.name for stored in fields} != published.shards.keys():
        return {}
    block_rows = store.attributes.block_rows
    quarantine: dict[int, list[tuple[int, str]]] = {}
    for reason, rows in published.quarantine.items():
        for row in rows:
            quarantine.setdefault(row // block_rows, []).append((row, reason))
    known: dict[int, CommitRecord] = {}
    splits, next_row = from_runs(published.splits), 0
    for place, block in enumerate(published.blocks):
        here = slice(next_row, next_row := next_row + min(block_rows, len(store) - block * block_rows))
        shards = {}
        for stored in fields:
            first, end = (row // stored.shard_rows for row in (block * block_rows, (block + 1) * block_rows))
            sums = published.shards[stored.field.name]
            shards[stored.field.name] = tuple(zip(sums.sizes[first:end], sums.crc32[first:end], strict=True))
        record = CommitRecord(
            shards=shards,
            quarantine=_rows_by_reason(iter(quarantine.get(block, []))),
            splits=as_runs(splits[here]),
            statistics={field: of_blocks[place] for field, of_blocks in published.statistics.items()},
        )
        if listed.get(block) == hashlib.md5(as_document(record), usedforsecurity=False).hexdigest():
            known[block] = record
    return known


def _as_ranges(blocks: Sequence[int]) -> tuple[tuple[int, int], ...]:
    ranges: list[tuple[int, int]] = []
    for block in blocks:
        if ranges and ranges[-1][1] == block:
            ranges[-1] = ranges[-1][0], block + 1
        else:
            ranges.append((block, block + 1))
    return tuple(ranges)


def _rows_by_reason(entries: Iterator[tuple[int, str]]) -> dict[str, tuple[int, ...]]:
    """Thousands of shapes fail for few reasons: each reason is kept once."""
    rows: dict[str, list[int]] = {}
    for row, reason in entries:
        rows.setdefault(reason[:_LONGEST_REASON], []).append(row)
    return {reason: tuple(sorted(rows[reason])) for reason in sorted(rows)}


def _parse_record(content: bytes, where: str) -> CommitRecord:
    mend = "Remove it and run the command that wrote it again: it redoes that block."
    return parse_document(CommitRecord, content, where, mend)
