"""The view autoencoder."""

import torch

from tests.trainer.objectives.cases.case import SAMPLES, VIEWS, Case
from trainer.objectives.view_autoencoder import ViewAutoencodingBatch


def some_views() -> ViewAutoencodingBatch:
    random = torch.Generator().manual_seed(0)
    views = torch.randint(0, 256, (SAMPLES, VIEWS, 32, 32, 3), generator=random, dtype=torch.uint8)
    return ViewAutoencodingBatch(torch.arange(SAMPLES), torch.arange(SAMPLES) * 7, views)


CASES = {
    "view_autoencoder": Case(
        {
            "kind": "view_autoencoder",
            "image_model": {"trunk": {"name": "vgg11_bn", "image_size": 64}, "width": 0.0625},
        },
        some_views,
    ),
}
