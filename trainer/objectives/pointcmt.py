"""PointCMT: a student learns labels, to decode into the cloud that images of the shape decode into, and to judge both alike.

"Let Images Give You More: Point Cloud Cross-Modal Training for Shape Analysis" (NeurIPS 2022). Feature enhancement (FE)
decodes the student's features and the image network's with one frozen generator and pulls the clouds together;
classifier enhancement (CLE) gives both to the student's last layer and pulls its class probabilities together. Inference
needs the student and its head alone.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from datastore.batch import Batch
from datastore.errors import AskedWrongly, DoNotRetry
from models.encoding import PointEncoder
from models.heads import classification_head
from models.point_generator import PointGenerator
from trainer import distributed
from trainer.augment import in_random_order, scale_and_shift
from trainer.objectives.base import Corpus, Objective, Terms
from trainer.objectives.cloud_distance import CloudDistanceConfig, cloud_distance
from trainer.objectives.frozen import Frozen, load_network
from trainer.objectives.means import UNLABELLED, rank_share, smoothed_cross_entropy
from trainer.objectives.view_features import feature_width, of_shape


class PointCMTConfig(BaseModel, extra="forbid", frozen=True):
    """The defaults are the official classification setting."""

    kind: Literal["pointcmt"] = "pointcmt"
    needs_student: ClassVar[bool] = True

    teacher: str | None = None  # None: for a run whose two enhancements weigh nothing
    generator: str | None = None  # URL of an exported point generator, for feature enhancement
    label_smoothing: float = Field(default=0.2, ge=0, lt=1)
    feature_enhancement_weight: NonNegativeFloat = 30.0  # 0: no generator is loaded
    # Differs from the paper's code, which sums over the 32 clouds of its batch with a weight of 0.3: 9.6 of a mean is the
    # same, and does not change with the batch. "sum" and 0.3 restore it, over the clouds of all ranks in a micro-batch.
    classifier_enhancement_weight: NonNegativeFloat = 9.6
    classifier_enhancement_reduction: Literal["mean", "sum"] = "mean"
    detach_target: bool = False  # True: the class probabilities of images are a constant, as in other distillation
    distance: CloudDistanceConfig = CloudDistanceConfig()
    feature_width: PositiveInt = 512  # of the student's features before its last layer: the teacher's
    scale_range: tuple[PositiveFloat, PositiveFloat] = (2 / 3, 3 / 2)
    shift: NonNegativeFloat = 0.2

    @property
    def reads_images(self) -> bool:
        """Whether anything but labels is learned from."""
        return self.feature_enhancement_weight > 0 or self.classifier_enhancement_weight > 0

    @model_validator(mode="after")
    def _has_a_teacher(self) -> "PointCMTConfig":
        if self.reads_images and self.teacher is None:
            raise ValueError("name a teacher, or set feature_enhancement_weight and classifier_enhancement_weight to 0")
        return self

    @property
    def teacher_fields(self) -> tuple[str, ...]:
        """What the store must hold of the teacher."""
        enhances = self.feature_enhancement_weight > 0 or self.classifier_enhancement_weight > 0
        return ("view_features",) if enhances else ()

    def build(self, student: PointEncoder | None, corpus: Corpus) -> "PointCMT":
        """The objective around a student, sized for a corpus."""
        assert student is not None, "RunConfig checks needs_student"
        return PointCMT(self, student, corpus)


@dataclass(frozen=True)
class PointCMTBatch(Batch):
    points: Float32[Tensor, "b n 3"]
    label: Int64[Tensor, " b"]
    view_features: Float[Tensor, "b v d"] | None = None  # not read where both enhancements weigh nothing


class PointCMT(Objective[PointCMTBatch]):
    """Terms: `task`, `feature_enhancement`, `classifier_enhancement`, the last two only where their weight is not 0."""

    batch_type = PointCMTBatch

    def __init__(self, config: PointCMTConfig, student: PointEncoder, corpus: Corpus) -> None:
        super().__init__()
        if not corpus.class_names:
            raise DoNotRetry(
                "Objective 'pointcmt' learns from labels, but the store names no classes. Ingest a source that has them."
            )
        self.config = config
        self.student = student
        self.head = classification_head(student.pooled_dim, len(corpus.class_names), config.feature_width, bias=True)
        if config.reads_images:
            assert config.teacher is not None, "the config was validated"
            width = feature_width(config.teacher, corpus, "pointcmt")
            if width != config.feature_width:
                raise AskedWrongly(
                    f"Teacher {config.teacher!r} describes a view by {width} numbers, and one layer classifies its "
                    f"features and the student's, which are {config.feature_width}: set objective.feature_width={width}."
                )
        else:
            self.batch_type = PointCMTBatch.without("view_features")
        # After what is trained: whether there is a generator does not change the weights that training starts from
        self.generator = self._load_generator() if config.feature_enhancement_weight > 0 else None

    @property
    def encoder(self) -> PointEncoder:
        """The student."""
        return self.student

    def forward(self, batch: PointCMTBatch) -> Terms:
        config = self.config
        augmented = scale_and_shift(batch.points, batch.seeds, config.scale_range, config.shift)
        features, logits = self.read(in_random_order(augmented, batch.seeds, "order of points"))
        task = smoothed_cross_entropy(logits, batch.label, config.label_smoothing)
        terms: Terms = {"task": rank_share((batch.label != UNLABELLED).sum()) * task}
        if not config.reads_images:
            return terms
        assert batch.view_features is not None, "batch_type asks for them"
        # They are of the shape as it is stored, not as it was augmented
        of_images = of_shape(batch.view_features)
        num_clouds = torch.tensor(len(logits), device=logits.device)
        share = rank_share(num_clouds)
        if self.generator is not None:
            with torch.autocast(features.device.type, enabled=False):
                generator = self.generator.on(features.device)
                decoded, target = generator(features.float()), generator(of_images)
            gap = cloud_distance(decoded, target, config.distance).mean()
            terms["feature_enhancement"] = config.feature_enhancement_weight * share * gap
        if config.classifier_enhancement_weight > 0:
            image_logits = self.head[1](of_images.to(features.dtype))
            if config.detach_target:
                image_logits = image_logits.detach()
            gap = classifier_gap(logits, image_logits).mean()
            if config.classifier_enhancement_reduction == "sum":
                gap = gap * distributed.all_reduce_sum(num_clouds)
            terms["classifier_enhancement"] = config.classifier_enhancement_weight * share * gap
        return terms

    def read(self, points: Float32[Tensor, "b n 3"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b k"]]:
        """The paper's F_pts, nowhere negative, and class logits."""
        features = self.head[0](self.student(points).pooled)
        return features, self.head[1](features)

    def classify(self, points: Float32[Tensor, "b n 3"]) -> Float[Tensor, "b k"]:
        """Class logits, from points alone."""
        return self.read(points)[1]

    def _load_generator(self) -> Frozen[PointGenerator]:
        config = self.config
        if config.generator is None:
            raise AskedWrongly(
                "Objective 'pointcmt' has feature_enhancement_weight > 0 and no generator. Give the export of a job that "
                "trains one, such as pointcmt_generator (--set objective.generator=URL), or set the weight to 0."
            )
        generator = load_network(config.generator, PointGenerator, key="objective.generator")
        if generator.in_features != config.feature_width:
            raise AskedWrongly(
                f"objective.generator={config.generator} decodes {generator.in_features} features, and "
                f"objective.feature_width is {config.feature_width}. Give a generator that was trained on features of "
                f"teacher {config.teacher!r}."
            )
        return Frozen(generator)


def classifier_gap(point_logits: Float[Tensor, "b k"], image_logits: Float[Tensor, "b k"]) -> Float32[Tensor, " b"]:
    """KL(images || points) between class probabilities, for each cloud; zero where the logits agree."""
    of_points, of_images = F.log_softmax(point_logits.float(), dim=1), F.log_softmax(image_logits.float(), dim=1)
    return (of_images.exp() * (of_images - of_points)).sum(dim=1)
