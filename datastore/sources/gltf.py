"""A glTF 2.0 file, .glb or .gltf, as one mesh: in its rest pose, with its materials' base colours and textures.

Written here because what a general reader leaves out would show in a corpus: skins (a character would lie on its back),
sparse and normalised accessors, second texture coordinates, texture transforms, linear colours. What an animation does
later is not shown; lines and points have no surface and are left out.
"""

import base64
import binascii
import json
import struct
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import numpy as np
from jaxtyping import Float, Float32, Int32, UInt8

from datastore.mesh import Mesh
from datastore.sources import ShapeError
from datastore.sources.mesh_parts import MeshPart, Texture, decoded, joined, moved, texture_side

_MAGIC: Final = b"glTF"
_JSON_CHUNK, _BINARY_CHUNK = 0x4E4F534A, 0x004E4942
_DTYPES: Final = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
_WIDTHS: Final = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT4": 16}
_TRIANGLES, _STRIP, _FAN = 4, 5, 6
_DRACO: Final = "KHR_draco_mesh_compression"
_MESHOPT: Final = ("EXT_meshopt_compression", "KHR_meshopt_compression")
_INSTANCING: Final = "EXT_mesh_gpu_instancing"
_IMAGE_EXTENSIONS: Final = ("EXT_texture_webp", "EXT_texture_avif", "KHR_texture_basisu")

Fetch = Callable[[str], bytes]
"""A file beside this one by its name. OSError where there is none."""

_Matrix = Float[np.ndarray, "4 4"]
_Json = dict[str, Any]


def read_gltf(content: bytes, fetch: Fetch) -> Mesh:
    """The mesh of the file's scene. A texture that is missing or damaged leaves its part in the material's colour."""
    file = _File.parsed(content, fetch)
    materials = _Materials(file)
    parts, leftovers = [], set[str]()
    world, drawn = _world_transforms(file.json)
    for node in drawn:
        facts = file.json["nodes"][node]
        if "mesh" not in facts:
            continue
        if _INSTANCING in facts.get("extensions", {}):
            raise ShapeError(f"it repeats parts by {_INSTANCING}, which is not read here; write it without")
        mesh = file.json["meshes"][facts["mesh"]]
        weights = facts.get("weights", mesh.get("weights", []))
        for primitive in mesh["primitives"]:
            mode = primitive.get("mode", _TRIANGLES)
            if mode not in (_TRIANGLES, _STRIP, _FAN):
                leftovers.add("points" if mode == 0 else "lines")
                continue
            if "POSITION" not in primitive["attributes"]:
                continue
            positions, faces = _geometry(file, primitive, weights)
            if "skin" in facts and "JOINTS_0" in primitive["attributes"]:
                skin = file.json["skins"][facts["skin"]]
                # the joints alone place a skinned part; its node's own transform counts for nothing
                positions = _posed(file, positions, primitive["attributes"], skin, world)
                vertices = positions.astype(np.float32)
            else:
                vertices, faces = moved(positions, faces, world[node])
            parts.append(materials.painted(MeshPart(vertices, faces), primitive))
    if not any(len(part.faces) for part in parts):
        found = f"only {' and '.join(sorted(leftovers))}, which have no surface" if leftovers else "an empty scene"
        raise ShapeError(f"the file holds no triangles: {found}")
    return joined(parts, materials.textures())


