"""One node of a job: torchrun's agent, which starts this node's workers, restarts them in place and passes signals on.

    python -m launcher.agent --endpoint HOST:PORT --job ID --node I --nodes N --logs FOLDER -- COMMAND...

It differs from plain `torchrun` in what was seen to lose jobs:
- The rendezvous store lives outside the agents, so that no node's loss ends the job.
- Workers never share that store. They would find addresses of a dead round in it, and no restart across nodes succeeds.
- Exit codes 2, 64 and 75 of a worker are final: asked wrongly, do not retry, stopped. The agent passes them on.
- A stop signal goes to the workers, which save and leave by themselves; the agent waits for them. While it waits for
  other nodes there is nothing to save, and it ends at once.
- A node whose workers are done waits for the others, and starts its workers again when another node has to.
"""

import argparse
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from torch.distributed import DistError, Store  # type: ignore[attr-defined]
from torch.distributed.elastic.agent.server.api import DEFAULT_ROLE, RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousError,
    RendezvousParameters,
    registry,
)

from datastore.errors import (
    EXIT_ASKED_WRONGLY,
    EXIT_DO_NOT_RETRY,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_STOPPED,
    DoNotRetry,
    ViewpointError,
)
from launcher.command import STORE_SHARING_VARIABLE
from launcher.tether import tethered

MONITOR_SECONDS: Final = 0.2
HEARTBEAT_SECONDS: Final = 1
LOST_HEARTBEATS: Final = 6  # a node that was silent for so many is taken out of the rendezvous
JOIN_TIMEOUT_SECONDS: Final = 600
LEAVE_TOGETHER_SECONDS: Final = 10.0
STOP_TIMEOUT_SECONDS: Final = 120.0  # a checkpoint must be saved within it once a stop is asked for

_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_DONE_KEY: Final = "viewpoint/nodes_done"
_logger = logging.getLogger("launcher.agent")


class AnotherNodeRestartsError(Exception):
    """Workers of another node failed after this node's were done: all start again, as only all form a world."""


class NodeLogs(LogsSpecs):
    """One folder for each start of the workers, `start-000/worker-0.{out,err}.log`: restarts keep what came before."""

    def __init__(self, folder: Path) -> None:
        super().__init__(log_dir=str(folder))
        self._folder = folder
        self.latest: LogsDest = LogsDest()

    @property
    def root_log_dir(self) -> str:
        return str(self._folder)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        number = sum(1 for _ in self._folder.glob("start-*"))
        start = self._folder / f"start-{number:03d}"
        start.mkdir(parents=True)
        self.latest = LogsDest(
            stdouts={rank: str(start / f"worker-{rank}.out.log") for rank in envs},
            stderrs={rank: str(start / f"worker-{rank}.err.log") for rank in envs},
            error_files=dict.fromkeys(envs, ""),
        )
        return self.latest


class EventLog:
    """What happened on this node, one JSON object a line: the launcher shows it and keeps it in the run's history."""

    def __init__(self, path: Path, node: int) -> None:
        self._path, self._node = path, node

    def append(self, kind: str, **facts: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"time": time.time(), "event": kind, "node": self._node, **facts}) + "\n")


