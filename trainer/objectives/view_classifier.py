"""View classifier: an image network that names a shape from its views. The teachers of PointMCD and of PointCMT."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from jaxtyping import Int64, UInt8
from pydantic import BaseModel, Discriminator, Field, PositiveInt, Tag
from torch import Tensor

from datastore.batch import Batch
from datastore.errors import DoNotRetry
from models.encoding import PointEncoder
from models.image_models.multi_view import MultiViewClassifier, MultiViewClassifierConfig
from models.image_models.mvcnn import MVCNN, MVCNNConfig
from trainer.augment_images import some_views
from trainer.objectives.base import Corpus, Objective, Terms
from trainer.objectives.means import UNLABELLED, rank_share, smoothed_cross_entropy


def _kind(classifier: Any) -> str:
    """Which classifier a config is of; PointMCD's where it does not say."""
    if isinstance(classifier, BaseModel):
        return str(classifier.kind)  # type: ignore[attr-defined]
    return str(classifier.get("kind", "multi_view_classifier")) if isinstance(classifier, dict) else ""


ClassifierConfig = Annotated[
    Annotated[MultiViewClassifierConfig, Tag("multi_view_classifier")] | Annotated[MVCNNConfig, Tag("mvcnn")],
    Discriminator(_kind),
]


class ViewClassifierConfig(BaseModel, extra="forbid", frozen=True):
    """The image network and how it is trained."""

    kind: Literal["view_classifier"] = "view_classifier"
    needs_student: ClassVar[bool] = False

    image_model: ClassifierConfig
    label_smoothing: float = Field(default=0.2, ge=0, lt=1)
    views_per_step: PositiveInt | None = None  # of each shape, drawn anew each epoch; None: all, as published

    def build(self, student: PointEncoder | None, corpus: Corpus) -> "ViewClassifier":
        """The objective, sized for a corpus."""
        assert student is None, "RunConfig checks needs_student"
        return ViewClassifier(self, corpus)


@dataclass(frozen=True)
class ViewClassifierBatch(Batch):
    views: UInt8[Tensor, "b v h w 3"]
    label: Int64[Tensor, " b"]


class ViewClassifier(Objective[ViewClassifierBatch]):
    """Terms: `global`, from the maximum over views, and for PointMCD `views`, the mean over single ones; weights are 1."""

    batch_type = ViewClassifierBatch

    def __init__(self, config: ViewClassifierConfig, corpus: Corpus) -> None:
        super().__init__()
        if not corpus.class_names:
            raise DoNotRetry(
                "Objective 'view_classifier' learns from labels, but the store names no classes. "
                "Ingest a source that has them."
            )
        self.config = config
        image_model = config.image_model.model_copy(update={"num_classes": len(corpus.class_names)})
        self.classifier: MultiViewClassifier | MVCNN = image_model.build()

    @property
    def encoder(self) -> MultiViewClassifier | MVCNN:
        """The whole classifier: its descriptors of single views are what a student learns from."""
        return self.classifier

    def forward(self, batch: ViewClassifierBatch) -> Terms:
        predictions = self.classifier(some_views(batch.views, batch.seeds, self.config.views_per_step))
        smoothing, label = self.config.label_smoothing, batch.label
        share = rank_share((label != UNLABELLED).sum())
        terms = {"global": share * smoothed_cross_entropy(predictions.global_logits, label, smoothing)}
        if (view_logits := predictions.view_logits) is not None:
            view_label = label.repeat_interleave(view_logits.shape[1])
            terms["views"] = share * smoothed_cross_entropy(view_logits.flatten(0, 1), view_label, smoothing)
        return terms