@dataclass
class _File:
    """The parsed file and the numbers behind it."""

    json: _Json
    binary: bytes | None
    fetch: Fetch
    _fetched: dict[int, bytes] = field(default_factory=dict)

    @classmethod
    def parsed(cls, content: bytes, fetch: Fetch) -> "_File":
        """Both chunks of a .glb, or the text of a .gltf."""
        binary = None
        text = content
        if content[:4] == _MAGIC:
            version, length = struct.unpack_from("<II", content, 4)
            if version != 2:
                raise ShapeError(f"it is glTF {version}, and only glTF 2 is read here")
            if length > len(content):
                raise ShapeError(f"the file ends after {len(content):,} of {length:,} bytes: fetch it again")
            chunks = dict(_chunks(content[:length]))
            if _JSON_CHUNK not in chunks:
                raise ShapeError("the file has no JSON chunk: it is damaged")
            text, binary = chunks[_JSON_CHUNK], chunks.get(_BINARY_CHUNK)
        parsed = json.loads(text)
        if not isinstance(parsed, dict):
            raise ShapeError("its JSON is no glTF")
        version_text = str(parsed.get("asset", {}).get("version", "2.0"))
        if not version_text.startswith("2"):
            raise ShapeError(f"it is glTF {version_text}, and only glTF 2 is read here")
        return cls(parsed, binary, fetch)

    def numbers(self, accessor: int) -> np.ndarray:
        """An accessor's values, one row an element; normalised integers as the fractions that they stand for."""
        facts = self.json["accessors"][accessor]
        dtype, width, count = np.dtype(_DTYPES[facts["componentType"]]), _WIDTHS[facts["type"]], int(facts["count"])
        if "bufferView" in facts:
            values = self._strided(facts["bufferView"], facts.get("byteOffset", 0), dtype, count, width)
        else:
            values = np.zeros((count, width), dtype)
        if sparse := facts.get("sparse"):
            at, instead = sparse["indices"], sparse["values"]
            places = self._strided(
                at["bufferView"], at.get("byteOffset", 0), np.dtype(_DTYPES[at["componentType"]]), sparse["count"], 1
            )
            values = values.copy()
            values[places[:, 0]] = self._strided(
                instead["bufferView"], instead.get("byteOffset", 0), dtype, sparse["count"], width
            )
        if facts.get("normalized") and dtype.kind != "f":
            values = np.maximum(values.astype(np.float32) / np.iinfo(dtype).max, -1)
        return values

    def view(self, index: int) -> memoryview:
        """The bytes of a buffer view."""
        facts = self.json["bufferViews"][index]
        if compression := [name for name in _MESHOPT if name in facts.get("extensions", {})]:
            raise ShapeError(f"its geometry is compressed ({compression[0]}), and there is no decoder here; unpack it")
        start, length = facts.get("byteOffset", 0), facts["byteLength"]
        buffer = self._buffer(facts["buffer"])
        if start + length > len(buffer):
            raise ShapeError(
                f"a buffer has {len(buffer):,} of {start + length:,} bytes: the file is cut off or damaged"
            )
        return memoryview(buffer)[start : start + length]

    def resource(self, uri: str) -> bytes:
        """What a URI names: data in the URI itself, or a file beside this one."""
        if not uri.startswith("data:"):
            return self.fetch(urllib.parse.unquote(uri))
        header, _, data = uri.partition(",")
        try:
            return base64.b64decode(data) if header.endswith(";base64") else urllib.parse.unquote_to_bytes(data)
        except binascii.Error as error:
            raise ShapeError(f"the data in one of its URIs is damaged: {error}") from error

    def _buffer(self, index: int) -> bytes:
        if index not in self._fetched:
            uri = self.json["buffers"][index].get("uri")
            if uri is None:
                if index != 0 or self.binary is None:
                    raise ShapeError("the file lacks the binary chunk that it refers to: it is damaged")
                return self.binary
            try:
                self._fetched[index] = self.resource(uri)
            except OSError as error:
                raise ShapeError(f"its buffer {uri!r} is not beside it ({error}); fetch that file too") from error
        return self._fetched[index]

    def _strided(self, view: int, offset: int, dtype: np.dtype[Any], count: int, width: int) -> np.ndarray:
        data = self.view(view)
        row = dtype.itemsize * width
        stride = self.json["bufferViews"][view].get("byteStride", row)
        needed = offset + stride * (count - 1) + row if count else 0
        if min(offset, count, stride) < 0 or needed > len(data):
            raise ShapeError(f"an array of {needed:,} bytes lies in a buffer of {len(data):,}: the file is damaged")
        return np.ndarray((count, width), dtype, data, offset, (stride, dtype.itemsize))


