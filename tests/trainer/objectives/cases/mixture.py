"""A mixture of contrast and labels: terms of ranks with unequal numbers of labels beside negatives of all ranks."""

from datastore.batch import Batch
from tests.trainer.objectives.cases import crosspoint, pointmcd
from tests.trainer.objectives.cases.case import Case


def hard_batch() -> Batch:
    """The fields of both parts; which class a mixture reads them as is its own affair."""
    both = vars(crosspoint.hard_batch()) | vars(pointmcd.hard_batch())
    batch = Batch(both["ids"], both["seeds"])
    for name, tensor in both.items():
        object.__setattr__(batch, name, tensor)
    return batch


PARTS = {
    "contrast": {"weight": 0.5, "objective": crosspoint.CONFIG},
    "distil": {"objective": {"kind": "pointmcd", "teacher": "teacher"}},
}
CASES = {"mixture": Case({"kind": "mixture", "parts": PARTS}, hard_batch)}
