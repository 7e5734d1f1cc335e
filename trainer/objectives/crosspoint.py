"""CrossPoint: two augmented copies of a cloud, and an image of its shape, are to find each other among all others.

"CrossPoint: Self-Supervised Cross-Modal Contrastive Learning for 3D Point Cloud Understanding" (CVPR 2022). Points and
images are encoded by networks that start from random weights and are trained together, without labels and without a
teacher. The image branch and both heads are then left behind.

Negatives are the other samples of one micro-batch on all ranks, gathered with their gradient: ranks change nothing, but
accumulation does, as it cuts a global batch into several that do not see each other. `engine.max_micro_batch` of at least
global_batch / processes avoids it, and a run that accumulates says so when it starts. A shape is never its own negative:
no global batch holds one twice. What an epoch has left after its last whole batch is dropped, as published, or filled up
with other shapes (`data.remainder`), so that every process always brings as many.
"""

from dataclasses import dataclass
from typing import ClassVar, Final, Literal, cast

import torch
from jaxtyping import Float32, Int64, UInt8
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from datastore.batch import Batch
from datastore.errors import DoNotRetry
from models.encoding import PointEncoder
from models.heads import contrastive_head
from models.image_models.trunk import TrunkConfig, as_images, build_trunk
from models.unit_sphere import to_unit_sphere
from trainer import augment
from trainer.augment_images import crop_some, flip_some, jitter_colours, some_views
from trainer.distributed import gather, own_rows
from trainer.objectives.base import Corpus, Objective, Terms
from trainer.objectives.contrastive import nt_xent

RESNET_50: Final = TrunkConfig(
    name="resnet50", image_size=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)  # random weights; mean and deviation are ImageNet's all the same


class CrossPointConfig(BaseModel, extra="forbid", frozen=True):
    """The defaults are the official code's."""

    kind: Literal["crosspoint"] = "crosspoint"
    needs_student: ClassVar[bool] = True

    image_trunk: TrunkConfig = RESNET_50
    temperature: PositiveFloat = 0.1
    intra_modal_weight: NonNegativeFloat = 1.0  # of copy against copy
    cross_modal_weight: NonNegativeFloat = 1.0  # of copies against image; 0: no image branch is built, no view is read
    hidden_features: PositiveInt = 1024  # of the head on points
    image_hidden_features: PositiveInt = 512  # of the head on images
    projected_features: PositiveInt = 256
    # Of points, in this order, after each copy is brought to the unit sphere
    scale_range: tuple[PositiveFloat, PositiveFloat] = (0.5, 2.0)
    rotate: bool = True  # about the vertical axis, by any angle
    shift: NonNegativeFloat = 0.5  # of the extent along each axis
    jitter_deviation: NonNegativeFloat = 0.01
    jitter_limit: NonNegativeFloat = 0.05
    largest_drop_out: float = Field(0.875, ge=0, le=1)  # share of the points that become the first one
    # The paper lists elastic distortion of points and random windows of images, without their sizes; its code has neither
    elastic_deviation: NonNegativeFloat = 0.0  # of the nodes of a lattice of 5 a side, in radii of the cloud
    least_window: float = Field(1.0, gt=0, le=1)  # share of an image's area
    # Of images, in this order
    colour_jitter: float = Field(0.4, ge=0, le=1)  # brightness, contrast and saturation; not the hue
    flip_probability: float = Field(0.5, ge=0, le=1)

    @model_validator(mode="after")
    def _trains_something(self) -> "CrossPointConfig":
        if self.intra_modal_weight == 0 and self.cross_modal_weight == 0:
            raise ValueError("intra_modal_weight and cross_modal_weight are both 0: nothing would be learned")
        return self

    def build(self, student: PointEncoder | None, corpus: Corpus) -> "CrossPoint":
        """The objective around a student."""
        assert student is not None, "RunConfig checks needs_student"
        return CrossPoint(self, student, corpus)


@dataclass(frozen=True)
class CrossPointBatch(Batch):
    points: Float32[Tensor, "b n 3"]
    views: UInt8[Tensor, "b v h w 3"] | None = None  # with a cross-modal weight; where there are several, one is drawn


