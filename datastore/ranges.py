"""Single ranges of objects, by the shortest way that a store's kind of storage has.

A local file is read in place. An object behind HTTP (S3 and its like) is read by plain ranged GETs of a signed URL, which
any fsspec file system that can sign gives: straight from the socket into one buffer, on a connection that is kept. The
same bytes through s3fs cost several times the CPU time. Everything else is read through fsspec.
"""

import email.utils
import errno
import http.client
import io
import os
import queue
import socket
import ssl
import struct
import threading
import time
import urllib.request
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, Protocol, TypeVar
from urllib.parse import SplitResult, urlsplit

from datastore.errors import DoNotRetry
from datastore.objects import ObjectFolder, http_status
from datastore.pieces import Pieces

_SIGNED_SECONDS: Final = 3600
_RENEW_SECONDS: Final = 600  # before a signature ends
_FRESH_SECONDS: Final = 60  # a signature this old may have ended before its time, with the credentials that made it
_MOST_SIGNED: Final = 4096  # URLs kept: a corpus may have millions of objects
_LATER_STATUS: Final = (408, 425, 429, 500, 502, 503, 504)
_TEMPORARY_REDIRECT: Final = 307  # of a bucket that is new: its name is not known everywhere yet
_EXPIRED_STATUS: Final = (400, 403)  # what servers say of a signature that has ended
_REGION_STATUS: Final = (301, 302, 307, 400)  # what S3 says of one that was made for another region
# of a local file; whatever else goes wrong may pass: disks of networks come back, and other threads close files
_FINAL_ERRORS: Final = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
_LEAST_BYTES: Final = 2**18  # that come within a time-out, or the answer's rest: else a trickle would never time out
_PIECE_BYTES: Final = 2**14  # from here on a read is of an answer's content, whose length is known
_HEAD_BYTES: Final = 2**13  # of an answer that are looked at together
_NEARLY: Final = (
    1.05  # a wait may last so much longer than it should: to tell the system takes as long as to read the head
)
_LONGEST_LINE, _MOST_FIELDS = 2**16, 100  # of an answer's head
_MOST_PIECES: Final = 1024  # of memory that the system fills in one call
_WHOLE_READ_TIMEOUTS: Final = 15  # a read through fsspec shows no single bytes: so many times as long as without one

T = TypeVar("T")