def _chunks(content: bytes) -> list[tuple[int, bytes]]:
    """Type and bytes of each chunk of a .glb."""
    found, at = [], 12
    while at + 8 <= len(content):
        length, kind = struct.unpack_from("<II", content, at)
        found.append((kind, content[at + 8 : at + 8 + length]))
        at += 8 + length
    return found


def _world_transforms(tree: _Json) -> tuple[dict[int, _Matrix], list[int]]:
    """Where each node stands, and the nodes of the scene that is shown, in order."""
    nodes: list[_Json] = tree.get("nodes", [])
    children = {child for node in nodes for child in node.get("children", ())}
    roots = [index for index in range(len(nodes)) if index not in children]
    world: dict[int, _Matrix] = {}
    waiting = [(root, np.eye(4)) for root in roots]
    while waiting:
        index, above = waiting.pop()
        if index in world:
            raise ShapeError(f"node {index} of its scene hangs below two others: the file is damaged")
        world[index] = above @ _transform(nodes[index])
        waiting += [(child, world[index]) for child in nodes[index].get("children", ())]
    if len(world) < len(nodes):
        raise ShapeError("the nodes of its scene hang below each other in a circle: the file is damaged")
    scenes = tree.get("scenes", [])
    shown = scenes[tree.get("scene", 0)].get("nodes", []) if scenes else roots
    drawn: list[int] = []
    left = list(reversed(shown))
    while left:
        drawn.append(left.pop())
        left += reversed(nodes[drawn[-1]].get("children", ()))
    return world, drawn


def _transform(node: _Json) -> _Matrix:
    if "matrix" in node:
        by_column: _Matrix = np.array(node["matrix"], dtype=np.float64).reshape(4, 4)
        return by_column.T
    x, y, z, w = node.get("rotation", (0, 0, 0, 1))
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )
    matrix = np.eye(4)
    matrix[:3, :3] = rotation * np.array(node.get("scale", (1, 1, 1)), dtype=np.float64)
    matrix[:3, 3] = node.get("translation", (0, 0, 0))
    return matrix


def _geometry(
    file: _File, primitive: _Json, weights: list[float]
) -> tuple[Float32[np.ndarray, "n 3"], Int32[np.ndarray, "m 3"]]:
    """Vertices with the default weights of their morph targets, and triangles."""
    accessor = primitive["attributes"]["POSITION"]
    if _DRACO in primitive.get("extensions", {}) and "bufferView" not in file.json["accessors"][accessor]:
        raise ShapeError(
            f"its geometry is compressed with Draco ({_DRACO}), and there is no decoder here; write the file again "
            f"without that compression"
        )
    positions = file.numbers(accessor).astype(np.float32)
    for weight, target in zip(weights, primitive.get("targets", []), strict=False):
        if weight and "POSITION" in target:
            positions = positions + np.float32(weight) * file.numbers(target["POSITION"]).astype(np.float32)
    if "indices" in primitive:
        corners = file.numbers(primitive["indices"])[:, 0].astype(np.int32)
    else:
        corners = np.arange(len(positions), dtype=np.int32)
    return positions, _triangles(corners, primitive.get("mode", _TRIANGLES))


