"""Every format on small files with its quirks, and what is said where they are not what they promise."""

import csv
import pickle
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh

from datastore.demo import CLASS_NAMES
from datastore.errors import AskedWrongly, SourceError
from datastore.mesh import Mesh
from datastore.sources import Listing, ShapeError, ShapeReference, Source, open_source
from datastore.sources.mesh_bundle import MeshBundle
from datastore.sources.mesh_folder import MESH_SUFFIXES, MeshFolder

BOX = trimesh.creation.box(extents=[1, 2, 3])


def write_box(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gltf":
        for name, content in trimesh.Scene(BOX).export(file_type="gltf").items():
            (path.parent / (path.name if name == "model.gltf" else name)).write_bytes(content)
    else:
        BOX.export(path)


def load_only(source: Source) -> Mesh:
    (shape,) = source.listing.shapes
    return source.load(shape)


# --- demo


def test_the_demo_corpus_lists_and_loads_its_shapes() -> None:
    source = open_source("demo://shapes?count=24&seed=3")
    assert (source.FORMAT, len(source.listing.shapes)) == ("demo", 24)
    assert source.listing.class_names == CLASS_NAMES
    assert source.listing.coloured
    mesh = source.load(source.listing.shapes[5])
    assert mesh.face_parts is not None
    parts = {source.listing.part_names[part] for part in mesh.face_parts}
    assert all(part.startswith(CLASS_NAMES[source.listing.shapes[5].label]) for part in parts)


def test_another_seed_is_another_list_and_the_same_url_the_same_one() -> None:
    hashes = [open_source(f"demo://shapes?count=24&seed={seed}").listing.hash for seed in (0, 1, 0)]
    assert hashes[0] == hashes[2] != hashes[1]


# --- mesh folder


@pytest.mark.parametrize("suffix", MESH_SUFFIXES)
def test_each_mesh_format_gives_the_same_box(tmp_path: Path, suffix: str) -> None:
    write_box(tmp_path / f"chair/train/thing{suffix}")
    mesh = load_only(open_source(str(tmp_path)))
    assert mesh.vertices.dtype == np.float32
    assert mesh.faces.dtype == np.int32
    corners = mesh.vertices[mesh.faces]
    assert np.allclose(np.ptp(mesh.vertices, axis=0), [1, 2, 3])
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1).sum() / 2
    assert area == pytest.approx(22)
    assert mesh.face_colours is None
    assert mesh.vertex_colours is None


@pytest.mark.parametrize("header", ["OFF\n8 12 0\n", "OFF8 12 0\n", "OFF 8 12 0\n"])
def test_off_headers_that_lack_their_line_break_are_read(tmp_path: Path, header: str) -> None:
    body = BOX.export(file_type="off").split("\n", 2)[2]
    (tmp_path / "box.off").write_text(header + body)
    assert len(load_only(open_source(str(tmp_path))).faces) == 12


def test_class_and_split_come_from_the_folders_in_either_order(tmp_path: Path) -> None:
    for place in ("chair/train/a", "chair/test/b", "test/night_stand/c", "night_stand/valid/d", "sofa/e", "sofa/sub/f"):
        write_box(tmp_path / f"{place}.off")
    for ignored in ("chair/train/.a.off", "__MACOSX/chair/g.off", "chair/train/notes.txt"):
        write_box(tmp_path / f"{ignored}.off") if ignored.endswith("off") else (tmp_path / ignored).write_text("")
    listing = open_source(str(tmp_path)).listing
    assert listing.class_names == ("chair", "night_stand", "sofa")
    assert listing.splits == ("train", "val", "test")
    assert [(shape.id, listing.class_names[shape.label], shape.split) for shape in listing.shapes] == [
        ("chair/test/b", "chair", "test"),
        ("chair/train/a", "chair", "train"),
        ("night_stand/valid/d", "night_stand", "val"),
        ("sofa/e", "sofa", "train"),
        ("sofa/sub/f", "sofa", "train"),
        ("test/night_stand/c", "night_stand", "test"),
    ]


