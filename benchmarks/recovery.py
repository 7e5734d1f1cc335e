"""How long training takes to get over each kind of fault, on three nodes of this machine, beside torchrun.

    python benchmarks/recovery.py [--trials 20] [--only kill-worker hang ...] [--check] [--json FILE]

The demo recipe at a small size trains for as long as it takes: a fault comes some steps after all three nodes are at work
again, and its time runs until the first step of the world that follows. The slowest of all trials counts. Torchrun's time
is for the same training under `torchrun` with one worker killed, with the variable set without which it never recovers and
a store outside the nodes. The first step is that of a launch on four nodes, whose data and features are there, counted from
the command; no compiler is on its PATH.
"""

import argparse
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import yaml

from datastore.errors import EXIT_STOPPED
from launcher.chaos import Chaos, Fault, Kind
from launcher.command import (
    LOOPBACK,
    STORE_SHARING_VARIABLE,
    Layout,
    nursery_environment,
    worker_environment,
    worker_words,
)
from launcher.local import run_nodes, this_machine
from launcher.network import Networks, why_not
from launcher.nursery import Nursery
from launcher.rendezvous import RendezvousStore
from launcher.stop import StopRequest
from trainer.config import read_config
from trainer.heartbeat import HEARTBEAT_VARIABLE, read_beat
from trainer.recipes import recipe_path
from trainer.runfolder import RunFolder

NODES = 3
INTERVAL = 10  # steps between checkpoints
STEPS_BETWEEN = 13  # from a recovery to the next fault: no multiple of the interval
AWAY_SECONDS = 6.0
DEADLINE, TIMEOUT = 5.0, 6.0  # of a step and of a silent node
CORPUS = "prepare.corpus.source=demo://shapes?count=96&seed=0"


@dataclass
class Scenario:
    """One kind of fault: what it does to whom, and what its first recovery may take."""

    name: str
    kind: Kind
    target: int
    limit_seconds: float
    returns: bool = False  # a node comes back, and the world grows again


SCENARIOS = (
    Scenario("kill-worker", "kill-worker", 1, 15.0),
    Scenario("kill-node", "kill-node", 2, 20.0, returns=True),
    Scenario("kill-node-0", "kill-node", 0, 20.0, returns=True),
    Scenario("hang", "hang", 1, DEADLINE + 15.0),
    Scenario("preempt", "preempt", 1, 20.0, returns=True),
    Scenario("partition", "partition", 2, TIMEOUT + 15.0, returns=True),
)
REJOIN_LIMIT = 15.0
FIRST_STEP, FIRST_STEP_NODES, FIRST_STEP_LIMIT = "first-step", 4, 25.0


@dataclass
class Measured:
    """What the trials of one scenario gave."""

    recovered: list[float] = field(default_factory=list)
    rejoined: list[float] = field(default_factory=list)
    lost_steps: list[int] = field(default_factory=list)
    commit_steps: list[int] = field(default_factory=list)  # from the signal to the step that was saved for it
    most_manifests: int = 0  # of one step


class Trials(Chaos):
    """Gives the next fault a while after all nodes are at work again, and stops the job after the last."""

    def __init__(self, scenario: Scenario, trials: int) -> None:
        super().__init__(())
        self.scenario, self.left = scenario, trials
        self.events: list[dict[str, Any]] = []
        self._since_step: int | None = None
        self._is_calm = True
        self._is_over = False

    def heard(self, kind: str, **facts: Any) -> None:
        """An event of the job."""
        self.events.append({"event": kind, **facts})
        if kind == "recovered" and facts["world"] == NODES:
            self._is_calm, self._since_step = True, None

    def due(self, step: int) -> list[Fault]:
        if not self._is_calm or step == 0:
            return []
        if self._since_step is None:
            self._since_step = step
        if step - self._since_step < STEPS_BETWEEN:
            return []
        if self.left == 0:
            if not self._is_over:
                self._is_over = True
                os.kill(os.getpid(), signal.SIGTERM)
            return []
        self.left -= 1
        self._is_calm = False
        seconds = TIMEOUT + AWAY_SECONDS if self.scenario.kind == "partition" else AWAY_SECONDS
        return [Fault(self.scenario.kind, self.scenario.target, step, seconds)]


