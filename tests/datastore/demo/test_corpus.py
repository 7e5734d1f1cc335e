import hashlib
import subprocess
import sys
from collections import Counter, defaultdict
from functools import cache

import numpy as np
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from datastore.demo import CLASS_NAMES, PART_NAMES, DemoSpec, demo_mesh, demo_shapes, parse_demo_url
from datastore.errors import AskedWrongly
from datastore.mesh import Mesh

SHAPES_A_CLASS = 40  # enough for the rarest part of a class to turn up


@cache
def meshes_of(name: str) -> list[Mesh]:
    spec = DemoSpec(count=SHAPES_A_CLASS, classes=(name,))
    return [demo_mesh(spec, index) for index in range(spec.count)]


def triangle_areas(mesh: Mesh) -> np.ndarray:
    corners = mesh.vertices[mesh.faces].astype(np.float64)
    return np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1) / 2


def components(mesh: Mesh) -> np.ndarray:
    """The number of the piece that each face belongs to."""
    first, second = mesh.faces[:, 0], mesh.faces[:, 1]
    third = mesh.faces[:, 2]
    rows, columns = np.concatenate([first, second]), np.concatenate([second, third])
    links = coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(mesh.vertices),) * 2)
    return connected_components(links, directed=False)[1][first]


def elongation(mesh: Mesh) -> float:
    """How much farther the surface reaches along its longest axis than along its shortest."""
    middles, areas = mesh.vertices[mesh.faces].mean(axis=1), triangle_areas(mesh)
    spread = np.linalg.eigvalsh(np.cov(middles.T, aweights=areas))
    return float(np.sqrt(spread[-1] / spread[0]))


def digest(mesh: Mesh) -> str:
    return hashlib.sha256(mesh.vertices.tobytes() + mesh.faces.tobytes() + mesh.face_colours.tobytes()).hexdigest()


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_every_piece_is_closed_and_looks_outward(name: str) -> None:
    for mesh in meshes_of(name):
        edges = mesh.faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2).astype(np.int64)
        there, back = edges @ (len(mesh.vertices), 1), edges @ (1, len(mesh.vertices))
        assert len(np.unique(there)) == len(there)
        assert np.array_equal(np.sort(there), np.sort(back))
        corners = mesh.vertices[mesh.faces].astype(np.float64)
        signed = (corners[:, 0] * np.cross(corners[:, 1], corners[:, 2])).sum(axis=1)
        assert np.bincount(components(mesh), weights=signed).min() > 0


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_a_mesh_is_finite_of_moderate_size_and_has_no_flat_triangles(name: str) -> None:
    for mesh in meshes_of(name):
        assert mesh.vertices.dtype == np.float32
        assert mesh.faces.dtype == np.int32
        assert np.isfinite(mesh.vertices).all()
        assert 100 <= len(mesh.faces) <= 6000
        assert np.array_equal(np.unique(mesh.faces), np.arange(len(mesh.vertices)))
        assert triangle_areas(mesh).min() > 1e-9 * np.ptp(mesh.vertices, axis=0).max() ** 2


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_every_face_has_a_colour_and_a_part_of_its_own_class(name: str) -> None:
    seen: set[str] = set()
    for mesh in meshes_of(name):
        assert mesh.face_parts is not None
        assert mesh.face_colours is not None
        assert mesh.face_parts.shape == (len(mesh.faces),)
        assert mesh.face_parts.dtype == np.int16
        assert mesh.face_colours.shape == (len(mesh.faces), 3)
        assert mesh.face_colours.dtype == np.uint8
        seen |= {PART_NAMES[part] for part in np.unique(mesh.face_parts)}
        pieces_with_part = np.unique(np.stack([components(mesh), mesh.face_parts]), axis=1)
        assert len(set(pieces_with_part[0])) == pieces_with_part.shape[1], "a piece is of two parts"
    assert seen == {part for part in PART_NAMES if part.startswith(f"{name}/")}


def test_part_names_are_unique_and_every_class_has_several() -> None:
    assert len(set(PART_NAMES)) == len(PART_NAMES)
    assert len(CLASS_NAMES) >= 20
    parts_of = Counter(part.partition("/")[0] for part in PART_NAMES)
    assert set(parts_of) == set(CLASS_NAMES)
    assert min(parts_of.values()) >= 3


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_shapes_of_a_class_differ_in_size_structure_and_colour(name: str) -> None:
    statistics = defaultdict(list)
    for mesh in meshes_of(name):
        areas = triangle_areas(mesh)
        extent = np.ptp(mesh.vertices, axis=0)
        statistics["height to width"].append(extent[1] / np.hypot(extent[0], extent[2]))
        statistics["faces"].append(len(mesh.faces))
        statistics["area"].append(areas.sum() / (extent**2).sum())
        statistics["elongation"].append(elongation(mesh))
        statistics["colours"].append(tuple(np.average(mesh.face_colours, axis=0, weights=areas).round()))
        statistics["parts"].append(tuple(np.unique(mesh.face_parts)))
    for statistic in ("height to width", "area", "elongation"):
        values = np.array(statistics[statistic])
        assert values.std() > 0.05 * values.mean(), statistic
    assert len(set(statistics["colours"])) == SHAPES_A_CLASS
    assert len(set(statistics["faces"])) >= 5
    if name not in ("lamp", "umbrella"):  # these always have all their parts
        assert len(set(statistics["parts"])) >= 2


