"""glTF on files written here, byte by byte: what the format allows, and what real files lack."""

import base64
import io
import json
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import trimesh
from PIL import Image

from datastore.mesh import Mesh
from datastore.sources import ShapeError
from datastore.sources.gltf import read_gltf

TRIANGLE = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], np.float32)
COMPONENTS = {"i1": 5120, "u1": 5121, "i2": 5122, "u2": 5123, "u4": 5125, "f4": 5126}
TYPES = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4", 16: "MAT4"}
TURNED = [0.0, 0.0, 0.7071068, 0.7071068]  # a quarter turn about z


class Glb:
    """A .glb under construction: arrays become accessors, the rest is its JSON."""

    def __init__(self, **tree: Any) -> None:
        self.binary = b""
        self.tree: dict[str, Any] = {"asset": {"version": "2.0"}, "accessors": [], "bufferViews": []} | tree

    def view(self, data: bytes, **facts: Any) -> int:
        self.tree["bufferViews"].append({"buffer": 0, "byteOffset": len(self.binary), "byteLength": len(data)} | facts)
        self.binary += data + b"\0" * (-len(data) % 4)
        return len(self.tree["bufferViews"]) - 1

    def add(self, values: Any, dtype: str = "f4", **facts: Any) -> int:
        array = np.asarray(values, np.dtype("<" + dtype))
        accessor = {
            "bufferView": self.view(array.tobytes()),
            "componentType": COMPONENTS[dtype],
            "type": TYPES[1 if array.ndim == 1 else array.shape[1]],
            "count": len(array),
        }
        self.tree["accessors"].append(accessor | facts)
        return len(self.tree["accessors"]) - 1

    def image(self, pixels: Any) -> int:
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(pixels, np.uint8)).save(buffer, "PNG")
        self.tree.setdefault("images", []).append({"bufferView": self.view(buffer.getvalue()), "mimeType": "image/png"})
        self.tree.setdefault("textures", []).append({"source": len(self.tree["images"]) - 1})
        return len(self.tree["textures"]) - 1

    def one_mesh(self, primitive: dict[str, Any], **material: Any) -> "Glb":
        if material:
            self.tree["materials"] = [material]
            primitive = primitive | {"material": 0}
        return self.with_nodes([{"mesh": 0}], meshes=[{"primitives": [primitive]}])

    def with_nodes(self, nodes: list[dict[str, Any]], roots: tuple[int, ...] = (0,), **tree: Any) -> "Glb":
        self.tree |= {"nodes": nodes, "scenes": [{"nodes": list(roots)}], "scene": 0} | tree
        return self

    def content(self) -> bytes:
        tree = self.tree | {"buffers": [{"byteLength": len(self.binary)}]}
        text = json.dumps(tree).encode()
        text += b" " * (-len(text) % 4)
        body = struct.pack("<II", len(text), 0x4E4F534A) + text
        body += struct.pack("<II", len(self.binary), 0x004E4942) + self.binary
        return b"glTF" + struct.pack("<II", 2, 12 + len(body)) + body


def nothing_beside(name: str) -> bytes:
    raise FileNotFoundError(name)


def read(glb: Glb) -> Mesh:
    return read_gltf(glb.content(), nothing_beside)


def plain() -> Glb:
    glb = Glb()
    return glb.one_mesh({"attributes": {"POSITION": glb.add(TRIANGLE)}})


# --- geometry


def test_nodes_move_what_hangs_below_them() -> None:
    glb = plain().with_nodes(
        [
            {"children": [1], "translation": [10, 0, 0], "rotation": TURNED, "scale": [2, 2, 2]},
            {"mesh": 0, "matrix": [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 5, 1]},
        ]
    )
    assert np.allclose(read(glb).vertices, [[10, 0, 10], [10, 2, 10], [8, 0, 10]], atol=1e-5)


def test_a_mirrored_node_keeps_its_outside_outside() -> None:
    mesh = read(plain().with_nodes([{"mesh": 0, "scale": [-1, 1, 1]}]))
    corners = mesh.vertices[mesh.faces[0]]
    assert np.cross(corners[1] - corners[0], corners[2] - corners[0])[2] > 0


def test_only_the_scene_that_is_shown_counts() -> None:
    glb = plain().with_nodes([{"mesh": 0}, {"mesh": 0, "translation": [9, 0, 0]}], roots=(1,))
    assert read(glb).vertices[:, 0].min() == 9
    del glb.tree["scene"], glb.tree["scenes"]
    assert len(read(glb).faces) == 2


