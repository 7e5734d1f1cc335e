"""The Job controller of the cluster double: it makes the pods of Jobs, counts how they end, and says how the Job ends.

Our reading of what Kubernetes' documentation says of Jobs in 1.31 and later: Indexed and other Jobs, parallelism and elastic
completions, podFailurePolicy, podReplacementPolicy, backoffLimit and its delays (10 s, 20 s, 40 s ... ten minutes, anew after a
success), backoffLimitPerIndex, activeDeadlineSeconds, successPolicy, suspend, ttlSecondsAfterFinished, and the conditions on the
way. Left out: finalizers of pods (it counts in memory, and hears of each end from the watch), adoption of pods by labels,
manualSelector, managedBy.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self

from tests.cluster.refusals import Document, Refused
from tests.cluster.state import Event, State, now, owner_reference

INDEX: Final = "batch.kubernetes.io/job-completion-index"
INDEX_FAILURES: Final = "batch.kubernetes.io/job-index-failure-count"
FIRST_BACK_OFF, LAST_BACK_OFF = 10.0, 600.0
_ENDED: Final = ("Succeeded", "Failed")
_TICK_SECONDS: Final = 0.2
_logger = logging.getLogger("tests.cluster.job_controller")


@dataclass(frozen=True)
class Verdict:
    """What a Job's podFailurePolicy says of a failed pod."""

    action: str  # FailJob, FailIndex, Ignore or Count
    message: str = ""


@dataclass
class BackOff:
    """Failures in a row, and how long no pod is made after them."""

    first: float = FIRST_BACK_OFF
    failures: int = 0
    last_failure: float = 0.0

    def fail(self, at: float) -> None:
        """One more."""
        self.failures += 1
        self.last_failure = at

    def left(self, at: float) -> float:
        """Seconds until a pod may be made."""
        if self.failures == 0:
            return 0.0
        return max(0.0, self.last_failure + delay(self.failures, self.first) - at)


@dataclass
class _Memory:
    """What the controller knows of one Job beside its status."""

    back_off: BackOff
    pods: dict[str, Document] = field(default_factory=dict)  # by uid
    gone: set[str] = field(default_factory=set)
    counted: set[str] = field(default_factory=set)
    completed: set[int] = field(default_factory=set)
    failed_indexes: set[int] = field(default_factory=set)
    num_succeeded: int = 0
    num_failed: int = 0
    of_index: dict[int, BackOff] = field(default_factory=dict)  # ignored failures make it longer, too
    index_failures: Counter[int] = field(default_factory=Counter)
    failure: tuple[str, str] | None = None  # reason and message: it fails once all pods have ended
    success: tuple[str, str] | None = None
    active_since: float | None = None

    def living(self) -> list[Document]:
        """Pods that have not ended, those included that are told to."""
        return [pod for uid, pod in self.pods.items() if uid not in self.gone and phase_of(pod) not in _ENDED]

    def active(self) -> list[Document]:
        return [pod for pod in self.living() if "deletionTimestamp" not in pod["metadata"]]

    def terminating(self) -> list[Document]:
        return [pod for pod in self.living() if "deletionTimestamp" in pod["metadata"]]


