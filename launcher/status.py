"""`viewpoint status`: what a run is doing now, or did, from what lies in its folder; without a name, which runs there are."""

import argparse
import json
import textwrap
import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from datastore.errors import EXIT_DONE, ViewpointError
from datastore.progress import format_seconds

if TYPE_CHECKING:
    from trainer.runfolder import RunFolder

HELP = "what a run is doing now, or did; without RUN, which runs there are"

EXAMPLES = """\
examples:
  viewpoint status
  viewpoint status --runs s3://bucket/runs
  viewpoint status pointmcd-1
  viewpoint status s3://bucket/runs/pointmcd-1 --json
  viewpoint status pointmcd-1 --watch
"""

_WATCH_SECONDS: Final = 2.0
_REASON_WIDTH: Final = 240
_OF_A_STEP: Final = ("samples_per_second", "data_wait_share")

Record = Mapping[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `viewpoint status`."""
    parser.add_argument(
        "run", metavar="RUN", nargs="?", help="the run's folder, or its name in --runs; without it, all runs there"
    )
    parser.add_argument("--runs", metavar="URL", default="runs", help="folder of all runs (default: ./runs)")
    parser.add_argument("--watch", action="store_true", help="look again every 2 seconds while something is worked on")
    parser.add_argument("--json", action="store_true", help="one JSON object a run")


def run(arguments: argparse.Namespace) -> int:
    """Prints the state, once or again and again."""
    from trainer.runfolder import RunFolder, find_run, run_names

    runs_url = arguments.runs.rstrip("/")
    folder = None if arguments.run is None else find_run(arguments.run, runs_url)
    while True:
        found = [RunFolder(f"{runs_url}/{name}") for name in run_names(runs_url)] if folder is None else [folder]
        states = [state_of(each) for each in found]
        if arguments.json:
            for state in states:
                print(json.dumps(state), flush=True)
        elif folder is not None:
            print(describe(states[0], time.time()), flush=True)
        else:
            print(describe_all(states, runs_url, time.time()), flush=True)
        if not (arguments.watch and any(state["working"] for state in states)):
            return EXIT_DONE
        time.sleep(_WATCH_SECONDS)


def state_of(folder: "RunFolder") -> dict[str, Any]:
    """Everything that is known of a run, as JSON."""
    from launcher.presence import holder_of

    holder = holder_of(folder)
    trainings = [_training(name, run) for name, run in ({"": folder} | folder.arms()).items()]
    events = folder.events()
    times = [
        each["time"] for each in (*events[-1:], *(training["last"] or {} for training in trainings)) if "time" in each
    ]
    return {
        "run": folder.url,
        "job": _job(folder),
        "working": holder is not None,
        "worker": str(holder) if holder is not None else None,
        "state": _state(events, working=holder is not None),
        "failure": _failure(events, working=holder is not None),
        "time": max(times, default=None),
        "trainings": trainings,
        "scores": {name: record["accuracy"] for name, record in folder.records().items()},
    }


def describe(state: Mapping[str, Any], now: float) -> str:
    """The state for people."""
    lines = [
        f"{state['run']} ({state['job']}): {state['state']}" + (f", {state['worker']}" if state["working"] else "")
    ]
    if state["failure"] is not None:
        lines += _describe_failure(state["failure"], state["run"])
    for training in state["trainings"]:
        lines += _describe_training(training, now, working=state["working"])
    lines += [f"  {name}: {100 * accuracy:.1f} % of the test shapes" for name, accuracy in state["scores"].items()]
    return "\n".join(lines)


def describe_all(states: Sequence[Mapping[str, Any]], runs_url: str, now: float) -> str:
    """All runs for people, a line each, what happened last first."""
    from trainer.runfolder import shown_folder

    folder = shown_folder(runs_url)
    if not states:
        return (
            f"There are no runs in {folder}. `viewpoint launch pointmcd --nodes 4` begins one that needs no data and no GPU; "
            f"`viewpoint launch --help` says more. Runs that lie elsewhere: `viewpoint status --runs URL`."
        )
    rows = [
        (
            state["run"].rpartition("/")[2],
            state["job"],
            state["state"].partition("; ")[0],
            _progress(state),
            _when(state, now),
        )
        for state in sorted(states, key=lambda state: state["time"] or 0.0, reverse=True)
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(
        [f"Runs in {folder}:", *(f"  {line}" for line in lines), "`viewpoint status NAME` says more of one."]
    )


def _progress(state: Mapping[str, Any]) -> str:
    """How far a run's own training is, and what it was worth."""
    training = state["trainings"][0]
    last = training["last"]
    parts = ["no step yet"] if last is None else [_step_of(training)]
    parts += [
        f"{name} {100 * accuracy:.1f} %" for name, accuracy in state["scores"].items() if name.partition(".")[2] == ""
    ]
    return ", ".join(parts)


def _step_of(training: Record) -> str:
    return f"step {training['last']['step']:,} of {training['total_steps']:,}"


def _when(state: Mapping[str, Any], now: float) -> str:
    return f"{format_seconds(max(0.0, now - state['time']))} ago" if state["time"] is not None else ""


def _job(folder: "RunFolder") -> str:
    """The job's name; a config that this release cannot read hides nothing else of the run."""
    try:
        return folder.config().job
    except ViewpointError:
        return "unreadable config.yaml"


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
            return "failed"
        if kind == "launch_started" and event.get("on") == "k8s":
            return (
                "no pod at work now: they wait for their cluster, or its launcher was killed; the same launch goes on"
            )
        if kind == "launch_started":
            return "broken off without a word: its launcher was killed; the same launch goes on"
    return "trained" if any(event["event"] == "finished" for event in events) else "not running"


def _failure(events: Sequence[Record], *, working: bool) -> dict[str, Any] | None:
    """The step at which a run failed, why, and where to read more; None of a run that did not fail last."""
    if _state(events, working=working) != "failed":
        return None
    event = next(each for each in reversed(events) if each["event"] == "launch_failed")
    return {key: event.get(key) for key in ("step", "exit_code", "reason", "log")}


def _describe_failure(failure: Record, run_url: str) -> list[str]:
    """Why a run failed, in a line that is cut where it is very long, and where its logs are."""
    why = textwrap.shorten(failure["reason"] or "", _REASON_WIDTH, placeholder=" ...")
    said = f"  failed at step {failure['step']!r} with exit code {failure['exit_code']}"
    return [
        f"{said}: {why}" if why else said,
        f"  its log: {failure['log']}" if failure["log"] else f"  its logs: {run_url}/logs",
    ]


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
        "median": {key: median(line[key] for line in metrics) for key in _OF_A_STEP} if metrics else None,
        "saved": latest.get("saved"),
        "restarts": restarts_by_cause(events),
        "goodput": goodput(metrics[-1].get(ACCOUNT, {})) if metrics else None,
    }


def _describe_training(training: Record, now: float, *, working: bool) -> list[str]:
    last, saved = training["last"], training["saved"]
    if last is None:
        return [f"  {training['name']}: no step yet"]
    parts = [
        _step_of(training),
        f"loss {last['loss']:.4g}",
        _speed(training, working=working),
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


def _speed(training: Record, *, working: bool) -> str:
    """Of the newest step while it trains; afterwards of the median step, as the report has it: no single one stands for all."""
    is_live = working and not training["finished"]
    figures, of_all = (training["last"], "") if is_live else (training["median"], " (median step)")
    return f"{figures['samples_per_second']:,.0f} samples/s, data wait {100 * figures['data_wait_share']:.0f}%{of_all}"
