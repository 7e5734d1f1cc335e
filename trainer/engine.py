"""Forward, backward and update over all ranks: the only file that imports deepspeed.

Nothing is compiled at start: the optimizers are torch's own, and deepspeed's operators are switched off. In bf16 the
weights stay float32 and autocast chooses what runs in bf16. Weights cast to bf16, deepspeed's own mode, would take
batch normalisation and geometry along, and change the optimizer at ZeRO stage 0.
"""

import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Literal, Self

import torch
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from datastore.batch import Batch
from datastore.errors import DoNotRetry
from datastore.order import choose_micro_batch
from trainer.distributed import World, uses_gpu
from trainer.schedule import ScheduleConfig

Terms = dict[str, Tensor]

# Elements of gradients that are reduced together, and of weights that are gathered together at stage 3. Buffers of this
# size lie beside the model; messages of 40 MB keep a network busy. Deepspeed's own default sets 2 GB aside
_LARGEST_BUCKET: Final = 10_000_000
_KEPT_SHARE: Final = 8  # stage 3: this part of the weights may stay gathered until they are used again
_NEVER: Final = 2**62
VECTORS: Final = "vectors"
"""The rule of `no_decay` for parameters with one axis."""

_NO_COMPILER: Final = "TORCHDYNAMO_DISABLE"
_LINEAR: Final = nn.functional.linear


