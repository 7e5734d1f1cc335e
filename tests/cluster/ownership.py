"""Who has set which fields of an object (metadata.managedFields), and server-side apply, which goes by that.

A field is a path of steps as managedFields write them: `f:spec`, `k:{"name":"viewpoint"}` for an item of a list with keys,
`v:"a"` for one of a set.
"""

import copy
import json
from typing import Any

from tests.cluster.patches import below
from tests.cluster.refusals import Document, Refused
from tests.cluster.state import now

Path = tuple[str, ...]
Fields = set[Path]

_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
_NOBODYS = ("apiVersion", "kind")
_METADATA_OF_SERVER = (
    "name",
    "namespace",
    "uid",
    "creationTimestamp",
    "generation",
    "resourceVersion",
    "managedFields",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "generateName",
    "selfLink",
)


def fields_of(document: Document, schema: Document) -> Fields:
    """The fields that an object has; those that the server alone sets are left out."""
    own = {key: value for key, value in document.items() if key not in _NOBODYS}
    metadata = {key: value for key, value in own.get("metadata", {}).items() if key not in _METADATA_OF_SERVER}
    own["metadata"] = metadata
    if not metadata:
        del own["metadata"]
    return set(_walk(own, schema, ())) - {()}


def signed(
    before: Document | None, after: Document, schema: Document, manager: str, *, subresource: str | None = None
) -> list[Document]:
    """managedFields after `manager` made a change without apply: what it changed is its own, and nobody else's."""
    there = fields_of(after, schema)
    there = {path for path in there if (path[0] == "f:status") is (subresource == "status")}
    if before is not None:
        old = fields_of(before, schema)
        changed = {path for path in there if path not in old or _value(before, path) != _value(after, path)}
        removed = {path for path in old if _value(after, path) is _NOTHING}
    else:
        changed, removed = there, set()
    entries = copy.deepcopy((before or {}).get("metadata", {}).get("managedFields", []))
    own = (manager, "Update", subresource)
    kept: list[Document] = []
    mine: Fields = set(changed)
    for entry in entries:
        owned = _read(entry["fieldsV1"])
        if _who(entry) == own:
            mine |= owned - removed
            continue
        left = owned - removed - _leaves(changed)
        if left:
            kept.append(entry if left == owned else entry | {"fieldsV1": _written(left)})
    if mine:
        former = next((entry for entry in entries if _who(entry) == own), None)
        if former is not None and _read(former["fieldsV1"]) == mine and not changed:
            return [*kept, former]
        kept.append(_entry(after, manager, "Update", mine, subresource))
    return kept


def applied(
    current: Document | None, wanted: Document, schema: Document, manager: str, *, force: bool, subresource: str | None
) -> Document:
    """The object after server-side apply of what `manager` wants of it, managedFields included.

    Refused (409) where another manager has set one of its fields to another value, unless forced.
    """
    wanted = copy.deepcopy(wanted)
    wanted.get("metadata", {}).pop("managedFields", None)
    fields = fields_of(wanted, schema)
    entries = copy.deepcopy((current or {}).get("metadata", {}).get("managedFields", []))
    own = (manager, "Apply", subresource)
    formerly: Fields = set()
    others: list[Document] = []
    conflicts: list[Document] = []
    allowed = _of_earlier_apply(current, schema) if manager == "kubectl" else set()
    for entry in entries:
        owned = _read(entry["fieldsV1"])
        if _who(entry) == own:
            formerly = owned
            continue
        taken = {path for path in _leaves(fields & owned) if _value(current, path) != _value(wanted, path)}
        if not force and taken - allowed:
            conflicts += [_conflict(entry, path) for path in sorted(taken - allowed)]
        if owned - taken:
            others.append(entry if not taken else entry | {"fieldsV1": _written(owned - taken)})
    if conflicts:
        raise _refusal(conflicts)
    merged: Document = _merged(current or {}, wanted, schema)
    held = set().union(*(_read(entry["fieldsV1"]) for entry in others))
    for path in sorted(formerly - fields - held, key=len):  # an item of a list before the keys that it is found by
        if not any(other[: len(path)] == path for other in held | fields):
            _remove(merged, path)
    entry = _entry(wanted, manager, "Apply", fields, subresource)
    former = next((each for each in entries if _who(each) == own), None)
    if former is not None and former["fieldsV1"] == entry["fieldsV1"]:
        entry = former
    merged.setdefault("metadata", {})["managedFields"] = [*others, entry]
    return merged


def _of_earlier_apply(current: Document | None, schema: Document) -> Fields:
    """The fields that the same person set by client-side apply: kubectl may take those over."""
    annotations = (current or {}).get("metadata", {}).get("annotations", {})
    return fields_of(json.loads(annotations.get(_LAST_APPLIED, "{}")), schema)


def _refusal(conflicts: list[Document]) -> Refused:
    said = [f"{each['message']}: {each['field']}" for each in conflicts]
    many = "1 conflict" if len(said) == 1 else f"{len(said)} conflicts"
    return Refused(409, "Conflict", f"Apply failed with {many}: {', '.join(said)}", {"causes": conflicts})


