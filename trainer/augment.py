"""Random numbers and point augmentations that belong to a sample: functions of its seed alone.

A seed is mixed with the name of a purpose and a counter by splitmix64's finaliser, all samples at once on their device.
So a sample is augmented alike in any batch, on any rank and on any device, and no two purposes share their numbers.
"""

import math
import zlib
from typing import Final

import torch
import torch.nn.functional as F
from jaxtyping import Float32, Int64
from torch import Tensor

from datastore.errors import DoNotRetry

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


def normal(seeds: Int64[Tensor, " b"], count: int, purpose: str) -> Float32[Tensor, "b count"]:
    """`count` numbers of mean 0 and deviation 1 for each seed, none farther than 5.5 from 0."""
    least = 2.0 ** -(_FLOAT32_BITS + 1)  # zero would be infinitely far
    return math.sqrt(2) * torch.erfinv(2 * uniform(seeds, count, purpose).clamp(min=least) - 1)


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


def in_random_order(
    points: Float32[Tensor, "b n 3"], seeds: Int64[Tensor, " b"], purpose: str
) -> Float32[Tensor, "b n 3"]:
    """The clouds, the points of each in an order of its own: what looks at the first points found sees others."""
    order = uniform(seeds, points.shape[1], purpose).argsort(dim=1, stable=True)
    return points.gather(1, order[..., None].expand_as(points))


def some_points(seeds: Int64[Tensor, " b"], num_stored: int, count: int) -> Int64[Tensor, "b n"]:
    """Indices of `count` of each cloud's points in random order, others at each visit."""
    if count > num_stored:
        raise DoNotRetry(
            f"objective.num_points is {count}, but a shape comes with {num_stored} points. Lower it, raise "
            f"data.num_points, or ingest the shapes again with more points."
        )
    return uniform(seeds, num_stored, "points of this visit").argsort(dim=1, stable=True)[:, :count]


def scale(
    points: Float32[Tensor, "b n 3"], seeds: Int64[Tensor, " b"], scale_range: tuple[float, float], purpose: str
) -> Float32[Tensor, "b n 3"]:
    """The clouds, each times one number of U[scale_range]."""
    low, high = scale_range
    return points * (low + (high - low) * uniform(seeds, 1, purpose)[..., None])


def rotate_about_y(
    points: Float32[Tensor, "b n 3"], seeds: Int64[Tensor, " b"], purpose: str
) -> Float32[Tensor, "b n 3"]:
    """The clouds, each turned about the vertical axis by an angle of its own."""
    angles = 2 * math.pi * uniform(seeds, 1, purpose)
    sine, cosine = angles.sin(), angles.cos()
    x, y, z = points.unbind(dim=2)  # not a matrix product: autocast would round that
    return torch.stack([cosine * x + sine * z, y, cosine * z - sine * x], dim=2)


def shift_by_extent(
    points: Float32[Tensor, "b n 3"], seeds: Int64[Tensor, " b"], share: float, purpose: str
) -> Float32[Tensor, "b n 3"]:
    """The clouds, moved along each axis by U[-share, share] of what they extend along it."""
    extent = points.amax(dim=1) - points.amin(dim=1)
    return points + (share * (2 * uniform(seeds, 3, purpose) - 1) * extent)[:, None]


def jitter(
    points: Float32[Tensor, "b n 3"], seeds: Int64[Tensor, " b"], deviation: float, limit: float, purpose: str
) -> Float32[Tensor, "b n 3"]:
    """The clouds, each coordinate of each point moved by N(0, deviation²), by no more than the limit."""
    moved = deviation * normal(seeds, points[0].numel(), purpose)
    return points + moved.clamp(-limit, limit).view(points.shape)


def drop_out_points(
    points: Float32[Tensor, "b n 3"], seeds: Int64[Tensor, " b"], largest_ratio: float, purpose: str
) -> Float32[Tensor, "b n 3"]:
    """The clouds, with U[0, largest_ratio] of each one's points replaced by its first point: their number stays."""
    random = uniform(seeds, points.shape[1] + 1, purpose)
    dropped = random[:, 1:] < largest_ratio * random[:, :1]
    return torch.where(dropped[..., None], points[:, :1], points)


def distort(
    points: Float32[Tensor, "b n 3"], seeds: Int64[Tensor, " b"], deviation: float, purpose: str, *, nodes: int = 5
) -> Float32[Tensor, "b n 3"]:
    """The clouds bent smoothly: a lattice of `nodes` a side over each one's extent moves its nodes by N(0, deviation²).

    Points move as their cell does, by trilinear interpolation.
    """
    low, high = points.amin(dim=1, keepdim=True), points.amax(dim=1, keepdim=True)
    places = 2 * (points - low) / torch.where(high > low, high - low, 1) - 1  # in the lattice, from -1 to 1
    moved = deviation * normal(seeds, 3 * nodes**3, purpose).view(-1, 3, nodes, nodes, nodes)
    with torch.autocast(points.device.type, enabled=False):
        sampled = F.grid_sample(moved, places[:, :, None, None], align_corners=True, padding_mode="border")
    return points + sampled.flatten(2).transpose(1, 2)


def _mix(state: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    """splitmix64's finaliser; int64 products wrap around as uint64 ones do."""
    state = (state ^ _shift_right(state, 30)) * _FIRST_FACTOR
    state = (state ^ _shift_right(state, 27)) * _SECOND_FACTOR
    return state ^ _shift_right(state, 31)


def _shift_right(state: Int64[Tensor, "*shape"], bits: int) -> Int64[Tensor, "*shape"]:
    """The logical shift: torch's own would copy the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
