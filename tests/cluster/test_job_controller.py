"""The Job controller alone: pods end as the tests say, and time passes as they say."""

from typing import Any

import pytest

from tests.cluster.job_controller import JobController, index_of, indexes, is_true, judge_failure, phase_of, ranges
from tests.cluster.refusals import Document
from tests.cluster.state import State

SPACE = "default"
POLICY = {
    "rules": [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": {"containerName": "main", "operator": "In", "values": [2, 64]}},
    ]
}


class Cluster:
    """A controller whose clock and pods are the test's."""

    def __init__(self, **spec: Any) -> None:
        self.state = State(custom=False)
        self.controller = JobController(self.state)
        self.at = 1000.0
        template = {"spec": {"restartPolicy": "Never", "containers": [{"name": "main", "image": "any"}]}}
        whole = {"completionMode": "Indexed", "completions": 3, "parallelism": 3, "template": template} | spec
        whole = {key: value for key, value in whole.items() if value is not None}
        metadata = {"name": "job", "namespace": SPACE}
        self.state.create({"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": whole})
        self.look()

    def look(self, after: float = 0.0) -> Document:
        self.at += after
        for _ in range(3):
            self.controller.look(self.at)
        return self.job["status"]

    @property
    def job(self) -> Document:
        return self.state.get("Job", SPACE, "job")

    @property
    def living(self) -> list[Document]:
        return [pod for pod in self.state.list("Pod") if phase_of(pod) == "Pending"]

    @property
    def numbers(self) -> list[int | None]:
        return sorted(index_of(pod) for pod in self.living)

    def end(self, index: int, code: int, *, evicted: bool = False) -> Document:
        pod = next(each for each in self.living if index_of(each) == index)

        def edit(document: Document) -> None:
            ended = {"terminated": {"exitCode": code, "reason": "Error"}}
            status = {"name": "main", "image": "any", "imageID": "", "ready": False, "restartCount": 0, "state": ended}
            document["status"] |= {"phase": "Failed" if code else "Succeeded", "containerStatuses": [status]}
            if evicted:
                document["status"]["conditions"] = [{"type": "DisruptionTarget", "status": "True"}]

        return self.state.change("Pod", SPACE, pod["metadata"]["name"], edit, status=True)

    def reasons(self) -> list[tuple[str, str]]:
        return [(each["type"], each["reason"]) for each in self.job["status"].get("conditions", ())]


def test_pods_have_numbers_and_the_job_completes_when_each_has_succeeded_once() -> None:
    cluster = Cluster(parallelism=2)
    assert cluster.numbers == [0, 1]
    (first, _) = cluster.living
    assert first["spec"]["hostname"] == "job-0"
    assert first["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"] == "0"
    assert first["metadata"]["ownerReferences"][0]["uid"] == cluster.job["metadata"]["uid"]
    (variable,) = first["spec"]["containers"][0]["env"]
    assert variable["name"] == "JOB_COMPLETION_INDEX"
    cluster.end(1, 0)
    assert cluster.look()["completedIndexes"] == "1"
    assert cluster.numbers == [0, 2]
    cluster.end(0, 0)
    cluster.end(2, 0)
    status = cluster.look()
    assert (status["completedIndexes"], status["succeeded"], status["active"]) == ("0-2", 3, 0)
    assert cluster.reasons() == [("SuccessCriteriaMet", "CompletionsReached"), ("Complete", "CompletionsReached")]
    assert "completionTime" in status


def test_no_pod_is_made_for_ten_seconds_then_twenty_and_forty_and_a_success_forgives() -> None:
    cluster = Cluster()
    for seconds in (10, 20, 40):
        cluster.end(0, 1)
        cluster.look()
        cluster.look(seconds - 1)
        assert cluster.numbers == [1, 2]
        cluster.look(1)
        assert cluster.numbers == [0, 1, 2]
    cluster.end(1, 1)
    cluster.end(2, 0)
    cluster.look()
    cluster.end(0, 1)
    cluster.look()
    assert cluster.look(10)["failed"] == 5
    assert cluster.numbers in ([0], [0, 1])


def test_with_a_limit_for_each_number_the_losses_of_one_hold_up_no_other() -> None:
    cluster = Cluster(backoffLimitPerIndex=2, maxFailedIndexes=0)
    for seconds in (10, 20):
        cluster.end(0, 1)
        cluster.look()
        cluster.look(seconds)
        assert cluster.numbers == [0, 1, 2]
    cluster.end(2, 1)
    cluster.look()
    cluster.look(10)
    assert cluster.numbers == [0, 1, 2], "the first loss of this one"
    cluster.end(0, 1)
    status = cluster.look()
    assert status["failedIndexes"] == "0"
    assert cluster.reasons() == [("FailureTarget", "MaxFailedIndexesExceeded"), ("Failed", "MaxFailedIndexesExceeded")]
    assert cluster.living == []


