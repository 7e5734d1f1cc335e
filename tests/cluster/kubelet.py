"""The one node of the cluster double: it takes every pod that fits, and really runs what its containers run.

A pod has a network namespace with an address and names of its own (names.py), its volumes (volumes.py), and containers with
their variables, probes, output, grace period and exit codes (sandbox.py says what the image is). It is our reading of what
Kubernetes' documentation says of pods, not a kubelet. Left out: images and their pulling, private or missing ones; sidecars
(init containers that are restarted), ephemeral containers, kubectl's exec, attach, port-forward and cp; limits of memory and
cores, out-of-memory kills; scheduling by labels, taints, affinity and spread; service account tokens; lost nodes; gRPC
probes; postStart; changes of ConfigMaps after the start; termination messages; times within logs.
"""

import json
import logging
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.cluster.environment import Unresolved, amount, expand, variables_of, words_of
from tests.cluster.names import DOMAIN, NameServer, records
from tests.cluster.network import PodNetwork
from tests.cluster.probes import Probe, ask
from tests.cluster.refusals import Document, Refused, bad_request
from tests.cluster.sandbox import IMAGE_PATH, Container, Identity, Mount, Program, Sandbox
from tests.cluster.state import Event, State, now
from tests.cluster.volumes import mounts_of, prepare_volume

NODE: Final = "double"
_TICK_SECONDS: Final = 0.1
_AGAIN_SECONDS: Final = 1.0  # before what was missing is looked for again
_FIRST_BACK_OFF, _LAST_BACK_OFF = (
    10.0,
    300.0,
)  # before a container is started again, if it runs for less than ten minutes
_FORGIVEN_SECONDS: Final = 600.0
_PIECE_BYTES: Final = 2**16
_PROBES: Final = {"startup": "startupProbe", "readiness": "readinessProbe", "liveness": "livenessProbe"}
_logger = logging.getLogger("tests.cluster.kubelet")


