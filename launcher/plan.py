"""Pure: what a launch has to do, from what is asked for and what is complete already."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from datastore.schema import SCHEMA_VERSION
from trainer.config import CorpusConfig, RunConfig
from trainer.evaluate import RANDOM_WEIGHTS

Kind = Literal["ingest", "prerequisite", "cache", "pretrain", "evaluate", "report"]


@dataclass(frozen=True)
class Prerequisite:
    """A network that must be trained before the run, for its features in the store or for itself."""

    config: RunConfig
    run_url: str
    teacher: str | None = None  # the name under which its features are cached; None: only the network is needed
    fields: tuple[str, ...] = ()  # of the store, that are cached


@dataclass(frozen=True)
class Goal:
    """What one launch is about: the run, and where everything that it needs lies or shall lie."""

    config: RunConfig
    run_url: str
    store_url: str
    makes_corpus: bool
    prerequisites: tuple[Prerequisite, ...] = ()  # in the order in which they depend on each other

    @property
    def arms(self) -> Mapping[str, RunConfig]:
        """The runs that this one is compared with."""
        return {name: self.config.with_overrides(overrides) for name, overrides in self.config.comparisons.items()}

    @property
    def teacher_name(self) -> str | None:
        """Whose features the objective reads, if any."""
        return self.config.teacher

    def prerequisite_of_teacher(self, name: str) -> Prerequisite | None:
        """The one that trains a teacher of this name, if the launch trains it."""
        wanted = name.partition("@")[0]
        return next((each for each in self.prerequisites if each.teacher == wanted), None)

    def arm_url(self, arm: str) -> str:
        """The run folder of one arm."""
        return f"{self.run_url}/arms/{arm}"


@dataclass(frozen=True)
class Facts:
    """What is complete. Nothing, by default: a first run on an empty machine."""

    corpus_ready: bool = False
    cached: frozenset[str] = frozenset()  # teachers, by name, whose features are in the store
    trained: frozenset[str] = frozenset()  # URLs of runs whose training is finished
    evaluated: frozenset[tuple[str, str]] = frozenset()  # run URL, name of the record
    reported: bool = False


@dataclass(frozen=True)
class Step:
    """One stage of a launch: the words after `python -m trainer`, and whether its result is there already."""

    kind: Kind
    name: str  # unique in the launch, good for a folder's name
    title: str  # for people
    words: tuple[str, ...]
    run_url: str  # whose logs and events it writes
    on_nodes: bool  # on every node, or one process
    done: bool
    config: RunConfig | None = None  # what a training step trains
    teacher: Prerequisite | None = None  # whose features a caching step writes


def plan(goal: Goal, facts: Facts) -> tuple[Step, ...]:
    """Every step in order, those included that are done."""
    steps: list[Step] = []
    if goal.makes_corpus:
        steps.append(_ingest(goal, facts))
    for each in goal.prerequisites:
        steps += _prerequisite(goal, each, facts)
    runs = {"": (goal.run_url, goal.config)} | {arm: (goal.arm_url(arm), config) for arm, config in goal.arms.items()}
    steps += [_pretrain(arm, url, config, facts) for arm, (url, config) in runs.items()]
    if goal.config.student is not None:  # protocols judge encoders of points
        for protocol in goal.config.evaluation.protocols:
            steps += [_evaluate(goal, arm, url, protocol, facts, random=False) for arm, (url, _) in runs.items()]
            steps.append(_evaluate(goal, "", goal.run_url, protocol, facts, random=True))
    reported = facts.reported and all(step.done for step in steps)
    steps.append(
        Step("report", "report", "report", ("report", goal.run_url), goal.run_url, on_nodes=False, done=reported)
    )
    return tuple(steps)


def record_name(protocol: str, *, random: bool) -> str:
    """The name that an evaluation's record has in its run folder."""
    return f"{protocol}.{RANDOM_WEIGHTS}" if random else protocol


def corpus_folder(corpus: CorpusConfig) -> str:
    """The name of the store that a corpus is ingested into: the same settings find the same store.

    Another schema is another store: an upgrade makes the corpus anew beside the one that it could not read.
    """
    return f"corpus-{_digest([corpus.model_dump(mode='json'), SCHEMA_VERSION])}.zarr"


