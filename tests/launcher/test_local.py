"""Real agents with small workers: how a job of several nodes ends, restarts and stops."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from datastore.errors import EXIT_DO_NOT_RETRY, EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from launcher.chaos import Chaos, Fault
from launcher.command import Command, Layout, Machine
from launcher.local import Child, Nodes, Outcome, Spawned, Starter, run_nodes, run_process, run_together
from launcher.membership import Membership, Rules
from launcher.nursery import Nursery
from launcher.rendezvous import Host, RendezvousStore
from launcher.stop import StopRequest
from trainer.lines import append_line

PATIENT_WORKER = """
    import os, pathlib, signal, sys, time
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    here = pathlib.Path(sys.argv[1])
    (here / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    while not stopped:
        time.sleep(0.05)
    (here / f"saved-{os.environ['RANK']}").touch()
    sys.exit(75)
"""


LAUNCHER = """
    import sys
    from pathlib import Path
    from launcher.command import Layout, Machine
    from launcher.local import run_nodes
    from launcher.nursery import Nursery
    from launcher.rendezvous import RendezvousStore
    from launcher.stop import StopRequest

    here = Path(sys.argv[1])
    worker = (sys.executable, str(here / "worker.py"), str(here))
    with RendezvousStore() as store, StopRequest() as stop, Nursery() as nursery:
        run_nodes(worker, layout=Layout(2), job="test", store=store, logs=here / "logs", machine=Machine(2),
                  progress=here / "progress", stop=stop, start_agent=nursery.start)
"""


@pytest.fixture
def store() -> Iterator[RendezvousStore]:
    with RendezvousStore() as store:
        yield store


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


class Job:
    """Nodes that run one script, and everything that was heard of them."""

    def __init__(
        self,
        folder: Path,
        store: RendezvousStore,
        script: str,
        *,
        start_agent: Starter = Spawned,
        nodes: int = 2,
        procs_per_node: int = 1,
        max_restarts: int = 2,
        step_deadline: float = 60.0,
    ) -> None:
        self.folder, self.events = folder, list[dict[str, Any]]()
        self._store, self._start_agent = store, start_agent
        self._layout = Layout(nodes, procs_per_node, max_restarts, step_deadline=step_deadline)
        self._script = folder / "worker.py"
        self._script.write_text(textwrap.dedent(script))

    def run(self, meanwhile: Callable[["Job"], None] = lambda job: None) -> Outcome:
        """Runs to the end; `meanwhile` is called again and again."""
        with StopRequest() as stop:
            return run_nodes(
                (sys.executable, str(self._script), str(self.folder)),
                layout=self._layout,
                job="test",
                store=self._store,
                logs=self.folder / "logs",
                progress=self.folder / "progress",
                machine=Machine(cores=2),
                stop=stop,
                start_agent=self._start_agent,
                watch=lambda: meanwhile(self),
                on_event=lambda kind, **facts: self.events.append({"event": kind, **facts}),
            )

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]

    def all_run(self) -> bool:
        return all((self.folder / f"pid-{rank}").exists() for rank in range(self._layout.world))

    def pid(self, rank: int) -> int:
        return int((self.folder / f"pid-{rank}").read_text())


@pytest.fixture
def job_of(tmp_path: Path, store: RendezvousStore, nursery: Nursery) -> Callable[..., Job]:
    """A job whose agents are forked, as a launch does it."""
    return partial(Job, tmp_path, store, start_agent=nursery.start)


def once(condition: Callable[[Job], bool], act: Callable[[Job], None]) -> Callable[[Job], None]:
    """Acts the first time that the condition holds."""
    waiting = [True]

    def meanwhile(job: Job) -> None:
        if waiting and condition(job):
            waiting.clear()
            act(job)

    return meanwhile


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_workers_of_two_nodes_form_one_world_and_their_output_lies_with_their_node(
    tmp_path: Path, store: RendezvousStore
) -> None:
    script = """
        import os
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "DS_ACCELERATOR", "MASTER_ADDR")
        print(*(os.environ[name] for name in names), os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"])
    """
    job = Job(tmp_path, store, script)
    assert job.run() == Outcome(EXIT_DONE)
    assert sorted(event["node"] for event in job.of_kind("workers_started")) == [0, 1]
    said = [(tmp_path / f"logs/node-{node}/test/start-000/worker-0.out.log").read_text().split() for node in (0, 1)]
    assert said == [
        ["0", "2", "0", "1", "cpu", "127.0.0.1", "1"],
        ["1", "2", "0", "1", "cpu", "127.0.0.1", "1"],
    ]


def test_an_error_that_no_retry_mends_ends_all_nodes_at_once(tmp_path: Path, job_of: Callable[..., Job]) -> None:
    script = """
        import os, sys, time
        if os.environ["RANK"] == "1":
            sys.exit(64)
        time.sleep(600)
    """
    job = job_of(script)
    outcome = job.run()
    assert outcome.exit_code == EXIT_DO_NOT_RETRY
    assert len(job.of_kind("workers_started")) == 2, "nothing was restarted"
    assert outcome.culprit == f"node {job.of_kind('workers_ended')[0]['node']}"


def test_a_killed_worker_is_restarted_with_the_whole_world(tmp_path: Path, job_of: Callable[..., Job]) -> None:
    script = """
        import os, pathlib, sys, time
        rank, folder = os.environ["RANK"], pathlib.Path(sys.argv[1])
        again = (folder / f"pid-{rank}").exists()
        (folder / f"pid-{rank}").write_text(str(os.getpid()))
        if again:
            sys.exit(0)
        time.sleep(600)
    """
    job = job_of(script)
    outcome = job.run(once(Job.all_run, lambda job: os.kill(job.pid(1), signal.SIGKILL)))
    assert outcome == Outcome(EXIT_DONE)
    assert [sorted(event["exit_codes"].values()) for event in job.of_kind("workers_ended")] == [[-9]]
    assert [event["world"] for event in job.of_kind("workers_started")] == [2, 2, 2, 2]


def test_a_worker_that_hangs_shows_where_in_its_log_and_is_started_again(job_of: Callable[..., Job]) -> None:
    script = """
        import pathlib, sys, time
        from trainer.heartbeat import HEART
        mark = pathlib.Path(sys.argv[1]) / "mark"
        if mark.exists():
            sys.exit(0)
        mark.touch()
        HEART.start()
        for step in range(1, 5):
            HEART.beat(step)
            time.sleep(0.1)
        def waits_for_ever():
            time.sleep(600)
        waits_for_ever()
    """
    job = job_of(script, nodes=1, step_deadline=1.0)
    assert job.run() == Outcome(EXIT_DONE)
    (hang,) = job.of_kind("hang_detected")
    assert (hang["rank"], hang["phase"], hang["step"], hang["is_suspended"]) == (0, "step", 4, False)
    stacks = Path(hang["log"]).read_text()
    assert "most recent call first" in stacks
    assert "waits_for_ever" in stacks
    assert [event["cause"] for event in job.of_kind("restart")] == ["worker_hung"]


def test_a_node_whose_workers_are_done_joins_one_that_must_start_again(
    tmp_path: Path, job_of: Callable[..., Job]
) -> None:
    script = """
        import os, pathlib, sys, time
        tries = pathlib.Path(sys.argv[1]) / "tries"
        if os.environ["RANK"] == "1":
            time.sleep(1.0)  # the other node's worker is done by now
            tries.write_text((tries.read_text() if tries.exists() else "") + "x")
            sys.exit(tries.read_text() == "x")
    """
    job = job_of(script)
    assert job.run() == Outcome(EXIT_DONE)
    assert (tmp_path / "tries").read_text() == "xx"


def test_a_fault_that_comes_too_late_is_left_out_and_ends_nothing(tmp_path: Path, store: RendezvousStore) -> None:
    heard: list[tuple[str, dict[str, Any]]] = []
    nodes = Nodes(
        [],
        Host(store, "late", Membership(Rules(most=1, least=1))),
        [],
        on_event=lambda kind, **facts: heard.append((kind, facts)),
        chaos=Chaos((Fault("kill-worker", 1, step=0), Fault("hang", 0, step=0))),
        networks=None,
    )
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    facts = {"node": 0, "generation": 1, "ranks": [0], "pids": [gone.pid], "heartbeats": [str(tmp_path / "none")]}
    nodes.heard("workers_started", **facts)
    nodes.tick()
    skipped = [facts["fault"] for kind, facts in heard if kind == "chaos_skipped"]
    assert skipped == ["kill-worker=1@0", "hang=0@0"]
    assert not [kind for kind, _ in heard if kind == "chaos_injected"]


def test_nodes_of_another_launch_that_write_beside_ours_are_not_heard(tmp_path: Path, store: RendezvousStore) -> None:
    heard: list[str] = []
    nodes = Nodes(
        [],
        Host(store, "shared", Membership(Rules(most=1, least=1))),
        [tmp_path],
        on_event=lambda kind, **facts: heard.append(kind),
        chaos=None,
        networks=None,
        launch="ours",
    )
    for launch, kind in (("theirs", "worker_stuck"), ("ours", "workers_done")):
        append_line(tmp_path / "events.jsonl", {"event": kind, "launch": launch, "node": 0})
    nodes.tick()
    assert heard == ["workers_done"]


def test_workers_that_keep_failing_end_the_job_and_the_log_that_says_why_is_named(
    tmp_path: Path, job_of: Callable[..., Job]
) -> None:
    script = """
        raise RuntimeError("the reason")
    """
    outcome = job_of(script, nodes=1, max_restarts=0).run()
    assert outcome.exit_code == EXIT_FAILED
    assert outcome.log is not None
    assert "the reason" in outcome.log.read_text()


def test_a_stop_signal_reaches_every_worker_which_saves_before_it_ends(
    tmp_path: Path, job_of: Callable[..., Job]
) -> None:
    job = job_of(PATIENT_WORKER)
    outcome = job.run(once(Job.all_run, lambda job: os.kill(os.getpid(), signal.SIGTERM)))
    assert outcome == Outcome(EXIT_STOPPED)
    assert (tmp_path / "saved-0").exists()
    assert (tmp_path / "saved-1").exists()


def test_a_worker_that_stops_by_itself_ends_the_job_and_its_neighbours_may_finish(
    tmp_path: Path, job_of: Callable[..., Job]
) -> None:
    script = """
        import os, pathlib, sys, time
        if os.environ["RANK"] == "0":
            time.sleep(1.0)  # its last lines
            (pathlib.Path(sys.argv[1]) / "written").touch()
        sys.exit(75)
    """
    assert job_of(script, nodes=1, procs_per_node=2).run().exit_code == EXIT_STOPPED
    assert (tmp_path / "written").exists()


def test_the_second_interrupt_kills(tmp_path: Path, job_of: Callable[..., Job]) -> None:
    script = PATIENT_WORKER.replace("while not stopped", "while True")
    job = job_of(script, nodes=1)

    def interrupt_twice(job: Job) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()

    started = time.monotonic()
    assert job.run(once(Job.all_run, interrupt_twice)) == Outcome(EXIT_STOPPED)
    assert time.monotonic() - started < 30
    assert not is_running(job.pid(0))


def test_a_killed_node_is_replaced_and_takes_its_worker_with_it(tmp_path: Path, job_of: Callable[..., Job]) -> None:
    script = """
        import os, pathlib, sys, time
        rank, folder = os.environ["RANK"], pathlib.Path(sys.argv[1])
        if (folder / "killed").exists():
            sys.exit(0)
        (folder / f"pid-{rank}").write_text(str(os.getpid()))
        while not (folder / "killed").exists():
            time.sleep(0.05)
        sys.exit(1)  # what a worker does that loses its connection
    """
    job = job_of(script)
    pids: list[int] = []

    def kill_agent(job: Job) -> None:
        worker = psutil.Process(job.pid(1))
        pids.append(worker.pid)
        worker.parent().parent().kill()  # its own parent is the process that workers are forked from
        deadline = time.monotonic() + 5
        while is_running(worker.pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        (tmp_path / "killed").touch()

    assert job.run(once(Job.all_run, kill_agent)) == Outcome(EXIT_DONE)
    assert not is_running(pids[0])
    assert [event["ended"] for event in job.of_kind("node_replaced")] == ["was killed by SIGKILL"]
    assert [event["cause"] for event in job.of_kind("restart")] == ["node_lost"]


def test_a_killed_launcher_leaves_no_process_and_its_workers_save(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(textwrap.dedent(PATIENT_WORKER))
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(LAUNCHER), str(tmp_path)]) as process:
        try:
            deadline = time.monotonic() + 60
            while not all((tmp_path / f"pid-{rank}").exists() for rank in (0, 1)):
                assert time.monotonic() < deadline, "workers did not start"
                time.sleep(0.1)
            family = psutil.Process(process.pid).children(recursive=True)
        finally:
            process.kill()
    assert len(family) == 7, "a nursery, two agents with a nursery each, two workers"
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    assert (tmp_path / "saved-0").exists()
    assert (tmp_path / "saved-1").exists()


def test_a_stage_of_one_process_passes_its_exit_code_on_and_keeps_its_output(tmp_path: Path) -> None:
    command = Command((sys.executable, "-c", "import sys; print('hello'); sys.exit(64)"))
    with StopRequest() as stop:
        outcome = run_process("ingest", command, tmp_path / "ingest.log", stop=stop)
    assert outcome == Outcome(EXIT_DO_NOT_RETRY, "ingest", tmp_path / "ingest.log")
    assert (tmp_path / "ingest.log").read_text() == "hello\n"


def test_an_error_in_the_launcher_ends_what_it_started(tmp_path: Path) -> None:
    child = Child("sleeper", Command((sys.executable, "-c", "import time; time.sleep(600)")), tmp_path / "log")

    def fail() -> None:
        raise RuntimeError("a bug of ours")

    with StopRequest() as stop, pytest.raises(RuntimeError, match="a bug of ours"):
        run_together([child], stop=stop, watch=fail)
    assert child.exit_code == -signal.SIGKILL


def test_a_request_from_elsewhere_stops_like_a_signal(tmp_path: Path) -> None:
    command = Command((sys.executable, "-c", "import time; time.sleep(600)"))
    with StopRequest(asked_elsewhere=lambda: True) as stop:
        assert run_process("stage", command, tmp_path / "log", stop=stop).exit_code == EXIT_STOPPED
