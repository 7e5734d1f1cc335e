"""The network of the cluster double: a bridge that pods are plugged into, and doors to servers on this machine's loopback.

    vk<process id> (10.78.K.1: names, doors)  --  vk<process id>p<n> <-> eth0 10.78.K.N (a pod)

Pods reach each other, the bridge and what has a door there, and nothing else. NetworkPolicies are not enforced.
"""

import asyncio
import os
import re
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import psutil

INTERFACE: Final = "eth0"
_NAMES: Final = re.compile(r"vk([0-9a-f]+)")
_FIRST, _LAST = 10, 250
_PIECE_BYTES: Final = 2**18


class PodNetwork:
    """A bridge of our own while it is entered; addresses are given in turn, so that a new pod has another than the last."""

    def __init__(self) -> None:
        self._name = f"vk{os.getpid():x}"
        self._lock = threading.Lock()
        self._subnet = ""
        self._next = _FIRST
        self._plugged: dict[str, str] = {}  # interfaces on our side, by address
        self._doors: list[Door] = []

    @property
    def gateway(self) -> str:
        """The bridge's address, which all pods reach."""
        return f"{self._subnet}.1"

    def plug(self, process: int) -> str:
        """Gives the network namespace of a process an interface; returns its address."""
        with self._lock:
            for _ in range(_LAST - _FIRST):
                number, self._next = self._next, self._next + 1 if self._next < _LAST else _FIRST
                address = f"{self._subnet}.{number}"
                if address not in self._plugged:
                    break
            else:
                raise RuntimeError(
                    f"All addresses of {self._subnet}.0/24 are in use: the double has room for 240 pods."
                )
            self._plugged[address] = name = f"{self._name}p{number}"
        ip("link", "add", name, "type", "veth", "peer", "name", INTERFACE, "netns", str(process))
        ip("link", "set", name, "master", self._name, "up")
        inside = ("nsenter", f"--target={process}", "--net", "ip")
        run(*inside, "address", "add", f"{address}/24", "dev", INTERFACE)
        run(*inside, "link", "set", INTERFACE, "up")
        run(*inside, "link", "set", "lo", "up")
        return address

    def unplug(self, address: str) -> None:
        """Takes a pod off the network at once; its namespace may live on for a moment."""
        with self._lock:
            name = self._plugged.pop(address, None)
        if name is not None and Path(f"/sys/class/net/{name}").exists():
            subprocess.run(["ip", "link", "delete", name], capture_output=True, check=False)  # it went by itself

    def open_door(self, port: int) -> None:
        """From now on, pods reach the port of this machine's loopback at the bridge's address."""
        self._doors.append(Door(self.gateway, port))

    def __enter__(self) -> Self:
        remove_abandoned()
        self._subnet = _free_subnet()
        ip("link", "add", self._name, "type", "bridge")
        try:
            ip("address", "add", f"{self.gateway}/24", "dev", self._name)
            ip("link", "set", self._name, "up")
        except RuntimeError:
            ip("link", "delete", self._name)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for door in self._doors:
            door.close()
        for address in list(self._plugged):
            self.unplug(address)
        ip("link", "delete", self._name)


class Door:
    """Passes connections to a port on to the same port of loopback, byte for byte: signatures cover the host's name."""

    def __init__(self, address: str, port: int) -> None:
        self._port = port
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None] | None] = set()  # asyncio itself would let them be collected
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, address, port))
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"door-{port}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends all connections."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        self._server.close()
        ours = asyncio.current_task()
        others = [task for task in asyncio.all_tasks() if task is not ours]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.current_task())
        with suppress(OSError, asyncio.CancelledError):  # one of the two has gone, or the double goes
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self._port)
            try:
                await asyncio.gather(_pass_on(reader, inner_writer), _pass_on(inner_reader, writer))
            finally:
                inner_writer.close()
        writer.close()
        self._tasks.discard(asyncio.current_task())


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(_PIECE_BYTES):
        writer.write(piece)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()


def remove_abandoned() -> None:
    """Removes the bridges of processes that were killed; their pods ended with them."""
    for path in Path("/sys/class/net").iterdir():
        match = _NAMES.fullmatch(path.name)
        if match is not None and not _is_alive(int(match[1], 16)):
            subprocess.run(["ip", "link", "delete", path.name], capture_output=True, check=False)  # another was faster


def ip(*words: str) -> None:
    """Runs `ip`."""
    run("ip", *words)


def run(*words: str) -> str:
    """What a command of this machine prints; an error with its words where it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(
            f"`{' '.join(words)}` failed: {done.stderr.strip()}. The cluster double needs Linux, root, iproute2 and "
            f"util-linux: it gives each pod namespaces of its own."
        )
    return done.stdout


def _is_alive(process: int) -> bool:
    try:
        return "python" in psutil.Process(process).exe()  # and no later one of that number
    except psutil.NoSuchProcess:
        return False


def _free_subnet() -> str:
    taken = run("ip", "-4", "address")
    for number in range(1, 255):
        if f" 10.78.{number}." not in taken:
            return f"10.78.{number}"
    raise RuntimeError("All networks 10.78.K.0/24 are in use. Remove some bridges: `ip link`.")
