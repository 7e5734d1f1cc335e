"""What a stream delivers: one dataclass a kind of training, whose field names are the store fields that are read."""

import dataclasses
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Int64
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Ids and seeds, which every batch carries; subclasses add the fields that they read, by their names in the store."""

    ids: Int64[Tensor, " b"]  # rows of the store
    seeds: Int64[Tensor, " b"]  # a function of (run seed, epoch, id): all of a sample's randomness starts here

    @classmethod
    def store_fields(cls) -> tuple[str, ...]:
        """Names of the store fields that this batch reads."""
        return tuple(field.name for field in dataclasses.fields(cls) if field.name not in ("ids", "seeds"))

    def to(self, device: torch.device) -> Self:
        """The same batch on another device; copies overlap with compute where the memory is pinned."""
        moved = {
            field.name: getattr(self, field.name).to(device, non_blocking=True) for field in dataclasses.fields(self)
        }
        return type(self)(**moved)

    def __len__(self) -> int:
        return len(self.ids)
