"""kill -9 at any moment: the next run goes on, and in the end the store is the one of a run that nobody killed."""

import random
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from datastore.inspect import verify_store
from datastore.layout import Store, open_store
from tests.ingests import Ingest, assert_equal_stores, assert_sound, start_ingest, succeed, undisturbed_store


@dataclass
class Series:
    """Ingests of one source into one store, killed one after the other; a new store whenever one is complete."""

    source: str
    new_url: Callable[[], str]
    undisturbed: Store
    moments: random.Random
    options: tuple[str, ...] = ()
    operations: int = 40  # at most so many before a kill; a block takes 15
    seconds: float = 2.5  # that an ingest takes, about
    kills: Counter[str] = field(default_factory=Counter)
    complete: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.url = self.new_url()

    def kill(self, how: str) -> None:
        """One run, killed unless it ends before its moment; whatever it leaves, a reader must find it sound."""
        moment = self.moments.uniform(0, self.seconds)
        if how in ("group", "parent", "worker"):
            running = start_ingest(self.source, self.url, *self.options)
            if not running.ends_within(moment):
                self.kills[how] += self._strike(running, how)
        else:
            number = 1 if how.startswith("publish") else self.moments.randint(1, self.operations)
            dies = how, number, self.moments.choice([0, 0.0005, 0.002, 0.01])
            running = start_ingest(self.source, self.url, *self.options, dies=dies)
        code, said = running.outcome()
        assert code in (0, -9), said
        if how not in ("group", "parent", "worker"):
            self.kills[how] += code == -9
        assert_sound(self.url, self.undisturbed)
        if code == 0:
            self._finish()

    def finish(self) -> None:
        """A last run that nobody kills, and the test of everything that was written."""
        succeed(start_ingest(self.source, self.url, *self.options))
        assert verify_store(open_store(self.url)) == []
        self._finish()

    def _strike(self, running: Ingest, how: str) -> bool:
        """Whether there was somebody to kill."""
        if how == "group":
            running.kill_group()
            return True
        parent = psutil.Process(running.pid)
        victims = [parent] if how == "parent" else self._workers(running, parent)
        if victims:
            self.moments.choice(victims).kill()
        return bool(victims)

    def _workers(self, running: Ingest, parent: psutil.Process) -> list[psutil.Process]:
        while not running.ends_within(0):
            # multiprocessing's own helper is no worker: it has no work
            children = [child for child in parent.children() if "spawn_main" in " ".join(child.cmdline())]
            if children:
                return children
            time.sleep(0.01)
        return []

    def _finish(self) -> None:
        assert_equal_stores(self.url, self.undisturbed.url)
        self.complete.append(self.url)
        self.url = self.new_url()


HOW = ("group", "parent", "worker", "before", "during", "after", "publish-before", "publish-during", "publish-after")


def fifty_kills(series: Series) -> None:
    """Every kind in turn, every other one around an operation, until fifty have found their victim."""
    turns = 0
    while series.kills.total() < 50:
        series.kill(HOW[turns // 2 % len(HOW)] if turns % 2 else series.moments.choice(("before", "during", "after")))
        turns += 1
        assert turns < 150, f"too few kills find anybody: {series.kills}"
    series.finish()
    assert set(series.kills) == set(HOW) and all(series.kills.values()), series.kills
    print(f"kills {dict(series.kills)}, stores completed {len(series.complete)}")


def test_five_kills_leave_the_store_of_an_undisturbed_run(tmp_path: Path) -> None:
    source = "demo://shapes?count=20&seed=0"  # two blocks
    undisturbed = undisturbed_store(source, tmp_path / "undisturbed")
    series = Series(
        source,
        lambda: str(tmp_path / uuid.uuid4().hex),
        undisturbed,
        random.Random(0),
        options=("--workers", "1"),
        operations=14,  # fewer than any run has before it publishes: each kill finds its victim
    )
    for how in ("before", "during", "after", "publish-before", "publish-during"):
        series.kill(how)
    series.finish()
    assert series.kills.total() == 5 and len(series.complete) == 1, series


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_kills_leave_the_store_of_an_undisturbed_run(tmp_path: Path) -> None:
    source = "demo://shapes?count=128&seed=0"  # eight blocks
    undisturbed = undisturbed_store(source, tmp_path / "undisturbed")
    fifty_kills(Series(source, lambda: str(tmp_path / uuid.uuid4().hex), undisturbed, random.Random(1)))


@pytest.mark.s3
@pytest.mark.timeout(1800)
def test_fifty_kills_on_s3_leave_the_store_of_an_undisturbed_run(tmp_path: Path, s3_bucket: str) -> None:
    source = "demo://shapes?count=128&seed=0"
    undisturbed = undisturbed_store(source, tmp_path / "undisturbed")
    series = Series(source, lambda: f"{s3_bucket}/{uuid.uuid4().hex}", undisturbed, random.Random(2), seconds=5)
    fifty_kills(series)
