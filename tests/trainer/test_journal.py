"""Tests of trainer/journal.py."""

import logging
import threading
import time

import pytest

from datastore.errors import ViewpointError
from trainer import journal
from trainer.journal import Journal


class _Storage:
    """Objects by name, with requests that can be made to fail."""

    def __init__(self) -> None:
        self.objects: dict[str, str] = {}
        self.num_puts, self.failures_left = 0, 0
        self.longest = 0

    def put(self, name: str, text: str) -> None:
        self.num_puts += 1
        if self.failures_left > 0:
            self.failures_left -= 1
            raise OSError("503 Slow Down")
        self.longest = max(self.longest, len(text))
        self.objects[name] = text

    def lines(self, stem: str) -> list[str]:
        return [
            line for name, text in sorted(self.objects.items()) if name.startswith(stem) for line in text.splitlines()
        ]


@pytest.fixture
def storage() -> _Storage:
    return _Storage()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_FIRST_PAUSE_SECONDS", 0.005)
    monkeypatch.setattr(journal, "_LONGEST_PAUSE_SECONDS", 0.02)


def test_every_start_has_names_of_its_own_that_sort_by_time_and_number(storage: _Storage) -> None:
    starts = [Journal(storage.put, "rank-0") for _ in range(2)]
    for start in starts:
        start.add("events", "a line\n", at_once=True)
    assert len(storage.objects) == 2, "neither replaced what the other wrote"
    assert all(name.startswith("events-20") and name.endswith("-00001.jsonl") for name in storage.objects)


def test_a_long_run_is_a_few_objects_of_bounded_size(storage: _Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_LARGEST_PART", 1000)
    written = Journal(storage.put, "rank-0")
    lines = [f"{number:099d}" for number in range(95)]
    for line in lines:
        written.add("events", line + "\n", at_once=True)
    assert storage.lines("events") == lines
    assert len(storage.objects) == 10 and storage.longest == 1000


def test_what_could_not_be_put_is_put_with_what_comes_next(storage: _Storage) -> None:
    written = Journal(storage.put, "launcher")
    storage.failures_left = 1
    with pytest.raises(OSError, match="503"):
        written.add("events", "first\n", at_once=True)
    written.add("events", "second\n", at_once=True)
    assert storage.lines("events") == ["first", "second"]


def test_lines_that_can_wait_are_put_together(storage: _Storage) -> None:
    written = Journal(storage.put, "rank-0")
    for number in range(100):
        written.add("metrics", f"{number}\n", at_once=False)
    assert storage.num_puts == 1, "the first: it shows soon that the run goes on"
    written.flush()
    assert storage.num_puts == 2 and len(storage.lines("metrics")) == 100


def test_trouble_is_said_once_and_waited_out_and_costs_no_line(
    storage: _Storage, caplog: pytest.LogCaptureFixture
) -> None:
    written = Journal(storage.put, "rank-0")
    storage.failures_left = 5
    with caplog.at_level(logging.WARNING), written.behind(retry_seconds=20):
        for number in range(20):
            written.add("events", f"{number}\n", at_once=True)
            time.sleep(0.002)
        written.flush()
        assert storage.lines("events") == [str(number) for number in range(20)]
        assert storage.failures_left == 0
    first, second = (record.getMessage() for record in caplog.records)
    assert "503 Slow Down" in first and "Training goes on meanwhile" in first and "nothing was lost" in second


def test_trouble_that_lasts_ends_the_run_with_a_reason_once_its_time_is_over(
    storage: _Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_FAREWELL_SECONDS", 0.05)
    written = Journal(storage.put, "rank-0")
    storage.failures_left = 10**9
    began = time.monotonic()
    with pytest.raises(ViewpointError, match=r"503 Slow Down.*checkpoint\.retry_seconds"), written.behind(0.3):
        while time.monotonic() - began < 20:
            written.add("metrics", "line\n", at_once=True)
            time.sleep(0.01)
    assert 0.3 <= time.monotonic() - began < 10


def test_whoever_must_know_that_all_is_written_learns_that_it_is_not(
    storage: _Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(journal, "_FAREWELL_SECONDS", 0.05)
    written = Journal(storage.put, "rank-0")
    storage.failures_left = 10**9
    with written.behind(retry_seconds=0.2):
        written.add("events", "finished\n", at_once=True)
        with pytest.raises(ViewpointError, match="cannot be written"):
            written.flush()
    assert "cannot be written" in caplog.text


def test_a_request_without_an_answer_keeps_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_FAREWELL_SECONDS", 0.05)
    answered = threading.Event()
    written = Journal(lambda name, text: (answered.wait(30), None)[1], "rank-0")
    began = time.monotonic()
    with written.behind(retry_seconds=20):
        written.add("events", "started\n", at_once=True)
        time.sleep(0.05)
        for number in range(1000):
            written.add("metrics", f"{number}\n", at_once=False)
    assert time.monotonic() - began < 5
    answered.set()