class JobController:
    """Looks after all Jobs while it is entered."""

    def __init__(self, state: State, *, first_back_off: float = FIRST_BACK_OFF) -> None:
        """`first_back_off`: seconds; a cluster has ten, and no setting for it."""
        self._state, self._first_back_off = state, first_back_off
        self._memories: dict[str, _Memory] = {}  # by the Job's uid
        self._closing = threading.Event()
        self._watch = state.watch("Pod")
        self._thread = threading.Thread(target=self._run, name="job-controller", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._watch.close()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.is_set():
            event = self._watch.next(_TICK_SECONDS)
            if event is not None:
                self._hear(event)
            self.look(time.monotonic())

    def look(self, at: float) -> None:
        """Takes in what happened, and brings all Jobs as far as they can be at a moment."""
        while (event := self._watch.next(0)) is not None:
            self._hear(event)
        for job in self._state.list("Job"):
            try:
                self.reconcile(job, at)
            except Refused as error:  # somebody was faster: the next look sees it
                _logger.info("%s", error)

    def _hear(self, event: Event) -> None:
        pod = event.object
        for owner in pod["metadata"].get("ownerReferences", ()):
            if owner["kind"] == "Job":
                memory = self._memory(owner["uid"])
                memory.pods[pod["metadata"]["uid"]] = pod
                if event.type == "DELETED":
                    memory.gone.add(pod["metadata"]["uid"])

    def reconcile(self, job: Document, at: float) -> None:
        """Brings a Job as far as it can be now."""
        metadata, spec = job["metadata"], job["spec"]
        if "deletionTimestamp" in metadata:
            return
        if is_true(job, "Complete") or is_true(job, "Failed"):
            self._remove_old(job)
            return
        memory = self._memory(metadata["uid"])
        self._count(job, memory, at)
        self._judge(job, memory, at)
        if memory.failure is not None or memory.success is not None:
            self._delete(job, memory.active())
        elif spec["suspend"]:
            self._delete(job, memory.active())
            memory.active_since = None
        else:
            if memory.active_since is None:
                memory.active_since = at
            self._manage(job, memory, at)
        self._report(job, memory)

    def _memory(self, uid: str) -> _Memory:
        return self._memories.setdefault(uid, _Memory(BackOff(self._first_back_off)))

    def _count(self, job: Document, memory: _Memory, at: float) -> None:
        """Takes in pods that have ended."""
        spec = job["spec"]
        for uid, pod in memory.pods.items():
            if uid in memory.counted:
                continue
            index = index_of(pod)
            if phase_of(pod) == "Succeeded":
                memory.counted.add(uid)
                memory.num_succeeded += 1
                memory.back_off = BackOff(self._first_back_off)
                if index is not None:
                    memory.completed.add(index)
            elif has_failed(pod, spec["podReplacementPolicy"]) or uid in memory.gone:
                memory.counted.add(uid)
                verdict = judge_failure(spec.get("podFailurePolicy"), pod)
                of_index = memory.of_index.setdefault(index or 0, BackOff(self._first_back_off))
                memory.back_off.fail(at)
                of_index.fail(at)
                if verdict.action == "Ignore":
                    continue
                memory.num_failed += 1
                memory.index_failures[index or 0] += 1
                if verdict.action == "FailJob" and memory.failure is None:
                    memory.failure = ("PodFailurePolicy", verdict.message)
                per_index = spec.get("backoffLimitPerIndex")
                if index is not None and (
                    verdict.action == "FailIndex"
                    or (per_index is not None and memory.index_failures[index] > per_index)
                ):
                    memory.failed_indexes.add(index)

    def _judge(self, job: Document, memory: _Memory, at: float) -> None:
        """Says how the Job ends, where that is clear."""
        if memory.failure is not None or memory.success is not None:
            return
        spec = job["spec"]
        restarts = sum(
            status["restartCount"]
            for pod in memory.living()
            for status in pod.get("status", {}).get("containerStatuses", ())
            if spec["template"]["spec"]["restartPolicy"] == "OnFailure"
        )
        deadline = spec.get("activeDeadlineSeconds")
        if memory.num_failed + restarts > spec["backoffLimit"]:
            memory.failure = ("BackoffLimitExceeded", "Job has reached the specified backoff limit")
        elif deadline is not None and memory.active_since is not None and at - memory.active_since >= deadline:
            memory.failure = ("DeadlineExceeded", "Job was active longer than specified deadline")
        elif len(memory.failed_indexes) > spec.get("maxFailedIndexes", 2**31):
            memory.failure = (
                "MaxFailedIndexesExceeded",
                "Job has exceeded the specified maximal number of failed indexes",
            )
        elif meets_success_policy(spec.get("successPolicy"), memory.completed):
            memory.success = ("SuccessPolicy", "Matched rules at index 0")
        elif is_complete(spec, memory.completed, memory.num_succeeded, len(memory.active())):
            memory.success = ("CompletionsReached", "Reached expected number of succeeded pods")
        elif memory.failed_indexes and len(memory.failed_indexes | memory.completed) >= spec.get("completions", 1):
            memory.failure = ("FailedIndexes", "Job has failed indexes")

    def _manage(self, job: Document, memory: _Memory, at: float) -> None:
        """Makes and ends pods, so that there are as many as there should be."""
        spec = job["spec"]
        active = memory.active()
        # with Failed, a pod that still ends keeps its place
        held = memory.living() if spec["podReplacementPolicy"] == "Failed" else active
        missing: list[int | None]
        if spec["completionMode"] == "Indexed":
            surplus = [pod for pod in active if (index_of(pod) or 0) >= spec["completions"]]
            taken = {index_of(pod) for pod in held}
            missing = [
                index
                for index in range(spec["completions"])
                if index not in memory.completed | memory.failed_indexes and index not in taken
            ]
        else:
            left = spec["completions"] - memory.num_succeeded if "completions" in spec else spec["parallelism"]
            if "completions" not in spec and memory.num_succeeded:
                left = len(active)
            surplus = []
            missing = [None] * max(left - len(held), 0)
        free = spec["parallelism"] - len(held) + len(surplus)
        if free < 0:
            surplus += [pod for pod in active if pod not in surplus][free:]
        self._delete(job, surplus)
        if "backoffLimitPerIndex" not in spec and memory.back_off.left(at) > 0:
            return
        for index in missing[: max(free, 0)]:
            of_index = memory.of_index.get(index or 0)
            if "backoffLimitPerIndex" in spec and of_index is not None and of_index.left(at) > 0:
                continue
            pod = self._state.create(pod_of(job, index, memory.index_failures[index or 0]))
            memory.pods[pod["metadata"]["uid"]] = pod
            self._record(job, "SuccessfulCreate", f"Created pod: {pod['metadata']['name']}")

    def _delete(self, job: Document, pods: Iterable[Document]) -> None:
        for pod in pods:
            metadata = pod["metadata"]
            with suppress(Refused):  # it has gone by itself
                self._state.delete("Pod", metadata["namespace"], metadata["name"], uid=metadata["uid"])
                self._record(job, "SuccessfulDelete", f"Deleted pod: {metadata['name']}")
            metadata["deletionTimestamp"] = now()  # until the watch tells it

    def _report(self, job: Document, memory: _Memory) -> None:
        """Writes the Job's status where it has changed."""
        spec, before = job["spec"], job.get("status", {})
        active, terminating = memory.active(), memory.terminating()
        conditions = {each["type"]: dict(each) for each in before.get("conditions", ())}
        status: Document = {
            "active": len(active),
            "ready": sum(is_true(pod, "Ready") for pod in active),
            "terminating": len(terminating),
            "failed": memory.num_failed,
            "succeeded": memory.num_succeeded,
            "uncountedTerminatedPods": {},
        }
        if spec["completionMode"] == "Indexed":
            status["succeeded"] = len(memory.completed)
            status["completedIndexes"] = ranges(memory.completed)
            if "backoffLimitPerIndex" in spec:
                status["failedIndexes"] = ranges(memory.failed_indexes)
        if memory.active_since is not None:
            status["startTime"] = before.get("startTime", now())
        if spec["suspend"] or "Suspended" in conditions:
            changed = _set(conditions, "Suspended", spec["suspend"], *suspension(suspended=spec["suspend"]))
            if changed:
                self._record(job, *suspension(suspended=spec["suspend"], event=True))
        if memory.failure is not None:
            _set(conditions, "FailureTarget", True, *memory.failure)
        elif memory.success is not None:
            _set(conditions, "SuccessCriteriaMet", True, *memory.success)
        if not active and not terminating:
            if memory.failure is not None:
                _set(conditions, "Failed", True, *memory.failure)
                self._record(job, *memory.failure, type="Warning")
            elif memory.success is not None:
                _set(conditions, "Complete", True, *memory.success)
                status["completionTime"] = now()
                self._record(job, "Completed", "Job completed")
        if conditions:
            status["conditions"] = list(conditions.values())
        if status != before:
            self._state.update_status(job | {"status": status})

    def _remove_old(self, job: Document) -> None:
        kept = job["spec"].get("ttlSecondsAfterFinished")
        if kept is None:
            return
        ended = [each for each in job["status"]["conditions"] if each["type"] in ("Complete", "Failed")]
        if ended[0]["lastTransitionTime"] <= now(-kept):
            self._state.delete("Job", job["metadata"]["namespace"], job["metadata"]["name"])

    def _record(self, job: Document, reason: str, message: str, type: str = "Normal") -> None:
        self._state.record(job, reason, message, type=type, component="job-controller")


def delay(failures: int, first: float = FIRST_BACK_OFF) -> float:
    """Seconds without a new pod after so many failures in a row."""
    return float(min(first * 2.0 ** min(failures - 1, 30), LAST_BACK_OFF))


def pod_of(job: Document, index: int | None, index_failures: int = 0) -> Document:
    """A new pod of a Job, for one index where it has indexes."""
    metadata, spec = job["metadata"], job["spec"]
    template: dict[str, Any] = {
        "labels": dict(spec["template"].get("metadata", {}).get("labels", {})),
        "annotations": dict(spec["template"].get("metadata", {}).get("annotations", {})),
        "namespace": metadata["namespace"],
        "generateName": f"{metadata['name']}-",
        "ownerReferences": [owner_reference(job)],
    }
    pod: Document = {"apiVersion": "v1", "kind": "Pod", "metadata": template, "spec": dict(spec["template"]["spec"])}
    if index is None:
        return pod
    template["generateName"] += f"{index}-"
    template["labels"][INDEX] = template["annotations"][INDEX] = str(index)
    if "backoffLimitPerIndex" in spec:
        template["annotations"][INDEX_FAILURES] = str(index_failures)
    pod["spec"].setdefault("hostname", f"{metadata['name']}-{index}")
    own = {"name": "JOB_COMPLETION_INDEX", "valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['{INDEX}']"}}}
    for kind in ("initContainers", "containers"):
        if kind in pod["spec"]:
            pod["spec"][kind] = [
                container
                if any(each["name"] == own["name"] for each in container.get("env", ()))
                else container | {"env": [*container.get("env", ()), own]}
                for container in pod["spec"][kind]
            ]
    return pod


