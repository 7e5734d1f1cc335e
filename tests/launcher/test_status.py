"""What can be seen of a run, and how it is stopped, from anywhere that reaches its folder."""

import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from datastore.errors import EXIT_ASKED_WRONGLY, EXIT_DONE
from launcher import cancel
from launcher.__main__ import main
from launcher.presence import Presence
from launcher.runs import COMPLETE
from launcher.status import describe, state_of
from launcher.stop import STOP_REQUESTED
from tests.runs import tiny_config
from trainer.runfolder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(str(tmp_path / "mine"))
    folder.write_config(tiny_config("store.zarr"))
    return folder


def train_a_bit(run: RunFolder) -> None:
    run.append_event("launch_started", nodes=2)
    run.append_event("started", total_steps=400, world=2)
    figures = {"loss": 1.23456, "samples_per_second": 310.4, "data_wait_share": 0.031}
    run.append_metrics({"step": 120, "account": {"forward": 3.0, "data_wait": 2.0}, **figures})
    run.append_event("saved", step=100, seconds=0.1)
    run.append_event("restart", cause="worker_killed", generation=2)
    run.append_event("started", total_steps=400, world=2)


def test_a_run_that_is_worked_on_shows_how_far_it_is(run: RunFolder) -> None:
    train_a_bit(run)
    with Presence(run) as presence:
        presence.enter_step("pretrain")
        lines = describe(state_of(run), time.time() + 5).splitlines()
    me = f"process {os.getpid()} on {socket.gethostname()}"
    assert lines == [
        f"{run.url} (tiny): running, {me}, at step 'pretrain'",
        "  pretrain: step 120 of 400, loss 1.235, 310 samples/s, data wait 3%, 5 s ago, saved at step 100 5 s ago, "
        "60% of the time in steps that count, started again: 1 worker_killed",
    ]


def test_how_a_run_ended_is_told_apart(run: RunFolder) -> None:
    train_a_bit(run)
    assert state_of(run)["state"].startswith("broken off without a word")
    run.append_event("launch_started", on="k8s")
    assert state_of(run)["state"].startswith("no pod at work now")
    run.append_event("launch_stopped", step="pretrain")
    assert state_of(run)["state"] == "stopped; the same launch goes on"
    run.append_event("launch_failed", step="pretrain", exit_code=1)
    assert state_of(run)["state"] == "failed"
    run.append_event(COMPLETE)
    assert state_of(run)["state"] == "complete"


def test_a_failed_run_says_why_and_where_its_log_is(run: RunFolder) -> None:
    log = f"{run.url}/logs/node-0/pretrain/start-000/worker-0.err.log"
    reason = "Training stopped at step 2:\n  - term 'task' is nan on rank 0 for samples " + "[1, 2, 3], " * 40
    run.append_event("launch_failed", step="pretrain", exit_code=64, reason=reason, log=log)
    lines = describe(state_of(run), time.time()).splitlines()
    assert lines[0] == f"{run.url} (tiny): failed"
    assert lines[1].startswith(
        "  failed at step 'pretrain' with exit code 64: Training stopped at step 2: - term 'task'"
    )
    assert lines[1].endswith(", ..."), "cut at a word"
    assert len(lines[1]) < 300
    assert lines[2] == f"  its log: {log}"
    assert state_of(run)["failure"] == {"step": "pretrain", "exit_code": 64, "reason": reason, "log": log}


def test_a_failure_of_which_nothing_is_known_still_names_the_folder_of_logs(run: RunFolder) -> None:
    run.append_event("launch_failed", step="pretrain", exit_code=1, reason="")
    lines = describe(state_of(run), time.time()).splitlines()
    assert lines[1:3] == ["  failed at step 'pretrain' with exit code 1", f"  its logs: {run.url}/logs"]
    run.append_event("launch_started")
    assert state_of(run)["failure"] is None


def test_the_speed_is_the_newest_steps_while_it_trains_and_the_median_steps_afterwards(run: RunFolder) -> None:
    train_a_bit(run)
    for step, rate in ((121, 300.0), (122, 20.0)):
        run.append_metrics({"step": step, "loss": 1.0, "samples_per_second": rate, "data_wait_share": 0.5})
    with Presence(run):
        assert " 20 samples/s, data wait 50%, " in describe(state_of(run), time.time())
    assert " 300 samples/s, data wait 50% (median step), " in describe(state_of(run), time.time())
    run.append_event("finished", step=122)
    with Presence(run):  # another step of the launch
        assert " 300 samples/s, data wait 50% (median step), " in describe(state_of(run), time.time())


