"""Ends a command when the process that started it dies: `python tether.py PARENT_PID SIGNAL COMMAND...`.

A launcher or an agent that is killed cannot stop what it started, and workers without an agent would train on
unwatched. The kernel keeps the promise instead: it sends SIGNAL to this process, which has become COMMAND by then. Only
Linux offers it; elsewhere the command runs untethered. This file imports nothing of ours: it must cost milliseconds.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


def tethered(command: Sequence[str], death_signal: signal.Signals) -> list[str]:
    """The command that runs `command` as a child of this process and ends it with this process."""
    # isolated and without site packages: nothing of the environment can slow it down or break it
    return [sys.executable, "-I", "-S", str(Path(__file__)), str(os.getpid()), death_signal.name, *command]


def end_with(parent: int, death_signal: signal.Signals) -> None:
    """Makes the kernel send this process a signal when the process that started it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(death_signal))
        if os.getppid() != parent:  # it died before the promise was made
            sys.exit(f"tether: the parent {parent} is gone already")


def main() -> None:
    """Becomes the command; it never returns."""
    parent, signal_name, *command = sys.argv[1:]
    end_with(int(parent), signal.Signals[signal_name])
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
