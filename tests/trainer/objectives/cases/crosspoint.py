"""CrossPoint: every sample of a rank is a negative of every other rank's."""

import torch

from tests.trainer.objectives.cases.case import POINTS, SAMPLES, VIEWS, Case
from trainer.objectives.crosspoint import CrossPointBatch


def hard_batch() -> CrossPointBatch:
    random = torch.Generator().manual_seed(0)
    points = torch.randn(SAMPLES, POINTS, 3, generator=random)
    points[2] = 0.5  # a cloud of one place
    views = torch.randint(0, 256, (SAMPLES, VIEWS, 32, 32, 3), generator=random, dtype=torch.uint8)
    return CrossPointBatch(torch.arange(SAMPLES), torch.arange(SAMPLES) * 7, points, views)


CONFIG = {"kind": "crosspoint", "image_trunk": {"name": "test_resnet", "image_size": 48}, "hidden_features": 32}
POINTNET = {"kind": "pointnet", "width": 0.125, "transforms": False}
CASES = {
    "crosspoint": Case(CONFIG, hard_batch, student=POINTNET),
    "crosspoint, dgcnn": Case(CONFIG, hard_batch, student={"kind": "dgcnn", "width": 0.125, "num_neighbours": 5}),
    "crosspoint without images": Case(CONFIG | {"cross_modal_weight": 0}, hard_batch, student=POINTNET),
}
