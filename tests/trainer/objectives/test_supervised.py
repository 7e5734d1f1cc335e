"""Tests of trainer/objectives/supervised.py."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from datastore.errors import DoNotRetry
from models.students import build_student
from trainer.augment import scale_and_shift
from trainer.objectives.base import Corpus
from trainer.objectives.means import smoothed_cross_entropy
from trainer.objectives.supervised import Supervised, SupervisedBatch, SupervisedConfig

CORPUS = Corpus(class_names=("chair", "lamp"), num_views=0, image_size=0, part_names=("leg", "seat", "shade"))
STUDENT = {"kind": "pointnet", "width": 0.125}


def make_objective(student: dict[str, Any] | None = None, **options: Any) -> Supervised:
    torch.manual_seed(0)
    return SupervisedConfig(**options).build(build_student(student or STUDENT), CORPUS)


def make_batch(b: int = 4, n: int = 24) -> SupervisedBatch:
    generator = torch.Generator().manual_seed(0)
    return SupervisedBatch(
        ids=torch.arange(b),
        seeds=torch.arange(b),
        points=torch.randn(b, n, 3, generator=generator),
        label=torch.randint(0, 2, (b,), generator=generator),
        part_labels=torch.randint(0, 3, (b, n), generator=generator).short(),
    )


def test_classification_is_a_cross_entropy_of_the_pooled_features() -> None:
    objective, batch = make_objective().eval(), make_batch()
    encoding = objective.student(scale_and_shift(batch.points, batch.seeds, (2 / 3, 3 / 2), 0.2))
    terms = objective(batch)
    assert terms.keys() == {"task", "transform_penalty"}
    assert objective.batch_type.store_fields() == ("points", "label")
    expected = smoothed_cross_entropy(objective.head(encoding.pooled), batch.label, 0.2)
    torch.testing.assert_close(terms["task"], expected)
    torch.testing.assert_close(terms["transform_penalty"], 0.001 * encoding.penalty)


def test_part_segmentation_is_a_cross_entropy_of_labelled_points() -> None:
    objective, batch = make_objective(task="parts", label_smoothing=0.0).eval(), make_batch()
    assert batch.part_labels is not None and objective.batch_type.store_fields() == ("points", "label", "part_labels")
    batch.part_labels[0, :10] = -1
    batch.label[3] = -1
    encoding = objective.student(scale_and_shift(batch.points, batch.seeds, (2 / 3, 3 / 2), 0.2))
    logits = objective.head(encoding, batch.label.clamp(min=0))
    losses = [F.cross_entropy(logits[0, 10:], batch.part_labels[0, 10:].long(), reduction="sum")]
    losses += [F.cross_entropy(logits[row], batch.part_labels[row].long(), reduction="sum") for row in (1, 2)]
    torch.testing.assert_close(objective(batch)["task"], torch.stack(losses).sum() / (14 + 24 + 24))


def test_points_can_be_left_as_they_are() -> None:
    objective, batch = make_objective(scale_range=(1.0, 1.0), shift=0.0).eval(), make_batch()
    other = dataclasses.replace(batch, seeds=batch.seeds + 1)
    assert torch.equal(objective(batch)["task"], objective(other)["task"])


def test_a_single_shape_is_finite_where_the_student_takes_one() -> None:
    objective, batch = make_objective({"kind": "dgcnn", "width": 0.125, "num_neighbours": 5}), make_batch(1)
    terms = objective(batch)
    terms["task"].backward()
    assert terms["task"].isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())


def test_a_store_without_classes_or_parts_is_refused() -> None:
    student = build_student(STUDENT)
    with pytest.raises(DoNotRetry, match="names no classes"):
        SupervisedConfig().build(student, dataclasses.replace(CORPUS, class_names=()))
    with pytest.raises(DoNotRetry, match="names no parts"):
        SupervisedConfig(task="parts").build(student, dataclasses.replace(CORPUS, part_names=()))
