"""Single ranges by signed HTTP, TLS, local files and fsspec: what is final, what may pass, and what wakes a read."""

import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException, HTTPResponse
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore.errors import StoreError, ViewpointError
from datastore.fetch import FetchConfig, Fetcher, FetchFailed
from datastore.objects import ObjectFolder
from datastore.pieces import Pieces
from datastore.ranges import Call, Refused, _LongestWait, _Response, open_ranges
from tests.range_server import (
    CONTENT,
    Answer,
    Handler,
    RangeServer,
    ServedFolder,
    broken_off,
    hung,
    hung_in_the_middle,
    no_http,
    reset,
    right,
    self_signed,
    status,
)

PART = 10_000
CLOSING_SECONDS = 2.0


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    started = RangeServer()
    yield started
    started.close()


def fetched(fetcher: Fetcher, start: int, end: int) -> bytes:
    return bytes(
        fetcher.fetch("shard", start, end, lambda found: None if bytes(found) == CONTENT[start:end] else "damaged")
    )


def wait_until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come to this"
        time.sleep(0.01)


# Signatures


class EndingFolder(ServedFolder):
    """Objects behind URLs of which each has another signature, 1, 2 and so on; the first is made to try."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.num_signed = -1

    def signed_url(self, name: str, seconds: int) -> str:
        self.num_signed += 1
        return f"{self.url}/{name}?signature={self.num_signed}"


def signature_of(handler: Handler) -> int:
    return int(handler.path.partition("signature=")[2])


@pytest.fixture
def ending(server: RangeServer) -> Iterator[tuple[EndingFolder, Fetcher]]:
    """A folder, and a fetcher that has already read by signature 1."""
    folder = EndingFolder(server.url)
    fetcher = Fetcher(folder, FetchConfig(part_mib=PART / 2**20, retry_seconds=20, hedge_least_seconds=20))
    assert fetched(fetcher, 0, 100) == CONTENT[:100]
    assert folder.num_signed == 1
    yield folder, fetcher
    fetcher.close()


def let_pass(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """As while a laptop sleeps: the wall clock goes on, the monotonic one does not."""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + seconds)


def refusing_the_first(handler: Handler, content: bytes) -> None:
    (status(403) if signature_of(handler) == 1 else right)(handler, content)


def test_a_signature_is_renewed_before_its_end(
    ending: tuple[EndingFolder, Fetcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, fetcher = ending
    let_pass(monkeypatch, 2900)
    assert fetched(fetcher, 0, 100) == CONTENT[:100]
    assert folder.num_signed == 1
    let_pass(monkeypatch, 200)
    for _ in range(2):
        assert fetched(fetcher, 0, 100) == CONTENT[:100]
        assert folder.num_signed == 2


def test_requests_that_share_a_signature_that_has_ended_all_go_on(
    server: RangeServer, ending: tuple[EndingFolder, Fetcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    meeting = threading.Barrier(4, timeout=10)

    def together(handler: Handler, content: bytes) -> None:
        if signature_of(handler) == 1:
            meeting.wait()
        refusing_the_first(handler, content)

    server.script = lambda number: together
    let_pass(monkeypatch, 600)
    assert fetched(ending[1], 0, 4 * PART) == CONTENT[: 4 * PART]
    assert ending[1].retries == 4


def test_a_late_refusal_leaves_the_signature_that_came_after(
    server: RangeServer, ending: tuple[EndingFolder, Fetcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, fetcher = ending
    arrived, renewed = threading.Event(), threading.Event()

    def late(handler: Handler, content: bytes) -> None:
        arrived.set()
        assert renewed.wait(10)
        status(403)(handler, content)

    server.script = lambda number: late if number == 1 else refusing_the_first
    let_pass(monkeypatch, 600)
    with ThreadPoolExecutor(1) as reader:
        read = reader.submit(fetched, fetcher, 0, 100)
        assert arrived.wait(10)
        assert fetched(fetcher, 100, 200) == CONTENT[100:200]
        renewed.set()
        assert read.result(10) == CONTENT[:100]
    assert folder.num_signed == 2


def test_access_that_is_withdrawn_meanwhile_is_final_when_a_fresh_signature_is_refused_too(
    server: RangeServer, ending: tuple[EndingFolder, Fetcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.script = lambda number: status(403)
    let_pass(monkeypatch, 600)
    with pytest.raises(FetchFailed, match="check the credentials") as raised:
        fetched(ending[1], 0, 100)
    assert not raised.value.may_pass
    assert len(server.asked) == 3


def test_no_more_signatures_are_kept_than_a_bound(
    server: RangeServer, ending: tuple[EndingFolder, Fetcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, fetcher = ending
    monkeypatch.setattr("datastore.ranges._MOST_SIGNED", 2)
    for name in ("b", "c", "d", "d", "c", "b"):
        fetcher.fetch(name, 0, 10, lambda found: None)
    assert folder.num_signed == 5, "only the one that was signed longest ago is signed again"


@pytest.mark.parametrize("number", [301, 307, 400])
def test_a_bucket_in_another_region_is_an_error_that_says_what_to_set(
    server: RangeServer, ending: tuple[EndingFolder, Fetcher], number: int
) -> None:
    server.script = lambda _: status(number, x_amz_bucket_region="eu-west-1")
    with pytest.raises(FetchFailed, match=r"lies in region eu-west-1 .*set AWS_DEFAULT_REGION=eu-west-1") as raised:
        fetched(ending[1], 0, 100)
    assert not raised.value.may_pass


def test_a_new_bucket_that_is_not_known_everywhere_yet_is_asked_again(
    server: RangeServer, ending: tuple[EndingFolder, Fetcher]
) -> None:
    server.script = lambda number: status(307) if number == 1 else right
    assert fetched(ending[1], 0, 100) == CONTENT[:100]


class PayloadError(Exception):
    """Like aiohttp's and gcsfs', no OSError."""

    def __init__(self, code: int | None = None) -> None:
        super().__init__("the payload is not complete")
        self.code = code


class TroubledFolder(ServedFolder):
    """Objects behind URLs whose signing, but for the first of all, goes by the script."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.failures: list[Exception] = []
        self.may_sign = threading.Event()
        self.may_sign.set()

    def signed_url(self, name: str, seconds: int) -> str:
        self.may_sign.wait(30)
        if self.failures:
            raise self.failures.pop()
        return super().signed_url(name, seconds)


