"""Tests of trainer/augment_images.py."""

import pytest
import torch
from torch import Tensor
from torchvision.transforms import functional

from trainer.augment import uniform
from trainer.augment_images import crop_some, flip_some, jitter_colours, some_views

ADJUST = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)


def pictures(b: int = 6, size: int = 8) -> Tensor:
    return torch.rand(b, 3, size, size + 2, generator=torch.Generator().manual_seed(0))


def test_some_views_are_drawn_without_repetition_by_the_shape_s_seed() -> None:
    views = torch.arange(12, dtype=torch.uint8).view(1, 12, 1, 1, 1).expand(50, 12, 1, 1, 3).contiguous()
    seeds = torch.arange(50)
    drawn = some_views(views, seeds, 4)[..., 0, 0, 0]
    assert all(len(set(row)) == 4 for row in drawn.tolist())
    assert set(drawn.flatten().tolist()) == set(range(12)) and len({tuple(row) for row in drawn.tolist()}) > 40
    assert torch.equal(some_views(views[20:], seeds[20:], 4)[..., 0, 0, 0], drawn[20:])
    assert some_views(views, seeds, None) is views and some_views(views, seeds, 12) is views


def test_a_single_view_is_each_one_equally_often() -> None:
    views = torch.arange(5, dtype=torch.uint8).view(1, 5, 1, 1, 1).expand(5000, 5, 1, 1, 3)
    counts = some_views(views, torch.arange(5000), 1)[:, 0, 0, 0, 0].bincount()
    assert ((counts - 1000).abs() < 5 * 800**0.5).all()


def test_colours_are_jittered_as_torchvision_does_one_after_the_other() -> None:
    images, seeds = pictures(60), torch.arange(60)
    jittered = jitter_colours(images, seeds, 0.4, "test")
    random = uniform(seeds, 6, "test")
    orders = random[:, 3:].argsort(dim=1)
    assert len({tuple(order) for order in orders.tolist()}) == 6
    for image, found, factors, order in zip(images, jittered, 1 + 0.4 * (2 * random[:, :3] - 1), orders, strict=True):
        for kind in order.tolist():
            image = ADJUST[kind](image, factors[kind].item())
        torch.testing.assert_close(found, image, atol=1e-3, rtol=0)


def test_half_of_the_images_are_mirrored() -> None:
    images = pictures(1).expand(2000, 3, 8, 10)
    mirrored = (flip_some(images, torch.arange(2000), 0.5, "test") != images).any(dim=(1, 2, 3))
    assert abs(mirrored.float().mean() - 0.5) < 0.05
    assert torch.equal(flip_some(images, torch.arange(2000), 0.5, "test")[mirrored][0], images[0].flip(2))
    assert torch.equal(flip_some(images, torch.arange(2000), 0.0, "test"), images)


def test_a_crop_is_a_window_of_the_image() -> None:
    size = 32
    slope = torch.linspace(-1, 1, size)
    images = torch.stack([slope.expand(size, size), slope[:, None].expand(size, size), torch.zeros(size, size)])
    cropped = crop_some(images.expand(500, 3, size, size), torch.arange(500), 0.25, "test")
    sides = (cropped[:, 0, 0, -1] - cropped[:, 0, 0, 0]) / 2, (cropped[:, 1, -1, 0] - cropped[:, 1, 0, 0]) / 2
    torch.testing.assert_close(sides[0], sides[1], atol=0.05, rtol=0)
    assert 0.45 < sides[0].min() < 0.55 and 0.95 < sides[0].max() <= 1
    assert cropped.abs().max() <= 1
    torch.testing.assert_close(crop_some(images[None], torch.arange(1), 1.0, "test")[0], images, atol=1e-5, rtol=0)


CHANGES = {
    "jitter": lambda images, seeds, purpose: jitter_colours(images, seeds, 0.4, purpose),
    "flip": lambda images, seeds, purpose: flip_some(images, seeds, 0.5, purpose),
    "crop": lambda images, seeds, purpose: crop_some(images, seeds, 0.25, purpose),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_belongs_to_sample_and_purpose_and_leaves_its_input_alone(name: str) -> None:
    change, images, seeds = CHANGES[name], pictures(), torch.tensor([3, 1, 4, -1, 59, 2**60])
    before = images.clone()
    together = change(images, seeds, "one")
    assert torch.equal(images, before)
    assert together.shape == images.shape and together.min() >= 0 and together.max() <= 1
    order = [5, 2, 0]
    assert torch.equal(change(images[order], seeds[order], "one"), together[order])
    assert not torch.equal(change(images, seeds, "two"), together)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(change(images, seeds, "one"), together)
