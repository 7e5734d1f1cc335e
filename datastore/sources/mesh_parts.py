"""Parts of a mesh file, each with its own paint, joined into one mesh; and images as textures of bounded size."""

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from jaxtyping import Float, Float32, Int16, Int32, UInt8

from datastore.mesh import Mesh
from datastore.render import NEUTRAL_GREY
from datastore.sources import ShapeError

if TYPE_CHECKING:
    from PIL.Image import Image

Texture = UInt8[np.ndarray, "h w 3"]

_TEXTURE_BYTES: Final = 48 * 2**20
"""Of all textures of a shape together. A view of some hundred pixels shows no more of them, and an 8,192-pixel atlas
would fill a worker's memory."""

_LARGEST_SIDE: Final = 1024
_SMALLEST_SIDE: Final = 16

DECODING_FAILS: Final = (
    ArithmeticError, EOFError, LookupError, NotImplementedError, OSError, SyntaxError, TypeError, ValueError,
)  # fmt: skip
"""What Pillow raises on damaged images; SyntaxError is its word for a broken PNG."""


@dataclass(frozen=True)
class MeshPart:
    """Triangles with one material, in the coordinates of the whole."""

    vertices: Float32[np.ndarray, "n 3"]
    faces: Int32[np.ndarray, "m 3"]  # index into this part's vertices
    face_colours: UInt8[np.ndarray, "m 3"] | None = None
    vertex_colours: UInt8[np.ndarray, "n 3"] | None = None  # one of the two, also for where there is no texture
    texture: int | None = None  # index into the textures handed to `joined`
    uv: Float[np.ndarray, "n 2"] | None = None  # there with a texture; (0, 0) is its bottom left


def moved(
    vertices: Float[np.ndarray, "n 3"], faces: Int32[np.ndarray, "m 3"], transform: Float[np.ndarray, "4 4"]
) -> tuple[Float32[np.ndarray, "n 3"], Int32[np.ndarray, "m 3"]]:
    """Vertices and faces of a part where its scene puts it; a mirrored part keeps its outside outside."""
    turned = vertices @ transform[:3, :3].T + transform[:3, 3]
    if np.linalg.det(transform[:3, :3]) < 0:
        faces = np.ascontiguousarray(faces[:, ::-1])
    return turned.astype(np.float32), faces


def joined(parts: Sequence[MeshPart], textures: Sequence[Texture | None]) -> Mesh:
    """One mesh. A part whose texture is None keeps its colours. ShapeError where a face names a vertex that is not there."""
    if not any(len(part.faces) for part in parts):
        raise ShapeError("the file holds no triangles")
    for part in parts:
        if len(part.faces) and not (part.faces.min() >= 0 and part.faces.max() < len(part.vertices)):
            outside = part.faces.min() if part.faces.min() < 0 else part.faces.max()
            raise ShapeError(f"a face names vertex {outside:,}, and there are {len(part.vertices):,}")
    counts = [len(part.vertices) for part in parts]
    if sum(counts) > np.iinfo(np.int32).max:
        raise ShapeError(f"{sum(counts):,} vertices are more than 32-bit indices can name")
    first = np.cumsum([0, *counts])
    textured = [part.texture is not None and textures[part.texture] is not None for part in parts]
    face_colours, vertex_colours = _joined_colours(parts, textured)
    return Mesh(
        vertices=np.concatenate([part.vertices for part in parts]),
        faces=np.concatenate([part.faces + np.int32(first[index]) for index, part in enumerate(parts)]),
        face_colours=face_colours,
        vertex_colours=vertex_colours,
        **_joined_textures(parts, textures, textured),
    )


def _joined_colours(
    parts: Sequence[MeshPart], textured: Sequence[bool]
) -> tuple[UInt8[np.ndarray, "m 3"] | None, UInt8[np.ndarray, "n 3"] | None]:
    """Of faces, or of vertices if that loses nothing. Parts without colours are grey; those with a texture need none."""
    bare = [part for part, has_texture in zip(parts, textured, strict=True) if not has_texture]
    if all(part.face_colours is None and part.vertex_colours is None for part in bare):
        return None, None
    if all(part.face_colours is None for part in bare):
        return None, np.concatenate(
            [_grey(len(part.vertices)) if part.vertex_colours is None else part.vertex_colours for part in parts]
        )
    colours = []
    for part in parts:
        if part.face_colours is not None:
            colours.append(part.face_colours)
        elif part.vertex_colours is not None:
            colours.append(part.vertex_colours[part.faces].mean(axis=1).astype(np.uint8))
        else:
            colours.append(_grey(len(part.faces)))
    return np.concatenate(colours), None


def _joined_textures(
    parts: Sequence[MeshPart], textures: Sequence[Texture | None], textured: Sequence[bool]
) -> dict[str, Any]:
    """What a mesh with textures has more than one without; nothing where no part has one."""
    if not any(textured):
        return {}
    used = sorted({part.texture for part, has in zip(parts, textured, strict=True) if has and part.texture is not None})
    if len(used) > np.iinfo(np.int16).max:
        raise ShapeError(f"{len(used):,} textures are more than 16-bit indices can name")
    number: dict[int | None, int] = {texture: place for place, texture in enumerate(used)}
    face_textures: list[Int16[np.ndarray, " m"]] = []
    vertex_uv: list[Float32[np.ndarray, "n 2"]] = []
    for part, has_texture in zip(parts, textured, strict=True):
        face_textures.append(np.full(len(part.faces), number[part.texture] if has_texture else -1, np.int16))
        if has_texture and part.uv is not None:
            vertex_uv.append(np.nan_to_num(part.uv.astype(np.float32), posinf=0, neginf=0))
        else:
            vertex_uv.append(np.zeros((len(part.vertices), 2), np.float32))
    return {
        "textures": tuple(texture for texture in (textures[index] for index in used) if texture is not None),
        "face_textures": np.concatenate(face_textures),
        "vertex_uv": np.concatenate(vertex_uv),
    }


def _grey(count: int) -> UInt8[np.ndarray, "count 3"]:
    return np.full((count, 3), NEUTRAL_GREY, np.uint8)


def texture_side(num_textures: int) -> int:
    """Most pixels along a side of each of a shape's textures; many of them are kept smaller, so that all fit."""
    side = _LARGEST_SIDE
    while side > _SMALLEST_SIDE and 3 * side * side * num_textures > _TEXTURE_BYTES:
        side //= 2
    return side


def decoded(image: "bytes | Image", most_pixels: int, *, alpha_counts: bool) -> Texture | None:
    """An image as a texture, made smaller where it is larger; None where Pillow cannot read it.

    Surfaces here are opaque. Where a material says that alpha counts, what shines through is white, as the background
    of views is; elsewhere alpha is what files carry by accident, and it is ignored.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            # large images are expected, and made small at once; beyond twice that size Pillow refuses them
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
            opened.thumbnail((most_pixels, most_pixels), Image.Resampling.BOX)
            return on_white(opened) if alpha_counts else np.array(opened.convert("RGBA"))[..., :3].copy()
    except (*DECODING_FAILS, Image.DecompressionBombError):
        return None


def on_white(image: "Image") -> UInt8[np.ndarray, "h w 3"]:
    """An image's colours as they look on white paper."""
    if not image.has_transparency_data:
        return np.array(image.convert("RGB"))
    pixels = np.array(image.convert("RGBA"))
    alpha = pixels[..., 3:].astype(np.uint16)
    return ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
