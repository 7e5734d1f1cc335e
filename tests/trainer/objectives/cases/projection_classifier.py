"""The projection classifier: ranks with unequal numbers of labels."""

import torch

from tests.trainer.objectives.cases.case import CLASSES, POINTS, SAMPLES, Case
from trainer.objectives.projection_classifier import ProjectionClassifierBatch


def hard_batch() -> ProjectionClassifierBatch:
    random = torch.Generator().manual_seed(0)
    points = torch.randn(SAMPLES, POINTS, 3, generator=random)
    label = torch.randint(0, CLASSES, (SAMPLES,), generator=random)
    label[:2] = -1
    return ProjectionClassifierBatch(torch.arange(SAMPLES), torch.arange(SAMPLES) * 7, points, label)


IMAGE_MODEL = {"trunk": {"name": "test_vit", "image_size": 32}, "projection": 8}
CASES = {
    "projection_classifier": Case(
        {"kind": "projection_classifier", "image_model": IMAGE_MODEL, "num_points": 24}, hard_batch
    )
}
