"""Tasks that end badly, one at a time and among good ones."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from datastore.errors import DoNotRetry, ViewpointError
from datastore.process_pool import Died, Limits, ProcessPool

GIB = 2**30


def behave(task: str) -> str:
    """Does what the task says; runs in a worker."""
    if task == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if task.startswith("killed once:") and not Path(task.partition(":")[2]).exists():
        Path(task.partition(":")[2]).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "leave":
        os._exit(3)
    if task == "hang":
        time.sleep(60)
    if task == "gorge":
        try:
            return str(len(bytearray(4 * GIB)))
        except MemoryError:
            return "too much"
    if task == "refuse":
        raise DoNotRetry("no ray caster")
    return task.upper()


def results_of(
    tasks: list[str],
    num_workers: int,
    seconds_per_task: float = 30,
    work: Callable[[str], str] = behave,
    memory_bytes: int = GIB,
) -> dict[int, str | Died]:
    found: dict[int, str | Died] = {}
    offered, deadline = 0, time.monotonic() + 60
    with ProcessPool(work, num_workers, Limits(seconds_per_task, memory_bytes)) as pool:
        while len(found) < len(tasks):
            assert time.monotonic() < deadline
            while offered < len(tasks) and pool.offer(offered, tasks[offered]):
                offered += 1
            found |= dict(pool.results(0.1))
    return found


def test_a_task_that_kills_its_process_costs_itself_only() -> None:
    found = results_of(["a", "crash", "b", "leave", "c"], num_workers=2)
    assert [found[key] for key in (0, 2, 4)] == ["A", "B", "C"]
    assert found[1] == Died("was ended by SIGKILL, perhaps for lack of memory")
    assert found[3] == Died("ended with exit code 3")


def test_a_task_whose_process_somebody_killed_is_done_once_more(tmp_path: Path) -> None:
    marks = [f"killed once:{tmp_path / name}" for name in "ab"]
    assert results_of(["a", *marks, "b"], num_workers=1) == {0: "A", 1: marks[0].upper(), 2: marks[1].upper(), 3: "B"}


def test_a_process_that_was_killed_while_it_started_or_waited_is_replaced() -> None:
    with ProcessPool(behave, 2, Limits(30, GIB)) as pool:
        for worker in pool._workers:
            worker.process.kill()
        pool.offer(0, "a")
        found: dict[int, str | Died] = {}
        while not found:
            found |= dict(pool.results(0.1))
        idle = next(worker for worker in pool._workers if worker.is_ready)
        idle.process.kill()
        idle.process.join()
        assert pool.offer(1, "b")
        while len(found) < 2:
            found |= dict(pool.results(0.1))
    assert found == {0: "A", 1: "B"}


def test_a_task_that_asks_for_too_much_memory_is_told_so_and_the_others_go_on() -> None:
    assert results_of(["a", "gorge", "b"], num_workers=1) == {0: "A", 1: "too much", 2: "B"}


def test_a_task_that_never_ends_is_given_up() -> None:
    found = results_of(["hang", "a"], num_workers=1, seconds_per_task=0.3)
    assert found == {0: Died("took longer than 0.3 s"), 1: "A"}


def test_an_error_meant_for_people_ends_the_whole_pool() -> None:
    with pytest.raises(DoNotRetry, match="no ray caster"):
        results_of(["a", "refuse", "b"], num_workers=1)


def test_processes_that_cannot_start_are_an_error_and_not_a_broken_task(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ViewpointError, match="could not start"):
        results_of(["a"], num_workers=1, work=Unpicklable())
    assert "unpicklable on purpose" in capfd.readouterr().err


class Unpicklable:
    """Work that arrives broken."""

    def __call__(self, task: str) -> str:
        return task

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return fail_to_load, ()


def fail_to_load() -> None:
    raise RuntimeError("unpicklable on purpose")


def survive(_: str) -> str:
    """In a worker: what Ctrl-C and a polite kill do to it, and how many threads it may use."""
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    return f"alive with {os.environ['OMP_NUM_THREADS']} thread"


def test_signals_for_the_whole_group_leave_the_workers_to_their_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert results_of([""], num_workers=1, work=survive) == {0: "alive with 1 thread"}
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGINT, signal.SIGTERM}


def name_process(_: str) -> str:
    return str(os.getpid())


def test_the_first_worker_of_a_program_is_spared_such_signals_too(tmp_path: Path) -> None:
    """Python starts a process of its own beside the first worker, and unblocks signals for that."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal, sys, time\n"
        "from datastore.process_pool import Limits, ProcessPool\n"
        "if __name__ == '__main__':\n"
        "    with ProcessPool(time.sleep, 1, Limits(60, 2**33)) as pool:\n"
        "        (worker,) = pool._workers\n"
        "        pool.offer(1, 1.0)\n"
        "        for number in (signal.SIGINT, signal.SIGTERM):\n"
        "            for _ in range(20):\n"
        "                os.kill(worker.process.pid, number)\n"
        "                time.sleep(0.01)\n"
        "        while not (found := pool.results(1.0)):\n"
        "            pass\n"
        "        print(found)\n"
    )
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[(1, None)]\n", "")


def test_no_worker_outlives_the_pool() -> None:
    with ProcessPool(name_process, 2, Limits(30, GIB)) as pool:
        pool.offer(0, "")
        found: list[tuple[int, str | Died]] = []
        while not found:
            found = pool.results(0.1)
    assert not Path(f"/proc/{found[0][1]}").exists()
