"""What an object must satisfy beyond its schema, and what of it may not change: the rules that our manifests can break.

Kubernetes has many more. CEL rules of definitions, admission webhooks, quotas and RBAC are not among these.
"""

import json
import re
from typing import Any

from tests.cluster.defaults import is_name
from tests.cluster.kinds import Kind
from tests.cluster.refusals import Document, Refused, bad_request, cause, invalid
from tests.k8s.schemas import Problem, problems

_LABEL_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?")
_LABEL_NAME = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
_SUBDOMAIN = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and "
    "end with an alphanumeric character"
)
_IMMUTABLE = "field is immutable"

Way = tuple[str | int, ...]


def unknown_fields(document: Document, version: str) -> list[Way]:
    """Where the fields are that the kind does not have."""
    return [
        (*problem.absolute_path, name)
        for problem in problems(document, version)
        if problem.validator == "additionalProperties"
        for name in sorted(problem.instance.keys() - problem.schema.get("properties", {}).keys())
    ]


def remove_fields(document: Document, ways: list[Way]) -> None:
    """Removes fields in place."""
    for *way, last in ways:
        here: Any = document
        for step in way:
            here = here[step]
        del here[last]


def check_schema(document: Document, kind: Kind, version: str) -> None:
    """Refuses what does not have the shape of its kind."""
    causes = []
    for problem in problems(document, version):
        if problem.validator in ("type", "oneOf", "anyOf") and not kind.custom:
            raise bad_request(
                f'{kind.name} in version "{kind.version}" cannot be handled as a {kind.name}: json: cannot unmarshal '
                f"{_type_of(problem.instance)} into Go struct field {kind.name}.{path_of(problem.absolute_path)} of type "
                f"{_wanted(problem)}"
            )
        if problem.validator == "additionalProperties":
            raise strict_error(kind, unknown_fields(document, version))
        causes.append(_cause_of(problem))
    if causes:
        metadata = document.get("metadata")
        name = metadata.get("name", "") if isinstance(metadata, dict) else ""
        raise invalid(kind.name, kind.group, name, causes)


def strict_error(kind: Kind, ways: list[Way]) -> Refused:
    """The refusal of unknown fields."""
    listed = ", ".join(f'unknown field "{path_of(way)}"' for way in ways)
    return bad_request(
        f'{kind.name} in version "{kind.version}" cannot be handled as a {kind.name}: strict decoding error: {listed}'
    )


def check_rules(document: Document, kind: Kind) -> None:
    """Refuses an object that has the right shape, and still cannot be."""
    causes = _metadata_causes(document)
    if not kind.custom:
        rules = {"Pod": _pod_causes, "Job": _job_causes, "Service": _service_causes, "ConfigMap": _config_causes}
        causes += rules[kind.name](document) if kind.name in rules else []
    if causes:
        raise invalid(kind.name, kind.group, document["metadata"].get("name", ""), causes)


def check_change(before: Document, after: Document, kind: Kind) -> None:
    """Refuses a change of what may not change."""
    causes = []
    if not kind.custom:
        for path in _UNCHANGING.get(kind.name, ()):
            other = _at(after, path)
            if other != _at(before, path):
                causes.append(cause(path, f"Invalid value: {_shown(other)}: {_IMMUTABLE}"))
        if kind.name == "Pod" and _fixed_of_pod(before["spec"]) != _fixed_of_pod(after["spec"]):
            causes.append(
                cause(
                    "spec",
                    "Forbidden: pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers"
                    "[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),"
                    "`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)",
                    "FieldValueForbidden",
                )
            )
        if kind.name in ("ConfigMap", "Secret") and before.get("immutable"):
            for name in ("data", "binaryData"):
                if before.get(name) != after.get(name):
                    causes.append(
                        cause(name, "Forbidden: field is immutable when `immutable` is set", "FieldValueForbidden")
                    )
    if causes:
        raise invalid(kind.name, kind.group, after["metadata"]["name"], causes)


