"""An HTTP server on loopback that sends ranges of CONTENT, by a script of what goes wrong."""

import socket
import ssl
import struct
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from datastore.objects import ObjectFolder

CONTENT = bytes(range(256)) * 400

Answer = Callable[["Handler", bytes], None]
"""How a server answers a request: given what it should send."""


class _Server(ThreadingHTTPServer):
    request_queue_size = 64  # else one of many connections that begin together is not heard for a second


class RangeServer:
    """An HTTP server that sends ranges of CONTENT; `script` says how, by the request's number from 0."""

    def __init__(self, certificate: Path | None = None) -> None:
        self.script: Callable[[int], Answer] = lambda number: right
        self.asked: list[tuple[int, int]] = []
        self.connections: set[tuple[str, int]] = set()  # from which port of the client's
        self.under_way = 0
        self.most_under_way = 0
        self.broken_off = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.of = self  # type: ignore[attr-defined]
        self._server.daemon_threads = True
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            # each thread of the server shakes hands for itself: one that a client leaves must not hold up the others
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"{'http' if certificate is None else 'https'}://127.0.0.1:{self._server.server_port}"

    def fails(self, count: int, answer: Answer) -> None:
        """The first so many requests are answered so, the others right."""
        self.script = lambda number: answer if number < count else right

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 5
    disable_nagle_algorithm = True

    @property
    def of(self) -> RangeServer:
        return self.server.of  # type: ignore[attr-defined, no-any-return]

    def do_GET(self) -> None:
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        start, end = int(first), int(last) + 1
        with self.of.lock:
            number = len(self.of.asked)
            self.of.asked.append((start, end))
            self.of.connections.add(self.client_address)
            self.of.under_way += 1
            self.of.most_under_way = max(self.of.most_under_way, self.of.under_way)
        try:
            self.of.script(number)(self, CONTENT[start:end])
        except ConnectionError:
            self.of.broken_off += 1
        finally:
            with self.of.lock:
                self.of.under_way -= 1

    def begin(self, status: int, num_bytes: int, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(num_bytes))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def log_message(self, *words: object) -> None:
        return


def right(handler: Handler, content: bytes) -> None:
    handler.begin(206, len(content))
    handler.wfile.write(content)


def status(number: int, **headers: str) -> Answer:
    return lambda handler, content: handler.begin(number, 0, **headers)


def broken_off(handler: Handler, content: bytes) -> None:
    handler.begin(206, len(content))
    handler.wfile.write(content[: len(content) // 2])
    handler.close_connection = True


def reset(handler: Handler, content: bytes) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True


def no_http(handler: Handler, content: bytes) -> None:
    handler.wfile.write(b"what?\r\n\r\n")
    handler.close_connection = True


def flipped_at(place: int) -> Answer:
    def answer(handler: Handler, content: bytes) -> None:
        right(handler, content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])

    return answer


def hung(handler: Handler, content: bytes) -> None:
    """Sends nothing until the client has gone."""
    while not handler.of.closing.is_set():
        handler.connection.settimeout(0.05)
        with suppress(TimeoutError):
            if not handler.connection.recv(1):
                handler.close_connection = True
                raise ConnectionError


def hung_in_the_middle(handler: Handler, content: bytes) -> None:
    handler.begin(206, len(content))
    handler.wfile.write(content[: len(content) // 2])
    hung(handler, content)


class ServedFolder(ObjectFolder):
    """The objects of a server, whose URLs need no signature."""

    is_local = False

    def signed_url(self, name: str, seconds: int) -> str:
        return f"{self.url}/{name}?signature=1"


def self_signed(folder: Path) -> Path:
    """A certificate of 127.0.0.1's own, with its key, in one file."""
    path = folder / "certificate.pem"
    options = "req -x509 -nodes -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -days 2 -subj /CN=viewpoint-tests"
    subprocess.run(
        ["openssl", *options.split(), "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", path, "-out", path],
        check=True,
        capture_output=True,
    )
    key_and_certificate = path.read_text()
    assert "PRIVATE KEY" in key_and_certificate
    assert "BEGIN CERTIFICATE" in key_and_certificate
    return path
