"""The learning rate of each step: a pure function, so that a resumed run needs no scheduler state."""

import math
from typing import Literal, Self

from pydantic import BaseModel, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator


class ScheduleConfig(BaseModel, extra="forbid", frozen=True):
    """How the learning rate goes from `start_lr` (after warm-up) to `end_lr` at the end of the run."""

    kind: Literal["cosine", "constant"] = "cosine"
    end_lr: NonNegativeFloat = 0.0
    per: Literal["epoch", "step"] = (
        "step"  # "epoch": the rate stands still within an epoch, as papers before 2023 do it
    )
    warmup_steps: NonNegativeInt = 0  # of a schedule per step; the cosine begins after them
    # Of a schedule per epoch; the cosine runs on beneath them, from epoch 0
    warmup_epochs: NonNegativeInt = 0
    warmup_start_lr: NonNegativeFloat = 0.0
    period_epochs: PositiveInt | None = None  # of the cosine; None: the run. I2P-MAE stops at 301 of 400
    # Each epoch has the rate of the epoch so many later, of epoch 0 at the earliest. Codes that step their schedule before
    # an epoch train with +1 (CrossPoint), those that step it after one with that epoch's number with -1 (PointCMT, I2P-MAE).
    offset_epochs: int = 0

    @model_validator(mode="after")
    def _counts_in_one_unit(self) -> Self:
        if self.per == "epoch" and self.warmup_steps:
            raise ValueError("warmup_steps is for schedules per step; give warmup_epochs, or per: step")
        if self.per == "step" and (self.warmup_epochs or self.period_epochs or self.offset_epochs):
            raise ValueError(
                "warmup_epochs, period_epochs and offset_epochs are for schedules per epoch: add per: epoch"
            )
        return self


def lr_at(schedule: ScheduleConfig, start_lr: float, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """The learning rate of step `step`, counted from zero.

    Per epoch, the rate moves once an epoch and would reach `end_lr` with the first epoch after the run; per step, with the
    first step after the run.
    """
    if schedule.per == "epoch":
        done = max(step // steps_per_epoch + schedule.offset_epochs, 0)
        length = schedule.period_epochs or math.ceil(total_steps / steps_per_epoch)
        if done < schedule.warmup_epochs:
            return schedule.warmup_start_lr + (start_lr - schedule.warmup_start_lr) * done / schedule.warmup_epochs
    else:
        if step < schedule.warmup_steps:
            return start_lr * (step + 1) / (schedule.warmup_steps + 1)
        done, length = step - schedule.warmup_steps, total_steps - schedule.warmup_steps
    if schedule.kind == "constant":
        return start_lr
    share = min(1.0, done / length) if length > 0 else 1.0
    return schedule.end_lr + (start_lr - schedule.end_lr) * (1 + math.cos(math.pi * share)) / 2
