"""Single ranges of objects, by the shortest way that a store's kind of storage has.

A local file is read in place. An object behind HTTP (S3 and its like) is read by plain ranged GETs of a signed URL, which
any fsspec file system that can sign gives: straight from the socket into one buffer, on a connection that is kept. The
same bytes through s3fs cost several times the CPU time. Everything else is read through fsspec.
"""

import http.client
import os
import ssl
import threading
import time
import urllib.request
from typing import Final, Protocol
from urllib.parse import SplitResult, urlsplit

from datastore.errors import ViewpointError
from datastore.objects import ObjectFolder

_SIGNED_SECONDS: Final = 3600
_RENEW_SECONDS: Final = 600  # before a signature ends
_LATER_STATUS: Final = (408, 425, 429, 500, 502, 503, 504)
_EXPIRED_STATUS: Final = (400, 403)  # what servers say of a signature that has ended


class Refused(Exception):
    """A range that did not come; `may_pass`: asking again later may help."""

    def __init__(self, message: str, *, may_pass: bool) -> None:
        super().__init__(message)
        self.may_pass = may_pass


class Ranges(Protocol):
    """Reads ranges of objects. Threads share it."""

    is_local: bool

    def read(self, name: str, start: int, end: int) -> bytes | bytearray:
        """The bytes from `start` up to, not including, `end`; fewer where the object is shorter. Refused."""
        ...

    def timed_read(self, name: str, start: int, end: int) -> tuple[bytes | bytearray, float]:
        """The same, and the seconds to the first byte."""
        ...

    def close(self) -> None:
        """Ends what is under way."""
        ...


def open_ranges(folder: ObjectFolder, timeout_seconds: float) -> Ranges:
    """The shortest way to a folder's objects."""
    if folder.is_local:
        return _LocalRanges(folder)
    url = folder.signed_url("zarr.json", _SIGNED_SECONDS)
    if url is not None and not _goes_through_a_proxy(urlsplit(url)):
        return _SignedRanges(folder, timeout_seconds)
    return _FolderRanges(folder)


class _LocalRanges:
    """Files on a disk."""

    is_local = True

    def __init__(self, folder: ObjectFolder) -> None:
        self._folder = folder.local_path

    def read(self, name: str, start: int, end: int) -> bytes:
        try:
            descriptor = os.open(self._folder / name, os.O_RDONLY)
        except FileNotFoundError:
            raise Refused("it is missing", may_pass=False) from None
        except OSError as error:
            raise Refused(f"it cannot be opened: {error}", may_pass=False) from error
        try:
            return os.pread(descriptor, end - start, start)
        except OSError as error:
            raise Refused(f"it cannot be read: {error}", may_pass=True) from error
        finally:
            os.close(descriptor)

    def timed_read(self, name: str, start: int, end: int) -> tuple[bytes, float]:
        return self.read(name, start, end), 0.0

    def close(self) -> None:
        return


class _FolderRanges:
    """Anything that fsspec reads."""

    is_local = False

    def __init__(self, folder: ObjectFolder) -> None:
        self._folder = folder

    def read(self, name: str, start: int, end: int) -> bytes:
        try:
            return self._folder.read_range(name, start, end)
        except FileNotFoundError:
            raise Refused("it is missing", may_pass=False) from None
        except ViewpointError as error:
            raise Refused(str(error), may_pass=False) from error
        except (OSError, TimeoutError) as error:
            raise Refused(f"{type(error).__name__}: {error}", may_pass=True) from error

    def timed_read(self, name: str, start: int, end: int) -> tuple[bytes, float]:
        began = time.monotonic()
        content = self.read(name, start, end)
        return content, time.monotonic() - began

    def close(self) -> None:
        return


