"""A triangle mesh as every source delivers it: vertices, faces, and what is known of each face."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int16, Int32, UInt8


@dataclass(frozen=True)
class Mesh:
    """One shape in its source's own units. A face's corners run counter-clockwise seen from outside."""

    vertices: Float32[np.ndarray, "n 3"]
    faces: Int32[np.ndarray, "m 3"]
    face_parts: Int16[np.ndarray, " m"] | None = None  # index into the corpus' part names; -1 unknown
    face_colours: UInt8[np.ndarray, "m 3"] | None = None  # RGB
    vertex_colours: UInt8[np.ndarray, "n 3"] | None = None  # RGB; some formats colour corners instead of faces
    textures: tuple[UInt8[np.ndarray, "h w 3"], ...] = ()  # RGB, material factors worked in; the top row is the first
    face_textures: Int16[np.ndarray, " m"] | None = None  # index into textures; -1 none: the colours above hold
    vertex_uv: Float32[np.ndarray, "n 2"] | None = None  # (0, 0) is a texture's bottom left; outside of 0..1 it repeats