def judge_failure(policy: Document | None, pod: Document) -> Verdict:
    """What the first rule that matches a failed pod says of it; Count where none does."""
    metadata = pod["metadata"]
    where = f"{metadata['namespace']}/{metadata['name']}"
    for number, rule in enumerate((policy or {}).get("rules", ())):
        if "onExitCodes" in rule:
            wanted = rule["onExitCodes"]
            for name, code in exit_codes(pod):
                if code == 0 or wanted.get("containerName", name) != name:
                    continue
                if (code in wanted["values"]) is (wanted["operator"] == "In"):
                    return Verdict(
                        rule["action"],
                        f"Container {name} for pod {where} failed with exit code {code} matching {rule['action']} rule "
                        f"at index {number}",
                    )
        for pattern in rule.get("onPodConditions") or ():
            conditions = pod.get("status", {}).get("conditions", ())
            if any(each["type"] == pattern["type"] and each["status"] == pattern["status"] for each in conditions):
                return Verdict(
                    rule["action"],
                    f"Pod {where} has condition {pattern['type']} matching {rule['action']} rule at index {number}",
                )
    return Verdict("Count")


def exit_codes(pod: Document) -> list[tuple[str, int]]:
    """Containers that have ended, and how."""
    status = pod.get("status", {})
    return [
        (each["name"], each["state"]["terminated"]["exitCode"])
        for each in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ()))
        if "terminated" in each["state"]
    ]


