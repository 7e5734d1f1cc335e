"""Pure: what a container sees of its pod and of objects beside it: variables, `$(NAME)` in its words, fields, amounts."""

import base64
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from tests.cluster.refusals import Document

FindObject = Callable[[str, str], Document | None]
"""The ConfigMap or Secret of a name in the pod's namespace: called with the kind and the name."""

_SUFFIXES: Final = {
    "n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15,
    "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50,
}  # fmt: skip
_REFERENCE: Final = re.compile(r"\$\$|\$\(([-._a-zA-Z][-._a-zA-Z0-9]*)\)")
_LABEL_FIELD: Final = re.compile(r"metadata\.(labels|annotations)\['([^']+)'\]")


class Unresolved(Exception):
    """Something that the pod refers to is not there: it waits until it comes."""


def amount(quantity: str | int | float) -> float:
    """The number that a quantity such as 500m or 4Gi is."""
    match = re.fullmatch(r"([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)([a-zA-Z]*)", str(quantity))
    if match is None or match[2] not in _SUFFIXES:
        raise ValueError(f"{quantity!r} is not a quantity such as 2, 500m or 4Gi.")
    return float(match[1]) * _SUFFIXES[match[2]]


def expand(text: str, variables: Mapping[str, str]) -> str:
    """The text with `$(NAME)` replaced where there is such a variable; `$$` is one dollar sign."""

    def replaced(match: re.Match[str]) -> str:
        return "$" if match[1] is None else variables.get(match[1], match[0])

    return _REFERENCE.sub(replaced, text)


def words_of(container: Document, variables: Mapping[str, str]) -> tuple[str, ...]:
    """What a container runs."""
    return tuple(expand(word, variables) for word in (*container.get("command", ()), *container.get("args", ())))


def variables_of(container: Document, pod: Document, find: FindObject) -> dict[str, str]:
    """A container's variables by name, without the image's; later ones may refer to earlier ones."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        kind, reference = (
            ("ConfigMap", source.get("configMapRef")) if "configMapRef" in source else ("Secret", source["secretRef"])
        )
        data = texts_of(kind, reference["name"], find, optional=reference.get("optional", False))
        found |= {f"{source.get('prefix', '')}{name}": value for name, value in data.items()}
    for entry in container.get("env", ()):
        value = _value_of(entry, pod, find) if "valueFrom" in entry else expand(entry.get("value", ""), found)
        if value is not None:
            found[entry["name"]] = value
    return found


def texts_of(kind: str, name: str, find: FindObject, *, optional: bool = False) -> dict[str, str]:
    """What a ConfigMap or Secret holds; nothing where it is missing and may be."""
    document = find(kind, name)
    if document is None:
        if optional:
            return {}
        raise Unresolved(f'{kind.lower()} "{name}" not found')
    data = dict(document.get("data") or {})
    if kind == "Secret":
        return {key: base64.b64decode(value).decode() for key, value in data.items()} | (
            document.get("stringData") or {}
        )
    return data


def field_of(pod: Document, path: str, resource: Document | None = None) -> str:
    """A field of the pod, as the downward API has it; '' where it has no value."""
    match = _LABEL_FIELD.fullmatch(path)
    if match is not None:
        return str(pod["metadata"].get(match[1], {}).get(match[2], ""))
    if path in ("metadata.labels", "metadata.annotations"):
        pairs = pod["metadata"].get(path.partition(".")[2], {})
        return "\n".join(f'{key}="{value}"' for key, value in sorted(pairs.items()))
    if path == "status.podIPs":
        return ",".join(each["ip"] for each in pod.get("status", {}).get("podIPs", ()))
    found: object = pod
    for name in path.split("."):
        found = found.get(name, "") if isinstance(found, dict) else ""
    return str(found)


def resource_of(containers: Iterable[Document], own: Document, reference: Document) -> str:
    """An amount that a container asked for, in units of the divisor, rounded up."""
    named = reference.get("containerName", own["name"])
    container = next(each for each in containers if each["name"] == named)
    kind, _, resource = reference["resource"].partition(".")
    resources = container.get("resources", {})
    asked = resources.get(kind, {}).get(resource)
    if asked is None and kind == "requests":  # what is limited and not asked for is asked for
        asked = resources.get("limits", {}).get(resource)
    divisor = amount(reference.get("divisor") or 1) or 1.0
    return str(math.ceil(round(amount(asked or 0) / divisor, 9)))


def _value_of(entry: Document, pod: Document, find: FindObject) -> str | None:
    source = entry["valueFrom"]
    if "fieldRef" in source:
        return field_of(pod, source["fieldRef"]["fieldPath"])
    if "resourceFieldRef" in source:
        containers = [*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]]
        own = next(each for each in containers if entry in each.get("env", ()))
        return resource_of(containers, own, source["resourceFieldRef"])
    kind, reference = (
        ("ConfigMap", source["configMapKeyRef"]) if "configMapKeyRef" in source else ("Secret", source["secretKeyRef"])
    )
    optional = reference.get("optional", False)
    data = texts_of(kind, reference["name"], find, optional=optional)
    if reference["key"] not in data:
        if optional:
            return None
        raise Unresolved(
            f"couldn't find key {reference['key']} in {kind} {pod['metadata']['namespace']}/{reference['name']}"
        )
    return data[reference["key"]]
