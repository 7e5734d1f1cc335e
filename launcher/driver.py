"""Drives one launch: finds out what is missing, runs it step by step, sums up."""

import json
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import fsspec

from datastore.errors import EXIT_DONE, EXIT_STOPPED, AskedWrongly, DoNotRetry, MissingField
from launcher.chaos import Chaos, needs_networks
from launcher.command import (
    Command,
    Machine,
    fold,
    node_command,
    nursery_environment,
    process_command,
    shell_settings,
    worker_words,
)
from launcher.events import describe_event
from launcher.facts import FEATURES_CACHED, find_features, find_store, observe
from launcher.local import Outcome, run_nodes, run_process, this_machine
from launcher.network import Networks, why_not
from launcher.nursery import Nursery
from launcher.patience import tolerating
from launcher.plan import Goal, Prerequisite, Step, corpus_folder, plan
from launcher.prerequisites import missing_networks, prerequisites_of
from launcher.presence import HeldError, Presence
from launcher.readings import ProgressReader
from launcher.rendezvous import RendezvousStore
from launcher.runs import COMPLETE, ChosenRun, choose_run, continued, is_same_training, pinned
from launcher.spec import LaunchSpec, check_world, node_counts_for, worlds_for
from launcher.stop import STOP_REQUESTED, StopRequest, Urgency
from launcher.suitable_store import refuse_unsuitable_corpus, refuse_unsuitable_store
from launcher.summary import STEP_FINISHED, results_of, summarise
from launcher.tail import complaint, last_lines
from launcher.terminal import Screen, describe_end, open_screen
from trainer.config import RunConfig, load_recipe
from trainer.runfolder import RUNS_URL, RunFolder

_DEMO_FOLDER: Final = "demo"
_FAILURE_LINES: Final = 15
_COMPLAINT_LINES: Final = 200
_PLAN_WIDTH: Final = 100
_PLAN_INDENT: Final = 3


def launch(spec: LaunchSpec, *, command: str, dry_run: bool = False, as_json: bool = False) -> int:
    """Runs a job to its report and returns the exit code; `command` is what the person typed, to be repeated."""
    goal, run = resolve(spec)
    steps = plan(goal, observe(goal))
    if not run.is_complete:
        refuse_unsuitable_store(goal, spec.layout, steps)
    if dry_run:
        print_plan(goal, spec, steps, this_machine(), as_json=as_json)
        return EXIT_DONE
    with ExitStack() as held, open_screen() as screen:
        if run.is_complete:
            screen.say(headline(goal, spec))
            screen.say(f"Run {run.folder.url} is complete: nothing to do. Another one: leave --run out, or a new name.")
        else:
            goal, run, presence = hold(goal, run, spec, held)
            screen.say(headline(goal, spec))
            code = _Launch(goal, spec, screen, command).run(presence)
            if code != EXIT_DONE:
                return code
    if as_json:
        for result in results_of(run.folder):
            print(json.dumps(result))
    else:
        print(summarise(run.folder, goal, spec))
    return EXIT_DONE


def resolve(spec: LaunchSpec) -> tuple[Goal, ChosenRun]:
    """What the launch is about, and which run it continues or starts; starts nothing and writes nothing."""
    runs_url = (spec.runs_url or RUNS_URL).rstrip("/")
    config = load_recipe(spec.job, demo=spec.is_demo, assignments=spec.assignments, store_url=spec.data_url)
    shared_url = f"{runs_url}/{_DEMO_FOLDER}" if spec.is_demo else runs_url
    if spec.is_demo:
        if config.prepare.corpus is None:
            raise AskedWrongly(
                f"Job {config.job!r} has no corpus of its own: its recipe lacks prepare.corpus. Give your data with "
                f"--data URL."
            )
        config = _with_store(config, f"{shared_url}/{corpus_folder(config.prepare.corpus)}")
    store_url = config.data.store_url
    assert store_url is not None
    prerequisites: tuple[Prerequisite, ...] = ()
    if spec.is_demo or spec.prepare:

        def load_job(job: str) -> RunConfig:
            return _with_store(load_recipe(job, demo=spec.is_demo), store_url)

        prepared = prerequisites_of(config, load_job, shared_url, store_url)
        config, prerequisites = prepared.config, prepared.prerequisites
    else:
        _refuse_missing_networks(config)
    check_world(
        spec.layout, {each.job: each.global_batch for each in (config, *(needed.config for needed in prerequisites))}
    )
    run = choose_run(runs_url, spec.run_name, config, same_store=spec.is_demo)
    goal = Goal(
        config=run.config,
        run_url=run.folder.url,
        store_url=store_url,
        makes_corpus=spec.is_demo,
        prerequisites=prerequisites,
    )
    _refuse_missing_features(goal)
    return goal, run


