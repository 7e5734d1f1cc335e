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
    needed = [RunFolder(each.run_url) for each in goal.prerequisites]
    teachers = {each.teacher for each in goal.prerequisites if each.teacher is not None}
    return Facts(
        corpus_ready=store is not None and store.is_complete(),
        cached=frozenset(name for name in teachers if find_features(goal, store, _asked_for(goal, name)) is not None),
        trained=frozenset(run.url for run in (*runs, *needed) if run.is_finished()),
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


def _asked_for(goal: Goal, teacher: str) -> str:
    """The teacher as the run names it, which may be bound to weights already."""
    own = goal.teacher_name or ""
    return own if own.partition("@")[0] == teacher else teacher


def find_features(goal: Goal, store: Store | None, teacher: str) -> str | None:
    """`name@hash` of the complete features that this launch shall read, or None where they are not there yet."""
    if store is None:
        return None
    if "@" in teacher:  # the run began with these weights, and stays with them
        return teacher if teacher in store.teachers else None
    needed = goal.prerequisite_of_teacher(teacher)
    if needed is not None:
        for event in reversed(RunFolder(needed.run_url).events()):
            if (
                event["event"] == FEATURES_CACHED
                and event["store"] == goal.store_url
                and _holds(store, event["teacher"], needed.fields)
            ):
                key: str = event["teacher"]
                return key
        if goal.makes_corpus:
            return None  # what else lies in the demo's store comes from a teacher of another recipe
    try:
        key = store.resolve_teacher(teacher)
    except MissingField:
        return None
    return key if needed is None or _holds(store, key, needed.fields) else None


def _holds(store: Store, teacher: str, fields: tuple[str, ...]) -> bool:
    return teacher in store.teachers and set(fields) <= set(store.teachers[teacher].fields)
