"""The double's storage: who is told of what, what is refused, and what goes when something goes."""

import threading
import time

import pytest

from tests.cluster.refusals import Refused
from tests.cluster.state import State, owner_reference
from tests.k8s.schemas import Document


@pytest.fixture(scope="module")
def state() -> State:
    return State()


@pytest.fixture
def namespace(state: State, request: pytest.FixtureRequest) -> str:
    name = f"t{abs(hash(request.node.name)) % 10**8}"
    state.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    return name


def config(namespace: str, name: str = "a", **labels: str) -> Document:
    metadata = {"namespace": namespace, "name": name, "labels": labels}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}


def pod(namespace: str, name: str = "p", node: str | None = "n", owner: Document | None = None) -> Document:
    metadata: Document = {"namespace": namespace, "name": name}
    metadata |= {"ownerReferences": [owner_reference(owner)]} if owner else {}
    spec: Document = {"containers": [{"name": "c", "image": "i:1"}]} | ({"nodeName": node} if node else {})
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def refusal(error: pytest.ExceptionInfo[Refused]) -> tuple[int, str]:
    return error.value.code, error.value.reason


def test_a_change_of_what_somebody_else_has_changed_is_refused(state: State, namespace: str) -> None:
    seen = state.create(config(namespace))
    state.update(seen | {"data": {"x": "1"}})
    with pytest.raises(Refused, match="the object has been modified") as error:
        state.update(seen | {"data": {"x": "2"}})
    assert refusal(error) == (409, "Conflict")
    del seen["metadata"]["resourceVersion"]
    assert state.update(seen | {"data": {"x": "2"}})["data"] == {"x": "2"}


