"""Every command in the README runs. Long ones run on a smaller corpus: the same words, with `--set` behind them."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from datastore.demo import DemoSpec, demo_mesh, demo_shapes
from trainer.recipes import recipe_path

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent
SMALL = [
    "prepare.corpus.source=demo://shapes?count=48&seed=0&classes=chair,bottle,car",
    "global_batch=8",
    "epochs=1",
]
SMALL_WORDS = [word for assignment in SMALL for word in ("--set", assignment)]
WORDS_ADDED = {
    "make launch JOB=pointmcd NODES=4": ["RUNS=runs", f"ARGS={shlex.join(SMALL_WORDS)}"],
    ".venv/bin/python benchmarks/distillation_gain.py --jobs pointmcd --seeds 0 1 2 --nodes 4": [
        "--runs",
        "runs",
        *SMALL_WORDS,
    ],
    "viewpoint ingest meshes/ shapes.zarr": [],
    "viewpoint inspect shapes.zarr --verify --contact-sheet shapes.png": [],
    # the published settings train for days; what they would run is planned whole, from what the store holds
    "viewpoint launch pointmcd --nodes 4 --data shapes.zarr --prepare": [
        "--dry-run",
        "--set",
        "global_batch=16",
        "--set",
        "prepare.teacher_job=./pointmcd_teacher.yaml",
    ],
}


def commands(language: str) -> list[str]:
    """The lines of the README's code blocks in one language, without comments."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A command of the README, run in a folder of its own by this environment's programs."""
    words = [*shlex.split(command), *WORDS_ADDED[command]]
    if words[0] == "make":
        # this environment is installed already, whatever make thinks of its age
        installed = BIN.parent / ".installed"
        words[1:1] = ["-f", str(ROOT / "Makefile"), f"VENV={BIN.parent}", "-o", str(installed)]
        if not installed.exists():
            pytest.fail(f"{installed} is missing: run the tests by `make test`, which installs first")
    if words[0] == ".venv/bin/python":
        words[:2] = [sys.executable, str(ROOT / words[1])]
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    finished = subprocess.run(
        words, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished


def write_meshes(folder: Path) -> None:
    """`folder/CLASS/SPLIT/ID.off` of a few demo shapes."""
    spec = DemoSpec(count=24, classes=("chair", "bottle", "car"))
    for index, (identifier, _, split) in enumerate(demo_shapes(spec)):
        mesh = demo_mesh(spec, index)
        path = folder / identifier.rpartition("-")[0] / split / f"{identifier}.off"
        path.parent.mkdir(parents=True, exist_ok=True)
        faces = np.hstack([np.full((len(mesh.faces), 1), 3), mesh.faces])
        with path.open("w") as file:
            file.write(f"OFF\n{len(mesh.vertices)} {len(mesh.faces)} 0\n")
            np.savetxt(file, mesh.vertices, fmt="%.6f")
            np.savetxt(file, faces, fmt="%d")


def test_every_command_of_the_readme_is_one_that_these_tests_run() -> None:
    assert commands("bash") == list(WORDS_ADDED)


def test_shapes_of_ones_own_are_ingested_inspected_and_planned_for(tmp_path: Path) -> None:
    write_meshes(tmp_path / "meshes")
    run("viewpoint ingest meshes/ shapes.zarr", tmp_path)
    inspected = run("viewpoint inspect shapes.zarr --verify --contact-sheet shapes.png", tmp_path)
    assert "bottle" in inspected.stdout
    assert (tmp_path / "shapes.png").stat().st_size > 10_000
    teacher = recipe_path("pointmcd_teacher", demo=False).read_text()  # both take more shapes a step than these few
    (tmp_path / "pointmcd_teacher.yaml").write_text(teacher.replace("global_batch: 48", "global_batch: 16"))
    planned = run("viewpoint launch pointmcd --nodes 4 --data shapes.zarr --prepare", tmp_path)
    assert "--node 3" in planned.stdout


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the README's first command has run."""
    folder = tmp_path_factory.mktemp("first-run")
    finished = run("make launch JOB=pointmcd NODES=4", folder)
    assert "random weights" in finished.stdout + finished.stderr
    return folder


def test_the_first_command_ends_with_a_table_and_a_page(first_run: Path) -> None:
    made = first_run / "runs" / "pointmcd-1"
    assert (made / "report.html").stat().st_size > 10_000
    for record in (
        "evaluation/svm@heldout.json",
        "evaluation/svm@heldout.random_weights.json",
        "arms/distillation_off/evaluation/svm@heldout.json",
    ):
        assert 0 <= json.loads((made / record).read_text())["accuracy"] <= 1


def test_the_python_lines_of_the_readme_work(first_run: Path) -> None:
    exported = first_run / "exported"
    subprocess.run([BIN / "viewpoint", "export", "runs/pointmcd-1", "exported"], cwd=first_run, check=True)
    shutil.move(next((first_run / "runs" / "demo").glob("*.zarr")), first_run / "shapes.zarr")
    lines = commands("python")
    assert lines[0] == "import datastore, models"
    program = "\n".join([*lines, "print(tuple(features.shape))"])
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=first_run, capture_output=True, text=True, check=True
    )
    width = json.loads((exported / "model.json").read_text())["student"]["width"]
    assert finished.stdout.strip() == f"(2, {round(1024 * width)})"


@pytest.mark.slow
def test_the_command_that_repeats_the_comparison_over_seeds_prints_its_table(tmp_path: Path) -> None:
    finished = run(".venv/bin/python benchmarks/distillation_gain.py --jobs pointmcd --seeds 0 1 2 --nodes 4", tmp_path)
    result = json.loads(finished.stdout.splitlines()[-1])
    assert list(result["jobs"]["pointmcd"]) == ["0", "1", "2"]
    assert result["targets"]["pointmcd_points_above_random_weights"]["ok"] in (True, False)
