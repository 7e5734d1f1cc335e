"""Networks that help to train another and stay as they are."""

from typing import Generic, TypeVar

import torch
from torch import nn

from datastore.errors import AskedWrongly, DoNotRetry
from models.exported import ExportedEncoder, load
from trainer.fetched import fetched

NetworkT = TypeVar("NetworkT", bound=nn.Module)


class Frozen(Generic[NetworkT]):
    """A network in eval mode and without gradients, which no module that holds this owns.

    So it is in no optimizer and in no checkpoint, no ZeRO stage cuts it, and `train()` of its holder leaves it in eval mode.
    """

    def __init__(self, network: NetworkT) -> None:
        self._network = network.eval().requires_grad_(False)

    def on(self, device: torch.device) -> NetworkT:
        """The network, on that device from now on."""
        return self._network.to(device)


def load_network(url: str, kind: type[NetworkT], *, key: str) -> NetworkT:
    """The network of that kind in the exported folder at a URL; `key` names in errors the setting that gave it."""
    try:
        with fetched(url) as path:
            loaded = load(path)
    except (ValueError, FileNotFoundError) as error:
        raise DoNotRetry(f"{key}={url}: {error}") from error
    network = loaded.network if isinstance(loaded, ExportedEncoder) else loaded
    if not isinstance(network, kind):
        raise AskedWrongly(
            f"{key}={url} holds a {type(network).__name__}, where a {kind.__name__} is needed. Give the export of a job "
            f"that trains one."
        )
    return network
