"""What every objective is: a batch it reads, modules it owns, and a forward pass that returns its weighted terms."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Generic, TypeVar

from torch import Tensor, nn

from datastore.batch import Batch

Terms = dict[str, Tensor]
"""Scalars by name, already weighted: the loss is their sum, so the log adds up to what was optimised."""


@dataclass(frozen=True)
class TaughtFields:
    """What a teacher wrote into a store: sizes of one shape's arrays, by field, and of the images that it looked at."""

    image_size: int
    sizes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Corpus:
    """The facts about a store that size a network: read from the store, never written in a recipe."""

    class_names: tuple[str, ...]
    num_views: int
    image_size: int
    part_names: tuple[str, ...] = ()
    teacher_dims: Mapping[str, int] = field(default_factory=dict)  # width of view_features, by teacher
    teachers: Mapping[str, TaughtFields] = field(default_factory=dict)


BatchT = TypeVar("BatchT", bound=Batch)


class Objective(nn.Module, ABC, Generic[BatchT]):
    """One way to train. `encoder` is the module that is kept, evaluated and exported."""

    # Whether its loss ties the samples of a micro-batch together, so that accumulation changes what is learned
    compares_samples: bool = False
    batch_type: type[Batch]
    figures: Mapping[str, Tensor] = MappingProxyType({})  # of the last forward: watched, without a part in the loss

    @property
    @abstractmethod
    def encoder(self) -> nn.Module:
        """The network that remains after training."""

    @abstractmethod
    def forward(self, batch: BatchT) -> Terms:
        """The weighted terms of one micro-batch."""
