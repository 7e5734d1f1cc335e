"""Tests of trainer/objectives/view_segmenter.py."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from datastore.errors import AskedWrongly, DoNotRetry
from models.exported import save_exported
from models.image_models.attention_vgg import ViewAutoencoderConfig
from tests.trainer.objectives.cases.view_segmenter import CASES, hard_batch
from trainer.objectives.base import Corpus
from trainer.objectives.view_segmenter import UNKNOWN, ViewSegmentingConfig, label_map, pixel_loss

CASE = CASES["view_segmenter"]
BACKGROUND = 9


def label_map_by_loops(pixels, visible, parts, surface, size):  # type: ignore[no-untyped-def]
    rows, height, width = surface.shape
    expected = torch.full((rows, size, size), UNKNOWN)
    for sample in range(rows):
        for row in range(size):
            for column in range(size):
                if not surface[sample, row * height // size, column * width // size]:
                    expected[sample, row, column] = BACKGROUND
        for point in sorted(range(pixels.shape[1]), key=lambda point: -int(parts[sample, point])):
            column, row = (int((float(place) + 0.5) * size // extent) for place, extent in zip(
                pixels[sample, point], (width, height), strict=True
            ))  # fmt: skip
            if visible[sample, point] and parts[sample, point] >= 0 and 0 <= column < size and 0 <= row < size:
                expected[sample, row, column] = parts[sample, point]
    return expected


@pytest.mark.parametrize("size", [8, 16, 4])
def test_labels_lie_at_the_pixels_of_visible_points(size: int) -> None:
    random = torch.Generator().manual_seed(size)
    pixels = torch.randint(-2, 10, (3, 40, 2), generator=random)
    visible = torch.rand(3, 40, generator=random) < 0.6
    parts = torch.randint(-1, 4, (3, 40), generator=random)
    surface = torch.rand(3, 8, 8, generator=random) < 0.7
    found = label_map(pixels, visible, parts, surface, size, background=BACKGROUND)
    assert torch.equal(found, label_map_by_loops(pixels, visible, parts, surface, size))
    order = torch.randperm(40, generator=random)
    again = label_map(pixels[:, order], visible[:, order], parts[:, order], surface, size, background=BACKGROUND)
    assert torch.equal(found, again), "the order of points does not matter"


def test_the_loss_is_the_mean_over_known_pixels() -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 3, 3, generator=random)
    labels = torch.randint(-1, 4, (2, 3, 3), generator=random)
    known = labels != UNKNOWN
    expected = F.cross_entropy(logits.permute(0, 2, 3, 1)[known], labels[known])
    torch.testing.assert_close(pixel_loss(logits, labels), expected)
    assert pixel_loss(logits, torch.full_like(labels, UNKNOWN)).item() == 0


def test_training_can_begin_with_an_autoencoder_s_trunk(tmp_path: Path) -> None:
    config = ViewAutoencoderConfig.model_validate(CASE.config["image_model"])
    torch.manual_seed(3)
    network = config.build()
    save_exported(tmp_path, {"kind": "image_model", "image_model": config.model_dump(mode="json")}, network, "", {})
    started = ViewSegmentingConfig.model_validate({**CASE.config, "start": str(tmp_path)}).build(None, CASE.corpus)
    for name, value in started.encoder.trunk.state_dict().items():
        assert torch.equal(value, network.trunk.state_dict()[name]), name


def test_a_trunk_of_another_width_is_refused_with_the_setting_s_name(tmp_path: Path) -> None:
    config = ViewAutoencoderConfig.model_validate({**CASE.config["image_model"], "width": 0.125})
    described = {"kind": "image_model", "image_model": config.model_dump(mode="json")}
    save_exported(tmp_path, described, config.build(), "", {})
    with pytest.raises(AskedWrongly, match=r"set objective\.image_model\.width to the autoencoder's"):
        ViewSegmentingConfig.model_validate({**CASE.config, "start": str(tmp_path)}).build(None, CASE.corpus)


def test_a_store_without_parts_is_refused() -> None:
    with pytest.raises(DoNotRetry, match="names no parts"):
        ViewSegmentingConfig.model_validate(CASE.config).build(None, Corpus(("chair",), 4, 32))


def test_a_view_is_drawn_by_the_shape_s_seed() -> None:
    objective = ViewSegmentingConfig.model_validate(CASE.config).build(None, CASE.corpus).eval()
    batch = hard_batch()
    first, again = objective(batch)["pixels"], objective(batch)["pixels"]
    assert torch.equal(first, again) and torch.isfinite(first) and first > 0
    others = {objective(dataclasses.replace(batch, seeds=batch.seeds + seed))["pixels"].item() for seed in range(1, 9)}
    assert len(others | {first.item()}) > 4, "other seeds draw other views"
