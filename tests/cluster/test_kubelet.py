"""Pods that really run: Jobs of small shell commands, from their creation to their end."""

import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.network import why_not
from tests.cluster.double import Double
from tests.cluster.job_controller import exit_codes, is_true
from tests.cluster.kubelet import NODE
from tests.cluster.refusals import Document
from tests.cluster.sandbox import ROOT

SPACE = "default"


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Double | None]:
    if why_not() is not None:
        yield None  # only root can run pods
        return
    with Double(tmp_path_factory.mktemp("cluster"), first_back_off=0.3) as made:
        yield made


def job(name: str, script: str, *, completions: int = 1, spec: Document | None = None, **pod: Any) -> Document:
    container = {"name": "main", "image": "any", "command": ["sh", "-c", script]} | pod.pop("container", {})
    template = {"spec": {"restartPolicy": "Never", "containers": [container]} | pod}
    whole = {"completionMode": "Indexed", "completions": completions, "parallelism": completions, "template": template}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "namespace": SPACE},
        "spec": whole | (spec or {}),
    }


def until(double: Double, name: str, holds: Callable[[Document], bool], seconds: float = 90) -> Document:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = double.state.get("Job", SPACE, name)
        if holds(found):
            return found
        time.sleep(0.05)
    raise AssertionError(
        f"{found['status']}\n{[(each['reason'], each['message']) for each in double.state.list('Event')]}"
    )


def pods(double: Double, name: str) -> list[Document]:
    return double.state.list("Pod", SPACE, f"job-name={name}")


def output(double: Double, pod: Document) -> str:
    path = double.kubelet.log_path(SPACE, pod["metadata"]["name"])
    return path.read_text() if path is not None else ""


def events(double: Double, about: Document) -> list[str]:
    return [
        each["reason"]
        for each in double.state.list("Event", SPACE, fields=f"involvedObject.uid={about['metadata']['uid']}")
    ]


def ends_with(kind: str) -> Callable[[Document], bool]:
    return lambda found: is_true(found, kind)


POLICY = {"rules": [{"action": "FailJob", "onExitCodes": {"operator": "In", "values": [64]}}]}


def test_pods_of_an_indexed_job_have_numbers_names_and_variables_and_the_job_completes(double: Double | None) -> None:
    if double is None:
        return
    double.state.create(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "group", "namespace": SPACE},
            "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"job-name": "meet"}},
        }
    )
    settings = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings", "namespace": SPACE}}
    double.state.create(settings | {"data": {"colour": "blue"}})
    double.state.create(
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "keys", "namespace": SPACE},
            "stringData": {"KEY": "hush"},
        }
    )
    container = {
        "env": [
            {"name": "ADDRESS", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {
                "name": "JOB",
                "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['batch.kubernetes.io/job-name']"}},
            },
            {"name": "FIRST", "value": "$(JOB)-0.group"},
            {"name": "CORES", "valueFrom": {"resourceFieldRef": {"resource": "requests.cpu"}}},
        ],
        "envFrom": [{"secretRef": {"name": "keys"}}],
        "args": ["$(JOB)"],
        "resources": {"requests": {"cpu": "1500m"}},
        "volumeMounts": [
            {"name": "settings", "mountPath": "/etc/settings", "readOnly": True},
            {"name": "memory", "mountPath": "/dev/shm"},
            {"name": "scratch", "mountPath": "/tmp"},
        ],
        "securityContext": {"readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}},
    }
    script = """
        echo $JOB_COMPLETION_INDEX of $0, $FIRST, $CORES, $KEY, $(cat /etc/settings/colour), $(id -u), $(hostname), $$$$
        hostname -i | grep -qx "$ADDRESS" && echo knows itself
        until getent ahostsv4 meet-0.group | grep -q STREAM && getent hosts meet-1.group; do sleep 0.1; done
        getent hosts nobody.group || echo nobody there
        touch /here 2>/dev/null || echo read-only; touch /tmp/here && df /dev/shm | grep -q 2048 && echo room
        touch /etc/settings/x 2>/dev/null || echo read-only; python -c 'import launcher; print("the image")'
        sleep 0.5
    """
    volumes = [
        {"name": "settings", "configMap": {"name": "settings"}},
        {"name": "memory", "emptyDir": {"medium": "Memory", "sizeLimit": "2Mi"}},
        {"name": "scratch", "emptyDir": {}},
    ]
    identity = {"runAsNonRoot": True, "runAsUser": 10001, "runAsGroup": 10001, "fsGroup": 10001}
    double.state.create(
        job(
            "meet",
            script,
            completions=2,
            container=container,
            volumes=volumes,
            subdomain="group",
            securityContext=identity,
        )
    )
    ended = until(double, "meet", ends_with("Complete"))
    assert ended["status"]["completedIndexes"] == "0-1"
    found = pods(double, "meet")
    assert [each["metadata"]["name"].rpartition("-")[0] for each in found] == ["meet-0", "meet-1"]
    for index, pod in enumerate(found):
        lines = output(double, pod).splitlines()
        assert lines[:2] == [f"{index} of meet, meet-0.group, 2, hush, blue, 10001, meet-{index}, 1", "knows itself"]
        assert lines[-5:] == ["nobody there", "read-only", "room", "read-only", "the image"]
        assert pod["status"]["phase"] == "Succeeded"
        assert {"Scheduled", "Pulled", "Created", "Started"} <= set(events(double, pod))


