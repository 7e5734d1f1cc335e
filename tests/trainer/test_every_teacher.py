"""What is cached of a teacher equals what it says afresh, for every kind of image network that there is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from datastore.layout import Store, open_store
from datastore.schema import FIELDS
from datastore.write import verify
from models.image_models import ImageModelConfig, build_image_model
from models.image_models.teacher import ImageTeacher
from tests.stores import small_attributes, write_small_store
from trainer.cache import cache
from trainer.teachers import fields_offered

ROWS = 18  # blocks of 16 and 2
CONVOLUTIONS = {"name": "test_resnet", "image_size": 32, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
TRANSFORMER = {"name": "test_vit", "image_size": 48}
VGG = {"name": "vgg11_bn", "image_size": 32}
CASES: Mapping[str, Mapping[str, Any]] = {
    "pooled": {"trunk": CONVOLUTIONS},
    "tokens": {"trunk": TRANSFORMER, "tokens": 3, "projection": 7},
    "mvcnn": {"trunk": CONVOLUTIONS, "num_classes": 3},
    "multi_view_classifier": {"trunk": CONVOLUTIONS, "num_classes": 3},
    "projected_views": {"trunk": TRANSFORMER, "projection": 7, "num_drawn": 15},
    "view_autoencoder": {"trunk": VGG, "width": 0.125},
    "view_segmenter": {"trunk": VGG, "width": 0.125, "num_categories": 3, "num_parts": 4},
}


def kinds() -> list[str]:
    union, _ = get_args(ImageModelConfig)
    return [config.model_fields["kind"].default for config in get_args(union)]


@pytest.fixture(scope="module")
def store_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three views of 8 pixels and 20 points of each shape."""
    url = str(tmp_path_factory.mktemp("teachers") / "store.zarr")
    attributes = small_attributes(num_rows=ROWS, block_rows=16, num_views=3, rig=None)
    write_small_store(url, attributes, ("views", "points", "split", "id"))
    return url


def teacher_of(kind: str) -> ImageTeacher:
    torch.manual_seed(0)
    teacher = build_image_model({"kind": kind, **CASES[kind]})
    with torch.no_grad():  # statistics as after training: with fresh ones, or in train mode, features would differ
        for module in teacher.modules():
            if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
                module.running_mean.uniform_(-0.2, 0.2)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return teacher.eval().requires_grad_(False)


def read(store: Store, key: str, field: str) -> np.ndarray:
    return store.read(f"teachers/{key}/{field}", range(ROWS))


@pytest.mark.parametrize("kind", kinds())
def test_cached_equals_a_fresh_forward_whatever_the_batch_the_workers_and_their_order(
    store_url: str, kind: str, tmp_path: Path
) -> None:
    teacher, store = teacher_of(kind), open_store(store_url)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    offered = fields_offered(store, teacher)
    with torch.inference_mode():  # all shapes at once, as nobody would cache them
        expected = teacher.teach(torch.from_numpy(store.read(teacher.reads, range(ROWS))), tuple(offered))
    assert {name: tuple(value.shape[1:]) for name, value in expected.items()} == dict(offered)

    for rank in (1, 0):
        summary = cache(store, teacher, kind, fields=tuple(offered), part=(rank, 2), batch=5)
    assert summary.is_complete
    assert torch.is_grad_enabled() and not teacher.training
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} changed"
        assert value.grad is None

    store = open_store(store_url)
    assert verify(store) == []
    for name, value in expected.items():
        cached = torch.from_numpy(read(store, summary.teacher, name))
        assert str(cached.dtype) == f"torch.{FIELDS[name].dtype}"
        if cached.dtype == torch.float16:
            torch.testing.assert_close(cached.float(), value.float(), rtol=2**-10, atol=1e-5)
        else:
            assert torch.equal(cached, value)
    found = store.statistics(summary.teacher)
    assert set(found) == {name for name, value in expected.items() if value.is_floating_point()}
    for name, spread in found.items():
        assert spread.mean == pytest.approx(expected[name].double().mean().item(), rel=1e-2, abs=1e-4)
        assert spread.largest == pytest.approx(expected[name].max().item(), rel=1e-3)
