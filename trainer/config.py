"""RunConfig: one training run, whole, on one page; reading recipes and `--set` overrides into it.

A recipe is a RunConfig written as YAML. It is complete and inherits from nothing. The resolved config is saved beside every
checkpoint, so it never holds a secret. Each leaf is defined beside the class that it configures.
"""

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Final, Self, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, NonNegativeInt, PositiveInt, ValidationError, model_validator

from datastore.errors import AskedWrongly
from datastore.stream import StreamConfig
from models.students import StudentConfig
from trainer.commits import CheckpointConfig
from trainer.engine import EngineConfig
from trainer.evaluate import EvaluationConfig
from trainer.metrics import MetricsConfig
from trainer.objectives import ObjectiveConfig
from trainer.recipes import recipe_path

Overrides = Mapping[str, Any]
"""Dotted keys and the values that replace them: `{"engine.optimizer.lr": 0.1}`."""


class CorpusConfig(BaseModel, extra="forbid", frozen=True):
    """A corpus that a run makes for itself when it is given no data."""

    source: str  # what `viewpoint ingest` takes
    rig: str
    image_size: PositiveInt
    points: PositiveInt


class PrepareConfig(BaseModel, extra="forbid", frozen=True):
    """What must exist before the run: a corpus, a teacher's features in it, and networks that other jobs train."""

    corpus: CorpusConfig | None = None
    teacher_job: str | None = None  # the recipe that trains the objective's teacher
    # Key of this recipe that takes the URL of an exported network -> the job that trains it
    networks: dict[str, str] = {}


