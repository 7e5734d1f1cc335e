"""Point clouds in HDF5: `data`, `label` and arrays beside them, one row a shape. Opened for reading only, never whole.

Files are read through file objects, so that nothing is locked: archives on read-only disks and network file systems
are fine. A remote file is fetched once a process.
"""

import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final
from weakref import finalize

import h5py
import numpy as np
from jaxtyping import Int64

from datastore.errors import SourceError
from datastore.sources import ReadingOptions, ShapeError
from datastore.sources.files import SourceFiles

_CHUNK_CACHE: Final = {"rdcc_nbytes": 32 * 2**20, "rdcc_nslots": 10_007}
"""Chunks of these data sets span a hundred rows and more: with the default of 1 MiB each row would decompress them anew."""

_SCALAR_KINDS: Final = "fiu"


@dataclass(frozen=True)
class CloudFile:
    """What is known of one file without reading its clouds."""

    path: str
    labels: Int64[np.ndarray, " n"]
    num_points: int
    arrays: frozenset[str]  # those beside `data` and `label`, of those looked for
    content: str  # its size and the checksum of its first cloud


def numbered_files(files: SourceFiles, split: str, list_file: str, options: ReadingOptions) -> list[str]:
    """`ply_data_<split>0.h5` and so on by number; where the data set's own list is there, it says which there must be.

    Disks list files in any order, and most readers of these data sets take them so: their rows have no fixed order.
    """
    named = re.compile(rf"ply_data_{split}(\d+)\.h5")
    matches = [match for match in map(named.fullmatch, files.entries()) if match]
    present = [match.string for match in sorted(matches, key=lambda match: int(match[1]))]
    if not files.exists(list_file):
        return present
    # the list holds paths of the repository that it was made in
    listed = {PurePosixPath(line).name for line in files.lines(list_file)}
    missing = sorted(listed - set(present))
    if missing and not options.partial:
        raise SourceError(
            f"{files.where(missing[0])} is missing, and {list_file} lists it. Fetch it, or say --partial to take what is there."
        )
    return [name for name in present if name in listed]


def look_at_clouds(
    files: SourceFiles,
    path: str,
    *,
    num_classes: int,
    beside: Mapping[str, tuple[int, ...]],
    required: Sequence[str] = (),
) -> CloudFile:
    """The facts of a file whose `data` is (n, p, 3) and whose `label` is (n, 1) or (n,).

    `beside` names arrays (n, p, ...) with what follows p. SourceError where shapes or types are others, arrays disagree
    in length, a required one is missing, or a label is out of range.
    """
    where = files.where(path)
    with _open(files, path) as file:
        data = _array(file, "data", where)
        num_rows, num_points = data.shape[:2] if data.ndim == 3 else (0, 0)
        _require_shape(data, (num_rows, num_points, 3), where, "(n, p, 3)")
        if num_rows == 0 or num_points == 0:
            raise SourceError(f"{where}: array 'data' is empty, {data.shape}. Fetch the file again.")
        label = _array(file, "label", where)
        if label.shape not in ((num_rows,), (num_rows, 1)):
            raise SourceError(
                f"{where}: array 'label' is {label.shape}, and 'data' has {num_rows:,} rows. Both come from one file; fetch it again."
            )
        found = [name for name in beside if name in file]
        if missing := [name for name in required if name not in file]:
            raise SourceError(f"{where} has no array {', '.join(missing)}; it holds {', '.join(sorted(file))}.")
        for name in found:
            _require_shape(
                _array(file, name, where), (num_rows, num_points, *beside[name]), where, "one value a point of 'data'"
            )
        try:
            labels = np.asarray(label[...]).reshape(num_rows)
            first_cloud = np.ascontiguousarray(data[0])
        except OSError as error:
            raise SourceError(f"{where} is damaged ({error}). Fetch it again.") from error
    if not (np.isfinite(labels) & (labels == np.floor(labels)) & (labels >= 0) & (labels < num_classes)).all():
        raise SourceError(
            f"{where}: labels are whole numbers from 0 to {num_classes - 1}, a class each, and these reach from {labels.min()} to "
            f"{labels.max()}. The file belongs to another data set, or is damaged."
        )
    content = f"{path}:{files.size(path)}:{zlib.crc32(first_cloud.tobytes()):08x}"
    return CloudFile(path, labels.astype(np.int64), num_points, frozenset(found), content)


def common_num_points(found: Sequence[CloudFile], files: SourceFiles) -> int:
    """How many points each cloud of all files has. SourceError where files disagree."""
    first = found[0]
    for file in found:
        if file.num_points != first.num_points:
            raise SourceError(
                f"{files.where(file.path)} has clouds of {file.num_points:,} points, and {first.path} of {first.num_points:,}. "
                f"They belong to different data sets: keep those of one."
            )
    return first.num_points


class RowReader:
    """Rows of the files of one source. The file read last stays open in this process, for rows that share its chunks."""

    def __init__(self, files: SourceFiles) -> None:
        self._files = files
        self._path: str | None = None
        self._arrays: dict[str, h5py.Dataset] = {}  # an array that is closed forgets its chunks
        self._opened = ExitStack()
        finalize(self, self._opened.close)

    def __reduce__(self) -> tuple[Any, ...]:
        return RowReader, (self._files,)

    def row(self, path: str, row: int, names: Sequence[str]) -> list[np.ndarray]:
        """That row of each array. ShapeError where it cannot be read."""
        try:
            if self._path != path:
                self._reopen(path)
            return [np.asarray(self._arrays[name][row]) for name in names]
        except (OSError, LookupError, ValueError) as error:
            where = self._files.where(path)
            raise ShapeError(f"{where}, row {row} cannot be read ({error}). Fetch the file again") from error
        except SourceError as error:
            raise ShapeError(str(error).rstrip(".")) from error

    def _reopen(self, path: str) -> None:
        self._path, self._arrays = None, {}
        self._opened.close()
        file = self._opened.enter_context(_open(self._files, path))
        self._arrays = {name: array for name, array in file.items() if isinstance(array, h5py.Dataset)}
        self._path = path


@contextmanager
def _open(files: SourceFiles, path: str) -> Iterator[h5py.File]:
    with files.open_whole(path) as stream:
        try:
            file = h5py.File(stream, "r", **_CHUNK_CACHE)
        except OSError as error:
            raise SourceError(
                f"{files.where(path)} is no HDF5 file, or only a part of one ({error}). Fetch it again."
            ) from error
        with file:
            yield file


def _array(file: h5py.File, name: str, where: str) -> h5py.Dataset:
    found = file.get(name)
    if not isinstance(found, h5py.Dataset):
        raise SourceError(f"{where} has no array '{name}'; it holds {', '.join(sorted(file)) or 'nothing'}.")
    if found.dtype.kind not in _SCALAR_KINDS:
        raise SourceError(f"{where}: array '{name}' is of {found.dtype}, and numbers are needed.")
    return found


def _require_shape(found: h5py.Dataset, shape: tuple[int, ...], where: str, meaning: str) -> None:
    if found.shape != shape:
        name = found.name.lstrip("/")
        raise SourceError(
            f"{where}: array '{name}' is {found.shape}, and {meaning} is needed. It is of another format, or damaged."
        )
