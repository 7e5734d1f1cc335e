"""A small S3 server on loopback, so that every system reads from the same one: GET, ranges, HEAD and listings of a folder.

    python -m readers.object_server FOLDER [--latency SECONDS] [--rate BYTES_PER_SECOND]

The kernel sends file contents without copying them through this process, a thread a connection: what a connection costs
here is little beside what any reader does with the bytes. `--latency` passes before each answer begins, and `--rate`
holds each connection to so many bytes a second, as a server far away does. Signatures are not looked at. It prints its
port, and ends with its standard input.
"""

import argparse
import os
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from typing import BinaryIO, Final
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

_SLICE_BYTES: Final = 2**20
_HTTP_STATUS: Final = {200: "OK", 206: "Partial Content", 404: "Not Found", 405: "Method Not Allowed", 416: "Bad Range"}


@contextmanager
def running_server(folder: Path, latency_seconds: float = 0.0, bytes_per_second: float = 0.0) -> Iterator[str]:
    """The URL of a server, in a process of its own, that ends with the block."""
    words = ["--latency", str(latency_seconds), "--rate", str(bytes_per_second)]
    process = subprocess.Popen(
        [sys.executable, __file__, str(folder), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, folder: Path, latency_seconds: float, bytes_per_second: float) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.folder, self.latency_seconds, self.bytes_per_second = folder, latency_seconds, bytes_per_second


class _Connection(socketserver.BaseRequestHandler):
    server: _Server
    request: socket.socket

    def handle(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            with self.request.makefile("rb") as incoming:
                while self._answer_next(incoming):
                    pass
        except (BrokenPipeError, ConnectionResetError):
            return  # the reader had enough

    def _answer_next(self, incoming: BinaryIO) -> bool:
        """Whether the connection goes on."""
        words = incoming.readline().split()
        if len(words) < 2:
            return False
        method, target = words[0].decode(), urlsplit(words[1].decode())
        headers = {}
        while line := incoming.readline().strip():
            name, _, value = line.partition(b":")
            headers[name.lower()] = value.strip().decode()
        time.sleep(self.server.latency_seconds)
        path = self.server.folder / unquote(target.path).strip("/")
        query = parse_qs(target.query, keep_blank_values=True)
        if method not in ("GET", "HEAD"):
            self._answer(405, b"")
        elif "list-type" in query:
            self._answer(200, self._listing(path, query.get("prefix", [""])[0], "delimiter" in query))
        elif path.is_file():
            self._send_file(path, headers.get(b"range"), with_body=method == "GET")
        elif method == "HEAD":
            self._answer(404, b"")
        else:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        return headers.get(b"connection", "").lower() != "close"

    def _answer(self, status: int, body: bytes) -> None:
        self._send_head(status, len(body), ["Content-Type: application/xml"])
        self.request.sendall(body)

    def _send_head(self, status: int, length: int, lines: list[str]) -> None:
        head = [f"HTTP/1.1 {status} {_HTTP_STATUS[status]}", f"Content-Length: {length}", *lines, "", ""]
        self.request.sendall("\r\n".join(head).encode())

    def _send_file(self, path: Path, wanted: str | None, *, with_body: bool) -> None:
        with path.open("rb") as file:
            facts = os.fstat(file.fileno())
            size = facts.st_size
            lines = [
                f'ETag: "{facts.st_mtime_ns:x}-{size:x}"',
                f"Last-Modified: {formatdate(facts.st_mtime, usegmt=True)}",
                "Accept-Ranges: bytes",
            ]
            status, start, end = 200, 0, size
            if wanted:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                if not first:
                    start = max(0, size - int(last))
                else:
                    start, end = int(first), min(size, int(last) + 1) if last else size
                if start >= size:
                    self._answer(416, b"")
                    return
                status = 206
                lines.append(f"Content-Range: bytes {start}-{end - 1}/{size}")
            self._send_head(status, end - start, lines)
            if with_body:
                self._send_body(file.fileno(), start, end)

    def _send_body(self, descriptor: int, start: int, end: int) -> None:
        rate, began, at = self.server.bytes_per_second, time.monotonic(), start
        while at < end:
            count = min(_SLICE_BYTES, end - at)
            if rate:
                time.sleep(max(0.0, began + (at + count - start) / rate - time.monotonic()))
            sent_to = at + count
            while at < sent_to:
                at += os.sendfile(self.request.fileno(), descriptor, at, sent_to - at)

    def _listing(self, bucket: Path, prefix: str, has_delimiter: bool) -> bytes:
        """Keys that begin with a prefix; of what lies in folders below it, only the folders where there is a delimiter."""
        above = bucket / prefix.rpartition("/")[0]
        candidates = above.iterdir() if has_delimiter else above.rglob("*")
        keys, folders = [], []
        for path in sorted(candidates) if above.is_dir() else []:
            key = path.relative_to(bucket).as_posix()
            if not key.startswith(prefix):
                continue
            if path.is_file():
                changed = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(path.stat().st_mtime))
                keys.append(
                    f"<Contents><Key>{escape(key)}</Key><LastModified>{changed}</LastModified>"
                    f"<Size>{path.stat().st_size}</Size></Contents>"
                )
            elif has_delimiter:
                folders.append(f"<CommonPrefixes><Prefix>{escape(key)}/</Prefix></CommonPrefixes>")
        return (
            f'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><Prefix>{escape(prefix)}</Prefix>'
            f"<KeyCount>{len(keys) + len(folders)}</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>"
            f"{''.join(keys)}{''.join(folders)}</ListBucketResult>"
        ).encode()


def main() -> None:
    """Serves until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--rate", type=float, default=0.0)
    arguments = parser.parse_args()
    with _Server(arguments.folder, arguments.latency, arguments.rate) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(server.server_address[1], flush=True)
        sys.stdin.buffer.read()
        server.shutdown()


if __name__ == "__main__":
    main()
