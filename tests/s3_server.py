"""A real S3-compatible server on loopback for tests marked `s3`: everything it keeps is gone when the session ends.

It checks signatures and credentials. What a test's own processes need to reach it stands in the environment. Usually it
is ministack, which starts in a second; with VIEWPOINT_TEST_S3=radosgw (`make test-s3`) it is Ceph's, which serves object
stores in production.

`make s3` starts it by itself, for those who try out a store or a run on S3 without one.
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from urllib.error import URLError

import fsspec
import pytest
from s3fs import S3FileSystem

KEY_ID, SECRET_KEY = "viewpoint-tests", "loopback-only"

_SERVER: Final = os.environ.get("VIEWPOINT_TEST_S3", "ministack")
_START_SECONDS: Final = {"ministack": 60, "radosgw": 240}[_SERVER]
_HEALTH_PATH: Final = {"ministack": "/_ministack/health", "radosgw": "/"}[_SERVER]
_ATTEMPTS: Final = 5
_END_SECONDS: Final = 30


@contextmanager
def running_s3_server(folder: Path, wanted_port: int | None = None) -> Iterator[str]:
    """The URL of a server that works in the folder and ends with the block. `wanted_port`: None for any that is free."""
    for attempt in range(_ATTEMPTS if wanted_port is None else 1):
        port, own_folder = wanted_port or _free_port(), folder / str(attempt)
        own_folder.mkdir()
        process = _start(own_folder, port)
        try:
            if _answers(process, port):
                yield f"http://127.0.0.1:{port}"
                return
        finally:
            process.terminate()
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # Ceph is several programs
                process.wait()
    raise RuntimeError(f"The S3 server does not start; its last words:\n{(own_folder / 'log').read_text()[-2000:]}")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of one server for all tests."""
    with running_s3_server(tmp_path_factory.mktemp("s3")) as url:
        yield url


@pytest.fixture
def s3_environment(s3_server: str) -> Iterator[None]:
    """An environment, inherited by every process, in which s3:// means the server; no test meets another's clients."""
    with s3_means(s3_server):
        yield


@pytest.fixture
def s3_bucket(s3_environment: None) -> str:
    """The URL of a new, empty bucket."""
    return new_bucket()


def variables(url: str) -> dict[str, str]:
    """What says that s3:// means the server at this URL."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }


@contextmanager
def s3_means(url: str) -> Iterator[None]:
    """Within the block, s3:// means the server at this URL, for this process and those that it starts."""
    absent = f"/no-such-folder/{uuid.uuid4().hex}"  # of the machine's own settings, none count
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_S3"))]:
            patch.delenv(name)
        for name, value in {
            **variables(url),
            "AWS_CONFIG_FILE": absent,
            "AWS_SHARED_CREDENTIALS_FILE": absent,
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        forget_clients()
        yield
        forget_clients()


def new_bucket() -> str:
    """The URL of a bucket that did not exist before; where s3:// means the server."""
    name = f"test-{uuid.uuid4().hex}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"


def forget_clients() -> None:
    """Closes every connection of this process to S3; who asks next reads the environment anew."""
    from zarr.core.sync import _get_loop  # here, so that sessions without S3 do not wait for zarr

    for filesystem in list(S3FileSystem._cache.values()):
        client = getattr(filesystem, "_s3creator", None)  # none before its first request
        if client is not None:
            # s3fs' own closing gives up after a tenth of a second, and knows nothing of the loop that zarr uses
            loop = _get_loop() if filesystem.asynchronous else filesystem.loop
            asyncio.run_coroutine_threadsafe(client.__aexit__(None, None, None), loop).result(30)
    S3FileSystem.clear_instance_cache()


def _start(folder: Path, port: int) -> "subprocess.Popen[bytes]":
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    if _SERVER == "radosgw":
        command = [
            str(Path(__file__).with_name("radosgw.sh")),
            "run",
            str(folder / "ceph"),
            str(port),
            str(_free_port()),
        ]
        environment |= {"RADOSGW_KEY_ID": KEY_ID, "RADOSGW_SECRET_KEY": SECRET_KEY}
    else:
        command = [sys.executable, "-m", "ministack"]
        environment |= _ministack_settings(folder, port)
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, process_group=0)


def _ministack_settings(folder: Path, port: int) -> dict[str, str]:
    return {
        "BIND_HOST": "127.0.0.1",
        "GATEWAY_PORT": str(port),
        "SERVICES": "s3,iam,sts",
        "AUTH": "true",
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "S3_PERSIST": "0",  # objects stay in memory
        "S3_DATA_DIR": str(folder / "data"),
        "STATE_DIR": str(folder / "state"),
        "TMPDIR": str(folder),
        "LOG_LEVEL": "WARNING",
    }


def _answers(process: "subprocess.Popen[bytes]", port: int) -> bool:
    """Whether the server came up; False when it ended, as it does where another process took the port."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with opener.open(f"http://127.0.0.1:{port}{_HEALTH_PATH}", timeout=5):
                return True
        except (URLError, ConnectionError, TimeoutError):
            time.sleep(0.05)
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(port: int) -> int:
    """Serves until it is interrupted; says how to reach it. The exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell that starts it in the background has it ignore the first
        signal.signal(number, signal.default_int_handler)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            print(f"Port {port} cannot be had ({error.strerror}). Name another: make s3 PORT=9001", file=sys.stderr)
            return 64
    try:
        with tempfile.TemporaryDirectory() as folder, running_s3_server(Path(folder), port) as url:
            with s3_means(url):
                fsspec.filesystem("s3").mkdir("viewpoint")
            print("# An S3 server on loopback with the bucket viewpoint. Elsewhere, s3:// means it after:")
            for name, value in variables(url).items():
                print(f"export {name}={value}")
            print("# Ctrl-C ends it, and what it holds is gone.", flush=True)
            while True:
                signal.pause()
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
