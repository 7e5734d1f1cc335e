"""PointMCD: what a view sees of the points is taught to match what an image network saw in that view.

"PointMCD: Boosting Deep Point Cloud Encoders via Multi-view Cross-modal Distillation" (IEEE TMM 2023). For each view,
the maximum over the embeddings of the points visible in it is projected and pulled towards the teacher's descriptor of
that view. Its three settings are one objective: classification; part segmentation (`task: parts`); and training without
labels (task_weight and transform_penalty_weight 0).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Float32, Int16, Int64
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor, nn

from datastore.batch import Batch
from models.encoding import Encoding, PointEncoder
from models.heads import Projection
from models.ops.view_pooling import masked_view_max
from trainer.augment import scale_and_shift
from trainer.objectives.base import Corpus, Objective, Terms
from trainer.objectives.means import UNLABELLED, rank_share, smoothed_cross_entropy
from trainer.objectives.task import Task, predictions, task_head
from trainer.objectives.view_features import feature_width


class PointMCDConfig(BaseModel, extra="forbid", frozen=True):
    """The defaults are the official classification setting with a PointNet student."""

    kind: Literal["pointmcd"] = "pointmcd"
    needs_student: ClassVar[bool] = True

    teacher: str
    task: Task = "classification"
    alignment_weight: NonNegativeFloat = 1.0  # 0: no alignment branch is built
    task_weight: NonNegativeFloat = 0.1  # 1 for the part-segmentation DGCNN; 0: no labels are used
    label_smoothing: float = Field(0.2, ge=0, lt=1)  # part segmentation with PointNet: 0.05
    transform_penalty_weight: NonNegativeFloat = 0.001  # of students that have one; part segmentation: 0
    # Differs from the paper's code, which lets the zero vector of a view that sees nothing through the projection and
    # counts its distance; True restores that. For closed shapes, no view is empty and both are the same.
    count_empty_views: bool = False
    scale_range: tuple[PositiveFloat, PositiveFloat] = (2 / 3, 3 / 2)  # part segmentation: 0.8, 1.2
    shift: NonNegativeFloat = 0.2  # part segmentation: 0.1

    @model_validator(mode="after")
    def _trains_something(self) -> "PointMCDConfig":
        if self.alignment_weight == 0 and self.task_weight == 0:
            raise ValueError("alignment_weight and task_weight are both 0: nothing would be learned")
        return self

    @property
    def teacher_fields(self) -> tuple[str, ...]:
        """What the store must hold of the teacher."""
        return ("view_features",) if self.alignment_weight > 0 else ()

    def build(self, student: PointEncoder | None, corpus: Corpus) -> "PointMCD":
        """The objective around a student, sized for a corpus."""
        assert student is not None, "RunConfig checks needs_student"
        return PointMCD(self, student, corpus)


@dataclass(frozen=True)
class PointMCDBatch(Batch):
    points: Float32[Tensor, "b n 3"]
    visibility: Bool[Tensor, "b n v"] | None = None  # with an alignment weight
    label: Int64[Tensor, " b"] | None = None  # with a task weight; of parts, the shape's category
    view_features: Float[Tensor, "b v d"] | None = None  # with an alignment weight
    part_labels: Int16[Tensor, "b n"] | None = None  # of task parts


class PointMCD(Objective[PointMCDBatch]):
    """Terms: `task`, `alignment`, `transform_penalty`, each only where its weight is not 0."""

    def __init__(self, config: PointMCDConfig, student: PointEncoder, corpus: Corpus) -> None:
        super().__init__()
        self.config = config
        self.student = student
        unread = {"part_labels"} if config.task == "classification" else set()
        # The head before the projection: a run without alignment starts from the same random weights
        self.head: nn.Module | None = None
        if config.task_weight > 0:
            self.head = task_head(
                config.task, student, corpus, objective="pointmcd",
                without_labels="train without labels (--set objective.task_weight=0)",
            )  # fmt: skip
        else:
            unread |= {"label", "part_labels"}
        self.projection = None
        if config.alignment_weight > 0:
            width = feature_width(config.teacher, corpus, "pointmcd")
            self.projection = Projection(student.per_point_dim, width)
        else:
            unread |= {"visibility", "view_features"}
        self.batch_type = PointMCDBatch.without(*sorted(unread)) if unread else PointMCDBatch

    @property
    def encoder(self) -> PointEncoder:
        """The student."""
        return self.student

    def forward(self, batch: PointMCDBatch) -> Terms:
        config = self.config
        encoding = self.student(scale_and_shift(batch.points, batch.seeds, config.scale_range, config.shift))
        terms: Terms = {}
        if self.head is not None:
            assert batch.label is not None, "batch_type asks for it"
            logits, labels = predictions(config.task, self.head, encoding, batch.label, batch.part_labels)
            task = smoothed_cross_entropy(logits, labels, config.label_smoothing)
            terms["task"] = config.task_weight * rank_share((labels != UNLABELLED).sum()) * task
        if self.projection is not None:
            predicted, target = self.descriptors(encoding, batch)
            share = rank_share(torch.tensor(len(target), device=target.device))
            terms["alignment"] = config.alignment_weight * share * alignment_loss(predicted, target)
        if encoding.penalty is not None and config.transform_penalty_weight > 0:
            terms["transform_penalty"] = config.transform_penalty_weight * encoding.penalty
        return terms

    def classify(self, points: Float32[Tensor, "b n 3"]) -> Float[Tensor, "b k"]:
        """Class logits, from points alone."""
        assert self.head is not None and self.config.task == "classification", "there is no such head otherwise"
        logits: Tensor = self.head(self.student(points).pooled)
        return logits

    def descriptors(
        self, encoding: Encoding, batch: PointMCDBatch
    ) -> tuple[Float[Tensor, "r d"], Float[Tensor, "r d"]]:
        """The student's descriptor and the teacher's, one row for each view that counts."""
        visibility, features = batch.visibility, batch.view_features
        assert self.projection is not None and visibility is not None and features is not None
        if encoding.indices is not None:  # a hierarchical student: the visibility of the points that survived
            visibility = visibility.gather(1, encoding.indices[..., None].expand(-1, -1, visibility.shape[2]))
        seen, empty = masked_view_max(encoding.per_point, visibility)
        target = features.detach()
        if self.config.count_empty_views:
            seen, target = seen.flatten(0, 1), target.flatten(0, 1)
        else:
            seen, target = seen[~empty], target[~empty]
        return self.projection(seen), target


def alignment_loss(predicted: Float[Tensor, "r d"], target: Float[Tensor, "r d"]) -> Float32[Tensor, ""]:
    """The mean absolute difference over views and channels; zero, with zero gradient, where there is no view."""
    total = (predicted.float() - target.float()).abs().sum()
    return total / max(predicted.numel(), 1)
