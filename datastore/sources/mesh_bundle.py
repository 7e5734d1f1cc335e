"""Many meshes in two files: index.csv names them, meshes.npz holds their vertices and faces end to end.

A third one, turntables.tar, may hold pictures that the authors rendered of some of them; they become extra views.
"""

import csv
import io
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import IO, Any, ClassVar, Final, Self

import numpy as np
from jaxtyping import Int64, UInt8

from datastore.errors import SourceError
from datastore.mesh import Mesh
from datastore.shape import Shape
from datastore.sources import Listing, ReadingOptions, ShapeError, ShapeReference, SourceImages, listed_licence
from datastore.sources.files import SourceFiles
from datastore.sources.mesh_parts import DECODING_FAILS, on_white

_INDEX: Final = "index.csv"
_MESHES: Final = "meshes.npz"
_TURNTABLES: Final = "turntables.tar"
_COLUMNS: Final = ("id", "class", "split")
_ARRAYS: Final = ("vertices", "faces", "vptr", "fptr")
_SPLIT_ORDER: Final = ("train", "val", "test", "unlabelled")

_READING_FAILS: Final = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


class MeshBundle:
    """Row k of the index is mesh k: `vertices[vptr[k]:vptr[k+1]]`, `faces[fptr[k]:fptr[k+1]]` counting within it.

    Column licence is each shape's; column turntable is 1 where the pictures hold `<id>.webp`; other columns are ignored.
    """

    FORMAT: ClassVar[str] = "mesh_bundle"
    LOOKS_LIKE: ClassVar[str] = f"a folder with {_INDEX} (columns id, class, split), {_MESHES}, perhaps {_TURNTABLES}"

    def __init__(self, url: str, listing: Listing) -> None:
        self.url = url
        self.listing = listing
        self._files = SourceFiles(url)

    @classmethod
    def recognises(cls, files: SourceFiles) -> bool:
        """Whether index and meshes are there."""
        return {_INDEX, _MESHES} <= set(files.entries())

    @classmethod
    def open(cls, files: SourceFiles, options: ReadingOptions) -> Self:
        """The bundle, with as many meshes as its index has rows."""
        if missing := [name for name in (_INDEX, _MESHES) if not files.exists(name)]:
            raise SourceError(f"{files.url}: a mesh bundle has {_INDEX} and {_MESHES}; missing: {', '.join(missing)}.")
        rows = _read_index(files)
        checksums = _check_arrays(files, len(rows))
        turntables = _turntables(files, rows, options)
        places = {shape_id: f"{member.offset_data} {member.size}" for shape_id, member in turntables.items()}
        class_names = tuple(sorted({row["class"] for row in rows} - {""}))
        label_of = {"": -1} | {name: label for label, name in enumerate(class_names)}
        splits = {row["split"] for row in rows}
        listing = Listing(
            shapes=[
                # where its pictures lie in their archive is found once, here, and not by each worker
                ShapeReference(
                    row["id"],
                    label_of[row["class"]],
                    row["split"],
                    f"{number} {places.get(row['id'], '')}".rstrip(),
                    row.get("licence", ""),
                )
                for number, row in enumerate(rows)
            ],
            class_names=class_names,
            splits=(*(name for name in _SPLIT_ORDER if name in splits), *sorted(splits - set(_SPLIT_ORDER))),
            extra_views=_extra_views(files, turntables),
            licence=listed_licence(row.get("licence", "") for row in rows),
            content=checksums,
        )
        return cls(files.url, listing)

    def load(self, shape: ShapeReference) -> Shape:
        """One mesh of the bundle, and the pictures of it."""
        row, *lies_at = (int(number) for number in shape.place.split())
        mesh = self._mesh(row)
        return Shape(mesh, extra_views=self._pictures(*lies_at) if lies_at else None)

    def _mesh(self, row: int) -> Mesh:
        arrays = self._arrays
        (first_vertex, end_vertex), (first_face, end_face) = (arrays[name][row : row + 2] for name in ("vptr", "fptr"))
        # copies: slices of a file that is mapped into memory would be read again at every use
        return Mesh(
            np.array(arrays["vertices"][first_vertex:end_vertex], dtype=np.float32),
            np.array(arrays["faces"][first_face:end_face], dtype=np.int32),
        )

    def _pictures(self, offset: int, size: int) -> UInt8[np.ndarray, "e h w 3"]:
        return _frames(self._files.read_range(_TURNTABLES, offset, size))

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        """Uncompressed arrays where they lie on disk. Compressed ones in memory: any mesh costs reading all before it."""
        files = self._files
        where = files.where(_MESHES)
        try:
            with files.open_whole(_MESHES) as file, zipfile.ZipFile(file) as archive:
                return {name: _array(files, file, archive, name) for name in _ARRAYS}
        except MemoryError as error:
            with files.open_whole(_MESHES) as file, zipfile.ZipFile(file) as archive:
                needed = sum(archive.getinfo(f"{name}.npy").file_size for name in _ARRAYS)
            raise SourceError(
                f"{where} unpacks to {needed / 2**30:.2f} GiB, which is more than a worker may use. Write it with "
                f"np.savez instead of np.savez_compressed, on a local disk: then only what is needed is read. Or raise "
                f"--limit-gib-per-worker."
            ) from error
        except _READING_FAILS as error:
            raise SourceError(f"{where} is damaged ({error}). Fetch it again.") from error

    def __reduce__(self) -> tuple[Any, ...]:
        # to worker processes goes what it takes to open the arrays, not the arrays
        return type(self), (self.url, self.listing)