def test_files_without_folders_are_unlabelled_and_for_training(tmp_path: Path) -> None:
    write_box(tmp_path / "a.stl")
    write_box(tmp_path / "b.STL".lower())
    listing = open_source(str(tmp_path)).listing
    assert listing.class_names == ()
    assert {(shape.label, shape.split) for shape in listing.shapes} == {(-1, "train")}


def test_parts_of_a_scene_stand_where_the_scene_puts_them(tmp_path: Path) -> None:
    scene = trimesh.Scene()
    for x in (-5.0, 5.0):
        scene.add_geometry(BOX, transform=trimesh.transformations.translation_matrix([x, 0, 0]))
    mirrored = np.diag([1.0, -1.0, 1.0, 1.0])
    mirrored[1, 3] = 9
    scene.add_geometry(BOX, transform=mirrored)
    scene.export(tmp_path / "scene.glb")
    mesh = load_only(open_source(str(tmp_path)))
    assert len(mesh.faces) == 36
    assert np.allclose(mesh.vertices.min(axis=0), [-5.5, -1, -1.5])
    assert np.allclose(mesh.vertices.max(axis=0), [5.5, 10, 1.5])
    # every box, the mirrored one too, still has its outside outside: their volumes add up
    assert trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).volume == pytest.approx(18, rel=1e-4)


def test_lines_and_points_of_a_scene_are_left_out(tmp_path: Path) -> None:
    scene = trimesh.Scene([BOX, trimesh.load_path(np.array([[0.0, 0, 0], [50, 0, 0]]))])
    scene.export(tmp_path / "scene.glb")
    assert np.ptp(load_only(open_source(str(tmp_path))).vertices, axis=0).max() == pytest.approx(3)


def test_colours_of_vertices_faces_and_materials_are_kept(tmp_path: Path) -> None:
    by_face = BOX.copy()
    by_face.visual.face_colors = np.tile([10, 200, 30, 255], (12, 1))
    by_face.export(tmp_path / "face.ply")
    by_vertex = BOX.copy()
    by_vertex.visual.vertex_colors = np.tile([10, 200, 30, 255], (8, 1))
    by_vertex.export(tmp_path / "vertex.ply")
    by_material = BOX.copy()
    green = trimesh.visual.material.PBRMaterial(baseColorFactor=[10, 200, 30, 255])
    by_material.visual = trimesh.visual.TextureVisuals(material=green)
    by_material.export(tmp_path / "material.glb")
    source = open_source(str(tmp_path))
    assert source.listing.coloured
    for shape in source.listing.shapes:
        mesh = source.load(shape)
        colours = mesh.vertex_colours if mesh.vertex_colours is not None else mesh.face_colours
        assert colours is not None
        assert np.array_equal(colours, np.tile([10, 200, 30], (len(colours), 1))), shape.id


def test_a_scene_of_coloured_and_plain_parts_is_grey_where_it_is_plain(tmp_path: Path) -> None:
    painted = BOX.copy()
    painted.visual.vertex_colors = np.tile([10, 200, 30, 255], (8, 1))
    scene = trimesh.Scene()
    scene.add_geometry(painted)
    scene.add_geometry(BOX, transform=trimesh.transformations.translation_matrix([9, 0, 0]))
    scene.export(tmp_path / "scene.glb")
    mesh = load_only(open_source(str(tmp_path)))
    assert mesh.vertex_colours is not None
    plain = mesh.vertices[:, 0] > 5
    assert np.array_equal(np.unique(mesh.vertex_colours[~plain], axis=0), [[10, 200, 30]])
    assert len(np.unique(mesh.vertex_colours[plain])) == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.off", b""),
        ("short.off", b"OFF\n8 12 0\n0 0 0\n"),
        ("index.off", b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n"),
        ("faceless.obj", b"v 0 0 0\nv 1 0 0\n"),
        ("header.ply", b"ply\nformat"),
        ("text.stl", b"solid"),
        ("zeros.stl", b"\0" * 84),
        ("long.stl", b"\0" * 80 + struct.pack("<I", 1000) + b"\0" * 50),
        ("magic.glb", b"glTF"),
        ("json.gltf", b"{"),
    ],
)
def test_a_damaged_file_is_a_broken_shape_and_no_crash(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ShapeError, match=r"cannot be read|no triangles"):
        load_only(open_source(str(tmp_path)))


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    write_box(tmp_path / "chair/a.off")
    write_box(tmp_path / "chair/a.obj")
    with pytest.raises(SourceError, match=r"2 shapes are named 'chair/a' \(at chair/a.obj, chair/a.off\)"):
        open_source(str(tmp_path))


