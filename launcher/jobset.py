"""Pure: fills a parsed manifest with what one step of a launch needs. What runs where and how is the manifest's word.

Filled, and nothing else, in the training Job, or in the JobSet's jobs:

    metadata.name                     of the step
    metadata.namespace                of every object that has one, where a namespace was asked for
    metadata.labels                   app.kubernetes.io/instance: the run; kueue.x-k8s.io/queue-name, where a queue was asked for
    spec.completions, .parallelism    pods of the step
    spec.backoffLimit                 ten a pod
    container: image                  where one was asked for
    container: args                   behind `--` the stage and its words; before it --recipe and --store go, as the launcher writes
                                      the config itself, and --job and --run-folder come
    container: env                    the values of NODES, MIN_NODES, PROCS_PER_NODE, GPUS_PER_NODE, MAX_RESTARTS, NODE_TIMEOUT
                                      and STEP_DEADLINE, where the manifest has them
    container: limits, GPUs           one a process where the manifest has any; none in steps that need none
    JobSet: network.subdomain         the step's name
    JobSet: replicatedJobs, coordinator   the pod that holds the store goes where no world meets

Everything beside it is applied as it lies.
"""

import copy
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from datastore.errors import AskedWrongly, DoNotRetry
from launcher.command import Layout
from launcher.plan import Step

Document = dict[str, Any]

CONTAINER: Final = "viewpoint"
GPU: Final = "nvidia.com/gpu"
INSTANCE_LABEL: Final = "app.kubernetes.io/instance"
QUEUE_LABEL: Final = "kueue.x-k8s.io/queue-name"
PLACEHOLDER_REGISTRY: Final = "registry.example/"
PLACEHOLDER_BUCKET: Final = "s3://your-bucket/"
_WORKLOADS: Final = ("Job", "JobSet")
_LONGEST_NAME: Final = 52  # of 63: the pods' names end with their number, the JobSet's with two and a word
_LOSSES_A_POD: Final = 10
_WITHOUT_GPU: Final = ("ingest", "report")
_IN_PARTS: Final = ("ingest", "cache")
_CLUSTER_WIDE: Final = ("Namespace", "ClusterTrainingRuntime", "ClusterQueue", "ResourceFlavor", "PersistentVolume")


@dataclass(frozen=True)
class Cluster:
    """Where and how a launch runs on Kubernetes, as asked; None: as the manifest has it."""

    manifest: str
    image: str | None = None
    namespace: str | None = None
    queue: str | None = None
    context: str | None = None  # kubectl's


@dataclass(frozen=True)
class Filling:
    """What one step puts into a manifest."""

    name: str
    run: str  # for people: whose step it is
    job: str  # the step's name
    words: tuple[str, ...]
    run_folder: str
    layout: Layout
    pods: int
    image: str | None = None
    namespace: str | None = None
    queue: str | None = None

    @property
    def stage(self) -> str:
        """The stage's name."""
        return self.words[0]

    @property
    def is_world(self) -> bool:
        """Whether its pods meet."""
        return self.stage == "pretrain"

    @property
    def environment(self) -> dict[str, str]:
        """Values of the container's variables."""
        layout = self.layout
        processes = layout.procs_per_node if self.is_world else 1
        return {
            "NODES": str(self.pods),
            "MIN_NODES": str(min(layout.least_nodes, self.pods)),
            "PROCS_PER_NODE": str(processes),
            "MAX_RESTARTS": str(layout.max_restarts),
            "NODE_TIMEOUT": f"{layout.node_timeout:g}",
            "STEP_DEADLINE": f"{layout.step_deadline:g}",
        }


def filling_of(step: Step, layout: Layout, run_url: str, cluster: Cluster) -> Filling:
    """What a step of a launch puts into a manifest. Stages whose parts need nothing of each other have a part a node."""
    pods = layout.nodes if step.on_nodes or step.words[0] in _IN_PARTS else 1
    return Filling(
        name=job_name(step.run_url, step.name),
        run=label_value(run_url.rstrip("/").rpartition("/")[2]),
        job=step.name,
        words=step.words,
        run_folder=run_url,
        layout=layout,
        pods=pods,
        image=cluster.image,
        namespace=cluster.namespace,
        queue=cluster.queue,
    )


