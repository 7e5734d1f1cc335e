"""One store on an S3 server, by the commands that people type, and read by somebody who has zarr and nothing of ours."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

from datastore.errors import EXIT_DO_NOT_RETRY
from datastore.layout import open_store
from tests.ingests import objects_of, undisturbed_store

ROOT = Path(__file__).parents[2]
SOURCE = "demo://shapes?count=24&seed=0"


def viewpoint(*words: str) -> str:
    """What a command prints."""
    finished = subprocess.run([sys.executable, "-m", "trainer", *words], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.s3
def test_a_store_on_s3_is_written_verified_and_read_by_plain_zarr(s3_bucket: str, tmp_path: Path) -> None:
    url = f"{s3_bucket}/corpora/demo.zarr"
    options = ("--rig", "simple6", "--image-size", "32", "--points", "64", "--workers", "2")
    assert "Went through 24 shapes" in viewpoint("ingest", SOURCE, url, *options)
    assert "Verified: every checksum is right" in viewpoint("inspect", url, "--verify")

    local = undisturbed_store(SOURCE, tmp_path / "local.zarr")
    assert objects_of(url) == objects_of(local.url)
    store, rows = open_store(url), [5, 3, 23, 0]
    for field in local.fields:
        assert (store.read(field, rows) == local.read(field, rows)).all()

    group = zarr.open_group(url, mode="r")
    facts = group.attrs["viewpoint"]
    visible = np.unpackbits(group["visibility"][:], axis=-1, count=facts["num_views"], bitorder="little").astype(bool)
    assert (visible == local.read("visibility", range(24))).all()
    assert (group["views"][:] == local.read("views", range(24))).all()
    assert group["points"].shape == (24, 64, 3) and group["points"].attrs["axes"] == ["row", "p", "3"]
    assert facts["class_names"] == list(local.class_names)
    assert list(group["id"][:]) == list(local.read("id", range(24)))


@pytest.mark.s3
@pytest.mark.parametrize("where", ["in a bucket", "of a missing bucket"])
def test_a_store_on_s3_that_is_not_there_is_one_line(s3_bucket: str, where: str) -> None:
    url = f"{s3_bucket}/missing.zarr" if where == "in a bucket" else "s3://viewpoint-has-no-such-bucket/missing.zarr"
    words = [sys.executable, "-m", "trainer", "inspect", url]
    finished = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == EXIT_DO_NOT_RETRY
    said = [line for line in finished.stderr.splitlines() if " INFO " not in line]
    assert said == [
        f"viewpoint: {url} is no store: it has no zarr.json. Nothing is there. Write a store with "
        f"`viewpoint ingest SOURCE {url}`."
    ]
