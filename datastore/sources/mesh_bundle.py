"""Many meshes in two files: index.csv names them, meshes.npz holds their vertices and faces end to end."""

import csv
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Final, Self

import numpy as np
from jaxtyping import Int64

from datastore.errors import SourceError
from datastore.mesh import Mesh
from datastore.shape import Shape
from datastore.sources import Listing, ReadingOptions, ShapeReference
from datastore.sources.files import SourceFiles

_INDEX: Final = "index.csv"
_MESHES: Final = "meshes.npz"
_ARRAYS: Final = ("vertices", "faces", "vptr", "fptr")
_SPLIT_ORDER: Final = ("train", "val", "test", "unlabelled")


class MeshBundle:
    """Row k of the index is mesh k: `vertices[vptr[k]:vptr[k+1]]`, `faces[fptr[k]:fptr[k+1]]` counting within it."""

    FORMAT: ClassVar[str] = "mesh_bundle"
    LOOKS_LIKE: ClassVar[str] = f"a folder with {_INDEX} (columns id, class, split) and {_MESHES}"

    def __init__(self, url: str, listing: Listing) -> None:
        self.url = url
        self.listing = listing

    @classmethod
    def recognises(cls, files: SourceFiles) -> bool:
        """Whether both files are there."""
        return {_INDEX, _MESHES} <= set(files.entries())

    @classmethod
    def open(cls, files: SourceFiles, options: ReadingOptions) -> Self:
        """The bundle, with as many meshes as its index has rows."""
        url = files.url
        if missing := [name for name in (_INDEX, _MESHES) if not files.exists(name)]:
            raise SourceError(f"{url}: a mesh bundle has {_INDEX} and {_MESHES}; missing: {', '.join(missing)}.")
        folder = files.local_path("")
        rows = _read_index(folder / _INDEX)
        with _open_arrays(folder / _MESHES) as arrays:
            starts, checksums = _read_starts(arrays, folder / _MESHES), _checksums(arrays)
        for name, pointers in starts.items():
            if len(pointers) != len(rows) + 1:
                raise SourceError(
                    f"{url}: {_INDEX} has {len(rows)} rows, but {name} in {_MESHES} bounds {len(pointers) - 1} meshes. "
                    f"Row k of the index is mesh k: take both files from the same place."
                )
        class_names = tuple(sorted({row["class"] for row in rows} - {""}))
        label_of = {"": -1} | {name: label for label, name in enumerate(class_names)}
        splits = {row["split"] for row in rows}
        licences = sorted({row["licence"] for row in rows if row.get("licence")})
        listing = Listing(
            shapes=[
                ShapeReference(row["id"], label_of[row["class"]], row["split"], str(place))
                for place, row in enumerate(rows)
            ],
            class_names=class_names,
            splits=(*(name for name in _SPLIT_ORDER if name in splits), *sorted(splits - set(_SPLIT_ORDER))),
            licence=", ".join(licences) or "unknown",
            content=checksums,
        )
        return cls(url, listing)

    def load(self, shape: ShapeReference) -> Shape:
        """One mesh of the bundle."""
        vertices, faces, vertex_starts, face_starts = self._arrays
        row = int(shape.place)
        return Shape(
            Mesh(vertices[vertex_starts[row] : vertex_starts[row + 1]], faces[face_starts[row] : face_starts[row + 1]])
        )

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """All meshes, in memory: compressed as they are, any one of them costs reading all before it."""
        path = SourceFiles(self.url).local_path(_MESHES)
        with _open_arrays(path) as arrays:
            starts = _read_starts(arrays, path)
            try:
                vertices = np.asarray(arrays["vertices"], dtype=np.float32)
                faces = np.asarray(arrays["faces"], dtype=np.int32)
            except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise SourceError(f"{path} is damaged ({error}). Fetch it again.") from error
        for name, pointers, total in (("vptr", starts["vptr"], len(vertices)), ("fptr", starts["fptr"], len(faces))):
            if pointers[0] != 0 or pointers[-1] != total or (np.diff(pointers) < 0).any():
                raise SourceError(
                    f"{path}: {name} does not rise from 0 to {total}. The file is damaged; fetch it again."
                )
        return vertices, faces, starts["vptr"], starts["fptr"]

    def __reduce__(self) -> tuple[Any, ...]:
        # to worker processes goes what it takes to open the arrays, not the arrays
        return type(self), (self.url, self.listing)


def _read_index(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in ("id", "class", "split") if name not in (reader.fieldnames or ())]
            rows = [] if missing else list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"{path} cannot be read as a table: {error}.") from error
    if missing:
        raise SourceError(
            f"{path} has no column {', '.join(missing)}; its first line names the columns id, class and split."
        )
    for number, row in enumerate(rows, start=2):
        if not row["id"] or row["class"] is None or not row["split"]:
            raise SourceError(f"{path}, line {number}: id and split must not be empty, and no column may be missing.")
    return rows


@contextmanager
def _open_arrays(path: Path) -> Iterator["np.lib.npyio.NpzFile"]:
    # opened here, because numpy leaves a file open that turns out to be no archive
    with path.open("rb") as file:
        try:
            arrays = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise SourceError(
                f"{path} is not an .npz archive, or only a part of one ({error}). Fetch it again."
            ) from error
        if not isinstance(arrays, np.lib.npyio.NpzFile):
            raise SourceError(f"{path} holds one bare array; an .npz archive with {', '.join(_ARRAYS)} is needed.")
        if missing := [name for name in _ARRAYS if name not in arrays.files]:
            raise SourceError(f"{path} has no {', '.join(missing)}; it holds {', '.join(arrays.files)}.")
        yield arrays


def _read_starts(arrays: "np.lib.npyio.NpzFile", path: Path) -> dict[str, Int64[np.ndarray, " n"]]:
    try:
        return {name: np.asarray(arrays[name], dtype=np.int64) for name in ("vptr", "fptr")}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise SourceError(f"{path} is damaged ({error}). Fetch it again.") from error


def _checksums(arrays: "np.lib.npyio.NpzFile") -> str:
    """The archive keeps a checksum of each member, so the content is known without reading it."""
    assert arrays.zip is not None, "the archive is open"
    return " ".join(f"{member.filename}:{member.CRC:08x}" for member in arrays.zip.infolist())