def test_scores_and_arms_are_shown(run: RunFolder) -> None:
    run.arm("distillation_off").write_config(tiny_config("store.zarr"))
    run.write_record("svm@heldout", {"accuracy": 0.875})
    lines = describe(state_of(run), time.time()).splitlines()
    assert lines[1:] == [
        "  pretrain: no step yet",
        "  distillation_off: no step yet",
        "  svm@heldout: 87.5 % of the test shapes",
    ]


def test_status_speaks_json(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    train_a_bit(run)
    assert main(["status", run.url, "--json"]) == EXIT_DONE
    state = json.loads(capsys.readouterr().out)
    assert state["trainings"][0]["last"]["step"] == 120
    assert state["working"] is False


def test_there_is_nothing_to_cancel_where_nothing_works(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cancel", run.url]) == EXIT_ASKED_WRONGLY
    assert "Nothing works on" in capsys.readouterr().err
    run.append_event(COMPLETE)
    assert main(["cancel", run.url]) == EXIT_ASKED_WRONGLY
    assert "it is complete" in capsys.readouterr().err


def test_cancel_asks_the_launcher_and_waits_until_it_has_stopped(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    def work_until_asked() -> None:
        with Presence(run):
            working.set()
            while run.read_text(STOP_REQUESTED) is None:
                time.sleep(0.02)
            time.sleep(0.3)  # saving
            run.remove(STOP_REQUESTED)

    working = threading.Event()
    launcher = threading.Thread(target=work_until_asked)
    launcher.start()
    working.wait()
    started = time.monotonic()
    assert main(["cancel", run.url]) == EXIT_DONE
    assert time.monotonic() - started >= 0.3
    launcher.join()
    assert "has stopped" in capsys.readouterr().err


def test_cancel_waits_for_all_parts_of_a_stage_and_takes_its_request_back(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cancel, "_ALL_HEARD_SECONDS", 1.0)
    monkeypatch.setattr(cancel, "_POLL_SECONDS", 0.05)
    ended: list[int] = []

    def be_two_parts() -> None:
        for part in range(2):
            with Presence(run):
                working.set()
                while run.read_text(STOP_REQUESTED) is None:
                    time.sleep(0.02)
                time.sleep(0.2)
            ended.append(part)
            time.sleep(0.2)  # until the next one looks

    working = threading.Event()
    parts = threading.Thread(target=be_two_parts)
    parts.start()
    working.wait()
    assert main(["cancel", run.url]) == EXIT_DONE
    assert ended == [0, 1]
    parts.join()
    assert run.read_text(STOP_REQUESTED) is None, "the next start is not stopped by it"


def test_without_a_name_all_runs_are_listed_the_newest_first(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.write_record("svm@heldout", {"accuracy": 0.875})
    run.write_record("svm@heldout.random_weights", {"accuracy": 0.5})
    train_a_bit(run)
    run.append_event("launch_stopped", step="pretrain")
    later = RunFolder(str(tmp_path / "later"))
    later.write_config(tiny_config("store.zarr"))
    later.append_event("launch_started", nodes=1)
    of_an_earlier_release = RunFolder(str(tmp_path / "earlier"))
    of_an_earlier_release.write_text("config.yaml", "colour: red\n")
    with Presence(later):
        assert main(["status", "--runs", str(tmp_path)]) == EXIT_DONE
    assert capsys.readouterr().out.splitlines() == [
        f"Runs in {tmp_path}:",
        "  later    tiny                    running      no step yet                          0 s ago",
        "  mine     tiny                    stopped      step 120 of 400, svm@heldout 87.5 %  0 s ago",
        "  earlier  unreadable config.yaml  not running  no step yet",
        "`viewpoint status NAME` says more of one.",
    ]
    assert main(["status", "--runs", str(tmp_path), "--json"]) == EXIT_DONE
    states = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {state["run"] for state in states} == {later.url, run.url, of_an_earlier_release.url}
    assert main(["status", "mine", "--runs", str(tmp_path)]) == EXIT_DONE
    assert capsys.readouterr().out.startswith(f"{run.url} (tiny): stopped")


def test_where_there_are_no_runs_it_says_how_to_begin_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["status"]) == EXIT_DONE
    said = capsys.readouterr().out
    assert said.startswith("There are no runs in ./runs. `viewpoint launch pointmcd --nodes 4` begins one")
