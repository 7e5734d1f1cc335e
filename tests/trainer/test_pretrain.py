"""Tests of trainer/pretrain.py: whole runs of a tiny PointMCD."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch

import models
from datastore.errors import (
    EXIT_STOPPED,
    EXIT_UNAVAILABLE,
    AskedWrongly,
    DoNotRetry,
    Stopped,
    StoreError,
    Unavailable,
    ViewpointError,
)
from datastore.layout import INGEST, create_store, create_teacher, open_store
from datastore.objects import ObjectFolder
from datastore.progress import PROGRESS_DIR_VARIABLE
from datastore.stream import Stream
from datastore.write import BlockWriter, publish
from tests.ranks import run_ranks
from tests.stores import sample_arrays, small_attributes, small_teacher, write_blocks, write_small_store
from trainer.commits import committed_steps
from trainer.config import RunConfig, read_config
from trainer.distributed import World, joined
from trainer.pretrain import build_objective, config_at, load_first_weights, pretrain, run, step_seed
from trainer.runfolder import RunFolder

STEPS = 8


class _StopAtStep(threading.Event):
    """Set at the n-th look: the loop looks once a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._looks_left = step

    def is_set(self) -> bool:
        self._looks_left -= 1
        return self._looks_left <= 0


@pytest.fixture(scope="module")
def store_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("corpus") / "store.zarr")
    store = write_small_store(url)
    scope = create_teacher(store, small_teacher())
    write_blocks(open_store(url), BlockWriter(open_store(url), scope).pending(), scope)
    publish(open_store(url))
    return url


def _config(store_url: str, **changes: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "job": "tiny",
        "objective": {"kind": "pointmcd", "teacher": "teacher"},
        "student": {"kind": "pointnet", "width": 0.0625},
        "data": {"store_url": store_url},
        "engine": {"optimizer": {"kind": "adamw", "lr": 1e-3}, "max_micro_batch": 4},
        "checkpoint": {"every_seconds": None},
        "steps": STEPS,
        "global_batch": 16,
    }
    for key, value in changes.items():
        tree[key] = tree.get(key, {}) | value if isinstance(value, dict) else value
    return RunConfig.model_validate(tree)


def _pretrain(config: RunConfig, run_url: str, stop_at: int | None = None) -> str | None:
    """Trains in the process group that the test made; returns why it stopped."""
    world = World.from_env()
    stop = threading.Event() if stop_at is None else _StopAtStep(stop_at)
    try:
        pretrain(config, RunFolder(run_url, writer=f"rank-{world.rank}"), world, stop)
    except (Stopped, DoNotRetry) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _losses(run_url: str) -> list[tuple[int, float, float]]:
    return [(each["step"], each["loss"], each["grad_norm"]) for each in RunFolder(run_url).metrics()]


def test_a_run_trains_saves_exports_and_says_so(
    store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PROGRESS_DIR_VARIABLE, str(tmp_path / "progress"))
    url = str(tmp_path / "run")
    config = _config(store_url, checkpoint={"every_steps": 3, "keep_last": 2})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config.to_yaml())
    arguments = argparse.Namespace(config=str(recipe), run=url, resume=False)
    assert run(arguments) == 0
    folder = RunFolder(url)
    assert folder.is_finished() and folder.config() == config
    assert [event["event"] for event in folder.events()] == ["started", "saved", "saved", "saved", "finished"]
    assert committed_steps_of(url) == [6, STEPS]
    lines = folder.metrics()
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] == pytest.approx(sum(lines[-1]["terms"].values()))
    assert set(lines[-1]["terms"]) == {"task", "alignment", "transform_penalty"}
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert 0 <= lines[-1]["data_wait_share"] <= 1 and lines[-1]["samples_per_second"] > 0
    (progress,) = (tmp_path / "progress").iterdir()
    shown = json.loads(progress.read_text().splitlines()[-1])["note"]
    typical = median(line["samples_per_second"] for line in lines)
    assert shown["samples/s"] == f"{typical:.0f}", "what stays on the screen is of the whole stage"
    finished = folder.last_event("finished")
    assert finished is not None and finished["seconds"]["forward"] > 0
    wall_seconds = finished["time"] - (folder.events()[0]["time"] - sum(folder.events()[0]["account"].values()))
    assert sum(finished["account"].values()) == pytest.approx(wall_seconds, rel=0.01)
    assert lines[-1]["phases"]["forward"] > 0
    encoder = models.load(folder.export_url)
    assert encoder.encode(torch.rand(2, 20, 3)).isfinite().all()
    before = _losses(url)
    assert run(arguments) == 0, "a finished run is left as it is"
    assert _losses(url) == before
    assert [event["event"] for event in folder.events()].count("finished") == 1


