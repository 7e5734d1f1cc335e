"""Trainings whose reads fail: they train on the very samples of an undisturbed one, or stop after a checkpoint."""

import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pytest

from datastore.errors import EXIT_DO_NOT_RETRY, EXIT_UNAVAILABLE, ViewpointError
from datastore.objects import ObjectFolder
from tests.fault_proxy import Fault, FaultProxy, Trouble
from tests.runs import tiny_config, write_corpus
from tests.s3_server import new_bucket, s3_means
from trainer import pretrain
from trainer.commits import committed_steps
from trainer.distributed import joined
from trainer.runfolder import RunFolder

pytestmark = [pytest.mark.s3, pytest.mark.slow]

STEPS, BREAKS_AT = 60, 10  # of 53 an epoch
NUM_SHARDS = 60
SHARDS = "/c/"  # in the path of every shard object, and of nothing else
POINTS = "points/c"


class Trained:
    """What one start of a run did."""

    def __init__(self, run: RunFolder, samples: list[list[int]], error: ViewpointError | None) -> None:
        self.run, self.samples, self.error = run, samples, error
        self.figures = [(line["step"], line["loss"], line["grad_norm"]) for line in run.metrics()]


@dataclass(frozen=True)
class Corpus:
    """A store on S3, and a training on the same store on disk, which nothing disturbs."""

    s3_url: str
    straight: Trained


def train(store_url: str, run_url: str, at_step: Callable[[int], None] = lambda step: None) -> Trained:
    """Trains the run from where it is; `at_step` is called before each step, and may break things."""
    # memory for a part of the shards only, so that most are read when the training is under way
    fetch = {"part_mib": 2**-9, "retry_seconds": 3.0, "timeout_seconds": 1.0, "hedge_least_seconds": 0.2}
    data = {"store_url": store_url, "num_points": 128, "unit_samples": 16, "lanes": 2, "memory_gib": 5e-4}
    checkpoint = {"every_seconds": None, "background": False}
    config = tiny_config(store_url, steps=STEPS, global_batch=12, checkpoint=checkpoint, data=data | {"fetch": fetch})
    run, samples, error = RunFolder(run_url), list[list[int]](), None
    train_step = pretrain.train_step

    def recording(engine: Any, micro_batches: Any, account: Any) -> Any:
        at_step(len(samples))
        samples.append([int(sample) for batch in micro_batches for sample in batch.ids])
        return train_step(engine, micro_batches, account)

    with pytest.MonkeyPatch.context() as patch, joined(60) as world:
        patch.setattr(pretrain, "train_step", recording)
        try:
            pretrain.pretrain(config, run, world, threading.Event())
        except ViewpointError as stopped:
            error = stopped
    return Trained(run, samples, error)


@pytest.fixture(scope="module")
def corpus(s3_server: str, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("faults")
    local_url = write_corpus(f"{folder}/shapes.zarr", num_rows=16 * NUM_SHARDS, block_rows=16, points_per_shape=200).url
    with s3_means(s3_server):
        s3_url = f"{new_bucket()}/shapes.zarr"
        fsspec.filesystem("s3").put(local_url, s3_url, recursive=True)
    straight = train(local_url, f"{folder}/straight")
    assert straight.error is None and len(straight.samples) == STEPS
    return Corpus(s3_url, straight)


@pytest.fixture
def proxy(s3_server: str, corpus: Corpus) -> Iterator[FaultProxy]:
    """Stands before the server, and s3:// means it."""
    with FaultProxy(s3_server) as proxy, s3_means(proxy.url):
        yield proxy


@pytest.mark.parametrize("fault", ["slow", "unavailable", "truncated", "reset", "flipped", "hung"])
def test_reads_that_fail_for_a_while_are_repeated_and_the_training_is_the_undisturbed_one(
    corpus: Corpus, proxy: FaultProxy, tmp_path: Path, fault: Fault
) -> None:
    proxy.trouble = Trouble({fault: 0.1}, slow_seconds=0.5, path_part=SHARDS)
    disturbed = train(corpus.s3_url, f"{tmp_path}/run")
    assert proxy.faults[fault] > 5
    assert disturbed.error is None
    assert disturbed.samples == corpus.straight.samples
    assert disturbed.figures == corpus.straight.figures


def _break(kind: str, proxy: FaultProxy, store_url: str) -> Callable[[], None]:
    """Breaks what is not read yet; returns what mends it."""
    filesystem = fsspec.filesystem("s3")
    shards = {name: filesystem.cat_file(name) for name in filesystem.find(f"{store_url}/{POINTS}")}
    assert len(shards) == NUM_SHARDS
    if kind == "unavailable":
        proxy.trouble = Trouble({"unavailable": 1.0}, path_part=SHARDS)
    for name, content in shards.items():
        if kind == "missing":
            filesystem.rm_file(name)
        elif kind == "damaged":
            damaged = bytearray(content)
            damaged[40] ^= 1
            filesystem.pipe_file(name, bytes(damaged))

    def mend() -> None:
        proxy.trouble = Trouble()
        for name, content in shards.items():
            filesystem.pipe_file(name, content)

    return mend


@pytest.mark.parametrize(
    ("kind", "exit_code", "says"),
    [
        ("unavailable", EXIT_UNAVAILABLE, r"/c/\d+.* cannot be read: .*HTTP 503"),
        ("missing", EXIT_DO_NOT_RETRY, rf"{POINTS}/\d+.* cannot be read"),
        ("damaged", EXIT_DO_NOT_RETRY, rf"{POINTS}/\d+.* cannot be read: it is damaged"),
    ],
)
def test_reads_that_fail_for_good_stop_the_training_after_a_checkpoint_and_it_goes_on_once_they_work(
    corpus: Corpus, proxy: FaultProxy, tmp_path: Path, kind: str, exit_code: int, says: str
) -> None:
    mends: list[Callable[[], None]] = []

    def break_once(step: int) -> None:
        if step == BREAKS_AT:
            mends.append(_break(kind, proxy, corpus.s3_url))

    stopped = train(corpus.s3_url, f"{tmp_path}/run", break_once)
    (mend,) = mends
    mend()
    assert stopped.error is not None and re.search(says, str(stopped.error)), stopped.error
    assert stopped.error.exit_code == exit_code
    last = len(stopped.samples)
    assert BREAKS_AT < last < STEPS
    assert committed_steps(ObjectFolder(stopped.run.checkpoints_url)) == [last], "nothing that was trained is lost"
    event = stopped.run.last_event()
    assert event is not None and (event["event"], event["step"]) == ("unreadable", last)
    resumed = train(corpus.s3_url, f"{tmp_path}/run")
    assert resumed.error is None and resumed.run.is_finished()
    assert stopped.samples + resumed.samples == corpus.straight.samples
    assert resumed.figures == corpus.straight.figures
