"""An agent's line to where nodes meet: a thread that carries reports out and orders in, whatever the agent does.

A cut network blocks that thread and nothing else. `silent_seconds` then grows, and the agent stops its workers: the other
nodes go on without them, and two worlds must not write side by side.
"""

import json
import logging
import threading
import time
from datetime import timedelta
from typing import Final

from torch.distributed import DistError, PrefixStore, TCPStore  # type: ignore[attr-defined]

from launcher.membership import Order, Report
from launcher.rendezvous import AGENTS, ORDER, agent_key, beat_key, report_key

EXCHANGE_SECONDS: Final = 0.1
_TIMEOUT: Final = timedelta(seconds=10)
_AGAIN_SECONDS: Final = 0.5
_logger = logging.getLogger("launcher.link")


class Link:
    """Reports what the agent last said; knows the newest order."""

    def __init__(self, endpoint: str, job: str, node: int, address: str) -> None:
        host, _, port = endpoint.rpartition(":")
        self._host, self._port, self._job = host, int(port), job
        self._node, self._address = node, address
        self._changed = threading.Condition()
        self._report = Report()
        self._sent: Report | None = None
        self._order = Order()
        self._agent = -1
        self._store: PrefixStore | None = None
        self._heard_at = time.monotonic()

    def start(self) -> None:
        """Connects, and goes on trying as long as nobody is there."""
        threading.Thread(target=self._carry, name="link", daemon=True).start()

    @property
    def agent(self) -> int:
        """This agent's number; another one after a connection was lost."""
        return self._agent

    @property
    def order(self) -> Order:
        """The newest that was heard."""
        return self._order

    @property
    def silent_seconds(self) -> float:
        """For how long nothing was heard."""
        return time.monotonic() - self._heard_at

    def say(self, report: Report) -> None:
        """Reports this from now on."""
        with self._changed:
            self._report = report

    def deliver(self, report: Report, seconds: float) -> bool:
        """Reports this, and waits until it has arrived; False where it did not in time."""
        self.say(report)
        with self._changed:
            return self._changed.wait_for(lambda: self._sent == report, seconds)

    def wait(self, seconds: float) -> None:
        """Returns after the next exchange, or the time."""
        with self._changed:
            self._changed.wait(seconds)

    def _carry(self) -> None:
        while True:
            try:
                self._exchange()
                time.sleep(EXCHANGE_SECONDS)
            except (DistError, OSError) as error:
                if self._store is not None:
                    _logger.warning("lost the rendezvous at %s:%d: %s", self._host, self._port, error)
                self._store, self._sent = None, None
                time.sleep(_AGAIN_SECONDS)

    def _exchange(self) -> None:
        store = self._store or self._connect()
        report = self._report
        if report != self._sent:
            store.set(report_key(self._agent), report.to_json())
        store.add(beat_key(self._agent), 1)
        order = Order.from_json(store.get(ORDER))
        with self._changed:
            self._store, self._sent, self._order = store, report, order
            self._heard_at = time.monotonic()
            self._changed.notify_all()

    def _connect(self) -> PrefixStore:
        connection = TCPStore(self._host, self._port, is_master=False, wait_for_workers=False, timeout=_TIMEOUT)
        store = PrefixStore(self._job, connection)
        self._agent = store.add(AGENTS, 1) - 1
        store.set(report_key(self._agent), self._report.to_json())
        store.set(agent_key(self._agent), json.dumps({"node": self._node, "address": self._address}))
        return store
