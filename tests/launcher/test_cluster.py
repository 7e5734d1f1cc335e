"""A launch on a cluster, with a kubectl that only remembers: what it applies, shows, refuses and returns."""

import io
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml

from datastore.errors import (
    EXIT_ASKED_WRONGLY,
    EXIT_DO_NOT_RETRY,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_STOPPED,
    AskedWrongly,
    DoNotRetry,
    ViewpointError,
)
from launcher import cluster
from launcher.__main__ import main
from launcher.cluster import ClusterJob, Kubectl, check_there, prefix_of, state_of
from launcher.jobset import Cluster, Document, workload_of
from launcher.pod import EXIT_CANCELLED
from launcher.presence import Presence
from tests.k8s.golden import documents
from trainer.runfolder import RunFolder

GOLDEN = Path(__file__).parent.parent / "golden" / "k8s"
PLAIN = str(GOLDEN / "overlays-plain.yaml")
RUNS = "memory://bucket/runs"
WORDS = ["launch", "pointmcd", "--nodes", "2", "--on", "k8s", "--runs", RUNS, "--manifest", PLAIN, "--image", "vp:1"]


def pod(name: str, code: int | None = None, index: int = 0, **labels: str) -> Document:
    state = {"running": {}} if code is None else {"terminated": {"exitCode": code}}
    return {
        "metadata": {
            "name": name,
            "annotations": {"batch.kubernetes.io/job-completion-index": str(index)},
            "labels": labels,
        },
        "status": {"phase": "Running" if code is None else "Failed", "containerStatuses": [{"state": state}]},
    }


class Remembering(Kubectl):
    """Jobs end as soon as somebody looks twice, with the code that `ends` has for them."""

    def __init__(self, ends: Callable[[str], int] = lambda name: 0) -> None:
        super().__init__()
        self.ends = ends
        self.applied: list[list[Document]] = []
        self.asked: list[str] = []
        self.deleted: list[str] = []
        self.there: dict[tuple[str, str], Document] = {("namespace", "viewpoint"): {}}
        self.looks: dict[str, int] = {}

    def _run(self, *words: str, given: str | None = None, namespace: str | None = None) -> str:
        self.asked.append(" ".join(words))
        if words[0] == "apply" and "--dry-run=server" not in words:
            assert given is not None
            found = [each for each in yaml.safe_load_all(given) if each]
            self.applied.append(found)
            job = workload_of(found)
            self.there["jobs.batch", job["metadata"]["name"]] = job
        if words[:2] == ("get", "pods"):
            name = words[3].partition("=")[2]
            code = self.ends(name)
            return json.dumps({"items": [pod(f"{name}-0-abc", code)]})
        if words[0] == "get":
            return self._get(words[1], words[2])
        if words[0] == "delete":
            self.deleted.append(words[2])
            self.there.pop((words[1], words[2]), None)
        if words[0] == "logs":
            return 'what went wrong\n{"teacher": "pointmcd_teacher@1"}\n'
        return ""

    def _get(self, kind: str, name: str) -> str:
        if (kind, name) not in self.there:
            return ""
        found = dict(self.there[kind, name])
        self.looks[name] = self.looks.get(name, 0) + 1
        if kind == "jobs.batch" and self.looks[name] > 1:
            ended = "Complete" if self.ends(name) == 0 else "Failed"
            found["status"] = {"conditions": [{"type": ended, "status": "True", "message": "the cluster says why"}]}
        return json.dumps(found or {"kind": kind})

    def follow(self, name: str, namespace: str | None) -> Any:
        class Process:
            stdout = io.StringIO("worker-0: step 1\n")

            def kill(self) -> None: ...

            def wait(self) -> int:
                return 0

        return Process()


@pytest.fixture
def no_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_POLL_SECONDS", 0.0)
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


def launched(monkeypatch: pytest.MonkeyPatch, kubectl: Kubectl, *words: str) -> int:
    monkeypatch.setattr(cluster, "Kubectl", lambda *_: kubectl)
    return main([*WORDS, *words])


@pytest.mark.usefixtures("no_runs")
def test_a_dry_run_prints_what_would_be_applied_and_applies_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kubectl = Remembering()
    assert launched(monkeypatch, kubectl, "--dry-run") == EXIT_DONE
    printed = [each for each in yaml.safe_load_all(capsys.readouterr().out) if each]
    assert kubectl.applied == []
    assert not RunFolder(f"{RUNS}/pointmcd-1").exists()
    jobs = [each for each in printed if each["kind"] == "Job"]
    assert len(jobs) == 9
    assert launched(monkeypatch, kubectl, "--dry-run", "--json") == EXIT_DONE
    steps = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [step["step"] for step in steps][:4] == ["ingest", "teacher", "cache", "pretrain"]
    assert [workload_of(step["documents"]) for step in steps] == jobs


