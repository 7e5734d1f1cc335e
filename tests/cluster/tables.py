"""Objects as the table that `kubectl get` prints: its columns, and a row for each object."""

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from tests.cluster.kinds import Kind
from tests.cluster.refusals import Document
from tests.k8s.schemas import custom_definitions

Cell = Callable[[Document], Any]
# Name, whether only `-o wide` shows it, and what it holds
Column = tuple[str, bool, Cell]


def table(objects: Sequence[Document], kind: Kind, *, resource_version: str, include: str = "Metadata") -> Document:
    """A Table; `include` says how much of each object goes with its row: None, Metadata or Object."""
    columns = _columns(kind)
    return {
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": {"resourceVersion": resource_version},
        "columnDefinitions": [
            {
                "name": name,
                "type": "string",
                "format": "name" if name == "Name" else "",
                "description": "",
                "priority": int(is_wide),
            }
            for name, is_wide, _ in columns
        ],
        "rows": [{"cells": [cell(each) for _, _, cell in columns]} | _object(each, include) for each in objects],
    }


def _object(document: Document, include: str) -> Document:
    if include == "None":
        return {}
    if include == "Object":
        return {"object": document}
    head = {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1"}
    return {"object": head | {"metadata": document["metadata"]}}


def _columns(kind: Kind) -> list[Column]:
    columns = _custom_columns(kind) if kind.custom else _BUILT_IN.get(kind.name, [])
    if kind.name == "Event" and not kind.custom:
        return columns
    has_age = any(name == "Age" for name, _, _ in columns)
    named: list[Column] = [("Name", False, lambda each: each["metadata"]["name"])]
    plain = [column for column in columns if not column[1]]
    wide = [column for column in columns if column[1]]
    return [*named, *plain, *([] if has_age else [("Age", False, _age)]), *wide]


def since(timestamp: str | None) -> str:
    """How long ago that was, as kubectl writes it."""
    return "<unknown>" if timestamp is None else _span((datetime.now(UTC) - _moment(timestamp)).total_seconds())


def _moment(timestamp: str) -> datetime:
    return datetime.fromisoformat(timestamp)


def _span(seconds: float) -> str:
    whole = max(0, int(seconds))
    if whole < 120:
        return f"{whole}s"
    if whole < 600:
        return f"{whole // 60}m{whole % 60}s" if whole % 60 else f"{whole // 60}m"
    if whole < 3 * 3600:
        return f"{whole // 60}m"
    return f"{whole // 3600}h" if whole < 48 * 3600 else f"{whole // 86400}d"


def _age(document: Document) -> str:
    return since(document["metadata"].get("creationTimestamp"))


def _at(*way: str, default: Any = "<none>") -> Cell:
    def cell(document: Document) -> Any:
        found: Any = document
        for step in way:
            found = found.get(step) if isinstance(found, dict) else None
        return default if found is None else found

    return cell


def _containers(pod: Document) -> list[Document]:
    return list(pod.get("status", {}).get("containerStatuses", ()))


def _pod_ready(pod: Document) -> str:
    ready = sum(1 for status in _containers(pod) if status.get("ready"))
    return f"{ready}/{len(pod['spec']['containers'])}"


def _pod_status(pod: Document) -> str:
    """What people read first: why a pod waits or ended, or that it is ending."""
    status = pod.get("status", {})
    said = status.get("reason") or status.get("phase", "Unknown")
    for container in _containers(pod):
        state = container.get("state", {})
        if state.get("waiting", {}).get("reason"):
            said = state["waiting"]["reason"]
        elif "terminated" in state:
            ended = state["terminated"]
            said = ended.get("reason") or f"ExitCode:{ended['exitCode']}"
    return "Terminating" if "deletionTimestamp" in pod["metadata"] else str(said)


def _job_status(job: Document) -> str:
    holding = [each["type"] for each in job.get("status", {}).get("conditions", ()) if each["status"] == "True"]
    for condition in ("Complete", "Failed"):
        if condition in holding:
            return condition
    if "deletionTimestamp" in job["metadata"]:
        return "Terminating"
    return next((each for each in ("Suspended", "FailureTarget", "SuccessCriteriaMet") if each in holding), "Running")


def _job_completions(job: Document) -> str:
    done = job.get("status", {}).get("succeeded", 0)
    spec = job["spec"]
    return f"{done}/{spec['completions']}" if "completions" in spec else f"{done}/1 of {spec['parallelism']}"


def _job_duration(job: Document) -> str:
    status = job.get("status", {})
    if "startTime" not in status:
        return ""
    end = status.get("completionTime")
    begun = _moment(status["startTime"])
    return _span(((_moment(end) if end else datetime.now(UTC)) - begun).total_seconds())


def _names_of_containers(document: Document) -> str:
    return ",".join(each["name"] for each in document["spec"]["template"]["spec"]["containers"])


def _images(document: Document) -> str:
    return ",".join(each["image"] for each in document["spec"]["template"]["spec"]["containers"])


def _pairs(pairs: Document | None) -> str:
    return ",".join(f"{key}={value}" for key, value in sorted((pairs or {}).items())) or "<none>"


def _service_ports(service: Document) -> str:
    ports = service["spec"].get("ports", ())
    return ",".join(f"{port['port']}/{port['protocol']}" for port in ports) or "<none>"


def _node_status(node: Document) -> str:
    ready = [each for each in node.get("status", {}).get("conditions", ()) if each["type"] == "Ready"]
    said = "Ready" if ready and ready[0]["status"] == "True" else "NotReady"
    return f"{said},SchedulingDisabled" if node.get("spec", {}).get("unschedulable") else said


def _event_object(event: Document) -> str:
    involved = event["involvedObject"]
    return f"{involved['kind'].lower()}/{involved['name']}"


def _pod_columns() -> list[Column]:
    return [
        ("Ready", False, _pod_ready),
        ("Status", False, _pod_status),
        ("Restarts", False, lambda pod: str(sum(each.get("restartCount", 0) for each in _containers(pod)))),
        ("IP", True, _at("status", "podIP")),
        ("Node", True, _at("spec", "nodeName")),
        ("Nominated Node", True, _at("status", "nominatedNodeName")),
        ("Readiness Gates", True, lambda _: "<none>"),
    ]


_BUILT_IN: dict[str, list[Column]] = {
    "Pod": _pod_columns(),
    "Job": [
        ("Status", False, _job_status),
        ("Completions", False, _job_completions),
        ("Duration", False, _job_duration),
        ("Containers", True, _names_of_containers),
        ("Images", True, _images),
        ("Selector", True, lambda job: _pairs(job["spec"].get("selector", {}).get("matchLabels"))),
    ],
    "Service": [
        ("Type", False, _at("spec", "type")),
        ("Cluster-IP", False, _at("spec", "clusterIP")),
        ("External-IP", False, lambda _: "<none>"),
        ("Port(s)", False, _service_ports),
        ("Selector", True, lambda service: _pairs(service["spec"].get("selector"))),
    ],
    "Event": [
        ("Last Seen", False, lambda event: since(event.get("lastTimestamp"))),
        ("Type", False, _at("type")),
        ("Reason", False, _at("reason")),
        ("Object", False, _event_object),
        ("Source", True, _at("source", "component")),
        ("Message", False, lambda event: event.get("message", "").strip()),
        ("First Seen", True, lambda event: since(event.get("firstTimestamp"))),
        ("Count", True, _at("count", default=1)),
        ("Name", True, _at("metadata", "name")),
    ],
    "Namespace": [("Status", False, _at("status", "phase"))],
    "Node": [
        ("Status", False, _node_status),
        ("Roles", False, lambda _: "<none>"),
        ("Age", False, _age),
        ("Version", False, _at("status", "nodeInfo", "kubeletVersion")),
    ],
    "ConfigMap": [("Data", False, lambda each: len(each.get("data", {})) + len(each.get("binaryData", {})))],
    "Secret": [("Type", False, _at("type")), ("Data", False, lambda each: len(each.get("data", {})))],
    "ServiceAccount": [("Secrets", False, lambda each: len(each.get("secrets", ())))],
    "PersistentVolumeClaim": [
        ("Status", False, _at("status", "phase")),
        ("Volume", False, _at("spec", "volumeName", default="")),
        ("Capacity", False, _at("status", "capacity", "storage", default="")),
        ("Access Modes", False, lambda each: ",".join(each["spec"].get("accessModes", ()))),
        ("StorageClass", False, _at("spec", "storageClassName", default="")),
    ],
    "NetworkPolicy": [
        ("Pod-Selector", False, lambda each: _pairs(each["spec"].get("podSelector", {}).get("matchLabels")))
    ],
}


def _custom_columns(kind: Kind) -> list[Column]:
    """The columns that the genuine definition has."""
    definition = custom_definitions()[kind.group, kind.name]
    (version,) = (each for each in definition["spec"]["versions"] if each["name"] == kind.version)
    columns = version.get("additionalPrinterColumns", ())
    return [
        (column["name"], column.get("priority", 0) > 0, _by_path(column["jsonPath"], column["type"]))
        for column in columns
    ]


def _by_path(path: str, type: str) -> Cell:
    """What a definition's jsonPath leads to; of its language, names and `[?(@.type=="X")]`."""
    steps = re.findall(r"\.([\w-]+)|\[\?\(@\.(\w+)==[\"'](.*?)[\"']\)\]", path)

    def cell(document: Document) -> Any:
        found: Any = document
        for name, key, value in steps:
            if name:
                found = found.get(name) if isinstance(found, dict) else None
            else:
                found = next((each for each in found or () if each.get(key) == value), None)
        if found is None:
            return ""
        return since(found) if type == "date" else found

    return cell