# A suspended Job's template may get other node selectors from a queue, and an Indexed Job other completions together with
# parallelism: neither is used here, and both are refused.
_UNCHANGING = {
    "Job": (
        "spec.completions",
        "spec.completionMode",
        "spec.selector",
        "spec.template",
        "spec.podFailurePolicy",
        "spec.successPolicy",
        "spec.backoffLimitPerIndex",
        "spec.managedBy",
    ),
    "Service": ("spec.clusterIP",),
    "PersistentVolumeClaim": ("spec.accessModes", "spec.storageClassName", "spec.volumeMode"),
    "Secret": ("type",),
}


def _fixed_of_pod(spec: Document) -> Document:
    """What of a pod may not change; the scheduler's word is not a client's."""
    free = ("activeDeadlineSeconds", "tolerations", "terminationGracePeriodSeconds", "nodeName")
    fixed = {name: value for name, value in spec.items() if name not in free}
    for containers in ("containers", "initContainers"):
        if containers in fixed:
            fixed[containers] = [
                {key: value for key, value in container.items() if key != "image"} for container in fixed[containers]
            ]
    return fixed


def _metadata_causes(document: Document) -> list[Document]:
    metadata = document["metadata"]
    causes = []
    name = metadata.get("name", "")
    if not name:
        causes.append(cause("metadata.name", "Required value: name or generateName is required", "FieldValueRequired"))
    elif not is_name(name):
        causes.append(cause("metadata.name", f"Invalid value: {_shown(name)}: {_SUBDOMAIN}"))
    causes += _label_causes(metadata.get("labels"), "metadata.labels")
    for key in metadata.get("annotations") or ():
        if not _LABEL_NAME.fullmatch(key):
            causes.append(
                cause(
                    "metadata.annotations",
                    f"Invalid value: {_shown(key)}: name part must consist of alphanumeric characters",
                )
            )
    return causes


def _label_causes(labels: Any, path: str) -> list[Document]:
    causes = []
    for key, value in (labels or {}).items():
        if not _LABEL_NAME.fullmatch(key) or len(key.rpartition("/")[2]) > 63:
            causes.append(
                cause(
                    path,
                    f"Invalid value: {_shown(key)}: name part must consist of alphanumeric characters, '-', '_' or '.'",
                )
            )
        if len(value) > 63:
            causes.append(cause(path, f"Invalid value: {_shown(value)}: must be no more than 63 characters"))
        elif not _LABEL_VALUE.fullmatch(value):
            causes.append(
                cause(
                    path,
                    f"Invalid value: {_shown(value)}: a valid label must be an empty string or consist of alphanumeric "
                    "characters, '-', '_' or '.', and must start and end with an alphanumeric character",
                )
            )
    return causes


def _job_causes(job: Document) -> list[Document]:
    spec = job["spec"]
    causes = []
    for name in ("completions", "parallelism", "backoffLimit", "ttlSecondsAfterFinished"):
        if spec.get(name, 0) < 0:
            causes.append(cause(f"spec.{name}", f"Invalid value: {spec[name]}: must be greater than or equal to 0"))
    if spec["completionMode"] not in ("Indexed", "NonIndexed"):
        causes.append(_unsupported("spec.completionMode", spec["completionMode"], "Indexed", "NonIndexed"))
    if spec["completionMode"] == "Indexed" and "completions" not in spec:
        causes.append(
            cause("spec.completions", "Required value: when completion mode is Indexed", "FieldValueRequired")
        )
    if spec["completionMode"] == "Indexed" and len(f"{job['metadata']['name']}-{spec.get('completions', 1) - 1}") > 63:
        causes.append(
            cause(
                "metadata.name",
                "Invalid value: will not able to create pod with index: must be no more than 63 characters",
            )
        )
    policy = spec["template"]["spec"]["restartPolicy"]
    if policy not in ("Never", "OnFailure"):
        causes.append(_unsupported("spec.template.spec.restartPolicy", policy, "OnFailure", "Never"))
    if "podFailurePolicy" in spec:
        causes += _failure_policy_causes(spec, policy)
    return (
        causes
        + _pod_spec_causes(spec["template"]["spec"], "spec.template.spec")
        + _label_causes(spec["template"].get("metadata", {}).get("labels"), "spec.template.labels")
    )


