"""Everything that happens to data: stores, ingest, streaming."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datastore.layout import Store, open_store

__all__ = ["Store", "open_store"]


def __getattr__(name: str) -> Any:
    # zarr takes half a second to import: `viewpoint --help` does without
    if name in __all__:
        from datastore import layout

        return getattr(layout, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
