"""Three images of a cloud from its points alone, as I2P-MAE (CVPR 2023) shows clouds to an image network.

Orthographic, along the three axes. The value of a pixel is the signed sum of the depths of all points splatted onto it,
without a z-buffer: surfaces at depth zero are as grey as the background. Sums are of whole numbers, so an image is the
same to the bit whatever the order of the points and on any device, and no gradient flows back to them.
"""

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from models.ops.checks import check_clouds, check_no_nan

NUM_VIEWS: Final = 3
SMALLEST_IMAGE: Final = 8  # pixels a side

_AXES: Final = ((0, 1, 2), (2, 0, 1), (1, 2, 0))  # of each view: image row, image column, depth
_REACH: Final = 2  # a point marks so many cells around its own: a window of 5 by 5
_MARGIN: Final = 1  # cells left free before the first
_STEPS_IN_ONE: Final = 2.0**24  # depth is counted in these: as fine as float32 is at 1, and sums up to 5e11 fit
_AVOIDS_DIVISION_BY_ZERO: Final = 1e-30


@dataclass(frozen=True)
class Frame:
    """How the three images lie on each cloud; last axis: along image rows, along image columns."""

    lowest: Float32[Tensor, "b 3 2"]  # coordinates where the first cell begins
    cell: Float32[Tensor, "b 3 1"]  # side of a cell; one a view, so that the aspect is kept
    shift: Int64[Tensor, "b 3 2"]  # of cells, which brings the drawing to the middle of the image
    image_size: int


def frame_clouds(points: Float[Tensor, "b n 3"], image_size: int = 224) -> Frame:
    """The frame in which each cloud fills its images along their longer side."""
    check_clouds("points", points)
    check_no_nan(points=points)
    if image_size < SMALLEST_IMAGE or image_size % 2:
        raise ValueError(f"image_size is {image_size}; expected an even number of pixels, {SMALLEST_IMAGE} or more.")
    plane = _seen(points)[..., :2]
    lowest = plane.amin(dim=2)
    extent = (plane.amax(dim=2) - lowest).amax(dim=-1, keepdim=True)
    cell = extent.clamp(min=_AVOIDS_DIVISION_BY_ZERO) / _last_cell(image_size)
    marked = _cells(plane, lowest, cell, image_size).amax(dim=2) + _MARGIN + _REACH  # from _MARGIN - _REACH on
    middle = (marked + _MARGIN - _REACH).div(2, rounding_mode="floor")
    return Frame(lowest, cell, image_size // 2 - middle - 1, image_size)


def pixels_of(points: Float[Tensor, "b n 3"], frame: Frame) -> Int64[Tensor, "b n 3 2"]:
    """Column and row of each point in each view. Points beyond those that made the frame may fall on the border."""
    plane = _seen(points)[..., :2]
    cells = ((plane - frame.lowest[:, :, None]) / frame.cell[:, :, None]).floor().long()
    rows_and_columns = (cells + _MARGIN + frame.shift[:, :, None]).clamp(0, frame.image_size - 1)
    return rows_and_columns.flip(-1).transpose(1, 2)


def depth_sums(points: Float[Tensor, "b n 3"], frame: Frame) -> Float32[Tensor, "b 3 s s"]:
    """The three images, rows before columns: sums of depths, zero where nothing is.

    A point whose window sticks out counts twice on the border, where its outermost cells are bent back to.
    """
    seen, size = _seen(points), frame.image_size
    cells = _cells(seen[..., :2], frame.lowest, frame.cell, size) + frame.shift[:, :, None]
    inner = _last_cell(size) + 1  # a side of the canvas of points' own cells
    images = torch.arange(len(points) * NUM_VIEWS, device=points.device).view(-1, NUM_VIEWS, 1)
    places = (images * inner + cells[..., 0]) * inner + cells[..., 1]
    steps = (seen[..., 2] * _STEPS_IN_ONE).round().long()
    # along one axis, the only one for which torch can be asked to add in a fixed order: others warn where it is
    canvas = steps.new_zeros(images.numel() * inner * inner).scatter_add_(0, places.flatten(), steps.flatten())
    marks = _spread(_spread(canvas.view(-1, NUM_VIEWS, inner, inner)).transpose(2, 3)).transpose(2, 3)
    return (marks.double() / _STEPS_IN_ONE).float()


def grey_images(
    sums: Float32[Tensor, "b 3 s s"], mean: Float32[Tensor, "3 1 1"], std: Float32[Tensor, "3 1 1"]
) -> Float32[Tensor, "b 3 3 s s"]:
    """The images as a network takes them, three equal channels normalised: nothing is 0.5, the far is bright."""
    return (sums.sigmoid()[:, :, None] - mean) / std


def _seen(points: Tensor) -> Tensor:
    """Coordinates along each view's rows, columns and depth, [b, 3, n, 3]."""
    return torch.stack([points.detach().float()[..., axes] for axes in _AXES], dim=1)


def _last_cell(image_size: int) -> int:
    """The number of the last cell that a point can lie in: margins and half windows need the rest."""
    return image_size - 1 - _REACH


def _cells(plane: Tensor, lowest: Tensor, cell: Tensor, image_size: int) -> Tensor:
    """The cell of each point that the frame was made of, [b, 3, n, 2]."""
    return ((plane - lowest[:, :, None]) / cell[:, :, None]).floor().long().clamp(0, _last_cell(image_size))


def _spread(canvas: Tensor) -> Tensor:
    """Sums over windows along the last axis, which becomes as long as an image: cells beyond it are added to the last."""
    padded = F.pad(canvas, (2 * _REACH, 2 * _REACH))
    length = padded.shape[-1] - 2 * _REACH
    sums = padded[..., :length].clone()
    for offset in range(1, 2 * _REACH + 1):
        sums += padded[..., offset : offset + length]
    sums[..., 1] += sums[..., 0]
    sums[..., -2] += sums[..., -1]
    return sums[..., 1:-1]
