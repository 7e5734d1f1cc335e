"""Trainings that are killed: they repeat the undisturbed one to the last bit, and their time adds up."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from datastore.layout import Store
from tests.runs import tiny_config
from trainer.config import RunConfig
from trainer.history import goodput
from trainer.runfolder import RunFolder

pytestmark = pytest.mark.slow

_STEPS = 120


def _start(recipe: Path, url: str) -> "subprocess.Popen[bytes]":
    words = [sys.executable, "-m", "trainer", "pretrain", "--config", str(recipe), "--run", url]
    return subprocess.Popen(words, env=os.environ | {"DS_ACCELERATOR": "cpu"}, stderr=subprocess.DEVNULL)


def _figures(url: str) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step; a step that was repeated must have repeated them."""
    found: dict[int, tuple[float, float]] = {}
    for line in RunFolder(url).metrics():
        figures = line["loss"], line["grad_norm"]
        assert found.setdefault(line["step"], figures) == figures, f"step {line['step']} differs when it is repeated"
    return found


@pytest.mark.parametrize(("stage", "precision"), [(1, "float32"), (3, "bf16")])
def test_a_run_that_is_killed_three_times_repeats_the_undisturbed_one_and_its_time_adds_up(
    stage: int, precision: str, tiny_corpus: Store, tmp_path: Path
) -> None:
    engine = {"zero_stage": stage, "precision": precision, "max_micro_batch": 8}
    config: RunConfig = tiny_config(tiny_corpus.url, steps=_STEPS, engine=engine, checkpoint={"every_steps": 7})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config.to_yaml())
    straight, killed = str(tmp_path / "straight"), str(tmp_path / "killed")
    assert _start(recipe, straight).wait(240) == 0
    chance, seen = random.Random(stage), 0
    for _ in range(3):
        process = _start(recipe, killed)
        until = seen + chance.randint(10, 25)
        while process.poll() is None and max((line["step"] for line in RunFolder(killed).metrics()), default=0) < until:
            time.sleep(0.02)
        assert process.poll() is None, "it was to be killed on its way"
        process.kill()
        process.wait()
        seen = until
    assert _start(recipe, killed).wait(240) == 0
    assert _figures(killed) == _figures(straight)
    folder = RunFolder(killed)
    starts = [event for event in folder.events() if event["event"] == "started"]
    assert [start["generation"] for start in starts] == [1, 2, 3, 4] and starts[-1]["resumed_from"] > 0
    finished = folder.last_event("finished")
    assert finished is not None
    account = finished["account"]
    wall_seconds = finished["time"] - (starts[0]["time"] - sum(starts[0]["account"].values()))
    assert sum(account.values()) == pytest.approx(wall_seconds, rel=0.01)
    assert account["redone"] > 0 and account["down"] > 0 and 0 < goodput(account) < 1
