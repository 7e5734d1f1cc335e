"""Bundles of meshes in two files, with the pictures that some of them come with."""

import csv
import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import trimesh
from PIL import Image

from datastore.errors import SourceError
from datastore.mesh import Mesh
from datastore.sources import ReadingOptions, ShapeError, ShapeReference, Source, SourceImages, open_source
from datastore.sources.mesh_bundle import MeshBundle

BOX = trimesh.creation.box(extents=[1, 2, 3])
PARTIAL = ReadingOptions(partial=True)
ROWS = [
    {"id": "o0", "class": "chair", "split": "train", "group": "g0", "licence": "CC0-1.0", "turntable": "1"},
    {"id": "o1", "class": "bench", "split": "test", "group": "g1", "licence": "CC-BY-4.0", "turntable": ""},
    {"id": "o2", "class": "", "split": "unlabelled", "group": "g1", "licence": "", "turntable": "1"},
]


def write_bundle(
    folder: Path,
    rows: Sequence[dict[str, str]] = ROWS,
    *,
    save: Callable[..., None] = np.savez_compressed,
    pictures: dict[str, bytes] | None = None,
    **changes: Any,
) -> Path:
    """Boxes of growing size, one a row."""
    folder.mkdir(exist_ok=True)
    with (folder / "index.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    arrays = {
        "vertices": np.concatenate([BOX.vertices * (row + 1) for row in range(len(ROWS))]).astype(np.float32),
        "faces": np.concatenate([BOX.faces] * len(ROWS)).astype(np.int32),
        "vptr": np.arange(len(ROWS) + 1) * 8,
        "fptr": np.arange(len(ROWS) + 1) * 12,
    }
    arrays |= changes
    save(folder / "meshes.npz", **{name: array for name, array in arrays.items() if array is not None})
    if pictures is None:
        pictures = {row["id"]: turntable() for row in rows if row.get("turntable") == "1"}
    with tarfile.open(folder / "turntables.tar", "w") as archive:
        for shape_id, content in pictures.items():
            member = tarfile.TarInfo(f"./{shape_id}.webp")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return folder


def turntable(num_frames: int = 3, size: tuple[int, int] = (8, 8)) -> bytes:
    """Frame k is transparent but for a square of grey 60 k."""
    frames = []
    for number in range(num_frames):
        pixels = np.full((size[1], size[0], 4), [7, 7, 7, 0], np.uint8)
        pixels[2:6, 2:6] = [60 * number, 60 * number, 60 * number, 255]
        frames.append(Image.fromarray(pixels))
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], lossless=True, exact=True)
    return buffer.getvalue()


def mesh_of(source: Source, shape: ShapeReference) -> Mesh:
    mesh = source.load(shape).geometry
    assert isinstance(mesh, Mesh)
    return mesh


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_bundle_gives_each_row_its_mesh(tmp_path: Path, save: Callable[..., None]) -> None:
    source = open_source(str(write_bundle(tmp_path / "bundle", save=save)))
    listing = source.listing
    assert source.FORMAT == "mesh_bundle"
    assert listing.class_names == ("bench", "chair")
    assert listing.splits == ("train", "test", "unlabelled")
    assert [(shape.id, shape.label, shape.split, shape.licence) for shape in listing.shapes] == [
        ("o0", 1, "train", "CC0-1.0"),
        ("o1", 0, "test", "CC-BY-4.0"),
        ("o2", -1, "unlabelled", ""),
    ]
    assert (listing.licence, listing.coloured) == ("CC-BY-4.0, CC0-1.0", False)
    for row, shape in enumerate(listing.shapes):
        mesh = mesh_of(source, shape)
        assert np.allclose(np.ptp(mesh.vertices, axis=0), np.array([1, 2, 3]) * (row + 1))
        assert np.array_equal(mesh.faces, BOX.faces)
        assert (mesh.vertices.dtype, mesh.faces.dtype) == (np.float32, np.int32)


def test_uncompressed_arrays_stay_on_the_disk(tmp_path: Path) -> None:
    uncompressed = MeshBundle(str(write_bundle(tmp_path / "bundle", save=np.savez)), None)  # type: ignore[arg-type]
    assert isinstance(uncompressed._arrays["vertices"], np.memmap)


