"""Tests of trainer/fragments.py; that what it finds can be loaded anywhere is tested in test_checkpoint.py."""

import pytest

from datastore.errors import DoNotRetry
from tests.ranks import run_ranks
from tests.trainer.toy import config_of, toy_engine, train
from trainer.fragments import WEIGHT, check_layout, masters, scalars, tensors


def _layout_is_refused(stage: int) -> str:
    engine = toy_engine(config_of(stage))
    if stage == 3:
        engine.zero_optimizer.fp16_groups[0] = engine.zero_optimizer.fp16_groups[0][:-1]
    else:
        first = engine.zero_optimizer.bit16_groups[0][0]
        if first._hp_mapping is not None:
            first._hp_mapping.lp_fragment_address.start += 1
    with pytest.raises(DoNotRetry) as error:
        check_layout(engine)
    engine.close()
    return str(error.value)


def _held(stage: int) -> tuple[set[str], dict[str, float], list[tuple[str, int, int]]]:
    engine = toy_engine(config_of(stage))
    train(engine, range(2))
    trained = [master for master in masters(engine) if not master.frozen]
    kinds = {kind for master in trained for kind in tensors(engine, master)}
    pieces = [(piece.name, piece.start, piece.length) for master in masters(engine) for piece in master.pieces]
    found = kinds, scalars(engine), pieces
    engine.close()
    return found


@pytest.mark.parametrize("stage", [1, 3])
def test_a_layout_that_does_not_add_up_is_refused_at_start(stage: int) -> None:
    for message in run_ranks(_layout_is_refused, stage):
        assert ("scale: 1 of 1 elements, other values" if stage == 1 else "second.bias: 0 of 5 elements") in message
        assert "zero_stage=0" in message


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ranks_share_every_parameter_without_gap_or_overlap(stage: int) -> None:
    (kinds, counted, first), (_, _, second) = run_ranks(_held, stage)
    assert kinds == {WEIGHT, "exp_avg", "exp_avg_sq"} and counted == {"step": 2.0}
    sizes = {"first.weight": 111, "first.bias": 37, "norm.weight": 37, "norm.bias": 37, "second.weight": 185}
    sizes |= {"second.bias": 5, "scale": 1}
    for name, size in sizes.items():
        covered = [
            element
            for each, start, length in first + second
            if each == name
            for element in range(start, start + length)
        ]
        assert sorted(covered) == list(range(size)), name
