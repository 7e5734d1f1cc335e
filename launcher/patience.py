"""What may fail now and then without ending a job: looking for notes on object storage, and leaving some there."""

import logging
from collections.abc import Callable
from typing import TypeVar

ResultT = TypeVar("ResultT")
_logger = logging.getLogger("launcher.patience")


def tolerating(action: Callable[[], ResultT], what: str, otherwise: ResultT) -> ResultT:
    """The action's result; where it fails, a line in the log and what stands in for it."""
    try:
        return action()
    except Exception as error:  # noqa: BLE001 (each object store has errors of its own, and none may end a job)
        _logger.warning("could not %s, which is tried again: %s: %s", what, type(error).__name__, error)
        return otherwise
