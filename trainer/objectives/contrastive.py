"""NT-Xent: each vector picks its partner among all vectors of a batch."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor

_EVERY_PAIR = slice(None)


def nt_xent(
    first: Float[Tensor, "r d"], second: Float[Tensor, "r d"], temperature: float, pairs: slice = _EVERY_PAIR
) -> Float32[Tensor, ""]:
    """The mean of -log softmax at the partner, over both vectors of each pair; log(2r - 1) where all vectors are equal.

    A row's negatives are the other 2r - 2 vectors of both lists. `pairs` are those that the mean is taken over: a rank
    that holds the pairs of all ranks takes its own, and the mean over equal ranks is the mean over all pairs.
    """
    normalised = torch.stack([normalised_rows(first), normalised_rows(second)])
    with torch.autocast(normalised.device.type, enabled=False):  # at 1 / 0.1, bf16 would round similarities to 1/16
        similarities = normalised[:, pairs].flatten(0, 1) @ normalised.flatten(0, 1).T / temperature
    num_pairs = len(first)
    own = torch.arange(num_pairs, device=first.device)[pairs]
    itself = torch.cat([own, own + num_pairs])
    partner = torch.cat([own + num_pairs, own])
    similarities = similarities.scatter(1, itself[:, None], -torch.inf)
    return F.cross_entropy(similarities, partner)


def normalised_rows(rows: Float[Tensor, "r d"]) -> Float32[Tensor, "r d"]:
    """Rows of length one; a row of zeros stays, with a finite gradient."""
    rows = rows.float()
    # Divided by their largest entry first, squares can neither overflow nor vanish; the direction does not change
    largest = rows.detach().abs().amax(dim=1, keepdim=True)
    return F.normalize(rows / torch.where(largest > 0, largest, 1), dim=1, eps=1.0)
