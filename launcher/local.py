"""Runs processes on this machine to their common end: passes stop signals on, replaces killed nodes."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

import psutil

from datastore.errors import EXIT_ASKED_WRONGLY, EXIT_DO_NOT_RETRY, EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from launcher.command import Command, Layout, Machine, node_command
from launcher.stop import StopRequest, Urgency
from launcher.tail import Record, Tail
from launcher.tether import tethered

POLL_SECONDS: Final = 0.1
PATIENCE_SECONDS: Final = 30.0  # for processes that are told to end because another one failed

EventListener = Callable[..., Any]
"""Called with the kind of an event and its facts."""

Starter = Callable[[Command, Path], "Process"]
"""Starts a command whose output goes to the end of a file."""


@dataclass(frozen=True)
class Outcome:
    """How processes ended: an exit code, and who is to blame where it is not a success."""

    exit_code: int
    culprit: str | None = None
    log: Path | None = None  # where the culprit says why


class Process(Protocol):
    """Something that was started, runs in a session of its own, and ends when the launcher dies."""

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative after a signal."""

    def send(self, number: signal.Signals) -> None:
        """Sends a signal, unless it has ended."""

    def wait(self) -> None:
        """Returns when it has ended."""


class Spawned:
    """A process like any other."""

    def __init__(self, command: Command, log: Path) -> None:
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                tethered(command.words, signal.SIGTERM),
                env=os.environ | dict(command.environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the launcher alone, which passes it on in order
            )

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative after a signal."""
        return self._process.poll()

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the process; to all of its session where it kills, since pools of workers are in it."""
        if self._process.poll() is not None:
            return
        if number is signal.SIGKILL:
            os.killpg(self._process.pid, number)
        else:
            self._process.send_signal(number)

    def wait(self) -> None:
        """Returns when it has ended."""
        self._process.wait()


class Child:
    """One place in a job: a process, its output in a file, and the process that replaces it when it is killed."""

    def __init__(self, name: str, command: Command, log: Path, start: Starter = Spawned) -> None:
        self.name, self.command, self.log = name, command, log
        self.replacements = 0
        self._start = start
        self._process: Process | None = None

    def start(self) -> None:
        """Starts it, for the first time or again."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._process = self._start(self.command, self.log)

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative after a signal."""
        assert self._process is not None
        return self._process.exit_code

    def send(self, number: signal.Signals) -> None:
        """Sends a signal, unless it has ended or was not started."""
        if self._process is not None:
            self._process.send(number)

    def wait(self) -> None:
        """Returns when it has ended."""
        if self._process is not None:
            self._process.wait()


def run_process(
    name: str, command: Command, log: Path, *, stop: StopRequest, watch: Callable[[], None] = lambda: None
) -> Outcome:
    """Runs a stage that is one process."""
    outcome = run_together([Child(name, command, log)], stop=stop, watch=watch)
    return replace(outcome, log=log)


def run_nodes(
    worker: Sequence[str],
    *,
    layout: Layout,
    job: str,
    endpoint: str,
    logs: Path,
    progress: Path,
    machine: Machine,
    stop: StopRequest,
    start_agent: Starter = Spawned,
    watch: Callable[[], None] = lambda: None,
    on_event: EventListener = lambda kind, **facts: None,
) -> Outcome:
    """Runs a stage as workers under node agents; agents meet at `endpoint`, logs lie in `logs/node-I/JOB/`."""
    folders = [logs / f"node-{node}" / job for node in range(layout.nodes)]
    children = [
        Child(
            f"node {node}",
            node_command(
                worker,
                node=node,
                layout=layout,
                job=job,
                endpoint=endpoint,
                logs=folder,
                machine=machine,
                progress=progress,
            ),
            folder / "agent.log",
            start_agent,
        )
        for node, folder in enumerate(folders)
    ]
    tails = [Tail(folder / "events.jsonl", from_end=True) for folder in folders]
    ended: dict[int, Record] = {}

    def watch_nodes() -> None:
        for tail in tails:
            for event in tail.read():
                if event["event"] == "workers_ended":
                    ended[event["node"]] = event
                on_event(event["event"], **{key: value for key, value in event.items() if key not in ("time", "event")})
        watch()

    outcome = run_together(
        children,
        stop=stop,
        watch=watch_nodes,
        on_event=on_event,
        max_replacements=layout.max_restarts,
        one_world=True,
    )
    watch_nodes()
    return _with_log(outcome, children, ended)


