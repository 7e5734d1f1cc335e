"""The fast paths on CPUs, in numpy: blocks that stay in cache, shared out among as many threads as torch uses.

Neighbours are found in two moves. A matrix product gives all distances, nearly; whatever it cannot rule out, given how
far it may be off, is a candidate, and of those few the exact distances decide. So results equal the reference to the
bit, ties included, at a fifth of its time and less; where very many points tie they stay right and get slower.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.ops.reference import pad_to_power_of_two

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

_BLOCK: Final = 1 << 18  # distances a thread works on at a time: 1 MB, to stay in a core's cache
_STAGE: Final = 1 << 23  # distances that one matrix product of features yields
_FEW_FEATURES: Final = 8  # up to here numpy multiplies faster than torch, block by block
_UNTHREADED: Final = 1 << 18  # multiply-adds up to which OpenBLAS starts no threads of its own
_NO_KEY: Final = np.iinfo(np.int64).max

Job = TypeVar("Job")


def farthest_points(points: Tensor, start: Tensor, num_samples: int) -> Tensor:
    """As the reference: one step a sample, over each thread's share of the clouds at once."""
    chosen = np.empty((len(points), num_samples), np.int64)

    def sample(clouds: slice) -> None:
        x, y, z = (np.ascontiguousarray(axis) for axis in np.moveaxis(points[clouds].numpy(), -1, 0))
        rows = np.arange(len(x))
        nearest, squared, term = np.full_like(x, np.inf), np.empty_like(x), np.empty_like(x)
        last = chosen[clouds, 0] = start[clouds].numpy()
        for step in range(1, num_samples):
            np.subtract(x, x[rows, last, None], out=squared)
            np.square(squared, out=squared)
            for axis in (y, z):
                np.subtract(axis, axis[rows, last, None], out=term)
                np.square(term, out=term)
                np.add(squared, term, out=squared)
            np.minimum(nearest, squared, out=nearest)
            nearest[rows, last] = -1  # below every distance: never chosen again
            last = chosen[clouds, step] = nearest.argmax(axis=1)

    share = -(-len(points) // torch.get_num_threads())
    _in_threads(sample, [slice(first, first + share) for first in range(0, len(points), share)])
    return torch.from_numpy(chosen)


def nearest_neighbours(queries: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices and squared distances [b, m, k], ascending, of equals the lowest index first."""
    keys = np.empty((*queries.shape[:2], k), np.int64)

    def find(tile: _Tile, block: _Block) -> None:
        keys[tile] = block.nearest(k).reshape(keys[tile].shape)

    _for_each_block(find, queries, points, most_copies=k)
    found = torch.from_numpy(keys)
    return found & 0xFFFFFFFF, (found >> 32).int().view(torch.float32)


def ball_query(centres: Tensor, points: Tensor, squared_radius: float, k: int) -> Tensor:
    """The first k points nearer than the radius, padded with the first; else the nearest point."""
    found = np.empty((*centres.shape[:2], k), np.int64)

    def find(tile: _Tile, block: _Block) -> None:
        found[tile] = block.first_within(np.float32(squared_radius), k).reshape(found[tile].shape)

    _for_each_block(find, centres, points)
    return torch.from_numpy(found)


_Tile = tuple[slice, slice]  # some clouds, some of their queries


@dataclass(frozen=True)
class _Block:
    """Some queries of some clouds, those clouds' points, and the distances between them, off by at most `errors`."""

    queries: Floats  # [c, r, e], features padded to a power of two
    points: Floats  # [c, n, e]
    approximate: Floats  # [c * r, n]
    errors: Floats  # [c * r, 1]

    def nearest(self, k: int) -> Integers:
        """The k nearest points of each query as sorted keys [c * r, k]: the bits of the distance, then the index."""
        bound = _least(self.approximate, k) + 2 * self.errors
        # Negated, so that what is not a number, after an overflow, is a candidate too
        rows, columns = np.divmod(np.flatnonzero(~(self.approximate > bound)), self.approximate.shape[1])
        counts = np.bincount(rows, minlength=len(bound))
        keys = np.full((len(bound), counts.max()), _NO_KEY)
        places = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        keys[rows, places] = self.exact(rows, columns).view(np.int32).astype(np.int64) << 32 | columns
        keys.sort(axis=1)
        return keys[:, :k]

    def first_within(self, squared_radius: np.float32, k: int) -> Integers:
        """The first k points [c * r, k] within the radius, padded with the first; the nearest where there are none."""
        num_points = self.approximate.shape[1]
        within = self.approximate < squared_radius - self.errors
        unsure = np.flatnonzero(~within & ~(self.approximate > squared_radius + self.errors))
        within.reshape(-1)[unsure] = self.exact(*np.divmod(unsure, num_points)) < squared_radius
        counts = np.count_nonzero(within, axis=1)[:, None]
        slots = np.arange(k)
        places = np.cumsum(counts)[:, None] - counts + np.where(slots < counts, slots, 0)
        found = np.append(np.flatnonzero(within), 0)  # one more, for empty rows to point to
        result: Integers = found[places] % num_points
        for row in np.flatnonzero(counts == 0):
            result[row] = self.exact(np.full(num_points, row), np.arange(num_points)).argmin()
        return result

    def exact(self, rows: Integers, columns: Integers) -> Floats:
        """Squared distances of these pairs, to the reference's bit."""
        num_clouds, num_points, width = self.points.shape
        if num_clouds > 1:
            columns = columns + rows // self.queries.shape[1] * num_points
        terms = np.take(self.points.reshape(-1, width), columns, axis=0)
        terms -= np.take(self.queries.reshape(-1, width), rows, axis=0)
        sums = np.square(terms, out=terms).reshape(-1)
        while len(sums) > len(rows):
            sums = sums[::2] + sums[1::2]
        return sums


def _least(distances: Floats, k: int) -> Floats:
    """An upper bound [r, 1] of each row's k-th smallest entry: the k-th smallest of the least entries of some groups."""
    num_points = distances.shape[1]
    num_groups = -(-num_points // 8)
    if num_groups < 4 * k:
        groups = distances.copy()
    else:
        groups = distances[:, :num_groups].copy()
        for first in range(num_groups, num_points, num_groups):
            part = distances[:, first : first + num_groups]
            np.minimum(groups[:, : part.shape[1]], part, out=groups[:, : part.shape[1]])
    groups.partition(k - 1, axis=1)
    return groups[:, k - 1 : k]


def _for_each_block(
    function: Callable[[_Tile, _Block], None], queries: Tensor, points: Tensor, most_copies: int | None = None
) -> None:
    """Calls the function on blocks that together hold all queries with all points of their clouds, in threads.

    Of identical points only the first `most_copies` need to be candidates.
    """
    # Around their centre coordinates are small, and so is what the product loses
    centre = points.mean(dim=1, keepdim=True)
    left, right = queries - centre, points - centre
    left_squares, right_squares = left.square().sum(-1, keepdim=True), right.square().sum(-1, keepdim=True)
    largest = torch.maximum(left_squares.amax((1, 2)), right_squares.amax((1, 2))).numpy()
    errors = _rounding(queries.shape[-1]) * largest + np.finfo(np.float32).tiny
    if most_copies is not None:
        _move_copies_away(right_squares, right, most_copies)
    left = torch.cat([-2 * left, left_squares, torch.ones_like(left_squares)], dim=-1)
    right = torch.cat([right, torch.ones_like(right_squares), right_squares], dim=-1).transpose(1, 2)
    padded_queries, padded_points = pad_to_power_of_two(queries).numpy(), pad_to_power_of_two(points).numpy()

    def call(tile: _Tile, approximate: Floats) -> None:
        clouds, _ = tile
        _, num_rows, num_points = approximate.shape
        block = _Block(
            padded_queries[tile],
            padded_points[clouds],
            approximate.reshape(-1, num_points),
            np.repeat(errors[clouds], num_rows)[:, None],
        )
        function(tile, block)

    shape = (len(queries), queries.shape[1], points.shape[1])
    if queries.shape[-1] <= _FEW_FEATURES:
        left_array, right_array = left.numpy(), right.numpy()
        _in_threads(lambda tile: call(tile, _multiply(left_array[tile], right_array[tile[0]])), _tiles(shape, _BLOCK))
        return
    stages = _tiles(shape, _STAGE)
    room = torch.from_numpy(np.empty(left[stages[0]].shape[:2].numel() * shape[2], np.float32))
    for clouds, rows in stages:
        product = _multiply_features(left[clouds, rows], right[clouds], room)

        def call_on_part(
            part: _Tile, first_cloud: int = clouds.start, first_row: int = rows.start, product: Floats = product
        ) -> None:
            call((_moved(part[0], first_cloud), _moved(part[1], first_row)), product[part])

        _in_threads(call_on_part, _tiles(product.shape, _BLOCK))


def _rounding(num_features: int) -> np.float32:
    """How far the product's and the exact distances may be apart, as a multiple of the largest squared norm.

    A sum of d products is off by at most d roundings of its terms' magnitudes, which sum to at most four squared norms;
    the norms are such sums too, and moving to the centre rounds each coordinate once. Half of this would do.
    """
    return np.float32(8 * (num_features + 8) * np.finfo(np.float32).eps)


def _multiply(left: Floats, right: Floats) -> Floats:
    """Matrix products [c, r, n], in portions that OpenBLAS works off in the thread that calls it."""
    num_clouds, num_rows, width = left.shape
    product = np.empty((num_clouds, num_rows, right.shape[2]), np.float32)
    portion = max(1, _UNTHREADED // (width * right.shape[2]))
    for first in range(0, num_rows, portion):
        rows = slice(first, first + portion)
        np.matmul(left[:, rows], right, out=product[:, rows])
    return product


def _multiply_features(left: Tensor, right: Tensor, room: Tensor) -> Floats:
    """Matrix products, in as many threads as torch uses; in numpy where torch was told to multiply in less than float32."""
    product = room[: left.shape[0] * left.shape[1] * right.shape[2]].view(*left.shape[:2], -1)
    if torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee"):  # type: ignore[attr-defined]  # missing in its stub
        torch.bmm(left, right, out=product)
    else:
        np.matmul(left.numpy(), right.numpy(), out=product.numpy())
    return product.numpy()


def _move_copies_away(squares: Tensor, points: Tensor, most_copies: int) -> None:
    """Makes the squared norms [b, n, 1] infinite of points with `most_copies` identical ones before them.

    Where a cloud's points are largely one and the same, every one of them would be everyone's candidate.
    """
    norms = squares.squeeze(-1)
    ascending = np.sort(norms.numpy(), axis=1)
    if not (ascending[:, most_copies:] == ascending[:, :-most_copies]).any():
        return
    order = norms.argsort(dim=1, stable=True)
    ordered = points.gather(1, order[..., None].expand_as(points))
    places = torch.arange(norms.shape[1]).expand_as(order)
    is_copy = torch.nn.functional.pad((ordered[:, 1:] == ordered[:, :-1]).all(dim=-1), (1, 0))
    num_before = places - torch.where(is_copy, 0, places).cummax(dim=1).values
    squares.masked_fill_(torch.zeros_like(is_copy).scatter_(1, order, num_before >= most_copies)[..., None], torch.inf)


def _tiles(shape: tuple[int, int, int], size: int) -> list[_Tile]:
    """Slices of the first two axes that cut an array into pieces of at most `size` entries, or a single row."""
    num_clouds, num_rows, num_points = shape
    rows = min(num_rows, max(1, size // num_points))
    clouds = max(1, size // (num_rows * num_points))
    return [
        (slice(cloud, min(cloud + clouds, num_clouds)), slice(row, min(row + rows, num_rows)))
        for cloud in range(0, num_clouds, clouds)
        for row in range(0, num_rows, rows)
    ]


def _moved(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)


def _in_threads(function: Callable[[Job], None], jobs: Sequence[Job]) -> None:
    """Calls the function on every job, in at most as many threads as torch uses for an operation."""

    def call(job: Job) -> None:
        with np.errstate(over="ignore", invalid="ignore"):  # huge coordinates: their distances are infinite
            function(job)

    num_threads = min(torch.get_num_threads(), len(jobs))
    if num_threads <= 1:
        for job in jobs:
            call(job)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(call, jobs))  # raises what a job raised
