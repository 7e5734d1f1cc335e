"""Who works on a run folder right now: a note that its launcher keeps fresh, so that nobody else starts there.

A launcher that was taken for gone, and lives, finds the note of the one that took the run over, and ends. Until then,
and where it cannot see the note, the fence of trainer/commits.py keeps its commits out.
"""

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import psutil

from datastore.errors import ViewpointError
from datastore.objects import ObjectFolder
from launcher.patience import tolerating
from trainer.commits import TakenOverError
from trainer.runfolder import RunFolder

_NOTE: Final = "launcher.json"
_REFRESH_SECONDS: Final = 5.0
STALE_SECONDS: Final = 30.0  # of a launcher whose process cannot be seen from here


class HeldError(ViewpointError):
    """Another launcher works on the run."""


@dataclass(frozen=True)
class Holder:
    """A launcher at work."""

    pid: int
    process_started: float  # tells it from a later process with the same number
    host: str
    time: float
    step: str
    machine: str = ""  # whose process numbers are meant

    def is_alive(self) -> bool:
        """Whether it still works on the run."""
        if self.machine != this_machine():
            return time.time() - self.time < STALE_SECONDS
        try:
            return bool(abs(psutil.Process(self.pid).create_time() - self.process_started) < 1)
        except psutil.NoSuchProcess:
            return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, at step {self.step!r}"


@cache
def this_machine() -> str:
    """What has process numbers of its own: two containers may have one name, and a machine has another life after a boot."""
    known = [socket.gethostname()]
    with suppress(OSError):  # no Linux
        known.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        known.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(known)


def holder_of(run: RunFolder) -> Holder | None:
    """The launcher that works on a run, if one does."""
    holder = _noted(run)
    return holder if holder is not None and holder.is_alive() else None


def _noted(run: RunFolder) -> Holder | None:
    text = run.read_text(_NOTE)
    return Holder(**json.loads(text)) if text is not None else None


class Presence:
    """Holds a run folder while it is entered; refuses where another launcher holds it."""

    def __init__(self, run: RunFolder, advice: str = "Or start another run with --run NAME.") -> None:
        self._run, self._advice = run, advice
        self._refreshed = 0.0
        self.step = "starting"

    def refresh(self) -> None:
        """Says that we are still there; cheap enough to call all the time. TakenOverError where somebody else is."""
        now = time.monotonic()
        if now - self._refreshed > _REFRESH_SECONDS:
            self._refreshed = now
            other = tolerating(self._renew, f"say in {self._run.url} that this launcher is still there", None)
            if other is not None:
                raise TakenOverError(
                    f"{self._run.url} was taken over by another launcher ({other}), which had seen no sign of life of "
                    f"this one: the run goes on there, and this launch ends. To have it back, stop that one with "
                    f"`viewpoint cancel {self._run.url}`, and repeat this command."
                )

    def enter_step(self, step: str) -> None:
        """Says what we are at."""
        self.step = step
        self._write()

    def __enter__(self) -> Self:
        if not ObjectFolder(self._run.url).create(_NOTE, self._note().encode()):
            other = holder_of(self._run)
            if other is not None:
                raise HeldError(
                    f"{self._run.url} is being worked on by another launcher ({other}). Watch it with `viewpoint status "
                    f"{self._run.url}`. To take it over, stop it with `viewpoint cancel {self._run.url}` and repeat this "
                    f"command; of a machine that is gone, {STALE_SECONDS:.0f} s after its last sign of life, which was "
                    f"{max(0.0, time.time() - other.time):.0f} s ago. {self._advice}"
                )
            self._write()  # over the note of a launcher that was killed
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        noted = _noted(self._run)
        if noted is not None and self._is_ours(noted):  # and not of a launch that took the run over
            self._run.remove(_NOTE)

    def _renew(self) -> Holder | None:
        """Writes the note anew, unless another launcher that lives has one there: returns that."""
        noted = holder_of(self._run)
        if noted is not None and not self._is_ours(noted):
            return noted
        self._write()
        return None

    def _is_ours(self, noted: Holder) -> bool:
        ours = self._holder()
        return (noted.pid, noted.machine) == (ours.pid, ours.machine)

    def _write(self) -> None:
        self._run.write_text(_NOTE, self._note())

    def _note(self) -> str:
        return json.dumps(asdict(self._holder()))

    def _holder(self) -> Holder:
        started = psutil.Process().create_time()
        return Holder(os.getpid(), started, socket.gethostname(), time.time(), self.step, this_machine())
