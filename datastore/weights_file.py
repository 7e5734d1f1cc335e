"""What is kept of a file of weights, so that a later change of it is noticed."""

import hashlib
from functools import lru_cache
from pathlib import Path

from pydantic import BaseModel


class WeightsFile(BaseModel, extra="forbid", frozen=True):
    """A file on a disk, as it was."""

    path: str
    num_bytes: int
    modified_ns: int
    digest: str  # BLAKE2b

    @classmethod
    def of(cls, path: Path) -> "WeightsFile":
        """The file as it is now."""
        path = path.resolve()
        status = path.stat()
        return cls(
            path=str(path),
            num_bytes=status.st_size,
            modified_ns=status.st_mtime_ns,
            digest=_digest(path, status.st_size, status.st_mtime_ns),
        )

    def has_changed(self) -> bool:
        """Whether it holds something else now. A file that is not here says nothing."""
        path = Path(self.path)
        try:
            status = path.stat()
            if (status.st_size, status.st_mtime_ns) == (self.num_bytes, self.modified_ns):
                return False
            return status.st_size != self.num_bytes or self.of(path).digest != self.digest
        except OSError:
            return False


@lru_cache(maxsize=16)
def _digest(path: Path, num_bytes: int, modified_ns: int) -> str:
    """Of a file that is told apart from what it was before by its size and time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
