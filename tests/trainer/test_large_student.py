"""A student of 300 million parameters trains where no process has the memory for all of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_does_not_fit_into_one_process_trains_over_four_under_zero_3(tmp_path: Path) -> None:
    """Each may take 3.5 GiB, which the kernel sees to; all in all it needs some 11."""
    record = tmp_path / "record.json"
    words = [sys.executable, "benchmarks/memory.py", "--only-large", "--check", "--json", str(record)]
    done = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (target,) = json.loads(record.read_text())["targets"].values()
    assert target["ok"]
    assert "one process             does not fit" in done.stdout and "315 million parameters" in done.stdout
