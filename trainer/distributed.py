"""The processes of a run: who this one is, and the few things that they say to each other.

Every function is the identity outside a process group, so that losses and objectives run without ranks.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self, TypeVar, cast

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from datastore.errors import AskedWrongly

ReportT = TypeVar("ReportT")


@dataclass(frozen=True)
class World:
    """This process among the others: `rank` of `size`, `local_rank` on its node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def from_env(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """What torchrun says in RANK, WORLD_SIZE and LOCAL_RANK; a world of one without them."""
        given = {name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in environment}
        if "WORLD_SIZE" not in given:
            return cls()
        try:
            rank, size = int(given["RANK"]), int(given["WORLD_SIZE"])
            local_rank = int(given.get("LOCAL_RANK", given["RANK"]))
        except (KeyError, ValueError) as error:
            raise AskedWrongly(
                f"The environment describes no world: RANK and WORLD_SIZE must be whole numbers, found {given}. "
                "Start workers with torchrun or `viewpoint launch`, or unset WORLD_SIZE to run one process."
            ) from error
        if not 0 <= rank < size:
            raise AskedWrongly(f"RANK={rank} is not one of the {size} ranks that WORLD_SIZE announces.")
        return cls(rank, size, local_rank)

    @property
    def is_first(self) -> bool:
        """True in the one process that speaks and writes for all."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank: all ranks get the same answer."""
        return bool(all_reduce_sum(torch.tensor(float(flag), device=communication_device())).item() > 0)


def uses_gpu() -> bool:
    """Whether this process computes on a GPU: where there is one, unless DS_ACCELERATOR=cpu says otherwise."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


@contextmanager
def joined(timeout_seconds: float) -> Iterator[World]:
    """This process's world, with the process group that torchrun prepared; a world of one needs no address.

    A collective that waits longer than the timeout fails, instead of hiding a dead rank.
    """
    world = World.from_env()
    if on_gpu := uses_gpu():
        torch.cuda.set_device(world.local_rank)
    # nccl for gradients, gloo for what ranks tell each other in host memory
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        alone = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, timeout=timeout, store=alone, rank=0, world_size=1)
    try:
        yield world
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def world_size() -> int:
    """Ranks in the process group; one without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own_rows(num_rows: int) -> slice:
    """Where this rank's rows lie among those that `gather` returns."""
    first = dist.get_rank() * num_rows if dist.is_initialized() else 0
    return slice(first, first + num_rows)


def communication_device() -> torch.device:
    """Where tensors must lie to be sent to other ranks."""
    if dist.is_initialized() and "nccl" in dist.get_backend():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def all_reduce_sum(tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """The sum over all ranks, as a new tensor without gradient."""
    total = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def gather(tensor: Shaped[Tensor, "b *rest"]) -> Shaped[Tensor, "world_b *rest"]:
    """The rows of all ranks, in the order of ranks, with gradient; every rank must bring equally many rows.

    The gradient of a rank's rows is the sum over the losses of all ranks. As the engine then takes the mean over ranks,
    the update follows the mean of the ranks' losses, exactly as one process with all rows would.
    """
    if world_size() == 1:
        return tensor
    return cast(Tensor, _Gather.apply(tensor))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        rows = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(rows, tensor.contiguous())
        context.num_rows = len(tensor)
        return torch.cat(rows)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        total = all_reduce_sum(gradients[0])
        return total[dist.get_rank() * context.num_rows :][: context.num_rows]


def gather_reports(report: ReportT) -> list[ReportT]:
    """Every rank's report (any small picklable value), in the order of ranks, on every rank."""
    if world_size() == 1:
        return [report]
    reports: list[ReportT | None] = [None] * world_size()
    dist.all_gather_object(reports, report)
    return cast(list[ReportT], reports)


def barrier(timeout_seconds: float) -> None:
    """Returns when all ranks are here; after the timeout, a RuntimeError names the missing ranks where gloo is used."""
    if world_size() == 1:
        return
    if dist.get_backend() == "gloo":
        dist.monitored_barrier(timeout=timedelta(seconds=timeout_seconds))
    else:
        dist.barrier()  # nccl waits as long as the process group was told to
