"""Manifests are valid for every Kubernetes since 1.29, refuse every wrong field, and run what exists with what fits."""

import json
import re
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from datastore import ingest
from launcher import pod
from launcher.jobset import secrets_of, workload_of
from tests.k8s.golden import FOLDERS, GOLDEN, ROOT, SOURCES, digest_of_sources, documents, golden_of, rendered
from tests.k8s.schemas import VERSIONS, Document, is_namespaced, is_part_valid, is_whole_valid, mutations, refusal
from trainer.__main__ import STAGES, load_stage
from trainer.config import read_config

KUEUE = ROOT / "k8s" / "components" / "kueue" / "queues.yaml"
FILES = [*map(golden_of, FOLDERS), KUEUE]
NAMES = [path.stem for path in FILES]
RENEW = "Review what changed, and renew with: make manifests RENEW=1"


def specs_of_jobs(document: Document) -> list[Document]:
    """The Job specs in an object."""
    if document["kind"] == "Job":
        return [document["spec"]]
    if document["kind"] == "JobSet":
        return [job["template"]["spec"] for job in document["spec"]["replicatedJobs"]]
    if document["kind"] == "ClusterTrainingRuntime":
        return [job["template"]["spec"] for job in document["spec"]["template"]["spec"]["replicatedJobs"]]
    return []


def all_jobs() -> list[Any]:
    return [
        pytest.param(spec, id=f"{path.stem}-{document['kind']}-{number}")
        for path in FILES
        for document in documents(path)
        for number, spec in enumerate(specs_of_jobs(document))
    ]


def environment_of(container: Document) -> dict[str, str]:
    """What a container's variables are in pod 0 of a Job; Trainer's and JobSet's own included."""
    facts = {"PET_NNODES": "4", "PET_MASTER_ADDR": "train-node-0-0.train", "COORDINATOR": "train-store-0-0.train"}
    given = {entry["name"]: entry.get("value", "1") for entry in container["env"]}
    return facts | given | {"JOB_NAME": "train", "POD_IP": "127.0.0.1"} | {"COORDINATOR": facts["COORDINATOR"]}


def words_of(container: Document) -> list[str]:
    """The args as the kubelet expands them."""
    environment = environment_of(container)
    return [re.sub(r"\$\((\w+)\)", lambda match: environment[match.group(1)], word) for word in container["args"]]


def test_the_golden_files_are_of_these_sources() -> None:
    assert SOURCES.read_text().strip() == digest_of_sources(), f"k8s/ changed. {RENEW}"
    assert sorted(path.name for path in GOLDEN.glob("*.yaml")) == sorted(golden_of(folder).name for folder in FOLDERS)


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=[f"{folder.parent.name}-{folder.name}" for folder in FOLDERS])
def test_kustomize_builds_the_golden_file(folder: Path) -> None:
    assert rendered(folder) == golden_of(folder).read_text(), RENEW


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_manifest_passes_strict_validation(path: Path) -> None:
    for document in documents(path):
        assert refusal(document) is None


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_manifest_passes_for_every_supported_kubernetes(path: Path, version: str) -> None:
    for document in documents(path):
        assert refusal(document, version) is None


def test_the_supported_versions_reach_from_1_29_to_the_newest_that_is_known() -> None:
    assert VERSIONS[0] == "1.29"
    assert len(VERSIONS) >= 9


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_wrong_field_is_refused(path: Path) -> None:
    count = 0
    for document in documents(path):
        for mutation in mutations(document):
            assert not is_part_valid(mutation), f"{document['kind']}: {mutation.what} was accepted"
            count += 1
    assert count > 25


@pytest.mark.parametrize("name", ["overlays-plain", "overlays-monitoring", "stages-ingest"])
def test_every_wrong_field_is_refused_in_the_whole_manifest(name: str) -> None:
    refused = [
        mutation.what
        for document in documents(GOLDEN / f"{name}.yaml")
        for mutation in mutations(document)
        if not is_whole_valid(mutation)
    ]
    assert len(refused) == sum(1 for each in documents(GOLDEN / f"{name}.yaml") for _ in mutations(each))
    assert len(refused) > 300


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_wrong_field_is_refused_in_every_whole_manifest_for_the_oldest_kubernetes(path: Path) -> None:
    for document in documents(path):
        for mutation in mutations(document, VERSIONS[0]):
            assert not is_whole_valid(mutation), f"{document['kind']}: {mutation.what} was accepted"


