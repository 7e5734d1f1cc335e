"""Tests of trainer/objectives/pointmcd.py. Numbers of properties are those of the specification, section 6."""

import dataclasses
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from datastore.errors import DoNotRetry, MissingField
from models.encoding import Encoding
from models.students import build_student
from tests.trainer.objectives.cases import pointmcd
from trainer.augment import scale_and_shift
from trainer.objectives.base import Corpus
from trainer.objectives.means import smoothed_cross_entropy
from trainer.objectives.pointmcd import PointMCD, PointMCDBatch, PointMCDConfig, alignment_loss

CORPUS = Corpus(class_names=("chair", "lamp", "table"), num_views=3, image_size=32, teacher_dims={"teacher": 16})


def make_objective(**options: Any) -> PointMCD:
    torch.manual_seed(0)
    student = build_student({"kind": "pointnet", "width": 0.125})
    return PointMCDConfig(**{"teacher": "teacher", **options}).build(student, CORPUS)


def make_batch(b: int = 4, n: int = 24, v: int = 3, seed: int = 0) -> PointMCDBatch:
    generator = torch.Generator().manual_seed(seed)
    return PointMCDBatch(
        ids=torch.arange(b),
        seeds=torch.arange(b) + 100 * seed,
        points=torch.randn(b, n, 3, generator=generator),
        visibility=torch.rand(b, n, v, generator=generator) < 0.4,
        label=torch.randint(0, 3, (b,), generator=generator),
        view_features=torch.rand(b, v, 16, generator=generator).half(),
    )


def without_views(batch: PointMCDBatch, *views: tuple[int, int]) -> PointMCDBatch:
    visibility = batch.visibility.clone()
    for sample, view in views:
        visibility[sample, :, view] = False
    return dataclasses.replace(batch, visibility=visibility)


def gradients(objective: PointMCD, batch: PointMCDBatch, *names: str) -> dict[str, Tensor]:
    objective.zero_grad()
    terms = objective(batch)
    torch.stack([terms[name] for name in names or terms]).sum().backward()
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


def test_the_terms_are_the_paper_s_sum() -> None:
    objective, batch = make_objective(), make_batch()
    terms = objective(batch)
    objective = make_objective()  # statistics of the forward pass above do not matter in train mode, but be exact
    points = scale_and_shift(batch.points, batch.seeds, (2 / 3, 3 / 2), 0.2)
    encoding = objective.student(points)
    assert objective.head is not None and objective.projection is not None
    logits = objective.head(encoding.per_point.amax(dim=1))
    # Zeroing hidden points is enough here, because embeddings are nowhere negative; the loop is over views
    seen = [(encoding.per_point * batch.visibility[:, :, v, None]).amax(dim=1) for v in range(3)]
    predicted = objective.projection(torch.stack(seen, dim=1).flatten(0, 1)).view(4, 3, 16)
    assert terms.keys() == {"task", "alignment", "transform_penalty"}
    torch.testing.assert_close(terms["task"], 0.1 * smoothed_cross_entropy(logits, batch.label, 0.2))
    torch.testing.assert_close(terms["alignment"], (predicted - batch.view_features).abs().mean())
    torch.testing.assert_close(terms["transform_penalty"], 0.001 * encoding.penalty)


def test_an_empty_view_has_no_loss_no_statistics_and_no_gradient() -> None:  # property 1
    batch = without_views(make_batch(), (1, 2), (3, 0))
    # Whatever the teacher says of a view that sees nothing
    other_features = batch.view_features.clone()
    other_features[1, 2] = 500
    other_features[3, 0] = -7
    objective = make_objective()
    expected = gradients(objective, batch, "alignment")
    statistics = {name: value.clone() for name, value in objective.named_buffers()}
    objective = make_objective()
    found = gradients(objective, dataclasses.replace(batch, view_features=other_features), "alignment")
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in found)
    for name, value in objective.named_buffers():
        assert torch.equal(value, statistics[name]), name
    encoding = objective.student(batch.points)
    predicted, target = objective.descriptors(encoding, batch)
    assert len(predicted) == len(target) == 10


def test_with_all_views_empty_the_alignment_is_zero_and_finite() -> None:  # property 1
    objective = make_objective()
    batch = dataclasses.replace(make_batch(), visibility=torch.zeros(4, 24, 3, dtype=torch.bool))
    found = gradients(objective, batch, "alignment")
    assert objective(batch)["alignment"] == 0
    assert all(torch.isfinite(gradient).all() and not gradient.any() for gradient in found.values())
    assert {name for name in found if name.startswith("projection")} == {
        "projection.linear.weight",
        "projection.norm.weight",
        "projection.norm.bias",
    }


