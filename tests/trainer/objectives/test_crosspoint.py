"""Tests of trainer/objectives/crosspoint.py. Numbers of properties and traps are those of the specification, sections 6, 5."""

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from datastore.errors import DoNotRetry
from datastore.layout import Store
from models.image_models.trunk import as_images, build_trunk
from models.students import build_student
from models.unit_sphere import to_unit_sphere
from tests.ranks import run_ranks
from tests.runs import tiny_config, train
from trainer import augment
from trainer.config import load_recipe
from trainer.objectives.base import Corpus
from trainer.objectives.contrastive import nt_xent
from trainer.objectives.crosspoint import RESNET_50, CrossPoint, CrossPointBatch, CrossPointConfig
from trainer.schedule import lr_at

CORPUS = Corpus(class_names=(), num_views=3, image_size=32)
TINY_TRUNK = {"name": "test_resnet", "image_size": 48, "mean": RESNET_50.mean, "std": RESNET_50.std}


def make_objective(**options: Any) -> CrossPoint:
    torch.manual_seed(0)
    student = build_student({"kind": "pointnet", "width": 0.125, "transforms": False})
    return CrossPointConfig.model_validate({"image_trunk": TINY_TRUNK, **options}).build(student, CORPUS)


def make_batch(b: int = 4, n: int = 24, seed: int = 0) -> CrossPointBatch:
    generator = torch.Generator().manual_seed(seed)
    return CrossPointBatch(
        ids=torch.arange(b),
        seeds=torch.arange(b) + 100 * seed,
        points=torch.randn(b, n, 3, generator=generator),
        views=torch.randint(0, 256, (b, 3, 32, 32, 3), generator=generator, dtype=torch.uint8),
    )