def test_the_same_shape_comes_out_in_another_process() -> None:
    spec = DemoSpec(count=len(CLASS_NAMES), seed=3)
    here = [digest(demo_mesh(spec, index)) for index in range(spec.count)]
    program = f"""
import hashlib
from datastore.demo import DemoSpec, demo_mesh

for index in range({spec.count}):
    mesh = demo_mesh(DemoSpec(count={spec.count}, seed=3), index)
    data = mesh.vertices.tobytes() + mesh.faces.tobytes() + mesh.face_colours.tobytes()
    print(hashlib.sha256(data).hexdigest())
"""
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert there == here


def test_no_two_shapes_are_alike() -> None:
    count = 3 * len(CLASS_NAMES)
    digests = {digest(demo_mesh(DemoSpec(count=count, seed=seed), index)) for seed in (0, 1) for index in range(count)}
    assert len(digests) == 2 * count


def test_a_shape_depends_on_neither_the_count_nor_the_other_classes() -> None:
    few, many = DemoSpec(count=60, seed=5), DemoSpec(count=900, seed=5)
    two = DemoSpec(count=10, seed=5, classes=("table", "chair"))
    assert demo_shapes(few) == demo_shapes(many)[:60]
    assert digest(demo_mesh(few, 41)) == digest(demo_mesh(many, 41))
    by_id = {shape_id: index for index, (shape_id, _, _) in enumerate(demo_shapes(many))}
    for index, shape in enumerate(demo_shapes(two)):
        assert shape == demo_shapes(many)[by_id[shape[0]]]
        assert digest(demo_mesh(two, index)) == digest(demo_mesh(many, by_id[shape[0]]))


def test_classes_take_turns_and_a_quarter_of_each_is_for_testing() -> None:
    shapes = demo_shapes(DemoSpec(count=645))
    assert len({shape_id for shape_id, _, _ in shapes}) == 645
    assert all(shape_id.startswith(f"{CLASS_NAMES[label]}-") for shape_id, label, _ in shapes)
    counts = Counter(label for _, label, _ in shapes)
    assert set(counts) == set(range(len(CLASS_NAMES)))
    assert max(counts.values()) - min(counts.values()) <= 1
    tests = Counter(label for _, label, split in shapes if split == "test")
    assert all(abs(tests[label] - count / 4) < 1 for label, count in counts.items())
    assert {split for _, _, split in shapes} == {"train", "test"}


def test_two_shapes_of_a_class_are_one_to_learn_from_and_one_to_test() -> None:
    shapes = demo_shapes(DemoSpec(count=2 * len(CLASS_NAMES)))
    for split in ("train", "test"):
        assert sorted(label for _, label, own in shapes if own == split) == list(range(len(CLASS_NAMES)))


def test_an_index_beyond_the_corpus_is_refused() -> None:
    with pytest.raises(IndexError, match="holds 10"):
        demo_mesh(DemoSpec(count=10), 10)


@pytest.mark.parametrize(
    ("url", "spec"),
    [
        ("demo://shapes", DemoSpec()),
        ("demo://shapes?count=640&seed=0", DemoSpec()),
        ("demo://shapes?seed=7", DemoSpec(seed=7)),
        ("demo://shapes?classes=table,chair&count=12", DemoSpec(count=12, classes=("table", "chair"))),
    ],
)
def test_a_url_says_which_shapes(url: str, spec: DemoSpec) -> None:
    assert parse_demo_url(url) == spec


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("demo://shapes?cuont=3", "unknown option cuont.*count, seed and classes"),
        ("demo://shapes?classes=chair,tabel", "'tabel'.*There are aeroplane, bed"),
        ("demo://shapes?classes=", "unknown class ''"),
        ("demo://shapes?classes=chair,chair", "named twice"),
        ("demo://shapes?count=0", "count=0 is not a whole number from 1 up"),
        ("demo://shapes?count=many", "count=many"),
        ("demo://shapes?count=1.5", "count=1.5"),
        ("demo://shapes?seed=-1", "seed=-1 is not a whole number from 0 up"),
        ("demo://shapes?seed=", "seed= is not"),
        ("demo://shapes?seed=1&seed=2", "given twice"),
        ("demo://teapots", "demo://shapes"),
        ("demo:shapes", "demo://shapes"),
    ],
)
def test_a_url_that_asks_wrongly_is_told_what_exists(url: str, message: str) -> None:
    with pytest.raises(AskedWrongly, match=message):
        parse_demo_url(url)
