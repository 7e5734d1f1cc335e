"""Ranges of remote objects kept on this node's disk: bounded, and shared by all of its processes.

An entry is a file of its own, named for its key. It is written beside its place and moved there, so a reader finds it
whole or not at all, and no reader takes a lock. It says which key it holds and carries a checksum, which is verified at
every use: what a dying disk or a careless hand changed is dropped and counts as absent.

Nobody counts what all processes put. Each looks through the folder after every 64th of the bound that it put itself, and
if more than seven eighths are used, the entries that were used longest ago go. That leaves room for what eight processes
put between two looks. Only this looking takes a lock, and who finds it taken keeps its bytes to itself this time.

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
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

import google_crc32c

from datastore.objects import locked_draft, remove_abandoned, write_whole

_MAGIC: Final = b"VPRANGE1"  # another layout of entries is another number
_HEAD: Final = struct.Struct("<8sIIQ")  # magic, checksum of key and content, bytes of the key, bytes of the content
_DRAFTS: Final = "drafts"
_LOCK: Final = "eviction.lock"
_LOOKS: Final = 64  # parts of the bound that a process puts between two looks
_FULL: Final = 7 / 8  # of the bound: entries go from here
_KEPT: Final = 3 / 4  # down to here, so that not every look evicts
_LARGEST: Final = 8  # an entry takes an eighth of the bound at most
_REST_SECONDS: Final = 300.0  # without new entries after a disk refused one
_PIECE_BYTES: Final = 2**20

_logger = logging.getLogger("datastore.disk_cache")


class DiskCache:
    """Contents by key. Threads and processes share it."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.hits = 0
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._unseen_bytes = limit_bytes  # put since this process last looked through the folder: the first put looks
        self._counting = threading.Lock()
        self._rests_until = 0.0
        self._has_warned = False
        try:
            (folder / _DRAFTS).mkdir(parents=True, exist_ok=True)
            remove_abandoned(folder / _DRAFTS)
        except OSError as error:
            self._rest(error)

    def get(self, key: str) -> bytes | None:
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

    def put(self, key: str, content: bytes | bytearray | memoryview) -> None:
        """Keeps it for now; where that fails, says so once and goes on."""
        if len(content) > self._limit_bytes // _LARGEST or time.monotonic() < self._rests_until:
            return
        with self._counting:
            self._unseen_bytes += len(content)
            looks = self._unseen_bytes >= self._limit_bytes // _LOOKS
            if looks:
                self._unseen_bytes = 0  # one thread looks, and the others go on
        try:
            if looks:
                self._look_and_write(key, memoryview(content))
            else:
                self._write(key, memoryview(content))
        except OSError as error:
            self._rest(error)

    def drop(self, key: str) -> None:
        """Removes an entry if it is there."""
        with suppress(OSError):  # one that stays is found damaged again, and counts as absent again
            self._path(key).unlink()

    def _path(self, key: str) -> Path:
        digest = hashlib.sha256(_MAGIC + key.encode()).hexdigest()
        return self._folder / digest[:2] / digest[2:40]

    def _write(self, key: str, content: memoryview) -> None:
        path, name = self._path(key), key.encode()
        (self._folder / _DRAFTS).mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(exist_ok=True)
        draft, descriptor = locked_draft(self._folder / _DRAFTS)
        try:
            write_whole(descriptor, _HEAD.pack(_MAGIC, _checksum(name, content), len(name), len(content)) + name)
            write_whole(descriptor, content)
            # not synced: an entry that a power cut left incomplete has a wrong checksum
            draft.replace(path)
        except OSError:
            draft.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)

    def _look_and_write(self, key: str, content: memoryview) -> None:
        """Makes room first; does nothing where another process is at that."""
        descriptor = os.open(self._folder / _LOCK, os.O_CREAT | os.O_WRONLY, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_abandoned(self._folder / _DRAFTS)
            self._evict(len(content))
            self._write(key, content)
        except BlockingIOError:
            with self._counting:
                self._unseen_bytes += self._limit_bytes // _LOOKS  # the next put looks
        finally:
            os.close(descriptor)

    def _evict(self, num_bytes: int) -> None:
        """Removes what was used longest ago, if there is not room enough for so many bytes."""
        entries = sorted(_entries(self._folder))
        total_bytes = num_bytes + sum(entry.num_bytes for entry in entries)
        if total_bytes <= self._limit_bytes * _FULL:
            return
        for entry in entries:
            if total_bytes <= self._limit_bytes * _KEPT:
                return
            Path(entry.path).unlink(missing_ok=True)
            total_bytes -= entry.num_bytes

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
        with suppress(FileNotFoundError), os.scandir(part) as files:
            for file in files:
                with suppress(FileNotFoundError):  # another process just evicted it
                    facts = file.stat(follow_symlinks=False)
                    taken = max(facts.st_size, 512 * facts.st_blocks)
                    yield _Entry(facts.st_mtime_ns, file.path, taken)


def _read(path: Path, name: bytes) -> bytes | None:
    """An entry's content; None where it is damaged."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        head = os.pread(descriptor, _HEAD.size + len(name), 0)
        if len(head) < _HEAD.size + len(name) or head[_HEAD.size :] != name:
            return None
        magic, checksum, name_bytes, num_bytes = _HEAD.unpack_from(head)
        if (magic, name_bytes, len(head) + num_bytes) != (_MAGIC, len(name), os.fstat(descriptor).st_size):
            return None
        content = os.pread(descriptor, num_bytes, len(head))
        if len(content) != num_bytes or google_crc32c.extend(google_crc32c.value(name), content) != checksum:
            return None
        with suppress(OSError):  # of a cache that may only be read, somebody else keeps the order of use
            os.utime(descriptor)  # the time of the last use; disks are mounted so that reading alone leaves none
        return content
    finally:
        os.close(descriptor)


def _checksum(name: bytes, content: memoryview) -> int:
    checksum = int(google_crc32c.value(name))
    for start in range(0, len(content), _PIECE_BYTES):  # it takes nothing but bytes: copied a piece at a time
        checksum = int(google_crc32c.extend(checksum, bytes(content[start : start + _PIECE_BYTES])))
    return checksum
