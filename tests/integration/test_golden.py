"""A change that is meant to change no figure changes none: the first steps of every demo recipe, as they were written down."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.golden_curves import FILE, STEPS, curves, machine, make_corpus
from trainer.recipes import known_jobs

pytestmark = pytest.mark.slow

GOLDEN: dict[str, Any] = json.loads(FILE.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("golden")


@pytest.fixture(scope="module")
def store_url(folder: Path) -> str:
    return make_corpus(folder)


def test_every_demo_recipe_has_a_curve_of_finite_losses() -> None:
    assert set(GOLDEN["curves"]) == set(known_jobs(demo=True)), "write them anew: python -m tests.golden_curves"
    for job, steps in GOLDEN["curves"].items():
        assert len(steps) == STEPS, job
        assert all(abs(term) < 100 for terms in steps for term in terms.values()), job


@pytest.mark.parametrize("job", known_jobs(demo=True))
def test_a_recipe_s_first_steps_are_those_that_were_written_down(job: str, store_url: str, folder: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = curves(job, store_url, folder)
    finally:
        torch.set_num_threads(threads)
    if GOLDEN["machine"] == machine():
        assert found == GOLDEN["curves"][job], "not to the bit; if it is meant: python -m tests.golden_curves"
    for expected, terms in zip(GOLDEN["curves"][job], found, strict=True):
        # another processor or torch rounds otherwise, and a step passes that on to the next
        assert terms == pytest.approx(expected, rel=0.02, abs=0.02), job
