"""Fills in what the real server fills into new objects and clients rely on. Not all that it fills in: what our manifests use."""

import base64
import ipaddress
import re
from typing import Any

from tests.cluster.kinds import Kind
from tests.cluster.refusals import Document
from tests.cluster.selectors import labels_of
from tests.k8s.schemas import schema_of

SERVICE_ADDRESSES = ipaddress.ip_network("10.96.0.0/16")


def fill_defaults(document: Document, kind: Kind, version: str) -> None:
    """Fills defaults into an object, in place."""
    if kind.custom:
        _fill_by_schema(document, schema_of(kind.api_version, kind.name, version))
    fill = {
        "Pod": _fill_pod,
        "Job": _fill_job,
        "Service": _fill_service,
        "Secret": _fill_secret,
        "PersistentVolumeClaim": _fill_claim,
        "NetworkPolicy": _fill_network_policy,
        "Namespace": _fill_namespace,
    }.get(kind.name)
    if fill is not None and not kind.custom:
        fill(document)


def fill_of_new(document: Document, kind: Kind) -> None:
    """What only a new object gets: it follows from its uid, or says that nothing has happened to it yet."""
    if kind.name == "Job":
        _bind_job(document)
        document["status"] = {}
    elif kind.name == "Pod":
        document["status"] = {"phase": "Pending", "qosClass": _quality_of_service(document["spec"])}
    elif kind.name == "Service":
        document["status"] = {"loadBalancer": {}}
        _give_address(document)
    elif kind.name == "PersistentVolumeClaim":
        document["status"] = {"phase": "Pending"}


def _fill_by_schema(value: Any, schema: Document) -> None:
    """Defaults that a definition has."""
    if isinstance(value, dict):
        for name, below in schema.get("properties", {}).items():
            if name not in value and "default" in below:
                value[name] = below["default"]
            if name in value:
                _fill_by_schema(value[name], below)
        rest = schema.get("additionalProperties")
        if isinstance(rest, dict):
            for name in value.keys() - schema.get("properties", {}).keys():
                _fill_by_schema(value[name], rest)
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for each in value:
            _fill_by_schema(each, schema["items"])


def _fill(part: Document, **values: Any) -> None:
    for name, value in values.items():
        part.setdefault(name, value)


def _fill_pod(pod: Document) -> None:
    spec = pod.get("spec", {})
    fill_pod_spec(spec)
    _fill(spec, enableServiceLinks=True, serviceAccountName="default", priority=0)
    _fill(spec, serviceAccount=spec["serviceAccountName"])


def fill_pod_spec(spec: Document) -> None:
    """What a template in a Job gets, too."""
    _fill(spec, restartPolicy="Always", dnsPolicy="ClusterFirst", schedulerName="default-scheduler")
    _fill(spec, terminationGracePeriodSeconds=30, securityContext={})
    for container in [*(spec.get("initContainers") or ()), *(spec.get("containers") or ())]:
        _fill_container(container)
    for volume in spec.get("volumes") or ():
        if set(volume) == {"name"}:
            volume["emptyDir"] = {}
        for source in ("configMap", "secret", "projected", "downwardAPI"):
            if isinstance(volume.get(source), dict):
                _fill(volume[source], defaultMode=420)
    if "serviceAccountName" in spec:
        _fill(spec, serviceAccount=spec["serviceAccountName"])


def _fill_container(container: Document) -> None:
    image = container.get("image", "")
    untagged = ":" not in image.rpartition("/")[2]
    policy = "Always" if image.endswith(":latest") or untagged else "IfNotPresent"
    _fill(container, imagePullPolicy=policy, terminationMessagePath="/dev/termination-log")
    _fill(container, terminationMessagePolicy="File", resources={})
    for port in container.get("ports") or ():
        _fill(port, protocol="TCP")
    for variable in container.get("env") or ():
        reference = variable.get("valueFrom", {}).get("fieldRef")
        if reference is not None:
            _fill(reference, apiVersion="v1")
        amount = variable.get("valueFrom", {}).get("resourceFieldRef")
        if amount is not None:
            _fill(amount, divisor="0")
    for name in ("livenessProbe", "readinessProbe", "startupProbe"):
        if name in container:
            _fill(container[name], timeoutSeconds=1, periodSeconds=10, successThreshold=1, failureThreshold=3)
    limits = container["resources"].get("limits")
    if limits:
        requests = container["resources"].setdefault("requests", {})
        for name, amount in limits.items():
            requests.setdefault(name, amount)