def projections(objective: CrossPoint, batch: CrossPointBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Of copy 1, copy 2 and image, each by a forward of its own, as eval mode allows."""
    assert batch.views is not None and objective.image_trunk is not None and objective.image_head is not None
    first, second = (
        objective.head(objective.student(objective.augmented(batch.points, batch.seeds, copy)).pooled)
        for copy in (1, 2)
    )
    return first, second, objective.image_head(objective.image_trunk(objective.images(batch.views, batch.seeds)))


def gradients(objective: CrossPoint, batch: CrossPointBatch, *names: str) -> dict[str, Tensor]:
    objective.zero_grad()
    terms = objective(batch)
    torch.stack([terms[name] for name in names or terms]).sum().backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


def loss_and_gradients_of_this_rank(num_samples: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    batch, share = make_batch(num_samples), num_samples // dist.get_world_size()
    mine = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    assert batch.views is not None
    part = CrossPointBatch(batch.ids[mine], batch.seeds[mine], batch.points[mine], batch.views[mine])
    objective = make_objective().eval()
    return {name: term.detach() for name, term in objective(part).items()}, gradients(objective, part)


def test_the_loss_is_the_sum_of_both_comparisons() -> None:  # property 3
    objective, batch = make_objective().eval(), make_batch()
    first, second, image = projections(objective, batch)
    terms = objective(batch)
    assert terms.keys() == {"intra_modal", "cross_modal"}
    torch.testing.assert_close(terms["intra_modal"], nt_xent(first, second, 0.1))
    torch.testing.assert_close(terms["cross_modal"], nt_xent((first + second) / 2, image, 0.1))
    weighted = make_objective(intra_modal_weight=2.0, cross_modal_weight=0.5).eval()(batch)
    torch.testing.assert_close(weighted["intra_modal"], 2 * terms["intra_modal"])
    torch.testing.assert_close(weighted["cross_modal"], terms["cross_modal"] / 2)


def test_the_prototype_is_the_mean_of_vectors_and_not_of_their_directions() -> None:  # trap 7
    objective, batch = make_objective().eval(), make_batch()
    first, second, image = projections(objective, batch)
    of_directions = nt_xent((F.normalize(first) + F.normalize(second)) / 2, image, 0.1)
    assert not torch.isclose(objective(batch)["cross_modal"], of_directions, rtol=1e-5)


def test_the_gradient_reaches_both_copies_alike_and_the_images() -> None:  # property 3
    objective, batch = make_objective().eval(), make_batch()
    projected: list[Tensor] = []

    def keep(_: Any, __: Any, output: Tensor) -> None:
        output.retain_grad()
        projected.append(output)

    objective.head.register_forward_hook(keep)
    found = gradients(objective, batch, "cross_modal")
    assert projected[0].grad is not None
    of_first, of_second = projected[0].grad.chunk(2)
    assert of_first.any() and torch.equal(of_first, of_second)
    assert any(name.startswith("image_trunk") and gradient.any() for name, gradient in found.items())
    found = gradients(objective, batch, "intra_modal")
    assert all(name.startswith(("student", "head")) for name, gradient in found.items() if gradient.any())


def test_both_copies_go_through_the_student_in_one_batch() -> None:  # trap 10
    objective, batch = make_objective(), make_batch()
    seen: list[Tensor] = []
    objective.student.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    objective(batch)
    assert [each.shape for each in seen] == [(8, 24, 3)]
    assert not torch.equal(seen[0][:4], seen[0][4:])


def test_a_copy_is_augmented_in_the_published_order() -> None:  # property 7
    objective, batch = make_objective(), make_batch()
    points, seeds = to_unit_sphere(batch.points), batch.seeds
    points = augment.scale(points, seeds, (0.5, 2.0), "crosspoint copy 1: scale")
    points = augment.rotate_about_y(points, seeds, "crosspoint copy 1: rotate")
    points = augment.shift_by_extent(points, seeds, 0.5, "crosspoint copy 1: shift")
    points = augment.jitter(points, seeds, 0.01, 0.05, "crosspoint copy 1: jitter")
    points = augment.drop_out_points(points, seeds, 0.875, "crosspoint copy 1: drop out")
    before = batch.points.clone()
    assert torch.equal(objective.augmented(batch.points, seeds, 1), points)
    assert torch.equal(batch.points, before)  # trap 13
    second = objective.augmented(batch.points, seeds, 2)
    assert second.shape == points.shape and not torch.equal(second, points)


def test_a_copy_is_the_same_in_any_batch_and_another_in_each_epoch() -> None:  # property 7, trap 12
    objective, batch = make_objective(), make_batch()
    together = objective.augmented(batch.points, batch.seeds, 2)
    for row in range(4):
        alone = objective.augmented(batch.points[row : row + 1], batch.seeds[row : row + 1], 2)
        assert torch.equal(alone, together[row : row + 1])
    assert not torch.equal(objective.augmented(batch.points, batch.seeds + 1, 2), together)


def test_augmentations_can_be_switched_off_and_the_paper_s_own_switched_on() -> None:  # trap 1
    off = {"scale_range": (1.0, 1.0), "rotate": False, "shift": 0, "jitter_deviation": 0, "largest_drop_out": 0}
    batch = make_batch()
    plain = make_objective(**off).augmented(batch.points, batch.seeds, 1)
    torch.testing.assert_close(plain, to_unit_sphere(batch.points))
    bent = make_objective(**off, elastic_deviation=0.05).augmented(batch.points, batch.seeds, 1)
    assert 0.01 < (bent - plain).abs().mean() < 0.05
    assert batch.views is not None
    still = {"colour_jitter": 0, "flip_probability": 0}
    whole = make_objective(**still).images(batch.views, batch.seeds)
    assert not torch.equal(make_objective(**still, least_window=0.5).images(batch.views, batch.seeds), whole)


def test_an_image_is_one_view_resized_and_normalised() -> None:
    objective, batch = make_objective(colour_jitter=0, flip_probability=0), make_batch()
    assert batch.views is not None
    images = objective.images(batch.views, batch.seeds)
    mean, deviation = (torch.tensor(each).view(3, 1, 1) for each in (RESNET_50.mean, RESNET_50.std))
    assert objective.batch_type.views_drawn == 1
    drawn = set()
    for row, image in enumerate(images):
        views = as_images(batch.views[row], 48, mean, deviation)
        (number,) = [number for number, view in enumerate(views) if torch.allclose(view, image, atol=1e-5)]
        drawn.add(number)
    assert len(drawn) > 1
    changed = make_objective().images(batch.views, batch.seeds)
    assert changed.shape == (4, 3, 48, 48) and not torch.allclose(changed, images)
    assert not torch.equal(make_objective().images(batch.views, batch.seeds + 1), changed)


def test_the_image_branch_has_as_many_parameters_as_the_paper_s() -> None:  # property 6
    trunk = build_trunk(RESNET_50)
    assert sum(parameter.numel() for parameter in trunk.parameters()) == 23_508_032
    assert trunk.head_hidden_size == 2048


def test_without_the_image_branch_the_student_learns_as_it_would_alone() -> None:
    batch = make_batch()
    alone, both = make_objective(cross_modal_weight=0), make_objective()
    assert alone.image_trunk is None and alone.batch_type.store_fields() == ("points",)
    for name, parameter in alone.named_parameters():
        assert torch.equal(parameter, both.get_parameter(name)), f"{name} starts elsewhere"
    narrow = alone.batch_type(batch.ids, batch.seeds, batch.points)
    found, expected = gradients(alone, narrow), gradients(both, batch, "intra_modal")
    assert all(torch.equal(gradient, expected[name]) for name, gradient in found.items())
    assert make_objective(intra_modal_weight=0)(batch).keys() == {"cross_modal"}


def test_one_sample_has_nothing_to_be_compared_with_and_stays_finite() -> None:  # trap 10
    objective, batch = make_objective(), make_batch(1)
    terms, found = objective(batch), gradients(objective, batch)
    assert terms["cross_modal"] == 0 and terms["intra_modal"] == 0
    assert all(gradient.isfinite().all() for gradient in found.values())


@pytest.mark.parametrize("length", [0.0, 1e-20, 1e18])
def test_projections_of_any_length_give_finite_losses_and_gradients(length: float) -> None:
    objective, batch = make_objective(), make_batch()
    assert objective.image_head is not None
    with torch.no_grad():
        for head in (objective.head, objective.image_head):
            for parameter in head[1].parameters():
                parameter.mul_(length)
    terms, found = objective(batch), gradients(objective, batch)
    assert all(value.isfinite().all() for value in (*terms.values(), *found.values()))


def test_under_autocast_geometry_and_loss_stay_float32() -> None:
    objective, batch = make_objective(), make_batch()
    seen: list[Tensor] = []
    objective.student.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    expected = objective(batch)
    with torch.autocast("cpu", torch.bfloat16):
        terms = objective(batch)
    assert torch.equal(*seen)
    for name, term in terms.items():
        assert term.dtype == torch.float32 and term.isfinite()
        torch.testing.assert_close(term, expected[name], rtol=0.05, atol=0.05)


def test_with_equal_projections_the_loss_is_the_logarithm_of_the_others() -> None:
    objective, batch = make_objective(), make_batch()
    assert objective.image_head is not None
    for head in (objective.head, objective.image_head):
        torch.nn.init.zeros_(head[1].weight)
    for name, term in objective(batch).items():  # points: their bias alone; images: zeros, as far from all as from each
        expected = math.log(7) if name == "intra_modal" else (math.log(4 + 3 * math.exp(10)) + math.log(7)) / 2
        assert term.item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_ranks_gives_the_loss_and_gradient_of_one_batch(world: int) -> None:  # property 8, trap 9
    parts = run_ranks(loss_and_gradients_of_this_rank, 8, world=world)
    objective = make_objective().eval()
    batch = make_batch(8)
    whole = {name: term.detach() for name, term in objective(batch).items()}, gradients(objective, batch)
    for expected, *found in zip(whole, *parts, strict=True):
        for name, value in expected.items():
            mean = torch.stack([part[name] for part in found]).mean(dim=0)  # as the engine averages
            torch.testing.assert_close(mean, value, rtol=1e-5, atol=1e-6, msg=name)


def test_a_run_that_accumulates_says_that_its_negatives_do_not(
    tiny_corpus: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    crosspoint = {"kind": "crosspoint", "image_trunk": TINY_TRUNK}
    student = {"kind": "pointnet", "width": 0.0625, "transforms": False}
    config = tiny_config(tiny_corpus.url, objective=crosspoint, student=student, steps=1)
    with caplog.at_level(logging.WARNING, "trainer.pretrain"):
        train(config, str(tmp_path / "run"))
    assert "'crosspoint' compares the samples of 8 at a time and not of the global batch of 16" in caplog.text


def test_the_recipes_have_the_published_rates() -> None:  # property 9, trap 2
    for job in ("crosspoint", "crosspoint_segmentation"):
        config = load_recipe(job, demo=False)
        schedule, lr = config.engine.schedule, config.engine.optimizer.lr
        rates = [lr_at(schedule, lr, 10 * epoch, 10, 1000) for epoch in range(100)]
        assert rates == pytest.approx([5e-4 * (1 + math.cos(math.pi * (e + 1) / 100)) for e in range(100)])
        assert rates[-1] == pytest.approx(0, abs=1e-18)
        exact = schedule.model_copy(update={"offset_epochs": 0})
        assert lr_at(exact, lr, 0, 10, 1000) == lr and lr_at(exact, lr, 999, 10, 1000) > 0


def test_the_recipes_train_the_published_networks() -> None:
    features = {"crosspoint": 2048, "crosspoint_segmentation": 1024}
    parameters = {"crosspoint": 617_856, "crosspoint_segmentation": 1_025_545}
    for job, width in features.items():
        config = load_recipe(job, demo=False)
        assert isinstance(config.objective, CrossPointConfig) and config.student is not None
        assert config.objective == CrossPointConfig()
        student = build_student(config.student)
        assert student.pooled_dim == width
        assert sum(parameter.numel() for parameter in student.parameters()) == parameters[job]
        assert config.engine.max_micro_batch >= config.global_batch, "it would accumulate"


def test_a_store_without_views_is_refused_where_images_are_compared() -> None:
    student = build_student({"kind": "pointnet", "width": 0.125, "transforms": False})
    corpus = dataclasses.replace(CORPUS, num_views=0)
    with pytest.raises(DoNotRetry, match=r"objective\.cross_modal_weight=0"):
        CrossPointConfig().build(student, corpus)
    CrossPointConfig(cross_modal_weight=0).build(student, corpus)


def test_nothing_to_learn_is_refused() -> None:
    with pytest.raises(ValidationError, match="nothing would be learned"):
        CrossPointConfig(intra_modal_weight=0, cross_modal_weight=0)
