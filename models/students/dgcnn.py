"""DGCNN: each layer looks at the nearest neighbours in the features of the layer before, then the maximum over points.

Wang et al., ACM TOG 2019, as two papers train it. The default is PointMCD's for classification: it ends with a ReLU, so
that embeddings are nowhere negative (617,856 parameters). `SEGMENTATION` is PointMCD's for part segmentation (224,256);
`CROSSPOINT` and `CROSSPOINT_SEGMENTATION` are CrossPoint's (617,856; 1,025,545 with its alignment of the input). The
official CrossPoint code also creates four norms that nothing uses, 1,408 parameters; they are not created here.
"""

from itertools import pairwise
from typing import Final, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from models.encoding import Encoding, Level, PointEncoder
from models.grouped_layers import grouped_max
from models.layers import row_layers
from models.ops.neighbours import nearest_neighbours
from models.ops.view_pooling import max_over_points

Widths = tuple[PositiveInt, ...]

SLOPE: Final = 0.2  # of every LeakyReLU


class DGCNNConfig(BaseModel, extra="forbid", frozen=True):
    """Sizes of a DGCNN."""

    kind: Literal["dgcnn"] = "dgcnn"
    width: PositiveFloat = 1.0  # multiplies every width below
    num_neighbours: PositiveInt = 20  # the point itself is one of them
    edge_widths: tuple[Widths, ...] = Field(
        default=((64,), (64,), (128,), (256,)), min_length=1
    )  # of each graph's layers
    embedding_width: PositiveInt = 1024
    final_relu: bool = True  # the embedding's activation; otherwise a LeakyReLU like all the others
    pooling: Literal["max", "max_and_mean"] = "max"
    transform: bool = False  # a learned alignment of the input
    transform_edge_widths: Widths = Field(default=(64, 128), min_length=1)
    transform_embedding_width: PositiveInt = 1024
    transform_widths: Widths = Field(default=(512, 256), min_length=1)

    def build(self) -> "DGCNN":
        """A new network with random weights."""
        return DGCNN(self)

    def scaled(self, *widths: int) -> Widths:
        """These widths times `width`."""
        return tuple(max(1, round(self.width * each)) for each in widths)


_SEGMENTATION_EDGES: Final = ((64, 64), (64, 64), (64,))
SEGMENTATION: Final = DGCNNConfig(num_neighbours=40, edge_widths=_SEGMENTATION_EDGES)
CROSSPOINT: Final = DGCNNConfig(num_neighbours=15, final_relu=False, pooling="max_and_mean")
# 15 neighbours in pre-training; part segmentation goes on with 40
CROSSPOINT_SEGMENTATION: Final = DGCNNConfig(
    num_neighbours=15, edge_widths=_SEGMENTATION_EDGES, final_relu=False, transform=True
)


class DGCNN(PointEncoder):
    """Embeds each point from the features of all graphs, and takes the maximum, or maximum and mean side by side."""

    def __init__(self, config: DGCNNConfig) -> None:
        super().__init__()
        self.pooling = config.pooling
        self.transform = InputTransform(config) if config.transform else None
        edges, num_features, num_local = [], 3, 0
        for widths in config.edge_widths:
            edges.append(EdgeLayers(num_features, config.scaled(*widths), config.num_neighbours))
            num_features = edges[-1].out_features
            num_local += num_features
        self.edges = nn.ModuleList(edges)
        self.level_dims = (num_local,)
        self.embedding = row_layers(
            num_local, config.scaled(config.embedding_width), negative_slope=0.0 if config.final_relu else SLOPE
        )
        self.per_point_dim = config.scaled(config.embedding_width)[0]
        self.pooled_dim = self.per_point_dim * (2 if config.pooling == "max_and_mean" else 1)

    def forward(self, points: Float[Tensor, "b n 3"]) -> Encoding:
        """Embeddings of the points in their own order, nowhere negative unless `final_relu` is off."""
        features = points
        if self.transform is not None:
            with torch.autocast(points.device.type, enabled=False):  # coordinates stay float32
                features = points @ self.transform(points).to(points.dtype)
        of_graphs = []
        for layer in self.edges:
            features = layer(features)
            of_graphs.append(features)
        local = torch.cat(of_graphs, dim=2)
        per_point = self.embedding(local)
        pooled = max_over_points(per_point)
        if self.pooling == "max_and_mean":
            pooled = torch.cat([pooled, per_point.mean(dim=1)], dim=1)
        return Encoding(per_point, pooled, levels=(Level(points, local),))


class EdgeLayers(nn.Module):
    """Layers on the edges of the graph of nearest features, then the maximum over each point's edges."""

    def __init__(self, in_features: int, widths: Widths, num_neighbours: int) -> None:
        super().__init__()
        self.num_neighbours = num_neighbours
        self.out_features = widths[-1]
        sizes = (2 * in_features, *widths)  # an edge is [neighbour - point, point]
        self.linears = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for width in widths)

    def forward(self, features: Float[Tensor, "b n c"]) -> Float[Tensor, "b n d"]:
        """New features of each point."""
        first, *others = self.linears
        assert isinstance(first, nn.Linear)
        neighbours = nearest_neighbours(features, features, self.num_neighbours).indices
        # In float32, as the distances are: an edge is the small difference of two terms
        with torch.autocast(features.device.type, enabled=False):
            of_difference, of_point = first.weight.chunk(2, dim=1)
            of_neighbours = F.linear(features, of_difference)
            of_points = F.linear(features, of_point) - of_neighbours
        return grouped_max(of_neighbours, of_points, neighbours, self.norms, others, negative_slope=SLOPE)


class InputTransform(nn.Module):
    """A 3 x 3 matrix for each cloud, computed from the cloud itself; the identity before any training."""

    def __init__(self, config: DGCNNConfig) -> None:
        super().__init__()
        edge_widths = config.scaled(*config.transform_edge_widths)
        embedding_widths = config.scaled(config.transform_embedding_width)
        widths = config.scaled(*config.transform_widths)
        self.edges = EdgeLayers(3, edge_widths, config.num_neighbours)
        self.embedding = row_layers(edge_widths[-1], embedding_widths, negative_slope=SLOPE)
        self.layers = row_layers(embedding_widths[-1], widths, negative_slope=SLOPE)
        self.matrix = nn.Linear(widths[-1], 9)
        nn.init.zeros_(self.matrix.weight)
        with torch.no_grad():
            self.matrix.bias.copy_(torch.eye(3).flatten())

    def forward(self, points: Float[Tensor, "b n 3"]) -> Float[Tensor, "b 3 3"]:
        """The matrices, to be multiplied from the right."""
        pooled = max_over_points(self.embedding(self.edges(points)))
        matrices: Tensor = self.matrix(self.layers(pooled)).unflatten(1, (3, 3))
        return matrices
