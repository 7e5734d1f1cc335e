"""Files at URLs as local paths."""

from pathlib import Path

import fsspec

from trainer.fetched import fetched


def test_remote_folders_are_fetched_and_local_ones_used_in_place(tmp_path: Path) -> None:
    with fetched(str(tmp_path)) as path:
        assert path == tmp_path
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/fetched-test/folder/a.txt", b"content")
    with fetched("memory://fetched-test/folder") as path:
        assert (path / "a.txt").read_bytes() == b"content"
        copy = path
    assert not copy.exists()
    memory.rm("/fetched-test", recursive=True)