def _failure_policy_causes(spec: Document, restart_policy: str) -> list[Document]:
    causes = []
    if restart_policy != "Never":
        causes.append(
            cause(
                "spec.template.spec.restartPolicy",
                f'Invalid value: "{restart_policy}": only "Never" is supported when podFailurePolicy is specified',
            )
        )
    if spec["podReplacementPolicy"] != "Failed":
        causes.append(_unsupported("spec.podReplacementPolicy", spec["podReplacementPolicy"], "Failed"))
    names = {container["name"] for container in spec["template"]["spec"]["containers"]}
    for index, rule in enumerate(spec["podFailurePolicy"]["rules"]):
        path = f"spec.podFailurePolicy.rules[{index}]"
        if rule["action"] not in ("Ignore", "FailJob", "Count", "FailIndex"):
            causes.append(_unsupported(f"{path}.action", rule["action"], "Count", "FailIndex", "FailJob", "Ignore"))
        codes = rule.get("onExitCodes")
        if (codes is None) == (not rule.get("onPodConditions")):
            causes.append(cause(path, "Invalid value: specifying one of OnExitCodes and OnPodConditions is required"))
        if codes is None:
            continue
        if codes["operator"] not in ("In", "NotIn"):
            causes.append(_unsupported(f"{path}.onExitCodes.operator", codes["operator"], "In", "NotIn"))
        if codes["operator"] == "In" and 0 in codes["values"]:
            causes.append(cause(f"{path}.onExitCodes.values", "Invalid value: 0: must not be 0 for the In operator"))
        if codes.get("containerName", next(iter(names))) not in names:
            causes.append(
                cause(
                    f"{path}.onExitCodes.containerName",
                    f'Invalid value: "{codes["containerName"]}": must be one of the container or initContainer names',
                )
            )
    return causes


def _pod_causes(pod: Document) -> list[Document]:
    return _pod_spec_causes(pod["spec"], "spec")


def _pod_spec_causes(spec: Document, path: str) -> list[Document]:
    causes = []
    if not spec["containers"]:
        causes.append(cause(f"{path}.containers", "Required value", "FieldValueRequired"))
    volumes = [volume["name"] for volume in spec.get("volumes") or ()]
    for index, name in enumerate(volumes):
        if name in volumes[:index]:
            causes.append(cause(f"{path}.volumes[{index}].name", f'Duplicate value: "{name}"', "FieldValueDuplicate"))
    for kind in ("initContainers", "containers"):
        names: set[str] = set()
        for index, container in enumerate(spec.get(kind) or ()):
            here = f"{path}.{kind}[{index}]"
            if container["name"] in names:
                causes.append(cause(f"{here}.name", f'Duplicate value: "{container["name"]}"', "FieldValueDuplicate"))
            names.add(container["name"])
            if not container.get("image"):
                causes.append(cause(f"{here}.image", "Required value", "FieldValueRequired"))
            for number, mount in enumerate(container.get("volumeMounts") or ()):
                if mount["name"] not in volumes:
                    causes.append(
                        cause(
                            f"{here}.volumeMounts[{number}].name", f'Not found: "{mount["name"]}"', "FieldValueNotFound"
                        )
                    )
            causes += _resource_causes(container.get("resources", {}), f"{here}.resources")
    if spec["restartPolicy"] not in ("Always", "OnFailure", "Never"):
        causes.append(_unsupported(f"{path}.restartPolicy", spec["restartPolicy"], "Always", "OnFailure", "Never"))
    return causes


