"""The fast paths on CUDA devices: Triton kernels, compiled when first called, from this source and without nvcc.

Sums are never fused with products (`enable_fp_fusion`), so that distances equal the reference's to the bit. Kernels carry
`no_type_check` because Triton compiles their text: nothing may be wrapped around them.
"""

from typing import Any, Final, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.ops import reference

_LONGEST_ROW: Final = 8192  # points that one program can hold in its registers
_SCRATCH: Final = 1 << 26  # distances in memory at a time: 256 MB
_TILE: Final = 4096  # squared differences a program holds at a time
_BALL_BLOCK: Final = 256
_NEAR_ORIGIN: Final = tl.constexpr(reference.NEAR_ORIGIN)
_TAKEN: Final = tl.constexpr(reference.TAKEN)
_TAKEN_LAST: Final = tl.constexpr(reference.TAKEN_LAST)
_LAST: Final = tl.constexpr(0x7FFFFFFF)  # above the bits of every distance, and above every index


def farthest_points(points: Tensor, start: Tensor, num_samples: int, origin_last: bool = False) -> Tensor:
    """As the reference; one program a cloud. Larger clouds than fit in registers go to the reference."""
    num_clouds, num_points, _ = points.shape
    if num_points > _LONGEST_ROW:
        return reference.farthest_points(points, start, num_samples, origin_last)
    chosen = start.new_empty(num_clouds, num_samples)
    block = triton.next_power_of_2(num_points)
    with torch.cuda.device_of(points):
        _farthest_points_kernel[(num_clouds,)](
            points.mT.contiguous(), start.contiguous(), chosen, num_points, num_samples,
            block_size=block, origin_last=origin_last, num_warps=max(1, min(16, block // 256)), enable_fp_fusion=False,
        )  # fmt: skip
    return chosen


def nearest_neighbours(queries: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices and squared distances [b, m, k], ascending, of equals the lowest index first."""
    num_points = points.shape[1]
    if num_points > _LONGEST_ROW:
        return reference.nearest_neighbours(queries, points, k)
    num_rows = max(1, _SCRATCH // (len(points) * num_points))
    parts = [_select(_squared_distances(part, points), k) for part in queries.split(num_rows, dim=1)]
    return torch.cat([indices for indices, _ in parts], dim=1), torch.cat([squared for _, squared in parts], dim=1)


def ball_query(centres: Tensor, points: Tensor, squared_radius: float, k: int) -> Tensor:
    """The first k points nearer than the radius, padded with the first; else the nearest point. One program a centre."""
    num_clouds, num_centres, _ = centres.shape
    found = torch.empty(num_clouds, num_centres, k, dtype=torch.int64, device=points.device)
    # As a tensor: a number would be passed in the kernel's own choice of precision
    limit = torch.tensor([squared_radius], dtype=torch.float32, device=points.device)
    with torch.cuda.device_of(points):
        _ball_query_kernel[(num_clouds * num_centres,)](
            centres.contiguous(), points.mT.contiguous(), limit, found, num_centres, points.shape[1], k,
            block_size=_BALL_BLOCK, num_slots=triton.next_power_of_2(k), num_warps=2, enable_fp_fusion=False,
        )  # fmt: skip
    return found


def _squared_distances(queries: Tensor, points: Tensor) -> Tensor:
    """As the reference's, [b, m, n]."""
    queries = reference.pad_to_power_of_two(queries).contiguous()
    points = reference.pad_to_power_of_two(points).contiguous()
    num_clouds, num_queries, width = queries.shape
    num_points = points.shape[1]
    distances = queries.new_empty(num_clouds, num_queries, num_points)
    block = max(1, min(_TILE // width, triton.next_power_of_2(num_points)))
    with torch.cuda.device_of(points):
        _squared_distances_kernel[(num_clouds * num_queries * triton.cdiv(num_points, block),)](
            queries, points, distances, num_queries, num_points,
            width=width, levels=width.bit_length() - 1, block_size=block, enable_fp_fusion=False,
        )  # fmt: skip
    return distances


def _select(distances: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices and values of the k smallest entries of each row. One program a row."""
    *rows, num_points = distances.shape
    indices = torch.empty(*rows, k, dtype=torch.int64, device=distances.device)
    squared = distances.new_empty(*rows, k)
    block = triton.next_power_of_2(num_points)
    with torch.cuda.device_of(distances):
        _select_kernel[(distances.shape[:-1].numel(),)](
            distances,
            indices,
            squared,
            num_points,
            k,
            block_size=block,
            num_warps=max(1, min(8, block // 1024)),
            enable_fp_fusion=False,
        )
    return indices, squared


@triton.jit
@no_type_check
def _farthest_points_kernel(
    coordinates, start, chosen, num_points, num_samples, block_size: tl.constexpr, origin_last: tl.constexpr
) -> Any:
    """One cloud, [3, n]; its points and their distances stay in registers."""
    cloud = tl.program_id(0).to(tl.int64)
    coordinates += cloud * 3 * num_points
    chosen += cloud * num_samples
    places = tl.arange(0, block_size)
    inside = places < num_points
    x = tl.load(coordinates + places, mask=inside, other=0.0)
    y = tl.load(coordinates + num_points + places, mask=inside, other=0.0)
    z = tl.load(coordinates + 2 * num_points + places, mask=inside, other=0.0)
    nearest = tl.where(inside, float("inf"), _TAKEN)
    if origin_last:
        nearest = tl.where(inside & (x * x + y * y + z * z < _NEAR_ORIGIN), _TAKEN_LAST, nearest)
    last = tl.load(start + cloud)
    tl.store(chosen, last)
    for step in range(1, num_samples):
        dx = x - tl.load(coordinates + last)
        dy = y - tl.load(coordinates + num_points + last)
        dz = z - tl.load(coordinates + 2 * num_points + last)
        nearest = tl.minimum(nearest, dx * dx + dy * dy + dz * dz)
        nearest = tl.where(places == last, _TAKEN, nearest)
        last = tl.argmax(nearest, axis=0, tie_break_left=True).to(tl.int64)
        tl.store(chosen + step, last)


@triton.jit
@no_type_check
def _squared_distances_kernel(
    queries,
    points,
    distances,
    num_queries,
    num_points,
    width: tl.constexpr,
    levels: tl.constexpr,
    block_size: tl.constexpr,
) -> Any:
    """From one query to a block of points."""
    num_blocks = tl.cdiv(num_points, block_size)
    row = (tl.program_id(0) // num_blocks).to(tl.int64)
    cloud = row // num_queries
    places = tl.program_id(0) % num_blocks * block_size + tl.arange(0, block_size)
    axes = tl.arange(0, width)
    inside = places < num_points
    query = tl.load(queries + row * width + axes)
    block = tl.load(
        points + (cloud * num_points + places[:, None]) * width + axes[None, :], mask=inside[:, None], other=0.0
    )
    terms = block - query[None, :]
    sums = terms * terms
    for level in tl.static_range(levels):
        even, odd = tl.split(tl.reshape(sums, (block_size, width >> (level + 1), 2)))
        sums = even + odd
    tl.store(distances + row * num_points + places, tl.reshape(sums, (block_size,)), mask=inside)


@triton.jit
@no_type_check
def _select_kernel(distances, indices, squared, num_points, k, block_size: tl.constexpr) -> Any:
    """The smallest entry of one row, k times; what was taken goes above all others."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, block_size)
    # Non-negative floats order like the integers with the same bits
    bits = tl.load(distances + row * num_points + places, mask=places < num_points, other=0.0).to(
        tl.int32, bitcast=True
    )
    bits = tl.where(places < num_points, bits, _LAST)
    for slot in range(k):
        least = tl.min(bits, axis=0)
        place = tl.min(tl.where(bits == least, places, _LAST), axis=0)
        bits = tl.where(places == place, _LAST, bits)
        tl.store(indices + row * k + slot, place.to(tl.int64))
        tl.store(squared + row * k + slot, least.to(tl.float32, bitcast=True))


@triton.jit
@no_type_check
def _ball_query_kernel(
    centres,
    coordinates,
    limit,
    found,
    num_centres,
    num_points,
    k,
    block_size: tl.constexpr,
    num_slots: tl.constexpr,
) -> Any:
    """One centre: its cloud's points, [3, n], block by block until k are found."""
    row = tl.program_id(0).to(tl.int64)
    coordinates += row // num_centres * 3 * num_points
    found += row * k
    x, y, z = tl.load(centres + row * 3), tl.load(centres + row * 3 + 1), tl.load(centres + row * 3 + 2)
    squared_radius = tl.load(limit)
    count = tl.program_id(0) * 0
    first = count
    nearest = count + _LAST
    begin = count
    while (begin < num_points) & (count < k):
        places = begin + tl.arange(0, block_size)
        inside = places < num_points
        dx = tl.load(coordinates + places, mask=inside, other=0.0) - x
        dy = tl.load(coordinates + num_points + places, mask=inside, other=0.0) - y
        dz = tl.load(coordinates + 2 * num_points + places, mask=inside, other=0.0) - z
        squared = dx * dx + dy * dy + dz * dz
        within = inside & (squared < squared_radius)
        slots = count + tl.cumsum(within.to(tl.int32), axis=0) - 1
        tl.store(found + slots, places.to(tl.int64), mask=within & (slots < k))
        num_within = tl.sum(within.to(tl.int32), axis=0)
        bits = tl.where(inside, squared.to(tl.int32, bitcast=True), _LAST)
        least = tl.min(bits, axis=0)
        # Padding is the first within the radius; until there is one, the nearest so far
        first_within = tl.min(tl.where(within, places, _LAST), axis=0)
        first_nearest = tl.min(tl.where(bits == least, places, _LAST), axis=0)
        if count == 0:
            if num_within > 0:
                first = first_within
            elif least < nearest:
                first = first_nearest
        nearest = tl.minimum(nearest, least)
        count += num_within
        begin += block_size
    slots = tl.arange(0, num_slots)
    tl.store(found + slots, (first + slots * 0).to(tl.int64), mask=(slots >= count) & (slots < k))
