"""Which views of a sample are looked at and how they are changed: functions of the sample's seed alone, as in `augment.py`."""

from typing import Final

import torch
import torch.nn.functional as F
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from trainer.augment import uniform

_LUMINANCE: Final = (0.299, 0.587, 0.114)  # of red, green, blue: ITU-R BT.601, as image libraries turn RGB to grey
_BRIGHTNESS, _CONTRAST, _SATURATION = range(3)


def some_views(
    views: UInt8[Tensor, "b v h w 3"], seeds: Int64[Tensor, " b"], count: int | None
) -> UInt8[Tensor, "b u h w 3"]:
    """All views, or `count` of each shape, drawn without repetition by the shape's seed."""
    num_views = views.shape[1]
    if count is None or count >= num_views:
        return views
    chosen = uniform(seeds, num_views, "views of this step").argsort(dim=1, stable=True)[:, :count]
    return views[torch.arange(len(views), device=views.device)[:, None], chosen]


def jitter_colours(
    images: Float32[Tensor, "b 3 h w"], seeds: Int64[Tensor, " b"], strength: float, purpose: str
) -> Float32[Tensor, "b 3 h w"]:
    """Images in [0, 1] with brightness, contrast and saturation each times U[1 - strength, 1 + strength], in random order.

    Each is a mixture with another image: with black, with its mean grey, with itself in grey. What leaves [0, 1] is cut.
    """
    random = uniform(seeds, 6, purpose)
    factors = (1 + strength * (2 * random[:, :3] - 1)).clamp(min=0)
    order = random[:, 3:].argsort(dim=1, stable=True)
    weights = torch.tensor(_LUMINANCE, device=images.device).view(3, 1, 1)
    for kinds in order.unbind(dim=1):
        kind, factor = kinds.view(-1, 1, 1, 1), factors.gather(1, kinds[:, None]).view(-1, 1, 1, 1)
        grey = (weights * images).sum(dim=1, keepdim=True)
        mean = grey.mean(dim=(2, 3), keepdim=True)
        other = torch.where(kind == _SATURATION, grey, torch.where(kind == _CONTRAST, mean, 0.0))
        images = (other + factor * (images - other)).clamp(0, 1)
    return images


def flip_some(
    images: Float32[Tensor, "b 3 h w"], seeds: Int64[Tensor, " b"], probability: float, purpose: str
) -> Float32[Tensor, "b 3 h w"]:
    """The images, each mirrored left to right with that probability."""
    flipped = uniform(seeds, 1, purpose).view(-1, 1, 1, 1) < probability
    return torch.where(flipped, images.flip(3), images)


def crop_some(
    images: Float32[Tensor, "b 3 h w"], seeds: Int64[Tensor, " b"], least_share: float, purpose: str
) -> Float32[Tensor, "b 3 h w"]:
    """Of each image a window of U[least_share, 1] of its area, of its shape and anywhere in it, enlarged to its size."""
    random = uniform(seeds, 3, purpose)
    side = (least_share + (1 - least_share) * random[:, 0]).sqrt()
    middle = (1 - side)[:, None] * (2 * random[:, 1:] - 1)
    windows = torch.zeros(len(images), 2, 3, device=images.device)
    windows[:, 0, 0], windows[:, 1, 1], windows[:, :, 2] = side, side, middle
    with torch.autocast(images.device.type, enabled=False):
        grid = F.affine_grid(windows, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False, padding_mode="border")
