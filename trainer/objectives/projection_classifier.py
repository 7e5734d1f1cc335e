"""Projection classifier: an image network that names a cloud from each of three depth images. A teacher for I2P-MAE.

Published runs take CLIP, which no labels of shapes have trained. Where its weights are not at hand, or are too large, this
trains a small network that knows such images, on the clouds that its student will see.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float32, Int64
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from datastore.batch import Batch
from datastore.errors import DoNotRetry
from models.depth_projection import NUM_VIEWS
from models.encoding import PointEncoder
from models.image_models.projected_views import ProjectedViews, ProjectedViewsConfig
from models.ops.neighbours import gather
from models.unit_sphere import to_unit_sphere
from trainer.augment import scale_and_shift, some_points
from trainer.objectives.base import Corpus, Objective, Terms
from trainer.objectives.means import UNLABELLED, rank_share, smoothed_cross_entropy


class ProjectionClassifierConfig(BaseModel, extra="forbid", frozen=True):
    """The image network, and the clouds that it is shown: augmented as I2P-MAE's are."""

    kind: Literal["projection_classifier"] = "projection_classifier"
    needs_student: ClassVar[bool] = False

    image_model: ProjectedViewsConfig
    num_points: PositiveInt = 2048  # of those stored, drawn anew at each visit
    scale_range: tuple[PositiveFloat, PositiveFloat] = (2 / 3, 3 / 2)
    shift: NonNegativeFloat = 0.2
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)

    def build(self, student: PointEncoder | None, corpus: Corpus) -> "ProjectionClassifier":
        """The objective, sized for a corpus."""
        assert student is None, "RunConfig checks needs_student"
        return ProjectionClassifier(self, corpus)


@dataclass(frozen=True)
class ProjectionClassifierBatch(Batch):
    points: Float32[Tensor, "b p 3"]
    label: Int64[Tensor, " b"]


class ProjectionClassifier(Objective[ProjectionClassifierBatch]):
    """Term: `images`, the mean over labelled clouds and their images."""

    batch_type = ProjectionClassifierBatch

    def __init__(self, config: ProjectionClassifierConfig, corpus: Corpus) -> None:
        super().__init__()
        if not corpus.class_names:
            raise DoNotRetry(
                "Objective 'projection_classifier' learns from labels, but the store names no classes. "
                "Ingest a source that has them."
            )
        self.config = config
        self.network = config.image_model.model_copy(update={"num_classes": len(corpus.class_names)}).build()

    @property
    def encoder(self) -> ProjectedViews:
        """The image network with its classifier: what it says of patches is what a student learns from."""
        return self.network

    def forward(self, batch: ProjectionClassifierBatch) -> Terms:
        config, seeds, label = self.config, batch.seeds, batch.label
        chosen = some_points(seeds, batch.points.shape[1], config.num_points)
        points = to_unit_sphere(gather(batch.points, chosen))
        logits = self.network(scale_and_shift(points, seeds, config.scale_range, config.shift))
        loss = smoothed_cross_entropy(logits.flatten(0, 1), label.repeat_interleave(NUM_VIEWS), config.label_smoothing)
        return {"images": rank_share((label != UNLABELLED).sum()) * loss}
