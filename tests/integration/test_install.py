"""`make` says what it installs, how large it is and how far it is, and of a failure why."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def install(folder: Path, pip: str) -> "subprocess.Popen[str]":
    """`make install` into a folder, with a pip that does what a shell script says."""
    venv, program = folder / "venv", folder / "pip"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").touch()  # an environment is made where there is none
    program.write_text(f"#!/bin/sh\n{pip}\n")
    program.chmod(0o755)
    words = ["make", "--no-print-directory", "install", f"VENV={venv}", f"PIP={program}", "INSTALL_NOTE_SECONDS=1"]
    return subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True, process_group=0)


def test_a_long_installation_says_what_goes_on(tmp_path: Path) -> None:
    pip = "echo Collecting torch; echo '  Downloading torch-2.15.whl (850 MB)'; echo '   ---- 850 MB'; sleep 2.5"
    made = install(tmp_path, pip)
    _, said = made.communicate(timeout=60)
    first, *notes = said.splitlines()
    assert made.returncode == 0
    assert "Installing Viewpoint's packages" in first
    assert "about 6 GB, some minutes" in first
    assert 1 <= len(notes) <= 3
    assert all("s, " in note and note.endswith("Downloading torch-2.15.whl (850 MB)") for note in notes)
    assert (tmp_path / "venv" / ".installed").exists()


def test_an_installation_that_fails_shows_the_end_of_its_log(tmp_path: Path) -> None:
    made = install(tmp_path, "echo ERROR: no space left; exit 1")
    _, said = made.communicate(timeout=60)
    assert made.returncode != 0
    assert "ERROR: no space left" in said
    assert f"whole log: {tmp_path}/venv/install.log" in said
    assert not (tmp_path / "venv" / ".installed").exists()


def test_control_c_ends_the_installation(tmp_path: Path) -> None:
    made = install(tmp_path, f"echo $$ >{tmp_path}/pid; exec sleep 100")
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pid = int((tmp_path / "pid").read_text())
    os.killpg(made.pid, signal.SIGINT)
    made.communicate(timeout=30)
    assert made.returncode != 0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
