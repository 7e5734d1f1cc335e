"""Point clouds in PLY files, binary or ascii: their vertices; faces, where there are any, are passed over."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Float32

from datastore.shape import PointCloud
from datastore.sources import ShapeError

_TYPES: Final = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2",
    "uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "float": "f4", "float32": "f4",
    "double": "f8", "float64": "f8",
}  # fmt: skip
_BYTE_ORDERS: Final = {"binary_little_endian": "<", "binary_big_endian": ">", "ascii": ""}

POINTS: Final = ("x", "y", "z")
NORMALS: Final = ("nx", "ny", "nz")
COLOURS: Final = ("red", "green", "blue")


@dataclass(frozen=True)
class PlyHeader:
    """What a file says of its vertices, and where they begin."""

    byte_order: str  # "" in ascii
    num_vertices: int
    properties: tuple[tuple[str, str], ...]  # name and NumPy type of each
    begins: int  # bytes before the first vertex

    @property
    def has_normals(self) -> bool:
        """Whether every vertex has one."""
        return set(NORMALS) <= {name for name, _ in self.properties}

    @property
    def has_colours(self) -> bool:
        """Whether every vertex has one of 8 bits a channel, which is what nearly all files have."""
        return all((name, "u1") in self.properties for name in COLOURS)


def read_ply_header(content: bytes, name: str) -> PlyHeader:
    """The header of a file, of which only the beginning need be there. ShapeError where it is none."""
    head, end, _ = content.partition(b"end_header")
    lines = [line.split() for line in head.decode("latin-1").splitlines()]
    begins = content.find(b"\n", len(head)) + 1
    if not (end and begins and lines and lines[0] == ["ply"]):
        raise ShapeError(f"{name} does not begin with a PLY header: fetch it again")
    byte_order = None
    num_vertices = -1
    properties: list[tuple[str, str]] = []
    elements: list[str] = []
    try:
        for words in lines[1:]:
            match words:
                case ["format", kind, _]:
                    byte_order = _BYTE_ORDERS[kind]
                case ["element", element, count]:
                    elements.append(element)
                    if element == "vertex":
                        num_vertices = int(count)
                case ["property", kind, property_name] if elements[-1] == "vertex":
                    properties.append((property_name, _TYPES[kind]))
                case ["property", "list", *_] if elements[-1] == "vertex":
                    raise ShapeError(f"{name}: lists at vertices are not supported")
    except (LookupError, ValueError) as error:
        raise ShapeError(f"{name}: the PLY header makes no sense at {error}") from error
    named = [property_name for property_name, _ in properties]
    if byte_order is None or elements[:1] != ["vertex"] or not set(POINTS) <= set(named):
        raise ShapeError(f"{name}: a cloud's PLY header names a format, and vertices first, with properties x, y and z")
    if num_vertices < 1 or len(set(named)) < len(named):
        raise ShapeError(f"{name}: the PLY header has {num_vertices} vertices with properties {', '.join(named)}")
    return PlyHeader(byte_order, num_vertices, tuple(properties), begins)


def read_ply_cloud(content: bytes, name: str) -> PointCloud:
    """The vertices of a file as points, with normals and colours where it has them.

    ShapeError where it is damaged or holds coordinates that are not finite; the message calls it by `name`.
    """
    header = read_ply_header(content, name)
    columns = _ascii_columns(content, header, name) if not header.byte_order else _binary_columns(content, header, name)
    points = _stacked(columns, POINTS)
    if not np.isfinite(points).all():
        vertex = int(np.flatnonzero(~np.isfinite(points).all(axis=1))[0])
        raise ShapeError(f"{name}: vertex {vertex} has coordinates that are not finite")
    return PointCloud(
        points,
        normals=_stacked(columns, NORMALS) if header.has_normals else None,
        colours=_stacked(columns, COLOURS).astype(np.uint8) if header.has_colours else None,
    )


def _binary_columns(content: bytes, header: PlyHeader, name: str) -> dict[str, np.ndarray]:
    row = np.dtype([(property_name, header.byte_order + kind) for property_name, kind in header.properties])
    whole = (len(content) - header.begins) // row.itemsize
    if whole < header.num_vertices:
        raise ShapeError(_truncated(name, whole, header))
    vertices = np.frombuffer(content, row, header.num_vertices, header.begins)
    return {property_name: vertices[property_name] for property_name, _ in header.properties}


def _ascii_columns(content: bytes, header: PlyHeader, name: str) -> dict[str, np.ndarray]:
    lines = content[header.begins :].split(b"\n", header.num_vertices)[: header.num_vertices]
    rows = [line.split() for line in lines if line.strip()]
    if len(rows) < header.num_vertices or len(rows[-1]) < len(header.properties):
        raise ShapeError(_truncated(name, len(rows), header))
    try:
        vertices = np.array(rows, dtype=np.float64)
    except ValueError as error:
        raise ShapeError(f"{name} holds what are no numbers, or lines of different lengths: fetch it again") from error
    return {property_name: vertices[:, column] for column, (property_name, _) in enumerate(header.properties)}


def _stacked(columns: dict[str, np.ndarray], names: tuple[str, ...]) -> Float32[np.ndarray, "n c"]:
    with np.errstate(over="ignore"):  # what is too large for 32 bits becomes infinite, and is refused as such
        return np.stack([columns[name] for name in names], axis=1).astype(np.float32)


def _truncated(name: str, found: int, header: PlyHeader) -> str:
    return f"{name} ends after {found:,} of its {header.num_vertices:,} vertices: fetch it again"
