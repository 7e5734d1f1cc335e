"""Tests of models/ops/image_lookup.py. Property 5 is that of I2P-MAE's specification, section 6."""

import pytest
import torch
from torch import Tensor

from models.ops.image_lookup import look_up_bicubic


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("height", "width", "image_size"), [(14, 14, 224), (7, 12, 50), (1, 1, 9), (2, 3, 3), (30, 20, 10)]
)
def test_a_look_up_equals_enlarging_and_indexing(height: int, width: int, image_size: int) -> None:  # property 5
    maps = random(3, height, width, 6)
    axis = torch.arange(image_size)
    pixels = torch.cartesian_prod(axis, axis).expand(3, -1, 2)
    whole = torch.nn.functional.interpolate(maps.permute(0, 3, 1, 2), size=(image_size, image_size), mode="bicubic")
    expected = whole.permute(0, 3, 2, 1).flatten(1, 2)  # column by column, as the pixels
    torch.testing.assert_close(look_up_bicubic(maps, pixels, image_size), expected, rtol=0, atol=1e-5)


def test_a_constant_map_gives_its_constant() -> None:  # property 5
    pixels = torch.randint(0, 224, (2, 100, 2), generator=torch.Generator().manual_seed(0))
    found = look_up_bicubic(torch.full((2, 14, 14, 3), -2.5), pixels, 224)
    torch.testing.assert_close(found, torch.full((2, 100, 3), -2.5))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_pixels_outside_count_as_the_nearest_inside(dtype: torch.dtype) -> None:
    maps = random(1, 14, 14, 3)
    outside = torch.tensor([[[-5, 3], [300, 223], [224, -1]]], dtype=dtype)
    inside = torch.tensor([[[0, 3], [223, 223], [223, 0]]])
    assert torch.equal(look_up_bicubic(maps, outside, 224), look_up_bicubic(maps, inside, 224))


def test_the_gradient_agrees_with_finite_differences() -> None:
    maps = random(2, 4, 3, 2).double().requires_grad_()
    pixels = torch.randint(0, 20, (2, 5, 2), generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda values: look_up_bicubic(values, pixels, 20), maps)
