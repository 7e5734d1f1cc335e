"""Ingest as a whole: interrupted, killed, in parts, and with shapes that misbehave."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import psutil
import pytest
import trimesh
from PIL import Image

from datastore import ingest as stage
from datastore.cameras import rig_by_name
from datastore.consistency import find_contradictions
from datastore.errors import AskedWrongly, SourceError, Stopped, StoreError
from datastore.ingest import IngestSummary, ingest, parse_part
from datastore.layout import open_store
from datastore.mesh import Mesh
from datastore.schema import QUARANTINED
from datastore.shape import Shape
from datastore.sources import Listing, ReadingOptions, ShapeError, ShapeReference, open_source
from datastore.sources.files import SourceFiles
from datastore.write import verify

SHAPES = "demo://shapes?count=160&seed=0"  # ten blocks
RIG = rig_by_name("azimuth12", image_size=16)
OPTIONS = {"rig": RIG, "num_points": 32}
WORDS = ["--image-size", "16", "--points", "32", "--workers", "1"]


def start(source: str, store: Path, **environment: str) -> "subprocess.Popen[str]":
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", "ingest", source, str(store), *WORDS],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


def commits(store: Path) -> list[Path]:
    return sorted((store / "_viewpoint/commits/ingest").glob("*.json"))


def contents(store: Path) -> dict[str, bytes]:
    """Every object that a reader depends on, but for the numbered manifests."""
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in store.rglob("*")
        if path.is_file() and not path.relative_to(store).is_relative_to("_viewpoint/manifests")
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("ingest") / "undisturbed.zarr"
    summary = ingest(open_source(SHAPES), str(store), **OPTIONS, num_workers=2)
    assert (summary.written, summary.resumed, summary.is_complete, summary.quarantine) == (160, 0, True, [])
    return store


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_ingest_that_was_interrupted_goes_on_and_ends_as_if_nothing_had_happened(
    tmp_path: Path, undisturbed: Path, number: signal.Signals
) -> None:
    store = tmp_path / "store.zarr"
    process = start(SHAPES, store)
    while not commits(store):
        assert process.poll() is None
        time.sleep(0.005)
    workers = psutil.Process(process.pid).children()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    finished = len(commits(store))
    assert 1 <= finished < 10
    if number == signal.SIGTERM:
        assert process.returncode == 75
        assert f"Stopped after {16 * finished} of 160 shapes" in errors
        assert len(open_store(str(store)).rows()) == 16 * finished
    else:
        assert process.returncode == -signal.SIGKILL
    assert not psutil.wait_procs(workers, timeout=20)[1]

    summary = ingest(open_source(SHAPES), str(store), **OPTIONS, num_workers=1)
    assert (summary.written, summary.resumed) == (160 - 16 * finished, 16 * finished)
    assert verify(open_store(str(store))) == []
    assert contents(store) == contents(undisturbed)


def test_parts_written_apart_are_the_whole(tmp_path: Path, undisturbed: Path) -> None:
    store = tmp_path / "store.zarr"
    first = ingest(open_source(SHAPES), str(store), **OPTIONS, num_workers=1, part=(1, 2))
    assert (first.written, first.is_complete) == (80, False)
    assert len(open_store(str(store)).rows()) == 80
    second = ingest(open_source(SHAPES), str(store), **OPTIONS, num_workers=1, part=(0, 2))
    assert (second.written, second.is_complete) == (80, True)
    assert contents(store) == contents(undisturbed)


def test_a_part_without_blocks_is_done_at_once(tmp_path: Path) -> None:
    summary = ingest(open_source("demo://shapes?count=3"), str(tmp_path / "s"), **OPTIONS, part=(5, 8))
    assert (summary.written, summary.resumed, summary.is_complete) == (0, 0, False)


def test_a_complete_store_is_left_alone_and_no_worker_starts(
    undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "ProcessPool", None)
    before = contents(undisturbed)
    summary = ingest(open_source(SHAPES), str(undisturbed), **OPTIONS)
    assert (summary.written, summary.resumed) == (0, 160)
    assert "Nothing to do" in stage.describe(summary)
    assert contents(undisturbed) == before


def test_a_store_goes_on_only_with_the_options_it_was_started_with(undisturbed: Path) -> None:
    with pytest.raises(StoreError, match="points_per_shape: 32 there, 64 asked for"):
        ingest(open_source(SHAPES), str(undisturbed), rig=RIG, num_points=64)
    with pytest.raises(StoreError, match="source_hash"):
        ingest(open_source(SHAPES.replace("seed=0", "seed=1")), str(undisturbed), **OPTIONS)


def test_an_event_stops_an_ingest_that_runs_in_a_thread(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped, match="Stopped after 0 of 160"):
        ingest(open_source(SHAPES), str(tmp_path / "s"), **OPTIONS, num_workers=1, stop=stop)


def write_off(path: Path, vertices: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(trimesh.Trimesh(vertices, trimesh.creation.box().faces, process=False).export(file_type="off"))


@pytest.fixture(scope="module")
def partly_broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three boxes, a file of no bytes, one with NaN, and one without area."""
    corners = np.asarray(trimesh.creation.box().vertices)
    folder = tmp_path_factory.mktemp("partly_broken") / "meshes"
    for name in ("train/a", "train/c", "test/e"):
        write_off(folder / f"box/{name}.off", corners)
    (folder / "box/train/b.off").write_text("")
    text = (folder / "box/train/a.off").read_text()
    (folder / "box/train/d.off").write_text(re.sub(r"-?0\.50*", "nan", text, count=1))
    write_off(folder / "box/train/f.off", corners * [1, 0, 0])
    return folder


