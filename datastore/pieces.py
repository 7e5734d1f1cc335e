"""Memory that a range of bytes is read into: one piece, or many, that lie anywhere."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate


class Pieces:
    """Places for neighbouring bytes, in their order."""

    def __init__(self, pieces: Sequence[memoryview]) -> None:
        self._pieces = pieces
        self._ends = list(accumulate(map(len, pieces)))
        # what of them this is: a part has the same lists, which may be long
        self._start, self._end = 0, self._ends[-1] if self._ends else 0

    @property
    def num_bytes(self) -> int:
        """That there are places for."""
        return self._end - self._start

    def part(self, start: int, end: int) -> "Pieces":
        """The places of the bytes from `start` up to, not including, `end`."""
        assert end <= self.num_bytes, f"{end} of {self.num_bytes} bytes"
        part = Pieces.__new__(Pieces)
        part._pieces, part._ends = self._pieces, self._ends
        part._start, part._end = self._start + start, self._start + max(start, end)
        return part

    def memory(self, most: int | None = None) -> list[memoryview]:
        """The memory, piece by piece; only the first `most` pieces."""
        if not self.num_bytes:
            return []
        first, last = bisect_right(self._ends, self._start), bisect_right(self._ends, self._end - 1)
        if most is not None:
            last = min(last, first + most - 1)
        chosen = list(self._pieces[first : last + 1])
        if self._ends[last] > self._end:
            chosen[-1] = chosen[-1][: self._end - self._ends[last]]
        begin = self._ends[first - 1] if first else 0
        if begin < self._start:
            chosen[0] = chosen[0][self._start - begin :]
        return chosen

    def fill(self, content: memoryview | bytes) -> None:
        """Copies bytes to their places, as many as there are of both."""
        count = min(self.num_bytes, len(content))
        source, at = memoryview(content), 0
        for piece in self.part(0, count).memory():
            piece[:] = source[at : at + len(piece)]
            at += len(piece)

    def joined(self) -> memoryview:
        """The bytes one after the other; a copy where they lie in many places."""
        memory = self.memory()
        return memory[0] if len(memory) == 1 else memoryview(b"".join(memory))
