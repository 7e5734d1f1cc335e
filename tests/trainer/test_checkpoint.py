"""Tests of trainer/checkpoint.py."""

import json
from itertools import product
from pathlib import Path

import pytest
import safetensors.torch
import torch

from datastore.errors import DoNotRetry, StoreError
from datastore.objects import ObjectFolder
from tests.ranks import run_ranks
from tests.trainer.toy import GLOBAL_BATCH, config_of, toy_engine, train
from trainer.checkpoint import (
    CheckpointConfig,
    Position,
    committed_steps,
    due,
    load_weights,
    open_checkpoint,
    restore,
    retain,
    save,
    superseded,
)
from trainer.distributed import World, joined
from trainer.engine import Engine, EngineConfig

HALF, WHOLE = 5, 10


def _save(engine: Engine, folder: ObjectFolder, step: int, config_hash: str = "abc") -> int:
    position = Position(step, step * GLOBAL_BATCH, {"forward": 1.5})
    return save(engine, position, folder, config_hash=config_hash, config="job: toy\n")


def _straight_and_saved(config: EngineConfig, url: str, norm: bool, micro_batch: int) -> list[float]:
    engine = toy_engine(config, norm=norm, micro_batch=micro_batch)
    losses = train(engine, range(HALF), micro_batch=micro_batch)
    _save(engine, ObjectFolder(url), HALF)
    losses += train(engine, range(HALF, WHOLE), micro_batch=micro_batch)
    engine.close()
    return losses


def _resumed(config: EngineConfig, url: str, norm: bool, micro_batch: int) -> list[float]:
    engine = toy_engine(config, norm=norm, micro_batch=micro_batch)
    train(engine, range(2), micro_batch=micro_batch)  # a state of its own, all of which must be replaced
    restored = restore(engine, ObjectFolder(url), config_hash="abc")
    assert restored.position == Position(HALF, HALF * GLOBAL_BATCH, {"forward": 1.5})
    assert not restored.damaged
    losses = train(engine, range(HALF, WHOLE), micro_batch=micro_batch)
    engine.close()
    return losses


def _resumed_losses_and_save(config: EngineConfig, url: str, copy_url: str) -> list[float]:
    engine = toy_engine(config)
    position = restore(engine, ObjectFolder(url), config_hash="abc").position
    losses = train(engine, range(position.step, WHOLE))
    _save(engine, ObjectFolder(copy_url), WHOLE)
    engine.close()
    return losses


def _many_saves(url: str) -> list[int]:
    engine = toy_engine(config_of(1))
    folder = ObjectFolder(url)
    config = CheckpointConfig(keep_last=2, keep_every=4)
    for step in (2, 4, 6, 8, 10):
        train(engine, [step])
        _save(engine, folder, step)
        if engine.world.is_first:
            retain(folder, config)
    engine.close()
    return committed_steps(folder)


def _restore_report(url: str) -> tuple[int, tuple[str, ...]]:
    engine = toy_engine(config_of(1))
    restored = restore(engine, ObjectFolder(url), config_hash="abc")
    engine.close()
    return restored.position.step, restored.damaged


def _restore_error(url: str, config_hash: str) -> str:
    engine = toy_engine(config_of(1))
    with pytest.raises(DoNotRetry) as error:
        restore(engine, ObjectFolder(url), config_hash=config_hash)
    engine.close()
    return str(error.value)


def _failure_of_save(url: str) -> str:
    engine = toy_engine(config_of(1))
    folder = ObjectFolder(url)
    if engine.world.rank == 1:

        def full(name: str, content: bytes) -> None:
            raise DoNotRetry(f"No room for {name}")

        folder.put = full  # type: ignore[method-assign]
    with pytest.raises(DoNotRetry) as error:
        _save(engine, folder, 1)
    engine.close()
    return str(error.value)


def _committed_twice(url: str) -> str:
    engine = toy_engine(config_of(2))
    _save(engine, ObjectFolder(url), 1)
    with pytest.raises(DoNotRetry) as error:
        _save(engine, ObjectFolder(url), 1)
    engine.close()
    return str(error.value)


def _flip_a_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x40
    path.write_bytes(content)


def _two_saves(url: str) -> list[float]:
    engine = toy_engine(config_of(1))
    train(engine, range(HALF))
    _save(engine, ObjectFolder(url), HALF)
    train(engine, range(HALF, 7))
    _save(engine, ObjectFolder(url), 7)
    losses = train(engine, range(7, 8))
    engine.close()
    return losses


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("stage", range(4))
def test_stopping_and_resuming_gives_the_losses_of_a_straight_run_to_the_last_bit(
    stage: int, precision: str, tmp_path: Path
) -> None:
    kind = "sgd" if stage == 1 else "adam"
    config = config_of(stage, kind, precision=precision)
    straight = run_ranks(_straight_and_saved, config, str(tmp_path), True, 4)
    resumed = run_ranks(_resumed, config, str(tmp_path), True, 4)
    assert [losses[HALF:] for losses in straight] == resumed


