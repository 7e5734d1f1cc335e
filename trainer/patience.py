"""Trouble with storage that may pass is waited out: a start of the run does not fail for a minute without an answer.

The budget is one for the whole start, since the other ranks wait meanwhile: it lies below the time that they wait for
each other. Uploads have one of their own (trainer/uploader.py), and so do reads of samples (datastore/fetch.py).
"""

import errno
import logging
import mmap
import time
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from datastore.errors import AskedWrongly, DoNotRetry, Unavailable, ViewpointError
from datastore.objects import ObjectFolder

_LASTING: Final = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.EDQUOT,
)
"""What is wrong with a path or a disk, and is no better a minute later."""

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.2, 5.0
_logger = logging.getLogger("trainer.patience")

ResultT = TypeVar("ResultT")


class Patience:
    """So many seconds of trouble in all."""

    def __init__(self, seconds: float) -> None:
        self._left = seconds

    def persist(self, action: Callable[[], ResultT], what: str) -> ResultT:
        """What the action returns, tried again while it fails of what may pass; Unavailable when the time is up."""
        pause, trouble_since = _FIRST_PAUSE_SECONDS, 0.0
        while True:
            try:
                result = action()
            except (ViewpointError, OSError) as error:
                if isinstance(error, DoNotRetry | AskedWrongly) or getattr(error, "errno", None) in _LASTING:
                    raise
                if not trouble_since:
                    trouble_since = time.monotonic()
                    _logger.warning("cannot %s, which is tried for %.0f s: %s", what, self._left, _described(error))
                tried = time.monotonic() - trouble_since
                if tried >= self._left:
                    raise Unavailable(
                        f"It was not possible to {what} within {tried:.0f} s: {_described(error)}. Check the network and "
                        f"the storage; what is committed is safe, and the same command goes on."
                    ) from error
                time.sleep(min(pause, self._left - tried))
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            else:
                if trouble_since:
                    self._left -= time.monotonic() - trouble_since
                    _logger.warning("it was possible to %s after %.1f s", what, time.monotonic() - trouble_since)
                return result


class PatientFolder(ObjectFolder):
    """A folder whose objects are asked for again after trouble."""

    def __init__(self, url: str, patience: Patience) -> None:
        super().__init__(url)
        self._patience = patience

    def read(self, name: str) -> bytes:
        """One object's content."""
        once = super().read
        return self._patience.persist(lambda: once(name), f"read {self.url}/{name}")

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """Some bytes of one object."""
        once = super().read_range
        return self._patience.persist(lambda: once(name, start, end), f"read {self.url}/{name}")

    def read_all(self, names: Sequence[str]) -> dict[str, bytes]:
        """The content of those objects that exist."""
        once = super().read_all
        return self._patience.persist(lambda: once(names), f"read from {self.url}")

    def names(self, folder: str = "") -> list[str]:
        """The names right below a folder."""
        once = super().names
        return self._patience.persist(lambda: once(folder), f"list {self.url}")

    def put(self, name: str, content: bytes | mmap.mmap) -> None:
        """Writes one object whole."""
        once = super().put
        self._patience.persist(lambda: once(name, content), f"write {self.url}/{name}")

    def create(self, name: str, content: bytes) -> bool:
        """Writes one object if there is none of that name. False also where its answer was lost: see `create` there."""
        once = super().create
        return self._patience.persist(lambda: once(name, content), f"create {self.url}/{name}")

    def remove(self, name: str) -> None:
        """Removes one object if it is there."""
        once = super().remove
        self._patience.persist(lambda: once(name), f"remove {self.url}/{name}")


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
