"""Tests of trainer/objectives/pointcmt.py. Numbers of properties and traps are those of the specification, 6 and 5."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from datastore.errors import AskedWrongly, DoNotRetry, MissingField
from models.point_generator import PointGeneratorConfig
from models.students import build_student
from tests.ranks import run_ranks
from tests.trainer.objectives.cases.pointcmt import exported_generator
from trainer import distributed
from trainer.augment import in_random_order, scale_and_shift
from trainer.config import load_recipe
from trainer.objectives.base import Corpus
from trainer.objectives.cloud_distance import CloudDistanceConfig, cloud_distance
from trainer.objectives.means import smoothed_cross_entropy
from trainer.objectives.pointcmt import PointCMT, PointCMTBatch, PointCMTConfig, classifier_gap

CORPUS = Corpus(class_names=("chair", "lamp", "table"), num_views=4, image_size=32, teacher_dims={"teacher": 16})
GENERATOR = exported_generator(16, 24)
OFF = {"feature_enhancement_weight": 0, "classifier_enhancement_weight": 0}


def make_objective(**options: Any) -> PointCMT:
    torch.manual_seed(0)
    student = build_student({"kind": "pointnet", "width": 0.125})
    settings = {"teacher": "teacher", "generator": GENERATOR, "feature_width": 16, **options}
    return PointCMTConfig.model_validate(settings).build(student, CORPUS)


def make_batch(b: int = 4, n: int = 24, v: int = 4, seed: int = 0) -> PointCMTBatch:
    generator = torch.Generator().manual_seed(seed)
    return PointCMTBatch(
        ids=torch.arange(b),
        seeds=torch.arange(b) + 100 * seed,
        points=torch.randn(b, n, 3, generator=generator),
        label=torch.randint(0, 3, (b,), generator=generator),
        view_features=torch.rand(b, v, 16, generator=generator).half(),
    )


def backward(objective: PointCMT, batch: PointCMTBatch, *names: str) -> dict[str, Tensor]:
    """Gradients of some of the terms, or of all, by parameter."""
    objective.zero_grad()
    terms = objective(batch)
    torch.stack([terms[name] for name in names or terms]).sum().backward()
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


def part_of(batch: PointCMTBatch, rows: slice) -> PointCMTBatch:
    return PointCMTBatch(*(getattr(batch, field.name)[rows] for field in dataclasses.fields(batch)))


def generator_weight(objective: PointCMT) -> Tensor:
    assert objective.generator is not None
    (weight,) = objective.generator.on(torch.device("cpu")).parameters()
    return weight


def slow_classifier_gap(points: Tensor, images: Tensor) -> list[float]:
    """KL(images || points), on numbers."""
    gaps = []
    for a, b in zip(points.tolist(), images.tolist(), strict=True):
        p, q = ([math.exp(value) / sum(map(math.exp, row)) for value in row] for row in (a, b))
        gaps.append(sum(of_image * math.log(of_image / of_point) for of_point, of_image in zip(p, q, strict=True)))
    return gaps


def test_the_terms_are_the_paper_s_sum() -> None:
    objective, batch = make_objective().eval(), make_batch()
    assert batch.view_features is not None
    terms = objective(batch)
    seen = in_random_order(
        scale_and_shift(batch.points, batch.seeds, (2 / 3, 3 / 2), 0.2), batch.seeds, "order of points"
    )
    projection, classifier = objective.head
    features = projection(objective.student(seen).pooled)
    logits = classifier(features)
    images = batch.view_features.float().max(dim=1).values
    weight = generator_weight(objective)
    decoded, target = ((each @ weight.T).view(4, 24, 3) for each in (features, images))
    gaps = slow_classifier_gap(logits, images @ classifier.weight.T + classifier.bias)
    expected = {
        "task": smoothed_cross_entropy(logits, batch.label, 0.2),
        "feature_enhancement": 30 * cloud_distance(decoded, target, CloudDistanceConfig()).mean(),
        "classifier_enhancement": torch.tensor(0.3 * 32 * sum(gaps) / 4),  # a sum with 0.3 over a batch of 32
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)


def test_the_published_student_has_as_many_parameters_as_the_paper_s() -> None:  # property 10
    corpus = Corpus(tuple(map(str, range(40))), num_views=20, image_size=224)
    objective = PointCMTConfig.model_validate(OFF).build(build_student({"kind": "pointnet2"}), corpus)
    assert sum(parameter.numel() for parameter in objective.parameters()) == 1_621_512


def test_a_training_step_leaves_the_generator_as_it_is_and_images_without_a_gradient() -> None:  # property 1, trap 18
    objective, batch = make_objective().train(), make_batch()
    assert batch.view_features is not None
    batch.view_features.requires_grad_()
    before = generator_weight(objective).clone()
    optimizer = torch.optim.AdamW(objective.parameters(), weight_decay=0.05)
    backward(objective, batch)
    optimizer.step()
    weight = generator_weight(objective)
    assert torch.equal(weight, before) and weight.grad is None and not weight.requires_grad
    assert batch.view_features.grad is None
    assert not any("generator" in name for name in objective.state_dict())


def test_the_generator_drops_nothing_while_the_student_trains() -> None:  # trap 9
    objective = make_objective().train()
    assert objective.generator is not None
    generator, features = objective.generator.on(torch.device("cpu")), torch.rand(2, 16)
    assert not generator.training and torch.equal(generator(features), generator(features))


@pytest.mark.parametrize("box", ["official", "intended"])
def test_feature_enhancement_sees_the_direction_of_features_and_not_their_length(
    box: str,
) -> None:  # property 4, trap 1
    config = CloudDistanceConfig.model_validate({"box_normalisation": box, "matching": "exact"})
    torch.manual_seed(0)
    generator = PointGeneratorConfig(in_features=16, num_points=24).build().eval()
    features, images = torch.rand(4, 16), torch.rand(4, 16)
    expected = cloud_distance(generator(features), generator(images), config)
    for factor in (0.1, 7.0):
        torch.testing.assert_close(cloud_distance(generator(factor * features), generator(images), config), expected)
    nothing = cloud_distance(generator(images), generator(images), config)
    torch.testing.assert_close(nothing, torch.zeros(4), atol=2e-6, rtol=0)


def test_the_classifier_gap_is_the_divergence_of_points_from_images() -> None:  # property 5
    points, images = torch.randn(6, 5), torch.randn(6, 5)
    gap = classifier_gap(points, images)
    torch.testing.assert_close(gap, torch.tensor(slow_classifier_gap(points, images)))
    assert (gap > 0).all() and not torch.allclose(gap, torch.tensor(slow_classifier_gap(images, points)), rtol=0.05)
    torch.testing.assert_close(classifier_gap(images, images), torch.zeros(6), atol=1e-6, rtol=0)


def test_logits_far_apart_have_a_finite_gap_and_gradient() -> None:  # trap 14
    points = torch.tensor([[1e4, -1e4, 0.0], [-3e4, 0, 3e4]]).requires_grad_()
    images = torch.tensor([[-1e4, 1e4, 0.0], [3e4, 0, -3e4]]).requires_grad_()
    gap = classifier_gap(points, images)
    gap.sum().backward()
    assert points.grad is not None and images.grad is not None
    assert all(torch.isfinite(value).all() for value in (gap, points.grad, images.grad))
    torch.testing.assert_close(gap, torch.tensor([2e4, 6e4]))


def test_a_detached_target_changes_the_gradient_of_the_classifier_alone() -> None:  # property 5
    batch = make_batch()
    found, detached = (
        backward(make_objective(detach_target=flag), batch, "classifier_enhancement") for flag in (False, True)
    )
    for name, gradient in found.items():
        assert torch.equal(gradient, detached[name]) == (not name.startswith("head.1.")), name


def test_a_sum_over_the_batch_is_the_mean_times_its_size() -> None:  # trap 10
    batch = make_batch()
    summed = {"classifier_enhancement_weight": 0.3, "classifier_enhancement_reduction": "sum"}
    term = make_objective(**summed)(batch)["classifier_enhancement"]
    mean = make_objective(classifier_enhancement_weight=0.3 * 4)(batch)["classifier_enhancement"]
    torch.testing.assert_close(term, mean)


def test_four_micro_batches_of_eight_have_the_gradient_of_one_of_thirty_two() -> None:  # property 6
    batch, objective = make_batch(b=32), make_objective(distance={"matching": "exact"}).eval()
    whole = backward(objective, batch)
    parts = [backward(objective, part_of(batch, slice(first, first + 8))) for first in range(0, 32, 8)]
    for name, gradient in whole.items():
        mean = torch.stack([part[name] for part in parts]).mean(dim=0)
        assert (mean - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_averaged_gradients_make_the_updates_that_the_paper_s_code_makes_with_summed_ones() -> None:  # trap 5
    published = load_recipe("pointcmt_teacher", demo=False).engine.optimizer
    assert (published.kind, published.lr) == ("adam", 1e-3)
    random = torch.Generator().manual_seed(0)
    gradients = torch.randn(20, 4, 50, generator=random) * 10 ** torch.randint(-9, 1, (50,), generator=random)
    averaged, summed = (torch.nn.Parameter(torch.linspace(-1, 1, 50)) for _ in range(2))
    ours = published.build({"weight": averaged})
    theirs = torch.optim.Adam([summed], lr=1e-3, weight_decay=1e-4, eps=1e-8)
    for parts in gradients:
        averaged.grad, summed.grad = parts.mean(dim=0), parts.sum(dim=0)
        ours.step()
        theirs.step()
    torch.testing.assert_close(averaged, summed, rtol=0, atol=1e-6)
    assert (summed - torch.linspace(-1, 1, 50)).abs().min() > 1e-4


def gradients_of_this_rank() -> dict[str, Tensor]:
    rank, size = torch.distributed.get_rank(), distributed.world_size()
    share = 32 // size
    objective = make_objective(distance={"matching": "exact"}).eval()
    return backward(objective, part_of(make_batch(b=32), slice(rank * share, (rank + 1) * share)))


@pytest.mark.slow
def test_four_ranks_with_eight_clouds_each_have_the_gradient_of_one_with_thirty_two() -> None:  # property 6, trap 10
    ranks = run_ranks(gradients_of_this_rank, world=4)
    objective = make_objective(distance={"matching": "exact"}).eval()
    for name, gradient in backward(objective, make_batch(b=32)).items():
        mean = torch.stack([rank[name] for rank in ranks]).mean(dim=0)
        assert (mean - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_views_may_come_in_any_order_and_more_than_once() -> None:  # property 8
    objective, batch = make_objective().eval(), make_batch()
    assert batch.view_features is not None
    expected = objective(batch)
    for order in ([3, 1, 0, 2], [0, 1, 2, 3, 3, 1]):
        for name, term in objective(dataclasses.replace(batch, view_features=batch.view_features[:, order])).items():
            assert torch.equal(term, expected[name])


def test_switched_off_the_loss_is_the_cross_entropy_of_the_same_student() -> None:  # property 10
    batch = make_batch()
    plain, taught = make_objective(teacher=None, generator=None, **OFF), make_objective()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, taught.get_parameter(name)), f"{name} starts elsewhere"
    assert plain.state_dict().keys() == taught.state_dict().keys()
    terms = plain(PointCMTBatch.without("view_features")(batch.ids, batch.seeds, batch.points, batch.label))
    assert terms.keys() == {"task"} and torch.equal(terms["task"], taught(batch)["task"])
    found, expected = backward(plain, batch), backward(taught, batch, "task")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("weight", ["feature_enhancement_weight", "classifier_enhancement_weight"])
def test_one_enhancement_can_be_switched_off_alone(weight: str) -> None:
    without = make_objective(**{weight: 0})(make_batch())
    taught = make_objective()(make_batch())
    assert taught.keys() - without.keys() == {weight.removesuffix("_weight")}
    assert all(torch.equal(term, taught[name]) for name, term in without.items())


def test_what_is_read_from_the_store_follows_from_the_weights() -> None:
    assert make_objective().batch_type.store_fields() == ("points", "label", "view_features")
    assert make_objective(**OFF).batch_type.store_fields() == ("points", "label")


def test_logits_need_points_alone_in_the_order_given() -> None:  # property 10, trap 11
    objective, batch = make_objective().eval(), make_batch()
    expected = objective.classify(batch.points)
    objective.generator = None
    seen: list[Tensor] = []
    objective.student.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    assert torch.equal(objective.classify(batch.points), expected) and expected.shape == (4, 3)
    assert torch.equal(seen[0], batch.points)
    objective(batch)
    augmented = scale_and_shift(batch.points, batch.seeds, (2 / 3, 3 / 2), 0.2)
    assert not torch.equal(seen[1], augmented)
    assert torch.equal(seen[1].sort(dim=1).values, augmented.sort(dim=1).values)


def in_bfloat16(objective: PointCMT) -> Iterator[tuple[str, Tensor]]:
    with torch.autocast("cpu", torch.bfloat16):
        yield from objective(make_batch()).items()


def test_terms_are_float32_and_near_under_autocast() -> None:  # trap 16
    objective = make_objective().eval()
    expected = objective(make_batch())
    for name, term in in_bfloat16(objective):
        assert term.dtype == torch.float32
        torch.testing.assert_close(term, expected[name], rtol=0.1, atol=0.02)


def test_one_cloud_is_enough() -> None:
    objective = make_objective().eval()
    gradients = backward(objective, make_batch(b=1))
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


def test_a_teacher_is_needed_where_images_are_read() -> None:
    with pytest.raises(ValidationError, match="name a teacher"):
        PointCMTConfig.model_validate({"classifier_enhancement_weight": 1})
    with pytest.raises(MissingField, match="viewpoint cache STORE --teacher other"):
        make_objective(teacher="other")


def test_a_generator_is_needed_where_features_are_decoded() -> None:
    with pytest.raises(AskedWrongly, match=r"--set objective\.generator=URL"):
        make_objective(generator=None)
    make_objective(generator=None, feature_enhancement_weight=0)


def test_widths_that_do_not_fit_are_refused_with_what_to_set() -> None:
    with pytest.raises(AskedWrongly, match=r"set objective\.feature_width=16"):
        make_objective(feature_width=512)
    narrow = exported_generator(8, 24)
    with pytest.raises(AskedWrongly, match="decodes 8 features"):
        make_objective(generator=narrow)


def test_a_store_without_classes_is_refused() -> None:
    student = build_student({"kind": "pointnet", "width": 0.125})
    with pytest.raises(DoNotRetry, match="names no classes"):
        PointCMTConfig.model_validate(OFF).build(student, dataclasses.replace(CORPUS, class_names=()))
