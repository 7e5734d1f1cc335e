"""Tests of trainer/objectives/image_to_points.py."""

import dataclasses
from typing import Any

import pytest
import torch

from datastore.errors import AskedWrongly, MissingField
from trainer.augment import scale_and_shift
from trainer.objectives.base import Corpus
from trainer.objectives.cloud_distance import CloudDistanceConfig, cloud_distance
from trainer.objectives.image_to_points import ImageToPoints, ImageToPointsBatch, ImageToPointsConfig

CORPUS = Corpus(class_names=(), num_views=4, image_size=32, teacher_dims={"teacher": 16})


def make_objective(**options: Any) -> ImageToPoints:
    torch.manual_seed(0)
    settings = {"teacher": "teacher", "generator": {"num_points": 24}, **options}
    return ImageToPointsConfig.model_validate(settings).build(None, CORPUS)


def make_batch(b: int = 4, n: int = 24, seed: int = 0) -> ImageToPointsBatch:
    generator = torch.Generator().manual_seed(seed)
    return ImageToPointsBatch(
        ids=torch.arange(b),
        seeds=torch.arange(b),
        points=torch.randn(b, n, 3, generator=generator),
        view_features=torch.rand(b, 4, 16, generator=generator).half(),
    )


def test_the_term_is_the_distance_of_decoded_and_augmented_points() -> None:
    objective, batch = make_objective().eval(), make_batch()
    decoded = objective.encoder(batch.view_features.float().max(dim=1).values)
    augmented = scale_and_shift(batch.points, batch.seeds, (2 / 3, 3 / 2), 0.2)
    expected = 30 * cloud_distance(decoded, augmented, CloudDistanceConfig()).mean()
    terms = objective(batch)
    assert terms.keys() == {"earth_movers_distance"}
    torch.testing.assert_close(terms["earth_movers_distance"], expected)


def test_the_generator_is_sized_by_the_teacher_s_features() -> None:
    assert make_objective().encoder.config.in_features == 16


def test_the_order_of_points_does_not_matter() -> None:
    objective, batch = make_objective(distance={"matching": "exact"}).eval(), make_batch()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    shuffled = dataclasses.replace(batch, points=batch.points[:, order])
    torch.testing.assert_close(objective(shuffled), objective(batch))


def test_training_brings_the_decoded_points_nearer() -> None:
    generator = {"num_points": 24, "dropout": 0.0}
    objective, batch = make_objective(generator=generator, scale_range=(1.0, 1.0), shift=0.0), make_batch()
    before = objective.eval()(batch)["earth_movers_distance"].item()
    optimizer = torch.optim.Adam(objective.train().parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        objective(batch)["earth_movers_distance"].backward()
        optimizer.step()
    assert objective.eval()(batch)["earth_movers_distance"].item() < before / 2


def test_points_are_decoded_in_float32_under_autocast() -> None:
    objective, batch = make_objective().eval(), make_batch()
    expected = objective(batch)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(objective(batch), expected)


def test_as_many_points_as_are_read_must_be_made() -> None:
    with pytest.raises(
        AskedWrongly, match=r"makes 24 points and the run reads 30: set objective\.generator\.num_points"
    ):
        make_objective()(make_batch(n=30))


def test_a_teacher_without_features_is_refused_with_the_command_that_writes_them() -> None:
    with pytest.raises(MissingField, match="viewpoint cache STORE --teacher other"):
        make_objective(teacher="other")
