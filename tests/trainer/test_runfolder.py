"""Tests of `trainer/runfolder.py`, on local disk and on an object store in memory."""

import threading
import time
from pathlib import Path

import fsspec
import pytest

from datastore.errors import DoNotRetry
from trainer import runfolder
from trainer.config import load_recipe
from trainer.runfolder import RunFolder, find_run


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "runs" / "a")
    filesystem = fsspec.filesystem("memory")
    if filesystem.exists("/runs"):
        filesystem.rm("/runs", recursive=True)
    return "memory://runs/a"


def test_what_is_written_is_read_back(url: str) -> None:
    run = RunFolder(url)
    assert not run.exists()
    config = load_recipe("pointmcd", demo=True)
    run.write_config(config)
    run.append_event("started", world=2)
    run.append_event("saved", step=3)
    run.append_metrics({"step": 1, "loss": 0.5})
    run.flush()
    run.write_record("svm@heldout", {"accuracy": 0.5})
    again = RunFolder(url)
    assert again.exists()
    assert again.name == "a"
    assert again.config() == config
    assert [event["event"] for event in again.events()] == ["started", "saved"]
    assert again.metrics()[0]["loss"] == 0.5
    assert again.records() == {"svm@heldout": {"accuracy": 0.5}}
    last = again.last_event("started")
    assert last is not None
    assert last["world"] == 2
    assert not again.is_finished()
    run.append_event("finished", step=9)
    assert again.is_finished()


def test_two_writers_add_to_one_history(url: str) -> None:
    trainer, launcher = RunFolder(url, writer="rank-0"), RunFolder(url, writer="launcher")
    trainer.append_event("started")
    launcher.append_event("restarted")
    trainer.append_event("finished")
    assert [event["event"] for event in RunFolder(url).events()] == ["started", "restarted", "finished"]


def test_a_missing_run_says_how_to_start_one(url: str) -> None:
    with pytest.raises(DoNotRetry, match=r"no config.yaml. Start one with `viewpoint launch JOB --run a`"):
        RunFolder(url).config()


def test_half_a_line_left_by_a_killed_writer_is_no_record(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    run.append_event("started")
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"time": 1, "eve')
    assert [event["event"] for event in run.events()] == ["started"]


def test_lines_of_many_threads_do_not_mix(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))

    def write(number: int) -> None:
        for _ in range(50):
            run.append_event("saved", number=number, padding="x" * 500)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(run.events()) == 200


def test_arms_are_run_folders_below_the_run(url: str) -> None:
    run = RunFolder(url)
    config = load_recipe("pointmcd", demo=True)
    run.write_config(config)
    assert run.arms() == {}
    run.arm("off").write_config(config.with_overrides({"objective.alignment_weight": 0.0}))
    (name, arm), *rest = run.arms().items()
    assert (name, rest) == ("off", [])
    assert arm.config().hash() != config.hash()


def test_a_file_can_be_removed(url: str) -> None:
    run = RunFolder(url)
    run.write_text("stop-requested", "")
    run.remove("stop-requested")
    run.remove("stop-requested")
    assert run.read_text("stop-requested") is None


def test_events_that_object_storage_would_not_take_are_written_with_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder("memory://runs/bad-moment")
    write = RunFolder.write_text
    monkeypatch.setattr(RunFolder, "write_text", lambda *_: (_ for _ in ()).throw(OSError("try again")))
    with pytest.raises(OSError, match="try again"):
        run.append_event("lost")
    monkeypatch.setattr(RunFolder, "write_text", write)
    run.append_event("kept")
    assert [event["event"] for event in run.events()] == ["lost", "kept"]


def test_two_starts_of_one_writer_lose_no_line_of_each_other(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that was cut off and does not know it yet goes on writing beside the one that came after it."""
    write_text = RunFolder.write_text

    def slowly(self: RunFolder, name: str, text: str) -> None:
        time.sleep(0.002)
        write_text(self, name, text)

    monkeypatch.setattr(RunFolder, "write_text", slowly)

    def write(start: str) -> None:
        run = RunFolder(url, writer="rank-0")
        for number in range(30):
            run.append_event("saved", start=start, number=number)

    threads = [threading.Thread(target=write, args=(start,)) for start in ("cut off", "its successor")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [(event["start"], event["number"]) for event in RunFolder(url).events()]
    assert sorted(found) == [(start, number) for start in ("cut off", "its successor") for number in range(30)]


def test_what_an_earlier_release_wrote_to_object_storage_is_still_read() -> None:
    run = RunFolder("memory://runs/older")
    run.write_text("events-rank-0.jsonl", '{"time": 1, "event": "started"}\n')
    run.append_event("saved", step=3)
    assert [event["event"] for event in run.events()] == ["started", "saved"]


def test_behind_the_training_no_line_waits_for_object_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    run, may_go_on, write = RunFolder("memory://runs/behind"), threading.Event(), RunFolder.write_text

    def stalled(self: RunFolder, name: str, text: str) -> None:
        assert may_go_on.wait(20)
        write(self, name, text)

    monkeypatch.setattr(RunFolder, "write_text", stalled)
    with run.written_behind(retry_seconds=20):
        for step in range(100):
            run.append_metrics({"step": step})
        run.append_event("saved", step=99)  # would wait for the server, were it not behind
        assert run.events() == []
        may_go_on.set()
        run.flush()
        assert len(run.metrics()) == 100 and run.last_event("saved") is not None


def test_a_damaged_line_leaves_the_others_readable(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    folder.append_event("started")
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b'{"time": 1, "ev\x00\x00\n{"time": 2, "event"')
    folder.append_event("finished")
    assert [event["event"] for event in folder.events()] == ["started", "finished"]
    assert folder.is_finished()


def test_on_a_disk_that_machines_share_each_process_has_a_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runfolder, "is_shared", lambda folder: True)
    for writer in ("rank-0", "nodes"):
        RunFolder(str(tmp_path), writer=writer).append_event(writer)
    assert len(list(tmp_path.glob("events-*.jsonl"))) == 2
    assert sorted(event["event"] for event in RunFolder(str(tmp_path)).events()) == ["nodes", "rank-0"]


def test_a_run_is_found_by_its_path_or_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RunFolder(f"{tmp_path}/runs/mine").write_config(load_recipe("pointmcd", demo=True))
    monkeypatch.chdir(tmp_path)
    assert find_run("mine").url == "runs/mine"
    assert find_run(str(tmp_path / "runs" / "mine")).name == "mine"
    with pytest.raises(DoNotRetry, match=r"Runs in \./runs: mine"):
        find_run("yours")
    with pytest.raises(DoNotRetry, match=r"memory://nowhere/runs/mine is no run folder"):
        find_run("memory://nowhere/runs/mine")
