"""Ranges of bytes of a store's objects, fetched until they are right: in parallel, checked, and again after trouble.

Local files are read where they are asked for. Of remote objects, `ranges.py` gives single ranges; here are the rules
around them. Large ranges are cut into parts, and as many requests are under way as the server's latency makes worthwhile.
Time-outs, refusals for lack of capacity and broken connections are tried again with growing pauses, within a budget of
time; a request much slower than its like gets a second one beside it, and the first answer counts; bytes that do not
match their checksum are fetched again. What cannot be had ends in one error that says what was tried. What was right can
be kept on this machine's disk (`disk_cache.py`), and is taken from there the next time.
"""

import hashlib
import logging
import math
import random
import statistics
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import pairwise
from typing import Annotated, Final, NamedTuple

import numpy as np
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from datastore.buffers import Buffers
from datastore.disk_cache import DiskCache
from datastore.objects import ObjectFolder
from datastore.pieces import Pieces
from datastore.ranges import Call, Missing, Refused, open_ranges

Problem = Callable[[memoryview], str | None]
"""What is wrong with fetched bytes, in words; None where nothing is."""

_TIMES_SETTLED: Final = 2  # a machine on the way, too, can hold a damaged copy; another one is asked the next time
_LONGEST_PAUSE_SECONDS: Final = 5.0
_LAST_PAUSE: Final = 0.75  # of the time that is left, at most: then comes the last attempt, which takes time, too
_NEAR_SECONDS: Final = 0.005  # to the first byte: a server on this machine or beside it
_REMEMBERED: Final = 64
_KEEP_BYTES: Final = 256 * 2**20
_CLOSED_POLL_SECONDS: Final = 0.2
_POLL_SECONDS: Final = 0.05  # how soon a slow request is noticed
_IDLE_SECONDS: Final = 1.0  # and that nobody asks any more
_TOGETHER: Final = 3  # requests for the same bytes: where one in ten is slow, one in a thousand is waited for
_logger = logging.getLogger("datastore.fetch")
_JITTER: Final = random.SystemRandom()  # not the run's own, whose seed is the same in all processes


class FetchConfig(BaseModel, extra="forbid", frozen=True):
    """How hard remote objects are asked for. Measured: benchmarks/stream.py."""

    part_mib: Annotated[float, Field(ge=2**-12)] = 8.0  # a request asks for about so much
    requests_near: PositiveInt = 8  # under way at once, where the first byte comes within 5 ms
    requests_far: PositiveInt = 32  # and elsewhere
    timeout_seconds: PositiveFloat = 20.0  # in which less than 256 KiB came, unless that is all
    retry_seconds: NonNegativeFloat = 120.0  # from the first trouble with a range until it is given up
    hedge_factor: PositiveFloat = 4.0  # a request that takes so many times the usual gets a second one beside it
    hedge_least_seconds: PositiveFloat = 1.0  # but none before this


class FetchFailed(Exception):
    """Bytes that could not be had undamaged; the message says what was tried and what came.

    `may_pass`: another run may have them later.
    """

    def __init__(self, message: str, *, may_pass: bool) -> None:
        super().__init__(message)
        self.may_pass = may_pass