def hold(goal: Goal, run: ChosenRun, spec: LaunchSpec, held: ExitStack) -> tuple[Goal, ChosenRun, Presence]:
    """Takes possession of the run. A new one that somebody else began in the same moment leaves us the next number."""
    while True:
        try:
            presence = held.enter_context(Presence(RunFolder(run.folder.url)))
        except HeldError:
            if spec.run_name is not None or not run.is_new:
                raise
            goal, run = resolve(spec)
            continue
        if run.is_new:
            run.folder.write_config(goal.config)
        return goal, run, presence


def headline(goal: Goal, spec: LaunchSpec) -> str:
    """The first line: what this run is, and that it is the demo where it is."""
    layout = spec.layout
    workers = f"{layout.nodes} node{'s' * (layout.nodes > 1)}" + (
        f" x {layout.procs_per_node} processes" * (layout.procs_per_node > 1)
    )
    if not goal.makes_corpus:
        return f"viewpoint: {goal.config.job} on {goal.store_url}, {workers}, into {goal.run_url}"
    corpus = goal.config.prepare.corpus
    assert corpus is not None
    small = "a small teacher and a small student" if goal.prerequisites else "a small network"
    return (
        f"viewpoint: {goal.config.job}, demo profile: no --data given, so it makes a corpus ({corpus.source}) and "
        f"trains {small}, minutes on 2 cores. On {workers}, into {goal.run_url}"
    )