def test_broken_shapes_are_left_out_and_listed(partly_broken: Path, tmp_path: Path) -> None:
    summary = ingest(open_source(str(partly_broken)), str(tmp_path / "s"), **OPTIONS, num_workers=1)
    reasons = {entry.id: entry.reason for entry in summary.quarantine}
    assert set(reasons) == {"box/train/b", "box/train/d", "box/train/f"}
    assert reasons["box/train/b"] == "off: the file is empty"
    assert reasons["box/train/d"] == "some coordinates are not finite"
    assert reasons["box/train/f"] == "the mesh has no area"
    store = open_store(str(tmp_path / "s"))
    assert [str(name) for name in store.read("id", store.rows("train"))] == ["box/train/a", "box/train/c"]
    assert np.count_nonzero(store.read("split", range(6)) == QUARANTINED) == 3
    assert not {"colours", "part_labels"} & set(store.fields)  # .off files carry neither
    text = stage.describe(summary)
    assert "3 of 6 shapes could not be used" in text
    assert "the mesh has no area: box/train/f" in text

    with pytest.raises(SourceError, match=r"shape 'box/train/b' cannot be used.*leave out --strict"):
        ingest(open_source(str(partly_broken)), str(tmp_path / "s"), **OPTIONS, strict=True)


def test_strict_stops_at_the_first_broken_shape(partly_broken: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"shape 'box/train/\w' cannot be used.*leave out --strict"):
        ingest(open_source(str(partly_broken)), str(tmp_path / "s"), **OPTIONS, num_workers=1, strict=True)
    assert not commits(tmp_path / "s")


def test_a_source_without_one_good_shape_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "meshes").mkdir()
    for name in "ab":
        (tmp_path / f"meshes/{name}.off").write_text("")
    with pytest.raises(SourceError, match=r"(?s)not one of its 2 shapes could be used:\n  2  off: the file is empty"):
        ingest(open_source(str(tmp_path / "meshes")), str(tmp_path / "s"), **OPTIONS, num_workers=1)


@dataclass
class Hostile:
    """A source whose shapes do what their names say."""

    FORMAT: ClassVar[str] = "hostile"
    LOOKS_LIKE: ClassVar[str] = ""
    listing: Listing
    url: str = "memory://hostile"

    @classmethod
    def recognises(cls, files: SourceFiles) -> bool:
        return False

    @classmethod
    def open(cls, files: SourceFiles, options: ReadingOptions) -> Self:
        shapes = [
            ShapeReference(name, -1, "train", "") for name in ("slow first", "good", "crash", "hang", "bug", "last")
        ]
        return cls(Listing(shapes, (), ("train",)))

    def load(self, shape: ShapeReference) -> Shape:
        box = trimesh.creation.box()
        if shape.id == "slow first":
            time.sleep(0.5)
        if shape.id == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if shape.id == "hang":
            time.sleep(60)
        if shape.id == "bug":
            raise RuntimeError("a bug of ours")
        return Shape(Mesh(np.asarray(box.vertices, np.float32), np.asarray(box.faces, np.int32)))


