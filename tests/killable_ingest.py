"""`viewpoint ingest` that kills itself: `python -m tests.killable_ingest MOMENT N SECONDS SOURCE STORE [OPTION...]`.

MOMENT is `before`, `during` or `after` the N-th operation that changes the store, counted from 1; `during` waits so many
SECONDS after its beginning. With `publish` in front, as in `publish-before`, only those operations on manifests count.
The whole process group dies at once, as by `kill -9 -- -GROUP`. `never` kills nobody.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

from datastore.objects import ObjectFolder
from trainer.__main__ import main as trainer_main

_count = 0
_counting = threading.Lock()


def die() -> None:
    """Ends this process and its workers; nothing of Python's runs any more."""
    os.killpg(0, signal.SIGKILL)


def deadly(operation: Callable[..., Any], moment: str, number: int, seconds: float) -> Callable[..., Any]:
    """The operation, which kills the group when it is called for the given time."""
    publishing, _, moment = moment.rpartition("-")

    @wraps(operation)
    def watched(folder: ObjectFolder, name: str, *content: bytes) -> Any:
        global _count
        with _counting:
            _count += not publishing or "/manifests/" in name
            due = _count == number and (not publishing or "/manifests/" in name)
        if due and moment == "before":
            die()
        if due and moment == "during":
            threading.Timer(seconds, die).start()
        result = operation(folder, name, *content)
        if due and moment == "after":
            die()
        if due and moment == "during":
            time.sleep(60)  # it was over before its time
        return result

    return watched


def main() -> int:
    """The exit code of the ingest, if it lives to see one."""
    moment, number, seconds, *words = sys.argv[1:]
    for name in ("put", "create", "remove"):
        setattr(ObjectFolder, name, deadly(getattr(ObjectFolder, name), moment, int(number), float(seconds)))
    return trainer_main(["ingest", *words])


if __name__ == "__main__":
    sys.exit(main())
