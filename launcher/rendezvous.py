"""The rendezvous store of local runs: in the launcher, outside every node, so that no node's loss ends the job."""

import errno
import socket
from datetime import timedelta
from types import TracebackType
from typing import Final, Self

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from datastore.errors import DoNotRetry
from launcher.command import LOOPBACK

_TIMEOUT: Final = timedelta(seconds=60)


class RendezvousStore:
    """Serves on loopback alone: agents unpickle what they read from it, so nobody else may write to it."""

    def __init__(self, port: int = 0) -> None:
        self._socket = _listen(port)
        self.port: int = self._socket.getsockname()[1]
        self._store: TCPStore | None = TCPStore(
            LOOPBACK,
            self.port,
            is_master=True,
            wait_for_workers=False,
            timeout=_TIMEOUT,
            master_listen_fd=self._socket.detach(),  # the store owns and closes it from here on
        )

    @property
    def endpoint(self) -> str:
        """What agents connect to."""
        return f"{LOOPBACK}:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._store = None  # its destructor stops the server


def _listen(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((LOOPBACK, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        reason = "is in use by another program" if error.errno == errno.EADDRINUSE else "may not be opened by this user"
        raise DoNotRetry(
            f"Port {port} on {LOOPBACK} {reason}, and nodes were to meet there. Leave --rendezvous-port out to take a "
            f"free port, or name another one; `ss -ltnp 'sport = :{port}'` shows who listens there."
        ) from error
    return listener
