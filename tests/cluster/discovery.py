"""What the double says it serves: groups, kinds, and where kubectl may leave the checking of fields to the server."""

from collections.abc import Iterable, Mapping

from tests.cluster.kinds import Kind
from tests.cluster.refusals import Document

_VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]
_QUERY_PARAMETERS = ("dryRun", "fieldManager", "fieldValidation", "force")


def version_of(kubernetes: str) -> Document:
    """The answer at /version: the Kubernetes whose schemas are checked against."""
    major, minor = kubernetes.split(".")[:2]
    return {
        "major": major,
        "minor": minor,
        "gitVersion": f"v{major}.{minor}.0",
        "gitCommit": "",
        "gitTreeState": "",
        "buildDate": "",
        "goVersion": "",
        "compiler": "",
        "platform": "viewpoint/double",
    }


def groups_of(kinds: Iterable[Kind]) -> Document:
    """The answer at /apis."""
    versions: dict[str, str] = {kind.group: kind.version for kind in kinds if kind.group}
    versions["authorization.k8s.io"] = "v1"
    return {
        "kind": "APIGroupList",
        "apiVersion": "v1",
        "groups": [_group(name, version) for name, version in sorted(versions.items())],
    }


def resources_of(kinds: Iterable[Kind], group: str, version: str) -> Document | None:
    """The answer at /api/v1 and /apis/GROUP/VERSION; None where nothing is served there."""
    resources = []
    for kind in kinds:
        if (kind.group, kind.version) == (group, version):
            resources.append(_resource(kind))
            resources += [_subresource(kind, "status", kind.name)] if kind.has_status else []
        if kind.name == "Pod" and (group, version) == ("", "v1"):
            resources.append(_subresource(kind, "log", "Pod", ["get"]))
            eviction = _subresource(kind, "eviction", "Eviction", ["create"])
            resources.append(eviction | {"group": "policy", "version": "v1"})
    if (group, version) == ("authorization.k8s.io", "v1"):
        name = "selfsubjectaccessreview"
        resources.append(
            {"name": f"{name}s", "singularName": name, "namespaced": False, "kind": "SelfSubjectAccessReview"}
            | {"verbs": ["create"]}
        )
    if not resources:
        return None
    whole = f"{group}/{version}" if group else version
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": whole, "resources": resources}


def openapi_paths(kinds: Iterable[Kind]) -> Document:
    """The answer at /openapi/v3."""
    versions = sorted({("apis/" if kind.group else "api/") + kind.api_version for kind in kinds})
    return {"paths": {each: {"serverRelativeURL": f"/openapi/v3/{each}"} for each in versions}}


def openapi_of(kinds: Iterable[Kind], group: str, version: str) -> Document:
    """One group's part of /openapi/v3: no schemas, as the server checks; only that it does."""
    served = [kind for kind in kinds if (kind.group, kind.version) == (group, version)]
    return {
        "openapi": "3.0.0",
        "info": {"title": "Viewpoint's cluster double", "version": "1"},
        "paths": dict(path for kind in served for path in _paths(kind)),
    }


def _paths(kind: Kind) -> list[tuple[str, Document]]:
    prefix = f"/apis/{kind.api_version}" if kind.group else f"/api/{kind.version}"
    place = "/namespaces/{namespace}" if kind.namespaced else ""
    operation = {
        "parameters": [
            {"name": name, "in": "query", "schema": {"type": "string", "uniqueItems": True}}
            for name in _QUERY_PARAMETERS
        ],
        "responses": {"200": {"description": "OK"}},
        "x-kubernetes-group-version-kind": {"group": kind.group, "version": kind.version, "kind": kind.name},
    }
    every = f"{prefix}{place}/{kind.plural}"
    one = operation | {"x-kubernetes-action": "patch"}
    return [(every, {"post": operation}), (f"{every}/{{name}}", {"put": operation, "patch": one})]


def _group(name: str, version: str) -> Document:
    served: Mapping[str, str] = {"groupVersion": f"{name}/{version}", "version": version}
    return {"name": name, "versions": [served], "preferredVersion": served}


def _resource(kind: Kind) -> Document:
    made: Document = {
        "name": kind.plural,
        "singularName": kind.name.lower(),
        "namespaced": kind.namespaced,
        "kind": kind.name,
        "verbs": _VERBS,
    }
    made |= {"shortNames": list(kind.short)} if kind.short else {}
    return made | ({"categories": list(kind.categories)} if kind.categories else {})


def _subresource(kind: Kind, name: str, shown: str, verbs: list[str] | None = None) -> Document:
    return {
        "name": f"{kind.plural}/{name}",
        "singularName": "",
        "namespaced": kind.namespaced,
        "kind": shown,
        "verbs": verbs or ["get", "patch", "update"],
    }
