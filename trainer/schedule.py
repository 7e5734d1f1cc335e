"""The learning rate of each step: a pure function, so that a resumed run needs no scheduler state."""

import math
from typing import Literal

from pydantic import BaseModel, NonNegativeFloat, NonNegativeInt


class ScheduleConfig(BaseModel, extra="forbid", frozen=True):
    """How the learning rate goes from `start_lr` (after warm-up) to `end_lr` at the end of the run."""

    kind: Literal["cosine", "constant"] = "cosine"
    end_lr: NonNegativeFloat = 0.0
    per: Literal["epoch", "step"] = (
        "step"  # "epoch": the rate stands still within an epoch, as papers before 2023 do it
    )
    warmup_steps: NonNegativeInt = 0


def lr_at(schedule: ScheduleConfig, start_lr: float, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """The learning rate of step `step`, counted from zero.

    Per epoch, the rate moves once an epoch and would reach `end_lr` with the first epoch after the run; per step, with the
    first step after the run.
    """
    if step < schedule.warmup_steps:
        return start_lr * (step + 1) / (schedule.warmup_steps + 1)
    if schedule.kind == "constant":
        return start_lr
    if schedule.per == "epoch":
        unit = steps_per_epoch
        done, length = step // unit, math.ceil(total_steps / unit)
    else:
        done, length = step - schedule.warmup_steps, total_steps - schedule.warmup_steps
    share = min(1.0, done / length) if length > 0 else 1.0
    return schedule.end_lr + (start_lr - schedule.end_lr) * (1 + math.cos(math.pi * share)) / 2
