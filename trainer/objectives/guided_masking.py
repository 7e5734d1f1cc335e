"""Which tokens stay visible in I2P-MAE: drawn without replacement, by an image network's attention to where they are.

As published the weights are a softmax of attention that seldom exceeds a hundredth, so they are nearly equal: two tokens
whose attention differs by 0.1 have weights in the ratio 1.105. Lower temperatures and standardised attention guide more,
and are other methods.
"""

import math
from typing import Final

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from trainer.augment import uniform

_SMALLEST_DEVIATION: Final = 1e-12  # below it all tokens count as equal


def log_weights(
    saliency: Float[Tensor, "b g"], temperature: float = 1.0, *, standardise: bool = False
) -> Float64[Tensor, "b g"]:
    """Logarithms of the weights that tokens are drawn with, which sum to one in each cloud."""
    values = saliency.detach().double()
    if standardise:
        centred = values - values.mean(dim=1, keepdim=True)
        values = centred / centred.square().mean(dim=1, keepdim=True).sqrt().clamp(min=_SMALLEST_DEVIATION)
    logarithms: Tensor = torch.log_softmax(values / temperature, dim=1)
    return logarithms


def draw_visible(
    log_weights: Float64[Tensor, "b g"], seeds: Int64[Tensor, " b"], num_visible: int
) -> Bool[Tensor, "b g"]:
    """`num_visible` tokens of each cloud, by its seed, as if drawn one after the other without replacement.

    The largest of log weight plus Gumbel noise are distributed so, and all clouds are drawn at once.
    """
    count = log_weights.shape[1]
    # half a step off the 2^24 numbers that there are: neither zero nor one, whose logarithms are not finite
    random = uniform(seeds, count, "visible tokens").double() + 2.0**-25
    keys: Tensor = log_weights - (-random.log()).log()
    chosen = keys.argsort(dim=1, descending=True, stable=True)[:, :num_visible]
    visible = torch.zeros_like(keys, dtype=torch.bool)
    visible.scatter_(1, chosen, True)
    return visible


def entropy(log_weights: Float64[Tensor, "b g"]) -> Float64[Tensor, ""]:
    """The mean entropy of the clouds' weights: the logarithm of their number where all are equal."""
    weights = log_weights.exp()
    mean: Tensor = -torch.special.xlogy(weights, weights).sum(dim=1).mean()
    return mean


def num_masked(num_tokens: int, ratio: float) -> int:
    """How many of so many tokens are masked: 51 of 64 at 0.8."""
    return math.floor(ratio * num_tokens)