def teacher_folder(teacher: RunConfig, store_url: str) -> str:
    """The name of a prerequisite's run folder: the same recipe on the same corpus finds the same network."""
    return f"{teacher.job}-{_digest([teacher.hash(), store_url])}"


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]


def _ingest(goal: Goal, facts: Facts) -> Step:
    corpus = goal.config.prepare.corpus
    assert corpus is not None, "a goal that makes its corpus has one"
    words = (
        "ingest", corpus.source, goal.store_url, "--rig", corpus.rig,
        "--image-size", str(corpus.image_size), "--points", str(corpus.points),
    )  # fmt: skip
    return Step("ingest", "ingest", "corpus", words, goal.run_url, on_nodes=False, done=facts.corpus_ready)


def _prerequisite(goal: Goal, needed: Prerequisite, facts: Facts) -> list[Step]:
    is_teacher = needed.teacher is not None and needed is goal.prerequisite_of_teacher(goal.teacher_name or "")
    cached = needed.teacher in facts.cached
    # a network that only its features are needed of is not trained where they are there
    is_loaded = any(f"{needed.run_url}/export" in _texts(config) for config in _configs(goal))
    steps = [
        Step(
            "prerequisite",
            "teacher" if is_teacher else needed.config.job,
            "teacher" if is_teacher else spoken(needed.config.job),
            ("pretrain", "--config", f"{needed.run_url}/config.yaml", "--run", needed.run_url),
            needed.run_url,
            on_nodes=True,
            done=needed.run_url in facts.trained or (cached and not is_loaded),
            config=needed.config,
        )
    ]
    if needed.teacher is not None:
        words = (
            "cache",
            goal.store_url,
            "--teacher",
            needed.teacher,
            "--weights",
            f"{needed.run_url}/export",
            "--json",
        )
        fields = () if needed.fields == ("view_features",) else ("--fields", *needed.fields)
        steps.append(
            Step(
                "cache",
                "cache" if is_teacher else _joined("cache", needed.teacher),
                "teacher features" if is_teacher else f"features of {spoken(needed.teacher)}",
                (*words, *fields),
                goal.run_url,
                on_nodes=True,
                done=cached,
                teacher=needed,
            )
        )
    return steps


def _configs(goal: Goal) -> list[RunConfig]:
    return [goal.config, *(each.config for each in goal.prerequisites)]


def _texts(config: RunConfig) -> set[str]:
    """Every text among a config's values."""

    def walk(value: object) -> set[str]:
        if isinstance(value, str):
            return {value}
        if isinstance(value, Mapping):
            return set().union(*(walk(each) for each in value.values()), set())
        if isinstance(value, list | tuple):
            return set().union(*(walk(each) for each in value), set())
        return set()

    return walk(config.model_dump(mode="json"))


def _pretrain(arm: str, url: str, config: RunConfig, facts: Facts) -> Step:
    words = ("pretrain", "--config", f"{url}/config.yaml", "--run", url)
    title = f"pretrain, {spoken(arm)}" if arm else "pretrain"
    return Step(
        "pretrain", _joined("pretrain", arm), title, words, url, on_nodes=True, done=url in facts.trained, config=config
    )


def _evaluate(goal: Goal, arm: str, url: str, protocol: str, facts: Facts, *, random: bool) -> Step:
    subject = spoken(RANDOM_WEIGHTS) if random else spoken(arm) if arm else "trained"
    words = ("evaluate", url, "--protocol", protocol, "--data", goal.store_url)
    return Step(
        "evaluate",
        _joined("evaluate", protocol.replace("@", "-"), subject.replace(" ", "_")),
        f"evaluate, {subject}" + (f", {protocol}" if len(goal.config.evaluation.protocols) > 1 else ""),
        (*words, "--random-weights") if random else words,
        url,
        on_nodes=False,
        done=(url, record_name(protocol, random=random)) in facts.evaluated,
    )


def spoken(name: str) -> str:
    """A name as people say it."""
    return name.replace("_", " ")


def _joined(*parts: str) -> str:
    return "-".join(part for part in parts if part)
