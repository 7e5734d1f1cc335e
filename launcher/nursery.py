"""Starts processes in milliseconds: forks them from one that has imported what they need.

The launcher has a nursery that forks the agents of nodes, and each agent one that forks its workers, as it is single-
threaded and an agent is not. A cold worker takes 3.5 s of processor time and hundreds of MB before it does anything,
which all workers on two cores would pay at every restart; forked ones share the memory and skip the wait. Each still runs
its own words with its own environment, session and log. A nursery has one thread and touches no GPU, so that forking it is
safe. It speaks JSON lines on its pipes: `{"start": id, "words": ...}` and `{"signal": id, ...}` in,
`{"started": id, "pid": ...}` and `{"ended": id, "code": ...}` out.
"""

import atexit
import ctypes
import importlib
import json
import math
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, NoReturn, Self

from datastore.errors import EXIT_FAILED
from launcher.command import AGENT_WORDS, TRAINER_WORDS, Command
from launcher.tether import end_with, tethered
from launcher.warm import has_lost_its_gpus, settle, warm_up

_WAKE_SECONDS: Final = 0.05
_PR_SET_NAME: Final = 15  # linux/prctl.h

Message = dict[str, Any]
Program = Callable[[Sequence[str]], int]


class Nursery:
    """The side that asks. The nursery is started when it is first needed, and again if it died."""

    def __init__(self, environment: Mapping[str, str] | None = None, stage: str | None = None) -> None:
        self._environment, self._stage = dict(environment or {}), stage
        self._process: subprocess.Popen[bytes] | _Forked | None = None
        self._unread = b""
        self._started = 0
        self._running: set[int] = set()
        self._pids: dict[int, int] = {}
        self._codes: dict[int, int] = {}

    @classmethod
    def forked(cls, stage: str | None) -> Self:
        """One that is this process's child and has imported what this process has. To be called with one thread."""
        nursery = cls(stage=stage)
        nursery._process = _Forked(lambda: serve(stage))
        return nursery

    def warm_up(self) -> None:
        """Starts it, so that it imports what its children need while something else goes on."""
        if isinstance(self._process, _Forked):
            return
        if self._process is not None:
            if self._process.poll() is None:
                return
            self._bury()
        # one thread: a fork copies only the thread that forks
        single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            tethered(
                [sys.executable, "-m", "launcher.nursery", *([self._stage] if self._stage else [])], signal.SIGTERM
            ),
            env=os.environ | self._environment | single,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )

    @property
    def is_alive(self) -> bool:
        """Whether it can still start anything."""
        return self._process is not None and self._process.poll() is None

    def start(self, command: Command, log: Path, errors: Path | None = None) -> "Forked":
        """Starts a command; its output goes to the end of the log, and its errors there too unless they have their own."""
        self.warm_up()
        self._started += 1
        self._running.add(self._started)
        self.send(
            {
                "start": self._started,
                "words": list(command.words),
                "environment": dict(command.environment),
                "log": str(log),
                "errors": str(errors or log),
            }
        )
        return Forked(self, self._started)

    def send(self, message: Message) -> None:
        """Gives the nursery an order; one that has died takes none."""
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
        except BrokenPipeError:
            return

    def code_of(self, child: int, wait_seconds: float = 0.0) -> int | None:
        """The exit code of a child, None while it runs; that of a killed one where the nursery itself has died."""
        deadline = time.monotonic() + wait_seconds
        while child in self._running:
            left = deadline - time.monotonic()
            if not self._hear(min(max(left, 0.0), _WAKE_SECONDS)) and left <= 0:
                break
        return self._codes.get(child)

    def pid_of(self, child: int) -> int:
        """The process id of a child; 0 where the nursery died before it started."""
        while child not in self._pids and child in self._running:
            self._hear(_WAKE_SECONDS)
        return self._pids.get(child, 0)

    def _hear(self, seconds: float) -> bool:
        """Takes in what the nursery has to say within a time; False where that is nothing."""
        assert self._process is not None
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        if not ready:
            return False
        chunk = os.read(self._process.stdout.fileno(), 65536)
        if not chunk:
            self._lose_all()
            return False
        *lines, self._unread = (self._unread + chunk).split(b"\n")
        for message in map(json.loads, lines):
            if "started" in message:
                self._pids[message["started"]] = message["pid"]
            else:
                self._codes[message["ended"]] = message["code"]
                self._running.discard(message["ended"])
        return True

    def _lose_all(self) -> None:
        """The nursery is dead, and with it all that it started: the kernel saw to that."""
        for child in self._running:
            self._codes[child] = -signal.SIGKILL
        self._running.clear()

    def _bury(self) -> None:
        while self._hear(0):
            pass
        self._lose_all()
        assert isinstance(self._process, subprocess.Popen)
        self._process.communicate()
        self._unread = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(self._process, subprocess.Popen):
            self._process.terminate()  # what still runs there gets SIGTERM from the kernel
            self._process.communicate()
        elif self._process is not None:
            self._process.kill()


