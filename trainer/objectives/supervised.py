"""Supervised: labels alone, of shapes or of their points. The baseline that methods are compared with, and fine-tuning."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float32, Int16, Int64
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from datastore.batch import Batch
from models.encoding import PointEncoder
from trainer.augment import scale_and_shift
from trainer.objectives.base import Corpus, Objective, Terms
from trainer.objectives.means import UNLABELLED, rank_share, smoothed_cross_entropy
from trainer.objectives.task import Task, predictions, task_head


class SupervisedConfig(BaseModel, extra="forbid", frozen=True):
    """The augmentation and the smoothing of PointMCD's classification; its own baseline is its recipe with alignment_weight 0."""

    kind: Literal["supervised"] = "supervised"
    needs_student: ClassVar[bool] = True

    task: Task = "classification"
    label_smoothing: float = Field(default=0.2, ge=0, lt=1)
    transform_penalty_weight: NonNegativeFloat = 0.001  # of students that have one
    scale_range: tuple[PositiveFloat, PositiveFloat] = (2 / 3, 3 / 2)  # (1, 1) and shift 0: points as they are
    shift: NonNegativeFloat = 0.2

    def build(self, student: PointEncoder | None, corpus: Corpus) -> "Supervised":
        """The objective around a student, sized for a corpus."""
        assert student is not None, "RunConfig checks needs_student"
        return Supervised(self, student, corpus)


@dataclass(frozen=True)
class SupervisedBatch(Batch):
    points: Float32[Tensor, "b n 3"]
    label: Int64[Tensor, " b"]  # of parts, the shape's category
    part_labels: Int16[Tensor, "b n"] | None = None  # of task parts


class Supervised(Objective[SupervisedBatch]):
    """Terms: `task`, and `transform_penalty` where its weight is not 0 and the student has one."""

    def __init__(self, config: SupervisedConfig, student: PointEncoder, corpus: Corpus) -> None:
        super().__init__()
        self.config = config
        self.student = student
        self.head = task_head(
            config.task, student, corpus, objective="supervised",
            without_labels="choose an objective without labels, such as crosspoint",
        )  # fmt: skip
        self.batch_type = SupervisedBatch if config.task == "parts" else SupervisedBatch.without("part_labels")

    @property
    def encoder(self) -> PointEncoder:
        """The student."""
        return self.student

    def forward(self, batch: SupervisedBatch) -> Terms:
        config = self.config
        encoding = self.student(scale_and_shift(batch.points, batch.seeds, config.scale_range, config.shift))
        logits, labels = predictions(config.task, self.head, encoding, batch.label, batch.part_labels)
        share = rank_share((labels != UNLABELLED).sum())
        terms: Terms = {"task": share * smoothed_cross_entropy(logits, labels, config.label_smoothing)}
        if encoding.penalty is not None and config.transform_penalty_weight > 0:
            terms["transform_penalty"] = config.transform_penalty_weight * encoding.penalty
        return terms
