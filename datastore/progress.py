"""How far a stage is, for whoever shows it: a launcher that reads files, a terminal, or a log.

A stage calls `Progress.update`. With VIEWPOINT_PROGRESS_DIR set, each process appends JSON lines to a file of its own in that
folder, and the launcher adds them up and draws them. Without it, the line is drawn here: live on a terminal, every few
seconds elsewhere.
"""

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

PROGRESS_DIR_VARIABLE: Final = "VIEWPOINT_PROGRESS_DIR"
_FILE_INTERVAL_SECONDS: Final = 0.2
_TERMINAL_INTERVAL_SECONDS: Final = 0.2
_LOG_INTERVAL_SECONDS: Final = 5.0
_STAGE_WIDTH: Final = 9


class Progress:
    """Counts of one stage in one process. `resumed` is what earlier runs had finished; it does not enter the rate."""

    def __init__(self, stage: str, total: int, unit: str, *, resumed: int = 0) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self.done, self.resumed = resumed, resumed
        self._note: dict[str, float | int | str] = {}
        self._started = time.monotonic()
        self._last_shown = 0.0
        self._path: Path | None = None
        if folder := os.environ.get(PROGRESS_DIR_VARIABLE):
            self._path = Path(folder) / f"{stage}-{os.environ.get('RANK', '0')}.jsonl"
            self._path.parent.mkdir(parents=True, exist_ok=True)
        self._show(force=True)

    def update(self, done: int, **note: float | int | str) -> None:
        """Sets how many units are finished (in all, resumed ones included) and figures to show beside them."""
        self.done = done
        self._note = note
        self._show(force=False)

    @property
    def rate(self) -> float:
        """Units a second since this process began."""
        elapsed = time.monotonic() - self._started
        return (self.done - self.resumed) / elapsed if elapsed > 0 else 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._show(force=True)
        if self._path is None and sys.stderr.isatty():
            print(file=sys.stderr)

    def _show(self, *, force: bool) -> None:
        now = time.monotonic()
        if self._path is not None:
            interval = _FILE_INTERVAL_SECONDS
        else:
            interval = _TERMINAL_INTERVAL_SECONDS if sys.stderr.isatty() else _LOG_INTERVAL_SECONDS
        if not force and now - self._last_shown < interval and self.done < self.total:
            return
        self._last_shown = now
        if self._path is not None:
            record = {
                "time": time.time(),
                "stage": self.stage,
                "done": self.done,
                "total": self.total,
                "unit": self.unit,
                "resumed": self.resumed,
                "rate": self.rate,
                "note": self._note,
            }
            with self._path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            return
        parts = _parts(self.done, self.total, self.unit, self.rate, self._note)
        if sys.stderr.isatty():
            line = fit(self.stage, parts, _columns() - 1, title_width=_STAGE_WIDTH)
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(f"{self.stage:<{_STAGE_WIDTH}} {'  '.join(parts)}", file=sys.stderr, flush=True)


def fit(title: str, parts: Sequence[str], width: int, *, title_width: int) -> str:
    """A line of so many columns at most: whole figures, of which the last ones go first, after the room beside the title."""
    line = f"{title:<{title_width}} {'  '.join(parts)}"
    for shown in range(len(parts), 0, -1):
        if len(line) <= width:
            break
        line = f"{title} {'  '.join(parts[:shown])}"
    return line[:width]


def _columns() -> int:
    """How wide the terminal is now that stderr goes to."""
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    except OSError:
        columns = 0
    return columns or shutil.get_terminal_size().columns


def _parts(done: int, total: int, unit: str, rate: float, note: Mapping[str, float | int | str]) -> list[str]:
    """What a line says, what matters most first: how far, how long still, how fast, and the stage's own figures."""
    parts = [f"{100 * done / total:3.0f}%" if total else "  0%"]
    is_bytes = unit == "bytes"
    parts.append(f"{format_bytes(done)} of {format_bytes(total)}" if is_bytes else f"{done:,}/{total:,} {unit}")
    if rate > 0:
        if done < total:
            parts.append(f"{format_seconds((total - done) / rate)} left")
        parts.append(f"{format_bytes(rate)}/s" if is_bytes else f"{rate:,.1f} {unit}/s")
    return parts + [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in note.items()
    ]


def format_seconds(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_bytes(count: float) -> str:
    """`1.5 MB`: three digits and a decimal unit."""
    power = min(int(math.log10(count) / 3), 5) if count >= 1 else 0
    value, unit = count / 1000**power, ("B", "kB", "MB", "GB", "TB", "PB")[power]
    return f"{value:.0f} {unit}" if power == 0 or value >= 100 else f"{value:.1f} {unit}"
