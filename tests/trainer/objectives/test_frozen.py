"""Networks that help to train another are no part of it."""

from pathlib import Path

import pytest
import torch
from torch import nn

from datastore.errors import AskedWrongly, DoNotRetry
from models.exported import save_exported
from models.image_models import build_image_model
from models.image_models.multi_view import MultiViewClassifier
from models.image_models.pooled import PooledTrunk
from trainer.objectives.frozen import Frozen, load_network

CONFIG = {"kind": "pooled", "trunk": {"name": "test_resnet", "image_size": 32}}


@pytest.fixture
def exported(tmp_path: Path) -> str:
    save_exported(tmp_path, {"kind": "image_model", "image_model": CONFIG}, build_image_model(CONFIG), "", {})
    return str(tmp_path)


def test_a_frozen_network_is_no_part_of_what_holds_it() -> None:
    holder = nn.Linear(2, 2)
    holder.helper = Frozen(nn.Sequential(nn.BatchNorm1d(3)))  # type: ignore[assignment]
    holder.train()
    network = holder.helper.on(torch.device("cpu"))  # type: ignore[operator]
    assert not network.training and not any(each.requires_grad for each in network.parameters())
    assert set(holder.state_dict()) == {"weight", "bias"} == {name for name, _ in holder.named_parameters()}


def test_an_exported_network_is_loaded_with_its_weights(exported: str) -> None:
    first, second = (load_network(exported, PooledTrunk, key="objective.teacher_network") for _ in range(2))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])


def test_a_network_of_another_kind_or_none_is_refused_with_the_setting_s_name(exported: str, tmp_path: Path) -> None:
    with pytest.raises(AskedWrongly, match=r"objective\.helper=.* holds a PooledTrunk, where a MultiViewClassifier"):
        load_network(exported, MultiViewClassifier, key="objective.helper")
    with pytest.raises(DoNotRetry, match=r"objective\.helper=.* is not an exported model"):
        load_network(str(tmp_path / "absent"), PooledTrunk, key="objective.helper")
