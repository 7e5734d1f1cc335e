"""The hierarchical masked transformer of Point-M2AE and I2P-MAE: tokens at three scales, encoded from fine to coarse.

"Learning 3D Representations from 2D Pre-trained Models via Image-to-Point Masked Autoencoders" (CVPR 2023) with the
network of Point-M2AE (NeurIPS 2022): 12,653,632 parameters, and 1,344 in the norms of its stages. A token stands for a
group: at the finest scale of points, at the others of tokens of the scale before. As a student like any other, it sees
all tokens; for masked pre-training, `group` says where tokens are, `propagate_visibility` which finer ones belong to
visible coarse ones, and `encode_visible` encodes these alone. What is masked is the objective's choice.

Differs from the paper's code: visibility never leaks from one cloud of a batch to another (there, masked tokens make
the first cloud's first token visible); with nothing masked no token is dropped (there, finer tokens that are nobody's
neighbour are); points near the origin can be centres like any other, unless `origin_last`. Parameters whose names
contain "token" have no weight decay there, and the names here agree.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from models.encoding import Encoding, Level, PointEncoder
from models.ops.neighbours import gather, nearest_neighbours
from models.ops.sampling import farthest_points
from models.pair_linear import PairLinear
from models.row_norm import RowNorm
from models.transformer import TransformerStage, attention_mask, drop_path_rates

_PADDED_TO = 8  # lengths are multiples of it, which attention kernels like; what a cloud's tokens become is the same


class MaskedTransformerConfig(BaseModel, extra="forbid", frozen=True):
    """Sizes of a masked transformer, from the finest scale to the coarsest; the defaults are those of pre-training.

    `width: 5, num_heads: 12` is a network of 300 million parameters.
    """

    kind: Literal["masked_transformer"] = "masked_transformer"
    width: PositiveFloat = 1.0  # multiplies every width
    num_groups: tuple[PositiveInt, PositiveInt, PositiveInt] = (512, 256, 64)
    group_sizes: tuple[PositiveInt, PositiveInt, PositiveInt] = (16, 8, 8)  # fine-tuning: 32, 16, 16 or 48, 24, 24
    widths: tuple[PositiveInt, PositiveInt, PositiveInt] = (96, 192, 384)
    embedding_widths: tuple[PositiveInt, PositiveInt] = (128, 256)  # inside the finest scale's token embedding
    depths: tuple[PositiveInt, PositiveInt, PositiveInt] = (5, 5, 5)
    num_heads: PositiveInt = 6
    mlp_ratio: PositiveFloat = 4.0
    drop_path: float = Field(default=0.1, ge=0, lt=1)  # of the last block; the first has none
    # Tokens see those nearer than this; fine-tuning: 0.32, 0.64, 1.28 and others. None: all see all
    local_radii: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    stage_norms: Literal["every", "last"] = "every"  # last: fine-tuning for classification
    # Linear SVM: max. Fine-tuning: mean_plus_max (ModelNet40), mean_and_max, side by side (ScanObjectNN)
    pooling: Literal["max", "mean_plus_max", "mean_and_max"] = "max"
    origin_last: bool = False  # centres as the papers' kernels choose them: `models.ops.sampling.farthest_points`
    checkpoint_activations: bool = False  # blocks are computed again in the backward pass instead of kept

    @model_validator(mode="after")
    def _fits(self) -> "MaskedTransformerConfig":
        for width in self.scaled(self.widths):
            if width % self.num_heads:
                raise ValueError(f"num_heads is {self.num_heads}, which does not divide {width}, a scale's width")
        for finer, coarser, size in zip(self.num_groups, self.num_groups[1:], self.group_sizes[1:], strict=False):
            if not max(coarser, size) <= finer:
                raise ValueError(
                    f"{coarser} groups of {size} cannot be made of {finer} tokens: num_groups must not grow, and no "
                    f"group can be larger than the scale before"
                )
        return self

    def build(self) -> "MaskedTransformer":
        """A new network with random weights."""
        return MaskedTransformer(self)

    def scaled(self, widths: Sequence[int]) -> list[int]:
        """These widths times `width`."""
        return [max(1, round(self.width * each)) for each in widths]


@dataclass(frozen=True)
class Scale:
    """The tokens of one scale: where they are, and what they are made of."""

    centres: Float[Tensor, "b g 3"]
    indices: Int64[Tensor, "b g"]  # of the centres among the cloud's points
    neighbours: Int64[Tensor, "b g k"]  # among the tokens of the scale before, nearest first; at first among the points


class MaskedTransformer(PointEncoder):
    """Embeddings of the coarsest tokens, at the points that are their centres, and what they pool to.

    Its levels are the points themselves and the tokens of each scale.
    """

    def __init__(self, config: MaskedTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.widths = config.scaled(config.widths)
        inner, outer = config.scaled(config.embedding_widths)
        self.token_embeddings = nn.ModuleList([TokenEmbedding(3, inner, outer, self.widths[0])])
        for before, width in pairwise(self.widths):
            self.token_embeddings.append(TokenEmbedding(before, before, before, width))
        rates = iter(drop_path_rates(config.drop_path, sum(config.depths)))
        self.stages = nn.ModuleList(
            TransformerStage(
                width,
                config.num_heads,
                [next(rates) for _ in range(depth)],
                mlp_ratio=config.mlp_ratio,
                checkpoint_activations=config.checkpoint_activations,
            )
            for width, depth in zip(self.widths, config.depths, strict=True)
        )
        every = config.stage_norms == "every"
        self.norms = nn.ModuleList(
            nn.LayerNorm(width) if every or index == len(self.widths) - 1 else nn.Identity()
            for index, width in enumerate(self.widths)
        )
        self.per_point_dim = self.widths[-1]
        self.pooled_dim = self.per_point_dim * (2 if config.pooling == "mean_and_max" else 1)
        self.level_dims = (3, *self.widths)
        self.apply(initialise)

    def forward(self, points: Float[Tensor, "b n 3"]) -> Encoding:
        """Embeddings of the coarsest tokens, nothing masked, with the places of their centres among the points."""
        scales = self.group(points)
        every_scale = self.encode_visible(points, scales)
        tokens = every_scale[-1]
        highest = tokens.amax(dim=1)
        if self.config.pooling == "max":
            pooled = highest
        elif self.config.pooling == "mean_plus_max":
            pooled = tokens.mean(dim=1) + highest
        else:
            pooled = torch.cat([tokens.mean(dim=1), highest], dim=1)
        levels = [Level(scale.centres, each) for scale, each in zip(scales, every_scale, strict=True)]
        return Encoding(tokens, pooled, scales[-1].indices, levels=(Level(points, points), *levels))

    def group(self, points: Float[Tensor, "b n 3"]) -> tuple[Scale, ...]:
        """Where the tokens of each scale are, the finest first. The cloud's first point is every scale's first centre."""
        needed = max(self.config.num_groups[0], self.config.group_sizes[0])
        if points.shape[1] < needed:
            raise ValueError(
                f"The masked transformer makes {self.config.num_groups[0]} groups of {self.config.group_sizes[0]} of a "
                f"cloud, but points is {tuple(points.shape)}: give it at least {needed} points, or set smaller "
                f"num_groups and group_sizes."
            )
        scales: list[Scale] = []
        before = points
        for num_groups, group_size in zip(self.config.num_groups, self.config.group_sizes, strict=True):
            chosen = farthest_points(before, num_groups, origin_last=self.config.origin_last)
            centres = gather(before, chosen)
            indices = scales[-1].indices.gather(1, chosen) if scales else chosen
            scales.append(Scale(centres, indices, nearest_neighbours(centres, before, group_size).indices))
            before = centres
        return tuple(scales)

    def encode_visible(
        self,
        points: Float[Tensor, "b n 3"],
        scales: Sequence[Scale],
        visible: Sequence[Bool[Tensor, "b _"]] | None = None,
    ) -> tuple[Float[Tensor, "b _ _"], ...]:
        """The tokens of each scale after that stage's norm, [b, g, d] in the order of `scales`, zero where not visible.

        `visible` comes from `propagate_visibility`; None: all are. What a cloud's tokens become does not depend on how
        many of other clouds' are visible.
        """
        lengths = None if visible is None else padded_lengths(visible)
        encoded: list[Tensor] = []
        for index, (scale, embedding, stage) in enumerate(zip(scales, self.token_embeddings, self.stages, strict=True)):
            # The spec leaves open what a masked group sees of masked tokens: zeros
            groups = gather(encoded[-1] if encoded else points, scale.neighbours)
            if not encoded:
                groups = groups - scale.centres[:, :, None]
            tokens = embedding(groups)  # of masked groups too: they take part in batch statistics
            radius = None if self.config.local_radii is None else self.config.local_radii[index]
            if visible is None or lengths is None:
                encoded.append(stage(tokens, scale.centres, attention_mask(scale.centres, radius=radius)))
                continue
            order, real = visible_first(visible[index], lengths[index])
            kept_centres = torch.where(real[..., None], gather(scale.centres, order), 0)
            kept = torch.where(real[..., None], gather(tokens, order), 0)
            kept = stage(kept, kept_centres, attention_mask(kept_centres, real, radius))
            encoded.append(put_back(torch.where(real[..., None], kept, 0), order, tokens.shape[1]))
        return self._normalise(encoded, visible)

    def _normalise(
        self, encoded: Sequence[Tensor], visible: Sequence[Bool[Tensor, "b _"]] | None
    ) -> tuple[Float[Tensor, "b _ _"], ...]:
        normalised = [norm(tokens) for norm, tokens in zip(self.norms, encoded, strict=True)]
        if visible is not None:
            normalised = [torch.where(mask[..., None], each, 0) for mask, each in zip(visible, normalised, strict=True)]
        # Whoever reads the coarsest tokens alone leaves the other norms out. Their gradient is then zero and not
        # missing: distributed engines wait for one of every parameter.
        unread = sum(tokens[:1, :1].sum() for tokens in normalised[:-1])
        return (*normalised[:-1], normalised[-1] + 0 * unread)


class TokenEmbedding(nn.Module):
    """One token of each group: a small PointNet with two maxima over the group's members."""

    def __init__(self, in_features: int, inner: int, outer: int, width: int) -> None:
        super().__init__()
        self.local = nn.Sequential(
            nn.Linear(in_features, inner), RowNorm(inner), nn.ReLU(inplace=True), nn.Linear(inner, outer)
        )
        self.pair = PairLinear(outer, outer, 2 * outer)  # on [the group's maximum, the member]
        self.pair_norm = RowNorm(2 * outer)
        self.output = nn.Linear(2 * outer, width)

    def forward(self, groups: Float[Tensor, "b g k c"]) -> Float[Tensor, "b g d"]:
        """The tokens."""
        local = self.local(groups)
        pairs = self.pair_norm(self.pair(local.amax(dim=2), local))
        tokens: Tensor = self.output(F.relu(pairs, inplace=True)).amax(dim=2)
        return tokens


