"""Ranks change nothing: each term and its gradient are those of one batch, for every case of every objective.

Layers that normalise over a batch are in eval mode, as their statistics are each rank's own. Gradients are compared entry
by entry, and the largest entry of the whole model is the measure: what is a hundred thousandth of it does not count.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.ranks import run_ranks
from tests.trainer.objectives.cases.case import SAMPLES
from tests.trainer.objectives.every_case import CASES, backward, batch_of, build, part_of
from trainer.distributed import World
from trainer.engine import BatchSplit, EngineConfig, build_engine
from trainer.fragments import WEIGHT, masters, tensors

RELATIVE = 1e-5
LR = 2.0**20  # so large that an update is the gradient and nothing else, to the last bits

Found = tuple[dict[str, Tensor], dict[str, Tensor]]  # terms, and gradients by parameter


def of_this_rank(case: str) -> Any:
    share = SAMPLES // dist.get_world_size()
    return part_of(batch_of(case), slice(dist.get_rank() * share, (dist.get_rank() + 1) * share))


def of_all_terms(case: str, batch: Any) -> dict[str, Found]:
    """Terms and the gradients of their sum."""
    return {"all terms": backward(build(case), batch)}


def of_each_term(case: str, batch: Any) -> dict[str, Found]:
    """Terms and the gradients of each, one after the other; nothing where there is one term alone."""
    objective = build(case)
    names = list(objective(batch))
    return {name: backward(objective, batch, [name]) for name in names} if len(names) > 1 else {}


def on_this_rank(found: Any, case: str) -> dict[str, Found]:
    return found(case, of_this_rank(case))


def through_the_engine(case: str, stage: int) -> Found:
    """Terms of this rank, and the pieces of the update that its optimizer holds, zero elsewhere."""
    objective, batch = build(case), of_this_rank(case)
    config = EngineConfig.model_validate(
        {"optimizer": {"kind": "sgd", "lr": LR, "momentum": 0.0}, "zero_stage": stage, "precision": "float32"}
    )
    with build_engine(objective, config, World.from_env(), BatchSplit(len(batch), 1)) as engine:
        before = pieces(engine)
        terms = engine(batch)
        engine.backward(terms)
        engine.step()
        moved = {name: (before[name] - after) / LR for name, after in pieces(engine).items()}
    return {name: term.detach() for name, term in terms.items()}, moved


def pieces(engine: Any) -> dict[str, Tensor]:
    """This rank's part of the weights: where all ranks hold all of them, those of the first."""
    whole = {name: torch.zeros(_numel(weight)) for name, weight in engine.module.named_parameters()}
    for master in masters(engine):
        if master.replicated and not engine.world.is_first:
            continue
        flat = tensors(engine, master)[WEIGHT]
        for piece in master.pieces:
            own = flat[piece.offset : piece.offset + piece.length]
            whole[piece.name][piece.start : piece.start + piece.length] = own
    return whole


def _numel(weight: Any) -> int:
    return int(getattr(weight, "ds_numel", weight.numel()))  # at stage 3 a weight is empty between steps


def check(case: str, ranks: list[Found], whole: Found, *, summed: bool = False) -> None:
    """Their mean is the whole batch's; updates of ranks that hold pieces are summed."""
    (terms, gradients), num_ranks = whole, len(ranks)
    assert all(set(of_rank[0]) == set(terms) for of_rank in ranks), case
    for name, value in terms.items():
        mean = torch.stack([of_rank[0][name].double() for of_rank in ranks]).mean()
        assert abs(mean - value) <= RELATIVE * max(abs(value), 1e-3), f"{case}: term {name}: {mean} and not {value}"
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        total = torch.stack([of_rank[1][name].double() for of_rank in ranks]).sum(dim=0)
        mean = (total if summed else total / num_ranks).flatten()
        difference = float((mean - gradient.flatten()).abs().max())
        assert difference <= RELATIVE * largest, f"{case}: gradient of {name}: {difference:.2g} of {largest:.2g}"


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("found", [of_all_terms, pytest.param(of_each_term, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
def test_ranks_are_one_batch_in_each_term_and_its_gradient(case: str, found: Any, world: int) -> None:
    ranks = run_ranks(on_this_rank, found, case, world=world)
    for terms, whole in found(case, batch_of(case)).items():
        check(f"{case}, {terms}", [of_rank[terms] for of_rank in ranks], whole)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("stage", range(4))
def test_every_zero_stage_makes_the_update_of_one_batch(stage: int, world: int) -> None:
    for case in CASES:
        ranks = run_ranks(through_the_engine, case, stage, world=world)
        check(f"{case}, stage {stage}", ranks, backward(build(case), batch_of(case)), summed=True)