class _Launch:
    """The state of a launch that runs: one step after the other, stopped or failed at any."""

    def __init__(self, goal: Goal, spec: LaunchSpec, screen: Screen, command: str) -> None:
        self._goal, self._spec, self._screen, self._command = goal, spec, screen, command
        self._run = RunFolder(goal.run_url, writer="launcher")
        self._machine = this_machine()
        # imports what training needs, and its children all that they do not need to import any more
        self._nursery = Nursery(nursery_environment(spec.layout, self._machine), stage="pretrain")
        self._networks: Networks | None = None

    def run(self, presence: Presence) -> int:
        """The exit code of the launch."""
        started = time.monotonic()
        with ExitStack() as held:
            self._run.remove(STOP_REQUESTED)
            stop = held.enter_context(StopRequest(lambda: self._run.read_text(STOP_REQUESTED) is not None))
            held.callback(self._run.remove, STOP_REQUESTED)
            held.callback(self._run.flush)
            steps = plan(self._goal, observe(self._goal))
            store: RendezvousStore | None = None
            if any(step.on_nodes and not step.done for step in steps):
                self._networks = self._enter_networks(held)
                place = {"host": self._networks.host} if self._networks is not None else {}
                store = held.enter_context(RendezvousStore(self._spec.rendezvous_port, **place))
                held.enter_context(self._nursery).warm_up()
            self._run.append_event(
                "launch_started", command=self._command, nodes=self._spec.layout.nodes, world=self._spec.layout.world,
                cores=self._machine.cores, gpus=self._machine.gpus,
            )  # fmt: skip
            for step in steps:
                if step.done:
                    self._screen.end(step.title, "reused: complete already")
                    continue
                if stop.urgency is not Urgency.GO_ON:
                    return self._broken_off(step, Outcome(EXIT_STOPPED))
                presence.enter_step(step.name)
                outcome = self._step(step, store, stop, presence)
                if outcome.exit_code != EXIT_DONE:
                    return self._broken_off(step, outcome)
                if step.kind == "ingest":
                    refuse_unsuitable_corpus(self._run, self._goal, self._spec.layout, steps)
            self._run.append_event(COMPLETE, seconds=time.monotonic() - started)
        return EXIT_DONE

    def _step(self, step: Step, store: RendezvousStore | None, stop: StopRequest, presence: Presence) -> Outcome:
        run = RunFolder(step.run_url, writer="launcher")
        with ExitStack() as held:
            presences = [presence]
            if step.kind == "prerequisite":
                shared = Presence(run, "Other launches share this network: wait until it is trained.")
                presences.append(held.enter_context(shared))
            if step.config is not None:
                begin_run(self._goal, run, step.config)
            logs = logs_folder(run)
            progress = logs / "progress" / step.name
            for figures in progress.glob(
                "*.jsonl"
            ):  # an earlier start's; the folder stays, as somebody may write there
                figures.unlink(missing_ok=True)
            reader = ProgressReader(progress)
            started = time.monotonic()
            self._screen.begin(step.title)

            def watch() -> None:
                for each in presences:
                    each.refresh()
                self._screen.show(reader.read())

            if step.on_nodes:
                assert store is not None
                outcome = run_nodes(
                    worker_words(step.words), layout=self._spec.layout, job=step.name, store=store,
                    logs=logs, progress=progress, machine=self._machine, stop=stop, watch=watch,
                    on_event=self._listener(run), start_agent=self._nursery.start,
                    committed=_Committed(run, step, reader), node_counts=self._node_counts(),
                    chaos=Chaos(self._spec.chaos) if step.name == "pretrain" else None, networks=self._networks,
                )  # fmt: skip
            else:
                command = process_command(worker_words(step.words), self._machine, progress)
                outcome = run_process(step.name, command, logs / f"{step.name}.log", stop=stop, watch=watch)
            seconds = time.monotonic() - started
            if outcome.exit_code == EXIT_DONE:
                self._screen.end(step.title, describe_end(reader.read(), seconds))
                self._run.append_event(
                    STEP_FINISHED, step=step.name, stage=step.kind, title=step.title, seconds=seconds
                )
                if step.teacher is not None and outcome.output is not None:
                    remember_features(self._goal, step.teacher, json.loads(last_lines(outcome.output, 1)[0]))
            _upload(run, logs)
            run.flush()
            return outcome

    def _node_counts(self) -> tuple[int, ...]:
        """Numbers of nodes that can share each global batch of this launch."""
        trained = [self._goal.config, *(needed.config for needed in self._goal.prerequisites)]
        return node_counts_for(self._spec.layout, *(config.global_batch for config in trained))

    def _enter_networks(self, held: ExitStack) -> Networks | None:
        """Networks of their own for the nodes, where the faults asked for need them and the machine has them."""
        if not needs_networks(self._spec.chaos) or why_not() is not None:
            return None
        remote = [url for url in (self._goal.store_url, self._goal.run_url) if not RunFolder(url).is_local]
        if remote:
            raise AskedWrongly(
                f"--chaos: a partition puts nodes into networks of their own, from which {' and '.join(remote)} cannot "
                f"be reached. Leave it out, or give local --data and --runs."
            )
        return held.enter_context(Networks(self._spec.layout.nodes))

    def _listener(self, run: RunFolder) -> Callable[..., None]:
        """Keeps the events of nodes in the run's history, and shows those that a person wants to know of."""

        def on_event(kind: str, **facts: Any) -> None:
            tolerating(lambda: run.append_event(kind, **facts), "write down what happened", None)
            line = describe_event(kind, facts)
            if line is not None:
                self._screen.say(f"  {line}")

        return on_event

    def _broken_off(self, step: Step, outcome: Outcome) -> int:
        if outcome.exit_code == EXIT_STOPPED:
            self._screen.end(step.title, "stopped")
            self._run.append_event("launch_stopped", step=step.name)
            self._screen.say(
                f"Stopped; what is finished is kept in {self._goal.run_url}. The same command goes on:\n  {self._command}"
            )
            return EXIT_STOPPED
        self._screen.end(
            step.title,
            f"failed with exit code {outcome.exit_code}" + (f" on {outcome.culprit}" if step.on_nodes else ""),
        )
        lines = last_lines(outcome.log, _COMPLAINT_LINES) if outcome.log is not None else []
        self._run.append_event(
            "launch_failed", step=step.name, exit_code=outcome.exit_code, reason=complaint(lines) or outcome.reason,
            log=_kept_log(RunFolder(step.run_url), outcome.log),
        )  # fmt: skip
        if outcome.reason:
            self._screen.say(f"\n{outcome.reason[:1].upper()}{outcome.reason[1:]}.")
        if outcome.log is not None:
            self._screen.say(f"\nThe end of {outcome.log}:")
            for line in lines[-_FAILURE_LINES:]:
                self._screen.say(f"    {line}")
        self._screen.say(
            f"\nWhat is finished is kept. Once that is mended, the same command goes on:\n  {self._command}"
        )
        return outcome.exit_code