def committed_steps_of(run_url: str) -> list[int]:
    from datastore.objects import ObjectFolder

    return committed_steps(ObjectFolder(RunFolder(run_url).checkpoints_url))


@pytest.mark.parametrize("stage", [1, 3])
def test_stopping_and_resuming_gives_the_figures_of_a_straight_run_to_the_last_bit(
    stage: int, store_url: str, tmp_path: Path
) -> None:
    config = _config(store_url, engine={"zero_stage": stage})
    straight, stopped = str(tmp_path / "straight"), str(tmp_path / "stopped")
    assert run_ranks(_pretrain, config, straight) == [None, None]
    for message in run_ranks(_pretrain, config, stopped, 3):
        assert message is not None and message.startswith(f"Stopped: Stopped at step 3 of {STEPS}")
    assert committed_steps_of(stopped) == [3]
    assert run_ranks(_pretrain, config, stopped) == [None, None]
    assert _losses(straight) == _losses(stopped)
    events = RunFolder(stopped).events()
    assert [event["event"] for event in events] == ["started", "saved", "stopped", "started", "saved", "finished"]
    assert events[3]["resumed_from"] == 3 and events[3]["world"] == 2
    assert [events[0]["generation"], events[3]["generation"]] == [1, 2]


def test_a_run_goes_on_with_what_it_saw_of_a_store_that_has_grown_meanwhile(tmp_path: Path) -> None:
    url = str(tmp_path / "store.zarr")
    whole = small_attributes(160)
    fields = ("points", "views", "visibility", "pixels", "label", "split", "id")
    scope = create_teacher(create_store(url, whole, fields), small_teacher())

    def publish_blocks(blocks: range) -> None:
        for each in (INGEST, scope):
            write_blocks(create_store(url, whole, fields), blocks, each)
            publish(create_store(url, whole, fields))

    publish_blocks(range(2))
    config = _config(url)
    straight, stopped = (RunFolder(str(tmp_path / name), writer="rank-0") for name in ("straight", "stopped"))
    with joined(200) as world:
        pretrain(config, straight, world, threading.Event())
    with joined(200) as world, pytest.raises(Stopped):
        pretrain(config, stopped, world, _StopAtStep(3))
    seen = open_store(url).manifest.number
    publish_blocks(range(2, 5))
    assert len(open_store(url).rows("train")) > len(open_store(url, seen).rows("train"))
    with joined(200) as world:
        pretrain(config, stopped, world, threading.Event())
    assert _losses(stopped.url) == _losses(straight.url)


def test_a_run_does_not_go_on_with_other_samples(store_url: str, tmp_path: Path) -> None:
    store, listed = open_store(store_url), tmp_path / "shapes.txt"
    ids = store.read("id", store.rows("train")[:40]).tolist()
    config = _config(store_url, data={"shapes_url": str(listed)})
    folder = RunFolder(str(tmp_path / "run"), writer="rank-0")
    listed.write_text("\n".join(ids))
    with joined(20) as world, pytest.raises(Stopped):
        pretrain(config, folder, world, _StopAtStep(3))
    listed.write_text("\n".join(ids[:-1]))
    with joined(20) as world, pytest.raises(DoNotRetry, match=r"other samples .* data.shapes_url .* Put it back"):
        pretrain(config, folder, world, threading.Event())
    listed.write_text("\n".join(reversed(ids)))  # a list has no order
    with joined(20) as world:
        pretrain(config, folder, world, threading.Event())
    assert folder.is_finished()


