"""Clouds in PLY files, of every flavour that writers produce."""

import struct

import numpy as np
import pytest

from datastore.sources import ShapeError
from datastore.sources.ply_cloud import read_ply_cloud

POINTS = np.array([[0.5, -1.25, 3], [4, 5, 6], [-7, 8, 9.5]], np.float32)
XYZ = "property float x\nproperty float y\nproperty float z\n"
FACES = "element face 1\nproperty list uchar int vertex_indices\n"


def header(kind: str, properties: str = XYZ, after: str = "", count: int = 3) -> bytes:
    return (
        f"ply\nformat {kind} 1.0\ncomment made for a test\nelement vertex {count}\n{properties}{after}end_header\n"
    ).encode()


def ascii_rows(rows: np.ndarray = POINTS) -> bytes:
    return "".join(" ".join(f"{value:g}" for value in row) + "\n" for row in rows).encode()


@pytest.mark.parametrize(
    "content",
    [
        header("ascii") + ascii_rows(),
        (header("ascii") + ascii_rows()).replace(b"\n", b"\r\n"),
        header("ascii", after=FACES) + ascii_rows() + b"3 0 1 2\n",
        header("binary_little_endian") + POINTS.astype("<f4").tobytes(),
        header("binary_little_endian", after=FACES) + POINTS.tobytes() + struct.pack("<Biii", 3, 0, 1, 2),
        header("binary_big_endian", XYZ.replace("float", "double")) + POINTS.astype(">f8").tobytes(),
    ],
    ids=["ascii", "carriage returns", "ascii with faces", "little endian", "with faces", "big endian doubles"],
)
def test_every_flavour_gives_the_same_points(content: bytes) -> None:
    cloud = read_ply_cloud(content, "a.ply")
    assert cloud.points.dtype == np.float32
    assert np.array_equal(cloud.points, POINTS)
    assert cloud.normals is None
    assert cloud.colours is None


def test_normals_and_colours_are_found_by_name_in_any_order() -> None:
    properties = (
        "property uchar red\nproperty uchar green\nproperty uchar blue\nproperty uchar alpha\n"
        "property float nx\nproperty float ny\nproperty float nz\nproperty short quality\n" + XYZ
    )
    row = "<4B3fh3f"
    content = header("binary_little_endian", properties, count=2)
    content += struct.pack(row, 1, 2, 3, 255, 0, 0, 1, -5, 10, 11, 12)
    content += struct.pack(row, 4, 5, 6, 255, 0, 1, 0, -5, 20, 21, 22)
    cloud = read_ply_cloud(content, "a.ply")
    assert cloud.points.tolist() == [[10, 11, 12], [20, 21, 22]]
    assert cloud.normals is not None and cloud.normals.tolist() == [[0, 0, 1], [0, 1, 0]]
    assert cloud.colours is not None and cloud.colours.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert cloud.colours.dtype == np.uint8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not begin with a PLY header"),
        (b"<html>", "does not begin with a PLY header"),
        (header("ascii")[:40], "does not begin with a PLY header"),
        (header("ascii") + ascii_rows(POINTS[:2]), "ends after 2 of its 3 vertices"),
        (header("ascii") + ascii_rows()[:-5], "lines of different lengths|ends after"),
        (header("ascii") + ascii_rows().replace(b"4", b"four"), "no numbers"),
        (header("binary_little_endian") + POINTS.tobytes()[:-1], "ends after 2 of its 3 vertices"),
        (header("ascii") + ascii_rows().replace(b"4", b"nan"), "vertex 1 has coordinates that are not finite"),
        (header("ascii") + ascii_rows().replace(b"4", b"1e300"), "vertex 1 has coordinates that are not finite"),
        (header("middle_endian"), "makes no sense"),
        (header("ascii", XYZ.replace("float", "quad")), "makes no sense"),
        (header("ascii", XYZ.replace(" z", " w")), "properties x, y and z"),
        (header("ascii", XYZ + "property list uchar int of\n"), "lists at vertices"),
        (header("ascii", count=0), "0 vertices"),
        (b"ply\nformat ascii 1.0\n" + FACES.encode() + header("ascii")[20:], "vertices first"),
    ],
)
def test_what_is_no_such_file_is_named_with_its_reason(content: bytes, message: str) -> None:
    with pytest.raises(ShapeError, match=rf"^a\.ply.*({message})"):
        read_ply_cloud(content, "a.ply")
