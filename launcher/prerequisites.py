"""Networks that must be there before a run: which jobs train them, in which order, and where their runs lie."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from datastore.errors import AskedWrongly
from launcher.plan import Prerequisite, teacher_folder
from trainer.config import RunConfig

LoadJob = Callable[[str], RunConfig]


@dataclass(frozen=True)
class Prepared:
    """A run's config with the URLs of the networks that it needs, and the jobs that must come before it."""

    config: RunConfig
    prerequisites: tuple[Prerequisite, ...]


def prerequisites_of(config: RunConfig, load_job: LoadJob, runs_url: str, store_url: str) -> Prepared:
    """What must be trained before this run, what must come before that first; each job once.

    `load_job` reads the recipe of a job on the same store. A network whose URL the config has already is not trained.
    """
    return _Search(load_job, runs_url, store_url).prepared(config, within=(config.job,))


def missing_networks(config: RunConfig) -> dict[str, str]:
    """Keys of the config that take the URL of a network and have none, with the jobs that train it."""
    return {key: job for key, job in config.prepare.networks.items() if _value(config, key) is None}


class _Search:
    def __init__(self, load_job: LoadJob, runs_url: str, store_url: str) -> None:
        self._load_job, self._runs_url, self._store_url = load_job, runs_url, store_url

    def prepared(self, config: RunConfig, within: tuple[str, ...]) -> Prepared:
        found: list[Prerequisite] = []
        if config.prepare.teacher_job is not None and config.teacher is not None:
            of_teacher = self._of_job(config.prepare.teacher_job, within)
            name = config.teacher.partition("@")[0]
            last = replace(of_teacher[-1], teacher=name, fields=config.teacher_fields)
            found += [*of_teacher[:-1], last]
        for key, job in missing_networks(config).items():
            found += self._of_job(job, within)
            config = _with_value(config, key, f"{found[-1].run_url}/export")
        return Prepared(config, _each_once(found))

    def _of_job(self, job: str, within: tuple[str, ...]) -> list[Prerequisite]:
        """The job's own prerequisites, and the job itself."""
        if job in within:
            raise AskedWrongly(
                f"Jobs need each other in a circle: {' -> '.join((*within, job))}. Mend their 'prepare'."
            )
        prepared = self.prepared(self._load_job(job), (*within, job))
        run_url = f"{self._runs_url}/{teacher_folder(prepared.config, self._store_url)}"
        return [*prepared.prerequisites, Prerequisite(prepared.config, run_url)]


def _each_once(found: list[Prerequisite]) -> tuple[Prerequisite, ...]:
    """The first of several that are the same run, with all that is asked of it."""
    by_url: dict[str, Prerequisite] = {}
    for each in found:
        before = by_url.get(each.run_url, each)
        by_url[each.run_url] = replace(
            before,
            teacher=before.teacher or each.teacher,
            fields=tuple(dict.fromkeys((*before.fields, *each.fields))),
        )
    return tuple(by_url.values())


def _value(config: RunConfig, key: str) -> Any:
    here: Any = config
    for name in key.split("."):
        here = here[name] if isinstance(here, dict) else getattr(here, name, None)
    return here


def _with_value(config: RunConfig, key: str, value: str) -> RunConfig:
    """The same run, arms included, with one value set."""
    arms = {name: {**overrides} for name, overrides in config.comparisons.items()}
    return config.with_overrides({key: value}).model_copy(update={"comparisons": arms})
