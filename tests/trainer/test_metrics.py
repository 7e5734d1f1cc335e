"""Tests of trainer/metrics.py."""

import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from datastore.errors import DoNotRetry
from trainer.distributed import World
from trainer.metrics import (
    PORT_OFFSET_VARIABLE,
    Bucket,
    Exporter,
    Means,
    MetricsConfig,
    Reads,
    StepFigures,
    TimeAccount,
)
from trainer.runfolder import RunFolder


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free: int = probe.getsockname()[1]
        return free


def _clock(*times: float) -> Iterator[float]:
    yield from times


def test_the_buckets_of_the_account_add_up_to_wall_time() -> None:
    ticks = _clock(0.0, 3.0, 4.5, 6.5, 10.0)
    account = TimeAccount(clock=lambda: next(ticks))
    account.enter("data_wait")
    account.enter("forward")
    account.enter("data_wait")
    seconds = account.seconds
    assert seconds["startup"] == 3.0 and seconds["forward"] == 2.0 and seconds["data_wait"] == 1.5 + 3.5
    assert sum(seconds.values()) == 10.0


def test_the_account_goes_on_where_an_earlier_start_ended() -> None:
    account = TimeAccount(clock=lambda: 0.0)
    account.add_earlier({"forward": 5.0, "a bucket of an older release": 1.0})
    assert account.seconds["forward"] == 5.0
    assert sum(account.seconds.values()) == 6.0


def test_phases_are_what_was_spent_since_they_were_last_asked_for() -> None:
    ticks = _clock(0.0, 1.0, 4.0, 4.5, 6.0)
    account = TimeAccount(clock=lambda: next(ticks))
    account.add_earlier({"down": 100.0})
    account.enter("forward")
    assert account.phases() == {"startup": 1.0, "forward": 3.0}
    account.enter("backward")
    assert account.phases() == {"forward": 0.5, "backward": 1.5}


def test_means_begin_anew_when_they_are_taken() -> None:
    means = Means()
    means.add({"loss": 1.0})
    means.add({"loss": 2.0})
    assert means.take() == {"loss": 1.5}
    means.add({"loss": 7.0})
    assert means.take() == {"loss": 7.0} and means.take() == {}


def test_a_scrape_finds_each_ranks_figures_on_its_own_port(port: int) -> None:
    texts = []
    for rank in (0, 1):
        world = World(rank, 2, local_rank=rank)
        exporter = Exporter(MetricsConfig(port=port), world, "demo-1", TimeAccount())
        exporter.observe(StepFigures(step=7, loss=1.5, terms={"task": 0.5, "alignment": 1.0}, lr=0.1), 448)
        exporter.saved(5, 0.1, 2.0)
        exporter.restarts = {"worker_killed": 2}
        exporter.uploaded_bytes = lambda: 1000
        exporter.reads = lambda: Reads(bytes_read=5, batches_ready=2, retries=3, cache_hits=4)
        with urllib.request.urlopen(f"http://127.0.0.1:{port + rank}/metrics", timeout=5) as response:
            texts.append(response.read().decode())
        exporter.close()
    first, second = texts
    assert 'viewpoint_loss{rank="0",run="demo-1",term="alignment"} 1.0' in first
    assert 'viewpoint_samples_total{rank="0",run="demo-1"} 448.0' in first
    assert 'viewpoint_checkpoint_committed_step{rank="0",run="demo-1"} 5.0' in first
    assert 'viewpoint_restarts_total{cause="worker_killed",rank="0",run="demo-1"} 2.0' in first
    assert 'viewpoint_checkpoint_seconds{part="stall",rank="0",run="demo-1"} 0.1' in first
    assert "viewpoint_goodput_ratio" in first and "viewpoint_goodput_ratio" not in second
    assert 'viewpoint_data_retries_total{rank="1",run="demo-1"} 3.0' in second
    assert 'viewpoint_data_cache_hits_total{rank="1",run="demo-1"} 4.0' in second
    assert 'viewpoint_checkpoint_bytes_total{rank="1",run="demo-1"} 1000.0' in second
    assert 'viewpoint_time_seconds_total{bucket="startup",rank="1",run="demo-1"}' in second
    assert "viewpoint_loss" not in second, "the loss is the same everywhere and comes from rank 0"
    for text in texts:
        assert all(line.startswith("viewpoint_") for line in text.splitlines() if not line.startswith("#"))


def test_the_second_node_of_a_machine_takes_the_ports_after_the_first(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PORT_OFFSET_VARIABLE, "1")
    first = Exporter(MetricsConfig(port=port - 1), World(1, 2, local_rank=0), "demo-1", TimeAccount())
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        assert 'rank="1"' in response.read().decode()
    first.close()


def test_a_port_in_use_is_named_with_the_option_that_changes_it(port: int) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("0.0.0.0", port))
        taken.listen()
        with pytest.raises(DoNotRetry, match=rf"Port {port}.*metrics\.port"):
            Exporter(MetricsConfig(port=port), World(), "demo-1", TimeAccount())


def test_the_figures_of_a_step_cost_at_most_half_a_per_cent_of_it(tmp_path: Path) -> None:
    """Of the demo's steps, 0.2 s; in processor time, as the machine may be busy."""
    run, account, means = RunFolder(str(tmp_path)), TimeAccount(), Means()
    exporter = Exporter(MetricsConfig(), World(), "demo-1", account)
    terms = {"task": 1.0, "alignment": 2.0, "transform_penalty": 3.0}
    buckets: tuple[Bucket, ...] = ("data_wait", "forward", "backward", "optimizer", "other")
    steps, began = 200, time.process_time()
    for step in range(steps):
        for bucket in buckets:
            account.enter(bucket)
        means.add({"loss": 6.0, **terms})
        figures = StepFigures(step=step, loss=6.0, terms=terms, phases=account.phases())
        exporter.observe(figures, step)
        run.append_metrics(figures.record() | {"account": account.seconds})
    assert (time.process_time() - began) / steps <= 0.005 * 0.2
    assert len(run.metrics()) == steps


def test_without_a_port_nothing_listens_and_figures_are_kept() -> None:
    exporter = Exporter(MetricsConfig(), World(), "demo-1", TimeAccount())
    exporter.observe(StepFigures(step=3), 96)
    assert exporter.figures.step == 3
    exporter.close()
