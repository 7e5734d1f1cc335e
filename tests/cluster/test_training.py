"""The whole path on the cluster double: kubectl applies what the launcher fills, pods meet and train, and get over faults."""

import json
import math
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from datastore.errors import EXIT_DONE, EXIT_STOPPED
from launcher.__main__ import main
from launcher.network import why_not
from tests.cluster.job_controller import exit_codes
from tests.cluster.kubelet import NODE
from tests.cluster.site import NAMESPACE, Site, copy_checkout, copy_manifests, running_site
from tests.runs import tiny_config, write_corpus
from trainer.runfolder import RunFolder, run_names

JOB = "viewpoint-train"
QUIET_START_SECONDS = 30.0
"""From `kubectl apply` to the first step of three pods on two quiet cores: where that takes longer, all the rest does."""

pytestmark = [pytest.mark.slow, pytest.mark.s3, pytest.mark.timeout(1800)]


@pytest.fixture
def site(tmp_path: Path, s3_server: str, s3_environment: None) -> Iterator[Site | None]:
    if why_not() is not None:
        yield None  # only root can run pods
        return
    with running_site(tmp_path, s3_server) as made:
        yield made


def recipe_file(folder: Path, store_url: str, **changes: Any) -> str:
    tree = tiny_config(store_url, **changes).model_dump(mode="json", exclude={"job": True, "data": {"store_url"}})
    (folder / "pointmcd.yaml").write_text(yaml.safe_dump(tree))
    return "./pointmcd.yaml"


def losses(run: RunFolder) -> dict[int, float]:
    """By step; of a step that was done twice, the last."""
    return {line["step"]: line["loss"] for line in run.metrics() if "loss" in line}


def until_new_step(run: RunFolder, since: float, story: Callable[[], str], seconds: float = 300) -> float:
    """When the first step after a moment ended; an error that tells the story where there is none."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        later = [float(line["time"]) for line in run.metrics() if line["time"] > since]
        if later:
            return min(later)
        time.sleep(0.5)
    raise AssertionError(f"No new step in {seconds} s.\n{story()}")


def poll_of(launched: "subprocess.Popen[str]") -> str:
    """Whether a launch still runs, and what it said if it does not."""
    code = launched.poll()
    return "it still runs" if code is None else f"it ended with {code}: {launched.communicate()[0]}"


class Training:
    """A run on three pods, as a user of kubectl starts it, and what becomes of it."""

    def __init__(self, site: Site, folder: Path, bucket: str, steps: int) -> None:
        self.site = site
        store = write_corpus(f"{bucket}/shapes.zarr")
        self.run = RunFolder(f"{bucket}/runs/faults")
        self.store_url = store.url
        self._settings = {"nodes": "3", "min_nodes": "3", "store": store.url, "run": self.run.url}
        self._folder, self._steps = folder, steps

    def apply(self) -> float:
        """Applies the job; returns when that was."""
        tree = tiny_config("unused", steps=self._steps, global_batch=12, checkpoint={"every_steps": 10})
        recipe = tree.model_dump(mode="json", exclude={"data": {"store_url"}})
        stage = copy_manifests(self._folder, self.site.endpoint_url, recipe, self._settings)
        self.site.kubectl("apply", "-k", str(stage))
        return time.time()

    def pod(self, index: int) -> str:
        """The name of the pod with a number, of its newest."""
        pods = [pod for pod in self.site.pods(JOB) if pod["spec"]["hostname"].endswith(f"-{index}")]
        name: str = pods[-1]["metadata"]["name"]
        return name

    def until_new_step(self, since: float) -> float:
        """When the first step after a moment ended."""
        return until_new_step(self.run, since, self.story)

    def until_saved(self, since: float, seconds: float = 300) -> dict[str, Any]:
        """The first checkpoint that was committed after a moment."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            later = [event for event in self.run.events() if event["event"] == "saved" and event["time"] > since]
            if later:
                return later[0]
            time.sleep(0.5)
        raise AssertionError(f"Nothing saved in {seconds} s.\n{self.story()}")

    def story(self) -> str:
        """What there is to see of it, for whoever has to find out why a test failed."""
        pods = [self.site.kubectl("get", "pods,jobs"), self.site.kubectl("get", "events")]
        logs = [path.read_text()[-3000:] for path in sorted(self.site.double.kubelet.folder.glob("*/logs/*.log"))]
        return "\n".join([*pods, *(str(event) for event in self.run.events()[-40:]), *logs])


