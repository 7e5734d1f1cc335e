"""Strict validators of manifests: Kubernetes' own schemas, and those of the genuine definitions in tests/crds.

Unknown fields, wrong types and missing required fields are refused, with a path. Not checked: rules in CEL, defaulting, and
what webhooks and quotas would say.
"""

import copy
import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import jsonschema
import yaml
from kubernetes_validate.utils import all_versions, major_minor, schema_contents

Document = dict[str, Any]
Problem: TypeAlias = jsonschema.exceptions.ValidationError

CRDS = Path(__file__).parent.parent / "crds"
VERSIONS = tuple(version for version in map(major_minor, all_versions()) if int(version.partition(".")[2]) >= 29)
NEWEST = VERSIONS[-1]
_OBJECT_META = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"


def refusal(document: Document, version: str = NEWEST) -> str | None:
    """Why a manifest is refused, with the path; None where it is valid."""
    problem = jsonschema.exceptions.best_match(problems(document, version))
    return None if problem is None else f"{'.'.join(map(str, problem.absolute_path))}: {problem.message}"


def problems(document: Document, version: str = NEWEST) -> Iterator[Problem]:
    """Everything that is wrong with a manifest."""
    yield from _validator(document["apiVersion"], document["kind"], version).iter_errors(document)


def is_namespaced(document: Document) -> bool:
    """Whether objects of its kind live in a namespace."""
    definition = custom_definitions().get((document["apiVersion"].partition("/")[0], document["kind"]))
    return definition["spec"]["scope"] == "Namespaced" if definition is not None else document["kind"] != "Namespace"


@dataclass(frozen=True)
class Mutation:
    """A manifest with one field wrong."""

    what: str
    document: Document
    validator: jsonschema.Draft202012Validator
    # The part that was changed and the schema of it, so that a test may check a manifest of a thousand lines in microseconds
    part: Any
    schema: Any


def mutations(document: Document, version: str = NEWEST) -> Iterator[Mutation]:
    """Every manifest that differs by an unknown field, a wrong type or a missing required field in one place."""

    def walk(
        value: Any, schema: Any, path: tuple[str | int, ...]
    ) -> Iterator[tuple[str, tuple[str | int, ...], Any, Any]]:
        wrong = "a word" if isinstance(value, list) else [["a list"]]
        yield "wrong type", path, wrong, schema
        if isinstance(value, dict):
            known = schema.get("properties")
            if known is not None and not _is_open(schema):
                yield "unknown field", path, value | {"unknownField": 1}, schema
            for name in schema.get("required", ()):
                yield f"without {name}", path, {key: each for key, each in value.items() if key != name}, schema
            rest = schema.get("additionalProperties")
            for key, each in value.items():
                below = (known or {}).get(key, rest if isinstance(rest, dict) else None)
                if below is not None:
                    yield from walk(each, below, (*path, key))
        elif isinstance(value, list) and isinstance(schema.get("items"), dict):
            for index, each in enumerate(value):
                yield from walk(each, schema["items"], (*path, index))

    whole = _validator(document["apiVersion"], document["kind"], version)
    for what, path, part, schema in walk(document, whole.schema, ()):
        if path:
            yield Mutation(f"{'.'.join(map(str, path))}: {what}", _with(document, path, part), whole, part, schema)
        elif isinstance(part, dict):
            yield Mutation(f"the document: {what}", part, whole, part, schema)


def is_part_valid(mutation: Mutation) -> bool:
    """Whether the changed part passes by itself."""
    return bool(jsonschema.Draft202012Validator(mutation.schema).is_valid(mutation.part))


def is_whole_valid(mutation: Mutation) -> bool:
    """Whether the manifest that has the changed part passes."""
    return bool(mutation.validator.is_valid(mutation.document))


def _with(document: Document, path: tuple[str | int, ...], part: Any) -> Document:
    """A copy with another part in one place; everything beside the path is shared."""
    changed = copy.copy(document)
    here: Any = changed
    for key in path[:-1]:
        here[key] = copy.copy(here[key])
        here = here[key]
    here[path[-1]] = part
    return changed


def _is_open(schema: Any) -> bool:
    return (
        bool(schema.get("x-kubernetes-preserve-unknown-fields"))
        or schema.get("additionalProperties", True) is not False
    )


@cache
def _validator(api_version: str, kind: str, version: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(schema_of(api_version, kind, version))


@cache
def schema_of(api_version: str, kind: str, version: str) -> Any:
    """The strict schema of a kind, with nothing in it to look up; lists say by which keys they are merged."""
    group, _, served_as = api_version.rpartition("/")
    definition = custom_definitions().get((group, kind))
    if definition is None:
        short = "-".join(filter(None, (group.partition(".")[0], served_as)))
        return _whole(schema_contents(f"{_folder(version)}/{kind.lower()}-{short}.json", version), version)
    served = next(each for each in definition["spec"]["versions"] if each["name"] == served_as and each["served"])
    schema = _strict(served["schema"]["openAPIV3Schema"])
    schema["properties"] |= {
        "metadata": _definition(_OBJECT_META, version),
        "apiVersion": {"const": api_version},
        "kind": {"const": kind},
    }
    schema["required"] = sorted({*schema.get("required", ()), "metadata"})
    return schema


def _strict(schema: Any) -> Any:
    """A structural schema as strict JSON Schema."""
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made: dict[str, Any] = {
        key: value
        for key, value in schema.items()
        if key
        in (
            "type",
            "required",
            "enum",
            "pattern",
            "minimum",
            "maximum",
            "minLength",
            "maxLength",
            "minItems",
            "maxItems",
            "default",
            "x-kubernetes-list-type",
            "x-kubernetes-list-map-keys",
        )
    }
    if "properties" in schema:
        made["properties"] = {name: _strict(each) for name, each in schema["properties"].items()}
        made["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    elif isinstance(schema.get("additionalProperties"), dict):
        made["additionalProperties"] = _strict(schema["additionalProperties"])
    if "items" in schema:
        made["items"] = _strict(schema["items"])
    if schema.get("nullable") and "type" in made:
        made["type"] = [made["type"], "null"]
    return made


def _whole(schema: Any, version: str) -> Any:
    """The schema with what it refers to in place: nothing in it is looked up while a manifest is checked."""
    if isinstance(schema, list):
        return [_whole(each, version) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if isinstance(reference := schema.get("$ref"), str):
        return _definition(reference.rpartition("/")[2], version)
    return {key: _whole(each, version) for key, each in schema.items() if key not in ("description", "format")}


@cache
def _definition(name: str, version: str) -> Any:
    return _whole(_definitions(version)["$defs"][name], version)


def _folder(version: str) -> str:
    return f"kubernetes-json-schema/v{version}.0-local-strict"


@cache
def _definitions(version: str) -> Any:
    return schema_contents(f"{_folder(version)}/_definitions.json", version)


@cache
def custom_definitions() -> dict[tuple[str, str], Any]:
    """The definitions in tests/crds by group and kind."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found = [yaml.load(gzip.decompress(path.read_bytes()), loader) for path in sorted(CRDS.glob("*.yaml.gz"))]
    return {(each["spec"]["group"], each["spec"]["names"]["kind"]): each for each in found}
