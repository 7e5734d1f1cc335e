"""How far a stage is, for whoever shows it: a launcher that reads files, a terminal, or a log.

A stage calls `Progress.update`. With VIEWPOINT_PROGRESS_DIR set, each process appends JSON lines to a file of its own in that
folder, and the launcher adds them up and draws them. Without it, the line is drawn here: live on a terminal, every few
seconds elsewhere.
"""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

PROGRESS_DIR_VARIABLE: Final = "VIEWPOINT_PROGRESS_DIR"
_FILE_INTERVAL_SECONDS: Final = 0.2
_TERMINAL_INTERVAL_SECONDS: Final = 0.2
_LOG_INTERVAL_SECONDS: Final = 5.0


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
        line = progress_line(self.stage, self.done, self.total, self.unit, self.rate, self._note)
        if sys.stderr.isatty():
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)


def progress_line(
    stage: str, done: int, total: int, unit: str, rate: float, note: Mapping[str, float | int | str]
) -> str:
    """One line for people: how far, how fast, how long still, and the stage's own figures."""
    share = f"{100 * done / total:3.0f}%" if total else "  0%"
    if unit == "bytes":
        parts = [f"{stage:<9} {share}  {format_bytes(done)} of {format_bytes(total)}"]
        rate_text = f"{format_bytes(rate)}/s"
    else:
        parts = [f"{stage:<9} {share}  {done:,}/{total:,} {unit}"]
        rate_text = f"{rate:,.1f} {unit}/s"
    if rate > 0:
        parts.append(rate_text)
        if done < total:
            parts.append(f"{format_seconds((total - done) / rate)} left")
    parts += [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in note.items()]
    return "  ".join(parts)


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
