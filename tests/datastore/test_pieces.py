"""Bytes go to their places, however those are cut and asked for."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from datastore.pieces import Pieces


@given(st.lists(st.integers(0, 7), max_size=9), st.data())
def test_any_part_of_the_places_is_those_bytes(sizes: list[int], data: st.DataObject) -> None:
    content = np.arange(sum(sizes), dtype=np.uint8)
    own = [memoryview(bytearray(size)) for size in sizes]
    pieces = Pieces(own)
    assert pieces.num_bytes == len(content)
    pieces.fill(content.data)
    assert b"".join(own) == bytes(pieces.joined()) == content.tobytes()
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    part = pieces.part(start, end)
    assert b"".join(part.memory()) == content[start:end].tobytes()
    most = data.draw(st.integers(1, 10))
    assert [bytes(piece) for piece in part.memory(most)] == [bytes(piece) for piece in part.memory()][:most]
    part.fill(bytes(part.num_bytes))
    assert b"".join(own) == np.where((content >= start) & (content < end), 0, content).astype(np.uint8).tobytes()


def test_only_as_many_bytes_are_copied_as_there_are_of_both() -> None:
    own = [memoryview(bytearray(2)), memoryview(bytearray(3))]
    Pieces(own).fill(b"abc")
    assert b"".join(own) == b"abc\0\0"
    Pieces(own).fill(b"vwxyz more")
    assert b"".join(own) == b"vwxyz"
