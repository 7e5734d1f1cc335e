"""What one pod of a job runs: a node of a world that trains, or one part of a stage whose parts need nothing of each other.

    python -m launcher.pod --nodes N --rendezvous HOST:PORT --address IP -- pretrain --config URL --run URL
    python -m launcher.pod --nodes N -- ingest SOURCE STORE      (part I of N: I is JOB_COMPLETION_INDEX)

It is the launcher of a pod, and the container's first process:
- Pod 0 hosts the store where nodes meet and decides who is in the world, in a process beside its agent. Where pod 0 is lost,
  the agents of the others kill their workers, wait for its successor in place, and go on from the last checkpoint:
  their pods do not fail. A pod of its own may hold the store instead (`--role store`), as in the JobSet.
- What is killed in a pod is started again in the pod, as the cluster's own restarts wait 10 s, 20 s, 40 s and so on.
- A pod that comes to a run that is finished ends at once with 0. So does one that was done with it, and whose store is
  gone for good: nobody holds it any more once the run is finished.
- A pod that others can do without waits for its turn as long as they train.
- Stop signals reach the agent, whose workers save and leave with 75. `viewpoint cancel` reaches pod 0 through the run folder:
  all save, and all pods end with 76, which the manifests' policies do not retry.
- `kubectl logs` shows what workers say. The files go to the run folder when the pod ends.
"""

import argparse
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from datastore.errors import (
    EXIT_ASKED_WRONGLY,
    EXIT_DO_NOT_RETRY,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_STOPPED,
    AskedWrongly,
    ViewpointError,
)
from launcher.command import (
    AGENT_WORDS,
    LOOPBACK,
    STORE_SHARING_VARIABLE,
    Command,
    Layout,
    Machine,
    loopback_interface,
    worker_environment,
    worker_words,
)
from launcher.patience import tolerating
from launcher.readings import ProgressReader
from launcher.stop import STOP_REQUESTED
from launcher.tail import Tail
from launcher.terminal import describe

if TYPE_CHECKING:
    from launcher.membership import Membership
    from launcher.presence import Presence
    from trainer.runfolder import RunFolder

EXIT_CANCELLED: Final = 76
"""Of a pod whose run somebody cancelled: everything is saved, and nobody shall start the pod again."""

METRICS_PORT: Final = 9400
"""Of local rank 0's exporter, as manifests name it."""

ROLES: Final = ("node", "worker", "store")
_POLL_SECONDS: Final = 0.2
_TICK_SECONDS: Final = 0.1
_LOOK_SECONDS: Final = 5.0  # between looks into the run folder: one request each
_AGAIN_SECONDS: Final = 1.0  # before what was killed is started again
_SAVING_SECONDS: Final = 140.0  # that all nodes have to save when the store's pod is told to stop; agents give 120
_FAREWELL_SECONDS: Final = 15.0  # for all agents to hear how the job ended
_SILENT_SECONDS: Final = 2.0  # after which an agent has heard it
_PROGRESS_SECONDS: Final = 10.0  # between lines that say how far it is
_PASSED_ON: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_WORLD_STAGE: Final = "pretrain"
_PART_STAGES: Final = ("ingest", "cache")
_logger = logging.getLogger("launcher.pod")


