"""Ranges of bytes of a store's objects, checked, and fetched again where they come damaged."""

import threading
from collections.abc import Callable
from typing import Final

from datastore.objects import ObjectFolder

Problem = Callable[[memoryview], str | None]
"""What is wrong with fetched bytes, in words; None where nothing is."""

_ATTEMPTS: Final = 2


class FetchFailed(Exception):
    """Bytes that could not be had undamaged; the message says what was tried and what came."""


class Fetcher:
    """Fetches ranges. Threads share it."""

    def __init__(self, folder: ObjectFolder) -> None:
        self.bytes_fetched = 0
        self._folder = folder
        self._counting = threading.Lock()

    def fetch(self, name: str, start: int, end: int, problem_of: Problem) -> memoryview:
        """The bytes of one object from `start` up to, not including, `end`."""
        problem = "nothing came"
        for _ in range(_ATTEMPTS):
            try:
                content = self._folder.read_range(name, start, end)
            except FileNotFoundError:
                problem = "it is missing"
                continue
            with self._counting:
                self.bytes_fetched += len(content)
            if len(content) != end - start:
                problem = f"bytes {start:,} to {end:,} were asked for and {len(content):,} came"
                continue
            found = problem_of(memoryview(content))
            if found is None:
                return memoryview(content)
            problem = found
        raise FetchFailed(f"{problem}, in {_ATTEMPTS} attempts")

    def close(self) -> None:
        """Gives up what is under way."""