class Fetcher:
    """Fetches ranges. Threads share it; `close` ends what is under way."""

    def __init__(
        self,
        folder: ObjectFolder,
        config: FetchConfig | None = None,
        cache: DiskCache | None = None,
        buffers: Buffers | None = None,
    ) -> None:
        self.buffers = buffers or Buffers(_KEEP_BYTES)
        self.bytes_fetched = 0
        self.requests = 0
        self.retries = 0
        self.hedges = 0
        self.cache_hits = 0
        self._url = folder.url
        self._config = config or FetchConfig()
        self._ranges = open_ranges(folder, self._config.timeout_seconds)
        self._cache = None if self.is_local else cache
        self._counting = threading.Lock()
        self._closed = threading.Event()
        self._tempo = _Tempo(self._config)
        self._own = _Own()
        self._under_way: set[_Request] = set()
        self._changed = threading.Condition(self._counting)  # what is under way, or whether this is closed
        # Threads, from the first need of each: for parts that are read beside each other, for second requests (which must
        # not wait in line behind first ones, whose turn may depend on them), and to see which requests are slow.
        self._parts_pool: ThreadPoolExecutor | None = None
        self._hedges_pool: ThreadPoolExecutor | None = None
        self._watch: threading.Thread | None = None

    @property
    def is_local(self) -> bool:
        """Whether objects are read from a disk."""
        return self._ranges.is_local

    def budget(self) -> "Budget":
        """The time for trouble that several fetches share: one shard's index and its chunks, say."""
        return Budget(self._config.retry_seconds)

    def fetch(
        self,
        name: str,
        start: int,
        end: int,
        problem_of: Problem,
        version: str = "",
        budget: "Budget | None" = None,
    ) -> memoryview:
        """The bytes of one object from `start` up to, not including, `end`, as soon as `problem_of` finds them right.

        `version` tells the local cache the object from another one that had its name. Without a budget, the fetch has one
        of its own.
        """
        content = self.buffers.empty((end - start,), np.uint8).data
        self.fill(Pieces([content]), name, start, lambda: problem_of(content), version, budget)
        return content

    def fill(
        self,
        target: Pieces,
        name: str,
        start: int,
        problem: Callable[[], str | None],
        version: str = "",
        budget: "Budget | None" = None,
    ) -> None:
        """The same, put where it belongs: as many bytes as the target has room for. `problem` looks at them there."""
        deadline = _Deadline(budget or self.budget())
        if self._cache is None:
            self._fetch(target, name, start, problem, deadline)
            return
        key = f"{self._url}/{name}?{version}#{start}-{start + target.num_bytes}"
        found = self._cache.get(key)
        if found is not None:
            if len(found) == target.num_bytes:
                target.fill(memoryview(found))
                if problem() is None:
                    with self._counting:
                        self.cache_hits += 1
                    return
            self._cache.drop(key)
        self._fetch(target, name, start, problem, deadline)
        self._cache.put(key, target)

    def exists(self, name: str) -> bool:
        """Whether there is such an object now, asked once. FetchFailed where there is no answer."""
        try:
            if self.is_local:
                self._ranges.read(name, 0, Call(), Pieces([memoryview(bytearray(1))]))
            else:
                self._answer(_Request(name, 0, Pieces([memoryview(bytearray(1))]), _Deadline(self.budget())))
        except Missing:
            return False
        except Refused as error:
            raise FetchFailed(str(error), may_pass=error.may_pass) from error
        return True

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Within the block, this thread is one of those that may read now: more would only get into each other's way.

        Requests have their turns by themselves; this is for what goes with them, as unpacking does. Far away they have them
        alone: the next one is under way while this thread works on what came.
        """
        if self._tempo.is_far:
            yield
            return
        with self._turn(_Deadline(self.budget())):
            yield

    @contextmanager
    def _turn(self, deadline: "_Deadline") -> Iterator[None]:
        if self._own.has_turn or self.is_local:
            yield
            return
        self._tempo.begin(self._closed, deadline)
        self._own.has_turn = True
        try:
            yield
        finally:
            self._own.has_turn = False
            self._tempo.end()

    def close(self) -> None:
        """Gives up what is under way; whoever waits for it gets a FetchFailed."""
        with self._changed:
            self._closed.set()
            self._changed.notify_all()
            while self._under_way:
                for request in self._under_way:
                    request.call.end()
                self._changed.wait(_POLL_SECONDS)
        for pool in (self._parts_pool, self._hedges_pool):
            if pool is not None:
                pool.shutdown(wait=True)  # what waits in line is refused at once
        if self._watch is not None:
            self._watch.join()
        self._ranges.close()

    def _fetch(
        self, target: Pieces, name: str, start: int, problem: Callable[[], str | None], deadline: "_Deadline"
    ) -> None:
        """Fills the target, and again, part by part, where a range came damaged.

        A part that comes twice the same is what the server holds: two transfers do not go wrong in the same way. So a
        range of many parts comes right though some part of it is damaged in most reads. If all of them came twice the
        same, and once more all of them did, the object itself is damaged.
        """
        num_bytes = target.num_bytes
        # equal ones: a request for the little that is left beyond whole parts would wait as long for its first byte
        num_parts = 1 if self.is_local else max(1, round(num_bytes / (self._config.part_mib * 2**20)))
        bounds = [num_bytes * number // num_parts for number in range(num_parts + 1)]
        parts = [_Part(start + begin, target.part(begin, end)) for begin, end in pairwise(bounds) if begin < end]
        trouble = _Trouble(deadline)
        times_settled = 0
        while True:
            asked = [part for part in parts if not part.is_settled]
            self._read_parts(name, asked, deadline)
            found = _length_problem(sum(part.num_bytes for part in parts), start, num_bytes) or problem()
            if found is None:
                return
            for part in asked:
                part.came_damaged()
            if all(part.is_settled for part in parts):
                times_settled += 1
                if times_settled == _TIMES_SETTLED:
                    raise FetchFailed(f"it is damaged: {found}, and comes like this each time", may_pass=False)
                for part in parts:
                    part.forget()
            self._pause(trouble.came_damaged(found))

    def _read_parts(self, name: str, parts: "list[_Part]", deadline: "_Deadline") -> None:
        """Fills some parts of a range, whether rightly or not."""
        if self.is_local:
            for part in parts:
                part.num_bytes = self._read(name, part, deadline)
            return
        left, beside = deque(parts), list[Future[None]]()
        try:
            while left:
                own = left.popleft()
                # others for which there is a turn; the rest this thread reads, too, or it might wait for those who wait for it
                while left and self._tempo.may_begin():
                    beside.append(self._begin_beside(name, left.popleft(), deadline))
                self._read_part(name, own, deadline)
            for read in beside:
                read.result()
        except BaseException:
            deadline.give_up()
            with self._changed:
                for request in self._under_way:
                    if request.deadline is deadline:
                        request.call.end()
            wait(beside)  # nobody writes to the target any more
            raise

    def _read(self, name: str, part: "_Part", deadline: "_Deadline") -> int:
        """Fills a part that lies on this machine's disk."""
        trouble = _Trouble(deadline)
        while True:
            try:
                num_bytes, _ = self._ranges.read(name, part.start, Call(), part.target)
            except Refused as error:
                self._pause(trouble.was_refused(error))
                continue
            with self._counting:
                self.bytes_fetched += num_bytes
            return num_bytes

    def _begin_beside(self, name: str, part: "_Part", deadline: "_Deadline") -> "Future[None]":
        """Has another thread fill a part, in a turn that this one has begun."""
        with self._changed:
            if self._closed.is_set():
                self._tempo.end()
                raise _closed()
            if self._parts_pool is None:
                most = max(self._config.requests_near, self._config.requests_far)
                self._parts_pool = ThreadPoolExecutor(most, thread_name_prefix="stream-parts")
            return self._parts_pool.submit(self._read_beside, name, part, deadline)

    def _read_beside(self, name: str, part: "_Part", deadline: "_Deadline") -> None:
        self._own.has_turn = True
        try:
            self._read_part(name, part, deadline)
        finally:
            self._own.has_turn = False
            self._tempo.end()

    def _read_part(self, name: str, part: "_Part", deadline: "_Deadline") -> None:
        """Fills a part that comes from a server."""
        trouble = _Trouble(deadline)
        while True:
            try:
                part.num_bytes = self._answer(_Request(name, part.start, part.target, deadline))
                return
            except Refused as error:
                with self._changed:
                    self._refuse_if_closed()  # which ended it
                deadline.refuse_if_given_up()
                self._pause(trouble.was_refused(error))

    def _answer(self, request: "_Request") -> int:
        """How many bytes came, by this request or by a second or third one that is sent where it takes too long.

        Either way the request's target has the bytes, and nobody writes to it any more.
        """
        try:
            with self._turn(request.deadline):
                num_bytes = self._timed_read(request)
        except Refused as refusal:
            return self._answer_of_another(request, refusal)
        for other in request.others:
            other.request.call.end()
        return num_bytes

    def _answer_of_another(self, request: "_Request", refusal: Refused) -> int:
        """The answer to a request that was sent beside this one, which failed, or was ended for the other."""
        if not request.call.has_ended:  # it is asked for anew, with a second request in its time
            for other in request.others:
                other.request.call.end()
            raise refusal
        while True:
            coming = [other.answer for other in request.others if not other.answer.done()]
            right = [other for other in request.others if other.answer.done() and not other.answer.exception()]
            if right:
                break
            if not coming:
                if request.is_late:
                    raise request.deadline.is_over() from refusal
                raise refusal
            if not wait(coming, request.deadline.seconds_left, FIRST_COMPLETED).done:
                for other in request.others:
                    other.request.call.end()
                raise request.deadline.is_over() from refusal
        for other in request.others:
            other.request.call.end()  # those that still wait: a server that hangs would keep them
        request.target.fill(right[0].request.target.joined())
        return right[0].answer.result()

    def _timed_read(self, request: "_Request") -> int:
        with self._changed:
            request.deadline.refuse_if_given_up()
            self._refuse_if_closed()
            self.requests += 1
            request.began = request.asked_at = time.monotonic()
            if not self._under_way:
                self._changed.notify_all()  # the watch
            self._under_way.add(request)
            if self._watch is None:
                watched = weakref.ref(self), self._changed, self._closed
                self._watch = threading.Thread(target=_watch, args=watched, name="stream-watch", daemon=True)
                self._watch.start()
        try:
            num_bytes, first_byte_seconds = self._ranges.read(request.name, request.start, request.call, request.target)
        finally:
            with self._changed:
                self._under_way.discard(request)
                if self._closed.is_set():
                    self._changed.notify_all()
        self._tempo.took(first_byte_seconds, time.monotonic() - request.began)
        with self._counting:
            self.bytes_fetched += num_bytes
        return num_bytes

    def _look_after_slow_ones(self) -> float:
        """Sends second requests beside slow ones, and ends those whose time is over; when to look again, in seconds."""
        patience_seconds = self._tempo.patience_seconds
        for request in self._under_way:
            if request.deadline.seconds_left == 0:
                request.is_late = True
                request.call.end()
            elif request.call.has_ended:
                request.call.end()  # again: it may just have begun to connect
            elif request.may_be_hedged and time.monotonic() >= request.asked_at + patience_seconds:
                self._hedge(request)
        return _POLL_SECONDS if self._under_way else _IDLE_SECONDS

    def _hedge(self, slow: "_Request") -> None:
        if self._hedges_pool is None:
            most = _TOGETHER * max(self._config.requests_near, self._config.requests_far)
            self._hedges_pool = ThreadPoolExecutor(most, thread_name_prefix="stream-second-requests")
        slow.asked_at = time.monotonic()
        try:
            own = Pieces([self.buffers.empty((slow.target.num_bytes,), np.uint8).data])
            second = _Request(slow.name, slow.start, own, slow.deadline, is_second=True)
            slow.others.append(_Other(second, self._hedges_pool.submit(self._second_answer, second, slow)))
        except (MemoryError, RuntimeError) as error:  # no memory, or no thread: it would only have been a help
            _logger.debug("no second request beside a slow one for %s: %s", slow.name, error)
            return
        self.hedges += 1

    def _second_answer(self, second: "_Request", slow: "_Request") -> int:
        num_bytes = self._timed_read(second)
        slow.call.end()
        return num_bytes

    def _refuse_if_closed(self) -> None:
        if self._closed.is_set():
            raise _closed()

    def _pause(self, seconds: float) -> None:
        """Waits, and lets others read meanwhile."""
        with self._counting:
            self.retries += 1
        if self._own.has_turn:
            self._tempo.end()
        is_closed = self._closed.wait(seconds)
        if self._own.has_turn:
            self._tempo.begin(self._closed)
        if is_closed:
            raise _closed()


