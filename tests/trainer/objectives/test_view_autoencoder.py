"""Tests of trainer/objectives/view_autoencoder.py."""

import dataclasses

import torch

from tests.trainer.objectives.cases.view_autoencoder import CASES, some_views
from trainer.objectives.base import Corpus
from trainer.objectives.view_autoencoder import ViewAutoencoding, ViewAutoencodingConfig, reconstruction_error


def make_objective(views_per_step: int | None) -> ViewAutoencoding:
    torch.manual_seed(0)
    settings = {**CASES["view_autoencoder"].config, "views_per_step": views_per_step}
    return ViewAutoencodingConfig.model_validate(settings).build(None, Corpus((), 4, 32)).eval()


def test_the_term_is_the_mean_difference_over_all_views() -> None:
    objective, batch = make_objective(None), some_views()
    images = objective.encoder.images(batch.views.flatten(0, 1))
    by_view = [(objective.encoder(image[None]) - image).abs().mean() for image in images]
    torch.testing.assert_close(objective(batch)["image"], torch.stack(by_view).mean())


def test_one_view_of_each_shape_is_drawn_by_its_seed() -> None:
    objective, batch = make_objective(1), some_views()
    images = objective.encoder.images(batch.views.flatten(0, 1)).unflatten(0, batch.views.shape[:2])
    errors = torch.stack(
        [torch.stack([(objective.encoder(view[None]) - view).abs().mean() for view in shape]) for shape in images]
    )
    term = objective(batch)["image"]
    assert errors.amin(dim=1).mean() < term < errors.amax(dim=1).mean()
    torch.testing.assert_close(objective(batch)["image"], term)
    others = {objective(dataclasses.replace(batch, seeds=batch.seeds + seed))["image"].item() for seed in range(1, 9)}
    assert len(others | {term.item()}) > 4, "other seeds draw other views"


def test_an_image_that_is_reproduced_has_no_error() -> None:
    images = torch.rand(2, 3, 8, 8)
    assert reconstruction_error(images, images).item() == 0
    assert reconstruction_error(images + 0.25, images).item() == torch.tensor(0.25).item()
