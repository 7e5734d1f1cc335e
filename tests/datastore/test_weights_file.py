"""A file that changed is noticed; one that was only copied or touched is not."""

import os
from pathlib import Path

from datastore.weights_file import WeightsFile


def test_only_other_content_is_a_change(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"1234")
    kept = WeightsFile.of(path)
    assert not kept.has_changed()
    os.utime(path, ns=(1, 1))
    assert not kept.has_changed()
    path.write_bytes(b"4321")
    assert kept.has_changed()
    path.write_bytes(b"12345")
    assert kept.has_changed()


def test_a_file_that_is_not_here_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"1234")
    kept = WeightsFile.of(path)
    path.unlink()
    assert not kept.has_changed()
    assert WeightsFile.model_validate_json(kept.model_dump_json()) == kept