class _Forked:
    """A child that serves on pipes, with the few things of `Popen` that are needed here."""

    def __init__(self, work: Callable[[], None]) -> None:
        orders, self._orders = os.pipe()
        answers_from, answers = os.pipe()
        parent, self.pid = os.getpid(), os.fork()
        if self.pid == 0:
            try:
                os.setsid()
                end_with(parent, signal.SIGKILL)
                os.dup2(orders, 0)
                os.dup2(answers, 1)
                for each in (orders, self._orders, answers_from, answers):
                    os.close(each)
                work()
            finally:
                _end(0)
        os.close(orders)
        os.close(answers)
        self.stdin: IO[bytes] = os.fdopen(self._orders, "wb", buffering=0)
        self.stdout: IO[bytes] = os.fdopen(answers_from, "rb", buffering=0)
        self._code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def kill(self) -> None:
        """Ends it, and with it all that it started."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self._code = -signal.SIGKILL


class Forked:
    """A child of a nursery, as `launcher.local` handles processes."""

    def __init__(self, nursery: Nursery, number: int) -> None:
        self._nursery, self._number = nursery, number

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative after a signal."""
        return self._nursery.code_of(self._number)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._nursery.pid_of(self._number)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal, unless it has ended; to all of its session where it kills."""
        self._nursery.send({"signal": self._number, "number": int(number)})

    def wait(self) -> None:
        """Returns when it has ended."""
        self.has_ended_within(math.inf)

    def has_ended_within(self, seconds: float) -> bool:
        """Whether it has ended, as soon as it has, or after the time."""
        return self._nursery.code_of(self._number, seconds) is not None


def serve(stage: str | None) -> None:
    """The nursery's own loop: forks, passes signals on and reports ends until its input ends."""
    warm_up(stage)
    running: dict[int, int] = {}  # process id -> number
    for message in _orders(lambda: _report_ends(running)):
        if "start" in message:
            parent, pid = os.getpid(), os.fork()
            if pid == 0:
                _become(message, parent)
            running[pid] = message["start"]
            _answer({"started": message["start"], "pid": pid})
        else:
            # not yet reaped, so the number cannot belong to another process
            for pid in [pid for pid, number in running.items() if number == message["signal"]]:
                _send(pid, signal.Signals(message["number"]))


def _send(pid: int, number: signal.Signals) -> None:
    """To all of its session where it kills: what writes checkpoints or reads data for it must not outlive it."""
    if number is signal.SIGKILL and os.getpgid(pid) == pid:  # else it has not come to its own session yet
        os.killpg(pid, number)
    else:
        os.kill(pid, number)


def _orders(meanwhile: Callable[[], None]) -> Iterator[Message]:
    unread = b""
    while True:
        meanwhile()
        if not select.select([0], [], [], _WAKE_SECONDS)[0]:
            continue
        chunk = os.read(0, 65536)
        if not chunk:
            return
        *lines, unread = (unread + chunk).split(b"\n")
        yield from map(json.loads, lines)


def _report_ends(running: dict[int, int]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        number = running.pop(pid, None)  # None: what a library that was imported had started
        if number is not None:
            _answer({"ended": number, "code": os.waitstatus_to_exitcode(status)})


def _answer(message: Message) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


def _become(order: Message, parent: int) -> NoReturn:
    """Runs in the forked process and never returns to the nursery's loop."""
    code = EXIT_FAILED
    try:
        code = _run(tuple(order["words"]), order, parent)
    except SystemExit as request:
        code = request.code if isinstance(request.code, int) else int(request.code is not None)
    except BaseException:  # noqa: BLE001 (as the interpreter does at the end of a program)
        traceback.print_exc()
    finally:
        _end(code)


def _run(words: tuple[str, ...], order: Message, parent: int) -> int:
    """The exit code of the program that this process now is."""
    environment = order["environment"]
    os.setsid()
    is_agent = words[: len(AGENT_WORDS)] == AGENT_WORDS
    # a node that loses its launcher lets its workers save; workers without an agent would train on unwatched
    end_with(parent, signal.SIGTERM if is_agent else signal.SIGKILL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(_appending(order["log"]), 1)
    os.dup2(_appending(order["errors"]), 2)
    os.environ.update(environment)
    random.seed()  # or all would wait the same "random" time
    if is_agent:
        _call_yourself("viewpoint-node")
        return _program("launcher.agent")(words[len(AGENT_WORDS) :])
    if words[: len(TRAINER_WORDS)] != TRAINER_WORDS or has_lost_its_gpus():
        os.execvp(words[0], words)
    _call_yourself(f"viewpoint-{environment.get('RANK', '')}")
    settle(environment.get("OMP_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS"))
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # last words of a killed one count
    sys.argv = list(words[len(TRAINER_WORDS) - 1 :])
    return _program("trainer.__main__")(words[len(TRAINER_WORDS) :])


def _end(code: int) -> NoReturn:
    """Ends a forked process as the interpreter would, but for its farewell, which is the nursery's own."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _appending(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)


def _program(module: str) -> Program:
    program: Program = importlib.import_module(module).main
    return program


def _call_yourself(name: str) -> None:
    """What `top` and `ps -o comm` show."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:15])


if __name__ == "__main__":
    importlib.import_module("launcher.agent")
    serve(sys.argv[1] if len(sys.argv) > 1 else None)
