"""Tests of trainer/schedule.py."""

import math
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError

from trainer.schedule import ScheduleConfig, lr_at

STEPS_PER_EPOCH = 153  # 9,843 shapes in batches of 64


def test_pointmcds_cosine_per_epoch_is_that_of_torch() -> None:
    schedule = ScheduleConfig(kind="cosine", per="epoch", end_lr=1e-3)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=500, eta_min=1e-3)
    for epoch in range(500):
        step = epoch * STEPS_PER_EPOCH
        expected = reference.get_last_lr()[0]
        for within in (0, 1, STEPS_PER_EPOCH - 1):
            assert lr_at(schedule, 0.1, step + within, STEPS_PER_EPOCH, 500 * STEPS_PER_EPOCH) == pytest.approx(
                expected
            )
        optimizer.step()
        reference.step()


def test_pointmcds_published_numbers() -> None:
    schedule = ScheduleConfig(kind="cosine", per="epoch", end_lr=1e-3)

    def lr(epoch: int) -> float:
        return lr_at(schedule, 0.1, epoch * STEPS_PER_EPOCH, STEPS_PER_EPOCH, 500 * STEPS_PER_EPOCH)

    assert lr(0) == 0.1
    assert lr(250) == pytest.approx((0.1 + 1e-3) / 2)
    assert lr(499) == pytest.approx(1e-3 + 0.099 * (1 + math.cos(math.pi * 499 / 500)) / 2)


def test_a_cosine_per_step_falls_at_every_step_after_its_warm_up() -> None:
    schedule = ScheduleConfig(kind="cosine", per="step", end_lr=1e-5, warmup_steps=10)
    rates = [lr_at(schedule, 2e-3, step, 7, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([2e-3 * (step + 1) / 11 for step in range(10)])
    assert rates[10] == 2e-3 == max(rates)
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))
    assert rates[55] == pytest.approx((2e-3 + 1e-5) / 2)
    assert lr_at(schedule, 2e-3, 100, 7, 100) == pytest.approx(1e-5)


def test_a_constant_rate_stays() -> None:
    schedule = ScheduleConfig(kind="constant", warmup_steps=1)
    assert [lr_at(schedule, 0.3, step, 5, 20) for step in (0, 1, 19)] == [0.15, 0.3, 0.3]


def test_a_run_that_is_all_warm_up_never_divides_by_zero() -> None:
    schedule = ScheduleConfig(warmup_steps=3)
    assert lr_at(schedule, 1.0, 2, 1, 3) == 0.75
    assert lr_at(schedule, 1.0, 3, 1, 3) == 0.0


def test_an_epoch_that_the_run_does_not_finish_counts_as_one() -> None:
    schedule = ScheduleConfig(per="epoch")
    assert lr_at(schedule, 1.0, 10, 10, 15) == pytest.approx(0.5)


def test_crosspoints_rates_are_those_of_a_schedule_stepped_before_each_epoch() -> None:
    schedule = ScheduleConfig(per="epoch", offset_epochs=1)
    rates = [lr_at(schedule, 1e-3, epoch * 7, 7, 100 * 7) for epoch in range(100)]
    assert rates == pytest.approx([0.5e-3 * (1 + math.cos(math.pi * (epoch + 1) / 100)) for epoch in range(100)])
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)


def test_pointcmts_rates_lag_one_epoch() -> None:
    schedule = ScheduleConfig(per="epoch", offset_epochs=-1)
    rates = [lr_at(schedule, 1e-3, epoch * 307, 307, 1000 * 307) for epoch in range(1000)]
    assert rates[0] == rates[1] == 1e-3
    assert rates[500] == pytest.approx(1e-3 * (1 + math.cos(math.pi * 499 / 1000)) / 2)


def test_i2p_maes_rates_warm_up_beneath_a_cosine_that_outlasts_the_run() -> None:
    schedule = ScheduleConfig(
        per="epoch", end_lr=1e-6, warmup_epochs=10, warmup_start_lr=1e-6, period_epochs=400, offset_epochs=-1
    )
    rates = [lr_at(schedule, 1e-3, epoch * 655, 655, 301 * 655) for epoch in range(301)]
    assert rates[0] == rates[1] == 1e-6
    assert rates[6] == pytest.approx(1e-6 + 5 * (1e-3 - 1e-6) / 10)
    assert rates[11] == pytest.approx(1e-6 + 0.5 * (1e-3 - 1e-6) * (1 + math.cos(math.pi * 10 / 400)))
    assert rates[300] == pytest.approx(1.5e-4, rel=0.02)


@pytest.mark.parametrize(
    "settings",
    [{"per": "epoch", "warmup_steps": 3}, {"per": "step", "warmup_epochs": 3}, {"per": "step", "offset_epochs": 1}],
)
def test_a_schedule_counts_in_one_unit(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=r"schedules per (step|epoch)"):
        ScheduleConfig.model_validate(settings)
