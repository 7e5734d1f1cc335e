"""Whether a run's account of its time is right: by the lines that it wrote, whatever ended its starts."""

from typing import Any

import pytest

from trainer.history import goodput
from trainer.runfolder import RunFolder


def check_time_adds_up(run: RunFolder) -> dict[str, float]:
    """The seconds by bucket of a finished run that was never stopped on purpose.

    Their sum is wall time, and goodput what the lines of its steps say, each step counted as it was done last.
    """
    events, finished = run.events(), run.last_event("finished")
    first = next(event for event in events if event["event"] == "started")
    assert finished is not None
    account: dict[str, float] = finished["account"]
    wall_seconds = finished["time"] - (first["time"] - sum(first["account"].values()))
    assert sum(account.values()) == pytest.approx(wall_seconds, rel=0.01)
    lines: dict[int, dict[str, Any]] = {line["step"]: line for line in run.metrics()}
    productive = sum(line["phases"][phase] for line in lines.values() for phase in ("forward", "backward", "optimizer"))
    assert goodput(account) == pytest.approx(productive / wall_seconds, rel=0.01)
    return account