def _conflict(entry: Document, path: Path) -> Document:
    return {
        "reason": "FieldManagerConflict",
        "message": f'conflict with "{entry["manager"]}" using {entry["apiVersion"]}',
        "field": "".join(f".{step[2:]}" if step[0] == "f" else f"[{step[2:]}]" for step in path),
    }


def _who(entry: Document) -> tuple[str, str, str | None]:
    return entry["manager"], entry["operation"], entry.get("subresource")


def _entry(document: Document, manager: str, operation: str, fields: Fields, subresource: str | None) -> Document:
    made: Document = {
        "manager": manager,
        "operation": operation,
        "apiVersion": document["apiVersion"],
        "time": now(),
        "fieldsType": "FieldsV1",
        "fieldsV1": _written(fields),
    }
    if subresource:
        made["subresource"] = subresource
    return made


def _written(fields: Fields) -> Document:
    """Fields as managedFields have them."""
    written: Document = {}
    for path in sorted(fields):
        here = written
        for step in path:
            here = here.setdefault(step, {})
    for path in fields:
        here = written
        for step in path:
            here = here[step]
        if here:
            here["."] = {}
    return written


def _read(written: Document, path: Path = ()) -> Fields:
    if not written:
        return {path}
    found: Fields = set()
    for step, rest in written.items():
        found |= {path} if step == "." else _read(rest, (*path, step))
    return found


def _leaves(fields: Fields) -> Fields:
    """Fields without others below them: an item of a list may be several managers', its fields are one's."""
    inner = {path[:length] for path in fields for length in range(1, len(path))}
    return {path for path in fields if path not in inner}


def _walk(value: Any, schema: Document, path: Path) -> list[Path]:
    if isinstance(value, dict) and value and schema.get("x-kubernetes-map-type") != "atomic":
        return [found for key, each in value.items() for found in _walk(each, below(schema, key), (*path, f"f:{key}"))]
    kind = schema.get("x-kubernetes-list-type")
    if isinstance(value, list) and value and kind == "map":
        found = []
        for item in value:
            step = (*path, _key_step(item, schema))
            found += [step, *(_walk(item, schema.get("items", {}), step))]
        return found
    if isinstance(value, list) and value and kind == "set":
        return [(*path, f"v:{json.dumps(item)}") for item in value]
    return [path]


def _key_step(item: Document, schema: Document) -> str:
    keys = {}
    for name in schema["x-kubernetes-list-map-keys"]:
        default = below(schema.get("items", {}), name).get("default", "TCP" if name == "protocol" else None)
        keys[name] = item.get(name, default)
    return f"k:{json.dumps(keys, sort_keys=True, separators=(',', ':'))}"


class _Nothing:
    """What a path leads to where nothing is."""


_NOTHING = _Nothing()


def _value(document: Any, path: Path) -> Any:
    here = document
    for step in path:
        here = _below_value(here, step)
        if here is _NOTHING:
            return _NOTHING
    return here


def _below_value(here: Any, step: str) -> Any:
    kind, name = step[0], step[2:]
    if kind == "f":
        return here.get(name, _NOTHING) if isinstance(here, dict) else _NOTHING
    if not isinstance(here, list):
        return _NOTHING
    if kind == "v":
        return next((item for item in here if item == json.loads(name)), _NOTHING)
    return next((item for item in here if _has_keys(item, json.loads(name))), _NOTHING)


def _has_keys(item: Any, keys: Document) -> bool:
    return isinstance(item, dict) and all(
        item.get(name, "TCP" if name == "protocol" else None) == value for name, value in keys.items()
    )


def _remove(document: Document, path: Path) -> None:
    *way, last = path
    holder = _value(document, tuple(way))
    found = _below_value(holder, last)
    if found is _NOTHING:
        return
    if isinstance(holder, dict):
        del holder[last[2:]]
        return
    holder.remove(found)
    if not holder:  # an empty list is the same as none
        _remove(document, tuple(way))


def _merged(current: Any, wanted: Any, schema: Document) -> Any:
    """Objects merge, lists with keys merge by them, sets unite, the rest is replaced."""
    if isinstance(wanted, dict) and isinstance(current, dict) and schema.get("x-kubernetes-map-type") != "atomic":
        merged = copy.deepcopy(current)
        for key, each in wanted.items():
            merged[key] = _merged(current.get(key), each, below(schema, key))
        return merged
    kind = schema.get("x-kubernetes-list-type")
    if isinstance(wanted, list) and isinstance(current, list) and kind == "set":
        return [*current, *(each for each in wanted if each not in current)]
    if isinstance(wanted, list) and isinstance(current, list) and kind == "map":
        items = {_key_step(item, schema): item for item in current}
        steps = {_key_step(item, schema): item for item in wanted}
        changed = {step: _merged(items.get(step), item, schema.get("items", {})) for step, item in steps.items()}
        return [*changed.values(), *(copy.deepcopy(item) for step, item in items.items() if step not in steps)]
    return copy.deepcopy(wanted)
