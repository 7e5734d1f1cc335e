"""Which of the implementations of an operation runs, and whether it looks for NaN first. The rule is `choose`.

Every operation has a plain torch reference for any device; most have a faster one on CPUs (numpy) and one
on CUDA devices (Triton). All give the same result. The environment variable VIEWPOINT_OPS, or `use` around some code,
takes one of them for all that follows; VIEWPOINT_OPS_CHECK=1, or `checking`, refuses NaN in what comes in.
"""

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import Final, Literal, get_args

import torch
from torch import Tensor

Tier = Literal["reference", "cpu", "triton"]
Setting = Literal["auto", "reference", "cpu", "triton"]

_MODULES: Final[dict[Tier, str]] = {
    "reference": "models.ops.reference",
    "cpu": "models.ops.cpu",
    "triton": "models.ops.triton_kernels",
}

_setting: ContextVar[Setting | None] = ContextVar("ops", default=None)
_checks: ContextVar[bool | None] = ContextVar("ops_check", default=None)


def choose(*tensors: Tensor) -> Tier:
    """The tier for operands on this device: on "auto" Triton on CUDA where it is installed, the fast path on CPUs."""
    device = tensors[0].device.type
    setting = current_setting()
    if setting == "auto":
        if device == "cpu":
            return "cpu"
        return "triton" if device == "cuda" and triton_is_installed() else "reference"
    if setting == "cpu" and device != "cpu":
        raise ValueError(
            f"VIEWPOINT_OPS=cpu (or tiers.use('cpu')) was asked for, and a tensor is on {tensors[0].device}. "
            f"Leave it at auto, or move the tensors with .cpu()."
        )
    if setting == "triton" and not (device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError(
            f"VIEWPOINT_OPS=triton (or tiers.use('triton')) was asked for, and a tensor is on {tensors[0].device}. "
            f"Triton needs a CUDA device; leave it at auto, or set TRITON_INTERPRET=1 to run its kernels slowly in Python."
        )
    return setting


def implementation(*tensors: Tensor) -> ModuleType:
    """The module of the tier that `choose` names; all of them hold the same functions."""
    return importlib.import_module(_MODULES[choose(*tensors)])


def current_setting() -> Setting:
    """What `use` set, or else VIEWPOINT_OPS, or else "auto"."""
    setting = _setting.get() or os.environ.get("VIEWPOINT_OPS") or "auto"
    if setting not in get_args(Setting):
        raise ValueError(f"VIEWPOINT_OPS is {setting!r}; it may be one of {', '.join(get_args(Setting))}.")
    return setting  # type: ignore[return-value]  # the line above saw to that


@contextmanager
def use(setting: Setting) -> Iterator[None]:
    """Within the block, operations run in this tier."""
    if setting not in get_args(Setting):
        raise ValueError(f"There is no tier {setting!r}; there are {', '.join(get_args(Setting))}.")
    token = _setting.set(setting)
    try:
        yield
    finally:
        _setting.reset(token)


@contextmanager
def checking(enabled: bool = True) -> Iterator[None]:
    """Within the block, operations refuse NaN and indices out of range; on CUDA that waits for the device each time."""
    token = _checks.set(enabled)
    try:
        yield
    finally:
        _checks.reset(token)


def checks_values() -> bool:
    """Whether `checking` or VIEWPOINT_OPS_CHECK=1 is in force."""
    enabled = _checks.get()
    return os.environ.get("VIEWPOINT_OPS_CHECK") == "1" if enabled is None else enabled


@cache
def triton_is_installed() -> bool:
    """Whether Triton can be imported and torch sees a device that it serves."""
    return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability() >= (7, 0)
