"""Features: which rows, which points, and the same whatever the number of ranks."""

from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from datastore import schema
from datastore.errors import DoNotRetry
from datastore.layout import QuarantinedRow, Store, create_store, open_store
from datastore.write import BlockWriter, publish
from models.encoding import Encoding, PointEncoder
from models.students import build_student
from tests.ranks import run_ranks
from tests.stores import sample_arrays, small_attributes
from trainer.distributed import World
from trainer.evaluate import features as features_module
from trainer.evaluate.features import ShapeFeatures, extract_features
from trainer.evaluate.labels import labelled_rows

CPU = torch.device("cpu")


class Sums(PointEncoder):
    """Sums of coordinates: what was read can be told from what comes out."""

    per_point_dim = pooled_dim = 3

    def forward(self, points: Float[Tensor, "b n 3"]) -> Encoding:
        return Encoding(points, points.sum(dim=1))


def extract(store: Store, encoder: PointEncoder, **changes: Any) -> dict[str, ShapeFeatures]:
    options: dict[str, Any] = {"num_points": None, "device": CPU, "world": World()}
    return extract_features(encoder, store, ("train", "test"), **(options | changes))


def test_features_are_of_the_first_points_as_stored(tiny_corpus: Store) -> None:
    found = extract(tiny_corpus, Sums(), num_points=7)
    for shapes in found.values():
        points = tiny_corpus.read("points", shapes.rows)[:, :7]
        np.testing.assert_allclose(shapes.values, points.sum(axis=1), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(shapes.labels, tiny_corpus.read("label", shapes.rows))


def test_unlabelled_and_quarantined_rows_are_left_out(tmp_path: Any) -> None:
    store = create_store(str(tmp_path / "s.zarr"), small_attributes(num_rows=16, block_rows=16), schema.INGEST_FIELDS)
    arrays = sample_arrays(store)
    arrays["label"][:] = np.arange(16) % 3
    arrays["label"][4] = -1
    arrays["split"][7] = schema.QUARANTINED
    BlockWriter(store).write(0, arrays, [QuarantinedRow(7, str(arrays["id"][7]), "empty")])
    publish(store)
    store = open_store(store.url)
    found = extract(store, Sums())
    rows = np.concatenate([shapes.rows for shapes in found.values()])
    assert sorted(rows.tolist()) == [row for row in range(16) if row not in (4, 7)]
    assert labelled_rows(store, "train")[0].tolist() == [row for row in range(16) if row % 3 != 2 and row not in (4, 7)]


def test_the_encoder_is_used_in_eval_mode_and_rows_do_not_see_each_other(tiny_corpus: Store) -> None:
    torch.manual_seed(0)
    encoder = build_student({"kind": "pointnet", "width": 0.0625}).eval()
    found = extract(tiny_corpus, encoder)["test"]
    for row, value in zip(found.rows[:3], found.values[:3], strict=True):
        alone = encoder(torch.from_numpy(tiny_corpus.read("points", [row]))).pooled[0]
        np.testing.assert_allclose(value, alone.detach().numpy(), rtol=1e-4, atol=1e-5)


def _on_rank(url: str) -> tuple[np.ndarray, tuple[str, ...]]:
    torch.manual_seed(0)
    encoder = build_student({"kind": "pointnet", "width": 0.0625}).eval()
    features_module._BATCH = 8  # several batches for each rank
    found = extract(open_store(url), encoder, world=World.from_env())["train"]
    return found.values, found.clouds


def test_ranks_share_the_batches_and_all_get_the_same(tiny_corpus: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "_BATCH", 8)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone, clouds = _on_rank(tiny_corpus.url)
    for values, rank_clouds in run_ranks(_on_rank, tiny_corpus.url):
        np.testing.assert_array_equal(values, alone)
        assert rank_clouds == clouds


def test_equal_clouds_have_equal_hashes_and_others_do_not(tiny_corpus: Store) -> None:
    found = extract(tiny_corpus, Sums())
    clouds = found["train"].clouds + found["test"].clouds
    assert len(set(clouds)) == len(clouds)
    assert extract(tiny_corpus, Sums())["train"].clouds == found["train"].clouds


def test_features_that_are_not_finite_are_refused(tiny_corpus: Store) -> None:
    class Broken(Sums):
        def forward(self, points: Float[Tensor, "b n 3"]) -> Encoding:
            return Encoding(points, points.sum(dim=1) / 0)

    with pytest.raises(DoNotRetry, match="not all finite"):
        extract(tiny_corpus, Broken())


def test_a_split_without_labels_is_refused(tmp_path: Any) -> None:
    store = create_store(str(tmp_path / "s.zarr"), small_attributes(num_rows=16, block_rows=16), schema.INGEST_FIELDS)
    arrays = sample_arrays(store)
    arrays["split"][:] = 0
    BlockWriter(store).write(0, arrays)
    publish(store)
    with pytest.raises(DoNotRetry, match=r"no labelled shape in split 'test'.*train 16, test 0"):
        extract(open_store(store.url), Sums())