def check_that_nothing_was_lost(run: RunFolder, since: float) -> dict[str, Any]:
    """The run began again after a moment where it had saved last, and did no step twice; that save."""
    events = [event for event in run.events() if event["event"] in ("saved", "started")]
    start = next(number for number, each in enumerate(events) if each["event"] == "started" and each["time"] > since)
    saved = events[start - 1]
    assert saved["event"] == "saved"
    assert events[start]["resumed_from"] == saved["step"]
    steps = [line["step"] for line in run.metrics() if line["time"] > since]
    assert len(steps) == len(set(steps))
    return dict(saved)


def test_a_launch_with_kubectl_trains_on_four_pods_to_the_report_as_four_local_nodes_do_bit_for_bit(
    site: Site | None, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if site is None:
        return
    store = write_corpus(f"{s3_bucket}/shapes.zarr")
    recipe = recipe_file(tmp_path, store.url, steps=12, evaluation={"protocols": []})
    words = (recipe, "--nodes", "4", "--data", store.url, "--runs", f"{s3_bucket}/runs", "--node-timeout", "20")
    launched = site.launch(*words, "--run", "on-pods", folder=tmp_path)
    said, _ = launched.communicate(timeout=1500)
    print(said)
    assert launched.returncode == EXIT_DONE, said
    run = RunFolder(f"{s3_bucket}/runs/on-pods")
    assert run.is_finished()
    assert run.read_text("report.html") is not None
    saved = run.last_event("saved")
    assert saved is not None
    assert saved["step"] == 12
    ended = {job["spec"]["completions"]: job["status"]["succeeded"] for job in site.get("jobs")["items"]}
    assert ended == {4: 4, 1: 1}, "the training and the report"
    assert "[node 0] viewpoint: the world is formed: nodes [0, 1, 2, 3]" in said

    monkeypatch.chdir(tmp_path)
    assert main(["launch", *words, "--run", "on-this-machine"]) == EXIT_DONE
    local = losses(RunFolder(f"{s3_bucket}/runs/on-this-machine"))
    assert sorted(local) == list(range(1, 13))
    assert losses(run) == local
    assert all(math.isfinite(loss) for loss in local.values())


def make_launch(checkout: Path, site: Site, *more: str) -> str:
    """What the documented command prints, in a checkout; an error with it where it fails."""
    command = ["make", "--no-print-directory", "launch", "JOB=pointmcd", "NODES=4", *more]
    # where make runs the tests, what it was told reaches all that it starts
    told = {"MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "MAKELEVEL", "PYTHON", "VENV", "RUNS", "RUN", "DATA", "SET", "ARGS"}
    environment = {name: value for name, value in site.environment.items() if name not in told}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    print(done.stderr, done.stdout)
    assert done.returncode == EXIT_DONE
    return done.stderr + done.stdout


@pytest.mark.timeout(3600)
def test_make_launch_runs_the_whole_demo_on_four_pods_as_on_four_local_nodes_bit_for_bit(
    site: Site | None, s3_bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if site is None:
        return
    runs_url = f"{s3_bucket}/runs"
    checkout = copy_checkout(
        tmp_path / "checkout", site.endpoint_url, {"store": f"{s3_bucket}/shapes.zarr", "run": f"{runs_url}/pointmcd-1"}
    )
    for name, epochs in (("pointmcd", 12), ("pointmcd_teacher", 26)):  # a quarter of the shapes, a few epochs
        path = checkout / "trainer" / "recipes" / "demo" / f"{name}.yaml"
        text = path.read_text().replace("count=640", "count=160").replace(f"epochs: {epochs}\n", "epochs: 3\n")
        assert text.count("count=160") == text.count("epochs: 3\n") == 1
        path.write_text(text)

    said = make_launch(checkout, site, "ON=k8s")
    ended = {}
    for job in site.get("jobs")["items"]:
        step = next(word[6:] for word in words_of(job) if word.startswith("--job="))
        ended[step] = (job["spec"]["completions"], job["status"]["succeeded"])
    assert ended == {
        **dict.fromkeys(("ingest", "teacher", "cache", "pretrain", "pretrain-distillation_off"), (4, 4)),
        **{f"evaluate-svm-heldout-{which}": (1, 1) for which in ("trained", "distillation_off", "random_weights")},
        "report": (1, 1),
    }
    assert "distilled is" in said
    run = RunFolder(f"{runs_url}/pointmcd-1")
    assert run.read_text("report.html") is not None
    assert main(["status", run.url]) == EXIT_DONE
    assert f"{run.url} (pointmcd): complete" in capsys.readouterr().out

    make_launch(checkout, site)
    for name in ("pointmcd-1", "pointmcd-1/arms/distillation_off", "demo/pointmcd_teacher-"):
        on_pods, here = (trained_in(f"{folder}/{name}") for folder in (runs_url, checkout / "runs"))
        assert len(losses(here)) == 9  # three epochs of three steps
        assert losses(on_pods) == losses(here)
        saved = on_pods.last_event("saved")
        assert saved is not None
        assert saved["step"] == max(losses(here))
        scores, local = ({key: each["accuracy"] for key, each in of.records().items()} for of in (on_pods, here))
        assert scores == local


def words_of(job: dict[str, Any]) -> list[str]:
    """The arguments of a Job's pods."""
    words: list[str] = job["spec"]["template"]["spec"]["containers"][0]["args"]
    return words


def trained_in(url: str) -> RunFolder:
    """The finished run at a URL, or the one whose name begins so."""
    parent, _, name = url.rpartition("/")
    (found,) = (each for each in run_names(parent) if each == name or (name.endswith("-") and each.startswith(name)))
    run = RunFolder(f"{parent}/{found}")
    assert run.is_finished()
    return run


def test_a_launch_on_pods_is_watched_cancelled_continued_and_stopped_by_control_c(
    site: Site | None, s3_bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if site is None:
        return
    store = write_corpus(f"{s3_bucket}/shapes.zarr")
    recipe = recipe_file(tmp_path, store.url, steps=1_000_000, evaluation={"protocols": []})
    words = (recipe, "--nodes", "2", "--data", store.url, "--runs", f"{s3_bucket}/runs", "--run", "long")
    run = RunFolder(f"{s3_bucket}/runs/long")

    def status() -> dict[str, Any]:
        assert main(["status", run.url, "--json"]) == EXIT_DONE
        found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return found

    began = time.time()
    with site.launch(*words, folder=tmp_path) as launched:
        first = until_new_step(run, began, lambda: poll_of(launched))
        seen = status()
        assert (seen["state"], seen["working"]) == ("running", True)
        assert "at step 'training on a cluster'" in seen["worker"]
        assert seen["trainings"][0]["last"]["time"] >= first
        assert main(["cancel", run.url]) == EXIT_DONE
        said, _ = launched.communicate(timeout=120)
    print(said)
    assert launched.returncode == EXIT_STOPPED
    assert "was cancelled, and all saved" in said
    (job,) = site.get("jobs")["items"]
    assert job["metadata"]["name"].startswith("long-pretrain-")
    (condition,) = (each for each in job["status"]["conditions"] if each["type"] == "Failed")
    assert (condition["reason"], job["status"]["failed"]) == ("PodFailurePolicy", 2)
    assert "exit code 76" in condition["message"]
    assert status()["state"] == "stopped; the same launch goes on"
    saved = run.last_event("saved")
    assert saved is not None
    assert saved["step"] == run.metrics()[-1]["step"], "all save the step that they have done"

    again = time.time()
    with site.launch(*words, folder=tmp_path) as launched:
        until_new_step(run, again, lambda: poll_of(launched))
        check_that_nothing_was_lost(run, again)
        launched.send_signal(signal.SIGINT)
        said, _ = launched.communicate(timeout=240)
    assert launched.returncode == EXIT_STOPPED
    assert "its pods save first" in said
    assert site.get("jobs")["items"] == site.get("pods")["items"] == []
    assert status()["state"] == "stopped; the same launch goes on"
    saved = run.last_event("saved")
    assert saved is not None
    assert saved["step"] == run.metrics()[-1]["step"]


def test_a_job_gets_over_killed_deleted_and_evicted_pods(site: Site | None, s3_bucket: str, tmp_path: Path) -> None:
    if site is None:
        return
    training = Training(site, tmp_path, s3_bucket, steps=1_000_000)
    run, kubelet = training.run, site.double.kubelet
    applied = training.apply()
    start = training.until_new_step(applied) - applied
    slowness = max(1.0, start / QUIET_START_SECONDS)
    print(f"first step {start:.1f} s after kubectl apply; limits are {slowness:.2f} times those of a quiet machine")

    training.until_saved(applied)
    victim, killed = training.pod(2), time.time()
    kubelet.kill(NAMESPACE, victim)
    took = training.until_new_step(killed + 1) - killed
    print(f"pod 2 killed: new step after {took:.1f} s")
    assert took <= 30 * slowness
    assert exit_codes(site.get("pod", victim)) == [("viewpoint", 137)]
    assert training.pod(2) != victim

    training.until_saved(killed + took)
    victim, deleted = training.pod(1), time.time()
    site.kubectl("delete", "pod", victim)  # returns when it is gone
    gone = time.time()
    took = training.until_new_step(gone) - deleted
    saved = check_that_nothing_was_lost(run, deleted)
    print(f"pod 1 deleted: saved after {saved['time'] - deleted:.1f} s, new step after {took:.1f} s")
    assert saved["time"] < gone, "before the pod ended"
    about_it = {each["reason"] for each in site.get("events")["items"] if each["involvedObject"]["name"] == victim}
    assert {"Scheduled", "Started", "Killing"} <= about_it

    running = {pod["metadata"]["name"] for pod in site.pods(JOB) if pod["status"]["phase"] == "Running"}
    drained = time.time()
    said = site.kubectl("drain", NODE, "--delete-emptydir-data")  # evicts all pods, and returns when they are gone
    print(f"node drained: all pods gone after {time.time() - drained:.1f} s")
    evicted = set(re.findall(r"pod/(\S+) evicted", said))  # pods that ended before are cleared away in the same way
    assert len(running) == 3 and running <= evicted
    assert site.get("job", JOB)["status"]["failed"] == 2, "evictions do not count"
    site.kubectl("delete", "job", JOB)
    site.kubectl("uncordon", NODE)
    again = training.apply()
    training.until_new_step(again)
    check_that_nothing_was_lost(run, drained)

    training.until_saved(again)
    killed = time.time()
    kubelet.kill(NAMESPACE, training.pod(0))
    took = training.until_new_step(killed + 1) - killed
    print(f"pod 0 killed: new step after {took:.1f} s")
    assert took <= 35 * slowness
    assert {pod["status"]["phase"] for pod in site.pods(JOB)[2:]} == {"Running"}, "the others waited in place"


def test_a_run_that_was_begun_with_other_settings_fails_its_job_at_once_and_none_is_tried_again(
    site: Site | None, s3_bucket: str, tmp_path: Path
) -> None:
    if site is None:
        return
    training = Training(site, tmp_path, s3_bucket, steps=10)
    training.run.write_config(tiny_config(training.store_url, seed=4))
    training.apply()
    site.kubectl("wait", "--for=condition=failed", "--timeout=600s", f"job/{JOB}")
    (condition,) = (each for each in site.get("job", JOB)["status"]["conditions"] if each["type"] == "Failed")
    assert condition["reason"] == "PodFailurePolicy"
    assert "Container viewpoint" in condition["message"]
    assert "failed with exit code 64 matching FailJob rule at index 1" in condition["message"]
    pods = site.pods(JOB)
    assert [pod["spec"]["hostname"] for pod in pods] in ([f"{JOB}-0"], [f"{JOB}-{index}" for index in range(3)])
    assert exit_codes(pods[0]) == [("viewpoint", 64)]
    assert "seed" in site.kubectl("logs", pods[0]["metadata"]["name"])
    made = [each for each in site.get("events")["items"] if each["reason"] == "SuccessfulCreate"]
    assert len(made) == 3


def test_a_job_that_loses_pod_0_just_after_the_end_of_training_completes(
    site: Site | None, s3_bucket: str, tmp_path: Path
) -> None:
    if site is None:
        return
    training = Training(site, tmp_path, s3_bucket, steps=6)
    training.apply()
    deadline = time.monotonic() + 900
    while not training.run.is_finished():
        assert time.monotonic() < deadline, training.story()
        time.sleep(0.2)
    first = training.pod(0)
    site.double.kubelet.kill(NAMESPACE, first)
    site.kubectl("wait", "--for=condition=complete", "--timeout=600s", f"job/{JOB}")
    assert exit_codes(site.get("pod", first)) == [("viewpoint", 137)]
    assert training.pod(0) != first
    assert "this pod has nothing to do" in site.kubectl("logs", training.pod(0))
    assert {pod["status"]["phase"] for pod in site.pods(JOB) if pod["metadata"]["name"] != first} == {"Succeeded"}
