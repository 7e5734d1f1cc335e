"""Files of JSON lines stay readable whatever happened to one of their writers."""

import json
import logging
import os
from pathlib import Path

import pytest

from trainer.lines import append_line, is_shared, records_of


def test_damaged_lines_are_left_out_and_counted_once(caplog: pytest.LogCaptureFixture) -> None:
    content = b'{"a": 1}\n{"a": 2, "b{"a": 3}\n\x00\x00\x00\n\n[4]\n{"a": 5}\n{"a": 6'
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert records_of(content, "somewhere") == [{"a": 1}, {"a": 5}]
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "somewhere has 3 damaged lines, left out"
    ]


def test_a_line_is_not_lost_with_the_half_line_of_a_writer_that_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    append_line(path, {"a": 1})
    with path.open("ab") as file:
        file.write(b'{"a": 2, "b')
    append_line(path, {"a": 3})
    append_line(path, {"a": 4})
    assert records_of(path.read_bytes(), str(path)) == [{"a": 1}, {"a": 3}, {"a": 4}]


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: write(descriptor, content[:3]))
    append_line(tmp_path / "events.jsonl", {"a": "long enough"})
    assert json.loads((tmp_path / "events.jsonl").read_text()) == {"a": "long enough"}


@pytest.mark.parametrize(
    ("folder", "shared"), [("/data/runs/a", True), ("/data/fast/a", False), ("/elsewhere", False), ("/database", False)]
)
def test_a_folder_of_another_machine_is_known_by_its_mount(
    monkeypatch: pytest.MonkeyPatch, folder: str, shared: bool
) -> None:
    mounts = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
40 22 0:50 / /data rw,relatime shared:2 - nfs4 server:/data rw
41 40 8:2 / /data/fast rw,relatime - xfs /dev/sdb rw
"""
    monkeypatch.setattr(Path, "read_text", lambda path: mounts)
    is_shared.cache_clear()
    assert is_shared(Path(folder)) is shared
    is_shared.cache_clear()