def test_a_code_of_the_policy_fails_the_job_at_once_and_others_are_tried_again(double: Double | None) -> None:
    if double is None:
        return
    double.state.create(job("wrong", "exit 64", spec={"podFailurePolicy": POLICY}))
    double.state.create(job("unlucky", "exit 1", spec={"podFailurePolicy": POLICY, "backoffLimit": 2}))
    wrong = until(double, "wrong", ends_with("Failed"))
    condition = next(each for each in wrong["status"]["conditions"] if each["type"] == "Failed")
    assert condition["reason"] == "PodFailurePolicy"
    assert "failed with exit code 64 matching FailJob rule at index 0" in condition["message"]
    assert len(pods(double, "wrong")) == wrong["status"]["failed"] == 1
    unlucky = until(double, "unlucky", ends_with("Failed"))
    assert [each["reason"] for each in unlucky["status"]["conditions"]] == ["BackoffLimitExceeded"] * 2
    assert len(pods(double, "unlucky")) == unlucky["status"]["failed"] == 3


def test_a_deleted_pod_is_told_to_end_and_replaced_when_it_has(double: Double | None) -> None:
    if double is None:
        return
    script = "trap 'echo told; sleep 0.5; exit 75' TERM; echo begun; while :; do sleep 0.05; done"
    double.state.create(job("told", script, spec={"podFailurePolicy": POLICY}))
    double.state.create(job("deaf", "echo begun; sleep 60", terminationGracePeriodSeconds=1))
    for name in ("told", "deaf"):
        until(double, name, lambda found: bool(found["status"].get("active")))
        wait_for_output(double, pods(double, name)[0], "begun\n")
    told, deaf = pods(double, "told")[0], pods(double, "deaf")[0]
    double.state.delete("Pod", SPACE, told["metadata"]["name"])
    double.state.delete("Job", SPACE, "deaf")
    until(double, "told", lambda found: found["status"].get("terminating") == 1 and not found["status"]["active"])
    until(double, "told", lambda found: found["status"]["failed"] == 1 and found["status"]["active"] == 1)
    assert output(double, told) == "begun\ntold\n"
    assert "Killing" in events(double, told)
    (successor,) = pods(double, "told")
    assert successor["metadata"]["uid"] != told["metadata"]["uid"]
    wait_for_output(double, successor, "begun\n")
    double.kubelet.kill(SPACE, successor["metadata"]["name"])
    until(double, "told", lambda found: found["status"]["failed"] == 2)
    assert exit_codes(double.state.get("Pod", SPACE, successor["metadata"]["name"])) == [("main", 137)]
    deadline = time.monotonic() + 60
    while pods(double, "deaf"):
        assert time.monotonic() < deadline, "process 1 does not hear SIGTERM, and is killed when its grace is over"
        time.sleep(0.05)
    assert output(double, deaf) == "begun\n"
    double.state.delete("Job", SPACE, "told")


def wait_for_output(double: Double, pod: Document, text: str) -> None:
    deadline = time.monotonic() + 60
    while output(double, pod) != text:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def pod_of(
    name: str, script: str, *, init: str | None = None, container: Document | None = None, **spec: Any
) -> Document:
    main = {"name": "main", "image": "any", "command": ["sh", "-c", script]} | (container or {})
    whole: Document = {"containers": [main], "terminationGracePeriodSeconds": 1} | spec
    if init is not None:
        mounts = {"volumeMounts": main.get("volumeMounts", [])}
        whole["initContainers"] = [{"name": "first", "image": "any", "command": ["sh", "-c", init]} | mounts]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": SPACE}, "spec": whole}


def until_pod(double: Double, name: str, holds: Callable[[Document], bool], seconds: float = 90) -> Document:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = double.state.get("Pod", SPACE, name)
        if holds(found):
            return found
        time.sleep(0.05)
    raise AssertionError(f"{found['status']}\n{events(double, found)}\n{output(double, found)}")


