"""Tests of trainer/history.py."""

import json
from pathlib import Path

import pytest

from trainer.history import account_so_far, goodput, last_metrics, restarts_by_cause, was_stopped


def test_what_a_killed_start_did_after_the_checkpoint_is_redone_and_the_gap_is_down() -> None:
    at_checkpoint = {"startup": 10.0, "forward": 50.0, "data_wait": 5.0, "checkpoint": 1.0}  # at 66 s
    last = {"startup": 10.0, "forward": 70.0, "data_wait": 8.0, "checkpoint": 2.0}  # at 90 s
    lines = [{"time": 80.0, "account": at_checkpoint}, {"time": 90.0, "account": last}, {"time": 95.0}]
    seconds = account_so_far(lines, at_checkpoint, began_at=97.0, was_stopped=False)
    assert seconds["forward"] == 50.0 and seconds["data_wait"] == 5.0 and seconds["checkpoint"] == 2.0
    assert seconds["redone"] == 20.0 + 3.0 and seconds["down"] == 7.0
    assert sum(seconds.values()) == 97.0, "wall time since the first start"


def test_the_account_closes_over_any_number_of_kills_before_the_next_checkpoint() -> None:
    at_checkpoint = {"forward": 10.0}
    now, seconds = 10.0, dict(at_checkpoint)
    for _ in range(3):
        seconds["forward"] = seconds["forward"] + 4.0
        line = {"time": now + 4.0, "account": seconds}
        now += 6.0
        seconds = account_so_far([line], at_checkpoint, began_at=now, was_stopped=False)
        seconds["startup"] = seconds.get("startup", 0.0) + 1.0
        now += 1.0
        assert sum(seconds.values()) == pytest.approx(now)
    assert seconds["redone"] == 12.0 and seconds["down"] == 6.0 and seconds["forward"] == 10.0


def test_time_in_which_a_run_was_stopped_on_purpose_does_not_lower_its_goodput() -> None:
    seconds = account_so_far([{"time": 10.0, "account": {"forward": 10.0}}], {"forward": 10.0}, 500.0, was_stopped=True)
    assert seconds["paused"] == 490.0 and goodput(seconds) == 1.0
    assert goodput({"forward": 3.0, "down": 1.0}) == 0.75
    assert goodput({}) == 0.0


def test_a_first_start_has_nothing_behind_it() -> None:
    assert account_so_far([{"time": 1.0}], {}, 5.0, was_stopped=False) == {}


def test_restarts_are_counted_by_what_the_launcher_or_the_run_said_of_them() -> None:
    kinds = [
        {"event": "started"},
        {"event": "restart", "cause": "worker_killed"},
        {"event": "started"},
        {"event": "started"},
        {"event": "stopped"},
        {"event": "started"},
        {"event": "restart", "cause": "worker_killed"},
        {"event": "started"},
        {"event": "unreadable"},
    ]
    assert restarts_by_cause(kinds) == {"worker_killed": 2, "unknown": 1, "stopped": 1}
    assert not was_stopped(kinds) and was_stopped(kinds[:5]) and not was_stopped([])


def test_nodes_that_save_to_let_another_in_were_not_stopped_on_purpose() -> None:
    kinds = [
        {"event": "started"},
        {"event": "restart", "cause": "node_joined"},
        {"event": "stopped"},
    ]
    assert not was_stopped(kinds), "that time is down, and lowers goodput"
    assert was_stopped([*kinds, {"event": "launch_stopped"}]), "somebody stopped the launch in that moment"
    kinds.append({"event": "started"})
    assert restarts_by_cause(kinds) == {"node_joined": 1}
    kinds.append({"event": "stopped"})
    assert was_stopped(kinds)


def test_metrics_are_read_from_their_end_and_half_a_line_is_none(tmp_path: Path) -> None:
    lines = [json.dumps({"time": number, "account": {"forward": number}}) for number in range(5000)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"time": 9e9, "acc')
    found = last_metrics(str(tmp_path))
    assert found[-1]["time"] == 4999 and len(found) < 5000
    (tmp_path / "metrics.jsonl").write_text(lines[0] + "\n")
    assert last_metrics(str(tmp_path)) == [{"time": 0, "account": {"forward": 0}}]
