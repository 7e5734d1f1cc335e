"""Runs processes on this machine to their common end: passes stop signals on, starts killed nodes again."""

import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol

import psutil

from datastore.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from launcher.chaos import Chaos, Fault
from launcher.command import Command, Layout, Machine, Place, node_command
from launcher.membership import FINAL_CODES, EventListener, Membership, Order, Rules
from launcher.network import INTERFACE, Networks, why_not
from launcher.recovery import Recoveries
from launcher.rendezvous import Host, RendezvousStore
from launcher.stop import StopRequest, Urgency
from launcher.tail import Record, Tail
from launcher.tether import tethered
from trainer.commits import LAUNCH_VARIABLE
from trainer.heartbeat import read_beat

POLL_SECONDS: Final = 0.1
PATIENCE_SECONDS: Final = 30.0  # for processes that are told to end because another one failed

Starter = Callable[[Command, Path], "Process"]
"""Starts a command whose output goes to the end of a file."""


@dataclass(frozen=True)
class Outcome:
    """How processes ended: an exit code, and who is to blame where it is not a success."""

    exit_code: int
    culprit: str | None = None
    log: Path | None = None  # where the culprit says why
    reason: str = ""  # where more than one log says
    output: Path | None = field(default=None, compare=False)  # what the first worker of the last world printed


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


class Nodes:
    """The nodes of one job while it runs: their agents, and whoever decides which of them form the world."""

    def __init__(
        self,
        children: Sequence[Child],
        host: Host,
        folders: Sequence[Path],
        *,
        on_event: EventListener,
        chaos: Chaos | None,
        networks: Networks | None,
        launch: str = "",
    ) -> None:
        self._children, self._host, self._networks, self._launch = children, host, networks, launch
        self._tails = [Tail(folder / "events.jsonl", from_end=True) for folder in folders]
        self._on_event, self._chaos = on_event, chaos or Chaos(())
        self.ended: dict[int, Record] = {}  # by node: how its workers ended last
        self._recoveries = Recoveries()
        self._generation = 0
        self._workers: dict[int, tuple[int, str]] = {}  # by rank, of the newest world: process id and heartbeat
        self.running: set[int] = set()  # nodes whose agents run
        self.returning: dict[int, float] = {}  # by node: when its agent is started again
        self._away: dict[int, float] = {}  # by node: seconds that it stays away when its agent has ended
        self._healing: dict[int, float] = {}  # by node: when its network is whole again
        self._deaths: dict[int, int] = {}  # by node: of its agent, before it was in any world

    @property
    def order(self) -> Order:
        """What the nodes were told."""
        return self._host.membership.order

    @property
    def output(self) -> Path | None:
        """What the first worker of the newest world printed."""
        if 0 not in self._workers:
            return None
        _, heartbeat = self._workers[0]
        return Path(heartbeat).with_suffix(".out.log")

    def start(self) -> None:
        """Starts all agents."""
        for node in range(len(self._children)):
            self._start(node)

    def stop(self) -> None:
        """The job was told to stop: nothing is formed or started any more."""
        self._host.membership.is_stopping = True
        self.returning.clear()

    def tick(self) -> None:
        """To be called several times a second."""
        self._host.tick()
        self._read_events()
        now = time.monotonic()
        self._read_heartbeats(now)
        for fault in self._chaos.due(self._recoveries.newest_step):
            self._inject(fault, now)
        for node in [node for node, due in self._healing.items() if now >= due]:
            del self._healing[node]
            assert self._networks is not None
            self._networks.heal(node)
            self.heard("partition_healed", node=node)
        for node in [node for node, due in self.returning.items() if now >= due]:
            del self.returning[node]
            self._start(node)

    def note_end(self, node: int, code: int, max_deaths: int) -> None:
        """Takes in that an agent has ended; one that was not told to is started again."""
        self.running.remove(node)
        self._host.tick()  # its last word first
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self._host.membership.gone(node, f"its agent {how}")
        if code == EXIT_STOPPED and node not in self._away:
            return
        away = self._away.pop(node, 0.0)
        self._deaths[node] = self._deaths.get(node, 0) + 1
        if self._deaths[node] > max_deaths:
            self._host.membership.end(
                EXIT_FAILED, f"the agent of node {node} {how}, {self._deaths[node]} times in a row"
            )
        if self.order.end is None:
            self.returning[node] = time.monotonic() + away
            self.heard("node_replaced", name=f"node {node}", ended=how, after_seconds=away)

    def is_history(self, node: int) -> bool:
        """Whether the job went on without the node before its agent ended."""
        self._host.tick()  # its last word first
        return self._host.membership.is_history(node)

    def _start(self, node: int) -> None:
        self._children[node].start()
        self.running.add(node)

    def heard(self, kind: str, **facts: Any) -> None:
        """Keeps an event and passes it on."""
        now = time.monotonic()
        self._recoveries.heard(kind, facts, now)
        if kind == "workers_ended":
            self.ended[facts["node"]] = {"time": time.time(), **facts}
        if kind == "world_formed":
            self._deaths.clear()
        if kind == "workers_started":
            if facts["generation"] > self._generation:
                self._generation, self._workers = facts["generation"], {}
            if facts["generation"] == self._generation:
                self._workers |= dict(
                    zip(facts["ranks"], zip(facts["pids"], facts["heartbeats"], strict=True), strict=True)
                )
        self._on_event(kind, **facts)

    def _read_events(self) -> None:
        for tail in self._tails:
            for event in tail.read():
                if event.pop("launch") != self._launch:
                    continue  # nodes of another launch of the same run write into the same file
                self.heard(
                    event["event"], **{key: value for key, value in event.items() if key not in ("time", "event")}
                )

    def _read_heartbeats(self, now: float) -> None:
        for _, path in list(self._workers.values()):
            beat = read_beat(path)
            recovery = self._recoveries.beat(beat, self._generation, now) if beat is not None else None
            if recovery is not None:
                self.heard("recovered", **asdict(recovery), world=len(self._workers))

    def _inject(self, fault: Fault, now: float) -> None:
        if fault.kind == "partition" and self._networks is None:
            self.heard("chaos_skipped", fault=str(fault), why=why_not() or "nodes share the launcher's network")
            return
        if fault.kind in ("kill-worker", "hang") and not self._signal_worker(fault):
            self.heard("chaos_skipped", fault=str(fault), why="that worker had ended by itself")
            return
        self.heard("chaos_injected", fault=str(fault), step=self._recoveries.newest_step)
        if fault.kind in ("kill-worker", "hang"):
            return
        if fault.kind == "partition":
            assert self._networks is not None
            self._networks.cut(fault.target)
            self._healing[fault.target] = now + fault.seconds
        else:
            self._away[fault.target] = fault.seconds
            self._children[fault.target].send(signal.SIGKILL if fault.kind == "kill-node" else signal.SIGTERM)

    def _signal_worker(self, fault: Fault) -> bool:
        """Whether there was a worker to do it to; a smaller world may lack the one that was meant."""
        ranks = [rank for rank in self._workers if rank <= fault.target] or list(self._workers)[:1]
        if not ranks:
            return False
        pid, _ = self._workers[max(ranks)]
        try:
            os.kill(pid, signal.SIGKILL if fault.kind == "kill-worker" else signal.SIGSTOP)
        except ProcessLookupError:
            return False
        return True


