"""Tests of trainer/checkpoint.py."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from datastore.errors import DoNotRetry, StoreError
from datastore.objects import ObjectFolder
from tests.ranks import run_ranks
from tests.trainer.savers import AT_ONCE, IDENTITY, load, position_at, save
from tests.trainer.toy import config_of, toy_engine, train
from trainer import checkpoint
from trainer.checkpoint import Identity, load_weights, open_checkpoint, restore, start
from trainer.commits import committed_steps
from trainer.distributed import World, joined
from trainer.engine import EngineConfig

HALF, WHOLE = 5, 10


def _straight_and_saved(config: EngineConfig, url: str, norm: bool, micro_batch: int) -> list[float]:
    engine = toy_engine(config, norm=norm, micro_batch=micro_batch)
    losses = train(engine, range(HALF), micro_batch=micro_batch)
    save(engine, ObjectFolder(url), HALF)
    losses += train(engine, range(HALF, WHOLE), micro_batch=micro_batch)
    engine.close()
    return losses


def _resumed(config: EngineConfig, url: str, norm: bool, micro_batch: int) -> list[float]:
    engine = toy_engine(config, norm=norm, micro_batch=micro_batch)
    train(engine, range(2), micro_batch=micro_batch)  # a state of its own, all of which must be replaced
    restored = load(engine, ObjectFolder(url))
    assert restored.position == position_at(HALF)
    assert not restored.damaged
    losses = train(engine, range(HALF, WHOLE), micro_batch=micro_batch)
    engine.close()
    return losses


def _resumed_losses_and_save(config: EngineConfig, url: str, copy_url: str) -> list[float]:
    engine = toy_engine(config)
    position = load(engine, ObjectFolder(url)).position
    losses = train(engine, range(position.step, WHOLE))
    save(engine, ObjectFolder(copy_url), WHOLE)
    engine.close()
    return losses


def _many_saves(url: str) -> list[int]:
    engine = toy_engine(config_of(1))
    folder = ObjectFolder(url)
    config = AT_ONCE.model_copy(update={"keep_last": 2, "keep_every": 4})
    for step in (2, 4, 6, 8, 10):
        train(engine, [step])
        save(engine, folder, step, config)
    engine.close()
    return committed_steps(folder)


def _restore_report(url: str) -> tuple[int, tuple[str, ...]]:
    engine = toy_engine(config_of(1))
    restored = load(engine, ObjectFolder(url))
    engine.close()
    return restored.position.step, restored.damaged


def _restore_error(url: str, config_hash: str) -> str:
    engine = toy_engine(config_of(1))
    with pytest.raises(DoNotRetry) as error:
        load(engine, ObjectFolder(url), Identity(config_hash, "job: toy\nseed: 7\n"))
    engine.close()
    return str(error.value)


def _flip_a_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x40
    path.write_bytes(content)


def _two_saves(url: str) -> list[float]:
    engine = toy_engine(config_of(1))
    train(engine, range(HALF))
    save(engine, ObjectFolder(url), HALF)
    train(engine, range(HALF, 7))
    save(engine, ObjectFolder(url), 7)
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
    ("kind", "pairs"),
    # each stage to every other one; to itself, and all of them between worlds, in the slow tests of layouts
    [
        ("adam", [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3), (2, 0), (3, 0), (3, 1)]),
        ("sgd", [(0, 3), (1, 0), (2, 1), (3, 2)]),
    ],
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
        name = f"step-{WHOLE:08d}/rank-{rank:05d}-of-00002.generation-1.safetensors"
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_flipped_byte_anywhere_is_noticed_and_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    run_ranks(_two_saves, str(tmp_path))
    step_folder = tmp_path / "step-00000007"
    blob = step_folder / "rank-00001-of-00002.generation-2.safetensors"
    pristine = {path: path.read_bytes() for path in step_folder.iterdir()}
    places = [(blob, 20), (blob, len(pristine[blob]) - 3), (blob, len(pristine[blob]) // 2)]
    places += [(step_folder / "rank-00000-of-00002.generation-2.json", 200), (step_folder / "manifest.json", 1)]
    for path, position in places:
        _flip_a_byte(path, position)
        for step, damaged in run_ranks(_restore_report, str(tmp_path)):
            assert step == HALF
            assert path.name in damaged[0]
        assert committed_steps(ObjectFolder(str(tmp_path))) == [HALF]
        for each, content in pristine.items():
            each.write_bytes(content)
        for path in sorted(tmp_path.glob("generation-*"))[2:]:
            path.unlink()  # else what is there beyond the step that these starts went on from would not count
    assert [step for step, _ in run_ranks(_restore_report, str(tmp_path))] == [7, 7]


def test_without_checksums_a_flipped_byte_would_be_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ObjectFolder(str(tmp_path))
    with joined(timeout_seconds=20) as world:
        engine = toy_engine(config_of(1), world=world)
        save(engine, folder, 3)
        (blob,) = tmp_path.glob("step-00000003/*.safetensors")
        _flip_a_byte(blob, len(blob.read_bytes()) // 2)
        with pytest.raises(DoNotRetry, match=r"the checksum of .* differs"):
            load(engine, folder)
        monkeypatch.setattr(checkpoint, "_read_verified", lambda folder, name, read, problem_of: read())
        restored = load(engine, folder)
        engine.close()
    assert restored.position.step == 3 and not restored.damaged


def test_a_run_whose_checkpoints_are_all_damaged_never_starts_over_by_itself(tmp_path: Path) -> None:
    run_ranks(_two_saves, str(tmp_path))
    for step in (HALF, 7):
        _flip_a_byte(next((tmp_path / f"step-{step:08d}").glob("rank-00001-*.safetensors")), 20)
    for _ in range(2):
        for message in run_ranks(_restore_error, str(tmp_path), "abc"):
            assert "can be loaded" in message
    assert committed_steps(ObjectFolder(str(tmp_path))) == [HALF, 7]


@pytest.mark.parametrize(
    "missing", ["rank-00001-of-00002.generation-2.safetensors", "rank-00000-of-00002.generation-2.json"]
)
def test_a_lost_file_is_noticed(missing: str, tmp_path: Path) -> None:
    run_ranks(_two_saves, str(tmp_path))
    (tmp_path / "step-00000007" / missing).unlink()
    assert [step for step, _ in run_ranks(_restore_report, str(tmp_path))] == [HALF, HALF]


def test_when_no_checkpoint_can_be_loaded_nothing_starts_from_scratch_unasked(tmp_path: Path) -> None:
    run_ranks(_two_saves, str(tmp_path))
    for blob in tmp_path.glob("*/rank-00000-of-00002.*.safetensors"):
        _flip_a_byte(blob, 1000)
    for message in run_ranks(_restore_error, str(tmp_path), "abc"):
        assert "another --run name" in message and "checksum" in message


def test_a_run_of_another_config_is_not_resumed(tmp_path: Path) -> None:
    run_ranks(_two_saves, str(tmp_path))
    for message in run_ranks(_restore_error, str(tmp_path), "def"):
        assert "hash abc, this one def" in message
        assert "seed: None there, 7 here" in message and "start_from" in message


def test_a_fresh_run_starts_at_step_zero(tmp_path: Path) -> None:
    assert run_ranks(_restore_report, str(tmp_path / "nothing")) == [(0, ()), (0, ())]


def test_told_to_resume_with_nothing_there_is_refused(tmp_path: Path) -> None:
    with joined(timeout_seconds=20) as world:
        engine = toy_engine(config_of(1), world=world)
        folder = ObjectFolder(str(tmp_path))
        with pytest.raises(DoNotRetry, match=r"nothing to resume.*without --resume"):
            restore(engine, folder, IDENTITY, start(engine, folder), must_exist=True)
        engine.close()


def test_a_byte_that_flips_on_its_way_is_read_again(tmp_path: Path) -> None:
    folder = ObjectFolder(str(tmp_path))
    with joined(timeout_seconds=20) as world:
        engine = toy_engine(config_of(1), world=world)
        save(engine, folder, 3)
        read_range, flips = folder.read_range, iter([True, False, True, True, False])

        def flipping(name: str, start: int, end: int) -> bytes:
            content = bytearray(read_range(name, start, end))
            content[-1] ^= next(flips, False)
            return bytes(content)

        folder.read_range = flipping  # type: ignore[method-assign]
        restored = load(engine, folder)
        engine.close()
    assert restored.position.step == 3 and not restored.damaged
    assert next(flips, None) is None, "all of them were met"


def test_the_newest_and_every_fourth_are_kept(tmp_path: Path) -> None:
    assert run_ranks(_many_saves, str(tmp_path))[0] == [4, 8, 10]
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-{step:08d}" for step in (4, 8, 10)]


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
    save(engine, ObjectFolder(f"{folder}/checkpoints"), 3)
    if engine.world.is_first and stage < 3:
        torch.save(engine.module.state_dict(), f"{folder}/expected.pt")
    engine.close()
    if stage == 3:  # its weights lie in pieces; stage 1 learns the same
        import torch.distributed as dist

        world = World.from_env()
        store = dist.FileStore(f"{folder}/rendezvous", world.size)
        dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)
        engine = toy_engine(config_of(1))
        load(engine, ObjectFolder(f"{folder}/checkpoints"))
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


def test_object_storage_holds_checkpoints_as_a_disk_does() -> None:
    folder = ObjectFolder("memory://runs/one/checkpoints")
    with joined(timeout_seconds=20) as world:
        engine = toy_engine(config_of(1), world=world)
        for step in (2, 4, 6):
            train(engine, [step - 2, step - 1])
            save(engine, folder, step, AT_ONCE.model_copy(update={"keep_last": 2}))
        expected = {name: value.clone() for name, value in engine.module.state_dict().items()}
        train(engine, [6])
        restored = load(engine, folder)
        found = engine.module.state_dict()
        engine.close()
    assert restored.position.step == 6 and committed_steps(folder) == [4, 6]
    assert folder.names("step-00000002") == []
    assert all(torch.equal(found[name], value) for name, value in expected.items())
