"""Runs a test's function in several processes that form a gloo world on this machine.

The processes stay a while for the next test, as importing torch takes longer than most tests do; each call makes a
process group of its own. A call that fails or says nothing ends them.
"""

import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 90.0
IDLE_SECONDS = 60.0  # then they go, and their memory with them
REUSE_SECONDS = 40.0  # less, so that none is asked while it goes

_ranks: dict[int, list["_Rank"]] = {}
_last_used: dict[int, float] = {}


def run_ranks(function: Callable[..., Any], *arguments: Any, world: int = 2) -> list[Any]:
    """What `function(*arguments)` returns on each rank; it must be importable: every rank is a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = _ranks.pop(world, [])
        if not ranks or time.monotonic() - _last_used[world] > REUSE_SECONDS:
            ranks = [_Rank(rank, world) for rank in range(world)]
        try:
            for rank in ranks:
                rank.pipe.send((Path(folder), function, arguments))
            results = [rank.receive(Path(folder)) for rank in ranks]
        except BaseException:
            for rank in ranks:
                rank.process.kill()
                rank.process.join()
            raise
        _ranks[world], _last_used[world] = ranks, time.monotonic()
        return results


class _Rank:
    def __init__(self, rank: int, world: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.rank = rank
        self.pipe, there = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(rank, world, there), daemon=True)
        self.process.start()
        there.close()

    def receive(self, folder: Path) -> Any:
        try:
            if wait([self.pipe], TIMEOUT_SECONDS):
                return self.pipe.recv()
            outcome = f"said nothing for {TIMEOUT_SECONDS:.0f} s"
        except EOFError:
            outcome = "failed"
        logs = "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(folder.glob("*.log")))
        raise AssertionError(f"rank {self.rank} {outcome}\n{logs}")


def _serve(rank: int, world: int, pipe: Connection) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        if not pipe.poll(IDLE_SECONDS):
            return
        try:
            folder, function, arguments = pipe.recv()
        except EOFError:
            return
        with (folder / f"rank-{rank}.log").open("w") as log:
            os.dup2(log.fileno(), sys.stderr.fileno())
        store = dist.FileStore(str(folder / "rendezvous"), world)  # no port to collide on
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = function(*arguments)
        if dist.is_initialized():
            dist.destroy_process_group()
        pipe.send(result)
