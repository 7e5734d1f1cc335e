"""Ranges come whole and right, or end in one error that says why; whatever hangs, closing does not."""

import email.utils
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from crc32c import crc32c

from datastore.disk_cache import DiskCache
from datastore.fetch import FetchConfig, Fetcher, FetchFailed
from datastore.objects import ObjectFolder
from tests.range_server import (
    CONTENT,
    Answer,
    Handler,
    RangeServer,
    ServedFolder,
    broken_off,
    flipped_at,
    hung,
    hung_in_the_middle,
    no_http,
    reset,
    right,
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


@pytest.fixture
def fetcher_of(server: RangeServer) -> Iterator[Callable[..., Fetcher]]:
    opened: list[Fetcher] = []

    def fetcher_of(cache: DiskCache | None = None, **changes: Any) -> Fetcher:
        settings = {"part_mib": PART / 2**20, "retry_seconds": 20.0, "hedge_least_seconds": 5.0} | changes
        opened.append(Fetcher(ServedFolder(server.url), FetchConfig(**settings), cache))
        return opened[-1]

    yield fetcher_of
    for fetcher in opened:
        fetcher.close()
    assert request_threads() == []


FetcherOf = Callable[..., Fetcher]


def request_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("stream-")]


def expecting(start: int, end: int) -> Callable[[memoryview], str | None]:
    """What ShardReader does: compares checksums, and says both."""
    expected = crc32c(CONTENT[start:end])

    def problem(content: memoryview) -> str | None:
        found = crc32c(bytes(content))
        return None if found == expected else f"checksum {found:08x}, not {expected:08x}"

    return problem


def fetched(fetcher: Fetcher, start: int, end: int, **options: str) -> bytes:
    return bytes(fetcher.fetch("shard", start, end, expecting(start, end), **options))


