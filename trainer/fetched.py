"""Files and folders at a URL as local paths."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem


@contextmanager
def fetched(url: str) -> Iterator[Path]:
    """A local path of a file or folder: itself, or a copy of a remote one for as long as the block runs."""
    filesystem, path = fsspec.core.url_to_fs(url)
    if isinstance(filesystem, LocalFileSystem):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="viewpoint-") as folder:
        local = Path(folder) / Path(path).name
        filesystem.get(path, str(local), recursive=bool(filesystem.isdir(path)))
        yield local
