"""Where nodes meet: a store outside every node, so that no node's loss ends the job, and who decides with it.

    JOB/agents         counts the agents that ever came
    JOB/agent/I        who agent I is: its node, address and machine
    JOB/beat/I         grows as long as agent I lives
    JOB/report/I       what agent I says (`membership.Report`)
    JOB/order          what all agents do (`membership.Order`)

Everything is JSON. Locally the launcher holds the store and decides; agents reach both through `launcher.link`.
"""

import errno
import json
import socket
import time
from datetime import timedelta
from types import TracebackType
from typing import Final, Self

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from datastore.errors import DoNotRetry
from launcher.command import LOOPBACK
from launcher.membership import Membership, Report

AGENTS: Final = "agents"
ORDER: Final = "order"
_TIMEOUT: Final = timedelta(seconds=60)


class RendezvousStore:
    """Serves on loopback unless told; whoever reaches it can end the job, so keep it off open networks."""

    def __init__(self, port: int = 0, host: str = LOOPBACK) -> None:
        self._socket = _listen(host, port)
        self.host = host
        self.port: int = self._socket.getsockname()[1]
        self._store: TCPStore | None = TCPStore(
            host,
            self.port,
            is_master=True,
            wait_for_workers=False,
            timeout=_TIMEOUT,
            master_listen_fd=self._socket.detach(),  # the store owns and closes it from here on
        )

    @property
    def endpoint(self) -> str:
        """What agents connect to."""
        return f"{self.host}:{self.port}"

    def of_job(self, job: str) -> PrefixStore:
        """The part of it that one job's agents use."""
        assert self._store is not None, "the store is closed"
        return PrefixStore(job, self._store)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._store = None  # its destructor stops the server


class Host:
    """Carries the agents' reports to the membership of a job, and its order back."""

    def __init__(self, store: RendezvousStore, job: str, membership: Membership) -> None:
        self.membership = membership
        self._store = store.of_job(job)
        self._known: set[int] = set()
        self._told = membership.order
        self._tell()

    def tick(self) -> None:
        """To be called several times a second; milliseconds."""
        now = time.monotonic()
        there = self._store.add(AGENTS, 0)
        for agent in set(range(there)) - self._known:
            if self._store.check([agent_key(agent), report_key(agent)]):  # not where it died on its way
                who = json.loads(self._store.get(agent_key(agent)))
                self.membership.join(agent, who["node"], who["address"], now, who.get("machine", ""))
                self._known.add(agent)
        for agent in self._known:
            report = Report.from_json(self._store.get(report_key(agent)))
            self.membership.hear(agent, self._store.add(beat_key(agent), 0), report, now)
        self.membership.tick(now)
        if self.membership.order != self._told:
            self._tell()

    def _tell(self) -> None:
        self._told = self.membership.order
        self._store.set(ORDER, self._told.to_json())


def agent_key(agent: int) -> str:
    """Where it says who it is."""
    return f"agent/{agent}"


def beat_key(agent: int) -> str:
    """Where it shows that it lives."""
    return f"beat/{agent}"


def report_key(agent: int) -> str:
    """Where it says what it does."""
    return f"report/{agent}"


def _listen(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        reason = "is in use by another program" if error.errno == errno.EADDRINUSE else "may not be opened by this user"
        raise DoNotRetry(
            f"Port {port} on {host} {reason}, and nodes were to meet there. Leave --rendezvous-port out to take a "
            f"free port, or name another one; `ss -ltnp 'sport = :{port}'` shows who listens there."
        ) from error
    return listener
