"""The local cache keeps what it was given or nothing, within its bound, whoever shares it and whoever is killed."""

import errno
import fcntl
import logging
import multiprocessing
import os
import random
import resource
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from datastore import disk_cache
from datastore.disk_cache import DiskCache

LIMIT = 2**20
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.datastore.test_disk_cache"])


def content_of(key: str, num_bytes: int = 20_000) -> bytes:
    """Bytes that follow from the key."""
    return random.Random(key).randbytes(num_bytes)


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name not in ("eviction.lock", "total")]


def taken_bytes(folder: Path) -> int:
    total = 0
    for path in files_of(folder):
        try:
            total += 512 * path.stat().st_blocks  # drafts have their whole size before anything is written
        except FileNotFoundError:
            continue  # evicted, or moved to its place
    return total


def test_what_was_put_is_there_for_every_process_of_the_node(tmp_path: Path) -> None:
    cache, other = DiskCache(tmp_path / "a" / "cache", LIMIT), DiskCache(tmp_path / "a" / "cache", LIMIT)
    assert cache.get("key") is None
    cache.put("key", memoryview(bytearray(content_of("key"))))
    cache.put("empty", b"")
    assert other.get("key") == cache.get("key") == content_of("key")
    assert other.get("empty") == b""
    assert other.get("another key") is None
    assert (cache.hits, other.hits) == (1, 2)
    other.put("key", b"new")
    assert cache.get("key") == b"new"
    cache.drop("key")
    cache.drop("key")
    assert other.get("key") is None


def test_the_bound_holds_and_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, LIMIT)
    for number in range(200):
        cache.put(f"{number}", content_of(f"{number}"))
        assert taken_bytes(tmp_path) <= LIMIT
        assert cache.get("0") == content_of("0"), "it is used all the time"
    kept = [number for number in range(200) if cache.get(f"{number}") is not None]
    assert kept == [0, *range(kept[1], 200)], "but for the one in use, the newest are left"
    assert len(kept) >= 0.6 * LIMIT / 20_000


