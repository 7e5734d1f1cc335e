"""Faults on purpose: what `--chaos` may say, and when each fault is due."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

from datastore.errors import AskedWrongly
from launcher.command import Layout

Kind = Literal["kill-worker", "kill-node", "hang", "partition", "preempt"]

GRAMMAR: Final = """\
faults on purpose (--chaos), to see a job survive them: FAULT[=TARGET]@STEP[:SECONDSs], several with commas between.
  kill-worker=R@20       kill -9 of the worker with rank R (default: the last) once step 20 is done
  hang=R@60              stops that worker as if it hung: it misses its --step-deadline
  kill-node=N@40:15s     kill -9 of node N (default: the last); it is started again 15 s later (default)
  preempt=N@50:15s       SIGTERM to node N, as a cluster does that takes it back; it returns 15 s later (default)
  partition=N@80:30s     cuts node N off the network for 30 s (default). Nodes get networks of their own, which needs
                         root on Linux; the fault is left out, loudly, elsewhere
Steps are those of the job's own training; @20 and @step=20 are the same.
"""

_FAULT: Final = re.compile(
    r"(?P<kind>[a-z-]+)(?:=(?P<target>\d+))?@(?:step=)?(?P<step>\d+)(?::(?P<seconds>\d+(?:\.\d+)?)s)?"
)
_ON_NODES: Final = ("kill-node", "partition", "preempt")
_DEFAULT_SECONDS: Final = {"kill-node": 15.0, "preempt": 15.0, "partition": 30.0}


@dataclass(frozen=True)
class Fault:
    """One fault of a plan."""

    kind: Kind
    target: int  # a node's number or a worker's rank
    step: int
    seconds: float = 0.0  # that a node stays away

    def __str__(self) -> str:
        for_seconds = f":{self.seconds:g}s" if self.kind in _ON_NODES else ""
        return f"{self.kind}={self.target}@{self.step}{for_seconds}"


def parse_chaos(plan: str, layout: Layout) -> tuple[Fault, ...]:
    """The faults of a plan, in the order of their steps; an error that says what is wrong with it."""
    faults = [_parse(word.strip(), layout) for word in plan.split(",") if word.strip()]
    if not faults:
        raise AskedWrongly("--chaos names no fault. For example: --chaos kill-worker@20,kill-node=2@40:15s")
    return tuple(sorted(faults, key=lambda fault: fault.step))


def needs_networks(faults: Sequence[Fault]) -> bool:
    """Whether nodes must have networks of their own."""
    return any(fault.kind == "partition" for fault in faults)


class Chaos:
    """Hands each fault out once, when its step is done."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self._waiting = list(faults)

    def due(self, step: int) -> list[Fault]:
        """The faults whose time has come."""
        due = [fault for fault in self._waiting if fault.step <= step]
        self._waiting = [fault for fault in self._waiting if fault.step > step]
        return due


def _parse(word: str, layout: Layout) -> Fault:
    match = _FAULT.fullmatch(word)
    if match is None:
        raise AskedWrongly(
            f"--chaos: {word!r} is no fault. One reads FAULT[=TARGET]@STEP[:SECONDSs], for example kill-node=2@40:15s; "
            f"FAULT is one of {', '.join(get_args(Kind))}."
        )
    kind = next((each for each in get_args(Kind) if each == match["kind"]), None)
    if kind is None:
        raise AskedWrongly(f"--chaos: {match['kind']!r} in {word!r} is not one of {', '.join(get_args(Kind))}.")
    there, what = (layout.nodes, "node") if kind in _ON_NODES else (layout.world, "rank")
    target = there - 1 if match["target"] is None else int(match["target"])
    if target >= there:
        raise AskedWrongly(f"--chaos: {word!r} means {what} {target}, but there are {there}: 0 to {there - 1}.")
    if match["seconds"] is not None and kind not in _ON_NODES:
        raise AskedWrongly(
            f"--chaos: {word!r} has a time, which {kind} does not take: leave ':{match['seconds']}s' out."
        )
    seconds = float(match["seconds"]) if match["seconds"] else _DEFAULT_SECONDS.get(kind, 0.0)
    return Fault(kind, target, int(match["step"]), seconds)
