"""One file an objective. The union is the registry: a new objective adds itself to it."""

from typing import Annotated

from pydantic import Field

from trainer.objectives.pointmcd import PointMCDConfig
from trainer.objectives.view_classifier import ViewClassifierConfig

ObjectiveConfig = Annotated[PointMCDConfig | ViewClassifierConfig, Field(discriminator="kind")]
