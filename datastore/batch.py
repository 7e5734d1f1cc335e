"""What a stream delivers: one dataclass a kind of training, whose field names are the store fields that are read."""

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Self

import torch
from jaxtyping import Int64
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Ids and seeds, which every batch carries; subclasses add the fields that they read, by their names in the store."""

    ids: Int64[Tensor, " b"]  # rows of the store
    seeds: Int64[Tensor, " b"]  # a function of (run seed, epoch, id): all of a sample's randomness starts here

    views_drawn: ClassVar[int | None] = None  # of each sample; None: all of them
    _unread: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def store_fields(cls) -> tuple[str, ...]:
        """Names of the store fields that this batch reads."""
        own = {"ids", "seeds"} | cls._unread
        return tuple(field.name for field in dataclasses.fields(cls) if field.name not in own)

    @classmethod
    @lru_cache
    def without(cls, *names: str) -> type[Self]:
        """The same batch for a setting that does not need these fields: they are not read, and stay None."""
        narrowed: type[Self] = type(cls.__name__, (cls,), {"_unread": cls._unread | set(names), "__doc__": cls.__doc__})
        return narrowed

    @classmethod
    @lru_cache
    def drawing(cls, num_views: int) -> type[Self]:
        """The same batch with only so many views of each sample, in every field that has the axis v.

        Which ones follows from the sample's seed: `order.drawn_views(seeds, ...)` names them.
        """
        narrowed: type[Self] = type(cls.__name__, (cls,), {"views_drawn": num_views, "__doc__": cls.__doc__})
        return narrowed

    def to(self, device: torch.device) -> Self:
        """The same batch on another device. Copies from pinned memory do not hold up this thread; the device makes them in turn."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True) for name in ("ids", "seeds", *self.store_fields())
        }
        return type(self)(**moved)

    def __len__(self) -> int:
        return len(self.ids)
