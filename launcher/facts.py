"""What is complete already, looked up where it lies."""

from typing import Final

from datastore.errors import MissingField, StoreError
from datastore.layout import Store, open_store
from launcher.plan import Facts, Goal
from trainer.runfolder import Record, RunFolder

FEATURES_CACHED: Final = "features_cached"
"""The event in a teacher's run that says under which key a store holds its features."""


def observe(goal: Goal) -> Facts:
    """The facts that a plan starts from."""
    store = find_store(goal)
    runs = [RunFolder(url) for url in (goal.run_url, *(goal.arm_url(arm) for arm in goal.arms))]
    return Facts(
        corpus_ready=store is not None and store.is_complete(),
        teacher_trained=goal.teacher_run_url is not None and RunFolder(goal.teacher_run_url).is_finished(),
        features_ready=goal.teacher_name is None or find_features(goal, store) is not None,
        trained=frozenset(run.url for run in runs if run.is_finished()),
        evaluated=frozenset(
            (run.url, name) for run in runs for name, record in run.records().items() if _is_current(run, record, goal)
        ),
        reported=RunFolder(goal.run_url).read_text("report.html") is not None,
    )


def _is_current(run: RunFolder, record: Record, goal: Goal) -> bool:
    """Whether a record judges this run's final weights on this store: people evaluate checkpoints and other stores too."""
    if record["store"]["url"] != goal.store_url:
        return False
    end, judged = run.last_event("finished"), record["checkpoint"]
    return bool(judged["is_random"]) or (end is not None and judged["step"] == end["step"])


def find_store(goal: Goal) -> Store | None:
    """The store, or None where this launch has yet to begin it. A store that somebody named must be there."""
    try:
        return open_store(goal.store_url)
    except StoreError:
        if goal.makes_corpus:
            return None
        raise


def find_features(goal: Goal, store: Store | None) -> str | None:
    """`name@hash` of the complete features that the run shall read, or None where they are not there yet."""
    if store is None or goal.teacher_name is None:
        return None
    if "@" in goal.teacher_name:  # the run began with these weights, and stays with them
        return goal.teacher_name if goal.teacher_name in store.teachers else None
    if goal.teacher_run_url is not None:
        for event in reversed(RunFolder(goal.teacher_run_url).events()):
            if (
                event["event"] == FEATURES_CACHED
                and event["store"] == goal.store_url
                and event["teacher"] in store.teachers
            ):
                key: str = event["teacher"]
                return key
        if goal.makes_corpus:
            return None  # what else lies in the demo's store comes from a teacher of another recipe
    try:
        return store.resolve_teacher(goal.teacher_name)
    except MissingField:
        return None
