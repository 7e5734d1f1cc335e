"""An agent's line to where nodes meet."""

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from launcher.link import GivenUpError, Link
from launcher.membership import Membership, Order, Report, Rules
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


def test_a_connection_that_was_given_up_and_stands_at_last_does_not_speak_for_the_node(
    wire: tuple[Wire, Host], link_to: Callable[..., Link]
) -> None:
    made, host = wire
    link = link_to(made)
    link.start()
    until(lambda: joined(host) == [0])
    with pytest.raises(GivenUpError):
        link._connect(link._carrier - 1)  # the thread of an earlier try, whose host has come only now
    assert link.deliver(Report(phase="done"), 5.0), "what it had sent has arrived by then"
    assert joined(host) == [0], "a later one of the same node would have replaced it"
    assert not host.membership._agents[0].is_lost


def joined(host: Host) -> list[int]:
    host.tick()
    return list(host.membership._agents)


def test_a_host_that_comes_late_is_found_within_a_second_and_nothing_is_said_before(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    link = Link(f"127.0.0.1:{port}", "job", 0, "127.0.0.1", give_up_seconds=10.0)
    link.start()
    time.sleep(1.5)
    with RendezvousStore(port) as store:
        Host(store, "job", Membership(Rules(most=1, least=1)))
        until(lambda: link.agent == 0 and link.silent_seconds < 0.5, 1.5)
        link.close()
    assert "TCPStore" not in capfd.readouterr().err, "torch's own tries come with its stack"


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