def test_a_run_goes_on_with_fewer_processes_and_another_stage(store_url: str, tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    run_ranks(_pretrain, _config(store_url, engine={"zero_stage": 2}), url, 4)
    assert run_ranks(_pretrain, _config(store_url, engine={"zero_stage": 0}), url, world=1) == [None]
    assert [step for step, *_ in _losses(url)] == list(range(1, STEPS + 1))
    assert RunFolder(url).is_finished()


def test_trouble_with_what_a_run_writes_down_is_waited_out(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url, write, failures = "memory://runs/trouble", RunFolder.write_text, iter(range(5))

    def failing(self: RunFolder, name: str, text: str) -> None:
        if name.startswith(("metrics", "events")) and next(failures, None) is not None:
            raise OSError("503 Slow Down")
        write(self, name, text)

    monkeypatch.setattr(RunFolder, "write_text", failing)
    config = _config(store_url, checkpoint={"every_steps": 4, "background": False})
    with joined(20) as world:
        pretrain(config, RunFolder(url, writer="rank-0"), world, threading.Event())
    folder = RunFolder(url)
    assert [event["event"] for event in folder.events()] == ["started", "saved", "saved", "finished"]
    assert [step for step, *_ in _losses(url)] == list(range(1, STEPS + 1))
    assert next(failures, None) is None, "all of the trouble was met"


def test_a_start_waits_out_an_outage_of_its_storage(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = {"names": 2, "create": 2, "read_all": 1, "read": 1}

    def unsteady(name: str, action: Any) -> Any:
        def attempt(*arguments: Any) -> Any:
            if failures[name]:
                failures[name] -= 1
                raise OSError("503 Slow Down")
            return action(*arguments)

        return attempt

    for name in failures:
        monkeypatch.setattr(ObjectFolder, name, unsteady(name, getattr(ObjectFolder, name)))
    config = _config(store_url, checkpoint={"every_steps": 4, "background": False})
    with joined(200) as world:
        pretrain(config, RunFolder("memory://runs/outage"), world, threading.Event())
    assert failures == dict.fromkeys(failures, 0)
    assert RunFolder("memory://runs/outage").is_finished()


def test_another_recipe_is_refused_before_it_fences_out_the_run_that_goes_on(store_url: str, tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    with joined(200) as world:
        pretrain(_config(store_url), folder, world, threading.Event())
    before = ObjectFolder(folder.checkpoints_url).names()
    with joined(200) as world, pytest.raises(DoNotRetry, match="belongs to another training"):
        pretrain(_config(store_url, seed=99), folder, world, threading.Event())
    assert ObjectFolder(folder.checkpoints_url).names() == before, "no start of its own is written down"


def test_a_store_that_does_not_answer_any_more_has_an_exit_code_of_its_own(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(stream: Stream[Any], count: int) -> Iterator[Any]:
        raise ViewpointError("points/c/0 cannot be read: no answer")
        yield

    monkeypatch.setattr(Stream, "steps", failing)
    with joined(200) as world, pytest.raises(Unavailable, match="Rank 0: points/c/0 cannot be read") as raised:
        pretrain(_config(store_url), RunFolder("memory://runs/silent"), world, threading.Event())
    assert raised.value.exit_code == EXIT_UNAVAILABLE


def _pretrain_until_unreadable(config: RunConfig, run_url: str, good_steps: int) -> str | None:
    """Rank 1 meets a shard that is damaged after some steps."""
    steps, is_affected = Stream.steps, World.from_env().rank == 1

    def failing(stream: Stream[Any], count: int) -> Iterator[Any]:
        for number, batches in enumerate(steps(stream, count)):
            if is_affected and number == good_steps:
                raise StoreError("points/c/0: it is damaged")
            yield batches

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stream, "steps", failing)
        return _pretrain(config, run_url)


@pytest.mark.parametrize("good_steps", [0, 3])
def test_data_that_cannot_be_read_stops_all_ranks_after_a_checkpoint(
    good_steps: int, store_url: str, tmp_path: Path
) -> None:
    url = str(tmp_path / "run")
    first, second = run_ranks(_pretrain_until_unreadable, _config(store_url), url, good_steps)
    assert (
        first == "DoNotRetry: Rank 1: points/c/0: it is damaged" and second == "StoreError: points/c/0: it is damaged"
    )
    assert committed_steps_of(url) == [3] * (good_steps > 0)
    if good_steps:
        event = RunFolder(url).last_event()
        assert event is not None and event["event"] == "unreadable" and event["step"] == 3
        assert run_ranks(_pretrain, _config(store_url), url) == [None, None], "once that is mended it goes on"


def test_fine_tuning_begins_with_another_runs_encoder_and_is_another_training(store_url: str, tmp_path: Path) -> None:
    base = _config(store_url, steps=2)
    assert run_ranks(_pretrain, base, str(tmp_path / "base"), world=1) == [None]
    theirs = models.load(f"{tmp_path}/base/export").network.state_dict()
    for source in (f"{tmp_path}/base", f"{tmp_path}/base/export", f"{tmp_path}/base/checkpoints/step-00000002"):
        tuned = _config(store_url, start_from=source, steps=1)
        assert tuned.hash() != base.hash()
        objective = build_objective(tuned, open_store(store_url))
        load_first_weights(objective.encoder, source)
        assert all(torch.equal(value, theirs[name]) for name, value in objective.encoder.state_dict().items())
    other = _config(store_url, start_from=f"{tmp_path}/base", student={"width": 0.125}, steps=2)
    (message,) = run_ranks(_pretrain, other, str(tmp_path / "other"), world=1)
    assert message is not None and "holds another network" in message and "there and [" in message
    tuned = _config(store_url, start_from=f"{tmp_path}/base", steps=2)
    assert run_ranks(_pretrain, tuned, str(tmp_path / "tuned"), world=1) == [None]
    assert _losses(str(tmp_path / "tuned"))[0][1] != _losses(str(tmp_path / "base"))[0][1]
    shutil.rmtree(tmp_path / "base")
    assert run_ranks(_pretrain, tuned, str(tmp_path / "tuned"), world=1) == [None], "resuming needs its start no more"


def test_a_damaged_checkpoint_is_passed_over_loudly(store_url: str, tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    config = _config(store_url, checkpoint={"every_steps": 2})
    straight = run_ranks(_pretrain, config, url, 4)
    assert straight[0] is not None
    blob = next((tmp_path / "run" / "checkpoints" / "step-00000004").glob("rank-00001*.safetensors"))
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    assert run_ranks(_pretrain, config, url) == [None, None]
    damaged = RunFolder(url).last_event("checkpoint_damaged")
    assert damaged is not None and damaged["resumed_from"] == 2 and blob.name in damaged["problem"]
    figures = _losses(url)
    assert [step for step, *_ in figures] == [1, 2, 3, 4, 3, 4, 5, 6, 7, 8]
    assert figures[2:4] == figures[4:6], "steps that are repeated repeat to the last bit"


def test_a_loss_that_is_not_finite_stops_all_ranks_before_a_save_and_names_the_samples(tmp_path: Path) -> None:
    url = str(tmp_path / "store.zarr")
    store = write_small_store(url)
    scope = create_teacher(store, small_teacher())
    store = open_store(url)
    writer = BlockWriter(store, scope)
    arrays = sample_arrays(store, scope)
    broken = int(store.rows("train")[5])
    arrays["view_features"][broken, 0, 0] = np.inf
    for block in writer.pending():
        first, end = store.block_range(block)
        writer.write(block, {name: array[first:end] for name, array in arrays.items()})
    publish(store)
    run_url = str(tmp_path / "run")
    messages = run_ranks(_pretrain, _config(url, checkpoint={"every_steps": 1}), run_url)
    assert messages[0] == messages[1] is not None
    assert "term 'alignment' is inf" in messages[0] and f"{broken}" in messages[0] and "on rank" in messages[0]
    event = RunFolder(run_url).last_event("not_finite")
    assert event is not None
    assert committed_steps_of(run_url) == [step for step in (event["step"] - 2, event["step"] - 1) if step > 0]


def test_sigterm_saves_at_the_same_step_and_exits_75(store_url: str, tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(_config(store_url, steps=100_000).to_yaml())
    command = [sys.executable, "-m", "trainer", "pretrain", "--config", str(recipe), "--run", url]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    folder, deadline = RunFolder(url), time.monotonic() + 60
    while not folder.metrics() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == EXIT_STOPPED, stderr
    event = folder.last_event()
    assert event is not None and event["event"] == "stopped"
    assert committed_steps_of(url) == [event["step"]]
    assert "everything is saved" in stderr
    assert "Traceback" not in stderr and "DeepSpeed" not in stderr, "deepspeed's chatter is for nobody"


def test_what_is_asked_wrongly_is_found_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(AskedWrongly, match="no config"):
        config_at(str(tmp_path / "nothing.yaml"))
    config = read_config(_config("nowhere").to_yaml(), name="test", assignments=["data.store_url=null"])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config.to_yaml())
    with pytest.raises(AskedWrongly, match="names no store"):
        run(argparse.Namespace(config=str(recipe), run=str(tmp_path / "run"), resume=False))


def test_every_rank_and_step_has_randomness_of_its_own() -> None:
    seeds = {step_seed(seed, step, rank) for seed in range(3) for step in range(50) for rank in range(4)}
    assert len(seeds) == 600
    assert step_seed(0, 7, 1) == step_seed(0, 7, 1)


def test_the_help_needs_no_torch() -> None:
    code = "import sys, trainer.pretrain; print(json.dumps('torch' in sys.modules))"
    out = subprocess.run([sys.executable, "-c", f"import json; {code}"], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) is False
