"""Every way to name an encoder leads to the same weights."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from datastore.errors import AskedWrongly, DoNotRetry, StoreError
from datastore.layout import Store, open_store
from models.encoding import PointEncoder
from tests.runs import STEPS, tiny_config
from trainer.checkpoint import load_weights
from trainer.encoders import encoder_url, find_encoder, initial_encoder, trained_encoder
from trainer.runfolder import RunFolder


def same(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_run_its_checkpoint_and_its_export_are_one_encoder(tiny_run: RunFolder) -> None:
    found = [
        find_encoder(tiny_run.url),
        find_encoder(f"{tiny_run.url}/"),
        find_encoder(tiny_run.checkpoints_url),
        find_encoder(f"{tiny_run.checkpoints_url}/step-{STEPS:08d}"),
        find_encoder(tiny_run.export_url),
    ]
    assert all(same(each.encoder, found[0].encoder) for each in found)
    assert [each.step for each in found] == [STEPS] * 5
    assert {each.config_hash for each in found} == {tiny_run.config().hash()}
    assert {each.num_points for each in found} == {16}
    assert {each.split for each in found} == {"train"}
    assert {each.teacher for each in found} == {"teacher"}
    assert [each.run is None for each in found] == [False] * 4 + [True]
    assert not any(each.encoder.training for each in found)
    assert not any(parameter.requires_grad for each in found for parameter in each.encoder.parameters())


def test_an_earlier_checkpoint_has_other_weights(tiny_run: RunFolder) -> None:
    early = find_encoder(f"{tiny_run.checkpoints_url}/step-00000002")
    assert early.step == 2
    assert not same(early.encoder, find_encoder(tiny_run.url).encoder)


def test_a_relative_path_is_understood(tiny_run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(tiny_run.url) / "checkpoints")
    assert find_encoder("step-00000002").step == 2
    assert find_encoder("..").step == STEPS


def test_a_run_in_the_folder_of_runs_is_known_by_its_name(
    tiny_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_run.url, "runs/first")
    assert encoder_url("first") == "runs/first"
    assert find_encoder(encoder_url("first")).step == STEPS
    for other in ("runs/first", "runs/first/checkpoints", "s3://bucket/first", "absent"):
        assert encoder_url(other) == other
    with pytest.raises(AskedWrongly, match=r"There is nothing\. Runs in \./runs: first\."):
        find_encoder("absent")
    shutil.copytree(tiny_run.export_url, "first")
    assert encoder_url("first") == "first", "what lies at the path itself comes before a run of that name"


def test_random_weights_are_those_that_training_begins_with(tiny_run: RunFolder, tiny_corpus: Store) -> None:
    from trainer.pretrain import build_objective

    found = find_encoder(tiny_run.url, random_weights=True)
    assert found.is_random and found.step is None
    assert same(found.encoder, build_objective(tiny_run.config(), tiny_corpus).encoder)
    assert not same(found.encoder, find_encoder(tiny_run.url).encoder)
    other_seed = tiny_run.config().model_copy(update={"seed": 4})
    assert not same(found.encoder, initial_encoder(other_seed))


def test_drawing_first_weights_leaves_the_random_state_alone(tiny_corpus: Store) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    initial_encoder(tiny_config(tiny_corpus.url))
    assert torch.equal(torch.rand(1), expected)


def test_running_statistics_come_along(tiny_run: RunFolder) -> None:
    encoder = find_encoder(tiny_run.url).encoder
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm1d)]
    assert norms and all(norm.num_batches_tracked.item() > 0 for norm in norms)


def test_places_without_an_encoder_are_refused(tiny_run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "something.txt").touch()
    with pytest.raises(AskedWrongly, match=r"no run folder .*There is something\.txt"):
        find_encoder(str(tmp_path))
    with pytest.raises(AskedWrongly, match="give --random-weights the run folder"):
        find_encoder(tiny_run.export_url, random_weights=True)
    fresh = RunFolder(str(tmp_path / "fresh"))
    fresh.write_config(tiny_run.config())
    with pytest.raises(StoreError, match="no committed checkpoint"):
        find_encoder(fresh.url)
    assert find_encoder(fresh.url, random_weights=True).is_random


def test_a_damaged_export_is_refused(tiny_run: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(tiny_run.export_url, tmp_path / "export")
    (tmp_path / "export" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(DoNotRetry, match="Export it again"):
        find_encoder(str(tmp_path / "export"))


def test_a_config_that_is_not_the_checkpoint_s_is_refused(tiny_run: RunFolder) -> None:
    weights = load_weights(tiny_run.checkpoints_url)
    without_transforms = {name: weight for name, weight in weights.items() if "input_transform" not in name}
    with pytest.raises(DoNotRetry, match="holds 0 networks"):
        trained_encoder(tiny_run, without_transforms)
    assert isinstance(trained_encoder(tiny_run, weights), PointEncoder)


def test_the_store_that_was_read_is_recognised(tiny_run: RunFolder, tiny_corpus: Store, tmp_path: Path) -> None:
    found = find_encoder(tiny_run.url)
    assert found.read_store(tiny_corpus)
    shutil.copytree(tiny_corpus.url, tmp_path / "copy.zarr")
    assert not found.read_store(open_store(tmp_path / "copy.zarr"))