class NodeAgent(LocalElasticAgent):
    """Torchrun's agent with the differences that this file's docstring lists."""

    def __init__(self, spec: WorkerSpec, logs: NodeLogs, events: EventLog) -> None:
        super().__init__(spec, logs_specs=logs)
        self._logs = logs
        self._events = events
        self._stopping = False
        self._in_rendezvous = False
        self._starts = 0

    def stop(self) -> None:
        """Tells the workers to save and end, and starts nothing any more. Called from a thread of its own."""
        self._stopping = True
        if self._in_rendezvous:
            # the main thread may hang in the rendezvous store for a minute, and there is nothing to save
            _logger.info("stopped while waiting for other nodes")
            os._exit(EXIT_STOPPED)
        self._tell_workers(signal.SIGTERM)

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

    def exit_code(self, result: RunResult | None) -> int:
        """What this process exits with after `run` returned."""
        if result is not None and not result.is_failed():
            return EXIT_DONE
        codes = [failure.exitcode for failure in result.failures.values()] if result is not None else []
        final = final_exit_code(codes)
        if final is not None:
            return final
        return EXIT_STOPPED if self._stopping and set(codes) <= {-signal.SIGTERM} else EXIT_FAILED

    def _tell_workers(self, signal_to_send: signal.Signals) -> None:
        if isinstance(self._pcontext, SubprocessContext):
            for handler in self._pcontext.subprocess_handlers.values():
                handler.proc.send_signal(signal_to_send)  # nothing where it has ended

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        self._in_rendezvous = True
        if self._stopping:
            self.stop()
        try:
            super()._rendezvous(worker_group)
        finally:
            self._in_rendezvous = False

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        workers: dict[int, Any] = super()._start_workers(worker_group)
        self._events.append(
            "workers_started",
            start=self._starts,
            ranks=[worker.global_rank for worker in worker_group.workers],
            world=worker_group.workers[0].world_size,
            pids=list(workers.values()),
        )
        self._starts += 1
        if self._stopping:
            self._tell_workers(signal.SIGTERM)
        return workers

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._let_stopped_workers_leave()
        result: RunResult = super()._monitor_workers(worker_group)
        if self._stopping and result.state is WorkerState.HEALTHY:
            result = self._wait_for_stopped_workers(worker_group)
        if result.state is WorkerState.FAILED:
            codes = [failure.exitcode for failure in result.failures.values()]
            if self._stopping or final_exit_code(codes) is not None:
                self._remaining_restarts = 0
            self._events.append(
                "workers_ended",
                exit_codes={str(rank): failure.exitcode for rank, failure in result.failures.items()},
                logs=[self._logs.latest.stderrs[failure.local_rank] for failure in result.failures.values()],
                restarts_left=self._remaining_restarts,
            )
        return result

    def _let_stopped_workers_leave(self) -> None:
        """Waits a little for the neighbours of a worker that saved and left: torch would kill them in their last lines."""
        if not isinstance(self._pcontext, SubprocessContext):
            return
        deadline = time.monotonic() + LEAVE_TOGETHER_SECONDS
        while time.monotonic() < deadline:
            codes = [handler.proc.poll() for handler in self._pcontext.subprocess_handlers.values()]
            if EXIT_STOPPED not in codes or None not in codes:
                return
            time.sleep(MONITOR_SECONDS)

    def _wait_for_stopped_workers(self, worker_group: WorkerGroup) -> RunResult:
        """The end of workers that were told to stop. Nothing else is watched: the rendezvous store may be gone."""
        deadline = time.monotonic() + STOP_TIMEOUT_SECONDS
        result = RunResult(state=WorkerState.HEALTHY)
        while result.state is WorkerState.HEALTHY:
            if time.monotonic() > deadline:
                _logger.error("workers did not stop within %.0f s of the signal: killed", STOP_TIMEOUT_SECONDS)
                self._tell_workers(signal.SIGKILL)
            time.sleep(MONITOR_SECONDS)
            result = super()._monitor_workers(worker_group)
        return result

    def _invoke_run(self, role: str = DEFAULT_ROLE) -> RunResult:
        while True:
            try:
                return super()._invoke_run(role)
            except AnotherNodeRestartsError:
                _logger.info("another node restarts: starting this node's workers again, to form a world with it")

    def _exit_barrier(self) -> None:
        store: Store | None = self._store
        assert store is not None
        handler, nodes = self._worker_group.spec.rdzv_handler, self._worker_group.group_world_size or 1
        try:
            done = store.add(_DONE_KEY, 1)
            while done < nodes and not self._stopping:
                if handler.num_nodes_waiting() > 0:
                    raise AnotherNodeRestartsError
                time.sleep(MONITOR_SECONDS)
                done = store.add(_DONE_KEY, 0)
        except (DistError, RendezvousConnectionError) as error:
            # the launcher ended first; this node's work is done either way
            _logger.info("the rendezvous store is gone: %s", error)


