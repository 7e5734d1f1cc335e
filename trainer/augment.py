"""Random numbers and point augmentations that belong to a sample: functions of its seed alone.

A seed is mixed with the name of a purpose and a counter by splitmix64's finaliser, all samples at once on their device.
So a sample is augmented alike in any batch, on any rank and on any device, and no two purposes share their numbers.
"""

import zlib
from typing import Final

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

_GOLDEN: Final = 0x9E3779B97F4A7C15 - 2**64  # splitmix64's constants, as int64 has them
_FIRST_FACTOR: Final = 0xBF58476D1CE4E5B9 - 2**64
_SECOND_FACTOR: Final = 0x94D049BB133111EB - 2**64
_FLOAT32_BITS: Final = 24


def uniform(seeds: Int64[Tensor, " b"], count: int, purpose: str) -> Float32[Tensor, "b count"]:
    """`count` numbers in [0, 1) for each seed; another purpose gives others."""
    purposes = torch.tensor(zlib.crc32(purpose.encode()), device=seeds.device)
    keys = _mix(seeds ^ _mix(purposes))
    counters = torch.arange(1, count + 1, device=seeds.device)
    bits = _mix(keys[:, None] + counters * _GOLDEN)
    return _shift_right(bits, 64 - _FLOAT32_BITS).to(torch.float32) / 2**_FLOAT32_BITS


def scale_and_shift(
    points: Float32[Tensor, "b n 3"],
    seeds: Int64[Tensor, " b"],
    scale_range: tuple[float, float],
    shift: float,
) -> Float32[Tensor, "b n 3"]:
    """The clouds, each axis of each cloud scaled by U[scale_range], then moved by U[-shift, shift]."""
    low, high = scale_range
    random = uniform(seeds, 6, "scale and shift")[:, None, :]
    return points * (low + (high - low) * random[..., :3]) + shift * (2 * random[..., 3:] - 1)


def _mix(state: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    """splitmix64's finaliser; int64 products wrap around as uint64 ones do."""
    state = (state ^ _shift_right(state, 30)) * _FIRST_FACTOR
    state = (state ^ _shift_right(state, 27)) * _SECOND_FACTOR
    return state ^ _shift_right(state, 31)


def _shift_right(state: Int64[Tensor, "*shape"], bits: int) -> Int64[Tensor, "*shape"]:
    """The logical shift: torch's own would copy the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