def begin_run(goal: Goal, run: RunFolder, config: RunConfig) -> None:
    """Writes the config that a training step reads, bound to the teacher's features that it finds now, once and for all."""
    if run.exists() and is_same_training(there := run.config(), config):
        config = continued(there, config)
    teacher = config.teacher
    if teacher is not None:
        features = find_features(goal, find_store(goal), teacher)
        if features is not None:  # without them the stage itself says what is missing
            config = pinned(config, features)
    run.write_config(config)


def remember_features(goal: Goal, teacher: Prerequisite, summary: Mapping[str, Any]) -> None:
    """Notes under which key the teacher's features lie: several teachers of one name can lie side by side."""
    teacher_run = RunFolder(teacher.run_url, writer="launcher")
    teacher_run.append_event(FEATURES_CACHED, store=goal.store_url, teacher=summary["teacher"])


class _Committed:
    """What no restart of a step can lose: its newest checkpoint, or the share of its work that is written."""

    def __init__(self, run: RunFolder, step: Step, reader: ProgressReader) -> None:
        self._run, self._step, self._reader = run, step, reader
        self._last = 0.0

    def __call__(self) -> float:
        """A number that grows with it."""
        self._last = max(self._last, tolerating(self._look, "look for new checkpoints", self._last))
        return self._last

    def _look(self) -> float:
        if self._step.config is None:
            reading = self._reader.read()
            return float(reading.done) if reading is not None else 0.0
        saved = self._run.last_event("saved")
        return float(saved["step"]) if saved is not None else 0.0


def logs_folder(run: RunFolder) -> Path:
    """Where processes write: in the run folder, or in ./logs for a run on object storage, which cannot be appended to."""
    if run.local_path is not None:
        return Path(run.local_path) / "logs"
    return Path("logs") / run.url.partition("://")[2]


def _kept_log(run: RunFolder, log: Path | None) -> str:
    """Where a log of a run is found later: below the run's URL, whichever machine wrote it."""
    folder = logs_folder(run)
    return (
        f"{run.url}/logs/{log.relative_to(folder)}"
        if log is not None and log.is_relative_to(folder)
        else str(log or "")
    )


