"""A cache stage in a process of its own, which kills itself around one of its operations on the store."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from multiprocessing.process import BaseProcess
from typing import Any

import timm  # noqa: F401
import torch

import datastore.write  # noqa: F401
import models.exported
import models.image_models  # noqa: F401
import trainer.describing  # noqa: F401
from datastore.layout import open_store
from datastore.objects import ObjectFolder
from trainer.cache import cache
from trainer.teachers import TimmOptions, load_teacher

# a server that has imported everything, also what the stage imports late, forks one in milliseconds; all tests share it
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.writers", "tests.killable_cache"])


def cache_and_die(url: str, moment: str, number: int, seconds: float) -> None:
    """Caches a small random teacher's features. `moment`: never, or before, during or after the n-th operation.

    `during` waits so many seconds after its beginning.
    """
    torch.set_num_threads(2)
    if moment != "never":
        count = threading.Lock(), [0]
        for name in ("put", "create", "remove"):
            setattr(ObjectFolder, name, _deadly(getattr(ObjectFolder, name), moment, number, seconds, count))
    teacher, _ = load_teacher(None, TimmOptions("test_resnet", image_size=32))
    cache(open_store(url), teacher, "teacher", batch=8)


def _deadly(
    operation: Callable[..., Any], moment: str, number: int, seconds: float, count: tuple[Any, list[int]]
) -> Callable[..., Any]:
    lock, so_far = count

    @wraps(operation)
    def watched(*arguments: Any) -> Any:
        with lock:
            so_far[0] += 1
            due = so_far[0] == number
        if due and moment == "before":
            _die()
        if due and moment == "during":
            threading.Timer(seconds, _die).start()
        result = operation(*arguments)
        if due and moment == "after":
            _die()
        if due and moment == "during":
            time.sleep(60)  # it was over before its time
        return result

    return watched


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def running(function: Callable[..., None], *arguments: Any) -> Iterator[BaseProcess]:
    """A process that runs the function; killed at the end if it is still there."""
    process = _processes.Process(target=function, args=arguments)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()
