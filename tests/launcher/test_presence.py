"""Two launchers never work on one run."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from datastore.errors import ViewpointError
from launcher.presence import Presence, holder_of, this_machine
from trainer.commits import TakenOverError
from trainer.runfolder import RunFolder


def note(pid: int, *, started: float, host: str | None = None, age: float = 0.0, machine: str | None = None) -> str:
    facts = {"pid": pid, "process_started": started, "host": host or socket.gethostname(), "time": time.time() - age}
    where = machine or (this_machine() if host is None else host)
    return json.dumps({**facts, "step": "pretrain", "machine": where})


def test_who_works_on_a_run_can_be_seen_while_it_does(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    assert holder_of(run) is None
    with Presence(run) as presence:
        presence.enter_step("cache")
        holder = holder_of(run)
        assert holder is not None
        assert (holder.pid, holder.step) == (os.getpid(), "cache")
    assert holder_of(run) is None


def test_a_run_that_another_launcher_works_on_is_refused(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        run.write_text("launcher.json", note(other.pid, started=psutil.Process(other.pid).create_time()))
        with pytest.raises(ViewpointError, match="another launcher") as refused, Presence(run):
            pass
        other.kill()
    assert f"To take it over, stop it with `viewpoint cancel {run.url}` and repeat this command" in str(refused.value)


def test_a_note_that_a_killed_launcher_left_stops_nobody(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    run.write_text("launcher.json", note(os.getpid(), started=1.0))  # a later process has its number
    assert holder_of(run) is None
    with Presence(run):
        assert holder_of(run) is not None


def test_who_was_taken_over_leaves_the_note_of_the_other_where_it_is(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    with Presence(run):
        run.write_text("launcher.json", note(1, started=0.0, host="elsewhere"))
    assert holder_of(run) is not None, "a third launch is refused"


def test_who_was_taken_over_learns_it_from_the_note_and_ends_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.presence._REFRESH_SECONDS", -1.0)
    run = RunFolder(str(tmp_path))
    with Presence(run) as presence:
        presence.refresh()
        run.write_text("launcher.json", note(1, started=0.0, host="elsewhere", age=60))
        presence.refresh()  # that one is gone, too
        run.write_text("launcher.json", note(1, started=0.0, host="elsewhere"))
        with pytest.raises(TakenOverError, match=r"\(process 1 on elsewhere, at step 'pretrain'\).*goes on there"):
            presence.refresh()
    holder = holder_of(run)
    assert holder is not None and holder.host == "elsewhere"


def test_a_launcher_on_another_machine_counts_while_its_note_is_fresh(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    run.write_text("launcher.json", note(1, started=0.0, host="elsewhere", age=10))
    assert holder_of(run) is not None
    run.write_text("launcher.json", note(1, started=0.0, host="elsewhere", age=60))
    assert holder_of(run) is None


def test_a_note_that_cannot_be_refreshed_now_is_refreshed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.presence._REFRESH_SECONDS", 0.0)
    run = RunFolder(str(tmp_path))
    with Presence(run) as presence:
        write = RunFolder.write_text
        monkeypatch.setattr(RunFolder, "write_text", lambda *_: (_ for _ in ()).throw(OSError("try again")))
        presence.refresh()
        monkeypatch.setattr(RunFolder, "write_text", write)
        before = holder_of(run)
        presence.refresh()
        after = holder_of(run)
        assert before is not None and after is not None
        assert after.time > before.time


def test_a_launcher_in_another_container_of_the_same_name_is_no_process_of_this_one(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    run.write_text("launcher.json", note(1, started=0.0, machine="another pid namespace", age=10))
    assert holder_of(run) is not None, "that number is another process here, and says nothing"
    run.write_text("launcher.json", note(1, started=0.0, machine="another pid namespace", age=60))
    assert holder_of(run) is None
