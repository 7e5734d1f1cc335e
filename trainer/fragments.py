"""Which piece of which parameter this rank's optimizer holds, at every ZeRO stage.

A checkpoint made of such pieces, each with its name and place, loads at any other stage and number of ranks, which
deepspeed's own checkpoints do not. The layouts are private to deepspeed: this file alone knows them, pyproject.toml
pins the release, and `check_layout` refuses to train where the pieces do not add up to the model.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from datastore.errors import DoNotRetry
from trainer.distributed import all_reduce_sum, communication_device, world_size
from trainer.engine import Engine

WEIGHT = "weight"
"""The name of the float32 master weights among a piece's tensors; the others are the optimizer's own, as `exp_avg`."""

SCALARS = ("step",)
"""What torch's optimizers keep beside tensors of the parameter's shape."""


@dataclass(frozen=True)
class Piece:
    """`length` consecutive elements of a flattened parameter from `start`, which lie at `offset` of a master tensor."""

    name: str
    start: int
    length: int
    offset: int


@dataclass(frozen=True)
class Master:
    """A float32 tensor that the optimizer updates (or a frozen parameter), and the pieces of parameters in it."""

    tensor: Float[Tensor, "..."]
    pieces: tuple[Piece, ...]
    replicated: bool  # every rank holds all of it
    frozen: bool = False


def masters(engine: Engine) -> list[Master]:
    """All that this rank holds, in an order that is the same in every run with the same layout."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    rank = engine.world.rank
    frozen: list[tuple[str, Any]] = [(name, weight) for weight, name in names.items() if not weight.requires_grad]
    if engine.zero_stage == 3:
        partitions = list(_parameter_partitions(engine.zero_optimizer, names, rank))
        return partitions + [
            Master(weight.ds_tensor, _own_piece(name, weight, rank, 0), replicated=False, frozen=True)
            for name, weight in frozen
        ]
    if engine.zero_stage == 0:
        trained = [_whole(name, weight) for weight, name in names.items() if weight.requires_grad]
    else:
        trained = list(_flat_partitions(engine.zero_optimizer, names))
    return trained + [_whole(name, weight, frozen=True) for name, weight in frozen]


def tensors(engine: Engine, master: Master) -> dict[str, Tensor]:
    """The master weights and the optimizer's tensors of that shape, by name: flat views, so writing to them counts."""
    found = {WEIGHT: master.tensor.detach().view(-1)}
    for name, value in engine.optimizer.state.get(master.tensor, {}).items():
        if isinstance(value, Tensor) and name not in SCALARS:
            found[name] = value.view(-1)
    return found


def scalars(engine: Engine) -> dict[str, float]:
    """What the optimizer counts beside its tensors, as `step`: the same for every parameter."""
    for master in masters(engine):
        state = engine.optimizer.state.get(master.tensor, {})
        found = {name: float(state[name]) for name in SCALARS if name in state}
        if found:
            return found
    return {}


def create_optimizer_state(engine: Engine, tensor_names: list[str], scalar_values: dict[str, float]) -> None:
    """Gives a fresh optimizer the state that it would have after a step, with zeros where tensors will be loaded."""
    for master in masters(engine):
        if master.frozen:
            continue
        state: dict[str, Any] = {name: torch.tensor(value) for name, value in scalar_values.items()}
        state |= {name: torch.zeros_like(master.tensor, requires_grad=False) for name in tensor_names if name != WEIGHT}
        if state:
            engine.optimizer.state[master.tensor] = state


@torch.no_grad()
def publish(engine: Engine) -> None:
    """Copies master weights that were written to into the weights that the model computes with; all ranks call it."""
    optimizer = engine.zero_optimizer
    if engine.zero_stage in (1, 2):
        optimizer._hp_optimizer_states_linked = False  # the links point at the state before loading
        optimizer.update_lp_params()
    elif engine.zero_stage == 3:
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:  # small ones, which stay whole between steps
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


@torch.no_grad()
def check_layout(engine: Engine) -> None:
    """Refuses to go on unless the pieces of all ranks add up to each parameter and hold the weights of the model.

    Costs one collective; it is what stands between a changed deepspeed and a checkpoint that cannot be loaded.
    """
    parameters = dict(engine.module.named_parameters())
    held = dict.fromkeys(parameters, 0.0)
    differing = dict.fromkeys(parameters, 0.0)
    for master in masters(engine):
        flat = tensors(engine, master)[WEIGHT]
        for piece in master.pieces:
            held[piece.name] += piece.length / (world_size() if master.replicated else 1)
            mine = flat[piece.offset : piece.offset + piece.length]
            used = _used_weights(parameters[piece.name], piece, engine.world.rank)
            differing[piece.name] += float(mine.numel() != used.numel() or not torch.equal(mine, used.to(mine.dtype)))
    counts = torch.tensor([list(held.values()), list(differing.values())], dtype=torch.float64).to(
        communication_device()
    )
    totals, differences = all_reduce_sum(counts).tolist()
    wrong = [
        f"{name}: {total:.0f} of {_numel(parameter)} elements{', other values' if differs else ''}"
        for (name, parameter), total, differs in zip(parameters.items(), totals, differences, strict=True)
        if round(total) != _numel(parameter) or differs
    ]
    if wrong:
        raise DoNotRetry(
            f"The optimizer of ZeRO stage {engine.zero_stage} is not laid out as trainer/fragments.py expects, so its "
            f"checkpoints could not be loaded: {'; '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}. Install a "
            f"deepspeed release that pyproject.toml names, or train with engine.zero_stage=0."
        )


def _whole(name: str, parameter: nn.Parameter, *, frozen: bool = False) -> Master:
    return Master(parameter, (Piece(name, 0, parameter.numel(), 0),), replicated=True, frozen=frozen)


def _flat_partitions(optimizer: Any, names: dict[nn.Parameter, str]) -> Iterator[Master]:
    """ZeRO 1 and 2: each parameter group is flattened and cut into as many equal partitions as there are ranks."""
    for group, partition in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        pieces = []
        for parameter in group:
            if (mapping := parameter._hp_mapping) is not None:  # None: all of it lies on other ranks
                model, master = mapping.lp_fragment_address, mapping.hp_fragment_address
                pieces.append(Piece(names[parameter], model.start, master.numel, master.start))
        yield Master(partition, tuple(pieces), replicated=False)


def _parameter_partitions(optimizer: Any, names: dict[nn.Parameter, str], rank: int) -> Iterator[Master]:
    """ZeRO 3: each parameter is cut into as many equal partitions as there are ranks; the last ones are padded."""
    for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        pieces: list[Piece] = []
        offset = 0
        for parameter in group:
            pieces += _own_piece(names[parameter], parameter, rank, offset)
            offset += parameter.ds_tensor.ds_numel
        yield Master(flat, tuple(pieces), replicated=False)


def _own_piece(name: str, parameter: Any, rank: int, offset: int) -> tuple[Piece, ...]:
    stride = parameter.ds_tensor.ds_numel
    start = rank * stride
    length = min(stride, parameter.ds_numel - start)
    return (Piece(name, start, length, offset),) if length > 0 else ()


def _used_weights(parameter: Any, piece: Piece, rank: int) -> Tensor:
    """What the model computes with, at the place of a piece."""
    start, flat = piece.start, parameter
    if hasattr(parameter, "ds_tensor"):
        start, flat = piece.start - rank * parameter.ds_tensor.ds_numel, parameter.ds_tensor
    used: Tensor = flat.detach().view(-1)[start : start + piece.length]
    return used


def _numel(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