@pytest.mark.parametrize(
    ("mode", "indices", "expected"),
    [
        (4, [0, 1, 2, 2, 1, 3, 3], [[0, 1, 2], [2, 1, 3]]),
        (5, [0, 1, 2, 3], [[0, 1, 2], [2, 1, 3]]),
        (6, [0, 1, 2, 3], [[0, 1, 2], [0, 2, 3]]),
    ],
)
def test_lists_strips_and_fans_are_triangles(mode: int, indices: list[int], expected: list[list[int]]) -> None:
    glb = Glb()
    position = glb.add([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]])
    glb.one_mesh({"attributes": {"POSITION": position}, "indices": glb.add(indices, "u2"), "mode": mode})
    assert read(glb).faces.tolist() == expected


def test_interleaved_sparse_and_normalised_numbers_are_read() -> None:
    glb = Glb()
    rows = np.zeros(3, [("position", "<f4", 3), ("normal", "<f4", 3)])
    rows["position"] = TRIANGLE
    view = glb.view(rows.tobytes(), byteStride=24)
    sparse = {
        "count": 1,
        "indices": {"bufferView": glb.view(np.array([2], "<u2").tobytes()), "componentType": 5123},
        "values": {"bufferView": glb.view(np.array([0, 7, 0], "<f4").tobytes())},
    }
    glb.tree["accessors"].append(
        {"bufferView": view, "componentType": 5126, "type": "VEC3", "count": 3, "sparse": sparse}
    )
    assert read(glb.one_mesh({"attributes": {"POSITION": 0}})).vertices[2].tolist() == [0, 7, 0]

    glb = Glb()
    position = glb.add([[0, 0, 0], [32767, 0, 0], [0, -32768, 0]], "i2", normalized=True)
    assert read(glb.one_mesh({"attributes": {"POSITION": position}})).vertices[1:].tolist() == [[1, 0, 0], [0, -1, 0]]


def test_a_skinned_part_stands_where_its_joints_are() -> None:
    glb = Glb()
    attributes = {
        "POSITION": glb.add(TRIANGLE),
        "JOINTS_0": glb.add([[0, 1, 0, 0]] * 3, "u1"),
        # the last one's weights do not add up to one
        "WEIGHTS_0": glb.add([[1, 0, 0, 0], [0, 1, 0, 0], [0.25, 0.25, 0, 0]]),
    }
    back = np.eye(4)
    back[3, 0] = -1  # by column: the second joint's own frame lies at x = 1
    inverse = glb.add(np.stack([np.eye(4), back]).reshape(2, 16))
    nodes = [
        {"mesh": 0, "skin": 0, "translation": [500, 0, 0]},  # counts for nothing
        {"children": [2]},
        {"translation": [1, 0, 3]},
    ]
    glb.with_nodes(nodes, (0, 1), meshes=[{"primitives": [{"attributes": attributes}]}])
    glb.tree["skins"] = [{"joints": [1, 2], "inverseBindMatrices": inverse}]
    assert np.allclose(read(glb).vertices, [[0, 0, 0], [1, 0, 3], [0, 1, 1.5]])


def test_morph_targets_count_with_their_default_weights() -> None:
    glb = Glb()
    target = {"POSITION": glb.add(np.full((3, 3), 4.0))}
    primitive = {"attributes": {"POSITION": glb.add(TRIANGLE)}, "targets": [target]}
    glb.with_nodes([{"mesh": 0}], meshes=[{"primitives": [primitive], "weights": [0.5]}])
    assert np.array_equal(read(glb).vertices, TRIANGLE + 2)


def test_an_animation_changes_nothing() -> None:
    glb = plain()
    glb.tree["animations"] = [{"channels": [], "samplers": []}]
    assert np.array_equal(read(glb).vertices, TRIANGLE)


def test_lines_and_points_are_left_out() -> None:
    glb = Glb()
    position = {"POSITION": glb.add(TRIANGLE)}
    far = {"POSITION": glb.add(TRIANGLE * 100)}
    glb.with_nodes(
        [{"mesh": 0}],
        meshes=[
            {"primitives": [{"attributes": position}, {"attributes": far, "mode": 1}, {"attributes": far, "mode": 0}]}
        ],
    )
    assert read(glb).vertices.max() == 1


# --- paint


UV = np.array([[0, 0], [1, 0], [0, 1]], np.float32)
RED_AND_BLUE = [[[255, 0, 0], [0, 0, 255]]]


