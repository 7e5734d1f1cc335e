"""Objects below a URL, the same on local disk and in an object store."""

import errno
import fcntl
import hashlib
import mmap
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory

import fsspec
import pytest
from botocore.exceptions import ClientError
from s3fs import S3FileSystem
from s3fs.errors import translate_boto_error

from datastore.errors import AskedWrongly, DoNotRetry, StoreError, Unavailable, ViewpointError
from datastore.objects import DRAFTS_FOLDER, ObjectFolder, http_status
from tests.s3_server import forget_clients


@pytest.fixture(params=["local", "file", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectFolder]:
    urls = {"local": str(tmp_path / "store"), "file": f"file://{tmp_path}/store", "memory": "memory://objects"}
    if request.param == "s3":
        urls["s3"] = f"{request.getfixturevalue('s3_bucket')}/a folder"
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


def test_of_many_that_create_the_same_object_one_wins(folder: ObjectFolder) -> None:
    with ThreadPoolExecutor(20) as pool:
        for race in range(10):
            wins = list(pool.map(lambda who, race=race: folder.create(f"record-{race}", b"%d" % who), range(20)))
            assert sum(wins) == 1
            assert folder.read(f"record-{race}") == b"%d" % wins.index(True)


def test_a_range_of_an_object_is_read_as_far_as_there_is_one(folder: ObjectFolder) -> None:
    folder.put("digits", b"0123456789")
    assert folder.read_range("digits", 0, 4) == b"0123"
    assert folder.read_range("digits", 7, 100) == b"789"
    with pytest.raises(FileNotFoundError):
        folder.read_range("missing", 0, 4)


def test_a_listing_tells_objects_from_folders_and_their_digests_where_it_can(folder: ObjectFolder) -> None:
    folder.put("a/record", b"content")
    folder.put("a/deeper/record", b"x")
    assert folder.listed("missing") == {}
    digest = hashlib.md5(b"content").hexdigest() if folder.url.startswith("s3:") else None
    assert folder.listed("a") == {"record": digest}


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


@pytest.mark.parametrize("url", ["", " ", "s3:", "s3://", "http://", "file:///", "memory://"])
def test_a_url_that_names_nothing_is_refused_and_is_not_the_working_directory(url: str) -> None:
    with pytest.raises(DoNotRetry, match=r"An empty name was given|names no bucket, server or folder"):
        ObjectFolder(url)


def test_the_root_of_the_disk_is_not_the_working_directory() -> None:
    assert {"tmp", "usr"} <= set(ObjectFolder("/").names())
    assert ObjectFolder("/").url == "/"


class _Answering(BaseHTTPRequestHandler):
    """Answers each request with the status that is its path."""

    def do_GET(self) -> None:
        self.send_error(int(self.path.rpartition("/")[2]))

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""


@pytest.fixture
def http_server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Answering) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/store"
        server.shutdown()


def test_a_web_servers_refusal_is_told_from_its_trouble_and_from_an_absent_object(http_server: str) -> None:
    folder = ObjectFolder(http_server)
    with pytest.raises(FileNotFoundError):
        folder.read("404")
    with pytest.raises(StoreError, match=r"Access to .*/store/403 is refused"):
        folder.read("403")
    with pytest.raises(Unavailable, match=r"503.*whether the server runs"):
        folder.read("503")


def test_a_web_server_that_does_not_answer_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    with pytest.raises(Unavailable, match=rf"127\.0\.0\.1:{port}/store/zarr\.json cannot be read: Cannot connect"):
        ObjectFolder(f"http://127.0.0.1:{port}/store").read("zarr.json")


