"""Tests of trainer/objectives/i2p_mae.py."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from datastore.errors import DoNotRetry, MissingField
from models.image_models.projected_views import ProjectedViews, ProjectedViewsConfig, ProjectedWords
from models.students import build_student
from models.students.masked_transformer import MaskedTransformerConfig, propagate_visibility
from tests.trainer.objectives.cases.case import CORPUS, POINTS, SAMPLES
from tests.trainer.objectives.cases.i2p_mae import (
    CACHED,
    IMAGE_MODEL,
    ONLINE,
    STUDENT,
    TAUGHT,
    clouds,
    hard_batch,
    points_alone,
)
from trainer.augment import some_points
from trainer.objectives.base import Corpus, TaughtFields
from trainer.objectives.guided_masking import draw_visible, log_weights, num_masked
from trainer.objectives.i2p_mae import (
    I2PMAE,
    TEACHER_FIELDS,
    CachedI2PMAEBatch,
    I2PMAEBatch,
    I2PMAEConfig,
    OnlineTeacher,
    coordinates_loss,
    features_loss,
)

NO_AUGMENTATION: dict[str, Any] = {"scale_range": (1, 1), "shift": 0, "num_points": POINTS}


def build(corpus: Corpus = TAUGHT, **settings: Any) -> I2PMAE:
    torch.manual_seed(0)
    student = build_student(STUDENT)
    return I2PMAEConfig.model_validate(CACHED | settings).build(student, corpus).eval()


def online(**settings: Any) -> I2PMAE:
    return build(TAUGHT, **{"teacher": None} | ONLINE | settings)


def network_of(objective: I2PMAE) -> ProjectedViews:
    """The teacher that looks in every step."""
    assert isinstance(objective._teacher, OnlineTeacher)
    return objective._teacher._network.on(torch.device("cpu"))


def loss_of(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


def one_of(batch: I2PMAEBatch, index: int) -> Any:
    fields = (each.name for each in dataclasses.fields(batch))
    return type(batch)(**{name: getattr(batch, name)[index : index + 1] for name in fields})


def seen_by_student(objective: I2PMAE, batch: I2PMAEBatch) -> tuple[Tensor, Any, Any]:
    """The augmented points, their scales, and what of them is visible."""
    heard: list[Any] = []
    encode_visible = objective.student.encode_visible

    def listen(*arguments: Any) -> Any:
        heard.extend(arguments)
        return encode_visible(*arguments)

    objective.student.encode_visible = listen  # type: ignore[method-assign, assignment]
    with torch.no_grad():
        objective(batch)
    objective.student.encode_visible = encode_visible  # type: ignore[method-assign]
    return heard[0], heard[1], heard[2]


# ---- the network


def test_the_pre_training_student_has_as_many_parameters_as_published() -> None:
    sizes = {"view_tokens": (3, 196, 512), "view_saliency": (3, 196), "view_pixels": (8192, 3, 2)}
    corpus = dataclasses.replace(CORPUS, teachers={"clip": TaughtFields(224, sizes)})
    with torch.device("meta"):
        student = MaskedTransformerConfig().build()
        objective = I2PMAEConfig(teacher_mode="cached", teacher="clip").build(student, corpus)
        without = I2PMAEConfig(teacher_mode="cached", teacher="clip", features_weight=0).build(student, corpus)
    assert sum(parameter.numel() for parameter in objective.parameters()) == 17_622_808
    assert sum(parameter.numel() for parameter in without.parameters()) == 15_251_224  # Point-M2AE
    assert objective.encoder is student


def test_the_svm_s_feature_is_the_maximum_of_the_coarsest_tokens_after_their_norm() -> None:
    with torch.device("meta"):
        assert MaskedTransformerConfig().build().pooled_dim == 384
    student, points = build().student, clouds()
    with torch.no_grad():
        tokens = student.encode_visible(points, student.group(points))[-1]
        torch.testing.assert_close(student(points).pooled, tokens.amax(dim=1))


# ---- what is masked


def test_a_token_is_visible_where_a_parent_is_and_nowhere_else_in_every_cloud() -> None:
    """The official code lets masked parents show the first token of the batch's first cloud."""
    _, scales, visible = seen_by_student(build(), hard_batch())
    assert (visible[2].sum(dim=1) == 2).all()
    for finer, coarser, scale in ((0, 1, scales[1]), (1, 2, scales[2])):
        for cloud in range(SAMPLES):
            children = set(scale.neighbours[cloud][visible[coarser][cloud]].flatten().tolist())
            assert set(visible[finer][cloud].nonzero().flatten().tolist()) == children
    shares = [visible[scale].double().mean() for scale in (2, 1, 0)]
    assert shares[0] < shares[1]
    assert len({int(mask.sum()) for mask in visible[1]}) > 1, "the batch should be ragged"


