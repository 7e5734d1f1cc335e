"""Large memory that is used again: fresh pages from the system cost several times what is done with them.

A stream fills hundreds of megabytes a second and lets them go just as fast. Left to the allocator, each unit and batch
is a mapping of its own, whose pages the kernel clears one by one, or a place in the heap of whichever thread asked, which
keeps what others free.
"""

import math
import threading
import weakref
from collections import deque
from typing import Any, Final

import numpy as np

_SMALL_BYTES: Final = 2**16
_STEPS_AN_OCTAVE: Final = 8
"""Sizes are rounded up, by an eighth at most: encoded units differ a little in length and shall fit each other's place."""


class Buffers:
    """Arrays whose memory comes back when the last reference to them, or to any view or tensor of theirs, has gone.

    `keep_bytes`: what is allocated beyond that is not kept for later. Threads share it.
    """

    def __init__(self, keep_bytes: int) -> None:
        self._keep_bytes = keep_bytes
        self._lock = threading.Lock()
        self._allocated_bytes = 0
        self._free: dict[int, list[np.ndarray]] = {}
        self._lent: dict[int, weakref.ref[np.ndarray]] = {}
        # whoever drops the last reference may be in the middle of `empty`: so coming back takes no lock
        self._returned: deque[tuple[int, np.ndarray]] = deque()
        self._gone: deque[int] = deque()  # bytes that were counted for others, likewise

    @property
    def allocated_bytes(self) -> int:
        """Memory that is lent or kept for later, and what others said that they hold."""
        with self._lock:
            self._forget_the_gone()
            return self._allocated_bytes

    def count(self, owner: object, num_bytes: int) -> None:
        """Counts memory that is not from here, as long as there is its owner."""
        with self._lock:
            self._allocated_bytes += num_bytes
        weakref.finalize(owner, self._gone.append, num_bytes).atexit = False

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any] | type | str) -> np.ndarray:
        """An array of unset values."""
        dtype = np.dtype(dtype)
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes <= _SMALL_BYTES:
            return np.empty(shape, dtype)
        with self._lock:
            memory = self._take(rounded(num_bytes))
        # numpy lets views hold the array that they were taken from up to the first that is not made of another array;
        # so every view holds `lent`, and none holds `memory` alone
        lent = np.frombuffer(memory.data, np.uint8)
        key, returned = id(memory), self._returned
        self._lent[key] = weakref.ref(lent, lambda _: returned.append((key, memory)))
        return lent[:num_bytes].view(dtype).reshape(shape)

    def _forget_the_gone(self) -> None:
        while self._gone:
            self._allocated_bytes -= self._gone.popleft()

    def _take(self, size: int) -> np.ndarray:
        self._forget_the_gone()
        while self._returned:
            key, memory = self._returned.popleft()
            del self._lent[key]
            self._free.setdefault(len(memory), []).append(memory)
        if self._free.get(size):
            return self._free[size].pop()
        self._allocated_bytes += size
        for other, free in self._free.items():
            while free and self._allocated_bytes > self._keep_bytes:
                free.pop()
                self._allocated_bytes -= other
        return np.empty(size, np.uint8)


def rounded(num_bytes: int) -> int:
    """What an array of so many bytes takes."""
    if num_bytes <= _SMALL_BYTES:
        return num_bytes
    step = 1 << max(0, (num_bytes - 1).bit_length() - _STEPS_AN_OCTAVE.bit_length())
    return -(-num_bytes // step) * step