def test_empty_views_can_be_counted_as_the_official_code_does() -> None:
    batch = without_views(make_batch(), (1, 2))
    objective = make_objective(count_empty_views=True)
    encoding = objective.student(batch.points)
    predicted, target = objective.descriptors(encoding, batch)
    assert len(predicted) == 12
    assert torch.equal(target, batch.view_features.flatten(0, 1))
    dropped, counted = make_objective()(batch)["alignment"], make_objective(count_empty_views=True)(batch)["alignment"]
    assert not torch.isclose(dropped, counted)
    full = dataclasses.replace(batch, visibility=torch.ones_like(batch.visibility))
    assert torch.equal(make_objective()(full)["alignment"], make_objective(count_empty_views=True)(full)["alignment"])


def test_the_alignment_does_not_depend_on_points_hidden_from_every_view() -> None:  # property 2
    objective, batch = make_objective(), make_batch()
    visibility = batch.visibility.clone()
    visibility[:, :6] = False
    batch = dataclasses.replace(batch, visibility=visibility)
    encoding = objective.student(batch.points)
    encoding.per_point.retain_grad()
    alignment_loss(*objective.descriptors(encoding, batch)).backward()
    assert encoding.per_point.grad is not None
    assert not encoding.per_point.grad[:, :6].any() and encoding.per_point.grad[:, 6:].any()


def test_rows_of_points_and_visibility_may_be_permuted_together_but_not_apart() -> None:  # property 4
    objective, batch = make_objective().eval(), make_batch()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    permuted = dataclasses.replace(batch, points=batch.points[:, order])
    together = dataclasses.replace(permuted, visibility=batch.visibility[:, order])
    expected = objective(batch)
    for name, term in objective(together).items():
        torch.testing.assert_close(term, expected[name])
    torch.testing.assert_close(objective.classify(together.points), objective.classify(batch.points))
    assert not torch.isclose(objective(permuted)["alignment"], expected["alignment"])


def test_views_and_the_teacher_s_rows_may_be_permuted_together() -> None:  # property 5
    objective, batch = make_objective().eval(), make_batch()
    order = [2, 0, 1]
    together = dataclasses.replace(
        batch, visibility=batch.visibility[:, :, order], view_features=batch.view_features[:, order]
    )
    torch.testing.assert_close(objective(together)["alignment"], objective(batch)["alignment"])
    apart = dataclasses.replace(batch, visibility=batch.visibility[:, :, order])
    assert not torch.isclose(objective(apart)["alignment"], objective(batch)["alignment"])


def test_without_alignment_the_student_learns_as_it_would_alone() -> None:  # property 8
    batch = make_batch()
    plain, distilled = make_objective(alignment_weight=0), make_objective()
    assert plain.projection is None and "alignment" not in plain(batch)
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, distilled.get_parameter(name)), f"{name} starts elsewhere"
    found, expected = gradients(plain, batch), gradients(distilled, batch, "task", "transform_penalty")
    assert found.keys() == {name for name in expected if not name.startswith("projection")}
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_without_alignment_no_teacher_needs_to_exist() -> None:
    student = build_student({"kind": "pointnet", "width": 0.125})
    corpus = dataclasses.replace(CORPUS, teacher_dims={})
    objective = PointMCDConfig(teacher="absent", alignment_weight=0).build(student, corpus)
    assert objective(make_batch()).keys() == {"task", "transform_penalty"}


def test_logits_are_the_same_with_the_alignment_branch_removed() -> None:  # property 9
    objective, batch = make_objective().eval(), make_batch()
    expected = objective.classify(batch.points)
    objective.projection = None
    assert torch.equal(objective.classify(batch.points), expected) and expected.shape == (4, 3)


def test_labels_are_not_needed_when_the_task_weighs_nothing() -> None:
    student = build_student({"kind": "pointnet", "width": 0.125})
    config = PointMCDConfig(teacher="teacher", task_weight=0, transform_penalty_weight=0)
    objective = config.build(student, dataclasses.replace(CORPUS, class_names=()))
    assert objective.head is None
    batch = dataclasses.replace(make_batch(), label=torch.full((4,), -1))
    assert objective(batch).keys() == {"alignment"}