@pytest.mark.usefixtures("no_runs")
def test_steps_are_applied_in_order_until_one_fails_and_its_log_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kubectl = Remembering(lambda name: 64 if "-pretrain-" in name else 0)
    assert launched(monkeypatch, kubectl) == EXIT_DO_NOT_RETRY
    said = capsys.readouterr().err
    stages = [workload_of(each)["spec"]["template"]["spec"]["containers"][0]["args"] for each in kubectl.applied]
    assert [words[words.index("--") + 1] for words in stages] == ["ingest", "pretrain", "cache", "pretrain"]
    assert "[node 0] worker-0: step 1" in said
    assert "failed: the cluster says why" in said
    assert "    what went wrong" in said
    assert "the same command goes on:\n  viewpoint launch pointmcd --nodes 2 --on k8s" in said
    run = RunFolder(f"{RUNS}/pointmcd-1")
    assert run.config().metrics.port == 9400
    failed = run.events()[-1]
    assert (failed["event"], failed["step"], failed["reason"]) == ("launch_failed", "pretrain", "the cluster says why")
    assert failed["log"].startswith("`kubectl logs ")
    assert kubectl.asked.count("apply --dry-run=server -f -") == 4, "the server judges before anything is created"


@pytest.mark.usefixtures("no_runs")
def test_resubmitting_removes_a_job_that_ended_and_goes_on_in_the_same_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kubectl = Remembering(lambda name: 1)
    assert launched(monkeypatch, kubectl) == EXIT_FAILED
    first = workload_of(kubectl.applied[0])["metadata"]["name"]
    kubectl.ends = lambda name: 2
    assert launched(monkeypatch, kubectl) == EXIT_ASKED_WRONGLY
    assert kubectl.deleted == [first]
    assert workload_of(kubectl.applied[1])["metadata"]["name"] == first
    assert "pointmcd-1" in capsys.readouterr().err


@pytest.mark.usefixtures("no_runs")
def test_a_job_that_runs_is_followed_and_not_applied_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kubectl = Remembering(lambda name: 1)
    assert launched(monkeypatch, kubectl) == EXIT_FAILED
    name = workload_of(kubectl.applied[0])["metadata"]["name"]
    kubectl.looks[name] = -2  # looks until it ends
    assert launched(monkeypatch, kubectl) == EXIT_FAILED
    assert len(kubectl.applied) == 1
    assert "runs already, with the settings that it was started with" in capsys.readouterr().err


@pytest.mark.usefixtures("no_runs")
def test_a_cancelled_job_is_a_stopped_launch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launched(monkeypatch, Remembering(lambda name: EXIT_CANCELLED)) == EXIT_STOPPED
    assert "was cancelled, and all saved" in capsys.readouterr().err
    assert RunFolder(f"{RUNS}/pointmcd-1").last_event()["event"] == "launch_stopped"  # type: ignore[index]


@pytest.mark.usefixtures("no_runs")
def test_a_run_that_somebody_else_works_on_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launched(monkeypatch, Remembering(lambda name: 1)) == EXIT_FAILED
    kubectl = Remembering()
    with Presence(RunFolder(f"{RUNS}/pointmcd-1")):
        assert launched(monkeypatch, kubectl) == EXIT_FAILED
    assert kubectl.applied == []
    assert "is being worked on by process" in capsys.readouterr().err


@pytest.mark.usefixtures("no_runs")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--queue", "fast"), "has no Kueue queue 'fast'"),
        (("--runs", "runs"), "--runs s3://bucket/runs"),
        (("--data", "shapes.zarr"), "--data s3://bucket/shapes.zarr"),
        (("--nodes", "5"), "cannot share the global batch"),
        (("--image", "registry.example/viewpoint:0.1.0"), "placeholder"),
        (("--manifest", "nowhere"), "no such file or folder"),
        (("--chaos", "kill-worker@3"), "kubectl delete pod"),
    ],
)
def test_what_would_fail_later_is_refused_before_anything_is_applied(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    kubectl = Remembering()
    assert launched(monkeypatch, kubectl, *words) in (EXIT_ASKED_WRONGLY, EXIT_DO_NOT_RETRY)
    assert said in capsys.readouterr().err
    assert kubectl.applied == []


@pytest.mark.usefixtures("no_runs")
def test_without_runs_a_launch_takes_those_of_the_site_or_says_how_to_name_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(cluster, "Kubectl", lambda *_: Remembering(lambda name: 1))
    words = [word for word in WORDS if word not in ("--runs", RUNS)]
    assert main(words) == EXIT_ASKED_WRONGLY
    assert "No place for runs" in capsys.readouterr().err
    mine = tmp_path / "mine.yaml"
    mine.write_text(Path(PLAIN).read_text().replace("s3://your-bucket/runs", RUNS))
    assert main([*words, "--manifest", str(mine)]) == EXIT_FAILED
    assert RunFolder(f"{RUNS}/pointmcd-1").exists()


def test_a_namespace_and_a_secret_that_are_missing_are_refused() -> None:
    kubectl = Remembering()
    with pytest.raises(DoNotRetry, match="no secret 'viewpoint-storage'"):
        check_there(kubectl, documents(GOLDEN / "overlays-s3.yaml"), Cluster("m"))
    kubectl.there["secret", "viewpoint-storage"] = {}
    check_there(kubectl, documents(GOLDEN / "overlays-s3.yaml"), Cluster("m"))
    with pytest.raises(DoNotRetry, match="kubectl create namespace other"):
        check_there(kubectl, documents(GOLDEN / "overlays-s3.yaml"), Cluster("m", namespace="other"))


def test_options_of_clusters_need_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "pointmcd", "--image", "a", "--queue", "b"]) == EXIT_ASKED_WRONGLY
    assert "--image and --queue goes with --on k8s" in capsys.readouterr().err


