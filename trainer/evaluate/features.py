"""Features of a frozen encoder: one row a shape, pooled, from the first points as they are stored, unscaled."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int64
from numpy import ndarray

from datastore.errors import DoNotRetry
from datastore.layout import Store
from datastore.progress import Progress
from models.encoding import PointEncoder
from trainer.distributed import World, gather_reports
from trainer.evaluate.labels import labelled_rows

_BATCH = 64  # part of the result: another size may change last bits


@dataclass(frozen=True)
class ShapeFeatures:
    """Some rows of a store as an encoder sees them."""

    rows: Int64[ndarray, " n"]
    labels: Int64[ndarray, " n"]
    values: Float32[ndarray, "n d"]
    clouds: tuple[str, ...]  # a hash of each shape's points: equal clouds under two names are found by it


def extract_features(
    encoder: PointEncoder,
    store: Store,
    splits: Sequence[str],
    *,
    num_points: int | None,
    device: torch.device,
    world: World,
) -> dict[str, ShapeFeatures]:
    """Features of every labelled shape of each split; ranks share the batches, and all of them get all features."""
    chosen = {split: labelled_rows(store, split) for split in splits}
    for split, (rows, _) in chosen.items():
        if not len(rows):
            raise DoNotRetry(
                f"{store.url} has no labelled shape in split {split!r}, which this protocol needs. Its splits: "
                f"{', '.join(f'{name} {len(store.rows(name)):,}' for name in store.splits)}."
            )
    # batches do not cross splits, so that the features of one do not depend on the other
    batches = [(split, first) for split, (rows, _) in chosen.items() for first in range(0, len(rows), _BATCH)]
    mine: dict[tuple[str, int], tuple[ndarray, list[str]]] = {}
    encoder = encoder.to(device)
    total = sum(len(rows) for rows, _ in chosen.values())
    with Progress("evaluate", total, "shapes") as progress:
        for number, (split, first) in enumerate(batches):
            if number % world.size != world.rank:
                continue
            rows = chosen[split][0][first : first + _BATCH]
            points = store.read("points", rows)[:, :num_points]
            mine[split, first] = (_encode(encoder, points, device), [_hash(cloud) for cloud in points])
            progress.update(min((number + 1) * _BATCH, total))
    found = {key: value for part in gather_reports(mine) for key, value in part.items()}
    features = {}
    for split, (rows, labels) in chosen.items():
        parts = [found[split, first] for first in range(0, len(rows), _BATCH)]
        values = np.concatenate([values for values, _ in parts])
        if not np.isfinite(values).all():
            raise DoNotRetry(
                f"The encoder's features of split {split!r} are not all finite numbers: its weights are damaged, or "
                f"its training diverged. Look at the loss in the run's report."
            )
        features[split] = ShapeFeatures(rows, labels, values, tuple(cloud for _, hashes in parts for cloud in hashes))
    return features


@torch.inference_mode()
def _encode(encoder: PointEncoder, points: Float32[ndarray, "b n 3"], device: torch.device) -> Float32[ndarray, "b d"]:
    pooled: ndarray = encoder(torch.from_numpy(points).to(device)).pooled.float().cpu().numpy()
    return pooled


def _hash(cloud: Float32[ndarray, "n 3"]) -> str:
    return hashlib.blake2b(np.ascontiguousarray(cloud).tobytes(), digest_size=12).hexdigest()
