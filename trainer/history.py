"""What earlier starts of a run left: where its time went so far, and why it was started again.

Time is a closed account over all starts: at every moment since the first one began, exactly one bucket ran. What a start
spent after the checkpoint that the next one loads has to be done again, and moves to `redone`; the gap until the next
process begins is `down`, or `paused` where the run had been stopped on purpose. A start that was killed is believed up to
its last line in metrics.jsonl.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from datastore.objects import ObjectFolder
from trainer.lines import records_of

ACCOUNT: Final = "account"
"""The key under which lines of metrics.jsonl and events keep the seconds by bucket."""

_OF_STEPS: Final = ("data_wait", "forward", "backward", "optimizer", "other")
_PRODUCTIVE: Final = ("forward", "backward", "optimizer")
_NOT_COUNTED: Final = ("paused",)
_TAIL_BYTES: Final = 2**16
_TAIL_PARTS: Final = 8
_STOPPED_KINDS: Final = ("stopped", "finished")

Record = Mapping[str, Any]


def goodput(seconds: Mapping[str, float]) -> float:
    """The share of wall time spent on steps that count; time in which the run was stopped on purpose is left out."""
    total = sum(spent for bucket, spent in seconds.items() if bucket not in _NOT_COUNTED)
    return sum(seconds.get(bucket, 0.0) for bucket in _PRODUCTIVE) / total if total > 0 else 0.0


def account_so_far(
    records: Iterable[Record], at_checkpoint: Mapping[str, float], began_at: float, *, was_stopped: bool
) -> dict[str, float]:
    """Seconds by bucket up to the moment at which this start's process began.

    `records` are lines that may have an account; `at_checkpoint` is the one in the checkpoint that was loaded.
    """
    known = [record for record in records if ACCOUNT in record]
    if not known:
        return dict(at_checkpoint)
    last = max(known, key=lambda record: float(record["time"]))
    seconds = {str(bucket): float(spent) for bucket, spent in last[ACCOUNT].items()}
    redone = seconds.get("redone", 0.0)
    for bucket in _OF_STEPS:
        lost = max(0.0, seconds.get(bucket, 0.0) - at_checkpoint.get(bucket, 0.0))
        seconds[bucket] = seconds.get(bucket, 0.0) - lost
        redone += lost
    gap = "paused" if was_stopped else "down"
    # a clock of another node may be behind
    seconds[gap] = seconds.get(gap, 0.0) + max(0.0, began_at - float(last["time"]))
    return seconds | {"redone": redone}


def restarts_by_cause(events: Sequence[Record]) -> dict[str, int]:
    """How often the run was started again, by what the launcher gave as the cause, or by what the run said last."""
    causes: Counter[str] = Counter()
    cause: str | None = None
    has_started = False
    for event in events:
        match event["event"]:
            case "started":
                if has_started:
                    causes[cause or "unknown"] += 1
                has_started, cause = True, None
            case "restart":
                cause = str(event.get("cause", "unknown"))
            case "stopped" | "not_finite" | "unreadable" as kind if cause is None:
                cause = kind  # else the launcher had them stop, and said why
    return dict(causes)


def was_stopped(events: Sequence[Record]) -> bool:
    """Whether the newest start had ended on purpose, and not for its launch to start all again at once."""
    is_stopped = is_restarted = False
    for event in events:
        match event["event"]:
            case "started":
                is_stopped = is_restarted = False
            case "restart":
                is_restarted = True
            case "launch_stopped":
                is_restarted = False
            case kind if kind in _STOPPED_KINDS:
                is_stopped = True
    return is_stopped and not is_restarted


def last_metrics(run_url: str) -> list[Record]:
    """The last lines of metrics.jsonl, read from its end: that of a long run is large."""
    folder = ObjectFolder(run_url)
    lines: list[Record] = []
    names = [name for name in folder.names() if name.startswith("metrics") and name.endswith(".jsonl")]
    for name in names[-_TAIL_PARTS:]:  # the parts on object storage are named by the time at which their writer began
        size = folder.size(name) or 0
        tail = folder.read_range(name, max(0, size - _TAIL_BYTES), size)
        if size > _TAIL_BYTES:
            tail = tail.partition(b"\n")[2]  # it begins within a line
        lines += records_of(tail, f"{run_url}/{name}")
    return lines
