"""The three kinds of patch, and managed fields, on small objects."""

import copy

import pytest

from tests.cluster.ownership import applied, fields_of, signed
from tests.cluster.patches import json_patched, merge_patched, strategic_patched
from tests.cluster.refusals import Refused
from tests.k8s.schemas import NEWEST, Document, schema_of

POD = schema_of("v1", "Pod", NEWEST)


def pod(*containers: Document, **spec: object) -> Document:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "p"},
        "spec": {"containers": list(containers), **spec},
    }


def test_a_merge_patch_removes_what_is_null_and_replaces_lists() -> None:
    before = {"a": {"x": 1, "y": 2}, "l": [1, 2]}
    assert merge_patched(before, {"a": {"x": None, "z": 3}, "l": [3]}) == {"a": {"y": 2, "z": 3}, "l": [3]}
    assert before == {"a": {"x": 1, "y": 2}, "l": [1, 2]}


def test_a_json_patch_does_what_its_operations_say() -> None:
    before = {"a": {"x/y": 1}, "l": [1, 2]}
    operations: list[Document] = [
        {"op": "test", "path": "/l/0", "value": 1},
        {"op": "add", "path": "/l/-", "value": 3},
        {"op": "add", "path": "/l/0", "value": 0},
        {"op": "replace", "path": "/a/x~1y", "value": 2},
        {"op": "copy", "from": "/l/3", "path": "/c"},
        {"op": "move", "from": "/a", "path": "/b"},
        {"op": "remove", "path": "/l/1"},
    ]
    assert json_patched(before, operations) == {"b": {"x/y": 2}, "l": [0, 2, 3], "c": 3}
    for operation in ({"op": "test", "path": "/l/0", "value": 2}, {"op": "replace", "path": "/none", "value": 1}):
        with pytest.raises(Refused, match="rejected our request"):
            json_patched(before, [operation])


def test_a_strategic_patch_merges_lists_by_their_keys() -> None:
    before = pod({"name": "a", "image": "1", "args": ["x"]}, {"name": "b", "image": "1"})
    patch = {
        "spec": {
            "$setElementOrder/containers": [{"name": "c"}, {"name": "a"}],
            "containers": [
                {"name": "a", "args": ["y", "z"]},
                {"name": "b", "$patch": "delete"},
                {"name": "c", "image": "2"},
            ],
        }
    }
    after = strategic_patched(before, patch, POD)
    assert after["spec"]["containers"] == [
        {"name": "c", "image": "2"},
        {"name": "a", "image": "1", "args": ["y", "z"]},
    ]
    replaced = strategic_patched(before, {"spec": {"containers": [{"$patch": "replace"}, {"name": "z"}]}}, POD)
    assert replaced["spec"]["containers"] == [{"name": "z"}]
    with pytest.raises(Refused, match="does not contain declared merge key: name"):
        strategic_patched(before, {"spec": {"containers": [{"image": "2"}]}}, POD)


def test_a_strategic_patch_removes_from_lists_of_words_and_keeps_to_one_kind_of_volume() -> None:
    before = pod({"name": "a"}, volumes=[{"name": "v", "emptyDir": {}}])
    before["metadata"]["finalizers"] = ["x/a", "x/b"]
    patch = {
        "metadata": {"$deleteFromPrimitiveList/finalizers": ["x/a"], "finalizers": ["x/c"]},
        "spec": {"volumes": [{"$retainKeys": ["name", "configMap"], "name": "v", "configMap": {"name": "c"}}]},
    }
    after = strategic_patched(before, patch, POD)
    assert after["metadata"]["finalizers"] == ["x/b", "x/c"]
    assert after["spec"]["volumes"] == [{"name": "v", "configMap": {"name": "c"}}]


def test_apply_gives_up_what_is_no_longer_wanted_and_nobody_else_wants() -> None:
    first = applied(
        None,
        pod({"name": "a", "image": "1", "env": [{"name": "X", "value": "1"}]}),
        POD,
        "one",
        force=False,
        subresource=None,
    )
    both = applied(
        first,
        pod({"name": "a", "env": [{"name": "Y", "value": "2"}]}, {"name": "b"}),
        POD,
        "two",
        force=False,
        subresource=None,
    )
    assert both["spec"]["containers"][0]["env"] == [{"name": "Y", "value": "2"}, {"name": "X", "value": "1"}]
    less = applied(both, pod({"name": "a", "image": "1"}), POD, "one", force=False, subresource=None)
    assert less["spec"]["containers"] == [
        {"name": "a", "env": [{"name": "Y", "value": "2"}], "image": "1"},
        {"name": "b"},
    ]
    none = applied(less, pod({"name": "a"}), POD, "two", force=False, subresource=None)
    assert none["spec"]["containers"] == [{"name": "a", "image": "1"}]


def test_ports_without_a_protocol_are_those_of_tcp() -> None:
    first = applied(
        None, pod({"name": "a", "ports": [{"containerPort": 80}]}), POD, "one", force=False, subresource=None
    )
    filled = copy.deepcopy(first)
    filled["spec"]["containers"][0]["ports"][0]["protocol"] = "TCP"
    again = applied(
        filled,
        pod({"name": "a", "ports": [{"containerPort": 80, "name": "web"}]}),
        POD,
        "one",
        force=False,
        subresource=None,
    )
    assert again["spec"]["containers"][0]["ports"] == [{"containerPort": 80, "protocol": "TCP", "name": "web"}]


def test_a_change_takes_fields_from_those_who_had_set_them() -> None:
    before = applied(None, pod({"name": "a", "image": "1", "args": ["x"]}), POD, "one", force=False, subresource=None)
    after = copy.deepcopy(before)
    after["spec"]["containers"][0]["image"] = "2"
    after["metadata"]["managedFields"] = signed(before, after, POD, "two")
    owned = {each["manager"]: str(each["fieldsV1"]) for each in after["metadata"]["managedFields"]}
    assert "f:image" in owned["two"]
    assert "f:image" not in owned["one"]
    with pytest.raises(Refused, match=r'conflict with "two".*image') as error:
        applied(after, pod({"name": "a", "image": "1", "args": ["x"]}), POD, "one", force=False, subresource=None)
    assert error.value.code == 409
    assert applied(after, pod({"name": "a", "image": "1"}), POD, "one", force=True, subresource=None)["spec"][
        "containers"
    ] == [{"name": "a", "image": "1"}]


def test_fields_are_paths_with_the_keys_of_lists() -> None:
    container = 'k:{"name":"a"}'
    assert fields_of(pod({"name": "a", "args": ["x", "y"]}, hostNetwork=True), POD) == {
        ("f:spec", "f:hostNetwork"),
        ("f:spec", "f:containers", container),
        ("f:spec", "f:containers", container, "f:name"),
        ("f:spec", "f:containers", container, "f:args"),
    }
