"""Ranges of remote objects kept on this node's disk: bounded, and shared by all of its processes.

An entry is a file of its own, named for its key. It is written beside its place and moved there, so a reader finds it
whole or not at all, and no reader takes a lock. It says which key it holds and carries a checksum, which is verified at
every use: what a dying disk or a careless hand changed is dropped and counts as absent.

A file holds how many bytes are taken, at most: whoever puts one adds its size before it is written, so any number of
processes stays within the bound. Where that comes to seven eighths of it, somebody looks through the folder, corrects the
number (entries are replaced and dropped, and writers are killed), and removes the entries that were used longest ago. The
others go on meanwhile; who finds no room keeps its bytes to itself this time.

The cache saves time and never costs a run: where the disk is full or may not be written, it says so once, and the run
goes on without new entries.
"""

import fcntl
import hashlib
import logging
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

from crc32c import crc32c

from datastore.objects import locked_draft, remove_abandoned, write_whole
from datastore.pieces import Pieces

_MAGIC: Final = b"VPRANGE1"  # another layout of entries is another number
_HEAD: Final = struct.Struct("<8sIIQ")  # magic, checksum of key and content, bytes of the key, bytes of the content
_DRAFTS: Final = "drafts"
_LOCK: Final = "eviction.lock"
_TOTAL: Final = "total"
_TOTAL_FORM: Final = struct.Struct("<8sQ")  # magic, bytes taken at most
_TOTAL_SECONDS: Final = 0.2  # that a put waits for whoever changes it; one that is stopped must not stop the others
_BLOCK_BYTES: Final = 4096  # disks give room in these
_FULL: Final = 7 / 8  # of the bound: entries go from here
_KEPT: Final = 3 / 4  # down to here, so that not every put looks
_LARGEST: Final = 8  # an entry takes an eighth of the bound at most
_REST_SECONDS: Final = 300.0  # without new entries after a disk refused one

_logger = logging.getLogger("datastore.disk_cache")


