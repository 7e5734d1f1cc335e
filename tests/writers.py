"""Writers that tests run in processes of their own: some share a store, some are killed, some run out of room."""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from datastore.errors import DoNotRetry
from datastore.layout import StoreAttributes, create_store, open_store
from datastore.write import BlockWriter, publish, verify
from tests.stores import small_attributes, write_blocks

FEW_FIELDS = ("points", "split", "id")

# a server that has imported everything forks a writer in milliseconds, and without the test process's threads
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.writers"])


def write_part(url: str, attributes: StoreAttributes, fields: tuple[str, ...], part: tuple[int, int] = (0, 1)) -> None:
    """What an ingest does: creates or opens the store, writes what is pending of its part, publishes."""
    store = create_store(url, attributes, fields)
    write_blocks(store, BlockWriter(store).pending(part))
    publish(store)


def write_part_and_die(url: str, attributes: StoreAttributes, fields: tuple[str, ...], operation: int) -> None:
    """The same, but killed right before its n-th operation that changes the store's files."""
    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if _changes_files(event, arguments) and str(arguments[0]).startswith(url):
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    write_part(url, attributes, fields)


def _changes_files(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "open":
        return bool(arguments[2] & os.O_CREAT)
    if event == "os.mkdir":
        return not Path(arguments[0]).exists()
    return event in ("os.rename", "os.link") or (event == "os.remove" and Path(arguments[0]).exists())


def write_with_file_limit(url: str, attributes: StoreAttributes, fields: tuple[str, ...], limit_bytes: int) -> None:
    """The same, where no file may be larger than a limit; what is said of it goes to a file beside the store."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))
    try:
        write_part(url, attributes, fields)
    except DoNotRetry as error:
        Path(f"{url}.error").write_text(str(error))
        sys.exit(error.exit_code)


@contextmanager
def running(function: Callable[..., None], *arguments: Any) -> Iterator[BaseProcess]:
    """A process that runs the function, killed at the end if it is still there."""
    process = _processes.Process(target=function, args=arguments)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()
        process.close()


def fill_small_disk(folder: str) -> None:
    """Runs in a mount namespace of its own: a disk fills up, room is made, and the same call goes on."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder], check=True)
    url, attributes = f"{folder}/store", small_attributes(num_rows=640, points_per_shape=200)
    try:
        write_part(url, attributes, FEW_FIELDS)
    except DoNotRetry as error:
        print(error)
    else:
        sys.exit("the disk was not full")
    subprocess.run(["mount", "-o", "remount,size=16m", folder], check=True)
    write_part(url, attributes, FEW_FIELDS)
    store = open_store(url)
    if not store.is_complete() or verify(store):
        sys.exit("the store did not recover")