def run_nodes(
    worker: Sequence[str],
    *,
    layout: Layout,
    job: str,
    store: RendezvousStore,
    logs: Path,
    progress: Path,
    machine: Machine,
    stop: StopRequest,
    start_agent: Starter = Spawned,
    watch: Callable[[], None] = lambda: None,
    on_event: EventListener = lambda kind, **facts: None,
    committed: Callable[[], float] = lambda: 0.0,
    node_counts: Sequence[int] = (),
    chaos: Chaos | None = None,
    networks: Networks | None = None,
) -> Outcome:
    """Runs a stage as workers under node agents, which meet in the store; logs lie in `logs/node-I/JOB/`.

    `committed` grows with what no restart can lose: without growth, restarts are counted. `node_counts` are the numbers
    of nodes that can share the work.
    """
    folders = [logs / f"node-{node}" / job for node in range(layout.nodes)]
    # other launches may work on the same run without knowing it: the fence tells their starts from those of this one
    launch = f"process {os.getpid()} on {socket.gethostname()}, {uuid.uuid4().hex[:8]}"
    commands = [
        node_command(
            worker,
            node=node,
            layout=layout,
            job=job,
            endpoint=store.endpoint,
            logs=folder,
            machine=machine,
            progress=progress,
            place=Place(networks.address(node), INTERFACE, networks.name(node)) if networks else Place(),
        )
        for node, folder in enumerate(folders)
    ]
    children = [
        Child(
            f"node {node}",
            replace(command, environment={**command.environment, LAUNCH_VARIABLE: launch}),
            folder / "agent.log",
            start_agent,
        )
        for node, (command, folder) in enumerate(zip(commands, folders, strict=True))
    ]
    rules = Rules(
        most=layout.nodes,
        least=layout.least_nodes,
        counts=tuple(node_counts),
        max_restarts=layout.max_restarts,
        silence_seconds=layout.node_timeout,
    )
    heard: list[Callable[..., None]] = []  # the nodes, which need the membership that tells them
    membership = Membership(rules, progress=committed, on_event=lambda kind, **facts: heard[0](kind, **facts))
    host = Host(store, job, membership)
    nodes = Nodes(children, host, folders, on_event=on_event, chaos=chaos, networks=networks, launch=launch)
    heard.append(nodes.heard)

    def watch_nodes() -> None:
        nodes.tick()
        watch()

    try:
        nodes.start()
        outcome = _until_the_end(nodes, children, stop, watch_nodes, layout.max_restarts)
    finally:
        for child in children:
            child.send(signal.SIGKILL)
            child.wait()
    watch_nodes()
    return replace(_with_log(outcome, children, nodes.ended), output=nodes.output)


