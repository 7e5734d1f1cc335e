"""View autoencoder: an image network that reproduces views from their descriptors. PointMCD's teacher without labels."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float, Float32, UInt8
from pydantic import BaseModel, PositiveInt
from torch import Tensor

from datastore.batch import Batch
from models.encoding import PointEncoder
from models.image_models.attention_vgg import ViewAutoencoder, ViewAutoencoderConfig
from trainer.augment_images import some_views
from trainer.objectives.base import Corpus, Objective, Terms


class ViewAutoencodingConfig(BaseModel, extra="forbid", frozen=True):
    """The defaults are those of the published pre-training.

    Differs from the paper's code, which draws a class first and then one of its shapes: here every shape is as likely.
    """

    kind: Literal["view_autoencoder"] = "view_autoencoder"
    needs_student: ClassVar[bool] = False

    image_model: ViewAutoencoderConfig
    views_per_step: PositiveInt | None = 1  # of each shape, drawn anew each epoch; None: all

    def build(self, student: PointEncoder | None, corpus: Corpus) -> "ViewAutoencoding":
        """The objective; it needs no fact about the corpus."""
        assert student is None, "RunConfig checks needs_student"
        return ViewAutoencoding(self)


@dataclass(frozen=True)
class ViewAutoencodingBatch(Batch):
    views: UInt8[Tensor, "b v h w 3"]


class ViewAutoencoding(Objective[ViewAutoencodingBatch]):
    """One term, `image`: how far the reproduced views are from the views."""

    batch_type = ViewAutoencodingBatch

    def __init__(self, config: ViewAutoencodingConfig) -> None:
        super().__init__()
        self.config = config
        self.autoencoder = config.image_model.build()

    @property
    def encoder(self) -> ViewAutoencoder:
        """The whole autoencoder: its descriptors of views are what a student learns from."""
        return self.autoencoder

    def forward(self, batch: ViewAutoencodingBatch) -> Terms:
        views = some_views(batch.views, batch.seeds, self.config.views_per_step)
        images = self.autoencoder.images(views.flatten(0, 1))
        return {"image": reconstruction_error(self.autoencoder(images), images)}


def reconstruction_error(reproduced: Float[Tensor, "r 3 s s"], images: Float[Tensor, "r 3 s s"]) -> Float32[Tensor, ""]:
    """The mean absolute difference over views, colours and pixels."""
    return (reproduced.float() - images.float()).abs().mean()