def _fill_job(job: Document) -> None:
    spec = job.get("spec", {})
    if "completions" not in spec and "parallelism" not in spec:
        _fill(spec, completions=1)
    _fill(spec, parallelism=1, completionMode="NonIndexed", suspend=False, manualSelector=False)
    _fill(spec, backoffLimit=2**31 - 1 if "backoffLimitPerIndex" in spec else 6)
    _fill(spec, podReplacementPolicy="Failed" if "podFailurePolicy" in spec else "TerminatingOrFailed")
    for rule in spec.get("podFailurePolicy", {}).get("rules") or ():
        for pattern in rule.get("onPodConditions") or ():
            _fill(pattern, status="True")
    template = spec.get("template", {})
    if isinstance(template.get("spec"), dict):
        fill_pod_spec(template["spec"])


def _bind_job(job: Document) -> None:
    """The Job's pods are those that carry its uid."""
    metadata, spec = job["metadata"], job["spec"]
    own = {
        "batch.kubernetes.io/controller-uid": metadata["uid"],
        "batch.kubernetes.io/job-name": metadata["name"],
        "controller-uid": metadata["uid"],
        "job-name": metadata["name"],
    }
    if spec["manualSelector"]:
        return
    del spec["manualSelector"]
    labels = spec["template"].setdefault("metadata", {}).setdefault("labels", {})
    labels |= own
    spec["selector"] = {"matchLabels": {"batch.kubernetes.io/controller-uid": metadata["uid"]}}
    if not labels_of(job):
        metadata["labels"] = dict(labels)


def _fill_service(service: Document) -> None:
    spec = service.get("spec", {})
    _fill(spec, type="ClusterIP", sessionAffinity="None")
    if spec["type"] == "ExternalName":
        return
    _fill(spec, internalTrafficPolicy="Cluster", ipFamilies=["IPv4"], ipFamilyPolicy="SingleStack")
    for port in spec.get("ports") or ():
        _fill(port, protocol="TCP")
        if "port" in port:
            _fill(port, targetPort=port["port"])


def _give_address(service: Document) -> None:
    spec = service["spec"]
    if spec["type"] == "ExternalName":
        return
    if "clusterIP" not in spec:
        number = int(service["metadata"]["uid"].replace("-", "")[:8], 16)
        spec["clusterIP"] = str(SERVICE_ADDRESSES[1 + number % (SERVICE_ADDRESSES.num_addresses - 2)])
    spec["clusterIPs"] = [spec["clusterIP"]]


def _fill_secret(secret: Document) -> None:
    _fill(secret, type="Opaque")
    for name, text in secret.pop("stringData", {}).items():
        secret.setdefault("data", {})[name] = base64.b64encode(text.encode()).decode()


def _fill_claim(claim: Document) -> None:
    _fill(claim.get("spec", {}), volumeMode="Filesystem")


def _fill_network_policy(policy: Document) -> None:
    spec = policy.get("spec", {})
    _fill(spec, policyTypes=["Ingress", "Egress"] if "egress" in spec else ["Ingress"])
    for rule in [*(spec.get("ingress") or ()), *(spec.get("egress") or ())]:
        for port in rule.get("ports") or ():
            _fill(port, protocol="TCP")


def _fill_namespace(namespace: Document) -> None:
    name = namespace["metadata"].get("name")
    if name:
        namespace["metadata"].setdefault("labels", {})["kubernetes.io/metadata.name"] = name
    namespace["spec"] = {"finalizers": ["kubernetes"]}
    namespace["status"] = {"phase": "Active"}


def _quality_of_service(spec: Document) -> str:
    resources = [container["resources"] for container in spec["containers"]]
    if not any(each.get("requests") or each.get("limits") for each in resources):
        return "BestEffort"
    full = all(
        {"cpu", "memory"} <= set(each.get("limits", {})) and each["limits"] == each["requests"] for each in resources
    )
    return "Guaranteed" if full else "Burstable"


def is_name(text: str) -> bool:
    """Whether it can be a name: as in DNS."""
    return (
        len(text) <= 253
        and re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*", text) is not None
    )
