"""Folders of clouds: what columns mean, what folders mean, and what is a mesh after all."""

import struct
from pathlib import Path

import numpy as np
import pytest
import trimesh

from datastore.errors import AskedWrongly, SourceError
from datastore.shape import PointCloud
from datastore.sources import ReadingOptions, ShapeError, open_source
from datastore.sources.files import SourceFiles
from datastore.sources.point_folder import POINT_SUFFIXES, PointFolder

POINTS = np.random.default_rng(0).normal(size=(40, 3)).round(3).astype(np.float32)
NORMALS = POINTS / np.linalg.norm(POINTS, axis=1, keepdims=True)
COLOURS = np.random.default_rng(1).integers(0, 256, size=(40, 3)).astype(np.uint8)


def text(*columns: np.ndarray, separator: str = " ", header: str = "") -> str:
    rows = np.concatenate(columns, axis=1, dtype=np.float64)
    return header + "".join(separator.join(f"{value:.6f}" for value in row) + "\n" for row in rows)


def ply(with_faces: bool) -> bytes:
    """As scanners write them: little-endian floats, three bytes of colour."""
    faces = "element face 1\nproperty list uchar int vertex_indices\n" if with_faces else "element face 0\n"
    fields = "property float {}\n" * 3 + "property uchar {}\n" * 3
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex 40\n{fields.format(*'xyz', 'red', 'green', 'blue')}{faces}end_header\n"
    body = b"".join(struct.pack("<3f3B", *point, *colour) for point, colour in zip(POINTS, COLOURS, strict=True))
    return header.encode() + body + (struct.pack("<B3i", 3, 0, 1, 2) if with_faces else b"")


def write(path: Path, content: str | bytes | np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def only_cloud(folder: Path) -> PointCloud:
    source = open_source(str(folder))
    assert source.FORMAT == "point_folder"
    (shape,) = source.listing.shapes
    cloud = source.load(shape).geometry
    assert isinstance(cloud, PointCloud)
    assert cloud.points.dtype == np.float32
    assert np.allclose(cloud.points, POINTS, atol=1e-6)
    assert source.listing.with_normals == (cloud.normals is not None)
    assert source.listing.coloured == (cloud.colours is not None)
    return cloud


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.xyz", text(POINTS)),
        ("a.txt", text(POINTS, separator=",")),
        ("a.txt", text(POINTS, separator=", ")),
        ("a.XYZ", text(POINTS, separator="\t").replace("\n", "\r\n")),
        ("a.txt", text(POINTS, separator=";")),
        ("a.pts", text(POINTS, header="40\n")),
        ("a.pts", text(POINTS, POINTS[:, :1], header="40\n")),
        ("a.csv", text(POINTS, separator=",", header="x,y,z\n")),
        ("a.csv", text(POINTS[:, ::-1], separator=",", header='"Z","Y","X"\n')),
        (
            "a.csv",
            text(POINTS, separator=",", header="x,y,z,name\n").replace("\n", ",chair\n").replace("name,chair", "name"),
        ),
        ("a.txt", text(POINTS, header="//X Y Z\n")),
        ("a.txt", text(POINTS, header="# x y z\n")),
        ("a.npy", POINTS),
        ("a.npy", POINTS.astype(np.float64)),
    ],
)
def test_points_are_read_from_every_kind_of_file(tmp_path: Path, name: str, content: str | np.ndarray) -> None:
    write(tmp_path / "set" / name, content)
    cloud = only_cloud(tmp_path / "set")
    assert cloud.normals is None
    assert cloud.colours is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.xyz", text(POINTS, NORMALS)),
        ("a.csv", text(POINTS, NORMALS * 7, separator=",", header="x,y,z,nx,ny,nz\n")),
        ("a.csv", text(NORMALS, POINTS, separator=",", header="normal_x,normal_y,normal_z,x,y,z\n")),
        ("a.npy", np.concatenate([POINTS, NORMALS], axis=1)),
    ],
)
def test_columns_of_length_1_are_normals(tmp_path: Path, name: str, content: str | np.ndarray) -> None:
    write(tmp_path / "set" / name, content)
    cloud = only_cloud(tmp_path / "set")
    assert cloud.colours is None
    assert cloud.normals is not None
    directions = cloud.normals / np.linalg.norm(cloud.normals, axis=1, keepdims=True)
    assert np.allclose(directions, NORMALS, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", text(POINTS, COLOURS)),
        ("a.txt", text(POINTS, COLOURS / 255)),
        ("a.pts", text(POINTS, POINTS[:, :1], COLOURS, header="40\n")),
        ("a.csv", text(POINTS, COLOURS, separator=",", header="X,Y,Z,R,G,B\n")),
        ("a.csv", text(COLOURS, POINTS, separator=",", header="red,green,blue,x,y,z\n")),
        ("a.npy", np.concatenate([POINTS, COLOURS], axis=1)),
        ("a.ply", ply(with_faces=False)),
    ],
)
def test_other_columns_are_colours(tmp_path: Path, name: str, content: str | bytes | np.ndarray) -> None:
    write(tmp_path / "set" / name, content)
    cloud = only_cloud(tmp_path / "set")
    assert cloud.normals is None
    assert np.array_equal(cloud.colours, COLOURS)


