"""One mesh file, whatever its format, as one mesh: all its parts in place, with their colours and textures."""

import io
import posixpath
import re
import struct
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from jaxtyping import UInt8

from datastore.errors import SourceError
from datastore.mesh import Mesh
from datastore.sources import ShapeError
from datastore.sources.files import SourceFiles
from datastore.sources.gltf import read_gltf
from datastore.sources.mesh_parts import MeshPart, decoded, joined, moved, texture_side
from datastore.sources.off import read_off

if TYPE_CHECKING:
    import trimesh

MESH_SUFFIXES: Final = (".off", ".obj", ".ply", ".stl", ".glb", ".gltf")
COLOURED_SUFFIXES: Final = frozenset({".obj", ".ply", ".glb", ".gltf"})
"""What can carry colours: to know which files do, one would have to read them all."""

_STL_TRIANGLE: Final = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
_STL_HEADER_BYTES: Final = 84
_RELATIVE_FACE: Final = re.compile(rb"^[ \t]*[fF][ \t][^\n]*-", re.MULTILINE)

# What readers of a dozen formats raise on damaged files. Anything else is a fault that should be seen: the worker process
# ends with a traceback, its shape goes into quarantine, and the ingest goes on.
_READING_FAILS: Final = (
    ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, NameError, NotImplementedError,
    OSError, RecursionError, TypeError, ValueError, struct.error,
)  # fmt: skip


def read_mesh(files: SourceFiles, path: str) -> Mesh:
    """One file of a source, with what lies beside it (materials, buffers, images). ShapeError where it is no mesh.

    A texture that is missing or cannot be decoded leaves its part in the material's colour: the shape is worth more than
    its paint.
    """
    suffix = PurePosixPath(path).suffix.lower()
    beside = _Beside(files, path)
    try:
        content = files.read(path)
        if not content:
            raise ShapeError("the file is empty")
        if suffix == ".off":
            return read_off(content)
        if suffix in (".glb", ".gltf"):
            return read_gltf(content, beside.fetch)
        if suffix == ".stl" and len(content) == _stl_bytes(content):
            return _binary_stl(content)
        if suffix == ".stl" and b"\0" in content:  # which text has none of
            raise ShapeError(
                f"its header announces {_stl_bytes(content):,} bytes, but there are {len(content):,}: it was cut short or "
                f"damaged, fetch it again"
            )
        return _by_trimesh(content, suffix, beside)
    except ShapeError as error:
        raise ShapeError(f"{suffix[1:]}: {error}") from error
    except SourceError as error:
        raise ShapeError(str(error).rstrip(".")) from error
    except _READING_FAILS as error:
        raise ShapeError(f"cannot be read as {suffix}: {type(error).__name__}: {error}") from error


class _Beside:
    """Files that a mesh file names, found below the source's root."""

    def __init__(self, files: SourceFiles, path: str) -> None:
        self._files = files
        self._folder = posixpath.dirname(path)

    def fetch(self, name: str) -> bytes:
        """One file. FileNotFoundError where there is none, or where its name leads out of the source."""
        name = name.strip().strip('"').replace("\\", "/")
        # a name such as C:/models/wood.png is of its author's disk, and the file often lies beside the mesh
        for candidate in dict.fromkeys((name, posixpath.basename(name))):
            path = posixpath.normpath(posixpath.join(self._folder, candidate))
            if not path.startswith(("../", "/")) and ":" not in path and self._files.exists(path):
                return self._files.read(path)
        raise FileNotFoundError(f"there is no {name} beside it")


def _stl_bytes(content: bytes) -> int:
    """How long a binary STL file of that header is; a text file's length differs."""
    if len(content) < _STL_HEADER_BYTES:
        return _STL_HEADER_BYTES
    return _STL_HEADER_BYTES + _STL_TRIANGLE.itemsize * int(struct.unpack_from("<I", content, _STL_HEADER_BYTES - 4)[0])


def _binary_stl(content: bytes) -> Mesh:
    corners = np.frombuffer(content, _STL_TRIANGLE, offset=_STL_HEADER_BYTES)["corners"]
    vertices = corners.astype(np.float32).reshape(-1, 3)
    return joined([MeshPart(vertices, np.arange(len(vertices), dtype=np.int32).reshape(-1, 3))], [])