def test_evictions_count_nothing_and_are_replaced_after_a_delay_all_the_same() -> None:
    cluster = Cluster(podFailurePolicy=POLICY, backoffLimit=0)
    cluster.end(1, 75, evicted=True)
    assert cluster.look()["failed"] == 0
    assert cluster.numbers == [0, 2]
    cluster.look(10)
    assert cluster.numbers == [0, 1, 2]
    cluster.end(1, 1)
    cluster.look()
    assert cluster.reasons()[-1] == ("Failed", "BackoffLimitExceeded")


def test_a_code_of_the_policy_ends_the_job_and_its_other_pods() -> None:
    cluster = Cluster(podFailurePolicy=POLICY)
    pod = cluster.end(1, 64)
    status = cluster.look()
    assert status["active"] == 0
    assert cluster.living == [], "given to no node, they are gone at once"
    assert cluster.reasons() == [("FailureTarget", "PodFailurePolicy"), ("Failed", "PodFailurePolicy")]
    said = status["conditions"][-1]["message"]
    name = pod["metadata"]["name"]
    assert said == f"Container main for pod default/{name} failed with exit code 64 matching FailJob rule at index 1"


@pytest.mark.parametrize(("policy", "replaced"), [("Failed", [0, 2]), ("TerminatingOrFailed", [0, 1, 2])])
def test_a_pod_that_still_ends_keeps_its_place_where_the_policy_says_so(policy: str, replaced: list[int]) -> None:
    cluster = Cluster(podReplacementPolicy=policy)
    pod = next(each for each in cluster.living if index_of(each) == 1)
    name = pod["metadata"]["name"]

    def to_a_node(document: Document) -> None:
        document["spec"]["nodeName"] = "double"

    cluster.state.change("Pod", SPACE, name, to_a_node)
    cluster.state.delete("Pod", SPACE, name)
    cluster.look()
    status = cluster.look(10)
    assert status["terminating"] == 1
    assert sorted(index_of(each) for each in cluster.living if each["metadata"]["name"] != name) == replaced


def test_a_suspended_job_has_no_pods_and_a_resumed_one_has_them_again() -> None:
    cluster = Cluster(suspend=True)
    assert cluster.living == []
    assert cluster.reasons() == [("Suspended", "JobSuspended")]

    def resume(document: Document) -> None:
        document["spec"]["suspend"] = False

    cluster.state.change("Job", SPACE, "job", resume)
    cluster.look()
    assert cluster.numbers == [0, 1, 2]
    assert not is_true(cluster.job, "Suspended")


def test_jobs_end_by_deadline_by_success_policy_and_go_after_their_time() -> None:
    late = Cluster(activeDeadlineSeconds=5)
    late.look(5)
    assert late.reasons()[-1] == ("Failed", "DeadlineExceeded")
    enough = Cluster(
        successPolicy={"rules": [{"succeededIndexes": "1-2", "succeededCount": 1}]}, ttlSecondsAfterFinished=0
    )
    enough.end(2, 0)
    enough.controller.look(enough.at)
    assert enough.reasons() == [("SuccessCriteriaMet", "SuccessPolicy")]
    enough.controller.look(enough.at)
    assert enough.reasons()[-1] == ("Complete", "SuccessPolicy")
    enough.controller.look(enough.at)
    assert enough.state.find("Job", SPACE, "job") is None


def test_a_job_without_numbers_makes_as_many_pods_as_are_left_to_succeed() -> None:
    cluster = Cluster(completionMode="NonIndexed", completions=2, parallelism=5)
    assert len(cluster.living) == 2
    for pod in cluster.living:
        cluster.state.change(
            "Pod", SPACE, pod["metadata"]["name"], lambda found: found["status"].update(phase="Succeeded"), status=True
        )
    assert cluster.look()["succeeded"] == 2
    assert cluster.reasons()[-1] == ("Complete", "CompletionsReached")


def test_the_first_rule_that_matches_a_failed_pod_counts() -> None:
    ended = {"name": "main", "state": {"terminated": {"exitCode": 64}}}
    pod = {"metadata": {"namespace": SPACE, "name": "pod"}, "status": {"containerStatuses": [ended]}}
    assert judge_failure(POLICY, pod).action == "FailJob"
    pod["status"]["conditions"] = [{"type": "DisruptionTarget", "status": "True"}]
    assert judge_failure(POLICY, pod).action == "Ignore"
    other = {"rules": [{"action": "FailIndex", "onExitCodes": {"operator": "NotIn", "values": [1]}}]}
    assert judge_failure(other, pod).action == "FailIndex"
    assert judge_failure(None, pod).action == "Count"


def test_numbers_are_written_as_ranges_and_read_again() -> None:
    assert ranges({0, 2, 3, 4, 9}) == "0,2-4,9"
    assert indexes("0,2-4,9") == {0, 2, 3, 4, 9}
    assert ranges(()) == ""
    assert indexes("") == set()
