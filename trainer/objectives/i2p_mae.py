"""I2P-MAE: masked clouds are completed, and what is visible of them is matched to what an image network sees there.

"Learning 3D Representations from 2D Pre-trained Models via Image-to-Point Masked Autoencoders" (CVPR 2023). Which tokens
stay visible is drawn by the image network's attention. Masked tokens of the middle scale predict their neighbours'
places, visible ones what the image network says of three depth images at their neighbours. As published, the images are
those of the augmented cloud (`teacher_mode: online`). In the variant `cached`, a store holds what was said of images of
the canonical cloud, drawn once; each point keeps its pixels there, and an augmented point looks the maps up by identity.
"""

from dataclasses import dataclass
from math import isqrt
from typing import ClassVar, Final, Literal

import torch
from jaxtyping import Bool, Float, Float32, Int16, Int64
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from datastore.batch import Batch
from datastore.errors import DoNotRetry, MissingField
from models.depth_projection import NUM_VIEWS
from models.encoding import PointEncoder
from models.image_models.projected_views import ProjectedViews, ProjectedViewsConfig, ProjectedWords
from models.masked_decoder import CoordinatesHead, FeaturesHead, MaskedDecoderConfig
from models.ops.distances import chamfer_distance
from models.ops.image_lookup import look_up_bicubic
from models.ops.neighbours import gather
from models.students.masked_transformer import MaskedTransformer, propagate_visibility
from models.unit_sphere import to_unit_sphere
from trainer.augment import scale_and_shift, some_points
from trainer.objectives.base import Corpus, Objective, Terms
from trainer.objectives.frozen import Frozen, load_network
from trainer.objectives.guided_masking import draw_visible, entropy, log_weights, num_masked
from trainer.objectives.means import rank_share

TEACHER_FIELDS: Final = ("view_tokens", "view_saliency", "view_pixels")


class I2PMAEConfig(BaseModel, extra="forbid", frozen=True):
    """The defaults are the published setting."""

    kind: Literal["i2p_mae"] = "i2p_mae"
    needs_student: ClassVar[bool] = True
    student_kinds: ClassVar[tuple[str, ...]] = ("masked_transformer",)

    teacher_mode: Literal["online", "cached"] = "online"
    teacher: str | None = None  # cached: whose tokens, saliency and pixels the store holds
    image_model: ProjectedViewsConfig | None = None  # online: the teacher; its weights are trunk.weights
    network: str | None = None  # online: or the URL of one that a job trained
    random_teacher: bool = False  # lets image_model have no weights: it then teaches nothing, and only its cost is real
    teacher_precision: Literal["float32", "float16"] = "float32"  # online, on GPUs; official: float16. CPUs: float32
    num_points: PositiveInt = 2048  # of those stored, drawn anew at each visit
    scale_range: tuple[PositiveFloat, PositiveFloat] = (2 / 3, 3 / 2)  # of each axis
    shift: NonNegativeFloat = 0.2
    mask_ratio: float = Field(default=0.8, ge=0, lt=1)  # of the coarsest tokens; at finer scales fewer are masked
    # As published, guidance is a softmax over values of a hundredth and nearly uniform. Both switches make it stronger
    temperature: PositiveFloat = 1.0
    standardise_saliency: bool = False
    coordinates_weight: NonNegativeFloat = 1.0
    features_weight: NonNegativeFloat = 1.0
    decoder: MaskedDecoderConfig = MaskedDecoderConfig()

    @model_validator(mode="after")
    def _teacher_fits_mode(self) -> "I2PMAEConfig":
        is_cached = self.teacher_mode == "cached"
        if is_cached != (self.teacher is not None):
            raise ValueError(
                "give 'teacher', the name of a teacher in the store, where teacher_mode is cached, only there"
            )
        if [self.image_model, self.network].count(None) != (2 if is_cached else 1):
            raise ValueError("give one of 'image_model' and 'network' where teacher_mode is online, and only there")
        if self.coordinates_weight == self.features_weight == 0:
            raise ValueError("coordinates_weight and features_weight are both 0: nothing would be learned")
        return self

    @property
    def teacher_fields(self) -> tuple[str, ...]:
        """What the store must hold of the teacher."""
        return TEACHER_FIELDS if self.teacher_mode == "cached" else ()

    def build(self, student: PointEncoder | None, corpus: Corpus) -> "I2PMAE":
        """The objective around a student, sized for a corpus."""
        assert isinstance(student, MaskedTransformer), "RunConfig checks student_kinds"
        return I2PMAE(
            self, student, CachedTeacher(self, corpus) if self.teacher_mode == "cached" else OnlineTeacher(self)
        )