def _by_trimesh(content: bytes, suffix: str, beside: _Beside) -> Mesh:
    """OBJ, PLY and text STL."""
    import trimesh

    class Resolver(trimesh.resolvers.Resolver):
        """Hands trimesh the files that a mesh names."""

        def __init__(self) -> None:
            self.file_name = "mesh"

        def get(self, name: str) -> bytes:
            return beside.fetch(name)

        def write(self, name: str, data: bytes) -> None:
            raise NotImplementedError("sources are read only")

        def namespaced(self, namespace: str) -> "Resolver":
            raise NotImplementedError("one folder is enough")

        def keys(self) -> list[str]:
            return []

    if suffix == ".obj" and _RELATIVE_FACE.search(content):
        content = _with_absolute_faces(content)
    # process=False: vertices are not merged, so their order and colours stay the file's own
    scene = trimesh.load_scene(io.BytesIO(content), file_type=suffix[1:], resolver=Resolver(), process=False)
    parts, images, left_out = [], list[Any](), set[str]()
    for node in scene.graph.nodes_geometry:
        transform, name = scene.graph[node]
        geometry = scene.geometry[name]
        if isinstance(geometry, trimesh.Trimesh) and len(geometry.faces):
            parts.append(_part(geometry, transform, images))
        elif len(getattr(geometry, "vertices", ())):
            left_out.add("points" if isinstance(geometry, trimesh.PointCloud) else "lines or points")
    del scene
    if not parts:
        if suffix == ".ply" and left_out:
            raise ShapeError(
                "it has points and no faces: it is a point cloud. `--format point_folder` reads a folder of them"
            )
        found = f"only {' and '.join(sorted(left_out))}, which have no surface" if left_out else "none was found"
        raise ShapeError(f"the file holds no triangles: {found}")
    side = texture_side(len(images))
    return joined(parts, [decoded(image, side, alpha_counts=False) for image in images])


def _part(geometry: "trimesh.Trimesh", transform: np.ndarray, images: list[Any]) -> MeshPart:
    """One part of a scene; an image that it shows joins the list."""
    vertices, faces = moved(np.asarray(geometry.vertices), np.asarray(geometry.faces, dtype=np.int32), transform)
    visual: Any = geometry.visual  # which of several classes it is, `kind` tells
    if visual.kind == "face":
        return MeshPart(vertices, faces, face_colours=_rgb(visual.face_colors))
    if visual.kind == "vertex":
        return MeshPart(vertices, faces, vertex_colours=_rgb(visual.vertex_colors))
    if visual.kind != "texture":
        return MeshPart(vertices, faces)
    material = visual.material
    is_stated = "diffuse" in getattr(material, "kwargs", {}) or "kd" in getattr(material, "kwargs", {})
    colour = _rgb(np.asarray(material.main_color)[None]) if is_stated else None
    colours = None if colour is None else np.broadcast_to(colour, (len(vertices), 3))
    image = getattr(material, "image", None)
    if image is None or visual.uv is None or len(visual.uv) != len(vertices):
        return MeshPart(vertices, faces, vertex_colours=colours)
    number = next((index for index, known in enumerate(images) if known is image), len(images))
    if number == len(images):
        images.append(image)
    # Kd beside map_Kd is ignored, as most programs do: exporters leave 0.8 there, or even 0
    return MeshPart(vertices, faces, vertex_colours=colours, texture=number, uv=np.asarray(visual.uv)[:, :2])


def _rgb(colours: np.ndarray) -> UInt8[np.ndarray, "n 3"]:
    return np.ascontiguousarray(colours[:, :3], dtype=np.uint8)


def _with_absolute_faces(content: bytes) -> bytes:
    """An OBJ file whose faces count from the first vertex; -1 is the last one before the face, where trimesh takes the
    last of the file."""
    seen = {b"v": 0, b"vt": 0, b"vn": 0}
    kinds = (b"v", b"vt", b"vn")
    lines = content.replace(b"\\\n", b" ").split(b"\n")
    for number, line in enumerate(lines):
        word = line.split(maxsplit=1)[:1]
        if word and word[0] in seen:
            seen[word[0]] += 1
        elif word and word[0] in (b"f", b"F") and b"-" in line:
            corners = []
            for corner in line.split()[1:]:
                indices = corner.split(b"/")
                for place, index in enumerate(indices[:3]):
                    if index.startswith(b"-"):
                        indices[place] = b"%d" % (seen[kinds[place]] + 1 + int(index))
                corners.append(b"/".join(indices))
            lines[number] = b"f " + b" ".join(corners)
    return b"\n".join(lines)
