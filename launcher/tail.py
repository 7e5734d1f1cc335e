"""Reads files of JSON lines while others still write them."""

from pathlib import Path
from typing import Any

from trainer.lines import records_of

Record = dict[str, Any]


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