@pytest.mark.parametrize(
    "failure", [ViewpointError("the server of credentials does not answer"), PayloadError(500), OSError(5, "")]
)
def test_credentials_that_cannot_be_had_for_a_moment_are_asked_for_again(
    server: RangeServer, failure: Exception
) -> None:
    folder = TroubledFolder(server.url)
    fetcher = Fetcher(folder, FetchConfig(part_mib=PART / 2**20))
    folder.failures = [failure] * 3
    assert fetched(fetcher, 0, 3 * PART) == CONTENT[: 3 * PART]
    assert fetcher.retries >= 3
    fetcher.close()


def test_credentials_that_are_gone_end_every_part_of_the_range(server: RangeServer) -> None:
    folder = TroubledFolder(server.url)
    fetcher = Fetcher(folder, FetchConfig(part_mib=PART / 2**20))
    folder.failures = [StoreError("There are no credentials")] * 3
    with pytest.raises(FetchFailed, match="no credentials") as raised:
        fetched(fetcher, 0, 3 * PART)
    assert not raised.value.may_pass
    fetcher.close()


def test_signing_that_hangs_is_tried_again_and_kept_from_no_closing(server: RangeServer) -> None:
    folder = TroubledFolder(server.url)
    fetcher = Fetcher(folder, FetchConfig(timeout_seconds=0.1))
    folder.may_sign.clear()
    with ThreadPoolExecutor(1) as reader:
        read = reader.submit(fetched, fetcher, 0, 100)
        wait_until(lambda: fetcher.retries >= 2)
        started = time.monotonic()
        fetcher.close()
        assert isinstance(read.exception(CLOSING_SECONDS), FetchFailed)
        assert time.monotonic() - started < CLOSING_SECONDS
    folder.may_sign.set()


