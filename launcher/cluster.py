"""Drives a launch on Kubernetes: each step is a job that kubectl applies, watches and reads the logs of.

The launcher needs the cluster only while it follows. Pods go on without it: the same command finds its job again and follows
it, or begins the next step. It writes each step's config into the run folder, as it does on local nodes; pods do the rest.
"""

import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

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
from datastore.progress import format_seconds
from launcher.driver import begin_run, headline, remember_features, resolve
from launcher.facts import observe
from launcher.jobset import (
    QUEUE_LABEL,
    Cluster,
    Document,
    Filling,
    check_fillable,
    check_urls,
    fill,
    filling_of,
    runs_of,
    secrets_of,
    workload_of,
)
from launcher.plan import Goal, Step, plan
from launcher.pod import EXIT_CANCELLED, METRICS_PORT
from launcher.presence import holder_of
from launcher.runs import COMPLETE
from launcher.spec import LaunchSpec
from launcher.stop import STOP_REQUESTED, StopRequest, Urgency
from launcher.suitable_store import refuse_unsuitable_corpus, refuse_unsuitable_store
from launcher.summary import STEP_FINISHED, results_of, summarise
from launcher.tail import complaint
from launcher.terminal import Screen, open_screen
from trainer.runfolder import RunFolder

SITE_MANIFEST: Final = str(Path(__file__).parent.parent / "k8s" / "stages" / "train")
_POLL_SECONDS: Final = 2.0
_LAST_LINES_SECONDS: Final = 10.0  # for the rest of the logs of pods that have ended
_MOST_FOLLOWED: Final = 64  # pods: each is a connection of kubectl's
_OPERATORS: Final = {"localqueues.kueue.x-k8s.io": "Kueue", "jobsets.jobset.x-k8s.io": "JobSet"}
_FAILURE_LINES: Final = 15
_CODES_THAT_SAY_MOST: Final = (EXIT_DO_NOT_RETRY, EXIT_ASKED_WRONGLY, EXIT_CANCELLED)


def launch_on_cluster(
    spec: LaunchSpec, cluster: Cluster, *, command: str, dry_run: bool = False, as_json: bool = False
) -> int:
    """Runs a job to its report on a cluster and returns the exit code; `dry_run` prints what would be applied."""
    if spec.chaos:
        raise AskedWrongly("--chaos is for local nodes. On a cluster, `kubectl delete pod` does the same.")
    kubectl = Kubectl(cluster.context, cluster.namespace)
    documents = kubectl.read(cluster.manifest)
    check_fillable(documents, cluster)
    spec = replace(spec, runs_url=spec.runs_url or runs_of(documents))
    check_urls({"--runs": spec.runs_url, "--data": spec.data_url})
    goal, run = resolve(spec)
    steps = plan(goal, observe(goal))
    if not run.is_complete:
        refuse_unsuitable_store(goal, spec.layout, steps)
    if dry_run:
        print_documents(goal, spec, cluster, steps, documents, as_json=as_json)
        return EXIT_DONE
    with open_screen() as screen:
        screen.say(headline(goal, spec))
        if run.is_complete:
            screen.say(f"Run {run.folder.url} is complete: nothing to do. Another one: leave --run out, or a new name.")
        else:
            check_there(kubectl, documents, cluster)
            if run.is_new:
                run.folder.write_config(goal.config)
            code = _Followed(goal, spec, cluster, kubectl, documents, screen, command).run(steps)
            if code != EXIT_DONE:
                return code
    if as_json:
        for result in results_of(run.folder):
            print(json.dumps(result))
    else:
        print(summarise(run.folder, goal, spec))
    return EXIT_DONE


def print_documents(
    goal: Goal,
    spec: LaunchSpec,
    cluster: Cluster,
    steps: Sequence[Step],
    documents: Sequence[Document],
    *,
    as_json: bool,
) -> None:
    """Prints exactly what would be applied, step after step; creates nothing."""
    for number, step in enumerate(steps, start=1):
        filled = [] if step.done else fill(documents, filling_of(step, spec.layout, goal.run_url, cluster))
        if as_json:
            print(json.dumps({"step": step.name, "done": step.done, "documents": filled}))
            continue
        when = "complete already" if step.done else "applied when the steps before are complete"
        print(f"# {number}. {step.title}: {when}")
        print("".join(f"---\n{as_yaml(document)}" for document in filled), end="")


