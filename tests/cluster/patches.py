"""An object with a patch in it, for the three kinds of patch that kubectl sends: JSON, merge, and strategic merge."""

import copy
from typing import Any

from tests.cluster.refusals import Document, Refused, bad_request


def json_patched(document: Document, operations: list[Document]) -> Document:
    """As RFC 6902 has it."""
    whole: dict[str, Any] = {"": copy.deepcopy(document)}
    for operation in operations:
        try:
            _operate(whole, operation)
        except (KeyError, IndexError, ValueError, TypeError) as error:
            message = f"the server rejected our request due to an error in our request: {operation}: {error!r}"
            raise Refused(422, "Invalid", message) from error
    patched: Document = whole[""]
    return patched


def merge_patched(value: Any, patch: Any) -> Any:
    """As RFC 7386 has it: what is null goes, objects merge, the rest is replaced."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    merged = dict(value) if isinstance(value, dict) else {}
    for key, each in patch.items():
        if each is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patched(merged.get(key), each)
    return merged


def strategic_patched(value: Any, patch: Any, schema: Document) -> Any:
    """As a merge patch, but that lists merge where the schema says by which key, and `$` begins what says how."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    if patch.get("$patch") == "replace":
        return {key: copy.deepcopy(each) for key, each in patch.items() if key != "$patch"}
    merged = dict(value) if isinstance(value, dict) else {}
    if "$retainKeys" in patch:
        merged = {key: each for key, each in merged.items() if key in patch["$retainKeys"]}
    for key, each in patch.items():
        directive, _, name = key.partition("/")
        if key in ("$patch", "$retainKeys"):
            continue
        if directive == "$deleteFromPrimitiveList":
            merged[name] = [item for item in merged.get(name, ()) if item not in each]
        elif directive == "$setElementOrder":
            continue
        elif each is None:
            merged.pop(key, None)
        elif isinstance(each, list) and "merge" in below(schema, key).get("x-kubernetes-patch-strategy", ""):
            merged[key] = _merged_list(merged.get(key) or [], each, below(schema, key))
        else:
            merged[key] = strategic_patched(merged.get(key), each, below(schema, key))
    for key, order in patch.items():
        directive, _, name = key.partition("/")
        if directive == "$setElementOrder" and name in merged:
            merge_key = below(schema, name).get("x-kubernetes-patch-merge-key")
            merged[name] = _ordered(merged[name], order, merge_key)
    return merged


def below(schema: Document, name: str) -> Document:
    """The schema of a field; empty where it says nothing of it."""
    found = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
    return found if isinstance(found, dict) else {}


def _merged_list(current: list[Any], patch: list[Any], schema: Document) -> list[Any]:
    merge_key = schema.get("x-kubernetes-patch-merge-key")
    if merge_key is None:
        return [*current, *(each for each in patch if each not in current)]
    if any(each.get("$patch") == "replace" for each in patch):
        return [each for each in patch if each.get("$patch") != "replace"]
    merged = list(current)
    for each in patch:
        if merge_key not in each:
            raise bad_request(f"map: {each} does not contain declared merge key: {merge_key}")
        places = [place for place, item in enumerate(merged) if item.get(merge_key) == each[merge_key]]
        if each.get("$patch") == "delete":
            merged = [item for place, item in enumerate(merged) if place not in places]
        elif places:
            merged[places[0]] = strategic_patched(merged[places[0]], each, schema.get("items", {}))
        else:
            merged.append(strategic_patched({}, each, schema.get("items", {})))
    return merged


def _ordered(items: list[Any], order: list[Any], merge_key: str | None) -> list[Any]:
    """Items that the order names in its order, then the others."""
    wanted = [each[merge_key] if merge_key and isinstance(each, dict) else each for each in order]

    def place(item: Any) -> int:
        name = item.get(merge_key) if merge_key and isinstance(item, dict) else item
        return wanted.index(name) if name in wanted else len(wanted)

    return sorted(items, key=place)


def _operate(whole: dict[str, Any], operation: Document) -> None:
    """One operation of a JSON patch, in place."""
    kind = operation["op"]
    if kind in ("move", "copy"):
        value = copy.deepcopy(_found(whole, operation["from"]))
        if kind == "move":
            _operate(whole, {"op": "remove", "path": operation["from"]})
        _operate(whole, {"op": "add", "path": operation["path"], "value": value})
        return
    if kind == "test":
        if _found(whole, operation["path"]) != operation["value"]:
            raise ValueError("the value is another")
        return
    *way, last = _way(operation["path"])
    holder: Any = whole
    for step in way:
        holder = holder[int(step)] if isinstance(holder, list) else holder[step]
    if isinstance(holder, list):
        place = len(holder) if last == "-" else int(last)
        if kind == "add":
            holder.insert(place, copy.deepcopy(operation["value"]))
        elif kind == "replace":
            holder[place] = copy.deepcopy(operation["value"])
        else:
            del holder[place]
    elif kind == "add" or (kind == "replace" and last in holder):
        holder[last] = copy.deepcopy(operation["value"])
    elif kind == "remove":
        del holder[last]
    else:
        raise KeyError(last)


def _way(pointer: str) -> list[str]:
    return [step.replace("~1", "/").replace("~0", "~") for step in pointer.split("/")]


def _found(whole: dict[str, Any], pointer: str) -> Any:
    here: Any = whole
    for step in _way(pointer):
        here = here[int(step)] if isinstance(here, list) else here[step]
    return here
