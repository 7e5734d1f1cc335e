"""What a batch reads follows from its type."""

from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from datastore.batch import Batch


@dataclass(frozen=True)
class Clouds(Batch):
    """Clouds with names."""

    points: Float32[Tensor, "b n 3"]
    label: Int64[Tensor, " b"] | None = None


def test_a_batch_reads_the_fields_that_it_has() -> None:
    assert Clouds.store_fields() == ("points", "label")


def test_a_setting_that_needs_less_reads_less() -> None:
    narrow = Clouds.without("label")
    assert narrow.store_fields() == ("points",) and Clouds.store_fields() == ("points", "label")
    assert narrow is Clouds.without("label") and issubclass(narrow, Clouds)
    assert narrow.without("points").store_fields() == ()
    batch = narrow(ids=torch.arange(2), seeds=torch.arange(2), points=torch.ones(2, 4, 3))
    moved = batch.to(torch.device("cpu"))
    assert type(moved) is narrow and moved.label is None and len(moved) == 2
    assert torch.equal(moved.points, batch.points)
