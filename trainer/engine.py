"""Forward, backward and update over all ranks: the only file that imports deepspeed."""

from typing import Literal

from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from trainer.schedule import ScheduleConfig


class OptimizerConfig(BaseModel, extra="forbid", frozen=True):
    """Torch's own optimizers: deepspeed's would be compiled at start."""

    kind: Literal["sgd", "adam", "adamw"] = "adamw"  # adam: weight decay is added to the gradient; adamw: decoupled
    lr: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.0
    momentum: float = Field(0.9, ge=0, lt=1)  # sgd
    betas: tuple[float, float] = (0.9, 0.999)  # adam, adamw
    eps: PositiveFloat = 1e-8  # adam, adamw


class EngineConfig(BaseModel, extra="forbid", frozen=True):
    """How weights are updated and how the work is spread; nothing here but the optimizer and the schedule changes what is learned."""

    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    clip_grad_norm: PositiveFloat | None = None
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["auto", "float32", "bf16"] = "auto"  # auto: bf16 on GPUs that have it, float32 elsewhere
    max_micro_batch: PositiveInt = 32  # of one process; what is left of the global batch is accumulated
    collective_timeout_seconds: PositiveFloat = 120.0  # gloo's own 30 minutes would hide a dead rank
