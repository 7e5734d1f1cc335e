"""One mesh file of each format: read from a disk or by URL, painted, and refused with a reason."""

import io
import struct
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import trimesh
from PIL import Image

from datastore.mesh import Mesh
from datastore.sources import ShapeError
from datastore.sources.files import SourceFiles
from datastore.sources.mesh_files import MESH_SUFFIXES, read_mesh

BOX = trimesh.creation.box(extents=[1, 2, 3])
GREEN = [10, 200, 30]

SQUARE_OBJ = """{library}
v 0 0 0
v 1 0 0
v 1 1 0
v 0 1 0
vt 0 0
vt 1 0
vt 1 1
vt 0 1
usemtl wood
f 1/1 2/2 3/3
f 1/1 3/3 4/4
"""


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The same folder on a disk and behind a URL."""
    url = str(tmp_path) if request.param == "disk" else "memory://meshes"
    yield url
    if request.param == "memory":
        fsspec.filesystem("memory").rm("/", recursive=True)


def write(folder: str, files: dict[str, bytes | str]) -> None:
    for path, content in files.items():
        with fsspec.open(f"{folder}/{path}", "wb", auto_mkdir=True) as file:
            file.write(content if isinstance(content, bytes) else content.encode())


def read(folder: str, path: str) -> Mesh:
    return read_mesh(SourceFiles(folder), path)


def png(pixels: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def exported(suffix: str) -> dict[str, bytes]:
    """A box as a file of that format, and what lies beside it."""
    content = (trimesh.Scene(BOX) if suffix == ".gltf" else BOX).export(file_type=suffix[1:])
    if isinstance(content, dict):
        return {("a/box.gltf" if name == "model.gltf" else f"a/{name}"): part for name, part in content.items()}
    return {f"a/box{suffix}": content.encode() if isinstance(content, str) else content}


@pytest.mark.parametrize("suffix", MESH_SUFFIXES)
def test_each_format_gives_the_same_box(folder: str, suffix: str) -> None:
    write(folder, exported(suffix))
    mesh = read(folder, f"a/box{suffix}")
    assert (mesh.vertices.dtype, mesh.faces.dtype) == (np.float32, np.int32)
    assert np.allclose(np.ptp(mesh.vertices, axis=0), [1, 2, 3])
    assert trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).volume == pytest.approx(6)
    assert (mesh.face_colours, mesh.vertex_colours, mesh.textures) == (None, None, ())


@pytest.mark.parametrize(
    "image_name", ["wood.png", "./textures/wood.png", r"textures\wood.png", r"C:\work\wood.png", '"wood.png"']
)
def test_an_obj_finds_its_texture_however_its_author_named_it(folder: str, image_name: str) -> None:
    pixels = [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [9, 9, 9]]]
    image_path = "chair/textures/wood.png" if "textures" in image_name else "chair/wood.png"
    write(
        folder,
        {
            "chair/a.obj": SQUARE_OBJ.format(library="mtllib ./a.mtl"),
            "chair/a.mtl": f"newmtl wood\nKd 0 0 0\nmap_Kd {image_name}\n",
            image_path: png(pixels),
        },
    )
    mesh = read(folder, "chair/a.obj")
    assert [texture.tolist() for texture in mesh.textures] == [pixels]
    assert mesh.face_textures is not None
    assert mesh.face_textures.tolist() == [0, 0]
    assert mesh.vertex_uv is not None
    assert np.array_equal(mesh.vertex_uv, mesh.vertices[:, :2])  # (0, 0) is the texture's bottom left


def test_a_part_without_its_texture_has_the_materials_colour(folder: str) -> None:
    write(
        folder,
        {
            "a.obj": SQUARE_OBJ.format(library="mtllib a.mtl"),
            "a.mtl": "newmtl wood\nKd 1 0.2 0\nmap_Kd ../../gone.png\n",
            "b.obj": SQUARE_OBJ.format(library="mtllib gone.mtl"),
        },
    )
    mesh = read(folder, "a.obj")
    assert mesh.textures == ()
    assert mesh.vertex_colours is not None
    assert mesh.vertex_colours.tolist() == [[255, 51, 0]] * 4
    assert read(folder, "b.obj").vertex_colours is None


def test_parts_with_a_texture_and_parts_without_are_told_apart(folder: str) -> None:
    library = "newmtl wood\nmap_Kd wood.png\nnewmtl steel\nKd 0 0 1\n"
    text = SQUARE_OBJ.format(library="mtllib a.mtl") + "usemtl steel\nf 1 2 4\n"
    write(folder, {"a.obj": text, "a.mtl": library, "wood.png": png([[[255, 0, 0]]])})
    mesh = read(folder, "a.obj")
    assert mesh.face_textures is not None
    assert sorted(mesh.face_textures.tolist()) == [-1, 0, 0]
    assert mesh.vertex_colours is not None
    steel = mesh.faces[mesh.face_textures == -1]
    assert mesh.vertex_colours[steel[0]].tolist() == [[0, 0, 255]] * 3


def test_nothing_outside_of_the_source_is_read(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png([[[255, 0, 0]]]))
    for name in ("../secret.png", str(tmp_path / "secret.png")):
        write(str(tmp_path / "source"), {"a.obj": SQUARE_OBJ.format(library="mtllib a.mtl")})
        write(str(tmp_path / "source"), {"a.mtl": f"newmtl wood\nmap_Kd {name}\n"})
        assert read(str(tmp_path / "source"), "a.obj").textures == ()


def test_faces_may_count_backwards_from_where_they_stand(tmp_path: Path) -> None:
    two = "".join(f"v {x} 0 0\nv {x + 1} 0 0\nv {x} 1 0\nvn 0 0 1\nf -3//-1 -2//-1 -1//-1\n" for x in (0, 5))
    write(str(tmp_path), {"a.obj": two})
    mesh = read(str(tmp_path), "a.obj")
    assert sorted(mesh.vertices[mesh.faces][:, 0, 0].tolist()) == [0, 5]


@pytest.mark.parametrize("kind", ["face", "vertex"])
def test_colours_of_a_ply_are_kept(tmp_path: Path, kind: str) -> None:
    box = BOX.copy()
    if kind == "face":
        box.visual.face_colors = np.tile([*GREEN, 255], (12, 1))
    else:
        box.visual.vertex_colors = np.tile([*GREEN, 255], (8, 1))
    box.export(tmp_path / "box.ply")
    mesh = read(str(tmp_path), "box.ply")
    colours, other = (mesh.face_colours, mesh.vertex_colours)[:: 1 if kind == "face" else -1]
    assert colours is not None
    assert colours.tolist() == [GREEN] * len(colours)
    assert other is None


def test_text_and_binary_stl_agree(tmp_path: Path) -> None:
    write(str(tmp_path), {"text.stl": BOX.export(file_type="stl_ascii"), "binary.stl": BOX.export(file_type="stl")})
    text, binary = (read(str(tmp_path), f"{name}.stl") for name in ("text", "binary"))
    assert np.allclose(text.vertices[text.faces], binary.vertices[binary.faces])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.off", b"", "off: the file is empty"),
        ("short.off", b"OFF\n8 12 0\n0 0 0\n", "fetch it again"),
        ("faceless.obj", b"v 0 0 0\nv 1 0 0\n", "no triangles: only points"),
        ("lines.obj", b"v 0 0 0\nv 1 0 0\nl 1 2\n", "no triangles"),
        ("index.obj", b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n", r"cannot be read|names vertex"),
        ("header.ply", b"ply\nformat", "cannot be read"),
        ("cloud.ply", trimesh.PointCloud(BOX.vertices).export(file_type="ply"), "--format point_folder"),
        ("text.stl", b"solid", r"cannot be read|no triangles"),
        ("zeros.stl", b"\0" * 84, "no triangles"),
        ("long.stl", b"\0" * 80 + struct.pack("<I", 1000) + b"\0" * 50, "announces 50,084 bytes, but there are 134"),
        ("magic.glb", b"glTF", "cannot be read"),
        ("json.gltf", b"{", "cannot be read"),
        ("list.gltf", b"[]", "no glTF"),
        ("empty.gltf", b"{}", "an empty scene"),
    ],
)
def test_a_damaged_file_is_a_broken_shape_and_says_why(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    write(str(tmp_path), {name: content})
    with pytest.raises(ShapeError, match=message):
        read(str(tmp_path), name)


def test_a_file_that_has_gone_is_a_broken_shape(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match=r"^.*a\.off is missing$"):
        read(str(tmp_path), "a.off")
