"""`viewpoint status`: what a run is doing now, or did, from what lies in its folder."""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from datastore.errors import EXIT_DONE
from datastore.progress import format_seconds

if TYPE_CHECKING:
    from trainer.runfolder import RunFolder

HELP = "what a run is doing now, or did"

EXAMPLES = """\
examples:
  viewpoint status pointmcd-1
  viewpoint status s3://bucket/runs/pointmcd-1 --json
  viewpoint status pointmcd-1 --watch
"""

_WATCH_SECONDS: Final = 2.0

Record = Mapping[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `viewpoint status`."""
    parser.add_argument("run", metavar="RUN", help="the run's folder, or its name in ./runs")
    parser.add_argument("--watch", action="store_true", help="look again every 2 seconds while something works on it")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Prints the state, once or again and again."""
    from trainer.runfolder import find_run

    folder = find_run(arguments.run)
    while True:
        state = state_of(folder)
        print(json.dumps(state) if arguments.json else describe(state, time.time()), flush=True)
        if not (arguments.watch and state["working"]):
            return EXIT_DONE
        time.sleep(_WATCH_SECONDS)


def state_of(folder: "RunFolder") -> dict[str, Any]:
    """Everything that is known of a run, as JSON."""
    from launcher.presence import holder_of

    holder = holder_of(folder)
    trainings = {"": folder} | folder.arms()
    return {
        "run": folder.url,
        "job": folder.config().job,
        "working": holder is not None,
        "worker": str(holder) if holder is not None else None,
        "state": _state(folder.events(), working=holder is not None),
        "trainings": [_training(name, run) for name, run in trainings.items()],
        "scores": {name: record["accuracy"] for name, record in folder.records().items()},
    }


def describe(state: Mapping[str, Any], now: float) -> str:
    """The state for people."""
    lines = [
        f"{state['run']} ({state['job']}): {state['state']}" + (f", {state['worker']}" if state["working"] else "")
    ]
    for training in state["trainings"]:
        lines += _describe_training(training, now)
    lines += [f"  {name}: {100 * accuracy:.1f} % of the test shapes" for name, accuracy in state["scores"].items()]
    return "\n".join(lines)


def _state(events: Sequence[Record], *, working: bool) -> str:
    if working:
        return "running"
    for event in reversed(events):
        kind = event["event"]
        if kind == "launch_complete":
            return "complete"
        if kind == "launch_stopped":
            return "stopped; the same launch goes on"
        if kind == "launch_failed":
            return "failed; see its logs"
        if kind == "launch_started" and event.get("on") == "k8s":
            return (
                "no pod at work now: they wait for their cluster, or its launcher was killed; the same launch goes on"
            )
        if kind == "launch_started":
            return "broken off without a word: its launcher was killed; the same launch goes on"
    return "trained" if any(event["event"] == "finished" for event in events) else "not running"


def _training(name: str, run: "RunFolder") -> dict[str, Any]:
    from trainer.history import ACCOUNT, goodput, restarts_by_cause

    events = run.events()
    latest: dict[str, Record] = {event["event"]: event for event in events}
    metrics = run.metrics()
    return {
        "name": name or "pretrain",
        "finished": "finished" in latest,
        "total_steps": latest["started"]["total_steps"] if "started" in latest else None,
        "last": metrics[-1] if metrics else None,
        "saved": latest.get("saved"),
        "restarts": restarts_by_cause(events),
        "goodput": goodput(metrics[-1].get(ACCOUNT, {})) if metrics else None,
    }


def _describe_training(training: Record, now: float) -> list[str]:
    last, saved = training["last"], training["saved"]
    if last is None:
        return [f"  {training['name']}: no step yet"]
    parts = [
        f"step {last['step']:,} of {training['total_steps']:,}",
        f"loss {last['loss']:.4g}",
        f"{last['samples_per_second']:,.0f} samples/s",
        f"data wait {100 * last['data_wait_share']:.0f}%",
        f"{format_seconds(max(0.0, now - last['time']))} ago",
    ]
    if saved is not None:
        parts.append(f"saved at step {saved['step']:,} {format_seconds(max(0.0, now - saved['time']))} ago")
    if training["goodput"]:
        parts.append(f"{100 * training['goodput']:.0f}% of the time in steps that count")
    if training["restarts"]:
        causes = ", ".join(f"{count} {cause}" for cause, count in training["restarts"].items())
        parts.append(f"started again: {causes}")
    return [f"  {training['name']}: {'finished at ' if training['finished'] else ''}{', '.join(parts)}"]
