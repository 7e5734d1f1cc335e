"""Nodes of one machine in network namespaces of their own, whose links can be cut: root, Linux and `ip` needed.

    vp0 (bridge, 10.77.K.1, the launcher)  --  vp0n0 <-> eth0 10.77.K.10 (node 0)  --  vp0n1 <-> eth0 10.77.K.11 ...

Everything is named for the launcher's process id, so that the next launcher finds and removes what a killed one left.
Nodes reach each other and the launcher, and nothing else.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import psutil

from datastore.errors import DoNotRetry

INTERFACE: Final = "eth0"
_NAMES: Final = re.compile(r"vp([0-9a-f]+)(?:n\d+)?")
_NAMESPACES: Final = Path("/var/run/netns")
_CLONE_NEWNET: Final = 0x40000000


def why_not() -> str | None:
    """Why nodes cannot have networks of their own here; None where they can."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "the command `ip` is missing (Debian and Ubuntu: package iproute2)"
    try:
        _ip("netns", "add", f"vp{_own_name()}n0")
        _ip("netns", "delete", f"vp{_own_name()}n0")
    except DoNotRetry as error:
        return str(error)
    return None


class Networks:
    """One namespace a node while it is entered."""

    def __init__(self, nodes: int) -> None:
        self._nodes = nodes
        self._name = f"vp{_own_name()}"
        self._subnet = ""

    @property
    def host(self) -> str:
        """The launcher's address, which all nodes reach."""
        return f"{self._subnet}.1"

    def name(self, node: int) -> str:
        """The namespace of a node."""
        return f"{self._name}n{node}"

    def address(self, node: int) -> str:
        """The node's address."""
        return f"{self._subnet}.{10 + node}"

    def cut(self, node: int) -> None:
        """Takes the node off the network."""
        _ip("link", "set", self.name(node), "down")

    def heal(self, node: int) -> None:
        """Puts it back."""
        _ip("link", "set", self.name(node), "up")

    def __enter__(self) -> Self:
        remove_abandoned()
        self._subnet = _free_subnet()
        try:
            _ip("link", "add", self._name, "type", "bridge")
            _ip("address", "add", f"{self.host}/24", "dev", self._name)
            _ip("link", "set", self._name, "up")
            for node in range(self._nodes):
                name = self.name(node)
                _ip("netns", "add", name)
                _ip("link", "add", name, "type", "veth", "peer", "name", INTERFACE, "netns", name)
                _ip("link", "set", name, "master", self._name, "up")
                _ip("-n", name, "address", "add", f"{self.address(node)}/24", "dev", INTERFACE)
                _ip("-n", name, "link", "set", INTERFACE, "up")
                _ip("-n", name, "link", "set", "lo", "up")
        except DoNotRetry:
            _remove(self._name)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _remove(self._name)


def enter_network(name: str) -> None:
    """Moves this thread, and all that it starts from now on, into a namespace."""
    with (_NAMESPACES / name).open() as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"cannot enter the network namespace {name}: {os.strerror(code)}")


def remove_abandoned() -> list[str]:
    """Removes what launchers left that were killed; returns its names."""
    there = {path.name for path in Path("/sys/class/net").iterdir()}
    if _NAMESPACES.exists():
        there |= {path.name for path in _NAMESPACES.iterdir()}
    owners = {match[1] for match in map(_NAMES.fullmatch, there) if match}
    abandoned = sorted(f"vp{owner}" for owner in owners if not _is_alive(owner))
    for name in abandoned:
        _remove(name)
    return abandoned


def _remove(name: str) -> None:
    """Removes a launcher's namespaces, and with them their links, then its bridge."""
    if _NAMESPACES.exists():
        for path in _NAMESPACES.iterdir():
            if re.fullmatch(rf"{name}n\d+", path.name):
                _ip("netns", "delete", path.name)
    for path in Path("/sys/class/net").iterdir():
        if re.fullmatch(rf"{name}(n\d+)?", path.name) and path.exists():
            subprocess.run(["ip", "link", "delete", path.name], capture_output=True, check=False)


def _own_name() -> str:
    """The process id in hexadecimal: interfaces have names of 15 letters at most, and no digit of it is an "n"."""
    return f"{os.getpid():x}"


def _is_alive(owner: str) -> bool:
    try:
        process = psutil.Process(int(owner, 16))
        return process.status() != psutil.STATUS_ZOMBIE and "python" in process.exe()  # no later one of that number
    except psutil.NoSuchProcess:
        return False


def _free_subnet() -> str:
    taken = subprocess.run(["ip", "-4", "address"], capture_output=True, text=True, check=True).stdout
    for number in range(1, 255):
        if f" 10.77.{number}." not in taken:
            return f"10.77.{number}"
    raise DoNotRetry("All networks 10.77.K.0/24 are in use, and nodes were to get one. Remove some bridges: `ip link`.")


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DoNotRetry(
            f"`ip {' '.join(words)}` failed: {done.stderr.strip()}. Nodes cannot have networks of their own."
        )