@pytest.mark.parametrize("columns", [(NORMALS, COLOURS), (COLOURS, NORMALS)])
def test_normals_and_colours_are_told_apart_in_either_order(tmp_path: Path, columns: tuple[np.ndarray, ...]) -> None:
    write(tmp_path / "set/a.txt", text(POINTS, *columns))
    cloud = only_cloud(tmp_path / "set")
    assert np.allclose(cloud.normals, NORMALS, atol=1e-5)
    assert np.array_equal(cloud.colours, COLOURS)


def test_class_and_split_come_from_the_folders_in_either_order(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for place in (
        "chair/train/a.xyz",
        "chair/test/b.npy",
        "test/night_stand/c.xyz",
        "night_stand/valid/d.xyz",
        "sofa/e.xyz",
    ):
        write(folder / place, POINTS if place.endswith("npy") else text(POINTS))
    write(folder / "sofa/.hidden.xyz", text(POINTS))
    write(folder / "train_list.txt", "chair/a\n")
    write(folder / "classes.csv", "chair,1\n")
    listing = open_source(str(folder)).listing
    assert listing.class_names == ("chair", "night_stand", "sofa")
    assert listing.splits == ("train", "val", "test")
    assert [(shape.id, listing.class_names[shape.label], shape.split) for shape in listing.shapes] == [
        ("chair/test/b", "chair", "test"),
        ("chair/train/a", "chair", "train"),
        ("night_stand/valid/d", "night_stand", "val"),
        ("sofa/e", "sofa", "train"),
        ("test/night_stand/c", "night_stand", "test"),
    ]


def test_files_of_one_name_keep_their_suffixes(tmp_path: Path) -> None:
    write(tmp_path / "set/a.xyz", text(POINTS))
    write(tmp_path / "set/a.pts", text(POINTS))
    listing = open_source(str(tmp_path / "set")).listing
    assert [(shape.id, shape.label, shape.split) for shape in listing.shapes] == [
        ("a.pts", -1, "train"),
        ("a.xyz", -1, "train"),
    ]


@pytest.mark.parametrize(
    ("places", "is_cloud"),
    [
        (["chair/a.ply"], True),
        (["chair/a.mesh.ply"], False),
        (["chair/a.off"], False),
        (["chair/a.ply", "chair/b.off"], True),
        (["chair/train/deep/a.xyz"], True),
        (["chair/readme.txt"], False),
        (["chair/readme.txt", "chair/z.xyz"], True),
        (["readme.txt", "chair/a.off"], False),
        (["index.csv", "chair/a.glb"], False),
        ([], False),
    ],
)
def test_the_first_file_that_tells_decides_what_the_folder_is(
    tmp_path: Path, places: list[str], is_cloud: bool
) -> None:
    for place in places:
        content = text(POINTS) if place.endswith(".xyz") else "read me first, please"
        write(tmp_path / place, ply(with_faces="mesh" in place) if place.endswith(".ply") else content)
    assert PointFolder.recognises(SourceFiles(tmp_path)) == is_cloud


def test_recognising_looks_at_few_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(200):
        (tmp_path / f"class_{number}/train").mkdir(parents=True)
    looked_at: list[str] = []
    entries = SourceFiles.entries
    monkeypatch.setattr(
        SourceFiles, "entries", lambda self, folder="": looked_at.append(folder) or entries(self, folder)
    )
    assert not PointFolder.recognises(SourceFiles(tmp_path))
    assert len(looked_at) < 40


def test_a_ply_with_faces_goes_to_the_meshes(tmp_path: Path) -> None:
    box = trimesh.creation.box()
    (tmp_path / "set/chair").mkdir(parents=True)
    box.export(tmp_path / "set/chair/box.ply")
    assert open_source(str(tmp_path / "set")).FORMAT == "mesh_folder"
    write(tmp_path / "set/chair/a.ply", ply(with_faces=False))
    source = open_source(str(tmp_path / "set"))
    assert source.FORMAT == "point_folder"
    with pytest.raises(ShapeError, match=r"box\.ply has faces: keep meshes in a folder of their own"):
        source.load(source.listing.shapes[1])


def test_what_the_first_clouds_have_is_promised_for_all(tmp_path: Path) -> None:
    write(tmp_path / "set/a.xyz", "damaged")
    write(tmp_path / "set/b.xyz", text(POINTS, NORMALS))
    write(tmp_path / "set/c.xyz", text(POINTS))
    listing = open_source(str(tmp_path / "set")).listing
    assert (len(listing.shapes), listing.with_normals, listing.coloured) == (3, True, False)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xyz", "", "is empty"),
        ("a.xyz", "1 2 3\n4 5\n", "is no table of numbers, or only a part of one"),
        ("a.xyz", "1 2 nan\n", "some coordinates are not finite, the first of them in row 0"),
        ("a.xyz", "1 2\n", "begins with '1 2', which is neither a row of numbers nor a header with columns x, y and z"),
        ("a.xyz", "height,width,depth\n1,2,3\n", "begins with 'height,width,depth', which is neither"),
        ("a.xyz", "1 2 3 4 5\n", "has 1 points of 5 numbers, and 3, 6 or 9 are known"),
        ("a.xyz", "1 2 3 4 5 600\n", "its colours are neither within 0 to 1 nor within 0 to 255"),
        ("a.xyz", "1 2 3 4 5 6 7 8 9\n", "columns 4 to 9 hold two colours"),
        ("a.pts", "3\n1 2 3\n4 5 6\n", "announces 3 points and has 2"),
        ("a.pts", "3\n", "begins with ''"),
        ("a.csv", "x,y,z\n", "holds no points"),
        ("a.csv", "x,y,z\n1,2\n", "is no table of numbers"),
        ("a.npy", np.zeros(3), r"is an array \(3,\), and a cloud is"),
        ("a.npy", np.zeros((4, 2)), "has 4 points of 2 numbers"),
        ("a.npy", np.zeros((0, 3)), "has 0 points of 3 numbers"),
        ("a.ply", ply(with_faces=False)[:-9], "ends after 39 of its 40 vertices"),
    ],
)
def test_a_file_that_is_no_cloud_breaks_it_alone(
    tmp_path: Path, name: str, content: str | bytes | np.ndarray, message: str
) -> None:
    write(tmp_path / "set" / name, content)
    with pytest.raises(SourceError, match=rf"{name}:? {message}"):
        open_source(str(tmp_path / "set"), "point_folder")
    write(tmp_path / "set/b.xyz", text(POINTS))
    source = open_source(str(tmp_path / "set"), "point_folder")
    with pytest.raises(ShapeError, match=rf"{name}:? {message}"):
        source.load(source.listing.shapes[0])
    source.load(source.listing.shapes[1])


def test_a_folder_without_clouds_says_what_would_be_one(tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=rf"the folder is empty\. No file below it ends in \{' '.join(POINT_SUFFIXES)}"
    ):
        open_source(str(tmp_path), "point_folder")
    with pytest.raises(AskedWrongly, match="has no variants"):
        open_source(str(tmp_path), "point_folder", ReadingOptions(variant="a"))


def test_another_size_of_a_file_is_another_list(tmp_path: Path) -> None:
    path = write(tmp_path / "set/a.xyz", text(POINTS))
    before = open_source(str(tmp_path / "set")).listing.hash
    path.write_text(text(POINTS[:-1]))
    assert open_source(str(tmp_path / "set")).listing.hash != before
