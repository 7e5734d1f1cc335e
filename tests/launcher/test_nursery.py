"""Agents forked from a warm process behave like any other."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from datastore.errors import EXIT_DO_NOT_RETRY
from launcher.command import Command
from launcher.nursery import Nursery
from tests.runs import tiny_config, write_corpus
from trainer.runfolder import RunFolder

# the agent refuses to run without the mandatory variable, and says so
WORDS = "-m launcher.agent --endpoint 127.0.0.1:1 --job j --node 0 --logs unused -- true"
REFUSED = Command((sys.executable, *WORDS.split()), {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0"})


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


def own_process(nursery: Nursery) -> psutil.Process:
    assert nursery._process is not None
    return psutil.Process(nursery._process.pid)


def test_a_forked_agent_has_its_own_words_environment_log_and_exit_code(nursery: Nursery, tmp_path: Path) -> None:
    agents = [nursery.start(REFUSED, tmp_path / f"{number}.log") for number in range(2)]
    for agent in agents:
        agent.wait()
    assert [agent.exit_code for agent in agents] == [EXIT_DO_NOT_RETRY] * 2
    for number in range(2):
        assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE must be 1" in (tmp_path / f"{number}.log").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_forking_is_safe_because_nothing_else_runs(nursery: Nursery, tmp_path: Path) -> None:
    nursery.start(REFUSED, tmp_path / "log").wait()  # torch is imported by now
    assert own_process(nursery).num_threads() == 1


def test_a_nursery_that_died_is_replaced(nursery: Nursery, tmp_path: Path) -> None:
    nursery.warm_up()
    first = own_process(nursery)
    agent = nursery.start(REFUSED, tmp_path / "log")
    first.kill()
    agent.wait()
    assert agent.exit_code in (EXIT_DO_NOT_RETRY, -signal.SIGKILL)
    deadline = time.monotonic() + 10
    while first.is_running() and first.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    second = nursery.start(REFUSED, tmp_path / "log")
    second.wait()
    assert second.exit_code == EXIT_DO_NOT_RETRY


FORKED_TRAINING = """
    import argparse, os, sys
    from pathlib import Path
    from launcher.warm import warm_up
    warm_up("pretrain")
    threads = len(os.listdir("/proc/self/task"))
    imported = set(sys.modules)
    from trainer.pretrain import run
    run(argparse.Namespace(config=sys.argv[1] + "/config.yaml", run=sys.argv[1], resume=False))
    print(threads, len(set(sys.modules) - imported))
"""


@pytest.mark.slow
def test_a_forked_worker_finds_all_that_is_slow_to_import(tmp_path: Path) -> None:
    config = tiny_config(write_corpus(f"{tmp_path}/shapes.zarr").url)
    run = RunFolder(f"{tmp_path}/run")
    run.write_config(config)
    words = [sys.executable, "-c", textwrap.dedent(FORKED_TRAINING), run.url]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ | {"DS_ACCELERATOR": "cpu"})
    threads, late = map(int, done.stdout.split()[-2:])
    assert threads == 1, "forking is safe"
    assert late < 100, "of some five thousand modules"
