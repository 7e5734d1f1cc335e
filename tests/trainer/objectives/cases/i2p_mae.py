"""I2P-MAE: clouds of which unequal numbers of finer tokens are visible, so that ranks have unequal numbers to predict."""

import dataclasses

import torch

from tests.trainer.objectives.cases.case import CORPUS, POINTS, SAMPLES, Case
from trainer.objectives.base import TaughtFields
from trainer.objectives.i2p_mae import CachedI2PMAEBatch, I2PMAEBatch

TOKENS, FEATURES = 4, 8  # of each image, two by two; of each token
STUDENT = {
    "kind": "masked_transformer",
    "num_groups": (16, 10, 6),
    "group_sizes": (4, 3, 3),
    "widths": (8, 12, 16),
    "embedding_widths": (6, 10),
    "depths": (1, 1, 1),
    "num_heads": 2,
}
SIZES = {"view_tokens": (3, TOKENS, FEATURES), "view_saliency": (3, TOKENS), "view_pixels": (POINTS, 3, 2)}
TAUGHT = dataclasses.replace(CORPUS, teachers={"teacher": TaughtFields(32, SIZES)})
SETTING = {"kind": "i2p_mae", "num_points": 24, "mask_ratio": 0.67, "decoder": {"num_heads": 2}}
CACHED = SETTING | {"teacher_mode": "cached", "teacher": "teacher"}
IMAGE_MODEL = {"trunk": {"name": "test_vit", "image_size": 32}, "projection": FEATURES}
ONLINE = SETTING | {
    "teacher_mode": "online",
    "image_model": IMAGE_MODEL,
    "random_teacher": True,
}


def clouds() -> torch.Tensor:
    """Of ever thinner boxes: their tokens have ever more neighbours in common."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(SAMPLES, POINTS, 3, generator=random) * torch.linspace(1, 0.05, SAMPLES)[
        :, None, None
    ] ** torch.tensor([0, 1, 1])


def hard_batch() -> CachedI2PMAEBatch:
    random = torch.Generator().manual_seed(1)
    return CachedI2PMAEBatch(
        torch.arange(SAMPLES),
        torch.arange(SAMPLES) * 7,
        clouds(),
        torch.randn(SAMPLES, *SIZES["view_tokens"], generator=random).half(),
        torch.rand(SAMPLES, *SIZES["view_saliency"], generator=random).half() / 10,
        torch.randint(0, 32, (SAMPLES, *SIZES["view_pixels"]), generator=random, dtype=torch.int16),
    )


def points_alone() -> I2PMAEBatch:
    return I2PMAEBatch(torch.arange(SAMPLES), torch.arange(SAMPLES) * 7, clouds())


# The published network has a norm of the finest scale's tokens, and nothing reads these
UNREAD = frozenset({"student.norms.0.weight", "student.norms.0.bias"})

CASES = {
    "i2p_mae, cached": Case(CACHED, hard_batch, STUDENT, TAUGHT, UNREAD),
    "i2p_mae, online": Case(ONLINE, points_alone, STUDENT, TAUGHT, UNREAD),
    "i2p_mae, coordinates alone": Case(CACHED | {"features_weight": 0}, hard_batch, STUDENT, TAUGHT, UNREAD),
    "i2p_mae, features alone": Case(CACHED | {"coordinates_weight": 0}, hard_batch, STUDENT, TAUGHT, UNREAD),
}
