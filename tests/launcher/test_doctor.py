"""Whether a machine, a store and a recipe are fit for a run."""

import json
from pathlib import Path

import pytest

from datastore.errors import EXIT_DO_NOT_RETRY
from launcher import doctor
from launcher.__main__ import main
from launcher.doctor import Finding
from tests.stores import write_small_store

CHECKS = ["python", "packages", "machine", "memory", "disk", "loopback", "rays", "collectives", "store", "recipe"]


def test_a_fit_machine_with_a_bad_store_and_recipe_is_told_what_to_mend(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("global_batch: many\n")
    words = ["--data", str(tmp_path), "--recipe", str(recipe), "--runs", str(tmp_path / "runs"), "--json"]
    assert main(["doctor", *words]) == EXIT_DO_NOT_RETRY
    findings = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [finding["name"] for finding in findings] == CHECKS
    problems = {finding["name"]: finding["detail"] for finding in findings if not finding["ok"]}
    assert set(problems) == {"store", "recipe"}
    assert "viewpoint ingest" in problems["store"]
    assert "global_batch" in problems["recipe"]
    assert not (tmp_path / "runs").exists()


def test_a_store_and_a_recipe_that_are_fit_are_described(tmp_path: Path) -> None:
    store = write_small_store(str(tmp_path / "shapes.zarr"))
    assert "70 shapes, complete; teachers' features: none" in doctor._store(store.url)
    assert "objective pointmcd, global batch 32, divided evenly by 1, 2, 4" in doctor._recipe("pointmcd", demo=True)


def test_too_little_memory_or_disk_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_memory_limit", lambda: 2.0 * 2**30)
    memory = doctor._memory()
    assert not memory.ok
    assert memory.detail.startswith("2.0 GiB are available")
    monkeypatch.setattr(doctor, "NEEDED_DISK_GIB", 1e9)
    disk = doctor._disk(tmp_path / "not" / "there" / "yet")
    assert not disk.ok
    assert "--runs" in disk.detail


def test_a_package_that_does_not_import_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    (tmp_path / "zarr.py").write_text("import os\nos._exit(9)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "_PACKAGES", ("torchvision", "yaml", "zarr", "rich"))
    *problems, healthy = doctor._packages()
    assert not any(finding.ok for finding in problems)
    assert "torch and torchvision must be versions of one pair" in problems[0].detail
    assert "zarr: importing it ended Python with code 9" in problems[1].detail
    assert healthy == Finding("packages", True, healthy.detail)
    assert healthy.detail.startswith("yaml ")
