"""An OFF file as one mesh, with the liberties that real ones take: glued headers, comments, polygons, colours."""

import re
from typing import Final

import numpy as np
from jaxtyping import Float32, Float64, Int32, UInt8

from datastore.mesh import Mesh
from datastore.sources import ShapeError
from datastore.sources.mesh_parts import MeshPart, joined

_COMMENT: Final = re.compile(rb"#[^\n]*")
# ModelNet's counts follow without a line break: OFF1046 900 0
_HEADER: Final = re.compile(rb"\s*(?P<uv>ST)?(?P<colours>C)?(?P<normals>N)?(?P<higher>4?n?)OFF(?P<binary>\s+BINARY)?")


def read_off(content: bytes) -> Mesh:
    """The mesh. Polygons become fans of triangles; colours are those of vertices (COFF) or, without them, of faces."""
    if b"#" in content:
        content = _COMMENT.sub(b"", content)
    header = _HEADER.match(content)
    if header is None:
        raise ShapeError("it does not begin with OFF: the file is damaged, or of another format")
    if header["binary"]:
        raise ShapeError("it is a binary OFF file, and only text is read here; convert it")
    if header["higher"]:
        raise ShapeError("its vertices do not have three dimensions")
    counts, _, body = content[header.end() :].lstrip().partition(b"\n")
    try:
        num_vertices, num_faces = (int(count) for count in counts.split()[:2])
    except ValueError:
        raise ShapeError(f"its first line should count vertices and faces, and is {counts[:40]!r}") from None
    plain = not (header["uv"] or header["colours"] or header["normals"])
    part = _triangles_only(body, num_vertices, num_faces) if plain else None
    return joined([part or _line_by_line(body, num_vertices, num_faces, bool(header["colours"]))], [])


def _triangles_only(body: bytes, num_vertices: int, num_faces: int) -> MeshPart | None:
    """The usual file, read at once: three numbers a vertex, then `3 a b c` a face. None where it is not like that."""
    try:
        numbers: Float64[np.ndarray, " k"] = np.fromstring(body.decode("ascii"), sep=" ")
    except ValueError:
        return None  # it holds something else than numbers: line by line, one sees what
    if len(numbers) != 3 * num_vertices + 4 * num_faces:
        return None
    faces = numbers[3 * num_vertices :].reshape(-1, 4)
    if (faces[:, 0] != 3).any():
        return None
    vertices = numbers[: 3 * num_vertices].astype(np.float32).reshape(-1, 3)
    return MeshPart(vertices, np.ascontiguousarray(faces[:, 1:], dtype=np.int32))


def _line_by_line(body: bytes, num_vertices: int, num_faces: int, with_colours: bool) -> MeshPart:
    lines = [line for line in body.splitlines() if line.strip()]
    if len(lines) < num_vertices + num_faces:
        raise ShapeError(f"the file ends after {len(lines):,} of {num_vertices + num_faces:,} lines: fetch it again")
    rows = [line.split() for line in lines[:num_vertices]]
    vertices: Float32[np.ndarray, "n 3"] = np.array([row[:3] for row in rows], dtype=np.float64).astype(np.float32)
    vertex_colours = _colours([row[3:] for row in rows]) if with_colours else None

    triangles: list[list[bytes]] = []
    polygon_colours: list[list[bytes]] = []
    num_triangles: list[int] = []
    for line in lines[num_vertices : num_vertices + num_faces]:
        row = line.split()
        num_corners = int(row[0])
        corners = row[1 : 1 + num_corners]
        if len(corners) < num_corners:
            raise ShapeError(f"a face of {num_corners} corners names {len(corners)}: the file is cut off or damaged")
        triangles += [[corners[0], corners[k], corners[k + 1]] for k in range(1, num_corners - 1)]
        polygon_colours.append(row[1 + num_corners :])
        num_triangles.append(max(0, num_corners - 2))
    faces: Int32[np.ndarray, "m 3"] = np.array(triangles, dtype=np.int32).reshape(-1, 3)
    face_colours = None if vertex_colours is not None else _colours(polygon_colours)
    if face_colours is not None:
        face_colours = np.repeat(face_colours, num_triangles, axis=0)
    return MeshPart(vertices.reshape(-1, 3), faces, face_colours=face_colours, vertex_colours=vertex_colours)


def _colours(rows: list[list[bytes]]) -> UInt8[np.ndarray, "n 3"] | None:
    """Colours from what stands behind each vertex or face; None unless every one has at least three numbers."""
    if not rows or min(len(row) for row in rows) < 3:
        return None
    values: Float64[np.ndarray, "n 3"] = np.array([row[:3] for row in rows], dtype=np.float64)
    # written as fractions, or as whole numbers up to 255
    as_fractions = values.max() <= 1 and any(b"." in token for row in rows for token in row[:3])
    return np.clip(255 * values + 0.5 if as_fractions else values, 0, 255).astype(np.uint8)