@dataclass(frozen=True)
class I2PMAEBatch(Batch):
    points: Float32[Tensor, "b p 3"]


@dataclass(frozen=True)
class CachedI2PMAEBatch(I2PMAEBatch):
    view_tokens: Float[Tensor, "b 3 t d"]
    view_saliency: Float[Tensor, "b 3 t"]
    view_pixels: Int16[Tensor, "b p 3 2"]


class OnlineTeacher:
    """Looks at the augmented cloud in every step, as published."""

    batch_type: type[I2PMAEBatch] = I2PMAEBatch

    def __init__(self, config: I2PMAEConfig) -> None:
        if config.image_model is not None:
            if config.image_model.trunk.weights is None and not config.random_teacher:
                raise DoNotRetry(
                    "Objective 'i2p_mae' was given no weights for its teacher: a random network teaches nothing. Name the "
                    "file with --set objective.image_model.trunk.weights=FILE ('hub' for timm's own), or accept that with "
                    "--set objective.random_teacher=true."
                )
            network = config.image_model.build()
        else:
            assert config.network is not None, "the config has one of the two"
            network = load_network(config.network, ProjectedViews, key="objective.network")
        self._network = Frozen(network)
        self._half = config.teacher_precision == "float16"
        self.image_size, self.num_features = network.image_size, network.num_features

    def look(
        self, batch: I2PMAEBatch, chosen: Int64[Tensor, "b n"], points: Float32[Tensor, "b n 3"]
    ) -> ProjectedWords:
        """Tokens and saliency of each view, and the pixels of the chosen points, which augmentation made `points`."""
        kind = points.device.type
        with torch.no_grad(), torch.autocast(kind, torch.float16, enabled=self._half and kind == "cuda"):
            return self._network.on(points.device).look(points)


class CachedTeacher:
    """Remembers what it said of the canonical cloud."""

    batch_type: type[I2PMAEBatch] = CachedI2PMAEBatch

    def __init__(self, config: I2PMAEConfig, corpus: Corpus) -> None:
        assert config.teacher is not None, "the config has a name for it"
        taught = corpus.teachers.get(config.teacher)
        missing = [field for field in TEACHER_FIELDS if taught is None or field not in taught.sizes]
        if taught is None or missing:
            raise MissingField(
                f"The store has no {', '.join(missing)} of teacher {config.teacher!r}, which objective 'i2p_mae' with "
                f"teacher_mode cached reads. Write them with `viewpoint cache STORE --teacher {config.teacher} "
                f"--weights FOLDER --fields {' '.join(TEACHER_FIELDS)}`."
            )
        self.image_size, self.num_features = taught.image_size, taught.sizes["view_tokens"][-1]

    def look(
        self, batch: I2PMAEBatch, chosen: Int64[Tensor, "b n"], points: Float32[Tensor, "b n 3"]
    ) -> ProjectedWords:
        """Tokens and saliency of each view, and the pixels of the chosen points, which augmentation made `points`."""
        assert isinstance(batch, CachedI2PMAEBatch), "its batch_type says so"
        pixels = batch.view_pixels.gather(1, chosen[:, :, None, None].expand(-1, -1, NUM_VIEWS, 2))
        return ProjectedWords(batch.view_tokens.detach(), batch.view_saliency.detach(), pixels.long())


