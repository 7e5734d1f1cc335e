"""Signs of life of one worker: a line that its agent's watchdog reads, and the stacks of all threads when it asks.

The line lies in the file that VIEWPOINT_HEARTBEAT names and is overwritten in place, two microseconds each time:
`PHASE STEP SECONDS`. Without the variable nobody watches, and nothing is written.
"""

import faulthandler
import os
import signal
import time
from typing import Final, Literal, NamedTuple

HEARTBEAT_VARIABLE: Final = "VIEWPOINT_HEARTBEAT"
STACKS_SIGNAL: Final = signal.SIGUSR1
_LINE_BYTES: Final = 64

Phase = Literal["startup", "step", "checkpoint", "finishing"]


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
            line = f"{phase} {self._step} {time.monotonic():.6f}"
            os.pwrite(self._file, line.ljust(_LINE_BYTES - 1).encode() + b"\n", 0)


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
