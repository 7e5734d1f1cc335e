"""How long a launch takes to its first step, where everything that it needs is there."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.runs import tiny_config, write_corpus
from trainer.runfolder import RunFolder

LIMIT_SECONDS = 25.0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_four_nodes_take_their_first_step_within_seconds_without_any_compiler(tmp_path: Path) -> None:
    store = write_corpus(f"{tmp_path}/shapes.zarr")
    config = tiny_config(store.url, steps=100_000, evaluation={"protocols": []})
    tree = config.model_dump(mode="json", exclude={"job": True, "data": {"store_url"}})
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    nothing, built = tmp_path / "nothing", tmp_path / "built"
    nothing.mkdir()
    words = [sys.executable, "-m", "launcher", "launch", "./mine.yaml", "--data", store.url, "--nodes", "4"]
    # whatever torch, triton or deepspeed would build would lie there, and no program can be found to build it
    environment = {"PATH": str(nothing), "TORCH_EXTENSIONS_DIR": str(built), "TRITON_CACHE_DIR": str(built)}
    started, run = time.monotonic(), RunFolder(f"{tmp_path}/runs/mine-1")
    launch = subprocess.Popen([*words, "--run", run.name], cwd=tmp_path, env=os.environ | environment)
    try:
        while not (run.exists() and run.metrics()):
            assert launch.poll() is None and time.monotonic() - started < 2 * LIMIT_SECONDS
            time.sleep(0.05)
        seconds = time.monotonic() - started
        launch.send_signal(signal.SIGINT)
        launch.wait(60)
    finally:
        launch.kill()
        launch.wait()
    print(f"the first step of four nodes: after {seconds:.1f} s")
    assert seconds <= LIMIT_SECONDS
    assert not built.exists()