def test_containers_wait_are_probed_start_again_and_follow_each_other(double: Double | None) -> None:
    if double is None:
        return
    shared: Document = {"volumeMounts": [{"name": "shared", "mountPath": "/shared"}]}
    volumes = [{"name": "shared", "emptyDir": {}}]
    second_time = "cat /shared/word; test -e /shared/was || { touch /shared/was; exit 3; }"
    exists = {"exec": {"command": ["test", "-e", "/shared/alive"]}, "periodSeconds": 1, "failureThreshold": 1}
    serving = {"httpGet": {"path": "/", "port": "web"}, "periodSeconds": 1, "timeoutSeconds": 5}
    web = {"ports": [{"name": "web", "containerPort": 8000}], "readinessProbe": serving}
    late = {"volumeMounts": [{"name": "late", "mountPath": "/etc/late"}]}
    for made in (
        pod_of(
            "again",
            second_time,
            init="echo hello > /shared/word",
            container=shared,
            volumes=volumes,
            restartPolicy="OnFailure",
        ),
        pod_of(
            "sick", "sleep 60", container=shared | {"livenessProbe": exists}, volumes=volumes, restartPolicy="Never"
        ),
        pod_of("web", "exec python -m http.server", container=web),
        pod_of(
            "late",
            "cat /etc/late/word",
            container=late,
            volumes=[{"name": "late", "configMap": {"name": "late"}}],
            restartPolicy="Never",
        ),
        pod_of("large", "true", container={"resources": {"limits": {"nvidia.com/gpu": "1"}}}),
        pod_of("root", "true", securityContext={"runAsNonRoot": True}),
    ):
        double.state.create(made)

    again = until_pod(double, "again", lambda found: found["status"]["phase"] == "Succeeded")
    (status,) = again["status"]["containerStatuses"]
    assert (status["restartCount"], status["lastState"]["terminated"]["exitCode"]) == (1, 3)
    assert output(double, again) == "hello\n"
    sick = until_pod(double, "sick", lambda found: found["status"]["phase"] == "Failed")
    assert exit_codes(sick) == [("main", 137)]
    assert {"Unhealthy", "Killing"} <= set(events(double, sick))
    until_pod(double, "web", lambda found: is_true(found, "Ready"))
    assert "FailedMount" in events(double, double.state.get("Pod", SPACE, "late"))
    metadata = {"name": "late", "namespace": SPACE}
    double.state.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"word": "at last"}})
    assert output(double, until_pod(double, "late", lambda found: found["status"]["phase"] == "Succeeded")) == "at last"
    large = double.state.get("Pod", SPACE, "large")
    assert (large["status"]["phase"], events(double, large)) == ("Pending", ["FailedScheduling"])
    root = until_pod(double, "root", lambda found: "waiting" in found["status"]["containerStatuses"][0]["state"])
    assert root["status"]["containerStatuses"][0]["state"]["waiting"]["reason"] == "CreateContainerConfigError"


def test_a_cordoned_node_takes_no_pod_until_it_is_uncordoned(double: Double | None) -> None:
    if double is None:
        return

    def cordon(unschedulable: bool) -> None:
        double.state.change(
            "Node", None, NODE, lambda node: node.setdefault("spec", {}).update(unschedulable=unschedulable)
        )

    cordon(True)
    double.state.create(job("cordoned", "true"))
    while not (waiting := pods(double, "cordoned")) or "FailedScheduling" not in events(double, waiting[0]):
        time.sleep(0.05)
    assert "nodeName" not in waiting[0]["spec"]
    cordon(False)
    until(double, "cordoned", lambda found: is_true(found, "Complete"))


HOLDER = """
    import sys, time
    from pathlib import Path
    from tests.cluster.double import Double
    container = {"name": "main", "image": "any", "command": ["sh", "-c", "echo begun; sleep 600 & sleep 600"]}
    spec = {"securityContext": {"runAsUser": 10001}, "containers": [container]}
    with Double(Path(sys.argv[1])) as double:
        metadata = {"name": "pod", "namespace": "default"}
        double.state.create({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
        while (path := double.kubelet.log_path("default", "pod")) is None or not path.read_text():
            time.sleep(0.05)
        worker, = double.kubelet._workers.values()
        print(worker._runs[0].container.first_process, flush=True)
        time.sleep(600)
"""


def test_pods_end_with_the_process_that_holds_the_double_however_it_ends(tmp_path: Path) -> None:
    if why_not() is not None:
        return
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        assert holder.stdout is not None
        first = psutil.Process(int(holder.stdout.readline()))
        assert first.uids().real == 10001
        family = [first, *first.children(recursive=True)]
        assert len(family) == 3
        holder.kill()
    gone, alive = psutil.wait_procs(family, timeout=30)
    assert (len(gone), alive) == (3, [])