def _with_log(outcome: Outcome, children: Sequence[Child], ended: dict[int, Record]) -> Outcome:
    """Names the log that says why: of the workers that ended first, as the others lost their connection to them."""
    if outcome.culprit is None:
        return outcome
    to_blame = [event for event in ended.values() if outcome.exit_code in event["exit_codes"].values()] or list(
        ended.values()
    )
    if not to_blame:
        agent = next(child for child in children if child.name == outcome.culprit)
        return replace(outcome, log=agent.log)
    first = min(to_blame, key=lambda event: event["time"])
    return replace(outcome, culprit=f"node {first['node']}", log=Path(first["logs"][0]))


def run_together(
    children: Sequence[Child],
    *,
    stop: StopRequest,
    watch: Callable[[], None] = lambda: None,
    on_event: EventListener = lambda kind, **facts: None,
    max_replacements: int = 0,
    one_world: bool = False,
) -> Outcome:
    """Runs the processes until all have ended or one has failed for good; the others are stopped then.

    A process that was killed is replaced up to `max_replacements` times. `watch` is called about ten times a second.
    `one_world`: the processes leave together, so that the first success means that all have done their work.
    """
    running = list(children)
    told = Urgency.GO_ON
    try:
        for child in running:
            child.start()
        while running:
            watch()
            told = _pass_on(stop.urgency, told, running)
            if one_world and told is Urgency.GO_ON and any(child.exit_code == EXIT_DONE for child in children):
                _wait(running, watch)
                return Outcome(EXIT_DONE)
            for child in list(running):
                code = child.exit_code
                if code is None:
                    continue
                if code < 0 and told is Urgency.GO_ON and child.replacements < max_replacements:
                    child.replacements += 1
                    on_event("node_replaced", name=child.name, killed_by=signal.Signals(-code).name)
                    child.start()
                    continue
                running.remove(child)
                if code != EXIT_DONE and told is Urgency.GO_ON:
                    return _judge(child, code, _end(running, watch))
            time.sleep(POLL_SECONDS)
        watch()
        codes = [child.exit_code for child in children]
        if told is Urgency.GO_ON or not any(codes):
            return Outcome(EXIT_DONE)
        lasting = next(
            (child for child in children if child.exit_code in (EXIT_DO_NOT_RETRY, EXIT_ASKED_WRONGLY)), None
        )
        if lasting is not None:
            return Outcome(lasting.exit_code or EXIT_FAILED, lasting.name)
        failed = next((child for child in children if (child.exit_code or 0) > 0), None)
        if failed is not None and EXIT_STOPPED not in codes:
            return Outcome(failed.exit_code or EXIT_FAILED, failed.name)  # it could not save: 75 would promise that
        return Outcome(EXIT_STOPPED)
    finally:
        for child in children:
            child.send(signal.SIGKILL)
            child.wait()


def _pass_on(asked: Urgency, told: Urgency, running: Sequence[Child]) -> Urgency:
    if asked > told:
        for child in running:
            child.send(signal.SIGKILL if asked is Urgency.KILL else signal.SIGTERM)
    return asked


def _end(running: Sequence[Child], watch: Callable[[], None]) -> list[Child]:
    """Ends processes that have nothing left to do since another one failed; returns those that ended by themselves."""
    for child in running:
        child.send(signal.SIGTERM)
    _wait(running, watch)
    return [child for child in running if child.exit_code is not None]


def _wait(running: Sequence[Child], watch: Callable[[], None]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while any(child.exit_code is None for child in running) and time.monotonic() < deadline:
        watch()
        time.sleep(POLL_SECONDS)


def _judge(first: Child, code: int, others: Sequence[Child]) -> Outcome:
    """The job's exit code: where two processes failed at about the same time, the one that says more counts."""
    for final in (EXIT_DO_NOT_RETRY, EXIT_ASKED_WRONGLY):
        for child in (first, *others):
            if child.exit_code == final:
                return Outcome(final, child.name)
    return Outcome(code if code > 0 else EXIT_FAILED, first.name)


def this_machine() -> Machine:
    """Cores that this process may use, and GPUs that torch sees."""
    import torch  # seconds, and only needed where something is started

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count() or 1
    return Machine(cores=cores, gpus=torch.cuda.device_count() if torch.cuda.is_available() else 0)
