"""A proxy on loopback that does to HTTP what networks and busy servers do: each fault at a rate of requests, by a seed.

It passes every request on as it came, the Host header too, which signatures cover: whoever signs for the proxy's own URL
is believed by the server behind it.
"""

import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import BinaryIO, Final, Literal, Self, get_args
from urllib.parse import urlsplit

Fault = Literal["unavailable", "throttled", "reset", "truncated", "flipped", "hung", "slow"]
FAULTS: Final[tuple[Fault, ...]] = get_args(Fault)

_PIECE_BYTES: Final = 2**16
_POLL_SECONDS: Final = 0.05


@dataclass(frozen=True)
class Trouble:
    """What goes wrong: shares of requests by fault, and how slow all of them are."""

    rates: Mapping[Fault, float] = field(default_factory=dict)
    latency_seconds: float = 0.0  # to the first byte of an answer
    bytes_per_second: float = float("inf")  # of one connection
    retry_after_seconds: int = 1  # what a throttled client is told
    slow_seconds: float = 1.0  # that a slow answer comes later
    path_part: str = ""  # only requests whose path has this in it; the others pass unharmed


class FaultProxy:
    """Stands before a server; `trouble` may be changed at any time."""

    def __init__(self, upstream_url: str, seed: int = 0) -> None:
        self.trouble = Trouble()
        self.num_requests = 0
        self.faults: Counter[Fault] = Counter()  # how often each was done
        upstream = urlsplit(upstream_url)
        assert upstream.hostname is not None
        self._upstream = (upstream.hostname, upstream.port or 80)
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._run(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every connection and thread."""
        self._closing.set()
        _wake(self._listening)
        with self._lock:
            for connection in self._sockets:
                _wake(connection)
        for thread in self._threads:
            thread.join()
        self._listening.close()

    def _run(self, function: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True, name="fault-proxy")
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closing.is_set():
            with suppress(OSError):  # it was woken to close
                client, _ = self._listening.accept()
                self._run(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        """One client's connection, with one of its own to the server."""
        with client, socket.socket() as server, suppress(OSError, _Over):
            with self._lock:
                self._sockets |= {client, server}
            try:
                for connection in (client, server):
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                server.connect(self._upstream)
                with client.makefile("rb") as asked, server.makefile("rb") as answered:
                    while not self._closing.is_set():
                        self._pass_on(client, asked, server, answered)
            finally:
                with self._lock:
                    self._sockets -= {client, server}

    def _pass_on(self, client: socket.socket, asked: BinaryIO, server: socket.socket, answered: BinaryIO) -> None:
        """One request and its answer."""
        request = _Message.read(asked)
        if request.headers.get("expect", "").lower() == "100-continue":
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = b"".join(request.body(asked))
        trouble, fault, place = self._draw(request.first_line)
        if trouble.latency_seconds:
            self._closing.wait(trouble.latency_seconds)
        if fault == "unavailable":
            client.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\n\r\n")
            return
        if fault == "throttled":
            wait = f"Retry-After: {trouble.retry_after_seconds}"
            client.sendall(f"HTTP/1.1 429 Too Many Requests\r\n{wait}\r\nContent-Length: 0\r\n\r\n".encode())
            return
        server.sendall(request.without_expect() + body)
        answer = _Message.read(answered)
        while answer.first_line.split()[1] == b"100":
            answer = _Message.read(answered)
        content = bytearray(b"".join(answer.body(answered, answers_head=request.first_line.startswith(b"HEAD"))))
        at = int(place * len(content))
        if fault == "flipped" and content:
            content[at] ^= 1 << int(place * 8e6) % 8
        if fault in ("reset", "truncated", "hung"):
            if fault != "hung" or place > 0.5:  # a server may hang before its answer, or within
                self._send(client, answer.head + content[:at], trouble)
            if fault == "hung":
                self._wait_for_the_end(client)
            if fault == "reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raise _Over
        if fault == "slow":
            self._wait_for_the_end(client, trouble.slow_seconds)
        self._send(client, answer.head + content, trouble)
        if answer.headers.get("connection", "").lower() == "close":
            raise _Over

    def _draw(self, first_line: bytes) -> tuple[Trouble, Fault | None, float]:
        """What happens to a request: the fault if any, and where in the answer, from 0 to 1."""
        with self._lock:
            trouble = self.trouble
            if trouble.path_part.encode() not in first_line:
                return Trouble(), None, 0.0
            self.num_requests += 1
            chance, place = self._random.random(), self._random.random()
            for fault, rate in trouble.rates.items():
                if chance < rate:
                    self.faults[fault] += 1
                    return trouble, fault, place
                chance -= rate
            return trouble, None, place

    def _send(self, client: socket.socket, content: bytes, trouble: Trouble) -> None:
        if trouble.bytes_per_second == float("inf"):
            client.sendall(content)
            return
        for start in range(0, len(content), _PIECE_BYTES):
            piece = content[start : start + _PIECE_BYTES]
            client.sendall(piece)
            if self._closing.wait(len(piece) / trouble.bytes_per_second):
                raise _Over

    def _wait_for_the_end(self, client: socket.socket, seconds: float = float("inf")) -> None:
        """Until the client has gone, the proxy goes, or so long."""
        until = time.monotonic() + seconds
        client.settimeout(_POLL_SECONDS)
        while not self._closing.is_set() and time.monotonic() < until:
            with suppress(TimeoutError):
                if not client.recv(1):
                    raise _Over
        client.settimeout(None)


class _Over(Exception):
    """A connection has come to its end."""


@dataclass(frozen=True)
class _Message:
    """The head of a request or an answer, as it came."""

    head: bytes
    headers: Mapping[str, str]

    @classmethod
    def read(cls, file: BinaryIO) -> "_Message":
        lines = [file.readline()]
        while lines[-1] not in (b"\r\n", b""):
            lines.append(file.readline())
        if lines[-1] == b"":
            raise _Over
        pairs = (line.decode("latin-1").partition(":") for line in lines[1:-1])
        return cls(b"".join(lines), {name.strip().lower(): value.strip() for name, _, value in pairs})

    @property
    def first_line(self) -> bytes:
        return self.head.partition(b"\r\n")[0]

    def without_expect(self) -> bytes:
        """The head without the wish to be told before the body is sent: it was told already."""
        lines = self.head.split(b"\r\n")
        return b"\r\n".join(line for line in lines if not line.lower().startswith(b"expect:"))

    def body(self, file: BinaryIO, *, answers_head: bool = False) -> list[bytes]:
        """What follows the head, in the framing in which it comes."""
        is_answer = self.first_line.startswith(b"HTTP/")
        if is_answer and (answers_head or self.first_line.split()[1] in (b"204", b"304") or self._is_interim):
            return []
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            return _chunks(file)
        if "content-length" in self.headers:
            return [file.read(int(self.headers["content-length"]))]
        return [file.read()] if is_answer else []

    @property
    def _is_interim(self) -> bool:
        return self.first_line.split()[1].startswith(b"1")


def _chunks(file: BinaryIO) -> list[bytes]:
    pieces = []
    while True:
        size = file.readline()
        pieces.append(size)
        if (num_bytes := int(size.partition(b";")[0], 16)) == 0:
            break
        pieces.append(file.read(num_bytes + len(b"\r\n")))
    while pieces[-1] not in (b"\r\n", b""):  # what trails, and an empty line
        pieces.append(file.readline())
    return pieces


def _wake(connection: socket.socket) -> None:
    with suppress(OSError):  # it has ended by itself
        connection.shutdown(socket.SHUT_RDWR)
