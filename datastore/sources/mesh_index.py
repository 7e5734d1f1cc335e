"""A table that names one mesh file a row: with its id, class, split and licence, where it has columns for them."""

import csv
import difflib
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, ClassVar, Final, Self

from datastore.errors import SourceError
from datastore.shape import Shape
from datastore.sources import Listing, ReadingOptions, ShapeReference, listed_licence
from datastore.sources.files import SourceFiles
from datastore.sources.mesh_files import COLOURED_SUFFIXES, MESH_SUFFIXES, read_mesh

_NAMES: Final = ("index.csv", "index.json")
_NAMES_OF_OTHERS: Final = frozenset({"meshes.npz"})  # a mesh bundle's
_COLUMNS: Final = ("path", "id", "class", "split", "licence")
_ALSO_SPELT: Final = {"license": "licence"}
_SPLIT_ORDER: Final = ("train", "val", "test")
_LOOKS_LIKE_A_TYPO: Final = (
    0.75  # of difflib's ratio, to a column that is not there: calss and splits do; category and author do not
)

_MOST_CHECKED: Final = 4096
_CHECKED_OF_MORE: Final = 256
_CHECKED_REMOTELY: Final = 64  # each is a request


@dataclass(frozen=True)
class _Row:
    """One row, and how to name it in a message."""

    where: str
    path: str
    id: str
    class_name: str
    split: str
    licence: str


class MeshIndex:
    """`index.csv` with a column path, or `index.json`: a list of such rows, or a mapping from ids to them."""

    FORMAT: ClassVar[str] = "mesh_index"
    LOOKS_LIKE: ClassVar[str] = (
        "a file .csv or .json (or a folder with index.csv or index.json) with columns path, id, class, split, licence"
    )

    def __init__(self, url: str, listing: Listing) -> None:
        self.url = url
        self.listing = listing
        self._files = SourceFiles(url)

    @classmethod
    def recognises(cls, files: SourceFiles) -> bool:
        """Whether it is a table itself, or a folder with one and without a bundle's meshes."""
        if files.single_file is not None:
            return files.single_file.lower().endswith((".csv", ".json"))
        names = set(files.entries())
        return not names.isdisjoint(_NAMES) and names.isdisjoint(_NAMES_OF_OTHERS)

    @classmethod
    def open(cls, files: SourceFiles, options: ReadingOptions) -> Self:
        """The table, in its own order. SourceError names the line that is wrong."""
        name = files.single_file or next((name for name in _NAMES if files.exists(name)), None)
        if name is None:
            raise SourceError(f"{files.url} holds neither {' nor '.join(_NAMES)}. {files.describe()}")
        text, table = files.text(name), files.where(name)
        rows = _csv_rows(text, table) if name.lower().endswith(".csv") else _json_rows(text, table)
        _refuse_double(rows, table)
        class_names = tuple(sorted({row.class_name for row in rows} - {""}))
        label_of = {"": -1} | {class_name: label for label, class_name in enumerate(class_names)}
        splits = {row.split for row in rows}
        sizes = "" if options.partial else _checked_sizes(files, rows, table)
        listing = Listing(
            shapes=[ShapeReference(row.id, label_of[row.class_name], row.split, row.path, row.licence) for row in rows],
            class_names=class_names,
            splits=(*(split for split in _SPLIT_ORDER if split in splits), *sorted(splits - set(_SPLIT_ORDER))),
            coloured=any(PurePosixPath(row.path).suffix.lower() in COLOURED_SUFFIXES for row in rows),
            licence=listed_licence(row.licence for row in rows),
            content=hashlib.sha256((text + sizes).encode()).hexdigest(),
        )
        return cls(files.url, listing)

    def load(self, shape: ShapeReference) -> Shape:
        """The file that a row names."""
        return Shape(read_mesh(*_located(self._files, shape.place)))


def _located(files: SourceFiles, path: str) -> tuple[SourceFiles, str]:
    """Where a path of the table leads: below the table's folder, elsewhere on its disk, or to a URL."""
    if "://" not in path and not path.startswith(("/", "../")):
        return files, path
    if path.startswith("../"):
        # of a local table the whole path: its URL may be a bare name, which has nothing above it
        folder = files.root if files.is_local else files.where("")
        while path.startswith("../"):
            folder, path = folder.rpartition("/")[0], path.removeprefix("../")
        path = f"{folder}/{path}"
    parent, _, name = path.rpartition("/")
    return SourceFiles(parent or "/"), name


def _csv_rows(text: str, table: str) -> list[_Row]:
    reader = csv.reader(io.StringIO(text), strict=True)
    rows: list[_Row] = []
    columns: list[str] = []
    try:
        for values in reader:
            if not any(value.strip() for value in values):
                continue
            where = f"line {reader.line_num}"
            if not columns:
                columns = _columns(values, f"{table}, {where}")
            elif len(values) != len(columns):
                raise SourceError(
                    f"{table}, {where} has {len(values)} values, and the first line names {len(columns)} columns. "
                    f"A value that holds a comma stands in double quotes."
                )
            else:
                rows.append(_row(dict(zip(columns, values, strict=True)), where, table))
    except csv.Error as error:
        raise SourceError(f"{table}, line {reader.line_num}: this is no CSV ({error}).") from error
    if not rows:
        raise SourceError(
            f"{table} has no rows: its first line names columns ({', '.join(_COLUMNS)}), then comes one a shape."
        )
    return rows


