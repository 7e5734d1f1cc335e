"""docs/objectives.md says what is so, and the objective that it shows works as it stands there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from trainer.config import RunConfig
from trainer.objectives import ObjectiveConfig
from trainer.recipes import known_jobs

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "objectives.md").read_text()
CONFIGS: dict[str, Any] = {
    config.model_fields["kind"].default: config for config in get_args(get_args(ObjectiveConfig)[0])
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_every_kind_of_objective_stands_in_the_docs() -> None:
    assert [kind for kind in CONFIGS if f"`{kind}`" not in PAGE] == []


def test_switches_exist_and_have_the_defaults_of_the_docs() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `([\w.]+)` \| `(.+?)` \|", PAGE, re.MULTILINE)
    assert len(rows) >= 20
    for kind, switch, said in rows:
        model, *rest = CONFIGS[kind], *switch.split(".")
        for name in rest[:-1]:
            model = type(model.model_fields[name].default)
        assert issubclass(model, BaseModel)
        assert model.model_fields[rest[-1]].default == yaml.safe_load(said), f"{kind}.{switch}"


def test_every_job_that_the_docs_launch_is_known() -> None:
    jobs = {line.split()[2] for block in blocks("bash") for line in block.splitlines()}
    assert jobs and jobs <= set(known_jobs(demo=False)) and jobs <= set(known_jobs(demo=True))


def test_the_mixture_of_the_docs_is_valid() -> None:
    recipe = {"job": "x", "student": {"kind": "pointnet"}, "epochs": 1, "global_batch": 32}
    RunConfig.model_validate(recipe | yaml.safe_load(blocks("yaml")[0]))


@pytest.mark.slow
def test_the_fifth_objective_of_the_docs_passes_the_tests_of_every_objective_and_is_planned(tmp_path: Path) -> None:
    objective, union, case = blocks("python")
    for package in ("datastore", "launcher", "models", "trainer", "tests"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "trainer/objectives/view_mean.py").write_text(objective)
    (tmp_path / "tests/trainer/objectives/cases/view_mean.py").write_text(case)
    (tmp_path / "view_mean.yaml").write_text(blocks("yaml")[1])
    registry = tmp_path / "trainer/objectives/__init__.py"
    added_import, added_name = union.strip().split("\n\n")
    before, line, after = registry.read_text().partition("ObjectiveConfig = Annotated")
    registry.write_text(f"{added_import}\n{before}{added_name}\n{line}{after}")

    suite = "tests/trainer/objectives/test_every_objective.py"
    passed = run(tmp_path, "pytest", "-q", suite, "-k", "view_mean or half_a_batch or union")
    assert " passed" in passed and "failed" not in passed
    assert "pointmcd_teacher" in run(tmp_path, "launcher", "launch", "view_mean.yaml", "--dry-run")


def run(folder: Path, *words: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout
