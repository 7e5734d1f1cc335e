"""Pickles of numbers, strings, containers and numpy arrays, read without running anything that they name.

A pickle is a program: read by `pickle.load`, it calls whatever its author wrote into it. This reader knows a dozen
names, each of them stands for a function of this file, and numpy never sees the pickle's description of an array. Any
other name is refused, with the name in the message. Long arrays stay in the file until they are asked for, so a data
set of gigabytes can be listed in megabytes.
"""

import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, ClassVar, Final

import numpy as np

from datastore.errors import SourceError

_STAYS_IN_FILE_FROM: Final = 4096  # bytes
_DTYPE_CODES: Final = "biufcSU"  # of plain values; objects and records are refused

# What a damaged or malicious pickle makes the machine raise.
_READING_FAILS: Final = (
    ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, TypeError, UnicodeError, ValueError,
    pickle.UnpicklingError, struct.error,
)  # fmt: skip


@dataclass(frozen=True)
class StoredBytes:
    """Bytes that were left in the file."""

    offset: int
    length: int


class _Refused(Exception):
    """The pickle holds something that this reader does not take; the message goes on from the file's name."""


class PickledArray:
    """An array of a pickle. `read` gives its values."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.dtype = np.dtype(np.uint8)
        self._is_fortran = False
        self._content: bytes | StoredBytes = b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, content = state
        self._fill(content, dtype, shape, is_fortran is True)

    def _fill(self, content: object, dtype: object, shape: object, is_fortran: bool) -> None:
        if not isinstance(dtype, _PickledDtype) or not isinstance(shape, tuple):
            raise ValueError("an array's description is none")
        if not all(isinstance(length, int) and length >= 0 for length in shape):
            raise ValueError(f"an array's shape is {shape!r}")
        if isinstance(content, str):
            content = content.encode("latin1")  # as Python 2 wrote it
        if not isinstance(content, bytes | StoredBytes):
            raise ValueError("an array's content is none")
        num_bytes = content.length if isinstance(content, StoredBytes) else len(content)
        expected = dtype.numpy.itemsize
        for length in shape:
            expected *= length
        if num_bytes != expected:
            raise ValueError(f"an array of shape {shape} and type {dtype.numpy} has {num_bytes} bytes")
        self.shape, self.dtype, self._is_fortran, self._content = shape, dtype.numpy, is_fortran, content

    def read(self, file: IO[bytes]) -> np.ndarray:
        """Its values, from the file that the pickle was read from."""
        content = self._content
        if isinstance(content, StoredBytes):
            file.seek(content.offset)
            stored, content = content, file.read(content.length)
            if len(content) != stored.length:
                raise SourceError("the pickle has become shorter since it was read")
        flat = np.frombuffer(content, self.dtype)
        return flat.reshape(self.shape, order="F" if self._is_fortran else "C")


def load_pickle(file: IO[bytes], where: str) -> Any:
    """What the pickle holds, with a `PickledArray` for each array and `StoredBytes` for other long bytes.

    SourceError where it names anything but numpy arrays, numbers, strings and containers, or ends too early.
    """
    try:
        return _Reader(file).load()
    except _Refused as refused:
        raise SourceError(f"{where} {refused}.") from refused
    except _READING_FAILS as error:
        detail = f"{type(error).__name__}: {error}"
        raise SourceError(
            f"{where} is no pickle of arrays, or only a part of one ({detail}). Fetch it again."
        ) from error


class _PickledDtype:
    """A plain type of values, from its name and byte order."""

    def __init__(self, name: str, *_: object) -> None:
        if not isinstance(name, str) or name[:1] not in _DTYPE_CODES or not name[1:].isdecimal():
            raise _Refused(f"holds arrays of {name!r}, and only arrays of numbers and of strings are read")
        self.numpy = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        if order not in ("<", ">", "|", "="):
            raise ValueError(f"a type has byte order {order!r}")
        self.numpy = self.numpy.newbyteorder(order)


def _reconstruct(*_: object) -> PickledArray:
    return PickledArray()


def _from_buffer(content: object, dtype: object, shape: object, order: object) -> PickledArray:
    array = PickledArray()
    array._fill(bytes(content) if isinstance(content, bytearray) else content, dtype, shape, order == "F")
    return array


def _scalar(dtype: object, content: object) -> Any:
    if not isinstance(dtype, _PickledDtype) or not isinstance(content, bytes | str):
        raise ValueError("a scalar's description is none")
    raw = content.encode("latin1") if isinstance(content, str) else content
    return np.frombuffer(raw, dtype.numpy, count=1)[0]


def _array_type(*_: object) -> None:
    raise ValueError("an array is made without its content")


def _encoded(text: object, encoding: object) -> bytes:
    # pickles of protocol 2 and before hold bytes as text
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise ValueError("text is encoded as no bytes of a pickle are")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""  # the only bytes that pickles of protocol 2 and before spell out as a call


def _known_names() -> dict[tuple[str, str], Callable[..., Any]]:
    known: dict[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "ndarray"): _array_type,
        ("numpy", "dtype"): _PickledDtype,
        ("_codecs", "encode"): _encoded,
        ("collections", "OrderedDict"): OrderedDict,
    }
    for numpy in ("numpy.core", "numpy._core"):  # before version 2, and since
        known[f"{numpy}.multiarray", "_reconstruct"] = _reconstruct
        known[f"{numpy}.multiarray", "scalar"] = _scalar
        known[f"{numpy}.numeric", "_frombuffer"] = _from_buffer
    for builtins in ("builtins", "__builtin__"):  # of Python 3, and 2
        known[builtins, "bytes"] = _no_bytes
        for kind in (set, frozenset, list, tuple, dict, complex):
            known[builtins, kind.__name__] = kind
    return known


class _Reader(pickle._Unpickler):
    """The standard library's own machine, in Python: with its names, its states and its long bytes under control."""

    _KNOWN: Final = _known_names()

    # the machine's own, which its type stubs leave out
    stack: list[Any]
    append: Callable[[object], None]

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="latin1")
        self._stream = file
        start = file.tell()
        self._end = file.seek(0, 2)
        file.seek(start)

    def find_class(self, module: str, name: str) -> Any:
        known = self._KNOWN.get((module, name))
        if known is None:
            raise _Refused(
                f"holds a {module}.{name}, and only numpy arrays, numbers, strings and containers are read from pickles. "
                f"Do not open it with other tools unless you trust whoever made it"
            )
        return known

    def _bytes(self, length: int) -> bytes | StoredBytes:
        offset = self._stream.tell()
        if not 0 <= length <= self._end - offset:
            raise EOFError(f"{length:,} bytes are announced, and {self._end - offset:,} are left")
        if length < _STAYS_IN_FILE_FROM:
            return self._stream.read(length)
        self._stream.seek(length, 1)
        return StoredBytes(offset, length)

    def _load_bytes(self, length_format: str) -> None:
        (length,) = struct.unpack(length_format, self._stream.read(struct.calcsize(length_format)))
        self.append(self._bytes(length))

    def _load_frame(self) -> None:
        # a frame only says how much may be read ahead; without reading ahead, the stream's place is the machine's
        self._stream.read(8)

    def _load_build(self) -> None:
        state = self.stack.pop()
        built = self.stack[-1]
        if not isinstance(built, PickledArray | _PickledDtype):
            raise pickle.UnpicklingError(f"a {type(built).__name__} is given a state")
        built.__setstate__(state)

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch,
        pickle.BINBYTES[0]: lambda self: self._load_bytes("<I"),
        pickle.BINBYTES8[0]: lambda self: self._load_bytes("<Q"),
        pickle.BYTEARRAY8[0]: lambda self: self._load_bytes("<Q"),
        pickle.FRAME[0]: _load_frame,
        pickle.BUILD[0]: _load_build,
    }
