"""What containers see of their pod and of objects beside it."""

import pytest

from tests.cluster.environment import Unresolved, amount, expand, field_of, variables_of, words_of
from tests.cluster.refusals import Document

OBJECTS: dict[tuple[str, str], Document] = {
    ("ConfigMap", "settings"): {"data": {"COLOUR": "blue", "SIZE": "3"}},
    ("Secret", "keys"): {"data": {"KEY": "aHVzaA=="}},
}


def find(kind: str, name: str) -> Document | None:
    return OBJECTS.get((kind, name))


def pod(container: Document) -> Document:
    return {
        "metadata": {"name": "job-0-abcde", "namespace": "space", "labels": {"a/b": "c"}},
        "spec": {"containers": [container], "nodeName": "double"},
        "status": {"podIP": "10.0.0.1"},
    }


def seen(container: Document) -> dict[str, str]:
    return variables_of({"name": "main"} | container, pod({"name": "main"} | container), find)


def test_variables_refer_to_those_before_them() -> None:
    found = seen(
        {"env": [{"name": "A", "value": "1"}, {"name": "B", "value": "$(A)2 $(C) $$(A)"}, {"name": "C", "value": "3"}]}
    )
    assert found == {"A": "1", "B": "12 $(C) $(A)", "C": "3"}


def test_whole_objects_come_first_and_single_variables_win() -> None:
    source = [{"configMapRef": {"name": "settings"}}, {"secretRef": {"name": "keys"}, "prefix": "MY_"}]
    assert seen({"envFrom": source, "env": [{"name": "SIZE", "value": "4"}]}) == {
        "COLOUR": "blue",
        "SIZE": "4",
        "MY_KEY": "hush",
    }


def test_values_come_from_fields_amounts_and_keys() -> None:
    env = [
        {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "LABEL", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['a/b']"}}},
        {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        {"name": "CORES", "valueFrom": {"resourceFieldRef": {"resource": "requests.cpu", "divisor": "0"}}},
        {"name": "MEMORY", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory", "divisor": "1Mi"}}},
        {"name": "SIZE", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "SIZE"}}},
        {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "KEY"}}},
        {"name": "NONE", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "OTHER", "optional": True}}},
    ]
    resources = {"requests": {"cpu": "1500m"}, "limits": {"memory": "2Gi"}}
    assert seen({"env": env, "resources": resources}) == {
        "IP": "10.0.0.1", "LABEL": "c", "NODE": "double", "CORES": "2", "MEMORY": "2048", "SIZE": "3", "KEY": "hush",
    }  # fmt: skip


def test_what_is_missing_is_named() -> None:
    with pytest.raises(Unresolved, match='secret "other" not found'):
        seen({"envFrom": [{"secretRef": {"name": "other"}}]})
    with pytest.raises(Unresolved, match="couldn't find key NAME in ConfigMap space/settings"):
        seen({"env": [{"name": "A", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "NAME"}}}]})


def test_words_are_expanded_and_what_is_unknown_stays() -> None:
    assert words_of({"command": ["run", "$(A)"], "args": ["$(B)", "$$(A)"]}, {"A": "1"}) == ("run", "1", "$(B)", "$(A)")
    assert expand("$(not a name) $", {}) == "$(not a name) $"


def test_quantities_and_fields_are_read() -> None:
    assert [amount(each) for each in ("2", "500m", "4Gi", "1k", 3, "1e3")] == [2, 0.5, 4 * 2**30, 1000, 3, 1000]
    with pytest.raises(ValueError, match="'4 GB' is not a quantity"):
        amount("4 GB")
    assert field_of(pod({"name": "main"}), "metadata.labels") == 'a/b="c"'
    assert field_of(pod({"name": "main"}), "spec.none") == ""
