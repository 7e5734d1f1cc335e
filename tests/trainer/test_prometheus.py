"""A real Prometheus scrapes a running training, and finds nothing wrong with its metrics."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from datastore.layout import Store
from tests.runs import tiny_config

pytestmark = pytest.mark.slow

_SCRAPE = """
global: {{scrape_interval: 1s}}
scrape_configs:
  - job_name: viewpoint
    static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
"""


def _program(name: str) -> str:
    path = shutil.which(name)
    assert path, f"{name} is not installed, and this test is about the real one: apt-get install prometheus"
    return path


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _fetched(url: str, process: "subprocess.Popen[bytes]", seconds: float = 120.0) -> str:
    """The answer, as soon as there is one."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + seconds
    while True:
        try:
            with opener.open(url, timeout=5) as response:
                return str(response.read().decode())
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, f"{url} does not answer"
            time.sleep(0.2)


def test_prometheus_scrapes_a_running_job_and_promtool_finds_nothing_wrong(tiny_corpus: Store, tmp_path: Path) -> None:
    promtool, prometheus = _program("promtool"), _program("prometheus")
    port, own_port = _free_port(), _free_port()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        tiny_config(tiny_corpus.url, steps=100_000, metrics={"port": port}, checkpoint={"every_steps": 10}).to_yaml()
    )
    (tmp_path / "prometheus.yml").write_text(_SCRAPE.format(port=port))
    words = [sys.executable, "-m", "trainer", "pretrain", "--config", str(recipe), "--run", str(tmp_path / "run")]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    with (tmp_path / "log").open("wb") as log:
        training = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
        server = subprocess.Popen(
            [
                prometheus,
                f"--config.file={tmp_path}/prometheus.yml",
                f"--storage.tsdb.path={tmp_path}/tsdb",
                f"--web.listen-address=127.0.0.1:{own_port}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        text = _fetched(f"http://127.0.0.1:{port}/metrics", training)
        checked = subprocess.run(
            [promtool, "check", "metrics"], input=text, text=True, capture_output=True, check=False
        )
        assert checked.returncode == 0, checked.stdout + checked.stderr

        def value_of(query: str) -> float:
            url = f"http://127.0.0.1:{own_port}/api/v1/query?query={urllib.parse.quote(query)}"
            found = json.loads(_fetched(url, server))["data"]["result"]
            return float(found[0]["value"][1]) if found else 0.0

        deadline = time.monotonic() + 120
        while not (value_of("viewpoint_step") > 20 and value_of("viewpoint_checkpoint_committed_step") >= 10):
            assert time.monotonic() < deadline and training.poll() is None, (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.5)
        assert 0 < value_of("viewpoint_goodput_ratio") <= 1
        assert value_of("sum(viewpoint_time_seconds_total)") > 1
        assert value_of("viewpoint_checkpoint_bytes_total") > 0
    finally:
        for process in (training, server):
            process.kill()
            process.wait()