@pytest.mark.parametrize("code", ["PreconditionFailed", "412"])
def test_a_refused_create_is_known_by_its_status_whatever_the_exception(code: str) -> None:
    # radosgw and swift do not name the condition, so s3fs makes a plain "invalid argument" of their refusal
    answer = {"Error": {"Code": code, "Message": ""}, "ResponseMetadata": {"HTTPStatusCode": 412}}
    error = translate_boto_error(ClientError(answer, "PutObject"))
    assert isinstance(error, OSError) and error.errno == errno.EINVAL
    assert http_status(error) == 412
    assert http_status(OSError(errno.EINVAL, "no request was made")) is None


# On an S3 server


@pytest.mark.s3
def test_more_objects_than_one_listing_holds_are_all_listed(s3_bucket: str) -> None:
    folder = ObjectFolder(f"{s3_bucket}/store")
    names = [f"{number:08d}.json" for number in range(1100)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: folder.put(f"records/{name}", name.encode()), names))
    assert folder.names("records") == names
    assert sorted(folder.listed("records")) == names
    some = names[::20]
    assert folder.read_all([f"records/{name}" for name in some]) == {f"records/{name}": name.encode() for name in some}


@pytest.mark.s3
def test_what_another_process_put_is_seen_at_once(s3_bucket: str) -> None:
    folder = ObjectFolder(f"{s3_bucket}/store")
    assert folder.names("records") == [] and not folder.exists("records/1")
    code = f"from datastore.objects import ObjectFolder; ObjectFolder({folder.url!r}).put('records/1', b'theirs')"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    assert folder.names("records") == ["1"] and folder.read("records/1") == b"theirs"
    assert not folder.create("records/1", b"ours")


@pytest.mark.s3
def test_a_bucket_that_does_not_exist_holds_nothing_and_takes_nothing(s3_environment: None) -> None:
    folder = ObjectFolder("s3://no-such-bucket/store")
    assert folder.names() == [] and not folder.exists("zarr.json") and folder.read_all(["zarr.json"]) == {}
    for write in (folder.put, folder.create):
        with pytest.raises(StoreError, match=r"s3://no-such-bucket/store/a cannot be written.*Create the bucket first"):
            write("a", b"x")


