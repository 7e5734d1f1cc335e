"""The view segmenter: ranks with unequal numbers of labelled pixels, and a shape of unknown category."""

import dataclasses

import torch

from tests.trainer.objectives.cases.case import CLASSES, CORPUS, POINTS, SAMPLES, VIEWS, Case
from trainer.objectives.view_segmenter import ViewSegmentingBatch

PARTS = ("leg", "seat", "back")


def hard_batch() -> ViewSegmentingBatch:
    random = torch.Generator().manual_seed(0)
    visibility = torch.rand(SAMPLES, POINTS, VIEWS, generator=random) < 0.4
    visibility[1] = False
    label = torch.randint(0, CLASSES, (SAMPLES,), generator=random)
    label[4] = -1
    depth = torch.randint(0, 2, (SAMPLES, VIEWS, 32, 32), generator=random)
    depth[0] = 1  # no background at all
    return ViewSegmentingBatch(
        torch.arange(SAMPLES),
        torch.arange(SAMPLES) * 7,
        torch.randint(0, 256, (SAMPLES, VIEWS, 32, 32, 3), generator=random, dtype=torch.uint8),
        depth.to(torch.uint16),
        torch.randint(-3, 36, (SAMPLES, POINTS, VIEWS, 2), generator=random).short(),
        visibility,
        torch.randint(-1, len(PARTS), (SAMPLES, POINTS), generator=random).short(),
        label,
    )


CASES = {
    "view_segmenter": Case(
        {
            "kind": "view_segmenter",
            "image_model": {"trunk": {"name": "vgg11_bn", "image_size": 64}, "width": 0.0625},
        },
        hard_batch,
        corpus=dataclasses.replace(CORPUS, part_names=PARTS),
    ),
}
