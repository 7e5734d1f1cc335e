"""Objects below a URL, the same on local disk and in an object store."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import fsspec
import pytest
from botocore.exceptions import ClientError
from s3fs.errors import translate_boto_error

from datastore.errors import AskedWrongly, StoreError, ViewpointError
from datastore.objects import DRAFTS_FOLDER, ObjectFolder, _http_status


@pytest.fixture(params=["local", "file", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectFolder]:
    urls = {"local": str(tmp_path / "store"), "file": f"file://{tmp_path}/store", "memory": "memory://objects"}
    yield ObjectFolder(urls[request.param])
    if request.param == "memory":
        fsspec.filesystem("memory").rm("/objects", recursive=True)


def test_an_object_reads_back_as_it_was_put(folder: ObjectFolder) -> None:
    folder.put("a/b/c", b"first")
    folder.put("a/b/c", b"second, in its place")
    assert folder.read("a/b/c") == b"second, in its place"
    assert folder.size("a/b/c") == 20
    assert folder.exists("a/b/c") and not folder.exists("a/b")
    assert list(folder.pieces("a/b/c", 8)) == [b"second, ", b"in its p", b"lace"]


def test_what_is_not_there_is_said_to_be_missing(folder: ObjectFolder) -> None:
    folder.put("there", b"")
    assert folder.size("missing") is None
    assert not folder.exists("missing")
    assert folder.names("missing") == []
    folder.remove("missing")
    with pytest.raises(FileNotFoundError):
        folder.read("missing")
    with pytest.raises(FileNotFoundError):
        list(folder.pieces("missing", 8))
    assert folder.read_all(["there", "missing"]) == {"there": b""}
    assert folder.read_all(["missing"]) == {}


def test_names_lists_one_level(folder: ObjectFolder) -> None:
    for name in ("b/2", "b/1", "b/deeper/3", "top"):
        folder.put(name, b"x")
    assert folder.names("b") == ["1", "2", "deeper"]
    assert set(folder.names()) >= {"b", "top"}
    folder.remove("b/1")
    assert folder.names("b") == ["2", "deeper"]


def test_create_makes_an_object_once(folder: ObjectFolder) -> None:
    assert folder.create("record", b"winner")
    assert not folder.create("record", b"loser")
    assert folder.read("record") == b"winner"


def test_of_many_that_create_the_same_object_one_wins(tmp_path: Path) -> None:
    folder = ObjectFolder(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        for race in range(20):
            wins = list(pool.map(lambda who, race=race: folder.create(f"record-{race}", b"%d" % who), range(8)))
            assert sum(wins) == 1
            assert folder.read(f"record-{race}") == b"%d" % wins.index(True)


def test_a_put_leaves_no_drafts(tmp_path: Path) -> None:
    folder = ObjectFolder(tmp_path)
    folder.put("a", b"x")
    folder.create("a", b"y")
    assert folder.names(DRAFTS_FOLDER) == []


def test_abandoned_drafts_go_and_those_of_living_writers_stay(tmp_path: Path) -> None:
    drafts = tmp_path / DRAFTS_FOLDER
    drafts.mkdir(parents=True)
    (drafts / "abandoned").write_bytes(b"half of a sha")
    (drafts / "in-use").write_bytes(b"half of a sha")
    with (drafts / "in-use").open("rb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        ObjectFolder(tmp_path).remove_abandoned_drafts()
        assert [path.name for path in drafts.iterdir()] == ["in-use"]
    ObjectFolder(tmp_path).remove_abandoned_drafts()
    assert not list(drafts.iterdir())


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Somebody whom permissions bind: root, who may write everywhere, becomes nobody for a while."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def test_a_folder_that_may_not_be_written_is_named() -> None:
    # not below tmp_path, which nobody but its owner may enter
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        with ordinary_user(), pytest.raises(StoreError, match=r"Access to .* is refused.*Check the permissions"):
            ObjectFolder(Path(folder) / "store").put("a", b"x")
        Path(folder).chmod(0o755)


def test_a_server_that_does_not_answer_is_named_with_what_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:  # a port that is taken and on which nobody listens
        unused.bind(("127.0.0.1", 0))
        environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{unused.getsockname()[1]}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ViewpointError, match=r"cannot be reached.*AWS_ENDPOINT_URL.*run the same command again"):
            ObjectFolder("s3://bucket/unreachable").read("zarr.json")


@pytest.mark.parametrize("url", ["nonsense://bucket/store", "s4://bucket"])
def test_an_unknown_protocol_is_the_askers_mistake(url: str) -> None:
    with pytest.raises(AskedWrongly, match="local path, s3://"):
        ObjectFolder(url).exists("zarr.json")


@pytest.mark.parametrize("code", ["PreconditionFailed", "412"])
def test_a_refused_create_is_known_by_its_status_whatever_the_exception(code: str) -> None:
    # radosgw and swift do not name the condition, so s3fs makes a plain "invalid argument" of their refusal
    answer = {"Error": {"Code": code, "Message": ""}, "ResponseMetadata": {"HTTPStatusCode": 412}}
    error = translate_boto_error(ClientError(answer, "PutObject"))
    assert isinstance(error, OSError) and error.errno == errno.EINVAL
    assert _http_status(error) == 412
    assert _http_status(OSError(errno.EINVAL, "no request was made")) is None
