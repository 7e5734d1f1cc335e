"""Tests of trainer/objectives/view_features.py."""

from pathlib import Path

import pytest
import torch

from datastore.errors import MissingField
from datastore.layout import create_teacher, open_store
from datastore.write import BlockWriter, publish
from tests.runs import tiny_config
from tests.stores import small_attributes, small_teacher, write_blocks, write_small_store
from trainer.objectives.base import Corpus
from trainer.objectives.view_features import feature_width, of_shape
from trainer.pretrain import build_objective


def test_a_shape_is_the_maximum_of_its_views_in_any_order_and_a_constant() -> None:
    features = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)).half()
    assert torch.equal(of_shape(features), features.float().max(dim=1).values)
    assert torch.equal(of_shape(features[:, [2, 0, 3, 1, 1]]), of_shape(features))
    assert not of_shape(features.float().requires_grad_()).requires_grad


def test_a_teacher_without_features_is_refused_with_the_command_that_writes_them() -> None:
    corpus = Corpus((), 4, 32, teacher_dims={"clip": 512})
    assert feature_width("clip", corpus, "pointmcd") == 512
    with pytest.raises(MissingField, match=r"those of clip. Write them with `viewpoint cache STORE --teacher other"):
        feature_width("other", corpus, "pointmcd")


def test_a_teacher_that_wrote_tokens_alone_has_no_features(tmp_path: Path) -> None:
    url = str(tmp_path / "store.zarr")
    store = write_small_store(url, small_attributes(), ("points", "label", "visibility", "split", "id"))
    tokens = {"fields": {"view_tokens": (12, 4, 6)}, "num_tokens": 4}
    scope = create_teacher(store, small_teacher().model_copy(update=tokens))
    write_blocks(open_store(url), BlockWriter(open_store(url), scope).pending(), scope)
    publish(open_store(url))
    with pytest.raises(MissingField, match="no 'view_features' of teacher 'teacher'"):
        build_objective(tiny_config(url), open_store(url))
