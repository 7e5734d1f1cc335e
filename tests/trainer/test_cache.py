"""What a teacher says must depend on its weights and on one shape alone, and survive being stopped anywhere."""

import argparse
import copy
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from datastore.batch import Batch
from datastore.errors import EXIT_STOPPED, AskedWrongly, DoNotRetry, MissingField, Stopped, StoreError
from datastore.layout import Store, open_store
from datastore.progress import format_bytes
from datastore.stream import StreamConfig, open_stream
from datastore.write import verify
from models.exported import save_exported
from models.image_models.multi_view import MultiViewClassifier, MultiViewClassifierConfig
from models.image_models.pooled import PooledTrunk, PooledTrunkConfig
from models.image_models.trunk import TrunkConfig
from models.students import build_student
from tests.killable_cache import cache_and_die, running
from tests.stores import small_attributes, write_small_store
from trainer import cache as cache_stage
from trainer.cache import add_arguments, cache, run
from trainer.heartbeat import HEARTBEAT_VARIABLE, Heart
from trainer.teachers import TimmOptions, load_teacher, teacher_attributes

ROWS = 36  # blocks of 16, 16 and 4
CONFIG = TrunkConfig(name="test_resnet", image_size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
FIELD = "teachers/{key}/view_features"


@dataclass(frozen=True)
class FeatureBatch(Batch):
    view_features: Float[Tensor, "b v d"]


def make_store(path: Path, fields: Sequence[str] = ("views", "split", "id")) -> Store:
    return write_small_store(str(path), small_attributes(num_rows=ROWS, block_rows=16), fields)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "store.zarr")


@pytest.fixture(scope="module")
def teacher() -> MultiViewClassifier:
    torch.manual_seed(0)
    classifier = MultiViewClassifierConfig(trunk=CONFIG, num_classes=3).build()
    with torch.no_grad():  # statistics as after training: in train mode, or with fresh ones, features would differ
        for module in classifier.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 2)
    return classifier.eval().requires_grad_(False)


def features_of(store: Store, key: str) -> np.ndarray:
    return open_store(store.url).read(FIELD.format(key=key), range(len(store)))


def test_cached_features_equal_a_fresh_forward_in_eval_mode(store: Store, teacher: MultiViewClassifier) -> None:
    summary = cache(store, teacher, "teacher")
    assert summary.is_complete and summary.rows == ROWS and summary.images == 12 * ROWS
    views = torch.from_numpy(store.read("views", range(ROWS)))
    with torch.inference_mode():
        expected = teacher.describe(views)  # one large batch, as nobody would cache it
    cached = torch.from_numpy(features_of(store, summary.teacher))
    assert cached.dtype == torch.float16
    torch.testing.assert_close(cached.float(), expected, rtol=2**-10, atol=1e-5)
    assert verify(open_store(store.url)) == []


@pytest.mark.parametrize(("batch", "threads"), [(1, 3), (9, 1), (64, 2)])
def test_features_do_not_depend_on_batches_threads_or_workers(
    tmp_path: Path, teacher: MultiViewClassifier, batch: int, threads: int
) -> None:
    one = make_store(tmp_path / "one.zarr")
    many = make_store(tmp_path / "many.zarr")
    before = torch.get_num_threads()
    key = cache(one, teacher, "teacher").teacher
    torch.set_num_threads(threads)
    try:
        for rank in (1, 0):
            cache(many, teacher, "teacher", part=(rank, 2), batch=batch)
        assert torch.get_num_threads() == threads, "the caller's setting is given back"
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(features_of(one, key), features_of(many, key))


