"""DNS of the cluster double: it answers for pods and headless Services as they are at this very moment.

A real cluster's answers may be some seconds old; these never are. Names of pods that have ended or are gone do not resolve.
Nothing outside the double resolves either.
"""

import socket
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

from tests.cluster.refusals import Document

DOMAIN: Final = "cluster.local"
Records = Mapping[str, tuple[str, ...]]

_ADDRESS, _POINTER, _ANY = 1, 12, 255
_INTERNET: Final = 1
_NO_SUCH_NAME: Final = 3
_SECONDS_TO_LIVE: Final = 5
_TO_THE_NAME_ASKED: Final = 0xC00C  # a pointer to the question, which begins after twelve bytes
_POLL_SECONDS: Final = 0.2


def records(pods: Sequence[Document], services: Sequence[Document]) -> Records:
    """Addresses by name: of each headless Service, and of each pod that has a host name below one."""
    found: dict[str, list[str]] = {}
    for service in services:
        spec, namespace = service["spec"], service["metadata"]["namespace"]
        if spec.get("clusterIP") != "None" or not spec.get("selector"):
            continue
        name = f"{service['metadata']['name']}.{namespace}.svc.{DOMAIN}"
        for pod in pods:
            if pod["metadata"]["namespace"] != namespace or not is_endpoint(pod, spec):
                continue
            address = pod["status"]["podIP"]
            found.setdefault(name, []).append(address)
            if pod["spec"].get("hostname") and pod["spec"].get("subdomain") == service["metadata"]["name"]:
                found.setdefault(f"{pod['spec']['hostname']}.{name}", []).append(address)
    return {name: tuple(addresses) for name, addresses in found.items()}


def is_endpoint(pod: Document, service: Document) -> bool:
    """Whether a Service leads to a pod: a chosen one that lives and, unless the Service does not mind, is ready."""
    status = pod.get("status", {})
    labels = pod["metadata"].get("labels", {})
    if not status.get("podIP") or status.get("phase") in ("Succeeded", "Failed"):
        return False
    if any(labels.get(name) != value for name, value in service["selector"].items()):
        return False
    ready = any(each["type"] == "Ready" and each["status"] == "True" for each in status.get("conditions", ()))
    return ready or bool(service.get("publishNotReadyAddresses"))


class NameServer:
    """Answers on port 53 of an address while it is entered."""

    def __init__(self, address: str, look_up: Callable[[], Records]) -> None:
        self._look_up = look_up
        self._closing = threading.Event()
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((address, 53))
        self._socket.settimeout(_POLL_SECONDS)
        self._thread = threading.Thread(target=self._serve, name="names", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while not self._closing.is_set():
            with suppress(TimeoutError):  # nobody asked
                question, sender = self._socket.recvfrom(512)
                self._socket.sendto(answer(question, self._look_up()), sender)


def answer(question: bytes, known: Records) -> bytes:
    """The answer to one question, as RFC 1035 packs it."""
    number, flags = struct.unpack_from("!HH", question)
    name, end = _read_name(question, 12)
    (wanted,) = struct.unpack_from("!H", question, end)
    addresses = known.get(name, ())
    exists = bool(addresses) or any(each.endswith(f".{name}") for each in known)
    data: list[tuple[int, bytes]] = []
    if wanted in (_ADDRESS, _ANY):
        data = [(_ADDRESS, socket.inet_aton(address)) for address in addresses]
    if name.endswith(".in-addr.arpa"):
        address = ".".join(reversed(name.removesuffix(".in-addr.arpa").split(".")))
        names = sorted(each for each, addresses in known.items() if address in addresses)
        names.sort(key=len, reverse=True)  # a pod's own name is longer than its Service's
        exists = bool(names)
        data = [(_POINTER, _write_name(each)) for each in names[:1] if wanted in (_POINTER, _ANY)]
    # authoritative answer, recursion available, as asked for
    head = struct.pack(
        "!HHHHHH", number, 0x8480 | (flags & 0x0100) | (0 if exists else _NO_SUCH_NAME), 1, len(data), 0, 0
    )
    entries = [
        struct.pack("!HHHIH", _TO_THE_NAME_ASKED, kind, _INTERNET, _SECONDS_TO_LIVE, len(content)) + content
        for kind, content in data
    ]
    return head + question[12 : end + 4] + b"".join(entries)


def _read_name(message: bytes, start: int) -> tuple[str, int]:
    """A name, in small letters, and where it ends."""
    labels: list[str] = []
    while (length := message[start]) != 0:
        labels.append(message[start + 1 : start + 1 + length].decode("ascii").lower())
        start += 1 + length
    return ".".join(labels), start + 1


def _write_name(name: str) -> bytes:
    return b"".join(bytes([len(label)]) + label.encode("ascii") for label in name.split(".")) + b"\0"
