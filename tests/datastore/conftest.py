"""A small store of real shapes, made once, for tests that only read it."""

import pytest

from datastore.cameras import rig_by_name
from datastore.ingest import ingest
from datastore.sources import open_source


@pytest.fixture(scope="session")
def demo_store_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """24 shapes of 22 classes, 256 points, six views of 48 pixels."""
    url = str(tmp_path_factory.mktemp("stores") / "demo.zarr")
    ingest(
        open_source("demo://shapes?count=24&seed=0"),
        url,
        rig=rig_by_name("simple6", image_size=48),
        num_points=256,
        num_workers=2,
    )
    return url