def test_shapes_that_crash_or_hang_cost_themselves_only(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    summary = ingest(
        Hostile.open(SourceFiles("memory://hostile"), ReadingOptions()),
        str(tmp_path / "s"),
        **OPTIONS,
        num_workers=2,
        seconds_per_shape=4,
    )
    assert {entry.id: entry.reason for entry in summary.quarantine} == {
        "crash": "was ended by SIGSEGV",
        "hang": "took longer than 4 s",
        "bug": "ended with exit code 1",
    }
    assert "a bug of ours" in capfd.readouterr().err
    store = open_store(str(tmp_path / "s"))
    assert [str(name) for name in store.read("id", store.rows())] == ["slow first", "good", "last"]
    assert np.isfinite(store.read("points", store.rows())).all()


def test_without_the_ray_caster_no_shape_is_blamed(tmp_path: Path) -> None:
    broken = tmp_path / "packages/embreex"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('no wheel for this machine')")
    process = start("demo://shapes?count=2", tmp_path / "s", PYTHONPATH=str(broken.parent))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 64
    assert "no wheel for this machine" in errors
    assert "pip install embreex" in errors
    assert not commits(tmp_path / "s")


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    stage.add_arguments(parser)
    return parser.parse_args(words)


def test_the_summary_is_one_json_object(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stage.run(arguments(SHAPES, str(undisturbed), *WORDS, "--json")) == 0
    (line,) = capsys.readouterr().out.splitlines()
    record = json.loads(line)
    assert (record["num_rows"], record["written"], record["is_complete"]) == (160, 0, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--part", "2/2"], "--part is i/n"),
        (["--part", "1"], "--part is i/n"),
        (["--image-size", "0"], "--image-size must be 8 pixels or more, not 0"),
        (["--workers", "-1"], "--workers must be above zero"),
        (["--rig", "round"], "no camera rig 'round'"),
        (["--format", "fbx"], "no format 'fbx'"),
    ],
)
def test_impossible_options_are_named(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(AskedWrongly, match=message):
        stage.run(arguments(SHAPES, str(tmp_path / "s"), *words))


def test_parts_are_counted_from_zero() -> None:
    assert parse_part("0/1") == (0, 1)
    assert parse_part("3/4") == (3, 4)


def test_the_summary_says_what_is_missing() -> None:
    summary = IngestSummary("s", 160, 80, 0, 10.0, is_complete=False)
    text = stage.describe(summary)
    assert "Went through 80 shapes for s in 10 s, 8.0 shapes/s." in text
    assert "Other parts of the store are still missing" in text
    assert "(20 were there before)" in stage.describe(replace(summary, resumed=20))


def test_fields_that_the_source_has_are_kept(undisturbed: Path) -> None:
    assert {"colours", "part_labels"} <= set(open_store(str(undisturbed)).fields)


@dataclass
class Moody:
    """A source with one shape of eighteen that can be read only when a file is there."""

    FORMAT: ClassVar[str] = "moody"
    LOOKS_LIKE: ClassVar[str] = ""
    listing: Listing
    mended: Path
    url: str = "memory://moody"

    @classmethod
    def recognises(cls, files: SourceFiles) -> bool:
        return False

    @classmethod
    def open(cls, files: SourceFiles, options: ReadingOptions) -> Self:
        raise NotImplementedError

    def load(self, shape: ShapeReference) -> Shape:
        if shape.id == "17" and not self.mended.exists():
            raise ShapeError("not today")
        box = trimesh.creation.box()
        return Shape(Mesh(np.asarray(box.vertices, np.float32), np.asarray(box.faces, np.int32)))


def test_blocks_with_quarantined_shapes_are_done_again_when_asked(tmp_path: Path) -> None:
    shapes = [ShapeReference(str(number), -1, "train", "") for number in range(18)]
    source = Moody(Listing(shapes, (), ("train",)), tmp_path / "mended")
    url = str(tmp_path / "store.zarr")
    first = ingest(source, url, **OPTIONS, num_workers=1)
    assert [(entry.id, entry.reason) for entry in first.quarantine] == [("17", "not today")]
    (tmp_path / "mended").touch()
    unasked = ingest(source, url, **OPTIONS, num_workers=1)
    assert (unasked.written, len(unasked.quarantine)) == (0, 1)
    asked = ingest(source, url, **OPTIONS, num_workers=1, retry_quarantined=True)
    assert (asked.written, asked.resumed, asked.quarantine) == (2, 16, [])  # the second block, of two shapes
    store = open_store(url)
    assert len(store.rows()) == 18
    assert verify(store) == []


def test_fields_can_be_left_out(tmp_path: Path) -> None:
    url = str(tmp_path / "store.zarr")
    ingest(open_source("demo://shapes?count=2"), url, **OPTIONS, num_workers=1, without=["depth", "pixels"])
    fields = set(open_store(url).fields)
    assert not {"depth", "pixels"} & fields
    assert {"points", "views", "visibility", "part_labels", "id"} <= fields
    with pytest.raises(AskedWrongly, match=r"--without id, points: fields that can be left out are normals, colours"):
        ingest(open_source("demo://shapes?count=2"), url, **OPTIONS, without=["points", "id"])


def test_images_that_a_source_lacks_cannot_be_its_views(tmp_path: Path) -> None:
    with pytest.raises(AskedWrongly, match=r"\(demo\) brings no images to take as views. Leave out --views"):
        ingest(open_source("demo://shapes?count=2"), str(tmp_path / "s"), **OPTIONS, views="source")


def test_clouds_become_rows_with_splats_and_estimated_visibility(tmp_path: Path) -> None:
    folder = tmp_path / "clouds/ball/train"
    folder.mkdir(parents=True)
    for name in "ab":
        np.savetxt(folder / f"{name}.xyz", trimesh.creation.icosphere(2).vertices * 3 + 1)
    source = open_source(str(tmp_path / "clouds"), options=ReadingOptions(up_axis="+Z"))
    assert stage.describe_listing(source) == "point_folder, 2 clouds in 1 classes (2 train)"
    url = str(tmp_path / "store.zarr")
    ingest(source, url, rig=RIG, num_points=162, num_workers=1)
    store = open_store(url)
    facts = store.attributes
    assert (facts.views_from, facts.visibility_from, facts.geometry) == (
        "point splats",
        "hidden-point removal",
        "points",
    )
    assert facts.source_up_axis == "+Z"
    assert find_contradictions(store) == []
    assert np.allclose(np.linalg.norm(store.read("points", [0])[0], axis=1), 1, atol=1e-3)
    assert "normals" not in store.fields
    # each camera sees the half of a ball that faces it, less what lies beyond the tangents from where it stands
    assert 0.3 < store.read("visibility", [0]).mean() < 0.45


def test_the_same_source_by_another_path_goes_on(tmp_path: Path) -> None:
    box = np.asarray(trimesh.creation.box().vertices)
    write_off(tmp_path / "meshes/box/train/a.off", box)
    (tmp_path / "link").symlink_to(tmp_path / "meshes")
    first = ingest(open_source(str(tmp_path / "meshes")), str(tmp_path / "s"), **OPTIONS, num_workers=1)
    again = ingest(open_source(str(tmp_path / "link")), str(tmp_path / "s"), **OPTIONS, num_workers=1)
    assert (first.written, again.written, again.resumed) == (1, 0, 1)


def test_a_rig_for_images_that_the_source_brings_is_refused_with_both_ways_out(tmp_path: Path) -> None:
    folder = tmp_path / "shapenet"
    (folder / "shapenet_pc").mkdir(parents=True)
    (folder / "shapenet_img").mkdir()
    (folder / "ShapeNet-55").mkdir()
    name = "02691156-a"
    np.save(folder / f"shapenet_pc/{name}.npy", np.random.default_rng(0).normal(size=(8192, 3)).astype(np.float32))
    Image.new("RGB", (16, 16), "red").save(folder / f"shapenet_img/{name}.png")
    for split in ("train", "test"):
        (folder / f"ShapeNet-55/{split}.txt").write_text(f"{name}.npy\n" if split == "train" else "")
    parser = argparse.ArgumentParser()
    stage.add_arguments(parser)
    words = [str(folder), str(tmp_path / "s"), "--partial", "--format", "shapenet55", "--image-size", "16"]
    with pytest.raises(AskedWrongly, match=r"brings its own images.*--views rendered to render, or --views source"):
        stage.run(parser.parse_args(words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--points", "1000000000"], r"A shape with 1,000,000,000 points .* GiB is the most"),
        (["--rig", "ring?views=1000000"], r"1,000,000 views of 224 pixels"),
        (["--image-size", "1"], r"--image-size must be 8 pixels or more, not 1"),
    ],
)
def test_what_no_machine_could_hold_is_refused_before_anything_is_written(
    tmp_path: Path, words: list[str], message: str
) -> None:
    parser = argparse.ArgumentParser()
    stage.add_arguments(parser)
    with pytest.raises(AskedWrongly, match=message):
        stage.run(parser.parse_args(["demo://shapes?count=2", str(tmp_path / "s"), *words]))
    assert not (tmp_path / "s").exists()


def test_a_shape_without_a_licence_of_its_own_has_no_other_ones(tmp_path: Path) -> None:
    for name in "ab":
        write_off(tmp_path / f"{name}.off", np.asarray(trimesh.creation.box().vertices))
    (tmp_path / "index.csv").write_text("path,licence\na.off,CC0\nb.off,\n")
    ingest(open_source(str(tmp_path / "index.csv")), str(tmp_path / "s"), **OPTIONS, num_workers=1)
    assert list(open_store(str(tmp_path / "s")).read("licence", [0, 1])) == ["CC0", "unknown"]
