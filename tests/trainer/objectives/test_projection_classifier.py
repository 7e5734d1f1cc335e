"""Tests of trainer/objectives/projection_classifier.py."""

import dataclasses

import pytest
import torch

from datastore.errors import DoNotRetry
from tests.trainer.objectives.cases.case import CORPUS
from tests.trainer.objectives.cases.projection_classifier import IMAGE_MODEL, hard_batch
from trainer.objectives.projection_classifier import ProjectionClassifier, ProjectionClassifierConfig


def build() -> ProjectionClassifier:
    torch.manual_seed(0)
    config = {"image_model": IMAGE_MODEL, "num_points": 24}
    return ProjectionClassifierConfig.model_validate(config).build(None, CORPUS).eval()


def test_it_has_a_class_for_each_of_the_corpus_s_and_keeps_the_whole_network() -> None:
    objective = build()
    classifier = objective.encoder.classifier
    assert classifier is not None and classifier.out_features == len(CORPUS.class_names)
    owned = {id(parameter) for parameter in objective.encoder.parameters()}
    assert owned == {id(parameter) for parameter in objective.parameters()}


def test_clouds_without_a_label_do_not_count() -> None:
    objective, batch = build(), hard_batch()
    labelled = batch.label >= 0
    fields = (each.name for each in dataclasses.fields(batch))
    rest = type(batch)(**{name: getattr(batch, name)[labelled] for name in fields})
    with torch.no_grad():
        torch.testing.assert_close(objective(batch), objective(rest))


def test_a_corpus_without_classes_is_refused() -> None:
    with pytest.raises(DoNotRetry, match="names no classes"):
        ProjectionClassifierConfig.model_validate({"image_model": IMAGE_MODEL}).build(
            None, dataclasses.replace(CORPUS, class_names=())
        )