def textured(pixels: Any = RED_AND_BLUE, uv_set: int = 0, more: Any = None, **material: Any) -> Glb:
    glb = Glb()
    attributes = {"POSITION": glb.add(TRIANGLE), f"TEXCOORD_{uv_set}": glb.add(UV)}
    if uv_set:
        attributes["TEXCOORD_0"] = glb.add(UV * 0)
    texture = {"index": glb.image(pixels), "texCoord": uv_set} | (more or {})
    colour = {"baseColorTexture": texture} | material.pop("colour", {})
    return glb.one_mesh({"attributes": attributes}, pbrMetallicRoughness=colour, **material)


@pytest.mark.parametrize("uv_set", [0, 1])
def test_a_texture_comes_with_its_coordinates_counted_from_the_bottom(uv_set: int) -> None:
    mesh = read(textured(uv_set=uv_set))
    assert [texture.tolist() for texture in mesh.textures] == [RED_AND_BLUE]
    assert mesh.face_textures is not None
    assert mesh.face_textures.tolist() == [0]
    assert mesh.vertex_uv is not None
    assert mesh.vertex_uv.tolist() == [[0, 1], [1, 1], [0, 0]]
    assert (mesh.vertex_colours, mesh.face_colours) == (None, None)


def test_a_texture_transform_moves_the_coordinates() -> None:
    transform = {"KHR_texture_transform": {"offset": [0.5, 0.25], "scale": [2, 1], "rotation": np.pi / 2}}
    mesh = read(textured(more={"extensions": transform}))
    assert mesh.vertex_uv is not None
    # a quarter turn of the coordinates, counter-clockwise as seen with the first row on top
    assert np.allclose(mesh.vertex_uv, [[0.5, 0.75], [0.5, 2.75], [1.5, 0.75]], atol=1e-6)


def test_factors_are_light_and_are_worked_into_the_texture() -> None:
    mesh = read(textured(pixels=[[[255, 255, 0]]], colour={"baseColorFactor": [0.5, 1, 1, 0.2]}))
    assert mesh.textures[0].tolist() == [[[188, 255, 0]]]  # half the light is 188 of 255 on a display


def test_alpha_shows_white_where_the_material_says_so_and_is_ignored_elsewhere() -> None:
    pixels = [[[200, 100, 0, 0], [200, 100, 0, 255]]]
    assert read(textured(pixels, alphaMode="BLEND")).textures[0].tolist() == [[[255, 255, 255], [200, 100, 0]]]
    assert read(textured(pixels)).textures[0].tolist() == [[[200, 100, 0], [200, 100, 0]]]


def test_large_textures_are_made_small() -> None:
    assert read(textured(np.zeros((32, 4096, 3)))).textures[0].shape == (8, 1024, 3)


def test_a_material_without_texture_colours_its_part_and_only_its_part() -> None:
    glb = Glb()
    first, second = ({"POSITION": glb.add(TRIANGLE)} for _ in range(2))
    glb.with_nodes(
        [{"mesh": 0}], meshes=[{"primitives": [{"attributes": first, "material": 0}, {"attributes": second}]}]
    )
    glb.tree["materials"] = [{"pbrMetallicRoughness": {"baseColorFactor": [1, 0.5, 0, 1]}}]
    colours = read(glb).vertex_colours
    assert colours is not None
    assert colours[:3].tolist() == [[255, 188, 0]] * 3
    assert len(np.unique(colours[3:])) == 1  # grey


def test_vertex_colours_are_light_too() -> None:
    glb = Glb()
    attributes = {
        "POSITION": glb.add(TRIANGLE),
        "COLOR_0": glb.add([[255, 0, 0, 255], [0, 128, 0, 255], [0, 0, 1, 255]], "u1", normalized=True),
    }
    colours = read(glb.one_mesh({"attributes": attributes})).vertex_colours
    assert colours is not None
    assert colours.tolist() == [[255, 0, 0], [0, 188, 0], [0, 0, 13]]


def test_specular_glossiness_materials_have_a_base_colour_too() -> None:
    glb = Glb()
    extension = {"KHR_materials_pbrSpecularGlossiness": {"diffuseFactor": [0, 1, 0, 1]}}
    colours = read(glb.one_mesh({"attributes": {"POSITION": glb.add(TRIANGLE)}}, extensions=extension)).vertex_colours
    assert colours is not None
    assert colours.tolist() == [[0, 255, 0]] * 3


