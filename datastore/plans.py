"""Which samples make up this rank's coming micro-batches, and which units they lie in, before anything is read. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from jaxtyping import Int64

from datastore.errors import AskedWrongly
from datastore.layout import Rows
from datastore.order import Lanes, Order, sample_seeds, say_worlds

_PLANNED_PLACES: Final = 4096  # looked up in the order at a time: numpy's cost of a call is then 1/4096 a sample


@dataclass(frozen=True)
class Shares:
    """How ranks share a global batch."""

    global_batch: int
    micro_batch: int
    rank: int
    world_size: int

    @property
    def accumulation(self) -> int:
        return self.global_batch // (self.micro_batch * self.world_size)

    def check(self, start: int) -> None:
        if self.global_batch % self.micro_batch:
            raise AskedWrongly(
                f"A global batch of {self.global_batch} cannot be cut into micro-batches of {self.micro_batch}. Choose "
                f"a micro-batch that divides it."
            )
        num_micro_batches = self.global_batch // self.micro_batch
        if num_micro_batches % self.world_size:
            worlds = [world for world in range(1, num_micro_batches + 1) if num_micro_batches % world == 0]
            raise AskedWrongly(
                f"A global batch of {self.global_batch} in micro-batches of {self.micro_batch} cannot be shared evenly "
                f"by {self.world_size} processes. {say_worlds(worlds)}"
            )
        if start % self.global_batch or start < 0:
            raise AskedWrongly(
                f"{start} samples seen are no whole number of global batches of {self.global_batch}: this run was "
                f"started with another global_batch. Go on with that one, or start a new run."
            )

    @property
    def offsets(self) -> Int64[np.ndarray, "a m"]:
        """This rank's places in a global batch, by micro-batch: neighbours, so that they lie in few lanes."""
        mine = self.accumulation * self.micro_batch
        return (self.rank * mine + np.arange(mine, dtype=np.int64)).reshape(self.accumulation, self.micro_batch)


class Run(NamedTuple):
    """Neighbouring places of a micro-batch whose samples lie in one unit."""

    unit: int
    start: int
    end: int


class Plan(NamedTuple):
    """One micro-batch, before anything is read."""

    epoch: int
    ids: Int64[np.ndarray, " m"]  # rows of the store
    seeds: Int64[np.ndarray, " m"]
    runs: list[Run]
    rows: list[int]  # of each sample in its unit


def plans_of(rows: Rows, order: Order, lanes: Lanes, shares: Shares, first_step: int) -> Iterator[Plan]:
    """This rank's micro-batches from an optimizer step on, without end."""
    offsets = shares.offsets
    steps_at_once = max(1, _PLANNED_PLACES // offsets.size)
    step = first_step
    while True:
        epoch, batch = divmod(step, lanes.num_batches)
        end = min(batch + steps_at_once, lanes.num_batches)
        batches = np.arange(batch, end, dtype=np.int64)[:, None, None]
        positions = lanes.positions(batches, offsets).reshape(-1, shares.micro_batch)
        samples = order.samples(epoch, positions)
        ids = rows[samples]
        seeds = sample_seeds(order.seed, epoch, ids)
        units, in_units = np.divmod(samples, order.unit_samples)
        # samples of one lane are neighbours in a batch, and mostly of one unit
        plan, ends = np.nonzero(np.diff(units, axis=1, append=-1))
        first_runs = np.searchsorted(plan, np.arange(len(samples) + 1))
        last_units = units[plan, ends].tolist()
        bounds = (ends + 1).tolist()
        for number, in_unit in enumerate(in_units.tolist()):
            runs, start = [], 0
            for place in range(first_runs[number], first_runs[number + 1]):
                runs.append(Run(last_units[place], start, bounds[place]))
                start = bounds[place]
            yield Plan(epoch, ids[number], seeds[number], runs, in_unit)
        step += end - batch


def span_of(order: Order, shares: Shares, lanes: Lanes) -> int:
    """Micro-batches, from the first on that needs a unit, in which a lane uses it up."""
    samples_of_a_lane = max(1, lanes.global_batch // lanes.num_lanes)
    # a window may begin within a batch, and so end within one
    batches = 1 + -(-order.largest_window * order.unit_samples // samples_of_a_lane)
    return min(batches, lanes.num_batches) * shares.accumulation