def test_published_sizes_mask_51_of_64_tokens_and_leave_a_third_and_three_fifths_of_the_finer_visible() -> None:
    with torch.device("meta"):
        student = MaskedTransformerConfig().build()
    random = torch.Generator().manual_seed(0)
    points = nn.functional.normalize(torch.randn(4, 2048, 3, generator=random), dim=2)
    scales = student.group(points)
    drawn = draw_visible(log_weights(torch.zeros(4, 64)), torch.arange(4), 64 - num_masked(64, 0.8))
    counts = [mask.sum(dim=1) for mask in propagate_visibility(scales, drawn)]
    assert (counts[2] == 13).all()
    assert (counts[1] > 75).all() and (counts[1] < 105).all()
    assert (counts[0] > 220).all() and (counts[0] < 380).all()


def test_guidance_is_a_softmax_without_temperature_unless_asked_otherwise() -> None:
    config = I2PMAEConfig(teacher_mode="cached", teacher="clip")
    assert config.temperature == 1 and not config.standardise_saliency
    entropies = []
    for settings in ({}, {"temperature": 0.01}, {"standardise_saliency": True}):
        objective = build(**settings)
        objective(hard_batch())
        entropies.append(float(objective.figures["masking_entropy"]))
    assert entropies[0] == pytest.approx(math.log(6), abs=1e-2)
    assert entropies[1] < entropies[0] - 0.1 and entropies[2] < entropies[0] - 0.1
    assert 0 < float(objective.figures["visible_of_finest"]) < 1


def test_points_that_the_teacher_attends_to_stay_visible() -> None:
    """All attention on the right half of the images; of each point's three pixels two are far to the left."""
    batch = hard_batch()
    pixels = torch.zeros_like(batch.view_pixels)
    pixels[:, :, 0, 0] = torch.where(batch.points[:, :, 0] > 0, 31, 0).short()
    saliency = torch.zeros(SAMPLES, 3, 2, 2)
    saliency[:, :, :, 1] = 90
    batch = dataclasses.replace(batch, view_pixels=pixels, view_saliency=saliency.flatten(2).half())
    _, scales, visible = seen_by_student(build(**NO_AUGMENTATION), batch)
    order = some_points(batch.seeds, POINTS, POINTS).gather(1, scales[2].indices)
    is_right = batch.points[:, :, 0].gather(1, order) > 0
    for cloud in range(SAMPLES):
        attended = is_right[cloud]
        expected = min(2, int(attended.sum()))
        assert int((visible[2][cloud] & attended).sum()) == expected


# ---- the data


def test_clouds_are_scaled_and_moved_along_their_axes_and_never_turned() -> None:
    """The official loop computes a rotation and drops it."""
    batch = hard_batch()
    points, _, _ = seen_by_student(build(), batch)
    chosen = some_points(batch.seeds, POINTS, 24)
    for cloud in range(SAMPLES):
        before = batch.points[cloud, chosen[cloud]].double()
        before = before - before.mean(dim=0)
        before = before / before.norm(dim=1).max()
        for axis in range(3):
            columns = torch.stack([before[:, axis], torch.ones(24, dtype=torch.float64)], dim=1)
            fitted = torch.linalg.lstsq(columns, points[cloud, :, axis].double()).solution
            torch.testing.assert_close(columns @ fitted, points[cloud, :, axis].double(), rtol=0, atol=1e-5)
            assert 2 / 3 - 1e-5 <= fitted[0] <= 3 / 2 + 1e-5 and abs(fitted[1]) <= 0.2 + 1e-5


# ---- the losses


