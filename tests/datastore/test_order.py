"""The order is a bijection of every epoch, the same for any world, cheap at any size, and mixes well."""

import time
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datastore.errors import AskedWrongly
from datastore.order import Lanes, Order, allowed_worlds, choose_micro_batch, keyed_hash, permute, sample_seeds

unhurried = settings(deadline=None)  # a busy machine is no failure

sizes = st.integers(1, 3000)
orders = st.builds(Order, sizes, st.integers(1, 200), st.integers(1, 9), st.integers(0, 2**62))
small_orders = st.builds(Order, st.integers(1, 150), st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**62))


def epoch_of(order: Order, epoch: int = 0) -> np.ndarray:
    return order.samples(epoch, np.arange(order.num_samples))


@given(sizes, st.integers(0, 2**62))
@unhurried
def test_a_permutation_sends_every_index_to_a_place_of_its_own_and_back(size: int, word: int) -> None:
    indices, key = np.arange(size), keyed_hash(word)
    placed = permute(indices, size, key)
    assert np.array_equal(np.sort(placed), indices)
    assert np.array_equal(permute(placed, size, key, inverse=True), indices)


@pytest.mark.parametrize("size", [3, 4, 5])
def test_every_order_of_a_few_units_is_as_likely_as_any_other(size: int) -> None:
    num_keys = 12_000
    keys = np.repeat(keyed_hash(7, np.arange(num_keys)), size)
    placed = permute(np.tile(np.arange(size), num_keys), size, keys).reshape(num_keys, size)
    _, counts = np.unique(placed, axis=0, return_counts=True)
    expected = num_keys / np.prod(np.arange(1, size + 1))
    assert len(counts) == np.prod(np.arange(1, size + 1))
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


@given(orders, st.integers(0, 1000))
@unhurried
def test_an_epoch_visits_every_sample_once_with_any_ragged_last_unit(order: Order, epoch: int) -> None:
    assert np.array_equal(np.sort(epoch_of(order, epoch)), np.arange(order.num_samples))


@given(orders, st.integers(0, 1000), st.data())
@unhurried
def test_one_position_alone_gives_what_the_whole_epoch_gives(order: Order, epoch: int, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, order.num_samples - 1))
    assert order.sample(epoch, position) == epoch_of(order, epoch)[position]


def windows_of(order: Order, epoch: int) -> list[tuple[int, int]]:
    """First position of each window of an epoch, and the one after its last: the windows' counts of units are known."""
    units = epoch_of(order, epoch) // order.unit_samples
    fewest, with_one_more = divmod(order.num_units, order.num_windows)
    bounds = [0]
    for window in range(order.num_windows):
        chosen = list(dict.fromkeys(units[bounds[-1] :].tolist()))[: fewest + (window < with_one_more)]
        bounds.append(bounds[-1] + int(np.isin(units, chosen).sum()))
    return list(pairwise(bounds))


