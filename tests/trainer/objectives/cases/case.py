"""What the tests of every objective need to know of one: one file here lists the cases of each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from datastore.batch import Batch
from trainer.objectives.base import Corpus

CLASSES: Final = 3
VIEWS: Final = 4
SAMPLES: Final = 8  # of which four ranks have two each
POINTS: Final = 32
WIDTH: Final = 16  # of the teacher's features

CORPUS: Final = Corpus(
    class_names=tuple(f"class {k}" for k in range(CLASSES)),
    num_views=VIEWS,
    image_size=32,
    teacher_dims={"teacher": WIDTH},
)


@dataclass(frozen=True)
class Case:
    """One setting of an objective, and a batch that is hard on it: unequal shares, empty views, missing labels."""

    config: Mapping[str, Any]
    batch: Callable[[], Batch]
    student: Mapping[str, Any] = field(default_factory=lambda: {"kind": "pointnet", "width": 0.125})
    corpus: Corpus = CORPUS
    unread: frozenset[str] = frozenset()  # parameters that the published network has and nothing reads
