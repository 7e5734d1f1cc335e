"""Tables that name mesh files, and what is said of the line that is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh

from datastore.errors import SourceError
from datastore.mesh import Mesh
from datastore.sources import ReadingOptions, ShapeError, open_source
from datastore.sources.mesh_index import MeshIndex

ROWS = [
    {"path": "chairs/a.off", "id": "first", "class": "chair", "split": "test", "licence": "CC0-1.0"},
    {"path": "./b.stl", "id": "second", "class": "", "split": "train", "licence": ""},
]


def write_meshes(folder: Path) -> None:
    (folder / "chairs").mkdir(parents=True, exist_ok=True)
    trimesh.creation.box(extents=[1, 2, 3]).export(folder / "chairs/a.off")
    trimesh.creation.box(extents=[4, 5, 6]).export(folder / "b.stl")


def as_csv(rows: list[dict[str, Any]]) -> str:
    return "\n".join([",".join(rows[0]), *(",".join(str(value) for value in row.values()) for row in rows)]) + "\n"


def described(source: MeshIndex) -> list[tuple[str, int, str, str]]:
    return [(shape.id, shape.label, shape.split, shape.licence) for shape in source.listing.shapes]


FORMS: list[tuple[str, Callable[[list[dict[str, Any]]], str]]] = [
    ("index.csv", as_csv),
    ("index.json", json.dumps),
    ("index.json", lambda rows: json.dumps({row["id"]: {k: v for k, v in row.items() if k != "id"} for row in rows})),
]


@pytest.mark.parametrize(("name", "form"), FORMS)
@pytest.mark.parametrize("by_name", [False, True])
def test_a_table_lists_its_rows_in_its_order(
    tmp_path: Path, name: str, form: Callable[[list[dict[str, Any]]], str], by_name: bool
) -> None:
    write_meshes(tmp_path)
    (tmp_path / name).write_text(form(ROWS))
    source = open_source(str(tmp_path / name if by_name else tmp_path))
    assert isinstance(source, MeshIndex)
    assert described(source) == [("first", 0, "test", "CC0-1.0"), ("second", -1, "train", "")]
    assert (source.listing.class_names, source.listing.splits) == (("chair",), ("train", "test"))
    assert source.listing.licence == "CC0-1.0"
    for shape, size in zip(source.listing.shapes, ([1, 2, 3], [4, 5, 6]), strict=True):
        mesh = source.load(shape).geometry
        assert isinstance(mesh, Mesh)
        assert np.allclose(np.ptp(mesh.vertices, axis=0), size)


def test_a_path_is_all_that_a_row_needs(tmp_path: Path) -> None:
    write_meshes(tmp_path)
    (tmp_path / "index.csv").write_text('\ufeffPath,author,LICENSE\nchairs/a.off,"Doe, Jane",CC0-1.0\n\nb.stl,,\n')
    source = open_source(str(tmp_path))
    assert isinstance(source, MeshIndex)
    assert described(source) == [("chairs/a", -1, "train", "CC0-1.0"), ("b", -1, "train", "")]


def test_paths_may_lead_out_of_the_folder(tmp_path: Path) -> None:
    write_meshes(tmp_path / "meshes")
    (tmp_path / "lists").mkdir()
    paths = ["../meshes/b.stl", str(tmp_path / "meshes/chairs/a.off"), f"file://{tmp_path}/meshes/b.stl"]
    (tmp_path / "lists/some.csv").write_text("path\n" + "\n".join(paths))
    source = open_source(str(tmp_path / "lists/some.csv"))
    sizes = []
    for shape in source.listing.shapes:
        mesh = source.load(shape).geometry
        assert isinstance(mesh, Mesh)
        sizes.append(float(np.ptp(mesh.vertices[:, 0])))
    assert sizes == [4, 1, 4]


@pytest.mark.parametrize("url", ["some.csv", ".", "../lists"])
def test_paths_may_lead_out_of_the_folder_that_one_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    write_meshes(tmp_path / "meshes")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/some.csv").write_text("path\n../meshes/b.stl\n../meshes/chairs/a.off\n")
    (tmp_path / "lists/index.csv").write_text("path\n../meshes/b.stl\n../meshes/chairs/c.off\n")
    monkeypatch.chdir(tmp_path / "lists")
    if url == "some.csv":
        source = open_source(url)
        assert all(isinstance(source.load(shape).geometry, Mesh) for shape in source.listing.shapes)
    else:
        with pytest.raises(
            SourceError, match=r"index.csv, line 3: there is no file '../meshes/chairs/c.off' \(and 0 more"
        ):
            open_source(url)


def test_other_content_behind_the_same_table_is_another_list(tmp_path: Path) -> None:
    write_meshes(tmp_path)
    (tmp_path / "index.csv").write_text(as_csv(ROWS))
    before = open_source(str(tmp_path)).listing.hash
    assert open_source(str(tmp_path)).listing.hash == before
    trimesh.creation.icosphere(1).export(tmp_path / "b.stl")
    assert open_source(str(tmp_path)).listing.hash != before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,class\na,b\n", r"index.csv, line 1 has no column 'path'.*it has id, class.*--format mesh_folder"),
        ("path,calss\nb.stl,x\n", r"line 1: 'calss' looks like 'class' mistyped"),
        ("paths\nb.stl\n", r"line 1: 'paths' looks like 'path' mistyped"),
        ("path,Path\nb.stl,b.stl\n", "names column path more than once"),
        ("path,id\nb.stl,a\n,b\n", "line 3: path is empty"),
        ("path,id\nb.stl,\n", "line 2: id is empty"),
        ("path,split\n\nb.stl, \n", "line 3: split is empty"),
        ("path,id\nb.stl\n", "line 2 has 1 values, and the first line names 2 columns"),
        ("path,id\nb.stl,x\nchairs/a.off,x\n", r"line 2 and line 3 have the same id 'x'"),
        ("path\nb.blend\n", r"line 2: 'b.blend' is no mesh file"),
        ("path\nb.stl\ngone.stl\n", r"line 3: there is no file 'gone.stl'.*--partial"),
        ("path\n", "has no rows"),
        ('path\n"b.stl\n', "line 2: this is no CSV"),
    ],
)
def test_what_is_wrong_with_a_csv_is_said_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    write_meshes(tmp_path)
    (tmp_path / "index.csv").write_text(text)
    with pytest.raises(SourceError, match=message):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n{"path": "b.stl",}]', "line 2: this is no JSON"),
        ("[]", "lists no shapes"),
        ('"b.stl"', "lists no shapes"),
        ('["b.stl"]', "entry 1 is no object"),
        ('{"x": {"class": "chair"}}', "entry 'x' has no column 'path'"),
        ('[{"path": "b.stl"}, {"path": null}]', "entry 2: path is empty"),
        ('[{"path": "b.stl", "splitt": "test"}]', "entry 1: 'splitt' looks like 'split'"),
        ('[{"path": "b.stl"}, {"path": "b.stl"}]', "entry 1 and entry 2 have the same id 'b'"),
    ],
)
def test_what_is_wrong_with_a_json_is_said_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    write_meshes(tmp_path)
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(SourceError, match=message):
        open_source(str(tmp_path))


def test_names_near_a_column_that_is_there_are_no_typos(tmp_path: Path) -> None:
    write_meshes(tmp_path)
    (tmp_path / "index.csv").write_text("path,id,uid,class,class_id\nb.stl,a,7,chair,3\n")
    assert open_source(str(tmp_path)).listing.class_names == ("chair",)


def test_with_partial_a_missing_file_is_one_broken_shape(tmp_path: Path) -> None:
    write_meshes(tmp_path)
    (tmp_path / "index.csv").write_text("path\nb.stl\ngone.stl\n")
    source = open_source(str(tmp_path), options=ReadingOptions(partial=True))
    source.load(source.listing.shapes[0])
    with pytest.raises(ShapeError, match=r"gone\.stl is missing"):
        source.load(source.listing.shapes[1])


def test_a_long_table_is_checked_by_samples(tmp_path: Path) -> None:
    text = "path,id\n" + "".join(f"b.stl,{number}\n" for number in range(5000))
    write_meshes(tmp_path)
    (tmp_path / "index.csv").write_text(text)
    assert len(open_source(str(tmp_path)).listing.shapes) == 5000
    (tmp_path / "b.stl").unlink()
    with pytest.raises(SourceError, match=r"line 2: there is no file 'b.stl' \(and 255 more of 256 looked for"):
        open_source(str(tmp_path))
