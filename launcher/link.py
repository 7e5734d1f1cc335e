"""An agent's line to where nodes meet: a thread that carries reports out and orders in, whatever the agent does.

A cut network blocks that thread and nothing else. `silent_seconds` then grows, and the agent stops its workers: the other
nodes go on without them, and two worlds must not write side by side.

Where the host of the store loses power, nobody closes the connection: torch's time-out bounds neither a `set` nor an
`add`, and the kernel goes on sending for a quarter of an hour. So a connection that is silent for too long is given up with
the thread that waits there, and another thread looks for the host's successor.
"""

import json
import logging
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Final

from torch.distributed import DistError, PrefixStore, TCPStore  # type: ignore[attr-defined]

from launcher.membership import Order, Report
from launcher.rendezvous import AGENTS, ORDER, agent_key, beat_key, report_key

EXCHANGE_SECONDS: Final = 0.1
_AGAIN_SECONDS: Final = 0.5
_logger = logging.getLogger("launcher.link")


class Link:
    """Reports what the agent last said; knows the newest order."""

    def __init__(self, endpoint: str, job: str, node: int, address: str, *, give_up_seconds: float = 10.0) -> None:
        host, _, port = endpoint.rpartition(":")
        self._host, self._port, self._job = host, int(port), job
        self._node, self._address = node, address
        self._changed = threading.Condition()
        self._report = Report()
        self._sent: Report | None = None
        self._order = Order()
        self._agent = -1
        self._heard_at = time.monotonic()
        self._give_up_seconds = give_up_seconds
        self._carrier = 0  # the number of the thread that carries; those before it were given up
        self._tried_at = 0.0  # when it last began anything
        self._keeper: threading.Thread | None = None
        self._closed = threading.Event()

    def start(self) -> None:
        """Connects, and goes on trying as long as nobody is there."""
        self._keeper = threading.Thread(target=self._keep_carrying, name="link", daemon=True)
        self._keeper.start()

    def close(self) -> None:
        """Says nothing any more. A thread that waits for an answer ends when it comes, or does not."""
        self._closed.set()
        self._carrier += 1
        if self._keeper is not None:
            self._keeper.join()

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

    def _keep_carrying(self) -> None:
        """Has one thread carry, and another one where that hangs."""
        while not self._closed.is_set():
            self._carrier += 1
            self._tried_at = time.monotonic()
            thread = threading.Thread(target=self._carry, args=(self._carrier,), name="link-carrier", daemon=True)
            thread.start()
            while (
                thread.is_alive()
                and time.monotonic() - self._tried_at < self._give_up_seconds
                and not self._closed.is_set()
            ):
                time.sleep(EXCHANGE_SECONDS)
            if self._closed.is_set():
                thread.join(self._give_up_seconds)
                return
            _logger.warning(
                "the rendezvous at %s:%d has not answered for %.0f s: connecting anew",
                self._host, self._port, self._give_up_seconds,
            )  # fmt: skip

    def _carry(self, number: int) -> None:
        store: PrefixStore | None = None
        while number == self._carrier:
            self._tried_at = time.monotonic()
            try:
                store = store or self._connect(number)
                self._exchange(store, number)
                time.sleep(EXCHANGE_SECONDS)
            except GivenUpError:
                return
            except Exception as error:  # noqa: BLE001 (whatever it is, an agent without a link would never be heard of again)
                if store is not None or not isinstance(error, DistError | OSError):
                    reason = str(error).partition("\n")[0]  # torch adds its own stack
                    _logger.warning("lost the rendezvous at %s:%d: %s", self._host, self._port, reason)
                store = None
                with self._changed:
                    self._sent = None
                time.sleep(_AGAIN_SECONDS)

    def _exchange(self, store: PrefixStore, number: int) -> None:
        report = self._report
        if report != self._sent:
            store.set(report_key(self._agent), report.to_json())
        store.add(beat_key(self._agent), 1)
        order = Order.from_json(store.get(ORDER))
        with self._changed:
            self._check(number)
            self._sent, self._order = report, order
            self._heard_at = time.monotonic()
            self._changed.notify_all()

    def _connect(self, number: int) -> PrefixStore:
        timeout = timedelta(seconds=0.8 * self._give_up_seconds)  # a host that is not there is nothing to speak of
        # torch would try again by itself, after longer and longer pauses, and print its own stack each time
        socket.create_connection((self._host, self._port), self._give_up_seconds / 4).close()
        connection = TCPStore(self._host, self._port, is_master=False, wait_for_workers=False, timeout=timeout)
        store = PrefixStore(self._job, connection)
        agent = store.add(AGENTS, 1) - 1
        self._check(number)  # one that was given up and comes in late must not stand for the node: it never speaks
        store.set(report_key(agent), self._report.to_json())
        who = {"node": self._node, "address": self._address, "machine": machine()}
        store.set(agent_key(agent), json.dumps(who))
        with self._changed:
            self._check(number)
            self._agent, self._sent = agent, None
        return store

    def _check(self, number: int) -> None:
        if number != self._carrier:
            raise GivenUpError


def machine() -> str:
    """What tells this machine from others; the same for all containers on it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # no Linux
        return socket.gethostname()


class GivenUpError(Exception):
    """Another thread carries by now."""