def test_a_refusal_names_the_path() -> None:
    document = json.loads(json.dumps(workload_of(documents(golden_of(ROOT / "k8s" / "overlays" / "plain")))))
    document["spec"]["template"]["spec"]["terminationGraceSeconds"] = 3
    said = refusal(document)
    assert said is not None
    assert said.startswith("spec.template.spec: ")
    assert "terminationGraceSeconds" in said


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_objects_are_in_the_namespace_of_the_settings_and_names_are_unique(path: Path) -> None:
    found = documents(path)
    for document in found:
        assert document["metadata"].get("namespace") == ("viewpoint" if is_namespaced(document) else None)
    names = [(document["kind"], document["metadata"]["name"]) for document in found]
    assert len(set(names)) == len(names)
    assert not any("kustomize.toolkit" in str(document) or "local-config" in str(document) for document in found)


@pytest.mark.parametrize("spec", all_jobs())
def test_a_job_survives_what_clusters_do(spec: Document) -> None:
    pods = spec.get("completions", 4)
    assert spec["completionMode"] == "Indexed"
    assert spec.get("parallelism", pods) <= pods
    assert spec["backoffLimit"] >= 10 * pods
    if pods > 1:  # one number's losses hold up no other's replacement, and what none waits for any more ends
        assert spec["backoffLimitPerIndex"] == 10
        assert spec["maxFailedIndexes"] == 0
    assert spec["podReplacementPolicy"] == "Failed"
    ignored, failed = spec["podFailurePolicy"]["rules"]
    assert ignored["action"] == "Ignore", "first, as an evicted pod may end with any code"
    assert ignored["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert failed["action"] == "FailJob"
    assert failed["onExitCodes"]["values"] == [2, 64, pod.EXIT_CANCELLED]
    (container,) = spec["template"]["spec"]["containers"]
    assert failed["onExitCodes"]["containerName"] == container["name"]


@pytest.mark.parametrize("spec", all_jobs())
def test_a_pod_can_do_nothing_that_it_does_not_need(spec: Document) -> None:
    template = spec["template"]["spec"]
    (container,) = template["containers"]
    assert template["restartPolicy"] == "Never"
    assert template["automountServiceAccountToken"] is False
    assert template["serviceAccountName"] == "viewpoint"
    context = template["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] > 1000
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    own = container["securityContext"]
    assert own == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"cpu", "memory"} <= set(container["resources"]["requests"])
    assert "memory" in container["resources"]["limits"]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert "/tmp" in mounts, "the root file system is read-only"
    volumes = {volume["name"] for volume in template["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert not any("SECRET" in entry["name"] or "KEY" in entry["name"] for entry in container["env"])


@pytest.mark.parametrize("spec", all_jobs())
def test_a_pod_runs_a_command_that_exists_and_fits_its_job(spec: Document) -> None:
    (container,) = spec["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", "launcher.pod"]
    arguments = pod.parser().parse_args(words_of(container))
    made = pod.pod_of(arguments)
    assert made.layout.nodes == spec.get("completions", 4) or arguments.role == "store"
    assert made.stage in STAGES
    stage = ArgumentParser()
    load_stage(made.stage).add_arguments(stage)
    stage.parse_args(made.words[1:])
    if made.is_node:
        template = spec["template"]["spec"]
        grace = template["terminationGracePeriodSeconds"]
        assert arguments.role == "store" or grace >= 120 + 30, "agents give their workers 120 s to save"
        assert made.rendezvous.endswith(":29400")
        assert {port["name"]: port["containerPort"] for port in container["ports"]}["rendezvous"] == 29400
        assert arguments.role == "store" or "/dev/shm" in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_ingest_takes_a_part_a_pod() -> None:
    (container,) = workload_of(documents(GOLDEN / "stages-ingest.yaml"))["spec"]["template"]["spec"]["containers"]
    made = pod.pod_of(pod.parser().parse_args(["--index=3", *words_of(container)]))
    words = pod.part_command(made).words
    assert words[-2:] == ("--part", "3/8")
    parser = ArgumentParser()
    ingest.add_arguments(parser)
    arguments = parser.parse_args(words[4:])
    assert arguments.store == "s3://your-bucket/shapes.zarr"


@pytest.mark.parametrize("path", [ROOT / "k8s/base/recipe.yaml", ROOT / "k8s/jobs/teacher/recipe.yaml"])
def test_a_recipe_is_a_valid_run_that_exports_its_figures(path: Path) -> None:
    config = read_config(path.read_text(), name=str(path))
    assert config.metrics.port == pod.METRICS_PORT
    job = yaml.safe_load((ROOT / "k8s" / "base" / "train.yaml").read_text())
    assert config.global_batch % job["spec"]["completions"] == 0


def test_one_settings_change_reaches_every_place_that_depends_on_it() -> None:
    for name in ("overlays-plain", "overlays-jobset", "stages-train", "stages-teacher"):
        workload = workload_of(documents(GOLDEN / f"{name}.yaml"))
        for spec in specs_of_jobs(workload):
            (container,) = spec["template"]["spec"]["containers"]
            assert container["image"] == "registry.example/viewpoint:0.1.0"
            assert environment_of(container)["NODES"] == "4"
    eight = workload_of(documents(GOLDEN / "overlays-gpu.yaml"))["spec"]["template"]["spec"]["containers"][0]
    assert eight["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert environment_of(eight)["PROCS_PER_NODE"] == environment_of(eight)["GPUS_PER_NODE"] == "8"


@pytest.mark.slow
def test_settings_are_changed_in_one_place(tmp_path: Path) -> None:
    import shutil

    shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    settings = tmp_path / "k8s" / "settings"
    text = (settings / "settings.yaml").read_text().replace('nodes: "4"', 'nodes: "16"', 1)
    text = text.replace("s3://your-bucket/shapes.zarr", "s3://mine/a.zarr")
    (settings / "settings.yaml").write_text(text)
    text = (settings / "kustomization.yaml").read_text().replace("namespace: viewpoint", "namespace: mine")
    (settings / "kustomization.yaml").write_text(text.replace("registry.example/viewpoint", "registry.mine/vp"))
    for folder in ("overlays/plain", "overlays/jobset", "overlays/everything", "stages/train"):
        out = rendered(tmp_path / "k8s" / folder)
        assert "registry.example" not in out
        assert "s3://your-bucket/shapes.zarr" not in out
        assert "namespace: viewpoint" not in out
        (node, *_) = specs_of_jobs(workload_of(list(filter(None, yaml.safe_load_all(out)))))
        assert node["completions"] == node["parallelism"] == 16
        (container,) = node["template"]["spec"]["containers"]
        assert environment_of(container)["NODES"] == "16"
        made = pod.pod_of(pod.parser().parse_args(["--index=15", *words_of(container)]))
        assert made.layout.least_nodes == 16
        assert node["backoffLimit"] >= 160, "ten a node, however many there are"


@pytest.mark.slow
@pytest.mark.parametrize("resource", ["base", "jobs/jobset"])
def test_what_only_some_sites_have_is_named_in_one_place_too(tmp_path: Path, resource: str) -> None:
    import shutil

    shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    components = tmp_path / "k8s" / "components"
    for path, old, new in (
        ("s3/secret.yaml", "name: viewpoint-storage #", "name: my-keys #"),
        ("gpu/gpus.yaml", 'gpus_per_node: "8"', 'gpus_per_node: "5"'),
        ("shared-volume/volume.yaml", "name: viewpoint-data", "name: my-volume"),
        ("kueue/kustomization.yaml", "value: viewpoint}", "value: my-queue}"),
    ):
        text = (components / path).read_text()
        assert text.count(old) == 1
        (components / path).write_text(text.replace(old, new))
    (tmp_path / "site").mkdir()
    overlay = {
        "resources": [f"../k8s/{resource}"],
        "components": [*(f"../k8s/components/{name}" for name in ("s3", "gpu", "shared-volume", "kueue"))],
    }
    (tmp_path / "site" / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    found = list(filter(None, yaml.safe_load_all(rendered(tmp_path / "site"))))
    workload = workload_of(found)
    assert workload["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "my-queue"
    assert secrets_of(found) == ("my-keys",)
    for spec in specs_of_jobs(workload):
        volumes = {volume["name"]: volume for volume in spec["template"]["spec"]["volumes"]}
        assert volumes["data"]["persistentVolumeClaim"]["claimName"] == "my-volume"
    (container,) = specs_of_jobs(workload)[0]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 5
    assert environment_of(container)["PROCS_PER_NODE"] == environment_of(container)["GPUS_PER_NODE"] == "5"


def test_secrets_are_named_and_never_held() -> None:
    assert secrets_of(documents(GOLDEN / "overlays-s3.yaml")) == ("viewpoint-storage",)
    assert secrets_of(documents(GOLDEN / "overlays-plain.yaml")) == ()
    for path in FILES:
        assert not any(document["kind"] == "Secret" for document in documents(path))


def test_pods_find_each_other_by_names_that_the_service_gives() -> None:
    found = documents(GOLDEN / "overlays-plain.yaml")
    job, service = workload_of(found), next(each for each in found if each["kind"] == "Service")
    template = job["spec"]["template"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert template["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    (container,) = template["spec"]["containers"]
    assert "--rendezvous=train-0.viewpoint:29400" in words_of(container)


def test_alerts_speak_of_metrics_that_are_exported() -> None:
    (rules,) = (each for each in documents(GOLDEN / "overlays-monitoring.yaml") if each["kind"] == "PrometheusRule")
    exported = set(
        re.findall(r'(?:gauge|counter|family)\((?:\s*\w+,)?\s*"(\w+)"', (ROOT / "trainer/metrics.py").read_text())
    )
    exported |= set(
        re.findall(
            r'"((?:checkpoint_seconds|restarts|loss|time_seconds|step_phase_seconds))"',
            (ROOT / "trainer/metrics.py").read_text(),
        )
    )
    recorded = {rule["record"] for group in rules["spec"]["groups"] for rule in group["rules"] if "record" in rule}
    alerts = [rule["alert"] for group in rules["spec"]["groups"] for rule in group["rules"] if "alert" in rule]
    assert len(alerts) == len(set(alerts)) == 8
    for group in rules["spec"]["groups"]:
        for rule in group["rules"]:
            for name in re.findall(r"viewpoint[:\w]*", rule["expr"]):
                plain = name.removeprefix("viewpoint_").removesuffix("_total")
                assert name in recorded or plain in exported, f"{name} is exported by nobody"


def test_the_jobset_s_nodes_are_the_job_s_but_for_where_the_store_is() -> None:
    job = workload_of(documents(GOLDEN / "overlays-plain.yaml"))
    jobset = workload_of(documents(GOLDEN / "overlays-jobset.yaml"))
    plain = job["spec"]["template"]["spec"]
    node = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    for key in ("securityContext", "topologySpreadConstraints", "terminationGracePeriodSeconds", "restartPolicy"):
        assert node[key] == plain[key]
    one, other = plain["containers"][0], node["containers"][0]
    for key in ("securityContext", "resources", "readinessProbe", "command", "image"):
        assert one[key] == other[key]
    assert set(other["args"]) - set(one["args"]) == {"--role=worker", "--rendezvous=$(COORDINATOR):29400"}
    assert all(rule["name"] for rule in jobset["spec"]["failurePolicy"]["rules"])


def test_exclusive_placement_is_of_the_nodes_and_not_of_the_store() -> None:
    node, store = workload_of(documents(GOLDEN / "overlays-jobset-exclusive.yaml"))["spec"]["replicatedJobs"]
    assert "alpha.jobset.sigs.k8s.io/exclusive-topology" in node["template"]["metadata"]["annotations"]
    assert "metadata" not in store["template"]


def test_every_policy_says_what_it_protects_from() -> None:
    text = (ROOT / "k8s" / "base" / "train.yaml").read_text()
    lines = text.splitlines()
    for word in (
        "backoffLimit", "backoffLimitPerIndex", "podReplacementPolicy", "ttlSecondsAfterFinished", "action: Ignore", "action: FailJob",
        "restartPolicy",
        "automountServiceAccountToken", "terminationGracePeriodSeconds", "topologySpreadConstraints", "readinessProbe",
        "securityContext:", "readOnlyRootFilesystem", "limits", "shared-memory", "subdomain", "completionMode",
    ):  # fmt: skip
        places = [number for number, line in enumerate(lines) if word in line]
        near = [line for number in places for line in lines[max(0, number - 2) : number + 4]]
        assert places
        assert any("#" in line for line in near), f"{word} has no comment"
