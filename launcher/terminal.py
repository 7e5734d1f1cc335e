"""What a person sees while a launch runs: one live line on a terminal, a plain line now and then elsewhere."""

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID
from rich.table import Column
from rich.text import Text

from datastore.progress import fit, format_seconds
from launcher.readings import Reading

PLAIN_INTERVAL_SECONDS: Final = 5.0
_TITLE_WIDTH: Final = 26
_WIDTH_FOR_A_BAR: Final = 120
_BAR_WIDTH: Final = 20
_SPINNER_WIDTH: Final = 2  # with the space beside it


class Screen(ABC):
    """Shows one step at a time; everything goes to stderr, results have stdout to themselves."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def say(self, line: str) -> None:
        """Adds a line that stays."""

    @abstractmethod
    def begin(self, title: str) -> None:
        """A step starts."""

    @abstractmethod
    def show(self, reading: Reading | None) -> None:
        """How far the step is; called often."""

    @abstractmethod
    def end(self, title: str, verdict: str) -> None:
        """The step has ended, well or not, or had nothing to do."""

    def close(self) -> None:  # noqa: B027 (most screens have nothing to put back)
        """Leaves the terminal as it was."""


class _LineColumn(ProgressColumn):
    """A step's title and how far it is, as much of it as the terminal is wide now."""

    def __init__(self, width: Callable[[], int]) -> None:
        super().__init__(Column(no_wrap=True))
        self._width = width

    def render(self, task: Task) -> Text:
        return Text(
            fit(task.description, task.fields["parts"], self._width(), title_width=_TITLE_WIDTH), overflow="ellipsis"
        )


class LiveScreen(Screen):
    """A line that moves, below the lines of the steps that are done."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, highlight=False)
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def say(self, line: str) -> None:
        # the terminal folds what is too long: newlines of ours would come along where somebody copies a command
        self._console.print(Text(line), soft_wrap=True)

    def begin(self, title: str) -> None:
        self.close()
        bar = [BarColumn(bar_width=_BAR_WIDTH)] if self._console.width >= _WIDTH_FOR_A_BAR else []
        taken = _SPINNER_WIDTH + len(bar) * (_BAR_WIDTH + 1)
        line = _LineColumn(lambda: self._console.width - taken)
        self._progress = Progress(
            SpinnerColumn(), *bar, line, console=self._console, transient=True, refresh_per_second=5
        )
        self._progress.start()
        self._task = self._progress.add_task(title, total=None, parts=["starting"])

    def show(self, reading: Reading | None) -> None:
        if self._progress is not None and self._task is not None and reading is not None:
            self._progress.update(self._task, total=reading.total, completed=reading.done, parts=_parts(reading))

    def end(self, title: str, verdict: str) -> None:
        self.close()
        self.say(f"  {title:<{_TITLE_WIDTH}} {verdict}")

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = self._task = None


class PlainScreen(Screen):
    """Lines without control codes, for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._title = ""
        self._shown: Reading | None = None
        self._shown_at = 0.0

    def say(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    def begin(self, title: str) -> None:
        self._title, self._shown = title, None
        self._shown_at = time.monotonic()
        self.say(f"  {title}: starting")

    def show(self, reading: Reading | None) -> None:
        now = time.monotonic()
        if reading is None or reading == self._shown or now - self._shown_at < PLAIN_INTERVAL_SECONDS:
            return
        self._shown, self._shown_at = reading, now
        self.say(f"  {self._title}: {describe(reading)}")

    def end(self, title: str, verdict: str) -> None:
        self.say(f"  {title}: {verdict}")


def open_screen(stream: TextIO | None = None) -> Screen:
    """The screen that fits where the lines go: stderr unless told."""
    stream = stream or sys.stderr
    console = Console(file=stream)
    return LiveScreen(stream) if console.is_terminal and not console.is_dumb_terminal else PlainScreen(stream)


def describe(reading: Reading) -> str:
    """How far, how long still, and the stage's own figures, in one line: what matters most comes first."""
    return "  ".join(_parts(reading))


def _parts(reading: Reading) -> list[str]:
    """What a line says, in the order in which it matters."""
    parts = [f"{100 * reading.done / reading.total:.0f}%" if reading.total else "0%"]
    left = reading.seconds_left
    if left is not None and reading.done < reading.total:
        parts.append(f"{format_seconds(left)} left")
    parts.append(f"{reading.done:,}/{reading.total:,} {reading.unit}")
    return parts + _figures(reading)


def describe_end(reading: Reading | None, seconds: float) -> str:
    """What a finished step leaves behind: its time, its size, its last figures."""
    if reading is None:
        return format_seconds(seconds)
    return "  ".join([format_seconds(seconds), f"{reading.done:,} {reading.unit}", *_figures(reading)])


def _figures(reading: Reading) -> list[str]:
    rates = {name: float(value) for name, value in reading.note.items() if name.endswith("/s")}
    if not rates and reading.rate > 0:
        rates[f"{reading.unit}/s"] = reading.rate
    others = {name: value for name, value in reading.note.items() if not name.endswith("/s")}
    return [f"{rate:,.0f} {name}" if rate >= 100 else f"{rate:.3g} {name}" for name, rate in rates.items()] + [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in others.items()
    ]