@pytest.mark.parametrize("damage", [{"uri": "wood.png"}, {"uri": "data:image/png;base64,iVBORw0K"}])
def test_a_texture_that_cannot_be_had_leaves_the_colour(damage: dict[str, str]) -> None:
    glb = textured(colour={"baseColorFactor": [0, 1, 0, 1]})
    glb.tree["images"] = [damage]
    mesh = read(glb)
    assert (mesh.textures, mesh.face_textures) == ((), None)
    assert mesh.vertex_colours is not None
    assert mesh.vertex_colours.tolist() == [[0, 255, 0]] * 3


# --- files


def test_a_gltf_reads_what_lies_beside_it_and_in_its_uris() -> None:
    glb = textured()
    asked = []

    def fetch(name: str) -> bytes:
        asked.append(name)
        return glb.binary

    tree = glb.tree | {"buffers": [{"uri": "my%20buffer.bin", "byteLength": len(glb.binary)}]}
    mesh = read_gltf(json.dumps(tree).encode(), fetch)
    assert asked == ["my buffer.bin"]
    uri = "data:application/octet-stream;base64," + base64.b64encode(glb.binary).decode()
    inside = read_gltf(json.dumps(tree | {"buffers": [{"uri": uri}]}).encode(), nothing_beside)
    assert np.array_equal(inside.vertices, mesh.vertices)
    assert np.array_equal(inside.textures[0], mesh.textures[0])


def change(part: str, index: int, **facts: Any) -> Callable[[Glb], None]:
    return lambda glb: glb.tree[part][index].update(facts)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda glb: glb.with_nodes([], roots=()), "an empty scene"),
        (lambda glb: glb.tree["meshes"][0]["primitives"][0].update(mode=1), "only lines, which have no surface"),
        (change("accessors", 0, count=99), r"an array of 1,188 bytes lies in a buffer of 36"),
        (change("bufferViews", 0, byteLength=999), "a buffer has 36 of 999 bytes"),
        (lambda glb: glb.with_nodes([{"children": [1]}, {"children": [0]}]), "in a circle"),
        (lambda glb: glb.with_nodes([{"children": [2]}, {"children": [2]}, {}]), "hangs below two others"),
        (lambda glb: glb.tree.update(asset={"version": "1.0"}), r"glTF 1.0, and only glTF 2 is read"),
        (
            lambda glb: glb.tree["bufferViews"][0].update(extensions={"EXT_meshopt_compression": {}}),
            r"compressed \(EXT_meshopt_compression\)",
        ),
        (
            lambda glb: (
                glb.tree["accessors"][0].pop("bufferView"),
                glb.tree["meshes"][0]["primitives"][0].update(extensions={"KHR_draco_mesh_compression": {}}),
            ),
            "compressed with Draco .* no decoder",
        ),
        (
            lambda glb: glb.tree["nodes"][0].update(extensions={"EXT_mesh_gpu_instancing": {}}),
            "EXT_mesh_gpu_instancing",
        ),
        (
            lambda glb: glb.tree["meshes"][0]["primitives"][0].update(indices=glb.add([0, 1, 7], "u1")),
            "names vertex 7, and there are 3",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said(break_it: Callable[[Glb], object], message: str) -> None:
    glb = plain()
    break_it(glb)
    with pytest.raises(ShapeError, match=message):
        read(glb)


def test_a_file_that_is_cut_off_or_lacks_its_buffer_is_said_to() -> None:
    content = plain().content()
    with pytest.raises(ShapeError, match=r"ends after .* fetch it again"):
        read_gltf(content[:-10], nothing_beside)
    tree = plain().tree | {"buffers": [{"uri": "gone.bin"}]}
    with pytest.raises(ShapeError, match=r"'gone.bin' is not beside it"):
        read_gltf(json.dumps(tree).encode(), nothing_beside)


def test_another_writer_agrees() -> None:
    box = trimesh.creation.box(extents=[1, 2, 3])
    scene = trimesh.Scene()
    scene.add_geometry(box, transform=trimesh.transformations.rotation_matrix(0.7, [1, 2, 3], [4, 5, 6]))
    mesh = read_gltf(scene.export(file_type="glb"), nothing_beside)
    whole = scene.to_mesh()
    assert np.allclose(np.sort(mesh.vertices, axis=0), np.sort(whole.vertices, axis=0), atol=1e-5)
    assert trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).volume == pytest.approx(6, rel=1e-4)
