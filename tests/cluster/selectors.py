"""Whether an object is one of those that a selector means: labels as in `a=b,c in (d, e),!f`, fields as in `metadata.name=x`."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from tests.cluster.refusals import Document, bad_request

Test = Callable[[Document], bool]

_TERM = re.compile(
    r"\s*(?:(?P<absent>!)\s*(?P<none>[\w./-]+)"
    r"|(?P<key>[\w./-]+)\s*(?:(?P<sign>==|=|!=)\s*(?P<value>[\w.-]*)|(?P<word>in|notin)\s*\((?P<values>[^)]*)\))?)\s*(?:,|$)"
)


def labels_test(selector: str | Mapping[str, str] | None) -> Test:
    """A test of labels; a mapping means all of its pairs."""
    if isinstance(selector, Mapping):
        pairs = dict(selector)
        return lambda document: pairs.items() <= labels_of(document).items()
    tests: list[Callable[[Mapping[str, str]], bool]] = []
    position = 0
    text = selector or ""
    while position < len(text):
        match = _TERM.match(text, position)
        if match is None:
            raise bad_request(f"unable to parse requirement: {text[position:]!r} in selector {text!r}")
        tests.append(_label_term(match))
        position = match.end()
    return lambda document: all(test(labels_of(document)) for test in tests)


def fields_test(selector: str | None) -> Test:
    """A test of fields by their path."""
    wanted: list[tuple[str, bool, str]] = []
    for term in filter(None, (selector or "").split(",")):
        path, sign, value = re.split(r"(==|!=|=)", term, maxsplit=1)
        wanted.append((path, sign != "!=", value))
    return lambda document: all((str(_at(document, path) or "") == value) is same for path, same, value in wanted)


def labels_of(document: Document) -> dict[str, str]:
    """An object's labels."""
    return document["metadata"].get("labels") or {}


def _label_term(match: re.Match[str]) -> Callable[[Mapping[str, str]], bool]:
    if match["absent"]:
        return lambda labels: match["none"] not in labels
    key = match["key"]
    if match["word"]:
        values = {each.strip() for each in match["values"].split(",")}
        return lambda labels: (labels.get(key) in values) is (match["word"] == "in")
    if match["sign"]:
        return lambda labels: (labels.get(key) == match["value"]) is (match["sign"] != "!=")
    return lambda labels: key in labels


def _at(document: Document, path: str) -> Any:
    found: Any = document
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found
