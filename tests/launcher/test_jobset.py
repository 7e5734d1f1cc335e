"""Filling manifests, as a pure function of parsed YAML: what changes is listed, and nothing else does."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from datastore.errors import AskedWrongly, DoNotRetry
from launcher.command import Layout
from launcher.jobset import (
    Cluster,
    Document,
    Filling,
    check_fillable,
    check_urls,
    fill,
    filling_of,
    image_of,
    job_name,
    label_value,
    runs_of,
    workload_of,
)
from launcher.plan import Step
from tests.k8s.golden import documents
from tests.k8s.schemas import refusal

GOLDEN = Path(__file__).parent.parent / "golden" / "k8s"
PRETRAIN = ("pretrain", "--config", "s3://b/runs/a/config.yaml", "--run", "s3://b/runs/a")


def filling(**changes: Any) -> Filling:
    return replace(
        Filling(
            name="a-pretrain-123456",
            run="a",
            job="pretrain",
            words=PRETRAIN,
            run_folder="s3://b/runs/a",
            layout=Layout(6, min_nodes=5, max_restarts=4, node_timeout=8, step_deadline=90),
            pods=6,
        ),
        **changes,
    )


def manifest(name: str) -> list[Document]:
    return documents(GOLDEN / f"overlays-{name}.yaml")


def differences(one: Any, other: Any, path: str = "") -> set[str]:
    """Paths at which two documents differ; containers and variables by their names."""
    if isinstance(one, dict) and isinstance(other, dict):
        return {
            found
            for key in {**one, **other}
            for found in differences(one.get(key), other.get(key), f"{path}.{key}".lstrip("."))
        }
    if (
        isinstance(one, list)
        and isinstance(other, list)
        and all(isinstance(each, dict) and "name" in each for each in [*one, *other])
    ):
        left, right = ({each["name"]: each for each in side} for side in (one, other))
        return {
            found for key in {**left, **right} for found in differences(left.get(key), right.get(key), f"{path}[{key}]")
        }
    return set() if one == other else {path}


def test_only_the_listed_fields_of_a_job_change() -> None:
    before = manifest("everything")
    after = fill(before, filling(image="registry/vp:2", namespace="mine", queue="fast"))
    changed = {found for one, other in zip(before, after, strict=True) for found in differences(one, other)}
    container = "spec.template.spec.containers[viewpoint]"
    assert changed == {
        "metadata.name", "metadata.namespace", "metadata.labels.app.kubernetes.io/instance",
        "metadata.labels.kueue.x-k8s.io/queue-name", "spec.completions", "spec.parallelism", "spec.backoffLimit",
        f"{container}.image", f"{container}.args", f"{container}.resources.limits.nvidia.com/gpu",
        *(f"{container}.env[{name}].value" for name in (
            "NODES", "MIN_NODES", "PROCS_PER_NODE", "GPUS_PER_NODE", "MAX_RESTARTS", "NODE_TIMEOUT", "STEP_DEADLINE",
        )),
    }  # fmt: skip
    assert manifest("everything") == before, "what is given stays as it is"


def test_a_filled_job_says_what_was_asked_for() -> None:
    job = workload_of(fill(manifest("plain"), filling()))
    assert job["metadata"]["name"] == "a-pretrain-123456"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 6
    assert job["spec"]["backoffLimit"] == 60
    (container,) = job["spec"]["template"]["spec"]["containers"]
    dashes = container["args"].index("--")
    assert container["args"][dashes + 1 :] == list(PRETRAIN)
    assert container["args"][dashes - 2 : dashes] == ["--job=pretrain", "--run-folder=s3://b/runs/a"]
    assert not any(word.startswith(("--recipe", "--store")) for word in container["args"])
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert {name: values[name] for name in ("NODES", "MIN_NODES", "MAX_RESTARTS", "NODE_TIMEOUT", "STEP_DEADLINE")} == {
        "NODES": "6",
        "MIN_NODES": "5",
        "MAX_RESTARTS": "4",
        "NODE_TIMEOUT": "8",
        "STEP_DEADLINE": "90",
    }


@pytest.mark.parametrize("name", ["plain", "gpu", "jobset", "everything", "s3"])
@pytest.mark.parametrize("stage", [PRETRAIN, ("ingest", "demo://shapes", "s3://b/s.zarr"), ("report", "s3://b/runs/a")])
def test_whatever_is_filled_stays_valid(name: str, stage: tuple[str, ...]) -> None:
    for document in fill(manifest(name), filling(words=stage, namespace="mine", image="i:1", queue="q")):
        assert refusal(document) is None


def test_a_node_asks_for_as_many_gpus_as_it_has_processes_and_a_part_for_one() -> None:
    def gpus(**changes: Any) -> tuple[Any, str]:
        (container,) = workload_of(fill(manifest("gpu"), filling(**changes)))["spec"]["template"]["spec"]["containers"]
        values = {entry["name"]: entry.get("value") for entry in container["env"]}
        return container["resources"]["limits"].get("nvidia.com/gpu"), str(values["GPUS_PER_NODE"])

    assert gpus(layout=Layout(2, procs_per_node=4), pods=2) == (4, "4")
    assert gpus(words=("cache", "s"), layout=Layout(2, procs_per_node=4)) == (1, "1")
    assert gpus(words=("ingest", "a", "b")) == (None, "0")
    assert gpus(words=("report", "a")) == (None, "0")


def test_a_manifest_without_gpus_stays_without() -> None:
    (container,) = workload_of(fill(manifest("plain"), filling()))["spec"]["template"]["spec"]["containers"]
    assert "nvidia.com/gpu" not in container["resources"]["limits"]


def test_a_jobset_keeps_its_store_for_a_world_and_loses_it_for_parts() -> None:
    world = workload_of(fill(manifest("jobset"), filling()))["spec"]
    assert [job["name"] for job in world["replicatedJobs"]] == ["node", "store"]
    node, store = (job["template"]["spec"] for job in world["replicatedJobs"])
    assert node["completions"] == 6
    assert store["completions"] == 1
    for spec in (node, store):
        (container,) = spec["template"]["spec"]["containers"]
        assert {"name": "NODES", "value": "6"} in container["env"]
        assert container["args"][-len(PRETRAIN) :] == list(PRETRAIN)
    parts = workload_of(fill(manifest("jobset"), filling(words=("ingest", "a", "b"))))["spec"]
    assert [job["name"] for job in parts["replicatedJobs"]] == ["node"]
    assert "coordinator" not in parts


def test_names_are_the_step_s_own_and_fit_into_those_of_pods() -> None:
    one = job_name("s3://b/runs/pointmcd-1", "pretrain")
    assert one.startswith("pointmcd-1-pretrain-")
    assert one == job_name("s3://b/runs/pointmcd-1", "pretrain")
    assert one != job_name("s3://other/runs/pointmcd-1", "pretrain")
    long = job_name("s3://b/runs/" + "A_long.name" * 9, "evaluate-svm-heldout-random_weights")
    assert len(long) <= 52
    assert long == long.lower()
    assert job_name("s3://b/7", "pretrain").startswith("run-7-pretrain-")
    assert label_value("a run!") == "a-run"


@pytest.mark.parametrize(
    ("words", "on_nodes", "pods"),
    [(PRETRAIN, True, 4), (("cache", "s"), True, 4), (("ingest", "a", "b"), False, 4), (("evaluate", "r"), False, 1)],
)
def test_parts_and_nodes_have_a_pod_each_and_the_rest_is_one(words: tuple[str, ...], on_nodes: bool, pods: int) -> None:
    step = Step("pretrain", "step", "step", words, "s3://b/runs/a/arms/off", on_nodes=on_nodes, done=False)
    made = filling_of(step, Layout(4), "s3://b/runs/a", Cluster("m", image="i:1", queue="q"))
    assert made.pods == pods
    assert made.run == "a"
    assert (made.image, made.queue, made.namespace) == ("i:1", "q", None)


def test_a_placeholder_is_no_image() -> None:
    assert image_of(manifest("plain")) == "registry.example/viewpoint:0.1.0"
    with pytest.raises(AskedWrongly, match=r"--image REGISTRY/viewpoint:TAG"):
        check_fillable(manifest("plain"), Cluster("m"))
    check_fillable(manifest("plain"), Cluster("m", image="registry/vp:1"))


def test_a_manifest_that_cannot_be_filled_is_refused_with_the_reason() -> None:
    with pytest.raises(AskedWrongly, match="has 0 of them"):
        check_fillable(manifest("trainjob"), Cluster("m", image="i:1"))
    broken = fill(manifest("plain"), filling())
    workload_of(broken)["spec"]["completionMode"] = "NonIndexed"
    with pytest.raises(AskedWrongly, match="must be Indexed"):
        check_fillable(broken, Cluster("m", image="i:1"))
    renamed = fill(manifest("plain"), filling())
    workload_of(renamed)["spec"]["template"]["spec"]["containers"][0]["name"] = "main"
    with pytest.raises(AskedWrongly, match="they have main"):
        check_fillable(renamed, Cluster("m", image="i:1"))
    wordless = fill(manifest("plain"), filling())
    workload_of(wordless)["spec"]["template"]["spec"]["containers"][0]["args"] = ["sleep"]
    with pytest.raises(AskedWrongly, match="no `--` in its args"):
        check_fillable(wordless, Cluster("m", image="i:1"))


@pytest.mark.parametrize("name", ["plain", "jobset"])
def test_runs_lie_beside_the_manifest_s_own_unless_that_is_a_placeholder(name: str) -> None:
    with pytest.raises(AskedWrongly, match=r"k8s/settings/settings.yaml.*--runs s3://BUCKET/runs"):
        runs_of(manifest(name))
    text = json.dumps(manifest(name)).replace("s3://your-bucket/", "s3://mine/")
    assert runs_of(json.loads(text)) == "s3://mine/runs"
    with pytest.raises(AskedWrongly, match="No place for runs"):
        runs_of(json.loads(text.replace("RUN_URL", "OTHER")))


@pytest.mark.parametrize("url", ["runs", "/data/shapes.zarr", "file:///data/shapes.zarr"])
def test_a_path_on_this_machine_is_refused_with_an_example(url: str) -> None:
    with pytest.raises(DoNotRetry, match=r"--data s3://bucket/"):
        check_urls({"--data": url})


def test_object_storage_and_no_data_are_fine() -> None:
    check_urls({"--runs": "s3://bucket/runs", "--data": None})