def test_a_missing_kubectl_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(DoNotRetry, match="apt-get install kubernetes-client"):
        Kubectl().words("get", "pods")


def test_kubectl_is_told_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    words = Kubectl("staging", "mine").words("get", "pods")
    assert words == ["/bin/kubectl", "--context", "staging", "--namespace", "mine", "get", "pods"]
    assert Kubectl().words("version", namespace="a") == ["/bin/kubectl", "--namespace", "a", "version"]


@pytest.mark.parametrize(
    ("said", "error"),
    [("Unable to connect to the server: dial tcp", ViewpointError), ('Error: unknown field "spec.x"', DoNotRetry)],
)
def test_kubectl_s_errors_are_ours(monkeypatch: pytest.MonkeyPatch, said: str, error: type[Exception]) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    done = subprocess.CompletedProcess([], 1, stdout="", stderr=said)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(ViewpointError, match="kubectl get job a") as raised:
        Kubectl().get("job", "a")
    assert type(raised.value) is error


def test_a_file_that_is_no_manifest_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    for text in ("a: [", "just: this", "- 1"):
        path.write_text(text)
        with pytest.raises(AskedWrongly, match="--manifest"):
            Kubectl().read(str(path))


@pytest.mark.parametrize("text", ["n", "Y", "1e3", "1.5E3", "1.e5", "0o17", "010", "08", ".5", "true", "1_000", "0x1f"])
def test_text_stays_text_for_kubectl_which_reads_yaml_in_another_way(text: str) -> None:
    assert cluster.as_yaml({"a": text}) == f"a: '{text}'\n"
    for plain in ("name", "1e", "v1", "e3", "a-1"):
        assert cluster.as_yaml({"a": plain, "b": 8, "c": 0.5, "d": True}) == f"a: {plain}\nb: 8\nc: 0.5\nd: true\n"


def test_an_operator_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    said = 'error: the server doesn\'t have a resource type "localqueues"'
    done = subprocess.CompletedProcess([], 1, stdout="", stderr=said)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(DoNotRetry, match="The cluster has no Kueue"):
        Kubectl().get("localqueues.kueue.x-k8s.io", "fast", "viewpoint")


def test_the_state_of_a_job_is_its_conditions() -> None:
    def with_condition(kind: str, status: str = "True") -> Document:
        return {"status": {"conditions": [{"type": kind, "status": status}]}}

    assert state_of(None) == "absent"
    assert state_of({}) == "running"
    assert state_of(with_condition("Suspended")) == "running"
    assert state_of(with_condition("Complete")) == "done"
    assert state_of(with_condition("Completed")) == "done", "as a JobSet says it"
    assert state_of(with_condition("Failed")) == "failed"
    assert state_of(with_condition("Failed", "False")) == "running"


def test_the_pod_to_blame_is_the_one_whose_code_says_most(monkeypatch: pytest.MonkeyPatch) -> None:
    job = ClusterJob(Remembering(), workload_of(documents(GOLDEN / "overlays-plain.yaml")))
    pods = [pod("a", 1), pod("b", 137), pod("c", 64), pod("d", 0), pod("e")]
    monkeypatch.setattr(job, "pods", lambda: pods)
    assert job.culprit() == ("c", 64)
    pods[2] = pod("c", 75)
    assert job.culprit() == ("a", 1)
    pods[:] = [pod("e")]
    assert job.culprit() == (None, EXIT_FAILED)


def test_lines_begin_with_the_number_of_their_pod() -> None:
    assert prefix_of(pod("a-3-xyz", index=3)) == "[node 3]"
    store = pod("a-store-0-0-x", **{"jobset.sigs.k8s.io/replicatedjob-name": "store"})
    assert prefix_of(store) == "[store]"
    assert prefix_of({"metadata": {"name": "a-x"}}) == "[a-x]"
