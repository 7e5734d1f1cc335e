"""Startup, readiness and liveness of a container: asks when it is time, and counts answers in a row."""

import http.client
import socket
import ssl
import time
from typing import Final

from tests.cluster.refusals import Document
from tests.cluster.sandbox import Container

_MOST_SAID: Final = 300


class Probe:
    """One probe of one container. `healthy` is None until it has spoken, as many times as it needs to be believed."""

    def __init__(self, described: Document, container: Document, started: float) -> None:
        self._described, self._container = described, container
        self._period = float(described.get("periodSeconds", 10))
        self._timeout = float(described.get("timeoutSeconds", 1))
        self._due = started + float(described.get("initialDelaySeconds", 0))
        self._in_a_row = 0
        self._last: bool | None = None
        self.healthy: bool | None = None
        self.said = ""

    def is_due(self) -> bool:
        """Whether it is time to ask."""
        return time.monotonic() >= self._due

    def ask(self, running: Container, address: str) -> bool:
        """Asks once. False where the answer was no; `said` has why."""
        self._due = time.monotonic() + self._period
        good, self.said = ask(self._described, self._container, running, address, self._timeout)
        self.take(good=good)
        return good

    def take(self, *, good: bool) -> None:
        """Counts an answer."""
        self._in_a_row = self._in_a_row + 1 if good is self._last else 1
        self._last = good
        needed = self._described.get("successThreshold", 1) if good else self._described.get("failureThreshold", 3)
        if self._in_a_row >= needed:
            self.healthy = good


def ask(described: Document, container: Document, running: Container, address: str, timeout: float) -> tuple[bool, str]:
    """Whether a handler says yes, and what it said."""
    if "exec" in described:
        code, said = running.execute(described["exec"]["command"], timeout)
        return code == 0, said[:_MOST_SAID]
    if "httpGet" in described:
        return _get(described["httpGet"], container, address, timeout)
    if "tcpSocket" in described:
        wanted = described["tcpSocket"]
        try:
            socket.create_connection((wanted.get("host", address), _port(wanted["port"], container)), timeout).close()
        except OSError as error:
            return False, f"dial tcp {address}: {error}"
        return True, ""
    raise ValueError(f"The cluster double has probes by exec, httpGet and tcpSocket, and no {', '.join(described)}.")


def _get(wanted: Document, container: Document, address: str, timeout: float) -> tuple[bool, str]:
    host, port = wanted.get("host", address), _port(wanted["port"], container)
    connection: http.client.HTTPConnection = http.client.HTTPConnection(host, port, timeout=timeout)
    if wanted.get("scheme", "HTTP") == "HTTPS":
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # as the kubelet
        connection = http.client.HTTPSConnection(host, port, timeout=timeout, context=context)
    headers = {each["name"]: each["value"] for each in wanted.get("httpHeaders", ())}
    try:
        connection.request("GET", wanted.get("path", "/"), headers=headers)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return False, f'Get "http://{host}:{port}{wanted.get("path", "/")}": {error}'
    finally:
        connection.close()
    return 200 <= status < 400, f"HTTP probe failed with statuscode: {status}"


def _port(port: int | str, container: Document) -> int:
    """The number of a port that may be given by its name."""
    if isinstance(port, int):
        return port
    return next(int(each["containerPort"]) for each in container.get("ports", ()) if each.get("name") == port)