@pytest.mark.parametrize("device", ["cpu:0", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def test_groups_as_a_gpu_takes_them_give_the_same_features(
    tmp_path: Path, teacher: MultiViewClassifier, device: str
) -> None:
    alone, grouped, again = (make_store(tmp_path / f"{name}.zarr") for name in ("alone", "grouped", "again"))
    key = cache(alone, teacher, "teacher").teacher
    on_device = copy.deepcopy(teacher)
    cache(grouped, on_device, "teacher", device=device, batch=64)
    for rank in (1, 0):
        cache(again, on_device, "teacher", device=device, batch=1, part=(rank, 2))
    np.testing.assert_allclose(features_of(grouped, key), features_of(alone, key), rtol=2**-9, atol=1e-4)
    np.testing.assert_array_equal(features_of(grouped, key), features_of(again, key))


def test_stopped_between_blocks_and_resumed_equals_undisturbed(
    tmp_path: Path, teacher: MultiViewClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = make_store(tmp_path / "one.zarr")
    disturbed = make_store(tmp_path / "two.zarr")
    key = cache(undisturbed, teacher, "teacher").teacher

    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped, match=r"16 of 36 shapes.*same command goes on"):
        cache(disturbed, teacher, "teacher", batch=8, stop=stop)
    with pytest.raises(MissingField, match="1 of 3 blocks"):
        open_store(disturbed.url).resolve_teacher("teacher")

    summary = cache(disturbed, teacher, "teacher")
    assert summary.rows == 20, "what was there is not done again"
    np.testing.assert_array_equal(features_of(undisturbed, key), features_of(disturbed, key))
    assert cache(disturbed, teacher, "teacher").rows == 0


def test_a_slow_block_is_given_up_when_asked_to_stop(
    store: Store, teacher: MultiViewClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_stage, "_FINISH_SECONDS", 0.0)
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped, match="Stopped after 0 of 36 shapes"):
        cache(store, teacher, "teacher", batch=8, stop=stop)


def test_killed_within_a_block_leaves_no_trace(
    tmp_path: Path, teacher: MultiViewClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path / "store.zarr")
    reference = make_store(tmp_path / "reference.zarr")
    key = cache(reference, teacher, "teacher").teacher
    calls = 0

    class Killed(BaseException):
        pass

    def dies(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Killed

    monkeypatch.setattr(cache_stage._Spread, "add", dies)
    with pytest.raises(Killed):
        cache(store, teacher, "teacher", batch=8)
    monkeypatch.undo()
    assert cache(store, teacher, "teacher").rows == 20
    np.testing.assert_array_equal(features_of(store, key), features_of(reference, key))


def test_rows_without_a_shape_get_zeros(tmp_path: Path, teacher: MultiViewClassifier) -> None:
    from datastore import schema
    from datastore.layout import QuarantinedRow, create_store
    from datastore.write import BlockWriter, publish
    from tests.stores import sample_arrays

    store = create_store(
        str(tmp_path / "store.zarr"), small_attributes(num_rows=16, block_rows=16), ("views", "split", "id")
    )
    arrays = sample_arrays(store)
    arrays["split"][5] = schema.QUARANTINED
    BlockWriter(store).write(0, arrays, [QuarantinedRow(5, str(arrays["id"][5]), "no triangle")])
    publish(store)
    store = open_store(store.url)
    features = features_of(store, cache(store, teacher, "teacher").teacher)
    assert not features[5].any() and features[4].any()


def test_the_hash_tells_weights_input_size_and_normalisation_apart(store: Store) -> None:
    torch.manual_seed(0)
    reference = PooledTrunkConfig(trunk=CONFIG).build()
    keys = {teacher_attributes(store, reference, "t").key}
    for changes in ({"image_size": 40}, {"mean": (0.4, 0.5, 0.5)}, {"std": (0.3, 0.25, 0.25)}):
        torch.manual_seed(0)
        keys.add(teacher_attributes(store, PooledTrunkConfig(trunk=CONFIG.model_copy(update=changes)).build(), "t").key)
    assert len(keys) == 4
    torch.manual_seed(0)
    same = PooledTrunkConfig(trunk=CONFIG).build()
    assert teacher_attributes(store, same, "t").key in keys
    next(same.parameters()).data.view(-1)[0] += 1e-6
    assert teacher_attributes(store, same, "t").key not in keys


def test_two_teachers_lie_side_by_side(store: Store, teacher: MultiViewClassifier) -> None:
    one = cache(store, teacher, "teacher").teacher
    torch.manual_seed(1)
    other = cache(open_store(store.url), PooledTrunkConfig(trunk=CONFIG).build().eval(), "other").teacher
    teachers = open_store(store.url).teachers
    assert set(teachers) == {one, other}
    assert teachers[one].dim == 512 and teachers[one].mean == CONFIG.mean and teachers[one].image_size == 32


def test_who_waits_for_views_says_so_to_its_watchdog(
    store: Store, tmp_path: Path, teacher: MultiViewClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(HEARTBEAT_VARIABLE, str(tmp_path / "heartbeat"))
    said: list[str] = []
    heart = Heart()
    heart.start()
    monkeypatch.setattr(cache_stage, "HEART", heart)
    monkeypatch.setattr(heart, "_write", lambda line: said.append(line.split()[0].decode()))
    cache(store, teacher, "small", batch=64)
    assert said[0] == "data"
    assert "step" in said


def test_features_that_float16_cannot_hold_are_refused(store: Store, teacher: MultiViewClassifier) -> None:
    torch.manual_seed(0)
    loud = MultiViewClassifierConfig(trunk=CONFIG, num_classes=3).build().eval()
    with torch.no_grad():
        for module in loud.to_descriptor.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                module.bias.fill_(1e6)
    with pytest.raises(StoreError, match=r"row 0: .*float16 cannot hold"):
        cache(store, loud, "loud")


def test_a_disk_that_is_too_small_is_refused_before_anything_runs(
    store: Store, teacher: MultiViewClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(cache_stage.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 64 * 2**20 + 1000))
    with pytest.raises(DoNotRetry, match=r"take 0\.4 MB more, and its disk has 67\.1 MB free"):
        cache(store, teacher, "teacher")


# The stage


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


def export(teacher: MultiViewClassifier, folder: Path) -> Path:
    config = {"kind": "image_model", "image_model": teacher.config.model_dump(mode="json")}
    training = {"job": "pointmcd_teacher", "split": "train", "config_hash": "0123", "step": 12}
    save_exported(folder, config, teacher, "card", {"training": training, "store": {"source_hash": "abc"}})
    return folder


def test_the_stage_caches_an_exported_teacher(
    store: Store, teacher: MultiViewClassifier, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export(teacher, tmp_path / "export")
    assert run(arguments(store.url, "--teacher", "mine", "--weights", str(folder), "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["is_complete"] and result["rows"] == ROWS
    assert result["teacher"] == teacher_attributes(store, teacher, "mine").key
    assert open_store(store.url).resolve_teacher("mine") == result["teacher"]
    assert open_store(store.url).teachers[result["teacher"]].training == {
        "job": "pointmcd_teacher", "split": "train", "config_hash": "0123", "source_hash": "abc",
    }  # fmt: skip


def test_weights_that_changed_since_are_noticed_when_a_stream_opens(
    store: Store, teacher: MultiViewClassifier, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export(teacher, tmp_path / "export")
    words = (store.url, "--teacher", "mine", "--weights", str(folder), "--json")
    run(arguments(*words))
    key = json.loads(capsys.readouterr().out)["teacher"]

    def opened(name: str) -> None:
        config = StreamConfig(store_url=store.url)
        with open_stream(
            config, FeatureBatch, teacher=name, global_batch=4, micro_batch=4, rank=0, world_size=1, seed=0
        ) as stream:
            assert len(next(stream.steps(1))[0].ids) == 4

    export(teacher, folder)  # the same weights again, at another time
    opened("mine")
    with torch.no_grad():
        next(teacher.parameters()).add_(1)
    export(teacher, folder)
    with pytest.raises(
        StoreError, match=rf"Teacher {key} of .* was written by the weights in .*safetensors, which have changed since"
    ) as raised:
        opened("mine")
    assert f"viewpoint cache {store.url} --teacher mine --weights {folder}" in str(raised.value)
    opened(key)
    run(arguments(*words))
    capsys.readouterr()
    with pytest.raises(StoreError, match="2 teachers named 'mine'"):
        opened("mine")


def test_ranks_write_their_parts(
    store: Store, teacher: MultiViewClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export(teacher, tmp_path / "export")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, complete in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        run(arguments(store.url, "--teacher", "mine", "--weights", str(folder)))
        assert bool(open_store(store.url).teachers) == complete


def test_random_weights_are_said_aloud_and_are_the_same_in_every_process(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (store.url, "--teacher", "test_resnet", "--random-weights", "--image-size", "32", "--json")
    run(arguments(*words))
    first = capsys.readouterr()
    assert "random weights, as asked" in first.err
    torch.rand(3)
    run(arguments(*words))
    assert json.loads(capsys.readouterr().out)["rows"] == 0
    assert json.loads(first.out)["rows"] == ROWS


def test_a_timm_model_takes_its_own_normalisation_and_the_weights_of_a_file(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(5)
    model = timm.create_model("test_resnet", num_classes=7)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    teacher, training = load_teacher(str(tmp_path / "weights.safetensors"), TimmOptions("test_resnet"))
    assert training == {}, "a file does not say what made it"
    assert isinstance(teacher, PooledTrunk)
    assert torch.equal(teacher.trunk.state_dict()["conv1.0.weight"], model.state_dict()["conv1.0.weight"])
    made_for = timm.get_pretrained_cfg("test_resnet")
    assert made_for is not None and teacher.image_size == made_for.input_size[-1]
    assert teacher.mean.flatten().tolist() == pytest.approx(made_for.mean)


def point_encoder(folder: Path) -> Path:
    config = {"kind": "pointnet", "width": 0.1}
    save_exported(folder, {"kind": "student", "student": config}, build_student(config), "card", {})
    return folder


@pytest.mark.parametrize(
    ("prepare", "words", "error", "message"),
    [
        (lambda path: path / "absent", (), AskedWrongly, "nothing is there"),
        (lambda path: path, (), AskedWrongly, "is no exported model"),
        (point_encoder, (), AskedWrongly, "point encoder"),
        (lambda path: None, ("--random-weights", "--teacher", "resnet_of_mine"), AskedWrongly, "no model"),
        (lambda path: None, ("--random-weights", "--batch", "0"), AskedWrongly, "one at least"),
        (lambda path: None, ("--random-weights", "--teacher", "test_resnet.r160_in1k/x"), AskedWrongly, "no model"),
    ],
)
def test_what_cannot_be_a_teacher_is_refused(
    store: Store,
    tmp_path: Path,
    prepare: Callable[[Path], Path | None],
    words: tuple[str, ...],
    error: type[Exception],
    message: str,
) -> None:
    weights = prepare(tmp_path / "export") if prepare is point_encoder else prepare(tmp_path)
    given = () if weights is None else ("--weights", str(weights))
    with pytest.raises(error, match=message):
        run(arguments(store.url, "--teacher", "test_resnet", *given, *words))


def test_a_store_without_views_is_refused_with_the_way_out(tmp_path: Path, teacher: MultiViewClassifier) -> None:
    store = make_store(tmp_path / "store.zarr", fields=("points", "split", "id"))
    with pytest.raises(MissingField, match=r"no field 'views'.*viewpoint ingest"):
        cache(store, teacher, "teacher")


def features_and_more(store: Store, *words: str, teacher: str = "test_vit") -> tuple[str, dict[str, tuple[int, ...]]]:
    """Runs the stage with random weights: the teacher's key, and the sizes of its fields."""
    run(arguments(store.url, "--teacher", teacher, "--random-weights", "--image-size", "32", *words))
    (key,) = open_store(store.url).teachers.keys() - store.teachers.keys()
    return key, open_store(store.url).teachers[key].fields


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ((), {"view_features": (12, 64)}),
        (("--tokens", "native"), {"view_features": (12, 64), "view_tokens": (12, 4, 64), "view_saliency": (12, 4)}),
        (("--tokens", "1x1", "--fields", "view_tokens", "--projection", "5"), {"view_tokens": (12, 1, 5)}),
        (("--fields", "view_saliency", "view_tokens"), {"view_saliency": (12, 4), "view_tokens": (12, 4, 64)}),
        (("--tokens", "none", "--precision", "bf16"), {"view_features": (12, 64)}),
        (("--teacher", "lean", "--model", "test_resnet", "--tokens", "1x1"), {"view_features": (12, 96), "view_tokens": (12, 1, 96)}),
        (
            ("--from-points", "--fields", "view_tokens", "view_pixels", "--mean", "0", "0", "0", "--std", "1", "1", "1"),
            {"view_tokens": (3, 4, 64), "view_pixels": (20, 3, 2)},
        ),
    ],
)  # fmt: skip
def test_fields_are_those_asked_for(
    tmp_path: Path, words: tuple[str, ...], fields: dict[str, tuple[int, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_store(tmp_path / "store.zarr", ("views", "points", "split", "id"))
    key, found = features_and_more(store, *words)
    assert found == fields
    teacher = open_store(store.url).teachers[key]
    again = teacher.command(store.url).split()[2:]
    assert run(arguments(*again)) == 0
    said = capsys.readouterr()
    assert "Nothing to do" in said.out, "what the store keeps of the command writes the same again"
    assert teacher.precision == ("bf16" if "bf16" in words else "float32")
    row_bytes = 2 * sum(int(np.prod(sizes)) for sizes in fields.values())
    assert f"for 36 shapes take about {format_bytes(36 * row_bytes)}, {row_bytes:,} bytes a shape" in said.err


def test_networks_settings_and_precision_are_told_apart_and_lie_side_by_side(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store.zarr")
    keys = {
        features_and_more(open_store(store.url), *words)[0]
        for words in ((), ("--precision", "bf16"), ("--tokens", "native"), ("--mean", "0", "0", "0"))
    }
    assert len(keys) == 4
    with pytest.raises(StoreError, match=r"4 teachers named 'test_vit'.*Name the one you mean in full, or remove"):
        open_store(store.url).resolve_teacher("test_vit")


def test_quick_gelu_is_another_teacher_with_the_same_weights(store: Store) -> None:
    torch.manual_seed(0)
    plain = PooledTrunkConfig(trunk=CONFIG).build()
    other = copy.deepcopy(plain)
    other.config = plain.config.model_copy(update={"trunk": CONFIG.model_copy(update={"name": "test_resnet_quick"})})
    tagged = copy.deepcopy(plain)
    trunk = CONFIG.model_copy(update={"name": "test_resnet.r160_in1k", "weights": "anywhere.safetensors"})
    tagged.config = plain.config.model_copy(update={"trunk": trunk})
    keys = [teacher_attributes(store, each, "t").key for each in (plain, other, tagged)]
    assert keys[0] != keys[1] and keys[0] == keys[2], "neither a tag nor where weights lay changes what is said"


def test_a_changed_weights_file_is_noticed_when_a_stream_opens(store: Store, tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    path = tmp_path / "weights.safetensors"
    keys = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        save_file(timm.create_model("test_resnet").state_dict(), path)
        words = (store.url, "--teacher", "mine", "--model", "test_resnet", "--image-size", "32", "--weights", str(path))
        run(arguments(*words))
        teachers = open_store(store.url).teachers
        keys += [key for key in teachers if key not in keys]
        if seed == 1:
            shutil.copytree(Path(store.url) / "teachers" / keys[0], tmp_path / "first")
            shutil.rmtree(Path(store.url) / "teachers" / keys[0])
    with pytest.raises(
        MissingField, match=rf"no fields of teacher '{keys[0]}'.*{keys[1]} \(32 px.*--weights .*{path.name}"
    ):
        open_stream(
            StreamConfig(store_url=store.url),
            FeatureBatch, teacher=keys[0], global_batch=4, micro_batch=4, rank=0, world_size=1, seed=0,
        )  # fmt: skip


def test_other_fields_of_a_teacher_that_is_there_are_refused_with_the_way_out(store: Store) -> None:
    features_and_more(store, "--tokens", "native")
    with pytest.raises(
        StoreError, match=r"this teacher with other properties \(fields.*all fields at once.*another name"
    ):
        features_and_more(open_store(store.url), "--tokens", "native", "--fields", "view_tokens")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--teacher", "test_resnet", "--fields", "view_saliency"), "has no view_saliency, only view_features, view_tokens.*class token"),
        (("--fields", "view_pixels"), "has no view_pixels, only view_features"),
        (("--tokens", "none", "--fields", "view_tokens"), "--tokens none, and --fields view_tokens"),
        (("--tokens", "2x2", "--from-points"), "--from-points keeps the tokens"),
        (("--tokens", "3x3"), "has 2 x 2 tokens .* cannot be made 3 x 3"),
    ],
)  # fmt: skip
def test_what_a_teacher_does_not_have_is_refused(store: Store, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(AskedWrongly, match=message):
        features_and_more(store, *words)


@pytest.mark.parametrize("grid", ["14", "14x7", "0x0", "x", "some"])
def test_what_is_no_grid_is_refused(grid: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments("s", "--teacher", "t", "--random-weights", "--tokens", grid)
    assert "no square grid such as 14x14" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("--mean", "0", "0", "0"), ("--from-points",), ("--tokens", "2x2")])
def test_an_exported_model_is_taken_as_it_is(
    store: Store, teacher: MultiViewClassifier, tmp_path: Path, words: tuple[str, ...]
) -> None:
    folder = str(export(teacher, tmp_path / "export"))
    with pytest.raises(AskedWrongly, match=f"is an exported model, .* leave {words[0]} out|keeps the tokens"):
        run(arguments(store.url, "--teacher", "mine", "--weights", folder, *words))


def test_a_gpu_that_is_too_small_takes_half_as_many_shapes(
    store: Store, teacher: MultiViewClassifier, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = cache(store, teacher, "whole").teacher
    whole = features_of(store, key)
    teach = MultiViewClassifier.teach

    def small(self: MultiViewClassifier, inputs: torch.Tensor, fields: Sequence[str]) -> Any:
        if len(inputs) > room:
            raise torch.OutOfMemoryError("out of memory\nTried to allocate")
        return teach(self, inputs, fields)

    monkeypatch.setattr(MultiViewClassifier, "teach", small)
    room = 6
    halved = cache(open_store(store.url), teacher, "halved", device="cpu:0").teacher
    assert "has memory for 5 shapes at a time" in capsys.readouterr().err
    np.testing.assert_allclose(features_of(store, halved), whole, rtol=2**-9, atol=1e-4)
    room = 0
    with pytest.raises(DoNotRetry, match=r"One shape at a time is more than cpu:0 has memory for.*bf16"):
        cache(open_store(store.url), teacher, "none", device="cpu:0")


# Killed


def test_kills_around_its_operations_leave_what_an_undisturbed_run_writes(tmp_path: Path) -> None:
    series = KilledCaches(tmp_path, random.Random(0))
    for number, moment in ((2, "before"), (5, "after"), (4, "during")):
        series.kill(number, moment)
    series.finish()
    assert series.kills == 3


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_kills_at_random_moments_leave_what_an_undisturbed_run_writes(tmp_path: Path) -> None:
    series = KilledCaches(tmp_path, random.Random(1), num_rows=160)
    while series.kills < 20:
        if series.moments.random() < 0.5:
            series.kill(series.moments.randint(1, 30), series.moments.choice(["before", "during", "after"]))
        else:
            series.kill_after(series.moments.uniform(0, series.seconds))
    series.finish()
    print(f"{series.kills} kills, {series.completed} stores completed")


@dataclass
class KilledCaches:
    """Cache stages killed one after the other over one store; over a copy of it whenever a teacher is complete."""

    folder: Path
    moments: random.Random
    num_rows: int = ROWS
    kills: int = 0
    completed: int = 0

    def __post_init__(self) -> None:
        self._empty = str(self.folder / "empty.zarr")
        write_small_store(
            self._empty, small_attributes(num_rows=self.num_rows, block_rows=16), ("views", "split", "id")
        )
        self._undisturbed = self._copy("undisturbed.zarr")
        began = time.monotonic()
        with running(cache_and_die, self._undisturbed, "never", 0, 0.0) as process:
            process.join()
        self.seconds = time.monotonic() - began
        assert process.exitcode == 0
        self._url = self._copy("0.zarr")

    def kill(self, number: int, moment: str) -> None:
        """A run that dies around its n-th operation on the store, unless it has fewer."""
        with running(cache_and_die, self._url, moment, number, self.moments.choice([0, 0.001, 0.01])) as process:
            process.join()
            self._ended(process)

    def kill_after(self, seconds: float) -> None:
        """A run that is killed from outside, unless it is done by then."""
        with running(cache_and_die, self._url, "never", 0, 0.0) as process:
            process.join(seconds)
            process.kill()
            process.join()
            self._ended(process)

    def finish(self) -> None:
        """A last run that nobody disturbs."""
        with running(cache_and_die, self._url, "never", 0, 0.0) as process:
            process.join()
            self._ended(process)
        assert process.exitcode == 0

    def _ended(self, process: BaseProcess) -> None:
        assert process.exitcode in (0, -9)
        self.kills += process.exitcode == -9
        assert verify(open_store(self._url)) == [], "what is published is whole after every kill"
        if process.exitcode == 0:
            assert self._contents(self._url) == self._contents(self._undisturbed)
            self.completed += 1
            self._url = self._copy(f"{self.completed}.zarr")

    def _copy(self, name: str) -> str:
        return str(shutil.copytree(self._empty, self.folder / name))

    @staticmethod
    def _contents(url: str) -> dict[str, bytes]:
        """Everything but how often a manifest was written, and drafts that nobody reads."""
        files = {str(path.relative_to(url)): path for path in Path(url).rglob("*") if path.is_file()}
        scopes = open_store(url).manifest.model_dump_json(exclude={"number"})
        kept = {
            name: path.read_bytes()
            for name, path in files.items()
            if "/manifests/" not in name and "drafts" not in name
        }
        return kept | {"manifest": scopes.encode()}


@pytest.mark.s3
@pytest.mark.timeout(600)
def test_killed_on_an_object_store_it_equals_a_local_run(s3_bucket: str, tmp_path: Path) -> None:
    def start(url: str) -> subprocess.Popen[str]:
        words = ("cache", url, "--teacher", "test_resnet", "--random-weights", "--image-size", "32", "--json")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-m", "trainer", *words], stdout=subprocess.PIPE, env=environment, text=True
        )

    attributes = small_attributes(num_rows=ROWS, block_rows=16)
    remote = write_small_store(f"{s3_bucket}/store.zarr", attributes, ("views", "split", "id"))
    local = make_store(tmp_path / "store.zarr")
    began = time.monotonic()
    key = json.loads(start(local.url).communicate()[0])["teacher"]
    moments, kills = random.Random(2), 0
    seconds = time.monotonic() - began
    while kills < 5:  # while it works, not while it imports
        process = start(remote.url)
        try:
            process.wait(moments.uniform(0.5 * seconds, 1.2 * seconds))
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
        kills += process.returncode == -9
        assert verify(open_store(remote.url)) == [], "what is published is whole after every kill"
        if process.returncode == 0:
            break
    assert json.loads(start(remote.url).communicate()[0])["is_complete"]
    assert kills > 0
    np.testing.assert_array_equal(features_of(remote, key), features_of(local, key))


@pytest.mark.slow
def test_killed_and_stopped_as_processes_are_it_equals_an_undisturbed_run(tmp_path: Path) -> None:
    def start(url: str) -> subprocess.Popen[str]:
        words = ("cache", url, "--teacher", "test_resnet", "--random-weights", "--image-size", "96", "--json")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-m", "trainer", *words], stdout=subprocess.PIPE, env=environment, text=True
        )

    def wait_for_commits(url: str, count: int, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + 120
        while len(list(Path(url).glob("_viewpoint/commits/teachers/*/*.json"))) < count:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)

    urls = [str(tmp_path / f"{name}.zarr") for name in ("disturbed", "undisturbed")]
    for url in urls:
        write_small_store(url, small_attributes(num_rows=160, block_rows=16), ("views", "split", "id"))
    with start(urls[0]) as killed:
        wait_for_commits(urls[0], 2, killed)
        killed.kill()
    with start(urls[0]) as stopped:
        wait_for_commits(urls[0], 4, stopped)
        stopped.terminate()
    assert stopped.returncode == EXIT_STOPPED
    with start(urls[0]) as finished, start(urls[1]) as undisturbed:
        summaries = [json.loads(process.communicate()[0]) for process in (finished, undisturbed)]
    assert 0 < summaries[0]["rows"] < summaries[1]["rows"] == 160
    stores = [open_store(url) for url in urls]
    path = FIELD.format(key=summaries[0]["teacher"])
    np.testing.assert_array_equal(*(store.read(path, range(160)) for store in stores))
    assert verify(stores[0]) == []
