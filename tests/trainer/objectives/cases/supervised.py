"""Labels alone: ranks with unequal numbers of them."""

import dataclasses

import torch

from tests.trainer.objectives.cases.case import CLASSES, CORPUS, POINTS, SAMPLES, Case
from trainer.objectives.supervised import SupervisedBatch

PARTS = ("leg", "seat", "back", "shade", "top")
WITH_PARTS = dataclasses.replace(CORPUS, part_names=PARTS)


def hard_batch() -> SupervisedBatch:
    random = torch.Generator().manual_seed(0)
    points = torch.randn(SAMPLES, POINTS, 3, generator=random)
    label = torch.randint(0, CLASSES, (SAMPLES,), generator=random)
    label[:2] = -1
    parts = torch.randint(-1, len(PARTS), (SAMPLES, POINTS), generator=random).short()
    return SupervisedBatch(torch.arange(SAMPLES), torch.arange(SAMPLES) * 7, points, label, parts)


CASES = {
    "supervised": Case(
        {"kind": "supervised"}, hard_batch, student={"kind": "pointnet", "width": 0.125, "transforms": False}
    ),
    "supervised, parts": Case({"kind": "supervised", "task": "parts"}, hard_batch, corpus=WITH_PARTS),
    "supervised, parts, dgcnn": Case(
        {"kind": "supervised", "task": "parts"},
        hard_batch,
        student={"kind": "dgcnn", "width": 0.125, "num_neighbours": 5},
        corpus=WITH_PARTS,
    ),
}
