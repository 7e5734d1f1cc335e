"""Puts a rank's share of a checkpoint where it belongs, and commits it once all ranks' shares are there.

Each trainer starts this as a process of its own, so that neither checksums nor uploads hold its interpreter; it has no
torch, a low priority and 50 MB. The share lies in memory that both processes map. It ends when its trainer does, however
that ends. What the two say to each other is JSON.

No rank asks another whether it has finished: rank 0's process looks for the files of all ranks. So a commit waits for no
training step.
"""

import ctypes
import mmap
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Final, Literal, TypeVar

import numpy as np
from crc32c import crc32c
from pydantic import BaseModel

from datastore.errors import DoNotRetry, ViewpointError
from datastore.objects import ObjectFolder
from trainer.commits import (
    CheckpointConfig,
    Entry,
    Manifest,
    RankFiles,
    RankIndex,
    SupersededError,
    commit,
    rank_name,
    retain,
    step_name,
)

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_NICENESS: Final = 19  # a step waits for the slowest of its threads: a tenth of one core taken is a tenth of the step
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.05, 1.0
_LONGEST_RETRY_PAUSE_SECONDS: Final = 5.0

ResultT = TypeVar("ResultT")


class Share(BaseModel, frozen=True):
    """What one rank writes at every save: it stays the same for as long as the process lives."""

    url: str  # of the folder of checkpoints
    rank: int
    world_size: int
    generation: int
    config: CheckpointConfig
    num_bytes: int
    header_bytes: int
    entries: tuple[Entry, ...]  # without checksums

    @property
    def name(self) -> str:
        """Of this rank's files."""
        return rank_name(self.rank, self.world_size, self.generation)


class SaveOrder(BaseModel, frozen=True):
    """One save."""

    step: int
    manifest: Manifest | None  # rank 0's: what it will be, less the ranks' files


class SaveReport(BaseModel, frozen=True):
    """What became of it so far."""

    step: int
    outcome: Literal["uploaded", "committed", "failed"]
    num_bytes: int = 0  # written by this rank
    seconds: float = 0.0  # since the order
    removed: tuple[int, ...] = ()  # steps whose checkpoints were deleted afterwards
    problem: str = ""
    is_hopeless: bool = False


class AbandonedError(Exception):
    """Nobody waits for this upload any more."""


def put_share(share: Share, step: int, content: mmap.mmap | bytes) -> int:
    """Writes one rank's files; returns their bytes. Trouble that may pass is waited for."""
    folder = ObjectFolder(share.url)
    values = np.frombuffer(content, np.uint8)
    index = RankIndex(
        header_bytes=share.header_bytes,
        header_crc32c=checksum(values[: share.header_bytes]),
        num_bytes=share.num_bytes,
        entries=tuple(
            entry.model_copy(update={"crc32c": checksum(values[entry.offset :][: entry.num_bytes])})
            for entry in share.entries
        ),
    )
    text = index.model_dump_json().encode()
    stem = f"{step_name(step)}/{share.name}"
    _persistently(lambda: folder.put(f"{stem}.safetensors", content), share.config.retry_seconds)
    # the index last: it tells rank 0 that this rank is done
    _persistently(lambda: folder.put(f"{stem}.json", text), share.config.retry_seconds)
    return share.num_bytes + len(text)


def commit_all(share: Share, manifest: Manifest, is_abandoned: Callable[[], bool] = lambda: False) -> list[int]:
    """Waits for the files of all ranks, makes them a checkpoint, and deletes what it supersedes: returns those steps."""
    folder, retry_seconds = ObjectFolder(share.url), share.config.retry_seconds
    step = step_name(manifest.step)
    names = [rank_name(rank, share.world_size, share.generation) for rank in range(share.world_size)]
    missing = {f"{name}.json" for name in names}
    pause = _FIRST_PAUSE_SECONDS
    while missing := missing - set(_persistently(lambda: folder.names(step), retry_seconds)):
        if is_abandoned():
            raise AbandonedError
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
    indexes = _persistently(lambda: folder.read_all([f"{step}/{name}.json" for name in names]), retry_seconds)
    ranks = []
    for name in names:
        text = indexes[f"{step}/{name}.json"]
        num_bytes = RankIndex.model_validate_json(text).num_bytes
        ranks.append(RankFiles(name=name, num_bytes=num_bytes, index_crc32c=checksum(text)))
    whole = manifest.model_copy(update={"ranks": tuple(ranks), "committed_at": time.time()})
    _persistently(lambda: commit(folder, whole), retry_seconds)
    return _persistently(lambda: retain(folder, share.config, share.generation), retry_seconds)


def checksum(content: "bytes | np.ndarray") -> int:
    """CRC-32C."""
    return crc32c(content.data if isinstance(content, np.ndarray) else content)


def _persistently(action: Callable[[], ResultT], retry_seconds: float) -> ResultT:
    """What the action returns, tried again after trouble that may pass."""
    began, pause = time.monotonic(), 0.2
    while True:
        try:
            return action()
        except (DoNotRetry, SupersededError):
            raise
        except (ViewpointError, OSError):
            if time.monotonic() - began > retry_seconds:
                raise
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_RETRY_PAUSE_SECONDS)


def serve(memory: int, connection: Connection) -> None:
    """Carries out orders until the trainer is gone."""
    share = Share.model_validate_json(connection.recv_bytes())
    with mmap.mmap(memory, share.num_bytes, prot=mmap.PROT_READ) as content:
        while True:
            order = SaveOrder.model_validate_json(connection.recv_bytes())
            began = time.monotonic()

            def tell(
                outcome: Literal["uploaded", "committed", "failed"],
                order: SaveOrder = order,
                began: float = began,
                **facts: object,
            ) -> None:
                seconds = time.monotonic() - began
                report = SaveReport.model_validate({"step": order.step, "outcome": outcome, "seconds": seconds} | facts)
                connection.send_bytes(report.model_dump_json().encode())

            try:
                num_bytes = put_share(share, order.step, content)
                tell("uploaded", num_bytes=num_bytes)
                if order.manifest is not None:
                    # whoever says anything before the commit wants it no more, or is gone
                    removed = commit_all(share, order.manifest, is_abandoned=connection.poll)
                    tell("committed", num_bytes=num_bytes, removed=tuple(removed))
            except AbandonedError:
                continue
            except (ViewpointError, OSError) as error:
                tell("failed", problem=str(error), is_hopeless=isinstance(error, DoNotRetry))


def main(words: Sequence[str]) -> None:
    """Works for the process that started it; the words are two descriptors, memory and pipe, and its process id."""
    memory, pipe, parent = map(int, words)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:
        return
    os.nice(_NICENESS)
    with Connection(pipe) as connection:
        try:
            serve(memory, connection)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return
