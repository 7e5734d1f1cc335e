"""What every objective is: a batch it reads, modules it owns, and a forward pass that returns its weighted terms."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar

from torch import Tensor, nn

from datastore.batch import Batch

Terms = dict[str, Tensor]
"""Scalars by name, already weighted: the loss is their sum, so the log adds up to what was optimised."""


@dataclass(frozen=True)
class Corpus:
    """The facts about a store that size a network: read from the store, never written in a recipe."""

    class_names: tuple[str, ...]
    num_views: int
    image_size: int
    part_names: tuple[str, ...] = ()
    teacher_dims: Mapping[str, int] = field(default_factory=dict)  # width of view_features, by teacher


BatchT = TypeVar("BatchT", bound=Batch)


class Objective(nn.Module, ABC, Generic[BatchT]):
    """One way to train. `encoder` is the module that is kept, evaluated and exported."""

    batch_type: ClassVar[type[Batch]]

    @property
    @abstractmethod
    def encoder(self) -> nn.Module:
        """The network that remains after training."""

    @abstractmethod
    def forward(self, batch: BatchT) -> Terms:
        """The weighted terms of one micro-batch."""
