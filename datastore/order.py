"""Which samples come when: pure functions of (seed, epoch, position), O(1) in time and memory whatever the corpus.

Samples are numbered 0 .. num_samples - 1 and lie in units of `unit_samples` consecutive numbers; the last unit may be
ragged. An epoch puts the units into a keyed order, cuts that into windows of at most `window_units` neighbours of nearly
equal count, and shuffles the samples inside each window. A position in this sequence is looked up without anything
before it, and whoever reads a stretch of it holds one window at a time.

A global batch takes samples from many such stretches at once, the `Lanes`: so it mixes many units, while a process that
takes a part of each batch reads only the lanes of its part, and all processes together read every unit about once.

Both shuffles are keyed bijections: a Feistel network over a near-square grid just large enough for the range; whatever
leaves the range walks on until it is back inside. Nothing here knows ranks or workers: `stream.py` shares out each
global batch, so its samples are the same for any number of processes.
"""

from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from datastore.errors import AskedWrongly

Integers = NDArray[np.int64]
Words = NDArray[np.uint64]

# Words that keep the uses of one seed apart.
_UNITS: Final = 1
_WINDOW: Final = 2
_SAMPLE: Final = 3
_ROUND: Final = 4
_VIEW: Final = 5

_ROUNDS: Final = 16  # with 12, a chi-square test still sees a bias in the orders of five to eight units
_LARGEST_RANGE: Final = 2**53  # float64 roots stay exact enough for the grid, and no product leaves 64 bits


class Order:
    """The order of `num_samples` samples in every epoch."""

    def __init__(self, num_samples: int, unit_samples: int, window_units: int, seed: int) -> None:
        if not 0 < num_samples <= _LARGEST_RANGE:
            raise ValueError(f"an order needs 1 to {_LARGEST_RANGE} samples, not {num_samples}")
        if unit_samples < 1 or window_units < 1:
            raise ValueError(f"units of {unit_samples} rows and windows of {window_units} units: both must be positive")
        self.num_samples, self.unit_samples, self.seed = num_samples, unit_samples, seed
        self.num_units = -(-num_samples // unit_samples)
        self.num_windows = -(-self.num_units // window_units)
        self._missing = self.num_units * unit_samples - num_samples  # rows that the ragged unit lacks
        # The first `_larger_windows` windows hold one unit more than the others: no epoch ends in a window of one
        # unit while the others hold many.
        self._window_units, self._larger_windows = divmod(self.num_units, self.num_windows)

    def sample(self, epoch: int, position: int) -> int:
        """The sample at one position of an epoch."""
        return int(self.samples(epoch, np.array([position], dtype=np.int64))[0])

    @property
    def largest_window(self) -> int:
        """How many units a window has at most."""
        return self._window_units + (self._larger_windows > 0)

    def samples(self, epoch: int, positions: Integers) -> Integers:
        """The samples at these positions of an epoch, each in [0, num_samples)."""
        ragged = self._ragged_slot(epoch)
        window = self._window_of_slot(self._padded(positions, ragged) // self.unit_samples)
        start = self._window_start(window, ragged)
        size = self._window_start(window + 1, ragged) - start
        shuffled = start + permute(positions - start, size, keyed_hash(_WINDOW, self.seed, epoch, window))
        slot, row = np.divmod(self._padded(shuffled, ragged), self.unit_samples)
        return permute(slot, self.num_units, self._unit_key(epoch)) * self.unit_samples + row

    # The ragged unit may stand anywhere in an epoch. Slots are places for whole units, `padded` positions count as if
    # every slot were full, and the rows that the ragged unit lacks are stepped over: no position is lost or visited
    # twice, and every window is exact.

    def _ragged_slot(self, epoch: int) -> int:
        last = np.array([self.num_units - 1], dtype=np.int64)
        return int(permute(last, self.num_units, self._unit_key(epoch), inverse=True)[0])

    def _padded(self, positions: Integers, ragged: int) -> Integers:
        return positions + self._missing * (positions >= (ragged + 1) * self.unit_samples - self._missing)

    def _window_start(self, window: Integers, ragged: int) -> Integers:
        slot = self._first_slot(window)
        return slot * self.unit_samples - self._missing * (slot > ragged)

    def _window_of_slot(self, slot: Integers) -> Integers:
        in_larger = self._larger_windows * (self._window_units + 1)
        return np.where(
            slot < in_larger,
            slot // (self._window_units + 1),
            self._larger_windows + (slot - in_larger) // self._window_units,
        )

    def _first_slot(self, window: Integers) -> Integers:
        return window * self._window_units + np.minimum(window, self._larger_windows)

    def _unit_key(self, epoch: int) -> Words:
        return keyed_hash(_UNITS, self.seed, epoch)


Remainder = Literal["drop", "pad"]


class Lanes:
    """How the global batches of an epoch are cut from the order: some samples of each from every lane.

    A lane is a stretch of the order, from which batch after batch takes its share. What an epoch has left after its last
    whole batch is dropped, other samples each time; with "pad" it makes one more batch, filled up from the beginning.
    """

    def __init__(self, num_samples: int, global_batch: int, num_lanes: int, remainder: Remainder = "drop") -> None:
        if not 0 < global_batch <= num_samples:
            raise ValueError(f"global batches of {global_batch} out of {num_samples} samples")
        self.num_samples, self.global_batch = num_samples, global_batch
        self.num_lanes = min(num_lanes, global_batch)
        self.num_batches = num_samples // global_batch if remainder == "drop" else -(-num_samples // global_batch)

    def lane_of(self, offset: Integers) -> Integers:
        """The lane that a place in a global batch takes its samples from."""
        return offset * self.num_lanes // self.global_batch

    def positions(self, batch: Integers, offset: Integers) -> Integers:
        """Where in the epoch's order the sample at this place of this global batch stands."""
        lane = self.lane_of(offset)
        first = -(-lane * self.global_batch // self.num_lanes)  # the first place of the lane in a batch
        width = -(-(lane + 1) * self.global_batch // self.num_lanes) - first
        # the lanes before this one take `first` samples of each batch
        position: Integers = self.num_batches * first + batch * width + (offset - first)
        return position % self.num_samples  # beyond the end only where batches are padded


def sample_seeds(seed: int, epoch: int, ids: Integers) -> Integers:
    """One non-negative seed a sample: a function of (seed, epoch, id) and of nothing else."""
    return (keyed_hash(_SAMPLE, seed, epoch, ids) >> np.uint64(1)).astype(np.int64)


def drawn_views(seeds: Integers, num_views: int, num_drawn: int) -> Integers:
    """By sample seed, `num_drawn` different views out of `num_views`, in random order: [b, num_drawn]."""
    drawn = np.arange(num_drawn, dtype=np.int64)
    return permute(np.broadcast_to(drawn, (len(seeds), num_drawn)), num_views, keyed_hash(_VIEW, seeds)[:, None])


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
            f"A global batch of {global_batch} cannot be shared evenly by {world_size} processes in micro-batches of at"
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
