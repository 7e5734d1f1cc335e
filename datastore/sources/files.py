"""Files below a source's URL, on a local disk or behind any fsspec URL: read only, and listed in one fixed order."""

import io
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final

import fsspec
from fsspec.implementations.local import LocalFileSystem

from datastore.errors import AskedWrongly, DoNotRetry, SourceError, ViewpointError

_LEFT_BY_ARCHIVERS: Final = (".", "__MACOSX")  # what such names begin with is no data
_READ_AHEAD_BYTES: Final = 2**20  # of a remote file; what fsspec takes unasked, 50 MiB, is a hundred shapes


@dataclass(frozen=True, slots=True)
class File:
    """One file: its path below the root, with slashes, and its size."""

    path: str
    size: int


class SourceFiles:
    """What lies at a URL: a folder, or a single file, whose root is then the folder around it. It pickles as its URL.

    To be kept for as long as files are read: a new one asks the server anew what the URL names. What concerns one file
    is a SourceError. A server that does not answer, or no longer lets us in, is another error: it concerns every file,
    and no shape shall be left out because of it.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = os.fspath(url).rstrip("/") or "/"

    def __reduce__(self) -> tuple[Any, ...]:
        return SourceFiles, (self.url,)

    @property
    def is_folder(self) -> bool:
        """Whether the URL names a folder."""
        return bool(self._filesystem.isdir(self._target))

    @cached_property
    def single_file(self) -> str | None:
        """The name of the file that the URL names; None where it names a folder or nothing."""
        return PurePosixPath(self._target).name if self._filesystem.isfile(self._target) else None

    @cached_property
    def root(self) -> str:
        """The folder, as fsspec names it."""
        return str(PurePosixPath(self._target).parent) if self.single_file else self._target

    def exists(self, path: str) -> bool:
        """Whether there is a file or folder of that path."""
        return bool(self._filesystem.exists(self._full(path)))

    def entries(self, folder: str = "") -> list[str]:
        """Names right below a folder, sorted, hidden ones aside; empty where there is no such folder."""
        return self._entries(folder) if folder else self._top

    @cached_property
    def _top(self) -> list[str]:
        # every format has a look at it, and there may be a million files
        return self._entries("")

    def _entries(self, folder: str) -> list[str]:
        try:
            found = self._filesystem.ls(self._full(folder), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = {str(entry).rstrip("/").rpartition("/")[2] for entry in found}
        return sorted(name for name in names if name and not name.startswith(_LEFT_BY_ARCHIVERS))

    def walk(self, suffixes: Collection[str], folder: str = "") -> list[File]:
        """Every file below a folder whose name ends in one of the suffixes (in any case), sorted by path."""
        wanted = tuple(suffix.lower() for suffix in suffixes)
        files = []
        for full, size in self._everything_below(self._full(folder)):
            path = full[len(self.root) :].lstrip("/")
            hidden = any(part.startswith(_LEFT_BY_ARCHIVERS) for part in path.split("/"))
            if path.lower().endswith(wanted) and not hidden:
                files.append(File(path, size))
        return sorted(files, key=lambda file: file.path)

    def _everything_below(self, top: str) -> Iterator[tuple[str, int]]:
        """Full path and size of every file."""
        if not self._filesystem.isdir(top):
            return
        if self.is_local:
            yield from _local_files(top, ())
            return
        for full, facts in self._filesystem.find(top, withdirs=False, detail=True).items():
            yield str(full), int(facts["size"])
        self._filesystem.invalidate_cache()  # it would keep kilobytes of each of a million files

    def size(self, path: str) -> int:
        """Bytes of one file."""
        with self._explained(path):
            return int(self._filesystem.size(self._full(path)))

    def read(self, path: str) -> bytes:
        """One file, whole."""
        # s3fs asks for the size first, to fetch large files in parts: of small ones, that is every second request
        in_one_request = {"max_concurrency": 1} if "s3" in self._filesystem.protocol else {}
        with self._explained(path):
            content: bytes = self._filesystem.cat_file(self._full(path), **in_one_request)
        return content

    def read_range(self, path: str, start: int, length: int) -> bytes:
        """A part of one file; less where the file ends before."""
        with self._explained(path):
            content: bytes = self._filesystem.cat_file(self._full(path), start=start, end=start + length)
        return content

    def text(self, path: str) -> str:
        """One file as UTF-8 text."""
        try:
            return self.read(path).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise SourceError(f"{self.where(path)} is not UTF-8 text ({error}).") from error

    def lines(self, path: str) -> list[str]:
        """The lines of a text file, without blanks around them and without empty ones."""
        return [line for line in (line.strip() for line in self.text(path).splitlines()) if line]

    def open(self, path: str) -> IO[bytes]:
        """One file, open for reading and seeking: on a local disk the file itself, elsewhere by ranged requests."""
        with self._explained(path):
            file: IO[bytes] = self._filesystem.open(self._full(path), "rb", block_size=_READ_AHEAD_BYTES)
        return file

    def open_whole(self, path: str) -> IO[bytes]:
        """The same for readers that jump about: a remote file is fetched first."""
        if self.is_local:
            return self.open(path)
        with self._explained(path):
            return io.BytesIO(self._filesystem.cat_file(self._full(path)))

    @property
    def is_local(self) -> bool:
        """Whether the files lie on this machine's disk."""
        return isinstance(self._filesystem, LocalFileSystem)

    def local_path(self, path: str) -> Path:
        """A file's path; only where `is_local`."""
        assert self.is_local, f"{self.url} is not on a local disk"
        return Path(self._full(path))

    def where(self, path: str) -> str:
        """A file's name for messages."""
        base = f"{self.url}/" if self.single_file is None else self.url.removesuffix(self.single_file)
        return f"{base}{path}" if path else base.rstrip("/")

    def describe(self) -> str:
        """A sentence about what is there, for somebody who expected something else."""
        if self.single_file is not None:
            return "this is a file; a source is the folder that holds the shapes, or an index in .csv or .json."
        if not self.is_folder:
            if not self.is_local:
                return "nothing is there."
            path = Path(self._target)
            parent = next(parent for parent in path.absolute().parents if parent.exists())
            return f"nothing is there (the path exists up to {parent})."
        names = self.entries()
        if not names:
            return "the folder is empty."
        more = f" and {len(names) - 6} more" if names[6:] else ""
        return f"no known format; the folder holds {', '.join(names[:6])}{more}."

    @contextmanager
    def _explained(self, path: str) -> Iterator[None]:
        """Turns what file systems raise into errors that say whether one file is concerned, or all."""
        try:
            yield
        except FileNotFoundError:
            raise SourceError(f"{self.where(path)} is missing.") from None
        except IsADirectoryError as error:
            raise SourceError(f"{self.where(path)} cannot be read: {error}.") from error
        except PermissionError as error:
            if self.is_local:
                raise SourceError(f"{self.where(path)} cannot be read: {error}.") from error
            raise DoNotRetry(
                f"Access to {self.where(path)} is refused ({error}). Check the credentials in the environment, which may "
                f"have expired; then run the same command again: it goes on where it stopped."
            ) from error
        except MemoryError:
            raise
        except Exception as error:  # each kind of server breaks a connection with errors of its own
            if not self.is_local:
                raise ViewpointError(
                    f"{self.where(path)} cannot be reached: {type(error).__name__}: {error}. Check the network; then run "
                    f"the same command again: it goes on where it stopped."
                ) from error
            if isinstance(error, OSError):
                raise SourceError(f"{self.where(path)} cannot be read: {error}.") from error
            raise

    def _full(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root

    @property
    def _filesystem(self) -> fsspec.AbstractFileSystem:
        return self._resolved[0]

    @property
    def _target(self) -> str:
        return self._resolved[1]

    @cached_property
    def _resolved(self) -> tuple[fsspec.AbstractFileSystem, str]:
        try:
            filesystem, path = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            raise SourceError(f"{self.url}: {error}. Install that package, or copy the files here.") from error
        except ValueError as error:
            raise AskedWrongly(f"{self.url}: {error}. Name a local path or a URL such as s3://BUCKET/PATH.") from error
        return filesystem, str(path).rstrip("/") or "/"


def _local_files(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, int]]:
    """Path and size of each file below a folder. Links are followed, but for those that lead back up."""
    facts = Path(folder).stat()
    if (facts.st_dev, facts.st_ino) in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _local_files(entry.path, (*above, (facts.st_dev, facts.st_ino)))
            elif entry.is_file():
                yield entry.path, entry.stat().st_size
            elif entry.is_symlink():
                yield entry.path, 0  # to nowhere: listed, so that its shape is missed