def _json_rows(text: str, table: str) -> list[_Row]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise SourceError(f"{table}, line {error.lineno}: this is no JSON ({error.msg}).") from error
    entries: list[tuple[str, Any]]
    if isinstance(found, Mapping):
        entries = [
            (f"entry {name!r}", {"id": name, **entry} if isinstance(entry, Mapping) else entry)
            for name, entry in found.items()
        ]
    elif isinstance(found, list):
        entries = [(f"entry {number}", entry) for number, entry in enumerate(found, start=1)]
    else:
        entries = []
    if not entries:
        raise SourceError(
            f'{table} lists no shapes. It is a list of objects such as {{"path": "chair/a.glb", "class": "chair"}}, or '
            f"one object that has them by id."
        )
    rows = []
    for where, entry in entries:
        if not isinstance(entry, Mapping):
            raise SourceError(
                f'{table}, {where} is no object. Write it as {{"path": "chair/a.glb", "class": "chair"}}.'
            )
        columns = _columns([str(key) for key in entry], f"{table}, {where}")
        values = ["" if value is None else str(value) for value in entry.values()]
        rows.append(_row(dict(zip(columns, values, strict=True)), where, table))
    return rows


def _columns(names: Sequence[str], where: str) -> list[str]:
    """The columns that names stand for; others are passed through. SourceError where one looks mistyped or is missing."""
    lowered = [name.strip().lower() for name in names]
    columns = [_ALSO_SPELT.get(name, name) for name in lowered]
    wanting = [name for name in _COLUMNS if name not in columns]
    for name in columns:
        close = difflib.get_close_matches(name, wanting, 1, _LOOKS_LIKE_A_TYPO) if name not in _COLUMNS else []
        if close:
            raise SourceError(
                f"{where}: {name!r} looks like {close[0]!r} mistyped. Columns that are read: {', '.join(_COLUMNS)}; "
                f"others are ignored, and this one would be. Rename it."
            )
    if "path" in wanting:
        raise SourceError(
            f"{where} has no column 'path', which names the mesh file; it has {', '.join(columns) or 'none'}. Where the "
            f"tree of folders already says what is what, --format mesh_folder reads it without the table."
        )
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise SourceError(f"{where} names column {', '.join(twice)} more than once.")
    return columns


def _row(values: Mapping[str, str], where: str, table: str) -> _Row:
    stripped = {name: values[name].strip() for name in _COLUMNS if name in values}
    for name in ("path", "id", "split"):
        if name in stripped and not stripped[name]:
            raise SourceError(f"{table}, {where}: {name} is empty. Fill it in, or leave out the column or the row.")
    path = stripped["path"].replace("\\", "/").removeprefix("./")
    if not path.lower().endswith(MESH_SUFFIXES):
        raise SourceError(
            f"{table}, {where}: {path!r} is no mesh file; those that are read end in {' '.join(MESH_SUFFIXES)}."
        )
    return _Row(
        where=where,
        path=path,
        id=stripped.get("id", str(PurePosixPath(path).with_suffix("")) if "://" not in path else path),
        class_name=stripped.get("class", ""),
        split=stripped.get("split", "train"),
        licence=stripped.get("licence", ""),
    )


def _refuse_double(rows: Sequence[_Row], table: str) -> None:
    first: dict[str, _Row] = {}
    for row in rows:
        if row.id in first:
            raise SourceError(
                f"{table}: {first[row.id].where} and {row.where} have the same id {row.id!r}. Give each its own, in "
                f"column id."
            )
        first[row.id] = row


def _checked_sizes(files: SourceFiles, rows: Sequence[_Row], table: str) -> str:
    """Sizes of the files that rows name: of all in a short table, else of some, evenly spread. SourceError if one is missing."""
    most = _MOST_CHECKED if files.is_local else _CHECKED_REMOTELY
    few = _CHECKED_OF_MORE if files.is_local else _CHECKED_REMOTELY
    checked = rows if len(rows) <= most else [rows[k * len(rows) // few] for k in range(few)]
    sizes, missing = [], []
    for row in checked:
        where, path = _located(files, row.path)
        try:
            sizes.append(str(where.size(path)))
        except (SourceError, OSError):
            missing.append(row)
    if missing:
        raise SourceError(
            f"{table}, {missing[0].where}: there is no file {missing[0].path!r} (and {len(missing) - 1:,} more of "
            f"{len(checked):,} looked for are missing). Paths count from the table's folder. With --partial, shapes whose "
            f"files are missing are left out."
        )
    return " ".join(sizes)
