"""Trainings that are killed: they repeat the undisturbed one to the last bit, and their time adds up."""

import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from datastore.layout import Store
from tests.accounts import check_time_adds_up
from tests.killable_training import IDS_OF_STEP
from tests.runs import tiny_config
from trainer.runfolder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

_STEPS, _KILLS = 60, 3
_PATIENCE_SECONDS = 400
_GLOBAL_BATCH = 24

_Processes = list["subprocess.Popen[bytes]"]


def _start(recipe: Path, folder: Path, world: int) -> _Processes:
    """The processes of a run, none of which waits for a launcher."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = [sys.executable, "-m", "tests.killable_training", str(folder / "ids"), "pretrain"]
    words += ["--config", str(recipe), "--run", str(folder / "run")]
    place = {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    folder.mkdir(exist_ok=True)
    with (folder / "log").open("ab") as log:
        return [
            subprocess.Popen(
                words,
                env=os.environ | place | {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)},
                stderr=log,
            )
            for rank in range(world)
        ]


def _run_to_its_end(recipe: Path, folder: Path, world: int) -> None:
    codes = [process.wait(_PATIENCE_SECONDS) for process in _start(recipe, folder, world)]
    assert codes == [0] * world, (folder / "log").read_text()[-3000:]


def _kill_on_its_way(processes: _Processes, run: RunFolder, until: int, victim: int) -> None:
    """kill -9 of one process at a step; the others find out, or go the same way."""
    while max((line["step"] for line in run.metrics()), default=0) < until:
        assert all(process.poll() is None for process in processes), "it was to be killed on its way"
        time.sleep(0.02)
    processes[victim].kill()
    for process in processes:
        try:
            process.wait(1.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _figures(run: RunFolder) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step; a step that was repeated must have repeated them."""
    found: dict[int, tuple[float, float]] = {}
    for line in run.metrics():
        figures = line["loss"], line["grad_norm"]
        assert found.setdefault(line["step"], figures) == figures, f"step {line['step']} differs when it is repeated"
    return found


def _samples(folder: Path, world: int) -> dict[tuple[int, int], list[int]]:
    """The ids that each rank read for each step; a step that was repeated must have read the same."""
    starts = [event for event in RunFolder(str(folder / "run")).events() if event["event"] == "started"]
    found: dict[tuple[int, int], list[int]] = {}
    for rank in range(world):
        lines = (folder / "ids" / IDS_OF_STEP.format(rank=rank)).read_text().splitlines()
        begun = iter(starts)
        for ids in map(json.loads, lines):
            if not ids:
                step = next(begun)["resumed_from"]
                continue
            step += 1
            assert found.setdefault((rank, step), ids) == ids, f"step {step} read other samples when it was repeated"
    return found


@pytest.mark.parametrize(
    ("stage", "precision", "world"),
    [
        *((stage, precision, 2) for stage in range(4) for precision in ("float32", "bf16")),
        (1, "float32", 1),
        (2, "bf16", 3),
        (3, "bf16", 4),
    ],
)
def test_a_run_that_is_killed_three_times_repeats_the_undisturbed_one_and_its_time_adds_up(
    stage: int, precision: str, world: int, tiny_corpus: Store, tmp_path: Path
) -> None:
    engine = {"zero_stage": stage, "precision": precision, "max_micro_batch": 4}
    config = tiny_config(
        tiny_corpus.url, steps=_STEPS, global_batch=_GLOBAL_BATCH, engine=engine, checkpoint={"every_steps": 7}
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config.to_yaml())
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run = RunFolder(str(killed / "run"))
    _run_to_its_end(recipe, straight, world)
    chance, seen = random.Random(stage), 0
    for _ in range(_KILLS):
        seen += chance.randint(9, 17)
        _kill_on_its_way(_start(recipe, killed, world), run, seen, victim=chance.randrange(world))
    _run_to_its_end(recipe, killed, world)

    assert _figures(run) == _figures(RunFolder(str(straight / "run")))
    assert len(_figures(run)) == _STEPS
    assert _samples(killed, world) == _samples(straight, world)
    starts = [event for event in run.events() if event["event"] == "started"]
    assert [start["generation"] for start in starts] == [1, 2, 3, 4] and starts[-1]["resumed_from"] > 0
    assert all(start["world"] == world for start in starts)

    account = check_time_adds_up(run)
    assert account["redone"] > 0 and account["down"] > 0