def _watch(watched: "weakref.ref[Fetcher]", changed: threading.Condition, closed: threading.Event) -> None:
    """Until a fetcher is closed, or forgotten: looks after its requests."""
    with changed:
        while not closed.is_set():
            fetcher = watched()
            if fetcher is None:
                return
            seconds = fetcher._look_after_slow_ones()
            del fetcher  # its last reference may go while nobody looks
            changed.wait(seconds)


class _Part:
    """A piece of a range, and its place in memory."""

    def __init__(self, start: int, target: Pieces) -> None:
        self.start, self.target = start, target
        self.num_bytes = 0  # that came
        self.is_settled = False  # it came twice the same
        self._digests: set[bytes] = set()

    def came_damaged(self) -> None:
        """Its range did, perhaps by another part: remembers what this one came like."""
        came = hashlib.blake2b(digest_size=16)
        for piece in self.target.part(0, self.num_bytes).memory():
            came.update(piece)
        self.is_settled = came.digest() in self._digests
        self._digests.add(came.digest())

    def forget(self) -> None:
        """As if it had not come yet."""
        self.is_settled = False
        self._digests.clear()


class _Own(threading.local):
    """What a thread knows of itself."""

    has_turn = False


class _Request:
    """One request for a part of an object."""

    def __init__(
        self, name: str, start: int, target: Pieces, deadline: "_Deadline", *, is_second: bool = False
    ) -> None:
        self.name, self.start, self.target, self.deadline = name, start, target, deadline
        self.call = Call()
        self.is_late = False  # it was ended because the time for it is over
        self.began = 0.0
        self.asked_at = 0.0  # when it or the last one beside it was sent
        self.others: list[_Other] = []
        self._is_second = is_second

    @property
    def may_be_hedged(self) -> bool:
        return not self._is_second and len(self.others) + 1 < _TOGETHER


