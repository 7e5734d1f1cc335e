"""Lines that one process adds to files on object storage, where nothing can be appended to.

    events-20261121T195522Z-rank-0-5f3a01-00001.jsonl    STEM-BEGIN-WRITER-CHANCE-NUMBER

A part is put whole, with all its lines, whenever some were added; once it is large, the next number begins. So a line
costs one request of bounded size, a long run leaves hundreds of objects and not a million, and a request whose answer
was lost can be repeated. Each process has names of its own: a start of the run that was cut off, and does not know it
yet, replaces nothing of the start that came after it.

Training writes behind its steps: `Journal.behind` puts lines from a thread, and waits out trouble that may pass.
"""

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from datastore.errors import ViewpointError

_LARGEST_PART: Final = 2**18  # bytes; rewritten at every flush until then
_FLUSH_SECONDS: Final = 15.0  # between puts of lines that can wait
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.2, 5.0
_FAREWELL_SECONDS: Final = 10.0  # for what is left when training ends by an error

_logger = logging.getLogger(__name__)


@dataclass
class _Part:
    """The part of one stem that still grows."""

    number: int = 1
    text: str = ""  # what is put already
    waiting: list[str] = field(default_factory=list)


class Journal:
    """Adds lines; `put` writes one object whole, by name."""

    def __init__(self, put: Callable[[str, str], None], writer: str) -> None:
        self._put = put
        # tells this process's files from those of others
        self.origin = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{writer}-{uuid.uuid4().hex[:6]}"
        self._parts: dict[str, _Part] = {}
        self._changing, self._putting = threading.Lock(), threading.Lock()
        self._put_at = 0.0
        self._retry_seconds: float | None = None  # None: nobody writes behind
        self._awake, self._ending, self._is_empty = threading.Event(), threading.Event(), threading.Event()
        self._trouble: Exception | None = None
        self._trouble_since = 0.0

    def add(self, stem: str, line: str, *, at_once: bool) -> None:
        """Adds a line, and puts it at once or with those of a quarter of a minute; behind, where that is arranged."""
        with self._changing:
            self._parts.setdefault(stem, _Part()).waiting.append(line)
            self._is_empty.clear()
        if self._retry_seconds is not None:
            self._raise_if_out_of_patience(self._retry_seconds)
            if at_once:
                self._awake.set()
        elif at_once or time.monotonic() - self._put_at > _FLUSH_SECONDS:
            self._put_waiting()

    def flush(self) -> None:
        """Returns when every line is on storage; raises where that cannot be, or not in the time that trouble may last."""
        if self._retry_seconds is None:
            self._put_waiting()
        elif not self._is_flushed(self._retry_seconds):
            raise self._failure()

    @contextmanager
    def behind(self, retry_seconds: float) -> Iterator[None]:
        """Within the block a thread puts what is added, and `add` raises once trouble has lasted for so long.

        Whoever needs to know that all is written calls `flush` before the end of the block: what is left there is
        tried for a few seconds more, and given up with a word in the log.
        """
        assert self._retry_seconds is None, "one thread is enough"
        self._retry_seconds = retry_seconds
        self._ending.clear()
        # a daemon: a request that hangs must not keep a process that is to end
        thread = threading.Thread(target=self._keep_putting, name="journal", daemon=True)
        thread.start()
        try:
            yield
        finally:
            if not self._is_flushed(_FAREWELL_SECONDS):
                _logger.warning("%s", self._failure())
            self._ending.set()
            self._awake.set()
            thread.join(_FAREWELL_SECONDS)
            self._retry_seconds = None

    def _put_waiting(self) -> None:
        """Puts what waits; what could not be put waits on."""
        with self._putting:
            for stem, part in list(self._parts.items()):
                with self._changing:
                    taken = len(part.waiting)
                    text = part.text + "".join(part.waiting)
                if not taken:
                    continue
                self._put(f"{stem}-{self.origin}-{part.number:05d}.jsonl", text)
                with self._changing:
                    del part.waiting[:taken]
                    part.text = text
                    if len(text) >= _LARGEST_PART:
                        part.number, part.text = part.number + 1, ""
            self._put_at = time.monotonic()
            with self._changing:
                if not any(part.waiting for part in self._parts.values()):
                    self._is_empty.set()

    def _keep_putting(self) -> None:
        pause = _FLUSH_SECONDS
        while not self._ending.is_set():
            if self._trouble is None:
                self._awake.wait(pause)
            else:  # an event that comes meanwhile does not hurry a server that has trouble
                self._ending.wait(pause)
            self._awake.clear()
            try:
                self._put_waiting()
            except Exception as error:  # noqa: BLE001 (each object store has errors of its own, and none may end a step)
                if self._trouble is None:
                    self._trouble_since, pause = time.monotonic(), _FIRST_PAUSE_SECONDS
                    _logger.warning("%s Training goes on meanwhile.", self._explained(error))
                self._trouble = error
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            else:
                if self._trouble is not None:
                    _logger.warning("What the run writes down is on storage again: nothing was lost.")
                self._trouble, pause = None, _FLUSH_SECONDS

    def _is_flushed(self, seconds: float) -> bool:
        self._awake.set()
        return self._is_empty.wait(seconds) or not any(part.waiting for part in self._parts.values())

    def _raise_if_out_of_patience(self, retry_seconds: float) -> None:
        if self._trouble is not None and time.monotonic() - self._trouble_since > retry_seconds:
            raise self._failure()

    def _failure(self) -> ViewpointError:
        return ViewpointError(self._explained(self._trouble or TimeoutError("a request has had no answer")))

    def _explained(self, error: Exception) -> str:
        return (
            f"Events and figures of the run cannot be written to object storage: {type(error).__name__}: {error}. They "
            f"are tried again until checkpoint.retry_seconds are over; check the network and the credentials."
        )