def test_a_name_that_is_not_resolved_for_a_while_holds_up_no_closing(
    server: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, may_answer = threading.Event(), threading.Event()

    def hanging(*arguments: object, **options: object) -> list[object]:
        asked.set()
        may_answer.wait(30)
        return []

    fetcher = Fetcher(ServedFolder(server.url))
    monkeypatch.setattr("datastore.ranges.socket.getaddrinfo", hanging)
    with ThreadPoolExecutor(1) as reader:
        read = reader.submit(fetched, fetcher, 0, 100)
        assert asked.wait(10)
        started = time.monotonic()
        fetcher.close()
        assert isinstance(read.exception(CLOSING_SECONDS), FetchFailed)
        assert time.monotonic() - started < CLOSING_SECONDS
    may_answer.set()


# Answers


def test_answers_in_chunks_and_whole_objects_are_taken_too(server: RangeServer) -> None:
    def in_chunks(handler: Handler, content: bytes) -> None:
        handler.send_response(206)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for start in range(0, len(content), 30):
            piece = content[start : start + 30]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        handler.wfile.write(b"0\r\n\r\n")

    def whole(handler: Handler, content: bytes) -> None:
        handler.begin(200, len(CONTENT))
        handler.wfile.write(CONTENT)

    server.script = lambda number: whole if number % 2 else in_chunks
    fetcher = Fetcher(ServedFolder(server.url))
    for _ in range(4):
        assert fetched(fetcher, 0, 100) == CONTENT[:100]
    assert fetcher.retries == 0
    fetcher.close()


# TLS, the only way to Amazon's S3


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return self_signed(tmp_path_factory.mktemp("certificate"))


@pytest.fixture
def secure(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    """A server behind TLS whose certificate is trusted."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    started = RangeServer(certificate)
    yield started
    started.close()


def test_ranges_come_through_tls_on_connections_that_are_kept(secure: RangeServer) -> None:
    fetcher = Fetcher(ServedFolder(secure.url), FetchConfig(part_mib=PART / 2**20, requests_near=2, requests_far=2))
    for _ in range(4):
        assert fetched(fetcher, 5, 4 * PART) == CONTENT[5 : 4 * PART]
    assert fetcher.retries == 0
    assert len(secure.asked) == 16
    fetcher.close()


@pytest.mark.parametrize("answer", [broken_off, reset, status(503), no_http], ids=["off", "reset", "503", "no http"])
def test_what_goes_wrong_for_a_while_behind_tls_is_tried_again(secure: RangeServer, answer: Answer) -> None:
    secure.fails(2, answer)
    fetcher = Fetcher(ServedFolder(secure.url))
    assert fetched(fetcher, 100, 2000) == CONTENT[100:2000]
    assert fetcher.retries == 2
    fetcher.close()


def test_a_connection_behind_tls_that_ended_while_idle_is_no_trouble(secure: RangeServer) -> None:
    def last(handler: Handler, content: bytes) -> None:
        right(handler, content)
        handler.close_connection = True

    secure.script = lambda number: last
    fetcher = Fetcher(ServedFolder(secure.url), FetchConfig(requests_near=1, requests_far=1))
    for _ in range(4):
        assert fetched(fetcher, 0, 100) == CONTENT[:100]
        time.sleep(0.02)
    assert fetcher.retries == 0
    fetcher.close()


def test_a_certificate_that_is_not_trusted_is_an_error_at_once(
    secure: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_CA_BUNDLE")
    fetcher = Fetcher(ServedFolder(secure.url))
    with pytest.raises(FetchFailed, match=r"certificate is not trusted \(.*\); AWS_CA_BUNDLE names") as raised:
        fetched(fetcher, 0, 100)
    assert not raised.value.may_pass
    fetcher.close()


@pytest.mark.parametrize("answer", [hung, hung_in_the_middle], ids=["hung", "in the middle"])
def test_closing_ends_what_is_under_way_behind_tls(secure: RangeServer, answer: Answer) -> None:
    secure.script = lambda number: answer
    fetcher = Fetcher(ServedFolder(secure.url), FetchConfig(part_mib=PART / 2**20))
    with ThreadPoolExecutor(1) as reader:
        read = reader.submit(fetched, fetcher, 0, 8 * PART)
        wait_until(lambda: len(secure.asked) == 8)
        started = time.monotonic()
        fetcher.close()
        assert isinstance(read.exception(CLOSING_SECONDS), FetchFailed)
        assert time.monotonic() - started < CLOSING_SECONDS


def chunked(handler: Handler, content: bytes) -> None:
    handler.send_response(206)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    for at in range(0, len(content), 700):
        piece = content[at : at + 700]
        handler.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
    handler.wfile.write(b"0\r\n\r\n")


def in_two_goes(handler: Handler, content: bytes) -> None:
    handler.begin(206, len(content))
    handler.wfile.write(content[:1000])
    time.sleep(0.05)
    handler.wfile.write(content[1000:])


def then_closed(handler: Handler, content: bytes) -> None:
    handler.begin(206, len(content), Connection="close")
    handler.wfile.write(content)
    handler.close_connection = True


def all_of_it(handler: Handler, content: bytes) -> None:
    handler.begin(200, len(CONTENT))
    handler.wfile.write(CONTENT)


@pytest.mark.parametrize("answer", [right, chunked, in_two_goes, then_closed, all_of_it])
@pytest.mark.parametrize("cuts", [0, 5, 3000])
@pytest.mark.parametrize("by", ["server", "secure"])
def test_bytes_go_to_their_places_however_those_are_cut_and_however_they_come(
    request: pytest.FixtureRequest, by: str, cuts: int, answer: Answer
) -> None:
    served: RangeServer = request.getfixturevalue(by)
    served.script = lambda number: answer
    ranges = open_ranges(ServedFolder(served.url), 5.0)
    end = len(CONTENT) // 2
    bounds = [0, *sorted(np.random.default_rng(cuts).integers(0, end, cuts).tolist()), end]  # some places are empty
    for _ in range(3):  # on one connection, where it stays
        own = [memoryview(bytearray(last - first)) for first, last in pairwise(bounds)]
        assert ranges.read("shard", 0, Call(), Pieces(own))[0] == end
        assert b"".join(own) == CONTENT[:end]
    assert len(served.connections) == (3 if answer in (chunked, then_closed, all_of_it) else 1)
    ranges.close()


def test_a_server_that_ignores_ranges_is_named_whatever_reads_it(
    server: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Whole(ServedFolder):
        def signed_url(self, name: str, seconds: int) -> None:
            return None  # so that fsspec reads

        def read_range(self, name: str, start: int, end: int) -> bytes:
            return CONTENT

    for parts in (1, 3):
        config = FetchConfig(part_mib=len(CONTENT) / 2 / parts / 2**20)
        fetcher = Fetcher(Whole(server.url), config)
        with pytest.raises(FetchFailed, match="ignores ranges"):
            fetcher.fetch("shard", 0, len(CONTENT) // 2, lambda _: None)
        fetcher.close()


def test_closing_ends_a_handshake_that_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        fetcher = Fetcher(ServedFolder(f"https://127.0.0.1:{silent.getsockname()[1]}"))
        with ThreadPoolExecutor(1) as reader:
            read = reader.submit(fetched, fetcher, 0, 100)
            connection, _ = silent.accept()
            with connection:
                connection.recv(1)
                started = time.monotonic()
                fetcher.close()
                assert isinstance(read.exception(CLOSING_SECONDS), FetchFailed)
                assert time.monotonic() - started < CLOSING_SECONDS


def test_a_read_that_is_ended_in_the_middle_takes_no_ciphertext_for_content(
    secure: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, whole = Call(), len(CONTENT)
    ranges = open_ranges(ServedFolder(secure.url), 5.0)
    content = bytearray(whole)

    def end_after_the_head(*head: object) -> None:
        wait_until(lambda: secure.under_way == 0)  # all of the answer is in this side's memory
        call.end()

    monkeypatch.setattr("datastore.ranges._refuse_another_range", end_after_the_head)
    try:
        ranges.read("shard", 0, call, Pieces([memoryview(content)]))
    except Refused:
        pass
    else:
        assert content == CONTENT
    monkeypatch.undo()
    content = bytearray(whole)
    ranges.read("shard", 0, Call(), Pieces([memoryview(content)]))
    assert content == CONTENT
    assert len(secure.connections) == 2, "the one that was ended is not used again"
    ranges.close()


# Local files


def test_a_local_file_that_fails_for_a_moment_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shard").write_bytes(CONTENT)
    fetcher = Fetcher(ObjectFolder(tmp_path))
    failures, opened = [errno.ESTALE, errno.EIO, errno.EMFILE], os.open

    def failing(path: Path, flags: int) -> int:
        if failures:
            raise OSError(failures.pop(), "not now")
        return opened(path, flags)

    monkeypatch.setattr("datastore.ranges.os.open", failing)
    assert fetched(fetcher, 0, 100) == CONTENT[:100]
    assert fetcher.retries == 3


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_a_local_file_that_may_not_be_read_is_an_error_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refused(path: Path, flags: int) -> int:
        raise OSError(number, os.strerror(number))

    fetcher = Fetcher(ObjectFolder(tmp_path))
    monkeypatch.setattr("datastore.ranges.os.open", refused)
    with pytest.raises(FetchFailed, match=os.strerror(number)) as raised:
        fetched(fetcher, 0, 100)
    assert not raised.value.may_pass


@pytest.mark.parametrize(("name", "says"), [("shard", "Is a directory"), ("file/shard", "Not a directory")])
def test_what_is_no_file_is_an_error_at_once(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "shard").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(FetchFailed, match=says) as raised:
        Fetcher(ObjectFolder(tmp_path)).fetch(name, 0, 10, lambda found: None)
    assert not raised.value.may_pass


# Through fsspec


class UnsignedFolder(ServedFolder):
    """Objects that only fsspec can read, as behind a proxy; `failures` come first."""

    def __init__(self, *failures: Exception) -> None:
        super().__init__("gs://bucket")
        self.failures = list(failures)
        self.hangs_until = threading.Event()
        self.hangs_until.set()

    def signed_url(self, name: str, seconds: int) -> None:  # type: ignore[override]
        return None

    def read_range(self, name: str, start: int, end: int) -> bytes:
        self.hangs_until.wait(30)
        if self.failures:
            raise self.failures.pop(0)
        return CONTENT[start:end]


@pytest.mark.parametrize(
    "failure",
    [
        ViewpointError("gs://bucket cannot be reached"),
        PayloadError(),
        PayloadError(503),
        TimeoutError(),
        OSError(5, ""),
    ],
    ids=["unreachable", "payload", "503", "time-out", "error of the system"],
)
def test_what_goes_wrong_for_a_moment_behind_fsspec_is_tried_again(failure: Exception) -> None:
    fetcher = Fetcher(UnsignedFolder(failure, failure))
    assert fetched(fetcher, 0, 100) == CONTENT[:100]
    assert fetcher.retries == 2
    fetcher.close()


@pytest.mark.parametrize(
    "failure", [StoreError("Access is refused"), PayloadError(403), FileNotFoundError()], ids=["refused", "403", "gone"]
)
def test_what_no_second_read_mends_behind_fsspec_is_an_error_at_once(failure: Exception) -> None:
    fetcher = Fetcher(UnsignedFolder(failure))
    with pytest.raises(FetchFailed) as raised:
        fetched(fetcher, 0, 100)
    assert not raised.value.may_pass
    fetcher.close()


def test_closing_does_not_wait_for_fsspec() -> None:
    folder = UnsignedFolder()
    folder.hangs_until.clear()
    fetcher = Fetcher(folder)
    with ThreadPoolExecutor(1) as reader:
        read = reader.submit(fetched, fetcher, 0, 100)
        time.sleep(0.2)
        started = time.monotonic()
        fetcher.close()
        error = read.exception(CLOSING_SECONDS)
        assert time.monotonic() - started < CLOSING_SECONDS
    assert isinstance(error, FetchFailed)
    assert error.may_pass, "the next start reads again"
    folder.hangs_until.set()


def test_a_read_through_fsspec_that_never_ends_is_given_up_within_the_budget() -> None:
    folder = UnsignedFolder()
    folder.hangs_until.clear()
    fetcher = Fetcher(folder, FetchConfig(timeout_seconds=0.01, retry_seconds=0.3))
    with pytest.raises(FetchFailed, match=r"TimeoutError: no answer within 0.15 s; \d+ attempts"):
        fetched(fetcher, 0, 100)
    fetcher.close()
    folder.hangs_until.set()


_FIELDS = st.lists(
    st.sampled_from(
        [
            "Content-Length: 7", "content-length:0", "Content-Length: many", "Transfer-Encoding: chunked", "Connection: close",
            "connection: Keep-Alive", "Content-Range: bytes 0-6/9", "Retry-After: 3", "X-Folded: one\r\n two", "X-Empty:",
            "ETag: \"a:b\"", "x-amz-bucket-region:  eu-north-1 ",
        ]
    ),
    unique_by=lambda line: line.partition(":")[0].lower(),
)  # fmt: skip


@given(
    st.sampled_from(
        ["HTTP/1.1 206 Partial Content", "HTTP/1.1 200 OK", "HTTP/1.0 200 OK", "HTTP/1.1 503", "HTTP/1.1 404 "]
    ),
    _FIELDS,
    st.booleans(),
)
def test_the_head_of_an_answer_means_what_the_standard_library_takes_it_for(
    status: str, fields: list[str], is_continued: bool
) -> None:
    head = "\r\n".join([*(["HTTP/1.1 100 Continue", ""] if is_continued else []), status, *fields, "", ""]).encode()
    found = []
    for kind in (HTTPResponse, lambda sock: _Response(sock, 5.0, _LongestWait())):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(head + b"content")
            answer = kind(ours)
            answer.begin()
            folded = {name.lower(): " ".join(value.split()) for name, value in answer.headers.items()}
            facts = answer.status, answer.reason, answer.version, answer.length, answer.chunked, answer.will_close
            found.append((facts, folded, answer.fp.read1(7) if answer.fp else b""))
            answer.close()
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "head",
    [
        b"", b"\r\n", b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1 200 OK\r\nno field\r\n\r\n",
        b"HTTP/1.1 " + 70_000 * b"2",
        b"HTTP/1.1 200 OK\r\n" + b"".join(b"F%d: x\r\n" % number for number in range(101)) + b"\r\n",
    ],
    ids=["none", "empty line", "another protocol", "no status", "no field", "long line", "many fields"],
)  # fmt: skip
def test_what_is_no_head_of_an_answer_is_refused(head: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(head)
        theirs.shutdown(socket.SHUT_WR)
        answer = _Response(ours, 5.0, _LongestWait())
        with pytest.raises(HTTPException):
            answer.begin()
        answer.close()
