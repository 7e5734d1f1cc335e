"""What masked pre-training needs behind the masked transformer: a decoder, and heads that reconstruct.

I2P-MAE (CVPR 2023): mask tokens fill the coarsest scale, a block mixes all tokens, features are interpolated to the
scale before, beside what the encoder knows there, and a second block follows: 2,591,616 parameters. From its tokens,
masked ones predict their neighbours' coordinates (4,632) and visible ones what image networks see there (2,371,584).
Nothing of this is kept after pre-training.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from models.ops.interpolation import interpolate_from_three
from models.row_norm import RowNorm
from models.students.masked_transformer import MaskedTransformer, Scale
from models.transformer import TransformerStage, drop_path_rates


class MaskedDecoderConfig(BaseModel, extra="forbid", frozen=True):
    """Sizes of the decoder; its widths are its encoder's."""

    depth: PositiveInt = 1  # blocks a scale
    num_heads: PositiveInt = 6  # the spec of the published network leaves it open: as many as the encoder's
    mlp_ratio: PositiveFloat = 4.0
    drop_path: float = Field(default=0.1, ge=0, lt=1)  # of the last block; the first has none
    checkpoint_activations: bool = False

    def build(self, encoder: MaskedTransformer) -> "MaskedDecoder":
        """A new decoder with random weights for what this encoder returns."""
        return MaskedDecoder(self, encoder.widths)


class MaskedDecoder(nn.Module):
    """Tokens of the second-finest scale, all of them, from the visible tokens of all scales but the finest."""

    def __init__(self, config: MaskedDecoderConfig, widths: Sequence[int]) -> None:
        super().__init__()
        coarse_to_fine = list(reversed(widths[1:]))
        self.width = coarse_to_fine[-1]
        self.mask_token = nn.Parameter(torch.empty(coarse_to_fine[0]))
        rates = iter(drop_path_rates(config.drop_path, config.depth * len(coarse_to_fine)))
        self.stages = nn.ModuleList(
            TransformerStage(
                width,
                config.num_heads,
                [next(rates) for _ in range(config.depth)],
                mlp_ratio=config.mlp_ratio,
                checkpoint_activations=config.checkpoint_activations,
            )
            for width in coarse_to_fine
        )
        self.token_propagations = nn.ModuleList(
            TokenPropagation(coarser, finer) for coarser, finer in pairwise(coarse_to_fine)
        )
        self.norm = nn.LayerNorm(self.width)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        for stage in self.stages:
            assert isinstance(stage, TransformerStage)
            stage.blocks.apply(initialise)

    def forward(
        self,
        tokens: Sequence[Float[Tensor, "b _ _"]],
        scales: Sequence[Scale],
        visible: Sequence[Bool[Tensor, "b _"]],
    ) -> Float[Tensor, "b g d"]:
        """The tokens of the second-finest scale, in its order. The arguments are those of `encode_visible`, and `tokens`
        what it returned: zero where masked."""
        coarse_to_fine = list(zip(tokens, scales, strict=True))[:0:-1]
        coarsest, scale = coarse_to_fine[0]
        decoded: Tensor = torch.where(visible[-1][..., None], coarsest, self.mask_token)
        decoded = self.stages[0](decoded, scale.centres)
        for (known, finer), propagation, stage in zip(
            coarse_to_fine[1:], self.token_propagations, self.stages[1:], strict=True
        ):
            decoded = propagation(known, interpolate_from_three(decoded, scale.centres, finer.centres))
            decoded, scale = stage(decoded, finer.centres), finer
        normalised: Tensor = self.norm(decoded)
        return normalised


class TokenPropagation(nn.Module):
    """Tokens of a finer scale, from what the encoder knows there and what was interpolated from the coarser one."""

    def __init__(self, coarser: int, finer: int) -> None:
        super().__init__()
        self.fuse = nn.Sequential(nn.Linear(finer + coarser, finer), RowNorm(finer), nn.GELU())
        self.residual = nn.Sequential(
            nn.Linear(finer, finer), RowNorm(finer), nn.GELU(), nn.Linear(finer, finer), RowNorm(finer)
        )

    def forward(self, known: Float[Tensor, "b g f"], interpolated: Float[Tensor, "b g c"]) -> Float[Tensor, "b g f"]:
        """The tokens."""
        fused = self.fuse(torch.cat([known, interpolated], dim=2))
        return F.gelu(fused + self.residual(fused))


class CoordinatesHead(nn.Linear):
    """Where a token's neighbours lie, relative to its centre."""

    def __init__(self, width: int, num_neighbours: int) -> None:
        super().__init__(width, 3 * num_neighbours)

    def forward(self, tokens: Float[Tensor, "r d"]) -> Float[Tensor, "r k 3"]:
        """One set of places a token; their order means nothing."""
        places: Tensor = super().forward(tokens).unflatten(1, (-1, 3))
        return places


class FeaturesHead(nn.Linear):
    """What image networks see at a token's neighbours, views side by side."""

    def __init__(self, width: int, num_neighbours: int, num_features: int = 3 * 512) -> None:
        super().__init__(width, num_neighbours * num_features)
        self.num_features = num_features

    def forward(self, tokens: Float[Tensor, "r d"]) -> Float[Tensor, "r k f"]:
        """One row of features a neighbour, in the neighbours' order."""
        features: Tensor = super().forward(tokens).unflatten(1, (-1, self.num_features))
        return features


def initialise(module: nn.Module) -> None:
    """Gives a linear layer of a block the decoder's start: Xavier's uniform one, and no bias."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:  # the spec leaves open how biases start
            nn.init.zeros_(module.bias)