class _Other(NamedTuple):
    """A request that was sent beside a slow one."""

    request: _Request
    answer: "Future[int]"


class _Tempo:
    """How many requests may be under way, and how long one usually takes."""

    def __init__(self, config: FetchConfig) -> None:
        self._config = config
        self._under_way = 0
        self._changed = threading.Condition()
        self._first_bytes: deque[float] = deque(maxlen=_REMEMBERED)
        self._durations: deque[float] = deque(maxlen=_REMEMBERED)

    def begin(self, closed: threading.Event, deadline: "_Deadline | None" = None) -> None:
        """Waits for a turn, and has it from then on."""
        with self._changed:
            while self._under_way >= self._limit() and not closed.is_set():
                if deadline is not None and deadline.seconds_left == 0:
                    raise deadline.is_over()
                self._changed.wait(_CLOSED_POLL_SECONDS)
            self._under_way += 1

    def may_begin(self) -> bool:
        """Whether there was a turn to have; it is the caller's then."""
        with self._changed:
            if self._under_way >= self._limit():
                return False
            self._under_way += 1
            return True

    def end(self) -> None:
        """Gives the turn to another."""
        with self._changed:
            self._under_way -= 1
            self._changed.notify()

    @property
    def patience_seconds(self) -> float:
        """How long a request may take before a second one is worth its while."""
        with self._changed:
            usual = statistics.median(self._durations) if self._durations else 0.0
        return max(self._config.hedge_least_seconds, self._config.hedge_factor * usual)

    def took(self, first_byte_seconds: float, seconds: float) -> None:
        """Remembers how long an answer took to its first byte and to its last."""
        with self._changed:
            self._first_bytes.append(first_byte_seconds)
            self._durations.append(seconds)

    @property
    def is_far(self) -> bool:
        """Whether latency is what many requests hide; without it more of them only get into each other's way."""
        with self._changed:
            return self._is_far()

    def _is_far(self) -> bool:
        return not self._first_bytes or min(self._first_bytes) > _NEAR_SECONDS

    def _limit(self) -> int:
        return self._config.requests_far if self._is_far() else self._config.requests_near


