"""Files of a source: what is found below a folder, what a server is asked for, and whom a failure concerns."""

import os
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from botocore.exceptions import EndpointConnectionError  # type: ignore[import-untyped]
from fsspec.implementations.memory import MemoryFileSystem
from s3fs import S3FileSystem

from datastore.errors import DoNotRetry, SourceError, ViewpointError
from datastore.sources import ReadingOptions, ShapeError, Source, open_source
from datastore.sources.files import File, SourceFiles
from datastore.sources.images import read_views
from datastore.sources.mesh_files import read_mesh
from datastore.sources.shape_file import read_shape_file
from tests.pictures import write_picture
from tests.s3_server import forget_clients, new_bucket

TRIANGLE = b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n"


@pytest.fixture
def remote() -> Iterator[SourceFiles]:
    """A source in fsspec's memory, which is as remote as a server is."""
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe_file("/files-of-a-test/chair/a.off", TRIANGLE)
    yield SourceFiles("memory://files-of-a-test")
    filesystem.rm("/files-of-a-test", recursive=True)


# What is found


def test_folders_and_files_behind_links_are_found_too(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "table").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.off").write_bytes(TRIANGLE)
    (source / "chair").symlink_to(tmp_path / "elsewhere")
    (source / "stool").symlink_to(tmp_path / "elsewhere")
    (source / "table/b.off").symlink_to(tmp_path / "elsewhere/a.off")
    (source / "table/lost.off").symlink_to(tmp_path / "nowhere.off")
    (source / "table/again").symlink_to(source)  # a circle
    found = SourceFiles(source).walk([".OFF"])
    names = ["chair/a.off", "stool/a.off", "table/b.off"]
    assert found == [*(File(name, len(TRIANGLE)) for name in names), File("table/lost.off", 0)]


def test_a_folder_that_may_not_be_read_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chair").mkdir()
    (tmp_path / "table").mkdir()
    (tmp_path / "table/a.off").write_bytes(TRIANGLE)
    listed = os.scandir

    def refuses(folder: str) -> Any:
        if os.fspath(folder).endswith("chair"):
            raise PermissionError(13, "Permission denied", folder)
        return listed(folder)

    monkeypatch.setattr(os, "scandir", refuses)
    with pytest.raises(SourceError, match=r"access is refused .*chair"):
        open_source(str(tmp_path), "mesh_folder")


def test_a_part_of_a_file_is_read(remote: SourceFiles, tmp_path: Path) -> None:
    (tmp_path / "a.off").write_bytes(TRIANGLE)
    assert SourceFiles(tmp_path).read_range("a.off", 4, 5) == TRIANGLE[4:9]
    assert remote.read_range("chair/a.off", 4, 5) == TRIANGLE[4:9]


def test_the_top_of_a_source_is_listed_once_for_all_formats(
    remote: SourceFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[str] = []
    ls = MemoryFileSystem.ls

    def noted(self: MemoryFileSystem, path: str, **options: Any) -> Any:
        listed.append(path)
        return ls(self, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "ls", noted)
    open_source(remote.url)
    assert listed.count("/files-of-a-test") == 1


# Whom a failure concerns

LOST_SERVER = [
    (EndpointConnectionError(endpoint_url="http://10.0.0.1"), ViewpointError, "cannot be reached: EndpointConnection"),
    (TimeoutError("no answer"), ViewpointError, r"chair/a.off cannot be reached: TimeoutError: no answer. Check the"),
    (PermissionError("ExpiredToken"), DoNotRetry, r"Access to .* is refused \(ExpiredToken\). Check the credentials"),
]


@pytest.mark.parametrize(("failure", "kind", "message"), LOST_SERVER)
def test_a_server_that_is_lost_costs_no_shape(
    remote: SourceFiles,
    monkeypatch: pytest.MonkeyPatch,
    failure: Exception,
    kind: type[ViewpointError],
    message: str,
) -> None:
    """Were it a SourceError, each shape that was tried meanwhile would go into quarantine."""

    def fails(*_: object, **__: object) -> bytes:
        raise failure

    monkeypatch.setattr(MemoryFileSystem, "cat_file", fails)
    monkeypatch.setattr(MemoryFileSystem, "_open", fails)
    for read in (
        lambda: read_mesh(remote, "chair/a.off"),
        lambda: read_shape_file(remote, "chair/a.off"),
        lambda: read_views(remote, ["chair/a.off"], 8),
        lambda: remote.open("chair/a.off"),
        lambda: remote.open_whole("chair/a.off"),
    ):
        with pytest.raises(kind, match=message) as caught:
            read()
        assert not isinstance(caught.value, SourceError)


def test_a_local_file_that_cannot_be_read_is_one_broken_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = SourceFiles(tmp_path)
    (tmp_path / "folder").mkdir()
    for failure in (PermissionError(13, "Permission denied"), OSError(5, "Input/output error")):

        def fails(*_: object, failure: OSError = failure, **__: object) -> bytes:
            raise failure

        with monkeypatch.context() as patched:
            patched.setattr(type(files._filesystem), "cat_file", fails)
            with pytest.raises(ShapeError, match=f"a.txt cannot be read: .*{failure.strerror}"):
                read_shape_file(files, "a.txt")
    with pytest.raises(ShapeError, match=r"folder cannot be read"):
        read_shape_file(files, "folder")


# What a server is asked for


def loaded_elsewhere(source: Source) -> Counter[str]:
    """The requests that another process makes for the second of two shapes."""
    references = list(source.listing.shapes)
    travelled = pickle.loads(pickle.dumps(source))
    forget_clients()
    travelled.load(references[0])
    requests = Counter[str]()
    with pytest.MonkeyPatch.context() as patched:
        call = S3FileSystem._call_s3

        async def counted(self: S3FileSystem, method: str, *arguments: Any, **options: Any) -> Any:
            requests[method] += 1
            return await call(self, method, *arguments, **options)

        patched.setattr(S3FileSystem, "_call_s3", counted)
        travelled.load(references[1])
    return requests


@pytest.mark.s3
def test_a_mesh_on_a_server_costs_one_request(s3_environment: None) -> None:
    url = new_bucket()
    for name in "ab":
        fsspec.filesystem("s3").pipe_file(f"{url}/chair/train/{name}.off", TRIANGLE)
    assert loaded_elsewhere(open_source(url)) == {"get_object": 1}


@pytest.mark.s3
def test_views_on_a_server_cost_a_request_each(s3_environment: None, tmp_path: Path) -> None:
    url = new_bucket()
    properties = "".join(f"property float {axis}\n" for axis in "xyz")
    cloud = f"ply\nformat ascii 1.0\nelement vertex 2\n{properties}end_header\n0 0 0\n1 1 1\n".encode()
    write_picture(tmp_path / "view.png", 1)
    server = fsspec.filesystem("s3")
    for model in ("02691156/a", "02691156/b"):
        renders = f"{url}/ShapeNetRendering/{model}/rendering"
        server.pipe_file(f"{url}/ShapeNet/{model}.ply", cloud)
        server.pipe_file(f"{renders}/rendering_metadata.txt", b"15 25 0 0.7 25\n" * 24)
        server.pipe({f"{renders}/{view:02d}.png": (tmp_path / "view.png").read_bytes() for view in range(24)})
    source = open_source(url, options=ReadingOptions(partial=True))
    assert loaded_elsewhere(source) == {"get_object": 1 + 1 + 24}