def propagate_visibility(scales: Sequence[Scale], coarsest: Bool[Tensor, "b g"]) -> tuple[Bool[Tensor, "b _"], ...]:
    """Which tokens of each scale are visible, the finest first: the neighbours of visible tokens of the next coarser."""
    visible = [coarsest]
    for finer, scale in zip(scales[-2::-1], scales[:0:-1], strict=True):
        num_clouds, num_tokens = finer.indices.shape
        seen = torch.where(visible[-1][..., None], scale.neighbours, num_tokens)  # those of masked tokens: nowhere
        marked = visible[-1].new_zeros(num_clouds, num_tokens + 1).scatter(1, seen.flatten(1), True)
        visible.append(marked[:, :num_tokens])
    return tuple(reversed(visible))


def padded_lengths(visible: Sequence[Bool[Tensor, "b _"]]) -> list[int]:
    """For each scale the room that the cloud with most visible tokens needs; asks the device once for all."""
    most = torch.stack([mask.sum(dim=1).amax() for mask in visible]).tolist()
    return [
        min(mask.shape[1], -(-max(longest, 1) // _PADDED_TO) * _PADDED_TO)
        for mask, longest in zip(visible, most, strict=True)
    ]


def visible_first(visible: Bool[Tensor, "b g"], length: int) -> tuple[Int64[Tensor, "b t"], Bool[Tensor, "b t"]]:
    """Indices of the visible tokens in their own order, then padding up to `length`; and which are not padding."""
    order = (~visible).byte().argsort(dim=1, stable=True)[:, :length]
    return order, visible.gather(1, order)


def put_back(tokens: Float[Tensor, "b t d"], order: Int64[Tensor, "b t"], num_tokens: int) -> Float[Tensor, "b g d"]:
    """The tokens at the places that `order` names, zeros elsewhere; no place is named twice."""
    zeros = tokens.new_zeros(len(tokens), num_tokens, tokens.shape[2])
    return zeros.scatter(1, order[..., None].expand_as(tokens), tokens)


def initialise(module: nn.Module) -> None:
    """Gives a linear layer the encoder's start: a truncated normal of deviation 0.02, and no bias."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
