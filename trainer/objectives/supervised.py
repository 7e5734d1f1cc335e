"""Supervised: labels alone, of shapes or of their points. The baseline that methods are compared with, and fine-tuning."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Float32, Int16, Int64
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from datastore.batch import Batch
from datastore.errors import DoNotRetry
from models.encoding import Encoding, PointEncoder
from models.heads import classification_head, part_segmentation_head
from trainer.augment import scale_and_shift
from trainer.objectives.base import Corpus, Objective, Terms
from trainer.objectives.means import UNLABELLED, rank_share, smoothed_cross_entropy


class SupervisedConfig(BaseModel, extra="forbid", frozen=True):
    """The augmentation and the smoothing of PointMCD's classification; its own baseline is its recipe with alignment_weight 0."""

    kind: Literal["supervised"] = "supervised"
    needs_student: ClassVar[bool] = True

    task: Literal["classification", "parts"] = "classification"
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
        num_classes, num_parts = len(corpus.class_names), len(corpus.part_names)
        if not num_classes:
            raise DoNotRetry(
                "Objective 'supervised' learns from labels, but the store names no classes. Ingest a source that has "
                "them, or choose an objective without labels, such as crosspoint."
            )
        self.head: nn.Module
        if config.task == "classification":
            self.head = classification_head(student.pooled_dim, num_classes)
            self.batch_type = SupervisedBatch.without("part_labels")
        else:
            if not num_parts:
                raise DoNotRetry(
                    "Objective 'supervised' with task 'parts' learns from labels of points, but the store names no "
                    "parts. Ingest a source that has them, or --set objective.task=classification."
                )
            self.head = part_segmentation_head(student, num_classes, num_parts)
            self.batch_type = SupervisedBatch

    @property
    def encoder(self) -> PointEncoder:
        """The student."""
        return self.student

    def forward(self, batch: SupervisedBatch) -> Terms:
        config = self.config
        encoding = self.student(scale_and_shift(batch.points, batch.seeds, config.scale_range, config.shift))
        logits, labels = self.predictions(encoding, batch)
        share = rank_share((labels != UNLABELLED).sum())
        terms: Terms = {"task": share * smoothed_cross_entropy(logits, labels, config.label_smoothing)}
        if encoding.penalty is not None and config.transform_penalty_weight > 0:
            terms["transform_penalty"] = config.transform_penalty_weight * encoding.penalty
        return terms

    def predictions(
        self, encoding: Encoding, batch: SupervisedBatch
    ) -> tuple[Float[Tensor, "r k"], Int64[Tensor, " r"]]:
        """Logits and labels, one row for each shape or, of parts, for each point."""
        if self.config.task == "classification":
            return self.head(encoding.pooled), batch.label
        assert batch.part_labels is not None
        logits = self.head(encoding, batch.label.clamp(min=0))
        # the head is told the category, so that without one nothing can be asked of it
        labels = torch.where(batch.label[:, None] != UNLABELLED, batch.part_labels.long(), UNLABELLED)
        return logits.flatten(0, 1), labels.flatten()