def final_exit_code(codes: Sequence[int]) -> int | None:
    """The exit code that ends the job, from those of a node's workers; None where a restart makes sense."""
    for code in (EXIT_DO_NOT_RETRY, EXIT_ASKED_WRONGLY):
        if code in codes:
            return code
    # what a worker that left with 75 leaves behind gets SIGTERM after a while
    if EXIT_STOPPED in codes and set(codes) <= {EXIT_STOPPED, -signal.SIGTERM}:
        return EXIT_STOPPED
    return None


def check_environment(environment: Mapping[str, str]) -> None:
    """Refuses to run where a restart could not work."""
    if environment.get(STORE_SHARING_VARIABLE) != "1":
        raise DoNotRetry(
            f"{STORE_SHARING_VARIABLE} must be 1 in the environment of launcher.agent, found "
            f"{environment.get(STORE_SHARING_VARIABLE)!r}. Without it workers share the agents' rendezvous store, and "
            f"no restart across nodes succeeds. `viewpoint launch` sets it; in a manifest of your own, add it to the "
            f"agent's environment."
        )


def build_agent(arguments: argparse.Namespace) -> NodeAgent:
    """The agent of one node, not yet started."""
    handler = registry.get_rendezvous_handler(
        RendezvousParameters(
            backend="c10d",
            endpoint=arguments.endpoint,
            run_id=arguments.job,
            min_nodes=arguments.nodes,
            max_nodes=arguments.nodes,
            local_addr=arguments.address,
            is_host=False,  # the store outlives every agent
            join_timeout=JOIN_TIMEOUT_SECONDS,
            last_call_timeout=1,
            keep_alive_interval=HEARTBEAT_SECONDS,
            keep_alive_max_attempt=LOST_HEARTBEATS,
        )
    )
    worker, *words = tethered(arguments.command, signal.SIGKILL)
    spec = WorkerSpec(
        role="worker",
        local_world_size=arguments.procs_per_node,
        rdzv_handler=handler,
        entrypoint=worker,
        args=tuple(words),
        max_restarts=arguments.max_restarts,
        monitor_interval=MONITOR_SECONDS,
        local_addr=arguments.address,
    )
    return NodeAgent(spec, NodeLogs(arguments.logs), EventLog(arguments.logs / "events.jsonl", arguments.node))


def run(arguments: argparse.Namespace) -> int:
    """Runs one node to its end and returns the exit code of its workers."""
    check_environment(os.environ)
    # torch would replace our handlers by ones that kill after 30 s, however long a checkpoint takes
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    arguments.logs.mkdir(parents=True, exist_ok=True)
    try:
        agent = build_agent(arguments)
        agent.listen()
        return agent.exit_code(agent.run())
    except RendezvousConnectionError as error:
        raise ViewpointError(
            f"Node {arguments.node} lost the rendezvous store at {arguments.endpoint}: {error}. "
            f"It lives in the launcher's process; look there for why it ended."
        ) from error


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
    made.add_argument(
        "--node", type=int, required=True, help="this node's number, for logs; ranks come from the rendezvous"
    )
    made.add_argument("--nodes", type=int, required=True, help="nodes of the job: it starts when all have joined")
    made.add_argument("--procs-per-node", type=int, default=1, help="workers on each node")
    made.add_argument("--address", default="127.0.0.1", help="where other nodes reach this one")
    made.add_argument("--max-restarts", type=int, default=3, help="restarts of the workers before the node gives up")
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


if __name__ == "__main__":
    # without the interpreter's farewell: torch's heartbeat thread may be in a call then, which aborts the process
    os._exit(main())
