"""Objects out of Kubernetes' protobuf, for the few kinds that `kubectl create` and `kubectl drain` send so and not as JSON.

Numbers of fields are those of the public `generated.proto` files; a field that is not listed here is refused, never dropped.
"""

import base64
from collections.abc import Callable, Iterator
from typing import Any

from tests.cluster.refusals import Document, bad_request

MAGIC = b"k8s\x00"
Decode = Callable[[Any], Any]
# number -> name, how its value is read, whether there may be several
Message = dict[int, tuple[str, Decode, str]]


def decoded(body: bytes) -> Document:
    """The object in a body that begins with `MAGIC`."""
    if not body.startswith(MAGIC):
        raise bad_request("the body is no protobuf of Kubernetes")
    envelope = _message(_ENVELOPE)(body[len(MAGIC) :])
    head = envelope["typeMeta"]
    try:
        read = _KINDS[head["kind"]]
    except KeyError:
        raise bad_request(f"the double reads no {head['kind']} from protobuf; send it as JSON") from None
    return {**head, **read(envelope["raw"])}


def _text(value: bytes) -> str:
    return value.decode()


def _data(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _number(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _truth(value: int) -> bool:
    return bool(value)


def _raw(value: bytes) -> bytes:
    return value


def _message(fields: Message) -> Callable[[bytes], Document]:
    """How a message of these fields is read; what is empty is left out, as it is in JSON."""

    def read(body: bytes) -> Document:
        found: Document = {}
        for number, value in _fields(body):
            if number not in fields:
                raise bad_request(f"the double does not know field {number} of this protobuf; send it as JSON")
            name, decode, many = fields[number]
            if many == "map":
                pair = dict(_fields(value))
                found.setdefault(name, {})[pair.get(1, b"").decode()] = decode(pair.get(2, b""))
            elif many == "list":
                found.setdefault(name, []).append(decode(value))
            else:
                found[name] = decode(value)
        return {name: value for name, value in found.items() if value not in ("", {}, [])}

    return read


def _fields(body: bytes) -> Iterator[tuple[int, Any]]:
    position = 0
    while position < len(body):
        tag, position = _varint(body, position)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, position = _varint(body, position)
            yield number, value
        elif wire == 2:
            size, position = _varint(body, position)
            yield number, body[position : position + size]
            position += size
        else:
            raise bad_request(f"the double reads no protobuf of wire type {wire}")


def _varint(body: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = body[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position


_TYPE: Message = {1: ("apiVersion", _text, ""), 2: ("kind", _text, "")}
_ENVELOPE: Message = {
    1: ("typeMeta", _message(_TYPE), ""),
    2: ("raw", _raw, ""),
    3: ("contentEncoding", _text, ""),
    4: ("contentType", _text, ""),
}
_METADATA: Message = {
    1: ("name", _text, ""),
    2: ("generateName", _text, ""),
    3: ("namespace", _text, ""),
    4: ("selfLink", _text, ""),
    5: ("uid", _text, ""),
    6: ("resourceVersion", _text, ""),
    7: ("generation", _number, ""),
    8: ("creationTimestamp", lambda _: "", ""),  # never a client's to say
    11: ("labels", _text, "map"),
    12: ("annotations", _text, "map"),
}
_PRECONDITIONS: Message = {1: ("uid", _text, ""), 2: ("resourceVersion", _text, "")}
_DELETE_OPTIONS: Message = {
    1: ("gracePeriodSeconds", _number, ""),
    2: ("preconditions", _message(_PRECONDITIONS), ""),
    3: ("orphanDependents", _truth, ""),
    4: ("propagationPolicy", _text, ""),
    5: ("dryRun", _text, "list"),
}
_REFERENCE: Message = {1: ("name", _text, "")}


def _kind(fields: Message) -> Callable[[bytes], Document]:
    return _message({1: ("metadata", _message(_METADATA), ""), **fields})


_KINDS: dict[str, Callable[[bytes], Document]] = {
    "Namespace": _kind({2: ("spec", _message({}), ""), 3: ("status", _message({1: ("phase", _text, "")}), "")}),
    "ServiceAccount": _kind(
        {3: ("imagePullSecrets", _message(_REFERENCE), "list"), 4: ("automountServiceAccountToken", _truth, "")}
    ),
    "ConfigMap": _kind({2: ("data", _text, "map"), 3: ("binaryData", _data, "map"), 4: ("immutable", _truth, "")}),
    "Secret": _kind(
        {
            2: ("data", _data, "map"),
            3: ("type", _text, ""),
            4: ("stringData", _text, "map"),
            5: ("immutable", _truth, ""),
        }
    ),
    "Eviction": _kind({2: ("deleteOptions", _message(_DELETE_OPTIONS), "")}),
    "DeleteOptions": _message(_DELETE_OPTIONS),
}
