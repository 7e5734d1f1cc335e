"""What each request of a client does to the state, and what it gets back: get, list, create, replace, patch, delete, evict."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from tests.cluster.kinds import Kind
from tests.cluster.ownership import applied, signed
from tests.cluster.patches import json_patched, merge_patched, strategic_patched
from tests.cluster.protobuf import decoded
from tests.cluster.refusals import Document, Refused, bad_request
from tests.cluster.rules import remove_fields, strict_error, unknown_fields
from tests.cluster.state import Signature, State, is_refusal, now
from tests.cluster.tables import table
from tests.k8s.schemas import schema_of

APPLY = "application/apply-patch+yaml"
_PATCHES = ("application/json-patch+json", "application/merge-patch+json", "application/strategic-merge-patch+json")


@dataclass(frozen=True)
class Target:
    """What a request is about."""

    kind: Kind
    namespace: str | None
    name: str | None
    subresource: str | None


@dataclass(frozen=True)
class Request:
    """What a client asks."""

    target: Target
    query: Mapping[str, str]
    body: bytes
    content_type: str
    accept: str
    user_agent: str

    @property
    def dry_run(self) -> bool:
        """Whether nothing shall be changed."""
        return "All" in self.query.get("dryRun", "")

    @property
    def manager(self) -> str:
        """Who changes fields."""
        return self.query.get("fieldManager") or self.user_agent.partition("/")[0] or "unknown"

    @property
    def wants_table(self) -> bool:
        """Whether the client prints columns."""
        return "as=Table" in self.accept


@dataclass(frozen=True)
class Answer:
    """What a client gets."""

    code: int
    body: Document
    warnings: list[str] = field(default_factory=list)


class Verbs:
    """Requests about the objects of one state."""

    def __init__(self, state: State) -> None:
        self._state = state

    def answer(self, method: str, request: Request) -> Answer:
        """Does what is asked; Refused where that cannot be."""
        target = request.target
        if target.subresource == "eviction" and method == "POST":
            return self._evict(request)
        if target.subresource not in (None, "status"):
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        if target.name is None:
            does = {"GET": self._list, "POST": self._create}.get(method)
        else:
            does = {"GET": self._get, "PUT": self._replace, "PATCH": self._patch, "DELETE": self._delete}.get(method)
        if does is None:
            raise Refused(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")
        return does(request)

    def _get(self, request: Request) -> Answer:
        target = request.target
        found = self._state.get(target.kind.name, target.namespace, _name(request))
        return Answer(200, self.shown([found], request) if request.wants_table else found)

    def _list(self, request: Request) -> Answer:
        kind, query = request.target.kind, request.query
        version = str(self._state.resource_version)
        found = self._state.list(
            kind.name, request.target.namespace, query.get("labelSelector"), query.get("fieldSelector")
        )
        if request.wants_table:
            return Answer(200, self.shown(found, request))
        body = {"kind": f"{kind.name}List", "apiVersion": kind.api_version, "metadata": {"resourceVersion": version}}
        return Answer(200, body | {"items": found})

    def shown(self, objects: list[Document], request: Request) -> Document:
        """Objects as a table."""
        version = str(self._state.resource_version)
        include = request.query.get("includeObject", "Metadata")
        return table(objects, request.target.kind, resource_version=version, include=include)

    def _create(self, request: Request) -> Answer:
        document, warnings = self._read(request)
        made = self._state.create(document, dry_run=request.dry_run, sign=self._signature(request))
        return Answer(201, made, warnings)

    def _replace(self, request: Request) -> Answer:
        document, warnings = self._read(request)
        replace = self._state.update_status if request.target.subresource else self._state.update
        return Answer(200, replace(document, dry_run=request.dry_run, sign=self._signature(request)), warnings)

    def _patch(self, request: Request) -> Answer:
        if request.content_type == APPLY:
            return self._apply(request)
        if request.content_type not in _PATCHES:
            raise _unsupported(request.content_type)
        target, warnings = request.target, []
        patch = _parsed(request)
        if target.kind.custom and request.content_type.startswith("application/strategic"):
            raise _unsupported(request.content_type)
        schema = self._schema(target.kind)

        def edit(document: Document) -> Document:
            if request.content_type == _PATCHES[0]:
                patched = json_patched(document, patch)
            elif request.content_type == _PATCHES[1]:
                patched = merge_patched(document, patch)
            else:
                patched = strategic_patched(document, patch, schema)
            warnings.extend(self._check_fields(patched, request))
            _check_place(patched, request)
            return patched

        done = self._state.change(
            target.kind.name,
            target.namespace,
            _name(request),
            edit,
            status=target.subresource == "status",
            dry_run=request.dry_run,
            sign=self._signature(request),
        )
        return Answer(200, done, warnings)

    def _apply(self, request: Request) -> Answer:
        """Server-side apply: makes the object, or what of it is this manager's."""
        target = request.target
        wanted = _parsed(request)
        if not isinstance(wanted, dict):
            raise bad_request("the body of an apply must be an object")
        ways = unknown_fields(_with_kind(wanted, request), self._state.version)
        if ways:
            where = f"{target.namespace}/{target.name}" if target.namespace else target.name
            said = ", ".join("." + ".".join(map(str, way)) for way in ways)
            raise Refused(
                500,
                "",
                f"failed to create typed patch object ({where}; {target.kind.api_version}, Kind={target.kind.name}): "
                f"{said}: field not declared in schema",
            )
        wanted.setdefault("metadata", {}).setdefault("name", target.name)
        _check_place(wanted, request)
        schema = self._schema(target.kind)
        force = request.query.get("force") == "true"

        def edit(document: Document | None) -> Document:
            return applied(document, wanted, schema, request.manager, force=force, subresource=target.subresource)

        try:
            done = self._state.change(
                target.kind.name,
                target.namespace,
                _name(request),
                edit,
                status=target.subresource == "status",
                dry_run=request.dry_run,
            )
        except Refused as error:
            if not is_refusal(error, 404) or target.subresource:
                raise
            return Answer(201, self._state.create(edit(None), dry_run=request.dry_run))
        return Answer(200, done)

    def _delete(self, request: Request) -> Answer:
        target = request.target
        options = {**request.query, **(_parsed(request) if request.body else {})}
        grace = options.get("gracePeriodSeconds")
        propagation = options.get("propagationPolicy") or (
            "Orphan" if options.get("orphanDependents") else "Background"
        )
        document = self._state.delete(
            target.kind.name,
            target.namespace,
            _name(request),
            None if grace is None else int(grace),
            propagation=propagation,
            uid=(options.get("preconditions") or {}).get("uid"),
            dry_run="All" in options.get("dryRun", "") or request.dry_run,
        )
        left = self._state.find(target.kind.name, target.namespace, _name(request))
        if left is not None and left["metadata"]["uid"] == document["metadata"]["uid"] and not request.dry_run:
            return Answer(200, left)
        details = {"name": target.name, "kind": target.kind.plural, "uid": document["metadata"]["uid"]}
        details |= {"group": target.kind.group} if target.kind.group else {}
        return Answer(200, _success() | {"details": details})

    def _evict(self, request: Request) -> Answer:
        """Deletes a pod, marked as what a disruption did: what drains and preemptions do."""
        target = request.target
        options = (_parsed(request) if request.body else {}).get("deleteOptions") or {}
        if request.dry_run or "All" in options.get("dryRun", ""):
            self._state.get("Pod", target.namespace, _name(request))
            return Answer(201, _success())
        condition = {
            "type": "DisruptionTarget",
            "status": "True",
            "reason": "EvictionByEvictionAPI",
            "message": "Eviction API: evicting",
            "lastTransitionTime": now(),
        }

        def mark(pod: Document) -> None:
            conditions = pod.setdefault("status", {}).setdefault("conditions", [])
            conditions[:] = [each for each in conditions if each["type"] != condition["type"]] + [condition]

        self._state.change("Pod", target.namespace, _name(request), mark, status=True)
        grace = options.get("gracePeriodSeconds")
        self._state.delete("Pod", target.namespace, _name(request), grace)
        return Answer(201, _success())

    def _read(self, request: Request) -> tuple[Document, list[str]]:
        """The object in a request's body, and what was not understood of it where that is only warned of."""
        document = _parsed(request)
        if not isinstance(document, dict):
            raise bad_request("the body must be an object")
        document = _with_kind(document, request)
        warnings = self._check_fields(document, request)
        _check_place(document, request)
        return document, warnings

    def _check_fields(self, document: Document, request: Request) -> list[str]:
        """Refuses unknown fields, or takes them out, as the client asks for."""
        ways = unknown_fields(document, self._state.version)
        if not ways:
            return []
        error = strict_error(request.target.kind, ways)
        validation = request.query.get("fieldValidation") or "Warn"
        if validation == "Strict":
            raise error
        remove_fields(document, ways)
        return [str(error).partition("strict decoding error: ")[2]] if validation == "Warn" else []

    def _schema(self, kind: Kind) -> Document:
        schema: Document = schema_of(kind.api_version, kind.name, self._state.version)
        return schema

    def _signature(self, request: Request) -> Signature:
        def sign(before: Document | None, after: Document) -> None:
            schema, subresource = self._schema(request.target.kind), request.target.subresource
            if before is not None and before["metadata"].get("managedFields") != after["metadata"].get("managedFields"):
                return  # the client itself says who has set what, as kubectl does when it changes to server-side apply
            after["metadata"]["managedFields"] = signed(before, after, schema, request.manager, subresource=subresource)

        return sign


