"""What holds for every objective. A new one adds a file to `cases/`."""

import dataclasses
import importlib
import pkgutil
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch import Tensor

from datastore.batch import Batch
from datastore.schema import FIELDS
from models.students import build_student
from tests.ranks import run_ranks
from tests.trainer.objectives.cases.case import SAMPLES, Case
from trainer.objectives import ObjectiveConfig
from trainer.objectives.base import Objective

CASES: dict[str, Case] = {
    name: case
    for found in pkgutil.iter_modules(importlib.import_module("tests.trainer.objectives.cases").__path__)
    if found.name != "case"
    for name, case in importlib.import_module(f"tests.trainer.objectives.cases.{found.name}").CASES.items()
}


def build(case: str) -> Objective[Any]:
    """The same weights every time, in eval mode: batch statistics would tie samples together."""
    torch.manual_seed(0)
    config: Any = TypeAdapter(ObjectiveConfig).validate_python(CASES[case].config)
    student = build_student(CASES[case].student) if config.needs_student else None
    objective: Objective[Any] = config.build(student, CASES[case].corpus).eval()
    for name, parameter in objective.named_parameters():
        if not parameter.any() and name.endswith("weight"):  # image networks begin with residual branches switched off
            torch.nn.init.ones_(parameter)
    return objective


def backward(objective: Objective[Any], batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Terms, and gradients by parameter."""
    objective.zero_grad()
    terms = objective(batch)
    torch.stack(list(terms.values())).sum().backward()
    gradients = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    return {name: term.detach() for name, term in terms.items()}, gradients


def batch_of(case: str) -> Any:
    """The case's batch, with what its setting reads and no more."""
    whole, batch_type = CASES[case].batch(), build(case).batch_type
    assert isinstance(batch_type, type) and issubclass(batch_type, type(whole))
    return batch_type(**{name: getattr(whole, name) for name in ("ids", "seeds", *batch_type.store_fields())})


def part_of(batch: Batch, rows: slice) -> Any:
    return type(batch)(**{name: getattr(batch, name)[rows] for name in ("ids", "seeds", *batch.store_fields())})


def terms_and_gradients_of_this_rank() -> dict[str, Any]:
    rank, half = dist.get_rank(), SAMPLES // 2
    return {
        name: backward(build(name), part_of(batch_of(name), slice(rank * half, (rank + 1) * half))) for name in CASES
    }


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
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.05)
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
    order: Any = [3, 0, 5, 1, 2, 4]
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


def test_half_a_batch_on_each_of_two_ranks_is_the_whole_batch_on_one() -> None:
    ranks = run_ranks(terms_and_gradients_of_this_rank)
    for case in CASES:
        whole = backward(build(case), batch_of(case))
        for expected, *parts in zip(whole, *(rank[case] for rank in ranks), strict=True):
            assert parts[0].keys() == parts[1].keys() == expected.keys(), case
            for name, value in expected.items():
                mean = (parts[0][name] + parts[1][name]) / 2  # as the engine averages
                torch.testing.assert_close(mean, value, rtol=1e-4, atol=1e-6, msg=f"{case}: {name}")


@pytest.mark.parametrize("case", CASES)
def test_the_batch_names_fields_of_the_store(case: str) -> None:
    assert set(build(case).batch_type.store_fields()) <= FIELDS.keys()


def test_every_objective_of_the_union_has_a_case() -> None:
    kinds = {config.model_fields["kind"].default for config in get_args(get_args(ObjectiveConfig)[0])}
    assert kinds == {case.config["kind"] for case in CASES.values()}