class _Dumper(yaml.SafeDumper):
    """Quotes the words that kubectl's YAML takes for truths and numbers, and Python's does not."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"[yYnN]$"), list("yYnN"))
_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?$|0[oO][0-7]+$"),
    list("-+.0123456789"),
)


def as_yaml(document: Document) -> str:
    """A document as it is given to kubectl."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=140)


def check_there(kubectl: "Kubectl", documents: Sequence[Document], cluster: Cluster) -> None:
    """Refuses what would leave pods waiting for ever: a queue, namespace or secret that is not there."""
    workload = workload_of(documents)
    namespace = cluster.namespace or workload["metadata"].get("namespace")
    if namespace is not None and kubectl.get("namespace", namespace) is None:
        raise DoNotRetry(
            f"The cluster has no namespace {namespace!r}. `kubectl create namespace {namespace}`, or --namespace."
        )
    if workload["kind"] == "JobSet":
        kubectl.get("jobsets.jobset.x-k8s.io", workload["metadata"]["name"], namespace)  # refused where there are none
    queue = cluster.queue or workload["metadata"].get("labels", {}).get(QUEUE_LABEL)
    if queue is not None and kubectl.get("localqueues.kueue.x-k8s.io", queue, namespace) is None:
        raise DoNotRetry(
            f"Namespace {namespace!r} has no Kueue queue {queue!r}: the job would wait for ever. `kubectl get localqueues` "
            f"lists those that are there; k8s/components/kueue/queues.yaml has examples."
        )
    for name in secrets_of(documents):
        if kubectl.get("secret", name, namespace) is None:
            raise DoNotRetry(
                f"Namespace {namespace!r} has no secret {name!r}, which the manifest refers to: pods would not start. "
                f"k8s/components/s3/kustomization.yaml says how to make it, and for whom it is left out."
            )


class Kubectl:
    """kubectl, with its errors as ours."""

    def __init__(self, context: str | None = None, namespace: str | None = None) -> None:
        self._context, self._namespace = context, namespace

    def words(self, *words: str, namespace: str | None = None) -> list[str]:
        """A command line of kubectl's."""
        program = shutil.which("kubectl")
        if program is None:
            raise DoNotRetry(
                "kubectl is missing: --on k8s applies and watches with it. Debian and Ubuntu: `apt-get install "
                "kubernetes-client`; elsewhere see https://kubernetes.io/docs/tasks/tools/."
            )
        where = namespace or self._namespace
        return [
            program,
            *(("--context", self._context) if self._context else ()),
            *(("--namespace", where) if where else ()),
            *words,
        ]

    def read(self, manifest: str) -> list[Document]:
        """The documents of a folder that kustomize builds, or of a file."""
        path = Path(manifest)
        if not path.exists():
            raise AskedWrongly(f"--manifest {manifest}: there is no such file or folder.")
        text = self._run("kustomize", manifest) if path.is_dir() else path.read_text()
        try:
            found = [document for document in yaml.safe_load_all(text) if document]
        except yaml.YAMLError as error:
            raise AskedWrongly(f"--manifest {manifest} is not valid YAML: {error}") from error
        if not all(isinstance(document, dict) and "kind" in document and "metadata" in document for document in found):
            raise AskedWrongly(f"--manifest {manifest} has something without kind and metadata: it is no manifest.")
        return found

    def apply(self, documents: Sequence[Document], *, dry_run: bool = False) -> None:
        """Creates or updates the objects; with `dry_run`, the server only says whether it would."""
        text = "".join(f"---\n{as_yaml(document)}" for document in documents)
        self._run("apply", *(["--dry-run=server"] if dry_run else []), "-f", "-", given=text)

    def get(self, kind: str, name: str, namespace: str | None = None) -> Document | None:
        """An object, or None where it is not there."""
        text = self._run("get", kind, name, "--ignore-not-found", "-o", "json", namespace=namespace)
        found: Document | None = json.loads(text) if text.strip() else None
        return found

    def pods(self, selector: str, namespace: str | None) -> list[Document]:
        """Pods by their labels."""
        found = json.loads(self._run("get", "pods", "-l", selector, "-o", "json", namespace=namespace))
        pods: list[Document] = found["items"]
        return pods

    def delete(self, kind: str, name: str, namespace: str | None) -> None:
        """Ends an object and its pods, and returns when they are gone: pods save first."""
        self._run(
            "delete", kind, name, "--cascade=foreground", "--wait=true", "--ignore-not-found", namespace=namespace
        )

    def last_lines(self, pod: str, count: int, namespace: str | None) -> list[str]:
        """The end of a pod's log."""
        return self._run("logs", pod, f"--tail={count}", namespace=namespace).splitlines()

    def follow(self, pod: str, namespace: str | None) -> subprocess.Popen[str]:
        """A process that prints a pod's log as it grows."""
        return subprocess.Popen(
            self.words("logs", "--follow", pod, namespace=namespace),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is for the launcher
        )

    def _run(self, *words: str, given: str | None = None, namespace: str | None = None) -> str:
        done = subprocess.run(
            self.words(*words, namespace=namespace),
            input=given,
            capture_output=True,
            text=True,
            start_new_session=True,
            check=False,
        )
        if done.returncode == 0:
            return done.stdout
        said = done.stderr.strip() or done.stdout.strip()
        message = f"`kubectl {' '.join(words)}` failed: {said}"
        if "doesn't have a resource type" in said:
            operator = next((name for kind, name in _OPERATORS.items() if kind in words), "operator for that")
            raise DoNotRetry(
                f"The cluster has no {operator}: {said}. Have it installed, or leave it out: k8s/overlays/plain needs no operator."
            )
        if "connection refused" in said or "timeout" in said.lower() or "Unable to connect" in said:
            raise ViewpointError(f"{message}\nIs the cluster there? `kubectl cluster-info` says which one it would be.")
        raise DoNotRetry(message)