def parser() -> argparse.ArgumentParser:
    """The command line of a pod."""
    made = argparse.ArgumentParser(prog="python -m launcher.pod", description="What one pod of a job runs.")
    made.add_argument("--role", choices=ROLES, default="node", help="node: pod 0 holds the store, too (default)")
    made.add_argument(
        "--index", type=int, default=int(os.environ.get("JOB_COMPLETION_INDEX", "0")), help="this pod's number"
    )
    made.add_argument("--nodes", type=int, required=True, help="pods in all: nodes, or parts")
    made.add_argument(
        "--min-nodes", type=number_or_all, metavar="N|all", help="nodes with which training goes on (default: all)"
    )
    made.add_argument("--procs-per-node", type=int, default=1, help="worker processes in each pod")
    made.add_argument("--gpus", type=int, default=0, help="GPUs of this pod; 0: workers compute on the CPU")
    made.add_argument("--cores", type=int, help="cores of this pod (default: all of the machine's)")
    made.add_argument("--rendezvous", metavar="HOST:PORT", help="where nodes meet")
    made.add_argument("--address", default=LOOPBACK, metavar="IP", help="of this pod")
    made.add_argument("--job", default="job", metavar="NAME", help="of the step, for its logs")
    made.add_argument("--run-folder", metavar="URL", help="the run that status and cancel speak of (default: --run's)")
    made.add_argument("--recipe", metavar="FILE", help="writes config.yaml of a run that has none, from this recipe")
    made.add_argument("--store", metavar="URL", help="the store that the recipe's run reads")
    made.add_argument("--max-restarts", type=int, default=3, help="in a row without a new checkpoint")
    made.add_argument("--node-timeout", type=float, default=10.0, metavar="SECONDS", help="silence of a lost node")
    made.add_argument(
        "--step-deadline", type=float, default=60.0, metavar="SECONDS", help="as `viewpoint launch` has it"
    )
    made.add_argument(
        "--patience", type=float, default=1800.0, metavar="SECONDS", help="for enough nodes, or the store, to come"
    )
    made.add_argument("--scratch", type=Path, default=Path("/tmp/viewpoint"), help="folder for logs and the ready file")
    made.add_argument("words", nargs="+", metavar="STAGE ...", help="a stage and its words, after `--`")
    return made


def number_or_all(text: str) -> int | None:
    """An option's value that counts nodes; None for all of them."""
    if text == "all":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or all, got {text!r}") from None


@dataclass(frozen=True)
class Pod:
    """One pod, as its command line describes it."""

    index: int
    layout: Layout
    words: tuple[str, ...]
    job: str
    address: str
    rendezvous: str
    run_folder: str | None
    scratch: Path
    machine: Machine
    patience: float

    @property
    def stage(self) -> str:
        """The stage's name."""
        return self.words[0]

    @property
    def is_node(self) -> bool:
        """Whether it is one of a world."""
        return self.stage == _WORLD_STAGE

    @property
    def logs(self) -> Path:
        """Where its processes write."""
        return self.scratch / "logs" / f"node-{self.index}" / self.job

    @property
    def ready_file(self) -> Path:
        """It is there while this pod's workers are in a world: what the readiness probe looks for."""
        return self.scratch / "ready"

    def option(self, name: str) -> str | None:
        """What the stage's words say of one of its options."""
        for position, word in enumerate(self.words):
            if word == name and position + 1 < len(self.words):
                return self.words[position + 1]
            if word.startswith(f"{name}="):
                return word.partition("=")[2]
        return None


def pod_of(arguments: argparse.Namespace) -> Pod:
    """The pod of a command line; an error where its parts do not fit."""
    nodes, stage = arguments.nodes, arguments.words[0]
    if not 0 <= arguments.index < nodes:
        raise AskedWrongly(
            f"This pod is number {arguments.index}, and --nodes says that there are {nodes}. In the manifest, NODES must "
            f"be what spec.completions and spec.parallelism are."
        )
    if stage == _WORLD_STAGE and arguments.rendezvous is None:
        raise AskedWrongly("A node needs --rendezvous HOST:PORT, for example $(JOB_NAME)-0.viewpoint:29400.")
    if stage not in (_WORLD_STAGE, *_PART_STAGES) and nodes > 1:
        raise AskedWrongly(f"Stage {stage!r} is one process: NODES and spec.completions must be 1, found {nodes}.")
    layout = Layout(
        nodes,
        arguments.procs_per_node,
        arguments.max_restarts,
        min_nodes=arguments.min_nodes,
        node_timeout=arguments.node_timeout,
        step_deadline=arguments.step_deadline,
    )
    if not 1 <= layout.least_nodes <= nodes:
        raise AskedWrongly(f"--min-nodes must be from 1 to --nodes ({nodes}), got {layout.least_nodes}.")
    cores = arguments.cores or os.cpu_count() or 1
    made = Pod(
        index=arguments.index,
        layout=layout,
        words=tuple(arguments.words),
        job=arguments.job,
        address=arguments.address,
        rendezvous=arguments.rendezvous or "",
        run_folder=arguments.run_folder,
        scratch=arguments.scratch,
        machine=Machine(cores, arguments.gpus),
        patience=arguments.patience,
    )
    if made.run_folder is None:
        return Pod(**{**vars(made), "run_folder": made.option("--run")})
    return made


