"""Kills at random points of saving and uploading: the newest committed checkpoint always loads, and garbage goes."""

import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from datastore.objects import ObjectFolder
from tests.fault_proxy import Fault, FaultProxy, Trouble
from tests.killable_saves import begin, save, values_of
from tests.s3_server import new_bucket, s3_means
from trainer.checkpoint import load_weights
from trainer.commits import MANIFEST, committed_steps, read_manifest, step_name


def _kill_and_look(
    url: str,
    kills: int,
    longest_seconds: float,
    before_saving: Callable[[], None] = lambda: None,
    before_looking: Callable[[], None] = lambda: None,
) -> list[int]:
    """Kills so many savers; returns the newest step after each."""
    chance, folder, newest = random.Random(0), ObjectFolder(url), []
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, "-m", "tests.killable_saves", url], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        before_saving()
        time.sleep(chance.uniform(0, longest_seconds))
        process.kill()
        process.communicate()
        before_looking()
        steps = committed_steps(folder)
        newest.append(max(steps, default=0))
        for step in steps[-1:]:
            loaded = load_weights(f"{url}/{step_name(step)}")["w"].numpy()
            assert np.array_equal(loaded, values_of(step)), f"step {step}"
    return newest


def _check_no_garbage(url: str) -> None:
    """After one more save, there is nothing but the two newest checkpoints and this start's record."""
    folder = ObjectFolder(url)
    generation, step = begin(url)
    save(url, generation, step + 1)
    kept = committed_steps(folder)
    assert kept == [step, step + 1]
    assert {name for name in folder.names() if name.startswith("step-")} == {step_name(each) for each in kept}
    for each in kept:
        stems = [rank.name for rank in read_manifest(folder, each).ranks]
        expected = {MANIFEST, *(f"{stem}.{suffix}" for stem in stems for suffix in ("json", "safetensors"))}
        assert set(folder.names(step_name(each))) == expected
    assert folder.names("_viewpoint/drafts") == []


def test_a_few_kills_lose_nothing_that_was_committed(tmp_path: Path) -> None:
    newest = _kill_and_look(str(tmp_path), kills=3, longest_seconds=0.3)
    assert newest == sorted(newest)
    if newest[-1]:
        _check_no_garbage(str(tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_kills_at_random_points_lose_nothing_that_was_committed(tmp_path: Path) -> None:
    newest = _kill_and_look(str(tmp_path), kills=50, longest_seconds=0.4)
    assert newest == sorted(newest) and len(set(newest)) > 10
    _check_no_garbage(str(tmp_path))


@pytest.mark.s3
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_kills_while_saving_to_an_object_store_lose_nothing(kills: int, s3_bucket: str) -> None:
    newest = _kill_and_look(f"{s3_bucket}/run/checkpoints", kills=kills, longest_seconds=1.0)
    assert newest == sorted(newest) and newest[-1] > 0
    _check_no_garbage(f"{s3_bucket}/run/checkpoints")


@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fifty_kills_while_the_object_store_fails_stalls_and_truncates_lose_nothing(s3_server: str) -> None:
    """What is read afterwards goes through the same trouble, less the requests that hang: those take a minute each.

    Four to five minutes on two cores.
    """
    with s3_means(s3_server):
        url = f"{new_bucket()}/run/checkpoints"
    rates: dict[Fault, float] = {"unavailable": 0.03, "throttled": 0.01, "reset": 0.02, "truncated": 0.02}
    reading = Trouble(rates=rates, latency_seconds=0.005)
    saving = Trouble(rates=rates | {"hung": 0.02}, latency_seconds=0.005)
    with FaultProxy(s3_server) as proxy, s3_means(proxy.url):

        def trouble(now: Trouble) -> Callable[[], None]:
            return lambda: setattr(proxy, "trouble", now)

        newest = _kill_and_look(url, 50, 2.0, before_saving=trouble(saving), before_looking=trouble(reading))
        print(f"newest step after each kill: {newest}; faults: {dict(proxy.faults)}")
        assert newest == sorted(newest) and len(set(newest)) > 10
        assert all(proxy.faults[fault] > 0 for fault in saving.rates)
    with s3_means(s3_server):
        save(url, *begin(url)[:1], step=newest[-1] + 1)
        _check_no_garbage(url)


@pytest.mark.s3
def test_parts_of_an_upload_that_was_killed_are_given_up(s3_bucket: str) -> None:
    import fsspec

    url = f"{s3_bucket}/run/checkpoints"
    generation, _ = begin(url)
    filesystem, bucket = fsspec.filesystem("s3"), s3_bucket.removeprefix("s3://")
    keys = [f"run/checkpoints/step-00000001/rank-00000-of-00002.generation-{number}.safetensors" for number in (0, 9)]
    for key in [*keys, "elsewhere/file"]:
        filesystem.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    save(url, generation, 1)
    left = {upload["Key"] for upload in filesystem.list_multipart_uploads(bucket)}
    assert left == {keys[1], "elsewhere/file"}, "what a newer start uploads, and what is not ours, stays"
