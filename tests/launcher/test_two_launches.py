"""Two launches on one run folder at the same time: the second is refused, or takes the run over for good."""

import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from datastore.errors import EXIT_DO_NOT_RETRY, EXIT_DONE, EXIT_FAILED
from datastore.objects import ObjectFolder
from tests.runs import tiny_config, write_corpus
from trainer.commits import committed_steps, read_manifest
from trainer.runfolder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS, INTERVAL = 800, 10
PATIENCE_SECONDS = 200.0

BLIND_LAUNCHER = """
    import sys
    from launcher.__main__ import main
    from launcher.presence import Holder

    Holder.is_alive = lambda holder: False  # as on machines whose clocks differ by a minute
    sys.exit(main(sys.argv[1:]))
"""


class Launches:
    """Launches of one run, and every manifest that was ever seen to count."""

    def __init__(self, folder: Path) -> None:
        store = write_corpus(f"{folder}/shapes.zarr")
        checkpoint = {"every_steps": INTERVAL, "every_seconds": None, "keep_last": 10_000, "background": False}
        config = tiny_config(
            store.url, steps=STEPS, global_batch=12, checkpoint=checkpoint, evaluation={"protocols": []}
        )
        tree = config.model_dump(mode="json", exclude={"job": True, "data": {"store_url"}})
        (folder / "mine.yaml").write_text(yaml.safe_dump(tree))
        self.run = RunFolder(f"{folder}/runs/shared")
        self.manifests: dict[int, int] = {}  # generation by step
        self.processes: list[subprocess.Popen[str]] = []
        self._folder = folder
        self._words = ["launch", "./mine.yaml", "--data", store.url, "--run", "shared", "--nodes", "2"]

    def start(self, *, is_blind: bool = False) -> "subprocess.Popen[str]":
        how = ["-c", textwrap.dedent(BLIND_LAUNCHER)] if is_blind else ["-m", "launcher"]
        process = subprocess.Popen(
            [sys.executable, *how, *self._words],
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def look(self) -> None:
        """Reads all manifests that count: none may ever be another than before."""
        folder = ObjectFolder(self.run.checkpoints_url)
        for step in set(committed_steps(folder)) - self.manifests.keys():
            self.manifests[step] = read_manifest(folder, step).generation
        for step in list(self.manifests)[-5:]:
            assert read_manifest(folder, step).generation == self.manifests[step], f"step {step} was committed twice"

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            self.look()
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def step(self) -> int:
        return max((line["step"] for line in self.run.metrics()), default=0)

    def check_manifests(self) -> None:
        """One for each step at which one is due, of starts that never go back, and none that does not count."""
        self.look()
        assert sorted(self.manifests) == list(range(INTERVAL, STEPS + 1, INTERVAL))
        generations = [generation for _, generation in sorted(self.manifests.items())]
        assert generations == sorted(generations)
        folder = ObjectFolder(self.run.checkpoints_url)
        assert {step: read_manifest(folder, step).generation for step in self.manifests} == self.manifests
        assert len(list(Path(folder.url).glob("step-*/manifest.json"))) == len(self.manifests)


@pytest.fixture
def launches(tmp_path: Path) -> Iterator[Launches]:
    launches = Launches(tmp_path)
    yield launches
    for process in launches.processes:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def test_of_two_launches_in_the_same_moment_one_trains_and_every_other_is_refused(launches: Launches) -> None:
    first, second = launches.start(), launches.start()
    launches.until(lambda: first.poll() is not None or second.poll() is not None)
    refused, holding = (first, second) if first.poll() is not None else (second, first)
    launches.until(lambda: launches.step() > 5 * INTERVAL)
    late = launches.start()
    for each in (refused, late):
        _, said = each.communicate(timeout=PATIENCE_SECONDS)
        assert each.returncode == EXIT_FAILED
        assert f"is being worked on by another launcher (process {holding.pid} " in said
        assert "viewpoint cancel" in said
    launches.until(lambda: holding.poll() is not None)
    assert holding.returncode == EXIT_DONE
    launches.check_manifests()
    assert [line["step"] for line in launches.run.metrics()] == list(range(1, STEPS + 1)), "nothing was disturbed"
    kinds = [event["event"] for event in launches.run.events()]
    assert kinds.count("launch_started") == kinds.count("started") == 1


@pytest.mark.parametrize("is_older_blind", [True, False])
def test_a_launch_that_knows_nothing_of_another_takes_the_run_over_and_no_step_has_two_manifests(
    launches: Launches, is_older_blind: bool
) -> None:
    """One that sees nothing either learns it at its next commit; the others from the note in the run's folder, at last."""
    older = launches.start(is_blind=is_older_blind)
    launches.until(lambda: launches.step() > 5 * INTERVAL)
    newer = launches.start(is_blind=True)
    launches.until(lambda: older.poll() is not None)
    _, said = older.communicate()
    assert older.returncode == EXIT_DO_NOT_RETRY, said
    assert "another launch" in said and "the run goes on there, and this launch ends" in said
    launches.until(lambda: newer.poll() is not None)
    assert newer.returncode == EXIT_DONE
    launches.check_manifests()
    starts = [event for event in launches.run.events() if event["event"] == "started"]
    assert [start["generation"] for start in starts] == [1, 2], "the older one did not take it back"
    assert set(launches.manifests.values()) == {1, 2}
    assert launches.run.is_finished()
    started = [event for event in launches.run.events() if event["event"] == "workers_started"]
    assert len(started) == 2 * 2, "each heard of its own nodes alone"