def agent_command(pod: Pod, interface: str) -> Command:
    """The agent of a pod that is a node, and what its workers inherit."""
    from trainer.commits import LAUNCH_VARIABLE

    layout = pod.layout
    words = (
        *AGENT_WORDS, "--endpoint", pod.rendezvous, "--job", pod.job, "--node", str(pod.index),
        "--procs-per-node", str(layout.procs_per_node), "--address", pod.address,
        "--node-timeout", f"{layout.node_timeout:g}", "--step-deadline", f"{layout.step_deadline:g}",
        "--logs", str(pod.logs), "--", *worker_words(pod.words),
    )  # fmt: skip
    environment = worker_environment(
        pod.machine, processes=layout.procs_per_node, devices=None, progress=pod.scratch / "progress"
    )
    mandatory = {STORE_SHARING_VARIABLE: "1", "GLOO_SOCKET_IFNAME": interface}
    return Command(words, environment | mandatory | {LAUNCH_VARIABLE: f"the job that meets at {pod.rendezvous}"})


def part_command(pod: Pod) -> Command:
    """The one process of a pod that does a part of a stage."""
    environment = worker_environment(pod.machine, processes=1, devices=None, progress=pod.scratch / "progress")
    del environment["VIEWPOINT_PROGRESS_DIR"]  # nobody reads files here: progress is for the log
    if pod.stage == "ingest" and pod.layout.nodes > 1:
        return Command(worker_words((*pod.words, "--part", f"{pod.index}/{pod.layout.nodes}")), environment)
    if pod.stage == "cache" and pod.layout.nodes > 1:
        environment |= {"RANK": str(pod.index), "LOCAL_RANK": "0", "WORLD_SIZE": str(pod.layout.nodes)}
    return Command(worker_words(pod.words), environment)


def interface_of(address: str, interfaces: Mapping[str, Sequence[str]]) -> str:
    """The network interface that has an address."""
    for name, addresses in interfaces.items():
        if address in addresses:
            return name
    if address == LOOPBACK:
        return loopback_interface()
    raise AskedWrongly(
        f"--address {address} is none of this pod's: {', '.join(f'{name} {list(each)}' for name, each in interfaces.items())}. "
        f"In the manifest, POD_IP comes from the field status.podIP."
    )