def prepare(folder: Path) -> str:
    """A run folder's config: the demo recipe, small, on a store whose features a barely trained teacher wrote."""
    viewpoint = [sys.executable, "-m", "launcher"]
    runs = folder / "runs"
    unset = [word for key in ("comparisons={}", "epochs=null", "steps=2") for word in ("--set", key)]
    protocols = ["--set", "evaluation.protocols=[]", "--set", CORPUS]
    run([*viewpoint, "launch", "pointmcd_teacher", "--runs", str(runs), "--run", "teacher", *unset, *protocols])
    (store,) = (runs / "demo").glob("corpus-*")
    run(
        [
            *viewpoint,
            "cache",
            str(store),
            "--teacher",
            "pointmcd_teacher",
            "--weights",
            str(runs / "teacher" / "export"),
        ]
    )
    recipe = yaml.safe_load(recipe_path("pointmcd", demo=True).read_text())
    recipe |= {"epochs": None, "steps": 10**6, "global_batch": 24, "comparisons": {}, "prepare": {}}
    recipe["checkpoint"] = {"every_steps": INTERVAL, "every_seconds": None}
    config = read_config(yaml.safe_dump(recipe), name="the demo recipe", default_job="recovery", store_url=str(store))
    return config.to_yaml()


def run(words: Sequence[str]) -> None:
    """Runs a command quietly; its output is shown where it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(words)} failed with {done.returncode}:\n{done.stdout}{done.stderr}")


def measure(scenario: Scenario, trials: int, config: str, folder: Path, nursery: Nursery, layout: Layout) -> Measured:
    """All trials of one scenario, in one run."""
    run_folder = RunFolder(str(folder / scenario.name))
    run_folder.write_text("config.yaml", config)
    chaos = Trials(scenario, trials)
    networks = Networks(NODES) if scenario.kind == "partition" else None
    try:
        if networks is not None:
            networks.__enter__()
        with RendezvousStore(host=networks.host if networks else LOOPBACK) as store, StopRequest() as stop:
            outcome = run_nodes(
                worker_words(("pretrain", "--config", f"{run_folder.url}/config.yaml", "--run", run_folder.url)),
                layout=layout,
                job=scenario.name,
                store=store,
                logs=folder / "logs",
                progress=folder / "progress" / scenario.name,
                machine=this_machine(),
                stop=stop,
                start_agent=nursery.start,
                on_event=chaos.heard,
                committed=lambda: float((run_folder.last_event("saved") or {"step": 0})["step"]),
                chaos=chaos,
                networks=networks,
            )
    finally:
        if networks is not None:
            networks.__exit__(None, None, None)
    if outcome.exit_code != EXIT_STOPPED:
        raise SystemExit(f"{scenario.name}: the run ended with {outcome}")
    return read(scenario, chaos.events, run_folder.events())


def read(scenario: Scenario, events: Sequence[dict[str, Any]], history: Sequence[dict[str, Any]]) -> Measured:
    """What the events of a run say."""
    measured = Measured()
    for event in events:
        if event["event"] == "recovered":
            is_growth = scenario.returns and event["world"] == NODES
            (measured.rejoined if is_growth else measured.recovered).append(event["seconds"])
            measured.lost_steps.append(event["lost_steps"])
    if scenario.kind == "preempt":
        asked = [event["step"] for event in events if event["event"] == "chaos_injected"]
        stopped = [event["step"] for event in history if event["event"] == "stopped"]
        for step in asked:
            measured.commit_steps.append(min(saved for saved in stopped if saved >= step) - step)
    saved = Counter(event["step"] for event in history if event["event"] == "saved")
    measured.most_manifests = max(saved.values())
    return measured


def torchrun_seconds(config: str, folder: Path) -> float | None:
    """The same training under three torchrun agents, one of whose workers is killed; None where it never recovers."""
    run_folder = RunFolder(str(folder / "torchrun"))
    run_folder.write_text("config.yaml", config)
    beats = [folder / f"torchrun-{node}.heartbeat" for node in range(NODES)]
    environment = worker_environment(this_machine(), processes=NODES, devices=None, progress=folder / "progress")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    host = subprocess.Popen([sys.executable, "-c", STORE, str(port)])
    agents = []
    try:
        for beat in beats:
            words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(NODES), "--nproc-per-node", "1"]
            words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "recovery"]
            words += [
                "--rdzv-conf",
                "is_host=0,last_call_timeout=1",
                "--local-addr",
                "127.0.0.1",
                "--max-restarts",
                "3",
            ]
            words += [
                "-m",
                "--",
                "trainer",
                "pretrain",
                "--config",
                f"{run_folder.url}/config.yaml",
                "--run",
                run_folder.url,
            ]
            own = {HEARTBEAT_VARIABLE: str(beat), STORE_SHARING_VARIABLE: "1", "GLOO_SOCKET_IFNAME": "lo"}
            agents.append(
                subprocess.Popen(
                    words, env=os.environ | environment | own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
            )
        if not until_step(beats[0], 2 * INTERVAL + 3, 300.0):
            raise SystemExit("training under torchrun did not start within five minutes")
        (worker,) = psutil.Process(agents[1].pid).children()
        killed_at = time.monotonic()
        worker.kill()
        worker.wait(10)
        return time.monotonic() - killed_at if restarted(beats[0], 180.0) else None
    finally:
        for agent in agents:
            agent.terminate()
        for agent in agents:
            try:
                agent.wait(60)
            except subprocess.TimeoutExpired:
                agent.kill()
        host.kill()
        host.wait()


def first_step_seconds(config: str, folder: Path) -> float:
    """From the command to the first step of a launch, with an empty PATH."""
    tree = yaml.safe_load(config)
    store_url = tree["data"].pop("store_url")
    del tree["job"]
    recipe = folder / "first_step.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    with tempfile.TemporaryDirectory() as name:
        run_folder = RunFolder(f"{name}/runs/first")
        words = [sys.executable, "-m", "launcher", "launch", str(recipe), "--data", store_url]
        words += ["--nodes", str(FIRST_STEP_NODES), "--runs", f"{name}/runs", "--run", "first"]
        began = time.monotonic()
        launch = subprocess.Popen(
            words, env=os.environ | {"PATH": name}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            while not (run_folder.exists() and run_folder.metrics()):
                if launch.poll() is not None or time.monotonic() - began > 300:
                    raise SystemExit(
                        f"a launch on {FIRST_STEP_NODES} nodes took no step; it ended with {launch.poll()}"
                    )
                time.sleep(0.05)
            return time.monotonic() - began
        finally:
            launch.send_signal(signal.SIGINT)
            launch.wait(120)


STORE = """
import sys, time
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, wait_for_workers=False)
time.sleep(3600)
"""


def until_step(beat: Path, step: int, seconds: float) -> bool:
    """Whether a worker got so far in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        said = read_beat(str(beat))
        if said is not None and said.step >= step:
            return True
        time.sleep(0.05)
    return False