def job_name(run_url: str, step: str) -> str:
    """A step's name on the cluster: the same step of the same run, and no other, has it again."""
    digest = hashlib.sha256(f"{run_url} {step}".encode()).hexdigest()[:6]
    words = f"{run_url.rstrip('/').rpartition('/')[2]}-{step}".lower()
    plain = re.sub(r"[^a-z0-9]+", "-", words).strip("-")[: _LONGEST_NAME - len(digest) - 1].rstrip("-")
    return f"{plain if plain[:1].isalpha() else f'run-{plain}'}-{digest}"


def label_value(text: str) -> str:
    """The text as a label takes it."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:63].strip("-._")


def fill(documents: Sequence[Document], filling: Filling) -> list[Document]:
    """The documents as they are applied; those given stay as they are."""
    filled = copy.deepcopy(list(documents))
    workload = workload_of(filled)
    metadata = workload["metadata"]
    metadata["name"] = filling.name
    labels = metadata.setdefault("labels", {})
    labels[INSTANCE_LABEL] = filling.run
    if filling.queue is not None:
        labels[QUEUE_LABEL] = filling.queue
    if workload["kind"] == "JobSet" and not filling.is_world:
        jobs = workload["spec"]["replicatedJobs"]
        workload["spec"]["replicatedJobs"] = [job for job in jobs if job["name"] == "node"]
        workload["spec"].pop("coordinator", None)
    if workload["kind"] == "JobSet":
        workload["spec"].setdefault("network", {})["subdomain"] = filling.name
    for spec, holds_nodes in _job_specs(workload):
        if holds_nodes:
            spec["completions"] = spec["parallelism"] = filling.pods
        spec["backoffLimit"] = _LOSSES_A_POD * filling.pods
        _fill_container(_container(spec), filling, holds_nodes=holds_nodes)
    if filling.namespace is not None:
        for document in filled:
            if document["kind"] not in _CLUSTER_WIDE:
                document["metadata"]["namespace"] = filling.namespace
    return filled


def workload_of(documents: Sequence[Document]) -> Document:
    """The one document that runs pods."""
    found = [document for document in documents if document["kind"] in _WORKLOADS]
    if len(found) != 1:
        kinds = ", ".join(f"{document['kind']} {document['metadata']['name']}" for document in documents)
        raise AskedWrongly(
            f"The launcher fills one training Job or JobSet, and the manifest has {len(found)} of them ({kinds}). "
            f"Give --manifest a folder such as k8s/overlays/plain; a TrainJob is for `kubectl apply -k`."
        )
    return found[0]


def image_of(documents: Sequence[Document]) -> str:
    """The image that the workload's pods run."""
    spec, _ = next(_job_specs(workload_of(documents)))
    image: str = _container(spec).get("image", "")
    return image


def runs_of(documents: Sequence[Document]) -> str:
    """The folder where the manifest's own run lies: where a launch's runs go that names no other."""
    for spec, _ in _job_specs(workload_of(documents)):
        for entry in _container(spec).get("env", ()):
            if entry["name"] == "RUN_URL" and "/" in entry.get("value", ""):
                runs: str = entry["value"].rstrip("/").rpartition("/")[0]
                if not f"{runs}/".startswith(PLACEHOLDER_BUCKET):
                    return runs
    raise AskedWrongly(
        f"No place for runs: the manifest has the placeholder {PLACEHOLDER_BUCKET} or none. Put a bucket of yours into "
        f"k8s/settings/settings.yaml, in store, run and teacher_run, or name the folder with --runs s3://BUCKET/runs (of "
        f"make: RUNS=s3://BUCKET/runs). This machine and all pods must reach it."
    )


