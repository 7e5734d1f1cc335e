"""Names of pods and headless Services."""

import struct
from typing import Any

import pytest

from tests.cluster.names import answer, is_endpoint, records
from tests.cluster.refusals import Document

SERVICE = {
    "metadata": {"namespace": "space", "name": "group"},
    "spec": {"clusterIP": "None", "selector": {"app": "vp"}, "publishNotReadyAddresses": True},
}


def pod(name: str, address: str, **status: Any) -> Document:
    return {
        "metadata": {"namespace": "space", "name": f"{name}-abcde", "labels": {"app": "vp"}},
        "spec": {"hostname": name, "subdomain": "group"},
        "status": {"phase": "Running", "podIP": address} | status,
    }


def asked(name: str, kind: int = 1) -> bytes:
    labels = b"".join(bytes([len(each)]) + each.encode() for each in name.split("."))
    return struct.pack("!HHHHHH", 7, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!HH", kind, 1)


def answered(message: bytes) -> tuple[int, int, bytes]:
    number, flags, _, count, _, _ = struct.unpack_from("!HHHHHH", message)
    assert number == 7
    return flags & 0xF, count, message[-4:]


def test_a_pod_has_a_name_below_its_service_and_the_service_leads_to_all() -> None:
    found = records(
        [pod("job-0", "10.0.0.1"), pod("job-1", "10.0.0.2", phase="Failed"), pod("job-2", "10.0.0.3")], [SERVICE]
    )
    assert found == {
        "group.space.svc.cluster.local": ("10.0.0.1", "10.0.0.3"),
        "job-0.group.space.svc.cluster.local": ("10.0.0.1",),
        "job-2.group.space.svc.cluster.local": ("10.0.0.3",),
    }


def test_a_pod_that_is_not_ready_is_found_only_where_the_service_does_not_mind() -> None:
    strict = SERVICE["spec"] | {"publishNotReadyAddresses": False}
    ready = [{"type": "Ready", "status": "True"}]
    assert is_endpoint(pod("job-0", "10.0.0.1"), SERVICE["spec"])
    assert not is_endpoint(pod("job-0", "10.0.0.1"), strict)
    assert is_endpoint(pod("job-0", "10.0.0.1", conditions=ready), strict)
    assert not is_endpoint(pod("job-0", ""), SERVICE["spec"])
    assert not is_endpoint(pod("job-0", "10.0.0.1"), SERVICE["spec"] | {"selector": {"app": "other"}})


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("job-0.group.space.svc.cluster.local", 1, (0, 1, bytes([10, 0, 0, 1]))),
        ("JOB-0.group.space.svc.cluster.local", 1, (0, 1, bytes([10, 0, 0, 1]))),
        ("job-0.group.space.svc.cluster.local", 28, (0, 0, bytes([0, 28, 0, 1]))),  # it has none of IPv6
        ("job-1.group.space.svc.cluster.local", 1, (3, 0, bytes([0, 1, 0, 1]))),
        ("space.svc.cluster.local", 1, (0, 0, bytes([0, 1, 0, 1]))),  # there is something below it
        ("example.org", 1, (3, 0, bytes([0, 1, 0, 1]))),
    ],
)
def test_questions_are_answered(name: str, kind: int, expected: tuple[int, int, bytes]) -> None:
    known = records([pod("job-0", "10.0.0.1")], [SERVICE])
    assert answered(answer(asked(name, kind), known)) == expected


def test_an_address_leads_back_to_the_pods_own_name() -> None:
    known = records([pod("job-0", "10.0.0.1")], [SERVICE])
    message = answer(asked("1.0.0.10.in-addr.arpa", 12), known)
    assert answered(message)[:2] == (0, 1)
    assert message.endswith(b"\x05job-0\x05group\x05space\x03svc\x07cluster\x05local\x00")
    assert answered(answer(asked("9.0.0.10.in-addr.arpa", 12), known))[:2] == (3, 0)