@pytest.mark.s3
def test_a_key_that_the_server_does_not_know_is_refused_by_name(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ObjectFolder(s3_bucket).put("there", b"x")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    forget_clients()
    folder = ObjectFolder(s3_bucket)
    operations: list[Callable[[], object]] = [
        lambda: folder.read("there"),
        lambda: folder.read_range("there", 0, 1),
        lambda: folder.read_all(["there"]),
        lambda: folder.names(),
        lambda: folder.listed(),
        lambda: folder.size("there"),
        lambda: list(folder.pieces("there", 8)),
        lambda: folder.put("a", b"x"),
        lambda: folder.create("a", b"x"),
        lambda: folder.remove("there"),
    ]
    for operation in operations:
        with pytest.raises(StoreError, match=r"Access to s3://.* is refused.*credentials in the environment"):
            operation()


def test_an_endpoint_that_is_no_url_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9137")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    forget_clients()
    with pytest.raises(StoreError, match=r"s3://bucket/store/zarr.json.*127.0.0.1:9137.*begins with http://"):
        ObjectFolder("s3://bucket/store").read("zarr.json")
    forget_clients()


@pytest.mark.s3
def test_without_any_credentials_it_is_said_which_are_looked_for(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    forget_clients()
    with pytest.raises(StoreError, match="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"):
        ObjectFolder(s3_bucket).put("a", b"x")


@pytest.mark.s3
def test_an_upload_in_parts_that_was_interrupted_shows_nowhere(s3_bucket: str) -> None:
    folder = ObjectFolder(f"{s3_bucket}/store")
    folder.put("shards/whole", b"as it was")
    server = folder._filesystem
    bucket = s3_bucket.removeprefix("s3://")
    for key in ("store/shards/whole", "store/shards/half"):
        upload = server.call_s3("create_multipart_upload", Bucket=bucket, Key=key)["UploadId"]
        part = {"Bucket": bucket, "Key": key, "UploadId": upload, "PartNumber": 1, "Body": bytes(5 * 2**20)}
        server.call_s3("upload_part", **part)
    assert folder.names("shards") == ["whole"] and folder.size("shards/half") is None
    assert folder.read("shards/whole") == b"as it was"
    assert folder.create("shards/half", b"whole now")


def _mapped(num_bytes: int) -> mmap.mmap:
    content = mmap.mmap(-1, num_bytes)
    content[:] = (bytes(range(251)) * (num_bytes // 251 + 1))[:num_bytes]
    return content


def test_large_mapped_memory_is_written_past_the_cache_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, write = _mapped(2**24 + 4097), os.write
    requests: list[tuple[bool, int]] = []

    def watched(descriptor: int, view: memoryview) -> int:
        taken = write(descriptor, view)
        requests.append((bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT), taken))
        return taken

    monkeypatch.setattr(os, "write", watched)
    ObjectFolder(tmp_path).put("share", content)
    assert (tmp_path / "share").read_bytes() == content[:]
    is_direct = [direct for direct, _ in requests]
    assert is_direct == sorted(is_direct, reverse=True), "what is no whole page comes last"
    if is_direct[0]:  # a file system in memory has no other way than its cache
        assert sum(taken for direct, taken in requests if direct) == 2**24 + 4096


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSPC])
def test_a_file_system_that_cannot_do_without_its_cache_is_written_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    content, write = _mapped(2**24 + 5), os.write

    def refusing(descriptor: int, view: memoryview) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(code, os.strerror(code))
        return write(descriptor, view)

    monkeypatch.setattr(os, "write", refusing)
    if code == errno.ENOSPC:
        with pytest.raises(DoNotRetry, match="No room"):
            ObjectFolder(tmp_path).put("share", content)
        assert not (tmp_path / "share").exists()
    else:
        ObjectFolder(tmp_path).put("share", content)
        assert (tmp_path / "share").read_bytes() == content[:]


@pytest.mark.s3
def test_a_large_object_is_put_in_parts_and_created_in_one_request(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ObjectFolder(s3_bucket)
    requests: list[str] = []
    call = S3FileSystem._call_s3

    async def watched(self: S3FileSystem, method: str, *arguments: object, **options: object) -> object:
        requests.append(method)
        return await call(self, method, *arguments, **options)

    monkeypatch.setattr(S3FileSystem, "_call_s3", watched)
    large = bytes(range(256)) * (101 * 2**12)  # s3fs splits what has 100 MiB and more
    folder.put("shard", large)
    assert "complete_multipart_upload" in requests and "put_object" not in requests
    requests.clear()
    assert folder.create("manifest", large) and not folder.create("manifest", large)
    assert set(requests) == {"put_object"}
    assert hashlib.md5(folder.read("manifest")).digest() == hashlib.md5(large).digest()
    assert folder.size("shard") == len(large)


@pytest.mark.s3
@pytest.mark.parametrize(("code", "wins"), [("PreconditionFailed", False), ("412", False), ("409", True)])
def test_refusals_of_other_servers_mean_what_they_say(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch, code: str, wins: bool
) -> None:
    # radosgw's and swift's 412 names no condition; Amazon's 409 says that another create is under way: ask again
    folder = ObjectFolder(s3_bucket)
    answer = {"Error": {"Code": code, "Message": ""}, "ResponseMetadata": {"HTTPStatusCode": 409 if wins else 412}}
    pipe_file, refusals = S3FileSystem._pipe_file, [translate_boto_error(ClientError(answer, "PutObject"))]

    async def refused_once(self: S3FileSystem, *arguments: object, **options: object) -> object:
        if refusals:
            raise refusals.pop()
        return await pipe_file(self, *arguments, **options)

    monkeypatch.setattr(S3FileSystem, "_pipe_file", refused_once)
    assert folder.create("record", b"x") is wins