def _until_the_end(
    nodes: Nodes, children: Sequence[Child], stop: StopRequest, watch: Callable[[], None], max_deaths: int
) -> Outcome:
    told = Urgency.GO_ON
    while nodes.running or nodes.returning:
        watch()
        running = [children[node] for node in nodes.running]
        told = _pass_on(stop.urgency, told, running)
        if told is not Urgency.GO_ON:
            nodes.stop()
        elif nodes.order.end is not None:
            _wait(running, watch)
            break
        for node in sorted(nodes.running):
            code = children[node].exit_code
            if code is None:
                continue
            if told is not Urgency.GO_ON:
                nodes.running.remove(node)
            elif code in FINAL_CODES and not nodes.is_history(node):
                _wait(running, watch)  # the others hear of it
                return Outcome(code, children[node].name)
            else:
                nodes.note_end(node, code, max_deaths)
        time.sleep(POLL_SECONDS)
    watch()
    if told is not Urgency.GO_ON or nodes.order.end is None:
        return _outcome_of_stopped(children)
    if nodes.order.end in (EXIT_DONE, EXIT_STOPPED):
        return Outcome(nodes.order.end)
    return Outcome(nodes.order.end, "the job", reason=nodes.order.reason)


def _with_log(outcome: Outcome, children: Sequence[Child], ended: Mapping[int, Record]) -> Outcome:
    """Names the log that says why: of the workers that ended first, as the others lost their connection to them."""
    if outcome.culprit is None:
        return outcome
    to_blame = [event for event in ended.values() if outcome.exit_code in event["exit_codes"].values()] or list(
        ended.values()
    )
    if not to_blame:
        agent = next((child for child in children if child.name == outcome.culprit), children[0])
        return replace(outcome, log=agent.log)
    first = min(to_blame, key=lambda event: event["time"])
    return replace(outcome, culprit=f"node {first['node']}", log=Path(first["logs"][0]))


def run_together(children: Sequence[Child], *, stop: StopRequest, watch: Callable[[], None] = lambda: None) -> Outcome:
    """Runs the processes until all have ended or one has failed; the others are stopped then.

    `watch` is called about ten times a second.
    """
    running = list(children)
    told = Urgency.GO_ON
    try:
        for child in running:
            child.start()
        while running:
            watch()
            told = _pass_on(stop.urgency, told, running)
            for child in list(running):
                code = child.exit_code
                if code is None:
                    continue
                running.remove(child)
                if code != EXIT_DONE and told is Urgency.GO_ON:
                    return _judge(child, code, _end(running, watch))
            time.sleep(POLL_SECONDS)
        watch()
        return Outcome(EXIT_DONE) if told is Urgency.GO_ON else _outcome_of_stopped(children)
    finally:
        for child in children:
            child.send(signal.SIGKILL)
            child.wait()


def _outcome_of_stopped(children: Sequence[Child]) -> Outcome:
    """How processes ended that were told to stop."""
    codes = [child.exit_code for child in children]
    if not any(codes):
        return Outcome(EXIT_DONE)
    lasting = next((child for child in children if child.exit_code in FINAL_CODES), None)
    if lasting is not None:
        return Outcome(lasting.exit_code or EXIT_FAILED, lasting.name)
    failed = next((child for child in children if (child.exit_code or 0) > 0), None)
    if failed is not None and EXIT_STOPPED not in codes:
        return Outcome(failed.exit_code or EXIT_FAILED, failed.name)  # it could not save: 75 would promise that
    return Outcome(EXIT_STOPPED)


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
    for final in FINAL_CODES:
        for child in (first, *others):
            if child.exit_code == final:
                return Outcome(final, child.name)
    return Outcome(code if code > 0 else EXIT_FAILED, first.name)


def this_machine() -> Machine:
    """Cores that this process may use, and GPUs that torch sees."""
    import torch  # seconds, and only needed where something is started

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count() or 1
    return Machine(cores=cores, gpus=torch.cuda.device_count() if torch.cuda.is_available() else 0)