def test_a_bundle_travels_without_its_arrays(tmp_path: Path) -> None:
    source = open_source(str(write_bundle(tmp_path / "bundle")))
    before = len(pickle.dumps(source))
    shapes = source.listing.shapes
    source.load(shapes[0])
    assert len(pickle.dumps(source)) == before
    copy = pickle.loads(pickle.dumps(source))
    assert np.array_equal(mesh_of(copy, shapes[2]).vertices, mesh_of(source, shapes[2]).vertices)


def test_a_bundle_behind_a_url_is_read_as_one_on_a_disk(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle", save=np.savez)
    memory = fsspec.filesystem("memory")
    try:
        memory.put(f"{folder}/", "/bundle/", recursive=True)
        near, far = (open_source(url) for url in (str(folder), "memory://bundle"))
        assert near.listing.hash == far.listing.hash
        for shape in near.listing.shapes:
            assert np.array_equal(mesh_of(near, shape).vertices, mesh_of(far, shape).vertices)
        views = far.load(far.listing.shapes[2]).extra_views
        assert views is not None
        assert views.shape == (3, 8, 8, 3)
    finally:
        memory.rm("/bundle", recursive=True)


def test_other_content_behind_the_same_names_is_another_list(tmp_path: Path) -> None:
    before = open_source(str(write_bundle(tmp_path / "bundle"))).listing.hash
    assert open_source(str(write_bundle(tmp_path / "bundle"))).listing.hash == before
    changed = write_bundle(tmp_path / "bundle", vertices=np.zeros((24, 3), np.float32))
    assert open_source(str(changed)).listing.hash != before


# --- turntables


def test_turntables_become_extra_views_on_white(tmp_path: Path) -> None:
    source = open_source(str(write_bundle(tmp_path / "bundle")))
    assert source.listing.extra_views == SourceImages(num_views=3, image_size=8)
    views = [source.load(shape).extra_views for shape in source.listing.shapes]
    assert views[1] is None
    for found in (views[0], views[2]):
        assert found is not None
        assert found.dtype == np.uint8
        assert found[:, 0, 0].tolist() == [[255, 255, 255]] * 3
        assert found[:, 4, 4].tolist() == [[0, 0, 0], [60, 60, 60], [120, 120, 120]]


def test_a_bundle_without_turntables_has_no_extra_views(tmp_path: Path) -> None:
    rows = [{name: row[name] for name in ("id", "class", "split")} for row in ROWS]
    source = open_source(str(write_bundle(tmp_path / "bundle", rows)))
    assert source.listing.extra_views is None
    assert source.load(source.listing.shapes[0]).extra_views is None


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        ({"o0": turntable()}, "holds 1 of the 2 turntables of index.csv; o2.webp is missing.*--partial"),
        ({"o0": b"?", "o2": b"?"}, "not one of 2 turntables can be read: its turntable is damaged"),
    ],
)
def test_turntables_that_the_index_promises_are_asked_for(
    tmp_path: Path, pictures: dict[str, bytes], message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        open_source(str(write_bundle(tmp_path / "bundle", pictures=pictures)))


def test_an_archive_that_is_missing_or_cut_off_is_noticed(tmp_path: Path) -> None:
    archive = write_bundle(tmp_path / "bundle") / "turntables.tar"
    content = archive.read_bytes()
    second = content.rindex(b"RIFF")
    archive.write_bytes(content[: second + 10])
    with pytest.raises(SourceError, match=r"turntables.tar.*(holds 1 of the 2|only a part)"):
        open_source(str(archive.parent))
    archive.write_bytes(b"not an archive")
    with pytest.raises(SourceError, match=r"not a \.tar archive"):
        open_source(str(archive.parent))
    archive.unlink()
    with pytest.raises(SourceError, match=r"turntables.tar is missing.*2 shapes.*--partial"):
        open_source(str(archive.parent))
    assert open_source(str(archive.parent), options=PARTIAL).listing.extra_views is None


@pytest.mark.parametrize(
    ("content", "message"),
    [(turntable()[:60], "its turntable is damaged"), (turntable(size=(8, 4)), "8 x 4 pixels, and views are square")],
)
def test_a_damaged_turntable_is_one_broken_shape(tmp_path: Path, content: bytes, message: str) -> None:
    source = open_source(str(write_bundle(tmp_path / "bundle", pictures={"o0": content, "o2": turntable()})))
    with pytest.raises(ShapeError, match=message):
        source.load(source.listing.shapes[0])
    assert source.load(source.listing.shapes[2]).extra_views is not None


# --- what is refused


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def write_bare_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: write_bundle(folder, ROWS[:2]), "2 rows, but vptr in meshes.npz bounds 3 meshes"),
        (lambda folder: write_bundle(folder, faces=None), "has no faces; it holds"),
        (lambda folder: write_bundle(folder, vertices=np.zeros((24, 2), np.float32)), r"vertices is float32 \[24, 2\]"),
        (lambda folder: write_bundle(folder, faces=np.zeros((36, 3))), r"faces is float64 \[36, 3\]; needed is whole"),
        (lambda folder: write_bundle(folder, vptr=np.array([0, 8, 16, 17])), "vptr does not rise from 0 to 24"),
        (lambda folder: write_bundle(folder, fptr=np.array([0, 24, 12, 36])), "fptr does not rise from 0 to 36"),
        (lambda folder: write_bundle(folder, vptr=np.zeros((4, 1), int)), r"vptr is int64 \[4, 1\]; needed is whole"),
        (lambda folder: write_bundle(folder, vptr=np.array([None] * 4)), "Python objects"),
        (lambda folder: write_bundle(folder, [{**row, "id": "same"} for row in ROWS]), "shapes are named 'same'"),
        (
            lambda folder: write_bundle(folder, [{**row, "split": ""} for row in ROWS]),
            "line 2: id and split must not be",
        ),
        (lambda folder: write_bundle(folder, [{**row, "turntable": "x"} for row in ROWS]), "turntable is 1 or empty"),
        (lambda folder: write_bundle(folder, [{"id": row["id"]} for row in ROWS]), "has no column class, split"),
        (lambda folder: (folder / "index.csv").write_text("id,class,split\na,b\n"), "line 2 has not as many values"),
        (lambda folder: (folder / "meshes.npz").unlink(), "missing: meshes.npz"),
        (lambda folder: truncate(folder / "meshes.npz"), "only a part of one"),
        (lambda folder: write_bare_array(folder / "meshes.npz"), "not an .npz archive"),
        (lambda folder: (folder / "index.csv").write_bytes(b"id,class,split\n\xff\xfe,a,b\n"), "not UTF-8 text"),
    ],
)
def test_a_bundle_that_breaks_its_promise_is_refused(
    tmp_path: Path, break_it: Callable[[Path], object], message: str
) -> None:
    folder = write_bundle(tmp_path / "bundle")
    break_it(folder)
    with pytest.raises(SourceError, match=message):
        open_source(str(folder), "mesh_bundle")


def test_arrays_that_turn_out_to_be_damaged_end_the_run(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle", save=np.savez_compressed)
    with zipfile.ZipFile(folder / "meshes.npz") as archive:
        faces = archive.getinfo("faces.npy")
    source = open_source(str(folder))
    content = bytearray((folder / "meshes.npz").read_bytes())
    middle = faces.header_offset + 30 + len("faces.npy") + faces.compress_size // 2
    content[middle : middle + 20] = b"\xff" * 20
    (folder / "meshes.npz").write_bytes(bytes(content))
    with pytest.raises(SourceError, match=r"meshes.npz is damaged.*Fetch it again"):
        source.load(source.listing.shapes[0])


def test_arrays_that_do_not_fit_into_memory_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(write_bundle(tmp_path / "bundle")))

    def too_large(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("numpy.lib.format.read_array", too_large)
    with pytest.raises(SourceError, match=r"GiB, which is more than a worker may use.*np\.savez .*--limit-gib"):
        source.load(source.listing.shapes[0])
