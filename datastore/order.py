"""Which samples come when: pure functions of (seed, epoch, position), O(1) in time and memory whatever the corpus.

Samples are numbered 0 .. num_samples - 1 and lie in shards of `shard_rows` consecutive numbers; the last shard may be
ragged. An epoch visits the shards in a keyed order, cut into windows of at most `window_shards` neighbours of nearly
equal count, and shuffles the samples inside each window. So whoever reads along holds one window of shards, and a
position is looked up without anything before it.

Both shuffles are keyed bijections: a Feistel network over a near-square grid just large enough for the range; whatever
leaves the range walks on until it is back inside. Nothing here knows ranks, workers or batches: `stream.py` cuts
positions into global batches, so the samples of global batch k are the same for any number of processes.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from datastore.errors import AskedWrongly

Integers = NDArray[np.int64]
Words = NDArray[np.uint64]

# Words that keep the uses of one seed apart.
_SHARDS: Final = 1
_WINDOW: Final = 2
_SAMPLE: Final = 3
_ROUND: Final = 4

_ROUNDS: Final = 16  # with 12, a chi-square test still sees a bias in the orders of five to eight shards
_LARGEST_RANGE: Final = 2**53  # float64 roots stay exact enough for the grid, and no product leaves 64 bits


class Order:
    """The order of `num_samples` samples in every epoch."""

    def __init__(self, num_samples: int, shard_rows: int, window_shards: int, seed: int) -> None:
        if not 0 < num_samples <= _LARGEST_RANGE:
            raise ValueError(f"an order needs 1 to {_LARGEST_RANGE} samples, not {num_samples}")
        if shard_rows < 1 or window_shards < 1:
            raise ValueError(
                f"shards of {shard_rows} rows and windows of {window_shards} shards: both must be positive"
            )
        self.num_samples, self.shard_rows, self.seed = num_samples, shard_rows, seed
        self.num_shards = -(-num_samples // shard_rows)
        self.num_windows = -(-self.num_shards // window_shards)
        self._missing = self.num_shards * shard_rows - num_samples  # rows that the ragged shard lacks
        # The first `_larger_windows` windows hold one shard more than the others: no epoch ends in a window of one
        # shard while the others hold many.
        self._window_shards, self._larger_windows = divmod(self.num_shards, self.num_windows)

    def sample(self, epoch: int, position: int) -> int:
        """The sample at one position of an epoch."""
        return int(self.samples(epoch, np.array([position], dtype=np.int64))[0])

    @property
    def largest_window(self) -> int:
        """How many shards a window has at most."""
        return self._window_shards + (self._larger_windows > 0)

    def samples(self, epoch: int, positions: Integers) -> Integers:
        """The samples at these positions of an epoch, each in [0, num_samples)."""
        ragged = self._ragged_slot(epoch)
        window = self._window_of_slot(self._padded(positions, ragged) // self.shard_rows)
        start = self._window_start(window, ragged)
        size = self._window_start(window + 1, ragged) - start
        shuffled = start + permute(positions - start, size, keyed_hash(_WINDOW, self.seed, epoch, window))
        slot, row = np.divmod(self._padded(shuffled, ragged), self.shard_rows)
        return permute(slot, self.num_shards, self._shard_key(epoch)) * self.shard_rows + row

    def windows(self, epoch: int, positions: Integers) -> Integers:
        """The windows that these positions of an epoch lie in."""
        return self._window_of_slot(self._padded(positions, self._ragged_slot(epoch)) // self.shard_rows)

    def window_shards(self, epoch: int, window: int) -> Integers:
        """The shards whose samples one window of an epoch shuffles."""
        slots = np.arange(self._first_slot(window), self._first_slot(window + 1), dtype=np.int64)
        return permute(slots, self.num_shards, self._shard_key(epoch))

    def window_start(self, epoch: int, window: int) -> int:
        """The first position of a window; that of the window after the last is `num_samples`."""
        return int(self._window_start(np.array([window], dtype=np.int64), self._ragged_slot(epoch))[0])

    # The ragged shard may stand anywhere in an epoch. Slots are places for whole shards, `padded` positions count as if
    # every slot were full, and the rows that the ragged shard lacks are stepped over: no position is lost or visited
    # twice, and every window is exact.

    def _ragged_slot(self, epoch: int) -> int:
        last = np.array([self.num_shards - 1], dtype=np.int64)
        return int(permute(last, self.num_shards, self._shard_key(epoch), inverse=True)[0])

    def _padded(self, positions: Integers, ragged: int) -> Integers:
        return positions + self._missing * (positions >= (ragged + 1) * self.shard_rows - self._missing)

    def _window_start(self, window: Integers, ragged: int) -> Integers:
        slot = window * self._window_shards + np.minimum(window, self._larger_windows)
        return slot * self.shard_rows - self._missing * (slot > ragged)

    def _window_of_slot(self, slot: Integers) -> Integers:
        in_larger = self._larger_windows * (self._window_shards + 1)
        return np.where(
            slot < in_larger,
            slot // (self._window_shards + 1),
            self._larger_windows + (slot - in_larger) // self._window_shards,
        )

    def _first_slot(self, window: int) -> int:
        return window * self._window_shards + min(window, self._larger_windows)

    def _shard_key(self, epoch: int) -> Words:
        return keyed_hash(_SHARDS, self.seed, epoch)


def sample_seeds(seed: int, epoch: int, ids: Integers) -> Integers:
    """One non-negative seed a sample: a function of (seed, epoch, id) and of nothing else."""
    return (keyed_hash(_SAMPLE, seed, epoch, ids) >> np.uint64(1)).astype(np.int64)


def keyed_hash(*words: int | Integers) -> Words:
    """64 bits that depend on every word and on their order; words broadcast against each other."""
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        # The additive constant and the finaliser are those of SplitMix64 (Steele, Lea and Flood, 2014).
        state = _mix(state + np.asarray(word, dtype=np.int64).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return state


def permute(indices: Integers, size: int | Integers, key: Words, *, inverse: bool = False) -> Integers:
    """Where a keyed bijection of [0, size) sends each index; `inverse` sends it back. Sizes and keys broadcast."""
    index, sizes, keys = (array.ravel() for array in np.broadcast_arrays(indices, size, key))
    placed = _feistel(index, sizes, keys, inverse)
    # Grid cells beyond the range: walk on along the cycle. It leads back into the range, in two rounds nearly always.
    outside = np.flatnonzero(placed >= sizes)
    while len(outside):
        placed[outside] = _feistel(placed[outside], sizes[outside], keys[outside], inverse)
        outside = outside[placed[outside] >= sizes[outside]]
    return placed.reshape(np.shape(indices))


def _feistel(index: Integers, size: Integers, key: Words, inverse: bool) -> Integers:
    """An alternating Feistel network over a grid of at least `size` cells, less than one row more."""
    # An even number of columns: on an odd by odd grid every round is an even permutation, and half of all orders would
    # be rare.
    num_columns = 2 * np.ceil(np.sqrt(size) / 2).astype(np.uint64)
    rows = (size.astype(np.uint64) + num_columns - np.uint64(1)) // num_columns
    row, column = np.divmod(index.astype(np.uint64), num_columns)
    for number, constant in reversed(_ROUND_CONSTANTS) if inverse else _ROUND_CONSTANTS:
        if number % 2 == 0:
            row = _shift(row, _mix((key ^ constant) + column) % rows, rows, inverse)
        else:
            column = _shift(column, _mix((key ^ constant) + row) % num_columns, num_columns, inverse)
    return (row * num_columns + column).astype(np.int64)


def _shift(value: Words, by: Words, modulus: Words, inverse: bool) -> Words:
    return (value + (modulus - by if inverse else by)) % modulus


def _mix(word: Words) -> Words:
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


_ROUND_CONSTANTS: Final = list(enumerate(keyed_hash(_ROUND, np.arange(_ROUNDS))))


def allowed_worlds(global_batch: int, max_micro_batch: int) -> list[int]:
    """Numbers of processes that can share a global batch exactly.

    Every process takes equal micro-batches, and none of one sample, which has no batch statistics (unless asked for).
    """
    least = min(2, max_micro_batch, global_batch)
    return [
        world
        for world in range(1, global_batch + 1)
        if global_batch % world == 0 and _largest_divisor(global_batch // world, max_micro_batch) >= least
    ]


def choose_micro_batch(global_batch: int, world_size: int, max_micro_batch: int) -> tuple[int, int]:
    """The largest micro-batch that fits, and how many of them each process accumulates to an optimizer step."""
    worlds = allowed_worlds(global_batch, max_micro_batch)
    if world_size not in worlds:
        raise AskedWrongly(
            f"a global batch of {global_batch} cannot be shared evenly by {world_size} processes in micro-batches of at"
            f" most {max_micro_batch}. {say_worlds(worlds)}"
        )
    micro_batch = _largest_divisor(global_batch // world_size, max_micro_batch)
    return micro_batch, global_batch // (world_size * micro_batch)


def _largest_divisor(number: int, limit: int) -> int:
    return next(divisor for divisor in range(min(number, limit), 0, -1) if number % divisor == 0)


def say_worlds(worlds: list[int]) -> str:
    """What to do instead, for people."""
    if not worlds:
        return "No number of processes can: change global_batch."
    *others, last = map(str, worlds)
    either = f"{', '.join(others)} or {last}" if others else last
    return f"Use {either} processes, or change global_batch."
