"""The restricted unpickler: it reads arrays of every protocol, and runs nothing of what a pickle names."""

import collections
import io
import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datastore.errors import SourceError
from datastore.sources.restricted_pickle import PickledArray, StoredBytes, load_pickle

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def read(content: bytes) -> Any:
    return load_pickle(io.BytesIO(content), "cache.dat")


def values(content: bytes, found: Any) -> Any:
    """What was read, with every array in its place."""
    if isinstance(found, PickledArray):
        return found.read(io.BytesIO(content))
    if isinstance(found, list | tuple):
        return type(found)(values(content, part) for part in found)
    return {key: values(content, part) for key, part in found.items()} if isinstance(found, dict) else found


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "array",
    [
        np.arange(6000, dtype=np.float32).reshape(1000, 6),
        np.asfortranarray(np.arange(6000, dtype=np.float64).reshape(1000, 6)),
        np.arange(5, dtype=">i4"),
        np.array([3], np.int32),
        np.array(2.5),
        np.array(["ab", "c"]),
        np.array([True, False]),
        np.zeros((0, 3), np.uint8),
        np.arange(12)[::2],
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_arrays_of_every_protocol_come_back(protocol: int, array: np.ndarray) -> None:
    content = pickle.dumps([array, array], protocol)
    for found in values(content, read(content)):
        assert found.dtype == array.dtype
        assert np.array_equal(found, array)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_numbers_strings_and_containers_come_back(protocol: int) -> None:
    things = {
        "list": [1, -(2**70), 2.5, None, True, "Straße", b"\x00\xff", 1j],
        "nested": ({"a": (1, (2, [3]))}, {1, 2}, frozenset({"x"}), collections.OrderedDict(a=1)),
    }
    assert read(pickle.dumps(things, protocol)) == things


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_numpy_scalars_come_back(protocol: int) -> None:
    found = read(pickle.dumps([np.float32(1.5), np.int64(-3), np.bool_(True)], protocol))
    assert found == [1.5, -3, True]
    assert found[0].dtype == np.float32


@pytest.mark.parametrize(("before", "after"), [("numpy._core", "numpy.core"), ("numpy.core", "numpy._core")])
def test_pickles_of_both_numpy_1_and_2_are_read(before: str, after: str) -> None:
    content = pickle.dumps(np.arange(3.0), 3).replace(before.encode(), after.encode())
    assert np.array_equal(values(content, read(content)), [0, 1, 2])


def test_a_python_2_pickle_of_an_array_is_read() -> None:
    # as Python 2 writes arange(3, dtype=float32): its bytes are a string
    content = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I3\ntcnumpy\ndtype\n(S'f4'\nI0\nI1\ntR"
        b"(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nS'\\x00\\x00\\x00\\x00\\x00\\x00\\x80?\\x00\\x00\\x00@'\ntb."
    )
    assert np.array_equal(values(content, read(content)), [0, 1, 2])


def test_long_arrays_stay_in_the_file_until_they_are_asked_for() -> None:
    arrays = [np.full((2000, 6), number, np.float32) for number in range(20)]
    content = pickle.dumps([arrays, [b"x" * 10_000]])

    class Counting(io.BytesIO):
        num_read = 0

        def read(self, size: int | None = -1) -> bytes:
            found = super().read(size)
            self.num_read += len(found)
            return found

    file = Counting(content)
    (found, (text,)) = load_pickle(file, "cache.dat")
    assert file.num_read < 5_000 < len(content)
    assert np.array_equal(found[7].read(file), arrays[7])
    assert isinstance(text, StoredBytes)


# --- what is refused


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Harmless:
    pass


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_malicious_pickle_runs_nothing_and_is_named(tmp_path: Path, protocol: int) -> None:
    trace = tmp_path / "trace"
    content = pickle.dumps([np.zeros(3), Calls(os.system, f"touch {trace}")], protocol)
    with pytest.raises(SourceError, match=r"cache\.dat holds a (posix|nt)\.system, and only numpy arrays"):
        read(content)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (Calls(eval, "1"), "eval"),
        (Calls(getattr, "a", "upper"), "getattr"),
        (Calls(bytearray, 10), "bytearray"),
        (Calls(subprocess.Popen, ["true"]), r"subprocess\.Popen"),
        (Calls(np.load, "x"), r"numpy.*load"),
        (Calls(np.fromfile, "x"), "fromfile"),
        (Harmless(), "Harmless"),
        (collections.Counter("a"), r"collections\.Counter"),
        (np.ma.masked_array([1.0]), r"numpy\.ma"),
    ],
)
def test_other_names_are_refused_with_their_names(thing: object, name: str) -> None:
    with pytest.raises(SourceError, match=f"holds a .*{name}"):
        read(pickle.dumps(thing))


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"(ios\nsystem\n.",
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.",
        b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__class__\x93.",  # a dotted path below a name that is known
        b"\x80\x02\x82\x01.",  # a registered extension
        b"Pid\n.",  # a persistent id
        b"\x80\x05\x97.",  # an out-of-band buffer
        b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.",
        b"cnumpy\nndarray\n(I1000000000\ntR.",
        b"cnumpy\ndtype\n(S'O8'\ntR.",
        b"c_codecs\nencode\n}S'a'\nI1\nsb.",  # a state for what has none
        b"cbuiltins\nlist\n(N}S'append'\nNsttb.",
    ],
)
def test_other_ways_to_run_or_change_something_are_refused(content: bytes) -> None:
    with pytest.raises(SourceError, match=r"cache\.dat"):
        read(content)


@pytest.mark.parametrize("array", [np.array([{}], dtype=object), np.zeros(2, dtype=[("a", "f4")])])
def test_arrays_of_objects_and_records_are_refused(array: np.ndarray) -> None:
    with pytest.raises(SourceError, match=r"cache\.dat holds arrays of '[OV]\d'"):
        read(pickle.dumps(array))


def test_an_array_whose_bytes_do_not_fill_its_shape_is_refused() -> None:
    content = pickle.dumps(np.arange(2000, dtype=np.float32), 4)
    wrong = content.replace((2000).to_bytes(2, "little") + b"\x85", (2001).to_bytes(2, "little") + b"\x85")
    assert wrong != content
    with pytest.raises(SourceError, match="shape"):
        read(wrong)


def test_a_truncated_pickle_is_refused_wherever_it_ends() -> None:
    content = pickle.dumps([[np.zeros((300, 6), np.float32)] * 2, [np.array([1], np.int32)]])
    for length in [*range(0, 300, 7), *range(300, len(content), 499), len(content) - 1]:
        with pytest.raises(SourceError, match=r"cache\.dat is no pickle of arrays, or only a part of one"):
            read(content[:length])


def test_noise_is_refused() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        content = random.bytes(60)
        try:
            read(content)
        except SourceError:
            continue