def test_what_does_not_change_gets_no_new_version_and_tells_nobody(state: State, namespace: str) -> None:
    made = state.create(config(namespace))
    watch = state.watch("ConfigMap", namespace, since=state.resource_version)
    assert state.update(made)["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]
    assert watch.next(0) is None


def test_what_comes_back_and_what_was_given_are_copies(state: State, namespace: str) -> None:
    given = config(namespace)
    made = state.create(given)
    assert "uid" not in given["metadata"]
    made["data"] = {"x": "1"}
    assert "data" not in state.get("ConfigMap", namespace, "a")


def test_status_and_the_rest_are_written_each_by_itself(state: State, namespace: str) -> None:
    made = state.create(pod(namespace))
    state.update_status(made | {"status": {"phase": "Running"}, "spec": {"containers": [{"name": "other"}]}})
    found = state.get("Pod", namespace, "p")
    assert found["status"]["phase"] == "Running"
    assert found["spec"]["containers"][0]["image"] == "i:1"
    found["status"]["phase"] = "Failed"
    found["metadata"]["labels"] = {"a": "b"}
    changed = state.update(found)
    assert (changed["status"]["phase"], changed["metadata"]["labels"]) == ("Running", {"a": "b"})
    with pytest.raises(Refused, match=r"status\.phase"):
        state.change("Pod", namespace, "p", lambda it: it["status"].update(phase=3), status=True)


def test_a_watch_sees_what_begins_and_stops_to_match(state: State, namespace: str) -> None:
    state.create(config(namespace, "old", app="x"))
    watch = state.watch("ConfigMap", namespace, "app=x")
    later = state.watch("ConfigMap", namespace, "app=x", since=state.resource_version)
    state.create(config(namespace, "other"))

    def label(name: str, **labels: str) -> None:
        state.change("ConfigMap", namespace, name, lambda it: it["metadata"].update(labels=labels))

    label("other", app="x")
    label("other", app="x", more="y")
    label("other")
    state.delete("ConfigMap", namespace, "old")
    seen = [(event.type, event.object["metadata"]["name"]) for event in iter(lambda: watch.next(0), None)]
    changes = [("ADDED", "other"), ("MODIFIED", "other"), ("DELETED", "other"), ("DELETED", "old")]
    assert seen == [("ADDED", "old"), *changes]
    assert [(event.type, event.object["metadata"]["name"]) for event in iter(lambda: later.next(0), None)] == changes


def test_a_watch_can_be_closed_while_somebody_waits(state: State) -> None:
    watch = state.watch("Pod", since=state.resource_version)
    threading.Timer(0.05, watch.close).start()
    begun = time.monotonic()
    assert watch.next(30) is None
    assert time.monotonic() - begun < 10


def test_a_pod_s_grace_can_be_shortened_and_not_prolonged(state: State, namespace: str) -> None:
    state.create(pod(namespace))
    first = state.delete("Pod", namespace, "p")["metadata"]
    assert first["deletionGracePeriodSeconds"] == 30
    assert state.delete("Pod", namespace, "p", 5)["metadata"]["deletionGracePeriodSeconds"] == 5
    assert state.delete("Pod", namespace, "p", 20)["metadata"]["deletionGracePeriodSeconds"] == 5
    state.remove("Pod", namespace, "p", uid="another's")
    assert state.find("Pod", namespace, "p") is not None
    state.remove("Pod", namespace, "p", uid=first["uid"])
    assert state.find("Pod", namespace, "p") is None
    state.remove("Pod", namespace, "p")


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_a_pod_that_has_ended_is_gone_at_once(state: State, namespace: str, phase: str) -> None:
    state.create(pod(namespace))
    state.change("Pod", namespace, "p", lambda it: it["status"].update(phase=phase), status=True)
    state.delete("Pod", namespace, "p")
    assert state.find("Pod", namespace, "p") is None


@pytest.mark.parametrize("propagation", ["Background", "Foreground", "Orphan"])
def test_an_owner_goes_before_after_or_without_what_it_owns(state: State, namespace: str, propagation: str) -> None:
    owner = state.create(config(namespace))
    state.create(pod(namespace, owner=owner))
    state.create(pod(namespace, "never-began", node=None, owner=owner))
    state.delete("ConfigMap", namespace, "a", propagation=propagation)
    left = {each["metadata"]["name"]: "deletionTimestamp" in each["metadata"] for each in state.list("Pod", namespace)}
    is_there = state.find("ConfigMap", namespace, "a") is not None
    assert is_there is (propagation == "Foreground")
    assert left == ({"p": False, "never-began": False} if propagation == "Orphan" else {"p": True})
    state.remove("Pod", namespace, "p")
    assert state.find("ConfigMap", namespace, "a") is None


def test_finalizers_hold_an_object_until_they_are_taken_away(state: State, namespace: str) -> None:
    given = config(namespace)
    given["metadata"]["finalizers"] = ["example.test/hold"]
    state.create(given)
    assert "deletionTimestamp" in state.delete("ConfigMap", namespace, "a")["metadata"]
    state.change("ConfigMap", namespace, "a", lambda it: it["metadata"].update(finalizers=[]))
    assert state.find("ConfigMap", namespace, "a") is None


def test_a_namespace_waits_for_its_pods_and_takes_nothing_new(state: State, namespace: str) -> None:
    state.create(pod(namespace))
    state.create(config(namespace))
    state.delete("Namespace", None, namespace)
    assert state.get("Namespace", None, namespace)["status"]["phase"] == "Terminating"
    assert state.list("ConfigMap", namespace) == []
    with pytest.raises(Refused, match="is being terminated") as error:
        state.create(config(namespace, "b"))
    assert refusal(error) == (403, "Forbidden")
    state.record(state.get("Pod", namespace, "p"), "Killing", "Stopping container c")
    state.remove("Pod", namespace, "p")
    assert state.find("Namespace", None, namespace) is None


def test_events_of_one_reason_and_message_are_counted(state: State, namespace: str) -> None:
    made = state.create(pod(namespace))
    for message in ("Back-off", "Back-off", "Back-off again"):
        state.record(made, "BackOff", message, type="Warning", component="kubelet")
    found = state.list("Event", namespace, fields=f"involvedObject.uid={made['metadata']['uid']}")
    assert sorted((event["message"], event["count"]) for event in found) == [("Back-off", 2), ("Back-off again", 1)]


@pytest.mark.parametrize(
    ("selector", "names"),
    [
        ("app=x", "ab"),
        ("app==x,n=1", "a"),
        ("app!=x", "c"),
        ("n", "ab"),
        ("!n", "c"),
        ("n in (1, 2)", "ab"),
        ("n notin (1)", "bc"),
        ({"app": "x", "n": "2"}, "b"),
        ("", "abc"),
        (None, "abc"),
    ],
)
def test_selectors_mean_what_kubernetes_means_by_them(
    state: State, namespace: str, selector: str | dict[str, str] | None, names: str
) -> None:
    for name, labels in (("a", {"app": "x", "n": "1"}), ("b", {"app": "x", "n": "2"}), ("c", {})):
        state.create(config(namespace, name, **labels))
    assert "".join(each["metadata"]["name"] for each in state.list("ConfigMap", namespace, selector)) == names


def test_a_selector_that_is_none_is_refused(state: State) -> None:
    with pytest.raises(Refused, match="unable to parse requirement"):
        state.list("Pod", None, "a in x")


def test_another_version_of_a_kind_is_refused(state: State) -> None:
    with pytest.raises(Refused, match='Job is served as "batch/v1"'):
        state.create({"apiVersion": "batch/v1beta1", "kind": "Job", "metadata": {"name": "j"}})
    with pytest.raises(Refused, match='no kind "CronTab"'):
        state.list("CronTab")
