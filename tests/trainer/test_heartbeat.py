"""What a worker leaves for its watchdog."""

import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.runs import tiny_config, train, write_corpus
from trainer import heartbeat
from trainer.heartbeat import HEARTBEAT_VARIABLE, Beat, Heart, read_beat


def test_the_last_word_is_read_back_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "heartbeat")
    assert read_beat(path) is None
    monkeypatch.setenv(HEARTBEAT_VARIABLE, path)
    heart = Heart()
    heart.start()
    first = read_beat(path)
    assert first is not None and first[:2] == ("startup", 0)
    heart.beat(1_000_000)
    heart.enter("checkpoint")
    last = read_beat(path)
    assert last is not None and last[:2] == ("checkpoint", 1_000_000)
    assert last.seconds > first.seconds


def test_without_the_variable_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(HEARTBEAT_VARIABLE, raising=False)
    heart = Heart()
    heart.start()
    heart.beat(1)
    assert list(tmp_path.iterdir()) == []


def test_who_waits_for_data_says_so_again_and_again_for_as_long_as_that_may_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "_PULSE_SECONDS", 0.02)
    monkeypatch.setenv(HEARTBEAT_VARIABLE, str(tmp_path / "heartbeat"))
    heart = Heart()
    heart.start()
    heart.beat(7)

    def said_within(seconds: float) -> list[Beat]:
        until, said = time.monotonic() + seconds, list[Beat]()
        while time.monotonic() < until:
            beat = read_beat(str(tmp_path / "heartbeat"))
            if beat is not None and beat not in said:
                said.append(beat)
            time.sleep(0.005)
        return said

    (before,) = said_within(0.02)
    with heart.waiting_for_data(0.4):
        waiting = said_within(0.3)
        assert {beat[:2] for beat in waiting} == {("data", 7)}
        assert len(waiting) > 2
        said_within(0.2)
        assert len(said_within(0.2)) == 1, "its time is over: the watchdog may count"
    assert said_within(0.1) == [before], "the time of a step is that between two of these"


def test_training_waits_for_data_with_a_word_for_its_watchdog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budgets: list[float] = []

    @contextmanager
    def waiting(heart: Heart, seconds: float) -> Iterator[None]:
        budgets.append(seconds)
        yield

    monkeypatch.setattr(Heart, "start", lambda heart: None)
    monkeypatch.setattr(Heart, "waiting_for_data", waiting)
    fetch = {"retry_seconds": 50.0, "timeout_seconds": 5.0}
    data = {"store_url": write_corpus(f"{tmp_path}/shapes.zarr").url, "num_points": 16, "fetch": fetch}
    train(tiny_config("", steps=3, data=data), f"{tmp_path}/run")
    assert budgets == [60.0] * 4, "before the first step, and with the others after each"


def test_training_says_each_phase_and_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, int]] = []
    monkeypatch.setattr(Heart, "start", lambda heart: None)
    monkeypatch.setattr(Heart, "enter", lambda heart, phase: said.append((phase, heart._step)))
    config = tiny_config(write_corpus(f"{tmp_path}/shapes.zarr").url, steps=3)
    train(config, f"{tmp_path}/run")
    steps = [number for phase, number in said if phase == "step"]
    assert sorted(set(steps)) == [1, 2, 3]
    assert ("checkpoint", 2) in said
    after_saving = said[said.index(("checkpoint", 2)) + 1]
    assert after_saving == ("step", 2), "a hang in the next step is not taken for a long save"
    assert said[-1] == ("finishing", 3)


def test_asked_by_its_agent_a_worker_shows_the_stacks_of_all_threads_and_works_on(tmp_path: Path) -> None:
    script = """
        import os, threading, time
        from trainer.heartbeat import STACKS_SIGNAL, Heart
        def upload_slowly(): time.sleep(600)
        threading.Thread(target=upload_slowly, daemon=True).start()
        Heart().start()
        os.kill(os.getpid(), STACKS_SIGNAL)
        print("still here")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={HEARTBEAT_VARIABLE: str(tmp_path / "heartbeat"), "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "still here\n"
    assert "upload_slowly" in done.stderr
    assert "Current thread" in done.stderr