def _resource_causes(resources: Document, path: str) -> list[Document]:
    causes = []
    for name, limit in resources.get("limits", {}).items():
        request = resources.get("requests", {}).get(name, limit)
        if quantity(request) > quantity(limit):
            causes.append(
                cause(
                    f"{path}.requests",
                    f'Invalid value: "{request}": must be less than or equal to {name} limit of {limit}',
                )
            )
    return causes


def quantity(text: str | float) -> float:
    """The number that a quantity such as 500m or 4Gi means."""
    match = re.fullmatch(r"([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi|)", str(text))
    if match is None:
        raise bad_request(
            f"quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$', got {text!r}"
        )
    number, unit = match.groups()
    factor = {"": 1.0, "m": 1e-3}.get(unit) or (1024.0 if unit.endswith("i") else 1000.0) ** (
        "kmgtp".index(unit[0].lower()) + 1
    )
    return float(number) * factor


def _service_causes(service: Document) -> list[Document]:
    spec = service["spec"]
    causes = []
    if spec["type"] not in ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"):
        causes.append(_unsupported("spec.type", spec["type"], "ClusterIP", "ExternalName", "LoadBalancer", "NodePort"))
    ports = spec.get("ports") or []
    if not ports and spec.get("clusterIP") != "None" and spec["type"] != "ExternalName":
        causes.append(cause("spec.ports", "Required value", "FieldValueRequired"))
    for index, port in enumerate(ports):
        if not 0 < port["port"] < 65536:
            causes.append(
                cause(
                    f"spec.ports[{index}].port",
                    f"Invalid value: {port['port']}: must be between 1 and 65535, inclusive",
                )
            )
        if len(ports) > 1 and not port.get("name"):
            causes.append(cause(f"spec.ports[{index}].name", "Required value", "FieldValueRequired"))
    return causes


def _config_causes(config: Document) -> list[Document]:
    both = set(config.get("data") or ()) & set(config.get("binaryData") or ())
    return [cause(f"data[{name}]", "Invalid value: duplicate of key present in binaryData") for name in sorted(both)]


def _unsupported(path: str, value: Any, *known: str) -> Document:
    listed = ", ".join(f'"{each}"' for each in known)
    return cause(path, f"Unsupported value: {_shown(value)}: supported values: {listed}", "FieldValueNotSupported")


def _cause_of(problem: Problem) -> Document:
    path = path_of(problem.absolute_path)
    if problem.validator == "required":
        name = re.match(r"'(.*?)' is a required", problem.message)
        assert name is not None
        return cause(path_of([*problem.absolute_path, name[1]]), "Required value", "FieldValueRequired")
    if problem.validator == "enum":
        return _unsupported(path, problem.instance, *map(str, problem.validator_value))
    return cause(
        path or "<nil>",
        f"Invalid value: {_shown(problem.instance)}: {path} in body {_said(problem)}",
        _reason_of(problem),
    )


def _said(problem: Problem) -> str:
    if problem.validator == "type":
        return f'must be of type {_wanted(problem)}: "{_type_of(problem.instance)}"'
    return f"must satisfy {problem.validator} {problem.validator_value}"


def _reason_of(problem: Problem) -> str:
    return "FieldValueTypeInvalid" if problem.validator == "type" else "FieldValueInvalid"


def _wanted(problem: Problem) -> str:
    wanted = problem.validator_value
    if not isinstance(wanted, list):
        return str(wanted)
    return " or ".join(str(each.get("type") if isinstance(each, dict) else each) for each in wanted if each != "null")


def _type_of(value: Any) -> str:
    for kind, name in ((bool, "bool"), (str, "string"), (dict, "object"), (list, "array")):
        if isinstance(value, kind):
            return name
    return "null" if value is None else "number"


def path_of(way: Any) -> str:
    """A path as messages have it: spec.containers[0].name."""
    return "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in way).removeprefix(".")


def _at(document: Document, path: str) -> Any:
    found: Any = document
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 200 else f"{text[:200]}..."
