"""The whole path on the cluster double: kubectl applies what the launcher fills, pods meet and train, and get over faults."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from datastore.errors import EXIT_DONE
from launcher.__main__ import main
from launcher.network import why_not
from tests.cluster.site import Site, running_site
from tests.runs import tiny_config, write_corpus
from trainer.runfolder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.s3, pytest.mark.timeout(900)]


@pytest.fixture
def site(tmp_path: Path, s3_server: str, s3_environment: None) -> Iterator[Site]:
    assert why_not() is None, f"{why_not()}: pods need it"
    with running_site(tmp_path, s3_server) as made:
        yield made


def recipe_file(folder: Path, store_url: str, **changes: Any) -> str:
    tree = tiny_config(store_url, **changes).model_dump(mode="json", exclude={"job": True, "data": {"store_url"}})
    (folder / "pointmcd.yaml").write_text(yaml.safe_dump(tree))
    return "./pointmcd.yaml"


def losses(run: RunFolder) -> dict[int, float]:
    """By step; of a step that was done twice, the last."""
    return {line["step"]: line["loss"] for line in run.metrics() if "loss" in line}


def test_a_launch_with_kubectl_trains_on_four_pods_to_the_report_as_four_local_nodes_do_bit_for_bit(
    site: Site, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write_corpus(f"{s3_bucket}/shapes.zarr")
    recipe = recipe_file(tmp_path, store.url, steps=12, evaluation={"protocols": []})
    words = (recipe, "--nodes", "4", "--data", store.url, "--runs", f"{s3_bucket}/runs", "--node-timeout", "20")
    launched = site.launch(*words, "--run", "on-pods", folder=tmp_path)
    said, _ = launched.communicate(timeout=600)
    print(said)
    assert launched.returncode == EXIT_DONE, said
    run = RunFolder(f"{s3_bucket}/runs/on-pods")
    assert run.is_finished()
    assert run.read_text("report.html") is not None

    monkeypatch.chdir(tmp_path)
    assert main(["launch", *words, "--run", "on-this-machine"]) == EXIT_DONE
    local = losses(RunFolder(f"{s3_bucket}/runs/on-this-machine"))
    assert sorted(local) == list(range(1, 13))
    assert losses(run) == local
    assert all(math.isfinite(loss) for loss in local.values())