def test_a_file_that_changes_its_size_changes_the_list(tmp_path: Path) -> None:
    write_box(tmp_path / "a.off")
    before = open_source(str(tmp_path)).listing.hash
    with (tmp_path / "a.off").open("a") as file:
        file.write("# \n")
    assert open_source(str(tmp_path)).listing.hash != before


# --- mesh bundle

ROWS = [
    {"id": "o0", "class": "chair", "split": "train", "licence": "CC0-1.0"},
    {"id": "o1", "class": "bench", "split": "test", "licence": "CC0-1.0"},
    {"id": "o2", "class": "", "split": "unlabelled", "licence": "CC0-1.0"},
]


def write_bundle(folder: Path, rows: Sequence[dict[str, str]] = ROWS, **changes: Any) -> Path:
    """Boxes of growing size, one a row."""
    folder.mkdir(exist_ok=True)
    columns = list(rows[0]) if rows else ["id", "class", "split"]
    with (folder / "index.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    arrays = {
        "vertices": np.concatenate([BOX.vertices * (row + 1) for row in range(len(ROWS))]).astype(np.float32),
        "faces": np.concatenate([BOX.faces] * len(ROWS)).astype(np.int32),
        "vptr": np.arange(len(ROWS) + 1) * 8,
        "fptr": np.arange(len(ROWS) + 1) * 12,
    }
    arrays |= changes
    np.savez_compressed(folder / "meshes.npz", **{name: array for name, array in arrays.items() if array is not None})
    return folder


def test_a_bundle_gives_each_row_its_mesh(tmp_path: Path) -> None:
    source = open_source(str(write_bundle(tmp_path / "bundle")))
    listing = source.listing
    assert source.FORMAT == "mesh_bundle"
    assert listing.class_names == ("bench", "chair")
    assert listing.splits == ("train", "test", "unlabelled")
    assert [(shape.id, shape.label, shape.split) for shape in listing.shapes] == [
        ("o0", 1, "train"),
        ("o1", 0, "test"),
        ("o2", -1, "unlabelled"),
    ]
    assert (listing.licence, listing.coloured) == ("CC0-1.0", False)
    for row, shape in enumerate(listing.shapes):
        mesh = source.load(shape)
        assert np.allclose(np.ptp(mesh.vertices, axis=0), np.array([1, 2, 3]) * (row + 1))
        assert np.array_equal(mesh.faces, BOX.faces)


def test_a_bundle_travels_without_its_arrays(tmp_path: Path) -> None:
    source = open_source(str(write_bundle(tmp_path / "bundle")))
    before = len(pickle.dumps(source))
    source.load(source.listing.shapes[0])
    assert len(pickle.dumps(source)) == before
    copy = pickle.loads(pickle.dumps(source))
    assert np.array_equal(copy.load(copy.listing.shapes[2]).vertices, source.load(source.listing.shapes[2]).vertices)