def secrets_of(documents: Sequence[Document]) -> tuple[str, ...]:
    """Secrets without which the workload's pods do not start."""
    names: dict[str, None] = {}
    for spec, _ in _job_specs(workload_of(documents)):
        pod, container = spec["template"]["spec"], _container(spec)
        references = [source.get("secretRef") for source in container.get("envFrom", ())]
        references += [entry.get("valueFrom", {}).get("secretKeyRef") for entry in container.get("env", ())]
        names |= {each["name"]: None for each in references if each and not each.get("optional")}
        names |= {each["name"]: None for each in pod.get("imagePullSecrets", ())}
        volumes = [volume["secret"] for volume in pod.get("volumes", ()) if "secret" in volume]
        names |= {each["secretName"]: None for each in volumes if not each.get("optional")}
    return tuple(names)


def check_fillable(documents: Sequence[Document], cluster: Cluster) -> None:
    """Refuses a manifest whose pods could not start; needs no cluster."""
    workload = workload_of(documents)
    for spec, _ in _job_specs(workload):
        if spec.get("completionMode") != "Indexed":
            raise AskedWrongly(
                f"{workload['kind']} {workload['metadata']['name']} must be Indexed: pods learn their number from it. Set "
                f"completionMode: Indexed."
            )
        if "--" not in _container(spec).get("args", ()):
            raise AskedWrongly(
                f"Container {CONTAINER!r} of {workload['metadata']['name']} has no `--` in its args, behind which the "
                f"launcher puts the stage. Begin with a copy of k8s/base/train.yaml."
            )
    image = cluster.image or image_of(documents)
    if not image or image.startswith(PLACEHOLDER_REGISTRY) or image == CONTAINER:
        raise AskedWrongly(
            f"No image to run: the manifest has the placeholder {image!r}. Build and push k8s/image, then name it with "
            f"--image REGISTRY/viewpoint:TAG, or in k8s/settings/kustomization.yaml."
        )


def check_urls(urls: Mapping[str, str | None]) -> None:
    """Refuses what lies on this machine: pods would not find it."""
    for what, url in urls.items():
        scheme, separator, _ = (url or "").partition("://")
        if url is not None and (not separator or scheme in ("file", "local")):
            raise DoNotRetry(
                f"{what} is {url}, which is on this machine and not on the cluster's. Name object storage, for example "
                f"{what} s3://bucket/{url.rstrip('/').rpartition('/')[2] or 'folder'}. With a volume that all pods share, use "
                f"`kubectl apply -k` and k8s/components/shared-volume instead."
            )


def _job_specs(workload: Document) -> Iterator[tuple[Document, bool]]:
    """Specs of the Jobs in a workload, and whether their pods are the nodes."""
    if workload["kind"] == "Job":
        yield workload["spec"], True
        return
    for job in workload["spec"]["replicatedJobs"]:
        yield job["template"]["spec"], job["name"] == "node"


def _container(spec: Document) -> Document:
    containers = spec["template"]["spec"]["containers"]
    found: Document | None = next((each for each in containers if each["name"] == CONTAINER), None)
    if found is None:
        raise AskedWrongly(
            f"The manifest's pods have no container {CONTAINER!r}, which the launcher fills; they have "
            f"{', '.join(each['name'] for each in containers)}. Begin with a copy of k8s/base/train.yaml."
        )
    return found


def _fill_container(container: Document, filling: Filling, *, holds_nodes: bool) -> None:
    if filling.image is not None:
        container["image"] = filling.image
    before = container["args"][: container["args"].index("--")]
    kept = [word for word in before if not word.startswith(("--recipe", "--store"))]
    container["args"] = [*kept, f"--job={filling.job}", f"--run-folder={filling.run_folder}", "--", *filling.words]
    values = filling.environment
    gpus = _fill_gpus(container, filling) if holds_nodes else 0
    for entry in container.get("env", ()):
        if entry["name"] in values:
            entry["value"] = values[entry["name"]]
        elif entry["name"] == "GPUS_PER_NODE":
            entry["value"] = str(gpus)


def _fill_gpus(container: Document, filling: Filling) -> int:
    """Asks for as many as there are processes, where the manifest asks for any at all."""
    gpus = 0 if filling.stage in _WITHOUT_GPU else int(filling.environment["PROCS_PER_NODE"])
    asked = 0
    for amounts in (container.get("resources", {}).get(kind, {}) for kind in ("limits", "requests")):
        if GPU in amounts:
            del amounts[GPU]
            if gpus:
                amounts[GPU] = asked = gpus
    return asked
