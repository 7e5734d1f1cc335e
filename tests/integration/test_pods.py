"""Two pods of a job as processes on this machine: they meet, train, and get over the loss of the one that holds the store."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from datastore.errors import EXIT_DONE, EXIT_STOPPED
from launcher.__main__ import main
from launcher.pod import EXIT_CANCELLED
from tests.runs import tiny_config, write_corpus
from trainer.runfolder import RunFolder


class Pods:
    """Processes that are killed as a pod's are: all at once."""

    def __init__(self, folder: Path, run: RunFolder) -> None:
        self._folder, self._run = folder, run
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self._port = probe.getsockname()[1]
        self.running: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, index: int) -> None:
        words = [
            sys.executable, "-m", "launcher.pod", f"--index={index}", "--nodes=2", "--cores=1", "--job=pretrain",
            f"--rendezvous=127.0.0.1:{self._port}", "--address=127.0.0.1", f"--scratch={self._folder / f'pod-{index}'}", "--",
            "pretrain", f"--config={self._run.url}/config.yaml", f"--run={self._run.url}",
        ]  # fmt: skip
        with (self._folder / f"pod-{index}.log").open("ab") as log:
            self.running[index] = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)

    def kill(self, index: int) -> None:
        os.killpg(self.running[index].pid, signal.SIGKILL)
        self.running[index].wait()

    def ends(self) -> list[int]:
        return [process.wait(timeout=240) for _, process in sorted(self.running.items())]

    def until_saved(self, step: int) -> None:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            saved = self._run.last_event("saved")
            if saved is not None and saved["step"] >= step:
                return
            time.sleep(0.2)
        raise AssertionError((self._folder / "pod-0.log").read_text()[-3000:])


@pytest.fixture
def pods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int) -> Iterator[tuple[Pods, RunFolder]]:
    monkeypatch.chdir(tmp_path)
    store = write_corpus("shapes.zarr")
    run = RunFolder(str(tmp_path / "run"))
    run.write_config(tiny_config(store.url, steps=steps, checkpoint={"every_steps": 10}))
    made = Pods(tmp_path, run)
    yield made, run
    for process in made.running.values():
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("steps", [20])
def test_pods_train_to_the_end_and_one_that_comes_late_has_nothing_to_do(pods: tuple[Pods, RunFolder]) -> None:
    made, run = pods
    made.start(0)
    made.start(1)
    assert made.ends() == [EXIT_DONE, EXIT_DONE]
    assert run.is_finished()
    made.start(1)
    assert made.ends() == [EXIT_DONE, EXIT_DONE]
    assert (Path(run.url) / "logs" / "node-1" / "pretrain" / "events.jsonl").exists()
    assert "100%  20/20 steps" in Path("pod-0.log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("steps", [1_000_000])
def test_pods_get_over_the_loss_of_any_and_are_cancelled_together(pods: tuple[Pods, RunFolder]) -> None:
    made, run = pods
    made.start(1)  # it waits for the one that holds the store
    made.start(0)
    made.until_saved(10)

    made.kill(0)
    before = saved_step(run)
    assert made.running[1].poll() is None, "it waits for its successor in place"
    made.start(0)
    made.until_saved(before + 20)

    made.running[1].send_signal(signal.SIGTERM)
    assert made.running[1].wait(timeout=120) == EXIT_STOPPED
    before = saved_step(run)
    time.sleep(3)
    assert made.running[0].poll() is None, "it waits for the one that was told to leave"
    made.start(1)
    made.until_saved(before + 20)

    made.kill(1)
    before = saved_step(run)
    made.start(1)
    made.until_saved(before + 20)

    assert main(["cancel", run.url]) == EXIT_DONE
    assert made.ends() == [EXIT_CANCELLED, EXIT_CANCELLED]
    committed, starts = 0, list[int]()
    for event in run.events():
        if event["event"] == "saved":
            assert event["step"] > committed, "no step was committed twice"
            committed = event["step"]
        elif event["event"] == "started":
            assert event["resumed_from"] >= committed, "no start went back behind what was committed"
            starts.append(event["resumed_from"])
    assert starts[0] == 0
    assert len(set(starts)) >= 4, "one after each loss, and each went on from what came after the one before"


def saved_step(run: RunFolder) -> int:
    saved = run.last_event("saved")
    assert saved is not None
    step: int = saved["step"]
    return step