class Refused(Exception):
    """A range that did not come; `may_pass`: asking again may help, after the seconds that the server asked for."""

    def __init__(self, message: str, *, may_pass: bool, pause_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.may_pass = may_pass
        self.pause_seconds = pause_seconds
        self.happened = time.monotonic()


class Missing(Refused):
    """There is no such object."""

    def __init__(self) -> None:
        super().__init__("it is missing", may_pass=False)


class Call:
    """A read under way, which another thread may end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wake: Callable[[], None] | None = None
        self._ended = False

    def end(self) -> None:
        """Wakes the reading thread with a Refused, now or, where it just begins to connect, at the next call of this."""
        with self._lock:
            self._ended = True
            if self._wake is not None:
                self._wake()

    @property
    def has_ended(self) -> bool:
        """Whether nobody waits for the read any more."""
        return self._ended

    @contextmanager
    def woken_by(self, wake: Callable[[], None]) -> Iterator[None]:
        """Within the block, the read waits for something that this ends."""
        with self._lock:
            if self._ended:
                raise _given_up()
            outer, self._wake = self._wake, wake
        try:
            yield
        finally:
            with self._lock:
                self._wake = outer

    def apart(self, function: Callable[[], T], seconds: float) -> T:
        """What the function returns or raises, within so many seconds. Refused where it takes longer, or the call ends.

        For what nobody can wake: it has a thread of its own, which is left to itself then.
        """
        outcomes: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                outcomes.put((function(), None))
            except BaseException as error:  # noqa: BLE001  it is raised in the thread that waits
                outcomes.put((None, error))

        with self.woken_by(lambda: outcomes.put((None, _given_up()))):
            threading.Thread(target=run, name="read-apart", daemon=True).start()
            try:
                result, error = outcomes.get(timeout=seconds)
            except queue.Empty:
                raise Refused(f"TimeoutError: no answer within {seconds:g} s", may_pass=True) from None
        if error is not None:
            raise error
        return result  # type: ignore[return-value]  # where there is no error, there is a result


def _given_up() -> Refused:
    return Refused("it was given up", may_pass=False)


class Ranges(Protocol):
    """Reads ranges of objects. Threads share it."""

    is_local: bool

    def read(self, name: str, start: int, call: Call, target: Pieces) -> tuple[int, float]:
        """How many bytes from `start` on were put into the target, and the seconds to the first of them. Refused.

        Fewer than it has room for where the object is shorter and the storage does not say so.
        """
        ...

    def close(self) -> None:
        """Ends connections that are kept; no read is under way any more."""
        ...


def open_ranges(folder: ObjectFolder, timeout_seconds: float) -> Ranges:
    """The shortest way to a folder's objects."""
    if folder.is_local:
        return _LocalRanges(folder)
    url = folder.signed_url("zarr.json", _SIGNED_SECONDS)
    if url is not None and not _goes_through_a_proxy(urlsplit(url)):
        is_encrypted = url.startswith("https:")
        certificates = ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE")) if is_encrypted else None
        return _SignedRanges(folder, timeout_seconds, certificates)
    return _FolderRanges(folder, timeout_seconds)


def _filled(target: Pieces, read: Callable[[list[memoryview], int], int]) -> int:
    """How many bytes were put into the target by `read`, which is given pieces and the place of their first byte."""
    filled = 0
    while filled < target.num_bytes and (
        count := read(target.part(filled, target.num_bytes).memory(_MOST_PIECES), filled)
    ):
        filled += count
    return filled


def _filled_in_turn(target: Pieces, read: Callable[[memoryview], int]) -> int:
    """The same by a `read` that knows one piece of memory at a time."""
    filled = 0
    for piece in target.memory():
        at = 0
        while at < len(piece):
            count = read(piece[at:])
            if not count:
                return filled
            at += count
            filled += count
    return filled


class _LocalRanges:
    """Files on a disk."""

    is_local = True

    def __init__(self, folder: ObjectFolder) -> None:
        self._folder = folder.local_path

    def read(self, name: str, start: int, call: Call, target: Pieces) -> tuple[int, float]:
        try:
            descriptor = os.open(self._folder / name, os.O_RDONLY)
            try:
                return _filled(target, lambda rest, at: os.preadv(descriptor, rest, start + at)), 0.0
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            raise Missing() from None
        except OSError as error:
            raise Refused(f"it cannot be read: {error}", may_pass=error.errno not in _FINAL_ERRORS) from error

    def close(self) -> None:
        return


class _FolderRanges:
    """Anything that fsspec reads."""

    is_local = False

    def __init__(self, folder: ObjectFolder, timeout_seconds: float) -> None:
        self._folder = folder
        self._seconds = _WHOLE_READ_TIMEOUTS * timeout_seconds

    def read(self, name: str, start: int, call: Call, target: Pieces) -> tuple[int, float]:
        began = time.monotonic()
        with _refusing():
            content = call.apart(lambda: self._folder.read_range(name, start, start + target.num_bytes), self._seconds)
        if len(content) > target.num_bytes:
            raise Refused("the server ignores ranges", may_pass=False)
        target.fill(content)
        return len(content), time.monotonic() - began

    def close(self) -> None:
        return


@contextmanager
def _refusing() -> Iterator[None]:
    """Turns what fsspec's file systems raise into a Refused: they share no base, and few of them are OSErrors."""
    try:
        yield
    except Refused:
        raise
    except FileNotFoundError:
        raise Missing() from None
    except DoNotRetry as error:
        raise Refused(str(error), may_pass=False) from error
    except Exception as error:
        status = http_status(error)
        is_final = status is not None and 400 <= status < 500 and status not in _LATER_STATUS
        raise Refused(f"{type(error).__name__}: {error}", may_pass=not is_final) from error


class _Signed(NamedTuple):
    """A URL with a signature."""

    url: SplitResult
    at: float  # of the wall clock, as the signature's own end is: others stop while a laptop sleeps

    @property
    def age_seconds(self) -> float:
        return time.time() - self.at


class _SignedRanges:
    """Objects behind signed URLs."""

    is_local = False

    def __init__(self, folder: ObjectFolder, timeout_seconds: float, certificates: ssl.SSLContext | None) -> None:
        self._folder = folder
        self._certificates = certificates
        self._timeout_seconds = timeout_seconds
        self._signed: OrderedDict[str, _Signed] = OrderedDict()  # by object, signed longest ago first
        self._idle: list[_Connection] = []  # used last is last, and the next: the others may end
        self._lock = threading.Lock()

    def read(self, name: str, start: int, call: Call, target: Pieces) -> tuple[int, float]:
        end = start + target.num_bytes
        signed = self._signed_url(name, call)
        began = time.monotonic()
        connection = self._connection(signed.url)
        try:
            with connection.reading_for(call):
                response = _response(connection, signed.url, start, end, call)
                first_byte_seconds = time.monotonic() - began
                self._refuse_status(response, name, signed)
                _refuse_another_range(response, start, end)
                filled = response.fill(target)
                if filled < target.num_bytes:
                    raise Refused(f"the answer broke off after {filled:,} of {target.num_bytes:,} bytes", may_pass=True)
                if not response.isclosed():
                    connection.close()  # more follows: all of the object, or the end of its last chunk
        except ssl.SSLCertVerificationError as error:
            connection.close()
            raise Refused(
                f"its server's certificate is not trusted ({error.verify_message}); AWS_CA_BUNDLE names a file of those "
                f"that are",
                may_pass=False,
            ) from error
        except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: of a socket that was just ended
            connection.close()
            raise Refused(f"{type(error).__name__}: {error}", may_pass=True) from error
        except Refused:
            connection.close()
            raise
        with self._lock:
            self._idle.append(connection)
        return filled, first_byte_seconds

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def _refuse_status(self, response: http.client.HTTPResponse, name: str, signed: _Signed) -> None:
        status = response.status
        if status in (http.client.OK, http.client.PARTIAL_CONTENT):
            return
        region = response.headers.get("x-amz-bucket-region")
        if status in _REGION_STATUS and region is not None and f"%2F{region}%2Fs3%2F" not in signed.url.query:
            raise Refused(
                f"its bucket lies in region {region} (HTTP {status}): set AWS_DEFAULT_REGION={region}", may_pass=False
            )
        if status in _EXPIRED_STATUS:
            with self._lock:
                if self._signed.get(name) is signed:  # and no other read has renewed it meanwhile
                    del self._signed[name]
            # this very URL may have ended; a fresh one that is refused too is refused for good
            raise Refused(
                f"access is refused (HTTP {status}); check the credentials in the environment",
                may_pass=not 0 <= signed.age_seconds < _FRESH_SECONDS,
            )
        if status == http.client.NOT_FOUND:
            raise Missing()
        if status == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise Refused("it is shorter than its manifest says", may_pass=False)
        raise Refused(
            f"the server answers HTTP {status} {response.reason}",
            may_pass=status in (*_LATER_STATUS, _TEMPORARY_REDIRECT),
            pause_seconds=_seconds_from_now(response.headers.get("Retry-After")),
        )

    def _signed_url(self, name: str, call: Call) -> _Signed:
        with self._lock:
            found = self._signed.get(name)
        if found is not None and 0 <= found.age_seconds < _SIGNED_SECONDS - _RENEW_SECONDS:
            return found
        now = time.time()
        with _refusing():  # credentials may have to be fetched first
            url = call.apart(lambda: self._folder.signed_url(name, _SIGNED_SECONDS), self._timeout_seconds)
        assert url is not None, "this folder could sign when it was opened"
        signed = _Signed(urlsplit(url), now)
        with self._lock:
            self._signed[name] = signed
            self._signed.move_to_end(name)
            while len(self._signed) > _MOST_SIGNED:
                self._signed.popitem(last=False)
        return signed

    def _connection(self, url: SplitResult) -> "_Connection":
        """A connection, kept from an earlier request where there is one."""
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return _Connection(url, self._timeout_seconds, self._certificates)


@dataclass
class _LongestWait:
    """How long the system lets a connection's socket wait for bytes, as far as it was told."""

    seconds: float = 0.0


class _Incoming(io.RawIOBase):
    """What the other side sends, as long as enough of it comes."""

    def __init__(
        self, sock: socket.socket, timeout_seconds: float, wait: "_LongestWait", file: io.BufferedIOBase
    ) -> None:
        self._sock, self._timeout_seconds = sock, timeout_seconds
        self._wait = wait
        self._file = file  # as long as it is open, a connection that ends with its answer stays open for that
        self.is_encrypted = isinstance(sock, ssl.SSLSocket)
        self._began, self._num_bytes = time.monotonic(), 0

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, target: Any) -> int:
        return self.fill([memoryview(target)])

    def fill(self, pieces: list[memoryview]) -> int:
        """How many bytes came; as many as there is room for, where that is much and nothing goes wrong."""
        if self._num_bytes >= _LEAST_BYTES:
            self._began, self._num_bytes = time.monotonic(), 0
        left_seconds = self._began + self._timeout_seconds - time.monotonic()
        if left_seconds <= 0:
            raise self._too_little()
        if self.is_encrypted:
            self._sock.settimeout(left_seconds)
            count = self._sock.recv_into(pieces[0])
        else:
            # the system waits, until all is there: a thread that wakes for each piece fights the others for Python
            if not left_seconds <= self._wait.seconds <= _NEARLY * left_seconds:
                _limit_waits(self._sock, socket.SO_RCVTIMEO, left_seconds)
                self._wait.seconds = left_seconds
            flags = socket.MSG_WAITALL if len(pieces) > 1 or len(pieces[0]) > _PIECE_BYTES else 0
            try:
                count = self._sock.recvmsg_into(pieces, 0, flags)[0]
            except BlockingIOError:
                raise self._too_little() from None
        self._num_bytes += count
        return count

    def _too_little(self) -> TimeoutError:
        return TimeoutError(f"{self._num_bytes:,} bytes came within {self._timeout_seconds:g} s")


