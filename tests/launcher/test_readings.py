"""Progress files of many processes as one figure."""

import json
from pathlib import Path

import pytest

from launcher.readings import ProgressReader, Reading, combine
from launcher.tail import Record, Tail, complaint, last_lines


def line(stage: str, done: int, *, time: float = 0.0, rate: float = 2.0, **note: float) -> Record:
    return {
        "time": time,
        "stage": stage,
        "done": done,
        "total": 10,
        "unit": "shapes",
        "resumed": 1,
        "rate": rate,
        "note": note,
    }


def test_processes_that_share_the_work_are_added_up() -> None:
    reading = combine([line("cache", 4, **{"images/s": 24.0}), line("cache", 6, **{"images/s": 12.0})])
    assert reading == Reading("cache", 10, 20, "shapes", 4.0, 2, {"images/s": 36.0})


def test_of_processes_that_count_the_same_steps_the_first_one_speaks() -> None:
    reading = combine([line("pretrain", 4, loss=1.5), line("pretrain", 4, loss=9.9)])
    assert reading == Reading("pretrain", 4, 10, "shapes", 2.0, 1, {"loss": 1.5})


def test_the_stage_heard_of_last_is_shown() -> None:
    reading = combine([line("features", 10, time=1.0), line("svm", 3, time=2.0)])
    assert reading is not None
    assert reading.stage == "svm"


def test_nothing_is_known_before_the_first_line(tmp_path: Path) -> None:
    reader = ProgressReader(tmp_path / "progress")
    assert reader.read() is None


def test_files_are_followed_while_they_grow(tmp_path: Path) -> None:
    path = tmp_path / "ingest-0.jsonl"
    whole = json.dumps(line("ingest", 5)) + "\n"
    path.write_text(whole + whole[:20])
    reader = ProgressReader(tmp_path)
    first = reader.read()
    assert first is not None
    assert (first.done, first.seconds_left) == (5, 2.5)
    with path.open("a") as file:
        file.write(whole[20:].replace('"done": 5', '"done": 7'))
    second = reader.read()
    assert second is not None
    assert second.done == 7


def test_a_tail_can_begin_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"old": 1}\n')
    tail = Tail(path, from_end=True)
    assert tail.read() == []
    with path.open("a") as file:
        file.write('{"new": 1}\n')
    assert tail.read() == [{"new": 1}]


def test_the_last_lines_of_a_log(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("one\ntwo\nthree\n")
    assert last_lines(tmp_path / "log", 2) == ["two", "three"]
    assert last_lines(tmp_path / "no log", 2) == []


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["step 1", "viewpoint: No room.", "  - a list", "W destroy_process_group()"], "No room."),
        (["Traceback (most recent call last):", "torch.OutOfMemoryError: CUDA", "bye"], "torch.OutOfMemoryError: CUDA"),
        (["[rank1]: RuntimeError: connection closed by peer"], "RuntimeError: connection closed by peer"),
        (["2026-11-22 06:37 WARNING DeepSpeed: [Rank 0] RuntimeError: not this", ""], ""),
        ([], ""),
    ],
)  # fmt: skip
def test_a_log_says_what_went_wrong(lines: list[str], said: str) -> None:
    assert complaint(lines) == said
