"""One node of a job: starts this node's workers, watches them, restarts them in place and passes signals on.

    python -m launcher.agent --endpoint HOST:PORT --job ID --node I --logs FOLDER -- COMMAND...

It is an agent of torchrun's API with a rendezvous and with workers of its own, since plain `torchrun` was seen to lose jobs:
- Who is in the world is decided outside the agents (`launcher.membership`), so that no node's loss ends the job.
- Workers never share the agents' store. They would find addresses of a dead world in it, and no restart succeeds.
- A worker that misses its deadline shows its stacks and is killed; torchrun would wait for the collectives' timeout, and
  then 30 s more. Workers of a broken world are killed at once: what they committed is safe, the rest is lost anyway.
- A node that cannot reach the others stops its workers, so that two worlds never write side by side.
- Exit codes 2 and 64 of a worker end the job: asked wrongly, do not retry.
- A stop signal goes to the workers, which save and leave by themselves with 75; the agent waits for them. While it waits
  for other nodes there is nothing to save, and it ends at once.
- A node whose workers are done waits for the others, and starts its workers again when another node has to.
- Workers are forked from a process that has imported what they need: a restart costs no imports.
"""

import argparse
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import psutil
from torch.distributed import DistError, HashStore  # type: ignore[attr-defined]
from torch.distributed.elastic.agent.server.api import (
    DEFAULT_ROLE,
    RunResult,
    SimpleElasticAgent,
    Worker,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousHandler, RendezvousInfo
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo

from datastore.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, DoNotRetry, ViewpointError
from launcher.command import LOOPBACK, STORE_SHARING_VARIABLE, Command
from launcher.link import Link
from launcher.membership import FINAL_CODES, Cause, Failure, Order, Report
from launcher.network import enter_network
from launcher.nursery import Forked, Nursery
from launcher.warm import stage_of
from launcher.watchdog import Deadlines, Hang, Watch
from trainer.commits import LAUNCH_VARIABLE
from trainer.heartbeat import HEARTBEAT_VARIABLE, STACKS_SIGNAL, read_beat
from trainer.lines import append_line

MONITOR_SECONDS: Final = 0.1
LEAVE_TOGETHER_SECONDS: Final = 10.0
STOP_TIMEOUT_SECONDS: Final = 120.0  # a checkpoint must be saved within it once a stop is asked for
SPARE_SILENCE_SECONDS: Final = 5.0  # after which nobody knows any more whether others train
STACKS_SECONDS: Final = 1.0  # that a hung worker has to write them
KILL_SECONDS: Final = 30.0  # that a killed worker has to end: it may have much memory to give back
DELIVERY_SECONDS: Final = 2.0  # that an agent which leaves waits for its last word to arrive
_FOR_EVER: Final = 10**9  # restarts: whoever decides on the membership counts them

_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_logger = logging.getLogger("launcher.agent")


class AnotherNodeRestartsError(Exception):
    """Workers of another node failed after this node's were done: all start again, as only all form a world."""


class StuckWorkerError(ViewpointError):
    """A worker that does not even end when it is killed."""


class JobEndedError(Exception):
    """The job has ended on all nodes."""

    def __init__(self, exit_code: int, reason: str) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


class EventLog:
    """What happened on this node, one JSON object a line: the launcher shows it and keeps it in the run's history."""

    def __init__(self, path: Path, node: int) -> None:
        self._path, self._node = path, node

    def append(self, kind: str, **facts: Any) -> None:
        launch = os.environ.get(LAUNCH_VARIABLE, "")
        append_line(self._path, {"time": time.time(), "event": kind, "launch": launch, "node": self._node, **facts})


def start_folder(logs: Path) -> Path:
    """A new folder for one start of the workers, `start-000` and so on: restarts keep what came before."""
    number = sum(1 for _ in logs.glob("start-*"))
    while True:
        folder = logs / f"start-{number:03d}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # the agent of another launch of the same run made it in this moment
            number += 1


class NodeRendezvous(RendezvousHandler):
    """Torchrun's view of the membership."""

    def __init__(self, link: Link, job: str, address: str, on_event: Callable[[str], None]) -> None:
        self.link = link
        self.generation = 0  # of the world that this node is or was in
        self.failures: tuple[Failure, ...] = ()  # why its workers ended
        self._job, self._address, self._on_event = job, address, on_event

    def next_rendezvous(self) -> RendezvousInfo:
        """Waits for the next world that this node is in."""
        self.link.say(Report("ready", self.generation, _free_port(self._address), self.failures))
        is_spare = False
        while True:
            order = self.link.order
            if order.end is not None:
                raise JobEndedError(order.end, order.reason)
            agents = [member.agent for member in order.members]
            if order.generation != self.generation and not order.restart and self.link.agent in agents:
                break
            if self._is_spare(order, agents) != is_spare:
                is_spare = not is_spare
                self._on_event("node_spare" if is_spare else "node_waits")
            self.link.wait(1.0)
        self.generation, self.failures = order.generation, ()
        self.link.say(Report("running", self.generation))
        first = order.members[0]
        # of the store that torchrun expects here nothing is used
        meeting = RendezvousStoreInfo(first.address, first.port)
        return RendezvousInfo(HashStore(), agents.index(self.link.agent), len(agents), meeting)

    def _is_spare(self, order: Order, agents: Sequence[int]) -> bool:
        """Whether others train, and this node waits for its turn: it misses nothing."""
        is_there = self.link.silent_seconds < SPARE_SILENCE_SECONDS
        return is_there and bool(agents) and not order.restart and self.link.agent not in agents

    def num_nodes_waiting(self) -> int:
        """Whether this node's workers shall stop for another world."""
        order = self.link.order
        return int(order.generation != self.generation or order.restart != "")

    def get_backend(self) -> str:
        return "viewpoint"

    @property
    def use_agent_store(self) -> bool:
        """As torchrun's own: what the mandatory variable says."""
        return os.environ.get(STORE_SHARING_VARIABLE) != "1"

    def get_run_id(self) -> str:
        return self._job

    def is_closed(self) -> bool:
        return self.link.order.end is not None

    def set_closed(self) -> None:
        """Nothing: the membership ends the job."""

    def shutdown(self) -> bool:
        return True


class NodeAgent(SimpleElasticAgent):
    """Torchrun's loop with the differences that this file's docstring lists."""

    def __init__(
        self,
        spec: WorkerSpec,
        handler: NodeRendezvous,
        nursery: Nursery,
        logs: Path,
        events: EventLog,
        deadlines: Deadlines | None,
        silence_seconds: float,
    ) -> None:
        super().__init__(spec)
        self._handler, self._link, self._nursery = handler, handler.link, nursery
        self._logs, self._events = logs, events
        self._deadlines, self._silence_seconds = deadlines, silence_seconds
        self._workers: dict[int, Forked] = {}  # by local rank
        self._watches: dict[int, Watch] = {}
        self._hung: set[int] = set()
        self._folder = logs
        self._has_stuck_worker = False
        self._is_stopping = False
        self._is_waiting = False  # for other nodes
        self._starts = 0

    def stop(self) -> None:
        """Tells the workers to save and end, and starts nothing any more. Called from a thread of its own."""
        self._is_stopping = True
        if self._is_waiting:
            # there is nothing to save
            _logger.info("stopped while waiting for other nodes")
            self.leave(EXIT_STOPPED)
            os._exit(EXIT_STOPPED)
        self._tell_workers(signal.SIGTERM)

    def start_link(self) -> None:
        """Connects to where nodes meet, in a thread."""
        self._link.start()

    def leave(self, code: int) -> None:
        """Tells the others with what this node ends."""
        report = Report("leaving", self._handler.generation, exit_code=code)
        if not self._link.deliver(report, DELIVERY_SECONDS):
            _logger.warning("nobody heard that this node ends with exit code %d", code)

    def listen(self) -> None:
        """From now on, stop signals reach `stop` at once, whatever the main thread is doing."""
        heard, heard_by_python = os.pipe()
        os.set_blocking(heard_by_python, False)
        signal.set_wakeup_fd(heard_by_python)
        for number in _STOP_SIGNALS:
            signal.signal(number, lambda *_: None)

        def wait_for_signals() -> None:
            while os.read(heard, 1):
                self.stop()

        threading.Thread(target=wait_for_signals, name="stop-signals", daemon=True).start()

    def exit_code(self, result: RunResult) -> int:
        """What this process exits with after `run` returned."""
        if not result.is_failed():
            return EXIT_DONE
        codes = [failure.exitcode for failure in result.failures.values()]
        final = next((code for code in FINAL_CODES if code in codes), None)
        if final is not None:
            return final
        return EXIT_STOPPED if self._is_stopping and have_saved(codes) else EXIT_FAILED

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        self._is_waiting = True
        if self._is_stopping:
            self.stop()
        try:
            super()._rendezvous(worker_group)
        finally:
            self._is_waiting = False

    def _assign_worker_ranks(
        self, store: Any, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> list[Worker]:
        """All nodes have equally many workers, so that nothing needs to be exchanged."""
        size, first = spec.local_world_size, group_rank * spec.local_world_size
        world = group_world_size * size
        return [Worker(local, first + local, first + local, world, world) for local in range(size)]

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        if not self._nursery.is_alive:
            raise ViewpointError("The process that workers are forked from has died, perhaps for want of memory.")
        self._folder = start_folder(self._logs)
        self._hung.clear()
        spec = worker_group.spec
        for worker in worker_group.workers:
            stem = self._folder / f"worker-{worker.local_rank}"
            command = Command((str(spec.entrypoint), *spec.args), self._environment(worker_group, worker))
            out, errors = stem.with_suffix(".out.log"), stem.with_suffix(".err.log")
            self._workers[worker.local_rank] = self._nursery.start(command, out, errors)
            if self._deadlines is not None:
                self._watches[worker.local_rank] = Watch(self._deadlines)
        pids = {local_rank: worker.pid for local_rank, worker in self._workers.items()}
        self._events.append(
            "workers_started",
            start=self._starts,
            generation=self._handler.generation,
            ranks=[worker.global_rank for worker in worker_group.workers],
            world=worker_group.workers[0].world_size,
            pids=list(pids.values()),
            heartbeats=[self._heartbeat(worker.local_rank) for worker in worker_group.workers],
        )
        self._starts += 1
        if self._is_stopping:
            self._tell_workers(signal.SIGTERM)
        return pids

    def _environment(self, group: WorkerGroup, worker: Worker) -> dict[str, str]:
        """What torchrun tells its workers, and where they leave their heartbeat."""
        return {
            "RANK": str(worker.global_rank),
            "LOCAL_RANK": str(worker.local_rank),
            "GROUP_RANK": str(group.group_rank),
            "WORLD_SIZE": str(worker.world_size),
            "LOCAL_WORLD_SIZE": str(group.spec.local_world_size),
            "GROUP_WORLD_SIZE": str(group.group_world_size),
            "MASTER_ADDR": str(group.master_addr),
            "MASTER_PORT": str(group.master_port),
            "TORCHELASTIC_RUN_ID": self._handler.get_run_id(),
            "TORCHELASTIC_RESTART_COUNT": str(self._starts),
            "TORCHELASTIC_USE_AGENT_STORE": str(self._handler.use_agent_store),
            HEARTBEAT_VARIABLE: self._heartbeat(worker.local_rank),
        }

    def _heartbeat(self, local_rank: int) -> str:
        return str(self._folder / f"worker-{local_rank}.heartbeat")

    def _tell_workers(self, number: signal.Signals) -> None:
        for worker in list(self._workers.values()):
            worker.send(number)  # nothing where it has ended

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if (order := self._link.order).end is not None:
            self._kill_workers()
            raise JobEndedError(order.end, order.reason)
        if self._link.silent_seconds > self._silence_seconds:
            _logger.error("cut off from the rendezvous for %.0f s: workers are killed", self._link.silent_seconds)
            self._events.append("cut_off", seconds=self._link.silent_seconds)
            return RunResult(WorkerState.UNHEALTHY)
        self._look_for_hangs(worker_group)
        self._let_stopped_workers_leave()
        if self._is_stopping:
            self._wait_for_workers("the stop signal")
        codes = {local_rank: worker.exit_code for local_rank, worker in self._workers.items()}
        failed = {local_rank: code for local_rank, code in codes.items() if code not in (None, EXIT_DONE)}
        if failed:
            return self._failed(worker_group, failed)
        if None in codes.values():
            return RunResult(WorkerState.HEALTHY)
        return RunResult(WorkerState.SUCCEEDED, {worker.global_rank: None for worker in worker_group.workers})

    def _failed(self, group: WorkerGroup, codes: Mapping[int, int | None]) -> RunResult:
        ranks = {worker.local_rank: worker.global_rank for worker in group.workers}
        failures = {
            ranks[local_rank]: ProcessFailure(local_rank, self._workers[local_rank].pid, code, error_file="")
            for local_rank, code in codes.items()
            if code is not None
        }
        self._handler.failures = tuple(
            Failure(rank, failure.exitcode, cause_of(failure.exitcode, is_hung=failure.local_rank in self._hung))
            for rank, failure in failures.items()
        )
        is_final = self._is_stopping or any(code in FINAL_CODES for code in codes.values())
        if is_final:
            self._remaining_restarts = 0
        self._events.append(
            "workers_ended",
            exit_codes={str(rank): failure.exitcode for rank, failure in failures.items()},
            generation=self._handler.generation,
            logs=[str(self._folder / f"worker-{failure.local_rank}.err.log") for failure in failures.values()],
            is_final=is_final,
        )
        return RunResult(WorkerState.FAILED, failures=failures)

    def _look_for_hangs(self, worker_group: WorkerGroup) -> None:
        """Kills workers that missed their deadline, after they had a chance to show what they are at."""
        now = time.monotonic()
        ranks = {worker.local_rank: worker.global_rank for worker in worker_group.workers}
        overdue: dict[int, Hang] = {}
        for local_rank, watch in self._watches.items():
            worker = self._workers[local_rank]
            hang = watch.look(read_beat(self._heartbeat(local_rank)), now, partial(_is_suspended, worker.pid))
            if hang is not None and worker.exit_code is None:
                overdue[local_rank] = hang
        if not overdue:
            return
        for local_rank, hang in overdue.items():
            self._hung.add(local_rank)
            _logger.error("rank %d hangs: %s; its stacks are in %s", ranks[local_rank], hang, self._folder)
            self._events.append(
                "hang_detected",
                rank=ranks[local_rank],
                phase=hang.phase,
                step=hang.step,
                silent_seconds=hang.silent_seconds,
                allowed_seconds=hang.allowed_seconds,
                is_suspended=_is_suspended(self._workers[local_rank].pid),
                log=str(self._folder / f"worker-{local_rank}.err.log"),
            )
            self._workers[local_rank].send(STACKS_SIGNAL)
        time.sleep(STACKS_SECONDS)
        self._kill({local_rank: self._workers[local_rank] for local_rank in overdue})

    def _let_stopped_workers_leave(self) -> None:
        """Waits a little for the neighbours of a worker that saved and left: they are in their last lines."""
        deadline = time.monotonic() + LEAVE_TOGETHER_SECONDS
        while time.monotonic() < deadline:
            codes = [worker.exit_code for worker in self._workers.values()]
            if EXIT_STOPPED not in codes or None not in codes:
                return
            time.sleep(MONITOR_SECONDS)

    def _wait_for_workers(self, why: str) -> None:
        """Waits until workers that were told to save have ended. Where the world breaks meanwhile, they cannot."""
        deadline = time.monotonic() + STOP_TIMEOUT_SECONDS
        while any(worker.exit_code is None for worker in self._workers.values()):
            if time.monotonic() > deadline:
                _logger.error("workers did not stop within %.0f s of %s: killed", STOP_TIMEOUT_SECONDS, why)
                self._kill_workers()
            is_broken = self._handler.num_nodes_waiting() and self._link.order.restart == "now"
            # a stop by signal is another thing: where the launcher has died, nobody is there to be heard, and they save
            is_cut_off = not self._is_stopping and self._link.silent_seconds > self._silence_seconds
            if is_broken or is_cut_off:
                self._kill_workers()
            time.sleep(MONITOR_SECONDS)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        """For the next world: those of a broken one are killed, those of a whole one save first."""
        if self._link.order.restart == "after_saving" and self._link.silent_seconds < self._silence_seconds:
            self._tell_workers(signal.SIGTERM)
            self._wait_for_workers("the call for another world")
        self._kill_workers()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        if not self._has_stuck_worker:
            self._kill_workers()

    def _kill_workers(self) -> None:
        self._kill(self._workers)

    def _kill(self, workers: Mapping[int, Forked]) -> None:
        """Returns when they have ended. Who is stuck in the kernel does not, and nothing that this node starts could work."""
        for worker in workers.values():
            worker.send(signal.SIGKILL)
        deadline = time.monotonic() + KILL_SECONDS
        stuck = [worker.pid for worker in workers.values() if not worker.has_ended_within(deadline - time.monotonic())]
        if stuck:
            self._has_stuck_worker = True
            self._tell_workers(signal.SIGKILL)
            self._events.append("worker_stuck", pids=stuck, seconds=KILL_SECONDS)
            raise StuckWorkerError(
                f"Process {', '.join(map(str, stuck))} has not ended {KILL_SECONDS:.0f} s after SIGKILL: it is stuck in "
                f"the kernel, as on a file system or a device that does not answer. This node leaves the job; look at "
                f"`dmesg` there, and restart the machine where the process stays."
            )

    def _invoke_run(self, role: str = DEFAULT_ROLE) -> RunResult:
        while True:
            try:
                return super()._invoke_run(role)
            except AnotherNodeRestartsError:
                _logger.info("another node restarts: starting this node's workers again, to form a world with it")

    def _exit_barrier(self) -> None:
        self._link.say(Report("done", self._handler.generation))
        self._events.append("workers_done", generation=self._handler.generation)
        while True:
            order = self._link.order
            if order.end == EXIT_DONE:
                return
            if order.end is not None:
                raise JobEndedError(order.end, order.reason)
            if self._is_stopping:  # others are at work still, and may need this node once more
                self.leave(EXIT_STOPPED)
                raise JobEndedError(EXIT_STOPPED, "this node was told to stop, with its own work done")
            if self._handler.num_nodes_waiting():
                raise AnotherNodeRestartsError
            self._link.wait(1.0)


def cause_of(code: int, *, is_hung: bool) -> Cause:
    """What became of a worker."""
    if is_hung:
        return "hung"
    if code in (EXIT_STOPPED, -signal.SIGTERM):  # the latter before it listened: there was nothing to save
        return "saved"
    return "killed" if code < 0 else "failed"


def have_saved(codes: Sequence[int]) -> bool:
    """Whether workers that were told to stop have done so."""
    return set(codes) <= {EXIT_STOPPED, -signal.SIGTERM}


def check_environment(environment: Mapping[str, str]) -> None:
    """Refuses to run where a restart could not work."""
    if environment.get(STORE_SHARING_VARIABLE) != "1":
        raise DoNotRetry(
            f"{STORE_SHARING_VARIABLE} must be 1 in the environment of launcher.agent, found "
            f"{environment.get(STORE_SHARING_VARIABLE)!r}. Without it workers look for a store that their agent keeps, "
            f"and no world forms. `viewpoint launch` sets it; in a manifest of your own, add it to the agent's "
            f"environment."
        )


def build_agent(arguments: argparse.Namespace, nursery: Nursery) -> NodeAgent:
    """The agent of one node, not yet started."""
    link = Link(
        arguments.endpoint, arguments.job, arguments.node, arguments.address, give_up_seconds=arguments.node_timeout
    )
    events = EventLog(arguments.logs / "events.jsonl", arguments.node)
    handler = NodeRendezvous(link, arguments.job, arguments.address, events.append)
    worker, *words = arguments.command
    spec = WorkerSpec(
        role="worker",
        local_world_size=arguments.procs_per_node,
        rdzv_handler=handler,
        entrypoint=worker,
        args=tuple(words),
        max_restarts=_FOR_EVER,
        monitor_interval=MONITOR_SECONDS,
        local_addr=arguments.address,
    )
    deadlines = Deadlines(step_floor=arguments.step_deadline) if arguments.step_deadline else None
    return NodeAgent(spec, handler, nursery, arguments.logs, events, deadlines, arguments.node_timeout)


def run(arguments: argparse.Namespace) -> int:
    """Runs one node to its end and returns the exit code of its workers."""
    check_environment(os.environ)
    if arguments.network is not None:
        enter_network(arguments.network)
    arguments.logs.mkdir(parents=True, exist_ok=True)
    with Nursery.forked(stage_of(tuple(arguments.command))) as nursery:  # before any thread
        agent = build_agent(arguments, nursery)
        agent.listen()
        agent.start_link()
        try:
            code = agent.exit_code(agent.run())
        except JobEndedError as ended:
            _logger.info("the job has ended with exit code %d: %s", ended.exit_code, ended)
            return ended.exit_code
        except StuckWorkerError:
            agent.leave(EXIT_FAILED)
            raise
        if code != EXIT_DONE:
            agent.leave(code)
        return code


def parser() -> argparse.ArgumentParser:
    """The agent's command line."""
    made = argparse.ArgumentParser(
        prog="python -m launcher.agent", description="One node of a job: starts and watches its workers."
    )
    made.add_argument(
        "--endpoint", required=True, metavar="HOST:PORT", help="the rendezvous store, which somebody else hosts"
    )
    made.add_argument(
        "--job", required=True, help="a name that all nodes of the job share, and no other job at this store"
    )
    made.add_argument("--node", type=int, required=True, help="this node's number; ranks are in the order of numbers")
    made.add_argument("--procs-per-node", type=int, default=1, help="workers on each node")
    made.add_argument("--address", default=LOOPBACK, help="where other nodes reach this one")
    made.add_argument("--network", metavar="NAME", help="the network namespace that this node runs in")
    made.add_argument(
        "--node-timeout", type=float, default=6.0, metavar="SECONDS", help="silence after which a node counts as lost"
    )
    made.add_argument(
        "--step-deadline",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="least time that a worker may need for a step before it counts as hung; 0: it never does",
    )
    made.add_argument("--logs", type=Path, required=True, help="folder for the workers' output and for events.jsonl")
    made.add_argument("command", nargs="+", metavar="COMMAND", help="one worker's command, after `--`")
    return made


def main(words: Sequence[str] | None = None) -> int:
    """Runs one agent and returns its exit code; every failure is in the log by then."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        code = run(parser().parse_args(words))
    except ViewpointError as error:
        print(f"viewpoint: {error}", file=sys.stderr)
        code = error.exit_code
    except (DistError, RendezvousError, OSError):
        traceback.print_exc()
        code = EXIT_FAILED
    logging.shutdown()
    sys.stderr.flush()
    return code


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port


def _is_suspended(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    # without the interpreter's farewell: a thread may be in a call of torch's then, which aborts the process
    os._exit(main())
