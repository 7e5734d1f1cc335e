"""Starts node agents in milliseconds: forks them from one process that has imported torch already.

An agent by itself takes 2.3 s of processor time and 290 MiB before it does anything, which four nodes on two cores would
pay at every stage. Forked ones share the memory and skip the wait; each still runs `launcher.agent` with its own words,
environment, session and log. The nursery has one thread and touches no GPU, so that forking it is safe. It speaks JSON
lines on its pipes: `{"start": id, "words": ...}` and `{"signal": id, ...}` in, `{"ended": id, "code": ...}` out.
"""

import importlib
import json
import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NoReturn, Self

from launcher.command import Command
from launcher.tether import end_with, tethered

_AGENT: Final = "launcher.agent"
_WAKE_SECONDS: Final = 0.05

Message = dict[str, Any]


class Nursery:
    """The launcher's side: starts the nursery when it is first needed, and again if it died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self._started = 0
        self._running: set[int] = set()
        self._codes: dict[int, int] = {}

    def warm_up(self) -> None:
        """Starts it, so that it imports what agents need while something else goes on."""
        if self._process is not None:
            if self._process.poll() is None:
                return
            self._bury()
        # one thread: a fork copies only the thread that forks
        single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            tethered([sys.executable, "-m", "launcher.nursery"], signal.SIGTERM),
            env=os.environ | single,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )

    def start(self, command: Command, log: Path) -> "Agent":
        """Starts an agent; its command is `python -m launcher.agent WORDS`, its output goes to the end of the log."""
        self.warm_up()
        self._started += 1
        self._running.add(self._started)
        words = list(command.words[command.words.index(_AGENT) + 1 :])
        self.send({"start": self._started, "words": words, "environment": dict(command.environment), "log": str(log)})
        return Agent(self, self._started)

    def send(self, message: Message) -> None:
        """Gives the nursery an order; one that has died takes none."""
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
        except BrokenPipeError:
            return

    def code_of(self, agent: int, *, wait: bool = False) -> int | None:
        """The exit code of an agent, None while it runs; that of a killed one where the nursery itself has died."""
        while agent in self._running:
            heard = self._hear(_WAKE_SECONDS if wait else 0)
            if not (heard or wait):
                break
        return self._codes.get(agent)

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
            self._codes[message["ended"]] = message["code"]
            self._running.discard(message["ended"])
        return True

    def _lose_all(self) -> None:
        """The nursery died, and the kernel ended its agents."""
        self._codes |= dict.fromkeys(self._running, -signal.SIGKILL)
        self._running.clear()

    def _bury(self) -> None:
        assert self._process is not None
        while self._hear(0):
            continue
        self._lose_all()
        self._unread = b""
        self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.terminate()  # what still runs there gets SIGTERM from the kernel
            self._process.communicate()


class Agent:
    """A forked agent, as `launcher.local` handles processes."""

    def __init__(self, nursery: Nursery, number: int) -> None:
        self._nursery, self._number = nursery, number

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative after a signal."""
        return self._nursery.code_of(self._number)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal, unless it has ended."""
        self._nursery.send({"signal": self._number, "number": int(number)})

    def wait(self) -> None:
        """Returns when it has ended."""
        self._nursery.code_of(self._number, wait=True)


def serve(run_agent: Callable[[Sequence[str]], int]) -> None:
    """The nursery's own loop: forks, passes signals on and reports ends until its input ends."""
    running: dict[int, int] = {}  # process id -> number
    for message in _orders(lambda: _report_ends(running)):
        if "start" in message:
            parent, pid = os.getpid(), os.fork()
            if pid == 0:
                _become_agent(message, parent, run_agent)
            running[pid] = message["start"]
        else:
            # not yet reaped, so the number cannot belong to another process
            for pid in [pid for pid, number in running.items() if number == message["signal"]]:
                os.kill(pid, message["number"])


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
        message = {"ended": running.pop(pid), "code": os.waitstatus_to_exitcode(status)}
        os.write(1, json.dumps(message).encode() + b"\n")


def _become_agent(order: Message, parent: int, run_agent: Callable[[Sequence[str]], int]) -> NoReturn:
    """Runs in the forked process and never returns."""
    os.setsid()
    end_with(parent, signal.SIGTERM)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(order["environment"])
    random.seed()  # or all agents would wait the same "random" time
    os._exit(run_agent(order["words"]))


if __name__ == "__main__":
    serve(importlib.import_module(_AGENT).main)
