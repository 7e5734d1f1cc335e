"""Reads files of JSON lines while others still write them."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from trainer.lines import records_of

Record = dict[str, Any]

_COMPLAINT: Final = re.compile(
    r"(?:\[rank\d+\]: )?(?:viewpoint: (?P<message>.+)|(?P<exception>[\w.]+(?:Error|Exception)\b.*))"
)


class Tail:
    """Delivers each line of a file once; half a line waits for its end, a file that is not there yet has none.

    A damaged line is left out, with a warning.
    """

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        self.path = path
        self._offset = path.stat().st_size if from_end and path.exists() else 0

    def read(self) -> list[Record]:
        """What was written since the last call."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        self._offset += len(whole) + len(newline)
        return records_of(whole + newline, str(self.path))


def last_lines(path: Path, count: int) -> list[str]:
    """The end of a log; empty where there is no file."""
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return []
    return text.splitlines()[-count:]


def complaint(lines: Iterable[str]) -> str:
    """What a log says went wrong: our own last message, else the last exception; empty where it tells neither."""
    found = [match for match in map(_COMPLAINT.fullmatch, lines) if match is not None]
    messages = [match["message"] for match in found if match["message"]]
    return (messages or [match["exception"] for match in found] or [""])[-1]
