"""Signs of life of one worker: a line that its agent's watchdog reads, and the stacks of all threads when it asks.

The line lies in the file that VIEWPOINT_HEARTBEAT names and is overwritten in place, two microseconds each time:
`PHASE STEP SECONDS`. Without the variable nobody watches, and nothing is written.

A worker that waits for data, its own or another rank's, can say nothing itself: a thread does, twice a second, for as
long as data may take. So a read that is tried again for two minutes is no hang, and a suspended process still is one.
"""

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Literal, NamedTuple

HEARTBEAT_VARIABLE: Final = "VIEWPOINT_HEARTBEAT"
STACKS_SIGNAL: Final = signal.SIGUSR1
_LINE_BYTES: Final = 64
_PULSE_SECONDS: Final = 0.5

Phase = Literal["startup", "step", "data", "checkpoint", "finishing"]


class Beat(NamedTuple):
    """What a worker said last."""

    phase: str
    step: int  # steps finished
    seconds: float  # of the worker's own clock, which only differences are taken of


class Heart:
    """Writes the line. `beat` after each step; `enter` before what takes longer than a step."""

    def __init__(self) -> None:
        self._file: int | None = None
        self._step = 0
        self._said = b""
        self._writing = threading.Lock()
        self._waits = threading.Event()
        self._waits_until = 0.0
        self._pulse: threading.Thread | None = None

    def start(self) -> None:
        """From now on the worker is watched; its agent's signal makes it write its stacks to stderr."""
        path = os.environ.get(HEARTBEAT_VARIABLE)
        if path is None:
            return
        faulthandler.register(STACKS_SIGNAL, all_threads=True)  # first: the file tells the agent that it may ask
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        self.enter("startup")

    def beat(self, step: int) -> None:
        """So many steps are finished."""
        self._step = step
        self.enter("step")

    def enter(self, phase: Phase) -> None:
        """What the worker does now."""
        if self._file is not None:
            with self._writing:
                self._say(phase)

    @contextmanager
    def waiting_for_data(self, seconds: float) -> Iterator[None]:
        """Within the block, waiting is no hang for so long while the process itself runs."""
        if self._file is None:
            yield
            return
        with self._writing:
            before = self._said
            self._say("data")
        self._waits_until = time.monotonic() + seconds
        self._waits.set()
        if self._pulse is None:
            self._pulse = threading.Thread(target=self._beat_while_waiting, name="heartbeat", daemon=True)
            self._pulse.start()
        try:
            yield
        finally:
            with self._writing:
                self._waits.clear()
                self._write(before)  # as it was: how long steps take is read from these lines

    def _beat_while_waiting(self) -> None:
        while True:
            self._waits.wait()
            time.sleep(_PULSE_SECONDS)
            with self._writing:
                if self._waits.is_set() and time.monotonic() < self._waits_until:
                    self._say("data")

    def _say(self, phase: Phase) -> None:
        line = f"{phase} {self._step} {time.monotonic():.6f}"
        self._write(line.ljust(_LINE_BYTES - 1).encode() + b"\n")

    def _write(self, line: bytes) -> None:
        assert self._file is not None
        self._said = line
        os.pwrite(self._file, line, 0)


HEART: Final = Heart()


def read_beat(path: str) -> Beat | None:
    """What the worker said last; None before its first word."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123 (ten times a second)
            words = file.read(_LINE_BYTES).split()
    except FileNotFoundError:
        return None
    if len(words) != 3:
        return None
    return Beat(words[0].decode(), int(words[1]), float(words[2]))