@dataclass
class Kept:
    """A process that is started again when it is killed."""

    command: Command
    max_deaths: int
    process: subprocess.Popen[bytes] | None = None
    deaths: int = 0
    _not_before: float = field(default=0.0, repr=False)

    def start(self) -> None:
        """Starts it; its output is the pod's own."""
        self.process = subprocess.Popen(self.command.words, env=os.environ | dict(self.command.environment))

    def send(self, number: signal.Signals) -> None:
        """Sends a signal, unless it has ended."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def tick(self, *, again: bool) -> int | None:
        """The exit code once it has ended for good; a killed one is started again where that is wanted."""
        if self.process is None:
            if time.monotonic() >= self._not_before:
                self.start()
            return None
        code = self.process.poll()
        if code is None or code >= 0 or not again or self.deaths >= self.max_deaths:
            return code
        self.deaths += 1
        _logger.warning("process %d was killed by %s; it starts again", self.process.pid, signal.Signals(-code).name)
        self.process, self._not_before = None, time.monotonic() + _AGAIN_SECONDS
        return None

    def end(self, seconds: float) -> None:
        """Gives it time to end, then kills it."""
        if self.process is None:
            return
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Told:
    """The stop signals that this process got."""

    def __init__(self) -> None:
        self.number: signal.Signals | None = None
        for number in _PASSED_ON:
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: object) -> None:
        self.number = signal.Signals(number)


def run(arguments: argparse.Namespace) -> int:
    """Runs the pod to its end and returns its exit code."""
    pod = pod_of(arguments)
    pod.scratch.mkdir(parents=True, exist_ok=True)
    pod.ready_file.unlink(missing_ok=True)
    told = Told()
    if arguments.recipe is not None and pod.index == 0 and arguments.role != "worker":
        write_config(pod, arguments.recipe, arguments.store)
    if arguments.role == "store":
        return hold_store(pod, told)
    if pod.is_node:
        return run_node(pod, told, holds_store=arguments.role == "node" and pod.index == 0)
    return run_part(pod, told)


def run_node(pod: Pod, told: Told, *, holds_store: bool) -> int:
    """A node of the world, and the store beside it on the node that holds it."""
    if is_finished(pod):
        print("viewpoint: the run is finished: this pod has nothing to do", flush=True)
        return EXIT_DONE
    import psutil

    interfaces = {name: [each.address for each in all_] for name, all_ in psutil.net_if_addrs().items()}
    agent = Kept(agent_command(pod, interface_of(pod.address, interfaces)), pod.layout.max_restarts)
    store = Kept(Command(store_words(sys.argv[1:])), max_deaths=pod.layout.max_restarts) if holds_store else None
    output = Output(pod)
    passed_on = False
    looked_at = time.monotonic()
    if store is not None:
        store.start()
    agent.start()
    try:
        while True:
            output.pass_on()
            if told.number is not None and not passed_on:
                passed_on = True
                agent.send(signal.SIGTERM)
                if store is not None:
                    store.send(signal.SIGTERM)  # all save with this node, and wait for the successor of both
            code = agent.tick(again=told.number is None)
            if code is not None:
                break
            if store is not None:
                ended = store.tick(again=told.number is None)
                if ended is not None and ended != EXIT_DONE and told.number is None:
                    agent.send(signal.SIGTERM)
                    agent.end(_FAREWELL_SECONDS)
                    code = ended
                    break
            patience = (2 if output.is_done else 12) * _LOOK_SECONDS
            if output.is_waiting and time.monotonic() - max(output.waiting_since, looked_at) > patience:
                looked_at = time.monotonic()
                if is_finished(pod):  # its end was not heard here
                    agent.send(signal.SIGTERM)
                    agent.end(_FAREWELL_SECONDS)
                    code = EXIT_DONE
                    break
                # a spare pod misses nothing, and one that ended would use up the Job's backoffLimit again and again
                if not output.is_spare and looked_at - output.waiting_since > pod.patience:
                    _logger.error("in no world for %.0f s: another pod may have more luck", pod.patience)
                    agent.send(signal.SIGTERM)
                    agent.end(_FAREWELL_SECONDS)
                    code = EXIT_FAILED
                    break
            time.sleep(_POLL_SECONDS)
    finally:
        pod.ready_file.unlink(missing_ok=True)
        if store is not None:
            store.end(_FAREWELL_SECONDS)  # it ends when all have heard how the job ended
        output.pass_on(is_last=True)
        tolerating(lambda: upload_logs(pod), "keep this pod's logs in the run folder", None)
    return code if code >= 0 else EXIT_FAILED


def run_part(pod: Pod, told: Told) -> int:
    """One part of a stage, or a stage that is one process."""
    work = Kept(part_command(pod), max_deaths=0)
    work.start()
    pod.ready_file.touch()
    run = watched_run(pod)
    sign = Sign(run, pod.job) if run is not None else None
    passed_on = is_cancelled = False
    looked_at = 0.0
    while (code := work.tick(again=False)) is None:
        if run is not None and time.monotonic() - looked_at > _LOOK_SECONDS:
            looked_at = time.monotonic()
            if sign is not None:
                sign.show()
            is_cancelled = is_cancelled or asked_to_stop(run)
        if (told.number is not None or is_cancelled) and not passed_on:
            passed_on = True
            work.send(signal.SIGTERM)
        time.sleep(_POLL_SECONDS)
    if sign is not None:
        sign.remove()
    if is_cancelled and code in (EXIT_STOPPED, -signal.SIGTERM):
        return EXIT_CANCELLED
    if code == -signal.SIGTERM and told.number is not None:
        return EXIT_STOPPED  # a stage without anything to save does not listen
    return code if code >= 0 else EXIT_FAILED


def store_words(own: Sequence[str]) -> tuple[str, ...]:
    """The command that holds the store for a pod that was started with these words."""
    before, after = list(own[: list(own).index("--")]), list(own[list(own).index("--") :])
    kept = [word for word in before if not word.startswith(("--recipe", "--role"))]
    return (sys.executable, "-m", "launcher.pod", *kept, "--role=store", *after)


def hold_store(pod: Pod, told: Told) -> int:
    """Holds the store and decides who is in the world until the job has ended; 0 then.

    Told to stop, it has all nodes save, and leaves when they have: they wait in place for its successor.
    """
    from launcher.membership import Membership, Rules
    from launcher.rendezvous import Host, RendezvousStore
    from launcher.spec import node_counts_for
    from trainer.pretrain import config_at
    from trainer.runfolder import RunFolder

    config_url, run_url = pod.option("--config"), pod.option("--run")
    if config_url is None or run_url is None:
        raise AskedWrongly(f"`pretrain` needs --config and --run, found {' '.join(pod.words)}.")
    config = config_at(config_url)
    run = RunFolder(run_url, writer="nodes")
    rules = Rules(
        most=pod.layout.nodes,
        least=pod.layout.least_nodes,
        counts=node_counts_for(pod.layout, config.global_batch),
        max_restarts=pod.layout.max_restarts,
        silence_seconds=pod.layout.node_timeout,
        patience_seconds=pod.patience,
        leavers_return=True,
    )
    if not rules.counts:
        raise AskedWrongly(
            f"{pod.layout.world} processes cannot share the global batch of {config.global_batch}, two samples each or "
            f"more. Set nodes and processes in the manifest, or global_batch in the recipe."
        )
    if pod.layout.nodes not in rules.counts:
        print(
            f"viewpoint: {pod.layout.nodes} nodes cannot share the global batch of {config.global_batch} evenly: "
            f"{rules.fit(pod.layout.nodes) or 'none'} of them train, and the others wait for their turn",
            flush=True,
        )
    keep = Keeper(run, RunFolder(pod.run_folder or run_url))
    # nodes that knew this pod's predecessor must see that its successor's worlds are others: they are numbered by time
    membership = Membership(rules, progress=keep.committed, on_event=keep.event, generation=int(time.time()))
    port = int(pod.rendezvous.rpartition(":")[2])
    leave_at: float | None = None
    with ExitStack() as held:
        store = held.enter_context(RendezvousStore(port, host=pod.address))
        host = Host(store, pod.job, membership)
        held.callback(lambda: keep.close(membership.order.end))
        while membership.order.end is None:
            host.tick()
            keep.look(membership)
            if told.number is not None:
                if leave_at is None:
                    membership.pause()
                    leave_at = time.monotonic() + _SAVING_SECONDS
                elif membership.is_idle or time.monotonic() > leave_at:
                    return EXIT_STOPPED
            time.sleep(_TICK_SECONDS)
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while time.monotonic() < deadline and membership.heard_within(_SILENT_SECONDS, time.monotonic()):
            host.tick()
            time.sleep(_TICK_SECONDS)
    return EXIT_DONE


class Sign:
    """The note in a run's folder by which `viewpoint status` and `cancel` know that a pod works on it.

    Any pod of a job puts it there, where no other one's is: when the one that did has ended, the next one does.
    """

    def __init__(self, run: "RunFolder", step: str) -> None:
        self._run, self._step = run, step
        self._presence: Presence | None = None

    def show(self) -> None:
        """Puts it there, and keeps it fresh. Where somebody else's is, ours comes when that is gone or stale."""
        if self._presence is None:
            self._presence = tolerating(self._enter, "say that this run is worked on", None)
            return
        from trainer.commits import TakenOverError

        try:
            self._presence.refresh()
        except TakenOverError:  # the fence decides who goes on
            self._presence = None

    def remove(self) -> None:
        """Nobody works on the run any more."""
        if self._presence is not None:
            presence = self._presence
            tolerating(lambda: presence.__exit__(None, None, None), "say that nobody works on this run", None)

    def _enter(self) -> "Presence | None":
        from launcher.presence import HeldError, Presence

        try:
            presence = Presence(self._run).__enter__()
        except HeldError:
            return None
        presence.enter_step(f"{self._step} on a cluster")
        return presence