def _triangles(corners: Int32[np.ndarray, " c"], mode: int) -> Int32[np.ndarray, "m 3"]:
    if mode == _TRIANGLES:
        return corners[: len(corners) // 3 * 3].reshape(-1, 3)
    second, third = corners[1:-1], corners[2:]
    if mode == _FAN:
        return np.stack([np.broadcast_to(corners[:1], second.shape), second, third], axis=1)
    odd = np.arange(len(third)) % 2 == 1
    first = corners[: len(third)]
    return np.stack([np.where(odd, second, first), np.where(odd, first, second), third], axis=1)


def _posed(
    file: _File, positions: Float32[np.ndarray, "n 3"], attributes: _Json, skin: _Json, world: dict[int, _Matrix]
) -> Float[np.ndarray, "n 3"]:
    """Vertices where their joints stand before any animation."""
    joints = np.stack([world[joint] for joint in skin["joints"]])
    if "inverseBindMatrices" in skin:
        inverse = file.numbers(skin["inverseBindMatrices"]).reshape(-1, 4, 4).transpose(0, 2, 1)
        joints = joints @ inverse[: len(joints)]
    pulled, total = np.zeros((len(positions), 3)), np.zeros((len(positions), 1))
    number = 0
    while f"JOINTS_{number}" in attributes:
        names = file.numbers(attributes[f"JOINTS_{number}"])
        weights = file.numbers(attributes[f"WEIGHTS_{number}"]).astype(np.float64)
        for name, weight in zip(names.T, weights.T, strict=True):
            turned = np.einsum("nij,nj->ni", joints[name, :3, :3], positions) + joints[name, :3, 3]
            pulled += weight[:, None] * turned
            total += weight[:, None]
        number += 1
    # weights should add up to one, and in many files they do not quite; a vertex that nothing pulls stays where it is
    return np.where(total > 0, pulled / np.where(total > 0, total, 1), positions)


@dataclass(frozen=True)
class _Paint:
    """A material, as far as it has to do with colour."""

    factor: tuple[float, float, float, float]  # linear
    is_stated: bool  # the material names a colour of its own
    alpha_counts: bool
    image: int | None
    uv_set: int
    uv_transform: Float[np.ndarray, "2 3"] | None


class _Materials:
    """Paints parts, and collects the textures that they use."""

    def __init__(self, file: _File) -> None:
        self._file = file
        self._wanted: dict[tuple[int, tuple[float, ...], bool], int] = {}

    def painted(self, part: MeshPart, primitive: _Json) -> MeshPart:
        """The part with its primitive's material: texture and its coordinates, and a colour for each vertex."""
        attributes = primitive["attributes"]
        paint = self._paints[primitive["material"]] if "material" in primitive else None
        colours = self._colours(len(part.vertices), attributes, paint)
        coordinates = attributes.get(f"TEXCOORD_{paint.uv_set}") if paint is not None else None
        if paint is None or paint.image is None or coordinates is None:
            return MeshPart(part.vertices, part.faces, vertex_colours=colours)
        uv = self._file.numbers(coordinates).astype(np.float32)
        if len(uv) != len(part.vertices):
            raise ShapeError(f"{len(uv):,} texture coordinates for {len(part.vertices):,} vertices: it is damaged")
        if paint.uv_transform is not None:
            uv = uv @ paint.uv_transform[:, :2].T + paint.uv_transform[:, 2]
        uv[:, 1] = 1 - uv[:, 1]  # the file counts from the top
        texture = self._wanted.setdefault((paint.image, paint.factor, paint.alpha_counts), len(self._wanted))
        return MeshPart(part.vertices, part.faces, vertex_colours=colours, texture=texture, uv=uv)

    def textures(self) -> list[Texture | None]:
        """The textures that parts asked for, each with its material's factor worked in."""
        side = texture_side(len(self._wanted))
        found: list[Texture | None] = []
        for image, factor, alpha_counts in self._wanted:
            try:
                content = self._image(image)
            except OSError:
                found.append(None)
                continue
            texture = decoded(content, side, alpha_counts=alpha_counts)
            if texture is not None and factor != (1, 1, 1, 1):
                texture = _multiplied(texture, factor, alpha_counts)
            found.append(texture)
        return found

    def _image(self, index: int) -> bytes:
        facts = self._file.json["images"][index]
        return (
            bytes(self._file.view(facts["bufferView"])) if "bufferView" in facts else self._file.resource(facts["uri"])
        )

    def _colours(self, count: int, attributes: _Json, paint: _Paint | None) -> UInt8[np.ndarray, "n 3"] | None:
        """Vertex colours times the material's factor; None where neither says anything."""
        factor = np.array(paint.factor if paint is not None else (1, 1, 1, 1), dtype=np.float32)
        if "COLOR_0" in attributes:
            linear = self._file.numbers(attributes["COLOR_0"]).astype(np.float32)
            if len(linear) != count:
                raise ShapeError(f"{len(linear):,} colours for {count:,} vertices: the file is damaged")
            linear = linear * factor[: linear.shape[1]]
        elif paint is not None and paint.is_stated:
            linear = factor[None]
        else:
            return None
        colours = _display(linear[:, :3])
        if paint is not None and paint.alpha_counts and linear.shape[1] == 4:
            colours = 1 - np.clip(linear[:, 3:], 0, 1) * (1 - colours)  # on white
        return np.broadcast_to((255 * colours + 0.5).astype(np.uint8), (count, 3))

    @cached_property
    def _paints(self) -> list[_Paint]:
        return [self._paint(facts) for facts in self._file.json.get("materials", [])]

    def _paint(self, facts: _Json) -> _Paint:
        extensions = facts.get("extensions", {})
        if "pbrMetallicRoughness" in facts or "KHR_materials_pbrSpecularGlossiness" not in extensions:
            colour = facts.get("pbrMetallicRoughness", {})
            factor, texture = colour.get("baseColorFactor"), colour.get("baseColorTexture")
        else:
            colour = extensions["KHR_materials_pbrSpecularGlossiness"]
            factor, texture = colour.get("diffuseFactor"), colour.get("diffuseTexture")
        transform = (texture or {}).get("extensions", {}).get("KHR_texture_transform", {})
        red, green, blue, alpha = factor or (1, 1, 1, 1)
        return _Paint(
            factor=(red, green, blue, alpha),
            is_stated=factor is not None,
            alpha_counts=facts.get("alphaMode", "OPAQUE") != "OPAQUE",
            image=None if texture is None else self._source_of(texture["index"]),
            uv_set=transform.get("texCoord", (texture or {}).get("texCoord", 0)),
            uv_transform=_uv_transform(transform) if transform else None,
        )

    def _source_of(self, texture: int) -> int | None:
        """Which image a texture shows: the plain one where there are several encodings."""
        facts = self._file.json["textures"][texture]
        others = [facts.get("extensions", {}).get(name, {}).get("source") for name in _IMAGE_EXTENSIONS]
        return next((source for source in (facts.get("source"), *others) if source is not None), None)


def _uv_transform(facts: _Json) -> Float[np.ndarray, "2 3"]:
    (u, v), angle, (across, down) = facts.get("offset", (0, 0)), facts.get("rotation", 0), facts.get("scale", (1, 1))
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.array([[cosine * across, sine * down, u], [-sine * across, cosine * down, v]], dtype=np.float32)


def _multiplied(texture: Texture, factor: tuple[float, ...], alpha_counts: bool) -> Texture:
    """The texture times a linear factor."""
    levels = _linear(np.arange(256, dtype=np.float32) / 255)
    channels = []
    for channel in range(3):
        table = _display(levels * factor[channel])
        if alpha_counts:
            table = 1 - np.clip(factor[3], 0, 1) * (1 - table)  # on white
        channels.append((255 * table + 0.5).astype(np.uint8)[texture[..., channel]])
    return np.stack(channels, axis=-1)


def _display(linear: Float32[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """Light as the numbers of an image, by sRGB's curve: factors and vertex colours are light, textures are images."""
    light = np.clip(np.nan_to_num(linear), 0, 1)
    display: Float32[np.ndarray, "*shape"] = np.where(
        light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055
    )
    return display.astype(np.float32)


def _linear(display: Float32[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    return np.where(display <= 0.04045, display / 12.92, ((display + 0.055) / 1.055) ** 2.4).astype(np.float32)
