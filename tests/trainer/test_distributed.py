"""Tests of trainer/distributed.py."""

import time

import pytest
import torch
import torch.distributed as dist

from datastore.errors import AskedWrongly
from tests.ranks import run_ranks
from trainer.distributed import World, all_reduce_sum, barrier, gather, gather_reports, own_rows, world_size


def _pair_losses(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(queries @ keys.T, dim=1).mean()


def _gathered_gradient(rows: torch.Tensor) -> torch.Tensor:
    rank = dist.get_rank()
    mine = rows.chunk(world_size())[rank].clone().requires_grad_()
    assert torch.equal(gather(mine)[own_rows(len(mine))], mine)
    _pair_losses(mine, gather(mine)).backward()
    gradient = mine.grad
    assert gradient is not None
    return gradient / world_size()  # the engine takes the mean over ranks


def _sums_and_reports() -> tuple[float, bool, bool, list[str]]:
    world = World.from_env()
    total = all_reduce_sum(torch.tensor(float(world.rank + 1), requires_grad=True))
    assert not total.requires_grad
    barrier(timeout_seconds=20)
    return total.item(), world.any(world.rank == 1), world.any(False), gather_reports(f"rank {world.rank}")


def _barrier_without_rank_one() -> str:
    if dist.get_rank() == 1:
        time.sleep(2)
        return ""
    with pytest.raises(RuntimeError) as error:
        barrier(timeout_seconds=0.5)
    return str(error.value)


def test_the_gradient_of_gathered_rows_is_that_of_one_process_with_all_rows() -> None:
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    whole = rows.clone().requires_grad_()
    _pair_losses(whole, gather(whole)).backward()
    parts = run_ranks(_gathered_gradient, rows, world=2)
    torch.testing.assert_close(torch.cat(parts), whole.grad)


def test_all_ranks_get_the_same_sum_the_same_flag_and_all_reports() -> None:
    assert run_ranks(_sums_and_reports) == [(3.0, True, False, ["rank 0", "rank 1"])] * 2


def test_a_barrier_names_the_missing_rank_instead_of_waiting_for_ever() -> None:
    first, second = run_ranks(_barrier_without_rank_one)
    assert "Rank 1" in first and second == ""


def test_without_a_process_group_everything_is_the_identity() -> None:
    tensor = torch.arange(3.0, requires_grad=True)
    assert gather(tensor) is tensor
    assert torch.equal(all_reduce_sum(tensor), tensor.detach())
    assert gather_reports(7) == [7]
    assert World.from_env({}) == World(0, 1, 0)
    assert World().any(True) and not World().any(False)


def test_the_world_comes_from_the_environment_of_torchrun() -> None:
    assert World.from_env({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}) == World(3, 4, 1)
    assert World.from_env({"RANK": "3", "WORLD_SIZE": "4"}).local_rank == 3


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "two", "RANK": "0"}])
def test_half_a_world_in_the_environment_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(AskedWrongly, match="RANK and WORLD_SIZE"):
        World.from_env(environment)


def test_a_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(AskedWrongly, match="RANK=2"):
        World.from_env({"RANK": "2", "WORLD_SIZE": "2"})
