"""Tests of models/ops/view_pooling.py. Numbers of properties are those of PointMCD's specification, section 6."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.ops.view_pooling import masked_view_max, max_over_points


def dense_view_max(per_point: Tensor, visibility: Tensor) -> tuple[Tensor, Tensor]:
    """The formula, with everything spelt out in memory."""
    hidden = ~visibility.transpose(1, 2)[..., None]
    spread = per_point[:, None].expand(-1, visibility.shape[2], -1, -1).masked_fill(hidden, -torch.inf)
    empty = ~visibility.any(dim=1)
    return spread.amax(dim=2).masked_fill(empty[..., None], 0), empty


def make(b: int = 3, n: int = 20, v: int = 4, c: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(b, n, c, generator=generator), torch.rand(b, n, v, generator=generator) < 0.4


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("sizes", [(3, 20, 4, 7), (1, 1, 1, 1), (2, 64, 12, 33), (4, 5, 9, 2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_values_and_gradients_are_those_of_the_dense_formula(sizes: tuple[int, int, int, int], seed: int) -> None:
    per_point, visibility = make(*sizes, seed=seed)
    fast, slow = per_point.clone().requires_grad_(), per_point.clone().requires_grad_()
    pooled, empty = masked_view_max(fast, visibility)
    expected, expected_empty = dense_view_max(slow, visibility)
    weights = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(9))
    (pooled * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.equal(pooled, expected) and torch.equal(empty, expected_empty)
    torch.testing.assert_close(fast.grad, slow.grad, rtol=0, atol=1e-6)


def test_the_gradient_agrees_with_finite_differences() -> None:
    per_point, visibility = make(b=2, n=6, v=3, c=4)
    exact = per_point.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda values: masked_view_max(values, visibility)[0], exact)
    assert torch.autograd.gradcheck(max_over_points, exact)


def test_a_view_that_sees_nothing_gives_zero_and_passes_no_gradient() -> None:  # property 1
    per_point, visibility = make()
    visibility[1, :, 2] = False
    visibility[2] = False
    per_point.requires_grad_()
    pooled, empty = masked_view_max(per_point, visibility)
    assert empty[1, 2] and empty[2].all() and not pooled[empty].any()
    pooled.sum().backward()
    assert per_point.grad is not None
    assert not per_point.grad[2].any() and torch.isfinite(per_point.grad).all()


def test_nothing_is_visible_anywhere() -> None:  # property 1
    per_point, visibility = make()
    per_point.requires_grad_()
    pooled, empty = masked_view_max(per_point, torch.zeros_like(visibility))
    pooled.sum().backward()
    assert empty.all() and not pooled.any() and not per_point.grad.any()  # type: ignore[union-attr]


def test_a_hidden_point_never_changes_a_view() -> None:  # property 2
    per_point, visibility = make()
    pooled, _ = masked_view_max(per_point, visibility)
    for view in range(visibility.shape[2]):
        changed = torch.where(visibility[:, :, view, None], per_point, per_point + 100)
        assert torch.equal(masked_view_max(changed, visibility)[0][:, view], pooled[:, view])


def test_a_point_hidden_from_every_view_has_no_gradient() -> None:  # property 2
    per_point, visibility = make()
    visibility[:, :5] = False
    per_point[:, :5] = 100
    per_point.requires_grad_()
    masked_view_max(per_point, visibility)[0].sum().backward()
    assert per_point.grad is not None
    assert not per_point.grad[:, :5].any() and per_point.grad[:, 5:].any()


def test_a_view_that_sees_all_points_is_the_maximum_over_the_cloud() -> None:  # property 3
    per_point, visibility = make()
    pooled, empty = masked_view_max(per_point, torch.ones_like(visibility))
    expected = max_over_points(per_point)
    assert torch.equal(expected, per_point.amax(dim=1)) and not empty.any()
    assert torch.equal(max_over_points(per_point.clone().requires_grad_()), expected)
    assert torch.equal(pooled, expected[:, None].expand_as(pooled))


def test_points_and_their_visibility_may_be_permuted_together_but_not_apart() -> None:  # property 4
    per_point, visibility = make()
    order = torch.randperm(per_point.shape[1], generator=torch.Generator().manual_seed(1))
    pooled, _ = masked_view_max(per_point, visibility)
    assert torch.equal(masked_view_max(per_point[:, order], visibility[:, order])[0], pooled)
    assert not torch.equal(masked_view_max(per_point[:, order], visibility)[0], pooled)


def test_views_may_be_permuted() -> None:  # property 5
    per_point, visibility = make()
    order = [2, 0, 3, 1]
    pooled, empty = masked_view_max(per_point, visibility)
    permuted, permuted_empty = masked_view_max(per_point, visibility[:, :, order])
    assert torch.equal(permuted, pooled[:, order]) and torch.equal(permuted_empty, empty[:, order])


def test_seeing_more_points_never_lowers_a_maximum() -> None:  # property 6
    per_point, visibility = make()
    per_point = per_point.abs()  # with signs, a view that saw nothing may fall below its 0
    more = visibility | (torch.rand(visibility.shape, generator=torch.Generator().manual_seed(2)) < 0.3)
    assert (masked_view_max(per_point, more)[0] >= masked_view_max(per_point, visibility)[0]).all()


def test_zeroing_hidden_points_is_the_same_only_where_nothing_is_negative() -> None:  # property 6
    per_point, visibility = make()

    def zero_masked(values: Tensor) -> Tensor:
        return (values[:, None] * visibility.transpose(1, 2)[..., None]).amax(dim=2)

    positive = per_point.relu()
    assert torch.equal(masked_view_max(positive, visibility)[0], zero_masked(positive))
    negative = -per_point.abs() - 1
    pooled, empty = masked_view_max(negative, visibility)
    assert (pooled[~empty] < 0).all() and not torch.equal(pooled, zero_masked(negative))


def test_of_equal_points_the_first_visible_one_gets_the_gradient() -> None:
    per_point = torch.ones(1, 4, 1, requires_grad=True)
    visibility = torch.tensor([[False], [True], [True], [False]])[None]
    masked_view_max(per_point, visibility)[0].sum().backward()
    assert per_point.grad is not None and per_point.grad.flatten().tolist() == [0, 1, 0, 0]


def test_no_tensor_is_larger_than_the_embeddings() -> None:  # property 7
    per_point, visibility = make(b=2, n=128, v=12, c=64)
    per_point.requires_grad_()
    with LargestTensor() as largest:
        pooled, _ = masked_view_max(per_point, visibility)
        pooled.sum().backward()
    assert largest.numel <= per_point.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_pool_in_their_own(dtype: torch.dtype) -> None:
    per_point, visibility = make()
    per_point = per_point.to(dtype).requires_grad_()
    pooled, _ = masked_view_max(per_point, visibility)
    pooled.sum().backward()
    assert pooled.dtype == dtype and torch.equal(pooled, dense_view_max(per_point, visibility)[0])


def test_visibility_of_other_points_is_refused() -> None:
    per_point, visibility = make()
    unchecked = inspect.unwrap(masked_view_max)  # outside tests nothing checks shapes before the function does
    with pytest.raises(ValueError, match="same rows of the visibility"):
        unchecked(per_point[:, :10], visibility)
    with pytest.raises(ValueError, match=r"torch\.float32; it must be torch\.bool"):
        unchecked(per_point, visibility.float())


@pytest.mark.gpu
def test_a_gpu_gives_the_same_values_and_gradients_every_time() -> None:
    per_point, visibility = make(b=4, n=256, v=12, c=128)
    visibility[1, :, 2] = False
    expected = per_point.clone().requires_grad_()
    dense, _ = dense_view_max(expected, visibility)
    weights = torch.randn(dense.shape, generator=torch.Generator().manual_seed(9))
    (dense * weights).sum().backward()
    assert expected.grad is not None
    gradients = []
    for _ in range(3):
        on_gpu = per_point.cuda().requires_grad_()
        pooled, _ = masked_view_max(on_gpu, visibility.cuda())
        (pooled * weights.cuda()).sum().backward()
        assert torch.equal(pooled.cpu(), dense) and on_gpu.grad is not None
        gradients.append(on_gpu.grad.cpu())
    torch.testing.assert_close(gradients[0], expected.grad, rtol=0, atol=1e-6)
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])
