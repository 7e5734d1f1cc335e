"""How urgently a launch was asked to end: by Ctrl-C or SIGTERM, or by `viewpoint cancel`."""

import enum
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Final, Self

from launcher.patience import tolerating

STOP_REQUESTED: Final = "stop-requested"
"""The file in a run folder by which `viewpoint cancel` asks, from wherever it runs."""

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ASK_EVERY_SECONDS: Final = 1.0


class Urgency(enum.IntEnum):
    """What was asked for so far."""

    GO_ON = 0
    SAVE_AND_STOP = 1
    KILL = 2


class StopRequest:
    """Listens while it is entered. The first signal asks to save and stop, the second one to kill."""

    def __init__(self, asked_elsewhere: Callable[[], bool] = lambda: False) -> None:
        self._urgency = Urgency.GO_ON
        self._asked_elsewhere = asked_elsewhere
        self._asked_at = time.monotonic()
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def urgency(self) -> Urgency:
        """What was asked for so far; looks for a request from elsewhere once a second."""
        now = time.monotonic()
        if self._urgency is Urgency.GO_ON and now - self._asked_at >= _ASK_EVERY_SECONDS:
            self._asked_at = now
            if tolerating(self._asked_elsewhere, "see whether somebody asked this launch to stop", False):
                self._urgency = Urgency.SAVE_AND_STOP
        return self._urgency

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._heard) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self._urgency = Urgency.KILL if self._urgency >= Urgency.SAVE_AND_STOP else Urgency.SAVE_AND_STOP
