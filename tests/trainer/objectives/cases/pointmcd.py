"""PointMCD: ranks with unequal numbers of empty views and of labels."""

import dataclasses

import torch

from tests.trainer.objectives.cases.case import CLASSES, CORPUS, POINTS, SAMPLES, VIEWS, WIDTH, Case
from trainer.objectives.pointmcd import PointMCDBatch


def hard_batch() -> PointMCDBatch:
    random = torch.Generator().manual_seed(0)
    visibility = torch.rand(SAMPLES, POINTS, VIEWS, generator=random) < 0.4
    visibility[0, :, 1:] = False  # ranks with half a batch have unequal numbers of empty views
    visibility[1, :, 2] = False
    visibility[5, :, 0] = False
    label = torch.randint(0, CLASSES, (SAMPLES,), generator=random)
    label[4] = -1  # and of labels
    points = torch.randn(SAMPLES, POINTS, 3, generator=random)
    features = torch.rand(SAMPLES, VIEWS, WIDTH, generator=random)
    parts = torch.randint(-1, len(PARTS), (SAMPLES, POINTS), generator=random).short()
    return PointMCDBatch(torch.arange(SAMPLES), torch.arange(SAMPLES) * 7, points, visibility, label, features, parts)


PARTS = ("leg", "seat", "back", "shade", "top")
WITH_PARTS = dataclasses.replace(CORPUS, part_names=PARTS)

CASES = {
    "pointmcd": Case({"kind": "pointmcd", "teacher": "teacher"}, hard_batch),
    "pointmcd, empty views counted": Case(
        {"kind": "pointmcd", "teacher": "teacher", "count_empty_views": True}, hard_batch
    ),
    "pointmcd without a teacher": Case({"kind": "pointmcd", "teacher": "none", "alignment_weight": 0}, hard_batch),
    "pointmcd without labels": Case({"kind": "pointmcd", "teacher": "teacher", "task_weight": 0}, hard_batch),
    "pointmcd, parts": Case(
        {"kind": "pointmcd", "teacher": "teacher", "task": "parts", "label_smoothing": 0.05},
        hard_batch,
        corpus=WITH_PARTS,
    ),
}
