"""Runs a test's function in several processes that form a gloo world on this machine."""

import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 90.0


def run_ranks(function: Callable[..., Any], *arguments: Any, world: int = 2) -> list[Any]:
    """What `function(*arguments)` returns on each rank; it must be importable, as every rank is a fresh process."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(rank, world, Path(folder), there, function, arguments))
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        try:
            return [_receive(rank, pipe, Path(folder)) for rank, pipe in enumerate(pipes)]
        finally:
            for process in processes:
                process.join(1)
                if process.is_alive():
                    process.kill()
                    process.join()


def _receive(rank: int, pipe: Connection, folder: Path) -> Any:
    try:
        if wait([pipe], TIMEOUT_SECONDS):
            return pipe.recv()
        outcome = f"said nothing for {TIMEOUT_SECONDS:.0f} s"
    except EOFError:
        outcome = "failed"
    logs = "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(folder.glob("*.log")))
    raise AssertionError(f"rank {rank} {outcome}\n{logs}")


def _rank(
    rank: int, world: int, folder: Path, pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    with (folder / f"rank-{rank}.log").open("w") as log:
        os.dup2(log.fileno(), sys.stderr.fileno())
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
    warnings.simplefilter("error")
    store = dist.FileStore(str(folder / "rendezvous"), world)  # no port to collide on
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    pipe.send(function(*arguments))
    dist.destroy_process_group()
