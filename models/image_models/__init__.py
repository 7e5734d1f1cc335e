"""Image networks over rendered views, by their configs: one file a network, each with the one face of `teacher.py`."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from models.image_models.attention_vgg import ViewAutoencoderConfig, ViewSegmenterConfig
from models.image_models.multi_view import MultiViewClassifierConfig
from models.image_models.mvcnn import MVCNNConfig
from models.image_models.pooled import PooledTrunkConfig
from models.image_models.projected_views import ProjectedViewsConfig
from models.image_models.teacher import ImageTeacher
from models.image_models.vision_transformer import TokenTrunkConfig

ImageModelConfig = Annotated[
    MultiViewClassifierConfig
    | MVCNNConfig
    | PooledTrunkConfig
    | ProjectedViewsConfig
    | TokenTrunkConfig
    | ViewAutoencoderConfig
    | ViewSegmenterConfig,
    Field(discriminator="kind"),
]

_ADAPTER: TypeAdapter[ImageModelConfig] = TypeAdapter(ImageModelConfig)


def build_image_model(config: ImageModelConfig | Mapping[str, Any]) -> ImageTeacher:
    """A new network, from its config or from `{"kind": "pooled", "trunk": {"name": "resnet18", ...}}`."""
    return _ADAPTER.validate_python(config).build()
