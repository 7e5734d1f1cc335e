"""Students by their configs: one file a network, each with the one face of `models/encoding.py`."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from models.encoding import PointEncoder
from models.students.curvenet import CurveNetConfig
from models.students.dgcnn import DGCNNConfig
from models.students.masked_transformer import MaskedTransformerConfig
from models.students.pointmlp import PointMLPConfig
from models.students.pointnet import PointNetConfig
from models.students.pointnet2 import PointNet2Config

StudentConfig = Annotated[
    CurveNetConfig | DGCNNConfig | MaskedTransformerConfig | PointMLPConfig | PointNet2Config | PointNetConfig,
    Field(discriminator="kind"),
]

_ADAPTER: TypeAdapter[StudentConfig] = TypeAdapter(StudentConfig)


def build_student(config: StudentConfig | Mapping[str, Any]) -> PointEncoder:
    """A new student with random weights, from its config or from `{"kind": "pointnet", ...}`."""
    return _ADAPTER.validate_python(config).build()