def test_augmentation_ranges_are_the_config_s() -> None:
    batch = make_batch()
    still = make_objective(scale_range=(1.0, 1.0), shift=0.0).eval()
    expected = still(dataclasses.replace(batch, seeds=batch.seeds + 1))
    for name, term in still(batch).items():
        assert torch.equal(term, expected[name])
    moving = make_objective().eval()
    assert not torch.isclose(moving(batch)["alignment"], expected["alignment"])


def test_the_loss_is_a_mean_of_absolute_differences() -> None:
    predicted, target = torch.tensor([[1.0, 2.0], [0.0, 4.0]]), torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    assert alignment_loss(predicted, target) == (1 + 0 + 3 + 4) / 4
    assert alignment_loss(predicted[:0], target[:0]) == 0
    assert alignment_loss(predicted.bfloat16(), target.half()).dtype == torch.float32


def test_nothing_to_learn_is_refused() -> None:
    with pytest.raises(ValidationError, match="nothing would be learned"):
        PointMCDConfig(teacher="teacher", alignment_weight=0, task_weight=0)


def test_a_teacher_without_features_is_refused_with_the_command_that_writes_them() -> None:
    student = build_student({"kind": "pointnet", "width": 0.125})
    with pytest.raises(MissingField, match="viewpoint cache STORE --teacher other"):
        PointMCDConfig(teacher="other").build(student, CORPUS)


def test_a_store_without_classes_is_refused_where_labels_are_learned() -> None:
    student = build_student({"kind": "pointnet", "width": 0.125})
    with pytest.raises(DoNotRetry, match=r"objective\.task_weight=0"):
        PointMCDConfig(teacher="teacher").build(student, dataclasses.replace(CORPUS, class_names=()))


SMALL_STEP = {"num_points": 8, "balls": [{"radius": 2.0, "num_neighbours": 4, "widths": [8, 16]}]}
PARTS = pointmcd.CASES["pointmcd, parts"]


def parts_objective(student: dict[str, Any], **options: Any) -> PointMCD:
    torch.manual_seed(0)
    config = PointMCDConfig.model_validate({**PARTS.config, **options})
    return config.build(build_student(student), PARTS.corpus)


def test_the_parts_term_is_the_mean_over_all_points_whose_part_is_known() -> None:
    objective = parts_objective({"kind": "pointnet", "width": 0.125}, alignment_weight=0).eval()
    batch: Any = pointmcd.hard_batch()
    terms = objective(batch)
    encoding = objective.student(scale_and_shift(batch.points, batch.seeds, (2 / 3, 3 / 2), 0.2))
    losses = []
    for sample in range(len(batch)):
        if batch.label[sample] < 0:
            continue
        one = Encoding(encoding.per_point[sample : sample + 1], encoding.pooled[sample : sample + 1])
        logits = objective.head(one, batch.label[sample : sample + 1])[0]  # type: ignore[misc]
        for point, part in enumerate(batch.part_labels[sample].tolist()):
            if part >= 0:
                losses.append(smoothed_cross_entropy(logits[point : point + 1], torch.tensor([part]), 0.05))
    torch.testing.assert_close(terms["task"], 0.1 * torch.stack(losses).mean())


@pytest.mark.parametrize(
    "student",
    [
        {"kind": "pointnet", "width": 0.125},
        {"kind": "dgcnn", "width": 0.125, "num_neighbours": 4, "edge_widths": [[64, 64], [64]]},
        {"kind": "pointnet2", "steps": [SMALL_STEP], "widths": [16, 32]},
    ],
    ids=lambda student: student["kind"],
)
def test_parts_are_learned_by_students_that_keep_points_and_by_those_that_thin_them_out(
    student: dict[str, Any],
) -> None:
    objective = parts_objective(student)
    terms = objective(pointmcd.hard_batch())
    assert {"task", "alignment"} <= set(terms)
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in objective.parameters())


def test_a_setting_reads_what_it_needs_and_no_more() -> None:
    def read(**options: Any) -> set[str]:
        return set(parts_objective({"kind": "pointnet", "width": 0.125}, **options).batch_type.store_fields())

    assert read() == {"points", "visibility", "label", "view_features", "part_labels"}
    assert read(task="classification") == {"points", "visibility", "label", "view_features"}
    assert read(task="classification", alignment_weight=0) == {"points", "label"}
    assert read(task_weight=0) == {"points", "visibility", "view_features"}


def test_parts_without_part_names_are_refused() -> None:
    with pytest.raises(DoNotRetry, match="store names no parts"):
        make_objective(task="parts")