class _Response(http.client.HTTPResponse):
    """An answer; its content goes from the socket to where it belongs, without a copy between."""

    def __init__(self, sock: socket.socket, timeout_seconds: float, wait: "_LongestWait") -> None:
        super().__init__(sock, method="GET")
        self._incoming = _Incoming(sock, timeout_seconds, wait, self.fp)
        self.fp = io.BufferedReader(self._incoming, _HEAD_BYTES)

    def begin(self) -> None:
        """Reads the head, as the base class does. That has each head parsed as an e-mail, which takes longer than all else."""
        self.status = http.client.CONTINUE
        while self.status == http.client.CONTINUE:
            line = self._line()
            if not line:
                raise http.client.RemoteDisconnected("the server ended the connection without an answer")
            version, status, self.reason = [*line.split(maxsplit=2), "", "", ""][:3]
            if not version.startswith("HTTP/1.") or not status.isdecimal() or len(status) != 3:
                raise http.client.BadStatusLine(line)
            self.code = self.status = int(status)
            self.headers = self.msg = self._fields()
        self.reason = self.reason.strip()
        self.version = 10 if version == "HTTP/1.0" else 11
        self.chunked = self.headers.get("Transfer-Encoding", "").lower() == "chunked"
        self.chunk_left = None
        length = self.headers.get("Content-Length", "")
        self.length = int(length) if length.isdecimal() and not self.chunked else None
        kept = self.headers.get("Connection", "close" if self.version == 10 else "").lower()
        self.will_close = "close" in kept or (self.length is None and not self.chunked)

    def _fields(self) -> http.client.HTTPMessage:
        found, name = http.client.HTTPMessage(), ""
        while (line := self._line()).strip():
            if line[0] in " \t" and name:  # it goes on with the field before
                found.replace_header(name, f"{found[name]} {line.strip()}")
                continue
            name, colon, value = line.partition(":")
            if not colon or len(found) == _MOST_FIELDS:
                raise http.client.HTTPException(f"{line[:80]!r} in the head of its answer")
            found[name] = value.strip()
        return found

    def _line(self) -> str:
        line = self.fp.readline(_LONGEST_LINE + 1)
        if len(line) > _LONGEST_LINE:
            raise http.client.LineTooLong("the head of the answer")
        return line.decode("latin-1")

    def fill(self, target: Pieces) -> int:
        """How many bytes of the content were put into the target."""
        if self.chunked or self.length is None or self._incoming.is_encrypted:
            return _filled_in_turn(target, self.readinto)
        early = self.read1(_HEAD_BYTES)  # what came with the head
        target.fill(early)
        following = target.part(len(early), min(target.num_bytes, len(early) + self.length))
        came = _filled(following, lambda pieces, _: self._incoming.fill(pieces))
        self.length -= came
        if not self.length:
            self.close()  # the connection stays
        return min(len(early), target.num_bytes) + came