def test_other_content_behind_the_same_names_is_another_list(tmp_path: Path) -> None:
    before = open_source(str(write_bundle(tmp_path / "bundle"))).listing.hash
    assert open_source(str(write_bundle(tmp_path / "bundle", licence=None))).listing.hash == before
    changed = write_bundle(tmp_path / "bundle", vertices=np.zeros((24, 3), np.float32))
    assert open_source(str(changed)).listing.hash != before


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: write_bundle(folder, ROWS[:2]), "2 rows, but vptr in meshes.npz bounds 3 meshes"),
        (lambda folder: write_bundle(folder, faces=None), "has no faces; it holds"),
        (lambda folder: write_bundle(folder, [{**row, "id": "same"} for row in ROWS]), "3 shapes are named 'same'"),
        (
            lambda folder: write_bundle(folder, [{**row, "split": ""} for row in ROWS]),
            "line 2: id and split must not be",
        ),
        (lambda folder: write_bundle(folder, [{"id": row["id"]} for row in ROWS]), "has no column class, split"),
        (lambda folder: (folder / "meshes.npz").unlink(), "missing: meshes.npz"),
        (lambda folder: truncate(folder / "meshes.npz"), "only a part of one"),
        (lambda folder: write_bare_array(folder / "meshes.npz"), "one bare array"),
        (
            lambda folder: (folder / "index.csv").write_bytes(b"id,class,split\n\xff\xfe,a,b\n"),
            "cannot be read as a table",
        ),
    ],
)
def test_a_bundle_that_breaks_its_promise_is_refused(
    tmp_path: Path, break_it: Callable[[Path], object], message: str
) -> None:
    folder = write_bundle(tmp_path / "bundle")
    break_it(folder)
    with pytest.raises(SourceError, match=message):
        MeshBundle.open(str(folder))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def write_bare_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def test_pointers_that_do_not_fit_the_arrays_are_noticed(tmp_path: Path) -> None:
    source = open_source(str(write_bundle(tmp_path / "bundle", vptr=np.array([0, 8, 16, 17]))))
    with pytest.raises(SourceError, match="vptr does not rise from 0 to 24"):
        source.load(source.listing.shapes[0])


# --- recognising


def test_an_unknown_format_lists_the_known_ones(tmp_path: Path) -> None:
    write_box(tmp_path / "a.off")
    with pytest.raises(AskedWrongly, match=r"(?s)no format 'fbx'.*demo .*mesh_bundle .*mesh_folder "):
        open_source(str(tmp_path), "fbx")


def test_a_format_that_is_named_is_not_guessed(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    write_box(bundle / "a.off")
    assert isinstance(open_source(str(bundle)), MeshBundle)
    assert isinstance(open_source(str(bundle), "mesh_folder"), MeshFolder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "nothing is there"),
        (lambda path: path.mkdir(), "the folder is empty"),
        (lambda path: (path.mkdir(), (path / "a.fbx").write_text("")), "the folder holds a.fbx"),
        (lambda path: path.write_text(""), "this is a file"),
    ],
)
def test_what_is_no_source_is_described(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    make(tmp_path / "source")
    with pytest.raises(SourceError, match=f"{message}(?s:.*)class/split/name"):
        open_source(str(tmp_path / "source"))
    with pytest.raises(SourceError, match=r"no file below it ends in|This format is a folder"):
        open_source(str(tmp_path / "source"), "mesh_folder")


def test_a_remote_folder_is_refused_with_a_way_out() -> None:
    with pytest.raises(SourceError, match="copy it here or mount it"):
        open_source("s3://bucket/meshes")


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([], "no shapes"),
        ([ShapeReference("a", 2, "train", "")], "label 2, but there are 2 classes"),
        ([ShapeReference("a", 0, "dev", "")], "split 'dev'"),
    ],
)
def test_a_listing_that_contradicts_itself_is_refused(shapes: list[ShapeReference], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        Listing(shapes=shapes, class_names=("chair", "table"), splits=("train",))


def test_the_order_of_shapes_belongs_to_the_list() -> None:
    shapes = [ShapeReference(name, 0, "train", "") for name in "ab"]
    forward, backward = (Listing(order, ("chair",), ("train",)) for order in (shapes, shapes[::-1]))
    assert forward.hash != backward.hash
