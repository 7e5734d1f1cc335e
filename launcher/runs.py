"""Which run folder a launch continues, or starts."""

import re
from dataclasses import dataclass
from pathlib import Path

import fsspec

from datastore.errors import AskedWrongly, DoNotRetry
from trainer.config import RunConfig
from trainer.runfolder import RunFolder

COMPLETE = "launch_complete"
"""The event that ends a run: trained, compared, evaluated and reported."""


@dataclass(frozen=True)
class ChosenRun:
    """A folder, and what shall be trained there."""

    folder: RunFolder
    config: RunConfig  # as asked for, bound to the teacher's weights that the folder's run began with
    is_new: bool = False
    is_complete: bool = False


def choose_run(runs_url: str, name: str | None, config: RunConfig, *, same_store: bool) -> ChosenRun:
    """The named run, else the newest unfinished run of the same training, else a new one with the next number.

    `same_store`: a named run must read the very store that it began with; without it, the store may have moved.
    """
    if name is not None:
        return _named(runs_url, name, config, same_store=same_store)
    numbers = _numbers(runs_url, config.job)
    for number in sorted(numbers, reverse=True):
        folder = RunFolder(f"{runs_url}/{config.job}-{number}")
        if not folder.exists() or folder.last_event(COMPLETE):
            continue
        there = folder.config()
        if is_same_training(there, config) and there.data.store_url == config.data.store_url:
            return ChosenRun(folder, continued(there, config))
    return ChosenRun(RunFolder(f"{runs_url}/{config.job}-{max(numbers, default=0) + 1}"), config, is_new=True)


def is_same_training(one: RunConfig, other: RunConfig) -> bool:
    """Whether going on with the other config would not change what is trained."""
    return _unpinned(one).hash() == _unpinned(other).hash()


def pinned(config: RunConfig, teacher: str) -> RunConfig:
    """The same run, bound to one teacher's weights (`name@hash`): another one in the store later changes nothing."""
    return _with_teacher(config, teacher)


def _unpinned(config: RunConfig) -> RunConfig:
    teacher = getattr(config.objective, "teacher", None)
    return config if teacher is None else _with_teacher(config, teacher.partition("@")[0])


def _with_teacher(config: RunConfig, teacher: str) -> RunConfig:
    return config.model_copy(update={"objective": config.objective.model_copy(update={"teacher": teacher})})


def continued(there: RunConfig, asked: RunConfig) -> RunConfig:
    """What is asked for may differ in how the work is spread; which teacher the run began with stays."""
    teacher = getattr(there.objective, "teacher", None)
    return asked if teacher is None else _with_teacher(asked, teacher)


def _named(runs_url: str, name: str, config: RunConfig, *, same_store: bool) -> ChosenRun:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise AskedWrongly(
            f"--run {name!r} is not a name: letters, digits, '.', '_' and '-' alone. The folder it lies in is --runs "
            f"(now {runs_url})."
        )
    folder = RunFolder(f"{runs_url}/{name}")
    if not folder.exists():
        return ChosenRun(folder, config, is_new=True)
    there = folder.config()
    differences = _differences(_unpinned(there).identity(), _unpinned(config).identity())
    if same_store:
        differences += _differences(there.data.store_url, config.data.store_url, "data.store_url")
    if differences:
        raise DoNotRetry(
            f"Run {name!r} in {runs_url} was started with another recipe:\n"
            + "\n".join(f"  - {line}" for line in differences)
            + f"\nGo on with its own settings (`--set` the first values), or start a new run with another --run name. "
            f"Its settings are in {folder.url}/config.yaml."
        )
    return ChosenRun(folder, continued(there, config), is_complete=folder.last_event(COMPLETE) is not None)


def _differences(there: object, asked: object, key: str = "") -> list[str]:
    """`engine.optimizer.lr: 0.001 there, 0.1 asked for`, for each value that differs."""
    if isinstance(there, dict) and isinstance(asked, dict):
        return [
            line
            for name in {**there, **asked}
            for line in _differences(there.get(name), asked.get(name), f"{key}.{name}" if key else str(name))
        ]
    return [] if there == asked else [f"{key}: {there!r} there, {asked!r} asked for"]


def _numbers(runs_url: str, job: str) -> list[int]:
    filesystem, root = fsspec.core.url_to_fs(runs_url, use_listings_cache=False)
    if not filesystem.isdir(root):
        return []
    matches = (re.fullmatch(rf"{re.escape(job)}-(\d+)", Path(path).name) for path in filesystem.ls(root, detail=False))
    return [int(match[1]) for match in matches if match]
