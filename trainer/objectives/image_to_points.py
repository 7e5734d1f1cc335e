"""Image to points: a generator learns to decode what an image network says of a shape into its points.

The second stage of PointCMT (NeurIPS 2022). It reads the teacher's features from the store; the paper's code runs the
frozen teacher at every step, which gives the same numbers.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Float32
from pydantic import BaseModel, NonNegativeFloat, PositiveFloat
from torch import Tensor

from datastore.batch import Batch
from datastore.errors import AskedWrongly
from models.encoding import PointEncoder
from models.point_generator import PointGenerator, PointGeneratorConfig
from trainer.augment import scale_and_shift
from trainer.objectives.base import Corpus, Objective, Terms
from trainer.objectives.cloud_distance import CloudDistanceConfig, cloud_distance
from trainer.objectives.means import rank_share
from trainer.objectives.view_features import feature_width, of_shape


class ImageToPointsConfig(BaseModel, extra="forbid", frozen=True):
    """The generator and how it is trained. The defaults are the official setting."""

    kind: Literal["image_to_points"] = "image_to_points"
    needs_student: ClassVar[bool] = False

    teacher: str
    generator: PointGeneratorConfig = PointGeneratorConfig()
    weight: PositiveFloat = 30.0
    distance: CloudDistanceConfig = CloudDistanceConfig()
    scale_range: tuple[PositiveFloat, PositiveFloat] = (2 / 3, 3 / 2)
    shift: NonNegativeFloat = 0.2

    def build(self, student: PointEncoder | None, corpus: Corpus) -> "ImageToPoints":
        """The objective, sized for a corpus."""
        assert student is None, "RunConfig checks needs_student"
        return ImageToPoints(self, corpus)


@dataclass(frozen=True)
class ImageToPointsBatch(Batch):
    points: Float32[Tensor, "b n 3"]
    view_features: Float[Tensor, "b v d"]


class ImageToPoints(Objective[ImageToPointsBatch]):
    """One term, `earth_movers_distance`."""

    batch_type = ImageToPointsBatch

    def __init__(self, config: ImageToPointsConfig, corpus: Corpus) -> None:
        super().__init__()
        self.config = config
        width = feature_width(config.teacher, corpus, "image_to_points")
        self.generator = config.generator.model_copy(update={"in_features": width}).build()

    @property
    def encoder(self) -> PointGenerator:
        """The generator."""
        return self.generator

    def forward(self, batch: ImageToPointsBatch) -> Terms:
        config = self.config
        # No image knows how its shape is scaled and moved: what of that box normalisation leaves is never learned.
        # The paper also shuffles the points, which no distance between sets of points sees.
        points = scale_and_shift(batch.points, batch.seeds, config.scale_range, config.shift)
        if points.shape[1] != config.generator.num_points:
            raise AskedWrongly(
                f"The generator makes {config.generator.num_points} points and the run reads {points.shape[1]}: set "
                f"objective.generator.num_points and data.num_points to the same number."
            )
        with torch.autocast(points.device.type, enabled=False):
            predicted = self.generator(of_shape(batch.view_features))
        share = rank_share(torch.tensor(len(points), device=points.device))
        distance = cloud_distance(predicted, points, config.distance).mean()
        return {"earth_movers_distance": config.weight * share * distance}
