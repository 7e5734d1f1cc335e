"""Runs a frozen teacher on many shapes, so that what it says of one does not depend on what stands beside it.

On CPU each shape goes through the network by itself on one thread, and shapes are spread over threads. Larger batches,
or more threads in one product, would change the order of sums and with it last bits (measured: up to 3e-6), so that a
store would depend on how it was made. It is no slower: 55 images/s for MobileNetV2 at 224 pixels on two cores, against
45 with batches of 48 images. Views go through small networks one at a time, whose maps then stay in a core's cache
(MobileNetV2: 18 instead of 26 ms an image), and through large ones together, whose weights do not fit it anyway
(ResNet-18: 23 instead of 42 ms). On a GPU a fixed number of shapes, counted from the first row of a block, goes through
together; where its memory is too small for them, half as many do.

Work is started and its result asked for later: meanwhile the next shapes are read, and the last ones written.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from datastore.errors import DoNotRetry
from datastore.schema import FIELDS
from trainer.numerics import exact_float32

if TYPE_CHECKING:
    from models.image_models.teacher import ImageTeacher
    from trainer.teachers import Precision

Words = dict[str, np.ndarray]
"""What a teacher says of some shapes, by field, in the store's types; a row a shape."""

Describe = Callable[[np.ndarray], Callable[[], Words]]
"""Starts with some shapes, given by the store field that the teacher reads; what it returns waits for the words."""

_GPU_IMAGES: Final = 256  # that go through a GPU together, about
_SMALL_WEIGHTS: Final = 4_000_000  # of a network that looks at one view at a time; a constant, so that bits are, too


def shapes_together(device: str, num_views: int) -> int:
    """How many shapes go through the network at a time."""
    return 1 if device == "cpu" else max(1, _GPU_IMAGES // num_views)


@contextmanager
def describer(
    teacher: "ImageTeacher", fields: Sequence[str], device: str, precision: "Precision", num_views: int
) -> Iterator[Describe]:
    """A function that lets a teacher describe shapes, for as long as the block runs."""

    def words_of(shapes: Tensor) -> dict[str, Tensor]:
        enabled = precision == "bf16"
        with torch.inference_mode(), torch.autocast(shapes.device.type, torch.bfloat16, enabled=enabled):
            said = teacher.teach(shapes, fields)
        return {field: said[field].to(getattr(torch, FIELDS[field].dtype)) for field in fields}

    exact_float32()
    if device == "cpu":
        is_small = sum(weights.numel() for weights in teacher.parameters()) <= _SMALL_WEIGHTS
        with _shape_by_shape(words_of, fields, view_by_view=is_small and teacher.reads == "views") as describe:
            yield describe
    else:
        teacher.to(device)
        yield _Groups(words_of, fields, torch.device(device), shapes_together(device, num_views)).start


@contextmanager
def _shape_by_shape(
    words_of: Callable[[Tensor], dict[str, Tensor]], fields: Sequence[str], view_by_view: bool
) -> Iterator[Describe]:
    """Each shape on one thread, as many shapes at a time as torch may use threads."""

    def describe_one(shape: np.ndarray) -> Words:
        whole = torch.from_numpy(shape[None])
        said = [words_of(part) for part in (whole.split(1, dim=1) if view_by_view else [whole])]
        return {field: torch.cat([each[field] for each in said], dim=1)[0].numpy() for field in fields}

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # torch counts threads by the thread that asks, so each worker says it again
    pool = ThreadPoolExecutor(threads, "cache-describe", initializer=torch.set_num_threads, initargs=(1,))

    def start(shapes: np.ndarray) -> Callable[[], Words]:
        started = [pool.submit(describe_one, shape) for shape in shapes]
        return lambda: {field: np.stack([each.result()[field] for each in started]) for field in fields}

    try:
        yield start
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


class _Groups:
    """So many shapes at a time, and never fewer: tensors of one size, so that the same kernels compute every shape."""

    def __init__(
        self, words_of: Callable[[Tensor], dict[str, Tensor]], fields: Sequence[str], device: torch.device, size: int
    ) -> None:
        self._words_of = words_of
        self._fields = fields
        self._device = device
        self._size = size
        self._copies: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, shapes: np.ndarray) -> Callable[[], Words]:
        """Queues all groups on the device; copies to and fro overlap with the compute of others."""
        parts: list[dict[str, Tensor]] = []
        first = 0
        while first < len(shapes):
            try:
                parts.append(self._describe(torch.from_numpy(shapes[first : first + self._size])))
                first += self._size
            except torch.OutOfMemoryError as error:
                self._halve(error)
        done = None
        if self._copies is not None:
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(self._device))

        def words() -> Words:
            if done is not None:
                done.synchronize()
            return {field: torch.cat([part[field] for part in parts]).numpy() for field in self._fields}

        return words

    def _halve(self, error: torch.OutOfMemoryError) -> None:
        if self._size == 1:
            raise DoNotRetry(
                f"One shape at a time is more than {self._device} has memory for: {str(error).splitlines()[0]} Choose a "
                f"smaller --image-size or network, or --precision bf16."
            ) from error
        self._size //= 2
        torch.cuda.empty_cache()
        print(f"viewpoint: {self._device} has memory for {self._size} shapes at a time.", file=sys.stderr)

    def _describe(self, shapes: Tensor) -> dict[str, Tensor]:
        num_shapes = len(shapes)
        group = self._to_device(shapes)
        if num_shapes < self._size:  # at the end of a block
            group = torch.cat([group, group.new_zeros((self._size - num_shapes, *group.shape[1:]))])
        return {field: self._to_host(value[:num_shapes]) for field, value in self._words_of(group).items()}

    def _to_device(self, shapes: Tensor) -> Tensor:
        if self._copies is None:
            return shapes.to(self._device)
        compute = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copies):
            group = shapes.pin_memory().to(self._device, non_blocking=True)
        compute.wait_stream(self._copies)
        group.record_stream(compute)
        return group

    def _to_host(self, value: Tensor) -> Tensor:
        if self._copies is None:
            return value.cpu()
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        return host.copy_(value, non_blocking=True)