@given(small_orders, st.integers(0, 1000))
@unhurried
def test_a_window_is_all_rows_of_a_few_whole_units(order: Order, epoch: int) -> None:
    sequence, seen = epoch_of(order, epoch), list[int]()
    for start, end in windows_of(order, epoch):
        units = np.unique(sequence[start:end] // order.unit_samples)
        of_units = [sample for sample in range(order.num_samples) if sample // order.unit_samples in units]
        assert sorted(sequence[start:end].tolist()) == of_units
        assert 0 < len(units) <= order.largest_window
        seen += units.tolist()
    assert sorted(seen) == list(range(order.num_units))


@given(st.integers(1, 150), st.integers(1, 40), st.integers(1, 9))
@unhurried
def test_windows_are_of_nearly_the_same_number_of_units_and_never_of_more_than_asked(
    num_samples: int, unit_samples: int, window_units: int
) -> None:
    order = Order(num_samples, unit_samples, window_units, seed=0)
    assert order.largest_window == -(-order.num_units // order.num_windows) <= window_units
    assert order.num_windows == -(-order.num_units // window_units)


lanes_of_some_epoch = st.tuples(sizes, st.integers(1, 64), st.integers(1, 64)).map(
    lambda drawn: (max(drawn[0], drawn[1]), drawn[1], drawn[2])
)


@given(lanes_of_some_epoch)
@unhurried
def test_global_batches_take_every_position_once_but_for_what_is_left(drawn: tuple[int, int, int]) -> None:
    num_samples, global_batch, num_lanes = drawn
    offsets = np.arange(global_batch)
    whole = Lanes(num_samples, global_batch, num_lanes)
    taken = whole.positions(np.arange(whole.num_batches)[:, None], offsets)
    assert np.array_equal(np.sort(taken, axis=None), np.arange(num_samples // global_batch * global_batch))
    padded = Lanes(num_samples, global_batch, num_lanes, "pad")
    taken = padded.positions(np.arange(padded.num_batches)[:, None], offsets)
    found, times = np.unique(taken, return_counts=True)
    assert np.array_equal(found, np.arange(num_samples))
    assert times.max() <= 2
    assert (times == 2).sum() == -num_samples % global_batch


@given(lanes_of_some_epoch)
@unhurried
def test_each_lane_gives_its_share_of_every_batch_from_a_stretch_of_its_own(drawn: tuple[int, int, int]) -> None:
    lanes = Lanes(*drawn)
    offsets = np.arange(lanes.global_batch)
    positions = lanes.positions(np.arange(lanes.num_batches)[:, None], offsets)
    lane = lanes.lane_of(offsets)
    assert set(lane.tolist()) == set(range(lanes.num_lanes))
    assert np.ptp(np.bincount(lane)) <= 1
    for number in range(lanes.num_lanes):
        stretch = positions[:, lane == number].ravel()
        assert np.array_equal(stretch, np.arange(stretch[0], stretch[0] + len(stretch)))


def test_epochs_and_seeds_each_have_an_order_of_their_own() -> None:
    first, other_seed = Order(1000, 64, 4, seed=0), Order(1000, 64, 4, seed=1)
    drawn = [epoch_of(first, 0), epoch_of(first, 1), epoch_of(other_seed, 0), epoch_of(other_seed, 1)]
    for index, one in enumerate(drawn):
        for another in drawn[index + 1 :]:
            assert np.mean(one == another) < 0.01


def test_the_order_of_a_seed_stays_what_it_was() -> None:
    """Resuming a run after an upgrade must not visit other samples: a change here breaks every run under way."""
    assert epoch_of(Order(12, 4, 2, seed=0)).tolist() == [0, 9, 2, 10, 8, 3, 1, 11, 7, 4, 5, 6]
    assert sample_seeds(3, 1, np.array([0, 5])).tolist() == [542238146538180893, 9080594252265588672]


def test_ten_thousand_million_samples_cost_what_ten_thousand_cost() -> None:
    def lookup(num_samples: int) -> float:
        order = Order(num_samples, 1024, 4, seed=0)
        started = time.perf_counter()
        for epoch in range(20):
            assert 0 <= order.sample(epoch, num_samples - 1 - epoch) < num_samples
        return time.perf_counter() - started

    tracemalloc.start()
    small, large = min(lookup(10**4) for _ in range(3)), min(lookup(10**10) for _ in range(3))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert large < 3 * small
    assert peak_bytes < 1_000_000


@given(st.integers(2**20, 2**45), st.integers(1, 5000), st.integers(1, 64), st.data())
@settings(max_examples=50, deadline=None)
def test_a_stretch_of_a_vast_corpus_is_of_two_windows_at_most(
    num_samples: int, unit_samples: int, window_units: int, data: st.DataObject
) -> None:
    order = Order(num_samples, unit_samples, window_units, seed=1)
    shortest = max(1, order.num_units // order.num_windows * unit_samples - unit_samples)
    start = data.draw(st.integers(0, num_samples - shortest))
    samples = order.samples(2, np.arange(start, min(start + shortest, start + 5000)))
    assert ((samples >= 0) & (samples < num_samples)).all()
    assert len(np.unique(samples)) == len(samples)
    assert len(np.unique(samples // unit_samples)) <= 2 * order.largest_window


def test_neighbours_in_the_order_lie_nearly_as_far_apart_as_in_a_full_permutation() -> None:
    num_samples = 65_536  # 64 shards
    far = np.abs(np.diff(np.random.default_rng(0).permutation(num_samples))).mean()
    one_shard, four, sixteen = (
        np.abs(np.diff(epoch_of(Order(num_samples, 1024, shards, seed=0)))).mean() for shards in (1, 4, 16)
    )
    assert one_shard < 0.05 * far  # what the window is for
    assert four > 0.65 * far
    assert sixteen > 0.9 * far


def test_batches_of_a_corpus_sorted_by_class_are_balanced_nearly_as_in_a_full_permutation() -> None:
    num_classes, num_samples, batch = 10, 64_000, 64
    labels = np.arange(num_samples) * num_classes // num_samples

    def classes_a_batch(order: np.ndarray) -> float:
        return float(np.mean([len(np.unique(row)) for row in labels[order].reshape(-1, batch)]))

    full = classes_a_batch(np.random.default_rng(0).permutation(num_samples))
    windows = {shards: classes_a_batch(epoch_of(Order(num_samples, 1000, shards, seed=0))) for shards in (1, 4, 16)}
    assert windows[1] < 0.15 * full
    assert windows[4] > 0.33 * full  # four shards of one class each can show no more than four classes
    assert windows[16] > 0.75 * full


def test_a_samples_seed_depends_on_seed_epoch_and_id_and_on_nothing_else() -> None:
    ids = np.array([4, 9, 4, 10**12])
    seeds = sample_seeds(5, 2, ids)
    assert seeds.dtype == np.int64
    assert (seeds >= 0).all()
    assert seeds[0] == seeds[2]
    assert sample_seeds(5, 2, ids[::-1]).tolist() == seeds[::-1].tolist()
    others = [sample_seeds(6, 2, ids), sample_seeds(5, 3, ids), sample_seeds(2, 5, ids), sample_seeds(5, 2, ids + 1)]
    assert all((seeds != other).all() for other in others)
    assert len(np.unique(sample_seeds(0, 0, np.arange(100_000)))) == 100_000


def test_nonsense_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="0"):
        Order(0, 4, 1, seed=0)
    with pytest.raises(ValueError, match="both must be positive"):
        Order(4, 4, 0, seed=0)


@given(st.integers(1, 600), st.integers(1, 70))
@unhurried
def test_every_allowed_world_shares_the_global_batch_exactly(global_batch: int, max_micro_batch: int) -> None:
    worlds = allowed_worlds(global_batch, max_micro_batch)
    assert worlds == sorted(set(worlds))
    assert 1 in worlds or min(max_micro_batch, global_batch) > 1
    for world in worlds:
        micro_batch, accumulation = choose_micro_batch(global_batch, world, max_micro_batch)
        assert micro_batch * accumulation * world == global_batch
        assert micro_batch <= max_micro_batch


def test_a_world_that_would_leave_one_sample_a_step_is_not_allowed() -> None:
    assert allowed_worlds(12, 8) == [1, 2, 3, 4, 6]
    assert allowed_worlds(12, 1) == [1, 2, 3, 4, 6, 12]
    assert choose_micro_batch(64, 2, 12) == (8, 4)


def test_a_world_that_does_not_divide_names_those_that_do() -> None:
    with pytest.raises(AskedWrongly, match=r"7 cannot be shared .* change global_batch"):
        choose_micro_batch(7, 1, 4)
    with pytest.raises(AskedWrongly, match=r"64 cannot be shared evenly by 3 .* Use 1, 2, 4, 8, 16 or 32 processes"):
        choose_micro_batch(64, 3, 16)