class _Followed:
    """A launch that runs: one step's job after the other."""

    def __init__(
        self,
        goal: Goal,
        spec: LaunchSpec,
        cluster: Cluster,
        kubectl: Kubectl,
        documents: Sequence[Document],
        screen: Screen,
        command: str,
    ) -> None:
        self._goal, self._spec, self._cluster = goal, spec, cluster
        self._kubectl, self._documents = kubectl, documents
        self._screen, self._command = screen, command
        self._run = RunFolder(goal.run_url, writer="launcher")
        self._why: dict[str, str] = {}  # the reason of a failure, and where its log is

    def run(self, steps: Sequence[Step]) -> int:
        """The exit code of the launch."""
        started = time.monotonic()
        with ExitStack() as held:
            stop = held.enter_context(StopRequest())
            held.callback(self._run.flush)
            layout = self._spec.layout
            self._run.append_event(
                "launch_started", command=self._command, nodes=layout.nodes, world=layout.world, on="k8s"
            )
            for step in steps:
                if step.done:
                    self._screen.end(step.title, "reused: complete already")
                    continue
                code = self._step(step, stop)
                if code == EXIT_STOPPED:
                    self._run.append_event("launch_stopped", step=step.name)
                    self._screen.say(
                        f"Stopped; what is finished is kept in {self._goal.run_url}. The same command goes on:\n  {self._command}"
                    )
                elif code != EXIT_DONE:
                    self._run.append_event("launch_failed", step=step.name, exit_code=code, **self._why)
                    self._screen.say(
                        f"\nWhat is finished is kept. Once that is mended, the same command goes on:\n  {self._command}"
                    )
                if code != EXIT_DONE:
                    return code
                if step.kind == "ingest":
                    refuse_unsuitable_corpus(self._run, self._goal, layout, steps)
            self._run.append_event(COMPLETE, seconds=time.monotonic() - started)
        return EXIT_DONE

    def _step(self, step: Step, stop: StopRequest) -> int:
        filling = filling_of(step, self._spec.layout, self._goal.run_url, self._cluster)
        filled = fill(self._documents, filling)
        workload = workload_of(filled)
        job = ClusterJob(self._kubectl, workload)
        if job.state() in ("done", "failed"):  # of an earlier launch: the run's folder says what is left to do
            job.delete()
        if job.state() == "absent":
            holder = holder_of(RunFolder(self._goal.run_url))
            if holder is not None:
                raise ViewpointError(
                    f"{self._goal.run_url} is being worked on by {holder}. Watch it with `viewpoint status "
                    f"{self._goal.run_url}`, stop it with `viewpoint cancel {self._goal.run_url}`."
                )
            self._run.remove(STOP_REQUESTED)
            if step.config is not None:
                begin_run(self._goal, RunFolder(step.run_url, writer="launcher"), with_metrics(step.config))
            self._kubectl.apply(filled, dry_run=True)
            self._kubectl.apply(filled)
            self._screen.say(f"{step.title}: applied {job}, {filling.pods} pod{'s' * (filling.pods > 1)}")
        else:
            self._screen.say(f"{step.title}: {job} runs already, with the settings that it was started with")
        started = time.monotonic()
        code = self._follow(job, filling, stop)
        seconds = time.monotonic() - started
        if code == EXIT_DONE:
            self._screen.end(step.title, f"done in {format_seconds(seconds)}")
            self._run.append_event(STEP_FINISHED, step=step.name, stage=step.kind, title=step.title, seconds=seconds)
            if step.teacher is not None:
                remember_features(self._goal, step.teacher, job.last_json())
        elif code == EXIT_STOPPED:
            self._run.remove(STOP_REQUESTED)
            self._screen.end(step.title, "stopped")
        else:
            self._screen.end(step.title, f"failed with exit code {code}")
        return code

    def _follow(self, job: "ClusterJob", filling: Filling, stop: StopRequest) -> int:
        """Shows the logs of all pods until the job has ended; the exit code."""
        with LogStream(self._kubectl, job.namespace, self._screen, filling.pods) as logs:
            while (state := job.state()) not in ("done", "failed", "absent"):
                logs.follow(job.pods())
                if stop.urgency is not Urgency.GO_ON:
                    self._screen.say(f"Asked to stop: deleting {job}; its pods save first.")
                    job.delete()
                    return EXIT_STOPPED
                time.sleep(_POLL_SECONDS)
            logs.follow(job.pods())
        if state == "done":
            return EXIT_DONE
        if state == "absent":
            self._screen.say(f"{job} was deleted by somebody; its pods have saved.")
            return EXIT_STOPPED
        return self._explain(job)

    def _explain(self, job: "ClusterJob") -> int:
        name, code = job.culprit()
        if code == EXIT_CANCELLED:
            self._screen.say(f"{job} was cancelled, and all saved.")
            return EXIT_STOPPED
        reason = job.reason()
        self._why = {"reason": reason}
        self._screen.say(f"\n{job} failed: {reason}")
        if name is not None:
            self._screen.say(f"\nThe end of the log of pod {name}:")
            lines = self._kubectl.last_lines(name, _FAILURE_LINES, job.namespace)
            for line in lines:
                self._screen.say(f"    {line}")
            namespace = job.namespace or self._cluster.namespace
            show = f"kubectl logs {name}" + (f" --namespace {namespace}" if namespace else "")
            self._why = {"reason": complaint(lines) or reason, "log": f"`{show}`"}
        return code


