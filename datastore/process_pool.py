"""Work in processes of its own: a task that crashes, runs out of memory or never ends costs one result, not the run."""

import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Final, Generic, Self, TypeVar

from datastore.errors import ViewpointError
from datastore.stopping import STOP_SIGNALS

Task = TypeVar("Task")
Result = TypeVar("Result")

_NUM_THREADS: Final = "OMP_NUM_THREADS"


class _Ready:
    """The first message of every process: it has started, and what it ends of from now on is its task."""


@dataclass(frozen=True)
class Died:
    """A task that gave no result, and what became of its process."""

    reason: str


@dataclass(frozen=True)
class Limits:
    """What one task may take; a task that takes more ends without a result."""

    seconds: float
    memory_bytes: int  # of the process that it runs in, all told


class ProcessPool(Generic[Task, Result]):
    """Runs `work` on tasks in processes, one task a process at a time.

    `work` travels to each process once. What it returns comes back from `results`. A ViewpointError that it raises is
    raised there too; anything else that it raises ends its process, with a traceback, and only that task. A process
    that somebody kills is replaced and its task done once more: the kill may have been meant for the machine's memory.
    """

    def __init__(self, work: Callable[[Task], Result], num_workers: int, limits: Limits) -> None:
        self._work = work
        self._limits = limits
        self._workers = [_Worker(work, limits.memory_bytes) for _ in range(num_workers)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.end()

    def offer(self, key: int, task: Task) -> bool:
        """Hands a task to a process that has none; whether there was one."""
        for worker in self._workers:
            if worker.key is None:
                worker.begin(key, task)
                return True
        return False

    def results(self, timeout_seconds: float) -> list[tuple[int, Result | Died]]:
        """What has come back by now, waiting a little if nothing has; the key of each is its task's."""
        ready = wait([worker.connection for worker in self._workers], timeout_seconds)
        found: list[tuple[int, Result | Died]] = []
        for index, worker in enumerate(self._workers):
            reason, killed = None, False
            if worker.connection in ready:
                try:
                    message = worker.connection.recv()
                except (EOFError, OSError):
                    reason, killed = worker.how_it_ended()
                else:
                    if isinstance(message, _Ready):
                        worker.became_ready()
                    elif isinstance(message, ViewpointError):
                        raise message
                    elif worker.key is not None:
                        found.append((worker.key, message))
                        worker.key, worker.is_second = None, False
                    continue
            elif worker.is_ready and worker.busy_seconds > self._limits.seconds:
                reason = f"took longer than {self._limits.seconds:g} s"
            if reason is not None:
                worker.end()
                self._workers[index] = _Worker(self._work, self._limits.memory_bytes)
                if killed and not worker.is_second:
                    self._workers[index].take_over(worker)
                elif not worker.is_ready:
                    raise ViewpointError(
                        f"A worker process could not start: it {reason}. Its error stands above this one."
                    )
                elif worker.key is not None:
                    found.append((worker.key, Died(reason)))
        return found


class _Worker:
    """One process and the task that it is at."""

    def __init__(self, work: Callable[[Task], Result], memory_bytes: int) -> None:
        context = get_context("spawn")  # a fork would copy locks that threads of this process hold at that moment
        self.connection, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(
            target=_work_until_closed, args=(theirs, work, memory_bytes), daemon=True
        )
        with _as_workers_need_it():
            self.process.start()
        theirs.close()  # else the end of the process would not show as the end of the pipe
        self.key: int | None = None
        self.is_second = False  # in place of one that was killed at the same task
        self.is_ready = False
        self._task: object = None
        self._began = 0.0

    @property
    def busy_seconds(self) -> float:
        """How long it has been at its task."""
        return time.monotonic() - self._began if self.key is not None else 0.0

    def begin(self, key: int, task: object) -> None:
        """Sends a task."""
        self.key, self._task, self._began = key, task, time.monotonic()
        try:
            self.connection.send(task)
        except ConnectionError:
            return  # it has ended, which shows when its results are asked for

    def take_over(self, killed: "_Worker") -> None:
        """Does the task of a killed one, if it had one."""
        self.is_second = True
        if killed.key is not None:
            self.begin(killed.key, killed._task)

    def became_ready(self) -> None:
        """Time spent on starting is not the task's."""
        self.is_ready, self._began = True, time.monotonic()

    def how_it_ended(self) -> tuple[str, bool]:
        """What became of a process whose pipe is closed, and whether somebody killed it."""
        self.process.join(5)
        code = self.process.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            killed = -code == signal.SIGKILL
            return f"was ended by {name}" + (", perhaps for lack of memory" if killed else ""), killed
        return f"ended with exit code {code}", False

    def end(self) -> None:
        """Ends the process at once; it holds nothing that could be half written."""
        self.process.kill()
        self.process.join()
        self.connection.close()


@contextmanager
def _as_workers_need_it() -> Iterator[None]:
    """What a process started in here inherits: stop signals blocked, and one thread in each numerical library."""
    # A signal for the whole group, as Ctrl-C sends it, is for the parent to act on. Were it to end a worker first, a good
    # task would pass for one that kills its process. An inherited mask leaves no moment without it.
    resource_tracker.ensure_running()  # it would be started with the first worker, and unblocks these signals for its own end
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threads = os.environ.get(_NUM_THREADS)
    os.environ[_NUM_THREADS] = "1"
    try:
        yield
    finally:
        if threads is None:
            del os.environ[_NUM_THREADS]
        else:
            os.environ[_NUM_THREADS] = threads
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _work_until_closed(connection: Connection, work: Callable[[Task], Result], memory_bytes: int) -> None:
    """The whole life of a worker process: it ends with the pipe, so it never outlives its parent."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # if that tracker had to be started anew meanwhile
    # counts what the process has written to or may write to, shared libraries aside: Python says MemoryError at the
    # limit, and the machine never has to choose a process to kill
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    with connection:  # closed before a traceback is printed, so that the time this takes is not the task's
        try:
            connection.send(_Ready())
            while True:
                task: Task = connection.recv()
                try:
                    connection.send(work(task))
                except ViewpointError as error:
                    connection.send(error)
        except (EOFError, ConnectionError):
            return
