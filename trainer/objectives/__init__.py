"""One file an objective. The union is the registry: a new objective adds itself to it."""

from typing import Annotated

from pydantic import Field

from trainer.objectives.crosspoint import CrossPointConfig
from trainer.objectives.i2p_mae import I2PMAEConfig
from trainer.objectives.image_to_points import ImageToPointsConfig
from trainer.objectives.mixture import MixtureConfig, MixturePart
from trainer.objectives.pointcmt import PointCMTConfig
from trainer.objectives.pointmcd import PointMCDConfig
from trainer.objectives.projection_classifier import ProjectionClassifierConfig
from trainer.objectives.supervised import SupervisedConfig
from trainer.objectives.view_autoencoder import ViewAutoencodingConfig
from trainer.objectives.view_classifier import ViewClassifierConfig
from trainer.objectives.view_segmenter import ViewSegmentingConfig

SingleObjectiveConfig = (
    CrossPointConfig
    | I2PMAEConfig
    | ImageToPointsConfig
    | PointCMTConfig
    | PointMCDConfig
    | ProjectionClassifierConfig
    | SupervisedConfig
    | ViewAutoencodingConfig
    | ViewClassifierConfig
    | ViewSegmentingConfig
)
ObjectiveConfig = Annotated[SingleObjectiveConfig | MixtureConfig, Field(discriminator="kind")]

MixturePart.model_rebuild()  # which was waiting for the name SingleObjectiveConfig
MixtureConfig.model_rebuild()