class Kubelet:
    """Runs pods while it is entered; leaving kills them all."""

    def __init__(
        self,
        state: State,
        network: PodNetwork,
        folder: Path,
        *,
        image_environment: Mapping[str, str] | None = None,
        capacity: Mapping[str, int] | None = None,
    ) -> None:
        """`image_environment`: variables that the image has; `capacity`: of extended resources, such as GPUs."""
        self._state, self.network, self.folder = state, network, folder
        self.image_environment = {"PATH": IMAGE_PATH, "HOME": "/"} | dict(image_environment or {})
        self._capacity = dict(capacity or {})
        self._workers: dict[str, _PodWorker] = {}  # by uid
        self._newest: dict[tuple[str, str], tuple[str, str]] = {}  # by namespace and name: uid, and first container
        self._closing = threading.Event()
        self._watch = state.watch()
        self._thread = threading.Thread(target=self._follow, name="kubelet", daemon=True)
        self._names = NameServer(network.gateway, lambda: records(state.list("Pod"), state.list("Service")))

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._state.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}})
        self._state.change("Node", None, NODE, self._describe_node, status=True)
        self._names.__enter__()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._watch.close()
        self._thread.join()
        for worker in list(self._workers.values()):
            worker.drop()
        for worker in list(self._workers.values()):
            worker.join()
        self._names.__exit__(kind, error, trace)

    def kill(self, namespace: str, pod: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Kills all processes of a pod's containers at once, as a machine's memory killer or an accident would."""
        self._worker(namespace, pod).signal_all(number)

    def log_path(
        self, namespace: str, pod: str, container: str | None = None, *, previous: bool = False
    ) -> Path | None:
        """The file with a container's output, or None where it has not begun; of pods that are gone, too."""
        if (namespace, pod) not in self._newest:
            return None
        uid, first = self._newest[namespace, pod]
        folder, container = self.folder / uid / "logs", container or first
        runs = sorted(folder.glob(f"{container}.*.log"), key=lambda path: int(path.suffixes[-2][1:]))
        if previous:
            runs = runs[:-1]
        return runs[-1] if runs else None

    def logs(
        self,
        namespace: str,
        pod: str,
        *,
        follow: bool = False,
        tail: int | None = None,
        container: str | None = None,
        previous: bool = False,
        timestamps: bool = False,
    ) -> Iterator[bytes]:
        """A container's output in pieces; with `follow`, until it has ended. Refused where there is none yet."""
        if timestamps:
            raise bad_request("the double keeps no times of lines")
        path = self.log_path(namespace, pod, container, previous=previous)
        if path is None:
            what = "previous terminated" if previous else "waiting to start:"
            raise bad_request(f'container "{container or "?"}" in pod "{pod}": {what} container not found')
        uid, _ = self._newest[namespace, pod]
        with path.open("rb") as file:
            if tail is not None:
                lines = file.read().splitlines(keepends=True)
                yield b"".join(lines[len(lines) - min(tail, len(lines)) :])
            while True:
                worker = self._workers.get(uid)
                has_ended = worker is None or not worker.is_running(path)
                while piece := file.read(_PIECE_BYTES):
                    yield piece
                if has_ended or not follow:
                    return
                time.sleep(_TICK_SECONDS)

    def why_unschedulable(self, pod: Document) -> str | None:
        """Why a pod does not fit on the node, or is not to; None where it does."""
        if self._state.get("Node", None, NODE).get("spec", {}).get("unschedulable"):
            return "0/1 nodes are available: 1 node(s) were unschedulable."
        for container in pod["spec"]["containers"]:
            for resource, asked in container.get("resources", {}).get("requests", {}).items():
                if "/" in resource and amount(asked) > self._capacity.get(resource, 0):
                    return f"0/1 nodes are available: 1 Insufficient {resource}."
        return None

    def _worker(self, namespace: str, pod: str) -> "_PodWorker":
        return self._workers[self._newest[namespace, pod][0]]

    def _follow(self) -> None:
        for event in self._watch:
            if self._closing.is_set():
                return
            taken = [event] if event.object["kind"] == "Pod" else []
            if event.object["kind"] == "Node":  # it may have room again
                taken = [Event("MODIFIED", pod) for pod in self._state.list("Pod")]
            for each in taken:
                try:
                    self._take(each)
                except Refused as error:  # the object changed in between: its next event comes
                    _logger.info("%s", error)

    def _take(self, event: Event) -> None:
        metadata = event.object["metadata"]
        worker = self._workers.get(metadata["uid"])
        if event.type == "DELETED":
            if worker is not None:
                worker.drop()
            return
        if worker is not None:
            worker.take(event.object)
            return
        if event.object["spec"].get("nodeName") or "deletionTimestamp" in metadata:
            return
        why = self.why_unschedulable(event.object)
        if why is not None:
            self._state.record(event.object, "FailedScheduling", why, type="Warning", component="default-scheduler")
            return
        self._assign(event.object)

    def _assign(self, pod: Document) -> None:
        namespace, name = pod["metadata"]["namespace"], pod["metadata"]["name"]

        def to_this_node(document: Document) -> None:
            document["spec"]["nodeName"] = NODE

        pod = self._state.change("Pod", namespace, name, to_this_node)
        self._state.record(
            pod, "Scheduled", f"Successfully assigned {namespace}/{name} to {NODE}", component="default-scheduler"
        )
        self._newest[namespace, name] = pod["metadata"]["uid"], pod["spec"]["containers"][0]["name"]
        self._workers[pod["metadata"]["uid"]] = worker = _PodWorker(self, self._state, pod)
        worker.start()

    def _describe_node(self, node: Document) -> None:
        node["status"] = {
            "addresses": [{"type": "InternalIP", "address": self.network.gateway}],
            "allocatable": {name: str(count) for name, count in self._capacity.items()},
            "capacity": {name: str(count) for name, count in self._capacity.items()},
            "conditions": [
                {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "it is no kubelet"}
            ],
        }


@dataclass
class _Run:
    """One of a pod's containers, over all its starts."""

    described: Document
    is_init: bool = False
    container: Container | None = None
    log: Path | None = None
    state: Document = field(default_factory=lambda: {"waiting": {"reason": "PodInitializing"}})
    last_state: Document = field(default_factory=dict)
    restarts: int = 0
    code: int | None = None  # once it has ended and is not started again
    not_before: float = 0.0
    started_at: float = 0.0
    probes: dict[str, Probe] = field(default_factory=dict)

    @property
    def name(self) -> str:
        name: str = self.described["name"]
        return name

    @property
    def has_started(self) -> bool:
        """Whether it runs, and its startup probe has said yes."""
        return "running" in self.state and ("startup" not in self.probes or self.probes["startup"].healthy is True)

    @property
    def is_ready(self) -> bool:
        if self.is_init:
            return self.code == 0
        return self.has_started and ("readiness" not in self.probes or self.probes["readiness"].healthy is True)


class _PodWorker:
    """The life of one pod."""

    def __init__(self, kubelet: Kubelet, state: State, pod: Document) -> None:
        metadata = pod["metadata"]
        self._thread = threading.Thread(target=self._run, name=f"pod-{metadata['name']}", daemon=True)
        self._kubelet, self._state, self._pod = kubelet, state, pod
        self._folder = kubelet.folder / metadata["uid"]
        self._where = (metadata["namespace"], metadata["name"])
        self._wake = threading.Event()
        self._dropped = False
        self._kill_at: float | None = None
        self._sandbox: Sandbox | None = None
        self._address = ""
        self._volumes: dict[str, Path] = {}
        self._reported: Document = {}
        spec = pod["spec"]
        self._init_runs = [_Run(each, is_init=True) for each in spec.get("initContainers", ())]
        self._runs = [_Run(each) for each in spec["containers"]]
        self._failed_for: tuple[str, str] | None = None  # of the pod itself: reason and message
        self._started_at = now()
        self._began = time.monotonic()

    # what the kubelet's own thread calls

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def join(self) -> None:
        """Waits until it is over."""
        self._thread.join()

    def take(self, pod: Document) -> None:
        """Somebody changed the pod."""
        self._pod = pod
        if "deletionTimestamp" in pod["metadata"]:
            kill_at = time.monotonic() + pod["metadata"]["deletionGracePeriodSeconds"]
            if self._kill_at is None or kill_at < self._kill_at - 1:
                self._kill_at = kill_at
            self._wake.set()

    def drop(self) -> None:
        """The pod is there no more: what runs is killed."""
        self._dropped = True
        self._kill_at = 0.0
        self._wake.set()

    def signal_all(self, number: signal.Signals) -> None:
        """Sends a signal to every container."""
        living = [run.container for run in self._runs if run.container is not None]
        if not living:
            raise RuntimeError(f"Nothing of pod {'/'.join(self._where)} runs.")
        for container in living:
            container.send(number)

    def is_running(self, log: Path) -> bool:
        """Whether the container that writes this log may write more."""
        runs = [run for run in (*self._init_runs, *self._runs) if run.log == log]
        return any(run.container is not None and run.container.poll() is None for run in runs)

    # the pod's own thread

    def _run(self) -> None:
        try:
            if self._prepare() and self._run_init_containers():
                self._run_containers()
            self._end()
        finally:
            if self._sandbox is not None:
                self._kubelet.network.unplug(self._address)
                self._sandbox.end()
            shutil.rmtree(self._folder / "volumes", ignore_errors=True)
            self._kubelet._workers.pop(self._pod["metadata"]["uid"], None)
            if self._kill_at is not None and not self._dropped:
                self._state.remove("Pod", *self._where, uid=self._pod["metadata"]["uid"])

    @property
    def _is_told_to_end(self) -> bool:
        return self._kill_at is not None

    def _record(self, reason: str, message: str, *, warning: bool = False) -> None:
        self._state.record(
            self._pod, reason, message, type="Warning" if warning else "Normal", component=f"kubelet, {NODE}"
        )

    def _prepare(self) -> bool:
        """Network, names and volumes; False where the pod is to end before it has begun."""
        (self._folder / "logs").mkdir(parents=True)
        spec = self._pod["spec"]
        hostname = spec.get("hostname") or self._where[1]
        self._sandbox = Sandbox(hostname[:63])
        self._address = self._kubelet.network.plug(self._sandbox.process)
        for run in (*self._init_runs, *self._runs):
            run.state = {"waiting": {"reason": "PodInitializing" if self._init_runs else "ContainerCreating"}}
        self._report()
        self._write_names(hostname)
        group = spec.get("securityContext", {}).get("fsGroup")
        for volume in spec.get("volumes", ()):
            while volume["name"] not in self._volumes:
                try:
                    path = prepare_volume(
                        volume,
                        self._folder / "volumes" / volume["name"],
                        self._kubelet.folder / "claims",
                        self._pod,
                        self._find,
                        self._sandbox.mount_memory,
                    )
                except Unresolved as error:
                    self._record(
                        "FailedMount", f'MountVolume.SetUp failed for volume "{volume["name"]}" : {error}', warning=True
                    )
                    if self._wait(_AGAIN_SECONDS):
                        return False
                    continue
                if group is not None and ("emptyDir" in volume or "persistentVolumeClaim" in volume):
                    self._sandbox.set_owner(path, group)
                self._volumes[volume["name"]] = path
        return not self._is_told_to_end

    def _run_init_containers(self) -> bool:
        """One after the other; False where the pod ends with them."""
        for run in self._init_runs:
            while run.code is None:
                if self._is_told_to_end or self._is_out_of_time():
                    self._stop([run])
                    return False
                self._step(run)
                self._report()
                self._wake.wait(_TICK_SECONDS)
            if run.code != 0:
                return False
        return True

    def _run_containers(self) -> None:
        while any(run.code is None for run in self._runs):
            if self._is_told_to_end or self._is_out_of_time():
                self._stop(self._runs)
                return
            for run in self._runs:
                self._step(run)
            self._report()
            self._wake.wait(_TICK_SECONDS)

    def _is_out_of_time(self) -> bool:
        allowed = self._pod["spec"].get("activeDeadlineSeconds")
        if allowed is None or time.monotonic() - self._began < allowed:
            return False
        self._failed_for = ("DeadlineExceeded", "Pod was active on the node longer than the specified deadline")
        return True

    def _step(self, run: _Run) -> None:
        """Starts, watches, probes or restarts one container, as it needs."""
        if run.code is not None:
            return
        if run.container is None:
            if time.monotonic() >= run.not_before:
                self._start(run)
            return
        code = run.container.poll()
        if code is not None:
            self._take_end(run, code)
            return
        for kind, probe in run.probes.items():
            if (
                not probe.is_due()
                or (kind == "startup" and probe.healthy)
                or (kind != "startup" and not run.has_started)
            ):
                continue
            if not probe.ask(run.container, self._address):
                self._record("Unhealthy", f"{kind.capitalize()} probe failed: {probe.said}", warning=True)
            if probe.healthy is False and kind != "readiness":
                self._record("Killing", f"Container {run.name} failed {kind} probe, will be restarted")
                self._kill([run], time.monotonic() + self._pod["spec"]["terminationGracePeriodSeconds"])
                return

    def _start(self, run: _Run) -> None:
        assert self._sandbox is not None
        try:
            program = self._program(run)
        except Unresolved as error:
            run.state = {"waiting": {"reason": "CreateContainerConfigError", "message": str(error)}}
            self._record("Failed", f"Error: {error}", warning=True)
            run.not_before = time.monotonic() + _AGAIN_SECONDS
            return
        image = run.described["image"]
        self._record("Pulled", f'Container image "{image}" already present on machine')
        run.log = self._folder / "logs" / f"{run.name}.{run.restarts}.log"
        run.container = self._sandbox.start(program, self._folder / "roots" / f"{run.name}.{run.restarts}", run.log)
        run.started_at = time.monotonic()
        run.state = {"running": {"startedAt": now()}}
        run.probes = {
            kind: Probe(run.described[name], run.described, run.started_at)
            for kind, name in _PROBES.items()
            if name in run.described and not run.is_init
        }
        self._record("Created", f"Created container: {run.name}")
        self._record("Started", f"Started container {run.name}")

    def _take_end(self, run: _Run, code: int, *, for_good: bool = False) -> None:
        """A container has ended: it is over, or starts again after a while."""
        started = run.state.get("running", {}).get("startedAt", now())
        reason = "Completed" if code == 0 else "Error"
        ended = {"terminated": {"exitCode": code, "reason": reason, "startedAt": started, "finishedAt": now()}}
        if code > 128:
            ended["terminated"]["signal"] = code - 128
        run.container = None
        policy = self._pod["spec"]["restartPolicy"]
        again = policy == "Always" if not run.is_init else False
        if for_good or not (again or (code != 0 and policy != "Never")):
            run.code, run.state = code, ended
            return
        back_off = min(_FIRST_BACK_OFF * 2 ** max(run.restarts - 1, 0), _LAST_BACK_OFF) if run.restarts else 0.0
        if time.monotonic() - run.started_at > _FORGIVEN_SECONDS:
            back_off = 0.0
        run.restarts += 1
        run.last_state = ended
        run.not_before = time.monotonic() + back_off
        run.state = ended
        if back_off:
            waiting = f"back-off {back_off:g}s restarting failed container={run.name} pod={self._where[1]}"
            run.state = {"waiting": {"reason": "CrashLoopBackOff", "message": waiting}}
            self._record("BackOff", "Back-off restarting failed container", warning=True)

    def _stop(self, runs: list[_Run]) -> None:
        """Ends containers because the pod ends."""
        living = [run for run in runs if run.container is not None]
        for run in living:
            self._record("Killing", f"Stopping container {run.name}")
        self._kill(living, time.monotonic() + self._pod["spec"]["terminationGracePeriodSeconds"], for_good=True)
        for run in runs:
            if run.code is None and "terminated" not in run.state:
                run.state = {"waiting": {"reason": "ContainerCreating"}}

    def _kill(self, runs: list[_Run], deadline: float, *, for_good: bool = False) -> None:
        """preStop, SIGTERM, and SIGKILL when there is no time left; a deletion's own deadline counts where there is one."""
        self._wake.clear()
        for run in runs:
            hook = run.described.get("lifecycle", {}).get("preStop")
            if hook is not None and run.container is not None and not self._dropped:
                left = max((self._kill_at or deadline) - time.monotonic(), 0.1)
                if "sleep" in hook:
                    self._wake.wait(min(hook["sleep"]["seconds"], left))
                    continue
                good, said = ask(hook, run.described, run.container, self._address, left)
                if not good:
                    self._record("FailedPreStopHook", f"PreStopHook failed: {said}", warning=True)
        for run in runs:
            if run.container is not None:
                run.container.send(signal.SIGTERM)
        while any(run.container is not None for run in runs):
            out_of_time = time.monotonic() >= (deadline if self._kill_at is None else self._kill_at)
            for run in runs:
                if run.container is None:
                    continue
                if out_of_time:
                    run.container.send(signal.SIGKILL)
                code = run.container.wait(_TICK_SECONDS / 2)
                if code is not None:
                    self._take_end(run, code, for_good=for_good)

    def _end(self) -> None:
        """What the pod is once nothing of it runs any more."""
        codes = [run.code for run in (*self._init_runs, *self._runs)]
        good = all(code == 0 for code in codes) and self._failed_for is None
        self._report("Succeeded" if good else "Failed")

    def _wait(self, seconds: float) -> bool:
        """Waits; True where the pod is told to end."""
        self._wake.wait(seconds)
        return self._is_told_to_end

    def _find(self, kind: str, name: str) -> Document | None:
        return self._state.find(kind, self._where[0], name)

    def _program(self, run: _Run) -> Program:
        """What a container runs, with all that it refers to."""
        spec = self._pod["spec"]
        address = {"podIP": self._address, "podIPs": [{"ip": self._address}], "hostIP": self._kubelet.network.gateway}
        pod = self._pod | {"status": self._pod.get("status", {}) | address}
        own = variables_of(run.described, pod, self._find)
        image = self._kubelet.image_environment
        words = words_of(run.described, own)
        if not words:
            raise Unresolved("no command specified: the cluster double's image has none of its own")
        return Program(
            words,
            dict(image) | {"HOSTNAME": spec.get("hostname") or self._where[1]} | own,
            expand(run.described.get("workingDir", "/"), own),
            (*self._own_mounts(), *mounts_of(run.described, self._volumes)),
            identity_of(spec.get("securityContext", {}), run.described.get("securityContext", {})),
            run.described.get("securityContext", {}).get("readOnlyRootFilesystem", False),
        )

    def _write_names(self, hostname: str) -> None:
        """The files by which a pod finds others and itself."""
        folder, namespace = self._folder / "etc", self._where[0]
        folder.mkdir()
        subdomain = self._pod["spec"].get("subdomain")
        names = f"{hostname}.{subdomain}.{namespace}.svc.{DOMAIN}\t{hostname}" if subdomain else hostname
        (folder / "hostname").write_text(f"{hostname}\n")
        (folder / "hosts").write_text(f"127.0.0.1\tlocalhost\n::1\tlocalhost\n{self._address}\t{names}\n")
        searched = f"{namespace}.svc.{DOMAIN} svc.{DOMAIN} {DOMAIN}"
        (folder / "resolv.conf").write_text(
            f"search {searched}\nnameserver {self._kubelet.network.gateway}\noptions ndots:5\n"
        )

    def _own_mounts(self) -> tuple[Mount, ...]:
        return tuple(
            Mount(self._folder / "etc" / name, f"/etc/{name}") for name in ("hostname", "hosts", "resolv.conf")
        )

    def _report(self, phase: str | None = None) -> None:
        """Writes the pod's status where it has changed."""
        if phase is None:
            phase = "Running" if any(run.log is not None for run in self._runs) else "Pending"
        status: Document = {
            "phase": phase,
            "hostIP": self._kubelet.network.gateway,
            "podIP": self._address,
            "podIPs": [{"ip": self._address}],
            "startTime": self._started_at,
            "containerStatuses": [_status_of(run) for run in self._runs],
        }
        if self._init_runs:
            status["initContainerStatuses"] = [_status_of(run) for run in self._init_runs]
        if self._failed_for is not None:
            status["reason"], status["message"] = self._failed_for
        is_ready = phase == "Running" and all(run.is_ready for run in self._runs)
        is_prepared = all(run.code == 0 for run in self._init_runs)
        why = {} if is_ready else _why_not_ready(phase, self._runs)
        facts = {
            "PodScheduled": (True, {}),
            "Initialized": (is_prepared, {}),
            "ContainersReady": (is_ready, why),
            "Ready": (is_ready, why),
        }
        wanted = json.loads(json.dumps([status, facts]))
        if wanted == self._reported or self._dropped:
            return

        def write(document: Document) -> None:
            written = document.setdefault("status", {})
            conditions = {each["type"]: each for each in written.get("conditions", ())}
            for kind, (is_so, reason) in facts.items():
                value = "True" if is_so else "False"
                since = conditions.get(kind, {})
                changed = since["lastTransitionTime"] if since.get("status") == value else now()
                conditions[kind] = {"type": kind, "status": value, "lastTransitionTime": changed} | reason
            written |= status | {"conditions": list(conditions.values())}

        with suppress(Refused):  # it was deleted by force: there is nothing left to say
            self._state.change("Pod", *self._where, write, status=True)
        self._reported = wanted


def identity_of(pod: Document, container: Document) -> Identity:
    """Who a container's processes are, by the security contexts of its pod and its own. The image's user is root."""
    both = {key: value for key, value in pod.items() if key in ("runAsUser", "runAsGroup", "runAsNonRoot")} | container
    user = both.get("runAsUser", 0)
    if both.get("runAsNonRoot") and user == 0:
        raise Unresolved("container has runAsNonRoot and image will run as root")
    groups = [*pod.get("supplementalGroups", ()), *([pod["fsGroup"]] if "fsGroup" in pod else [])]
    return Identity(
        user,
        both.get("runAsGroup", 0),
        tuple(groups),
        may_gain_privileges=both.get("allowPrivilegeEscalation", True),
        has_capabilities="ALL" not in both.get("capabilities", {}).get("drop", ()),
    )


def _status_of(run: _Run) -> Document:
    image = run.described["image"]
    return {
        "name": run.name,
        "image": image,
        "imageID": f"double://{image}",
        "containerID": f"double://{run.name}-{run.restarts}",
        "ready": run.is_ready,
        "started": run.has_started,
        "restartCount": run.restarts,
        "state": run.state,
        "lastState": run.last_state,
    }


def _why_not_ready(phase: str, runs: list[_Run]) -> Document:
    if phase == "Succeeded":
        return {"reason": "PodCompleted"}
    if phase == "Failed":
        return {"reason": "PodFailed"}
    names = " ".join(run.name for run in runs if not run.is_ready)
    return {"reason": "ContainersNotReady", "message": f"containers with unready status: [{names}]"}
