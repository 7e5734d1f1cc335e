"""`make s3` gives whoever has no S3 a server with one command, as docs/stream.md says."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.s3_server import variables

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent

USE_IT = """
import fsspec
from datastore.objects import ObjectFolder
folder = ObjectFolder("s3://viewpoint/a/folder")
folder.put("name", b"content")
assert folder.create("name", b"other") is False
assert folder.read_range("name", 1, 4) == b"ont"
assert fsspec.filesystem("s3").ls("viewpoint/a") == ["viewpoint/a/folder"]
"""


def make_s3(port: int) -> "subprocess.Popen[str]":
    """The command, as a terminal runs it: in a group of processes of its own."""
    # this environment is installed already, whatever make thinks of its age
    options = [f"VENV={BIN.parent}", "-o", f"{BIN.parent}/.installed-dev", "-o", f"{BIN.parent}/.installed"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    return subprocess.Popen(
        ["make", "--no-print-directory", *options, "s3", f"PORT={port}"],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0,
    )  # fmt: skip


@pytest.mark.s3
def test_one_command_starts_a_server_says_how_to_reach_it_and_ends_with_control_c() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = make_s3(port)
    assert server.stdout is not None
    try:
        lines = []
        while not lines or "Ctrl-C" not in lines[-1]:
            lines.append(server.stdout.readline())
            assert lines[-1], server.communicate()
        found = dict(re.findall(r"^export (\w+)=(\S+)$", "".join(lines), re.MULTILINE))
        assert found["AWS_ENDPOINT_URL"] == f"http://127.0.0.1:{port}"
        subprocess.run([sys.executable, "-c", USE_IT], cwd=ROOT, env=os.environ | found, check=True)

        second = make_s3(port)
        _, problem = second.communicate(timeout=60)
        assert second.returncode != 0
        assert f"Port {port} cannot be had" in problem
        assert "make s3 PORT=" in problem
    finally:
        os.killpg(server.pid, signal.SIGINT)
        _, last_words = server.communicate(timeout=60)
    assert "Traceback" not in last_words
    with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
        probe.connect(("127.0.0.1", port))


def test_the_docs_show_what_the_command_prints() -> None:
    shown = (ROOT / "docs" / "stream.md").read_text()
    for name, value in variables("http://127.0.0.1:9000").items():
        assert f"export {name}={value}\n" in shown
