"""PointNet: the same small network on every point, then the maximum over points. PointMCD's reduced variant by default.

PointMCD (IEEE TMM 2023) narrows the transform nets and ends with a ReLU, so that embeddings are nowhere negative; at
width 1 the encoder has 499,209 parameters. `PLAIN` is the original network (Qi et al., CVPR 2017), `CROSSPOINT` the one
without transform nets that CrossPoint trains (150,336 parameters).
"""

from typing import Final, Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, PositiveFloat, PositiveInt
from torch import Tensor, nn

from models.encoding import Encoding, PointEncoder
from models.ops.view_pooling import max_over_points
from models.row_norm import RowNorm

Widths = tuple[PositiveInt, ...]


class PointNetConfig(BaseModel, extra="forbid", frozen=True):
    """Sizes of a PointNet."""

    kind: Literal["pointnet"] = "pointnet"
    width: PositiveFloat = 1.0  # multiplies every width below
    transforms: bool = True  # learned alignments of the input and of the stem's features
    stem_widths: Widths = (64,)  # before the feature transform
    widths: Widths = (128, 1024)  # after it; the last is the width of the embedding
    transform_point_widths: Widths = (64, 64, 256)  # of a transform net, before its maximum over points
    transform_widths: Widths = (64, 64)  # and after it
    final_relu: bool = True
    bias: bool = True  # of the layers on points, which batch normalisation takes away again; CrossPoint's have none

    def build(self) -> "PointNet":
        """A new network with random weights."""
        return PointNet(self)

    def scaled(self, widths: Widths) -> Widths:
        """These widths times `width`."""
        return tuple(max(1, round(self.width * each)) for each in widths)


PLAIN: Final = PointNetConfig(
    stem_widths=(64, 64),
    widths=(64, 128, 1024),
    transform_point_widths=(64, 128, 1024),
    transform_widths=(512, 256),
    final_relu=False,
)
CROSSPOINT: Final = PointNetConfig(transforms=False, stem_widths=(64, 64), widths=(64, 128, 1024), bias=False)


class PointNet(PointEncoder):
    """Embeds each point and takes the maximum. The penalty says how far the feature transform is from a rotation."""

    def __init__(self, config: PointNetConfig) -> None:
        super().__init__()
        stem_widths, widths = config.scaled(config.stem_widths), config.scaled(config.widths)
        self.input_transform = TransformNet(3, config) if config.transforms else None
        self.stem = point_layers(3, stem_widths, bias=config.bias)
        self.feature_transform = TransformNet(stem_widths[-1], config) if config.transforms else None
        self.layers = point_layers(stem_widths[-1], widths, final_relu=config.final_relu, bias=config.bias)
        self.per_point_dim = self.pooled_dim = widths[-1]

    def forward(self, points: Float[Tensor, "b n 3"]) -> Encoding:
        """Embeddings of the points in their own order, nowhere negative unless `final_relu` is off."""
        penalty = None
        features = points
        if self.input_transform is not None:
            # Coordinates stay float32 also where the layers compute in less
            with torch.autocast(points.device.type, enabled=False):
                features = points @ self.input_transform(points).to(points.dtype)
        features = self.stem(features.flatten(0, 1)).unflatten(0, points.shape[:2])
        if self.feature_transform is not None:
            transform = self.feature_transform(features)
            penalty = orthogonality_penalty(transform)
            features = features @ transform
        per_point = self.layers(features.flatten(0, 1)).unflatten(0, points.shape[:2])
        return Encoding(per_point, max_over_points(per_point), penalty=penalty)


class TransformNet(nn.Module):
    """A matrix for each cloud, computed from the cloud itself: the identity plus what the network adds."""

    def __init__(self, num_features: int, config: PointNetConfig) -> None:
        super().__init__()
        point_widths, widths = config.scaled(config.transform_point_widths), config.scaled(config.transform_widths)
        self.num_features = num_features
        self.point_layers = point_layers(num_features, point_widths)
        self.layers = point_layers(point_widths[-1], widths)
        self.matrix = nn.Linear(widths[-1], num_features**2)

    def forward(self, features: Float[Tensor, "b n c"]) -> Float[Tensor, "b c c"]:
        """The matrices, to be multiplied from the right."""
        pooled = max_over_points(self.point_layers(features.flatten(0, 1)).unflatten(0, features.shape[:2]))
        matrices: Tensor = self.matrix(self.layers(pooled)).unflatten(1, (self.num_features, self.num_features))
        return matrices + torch.eye(self.num_features, dtype=matrices.dtype, device=matrices.device)


def point_layers(in_features: int, widths: Widths, *, final_relu: bool = True, bias: bool = True) -> nn.Sequential:
    """Linear, batch normalisation, ReLU for each width, on rows [r, in].

    A 1x1 convolution is this on the rows of all points; as a matrix product it takes two thirds of the time on a CPU.
    """
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(in_features, width, bias=bias), RowNorm(width), nn.ReLU(inplace=True)]
        in_features = width
    return nn.Sequential(*layers if final_relu else layers[:-1])


def orthogonality_penalty(transforms: Float[Tensor, "b c c"]) -> Float[Tensor, ""]:
    """The mean over the batch of ‖A Aᵀ − I‖_F: zero for rotations."""
    transforms = transforms.float()
    identity = torch.eye(transforms.shape[-1], device=transforms.device)
    distances: Tensor = torch.linalg.matrix_norm(transforms @ transforms.transpose(1, 2) - identity)
    return distances.mean()
