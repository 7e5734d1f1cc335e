"""The task that labels set: naming shapes, or the part that each of their points belongs to."""

from typing import Literal

import torch
from jaxtyping import Float, Int16, Int64
from torch import Tensor, nn

from datastore.errors import DoNotRetry
from models.encoding import Encoding, PointEncoder
from models.heads import classification_head, part_segmentation_head
from trainer.objectives.base import Corpus
from trainer.objectives.means import UNLABELLED

Task = Literal["classification", "parts"]


def task_head(task: Task, student: PointEncoder, corpus: Corpus, *, objective: str, without_labels: str) -> nn.Module:
    """What is trained on labels behind a student; `without_labels` tells in errors what else could be done."""
    num_classes, num_parts = len(corpus.class_names), len(corpus.part_names)
    if not num_classes:
        raise DoNotRetry(
            f"Objective {objective!r} learns from labels, but the store names no classes. Ingest a source that has them, "
            f"or {without_labels}."
        )
    if task == "classification":
        return classification_head(student.pooled_dim, num_classes)
    if not num_parts:
        raise DoNotRetry(
            f"Objective {objective!r} with task 'parts' learns from labels of points, but the store names no parts. Ingest "
            f"a source that has them, or set objective.task=classification."
        )
    return part_segmentation_head(student, num_classes, num_parts)


def predictions(
    task: Task,
    head: nn.Module,
    encoding: Encoding,
    label: Int64[Tensor, " b"],
    part_labels: Int16[Tensor, "b n"] | None,  # of task parts
) -> tuple[Float[Tensor, "r k"], Int64[Tensor, " r"]]:
    """Logits and labels, one row for each shape or, of parts, for each point."""
    if task == "classification":
        return head(encoding.pooled), label
    assert part_labels is not None, "batch_type asks for them"
    logits = head(encoding, label.clamp(min=0))
    # The head is told the category, so that without one nothing can be asked of it
    labels = torch.where(label[:, None] != UNLABELLED, part_labels.long(), UNLABELLED)
    return logits.flatten(0, 1), labels.flatten()
