"""Waits beside each other, which an interrupt ends all the same."""

import threading
from collections.abc import Callable
from typing import Any


def beside_each_other(functions: list[Callable[[], Any]]) -> list[Any]:
    """What each returns, in their order; the error of the first of them that failed.

    Each has a thread that the end of the process does not wait for, as it does for those of a pool: a server that never
    answers would hold up Ctrl-C.
    """
    waits = [_Wait(function) for function in functions]
    for wait in waits:
        wait.start()
    for wait in waits:
        wait.join()
        if wait.error is not None:
            raise wait.error
    return [wait.result for wait in waits]


class _Wait(threading.Thread):
    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__(name="beside", daemon=True)
        self._function = function
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self._function()
        except BaseException as error:  # noqa: BLE001  it is raised in the thread that waits
            self.error = error
