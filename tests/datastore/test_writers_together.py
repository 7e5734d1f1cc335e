"""Several ingests on one store: at the same time, in parts, in parts of another number, and with other shapes."""

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import fsspec
import pytest

from datastore.cameras import rig_by_name
from datastore.ingest import ingest
from datastore.layout import Store, open_store
from datastore.sources import open_source
from datastore.write import publish
from tests.ingests import assert_equal_stores, start_ingest, succeed, undisturbed_store

SOURCE = "demo://shapes?count=64&seed=0"  # four blocks
OTHER_SOURCE = "demo://shapes?count=64&seed=1"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return undisturbed_store(SOURCE, tmp_path_factory.mktemp("together") / "undisturbed")


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where there is no store yet, and processes can meet."""
    return f"{request.getfixturevalue('s3_bucket')}/store" if request.param == "s3" else str(tmp_path / "store")


@pytest.fixture
def memory_url() -> Iterator[str]:
    name = uuid.uuid4().hex
    yield f"memory://{name}"
    fsspec.filesystem("memory").rm(f"/{name}", recursive=True)


@pytest.mark.slow
def test_writers_of_the_same_part_do_no_harm_whatever_their_workers(url: str, undisturbed: Store) -> None:
    succeed(*(start_ingest(SOURCE, url, "--workers", workers) for workers in ("1", "3")))
    assert_equal_stores(url, undisturbed.url)


@pytest.mark.slow
def test_writers_of_overlapping_parts_do_no_harm(url: str, undisturbed: Store) -> None:
    parts = ("0/2", "1/2", "0/3", "2/3")
    succeed(*(start_ingest(SOURCE, url, "--workers", "1", "--part", part) for part in parts))
    assert_equal_stores(url, undisturbed.url)


def test_of_writers_with_other_shapes_or_options_one_is_refused_with_what_differs(url: str, undisturbed: Store) -> None:
    ours, theirs = start_ingest(SOURCE, url), start_ingest(OTHER_SOURCE, url, "--points", "32")
    outcomes = {SOURCE: ours.outcome(), OTHER_SOURCE: theirs.outcome()}
    (winner,) = (source for source, (code, _) in outcomes.items() if code == 0)
    (loser,) = outcomes.keys() - {winner}
    code, said = outcomes[loser]
    assert code == 64
    assert "already holds another store" in said and "source_hash" in said and "points_per_shape: " in said
    assert open_store(url).attributes.source_url == winner and open_store(url).is_complete()
    if winner == SOURCE:
        assert_equal_stores(url, undisturbed.url)


@pytest.mark.slow
def test_the_number_of_parts_may_change_between_runs(url: str, undisturbed: Store) -> None:
    killed = start_ingest(SOURCE, url, "--part", "0/2", dies=("after", 30, 0))
    assert killed.outcome()[0] == -9
    for index in range(3):
        succeed(start_ingest(SOURCE, url, "--workers", "1", "--part", f"{index}/3"))
    assert_equal_stores(url, undisturbed.url)


def test_writers_in_one_process_share_a_store_in_memory(memory_url: str, undisturbed: Store) -> None:
    def write(part: tuple[int, int]) -> None:
        rig = rig_by_name("simple6", image_size=32)
        source = open_source(SOURCE)
        ingest(source, memory_url, rig=rig, num_points=64, num_workers=1, part=part, stop=Event())

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, [(0, 1), (0, 2), (0, 1)]))
    assert_equal_stores(memory_url, undisturbed.url)


@pytest.mark.slow
def test_a_manifest_lost_to_a_kill_is_made_by_whoever_comes_next(tmp_path: Path, undisturbed: Store) -> None:
    url = str(tmp_path / "store")
    assert start_ingest(SOURCE, url, dies=("publish-before", 1, 0)).outcome()[0] == -9
    # everything is committed and nothing is published: another part's writer, with nothing to do, publishes it
    succeed(start_ingest(SOURCE, url, "--part", "3/7"))
    assert_equal_stores(url, undisturbed.url)
    assert publish(open_store(url)).number == 1
