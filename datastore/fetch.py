"""Ranges of bytes of a store's objects, fetched until they are right: in parallel, checked, and again after trouble.

Local files are read where they are asked for. Of remote objects, `ranges.py` gives single ranges; here are the rules
around them. Large ranges are cut into parts, and as many requests are under way as the server's latency makes worthwhile.
Time-outs, refusals for lack of capacity and broken connections are tried again with growing pauses, within a budget of
time; a request much slower than its like gets a second one beside it, and the first answer counts; bytes that do not
match their checksum are fetched again. What cannot be had ends in one error that says what was tried.
"""

import random
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Final

from pydantic import BaseModel, NonNegativeFloat, PositiveFloat, PositiveInt

from datastore.objects import ObjectFolder
from datastore.ranges import Refused, open_ranges

Problem = Callable[[memoryview], str | None]
"""What is wrong with fetched bytes, in words; None where nothing is."""

_MOST_DAMAGED: Final = 4  # attempts: a transfer may go wrong, but an object that is damaged stays so
_LONGEST_PAUSE_SECONDS: Final = 5.0
_NEAR_SECONDS: Final = 0.005  # to the first byte: a server on this machine or beside it
_REMEMBERED: Final = 64
_CLOSED_POLL_SECONDS: Final = 0.2


class FetchConfig(BaseModel, extra="forbid", frozen=True):
    """How hard remote objects are asked for. Measured: benchmarks/stream.py."""

    part_mib: PositiveFloat = 8.0  # a request asks for so much at most
    requests_near: PositiveInt = 8  # under way at once, where the first byte comes within 5 ms
    requests_far: PositiveInt = 32  # and elsewhere
    timeout_seconds: PositiveFloat = 20.0  # without a byte
    retry_seconds: NonNegativeFloat = 120.0  # from the first trouble with a range until it is given up
    hedge_factor: PositiveFloat = 4.0  # a request that takes so many times the usual gets a second one beside it
    hedge_least_seconds: PositiveFloat = 1.0  # but none before this


class FetchFailed(Exception):
    """Bytes that could not be had undamaged; the message says what was tried and what came."""


class Fetcher:
    """Fetches ranges. Threads share it; `close` ends what is under way."""

    def __init__(self, folder: ObjectFolder, config: FetchConfig | None = None) -> None:
        self.bytes_fetched = 0
        self.requests = 0
        self.retries = 0
        self.hedges = 0
        self._config = config or FetchConfig()
        self._ranges = open_ranges(folder, self._config.timeout_seconds)
        self._counting = threading.Lock()
        self._closed = threading.Event()
        self._tempo = _Tempo(self._config)
        self._requests: ThreadPoolExecutor | None = None

    @property
    def is_local(self) -> bool:
        """Whether objects are read from a disk."""
        return self._ranges.is_local

    def fetch(self, name: str, start: int, end: int, problem_of: Problem) -> memoryview:
        """The bytes of one object from `start` up to, not including, `end`, as soon as `problem_of` finds them right."""
        trouble = _Trouble(self._config.retry_seconds)
        while True:
            try:
                read = self._read if self.is_local else self._parts
                content = memoryview(read(name, start, end))
                problem = _length_problem(content, start, end) or problem_of(content)
                if problem is None:
                    return content
                trouble.came_damaged(problem)
            except Refused as error:
                trouble.was_refused(error)
            with self._counting:
                self.retries += 1
            if self._closed.wait(trouble.pause_seconds()):
                raise FetchFailed("the stream was closed")

    def close(self) -> None:
        """Gives up what is under way; whoever waits for it gets a FetchFailed."""
        self._closed.set()
        self._ranges.close()
        if self._requests is not None:
            self._requests.shutdown(wait=True, cancel_futures=True)

    def _read(self, name: str, start: int, end: int) -> bytes | bytearray:
        content = self._ranges.read(name, start, end)
        with self._counting:
            self.bytes_fetched += len(content)
        return content

    def _parts(self, name: str, start: int, end: int) -> bytes | bytearray:
        """One range, by as many requests as it takes."""
        part_bytes = int(self._config.part_mib * 2**20)
        bounds = [(at, min(at + part_bytes, end)) for at in range(start, end, part_bytes)]
        asked = [(self._ask(name, *bound), bound) for bound in bounds]
        parts = [self._await(answer, name, *bound) for answer, bound in asked]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _ask(self, name: str, start: int, end: int) -> Future[bytes | bytearray]:
        with self._counting:
            if self._requests is None:
                most = 2 * max(self._config.requests_near, self._config.requests_far)  # as many again for second ones
                self._requests = ThreadPoolExecutor(most, thread_name_prefix="stream-requests")
            self.requests += 1
        return self._requests.submit(self._request, name, start, end)

    def _request(self, name: str, start: int, end: int) -> bytes | bytearray:
        if self._closed.is_set():
            raise FetchFailed("the stream was closed")
        with self._tempo.turn(self._closed) as took:
            began = time.monotonic()
            content, first_byte_seconds = self._ranges.timed_read(name, start, end)
            took(first_byte_seconds, time.monotonic() - began)
        with self._counting:
            self.bytes_fetched += len(content)
        return content

    def _await(self, first: Future[bytes | bytearray], name: str, start: int, end: int) -> bytes | bytearray:
        """The answer to a request, or to a second one that is sent where the first takes too long."""
        answers = {first}
        done, _ = wait(answers, self._tempo.patience_seconds)
        if not done:
            with self._counting:
                self.hedges += 1
            answers.add(self._ask(name, start, end))
        while True:
            done, answers = wait(answers, return_when=FIRST_COMPLETED)
            right = next((answer for answer in done if answer.exception() is None), None)
            if right is not None or not answers:
                return (right or done.pop()).result()