def restarted(beat: Path, seconds: float) -> bool:
    """Whether a worker began anew and took a step in time."""
    deadline = time.monotonic() + seconds
    has_begun = False
    while time.monotonic() < deadline:
        said = read_beat(str(beat))
        has_begun = has_begun or (said is not None and said.phase == "startup")
        if has_begun and said is not None and said.phase == "step":
            return True
        time.sleep(0.05)
    return False


def target(values: Sequence[float], limit: float, reason: str = "") -> dict[str, Any]:
    """The slowest trial beside its limit."""
    if not values:
        return {"value": None, "target": limit, "better": "lower", "ok": None, "reason": reason or "not asked for"}
    slowest = max(values)
    return {
        "value": slowest, "target": limit, "better": "lower", "ok": slowest <= limit,
        "median": statistics.median(values), "trials": len(values),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20, help="of a killed worker; a quarter of them of the others")
    parser.add_argument("--only", nargs="+", choices=[*(scenario.name for scenario in SCENARIOS), FIRST_STEP])
    parser.add_argument("--baseline-trials", type=int, default=1, help="of torchrun, a minute each")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    layout = Layout(NODES, min_nodes=2, step_deadline=DEADLINE, node_timeout=TIMEOUT)
    chosen = [scenario for scenario in SCENARIOS if not arguments.only or scenario.name in arguments.only]
    found: dict[str, Measured] = {}
    reasons: dict[str, str] = {}
    print(
        f"{'fault':<14}{'trials':>7}{'first new step, s':>20}{'at most':>9}{'back with all, s':>19}{'lost steps':>12}"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = prepare(folder)
        with Nursery(nursery_environment(layout, this_machine()), stage="pretrain") as nursery:
            nursery.warm_up()
            for scenario in chosen:
                if scenario.kind == "partition" and (why := why_not()) is not None:
                    reasons[scenario.name] = why
                    print(f"{scenario.name:<14} left out: {why}")
                    continue
                trials = arguments.trials if scenario.name == "kill-worker" else max(1, arguments.trials // 4)
                measured = found[scenario.name] = measure(scenario, trials, config, folder, nursery, layout)
                print(
                    f"{scenario.name:<14}{len(measured.recovered):>7}{spread(measured.recovered):>20}"
                    f"{scenario.limit_seconds:>9.0f}{spread(measured.rejoined):>19}{max(measured.lost_steps):>12}",
                    flush=True,
                )
        is_asked_for = not arguments.only or FIRST_STEP in arguments.only
        first_steps = [
            first_step_seconds(config, folder) for _ in range(max(1, arguments.trials // 4) if is_asked_for else 0)
        ]
        print(
            f"{FIRST_STEP:<14}{len(first_steps):>7}{spread(first_steps):>20}{FIRST_STEP_LIMIT:>9.0f}"
            f"   (of a launch on {FIRST_STEP_NODES} nodes)",
            flush=True,
        )
        baseline = [torchrun_seconds(config, folder) for _ in range(arguments.baseline_trials)]
    recovered = [seconds for seconds in baseline if seconds is not None]
    print(f"{'torchrun':<14}{len(baseline):>7}{spread(recovered) if recovered else 'never':>20}   (a killed worker)")

    empty = Measured()
    targets = {
        f"{scenario.name}_seconds": target(
            found.get(scenario.name, empty).recovered, scenario.limit_seconds, reasons.get(scenario.name, "")
        )
        for scenario in SCENARIOS
    }
    everything = list(found.values())
    targets |= {
        "first_step_seconds": target(first_steps, FIRST_STEP_LIMIT),
        "rejoin_seconds": target([each for one in everything for each in one.rejoined], REJOIN_LIMIT),
        "lost_steps": target([each for one in everything for each in one.lost_steps], INTERVAL),
        "preempt_commit_steps": target(found.get("preempt", empty).commit_steps, 2),
        "preempt_lost_steps": target(found.get("preempt", empty).lost_steps, 0),
        "manifests_of_one_step": target([one.most_manifests for one in everything], 1),
    }
    result = {
        "benchmark": "recovery",
        "device": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": {package: version(package) for package in ("torch", "deepspeed")},
        "checkpoint_interval_steps": INTERVAL,
        "torchrun_seconds": baseline,
        "targets": targets,
    }
    line = json.dumps(result)
    print(line)
    if arguments.json:
        arguments.json.write_text(line + "\n")
    missed = [name for name, each in targets.items() if each["ok"] is False]
    return 1 if arguments.check and missed else 0


def spread(values: Sequence[float]) -> str:
    """`3.1 (2.9 to 4.0)`: the median, the quickest and the slowest."""
    if not values:
        return "-"
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    sys.exit(main())
