"""Whether a store has what every step of a launch asks of it, found out before anything heavy begins."""

import json
from collections.abc import Sequence
from pathlib import Path

from datastore.errors import DoNotRetry
from datastore.layout import Store
from launcher.command import Layout
from launcher.facts import find_store
from launcher.plan import Goal, Step
from trainer.config import RunConfig
from trainer.evaluate.labels import unmet_needs
from trainer.recipes import known_jobs, recipe_path
from trainer.runfolder import RunFolder


def refuse_unsuitable_store(goal: Goal, layout: Layout, steps: Sequence[Step]) -> None:
    """Ends a launch of which a step that is still to come asks for shapes or labels that the store lacks.

    A store that the launch makes itself passes until it is made.
    """
    store = find_store(goal)
    if store is None or (goal.makes_corpus and not store.is_complete()):
        return
    said = [*_too_few_shapes(goal, layout, steps, store), *_no_evaluation(goal, steps, store)]
    if said:
        raise DoNotRetry("\n".join(said))


def refuse_unsuitable_corpus(run: RunFolder, goal: Goal, layout: Layout, steps: Sequence[Step]) -> None:
    """The same of a corpus that the launch has just made; the run's history says why it ends here."""
    try:
        refuse_unsuitable_store(goal, layout, steps)
    except DoNotRetry as error:
        run.append_event("launch_failed", step="ingest", exit_code=error.exit_code, reason=str(error))
        raise


def num_available(config: RunConfig, store: Store) -> int:
    """How many shapes a training reads at most; the manifest knows it, no shape is read.

    Classes and lists may choose fewer still: to know that, workers read every label or name.
    """
    return len(store.row_ranges(config.data.split).every(config.data.every))


def say_shortage(config: RunConfig, available: int) -> str:
    """What a job takes beside what there is."""
    return (
        f"job {config.job!r} takes {config.global_batch:,} shapes a step, split {config.data.split!r} has {available:,}"
    )


def largest_batch(available: int, layout: Layout) -> int | None:
    """The largest global batch of so many shapes or fewer that the processes share evenly, two each or more."""
    each = available // layout.world
    return each * layout.world if each > 1 else None


def _too_few_shapes(goal: Goal, layout: Layout, steps: Sequence[Step], store: Store) -> list[str]:
    """The lines on trainings that take more shapes a step than there are."""
    short: dict[str, tuple[RunConfig, int]] = {}
    for config in (step.config for step in steps if step.config is not None and not step.done):
        available = num_available(config, store)
        if config.global_batch > available:
            short.setdefault(config.job, (config, available))
    if not short:
        return []
    if not store.is_complete():
        more = "Let its ingest finish"
    elif goal.makes_corpus:
        more = "Ask for a larger corpus (--set prepare.corpus.source=...)"
    else:
        more = "Ingest more shapes"
    lines = [f"{store.url} has too few shapes{'' if store.is_complete() else ' so far'}:"]
    lines += [f"  - {say_shortage(config, available)}" for config, available in short.values()]
    smaller = [_smaller_steps(goal, config, available, layout) for config, available in short.values() if available > 1]
    lines.append(f"{more}, or let a step take fewer:" if smaller else f"{more}.")
    return lines + [f"  - {each}" for each in smaller]


def _no_evaluation(goal: Goal, steps: Sequence[Step], store: Store) -> list[str]:
    """The lines on what the protocols ask for that stand at the end of the launch."""
    protocols = goal.config.evaluation.protocols
    if all(step.done for step in steps if step.kind == "evaluate"):
        return []
    lacks = unmet_needs(store, protocols)
    if not lacks:
        return []
    return [
        f"{store.url} cannot judge what this launch trains, by {' and '.join(protocols)}:",
        *(f"  - {each}" for each in lacks),
        "Make the store of shapes whose folders, or the columns of whose index, say class and split (train, test), or train "
        "without an evaluation:",
        f"  - {goal.config.job}: add --set 'evaluation.protocols=[]'; afterwards `viewpoint evaluate RUN --protocol "
        f"{protocols[0]} --data STORE` judges it on another store",
    ]


def _smaller_steps(goal: Goal, config: RunConfig, available: int, layout: Layout) -> str:
    """How a person changes a job's global batch: that of the launch by an option, another's in a copy of its recipe."""
    batch = largest_batch(available, layout)
    fewer_nodes = "launch on one node, and " if batch is None else ""
    batch = batch or available
    if config.job == goal.config.job:
        return f"{config.job}: {fewer_nodes}add --set global_batch={batch}"
    owners = [
        (owner, name) for owner in _trained(goal) for name in _needed_jobs(owner) if Path(name).stem == config.job
    ]
    published = [(owner, name) for owner, name in owners if name in known_jobs(demo=goal.makes_corpus)]
    if not published:
        files = " and ".join(dict.fromkeys(name for _, name in owners)) or "its recipe"
        return f"{config.job}: {fewer_nodes}write `global_batch: {batch}` into {files}"
    path = recipe_path(published[0][1], demo=goal.makes_corpus)
    options = ", and ".join(_take_copy(goal, owner, name) for owner, name in published)
    return f"{config.job}: {fewer_nodes}copy {path}, write `global_batch: {batch}` into the copy, and {options}"


def _trained(goal: Goal) -> list[RunConfig]:
    return [goal.config, *(needed.config for needed in goal.prerequisites)]


def _needed_jobs(owner: RunConfig) -> list[str]:
    """The names and files of the recipes that a run needs trained before."""
    return [name for name in (owner.prepare.teacher_job, *owner.prepare.networks.values()) if name is not None]


def _take_copy(goal: Goal, owner: RunConfig, name: str) -> str:
    """How a run is made to train a copy, in the working directory, of a recipe that it needs."""
    copy = f"./{name}.yaml"
    if owner is not goal.config:
        return f"name it ({copy}) under 'prepare' in a copy of the recipe of {owner.job!r}"
    if name == owner.prepare.teacher_job:
        return f"add --set prepare.teacher_job={copy}"
    networks = {key: copy if each == name else each for key, each in owner.prepare.networks.items()}
    return f"add --set 'prepare.networks={json.dumps(networks)}'"
