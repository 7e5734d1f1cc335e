"""Memory that a range of bytes is read into: one piece, or many, that lie anywhere."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate


class Pieces:
    """Places for neighbouring bytes, in their order."""

    def __init__(self, pieces: Sequence[memoryview]) -> None:
        self._pieces = pieces
        self._ends = list(accumulate(map(len, pieces)))

    @property
    def num_bytes(self) -> int:
        """That there are places for."""
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[memoryview]:
        return iter(self._pieces)

    def part(self, start: int, end: int) -> "Pieces":
        """The places of the bytes from `start` up to, not including, `end`."""
        if start >= end:
            return Pieces([])
        if (start, end) == (0, self.num_bytes):
            return self
        first, last = bisect_right(self._ends, start), bisect_right(self._ends, end - 1)
        chosen = list(self._pieces[first : last + 1])
        chosen[-1] = chosen[-1][: end - self._start(last)]
        chosen[0] = chosen[0][start - self._start(first) :]
        return Pieces(chosen)

    def fill(self, content: memoryview | bytes) -> None:
        """Copies bytes to their places, as many as there are of both."""
        source, at = memoryview(content), 0
        for piece in self._pieces:
            count = min(len(piece), len(source) - at)
            piece[:count] = source[at : at + count]
            at += count

    def joined(self) -> memoryview:
        """The bytes one after the other; a copy where they lie in many places."""
        return self._pieces[0] if len(self._pieces) == 1 else memoryview(b"".join(self._pieces))

    def _start(self, number: int) -> int:
        return self._ends[number - 1] if number else 0
