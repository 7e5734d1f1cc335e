"""Any ZeRO stage on any number of processes goes on from what any other saved: every pair of layouts."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from datastore.objects import ObjectFolder
from tests import ranks
from tests.ranks import run_ranks
from tests.trainer.savers import load, save
from tests.trainer.toy import config_of, toy_engine, train
from trainer.engine import Engine

HALF, WHOLE = 5, 15
GLOBAL_BATCH, MICRO_BATCH = 24, 2  # which one to four processes share evenly
FLOAT32_TOLERANCE = 1e-6


class Layout(NamedTuple):
    """A ZeRO stage and a number of processes."""

    stage: int
    world: int


def _engine(stage: int, precision: str) -> Engine:
    # without BatchNorm's batch statistics, for which another order of micro-batches leaves other buffers
    config = config_of(stage, precision=precision)
    return toy_engine(config, norm=False, micro_batch=MICRO_BATCH, global_batch=GLOBAL_BATCH)


def _train(engine: Engine, first: int, last: int) -> list[float]:
    losses = train(engine, range(first, last), micro_batch=MICRO_BATCH, global_batch=GLOBAL_BATCH)
    return [loss * MICRO_BATCH / GLOBAL_BATCH for loss in losses]  # of each rank: they add up to the mean


def _straight(stage: int, precision: str, url: str) -> list[float]:
    engine = _engine(stage, precision)
    _train(engine, 0, HALF)
    save(engine, ObjectFolder(url), HALF)
    losses = _train(engine, HALF, WHOLE)
    engine.close()
    return losses


def _resumed(stage: int, precision: str, urls: Sequence[str]) -> list[list[float]]:
    """The losses after loading each; what is loaded replaces all that the one before left."""
    engine, found = _engine(stage, precision), []
    for url in urls:
        assert load(engine, ObjectFolder(url)).position.step == HALF
        found.append(_train(engine, HALF, WHOLE))
    engine.close()
    return found


def _sums(per_rank: Sequence[Sequence[float]]) -> torch.Tensor:
    return torch.tensor(per_rank, dtype=torch.float64).sum(dim=0)


def _farthest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def _check_every_pair(layouts: Sequence[Layout], precision: str, folder: Path) -> None:
    urls = {layout: str(folder / f"stage-{layout.stage}-world-{layout.world}") for layout in layouts}
    straight = {
        layout: _sums(run_ranks(_straight, layout.stage, precision, urls[layout], world=layout.world))
        for layout in layouts
    }
    tolerance = FLOAT32_TOLERANCE
    if precision == "bf16":
        # what a change of the number of processes does to a run that nothing disturbs
        natural = max(_farthest(straight[a], straight[b]) for a, b in product(layouts, layouts) if a.stage == b.stage)
        print(f"a change of world by itself: {natural:.2e}")
        tolerance = max(tolerance, 3 * natural)
    differences, unlike = {}, []
    for loading in layouts:
        per_rank = run_ranks(_resumed, loading.stage, precision, list(urls.values()), world=loading.world)
        for saving, *losses in zip(urls, *per_rank, strict=True):
            resumed = _sums(losses)
            if saving == loading and not torch.equal(resumed, straight[saving]):
                unlike.append(saving)
            differences[saving, loading] = _farthest(resumed, straight[saving])
    pair, largest = max(differences.items(), key=lambda item: item[1])
    print(f"{precision}, {len(differences)} pairs: largest difference {largest:.2e} of {tolerance:.2e} allowed, {pair}")
    assert largest <= tolerance, pair
    assert not unlike, "these do not repeat themselves to the last bit"


def test_another_stage_and_world_goes_on_in_bf16(tmp_path: Path) -> None:
    """In float32, tests/trainer/test_checkpoint.py has more pairs."""
    _check_every_pair([Layout(3, 2), Layout(1, 1)], "bf16", tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_every_stage_and_world_loads_what_every_other_saved(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "TIMEOUT_SECONDS", 600.0)
    _check_every_pair([Layout(*each) for each in product(range(4), range(1, 5))], precision, tmp_path)
