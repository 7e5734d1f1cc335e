"""Genuine kubectl on the double's API server: each verb, and what is refused."""

import json
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.api import running_api
from tests.cluster.client import Client
from tests.cluster.conftest import in_new_namespace
from tests.cluster.refusals import bad_request
from tests.cluster.state import State
from tests.k8s.golden import FOLDERS, GOLDEN, ROOT, documents
from tests.k8s.schemas import NEWEST, VERSIONS, Document

OVERLAYS = [f"{folder.parent.name}/{folder.name}" for folder in FOLDERS]


def config(name: str = "a", labels: dict[str, str] | None = None, **data: str) -> Document:
    metadata = {"name": name, "labels": labels or {}}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata} | ({"data": data} if data else {})


def pod(name: str, node: str | None = None, **fields: Any) -> Document:
    spec = {"restartPolicy": "Never", "containers": [{"name": "c", "image": "registry.example/none:1"}]} | fields
    spec |= {"nodeName": node} if node else {}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": "t"}}, "spec": spec}


def job(name: str = "j", **fields: Any) -> Document:
    """Suspended: no cluster starts its pods."""
    template = {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "registry.example/none:1"}]}}
    spec = {"suspend": True, "template": template} | fields
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec}


def test_apply_creates_then_leaves_alone_then_changes(cluster: Client) -> None:
    assert (
        cluster("apply", "-f", "-", given=[config(x="1", y="1"), job()]) == "configmap/a created\njob.batch/j created\n"
    )
    assert (
        cluster("apply", "-f", "-", given=[config(x="1", y="1"), job()])
        == "configmap/a unchanged\njob.batch/j unchanged\n"
    )
    assert cluster("apply", "-f", "-", given=[config(x="2"), job(backoffLimit=3)]) == (
        "configmap/a configured\njob.batch/j configured\n"
    )
    found = json.loads(cluster("get", "configmap/a", "job/j", "-o", "json"))["items"]
    assert found[0]["data"] == {"x": "2"}, "what is no longer in the manifest goes"
    assert found[1]["spec"]["backoffLimit"] == 3
    assert found[1]["metadata"]["generation"] == 2


def test_apply_merges_lists_by_their_keys(cluster: Client) -> None:
    def service(*names: str) -> Document:
        ports = [{"name": name, "port": 80 + number} for number, name in enumerate(names)]
        spec = {"clusterIP": "None", "selector": {"app": "t"}, "ports": ports}
        return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}, "spec": spec}

    cluster("apply", "-f", "-", given=[service("a", "b")])
    cluster("apply", "-f", "-", given=[service("a", "c", "d")])
    found = json.loads(cluster("get", "service", "s", "-o", "json"))["spec"]
    assert [(each["name"], each["port"], each["targetPort"]) for each in found["ports"]] == [
        ("a", 80, 80),
        ("c", 81, 81),
        ("d", 82, 82),
    ]
    assert found["clusterIP"] == "None"


def test_diff_shows_what_apply_would_change(cluster: Client) -> None:
    cluster("apply", "-f", "-", given=[config(x="1")])
    done = cluster.try_("diff", "-f", "-", given=[config(x="2")])
    assert done.code == 1
    assert '-  x: "1"\n+  x: "2"' in done.out
    assert cluster.try_("diff", "-f", "-", given=[config(x="1")]).code == 0
    assert json.loads(cluster("get", "configmap", "a", "-o", "json"))["data"] == {"x": "1"}


def test_server_side_apply_keeps_to_what_each_manager_has_set(cluster: Client) -> None:
    def apply(document: Document, manager: str, *words: str) -> tuple[str, ...]:
        return ("apply", "--server-side", f"--field-manager={manager}", *words, "-f", "-")

    cluster(*apply({}, "one"), given=[config(x="1", y="1")])
    cluster(*apply({}, "two"), given=[config(z="1")])
    said = cluster.refused(*apply({}, "two"), given=[config(x="2", z="1")])
    assert 'conflict with "one"' in said
    assert ".data.x" in said
    cluster(*apply({}, "two", "--force-conflicts"), given=[config(x="2", z="1")])
    cluster(*apply({}, "one"), given=[config()])
    found = json.loads(cluster("get", "configmap", "a", "-o", "json", "--show-managed-fields"))
    assert found["data"] == {"x": "2", "z": "1"}, "y was of the first alone; x is now the second's"
    owned = {entry["manager"]: entry["fieldsV1"] for entry in found["metadata"]["managedFields"]}
    assert set(owned["two"]["f:data"]) - {"."} == {"f:x", "f:z"}