def has_failed(pod: Document, replacement: str) -> bool:
    """Whether a pod counts as failed: one that is told to end does at once, unless only those that have ended are replaced."""
    if phase_of(pod) == "Failed":
        return True
    return replacement != "Failed" and "deletionTimestamp" in pod["metadata"] and phase_of(pod) != "Succeeded"


def is_complete(spec: Document, completed: set[int], num_succeeded: int, num_active: int) -> bool:
    """Whether as much has succeeded as the Job asks for."""
    if spec["completionMode"] == "Indexed":
        wanted = int(spec["completions"])
        return len([index for index in completed if index < wanted]) >= wanted
    if "completions" in spec:
        return num_succeeded >= int(spec["completions"])
    return num_succeeded > 0 and num_active == 0


def meets_success_policy(policy: Document | None, completed: set[int]) -> bool:
    """Whether the indexes that succeeded are enough by one of the policy's rules."""
    for rule in (policy or {}).get("rules", ()):
        wanted = indexes(rule["succeededIndexes"]) if "succeededIndexes" in rule else None
        counting = completed if wanted is None else completed & wanted
        needed: int = rule.get("succeededCount", len(wanted) if wanted is not None else 1)
        if len(counting) >= needed:
            return True
    return False


def suspension(*, suspended: bool, event: bool = False) -> tuple[str, str]:
    """Reason and message of the condition, or of the event."""
    if suspended:
        return ("Suspended", "Job suspended") if event else ("JobSuspended", "Job suspended")
    return ("Resumed", "Job resumed") if event else ("JobResumed", "Job resumed")


def indexes(text: str) -> set[int]:
    """The numbers that a text such as 0,2-4 names."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def ranges(numbers: Iterable[int]) -> str:
    """The shortest text that names these numbers: 0,2-4."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def index_of(pod: Document) -> int | None:
    """A pod's completion index, in an Indexed Job."""
    text = pod["metadata"].get("annotations", {}).get(INDEX)
    return int(text) if text is not None else None


def phase_of(pod: Document) -> str:
    """Where a pod is in its life."""
    phase: str = pod.get("status", {}).get("phase", "Pending")
    return phase


def is_true(document: Document, kind: str) -> bool:
    """Whether an object has a condition, and it holds."""
    conditions: Sequence[Document] = document.get("status", {}).get("conditions", ())
    return any(each["type"] == kind and each["status"] == "True" for each in conditions)


def _set(conditions: dict[str, Document], kind: str, holds: bool, reason: str, message: str) -> bool:
    """Sets a condition; True where it changed."""
    status = "True" if holds else "False"
    if conditions.get(kind, {}).get("status") == status:
        return False
    conditions[kind] = {
        "type": kind, "status": status, "reason": reason, "message": message,
        "lastProbeTime": now(), "lastTransitionTime": now(),
    }  # fmt: skip
    return True