class RunConfig(BaseModel, extra="forbid", frozen=True):
    """One training run, whole. A recipe is this, written as YAML."""

    job: str
    objective: ObjectiveConfig
    student: StudentConfig | None = None  # None where the objective trains a network of its own
    data: StreamConfig = StreamConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    prepare: PrepareConfig = PrepareConfig()
    comparisons: dict[str, dict[str, Any]] = {}  # arm -> overrides: the same run with one thing changed
    epochs: PositiveInt | None = None  # exactly one of epochs and steps
    steps: PositiveInt | None = None
    global_batch: PositiveInt
    seed: NonNegativeInt = 0
    # The run, checkpoint or export whose encoder this training begins with, instead of random weights: fine-tuning
    start_from: str | None = None

    @model_validator(mode="after")
    def _length_is_given_once(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of 'epochs' and 'steps'")
        return self

    @model_validator(mode="after")
    def _student_fits_objective(self) -> Self:
        kind = self.objective.kind
        if self.objective.needs_student and self.student is None:
            raise ValueError(f"objective {kind!r} trains a point encoder: add a 'student' section")
        if not self.objective.needs_student and self.student is not None:
            raise ValueError(f"objective {kind!r} trains a network of its own: remove the 'student' section")
        kinds: tuple[str, ...] | None = getattr(self.objective, "student_kinds", None)
        if kinds is not None and self.student is not None and self.student.kind not in kinds:
            raise ValueError(
                f"objective {kind!r} needs a student of kind {' or '.join(kinds)}: student.kind is {self.student.kind!r}"
            )
        return self

    @model_validator(mode="after")
    def _ranks_wait_for_the_slowest_read(self) -> Self:
        if self.engine.collective_timeout_seconds <= self.data_wait_seconds:
            raise ValueError(
                f"engine.collective_timeout_seconds is {self.engine.collective_timeout_seconds:g}, and one rank may wait "
                f"{self.data_wait_seconds:g} s for its data (data.fetch.retry_seconds, and twice "
                f"data.fetch.timeout_seconds) while the others wait for it: raise the former above that, or lower the "
                f"latter"
            )
        return self

    @model_validator(mode="after")
    def _arms_are_valid(self) -> Self:
        for name, overrides in self.comparisons.items():
            try:
                self.with_overrides(overrides)
            except AskedWrongly as error:
                raise ValueError(f"comparison {name!r}: {error}") from error
        return self

    @property
    def teacher(self) -> str | None:
        """The teacher whose fields in the store the objective reads; None where its settings read none."""
        name: str | None = getattr(self.objective, "teacher", None)
        return name if self.teacher_fields else None

    @property
    def teacher_fields(self) -> tuple[str, ...]:
        """The fields of the teacher that the objective reads."""
        if getattr(self.objective, "teacher", None) is None:
            return ()
        fields: tuple[str, ...] = getattr(self.objective, "teacher_fields", ("view_features",))
        return fields

    @property
    def data_wait_seconds(self) -> float:
        """How long a rank may wait for its data: trouble with a read is waited out, and its first and last try hang."""
        fetch = self.data.fetch
        return fetch.retry_seconds + 2 * fetch.timeout_seconds

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return self.epochs * steps_per_epoch

    def with_overrides(self, overrides: Overrides) -> "RunConfig":
        """The same run with some values replaced; it has no comparisons of its own."""
        tree = self.model_dump(mode="json")
        tree["comparisons"] = {}
        for key, value in overrides.items():
            _replace(tree, key, value)
        return _validated(tree, f"job {self.job!r}")

    def identity(self) -> dict[str, Any]:
        """What makes two configs the same training: all but where things lie and how the work is spread and watched."""
        return _identity_of(self.model_dump(mode="json"))

    def hash(self) -> str:
        """Twelve hexadecimal digits of the identity."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:12]

    def to_yaml(self) -> str:
        """The recipe that gives this config again, with its hash in a comment."""
        body = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=120)
        return f"# hash {self.hash()}\n{body}"


_NOT_PART_OF_THE_IDENTITY: Final = (
    "job",
    "data.store_url",
    "data.prefetch_batches",
    "data.memory_gib",
    "data.fetch",
    "data.cache_path",
    "data.cache_gib",
    "engine.zero_stage",
    "engine.max_micro_batch",
    "engine.collective_timeout_seconds",
    "engine.offload",
    "student.checkpoint_activations",
    "checkpoint",
    "metrics",
    "evaluation",
    "prepare",
    "comparisons",
)


def differences(there: str, here: str) -> list[str]:
    """`engine.optimizer.lr: 0.001 there, 0.1 here`, for each value that makes two configs, as YAML, two trainings."""
    trees = [_identity_of(yaml.safe_load(text) or {}) for text in (there, here)]
    return list(_differing(trees[0], trees[1]))


def _differing(there: object, here: object, key: str = "") -> Iterator[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        for name in {**there, **here}:
            yield from _differing(there.get(name), here.get(name), f"{key}.{name}" if key else str(name))
    elif there != here:
        yield f"{key}: {there!r} there, {here!r} here"


def _identity_of(tree: dict[str, Any]) -> dict[str, Any]:
    for key in _NOT_PART_OF_THE_IDENTITY:
        *sections, leaf = key.split(".")
        here: Any = tree
        for name in sections:
            here = here.get(name) if isinstance(here, dict) else None
        if isinstance(here, dict):
            here.pop(leaf, None)
    return tree


def load_recipe(job: str, *, demo: bool, assignments: Sequence[str] = (), store_url: str | None = None) -> RunConfig:
    """The config of a known job or a recipe file, with `key=value` assignments applied."""
    path = recipe_path(job, demo=demo)
    return read_config(
        path.read_text(), name=f"recipe {path}", default_job=path.stem, assignments=assignments, store_url=store_url
    )


def read_config(
    text: str,
    *,
    name: str,
    default_job: str | None = None,
    assignments: Sequence[str] = (),
    store_url: str | None = None,
) -> RunConfig:
    """A config from YAML text; `name` says in errors where the text came from."""
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise AskedWrongly(f"{name} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise AskedWrongly(
            f"{name} must be a mapping of sections such as 'objective' and 'engine', not {type(tree).__name__}."
        )
    if default_job is not None:
        tree.setdefault("job", default_job)
    if store_url is not None:
        tree.setdefault("data", {})["store_url"] = store_url
    for key, value in parse_assignments(assignments).items():
        _replace(tree, key, value)
    return _validated(tree, name)


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """`key=value` words as dotted keys and YAML values."""
    parsed: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key.strip():
            raise AskedWrongly(
                f"--set takes key=value, for example --set engine.optimizer.lr=0.01; got {assignment!r}."
            )
        try:
            parsed[key.strip()] = _yaml_scalar(value)
        except yaml.YAMLError as error:
            raise AskedWrongly(f"--set {key.strip()}: the value {value!r} is not valid YAML: {error}") from error
    return parsed


def _yaml_scalar(text: str) -> Any:
    """The YAML value; also `1e-3`, which YAML 1.1 takes for a word because it lacks the point."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _replace(tree: dict[str, Any], key: str, value: Any) -> None:
    section, _, leaf = key.rpartition(".")
    _section(tree, section)[leaf] = value


def _section(tree: dict[str, Any], dotted: str) -> dict[str, Any]:
    """The mapping at a dotted key, made where it is missing: the schema judges the result."""
    here = tree
    for name in dotted.split(".") if dotted else ():
        following = here.get(name)
        if following is None:
            following = here[name] = {}
        if not isinstance(following, dict):
            raise AskedWrongly(f"{dotted!r} has nothing below {name!r}: its value is {following!r}.")
        here = following
    return here


def _validated(tree: dict[str, Any], name: str) -> RunConfig:
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        # A default that follows from a wrong value is no problem of its own
        problems = [problem for problem in error.errors() if problem["type"] != "default_factory_not_called"]
        lines = [_explain(problem) for problem in problems]
        raise AskedWrongly(f"{name} is not a valid run:\n" + "\n".join(f"  - {line}" for line in lines)) from error


def _explain(problem: Any) -> str:
    """One problem in people's words: the dotted key, what is wrong, and the nearest key that exists."""
    location = [str(part) for part in problem["loc"]]
    model, keys = _walk(location)
    dotted = ".".join(keys) if keys else "the run"
    if problem["type"] == "extra_forbidden":
        known = sorted(model.model_fields) if model is not None else []
        nearest = difflib.get_close_matches(location[-1], known, n=1)
        meant = f" Did you mean {nearest[0]!r}?" if nearest else ""
        return f"unknown key {dotted!r}.{meant} Known here: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"{dotted!r} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    given = "" if problem["type"] == "value_error" else f", got {problem['input']!r}"
    return f"{dotted}: {message[:1].lower()}{message[1:]}{given}"


def _walk(location: Sequence[str]) -> tuple[type[BaseModel] | None, list[str]]:
    """The model that holds the last key of an error's location, and the location without the tags of unions."""
    model: type[BaseModel] | None = RunConfig
    keys: list[str] = []
    candidates: tuple[type[BaseModel], ...] = ()
    is_mapping_key = False
    for position, part in enumerate(location):
        if is_mapping_key:
            keys.append(part)
            is_mapping_key = False
            continue
        tagged = (
            next((option for option in candidates if option.model_fields["kind"].default == part), None)
            if candidates
            else None
        )
        candidates = ()
        if tagged is not None:
            model = tagged
            continue
        keys.append(part)
        if position == len(location) - 1 or model is None or part not in model.model_fields:
            continue
        annotation = model.model_fields[part].annotation
        is_mapping_key = get_origin(annotation) is dict  # what follows is one
        options = tuple(_models_in(annotation))
        if len(options) == 1 and "kind" not in options[0].model_fields:
            model = options[0]
        else:
            candidates = tuple(option for option in options if "kind" in option.model_fields)
            model = candidates[0] if len(candidates) == 1 else None
    return model, keys


def _models_in(annotation: Any) -> Iterable[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, Annotated, dict):
        for argument in get_args(annotation):
            yield from _models_in(argument)
