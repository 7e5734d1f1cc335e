"""Operations of our own in torch's eyes: the compiler passes them by instead of looking inside, and they need no gradient."""

from collections.abc import Callable
from typing import Any, Final

import torch

# Not `torch.library.custom_op`: its first call imports the compiler, which takes a second and 140 MB.
_LIBRARY: Final = torch.library.Library("viewpoint", "DEF")


def opaque(schema: str, like: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function the operation that the schema describes; `like` returns empty tensors of its results' shapes."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"viewpoint::{name}", like, lib=_LIBRARY)
        operation: Callable[..., Any] = getattr(torch.ops.viewpoint, name)
        return operation

    return register
