"""A tree of mesh files, one a shape, whose folders name class and split."""

import struct
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

import numpy as np
from jaxtyping import UInt8

from datastore.errors import SourceError
from datastore.mesh import Mesh
from datastore.render import NEUTRAL_GREY
from datastore.shape import Shape
from datastore.sources import Listing, ReadingOptions, ShapeError, ShapeReference
from datastore.sources.files import SourceFiles

if TYPE_CHECKING:
    import trimesh

MESH_SUFFIXES: Final = (".off", ".obj", ".ply", ".stl", ".glb", ".gltf")
_COLOURED_SUFFIXES: Final = {".obj", ".ply", ".glb", ".gltf"}
_SPLIT_OF_FOLDER: Final = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}
_SPLIT_ORDER: Final = ("train", "val", "test")

_Colours = tuple[UInt8[np.ndarray, "m 3"] | None, UInt8[np.ndarray, "n 3"] | None]  # of faces, of vertices; not both

# What readers of a dozen formats raise on damaged files, and where an optional decoder is not installed. Anything else
# is a fault that should be seen: the worker process ends with a traceback, its shape goes into quarantine, and the
# ingest goes on.
_READING_FAILS: Final = (
    ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, NotImplementedError, OSError,
    TypeError, ValueError, struct.error,
)  # fmt: skip


class MeshFolder:
    """`class/split/name.off` and its kin: `class/name.off`, `split/class/name.off`, and bare files without a class."""

    FORMAT: ClassVar[str] = "mesh_folder"
    LOOKS_LIKE: ClassVar[str] = f"a folder tree class/split/name with files {' '.join(MESH_SUFFIXES)}"

    def __init__(self, url: str, listing: Listing) -> None:
        self.url = url
        self.listing = listing

    @classmethod
    def recognises(cls, files: SourceFiles) -> bool:
        """Whether there is a mesh file somewhere below."""
        return bool(files.walk(MESH_SUFFIXES))

    @classmethod
    def open(cls, files: SourceFiles, options: ReadingOptions) -> Self:
        """The folder, listed in the order of its sorted paths."""
        listed = files.walk(MESH_SUFFIXES)
        if not listed:
            raise SourceError(f"{files.url}: {files.describe()} No file below it ends in {' '.join(MESH_SUFFIXES)}.")
        found = [(_class_and_split(file.path), file.path) for file in listed]
        class_names = tuple(sorted({class_name for (class_name, _), _ in found} - {""}))
        label_of = {"": -1} | {name: label for label, name in enumerate(class_names)}
        splits = {split for (_, split), _ in found}
        listing = Listing(
            shapes=[
                ShapeReference(str(PurePosixPath(place).with_suffix("")), label_of[class_name], split, place)
                for (class_name, split), place in found
            ],
            class_names=class_names,
            splits=tuple(name for name in _SPLIT_ORDER if name in splits),
            # decided by what the format can carry: to know, one would have to read every file
            coloured=any(PurePosixPath(file.path).suffix.lower() in _COLOURED_SUFFIXES for file in listed),
            content=" ".join(str(file.size) for file in listed),
        )
        return cls(files.url, listing)

    def load(self, shape: ShapeReference) -> Shape:
        """One file as one mesh: all parts of its scene, each where the scene puts it."""
        import trimesh

        path = SourceFiles(self.url).local_path(shape.place)
        try:
            # process=False: vertices are not merged, so their order and colours stay the file's own
            scene = trimesh.load_scene(path, process=False)
            return Shape(_flattened(scene))
        except _READING_FAILS as error:
            raise ShapeError(f"cannot be read as {path.suffix.lower()}: {type(error).__name__}: {error}") from error


def _class_and_split(place: str) -> tuple[str, str]:
    """Both from the folders above a file: a split is known by its name, and the class is the first of the others."""
    folders = PurePosixPath(place).parts[:-1]
    splits = [_SPLIT_OF_FOLDER[name.lower()] for name in folders if name.lower() in _SPLIT_OF_FOLDER]
    classes = [name for name in folders if name.lower() not in _SPLIT_OF_FOLDER]
    return (classes[0] if classes else ""), (splits[0] if splits else "train")


def _flattened(scene: "trimesh.Scene") -> Mesh:
    """One mesh in the scene's coordinates."""
    import trimesh

    vertices, faces, colours = [], [], []
    num_vertices = 0
    for node in scene.graph.nodes_geometry:
        transform, name = scene.graph[node]
        geometry = scene.geometry[name]
        if not isinstance(geometry, trimesh.Trimesh) or len(geometry.faces) == 0:
            continue  # points and lines have no surface
        corners = np.asarray(geometry.faces, dtype=np.int64)
        if np.linalg.det(transform[:3, :3]) < 0:
            corners = corners[:, ::-1]  # a mirrored part would be inside out
        vertices.append(np.asarray(geometry.vertices) @ transform[:3, :3].T + transform[:3, 3])
        faces.append(corners + num_vertices)
        colours.append(_face_or_vertex_colours(geometry))
        num_vertices += len(geometry.vertices)
    if not faces:
        raise ShapeError("the file holds no triangles")
    if num_vertices > np.iinfo(np.int32).max:
        raise ShapeError(f"{num_vertices:,} vertices are more than 32-bit indices can name")
    face_colours, vertex_colours = _joined_colours(colours, faces, [len(part) for part in vertices])
    return Mesh(
        vertices=np.concatenate(vertices).astype(np.float32),
        faces=np.concatenate(faces).astype(np.int32),
        face_colours=face_colours,
        vertex_colours=vertex_colours,
    )


def _face_or_vertex_colours(geometry: "trimesh.Trimesh") -> _Colours:
    """The colours a part came with. A texture is read at the vertices; a bare material colours the whole part."""
    visual: Any = geometry.visual  # which of several classes it is, `kind` tells
    if visual.kind == "face":
        return np.asarray(visual.face_colors[:, :3], dtype=np.uint8), None
    if visual.kind == "vertex":
        return None, np.asarray(visual.vertex_colors[:, :3], dtype=np.uint8)
    if visual.kind == "texture":
        if visual.uv is None:  # without texture coordinates the reader cannot say how many colours there are
            return np.tile(np.asarray(visual.material.main_color[:3], dtype=np.uint8), (len(geometry.faces), 1)), None
        return None, np.asarray(visual.to_color().vertex_colors[:, :3], dtype=np.uint8)
    return None, None


def _joined_colours(colours: list[_Colours], faces: list[np.ndarray], num_vertices: list[int]) -> _Colours:
    """One array for all parts: of vertices if that loses nothing, else of faces. Parts without colours are grey."""
    if all(of_faces is None and of_vertices is None for of_faces, of_vertices in colours):
        return None, None
    if all(of_faces is None for of_faces, _ in colours):
        grey = [np.full((count, 3), NEUTRAL_GREY, dtype=np.uint8) for count in num_vertices]
        return None, np.concatenate([of if of is not None else grey[part] for part, (_, of) in enumerate(colours)])
    first = np.cumsum([0, *num_vertices])
    joined = []
    for part, (of_faces, of_vertices) in enumerate(colours):
        if of_faces is None and of_vertices is not None:
            of_faces = of_vertices[faces[part] - first[part]].mean(axis=1).astype(np.uint8)
        joined.append(of_faces if of_faces is not None else np.full((len(faces[part]), 3), NEUTRAL_GREY, np.uint8))
    return np.concatenate(joined), None