def test_a_large_range_comes_by_several_requests_at_a_time(server: RangeServer, fetcher_of: FetcherOf) -> None:
    meeting = threading.Barrier(3, timeout=10)

    def together(handler: Handler, content: bytes) -> None:
        meeting.wait()
        right(handler, content)

    server.script = lambda number: together
    fetcher = fetcher_of()
    # three equal ones, as a fourth for the rest would wait as long for its first byte
    end = 5 + 3 * PART + PART // 3
    assert fetched(fetcher, 5, end) == CONTENT[5:end]
    bounds = [5 + (end - 5) * number // 3 for number in range(4)]
    assert sorted(server.asked) == list(pairwise(bounds))
    assert (fetcher.requests, fetcher.retries, fetcher.hedges) == (3, 0, 0)
    assert fetcher.bytes_fetched == end - 5


def test_far_away_a_thread_that_works_on_what_came_leaves_its_request_to_another(
    server: RangeServer, fetcher_of: FetcherOf
) -> None:
    fetcher = fetcher_of(requests_near=1, requests_far=1, part_mib=1.0)

    def late(handler: Handler, content: bytes) -> None:
        time.sleep(0.02)
        right(handler, content)

    server.script = lambda number: late
    assert fetched(fetcher, 0, 10) == CONTENT[:10]  # it learns how far the server is
    with ThreadPoolExecutor(1) as other, fetcher.turn():
        assert other.submit(fetched, fetcher, 10, 20).result(5) == CONTENT[10:20]


def test_near_by_a_thread_that_works_on_what_came_keeps_others_from_reading(
    server: RangeServer, fetcher_of: FetcherOf
) -> None:
    fetcher = fetcher_of(requests_near=1, requests_far=1)
    fetcher._tempo.took(0.0001, 0.001)
    with ThreadPoolExecutor(1) as other:
        with fetcher.turn():
            read = other.submit(fetched, fetcher, 10, 20)
            with pytest.raises(TimeoutError):
                read.result(0.3)
        assert read.result(5) == CONTENT[10:20]


def test_no_more_requests_are_under_way_than_are_allowed(server: RangeServer, fetcher_of: FetcherOf) -> None:
    fetcher = fetcher_of(requests_near=3, requests_far=3, part_mib=500 / 2**20)
    with ThreadPoolExecutor(4) as readers:
        found = list(readers.map(lambda at: fetched(fetcher, at, at + 20_000), range(0, 80_000, 20_000)))
    assert b"".join(found) == CONTENT[:80_000]
    assert len(server.asked) == 160
    assert 1 < server.most_under_way <= 3


@pytest.mark.parametrize(
    "answer",
    [status(503), status(500), status(429), status(408), broken_off, reset, no_http, flipped_at(7)],
    ids=["503", "500", "429", "408", "broken off", "reset", "no http", "flipped"],
)
def test_what_goes_wrong_for_a_while_is_tried_again(server: RangeServer, fetcher_of: FetcherOf, answer: Answer) -> None:
    server.fails(2, answer)
    fetcher = fetcher_of()
    assert fetched(fetcher, 100, 2000) == CONTENT[100:2000]
    assert server.asked == [(100, 2000)] * 3
    assert (fetcher.requests, fetcher.retries) == (3, 2)


def test_only_the_part_that_was_refused_is_asked_for_again(server: RangeServer, fetcher_of: FetcherOf) -> None:
    server.fails(1, status(503))
    assert fetched(fetcher_of(), 0, 4 * PART) == CONTENT[: 4 * PART]
    assert len(server.asked) == 5


def test_half_of_all_requests_failing_in_every_way_harms_nothing(server: RangeServer, fetcher_of: FetcherOf) -> None:
    ways = [status(503), broken_off, reset, flipped_at(3), status(500), no_http]
    server.script = lambda number: right if number % 2 else ways[number // 2 % len(ways)]
    fetcher = fetcher_of()
    with ThreadPoolExecutor(4) as readers:
        found = list(readers.map(lambda at: fetched(fetcher, at, at + 900), range(0, 18_000, 900)))
    assert b"".join(found) == CONTENT[:18_000]
    assert fetcher.retries >= 10  # a reset on a kept connection is none


def test_a_connection_that_the_server_ended_while_idle_is_no_trouble(
    server: RangeServer, fetcher_of: FetcherOf
) -> None:
    def last(handler: Handler, content: bytes) -> None:
        right(handler, content)
        handler.close_connection = True

    server.script = lambda number: last
    fetcher = fetcher_of(requests_near=1, requests_far=1)
    for _ in range(5):
        assert fetched(fetcher, 0, 100) == CONTENT[:100]
        time.sleep(0.02)
    assert fetcher.retries == 0


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_server_that_says_when_to_come_back_is_not_asked_before(
    server: RangeServer, fetcher_of: FetcherOf, form: str
) -> None:
    at: list[float] = []
    # a date has whole seconds: two from now is at least one from now
    when = "1" if form == "seconds" else email.utils.formatdate(time.time() + 2.01, usegmt=True)

    def answer(handler: Handler, content: bytes) -> None:
        at.append(time.monotonic())
        status(429, Retry_After=when)(handler, content)

    server.fails(1, answer)
    assert fetched(fetcher_of(), 0, 100) == CONTENT[:100]
    assert 1.0 <= time.monotonic() - at[0] < 4.0


@pytest.mark.parametrize("answer", [status(503), status(429, Retry_After="3600"), broken_off, reset])
def test_the_budget_ends_in_an_error_that_says_what_was_tried(
    server: RangeServer, fetcher_of: FetcherOf, answer: Answer
) -> None:
    server.script = lambda number: answer
    started = time.monotonic()
    with pytest.raises(FetchFailed, match=r"; \d+ attempts within \d+ s went like this") as raised:
        fetched(fetcher_of(retry_seconds=0.8), 0, 100)
    assert raised.value.may_pass
    assert 0.5 < time.monotonic() - started < 2.0
    assert len(server.asked) >= 2


def test_a_server_that_hangs_is_given_up_within_the_budget(server: RangeServer, fetcher_of: FetcherOf) -> None:
    server.script = lambda number: hung
    with pytest.raises(FetchFailed, match=r"TimeoutError: .*; \d+ attempts"):
        fetched(fetcher_of(timeout_seconds=0.2, retry_seconds=0.4), 0, 100)


def test_all_trouble_of_a_range_has_one_budget(server: RangeServer, fetcher_of: FetcherOf) -> None:
    fetcher = fetcher_of(retry_seconds=1.0)
    started = time.monotonic()
    has_come = threading.Event()

    def answer(handler: Handler, content: bytes) -> None:  # refused for 0.7 s, damaged once, refused again for 0.7 s
        passed = time.monotonic() - started
        if passed > 0.7 and not has_come.is_set():
            has_come.set()
            flipped_at(3)(handler, content)
        else:
            (right if passed > 1.6 else status(503))(handler, content)

    server.script = lambda number: answer
    with pytest.raises(FetchFailed, match=r"; \d+ attempts within [1-9] s went like this") as raised:
        fetched(fetcher, 0, 100)
    assert has_come.is_set()
    assert raised.value.may_pass


def test_fetches_can_share_a_budget(server: RangeServer, fetcher_of: FetcherOf) -> None:
    fetcher = fetcher_of(retry_seconds=0.3)
    budget = fetcher.budget()
    server.fails(1, status(503))
    for _ in range(2):
        fetcher.fetch("shard", 0, 100, expecting(0, 100), budget=budget)
        time.sleep(0.3)  # the second one has no trouble, and needs no time for any
    server.script = lambda number: status(503)
    with pytest.raises(FetchFailed, match=r"; 1 attempts within \d s"):
        fetcher.fetch("shard", 0, 100, expecting(0, 100), budget=budget)
    server.script = lambda number: status(503) if number < 4 else right
    assert fetched(fetcher, 0, 100) == CONTENT[:100], "it has a budget of its own"


def test_a_read_under_way_ends_with_the_budget(server: RangeServer, fetcher_of: FetcherOf) -> None:
    server.script = lambda number: hung if number else status(503)
    started = time.monotonic()
    with pytest.raises(FetchFailed, match=r"HTTP 503 .*; 1 attempts within \d s went like this"):
        fetched(fetcher_of(timeout_seconds=30.0, retry_seconds=0.4), 0, 100)
    assert time.monotonic() - started < 2.0


def test_a_read_that_hangs_after_damage_is_given_up_for_the_damage(server: RangeServer, fetcher_of: FetcherOf) -> None:
    server.script = lambda number: hung if number > 1 else flipped_at(number)
    with pytest.raises(FetchFailed, match=r"its bytes come damaged: .*; 2 attempts within \d s went like this"):
        fetched(fetcher_of(timeout_seconds=30.0, retry_seconds=0.6), 0, 100)


def test_a_server_that_trickles_is_one_that_hangs(server: RangeServer, fetcher_of: FetcherOf) -> None:
    def trickling(handler: Handler, content: bytes) -> None:
        handler.begin(206, len(content))
        for place in range(len(content)):
            handler.wfile.write(content[place : place + 1])
            if handler.of.closing.wait(0.05):
                return

    server.script = lambda number: trickling if number < 2 else right
    fetcher = fetcher_of(timeout_seconds=0.3)
    started = time.monotonic()
    assert fetched(fetcher, 0, 200) == CONTENT[:200]
    assert (fetcher.retries, time.monotonic() - started < 5.0) == (2, True)
    server.script = lambda number: trickling
    with pytest.raises(FetchFailed, match=r"TimeoutError: .* came within 0.3 s|timed out"):
        fetched(fetcher_of(timeout_seconds=0.3, retry_seconds=0.2), 0, 200)


def test_a_slow_server_that_sends_enough_is_waited_for(
    server: RangeServer, fetcher_of: FetcherOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datastore.ranges._LEAST_BYTES", 100)

    def slow(handler: Handler, content: bytes) -> None:
        handler.begin(206, len(content))
        for place in range(0, len(content), 100):
            time.sleep(0.08)
            handler.wfile.write(content[place : place + 100])

    server.script = lambda number: slow
    fetcher = fetcher_of(timeout_seconds=0.5)
    assert fetched(fetcher, 0, 1000) == CONTENT[:1000]
    assert fetcher.retries == 0


def test_nobody_listening_is_tried_again_and_then_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        fetcher = Fetcher(ServedFolder(f"http://127.0.0.1:{unused.getsockname()[1]}"), FetchConfig(retry_seconds=0.2))
        with pytest.raises(FetchFailed, match=r"ConnectionRefusedError: .*; \d+ attempts"):
            fetched(fetcher, 0, 100)
        fetcher.close()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (status(403), r"access is refused \(HTTP 403\); check the credentials"),
        (status(404), "it is missing"),
        (status(416), "it is shorter than its manifest says"),
        (status(301), "HTTP 301"),
        (
            lambda handler, content: handler.begin(206, 10, Content_Range="bytes 1-10/11"),
            r"it is shorter .*bytes 1-10/11",
        ),
        (lambda handler, content: handler.begin(200, len(CONTENT)), "the server ignores ranges"),
    ],
)
def test_what_no_second_request_mends_is_an_error_at_once(
    server: RangeServer, fetcher_of: FetcherOf, answer: Answer, says: str
) -> None:
    server.script = lambda number: answer
    with pytest.raises(FetchFailed, match=says) as raised:
        fetched(fetcher_of(), 1, 100)
    assert not raised.value.may_pass
    assert len(server.asked) == 1


def test_the_same_damage_each_time_is_the_object_s(server: RangeServer, fetcher_of: FetcherOf) -> None:
    server.script = lambda number: flipped_at(3)
    says = r"it is damaged: checksum [0-9a-f]{8}, not [0-9a-f]{8}, and comes like this each time"
    with pytest.raises(FetchFailed, match=says) as raised:
        fetched(fetcher_of(), 0, 100)
    assert not raised.value.may_pass
    assert len(server.asked) == 4


def test_another_damage_each_time_is_the_way_s(server: RangeServer, fetcher_of: FetcherOf) -> None:
    server.script = lambda number: flipped_at(number) if number < 4 else right
    assert fetched(fetcher_of(), 0, 100) == CONTENT[:100]
    server.script = flipped_at
    with pytest.raises(FetchFailed, match=r"its bytes come damaged: checksum .*; \d+ attempts within 0 s"):
        fetched(fetcher_of(retry_seconds=0.2), 0, 100)


def test_a_range_of_many_parts_comes_right_though_every_read_of_it_is_damaged(
    server: RangeServer, fetcher_of: FetcherOf
) -> None:
    damage = random.Random(0)
    server.script = lambda number: flipped_at(damage.randrange(500)) if damage.random() < 0.2 else right
    fetcher = fetcher_of(part_mib=500 / 2**20)
    assert fetched(fetcher, 0, 50_000) == CONTENT[:50_000]
    assert 100 < len(server.asked) < 400
    assert fetcher.retries < 10


def test_parts_that_are_refused_together_wait_together(server: RangeServer, fetcher_of: FetcherOf) -> None:
    server.fails(10, status(429, Retry_After="1"))
    started = time.monotonic()
    assert fetched(fetcher_of(), 0, 10 * PART) == CONTENT[: 10 * PART]
    assert 1 <= time.monotonic() - started < 4


def test_pauses_follow_from_no_seed_and_leave_the_run_s_own_draws_alone(
    server: RangeServer, fetcher_of: FetcherOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    for _ in range(2):
        server.asked.clear()
        server.fails(3, status(503))
        fetcher = fetcher_of()
        monkeypatch.setattr(fetcher, "_pause", pauses.append)
        random.seed(0)
        assert fetched(fetcher, 0, 100) == CONTENT[:100]
        assert random.random() == random.Random(0).random()
    assert len(set(pauses)) == 6


# Memory


def test_a_range_is_held_once_however_often_it_comes_damaged(
    server: RangeServer, fetcher_of: FetcherOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage = random.Random(0)
    server.script = lambda number: flipped_at(damage.randrange(30_000)) if number < 12 else right
    fetcher = fetcher_of(part_mib=70_000 / 2**20)  # what is smaller is left to the allocator
    monkeypatch.setattr(fetcher, "_pause", lambda seconds: None)
    held: list[int] = []

    def problem(content: memoryview) -> str | None:
        held.append(fetcher.buffers.allocated_bytes)
        return None if bytes(content) == CONTENT[:100_000] else "damaged"

    assert bytes(fetcher.fetch("shard", 0, 100_000, problem)) == CONTENT[:100_000]
    assert len(held) > 5
    assert max(held) <= 1.125 * 100_000


# Slow requests


def test_a_slow_request_gets_a_second_one_beside_it_and_is_given_up(server: RangeServer, fetcher_of: FetcherOf) -> None:
    fetcher = fetcher_of(hedge_least_seconds=0.2, timeout_seconds=30.0)
    for slow in (hung, hung_in_the_middle):
        asked = len(server.asked)
        server.script = lambda number, slow=slow, asked=asked: slow if number == asked else right  # type: ignore[misc]
        started = time.monotonic()
        assert fetched(fetcher, 0, 100) == CONTENT[:100]
        assert 0.2 <= time.monotonic() - started < 5
    assert fetcher.hedges == 2
    assert fetcher.retries == 0
    wait_until(lambda: server.broken_off == 2)
    wait_until(lambda: server.under_way == 0)


def test_a_slow_request_that_goes_on_does_not_write_over_the_answer_to_the_second(
    server: RangeServer, fetcher_of: FetcherOf
) -> None:
    may_go_on = threading.Event()

    def slow_and_wrong(handler: Handler, content: bytes) -> None:
        handler.begin(206, len(content))
        handler.wfile.write(bytes(len(content) // 2))
        may_go_on.wait(10)
        handler.wfile.write(bytes(len(content) - len(content) // 2))

    server.script = lambda number: slow_and_wrong if number == 0 else right
    found = fetcher_of(hedge_least_seconds=0.2).fetch("shard", 0, 50_000, expecting(0, 50_000))
    may_go_on.set()
    wait_until(lambda: server.under_way == 0)
    assert bytes(found) == CONTENT[:50_000]


def test_a_second_request_needs_no_turn(server: RangeServer, fetcher_of: FetcherOf) -> None:
    fetcher = fetcher_of(hedge_least_seconds=0.2, requests_near=1, requests_far=1)
    server.script = lambda number: hung if number == 0 else right
    assert fetched(fetcher, 0, 100) == CONTENT[:100]


def test_a_slow_second_request_gets_a_third_one_and_that_is_all(server: RangeServer, fetcher_of: FetcherOf) -> None:
    fetcher = fetcher_of(hedge_least_seconds=0.1, timeout_seconds=30.0)
    server.script = lambda number: hung if number < 2 else right
    assert fetched(fetcher, 0, 100) == CONTENT[:100]
    assert (fetcher.hedges, fetcher.retries) == (2, 0)
    server.script = lambda number: hung
    with pytest.raises(FetchFailed, match="TimeoutError"):
        fetched(fetcher_of(hedge_least_seconds=0.1, timeout_seconds=0.8, retry_seconds=0.0), 0, 100)
    assert len(server.asked) == 6


def test_second_requests_do_not_wait_behind_all_that_are_queued(server: RangeServer, fetcher_of: FetcherOf) -> None:
    server.script = lambda number: hung if number < 4 else right
    fetcher = fetcher_of(
        part_mib=500 / 2**20, hedge_least_seconds=0.2, timeout_seconds=30.0, requests_near=4, requests_far=4
    )
    started = time.monotonic()
    with ThreadPoolExecutor(4) as readers:  # 160 requests, of which the first four hang
        found = list(readers.map(lambda at: fetched(fetcher, at, at + 20_000), range(0, 80_000, 20_000)))
    assert b"".join(found) == CONTENT[:80_000]
    assert time.monotonic() - started < 10
    assert 4 <= fetcher.hedges < 20
    assert fetcher.retries == 0


def test_waiting_for_a_turn_is_not_being_slow(server: RangeServer, fetcher_of: FetcherOf) -> None:
    def slow(handler: Handler, content: bytes) -> None:
        time.sleep(0.1)
        right(handler, content)

    server.script = lambda number: slow
    fetcher = fetcher_of(hedge_least_seconds=0.5, requests_near=1, requests_far=1)
    assert fetched(fetcher, 0, 10 * PART) == CONTENT[: 10 * PART]
    assert fetcher.hedges == 0


# Closing


@pytest.mark.parametrize("answer", [hung, hung_in_the_middle, status(503)], ids=["hung", "in the middle", "refused"])
def test_closing_ends_what_is_under_way_within_two_seconds(
    server: RangeServer, fetcher_of: FetcherOf, answer: Answer
) -> None:
    server.script = lambda number: answer
    fetcher = fetcher_of(part_mib=500 / 2**20)
    with ThreadPoolExecutor(4) as readers:
        # far more requests than may be under way: most wait for their turn, some not even for that
        reads = [readers.submit(fetched, fetcher, 0, 80_000) for _ in range(4)]
        wait_until(lambda: len(server.asked) >= 8)
        started = time.monotonic()
        fetcher.close()
        assert time.monotonic() - started < CLOSING_SECONDS
        for read in reads:
            assert isinstance(read.exception(CLOSING_SECONDS), FetchFailed)
        assert time.monotonic() - started < CLOSING_SECONDS
    assert request_threads() == []
    with pytest.raises(FetchFailed, match="the stream was closed"):
        fetched(fetcher, 0, 100)


def test_closing_ends_a_request_that_waits_for_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        address = listening.getsockname()
        with socket.create_connection(address):  # takes the one place in the queue: who comes next is not answered
            fetcher = Fetcher(ServedFolder(f"http://127.0.0.1:{address[1]}"))
            with ThreadPoolExecutor(1) as reader:
                read = reader.submit(fetched, fetcher, 0, 100)
                wait_until(lambda: fetcher.requests == 1)
                time.sleep(0.2)
                started = time.monotonic()
                fetcher.close()
                assert isinstance(read.exception(), FetchFailed)
                assert time.monotonic() - started < CLOSING_SECONDS
    assert request_threads() == []


def test_closing_twice_or_before_anything_was_read_is_fine(fetcher_of: FetcherOf) -> None:
    fetcher = fetcher_of()
    fetcher.close()
    fetcher.close()


def wait_until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come to this"
        time.sleep(0.01)


# The local cache


def test_what_was_right_once_is_not_asked_for_again(server: RangeServer, fetcher_of: FetcherOf, tmp_path: Path) -> None:
    for _ in range(2):
        cache = DiskCache(tmp_path, 2**20)
        fetcher = fetcher_of(cache)
        assert fetched(fetcher, 0, 3 * PART, version="1") == CONTENT[: 3 * PART]
        assert len(server.asked) == 3
    assert (cache.hits, fetcher.bytes_fetched, fetcher.requests) == (1, 0, 0)
    fetched(fetcher, 0, 3 * PART, version="2")
    assert len(server.asked) == 6, "the object was written anew"
    fetched(fetcher, 0, PART, version="1")
    assert len(server.asked) == 7, "this is another range"


def test_what_came_damaged_is_not_kept(server: RangeServer, fetcher_of: FetcherOf, tmp_path: Path) -> None:
    server.script = lambda number: flipped_at(3)
    cache = DiskCache(tmp_path, 2**20)
    with pytest.raises(FetchFailed, match="it is damaged"):
        fetched(fetcher_of(cache), 0, 100)
    server.script = lambda number: right
    assert fetched(fetcher_of(cache), 0, 100) == CONTENT[:100]
    assert cache.hits == 0


@pytest.mark.parametrize("kept", [b"something else", CONTENT[100:200]], ids=["shorter", "other bytes"])
def test_a_kept_range_that_is_not_right_is_fetched_again(
    server: RangeServer, fetcher_of: FetcherOf, tmp_path: Path, kept: bytes
) -> None:
    cache = DiskCache(tmp_path, 2**20)
    cache.put(f"{server.url}/shard?1#0-100", kept)
    for _ in range(2):
        assert fetched(fetcher_of(cache), 0, 100, version="1") == CONTENT[:100]
        assert len(server.asked) == 1


def test_local_objects_are_not_kept_twice(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "shard").write_bytes(CONTENT)
    cache = DiskCache(tmp_path / "cache", 2**20)
    for _ in range(2):
        assert fetched(Fetcher(ObjectFolder(tmp_path / "store"), cache=cache), 0, 100) == CONTENT[:100]
    assert cache.hits == 0


# Storage without HTTP


@pytest.mark.parametrize("where", ["local", "memory"])
def test_other_storage_is_read_by_the_same_rules(where: str, tmp_path: Path) -> None:
    folder = ObjectFolder(tmp_path if where == "local" else f"memory://{tmp_path.name}")
    folder.put("shard", CONTENT)
    fetcher = Fetcher(folder, FetchConfig(part_mib=PART / 2**20))
    assert fetched(fetcher, 3, 4 * PART) == CONTENT[3 : 4 * PART]
    assert fetcher.is_local == (where == "local")
    assert fetcher.bytes_fetched == 4 * PART - 3
    with pytest.raises(FetchFailed, match="it is missing"):
        fetcher.fetch("no-such-object", 0, 10, lambda content: None)
    with pytest.raises(FetchFailed, match=r"it is damaged: bytes 102,390 to 102,410 were asked for and 10 came"):
        fetcher.fetch("shard", len(CONTENT) - 10, len(CONTENT) + 10, lambda content: None)
    fetcher.close()
