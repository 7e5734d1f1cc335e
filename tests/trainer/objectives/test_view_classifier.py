"""Tests of trainer/objectives/view_classifier.py."""

import dataclasses
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from datastore.errors import DoNotRetry
from models.image_models.multi_view import MultiViewClassifierConfig
from models.image_models.mvcnn import MVCNN
from trainer.objectives.base import Corpus
from trainer.objectives.means import smoothed_cross_entropy
from trainer.objectives.view_classifier import (
    ViewClassifier,
    ViewClassifierBatch,
    ViewClassifierConfig,
)

CORPUS = Corpus(class_names=("chair", "lamp", "table"), num_views=4, image_size=32)


def make_objective(kind: str = "multi_view_classifier", views_per_step: int | None = None) -> ViewClassifier:
    torch.manual_seed(0)
    image_model = {"kind": kind, "trunk": {"name": "test_resnet", "image_size": 32}}
    config = ViewClassifierConfig.model_validate({"image_model": image_model, "views_per_step": views_per_step})
    return config.build(None, CORPUS)


def make_batch(b: int = 3) -> ViewClassifierBatch:
    generator = torch.Generator().manual_seed(0)
    return ViewClassifierBatch(
        ids=torch.arange(b),
        seeds=torch.arange(b),
        views=torch.randint(0, 256, (b, 4, 32, 32, 3), generator=generator, dtype=torch.uint8),
        label=torch.randint(0, 3, (b,), generator=generator),
    )


def test_the_terms_are_the_losses_of_the_shape_and_of_its_views() -> None:
    objective, batch = make_objective().eval(), make_batch()
    terms = objective(batch)
    predictions = objective.encoder(batch.views)
    torch.testing.assert_close(terms["global"], smoothed_cross_entropy(predictions.global_logits, batch.label, 0.2))
    assert predictions.view_logits is not None
    by_view = [smoothed_cross_entropy(predictions.view_logits[:, v], batch.label, 0.2) for v in range(4)]
    torch.testing.assert_close(terms["views"], torch.stack(by_view).mean())


def test_pointcmt_s_classifier_learns_from_the_shape_alone() -> None:
    objective, batch = make_objective("mvcnn").eval(), make_batch()
    assert isinstance(objective.encoder, MVCNN) and objective.encoder.classifier.out_features == 3
    terms = objective(batch)
    logits = objective.encoder(batch.views).global_logits
    assert terms.keys() == {"global"}
    torch.testing.assert_close(terms["global"], smoothed_cross_entropy(logits, batch.label, 0.2))


def test_a_classifier_that_does_not_say_its_kind_is_pointmcd_s_and_an_unknown_one_is_refused() -> None:
    image_model: dict[str, Any] = {"trunk": {"name": "test_resnet", "image_size": 32}}
    config = ViewClassifierConfig.model_validate({"image_model": image_model})
    assert isinstance(config.image_model, MultiViewClassifierConfig)
    assert (
        ViewClassifierConfig.model_validate(config.model_dump())
        == config
        == ViewClassifierConfig(image_model=config.image_model)
    )
    with pytest.raises(ValidationError, match="'mvcnn'"):
        ViewClassifierConfig.model_validate({"image_model": image_model | {"kind": "mvcn"}})


def test_a_shape_without_a_label_does_not_count() -> None:
    objective, batch = make_objective().eval(), make_batch()
    label = batch.label.clone()
    label[1] = -1
    kept = [0, 2]
    rest = ViewClassifierBatch(batch.ids[kept], batch.seeds[kept], batch.views[kept], batch.label[kept])
    expected = objective(rest)
    for name, term in objective(dataclasses.replace(batch, label=label)).items():
        torch.testing.assert_close(term, expected[name])


def test_fewer_views_a_step_make_a_smaller_forward_pass() -> None:
    objective, batch = make_objective(views_per_step=2), make_batch()
    seen = []
    objective.encoder.trunk.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape))
    objective(batch)
    assert seen == [(6, 3, 32, 32)]


def test_a_store_without_classes_is_refused() -> None:
    config = ViewClassifierConfig.model_validate({"image_model": {"trunk": {"name": "test_resnet", "image_size": 32}}})
    with pytest.raises(DoNotRetry, match="names no classes"):
        config.build(None, dataclasses.replace(CORPUS, class_names=()))
