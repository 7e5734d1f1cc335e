"""Small stores for tests: values follow from a seed, so that two writers agree on every byte."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.dtypes import StringDType

from datastore import schema
from datastore.cameras import rig_by_name
from datastore.layout import (
    INGEST,
    Store,
    StoreAttributes,
    StoredField,
    TeacherAttributes,
    create_store,
    open_store,
)
from datastore.write import BlockWriter, publish


def small_attributes(num_rows: int = 70, **changes: Any) -> StoreAttributes:
    """Attributes of a store with 12 tiny views; blocks of 32 rows unless told."""
    rig = rig_by_name("azimuth12", image_size=8)
    near, far = rig.depth_range
    facts: dict[str, Any] = {
        "num_rows": num_rows,
        "points_per_shape": 20,
        "block_rows": 32,
        "class_names": ("chair", "table", "lamp"),
        "splits": ("train", "test"),
        "rig": rig,
        "num_views": rig.num_views,
        "image_size": rig.image_size,
        "views_from": "rays",
        "visibility_from": "rays",
        "extra_views": 2,
        "extra_image_size": 4,
        "depth_near": near,
        "depth_far": far,
        "source_url": "memory://source",
        "source_format": "test",
        "source_hash": "0123456789abcdef",
    }
    return StoreAttributes(**(facts | changes))


def small_teacher(name: str = "teacher", weights_hash: str = "feedc0de0001", dim: int = 6) -> TeacherAttributes:
    """A teacher that describes 12 views by a few numbers each."""
    return TeacherAttributes(
        name=name,
        weights_hash=weights_hash,
        image_size=8,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        fields={"view_features": (12, dim)},
        dim=dim,
        options="--weights clip.safetensors",
    )


def sample_field(stored: StoredField, seed: int = 0) -> np.ndarray:
    """All rows of a field."""
    field, shape = stored.field, (stored.num_rows, *stored.row_shape)
    random = np.random.default_rng([seed, *field.name.encode()])
    if field.dtype == "string":
        return np.array([f"shape-{seed}-{row}-é" for row in range(stored.num_rows)], dtype=StringDType())
    if field.name == "split":
        return (np.arange(stored.num_rows) % 3 == 2).astype(np.uint8)  # two train, one test, two train
    if field.name == "label":
        return random.integers(-1, 3, shape)
    if field.dtype == "bool":
        return random.random(shape) < 0.5
    if field.dtype.startswith("float"):
        return random.standard_normal(shape).astype(field.dtype)
    return random.integers(0, 100, shape).astype(field.dtype)


def sample_arrays(store: Store, scope: str = INGEST, seed: int = 0) -> dict[str, np.ndarray]:
    """All rows of every field of a scope."""
    arrays = {stored.field.name: sample_field(stored, seed) for stored in store.fields_of(scope)}
    if "split" in arrays and len(store.splits) == 1:
        arrays["split"][:] = 0
    return arrays


def write_blocks(store: Store, blocks: Iterable[int], scope: str = INGEST, seed: int = 0) -> None:
    """Commits blocks filled with `sample_arrays`; publishes nothing."""
    writer, arrays = BlockWriter(store, scope), sample_arrays(store, scope, seed)
    for block in blocks:
        first, end = store.block_range(block)
        writer.write(block, {name: array[first:end] for name, array in arrays.items()})


def write_small_store(
    url: str, attributes: StoreAttributes | None = None, fields: Sequence[str] = schema.INGEST_FIELDS, seed: int = 0
) -> Store:
    """A complete, published store filled with `sample_arrays`."""
    store = create_store(url, attributes or small_attributes(), fields)
    write_blocks(store, BlockWriter(store).pending(), seed=seed)
    publish(store)
    return open_store(url)
