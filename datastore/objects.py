"""Objects below one URL, on local disk or in an object store: each is read and put whole, or created once.

A name is a path below the URL, with slashes. A put is atomic: whoever reads sees the old object, the new one or none,
even when the writer is killed. `create` is how processes agree: of many that create the same name, one wins.
"""

import errno
import fcntl
import mmap
import os
import re
import shutil
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Final, TypeGuard

import fsspec
from botocore.exceptions import BotoCoreError, NoCredentialsError  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from datastore.errors import AskedWrongly, DoNotRetry, StoreError, Unavailable

BOOKKEEPING_FOLDER: Final = "_viewpoint"
"""Below a store's URL, what is no zarr: drafts, commit records, manifests."""

DRAFTS_FOLDER: Final = f"{BOOKKEEPING_FOLDER}/drafts"
"""Where local objects are written before they are moved to their place; below the root, so that it is the same disk."""

_PROTOCOL_ALONE: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/*")
_DISK_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_HARD_LINKS: Final = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_CONFLICT, _PRECONDITION_FAILED, _INSUFFICIENT_STORAGE = 409, 412, 507  # of HTTP
_REFUSED: Final = (401, 403)
_CREATE_ATTEMPTS: Final = 5
_LARGEST_S3_PUT: Final = 5 * 2**30
_LARGEST_COPY: Final = 100 * 2**20  # above it s3fs uploads in parts
_DIRECT: Final = getattr(os, "O_DIRECT", 0)  # Linux
_LEAST_DIRECT: Final = 2**24  # bytes
_DIRECT_REQUEST: Final = 2**23  # bytes; a multiple of every block size
_NOT_DIRECT: Final = (errno.EINVAL, errno.EOPNOTSUPP)
_CREATING_IN_MEMORY: Final = threading.Lock()
"""fsspec's file system in memory looks and then writes: two threads could both find nothing."""


class ObjectFolder:
    """The objects below one URL."""

    def __init__(self, url: str | os.PathLike[str]) -> None:
        given = os.fspath(url)
        if not given.strip() or _PROTOCOL_ALONE.fullmatch(given):
            said = f"{given} names no bucket, server or folder" if given.strip() else "An empty name was given"
            raise DoNotRetry(f"{said}. Use a local path, s3://BUCKET/PATH or https://SERVER/PATH.")
        self.url = given.rstrip("/") or "/"

    @cached_property
    def _filesystem(self) -> fsspec.AbstractFileSystem:
        return self._resolved[0]

    @cached_property
    def root(self) -> str:
        """The URL without its protocol, as fsspec names it."""
        return str(self._resolved[1]).rstrip("/")

    @cached_property
    def _resolved(self) -> tuple[fsspec.AbstractFileSystem, str]:
        options: dict[str, object] = {}
        if self.url.startswith(("s3:", "s3a:")):
            # signed URLs are of the older form by default, which newer buckets and several servers do not take
            configured = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
            options["config_kwargs"] = {"signature_version": "s3v4"} | configured
        try:
            # other processes write here at the same time: a remembered listing would be a wrong one
            filesystem, path = fsspec.core.url_to_fs(self.url, use_listings_cache=False, **options)
        except ImportError as error:
            raise DoNotRetry(
                f"{self.url}: {error}. Install that package, or use a local path or an s3:// URL."
            ) from error
        except ValueError as error:
            raise AskedWrongly(f"{self.url}: {error}. Use a local path, s3://BUCKET/PATH or memory://NAME.") from error
        return filesystem, path

    @property
    def is_local(self) -> bool:
        """Whether the folder lies on this machine's disk."""
        return isinstance(self._filesystem, LocalFileSystem)

    @property
    def _is_memory(self) -> bool:
        return isinstance(self._filesystem, MemoryFileSystem)

    @property
    def _in_one_request(self) -> dict[str, int]:
        """What keeps s3fs from asking for an object's size before its content."""
        return {"max_concurrency": 1} if "s3" in self._filesystem.protocol else {}

    @property
    def local_path(self) -> Path:
        """The folder as a path; only where `is_local`."""
        assert self.is_local, f"{self.url} is not on a local disk"
        return Path(self.root)

    def read(self, name: str) -> bytes:
        """One object's content; FileNotFoundError where there is none."""
        with self._explained(name):
            content: bytes = self._filesystem.cat_file(self._path(name), **self._in_one_request)
        return content

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """The bytes of one object from `start` up to, not including, `end`; fewer where the object is shorter."""
        with self._explained(name):
            content: bytes = self._filesystem.cat_file(self._path(name), start=start, end=end)
        return content

    def signed_url(self, name: str, seconds: int) -> str | None:
        """A URL that reads one object by plain HTTP for so long; None where this kind of storage has none."""
        try:
            with self._explained(name):
                url = str(self._filesystem.sign(self._path(name), expiration=seconds))
        except NotImplementedError:
            return None
        return url if url.startswith(("http://", "https://")) else None

    def read_all(self, names: Sequence[str]) -> dict[str, bytes]:
        """The content of those objects that exist, many requests at a time where that is possible."""
        if not names:
            return {}
        paths = {self._path(name): name for name in names}
        contents: dict[str, bytes] = {}
        with self._explained(names[0]):
            found = self._filesystem.cat(list(paths), on_error="return")
            if isinstance(found, bytes):  # fsspec gives the bare content for a list of one on some file systems
                found = {next(iter(paths)): found}
            for path, content in found.items():
                if isinstance(content, FileNotFoundError):
                    continue
                if isinstance(content, BaseException):
                    raise content
                contents[paths[path]] = content
        return contents

    def size(self, name: str) -> int | None:
        """Bytes of one object; None where there is none."""
        # not `isfile`, which takes every failure, a refused access too, for an absent object
        with self._explained(name), suppress(FileNotFoundError, NotADirectoryError):
            facts = self._filesystem.info(self._path(name))
            return int(facts["size"]) if facts["type"] == "file" else None
        return None

    def exists(self, name: str) -> bool:
        """Whether there is such an object."""
        return self.size(name) is not None

    def names(self, folder: str = "") -> list[str]:
        """Last parts of the names right below a folder, sorted; empty where there is no such folder."""
        path = self._path(folder)
        self._filesystem.invalidate_cache(path)
        try:
            with self._explained(folder):
                found = self._filesystem.ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = {str(entry).rstrip("/").rpartition("/")[2] for entry in found if str(entry).rstrip("/") != path}
        return sorted(names - {""})

    def listed(self, folder: str = "") -> dict[str, str | None]:
        """Names of the objects right below a folder, and the MD5 of each one's content where the listing tells it.

        S3 tells it of what was put in one request without encryption by key; another digest only matches nothing.
        """
        path = self._path(folder)
        self._filesystem.invalidate_cache(path)
        try:
            with self._explained(folder):
                found = self._filesystem.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return {
            str(entry["name"]).rpartition("/")[2]: str(entry["ETag"]).strip('"') if "ETag" in entry else None
            for entry in found
            if entry["type"] == "file"
        }

    def pieces(self, name: str, piece_bytes: int) -> Iterator[bytes]:
        """One object's content, a piece at a time; FileNotFoundError where there is none."""
        with self._explained(name), self._filesystem.open(self._path(name), "rb", block_size=piece_bytes) as file:
            while piece := file.read(piece_bytes):
                yield piece

    def put(self, name: str, content: bytes | mmap.mmap) -> None:
        """Writes one object whole, in place of what was there. It is on disk when this returns.

        Mapped memory is taken a part at a time: a large object is not copied first.
        """
        if self.is_local:
            self._put_local(name, content, only_if_absent=False)
            return
        with self._explained_put(name, content):
            # what is small goes in one request, for which s3fs takes bytes alone
            whole = content[:] if len(content) < _LARGEST_COPY else content
            self._filesystem.pipe_file(self._path(name), whole)

    def create(self, name: str, content: bytes) -> bool:
        """Writes one object whole if there is none of that name; whether it did.

        False can also mean that it did and the answer was lost: the request was repeated and found its own object.
        """
        if self.is_local:
            return self._put_local(name, content, only_if_absent=True)
        # several S3 servers ignore the condition on what comes in parts, so s3fs must send it in one request
        whole = {"chunksize": _LARGEST_S3_PUT} if "s3" in self._filesystem.protocol else {}
        for _ in range(_CREATE_ATTEMPTS):
            try:
                with self._explained_put(name, content), _CREATING_IN_MEMORY if self._is_memory else nullcontext():
                    self._filesystem.pipe_file(self._path(name), content, mode="create", **whole)
            except FileExistsError:
                return False
            except OSError as error:
                status = http_status(error)
                if status == _PRECONDITION_FAILED:
                    return False
                if status != _CONFLICT:
                    raise
                time.sleep(0.1)  # another create of this name is under way: see who won
            else:
                return True
        if self.exists(name):
            return False
        raise DoNotRetry(
            f"{self.url}/{name} could not be created: the server reported a conflict {_CREATE_ATTEMPTS} times."
        )

    def remove(self, name: str) -> None:
        """Removes one object if it is there."""
        with suppress(FileNotFoundError), self._explained(name):
            self._filesystem.rm_file(self._path(name))

    def remove_abandoned_drafts(self) -> None:
        """Removes what killed writers left half written. Drafts of living writers stay: those hold a lock on them."""
        if not self.is_local:
            return
        remove_abandoned(self.local_path / DRAFTS_FOLDER)

    def remove_unfinished_uploads(self, is_abandoned: Callable[[str], bool]) -> None:
        """Gives up uploads in parts that nobody finishes: S3 keeps, and bills, the parts of killed writers unseen."""
        if "s3" not in self._filesystem.protocol:
            return
        bucket, _, path = self.root.partition("/")
        prefix = f"{path}/" if path else ""
        with self._explained(""):
            for upload in self._filesystem.list_multipart_uploads(bucket):
                key = str(upload["Key"])
                if key.startswith(prefix) and is_abandoned(key.removeprefix(prefix)):
                    with suppress(FileNotFoundError):  # it was finished or given up in this moment
                        self._filesystem.abort_mpu(bucket, key, upload["UploadId"])

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root or "/"

    def _put_local(self, name: str, content: bytes | mmap.mmap, *, only_if_absent: bool) -> bool:
        path = self.local_path / name
        drafts = self.local_path / DRAFTS_FOLDER
        with self._explained_put(name, content):
            drafts.mkdir(parents=True, exist_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            draft, descriptor = locked_draft(drafts)
            try:
                if isinstance(content, mmap.mmap):
                    write_mapped(descriptor, content)
                else:
                    write_whole(descriptor, content)
                # the commit record must not reach the disk before the shards that it vouches for
                os.fsync(descriptor)
                if not only_if_absent:
                    draft.replace(path)
                else:
                    try:
                        path.hardlink_to(draft)
                    except FileExistsError:
                        return False
                    except OSError as error:
                        if error.errno not in _NO_HARD_LINKS:
                            raise
                        raise DoNotRetry(
                            f"{self.url} lies on a file system without hard links ({error.strerror}), and writers "
                            f"agree on finished work by them. Use a local disk, a network file system with hard "
                            f"links, or an s3:// URL instead of a mounted bucket."
                        ) from error
                _sync_folder(path.parent)
            finally:
                draft.unlink(missing_ok=True)
                os.close(descriptor)
        return True

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Turns a refused access and an unreachable server into errors that say how to go on."""
        where = f"{self.url}/{name}" if name else self.url
        try:
            yield
        except PermissionError as error:
            raise StoreError(
                f"Access to {where} is refused ({error}). Check the permissions, or the credentials in the environment."
            ) from error
        except NoCredentialsError as error:
            raise StoreError(
                f"There are no credentials for {where}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                f"AWS_PROFILE; a public bucket is read with FSSPEC_S3_ANON=true."
            ) from error
        except BotoCoreError as error:
            raise Unavailable(
                f"{where} cannot be reached: {error}. Check the network, and AWS_ENDPOINT_URL if the server is not "
                f"Amazon's; then run the same command again."
            ) from error
        except _http_errors() as error:
            if http_status(error) in _REFUSED:
                raise StoreError(
                    f"Access to {where} is refused ({error}). The server wants to know who asks."
                ) from error
            raise Unavailable(
                f"{where} cannot be read: {error or type(error).__name__}. Check the address, and whether the server runs "
                f"and the network reaches it; then run the same command again."
            ) from error
        except ValueError as error:
            if "Invalid endpoint" not in str(error):
                raise
            raise StoreError(
                f"{where} cannot be asked for: {error}. An endpoint (AWS_ENDPOINT_URL) begins with http:// or https://."
            ) from error

    @contextmanager
    def _explained_put(self, name: str, content: bytes | mmap.mmap) -> Iterator[None]:
        """Also turns a full disk and a missing bucket into such errors."""
        try:
            with self._explained(name):
                yield
        except OSError as error:
            if error.errno in _DISK_FULL or http_status(error) == _INSUFFICIENT_STORAGE:
                free = f"{_free_bytes(self.local_path):,} are free" if self.is_local else "the server has no room"
                raise DoNotRetry(
                    f"No room for {self.url}/{name} ({len(content):,} bytes; {free}): {error.strerror}. What was "
                    f"committed is safe. Make room, or raise the quota or file size limit, and run the same command "
                    f"again: it goes on where it stopped."
                ) from error
            if isinstance(error, FileNotFoundError) and not self.is_local:
                raise StoreError(f"{self.url}/{name} cannot be written: {error}. Create the bucket first.") from error
            raise


def locked_draft(folder: Path) -> tuple[Path, int]:
    """A new empty file, and its descriptor holding a lock that ends with this process, however it ends."""
    while True:
        path = folder / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:  # else a cleaner came between the two calls and took it for abandoned
            return path, descriptor
        os.close(descriptor)


def remove_abandoned(drafts: Path) -> None:
    """Removes the drafts in a folder whose writers have ended: nobody holds the lock on them."""
    for path in drafts.glob("*"):
        with suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _free_bytes(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def write_whole(descriptor: int, content: bytes | memoryview | mmap.mmap) -> None:
    """Writes all of it; the system may take less at a time."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def write_mapped(descriptor: int, content: mmap.mmap) -> None:
    """Writes all of it, past the page cache where it is large and the file system can do that.

    Whoever maps this memory trains on meanwhile: the copy into the cache would take processor time (0.3 to 1.2 s for
    600 MB, against 0.03 s without it) and memory bandwidth from that, and the cache from what training reads.
    """
    view = memoryview(content)
    written, aligned = 0, len(view) - len(view) % mmap.PAGESIZE
    if _DIRECT and len(view) >= _LEAST_DIRECT:
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | _DIRECT)
            while written < aligned and written % mmap.PAGESIZE == 0:  # a short write may end within a block
                written += os.write(descriptor, view[written : min(written + _DIRECT_REQUEST, aligned)])
        except OSError as error:
            if error.errno not in _NOT_DIRECT:
                raise
        finally:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    write_whole(descriptor, view[written:])


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _http_errors() -> tuple[type[BaseException], ...]:
    """How a plain HTTP server's silence is raised: by aiohttp, which is imported where such a server is asked."""
    aiohttp = sys.modules.get("aiohttp")
    return () if aiohttp is None else (aiohttp.ClientError,)


def http_status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error: servers differ in the exception that a refusal becomes, not in the status."""
    while error is not None:
        response = getattr(error, "response", None)
        if _is_mapping(response):
            metadata = response.get("ResponseMetadata")
            if _is_mapping(metadata) and isinstance(metadata.get("HTTPStatusCode"), int):
                return int(str(metadata["HTTPStatusCode"]))
        for attribute in ("status", "status_code", "code"):
            value = getattr(error, attribute, None)
            if isinstance(value, int):
                return value
        error = error.__cause__ or error.__context__
    return None


def _is_mapping(value: object) -> TypeGuard[dict[str, object]]:
    return isinstance(value, dict)
