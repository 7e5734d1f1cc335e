"""What an image map says at the pixels that points fall on."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def look_up_bicubic(
    maps: Float[Tensor, "b h w c"], pixels: Int[Tensor, "b n 2"], image_size: int
) -> Float[Tensor, "b n c"]:
    """At each pixel (column, row) of a square image the map's value, as if the map were enlarged to the image's size.

    Bicubic with half-pixel centres, without antialiasing, replicated at the border (I2P-MAE): the same as enlarging and
    then indexing, without the enlarged map.
    """
    positions = 2 * (pixels.float() + 0.5) / image_size - 1
    sampled = torch.nn.functional.grid_sample(
        maps.permute(0, 3, 1, 2).float(),
        positions[:, :, None],
        mode="bicubic",
        padding_mode="border",
        align_corners=False,
    )
    return sampled.squeeze(-1).transpose(1, 2)
