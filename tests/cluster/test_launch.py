"""`viewpoint launch --on k8s` with genuine kubectl on the double's API server; jobs end as each test says, nothing runs."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml

from datastore.errors import EXIT_ASKED_WRONGLY, EXIT_DO_NOT_RETRY, EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from launcher import cluster
from launcher.__main__ import main
from launcher.pod import EXIT_CANCELLED
from tests.cluster.api import Api, running_api
from tests.cluster.client import Client
from tests.cluster.state import State, now, owner_reference
from tests.k8s.golden import GOLDEN, documents
from tests.k8s.schemas import Document
from trainer.runfolder import RunFolder

RUNS = "memory://bucket/runs"
PLAIN = str(GOLDEN / "overlays-plain.yaml")
IMAGE = "registry.test/viewpoint:1"
WORDS = ["launch", "pointmcd", "--nodes", "4", "--on", "k8s", "--runs", RUNS, "--image", IMAGE, "--manifest", PLAIN]
NAMESPACE = "viewpoint"


def logs_of(
    namespace: str,
    pod: str,
    *,
    follow: bool,
    tail: int | None,
    container: str | None,
    previous: bool,
    timestamps: bool,
) -> Iterable[bytes]:
    return [f"{pod} says something\n".encode()]


class Ending:
    """What a controller and kubelets would say: a job's pods run, and end with the code that `code_of` has for it; None: never."""

    def __init__(self, state: State, code_of: Callable[[str], int | None]) -> None:
        self.state, self.code_of = state, code_of
        self.seen: list[str] = []
        self._watch = state.watch(since=state.resource_version)
        self._thread = threading.Thread(target=self._end_all, daemon=True)

    def _end_all(self) -> None:
        for event in self._watch:
            if event.type == "ADDED" and event.object["kind"] in ("Job", "JobSet"):
                self.seen.append(event.object["metadata"]["name"])
                self.run(event.object)

    def run(self, job: Document) -> None:
        """Makes a job's pod, and ends both if they shall end."""
        name, label = job["metadata"]["name"], {"Job": "batch.kubernetes.io/job-name"}.get(job["kind"])
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": f"{name}-0-abcde",
                "namespace": NAMESPACE,
                "labels": {label or "jobset.sigs.k8s.io/jobset-name": name},
                "annotations": {"batch.kubernetes.io/job-completion-index": "0"},
                "ownerReferences": [owner_reference(job)],
            },
            "spec": {"containers": [{"name": "viewpoint", "image": "i"}], "restartPolicy": "Never"},
        }
        code = self.code_of(name)
        self._say(self.state.create(pod), "Running", {"running": {"startedAt": now()}})
        if code is None:
            return
        self._say(pod, "Succeeded" if code == 0 else "Failed", {"terminated": {"exitCode": code}})
        ended = {
            "type": ("Complete" if job["kind"] == "Job" else "Completed") if code == 0 else "Failed",
            "status": "True",
            "lastTransitionTime": now(),
            "reason": "ForTheTest",
            "message": "the cluster says why",
        }
        self.state.change(
            job["kind"],
            NAMESPACE,
            name,
            lambda found: found.setdefault("status", {}).update(conditions=[ended]),
            status=True,
        )

    def _say(self, pod: Document, phase: str, container: Document) -> None:
        status = {
            "name": "viewpoint",
            "ready": False,
            "restartCount": 0,
            "image": "i",
            "imageID": "",
            "state": container,
        }

        def edit(found: Document) -> None:
            found["status"] |= {"phase": phase, "containerStatuses": [status]}

        self.state.change("Pod", NAMESPACE, pod["metadata"]["name"], edit, status=True)

    def __enter__(self) -> "Ending":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._watch.close()
        self._thread.join()


@pytest.fixture
def state() -> State:
    state = State()
    state.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
    return state


@pytest.fixture
def server(state: State, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    monkeypatch.setattr(cluster, "_POLL_SECONDS", 0.1)
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]
    with running_api(state, logs=logs_of) as api:
        for name, value in api.environment.items():
            monkeypatch.setenv(name, value)
        yield api


@contextmanager
def interrupting(state: State, kind: str) -> Iterator[None]:
    """Ctrl-C, once the first job of that kind is there."""
    watch = state.watch(kind, since=state.resource_version)

    def wait() -> None:
        if watch.next(60) is not None:
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=wait)
    thread.start()
    yield
    watch.close()
    thread.join()


@pytest.mark.usefixtures("server")
def test_the_server_takes_every_document_that_a_dry_run_prints(
    server: Api, state: State, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*WORDS, "--dry-run"]) == EXIT_DONE
    printed = capsys.readouterr().out
    assert state.list("Job") == []
    made = Client(server.environment, NAMESPACE)("apply", "--dry-run=server", "-f", "-", given=printed)
    jobs = [each for each in yaml.safe_load_all(printed) if each and each["kind"] == "Job"]
    assert made.count("job.batch/") == len(jobs) == 9
    assert "unchanged" not in made