def test_a_folder_that_is_full_from_before_is_brought_below_a_new_bound(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, LIMIT)
    for number in range(40):
        cache.put(f"{number}", content_of(f"{number}"))
    smaller = DiskCache(tmp_path, LIMIT // 4)
    smaller.put("new", content_of("new"))
    assert taken_bytes(tmp_path) <= LIMIT // 4
    assert smaller.get("new") == content_of("new")


def test_what_would_take_most_of_the_bound_is_not_kept(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, LIMIT)
    cache.put("small", b"small")
    cache.put("large", bytes(LIMIT // 4))
    assert cache.get("large") is None
    assert cache.get("small") == b"small"


def test_a_damaged_entry_counts_as_absent_and_is_removed(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, LIMIT)
    cache.put("key", content_of("key", 60))
    (entry,) = files_of(tmp_path)
    whole = entry.read_bytes()
    flipped = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(len(whole))]
    for damaged in (whole[:-1], whole + b"x", b"", whole[:5], bytes(len(whole)), b"VPRANGE0" + whole[8:], *flipped):
        entry.write_bytes(damaged)
        assert cache.get("key") is None
        assert not entry.exists()
    cache.put("key", b"again")
    assert cache.get("key") == b"again"


def test_an_entry_of_another_key_or_another_version_is_not_given_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = DiskCache(tmp_path, LIMIT)
    cache.put("one", b"1")
    (one,) = files_of(tmp_path)
    cache.put("two", b"2")
    (two,) = set(files_of(tmp_path)) - {one}
    two.write_bytes(one.read_bytes())
    assert cache.get("two") is None
    monkeypatch.setattr(disk_cache, "_MAGIC", b"VPRANGE2")
    assert cache.get("one") is None
    assert one.exists(), "the other version still uses it"


# Trouble with the disk


def test_a_folder_that_cannot_be_made_is_said_once_and_costs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    cache = DiskCache(tmp_path / "file" / "cache", LIMIT)
    for _ in range(3):
        cache.put("key", b"content")
        assert cache.get("key") is None
    assert warnings_of(caplog) == 1
    assert "takes no new entries" in caplog.text
    assert "data.cache_path" in caplog.text


def test_a_full_disk_is_said_once_leaves_no_half_entry_and_what_was_there_is_still_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = DiskCache(tmp_path, LIMIT)
    cache.put("before", content_of("before"))

    def full(descriptor: int, content: bytes | memoryview) -> None:
        os.write(descriptor, content[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(disk_cache, "write_whole", full)
        for number in range(3):
            cache.put(f"{number}", content_of(f"{number}"))
        assert warnings_of(caplog) == 1
        assert "No space left on device" in caplog.text
        assert len(files_of(tmp_path)) == 1
    assert cache.get("before") == content_of("before")
    cache.put("after", b"after")
    assert cache.get("after") is None, "it is left alone for a while"
    monkeypatch.setattr(disk_cache.time, "monotonic", lambda: float("inf"))
    cache.put("after", b"after")
    assert cache.get("after") == b"after"


def test_a_quota_is_a_full_disk(tmp_path: Path) -> None:
    process = _processes.Process(target=_put_beyond_a_limit, args=(tmp_path,))
    process.start()
    process.join(30)
    assert process.exitcode == 0
    cache = DiskCache(tmp_path, LIMIT)
    assert cache.get("small") == b"small"
    assert len(files_of(tmp_path)) == 1


def _put_beyond_a_limit(folder: Path) -> None:
    cache = DiskCache(folder, LIMIT)
    cache.put("small", b"small")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    cache.put("large", content_of("large"))
    assert cache.get("large") is None


def warnings_of(caplog: pytest.LogCaptureFixture) -> int:
    return sum(record.levelno >= logging.WARNING for record in caplog.records)


# Many at once


def _put_and_get(folder: Path, seed: int, seconds: float) -> None:
    """Raises where anything comes back that was not put under its key."""
    cache, keys = DiskCache(folder, LIMIT), random.Random(seed)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        key = f"{keys.randrange(150)}"
        found = cache.get(key)
        if found is None:
            cache.put(key, content_of(key))
        elif found != content_of(key):
            raise ValueError(f"{key} came back as something else")


def tell(processes: Sequence[BaseProcess], what: signal.Signals) -> None:
    for process in processes:
        assert process.pid is not None
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(process.pid, what)


def test_processes_share_a_folder_and_together_stay_within_its_bound(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    processes = [_processes.Process(target=_put_and_get, args=(tmp_path, seed, 1.5)) for seed in range(3)]
    for process in processes:
        process.start()
    highest = 0
    while all(process.is_alive() for process in processes):
        tell(processes, signal.SIGSTOP)  # a sum over files that come and go would be no moment's
        highest = max(highest, taken_bytes(tmp_path))
        tell(processes, signal.SIGCONT)
        time.sleep(0.02)
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert LIMIT / 2 < highest <= LIMIT
    _put_and_get(tmp_path, 3, 0.2)
    assert caplog.records == [], "no entry is damaged"


def test_what_a_thread_puts_while_another_makes_room_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, looking, done = DiskCache(tmp_path, 2**20), threading.Event(), threading.Event()

    def evict(cache: DiskCache, draft: Path) -> int:
        looking.set()
        assert done.wait(10)
        return 0

    cache.put("before", b"0")
    monkeypatch.setattr(disk_cache, "_FULL", 0)  # every put looks
    monkeypatch.setattr(DiskCache, "_evict", evict)
    first = threading.Thread(target=cache.put, args=("first", b"1" * 100))
    first.start()
    assert looking.wait(10)
    cache.put("second", b"2" * 100)
    done.set()
    first.join()
    assert (cache.get("first"), cache.get("second")) == (b"1" * 100, b"2" * 100)


def test_any_number_of_processes_stays_within_the_bound(tmp_path: Path) -> None:
    caches = [DiskCache(tmp_path, LIMIT) for _ in range(16)]
    for number, cache in enumerate(caches):
        cache.put(f"first-{number}", b"")  # each has looked, and the folder was empty
    for number in range(60):
        caches[0].put(f"{number}", content_of(f"{number}", 15_000))
    assert taken_bytes(tmp_path) > 0.7 * LIMIT
    for turn in range(2):
        for number, cache in enumerate(caches):
            cache.put(f"{turn}-{number}", content_of("", LIMIT // 64 - 1000))
            assert taken_bytes(tmp_path) <= LIMIT
    assert taken_bytes(tmp_path) > LIMIT / 2


@pytest.mark.parametrize("damage", [b"x", bytes(40)])
def test_a_total_that_is_damaged_or_gone_is_found_out_again(tmp_path: Path, damage: bytes) -> None:
    caches = [DiskCache(tmp_path, LIMIT) for _ in range(2)]
    for cache in caches:
        cache.put("key", b"content")
    for number in range(60):
        (tmp_path / "total").write_bytes(damage)
        caches[number % 2].put(f"{number}", content_of(f"{number}"))
        assert taken_bytes(tmp_path) <= LIMIT
        assert caches[0].get(f"{number}") == content_of(f"{number}")


def test_a_process_that_is_stopped_while_it_counts_stops_no_other(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, LIMIT)
    cache.put("before", b"content")
    with (tmp_path / "total").open("rb") as total:
        fcntl.flock(total, fcntl.LOCK_EX)
        started = time.monotonic()
        cache.put("meanwhile", b"content")
        assert time.monotonic() - started < 2
        assert cache.get("before") == b"content"
        assert cache.get("meanwhile") is None
    cache.put("after", b"content")
    assert cache.get("after") == b"content"
    assert list((tmp_path / "drafts").iterdir()) == []


def test_threads_share_a_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = DiskCache(tmp_path, LIMIT)

    def put_and_get(seed: int) -> int:
        keys, num_wrong = random.Random(seed), 0
        for key in (f"{keys.randrange(80)}" for _ in range(200)):
            found = cache.get(key)
            if found is None:
                cache.put(key, content_of(key))
            num_wrong += found not in (None, content_of(key))
        return num_wrong

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(put_and_get, range(4))) == [0] * 4
    assert cache.hits > 0
    assert taken_bytes(tmp_path) <= LIMIT
    assert caplog.records == []


def test_a_writer_killed_at_any_moment_leaves_whole_entries_and_no_litter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    delays = random.Random(0)
    for seed in range(8):
        process = _processes.Process(target=_put_and_get, args=(tmp_path, seed, 60))
        process.start()
        time.sleep(delays.uniform(0.05, 0.3))
        tell([process], signal.SIGKILL)
        process.join(30)
    (tmp_path / "drafts" / "of-a-killed-writer").write_bytes(b"half")
    cache = DiskCache(tmp_path, LIMIT)
    assert files_of(tmp_path / "drafts") == []
    found = [key for key in map(str, range(150)) if cache.get(key) is not None]
    assert len(found) == len(files_of(tmp_path))
    assert all(cache.get(key) == content_of(key) for key in found)
    assert caplog.records == []


def test_a_writer_at_work_keeps_its_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DiskCache(tmp_path, LIMIT)
    write_whole = disk_cache.write_whole

    def slow(descriptor: int, content: bytes | memoryview) -> None:
        DiskCache(tmp_path, LIMIT)  # another process begins, and tidies up
        write_whole(descriptor, content)

    monkeypatch.setattr(disk_cache, "write_whole", slow)
    cache.put("key", b"content")
    assert cache.get("key") == b"content"