def _name(request: Request) -> str:
    assert request.target.name is not None
    return request.target.name


def _parsed(request: Request) -> Any:
    """A request's body."""
    if "protobuf" in request.content_type:
        return decoded(request.body)
    try:
        text = request.body.decode()
        return yaml.safe_load(text) if "yaml" in request.content_type else json.loads(text)
    except (ValueError, yaml.YAMLError) as error:
        raise bad_request(f"the object provided is unrecognized: {error}") from error


def _with_kind(document: Document, request: Request) -> Document:
    """The object as what it is sent as; another's kind is refused."""
    kind = request.target.kind
    whole = {"apiVersion": kind.api_version, "kind": kind.name} | document
    if (whole["apiVersion"], whole["kind"]) != (kind.api_version, kind.name):
        raise bad_request(
            f"the API version in the data ({whole['apiVersion']}, {whole['kind']}) does not match the expected API version "
            f"({kind.api_version}, {kind.name})"
        )
    return whole


def _check_place(document: Document, request: Request) -> None:
    """Refuses an object that is sent to another's address."""
    target = request.target
    metadata = document.get("metadata") or {}
    if not isinstance(metadata, dict):
        return  # which the schema refuses with its path
    if target.kind.namespaced and target.namespace is not None:
        if metadata.setdefault("namespace", target.namespace) != target.namespace:
            raise bad_request("the namespace of the provided object does not match the namespace sent on the request")
        document["metadata"] = metadata
    if target.name is not None and metadata.get("name") != target.name:
        raise bad_request(
            f"the name of the object ({metadata.get('name')}) does not match the name on the URL ({target.name})"
        )


def _success() -> Document:
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}


def _unsupported(content_type: str) -> Refused:
    return Refused(
        415,
        "UnsupportedMediaType",
        f"the body of the request was in an unknown format - accepted media types include: {', '.join((*_PATCHES, APPLY))}; "
        f"got {content_type}",
    )