class Keeper:
    """What whoever holds the store does in the run's folder: events, the sign that somebody works on it, requests."""

    def __init__(self, run: "RunFolder", watched: "RunFolder") -> None:
        self._run, self._watched = run, watched
        self._sign = Sign(watched, "training")
        self._looked_at = 0.0
        self._committed = 0.0

    def event(self, kind: str, **facts: object) -> None:
        """Writes down what happened, and says it."""
        from launcher.events import describe_event

        tolerating(lambda: self._run.append_event(kind, **facts), "write down what happened", None)
        line = describe_event(kind, facts)
        if kind == "world_formed" and line is None:
            line = f"the world is formed: nodes {facts['nodes']}"
        if line is not None:
            print(f"viewpoint: {line}", flush=True)

    def committed(self) -> float:
        """The step of the newest checkpoint, which no restart can lose."""
        saved = tolerating(lambda: self._run.last_event("saved"), "look for new checkpoints", None)
        self._committed = max(self._committed, float(saved["step"]) if saved is not None else 0.0)
        return self._committed

    def look(self, membership: "Membership") -> None:
        """Every few seconds: says that the run is worked on, and hears whether it shall stop."""
        if time.monotonic() - self._looked_at < _LOOK_SECONDS:
            return
        self._looked_at = time.monotonic()
        self._sign.show()
        if asked_to_stop(self._watched):
            membership.cancel(EXIT_CANCELLED)

    def close(self, end: int | None) -> None:
        """Nobody works on the run any more; a request to stop is granted, and must not stop the next start."""
        if end == EXIT_CANCELLED:
            tolerating(lambda: self._watched.remove(STOP_REQUESTED), "take back the request to stop", None)
        self._sign.remove()
        tolerating(self._run.flush, "write down what happened", None)


