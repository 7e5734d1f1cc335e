"""Transformer blocks on points: pre-norm, and each token's place is added again before every block.

As Point-M2AE and I2P-MAE have them: attention without bias on queries, keys and values, exact GELU, no dropout.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class TransformerStage(nn.Module):
    """Blocks of one width on tokens that have places."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        drop_paths: Sequence[float],  # one a block
        *,
        mlp_ratio: float = 4.0,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.position = PositionEmbedding(width)
        self.blocks = nn.ModuleList(Block(width, num_heads, rate, mlp_ratio) for rate in drop_paths)
        self.checkpoint_activations = checkpoint_activations

    def forward(
        self,
        tokens: Float[Tensor, "b t d"],
        centres: Float[Tensor, "b t 3"],
        allowed: Bool[Tensor, "b 1 _ t"] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """The tokens after all blocks. `allowed` says which keys a query may see; None: all."""
        position = self.position(centres)
        for block in self.blocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens + position, allowed, use_reentrant=False)
            else:
                tokens = block(tokens + position, allowed)
        return tokens


class Block(nn.Module):
    """Attention and a small network, each with a norm before it and a shortcut around it."""

    def __init__(self, width: int, num_heads: int, drop_path: float = 0.0, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        hidden = round(mlp_ratio * width)
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.drop_path = DropPath(drop_path)

    def forward(
        self, tokens: Float[Tensor, "b t d"], allowed: Bool[Tensor, "b 1 _ t"] | None = None
    ) -> Float[Tensor, "b t d"]:
        """The tokens with what the two parts make of them added."""
        tokens = tokens + self.drop_path(self.attention(self.attention_norm(tokens), allowed))
        added: Tensor = self.drop_path(self.mlp(self.mlp_norm(tokens)))
        return tokens + added


class Attention(nn.Module):
    """Attention in several heads among the tokens of a cloud."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"Tokens {width} wide cannot be shared out among {num_heads} heads: the rest is not 0.")
        self.num_heads = num_heads
        self.queries_keys_values = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width)

    def forward(
        self, tokens: Float[Tensor, "b t d"], allowed: Bool[Tensor, "b 1 _ t"] | None = None
    ) -> Float[Tensor, "b t d"]:
        """What each token takes from those it may see; every query must see at least one."""
        heads = self.queries_keys_values(tokens).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        queries, keys, values = heads.unbind(0)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed)
        output: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return output


class PositionEmbedding(nn.Module):
    """A vector for each place, by a small network on its coordinates."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(3, width)
        self.outer = nn.Linear(width, width)

    def forward(self, places: Float[Tensor, "b t 3"]) -> Float[Tensor, "b t d"]:
        """The vectors; coordinates are read in full precision also under autocast."""
        with torch.autocast(places.device.type, enabled=False):
            hidden = F.gelu(self.inner(places))
        embedded: Tensor = self.outer(hidden)
        return embedded


class DropPath(nn.Module):
    """In training, drops what it is given for some samples whole, and scales it up for the others."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, added: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """The same in expectation."""
        if self.rate == 0 or not self.training:
            return added
        kept = 1 - self.rate
        return added * (added.new_empty(len(added), 1, 1).bernoulli_(kept) / kept)


def drop_path_rates(highest: float, depth: int) -> list[float]:
    """From 0 at the first of `depth` blocks evenly up to `highest` at the last."""
    return [highest * block / max(depth - 1, 1) for block in range(depth)]


def attention_mask(
    centres: Float[Tensor, "b t 3"], real: Bool[Tensor, "b t"] | None = None, radius: float | None = None
) -> Bool[Tensor, "b 1 _ t"] | None:
    """Which keys each query may see: none that are padding, none as far away as the radius or farther. None: all.

    No row is empty, for attention over nothing is not a number: where there is nothing real, padding sees padding.
    """
    if radius is None:
        return None if real is None else (real | ~real.any(dim=1, keepdim=True))[:, None, None]
    with torch.no_grad():
        # The direct form: distances by way of a matrix product lose the last digits
        near = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist") < radius
    if real is not None:
        near = near & real[:, None] | torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
    return near[:, None]