@pytest.mark.usefixtures("server")
def test_jobs_are_applied_one_after_the_other_until_one_fails(state: State, capsys: pytest.CaptureFixture[str]) -> None:
    with Ending(state, lambda name: 64 if "teacher" in name else 0) as ending:
        assert main(WORDS) == EXIT_DO_NOT_RETRY
    said = capsys.readouterr().err
    ingest, teacher = ending.seen
    assert f"corpus: applied Job {ingest}, 4 pods" in said
    assert "corpus: done in" in said
    assert f"Job {teacher} failed: the cluster says why" in said
    assert f"    {teacher}-0-abcde says something" in said
    assert f"[node 0] {ingest}-0-abcde says something" in said
    assert state.get("Job", NAMESPACE, ingest)["spec"]["completions"] == 4
    run = RunFolder(f"{RUNS}/pointmcd-1")
    assert [event["event"] for event in run.events()] == ["launch_started", "step_finished", "launch_failed"]
    with Ending(state, lambda name: EXIT_CANCELLED) as again:
        assert main(WORDS) == EXIT_STOPPED
    assert again.seen == [ingest], "nothing was written: the job that ended is removed, and begun again under its name"
    assert "was cancelled, and all saved" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("server")
def test_ctrl_c_deletes_the_job_and_waits_for_its_pods(state: State, capsys: pytest.CaptureFixture[str]) -> None:
    with interrupting(state, "Pod"), Ending(state, lambda name: None):
        assert main(WORDS) == EXIT_STOPPED
    assert state.list("Job") == state.list("Pod") == []
    assert "its pods save first" in capsys.readouterr().err


@pytest.mark.slow
def test_a_job_that_runs_is_followed_and_not_applied_again(
    server: Api, state: State, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*WORDS, "--dry-run"]) == EXIT_DONE
    first = capsys.readouterr().out.partition("# 2.")[0]
    made = [state.create(each) for each in yaml.safe_load_all(first) if each]
    job = next(each for each in made if each["kind"] == "Job")

    def delete_once_it_is_followed() -> None:
        while not any("/log?" in request for request in server.requests):
            time.sleep(0.05)
        state.delete("Job", NAMESPACE, job["metadata"]["name"])

    with Ending(state, lambda name: None) as ending:
        ending.run(job)
        somebody = threading.Thread(target=delete_once_it_is_followed)
        somebody.start()
        assert main(WORDS) == EXIT_STOPPED
        somebody.join()
    assert ending.seen == []
    said = capsys.readouterr().err
    assert "runs already, with the settings that it was started with" in said
    assert "was deleted by somebody" in said


@pytest.mark.slow
@pytest.mark.usefixtures("server")
def test_a_job_set_is_followed_like_a_job(state: State, capsys: pytest.CaptureFixture[str]) -> None:
    with Ending(state, lambda name: 1 if "teacher" in name else 0) as ending:
        assert main([*WORDS, "--manifest", str(GOLDEN / "overlays-jobset.yaml")]) == EXIT_FAILED
    said = capsys.readouterr().err
    assert f"corpus: applied JobSet {ending.seen[0]}" in said
    assert "corpus: done in" in said
    assert f"JobSet {ending.seen[1]} failed" in said


@pytest.mark.usefixtures("server")
def test_what_the_cluster_lacks_is_refused_before_anything_is_applied(
    state: State, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: str) -> str:
        assert main([*WORDS, *words]) in (EXIT_DO_NOT_RETRY, EXIT_ASKED_WRONGLY)
        assert state.list("Job") == []
        return capsys.readouterr().err

    assert "The cluster has no namespace 'none'" in refused("--namespace", "none")
    assert "has no secret 'viewpoint-storage'" in refused("--manifest", str(GOLDEN / "overlays-s3.yaml"))
    assert "has no Kueue queue 'fast'" in refused("--queue", "fast")


@pytest.mark.slow
def test_a_cluster_without_kueue_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    state = State(custom=False)
    state.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
    with running_api(state) as api:
        for name, value in api.environment.items():
            monkeypatch.setenv(name, value)
        assert main([*WORDS, "--queue", "fast"]) == EXIT_DO_NOT_RETRY
        assert "has no Kueue" in capsys.readouterr().err
        assert main([*WORDS, "--manifest", str(GOLDEN / "overlays-jobset.yaml")]) == EXIT_DO_NOT_RETRY
        assert "has no JobSet" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("server")
def test_what_the_server_refuses_is_refused_before_the_run_begins(
    state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def edited(edit: Callable[[Any], None]) -> str:
        given = yaml.safe_load(yaml.safe_dump(documents(GOLDEN / "overlays-plain.yaml")))
        edit(next(each for each in given if each["kind"] == "Job"))
        path = tmp_path / "manifest.yaml"
        path.write_text(yaml.safe_dump_all(given))
        return str(path)

    manifest = edited(lambda job: job["spec"]["template"]["spec"].update(terminationGraceSeconds=3))
    assert main([*WORDS, "--manifest", manifest]) == EXIT_DO_NOT_RETRY
    assert 'unknown field "spec.template.spec.terminationGraceSeconds"' in capsys.readouterr().err
    assert state.list("Job") == []
    manifest = edited(lambda job: job["metadata"]["labels"].update(site="n", number="1e3"))
    with Ending(state, lambda name: 1):
        assert main([*WORDS, "--manifest", manifest]) == EXIT_FAILED
    (job,) = state.list("Job")
    assert (job["metadata"]["labels"]["site"], job["metadata"]["labels"]["number"]) == ("n", "1e3")
