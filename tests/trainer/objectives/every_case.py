"""The cases of all objectives, and how a test builds one and trains it."""

import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from datastore.batch import Batch
from models.students import build_student
from tests.trainer.objectives.cases.case import Case
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


def batch_of(case: str) -> Any:
    """The case's batch, with what its setting reads and no more; all views, also where a stream would draw some."""
    whole, batch_type = CASES[case].batch(), build(case).batch_type
    assert isinstance(batch_type, type) and issubclass(batch_type, type(whole))
    return batch_type(**{name: getattr(whole, name) for name in ("ids", "seeds", *batch_type.store_fields())})


def part_of(batch: Batch, rows: slice | list[int]) -> Any:
    """Some samples of a batch."""
    return type(batch)(**{name: getattr(batch, name)[rows] for name in ("ids", "seeds", *batch.store_fields())})


def backward(
    objective: Objective[Any], batch: Batch, terms: Iterable[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Terms, and by parameter the gradients of all of them or of some."""
    objective.zero_grad()
    found = objective(batch)
    torch.stack([found[name] for name in (found if terms is None else terms)]).sum().backward()
    gradients = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    return {name: term.detach() for name, term in found.items()}, gradients