class OptimizerConfig(BaseModel, extra="forbid", frozen=True):
    """Torch's own optimizers: deepspeed's would be compiled at start."""

    kind: Literal["sgd", "adam", "adamw"] = "adamw"  # adam: weight decay is added to the gradient; adamw: decoupled
    lr: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.0
    # Which parameters do not decay: "vectors" (those with one axis, biases among them) and parts of names, as "token"
    no_decay: tuple[str, ...] = ()
    momentum: float = Field(default=0.9, ge=0, lt=1)  # sgd
    betas: tuple[float, float] = (0.9, 0.999)  # adam, adamw
    eps: PositiveFloat = 1e-8  # adam, adamw

    def decays(self, name: str, num_axes: int) -> bool:
        """Whether weight decay is for the parameter of this name."""
        return not any(num_axes <= 1 if rule == VECTORS else rule in name for rule in self.no_decay)

    def groups(self, parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
        """The parameters by what decays and what does not, as torch's optimizers take them; no group is empty."""
        decaying = [each for name, each in parameters.items() if self.decays(name, each.dim())]
        others = [each for name, each in parameters.items() if not self.decays(name, each.dim())]
        groups = [{"params": decaying, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]

    def build(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer for these parameters by name."""
        groups = self.groups(parameters)
        match self.kind:
            case "sgd":
                return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)
            case "adam":
                return torch.optim.Adam(groups, lr=self.lr, betas=self.betas, eps=self.eps)
            case "adamw":
                return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps)


class EngineConfig(BaseModel, extra="forbid", frozen=True):
    """How weights are updated and how the work is spread over processes."""

    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    clip_grad_norm: PositiveFloat | None = None
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["auto", "float32", "bf16"] = "auto"  # auto: bf16 on GPUs that have it, float32 elsewhere
    max_micro_batch: PositiveInt = 32  # of one process; what is left of the global batch is accumulated
    # What lies in host memory instead of the GPU's: the optimizer's state with the master weights, which are updated there
    # by torch's own optimizers (stages 1 to 3), and the weights, too (stage 3). On a CPU it changes nothing but costs copies
    offload: Literal["none", "optimizer", "all"] = "none"
    # gloo's own 30 minutes would hide a dead rank. Ranks wait here, too, while one of them waits for its data
    collective_timeout_seconds: PositiveFloat = 180.0

    @model_validator(mode="after")
    def _stage_can_offload(self) -> Self:
        least = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.zero_stage < least:
            raise ValueError(f"offload {self.offload!r} needs zero_stage {least} or more, not {self.zero_stage}")
        return self


@dataclass(frozen=True)
class BatchSplit:
    """How a global batch is cut: `accumulation` times `micro_batch` samples on each rank."""

    micro_batch: int
    accumulation: int


def split_batch(global_batch: int, world_size: int, max_micro_batch: int) -> BatchSplit:
    """The largest micro-batch that is allowed and divides a rank's share of the global batch."""
    return BatchSplit(*choose_micro_batch(global_batch, world_size, max_micro_batch))


class Engine:
    """An objective with its optimizer, spread over ranks. `grad_norm` is that of the last update, before clipping."""

    def __init__(
        self, engine: Any, module: nn.Module, optimizer: torch.optim.Optimizer, world: World, zero_stage: int
    ) -> None:
        self._engine = engine
        self.module, self.optimizer = module, optimizer
        self.world, self.zero_stage = world, zero_stage
        self.device: torch.device = engine.device
        self.grad_norm = 0.0

    @property
    def has_finite_gradient(self) -> bool:
        """Whether the last update had a gradient to follow; deepspeed skips one that has none."""
        return math.isfinite(self.grad_norm)

    @property
    def zero_optimizer(self) -> Any:
        """Deepspeed's optimizer around ours, at stages 1 to 3: what trainer/fragments.py looks into."""
        return self._engine.optimizer

    def __call__(self, batch: Batch) -> Terms:
        """The objective's weighted terms of one micro-batch."""
        terms: Terms = self._engine(batch)
        return terms

    def backward(self, terms: Terms) -> None:
        """Adds the gradient of the terms' sum over the number of micro-batches; the last one is reduced over ranks."""
        self._engine.backward(torch.stack(tuple(terms.values())).sum())

    def step(self) -> None:
        """Updates the weights after the last micro-batch of a global batch; before that it only counts."""
        updates = self._engine.is_gradient_accumulation_boundary()
        if updates and self.zero_stage == 0:  # deepspeed keeps no norm at this stage
            gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
            self.grad_norm = float(nn.utils.get_total_norm(gradients))
        self._engine.step()
        if updates and self.zero_stage > 0:
            self.grad_norm = float(self._engine.get_global_grad_norm())

    def set_lr(self, lr: float) -> None:
        """Sets the learning rate of the next update."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the engine and the process group, which deepspeed keeps references to, and leaves torch as it was."""
        deepspeed = import_deepspeed()
        self._engine.destroy()
        deepspeed.comm.destroy_process_group()
        # at stage 3 it replaces this for good by one of its own, whose gradients differ in the last bit
        nn.functional.linear = _LINEAR


def build_engine(objective: nn.Module, config: EngineConfig, world: World, split: BatchSplit) -> Engine:
    """The engine of this rank, in the process group that `distributed.joined` made; weights are those of rank 0."""
    deepspeed = import_deepspeed()
    device = "cuda" if uses_gpu() else "cpu"
    if runs_in_bf16(config, device):
        # a forward of its own, not a context around the engine: deepspeed switches an outer autocast off.
        # Without its cache at stage 3, where cached casts would keep the whole model on every rank.
        cast = torch.autocast(device, torch.bfloat16, cache_enabled=config.zero_stage < 3)
        objective.forward = cast(objective.forward)
    parameters = {name: parameter for name, parameter in objective.named_parameters() if parameter.requires_grad}
    for name, parameter in objective.named_parameters():
        if parameter.dim() == 0:
            raise ValueError(f"parameter {name} has no axes, which deepspeed cannot send: give it the shape [1]")
    optimizer = config.optimizer.build(parameters)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # deepspeed takes it from nowhere else
    with _quiet():
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        engine, *_ = deepspeed.initialize(
            model=objective, optimizer=optimizer, config=_deepspeed_config(config, list(parameters.values()), split)
        )
    return Engine(engine, objective, optimizer, world, config.zero_stage)


def runs_in_bf16(config: EngineConfig, device: str) -> bool:
    """Whether matrix products run in bf16; an error where bf16 is asked for and the device lacks it."""
    supported = device == "cpu" or torch.cuda.is_bf16_supported()
    if config.precision == "bf16" and not supported:
        raise DoNotRetry(
            f"engine.precision is bf16, which {torch.cuda.get_device_name()} lacks. Set it to float32 or auto."
        )
    return config.precision == "bf16" or (config.precision == "auto" and device == "cuda" and supported)


def _deepspeed_config(config: EngineConfig, parameters: list[nn.Parameter], split: BatchSplit) -> dict[str, Any]:
    largest = max((parameter.numel() for parameter in parameters), default=1)
    total = sum(parameter.numel() for parameter in parameters)
    bucket = max(largest, min(total, _LARGEST_BUCKET))
    # Deepspeed's own default keeps 10^9 weights gathered from their first use on: all of any student
    kept = max(largest, total // _KEPT_SHARE)
    host_memory = {"device": "cpu", "pin_memory": uses_gpu()}
    return {
        "train_micro_batch_size_per_gpu": split.micro_batch,
        "gradient_accumulation_steps": split.accumulation,
        "gradient_clipping": config.clip_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,  # SGD is: tests/trainer/test_engine.py compares it with plain torch
        "steps_per_print": _NEVER,
        "zero_force_ds_cpu_optimizer": False,  # its optimizer for offloaded state would be compiled at start
        "zero_optimization": {
            "stage": config.zero_stage,
            "reduce_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
            "sub_group_size": bucket,  # updated at a time: what the optimizer lays beside its state is as large
            "stage3_max_live_parameters": kept,
            "stage3_max_reuse_distance": kept,
            **({"offload_optimizer": host_memory} if config.offload != "none" else {}),
            **({"offload_param": host_memory} if config.offload == "all" else {}),
        },
    }


def import_deepspeed() -> Any:
    """The module; here, because its import takes a while, and with its compilers and its chatter switched off."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if uses_gpu() else "cpu")
    with _quiet():
        import deepspeed
        from deepspeed.utils import logger
    # No operator counts as usable, so none is built: `deepspeed_shm_comm` alone would take half a minute at start.
    deepspeed.ops.__compatible_ops__ = {}
    logger.handlers.clear()  # it writes to stdout, where results go
    logger.propagate = True
    logger.setLevel(logging.WARNING)
    return deepspeed


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps warnings about deepspeed's own code from people who cannot act on them, and the compiler from starting.

    Deepspeed compiles kernels of an optimizer that is not used here (Muon) as it looks at ours: 2.5 s and 120 MB each.
    """
    before = os.environ.get(_NO_COMPILER)
    os.environ[_NO_COMPILER] = "1"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if before is None:
            del os.environ[_NO_COMPILER]
        else:
            os.environ[_NO_COMPILER] = before
