"""Networks of their own for nodes; what needs root is only checked as root."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from launcher import network
from launcher.network import Networks, remove_abandoned, why_not

HOLDER = """
    import sys, time
    from launcher.network import Networks
    with Networks(2) as networks:
        print(networks.name(0), flush=True)
        time.sleep(600)
"""


def namespaces() -> set[str]:
    folder = Path("/var/run/netns")
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def interfaces() -> set[str]:
    return {path.name for path in Path("/sys/class/net").iterdir()}


def test_who_is_not_root_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert why_not() is not None
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(network.shutil, "which", lambda name: None)
    assert "iproute2" in (why_not() or "")


def not_checked(capsys: pytest.CaptureFixture[str]) -> bool:
    """Whether there can be no namespaces here, which is said past all capturing: nobody shall think that it was checked."""
    why = why_not()
    if why is not None:
        with capsys.disabled():
            print(f"\nNOT CHECKED, run this test as root: nodes in networks of their own ({why})", file=sys.stderr)
    return why is not None


def test_nodes_reach_each_other_until_one_is_cut_and_nothing_is_left_behind(
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not_checked(capsys):
        return
    before = namespaces(), interfaces()
    with Networks(2) as networks:
        ping = ["ip", "netns", "exec", networks.name(0), sys.executable, "-c", KNOCK, networks.address(1)]
        assert subprocess.run(ping, check=False).returncode == 0, "refused at once, so it was heard"
        networks.cut(1)
        assert subprocess.run(ping, check=False).returncode == 1
        networks.heal(1)
        assert subprocess.run(ping, check=False).returncode == 0
    assert (namespaces(), interfaces()) == before


KNOCK = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 9), timeout=2)
except ConnectionRefusedError:
    sys.exit(0)
except OSError:
    sys.exit(1)
"""


def test_what_a_killed_launcher_left_is_removed_by_name_and_nothing_else_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not_checked(capsys):
        return
    before = namespaces(), interfaces()
    with (
        Networks(1) as mine,
        subprocess.Popen([sys.executable, "-c", textwrap.dedent(HOLDER)], stdout=subprocess.PIPE, text=True) as holder,
    ):
        assert holder.stdout is not None
        name = holder.stdout.readline().strip()
        assert name in namespaces()
        assert remove_abandoned() == [], "it lives"
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        time.sleep(0.1)
        assert remove_abandoned() == [name.removesuffix("n0")]
        assert name not in namespaces()
        assert mine.name(0) in namespaces()
    assert (namespaces(), interfaces()) == before