class Budget:
    """How long trouble may last, from the first of it on."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._began = math.inf

    def begin(self, happened: float) -> None:
        """The time runs, from then at the latest."""
        self._began = min(happened, self._began)

    @property
    def seconds_spent(self) -> float:
        """Since the first trouble."""
        return max(0.0, time.monotonic() - self._began)

    @property
    def seconds_left(self) -> float:
        """Until everything is given up."""
        return max(0.0, self._seconds - self.seconds_spent)


class _Deadline:
    """When one fetch is given up, its reads under way too. None before it had trouble: another's does not cut it short."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._attempts = 0
        self._problem = ""  # the last one
        self._is_given_up = False

    def give_up(self) -> None:
        """Another part of the same range failed."""
        self._is_given_up = True

    def refuse_if_given_up(self) -> None:
        """Ends what is done for the range."""
        if self._is_given_up:
            raise self.is_over()

    def begin(self, problem: str, happened: float) -> float:
        """There was trouble; the seconds left."""
        self._attempts += 1
        self._problem = problem
        self._budget.begin(happened)
        return self._budget.seconds_left

    @property
    def seconds_left(self) -> float | None:
        """None while there was no trouble."""
        return self._budget.seconds_left if self._attempts else None

    def is_over(self) -> FetchFailed:
        """The error that ends it."""
        tried = f"{self._attempts} attempts within {self._budget.seconds_spent:.0f} s went like this"
        return FetchFailed(f"{self._problem}; {tried}", may_pass=True)


