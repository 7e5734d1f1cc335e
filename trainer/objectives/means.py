"""Means over the rows that count, on one rank and over all ranks."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64, Shaped
from torch import Tensor

from trainer import distributed

UNLABELLED = -1


def smoothed_cross_entropy(
    logits: Float[Tensor, "r k"], labels: Int64[Tensor, " r"], smoothing: float
) -> Float32[Tensor, ""]:
    """PointMCD's SCE, the mean over labelled rows; zero where there is none.

    The target is 1 - smoothing for the true class and smoothing / (K - 1) for every other. torch spreads its own
    `label_smoothing` over all K classes, the true one too: SCE(s) is torch's at s K / (K - 1).
    """
    labelled = labels != UNLABELLED
    log_probabilities = F.log_softmax(logits.float(), dim=1)
    true = log_probabilities.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    others = log_probabilities.sum(dim=1) - true
    share = smoothing / max(logits.shape[1] - 1, 1)
    losses = -((1 - smoothing) * true + share * others)
    return torch.where(labelled, losses, 0).sum() / labelled.sum().clamp(min=1)


def rank_share(num_rows: Shaped[Tensor, ""]) -> Float32[Tensor, ""]:
    """What a mean over this rank's rows is multiplied by, so that the mean over ranks is the mean over all ranks' rows.

    One where all ranks have equally many rows; zero for a rank without any.
    Micro-batches that are accumulated each weigh the same, however many of their rows count: many
    counts, as of visible views, are known in the forward pass alone, when the one before has been summed already.
    """
    rows = num_rows.float()
    return rows * distributed.world_size() / distributed.all_reduce_sum(rows).clamp(min=1)
