"""Pure: how long a worker may be silent, from what it does and how long its steps took so far."""

import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from trainer.heartbeat import Beat

_REMEMBERED_STEPS: Final = 50
_LOOKS_APART_SECONDS: Final = 5.0


@dataclass(frozen=True)
class Deadlines:
    """Seconds of silence that each phase may take. A step: so many times the median of those before, but no less than a floor."""

    step_floor: float = 60.0
    step_factor: float = 10.0
    startup: float = 900.0  # a checkpoint is read from object storage, kernels are compiled, the first two steps end
    checkpoint: float = 900.0  # a large checkpoint is written to object storage
    finishing: float = 900.0

    def allowed(self, phase: str, typical_step: float | None) -> float:
        """The deadline of a phase, where a step typically takes so long; None before that is known."""
        if phase == "data":  # the worker says again and again that it waits, for as long as it may
            return self.step_floor
        if phase == "step" and typical_step is not None:
            return max(self.step_floor, self.step_factor * typical_step)
        longer = {"checkpoint": self.checkpoint, "finishing": self.finishing}.get(phase, self.startup)
        return max(longer, self.step_floor)


@dataclass(frozen=True)
class Hang:
    """A missed deadline."""

    phase: str
    step: int
    silent_seconds: float
    allowed_seconds: float


class Watch:
    """Follows one worker. A worker that never said a word is not watched: its stage has no heartbeat."""

    def __init__(self, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self._last: Beat | None = None
        self._stepped: Beat | None = None  # the end of the last step, if nothing but waiting for data came since
        self._changed_at = self._looked_at = 0.0
        self._steps: deque[float] = deque(maxlen=_REMEMBERED_STEPS)

    def look(self, beat: Beat | None, now: float, is_suspended: Callable[[], bool] = lambda: False) -> Hang | None:
        """Takes in what the worker said last; what is wrong where that is too long ago.

        A suspended worker has the time of a step in every phase: no checkpoint of it is only slow.
        """
        if now - self._looked_at > _LOOKS_APART_SECONDS:
            self._changed_at += now - self._looked_at  # we were stopped ourselves, and may not blame the worker
        self._looked_at = now
        if beat is None:
            return None
        before, self._last = self._last, beat
        if before is None or beat != before:
            self._changed_at = now
            if beat.phase == "step":
                if self._stepped is not None and beat.step > self._stepped.step:
                    self._steps.append((beat.seconds - self._stepped.seconds) / (beat.step - self._stepped.step))
                self._stepped = beat
            elif beat.phase != "data":
                self._stepped = None
            return None
        silent = now - self._changed_at
        typical_step = statistics.median(self._steps) if self._steps else None
        allowed = self._deadlines.allowed(beat.phase, typical_step)
        of_a_step = self._deadlines.allowed("step", typical_step or 0.0)
        if of_a_step < silent <= allowed and is_suspended():
            allowed = of_a_step
        return Hang(beat.phase, beat.step, silent, allowed) if silent > allowed else None
