"""What an image map says at the pixels that points fall on."""

from typing import Final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.ops.neighbours import weighted_sum

_SHARPNESS: Final = -0.75  # the kernel's a, as in torch's own enlargements


def look_up_bicubic(
    maps: Float[Tensor, "b h w c"], pixels: Int[Tensor, "b n 2"], image_size: int
) -> Float[Tensor, "b n c"]:
    """At each pixel (column, row) of a square image the map's value, as if the map were enlarged to the image's size.

    Bicubic with half-pixel centres, without antialiasing, replicated at the border (I2P-MAE): the same as enlarging and
    then indexing, without the enlarged map. Pixels outside the image count as those at its border. Gradients reach the maps.
    """
    if maps.ndim != 4 or pixels.ndim != 3 or pixels.shape[-1] != 2 or len(maps) != len(pixels):
        raise ValueError(
            f"maps is {tuple(maps.shape)} and pixels is {tuple(pixels.shape)}; expected [images, height, width, features] "
            f"and [images, points, 2], as many images in both."
        )
    if image_size < 1:
        raise ValueError(f"image_size is {image_size}; expected at least 1, the image's side in pixels.")
    _, height, width, _ = maps.shape
    columns, column_weights = _taps(pixels[..., 0], width, image_size)
    rows, row_weights = _taps(pixels[..., 1], height, image_size)
    indices = rows[..., :, None] * width + columns[..., None, :]
    weights = row_weights[..., :, None] * column_weights[..., None, :]
    return weighted_sum(maps.flatten(1, 2), indices.flatten(2), weights.flatten(2))


def _taps(pixels: Tensor, length: int, image_size: int) -> tuple[Tensor, Tensor]:
    """The four cells of a map along one axis that make up each pixel, and their weights, [b, n, 4] both."""
    positions = (pixels.clamp(0, image_size - 1).float() + 0.5) * (length / image_size) - 0.5
    first = positions.floor()
    distances = (positions - first)[..., None] + torch.tensor([1.0, 0.0, -1.0, -2.0], device=pixels.device)
    cells = first.long()[..., None] + torch.arange(-1, 3, device=pixels.device)
    return cells.clamp(0, length - 1), _bicubic(distances.abs())


def _bicubic(distance: Tensor) -> Tensor:
    """Keys' kernel at distances from 0 to 2."""
    a = _SHARPNESS
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return torch.where(distance <= 1, near, far)