class _Tempo:
    """How many requests may be under way, and how long one usually takes."""

    def __init__(self, config: FetchConfig) -> None:
        self._config = config
        self._under_way = 0
        self._changed = threading.Condition()
        self._first_bytes: deque[float] = deque(maxlen=_REMEMBERED)
        self._durations: deque[float] = deque(maxlen=_REMEMBERED)

    @contextmanager
    def turn(self, closed: threading.Event) -> Iterator[Callable[[float, float], None]]:
        """Waits for a turn. What it gives takes the seconds to the first byte and to the last."""
        with self._changed:
            while self._under_way >= self._limit() and not closed.is_set():
                self._changed.wait(_CLOSED_POLL_SECONDS)
            self._under_way += 1
        try:
            yield self._took
        finally:
            with self._changed:
                self._under_way -= 1
                self._changed.notify()

    @property
    def patience_seconds(self) -> float:
        """How long a request may take before a second one is worth its while."""
        with self._changed:
            usual = statistics.median(self._durations) if self._durations else 0.0
        return max(self._config.hedge_least_seconds, self._config.hedge_factor * usual)

    def _took(self, first_byte_seconds: float, seconds: float) -> None:
        with self._changed:
            self._first_bytes.append(first_byte_seconds)
            self._durations.append(seconds)

    def _limit(self) -> int:
        # latency is what many requests hide; without it more of them only get into each other's way
        far = not self._first_bytes or min(self._first_bytes) > _NEAR_SECONDS
        return self._config.requests_far if far else self._config.requests_near


class _Trouble:
    """What went wrong with one range so far, and how long to pause before it is asked for again."""

    def __init__(self, retry_seconds: float) -> None:
        self._retry_seconds = retry_seconds
        self._attempts = 0
        self._damaged = 0
        self._began: float | None = None

    def came_damaged(self, problem: str) -> None:
        """FetchFailed where it came damaged too often."""
        self._attempts += 1
        self._damaged += 1
        if self._damaged >= _MOST_DAMAGED:
            raise FetchFailed(f"it is damaged: {problem}, in {self._damaged} reads")

    def was_refused(self, error: Refused) -> None:
        """FetchFailed where asking again cannot help, or was tried for long enough."""
        self._attempts += 1
        now = time.monotonic()
        self._began = now if self._began is None else self._began
        if not error.may_pass:
            raise FetchFailed(str(error)) from error
        if now - self._began >= self._retry_seconds:
            raise FetchFailed(
                f"{error}; {self._attempts} attempts within {now - self._began:.0f} s went like this"
            ) from error

    def pause_seconds(self) -> float:
        """Twice as long each time, and never the same for two processes that met the same trouble."""
        longest = min(_LONGEST_PAUSE_SECONDS, 0.05 * 2**self._attempts)
        return random.uniform(longest / 2, longest)


def _length_problem(content: memoryview, start: int, end: int) -> str | None:
    if len(content) == end - start:
        return None
    return f"bytes {start:,} to {end:,} were asked for and {len(content):,} came"