class ClusterJob:
    """A Job or JobSet on the cluster."""

    def __init__(self, kubectl: Kubectl, workload: Document) -> None:
        self._kubectl, self._workload = kubectl, workload
        self.name: str = workload["metadata"]["name"]
        self.namespace: str | None = workload["metadata"].get("namespace")
        group = workload["apiVersion"].partition("/")[0]
        self._kind = f"{workload['kind'].lower()}s.{group}"

    def __str__(self) -> str:
        return f"{self._workload['kind']} {self.name}"

    def state(self) -> str:
        """absent, running, done or failed."""
        return state_of(self._kubectl.get(self._kind, self.name, self.namespace))

    def reason(self) -> str:
        """Why it failed, in the cluster's words."""
        found = self._kubectl.get(self._kind, self.name, self.namespace) or {}
        failed = [each for each in found.get("status", {}).get("conditions", ()) if each["type"] == "Failed"]
        return failed[0].get("message") or failed[0].get("reason", "") if failed else "it says no more"

    def pods(self) -> list[Document]:
        """Its pods, ended ones included."""
        label = "batch.kubernetes.io/job-name" if self._workload["kind"] == "Job" else "jobset.sigs.k8s.io/jobset-name"
        return self._kubectl.pods(f"{label}={self.name}", self.namespace)

    def culprit(self) -> tuple[str | None, int]:
        """The pod whose exit code says most, and that code."""
        codes = {name: code for name, code in map(_exit_of, self.pods()) if code not in (None, EXIT_DONE)}
        for wanted in (*_CODES_THAT_SAY_MOST, *codes.values()):
            for name, code in codes.items():
                if code is not None and code == wanted:
                    return name, code
        return None, EXIT_FAILED

    def last_json(self) -> dict[str, Any]:
        """The last JSON object that its pods printed."""
        for pod in self.pods():
            for line in reversed(self._kubectl.last_lines(pod["metadata"]["name"], _FAILURE_LINES, self.namespace)):
                if line.startswith("{") and line.endswith("}"):
                    found: dict[str, Any] = json.loads(line)
                    return found
        raise ViewpointError(f"The pods of {self} printed no result, or are gone already.")

    def delete(self) -> None:
        """Ends it; its pods save first."""
        self._kubectl.delete(self._kind, self.name, self.namespace)