class _SignedRanges:
    """Objects behind signed URLs."""

    is_local = False

    def __init__(self, folder: ObjectFolder, timeout_seconds: float) -> None:
        self._folder = folder
        self._timeout_seconds = timeout_seconds
        self._signed: dict[str, tuple[SplitResult, float]] = {}
        self._own = threading.local()
        self._connections: set[http.client.HTTPConnection] = set()
        self._lock = threading.Lock()
        self._closed = False

    def read(self, name: str, start: int, end: int) -> bytes | bytearray:
        return self.timed_read(name, start, end)[0]

    def timed_read(self, name: str, start: int, end: int) -> tuple[bytes | bytearray, float]:
        url = self._url(name)
        began = time.monotonic()
        connection = self._connection(url)
        try:
            target = f"{url.path}?{url.query}" if url.query else url.path
            connection.request("GET", target, headers={"Range": f"bytes={start}-{end - 1}"})
            with connection.getresponse() as response:
                first_byte_seconds = time.monotonic() - began
                self._refuse_status(response, name)
                if response.status == http.client.OK and start:
                    raise Refused("the server ignores ranges", may_pass=False)
                content = bytearray(end - start)
                view, filled = memoryview(content), 0
                while filled < len(content) and (count := response.readinto(view[filled:])):
                    filled += count
                if response.status == http.client.OK:
                    self._forget(connection)  # more bytes follow than were asked for
        except (OSError, http.client.HTTPException) as error:
            self._forget(connection)
            raise Refused(f"{type(error).__name__}: {error}", may_pass=True) from error
        except Refused:
            self._forget(connection)
            raise
        del view
        return content if filled == len(content) else bytes(content[:filled]), first_byte_seconds

    def close(self) -> None:
        with self._lock:
            self._closed = True
            connections = list(self._connections)
        for connection in connections:
            sock = connection.sock
            if sock is not None:
                try:
                    sock.shutdown(2)  # wakes a thread that waits for bytes; closing alone would not
                except OSError:
                    continue  # it has ended by itself

    def _refuse_status(self, response: http.client.HTTPResponse, name: str) -> None:
        status = response.status
        if status in (http.client.OK, http.client.PARTIAL_CONTENT):
            return
        if status in _EXPIRED_STATUS:
            with self._lock:
                renewed = self._signed.pop(name, None)
            # the same URL may just have ended; a fresh one that is refused too is refused for good
            may_pass = renewed is not None and renewed[1] - time.monotonic() < _SIGNED_SECONDS - _RENEW_SECONDS
            raise Refused(
                f"access is refused (HTTP {status}); check the credentials in the environment", may_pass=may_pass
            )
        if status == http.client.NOT_FOUND:
            raise Refused("it is missing", may_pass=False)
        if status == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise Refused("it is shorter than its manifest says", may_pass=False)
        raise Refused(f"the server answers HTTP {status} {response.reason}", may_pass=status in _LATER_STATUS)

    def _url(self, name: str) -> SplitResult:
        with self._lock:
            signed, ends = self._signed.get(name, (None, 0.0))
        if signed is None or ends - time.monotonic() < _RENEW_SECONDS:
            url = self._folder.signed_url(name, _SIGNED_SECONDS)
            assert url is not None, "this folder could sign when it was opened"
            signed = urlsplit(url)
            with self._lock:
                self._signed[name] = signed, time.monotonic() + _SIGNED_SECONDS
        return signed

    def _connection(self, url: SplitResult) -> http.client.HTTPConnection:
        """This thread's connection, kept from request to request."""
        found: http.client.HTTPConnection | None = getattr(self._own, "connection", None)
        if found is not None:
            return found
        if url.scheme == "https":
            context = ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE"))
            found = http.client.HTTPSConnection(url.netloc, timeout=self._timeout_seconds, context=context)
        else:
            found = http.client.HTTPConnection(url.netloc, timeout=self._timeout_seconds)
        self._own.connection = found
        with self._lock:
            self._connections.add(found)
            closed = self._closed
        if closed:
            raise Refused("the stream was closed", may_pass=False)
        return found

    def _forget(self, connection: http.client.HTTPConnection) -> None:
        connection.close()
        self._own.connection = None
        with self._lock:
            self._connections.discard(connection)


def _goes_through_a_proxy(url: SplitResult) -> bool:
    """Whether the environment says so: then fsspec, which knows proxies, reads."""
    return url.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(url.hostname or "")