def test_a_job_that_was_applied_one_way_is_applied_the_other_way(cluster: Client) -> None:
    """Defaults, and what the server has added, must not count as changes: a Job's template cannot be changed."""
    probe = {"exec": {"command": ["true"]}}
    variable = {"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}
    container = {"name": "c", "image": "registry.example/none:1", "readinessProbe": probe, "env": [variable]}
    given = [job(template={"spec": {"restartPolicy": "Never", "containers": [container]}})]
    cluster("apply", "-f", "-", given=given)
    for _ in range(2):
        assert cluster("apply", "--server-side", "-f", "-", given=given) == "job.batch/j serverside-applied\n"
    assert cluster("apply", "-f", "-", given=given) == "job.batch/j unchanged\n"


def test_a_dry_run_says_what_would_be_and_does_nothing(cluster: Client) -> None:
    assert cluster("apply", "--dry-run=server", "-f", "-", given=[config(), job()]) == (
        "configmap/a created (server dry run)\njob.batch/j created (server dry run)\n"
    )
    assert cluster.refused("get", "job", "j") == 'Error from server (NotFound): jobs.batch "j" not found\n'
    cluster("apply", "-f", "-", given=[config(x="1")])
    made = cluster("apply", "--dry-run=server", "-o", "yaml", "-f", "-", given=[config(x="2")])
    assert yaml.safe_load(made)["data"] == {"x": "2"}
    cluster("delete", "configmap", "a", "--dry-run=server")
    assert json.loads(cluster("get", "configmap", "a", "-o", "json"))["data"] == {"x": "1"}


def test_get_prints_tables_documents_names_and_paths(cluster: Client) -> None:
    cluster("apply", "-f", "-", given=[config("a", {"n": "1"}), config("b", {"n": "2"}), job(completions=3)])
    lines = cluster("get", "jobs").splitlines()
    assert [each for each in lines[0].split() if each != "STATUS"] == ["NAME", "COMPLETIONS", "DURATION", "AGE"]
    assert (
        lines[1].split()[::2] == ["j", "0/3", lines[1].split()[-1]][: len(lines[1].split()[::2])] or "0/3" in lines[1]
    )
    assert "IMAGES" in cluster("get", "jobs", "-o", "wide")
    assert cluster("get", "configmaps", "-l", "n in (1,2)", "-o", "name") == "configmap/a\nconfigmap/b\n"
    assert cluster("get", "cm", "-l", "n!=1,n", "-o", "jsonpath={.items[*].metadata.name}") == "b"
    assert cluster("get", "cm", "--field-selector=metadata.name=a", "-o", "name") == "configmap/a\n"
    assert yaml.safe_load(cluster("get", "job", "j", "-o", "yaml"))["spec"]["parallelism"] == 1
    assert cluster("get", "cm", "none", "--ignore-not-found") == ""
    assert 'configmaps "none" not found' in cluster.refused("get", "cm", "none")
    assert "doesn't have a resource type" in cluster.refused("get", "nonsense")


def test_watching_shows_changes_as_they_come(cluster: Client) -> None:
    cluster("create", "-f", "-", given=[config("a")])
    with cluster.running(
        "get", "configmaps", "--field-selector=metadata.name=a", "-w", "-o", "jsonpath={.data}{'\\n'}"
    ) as watching:
        assert watching.stdout is not None
        assert watching.stdout.readline() == "\n"
        cluster("patch", "configmap", "a", "--type=merge", "-p", '{"data": {"x": "1"}}')
        assert watching.stdout.readline() == '{"x":"1"}\n'
        watching.kill()


def test_wait_returns_when_it_is_so_and_fails_when_it_is_late(cluster: Client) -> None:
    cluster("create", "-f", "-", given=[config("a")])
    assert "timed out" in cluster.refused("wait", "--for=jsonpath={.data.x}=1", "configmap/a", "--timeout=0.2s")
    with cluster.running("wait", "--for=jsonpath={.data.x}=1", "configmap/a", "--timeout=60s") as waiting:
        cluster("patch", "configmap", "a", "-p", '{"data": {"x": "1"}}')
        assert waiting.communicate()[0] == "configmap/a condition met\n"


def test_wait_and_describe_see_what_a_controller_says(double: Client, state: State) -> None:
    double("create", "-f", "-", given=[job(suspend=False)])
    done = {"type": "Complete", "status": "True", "reason": "CompletionsReached", "message": "done"}

    def complete(found: Document) -> None:
        found["status"] = {"succeeded": 1, "conditions": [done]}

    with double.running("wait", "--for=condition=complete", "job/j", "--timeout=60s") as waiting:
        time.sleep(0.2)
        found = state.change("Job", double.namespace, "j", complete, status=True)
        assert waiting.communicate()[0] == "job.batch/j condition met\n"
    for _ in range(2):
        state.record(found, "Completed", "Job completed", component="job-controller")
    assert "Complete   1/1" in double("get", "job", "j")
    described = double("describe", "job", "j")
    assert "1 Succeeded" in described
    assert "job-controller  Job completed" in described
    (line,) = double("get", "events", "--no-headers").splitlines()
    assert line.split()[1:] == ["Normal", "Completed", "job/j", "Job", "completed"]
    assert json.loads(double("get", "events", "-o", "json"))["items"][0]["count"] == 2


def fake_logs(
    namespace: str,
    pod: str,
    *,
    follow: bool,
    tail: int | None,
    container: str | None,
    previous: bool,
    timestamps: bool,
) -> Iterable[bytes]:
    """Three lines of each pod, and with `follow` one more."""
    if pod == "new":
        raise bad_request(f'container "c" in pod "{pod}" is waiting to start: ContainerCreating')
    lines = [f"{pod} line {number}\n".encode() for number in range(3)]

    def pieces() -> Iterator[bytes]:
        yield b"".join(lines if tail is None else lines[-tail:])
        if follow:
            time.sleep(0.2)
            yield f"{pod} last\n".encode()

    return pieces()


def test_logs_of_a_pod_of_a_job_and_of_many_pods(state: State) -> None:
    with running_api(state, logs=fake_logs) as api:
        client = in_new_namespace(api, state)
        made = client("create", "-f", "-", "-o", "jsonpath={.metadata.uid}", given=[job(suspend=False)])
        pods = [pod("p1"), pod("p2"), pod("new")]
        for each in pods[:2]:
            each["metadata"]["labels"]["batch.kubernetes.io/controller-uid"] = made
        client("create", "-f", "-", given=pods)
        assert client("logs", "p1") == "p1 line 0\np1 line 1\np1 line 2\n"
        assert client("logs", "p1", "--tail=1") == "p1 line 2\n"
        assert client("logs", "-f", "p1", "--tail=1") == "p1 line 2\np1 last\n"
        assert client("logs", "job/j", "--tail=1") in ("p1 line 2\n", "p2 line 2\n")
        both = client("logs", "-l", f"batch.kubernetes.io/controller-uid={made}", "--tail=1", "--prefix")
        assert sorted(both.splitlines()) == ["[pod/p1/c] p1 line 2", "[pod/p2/c] p2 line 2"]
        assert "is waiting to start: ContainerCreating" in client.refused("logs", "new")
        assert "container d is not valid for pod p1" in client.refused("logs", "p1", "-c", "d")
        assert 'pods "p9" not found' in client.refused("logs", "p9")


def test_labels_annotations_and_patches(cluster: Client) -> None:
    cluster("create", "-f", "-", given=[config("a", x="1"), job()])
    cluster("label", "configmap", "a", "k=v")
    assert "already has a value" in cluster.refused("label", "configmap", "a", "k=w")
    cluster("annotate", "configmap", "a", "note=some words")
    cluster("patch", "configmap", "a", "--type=json", "-p", '[{"op": "add", "path": "/data/y", "value": "2"}]')
    cluster("patch", "configmap", "a", "--type=merge", "-p", '{"data": {"x": null}}')
    found = json.loads(cluster("get", "configmap", "a", "-o", "json"))
    assert found["data"] == {"y": "2"}
    assert (found["metadata"]["labels"], found["metadata"]["annotations"]) == ({"k": "v"}, {"note": "some words"})
    cluster("label", "configmap", "a", "k-")
    assert cluster("get", "configmaps", "-l", "k", "-o", "name") == ""
    cluster("patch", "job", "j", "-p", '{"spec": {"backoffLimit": 2}}')
    assert cluster("get", "job", "j", "-o", "jsonpath={.spec.backoffLimit}") == "2"
    cluster.refused("patch", "configmap", "a", "--type=json", "-p", '[{"op": "remove", "path": "/data/none"}]')
    said = cluster.refused("patch", "configmap", "a", "--type=merge", "-p", '{"metadata": {"resourceVersion": "1"}}')
    assert "the object has been modified" in said


def test_objects_are_deleted_by_name_by_label_by_file_and_by_folder(cluster: Client, tmp_path: Path) -> None:
    def names() -> str:
        return cluster("get", "configmaps", "-l", "n", "-o", "jsonpath={.items[*].metadata.name}")

    (tmp_path / "kustomization.yaml").write_text("resources: [d.yaml]\n")
    (tmp_path / "d.yaml").write_text(yaml.safe_dump(config("d", {"n": "2"})))
    cluster("apply", "-k", str(tmp_path))
    cluster("create", "-f", "-", given=[config(name, {"n": "1"}) for name in "abc"])
    assert 'configmap "a" deleted' in cluster("delete", "configmap", "a")
    cluster("delete", "-f", "-", given=[config("b")])
    assert names() == "c d"
    cluster("delete", "configmaps", "-l", "n=1")
    cluster("delete", "-k", str(tmp_path))
    assert names() == ""
    assert "not found" in cluster.refused("delete", "configmap", "a")
    cluster("delete", "configmap", "a", "--ignore-not-found")


def test_a_pod_stays_until_its_kubelet_has_ended_it(double: Client, state: State) -> None:
    double("create", "-f", "-", given=[pod("p", node="n", terminationGracePeriodSeconds=7), pod("never-began")])
    double("delete", "pod", "never-began", "--timeout=10s")
    watch = state.watch("Pod", double.namespace, since=state.resource_version)
    with double.running("delete", "pod", "p") as deleting:
        event = watch.next(30)
        assert event is not None
        assert event.object["metadata"]["deletionGracePeriodSeconds"] == 7
        assert double("get", "pod", "p", "--no-headers").split()[2] == "Terminating"
        assert deleting.poll() is None
        state.remove("Pod", double.namespace, "p")
        assert 'pod "p" deleted' in deleting.communicate()[0]
    double("create", "-f", "-", given=[pod("p", node="n")])
    double("delete", "pod", "p", "--grace-period=1", "--wait=false")
    assert state.get("Pod", double.namespace, "p")["metadata"]["deletionGracePeriodSeconds"] == 1
    double("delete", "pod", "p", "--grace-period=0", "--force")
    assert state.find("Pod", double.namespace, "p") is None


def test_draining_a_node_evicts_its_pods_as_disruptions(double: Client, state: State) -> None:
    name = f"node-{double.namespace}"
    double("create", "-f", "-", given=[{"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}])
    double("create", "-f", "-", given=[pod("p", node=name)])
    watch = state.watch("Pod", double.namespace, since=state.resource_version)
    with double.running("drain", name, "--force", "--grace-period=3") as draining:
        for event in watch:
            if "deletionTimestamp" in event.object["metadata"]:
                break
        (condition,) = event.object["status"]["conditions"]
        assert (condition["type"], condition["status"]) == ("DisruptionTarget", "True")
        assert event.object["metadata"]["deletionGracePeriodSeconds"] == 3
        state.remove("Pod", double.namespace, "p")
        assert "evicted" in draining.communicate()[0]
    assert state.get("Node", None, name)["spec"]["unschedulable"] is True


def test_what_an_object_owns_goes_with_it(double: Client, state: State) -> None:
    uid = double("create", "-f", "-", "-o", "jsonpath={.metadata.uid}", given=[job()])
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "j", "uid": uid}
    owned = pod("p", node="n")
    owned["metadata"]["ownerReferences"] = [owner | {"controller": True, "blockOwnerDeletion": True}]
    double("create", "-f", "-", given=[owned])
    with double.running("delete", "job", "j", "--cascade=foreground") as deleting:
        watch = state.watch("Pod", double.namespace)
        while "deletionTimestamp" not in state.get("Pod", double.namespace, "p")["metadata"]:
            watch.next(5)
        assert state.find("Job", double.namespace, "j") is not None, "it waits for its pod"
        state.remove("Pod", double.namespace, "p")
        assert deleting.wait() == 0
    assert state.find("Job", double.namespace, "j") is None


def test_a_namespace_goes_with_all_that_is_in_it(cluster: Client) -> None:
    said = cluster.refused("create", "--namespace=none-of-ours", "-f", "-", given=[config()])
    assert said == 'Error from server (NotFound): error when creating "STDIN": namespaces "none-of-ours" not found\n'
    cluster("create", "-f", "-", given=[config()])
    assert cluster("get", "serviceaccount", "default", "-o", "name") == "serviceaccount/default\n"
    cluster("delete", "namespace", cluster.namespace)
    assert "not found" in cluster.refused("get", "configmap", "a")
    cluster("create", "namespace", cluster.namespace)
    assert "not found" in cluster.refused("get", "configmap", "a")


def test_names_are_made_and_defaults_are_filled_in(cluster: Client) -> None:
    given = job()
    given["metadata"] = {"generateName": "made-"}
    first, second = (cluster("create", "-f", "-", "-o", "name", given=[given]) for _ in range(2))
    assert first.startswith("job.batch/made-")
    assert first != second
    found = json.loads(cluster("get", first.strip(), "-o", "json"))
    uid, name = found["metadata"]["uid"], found["metadata"]["name"]
    assert found["spec"]["selector"] == {"matchLabels": {"batch.kubernetes.io/controller-uid": uid}}
    assert found["spec"]["template"]["metadata"]["labels"]["batch.kubernetes.io/job-name"] == name
    spec = found["spec"]
    assert (spec["backoffLimit"], spec["completions"], spec["completionMode"]) == (6, 1, "NonIndexed")
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] == 30


def test_kubectl_makes_what_the_guide_makes_with_it(cluster: Client) -> None:
    cluster("create", "secret", "generic", "storage", "--from-literal=AWS_ACCESS_KEY_ID=name")
    assert cluster("get", "secret", "storage", "-o", "jsonpath={.data}") == '{"AWS_ACCESS_KEY_ID":"bmFtZQ=="}'
    cluster("create", "configmap", "files", "--from-literal=a=b")
    cluster("create", "serviceaccount", "other")
    assert cluster("auth", "can-i", "create", "jobs") == "yes\n"


WRONG = {
    "an unknown field": (job(backOffLimit=3), 'unknown field "spec.backOffLimit"'),
    "a wrong type": (job(completions="many"), "cannot unmarshal string into Go struct field"),
    "a value that is not known": (job(completionMode="Some"), "spec.completionMode"),
    "a missing required field": (job(template={"spec": {"restartPolicy": "Never", "containers": [{"image": "i"}]}}), "name"),
    "no container": (job(template={"spec": {"restartPolicy": "Never", "containers": []}}), "spec.template.spec.containers: Required"),
    "a restart policy that Jobs do not take": (
        job(template={"spec": {"restartPolicy": "Always", "containers": [{"name": "c", "image": "i"}]}}),
        'spec.template.spec.restartPolicy: Unsupported value: "Always"',
    ),
    "an Indexed Job without a number": (job(completionMode="Indexed", parallelism=2), "spec.completions: Required value"),
    "a negative number": (job(parallelism=-1), "spec.parallelism: Invalid value: -1"),
    "a failure policy with pods that start again": (
        job(
            podFailurePolicy={"rules": [{"action": "FailJob", "onExitCodes": {"operator": "In", "values": [64]}}]},
            template={"spec": {"restartPolicy": "OnFailure", "containers": [{"name": "c", "image": "i"}]}},
        ),
        'only "Never" is supported when podFailurePolicy is specified',
    ),
    "a name with capitals": (config("Big"), "metadata.name: Invalid value"),
    "a label that is none": (config("a", {"k": "no spaces"}), "metadata.labels: Invalid value"),
    "a mount without its volume": (
        pod("p", containers=[{"name": "c", "image": "i", "volumeMounts": [{"name": "v", "mountPath": "/v"}]}]),
        'volumeMounts[0].name: Not found: "v"',
    ),
    "an account that is not there": (pod("p", serviceAccountName="nobody"), 'serviceaccount "nobody" not found'),
}  # fmt: skip


def test_wrong_manifests_are_refused_with_the_path(cluster: Client) -> None:
    done = cluster.try_("create", "--dry-run=server", "-f", "-", given=[document for document, _ in WRONG.values()])
    assert done.out == ""
    for what, (_, said) in WRONG.items():
        assert said in done.err, what


def test_unknown_fields_are_refused_warned_of_or_ignored_as_asked(cluster: Client) -> None:
    given = [job(backOffLimit=3)]
    done = cluster.try_("create", "--validate=warn", "-f", "-", given=given)
    assert done.code == 0
    assert 'Warning: unknown field "spec.backOffLimit"' in done.err
    assert "backOffLimit" not in cluster("get", "job", "j", "-o", "json")
    said = cluster.refused("apply", "--server-side", "-f", "-", given=given)
    assert ".spec.backOffLimit: field not declared in schema" in said


def test_what_may_not_change_is_refused(cluster: Client) -> None:
    cluster("apply", "-f", "-", given=[job(completions=2)])
    for changed in (
        job(completions=3),
        job(
            template=job(
                template={"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "other"}]}}
            )["spec"]["template"],
            completions=2,
        ),
    ):
        said = cluster.refused("apply", "-f", "-", given=[changed])
        assert 'The Job "j" is invalid: spec.' in said
        assert "field is immutable" in said
    assert "AlreadyExists" in cluster.refused("create", "-f", "-", given=[job()])


def test_kinds_of_operators_are_served_by_their_genuine_definitions(double: Client) -> None:
    (given,) = (each for each in documents(GOLDEN / "overlays-jobset.yaml") if each["kind"] == "JobSet")
    given = json.loads(json.dumps(given))
    given["metadata"]["namespace"] = double.namespace
    double("apply", "-f", "-", given=[given])
    double("apply", "--server-side", "-f", "-", given=[given])
    assert double("get", "jobset", "viewpoint-train", "-o", "jsonpath={.metadata.generation}") == "1"
    assert double("get", "jobsets").splitlines()[0].split() == [
        "NAME",
        "TERMINALSTATE",
        "RESTARTS",
        "COMPLETED",
        "SUSPENDED",
        "AGE",
    ]
    given["spec"]["replicatedJobs"][0]["replcas"] = 2
    said = double.refused("apply", "-f", "-", given=[given])
    assert 'unknown field "spec.replicatedJobs[0].replcas"' in said
    del given["spec"]["replicatedJobs"][0]["replcas"]
    given["spec"]["replicatedJobs"] = "none"
    assert 'must be of type array: "string"' in double.refused("apply", "-f", "-", given=[given])


def test_a_cluster_without_operators_has_only_kubernetes_own_kinds() -> None:
    with running_api(State(custom=False)) as api:
        client = Client(api.environment, "default")
        assert "doesn't have a resource type" in client.refused("get", "localqueues.kueue.x-k8s.io", "q")


def test_the_server_says_what_it_is(double: Client) -> None:
    assert f"Server Version: v{NEWEST}.0" in double("version")
    assert json.loads(double("get", "--raw", "/version"))["platform"] == "viewpoint/double"


def test_an_overlay_passes_the_server() -> None:
    check_overlay("overlays/plain", NEWEST)


@pytest.mark.slow
@pytest.mark.parametrize("version", [VERSIONS[0], NEWEST])
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_and_stage_passes_the_server_of_the_oldest_and_the_newest_kubernetes(
    overlay: str, version: str
) -> None:
    check_overlay(overlay, version)


def check_overlay(overlay: str, version: str) -> None:
    """Applies it as a dry run, for good, again, and again from the server's side."""
    state = State(version)
    with running_api(state) as api:
        client = Client(api.environment, "viewpoint")
        client("create", "namespace", "viewpoint")
        folder = str(ROOT / "k8s" / overlay)
        whole = documents(GOLDEN / f"{overlay.replace('/', '-')}.yaml")
        made = client("apply", "--dry-run=server", "-k", folder)
        assert made.count("created (server dry run)") == len(whole)
        assert client("apply", "-k", folder).count(" created\n") == len(whole)
        for document in whole:
            name, namespace = document["metadata"]["name"], document["metadata"].get("namespace")
            assert state.find(document["kind"], namespace, name) is not None
        client("apply", "--server-side", "-k", folder)
        assert client.try_("diff", "--server-side", "-k", folder).out == ""
        client("delete", "-k", folder, "--timeout=30s")


def test_reading_and_writing_at_once_loses_nothing(double: Client, state: State) -> None:
    double("create", "-f", "-", given=[config("a")])

    def count(document: Document) -> None:
        data = document.setdefault("data", {})
        data["n"] = str(int(data.get("n", "0")) + 1)

    def twenty_times() -> None:
        for _ in range(20):
            state.change("ConfigMap", double.namespace, "a", count)

    watch = state.watch("ConfigMap", double.namespace)
    threads = [threading.Thread(target=twenty_times) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert state.get("ConfigMap", double.namespace, "a")["data"] == {"n": "80"}
    while (event := watch.next(1)) is not None and event.object["metadata"]["name"] == "a":
        if event.object.get("data") == {"n": "80"}:
            break
    assert event is not None
