"""How much memory a process and its children take at most while something runs."""

import contextlib
import threading
from pathlib import Path
from typing import Final

import psutil

_SAMPLING_SECONDS: Final = 0.1


class PeakMemory:
    """The most memory that this process and its children take at a time, shared pages counted once."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
        self.before_bytes = self._now()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        status = Path("/proc/self/status").read_text()
        highest = int(status.partition("VmHWM:")[2].split()[0]) * 1024
        self.peak_bytes = max(self.peak_bytes, self._now(), highest) - self.before_bytes

    def _watch(self) -> None:
        while not self._ended.wait(_SAMPLING_SECONDS):
            self.peak_bytes = max(self.peak_bytes, self._now())

    def _now(self) -> int:
        own = psutil.Process()
        children = own.children(recursive=True)
        if not children:
            return own.memory_info().rss
        whole = 0
        for process in [own, *children]:
            with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                whole += int(rollup.partition("\nPss:")[2].split()[0]) * 1024
        return whole
