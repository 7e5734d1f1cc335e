"""View segmenter: an image network that names the part each pixel shows. PointMCD's teacher for part segmentation.

Differs from the paper, whose label maps are rendered: here a view's labels are those of the points visible in it, at
their pixels, and background where nothing was hit. Pixels that show a surface between the points do not count. And where
the paper's code draws a class first and then one of its shapes, here every shape is as likely.
"""

from dataclasses import dataclass
from typing import ClassVar, Final, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int16, Int64, Shaped, UInt8, UInt16
from pydantic import BaseModel
from torch import Tensor

from datastore.batch import Batch
from datastore.errors import AskedWrongly, DoNotRetry
from models.encoding import PointEncoder
from models.image_models.attention_vgg import ViewAutoencoder, ViewSegmenter, ViewSegmenterConfig
from trainer.augment import uniform
from trainer.objectives.base import Corpus, Objective, Terms
from trainer.objectives.frozen import load_network
from trainer.objectives.means import rank_share

UNKNOWN: Final = -1


class ViewSegmentingConfig(BaseModel, extra="forbid", frozen=True):
    """The defaults are those of the published teacher: one of a shape's views each visit, no smoothing, no weights."""

    kind: Literal["view_segmenter"] = "view_segmenter"
    needs_student: ClassVar[bool] = False

    image_model: ViewSegmenterConfig
    start: str | None = (
        None  # URL of an exported view autoencoder, with whose trunk training begins; None: as image_model
    )

    def build(self, student: PointEncoder | None, corpus: Corpus) -> "ViewSegmenting":
        """The objective, sized for a corpus."""
        assert student is None, "RunConfig checks needs_student"
        return ViewSegmenting(self, corpus)


@dataclass(frozen=True)
class ViewSegmentingBatch(Batch):
    views: UInt8[Tensor, "b v h w 3"]
    depth: UInt16[Tensor, "b v h w"]  # where nothing was hit
    pixels: Int16[Tensor, "b n v 2"]
    visibility: Bool[Tensor, "b n v"]
    part_labels: Int16[Tensor, "b n"]
    label: Int64[Tensor, " b"]


class ViewSegmenting(Objective[ViewSegmentingBatch]):
    """One term, `pixels`: the cross-entropy over the pixels whose label is known."""

    batch_type = ViewSegmentingBatch

    def __init__(self, config: ViewSegmentingConfig, corpus: Corpus) -> None:
        super().__init__()
        if not corpus.part_names or not corpus.class_names:
            raise DoNotRetry(
                "Objective 'view_segmenter' learns from part labels, but the store names no parts or no classes. "
                "Ingest a source that has them, such as ShapeNetPart."
            )
        self.num_parts = len(corpus.part_names)
        sizes = {"num_categories": len(corpus.class_names), "num_parts": self.num_parts}
        self.segmenter = config.image_model.model_copy(update=sizes).build()
        if config.start is not None:
            trunk = load_network(config.start, ViewAutoencoder, key="objective.start").trunk
            if trunk.widths != self.segmenter.trunk.widths:
                raise AskedWrongly(
                    f"objective.start={config.start} has a trunk of widths {trunk.widths}, and this run's has "
                    f"{self.segmenter.trunk.widths}: set objective.image_model.width to the autoencoder's."
                )
            self.segmenter.trunk.load_state_dict(trunk.state_dict())

    @property
    def encoder(self) -> ViewSegmenter:
        """The whole segmenter: its descriptors of views are what a student learns from."""
        return self.segmenter

    def forward(self, batch: ViewSegmentingBatch) -> Terms:
        view = (uniform(batch.seeds, 1, "view of this step")[:, 0] * batch.views.shape[1]).long()
        labels = label_map(
            _chosen(batch.pixels.transpose(1, 2), view).long(),
            _chosen(batch.visibility.transpose(1, 2), view),
            batch.part_labels.long(),
            _chosen(batch.depth.int(), view) > 0,  # as int32: GPUs cannot index uint16
            self.segmenter.image_size,
            background=self.num_parts,
        )
        logits = self.segmenter(self.segmenter.images(_chosen(batch.views, view)), batch.label)
        share = rank_share((labels != UNKNOWN).sum())
        return {"pixels": share * pixel_loss(logits, labels)}


def label_map(
    pixels: Int64[Tensor, "b n 2"],  # column and row
    visible: Bool[Tensor, "b n"],
    part_labels: Int64[Tensor, "b n"],
    surface: Bool[Tensor, "b h w"],
    size: int,
    *,
    background: int,
) -> Int64[Tensor, "b size size"]:
    """Each pixel's part: the smallest label of the visible points in it; background off the surface; else unknown."""
    rows, height, width = surface.shape
    scale = torch.tensor([size / width, size / height], device=pixels.device)
    places = ((pixels + 0.5) * scale).floor().long()
    inside = visible & (part_labels >= 0) & ((places >= 0) & (places < size)).all(dim=2)
    sample = torch.arange(rows, device=pixels.device)[:, None].expand_as(inside)
    flat = (sample * size + places[..., 1]) * size + places[..., 0]
    # the smallest, and not the last written: the order of points must not matter
    found = torch.full((rows * size * size,), background + 1, device=pixels.device)
    found.scatter_reduce_(0, flat[inside], part_labels[inside], "amin")
    shown = F.interpolate(surface[:, None].float(), (size, size)).squeeze(1) > 0
    beside = torch.where(shown, torch.full_like(shown, UNKNOWN, dtype=torch.long), background)
    found = found.view(rows, size, size)
    return torch.where(found <= background, found, beside)


def pixel_loss(logits: Float[Tensor, "b q s s"], labels: Int64[Tensor, "b s s"]) -> Float32[Tensor, ""]:
    """The mean cross-entropy over pixels whose label is known; zero where there is none."""
    total = F.cross_entropy(logits.float(), labels, ignore_index=UNKNOWN, reduction="sum")
    return total / (labels != UNKNOWN).sum().clamp(min=1)


def _chosen(values: Shaped[Tensor, "b v ..."], view: Int64[Tensor, " b"]) -> Shaped[Tensor, "b ..."]:
    return values[torch.arange(len(view), device=view.device), view]