@pytest.mark.parametrize(
    ("kind", "pairs"), [("adam", list(product(range(4), range(4)))), ("sgd", [(0, 3), (1, 0), (2, 1), (3, 2)])]
)
def test_every_stage_and_world_loads_what_any_other_saved(
    kind: str, pairs: list[tuple[int, int]], tmp_path: Path
) -> None:
    def global_losses(per_rank: list[list[float]]) -> list[float]:
        return [sum(losses) for losses in zip(*per_rank, strict=True)]

    expected = {}
    for stage in range(4):
        losses = run_ranks(_straight_and_saved, config_of(stage, kind), str(tmp_path / str(stage)), False, 4)
        expected[stage] = global_losses(losses)[HALF:]
    for saved, loaded in pairs:
        for world in (1, 2) if loaded in (saved, 3 - saved) else (2,):
            losses = run_ranks(_resumed, config_of(loaded, kind), str(tmp_path / str(saved)), False, 4, world=world)
            torch.testing.assert_close(global_losses(losses), expected[saved], rtol=1e-6, atol=1e-7)
    run_ranks(_straight_and_saved, config_of(1, kind), str(tmp_path / "one"), False, 4, world=1)
    for stage in range(4):
        losses = run_ranks(_resumed, config_of(stage, kind), str(tmp_path / "one"), False, 4)
        torch.testing.assert_close(global_losses(losses), expected[1], rtol=1e-6, atol=1e-7)


