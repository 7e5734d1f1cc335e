"""Pure: how long a job took to get over what disturbed it, and how many steps it had to do again."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.heartbeat import Beat


@dataclass(frozen=True)
class Recovery:
    """From a disturbance to the first step of the world that came after it."""

    causes: tuple[str, ...]
    seconds: float
    lost_steps: int  # done before, and done again
    generation: int


@dataclass
class _Open:
    since: float
    generation: int  # of the world that was disturbed
    causes: list[str] = field(default_factory=list)


class Recoveries:
    """Follows the events and the steps of one job."""

    def __init__(self) -> None:
        self.newest_step = 0  # that the world which runs has done
        self._generation = 0
        self._furthest_step = 0
        self._open: _Open | None = None

    def heard(self, kind: str, facts: Mapping[str, Any], now: float) -> None:
        """An event of the job."""
        if kind == "workers_started" and facts["generation"] > self._generation:
            self._generation, self.newest_step = facts["generation"], 0
        elif kind == "chaos_injected":
            self._disturbed(facts["fault"], self._generation, now)
        elif kind == "restart":
            self._disturbed(facts["cause"], facts["generation"], now)

    def beat(self, beat: Beat, generation: int, now: float) -> Recovery | None:
        """A worker's word; what is over where it is the first step after a disturbance."""
        has_done_a_step = beat.phase != "startup" and (beat.phase != "data" or beat.step > 0)
        if generation != self._generation or not has_done_a_step:
            return None
        self.newest_step = max(self.newest_step, beat.step)
        recovery = None
        if self._open is not None and generation > self._open.generation:
            opened, self._open = self._open, None
            lost = max(0, self._furthest_step - beat.step + 1)
            recovery = Recovery(tuple(opened.causes), now - opened.since, lost, generation)
            self._furthest_step = beat.step  # what was lost is counted
        self._furthest_step = max(self._furthest_step, beat.step)
        return recovery

    def _disturbed(self, cause: str, generation: int, now: float) -> None:
        if self._open is None:
            self._open = _Open(now, generation)
        self._open.generation = max(self._open.generation, generation)
        self._open.causes.append(cause)
