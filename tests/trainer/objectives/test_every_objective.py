"""What holds for every objective. A new one adds a file to `cases/`."""

import dataclasses
from typing import get_args

import pytest
import torch

from datastore.schema import FIELDS
from tests.trainer.objectives.cases.case import POINTS, SAMPLES
from tests.trainer.objectives.every_case import CASES, backward, batch_of, build, part_of
from trainer.numerics import exact_float32
from trainer.objectives import ObjectiveConfig


@pytest.mark.parametrize("case", CASES)
def test_gradient_reaches_every_parameter(case: str) -> None:
    objective = build(case)
    _, gradients = backward(objective, batch_of(case))
    for name, _ in objective.named_parameters():
        assert name in gradients and torch.isfinite(gradients[name]).all(), name
        assert bool(gradients[name].any()) is not (name in CASES[case].unread), name


@pytest.mark.parametrize("case", CASES)
def test_nothing_reaches_the_data(case: str) -> None:
    batch = batch_of(case)
    tensors = {name: getattr(batch, name) for name in batch.store_fields()}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and name != "points":
            tensor.requires_grad_()
    backward(build(case), batch)
    for name, tensor in tensors.items():
        assert tensor.grad is None and torch.equal(tensor.detach(), before[name]), name


@pytest.mark.parametrize("case", CASES)
def test_terms_are_weighted_float32_scalars_that_a_training_step_lowers(case: str) -> None:
    objective, batch = build(case).train(), batch_of(case)
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.02)
    losses = []
    for _ in range(8):
        terms, _ = backward(objective, batch)
        assert all(term.shape == () and term.dtype == torch.float32 for term in terms.values())
        losses.append(torch.stack(list(terms.values())).sum().item())
        optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("case", CASES)
def test_the_same_batch_gives_the_same_terms_and_gradients_to_the_bit(case: str) -> None:
    batch = batch_of(case)
    first, second = backward(build(case).train(), batch), backward(build(case).train(), batch)
    for before, after in zip(first, second, strict=True):
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("case", CASES)
def test_the_order_of_samples_does_not_matter(case: str) -> None:
    batch, objective = batch_of(case), build(case)
    order = [3, 0, 5, 7, 1, 2, 6, 4]
    expected = backward(objective, batch)[0]
    for name, term in backward(objective, part_of(batch, order))[0].items():
        torch.testing.assert_close(term, expected[name])


@pytest.mark.parametrize("case", CASES)
def test_a_batch_without_labels_is_finite(case: str) -> None:
    batch = batch_of(case)
    if "label" in batch.store_fields():
        batch = dataclasses.replace(batch, label=torch.full((SAMPLES,), -1))
    terms, gradients = backward(build(case).train(), batch)
    assert all(torch.isfinite(value).all() for value in (*terms.values(), *gradients.values()))


@pytest.mark.parametrize("case", CASES)
def test_a_single_sample_is_finite(case: str) -> None:
    terms, gradients = backward(build(case).train(), part_of(batch_of(case), slice(0, 1)))
    assert all(torch.isfinite(value).all() for value in (*terms.values(), *gradients.values()))


@pytest.mark.parametrize("case", [case for case in CASES if "points" in batch_of(case).store_fields()])
def test_clouds_of_one_place_are_finite(case: str) -> None:
    batch = batch_of(case)
    batch = dataclasses.replace(batch, points=batch.points[:, :1].expand(-1, POINTS, -1).contiguous())
    terms, gradients = backward(build(case).train(), batch)
    assert all(torch.isfinite(value).all() for value in (*terms.values(), *gradients.values()))
    assert all(abs(value) < 1e3 for value in terms.values())


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "relative"), [(torch.float32, 2e-3), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("case", CASES)
def test_a_step_on_a_gpu_is_finite_and_near_the_cpu_s(case: str, precision: torch.dtype, relative: float) -> None:
    exact_float32()
    expected, _ = backward(build(case).train(), batch_of(case))
    device = torch.device("cuda")
    objective = build(case).train().to(device)
    objective.forward = torch.autocast("cuda", precision, enabled=precision is not torch.float32)(objective.forward)  # type: ignore[method-assign]
    terms, gradients = backward(objective, batch_of(case).to(device))
    assert all(torch.isfinite(value).all() for value in (*terms.values(), *gradients.values()))
    for name, term in terms.items():
        assert term.dtype == torch.float32
        torch.testing.assert_close(term.cpu(), expected[name], rtol=relative, atol=relative / 10)


@pytest.mark.parametrize("case", CASES)
def test_the_batch_names_fields_of_the_store(case: str) -> None:
    assert set(build(case).batch_type.store_fields()) <= FIELDS.keys()


def test_every_objective_of_the_union_has_a_case() -> None:
    kinds = {config.model_fields["kind"].default for config in get_args(get_args(ObjectiveConfig)[0])}
    assert kinds == {case.config["kind"] for case in CASES.values()}