def test_a_resumed_run_saves_the_same_bytes_as_a_straight_one(tmp_path: Path) -> None:
    config = config_of(1)
    run_ranks(_straight_and_saved, config, str(tmp_path / "half"), True, 4)
    run_ranks(_resumed_losses_and_save, config, str(tmp_path / "half"), str(tmp_path / "once"))
    run_ranks(_resumed_losses_and_save, config, str(tmp_path / "half"), str(tmp_path / "again"))
    for rank in range(2):
        name = f"step-{WHOLE:08d}/rank-{rank:05d}-of-00002.safetensors"
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_flipped_byte_anywhere_is_noticed_and_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    run_ranks(_two_saves, str(tmp_path))
    step_folder = tmp_path / "step-00000007"
    blob = step_folder / "rank-00001-of-00002.safetensors"
    pristine = {path: path.read_bytes() for path in step_folder.iterdir()}
    places = [(blob, 20), (blob, len(pristine[blob]) - 3), (blob, len(pristine[blob]) // 2)]
    places += [(step_folder / "rank-00000-of-00002.json", 200), (step_folder / "manifest.json", 1)]
    for path, position in places:
        _flip_a_byte(path, position)
        for step, damaged in run_ranks(_restore_report, str(tmp_path)):
            assert step == HALF
            assert path.name in damaged[0]
        assert committed_steps(ObjectFolder(str(tmp_path))) == [HALF]
        for each, content in pristine.items():
            each.write_bytes(content)
    assert [step for step, _ in run_ranks(_restore_report, str(tmp_path))] == [7, 7]


def test_a_run_whose_checkpoints_are_all_damaged_never_starts_over_by_itself(tmp_path: Path) -> None:
    run_ranks(_two_saves, str(tmp_path))
    for step in (HALF, 7):
        _flip_a_byte(tmp_path / f"step-{step:08d}" / "rank-00001-of-00002.safetensors", 20)
    for _ in range(2):
        for message in run_ranks(_restore_error, str(tmp_path), "abc"):
            assert "can be loaded" in message
    assert committed_steps(ObjectFolder(str(tmp_path))) == [HALF, 7]


@pytest.mark.parametrize("missing", ["rank-00001-of-00002.safetensors", "rank-00000-of-00002.json"])
def test_a_lost_file_is_noticed(missing: str, tmp_path: Path) -> None:
    run_ranks(_two_saves, str(tmp_path))
    (tmp_path / "step-00000007" / missing).unlink()
    assert [step for step, _ in run_ranks(_restore_report, str(tmp_path))] == [HALF, HALF]


def test_a_checkpoint_without_a_manifest_does_not_exist_and_is_cleared_away(tmp_path: Path) -> None:
    run_ranks(_two_saves, str(tmp_path))
    (tmp_path / "step-00000007" / "manifest.json").unlink()
    assert run_ranks(_restore_report, str(tmp_path)) == [(HALF, ()), (HALF, ())]
    folder = ObjectFolder(str(tmp_path))
    retain(folder, CheckpointConfig())
    assert (tmp_path / "step-00000007").exists(), "it may be under way: it is newer than what is committed"
    (tmp_path / "step-00000007").rename(tmp_path / "step-00000003")
    retain(folder, CheckpointConfig())
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-{HALF:08d}"]


def test_when_no_checkpoint_can_be_loaded_nothing_starts_from_scratch_unasked(tmp_path: Path) -> None:
    run_ranks(_two_saves, str(tmp_path))
    for blob in tmp_path.glob("*/rank-00000-of-00002.safetensors"):
        _flip_a_byte(blob, 1000)
    for message in run_ranks(_restore_error, str(tmp_path), "abc"):
        assert "another --run name" in message and "checksum" in message


def test_a_run_of_another_config_is_not_resumed(tmp_path: Path) -> None:
    run_ranks(_two_saves, str(tmp_path))
    for message in run_ranks(_restore_error, str(tmp_path), "def"):
        assert "hash abc, this one def" in message


def test_a_fresh_run_starts_at_step_zero(tmp_path: Path) -> None:
    assert run_ranks(_restore_report, str(tmp_path / "nothing")) == [(0, ()), (0, ())]


def test_the_newest_and_every_fourth_are_kept(tmp_path: Path) -> None:
    assert run_ranks(_many_saves, str(tmp_path))[0] == [4, 8, 10]
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-{step:08d}" for step in (4, 8, 10)]


def test_a_disk_that_is_full_on_one_rank_stops_all_and_says_which(tmp_path: Path) -> None:
    first, second = run_ranks(_failure_of_save, str(tmp_path))
    assert "Rank 1" in first and "No room" in first
    assert second.startswith("No room")
    assert not list(tmp_path.glob("*/manifest.json"))


def test_two_runs_in_one_folder_notice_each_other(tmp_path: Path) -> None:
    for message in run_ranks(_committed_twice, str(tmp_path)):
        assert "two runs write to one folder" in message


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_weights_load_without_a_process_group(stage: int, tmp_path: Path) -> None:
    run_ranks(_resumed_state, stage, str(tmp_path))
    expected = torch.load(tmp_path / "expected.pt", weights_only=True)
    for url in (str(tmp_path / "checkpoints"), str(tmp_path / "checkpoints" / "step-00000003")):
        weights = load_weights(url)
        assert weights.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(weights[name], value), name


def _resumed_state(stage: int, folder: str) -> None:
    engine = toy_engine(config_of(stage))
    train(engine, range(3))
    _save(engine, ObjectFolder(f"{folder}/checkpoints"), 3)
    if engine.world.is_first and stage < 3:
        torch.save(engine.module.state_dict(), f"{folder}/expected.pt")
    engine.close()
    if stage == 3:  # its weights lie in pieces; stage 1 learns the same
        import torch.distributed as dist

        world = World.from_env()
        store = dist.FileStore(f"{folder}/rendezvous", world.size)
        dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)
        engine = toy_engine(config_of(1))
        restore(engine, ObjectFolder(f"{folder}/checkpoints"), config_hash="abc")
        if world.is_first:
            torch.save(engine.module.state_dict(), f"{folder}/expected.pt")
        engine.close()


def test_files_are_safetensors_and_json_and_small(tmp_path: Path) -> None:
    run_ranks(_two_saves, str(tmp_path))
    folder, manifest = open_checkpoint(str(tmp_path))
    assert folder.url == str(tmp_path) and manifest.step == 7
    assert manifest.optimizer_tensors == ("exp_avg", "exp_avg_sq") and manifest.optimizer_scalars == {"step": 7.0}
    stored = [safetensors.torch.load_file(path) for path in sorted((tmp_path / "step-00000007").glob("*.safetensors"))]
    trained = 3 * 37 + 37 * 3 + 37 * 5 + 5 + 1
    frozen = 37
    total = sum(tensor.nbytes for tensors in stored for name, tensor in tensors.items() if "buffer" not in name)
    assert total == 12 * trained + 4 * frozen
    assert not [name for name in stored[1] if name.startswith("buffer")]
    assert "pickle" not in json.dumps(manifest.model_dump())


def test_a_folder_without_checkpoints_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no committed checkpoint"):
        load_weights(str(tmp_path))


def test_saving_is_due_by_steps_or_by_time() -> None:
    config = CheckpointConfig(every_steps=5, every_seconds=60)
    assert due(config, 10, 1.0) and due(config, 11, 60.0) and not due(config, 11, 59.0)
    never = CheckpointConfig(every_steps=None, every_seconds=None)
    assert not due(never, 10, 1e9)


def test_retention_never_deletes_the_newest() -> None:
    assert superseded([1, 2, 3, 4], CheckpointConfig(keep_last=2)) == [1, 2]
    assert superseded([4, 1, 3, 2], CheckpointConfig(keep_last=1, keep_every=2)) == [1, 3]
    assert superseded([7], CheckpointConfig(keep_last=1)) == []


def test_object_storage_holds_checkpoints_as_a_disk_does() -> None:
    folder = ObjectFolder("memory://runs/one/checkpoints")
    with joined(timeout_seconds=20) as world:
        engine = toy_engine(config_of(1), world=world)
        for step in (2, 4, 6):
            train(engine, [step - 2, step - 1])
            _save(engine, folder, step)
            retain(folder, CheckpointConfig(keep_last=2))
        expected = {name: value.clone() for name, value in engine.module.state_dict().items()}
        train(engine, [6])
        restored = restore(engine, folder, config_hash="abc")
        found = engine.module.state_dict()
        engine.close()
    assert restored.position.step == 6 and committed_steps(folder) == [4, 6]
    assert folder.names("step-00000002") == []
    assert all(torch.equal(found[name], value) for name, value in expected.items())