class CrossPoint(Objective[CrossPointBatch]):
    """Terms: `intra_modal`, `cross_modal`, each only where its weight is not 0."""

    compares_samples = True

    def __init__(self, config: CrossPointConfig, student: PointEncoder, corpus: Corpus) -> None:
        super().__init__()
        self.config = config
        self.student = student
        self.head = contrastive_head(student.pooled_dim, config.hidden_features, config.projected_features)
        self.image_trunk = self.image_head = None
        self.batch_type = CrossPointBatch.without("views")
        if config.cross_modal_weight > 0:
            if corpus.num_views == 0:
                raise DoNotRetry(
                    "Objective 'crosspoint' compares clouds with images, but the store has no views. Ingest the source "
                    "with a rig of cameras (--rig), or train on points alone (--set objective.cross_modal_weight=0)."
                )
            self.batch_type = CrossPointBatch.drawing(1)
            self.image_trunk = build_trunk(config.image_trunk)
            self.image_head = contrastive_head(
                cast(int, self.image_trunk.head_hidden_size),
                config.image_hidden_features,
                config.projected_features,
                bias=False,
            )

    @property
    def encoder(self) -> PointEncoder:
        """The student."""
        return self.student

    def forward(self, batch: CrossPointBatch) -> Terms:
        config = self.config
        # Both copies in one pass: batch statistics mix them
        copies = torch.cat([self.augmented(batch.points, batch.seeds, copy) for copy in (1, 2)])
        projected = list(self.head(self.student(copies).pooled).float().chunk(2))
        if self.image_trunk is not None and self.image_head is not None:
            assert batch.views is not None
            images = self.images(batch.views, batch.seeds)
            projected.append(self.image_head(self.image_trunk(images)).float())
        first, second, *of_images = gather(torch.stack(projected, dim=1)).unbind(dim=1)
        own = own_rows(len(batch))
        terms: Terms = {}
        if config.intra_modal_weight > 0:
            terms["intra_modal"] = config.intra_modal_weight * nt_xent(first, second, config.temperature, own)
        for of_image in of_images:
            # The mean of the vectors and not of their directions: a longer one weighs more
            prototype = (first + second) / 2
            terms["cross_modal"] = config.cross_modal_weight * nt_xent(prototype, of_image, config.temperature, own)
        return terms

    def augmented(
        self, points: Float32[Tensor, "b n 3"], seeds: Int64[Tensor, " b"], copy: int
    ) -> Float32[Tensor, "b n 3"]:
        """Copy 1 or 2 of each cloud, augmented."""
        config, purpose = self.config, f"crosspoint copy {copy}"
        points = to_unit_sphere(points)
        if config.elastic_deviation > 0:
            points = augment.distort(points, seeds, config.elastic_deviation, f"{purpose}: distort")
        points = augment.scale(points, seeds, config.scale_range, f"{purpose}: scale")
        if config.rotate:
            points = augment.rotate_about_y(points, seeds, f"{purpose}: rotate")
        points = augment.shift_by_extent(points, seeds, config.shift, f"{purpose}: shift")
        points = augment.jitter(points, seeds, config.jitter_deviation, config.jitter_limit, f"{purpose}: jitter")
        return augment.drop_out_points(points, seeds, config.largest_drop_out, f"{purpose}: drop out")

    def images(self, views: UInt8[Tensor, "b v h w 3"], seeds: Int64[Tensor, " b"]) -> Float32[Tensor, "b 3 size size"]:
        """One view of each shape, drawn anew each epoch, augmented and normalised."""
        config, trunk = self.config, self.config.image_trunk
        mean, deviation = (torch.tensor(each, device=views.device).view(3, 1, 1) for each in (trunk.mean, trunk.std))
        view = some_views(views, seeds, 1).squeeze(1)
        images = as_images(view, trunk.image_size, torch.zeros_like(mean), torch.ones_like(deviation))
        if config.least_window < 1:
            images = crop_some(images, seeds, config.least_window, "crosspoint image: window")
        images = jitter_colours(images, seeds, config.colour_jitter, "crosspoint image: colours")
        images = flip_some(images, seeds, config.flip_probability, "crosspoint image: flip")
        normalised: Tensor = (images - mean) / deviation
        return normalised
