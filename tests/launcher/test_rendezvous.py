"""Where nodes meet."""

import socket

import pytest

from datastore.errors import EXIT_DO_NOT_RETRY, DoNotRetry
from launcher.rendezvous import RendezvousStore


def test_a_port_in_use_is_named_with_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(DoNotRetry, match=f"Port {port} on 127.0.0.1 is in use") as refused:
            RendezvousStore(port)
    assert refused.value.exit_code == EXIT_DO_NOT_RETRY
    assert "--rendezvous-port" in str(refused.value)


def test_the_store_listens_on_loopback_alone() -> None:
    addresses = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {"127.0.0.1"}
    with RendezvousStore() as store:
        socket.create_connection(("127.0.0.1", store.port), timeout=5).close()
        for address in addresses:
            if not str(address).startswith("127."):
                with pytest.raises(OSError, match="refused"):
                    socket.create_connection((str(address), store.port), timeout=5)


def test_a_port_is_free_again_when_the_store_is_left() -> None:
    with RendezvousStore() as store:
        port = store.port
    with RendezvousStore(port) as again:
        assert again.port == port
