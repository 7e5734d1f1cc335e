"""Files of JSON lines that several processes add to, and that must be readable whatever happened to one of them."""

import json
import logging
import os
from functools import cache
from pathlib import Path
from typing import Any, Final

Record = dict[str, Any]

_SHARED_TYPES: Final = (
    "9p",
    "beegfs",
    "ceph",
    "cifs",
    "glusterfs",
    "gpfs",
    "lustre",
    "nfs",
    "nfs4",
    "smb3",
    "virtiofs",
)
_logger = logging.getLogger("trainer.lines")


def records_of(content: bytes, where: str) -> list[Record]:
    """The whole lines, parsed. Damaged ones are left out, and counted in a warning.

    What comes after the last newline is no line: its writer is at it, or was killed there.
    """
    records: list[Record] = []
    damaged = 0
    for line in content.rpartition(b"\n")[0].split(b"\n"):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            damaged += 1
            continue
        if isinstance(record, dict):
            records.append(record)
        else:
            damaged += 1
    if damaged:
        _warn_once(where, damaged)
    return records


def append_line(path: Path, record: Record) -> None:
    """Adds one line, whole: lines of several processes of one machine do not mix."""
    line = json.dumps(record).encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line  # somebody was killed within a line: ours must not go with it
        while line:
            line = line[os.write(descriptor, line) :]
    finally:
        os.close(descriptor)


@cache
def is_shared(folder: Path) -> bool:
    """Whether other machines may write there, too: what two of them append at the same time can overwrite each other."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text()
    except OSError:  # no Linux
        return False
    folder = folder.resolve()
    nearest, kind = "", ""
    for words in map(str.split, mounts.splitlines()):
        place = words[4].replace("\\040", " ")
        if folder.is_relative_to(place) and len(place) >= len(nearest):
            nearest, kind = place, words[words.index("-") + 1]
    return kind in _SHARED_TYPES or kind.startswith("fuse.")


@cache
def _warn_once(where: str, damaged: int) -> None:
    _logger.warning(
        "%s has %d damaged line%s, left out: a process or a machine died while it wrote, or the disk is failing",
        where, damaged, "s" * (damaged > 1),
    )  # fmt: skip