def print_plan(goal: Goal, spec: LaunchSpec, steps: tuple[Step, ...], machine: Machine, *, as_json: bool) -> None:
    """Prints what `launch` would run, command by command; starts and creates nothing."""
    if as_json:
        for step in steps:
            commands = [
                {"words": command.words, "environment": command.environment}
                for command in commands_of(step, spec, machine)
            ]
            print(json.dumps({"step": step.name, "done": step.done, "commands": commands}))
        return
    said = headline(goal, spec).replace("viewpoint:", "viewpoint launch --dry-run:", 1)
    print(
        textwrap.fill(
            said, _PLAN_WIDTH, subsequent_indent=" " * _PLAN_INDENT, break_long_words=False, break_on_hyphens=False
        )
    )
    trained = [goal.config, *(needed.config for needed in goal.prerequisites)]
    worlds = worlds_for(*(config.global_batch for config in trained))
    print(f"Worlds that divide the global batch: {', '.join(map(str, worlds))}. This one: {spec.layout.world}.")
    by_step = [[] if step.done else commands_of(step, spec, machine) for step in steps]
    common = common_environment([command for of_step in by_step for command in of_step])
    if common:
        print("Every process has, beside what stands before its command:")
        print(fold([["export", *shell_settings(common)]], _PLAN_WIDTH, _PLAN_INDENT))
    for number, (step, of_step) in enumerate(zip(steps, by_step, strict=True), start=1):
        where = f"on {spec.layout.nodes} nodes" if step.on_nodes else "in one process"
        print(f"\n{number}. {step.title}: " + ("reused, complete already" if step.done else f"runs {where}"))
        for command in of_step:
            own = {name: value for name, value in command.environment.items() if name not in common}
            print(replace(command, environment=own).as_shell(_PLAN_WIDTH, _PLAN_INDENT))
    if spec.rendezvous_port == 0:
        print("\nPORT stands for a free port, which is chosen at the start.")


def common_environment(commands: Sequence[Command]) -> dict[str, str]:
    """The variables that several processes all have with the same value."""
    if len(commands) < 2:
        return {}
    first, *others = (command.environment for command in commands)
    return {name: value for name, value in first.items() if all(each.get(name) == value for each in others)}


def commands_of(step: Step, spec: LaunchSpec, machine: Machine) -> list[Command]:
    """The processes that a step starts."""
    logs = logs_folder(RunFolder(step.run_url))
    progress = logs / "progress" / step.name
    if not step.on_nodes:
        return [process_command(worker_words(step.words), machine, progress)]
    endpoint = f"127.0.0.1:{spec.rendezvous_port or 'PORT'}"
    return [
        node_command(
            worker_words(step.words), node=node, layout=spec.layout, job=step.name, endpoint=endpoint,
            logs=logs / f"node-{node}" / step.name, machine=machine, progress=progress,
        )
        for node in range(spec.layout.nodes)
    ]  # fmt: skip


def _with_store(config: RunConfig, store_url: str) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update={"store_url": store_url})})


def _refuse_missing_features(goal: Goal) -> None:
    """Ends a launch on data of one's own that lack a teacher's features, unless it is to write them."""
    if goal.makes_corpus or goal.prerequisites or goal.teacher_name is None:
        return
    store = find_store(goal)
    assert store is not None, "a store that somebody named is there"
    try:
        store.resolve_teacher(goal.teacher_name)
    except MissingField as error:
        job = goal.config.prepare.teacher_job
        offer = (
            f" Or add --prepare to this command: it trains {job!r} on this store and writes them."
            if job is not None
            else ""
        )
        raise MissingField(f"{error}{offer}") from error


def _refuse_missing_networks(config: RunConfig) -> None:
    """Ends a launch that needs a network of another job, unless it is to train it."""
    for key, job in missing_networks(config).items():
        raise DoNotRetry(
            f"Job {config.job!r} needs a network that job {job!r} trains. Name its export with --set {key}=URL, or add "
            f"--prepare to this command, which trains it on this store."
        )


def _upload(run: RunFolder, logs: Path) -> None:
    """Copies the logs into a run folder that lies on object storage."""
    if run.is_local or not logs.exists():
        return
    filesystem, root = fsspec.core.url_to_fs(run.url, use_listings_cache=False)
    filesystem.put(f"{logs}/", f"{root}/logs/", recursive=True)
