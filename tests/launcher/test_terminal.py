"""What people read while a launch runs."""

import io
import re
import time

import pytest

from launcher import terminal
from launcher.readings import Reading
from launcher.terminal import LiveScreen, PlainScreen, describe, describe_end, open_screen

TRAINING = Reading("pretrain", 30, 120, "steps", 4.5, 0, {"loss": 1.23456, "samples/s": 310.0, "data wait": "3%"})
INGEST = Reading("ingest", 160, 640, "shapes", 6.25, 100, {})


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_line_says_what_matters_most_first() -> None:
    assert describe(TRAINING) == "25%  20 s left  30/120 steps  310 samples/s  loss 1.235  data wait 3%"
    assert describe(INGEST) == "25%  1 min 17 s left  160/640 shapes  6.25 shapes/s"


@pytest.mark.parametrize("columns", [60, 80, 130])
def test_the_live_line_uses_the_width_that_the_terminal_has(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    command = "viewpoint launch pointmcd --nodes 4 " + "--set engine.optimizer.lr=0.01 " * 5
    with open_screen(stream) as screen:
        screen.begin("pretrain, distillation off")
        screen.show(TRAINING)
        time.sleep(0.3)  # it is drawn five times a second
        screen.say(command)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    lines = [line.strip() for line in re.split(r"[\r\n]", shown) if "25%" in line]
    whole = "pretrain, distillation off 25%  20 s left  30/120 steps  310 samples/s  loss 1.235  data wait 3%"
    assert lines
    for line in lines:
        assert len(line) <= columns and "…" not in line
        assert columns - 15 < len(line) or line.endswith(whole)
    assert command.strip() in shown, "what is to be copied is not folded by us"


def test_a_finished_step_leaves_its_time_and_its_last_figures() -> None:
    done = Reading("ingest", 640, 640, "shapes", 6.25, 0, {"quarantined": 2})
    assert describe_end(done, 102.4) == "1 min 42 s  640 shapes  6.25 shapes/s  quarantined 2"
    assert describe_end(None, 9.0) == "9 s"


def test_away_from_a_terminal_there_are_plain_lines_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    screen = PlainScreen(stream)
    screen.begin("pretrain")
    for _ in range(120):
        clock[0] += 0.1
        screen.show(TRAINING if clock[0] < 6 else INGEST)
    screen.end("pretrain", "done")
    assert stream.getvalue().splitlines() == [
        "  pretrain: starting",
        f"  pretrain: {describe(TRAINING)}",
        f"  pretrain: {describe(INGEST)}",
        "  pretrain: done",
    ]


def test_a_line_that_says_nothing_new_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    clock = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    screen = PlainScreen(stream)
    screen.begin("pretrain")
    for _ in range(10):
        clock[0] += 10
        screen.show(TRAINING)
    assert len(stream.getvalue().splitlines()) == 2


def test_the_screen_fits_where_the_lines_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(open_screen(Terminal()), LiveScreen)
    assert isinstance(open_screen(io.StringIO()), PlainScreen)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_screen(Terminal()), PlainScreen)


def test_on_a_terminal_the_line_moves_and_what_is_done_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    with open_screen(stream) as screen:
        screen.begin("pretrain")
        screen.show(TRAINING)
        screen.say("node 1 was killed")
        screen.end("pretrain", "done")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "node 1 was killed" in shown
    assert shown.rstrip().endswith("pretrain                   done")