def test_the_coordinates_loss_is_chamfer_s_squared_in_both_directions() -> None:
    random = torch.Generator().manual_seed(0)
    predicted, places = torch.randn(2, 5, 8, 3, generator=random)
    between = (predicted[:, :, None] - places[:, None]).square().sum(dim=3)
    expected = between.amin(dim=2).mean() + between.amin(dim=1).mean()
    torch.testing.assert_close(coordinates_loss(predicted, places), expected)
    assert float(coordinates_loss(places, places)) == 0
    shuffled = places[:, torch.randperm(8, generator=random)]
    assert float(coordinates_loss(shuffled, places)) == 0
    torch.testing.assert_close(coordinates_loss(predicted, shuffled), expected)
    doubled = places.clone()
    doubled[0, 0] = doubled[0, 1]  # a place that nothing predicts
    assert float(coordinates_loss(doubled, places)) > 0


def test_losses_over_no_tokens_are_zero_with_zero_gradients() -> None:
    for loss, shape in ((coordinates_loss, (0, 8, 3)), (features_loss, (0, 8, 24))):
        head = nn.Linear(4, math.prod(shape[1:]))
        value = loss(head(torch.zeros(0, 4)).unflatten(1, shape[1:]), torch.zeros(shape))
        (gradient,) = torch.autograd.grad(value, [head.weight])
        assert float(value.detach()) == 0 and not gradient.any()


def test_coordinates_are_asked_of_masked_tokens_alone_and_features_of_visible_ones() -> None:
    objective, batch = build(), hard_batch()
    _, _, visible = seen_by_student(objective, batch)
    decoded: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        decoded.append(output)

    objective.decoder.register_forward_hook(keep)
    terms = objective(batch)
    for term, asked in (("coordinates", ~visible[1]), ("features", visible[1])):
        (gradient,) = torch.autograd.grad(terms[term], decoded, retain_graph=True)
        reached = gradient.abs().sum(dim=2) > 0
        assert torch.equal(reached, asked), term


def test_terms_are_means_over_tokens_whatever_else_is_in_the_batch() -> None:
    """So a cloud with more visible tokens weighs more, and no cloud depends on the padding that others make it need."""
    objective, batch = build(), hard_batch()
    with torch.no_grad():
        together = objective(batch)
    _, _, visible = seen_by_student(objective, batch)
    for term, counted in (("coordinates", ~visible[1]), ("features", visible[1])):
        counts = counted.sum(dim=1).double()
        with torch.no_grad():
            alone = torch.stack([objective(one_of(batch, index))[term] for index in range(SAMPLES)])
        torch.testing.assert_close(
            together[term].double(), (alone * counts).sum() / counts.sum(), rtol=1e-5, atol=1e-6, msg=term
        )


def test_weights_scale_their_terms() -> None:
    batch = hard_batch()
    with torch.no_grad():
        terms = build()(batch)
        doubled = build(coordinates_weight=2, features_weight=3)(batch)
    torch.testing.assert_close(doubled["coordinates"], 2 * terms["coordinates"])
    torch.testing.assert_close(doubled["features"], 3 * terms["features"])


