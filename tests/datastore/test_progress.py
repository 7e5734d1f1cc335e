"""How far a stage is, as people see it on terminals of any width, and in logs."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import time
from collections.abc import Iterator
from typing import TextIO

import pytest

from datastore.progress import PROGRESS_DIR_VARIABLE, Progress, fit

PARTS = ["25%", "20 s left", "30/120 steps", "310 samples/s", "loss 1.235", "data wait 3%"]


@pytest.fixture(autouse=True)
def drawn_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PROGRESS_DIR_VARIABLE, raising=False)


@pytest.fixture
def terminal() -> Iterator[tuple[int, TextIO]]:
    """A terminal's two ends: what a person sees, and what a process writes to."""
    seen, written = pty.openpty()
    with os.fdopen(written, "w") as stream:
        os.set_blocking(seen, False)
        yield seen, stream
    os.close(seen)


def resize(seen: int, columns: int) -> None:
    fcntl.ioctl(seen, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (140, "pretrain                   25%  20 s left  30/120 steps  310 samples/s  loss 1.235  data wait 3%"),
        (80, "pretrain 25%  20 s left  30/120 steps  310 samples/s  loss 1.235  data wait 3%"),
        (70, "pretrain 25%  20 s left  30/120 steps  310 samples/s  loss 1.235"),
        (40, "pretrain 25%  20 s left  30/120 steps"),
        (12, "pretrain 25%"),
        (10, "pretrain 2"),
    ],
)
def test_a_narrow_terminal_loses_whole_figures_the_least_important_first(width: int, line: str) -> None:
    assert fit("pretrain", PARTS, width, title_width=26) == line


def test_the_live_line_follows_the_terminals_width_and_never_wraps(
    terminal: tuple[int, TextIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, stream = terminal
    monkeypatch.setattr(sys, "stderr", stream)
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    resize(seen, 120)
    with Progress("ingest", 1_000, "shapes") as progress:
        for columns in (40, 20, 120):
            resize(seen, columns)
            clock[0] += 10.0
            progress.update(100 * round(clock[0] / 10), quarantined=3)
    lines = re.split(r"\r(?:\033\[K)?", os.read(seen, 10_000).decode())
    assert [line for line in lines if line.strip()][:4] == [
        "ingest      0%  0/1,000 shapes",
        "ingest  10%  100/1,000 shapes",
        "ingest  20%",
        "ingest     30%  300/1,000 shapes  1 min 10 s left  10.0 shapes/s  quarantined 3",
    ]


def test_a_log_has_whole_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Progress("checksums", 2_000_000, "bytes") as progress:
        clock[0] += 10.0
        progress.update(1_500_000)
    assert capsys.readouterr().err.splitlines()[1] == "checksums  75%  1.5 MB of 2.0 MB  3 s left  150 kB/s"
