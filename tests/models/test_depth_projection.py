"""Tests of models/depth_projection.py."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.depth_projection import NUM_VIEWS, depth_sums, frame_clouds, grey_images, pixels_of
from models.ops.image_lookup import look_up_bicubic

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def clouds(num_clouds: int = 2, num_points: int = 50) -> Tensor:
    """Boxes of unequal sides, on a grid of 1/256: sums and differences of their coordinates are exact."""
    random = torch.Generator().manual_seed(0)
    points = torch.rand(num_clouds, num_points, 3, generator=random) * 2 - 1
    return (points * torch.tensor([1.0, 0.5, 0.25]) * 256).round() / 256


def drawn_by_loops(points: Tensor, size: int) -> tuple[np.ndarray, np.ndarray]:
    """One cloud's images [3, s, s] and each point's row and column in them [n, 3, 2], as the paper's steps are told."""
    images = np.zeros((3, size, size))
    places = np.zeros((len(points), 3, 2), dtype=int)
    x, y, z = points.numpy().T
    for view, (row, column, depth) in enumerate([(x, y, z), (z, x, y), (y, z, x)]):
        lowest = (row.min(), column.min())
        cell = np.float32(max(row.max() - row.min(), column.max() - column.min())) / np.float32(size - 3)
        base = [np.floor((each - low) / cell).astype(int) for each, low in zip((row, column), lowest, strict=True)]
        splat = [each[:, None] + 1 + np.arange(-2, 3) for each in base]
        shift = [size // 2 - math.floor((each.max() + each.min()) / 2) - 1 for each in splat]
        for n in range(len(points)):
            for r in splat[0][n] + shift[0]:
                for c in splat[1][n] + shift[1]:
                    r_kept, c_kept = (k + 1 if k < 0 else k - 1 if k > size - 1 else k for k in (r, c))
                    assert 0 <= r_kept < size and 0 <= c_kept < size
                    images[view, r_kept, c_kept] += depth[n]
            places[n, view] = base[0][n] + 1 + shift[0], base[1][n] + 1 + shift[1]
    return images, places


@pytest.mark.parametrize("size", [32, 224])
def test_images_and_pixels_are_those_of_the_paper_s_steps(size: int) -> None:
    points = torch.randn(2, 60, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 0.3, 0.7])
    frame = frame_clouds(points, size)
    sums, pixels = depth_sums(points, frame), pixels_of(points, frame)
    for cloud in range(2):
        images, places = drawn_by_loops(points[cloud], size)
        torch.testing.assert_close(sums[cloud], torch.from_numpy(images).float(), rtol=0, atol=2e-6)
        assert torch.equal(pixels[cloud].flip(-1), torch.from_numpy(places))  # column before row


def test_the_longer_side_reaches_from_border_to_border_and_the_shorter_lies_in_the_middle() -> None:
    points = torch.tensor([[[-1.0, -0.25, 1.0], [1.0, 0.25, 1.0]]])
    frame = frame_clouds(points, 64)
    rows, columns = (depth_sums(points, frame)[0, 0] > 0).nonzero().T
    assert (rows.min(), rows.max()) == (0, 63)
    assert abs((columns.min() + columns.max()) / 2 - 31.5) <= 1


def test_the_order_of_points_changes_no_bit() -> None:
    points = clouds()
    order = torch.randperm(50, generator=torch.Generator().manual_seed(2))
    frame, other = frame_clouds(points), frame_clouds(points[:, order])
    assert torch.equal(depth_sums(points, frame), depth_sums(points[:, order], other))
    assert torch.equal(pixels_of(points, frame)[:, order], pixels_of(points[:, order], other))