class _Connection(http.client.HTTPConnection):
    """A connection that another thread can wake, while it is being made too: its socket is known from the start."""

    def __init__(self, url: SplitResult, timeout_seconds: float, certificates: ssl.SSLContext | None) -> None:
        super().__init__(url.hostname or "", url.port or (443 if certificates else 80), timeout=timeout_seconds)
        self._certificates = certificates
        self._timeout_seconds = timeout_seconds
        self._call = Call()
        self._answer: _Response | None = None
        self._wait = _LongestWait()

    def ask(self, target: str, headers: dict[str, str]) -> _Response:
        """The head of the answer to a GET."""
        if isinstance(self.sock, ssl.SSLSocket):
            self.sock.settimeout(self._timeout_seconds)  # which the answer before has used up
        if self.sock is None:
            self.connect()
        lines = [f"GET {target} HTTP/1.1", *map(": ".join, headers.items()), "Accept-Encoding: identity", "", ""]
        self.sock.sendall("\r\n".join(lines).encode("ascii"))
        self._answer = response = _Response(self.sock, self._timeout_seconds, self._wait)
        try:
            response.begin()
        except BaseException:
            response.close()
            raise
        if response.will_close:
            super().close()  # the answer keeps the socket until it is read
        return response

    def close(self) -> None:
        super().close()
        if self._answer is not None:
            self._answer.close()  # which lets go of the socket
            self._answer = None

    @contextmanager
    def reading_for(self, call: Call) -> Iterator[None]:
        """Within the block, the connection serves this call, and ends with it."""
        self._call = call
        try:
            with call.woken_by(self.wake):
                yield
        finally:
            if call.has_ended:
                self.close()

    def connect(self) -> None:
        addresses = self._call.apart(
            lambda: socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM), self._timeout_seconds
        )
        refusal = OSError(f"{self.host} has no address")
        for family, kind, protocol, _, address in addresses:
            try:
                self.sock = socket.socket(family, kind, protocol)
                self.sock.settimeout(self.timeout)
                self.sock.connect(address)
                break
            except OSError as error:
                refusal = error
                self.close()
        else:
            raise refusal
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._wait = _LongestWait()
        if self._certificates is None:
            self.sock.settimeout(None)
            _limit_waits(self.sock, socket.SO_SNDTIMEO, self._timeout_seconds)
        else:
            # while it is wrapped, there is no socket to wake
            encrypted = self.sock = self._certificates.wrap_socket(
                self.sock, server_hostname=self.host, do_handshake_on_connect=False
            )
            if self._call.has_ended:
                raise _given_up()
            encrypted.do_handshake()

    def wake(self) -> None:
        """Ends a wait for the other side. Closing the socket would not."""
        sock = self.sock
        if sock is not None:
            with suppress(OSError):  # it has ended by itself
                # not its own `shutdown`, which also takes TLS away from under the reader: ciphertext would be content
                socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _limit_waits(sock: socket.socket, direction: int, seconds: float) -> None:
    """Has the system end waits of a blocking socket."""
    whole = int(seconds)
    timeval = struct.pack("@ll", whole, max(1, int((seconds - whole) * 1e6)))  # all zero would mean for ever
    sock.setsockopt(socket.SOL_SOCKET, direction, timeval)