class LogStream:
    """Logs of all pods in one stream on the screen, each line with its pod's number; pods that come later, too."""

    def __init__(self, kubectl: Kubectl, namespace: str | None, screen: Screen, pods: int) -> None:
        self._kubectl, self._namespace, self._screen = kubectl, namespace, screen
        self._followed: dict[str, tuple[subprocess.Popen[str], threading.Thread]] = {}
        self._lock = threading.Lock()
        if pods > _MOST_FOLLOWED:
            screen.say(f"Logs are shown of {_MOST_FOLLOWED} of {pods} pods; the run's folder has all when they end.")

    def follow(self, pods: Sequence[Document]) -> None:
        """Follows those that have begun and are not followed yet."""
        for pod in pods:
            name, phase = pod["metadata"]["name"], pod.get("status", {}).get("phase")
            if name in self._followed or phase in (None, "Pending") or len(self._followed) >= _MOST_FOLLOWED:
                continue
            process = self._kubectl.follow(name, self._namespace)
            thread = threading.Thread(target=self._show, args=(process, prefix_of(pod)), name=name, daemon=True)
            self._followed[name] = (process, thread)
            thread.start()

    def _show(self, process: subprocess.Popen[str], prefix: str) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with self._lock:
                self._screen.say(f"{prefix} {line.rstrip()}")

    def __enter__(self) -> "LogStream":
        return self

    def __exit__(self, *error: object) -> None:
        deadline = time.monotonic() + _LAST_LINES_SECONDS
        for process, thread in self._followed.values():
            thread.join(max(0.0, deadline - time.monotonic()))
            process.kill()
        for process, thread in self._followed.values():
            process.wait()
            thread.join()
            assert process.stdout is not None
            process.stdout.close()


def prefix_of(pod: Document) -> str:
    """What the lines of a pod begin with: its number, and its name where it is no node."""
    metadata = pod["metadata"]
    annotations, labels = metadata.get("annotations", {}), metadata.get("labels", {})
    if labels.get("jobset.sigs.k8s.io/replicatedjob-name", "node") != "node":
        return f"[{labels['jobset.sigs.k8s.io/replicatedjob-name']}]"
    index = annotations.get("batch.kubernetes.io/job-completion-index")
    return f"[{metadata['name']}]" if index is None else f"[node {index}]"


def state_of(found: Document | None) -> str:
    """absent, running, done or failed."""
    if found is None:
        return "absent"
    holding = {each["type"] for each in found.get("status", {}).get("conditions", ()) if each["status"] == "True"}
    if holding & {"Complete", "Completed"}:
        return "done"
    return "failed" if "Failed" in holding else "running"


def with_metrics(config: Any) -> Any:
    """The same run with the exporter on, at the port that manifests name, unless it has one."""
    if config.metrics.port is not None:
        return config
    return config.model_copy(update={"metrics": config.metrics.model_copy(update={"port": METRICS_PORT})})


def _exit_of(pod: Document) -> tuple[str, int | None]:
    for status in pod.get("status", {}).get("containerStatuses", ()):
        ended = status.get("state", {}).get("terminated")
        if ended is not None:
            return pod["metadata"]["name"], ended["exitCode"]
    return pod["metadata"]["name"], None