class _Trouble:
    """What went wrong with one part or range so far; says how long to pause before it is asked for again."""

    def __init__(self, deadline: _Deadline) -> None:
        self._deadline = deadline
        self._attempts = 0
        self._is_last = False

    def came_damaged(self, problem: str) -> float:
        """The pause; FetchFailed where it was tried for long enough."""
        return self._pause_within_budget(f"its bytes come damaged: {problem}", time.monotonic(), 0.0)

    def was_refused(self, error: Refused) -> float:
        """The pause; FetchFailed where asking again cannot help, or was tried for long enough."""
        if not error.may_pass:
            raise FetchFailed(str(error), may_pass=False) from error
        return self._pause_within_budget(str(error), error.happened, error.pause_seconds)

    def _pause_within_budget(self, problem: str, happened: float, asked_seconds: float) -> float:
        left_seconds = self._deadline.begin(problem, happened)
        if not left_seconds or self._is_last:
            raise self._deadline.is_over()
        self._attempts += 1
        # twice as long each time, and never the same for two processes that met the same trouble
        longest = min(_LONGEST_PAUSE_SECONDS, 0.05 * 2**self._attempts)
        own_seconds = _JITTER.uniform(longest / 2, longest)
        # parts are looked at one after the other: that a later one was refused, too, may be known for a while
        seconds = max(0.0, happened + asked_seconds + own_seconds - time.monotonic())
        self._is_last = seconds > _LAST_PAUSE * left_seconds
        return min(seconds, _LAST_PAUSE * left_seconds)


def _closed() -> FetchFailed:
    return FetchFailed("the stream was closed", may_pass=True)


def _length_problem(came: int, start: int, asked: int) -> str | None:
    if came == asked:
        return None
    return f"bytes {start:,} to {start + asked:,} were asked for and {came:,} came"
