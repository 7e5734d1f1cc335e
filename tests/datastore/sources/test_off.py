"""OFF files as they lie about, not only as the format would have them."""

import numpy as np
import pytest
import trimesh

from datastore.sources import ShapeError
from datastore.sources.off import read_off

SQUARE = b"0 0 0\n1 0 0\n1 1 0\n0 1 0\n"
TWO_TRIANGLES = b"3 0 1 2\n3 0 2 3\n"


@pytest.mark.parametrize(
    "header",
    [
        b"OFF\n4 2 5\n",
        b"OFF4 2 5\n",
        b"OFF 4 2 5\n",
        b"OFF\r\n4 2 5\r\n",
        b"\n# made by hand\nOFF # the format\n# counts\n4 2\n\n",
        b"NOFF\n4 2 0\n",
    ],
)
def test_headers_may_be_glued_spaced_or_commented(header: bytes) -> None:
    normals = b" 0 0 1" if header.startswith(b"N") else b""
    mesh = read_off(header + SQUARE.replace(b"\n", normals + b"\n") + TWO_TRIANGLES)
    assert mesh.vertices.tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]]
    assert mesh.faces.tolist() == [[0, 1, 2], [0, 2, 3]]
    assert (mesh.vertices.dtype, mesh.faces.dtype) == (np.float32, np.int32)


def test_polygons_become_fans_and_lines_nothing() -> None:
    mesh = read_off(b"OFF\n4 3 0\n" + SQUARE + b"2 0 1\n4 0 1 2 3\n3 0 1 3\n")
    assert mesh.faces.tolist() == [[0, 1, 2], [0, 2, 3], [0, 1, 3]]


@pytest.mark.parametrize("colour", [b"255 128 0 255", b"1.0 0.5019608 0.0 1.0"])
def test_colours_of_vertices_are_whole_numbers_or_fractions(colour: bytes) -> None:
    mesh = read_off(b"COFF\n4 2 0\n" + SQUARE.replace(b"\n", b" " + colour + b"\n") + TWO_TRIANGLES)
    assert mesh.vertex_colours is not None
    assert mesh.vertex_colours.tolist() == [[255, 128, 0]] * 4


def test_colours_of_polygons_are_those_of_their_triangles() -> None:
    mesh = read_off(b"OFF\n4 2 0\n" + SQUARE + b"4 0 1 2 3 10 20 30\n3 0 1 3 40 50 60\n")
    assert mesh.face_colours is not None
    assert mesh.face_colours.tolist() == [[10, 20, 30], [10, 20, 30], [40, 50, 60]]


def test_the_quick_way_and_the_careful_one_agree() -> None:
    ball = trimesh.creation.icosphere(2)
    text = ball.export(file_type="off").encode()
    quick, careful = read_off(text), read_off(text.replace(b"OFF", b"NOFF", 1))
    assert np.array_equal(quick.vertices, careful.vertices)
    assert np.array_equal(quick.faces, careful.faces)
    assert np.allclose(quick.vertices, ball.vertices, atol=1e-6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"solid thing", "does not begin with OFF"),
        (b"OFF BINARY\n\0\0", "binary OFF"),
        (b"4OFF\n1 1 0\n", "three dimensions"),
        (b"OFF\nfour two\n", "should count vertices and faces"),
        (b"OFF\n", "should count vertices and faces"),
        (b"OFF\n4 2 5\n" + SQUARE + b"3 0 1 2\n", r"ends after 5 of 6 lines"),
        (b"OFF\n4 2 5\n" + SQUARE + b"3 0 1 2\n3 0 2", "a face of 3 corners names 2"),
        (b"OFF\n4 2 5\n" + SQUARE + b"3 0 1 2\n3 0 2 9\n", "names vertex 9, and there are 4"),
        (b"OFF\n4 2 5\n" + SQUARE + b"3 0 1 2\n3 0 2 -1\n", "names vertex -1"),
        (b"OFF\n4 0 0\n" + SQUARE, "no triangles"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(content: bytes, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        read_off(content)
