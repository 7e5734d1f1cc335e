"""Small ingests in processes of their own, to be killed or to meet on one store, and what their stores must equal."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import fsspec

from datastore.cameras import rig_by_name
from datastore.ingest import ingest
from datastore.layout import INGEST, Store, newest_manifest, open_store
from datastore.objects import DRAFTS_FOLDER, ObjectFolder
from datastore.sources import open_source
from datastore.write import verify

ROOT: Final = Path(__file__).parents[1]
OPTIONS: Final = ("--rig", "simple6", "--image-size", "32", "--points", "64", "--workers", "2")


def undisturbed_store(source: str, url: Path) -> Store:
    """The store of an ingest that met nobody, with the same options but another number of workers."""
    rig = rig_by_name("simple6", image_size=32)
    ingest(open_source(source), str(url), rig=rig, num_points=64, num_workers=1)
    return open_store(url)


def start_ingest(
    source: str, store_url: str, *options: str, dies: tuple[str, int, float] = ("never", 0, 0)
) -> "Ingest":
    """An ingest that has begun, and dies at the moment that `tests.killable_ingest` understands."""
    words = [str(word) for word in (*dies, source, store_url, *OPTIONS, *options)]
    return Ingest([sys.executable, "-m", "tests.killable_ingest", *words])


class Ingest:
    """A process group that ingests."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self.pid = self._process.pid

    def kill_group(self) -> None:
        """Ends all of it at once, workers too."""
        if self._process.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)

    def ends_within(self, seconds: float) -> bool:
        """Whether it ends by itself in this time."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def outcome(self) -> tuple[int, str]:
        """Exit code, and what was said."""
        _, said = self._process.communicate(timeout=240)
        return self._process.returncode, said


def succeed(*ingests: Ingest) -> None:
    """Waits for all of them, and each must be fine."""
    for running in ingests:
        code, said = running.outcome()
        assert code == 0, said


def objects_of(url: str) -> dict[str, bytes]:
    """Every object below a URL by name, but for manifests, whose number depends on who came when."""
    filesystem, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    paths = filesystem.find(root)
    contents = filesystem.cat(paths) if paths else {}
    names = {path: path.removeprefix(root).lstrip("/") for path in contents}
    return {name: contents[path] for path, name in names.items() if "/manifests/" not in name}


def assert_equal_stores(url: str, undisturbed_url: str) -> None:
    """Complete, verified, and the same in every byte that a reader depends on; no writer left anything behind."""
    store, undisturbed = open_store(url), open_store(undisturbed_url)
    assert store.is_complete(INGEST) and verify(store) == []
    assert store.manifest.scopes == undisturbed.manifest.scopes
    assert ObjectFolder(url).names(DRAFTS_FOLDER) == []
    ours, theirs = objects_of(url), objects_of(undisturbed_url)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


def assert_sound(url: str, undisturbed: Store) -> None:
    """A reader finds nothing, or rows that are all right: whatever died, and whenever."""
    folder = ObjectFolder(url)
    if not newest_manifest(folder).number:
        return
    store = open_store(url)
    assert verify(store) == []
    assert store.quarantine == []
    for name, sums in store.manifest.scope(INGEST).shards.items():
        expected = undisturbed.manifest.scope(INGEST).shards[name]
        pairs = zip(sums.sizes, sums.crc32, expected.sizes, expected.crc32, strict=True)
        wrong = [shard for shard, (size, crc32, *right) in enumerate(pairs) if size and [size, crc32] != right]
        assert wrong == [], f"{len(wrong)} shards of {name} in {store}"