def _read_index(files: SourceFiles) -> list[dict[str, str]]:
    where = files.where(_INDEX)
    reader = csv.DictReader(io.StringIO(files.text(_INDEX)), strict=True)
    try:
        missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
        rows = [] if missing else [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise SourceError(f"{where} cannot be read as a table: {error}.") from error
    if missing:
        raise SourceError(
            f"{where} has no column {', '.join(missing)}; its first line names the columns id, class and split."
        )
    for line, row in rows:
        if None in row or None in row.values():
            raise SourceError(f"{where}, line {line} has not as many values as the first line names columns.")
        if not row["id"] or not row["split"]:
            raise SourceError(f"{where}, line {line}: id and split must not be empty.")
        if row.get("turntable", "") not in ("", "0", "1"):
            raise SourceError(f"{where}, line {line}: turntable is 1 or empty, not {row['turntable']!r}.")
    return [row for _, row in rows]


# --- meshes.npz


@dataclass(frozen=True)
class _ArrayHeader:
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran_order: bool


def _check_arrays(files: SourceFiles, num_rows: int) -> str:
    """The checksum that the archive keeps of each array. SourceError where the arrays do not fit each other or the index."""
    where = files.where(_MESHES)
    try:
        with files.open(_MESHES) as file, zipfile.ZipFile(file) as archive:
            members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
            if missing := [name for name in _ARRAYS if name not in members]:
                raise SourceError(f"{where} has no {', '.join(missing)}; it holds {', '.join(members)}.")
            headers = {name: _read_header(archive, name) for name in _ARRAYS}
            starts = {name: _read_starts(archive, name, headers[name], where) for name in ("vptr", "fptr")}
    except _READING_FAILS as error:
        raise SourceError(
            f"{where} is not an .npz archive, or only a part of one ({error}). Fetch it again."
        ) from error
    for name, kinds in (("vertices", "f"), ("faces", "iu")):
        header = headers[name]
        if len(header.shape) != 2 or header.shape[1] != 3 or header.dtype.kind not in kinds or header.fortran_order:
            raise SourceError(
                f"{where}: {name} is {header.dtype} {list(header.shape)}; needed is "
                f"{'floating-point' if kinds == 'f' else 'whole'} numbers [N, 3], row by row."
            )
    for name, of in (("vptr", "vertices"), ("fptr", "faces")):
        pointers, total = starts[name], headers[of].shape[0]
        if len(pointers) != num_rows + 1:
            raise SourceError(
                f"{files.url}: {_INDEX} has {num_rows} rows, but {name} in {_MESHES} bounds {len(pointers) - 1} meshes. "
                f"Row k of the index is mesh k: take both files from the same place."
            )
        if pointers[0] != 0 or pointers[-1] != total or (np.diff(pointers) < 0).any():
            raise SourceError(f"{where}: {name} does not rise from 0 to {total}. The file is damaged; fetch it again.")
    return " ".join(f"{name}:{member.CRC:08x}" for name, member in members.items())


def _read_header(archive: zipfile.ZipFile, name: str) -> _ArrayHeader:
    with archive.open(f"{name}.npy") as member:
        return _header(member)


def _header(file: IO[bytes]) -> _ArrayHeader:
    """The header of an array; the file is then at its first number."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not read")
    return _ArrayHeader(shape, dtype, fortran_order)


def _read_starts(archive: zipfile.ZipFile, name: str, header: _ArrayHeader, where: str) -> Int64[np.ndarray, " n"]:
    if len(header.shape) != 1 or header.dtype.kind not in "iu" or header.shape[0] < 1:
        raise SourceError(f"{where}: {name} is {header.dtype} {list(header.shape)}; needed is whole numbers [n + 1].")
    with archive.open(f"{name}.npy") as member:
        return np.asarray(np.lib.format.read_array(member, allow_pickle=False), dtype=np.int64)


def _array(files: SourceFiles, file: IO[bytes], archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array: mapped from the disk where it lies there as it is, else read."""
    member = archive.getinfo(f"{name}.npy")
    if files.is_local and member.compress_type == zipfile.ZIP_STORED:
        # what the archive's directory does not say is how long the member's own header is
        file.seek(member.header_offset + 26)
        name_bytes, extra_bytes = (int.from_bytes(file.read(2), "little") for _ in range(2))
        file.seek(member.header_offset + 30 + name_bytes + extra_bytes)
        header = _header(file)
        if 0 in header.shape:
            return np.empty(header.shape, header.dtype)
        return np.memmap(files.local_path(_MESHES), header.dtype, "r", file.tell(), header.shape)
    with archive.open(member) as opened:
        return np.lib.format.read_array(opened, allow_pickle=False)


# --- turntables.tar


def _turntables(
    files: SourceFiles, rows: Sequence[dict[str, str]], options: ReadingOptions
) -> dict[str, tarfile.TarInfo]:
    """Where the pictures of each shape lie that has some. SourceError where the index says so and they are not there."""
    wanted = list(dict.fromkeys(row["id"] for row in rows if row.get("turntable") == "1"))
    where = files.where(_TURNTABLES)
    if not wanted or (options.partial and not files.exists(_TURNTABLES)):
        return {}
    if not files.exists(_TURNTABLES):
        raise SourceError(
            f"{where} is missing, and {_INDEX} has {len(wanted):,} shapes with turntable = 1. Fetch it, or say --partial "
            f"to go without."
        )
    size = files.size(_TURNTABLES)
    try:
        with files.open(_TURNTABLES) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            members = {member.name.removeprefix("./"): member for member in archive if member.isfile()}
    except (tarfile.TarError, EOFError, OSError) as error:
        raise SourceError(f"{where} is not a .tar archive, or only a part of one ({error}). Fetch it again.") from error
    # a pipe that broke leaves a last member that reaches beyond the end of the file
    whole = {name: member for name, member in members.items() if member.offset_data + member.size <= size}
    found = {shape_id: whole[f"{shape_id}.webp"] for shape_id in wanted if f"{shape_id}.webp" in whole}
    if len(found) < len(wanted) and not options.partial:
        first = next(shape_id for shape_id in wanted if shape_id not in found)
        raise SourceError(
            f"{where} holds {len(found):,} of the {len(wanted):,} turntables of {_INDEX}; {first}.webp is missing or cut "
            f"off. Fetch the archive again, or say --partial to take what is there."
        )
    return found


def _extra_views(files: SourceFiles, turntables: dict[str, tarfile.TarInfo]) -> SourceImages | None:
    """How many pictures each shape has and of what size, as the first that can be read has them."""
    if not turntables:
        return None
    reason: ShapeError | None = None
    for member in turntables.values():
        try:
            frames = _frames(files.read_range(_TURNTABLES, member.offset_data, member.size))
        except ShapeError as error:
            reason = reason or error
            continue
        return SourceImages(num_views=len(frames), image_size=frames.shape[1])
    raise SourceError(f"{files.where(_TURNTABLES)}: not one of {len(turntables):,} turntables can be read: {reason}.")


def _frames(content: bytes) -> UInt8[np.ndarray, "e h w 3"]:
    """The pictures of an animated image, on white. ShapeError where it is damaged, or not square."""
    from PIL import Image, ImageSequence

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content))
        if image.width != image.height:
            raise ShapeError(f"its turntable has {image.width} x {image.height} pixels, and views are square")
        return np.stack([on_white(frame) for frame in ImageSequence.Iterator(image)])
    except (*DECODING_FAILS, Image.DecompressionBombError) as error:
        raise ShapeError(f"its turntable is damaged ({error}): fetch {_TURNTABLES} again") from error