class Output:
    """Shows what a node's workers write, and keeps the file by which the pod is ready."""

    def __init__(self, pod: Pod) -> None:
        self._pod = pod
        self._events = Tail(pod.logs / "events.jsonl")
        self._offsets: dict[Path, int] = {}
        self._reader = ProgressReader(pod.scratch / "progress")
        self._said = (-1, 0.0)  # units done, and when that was said
        self.is_waiting = True
        self.is_spare = False  # it waits while others train
        self.is_done = False  # it waits for others to be, and then only for the word that all are
        self.waiting_since = time.monotonic()

    def pass_on(self, write: Callable[[str], None] | None = None, *, is_last: bool = False) -> None:
        """Writes what is new to stdout: lines with their worker's name; now and then how far it is, where rank 0 is."""
        for event in self._events.read():
            self._take_in(event["event"])
        show = write or (lambda line: print(line, flush=True))
        for path in sorted(self._pod.logs.glob("start-*/worker-*.log")):
            for line in self._new_lines(path):
                show(f"{path.name.partition('.')[0]}: {line}")
        reading, (done, at) = self._reader.read(), self._said
        if reading is not None and reading.done != done and (is_last or time.monotonic() - at > _PROGRESS_SECONDS):
            self._said = (reading.done, time.monotonic())
            show(describe(reading))

    def _take_in(self, kind: str) -> None:
        if kind in ("node_spare", "node_waits"):
            self.is_spare, self.waiting_since = kind == "node_spare", time.monotonic()
        if kind == "workers_done":
            self.is_waiting, self.is_done, self.waiting_since = True, True, time.monotonic()
        if kind == "workers_started":
            self.is_waiting = self.is_spare = self.is_done = False
            self._pod.ready_file.touch()
        elif kind in ("workers_ended", "cut_off"):
            if not self.is_waiting:
                self.waiting_since = time.monotonic()
            self.is_waiting = True
            self._pod.ready_file.unlink(missing_ok=True)

    def _new_lines(self, path: Path) -> list[str]:
        offset = self._offsets.get(path, 0)
        with path.open("rb") as file:
            file.seek(offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offsets[path] = offset + len(whole) + len(newline)
        return whole.decode(errors="replace").splitlines() if newline else []


def is_finished(pod: Pod) -> bool:
    """Whether the run that this pod trains has reached its last step."""
    from trainer.runfolder import RunFolder

    run_url = pod.option("--run")
    return run_url is not None and tolerating(RunFolder(run_url).is_finished, "look whether the run is finished", False)


def asked_to_stop(run: "RunFolder") -> bool:
    """Whether `viewpoint cancel` was called on the run."""
    return tolerating(lambda: run.read_text(STOP_REQUESTED) is not None, "see whether somebody asked to stop", False)


def watched_run(pod: Pod) -> "RunFolder | None":
    """The run that this pod works for, where it is for one."""
    if pod.run_folder is None:
        return None
    from trainer.runfolder import RunFolder

    return RunFolder(pod.run_folder)


def write_config(pod: Pod, recipe: str, store_url: str | None) -> None:
    """Begins a run: writes its config.yaml, bound to its teacher's features; leaves one that is there.

    DoNotRetry where the run was begun with another recipe.
    """
    from datastore.layout import open_store
    from launcher.runs import choose_run, pinned
    from trainer.config import load_recipe

    run_url = pod.option("--run")
    if run_url is None:
        raise AskedWrongly("--recipe needs to know the run folder: say `pretrain --config URL/config.yaml --run URL`.")
    runs_url, _, name = run_url.rstrip("/").rpartition("/")
    run = choose_run(runs_url, name, load_recipe(recipe, demo=False, store_url=store_url), same_store=False)
    config = run.config
    if config.metrics.port is None:
        config = config.model_copy(update={"metrics": config.metrics.model_copy(update={"port": METRICS_PORT})})
    teacher: str | None = getattr(config.objective, "teacher", None)
    if teacher is not None and config.data.store_url is not None:
        config = pinned(config, open_store(config.data.store_url).resolve_teacher(teacher))
    run.folder.write_config(config)


def upload_logs(pod: Pod) -> None:
    """Copies this pod's logs into the run folder: its disk goes with it."""
    import fsspec

    run_url = pod.option("--run")
    if run_url is None or not pod.logs.exists():
        return
    filesystem, root = fsspec.core.url_to_fs(run_url, use_listings_cache=False)
    filesystem.put(f"{pod.logs}/", f"{root}/logs/node-{pod.index}/{pod.job}/", recursive=True)


def main(words: Sequence[str] | None = None) -> int:
    """Runs one pod and returns its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("aiobotocore").setLevel(logging.WARNING)  # where keys and endpoint come from, for every client
    logging.getLogger("botocore").setLevel(logging.WARNING)
    try:
        return run(parser().parse_args(words))
    except ViewpointError as error:
        print(f"viewpoint: {error}", file=sys.stderr, flush=True)
        return error.exit_code


assert EXIT_CANCELLED not in (EXIT_DONE, EXIT_FAILED, EXIT_ASKED_WRONGLY, EXIT_DO_NOT_RETRY, EXIT_STOPPED)

if __name__ == "__main__":
    sys.exit(main())
