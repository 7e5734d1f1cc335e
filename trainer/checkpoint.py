"""Checkpoints that any ZeRO stage and any number of processes can load: when to save, what to keep, how to restore."""

from pydantic import BaseModel, PositiveFloat, PositiveInt


class CheckpointConfig(BaseModel, extra="forbid", frozen=True):
    """When to save and what to keep. A stopped or finished run is saved in any case."""

    every_steps: PositiveInt | None = None
    every_seconds: PositiveFloat | None = 60.0
    keep_last: PositiveInt = 2  # two, so that a damaged newest one has a predecessor
    keep_every: PositiveInt | None = None  # checkpoints at multiples of so many steps are never deleted
