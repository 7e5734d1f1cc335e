"""An agent's line to where nodes meet."""

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from launcher.link import Link
from launcher.membership import Membership, Order, Rules
from launcher.rendezvous import Host, RendezvousStore


class Wire:
    """Passes connections on to a server. Those that stand when it is cut stay open and say nothing any more, as if their
    other end had lost power; those that come later reach the server."""

    def __init__(self, port: int) -> None:
        self._upstream = port
        self._era = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._sockets: list[socket.socket] = [self._listening]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._era += 1

    def close(self) -> None:
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection(("127.0.0.1", self._upstream))
                self._sockets += [client, server]
                for source, target in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=(source, target, self._era), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, era: int) -> None:
        with suppress(OSError):
            while content := source.recv(65536):
                if era == self._era:
                    target.sendall(content)


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def wire() -> Iterator[tuple[Wire, Host]]:
    with RendezvousStore() as store:
        made = Wire(store.port)
        yield made, Host(store, "job", Membership(Rules(most=1, least=1)))
        made.close()


@pytest.fixture
def link_to() -> Iterator[Callable[..., Link]]:
    links: list[Link] = []

    def make(wire: Wire, **settings: float) -> Link:
        links.append(Link(f"127.0.0.1:{wire.port}", "job", 0, "127.0.0.1", **settings))
        return links[-1]

    yield make
    for link in links:
        link.close()


def test_a_connection_whose_other_end_lost_power_is_given_up_and_another_one_is_made(
    wire: tuple[Wire, Host], link_to: Callable[..., Link], caplog: pytest.LogCaptureFixture
) -> None:
    made, host = wire
    link = link_to(made, give_up_seconds=1.0)
    with caplog.at_level(logging.WARNING):
        link.start()
        until(lambda: link.agent == 0 and link.silent_seconds < 0.5)
        host.tick()
        made.cut()
        until(lambda: link.silent_seconds > 0.8, 5.0)
        until(lambda: link.silent_seconds < 0.5)
    assert link.agent == 1
    assert "has not answered for 1 s: connecting anew" in caplog.text
    host.tick()
    assert link.deliver(link._report, 5.0)


def test_whatever_goes_wrong_an_agent_is_heard_of_again(
    wire: tuple[Wire, Host],
    link_to: Callable[..., Link],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made, _ = wire
    read = Order.from_json
    answers = iter([ValueError("half an answer")])

    def from_json(text: str | bytes) -> Order:
        error = next(answers, None)
        if error is not None:
            raise error
        return read(text)

    monkeypatch.setattr(Order, "from_json", from_json)
    link = link_to(made)
    link.start()
    until(lambda: "half an answer" in caplog.text)
    until(lambda: link.agent == 1 and link.silent_seconds < 0.5)