@pytest.mark.parametrize("view", range(NUM_VIEWS))
def test_moving_within_the_image_plane_changes_nothing_and_moving_in_depth_does(view: int) -> None:
    points = clouds()
    row, column, depth = ((0, 1, 2), (2, 0, 1), (1, 2, 0))[view]
    before = depth_sums(points, frame_clouds(points))[:, view]
    moved = points.clone()
    moved[..., row] += 0.5
    moved[..., column] -= 0.25
    assert torch.equal(depth_sums(moved, frame_clouds(moved))[:, view], before)
    moved[..., depth] += 0.5
    assert not torch.equal(depth_sums(moved, frame_clouds(moved))[:, view], before)


def test_size_does_not_matter_where_points_fall() -> None:
    points = clouds()
    assert torch.equal(pixels_of(points, frame_clouds(points)), pixels_of(4 * points, frame_clouds(4 * points)))


def test_the_background_is_the_published_grey_and_depth_zero_vanishes_in_it() -> None:
    points = clouds()
    points[..., 2] = 0
    sums = depth_sums(points, frame_clouds(points, 64))
    images = grey_images(sums, MEAN, STD)
    assert images.shape == (2, 3, 3, 64, 64)
    background = torch.tensor([0.0655, 0.1964, 0.4178]).view(3, 1, 1)
    torch.testing.assert_close(images[:, 0], background.expand(2, 3, 64, 64), rtol=0, atol=1e-4)
    assert (sums[:, 1] == 0).float().mean() > 0.2 and (sums[:, 1] != 0).any()


@pytest.mark.parametrize("points", [torch.zeros(1, 4, 3), torch.full((2, 1, 3), 7.5), torch.eye(3)[None] * 1e6])
def test_degenerate_clouds_are_drawn_inside_the_image(points: Tensor) -> None:
    frame = frame_clouds(points, 64)
    pixels = pixels_of(points, frame)
    assert (pixels >= 0).all() and (pixels < 64).all()
    assert depth_sums(points, frame).isfinite().all()


def test_points_that_did_not_make_the_frame_have_pixels_too() -> None:
    points = clouds()
    frame = frame_clouds(points[:, :20])
    assert torch.equal(pixels_of(points, frame)[:, :20], pixels_of(points[:, :20], frame))
    beyond = pixels_of(points * 10, frame)
    assert beyond.min() == 0 and beyond.max() == 223


def test_looking_a_map_up_is_enlarging_it_and_reading_at_the_pixels() -> None:
    points = clouds(1)
    pixels = pixels_of(points, frame_clouds(points))[0].transpose(0, 1)  # a row of pixels a view
    maps = torch.randn(NUM_VIEWS, 5, 14, 14, generator=torch.Generator().manual_seed(3))
    enlarged = F.interpolate(maps, (224, 224), mode="bicubic", align_corners=False)
    expected = torch.stack([image[:, each[:, 1], each[:, 0]].T for image, each in zip(enlarged, pixels, strict=True)])
    torch.testing.assert_close(look_up_bicubic(maps.permute(0, 2, 3, 1), pixels, 224), expected, rtol=0, atol=1e-5)
    constant = look_up_bicubic(torch.full((NUM_VIEWS, 14, 14, 1), 3.5), pixels, 224)
    torch.testing.assert_close(constant, torch.full_like(constant, 3.5))


@pytest.mark.parametrize("size", [6, 33])
def test_image_sizes_that_cannot_be_centred_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="even number"):
        frame_clouds(clouds(), size)


def test_no_gradient_flows_back_to_the_points() -> None:
    points = clouds().requires_grad_()
    assert not depth_sums(points, frame_clouds(points, 32)).requires_grad


@pytest.mark.gpu
def test_a_gpu_draws_the_same_bits() -> None:
    points = torch.randn(4, 2048, 3, generator=torch.Generator().manual_seed(4))
    here, there = frame_clouds(points), frame_clouds(points.cuda())
    assert torch.equal(depth_sums(points, here), depth_sums(points.cuda(), there).cpu())
    assert torch.equal(pixels_of(points, here), pixels_of(points.cuda(), there).cpu())
