"""Tests of trainer/saving.py and trainer/uploader.py: saves that another process uploads."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from datastore.errors import DoNotRetry, ViewpointError
from datastore.objects import ObjectFolder
from tests.ranks import run_ranks
from tests.trainer.savers import AT_ONCE, IDENTITY, load, position_at, save, saver_of
from tests.trainer.toy import config_of, toy_engine, train
from trainer import saving
from trainer.checkpoint import start
from trainer.commits import committed_steps, read_manifest
from trainer.distributed import joined
from trainer.saving import Saver

BACKGROUND = AT_ONCE.model_copy(update={"background": True})


def _files(folder: Path, step: int) -> dict[str, bytes]:
    paths = (folder / f"step-{step:08d}").glob("rank-*")
    return {path.name.replace("generation-2", "generation-1"): path.read_bytes() for path in paths}


def _saved_both_ways(url: str) -> tuple[int, int]:
    engine = toy_engine(config_of(1))
    train(engine, range(3))
    save(engine, ObjectFolder(f"{url}/once"), 3)
    folder = ObjectFolder(f"{url}/behind")
    with saver_of(engine, folder, BACKGROUND) as saver:
        first = saver.begin(position_at(3), {"loss": 0.5})
        train(engine, [3])  # what is written is the state at step 3
        second = saver.begin(position_at(4), {})
        third = saver.finish()
        assert saver.in_flight is None
    engine.close()
    assert not first
    return len(second), len(third)


def test_what_is_uploaded_behind_the_training_is_the_state_at_the_save(tmp_path: Path) -> None:
    # the second save waited for the commit of the first, of which rank 0 alone is told
    assert run_ranks(_saved_both_ways, str(tmp_path)) == [(1, 1), (0, 0)]
    assert _files(tmp_path / "once", 3) == _files(tmp_path / "behind", 3)
    folder = ObjectFolder(str(tmp_path / "behind"))
    assert committed_steps(folder) == [3, 4]
    manifest = read_manifest(folder, 3)
    assert manifest.figures == {"loss": 0.5} and manifest.generation == 1 and len(manifest.ranks) == 2


def _failure(url: str, background: bool) -> str:
    engine = toy_engine(config_of(1))
    config = BACKGROUND if background else AT_ONCE
    mine = f"{url}/here" if engine.world.is_first else "/proc/nothing-can-be-written-here"
    saver = Saver(engine, ObjectFolder(mine), 1, config.model_copy(update={"retry_seconds": 0.1}), IDENTITY)
    with saver, pytest.raises(ViewpointError) as error:
        saver.begin(position_at(1), {})
        saver.finish()
    engine.close()
    return str(error.value)


@pytest.mark.parametrize("background", [True, False])
def test_an_upload_that_fails_on_one_rank_stops_all_and_says_which_and_why(background: bool, tmp_path: Path) -> None:
    for message in run_ranks(_failure, str(tmp_path), background):
        assert message.startswith("Rank 1 could not write") and "nothing-can-be-written-here" in message
        assert "goes on from the checkpoint before" in message
    assert not list(tmp_path.glob("**/manifest.json"))


def test_an_upload_process_that_is_killed_stops_the_run_with_a_reason(tmp_path: Path) -> None:
    with joined(timeout_seconds=20) as world:
        engine = toy_engine(config_of(1), world=world)
        folder = ObjectFolder(str(tmp_path))
        with saver_of(engine, folder, BACKGROUND) as saver:
            assert saver._worker is not None
            saver._worker._process.kill()
            saver.begin(position_at(1), {})
            with pytest.raises(ViewpointError, match=r"process that uploads ended with -9"):
                saver.finish()
        engine.close()


def test_an_older_start_is_refused_at_its_commit_and_stops(tmp_path: Path) -> None:
    with joined(timeout_seconds=20) as world:
        engine = toy_engine(config_of(1), world=world)
        folder = ObjectFolder(str(tmp_path))
        with saver_of(engine, folder, BACKGROUND.model_copy(update={"retry_seconds": 60})) as saver:
            start(engine, folder)
            saver.begin(position_at(1), {})
            with pytest.raises(ViewpointError, match="start 2 of this run, and this is start 1"):
                saver.finish()
        engine.close()
    assert committed_steps(folder) == []


def test_a_disk_without_room_is_no_trouble_that_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:
        raise DoNotRetry("No room.")

    monkeypatch.setattr(saving, "put_share", full)
    with joined(timeout_seconds=20) as world:
        engine = toy_engine(config_of(1), world=world)
        with saver_of(engine, ObjectFolder(str(tmp_path))) as saver, pytest.raises(DoNotRetry, match="No room"):
            saver.begin(position_at(1), {})
        engine.close()


def test_the_process_that_uploads_needs_no_torch_and_ends_with_its_trainer(tmp_path: Path) -> None:
    code = "import sys, trainer.uploader; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    code = """
import os, sys, time
from trainer.saving import _Worker
worker = _Worker()
print(worker._process.pid, flush=True)
time.sleep(60)
"""
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    worker = int(trainer.stdout.readline())
    time.sleep(0.5)
    os.kill(worker, signal.SIGTERM)  # a stop is for the trainer to hear
    time.sleep(0.2)
    assert _is_alive(worker)
    trainer.kill()
    trainer.communicate()
    deadline = time.monotonic() + 10
    while _is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_alive(worker)


def _is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_buffers_are_used_again_and_no_save_allocates(tmp_path: Path) -> None:
    with joined(timeout_seconds=20) as world:
        engine = toy_engine(config_of(0), world=world)
        train(engine, range(1))
        folder = ObjectFolder(str(tmp_path))
        with saver_of(engine, folder, BACKGROUND) as saver:
            saver.begin(position_at(1), {})
            addresses = [view.data_ptr() for view in saver._views]
            train(engine, [1])
            saver.begin(position_at(2), {})
            assert [view.data_ptr() for view in saver._views] == addresses
            saver.finish()
        expected = {name: value.clone() for name, value in engine.module.state_dict().items()}
        train(engine, [2])
        assert load(engine, folder).position.step == 2
        assert all(torch.equal(value, expected[name]) for name, value in engine.module.state_dict().items())
        engine.close()
