"""The view classifier: ranks with unequal numbers of labels."""

import torch

from tests.trainer.objectives.cases.case import CLASSES, SAMPLES, VIEWS, Case
from trainer.objectives.view_classifier import ViewClassifierBatch


def hard_batch() -> ViewClassifierBatch:
    random = torch.Generator().manual_seed(0)
    views = torch.randint(0, 256, (SAMPLES, VIEWS, 32, 32, 3), generator=random, dtype=torch.uint8)
    label = torch.randint(0, CLASSES, (SAMPLES,), generator=random)
    label[:2] = -1
    return ViewClassifierBatch(torch.arange(SAMPLES), torch.arange(SAMPLES) * 7, views, label)


IMAGE_MODEL = {"trunk": {"name": "test_resnet", "image_size": 32}}
MVCNN = {"kind": "mvcnn", **IMAGE_MODEL}
CASES = {
    "view_classifier": Case({"kind": "view_classifier", "image_model": IMAGE_MODEL}, hard_batch),
    "view_classifier, some views": Case(
        {"kind": "view_classifier", "image_model": IMAGE_MODEL, "views_per_step": 2}, hard_batch
    ),
    "view_classifier of PointCMT": Case({"kind": "view_classifier", "image_model": MVCNN}, hard_batch),
}