def _response(connection: _Connection, url: SplitResult, start: int, end: int, call: Call) -> _Response:
    """The server's answer, as far as its head."""
    target = f"{url.path}?{url.query}" if url.query else url.path
    headers = {"Host": url.netloc, "Range": f"bytes={start}-{end - 1}"}
    was_kept = connection.sock is not None
    try:
        return connection.ask(target, headers)
    except (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError, http.client.BadStatusLine):
        if not was_kept or call.has_ended:
            raise
    connection.close()  # servers end connections that were idle for a while: that is no trouble
    return connection.ask(target, headers)


def _refuse_another_range(response: http.client.HTTPResponse, start: int, end: int) -> None:
    if response.status == http.client.OK and start:
        raise Refused("the server ignores ranges", may_pass=False)
    asked = f"bytes {start}-{end - 1}"
    sent = response.headers.get("Content-Range", asked)
    if response.status == http.client.PARTIAL_CONTENT and sent.partition("/")[0] != asked:
        raise Refused(f"it is shorter than its manifest says: asked for {asked}, it has {sent}", may_pass=False)


def _seconds_from_now(retry_after: str | None) -> float:
    """What a Retry-After header asks for: it names seconds or a date."""
    if retry_after is None:
        return 0.0
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        when = email.utils.parsedate_to_datetime(retry_after)
    except ValueError:
        return 0.0
    return max(0.0, (when.astimezone(UTC) - datetime.now(UTC)).total_seconds())


def _goes_through_a_proxy(url: SplitResult) -> bool:
    """Whether the environment says so: then fsspec, which knows proxies, reads."""
    return url.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(url.hostname or "")
