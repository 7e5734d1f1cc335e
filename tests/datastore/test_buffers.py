"""Memory is used again once nobody refers to it, and never before."""

import gc
import threading

import numpy as np
import pytest
import torch

from datastore.buffers import Buffers

MIB = 2**20


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_comes_back_when_its_array_has_gone() -> None:
    buffers = Buffers(keep_bytes=64 * MIB)
    first = buffers.empty((256, 1024), np.float32)
    assert first.shape == (256, 1024) and first.dtype == np.float32 and first.flags.writeable
    where = address(first)
    del first
    assert address(buffers.empty((MIB,), np.uint8)) == where


@pytest.mark.parametrize(
    "keep",
    [
        lambda array: array[3:5],
        lambda array: array[3:5][1:].reshape(-1),
        lambda array: array.view(np.int32),
        lambda array: torch.from_numpy(array),
        lambda array: torch.from_numpy(array)[7].numpy(),
        lambda array: memoryview(array)[1:],
        lambda array: np.frombuffer(memoryview(array.reshape(-1))[64:], np.uint8),
    ],
)
def test_whatever_still_sees_the_memory_keeps_it(keep: object) -> None:
    buffers = Buffers(keep_bytes=64 * MIB)
    array = buffers.empty((256, 1024), np.float32)
    where = address(array)
    kept = keep(array)  # type: ignore[operator]
    del array
    gc.collect()
    assert address(buffers.empty((256, 1024), np.float32)) != where
    del kept
    assert where in {address(each) for each in [buffers.empty((256, 1024), np.float32) for _ in range(3)]}


def test_sizes_that_differ_a_little_use_the_same_memory() -> None:
    buffers = Buffers(keep_bytes=64 * MIB)
    first = buffers.empty((1_000_001,), np.uint8)
    where = address(first)
    del first
    second = buffers.empty((1_000_777,), np.uint8)
    assert len(second) == 1_000_777 and address(second) == where


def test_memory_beyond_the_bound_is_not_kept() -> None:
    buffers = Buffers(keep_bytes=4 * MIB)
    together = [buffers.empty((MIB,), np.uint8) for _ in range(4)]
    del together
    big = buffers.empty((3 * MIB,), np.uint8)
    assert buffers.allocated_bytes == 4 * MIB, "three of the four had to go for this one"
    del big


def test_threads_get_memory_of_their_own() -> None:
    buffers = Buffers(keep_bytes=8 * MIB)
    wrong = []

    def work(number: int) -> None:
        for _ in range(300):
            array = buffers.empty((100_000,), np.uint8)
            array[...] = number
            if (array != number).any():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_memory_of_others_counts_as_long_as_its_owner_is_there() -> None:
    buffers, owner = Buffers(MIB), torch.empty(1)
    buffers.count(owner, 3 * MIB)
    assert buffers.allocated_bytes == 3 * MIB
    view = owner[:]
    del owner
    assert buffers.allocated_bytes in (0, 3 * MIB), "a view may hold what it was made of"
    del view
    gc.collect()
    assert buffers.allocated_bytes == 0