class I2PMAE(Objective[I2PMAEBatch]):
    """Terms: `coordinates`, of masked tokens, and `features`, of visible ones, each only where its weight is not 0.

    Figures: `masking_entropy`, 4.159 where all of 64 tokens are as likely to stay; and what share of each finer scale is
    visible.
    """

    def __init__(
        self, config: I2PMAEConfig, student: MaskedTransformer, teacher: OnlineTeacher | CachedTeacher
    ) -> None:
        super().__init__()
        self.config = config
        self.batch_type = teacher.batch_type
        self._teacher = teacher
        self.student = student
        self.decoder = config.decoder.build(student)
        num_tokens, group_size = student.config.num_groups[-1], student.config.group_sizes[1]
        self._num_visible = num_tokens - num_masked(num_tokens, config.mask_ratio)
        self.coordinates_head = (
            CoordinatesHead(self.decoder.width, group_size) if config.coordinates_weight > 0 else None
        )
        self.features_head = None
        if config.features_weight > 0:
            self.features_head = FeaturesHead(self.decoder.width, group_size, NUM_VIEWS * teacher.num_features)

    @property
    def encoder(self) -> MaskedTransformer:
        """The student."""
        return self.student

    def forward(self, batch: I2PMAEBatch) -> Terms:
        config, seeds = self.config, batch.seeds
        chosen = some_points(seeds, batch.points.shape[1], config.num_points)
        # Rotation is left out on purpose: the official code draws one and then does not use it
        points = scale_and_shift(to_unit_sphere(gather(batch.points, chosen)), seeds, config.scale_range, config.shift)
        words = self._teacher.look(batch, chosen, points)
        scales = self.student.group(points)
        finest, middle, coarsest = scales

        saliency = self._seen_at(words.saliency[..., None], words.pixels, coarsest.indices).mean(dim=(2, 3))
        weights = log_weights(saliency, config.temperature, standardise=config.standardise_saliency)
        visible = propagate_visibility(scales, draw_visible(weights, seeds, self._num_visible))
        tokens = self.student.encode_visible(points, scales, visible)
        decoded = self.decoder(tokens, scales, visible)
        self.figures = {
            "masking_entropy": entropy(weights),
            "visible_of_finest": visible[0].double().mean(),
            "visible_of_middle": visible[1].double().mean(),
        }

        terms: Terms = {}
        if self.coordinates_head is not None:
            masked = ~visible[1]
            places = gather(finest.centres, middle.neighbours) - middle.centres[:, :, None]
            loss = coordinates_loss(self.coordinates_head(decoded[masked]), places[masked])
            terms["coordinates"] = config.coordinates_weight * rank_share(masked.sum()) * loss
        if self.features_head is not None:
            shown = visible[1]
            seen = self._seen_at(words.tokens, words.pixels, finest.indices).flatten(2)
            loss = features_loss(self.features_head(decoded[shown]), rows_of(seen, middle.neighbours, shown))
            terms["features"] = config.features_weight * rank_share(shown.sum()) * loss
        return terms

    def _seen_at(
        self, maps: Float[Tensor, "b 3 t d"], pixels: Int64[Tensor, "b n 3 2"], indices: Int64[Tensor, "b g"]
    ) -> Float32[Tensor, "b g 3 d"]:
        """What the maps say at some of the points."""
        pixels = pixels.gather(1, indices[:, :, None, None].expand(-1, -1, NUM_VIEWS, 2))
        side = isqrt(maps.shape[2])
        squares = maps.float().flatten(0, 1).unflatten(1, (side, side))
        rows = look_up_bicubic(squares, pixels.transpose(1, 2).flatten(0, 1), self._teacher.image_size)
        by_cloud: Tensor = rows.unflatten(0, (-1, NUM_VIEWS)).transpose(1, 2)
        return by_cloud


def rows_of(
    features: Float[Tensor, "b m f"], neighbours: Int64[Tensor, "b g k"], wanted: Bool[Tensor, "b g"]
) -> Float[Tensor, "r k f"]:
    """The features at the neighbours of the wanted tokens of all clouds; those of others take no memory."""
    first_rows = torch.arange(len(features), device=features.device)[:, None, None] * features.shape[1]
    return features.flatten(0, 1)[(neighbours + first_rows)[wanted]]


def coordinates_loss(predicted: Float[Tensor, "r k 3"], places: Float[Tensor, "r k 3"]) -> Float32[Tensor, ""]:
    """The chamfer distance between two sets of places, squared, both directions, the mean over tokens; zero without any."""
    if len(predicted) == 0:
        return predicted.float().sum()
    forth, back = chamfer_distance(predicted, places.detach())
    return forth.mean() + back.mean()


def features_loss(predicted: Float[Tensor, "r k f"], seen: Float[Tensor, "r k f"]) -> Float32[Tensor, ""]:
    """The mean squared error over tokens, neighbours and features; zero without any."""
    total: Tensor = (predicted.float() - seen.detach()).square().sum()
    return total / max(predicted.numel(), 1)