@pytest.mark.parametrize(
    "points",
    [
        torch.zeros(1, POINTS, 3),
        torch.ones(1, POINTS, 3),
        torch.randn(1, POINTS, 3) * 1e-6,
        torch.eye(3).repeat(11, 1)[None, :POINTS],
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_one_cloud_of_coincident_points_and_constant_saliency_is_finite(points: Tensor, training: bool) -> None:
    for objective, batch in ((build(), one_of(hard_batch(), 0)), (online(), one_of(points_alone(), 0))):
        batch = dataclasses.replace(batch, points=points)
        if isinstance(batch, CachedI2PMAEBatch):
            batch = dataclasses.replace(batch, view_saliency=torch.zeros_like(batch.view_saliency))
        terms = objective.train(training)(batch)
        torch.autograd.backward(loss_of(terms))
        assert all(term.isfinite() for term in terms.values())
        assert all(p.grad is None or p.grad.isfinite().all() for p in objective.parameters())


def test_padding_stays_finite_under_autocast_and_losses_stay_float32() -> None:
    """An additive mask of -1e5 is minus infinity in float16; ours are boolean."""
    objective, batch = build(), hard_batch()
    exact = objective(batch)
    with torch.autocast("cpu", torch.bfloat16):
        terms = objective(batch)
    torch.autograd.backward(loss_of(terms))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())
    for name, term in terms.items():
        assert term.dtype == torch.float32
        torch.testing.assert_close(term, exact[name], rtol=0.05, atol=0.05)


# ---- the teacher


def test_cached_is_online_where_nothing_is_augmented() -> None:
    """All points, in an order of their own, as they are: the store's float16 is all that differs."""
    points = clouds()
    network = ProjectedViewsConfig.model_validate(IMAGE_MODEL | {"num_drawn": None})
    torch.manual_seed(3)
    teacher = network.build().eval()
    with torch.no_grad():
        taught = teacher.teach(points, TEACHER_FIELDS)
    cached_batch = CachedI2PMAEBatch(
        torch.arange(SAMPLES),
        torch.arange(SAMPLES) * 7,
        points,
        taught["view_tokens"].half(),
        taught["view_saliency"].half(),
        taught["view_pixels"],
    )
    cached, fresh = build(**NO_AUGMENTATION), online(**NO_AUGMENTATION)
    network_of(fresh).load_state_dict(teacher.state_dict())
    fresh.load_state_dict(cached.state_dict())
    masks = [
        seen_by_student(objective, batch)[2] for objective, batch in ((cached, cached_batch), (fresh, points_alone()))
    ]
    for remembered, looked in zip(*masks, strict=True):
        assert torch.equal(remembered, looked)
    with torch.no_grad():
        expected = fresh(points_alone())
        for name, term in cached(cached_batch).items():
            torch.testing.assert_close(term, expected[name], rtol=1e-3, atol=1e-4)


def test_augmented_points_look_up_the_pixels_that_they_had() -> None:
    """Maps that say which pixel they were read at: one patch, so that every pixel of a view says the same."""
    objective, batch = build(), hard_batch()
    chosen = some_points(batch.seeds, POINTS, 24)
    words = objective._teacher.look(batch, chosen, batch.points[:, :24])
    for cloud in range(SAMPLES):
        assert torch.equal(words.pixels[cloud], batch.view_pixels[cloud, chosen[cloud]].long())
    assert words.tokens is batch.view_tokens or torch.equal(words.tokens, batch.view_tokens)


def test_the_online_teacher_looks_at_the_augmented_cloud() -> None:
    objective, batch = online(), points_alone()
    points, _, _ = seen_by_student(objective, batch)
    looked: list[Tensor] = []
    network = network_of(objective)
    look = network.look

    def listen(clouds: Tensor) -> ProjectedWords:
        looked.append(clouds)
        return look(clouds)

    network.look = listen  # type: ignore[method-assign, assignment]
    objective(batch)
    assert torch.equal(looked[0], points)


def test_the_teacher_neither_trains_nor_changes_while_the_student_does() -> None:
    objective, batch = online().train(), points_alone()
    network = network_of(objective)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    optimizer = torch.optim.AdamW(objective.parameters(), lr=0.1)
    torch.autograd.backward(loss_of(objective(batch)))
    optimizer.step()
    assert not any(module.training for module in network.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in network.parameters())
    owned = {id(parameter) for parameter in objective.parameters()}
    assert not any(id(parameter) in owned for parameter in network.parameters())


def test_an_online_teacher_without_weights_is_refused_unless_that_is_said() -> None:
    with pytest.raises(DoNotRetry, match=r"objective\.image_model\.trunk\.weights=FILE"):
        online(random_teacher=False)


def test_a_store_that_lacks_what_was_cached_says_how_to_write_it() -> None:
    with pytest.raises(
        MissingField, match=r"viewpoint cache STORE --teacher teacher .*view_tokens view_saliency view_pixels"
    ):
        build(CORPUS)
    some = dataclasses.replace(CORPUS, teachers={"teacher": TaughtFields(32, {"view_tokens": (3, 4, 8)})})
    with pytest.raises(MissingField, match="no view_saliency, view_pixels of teacher"):
        build(some)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"teacher_mode": "cached"}, "give 'teacher'"),
        ({"teacher_mode": "online", "teacher": "clip", "network": "there"}, "give 'teacher'"),
        ({"teacher_mode": "online"}, "one of 'image_model' and 'network'"),
        ({"teacher_mode": "online", "network": "there", "image_model": {}}, "one of 'image_model' and 'network'"),
        ({"teacher_mode": "cached", "teacher": "clip", "network": "there"}, "one of 'image_model' and 'network'"),
        ({"teacher_mode": "cached", "teacher": "clip", "features_weight": 0, "coordinates_weight": 0}, "nothing would"),
        ({"teacher_mode": "cached", "teacher": "clip", "mask_ratio": 1.0}, "less than 1"),
        ({"teacher_mode": "cached", "teacher": "clip", "temperature": 0}, "greater than 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        I2PMAEConfig.model_validate(settings)