class DiskCache:
    """Contents by key. Threads and processes share it."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.hits = 0
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._looks_first = True  # whatever the folder says, each process looks once
        self._counting = threading.Lock()
        self._rests_until = 0.0
        self._has_warned = False
        try:
            (folder / _DRAFTS).mkdir(parents=True, exist_ok=True)
            remove_abandoned(folder / _DRAFTS)
            if not any(folder.glob("[0-9a-f][0-9a-f]")):
                with suppress(FileExistsError), (folder / _TOTAL).open("xb") as file:  # another process begins it, too
                    _put_total(file.fileno(), 0)
        except OSError as error:
            self._rest(error)

    def get(self, key: str) -> bytearray | None:
        """What was put under a key, undamaged; None where there is no such entry any more."""
        path = self._path(key)
        try:
            content = _read(path, key.encode())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._warn(f"{path} cannot be read ({error})")
            return None
        if content is None:
            _logger.info("%s is damaged: it is dropped and fetched again", path)
            self.drop(key)
            return None
        with self._counting:
            self.hits += 1
        return content

    def put(self, key: str, content: bytes | bytearray | memoryview | Pieces) -> None:
        """Keeps it for now; where that fails, says so once and goes on."""
        pieces = content if isinstance(content, Pieces) else Pieces([memoryview(content)])
        if pieces.num_bytes > self._limit_bytes // _LARGEST or time.monotonic() < self._rests_until:
            return
        try:
            self._write(key, pieces)
        except OSError as error:
            self._rest(error)

    def drop(self, key: str) -> None:
        """Removes an entry if it is there."""
        with suppress(OSError):  # one that stays is found damaged again, and counts as absent again
            self._path(key).unlink()

    def _path(self, key: str) -> Path:
        digest = hashlib.sha256(_MAGIC + key.encode()).hexdigest()
        return self._folder / digest[:2] / digest[2:40]

    def _write(self, key: str, content: Pieces) -> None:
        path, name = self._path(key), key.encode()
        head = _HEAD.pack(_MAGIC, _checksum(name, content), len(name), content.num_bytes) + name
        (self._folder / _DRAFTS).mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(exist_ok=True)
        draft, descriptor = locked_draft(self._folder / _DRAFTS)
        try:
            # its whole size shows before it is counted: who looks now must not miss it
            os.ftruncate(descriptor, len(head) + content.num_bytes)
            if not self._has_room(draft, len(head) + content.num_bytes):
                draft.unlink(missing_ok=True)
                return
            write_whole(descriptor, head)
            for piece in content.memory():
                write_whole(descriptor, piece)
            # not synced: an entry that a power cut left incomplete has a wrong checksum
            draft.replace(path)
        except OSError:
            draft.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)

    def _has_room(self, draft: Path, num_bytes: int) -> bool:
        """Whether a draft of so many bytes may become an entry; makes room where there is little. It is counted then."""
        taken = -(-num_bytes // _BLOCK_BYTES) * _BLOCK_BYTES
        with self._counting:
            looks, self._looks_first = self._looks_first, False  # one thread looks, and the others go on
        if not looks and self._count(taken, int(self._limit_bytes * _FULL)):
            return True
        if not self._look(draft):
            with self._counting:
                self._looks_first |= looks
        return self._count(taken, self._limit_bytes)

    def _look(self, draft: Path) -> bool:
        """Finds out how many bytes are taken, and makes room if too many are. False where another process is at that."""
        descriptor = os.open(self._folder / _LOCK, os.O_CREAT | os.O_WRONLY, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_abandoned(self._folder / _DRAFTS)
            with self._total() as (before, change):
                if before is None:
                    before = self._limit_bytes  # unknown: nobody has room until it is found out
                    change(before)
            taken = self._evict(draft)
            with self._total() as (now, change):
                change(taken + max(0, (now or 0) - before))  # what others counted meanwhile may be in `taken`, too
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        return True

    def _evict(self, draft: Path) -> int:
        """Removes what was used longest ago if more than there should be is taken; how many bytes are, without the draft."""
        # drafts first: what becomes an entry meanwhile is counted twice, and nothing is missed
        drafts = sum(entry.num_bytes for entry in _files(self._folder / _DRAFTS) if entry.path != str(draft))
        entries = sorted(_entries(self._folder))
        taken = drafts + sum(entry.num_bytes for entry in entries)
        if taken <= self._limit_bytes * _FULL:
            return taken
        for entry in entries:
            if taken <= self._limit_bytes * _KEPT:
                break
            Path(entry.path).unlink(missing_ok=True)
            taken -= entry.num_bytes
        return taken

    def _count(self, num_bytes: int, limit_bytes: int) -> bool:
        """Adds to what is taken if it stays within the limit; whether it does."""
        try:
            with self._total() as (taken, change):
                has_room = taken is not None and taken + num_bytes <= limit_bytes
                if taken is not None and has_room:
                    change(taken + num_bytes)
        except BlockingIOError:
            return False
        return has_room

    @contextmanager
    def _total(self) -> Iterator[tuple[int | None, Callable[[int], None]]]:
        """How many bytes are taken, at most, and what changes that; None where nobody knows. Others wait meanwhile."""
        descriptor = os.open(self._folder / _TOTAL, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            _lock(descriptor, _TOTAL_SECONDS)
            content = os.pread(descriptor, _TOTAL_FORM.size, 0)
            magic, taken = _TOTAL_FORM.unpack(content) if len(content) == _TOTAL_FORM.size else (b"", 0)
            yield (
                taken if magic == _MAGIC else None,
                lambda changed: _put_total(descriptor, changed),
            )
        finally:
            os.close(descriptor)

    def _rest(self, error: OSError) -> None:
        self._rests_until = time.monotonic() + _REST_SECONDS
        self._warn(f"{self._folder} takes no new entries ({error})")

    def _warn(self, problem: str) -> None:
        with self._counting:
            already, self._has_warned = self._has_warned, True
        if not already:
            _logger.warning(
                "The local cache: %s. The run goes on without it. Make room or choose another data.cache_path.", problem
            )


class _Entry(NamedTuple):
    """A file of the cache; they sort by when they were used."""

    used_nanoseconds: int
    path: str
    num_bytes: int


def _entries(folder: Path) -> Iterator[_Entry]:
    """Every entry, of other versions too: they take room."""
    for part in folder.glob("[0-9a-f][0-9a-f]"):
        yield from _files(part)


def _files(folder: Path) -> Iterator[_Entry]:
    with suppress(FileNotFoundError), os.scandir(folder) as files:
        for file in files:
            with suppress(FileNotFoundError):  # another process just evicted it
                facts = file.stat(follow_symlinks=False)
                taken = max(facts.st_size, 512 * facts.st_blocks)
                yield _Entry(facts.st_mtime_ns, file.path, taken)


def _put_total(descriptor: int, taken: int) -> None:
    os.pwrite(descriptor, _TOTAL_FORM.pack(_MAGIC, taken), 0)


def _lock(descriptor: int, seconds: float) -> None:
    """Takes the lock on a file; BlockingIOError where another has it for so long."""
    until = time.monotonic() + seconds
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(0.001)


def _read(path: Path, name: bytes) -> bytearray | None:
    """An entry's content; None where it is damaged."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        head = os.pread(descriptor, _HEAD.size + len(name), 0)
        if len(head) < _HEAD.size + len(name) or head[_HEAD.size :] != name:
            return None
        magic, checksum, name_bytes, num_bytes = _HEAD.unpack_from(head)
        if (magic, name_bytes, len(head) + num_bytes) != (_MAGIC, len(name), os.fstat(descriptor).st_size):
            return None
        content = bytearray(num_bytes)
        if (
            os.preadv(descriptor, [content], len(head)) != num_bytes
            or _checksum(name, Pieces([memoryview(content)])) != checksum
        ):
            return None
        with suppress(OSError):  # of a cache that may only be read, somebody else keeps the order of use
            os.utime(descriptor)  # the time of the last use; disks are mounted so that reading alone leaves none
        return content
    finally:
        os.close(descriptor)


def _checksum(name: bytes, content: Pieces) -> int:
    found = crc32c(name)
    for piece in content.memory():
        found = crc32c(piece, found)
    return found
