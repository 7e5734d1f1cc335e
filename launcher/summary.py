"""What a finished launch says last: the scores side by side, where things lie, how long it took, what to do next."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from datastore.progress import format_seconds
from launcher.events import describe_recoveries
from launcher.plan import Goal, record_name, spoken
from launcher.spec import LaunchSpec
from trainer.evaluate import RANDOM_WEIGHTS
from trainer.runfolder import RunFolder

STEP_FINISHED: Final = "step_finished"
"""The event with which a launch says how long a step took."""

Row = tuple[str, dict[str, Any]]


def results_of(run: RunFolder) -> list[dict[str, Any]]:
    """Every score of a run and of what it is compared with, then the run itself: one object each."""
    protocols = run.config().evaluation.protocols
    scores = [
        {
            "kind": "score",
            "run": run.url,
            "arm": arm,
            **{
                key: record[key]
                for key in ("protocol", "accuracy", "class_mean_accuracy", "num_train", "num_test", "c", "seed")
            },
        }
        for protocol in protocols
        for arm, record in scores_of(run, protocol)
    ]
    finished = {"kind": "run", "run": run.url, "report": report_of(run), "seconds": seconds_of(run)}
    return [*scores, finished]


def scores_of(run: RunFolder, protocol: str) -> list[Row]:
    """The records of one protocol: the trained network's, each arm's, the one of random weights."""
    own = run.records()
    has_teacher = getattr(run.config().objective, "teacher", None) is not None
    found = {"distilled" if has_teacher else "trained": own.get(protocol)}
    found |= {arm: folder.records().get(protocol) for arm, folder in run.arms().items()}
    found[RANDOM_WEIGHTS] = own.get(record_name(protocol, random=True))
    return [(arm, record) for arm, record in found.items() if record is not None]


def summarise(run: RunFolder, goal: Goal, spec: LaunchSpec) -> str:
    """The closing words."""
    blocks = [
        table(protocol, rows) for protocol in goal.config.evaluation.protocols if (rows := scores_of(run, protocol))
    ]
    seconds = seconds_of(run)
    times = ", ".join(f"{title} {format_seconds(spent)}" for title, spent in seconds.items())
    where = [
        ("report", report_of(run)),
        ("encoder", run.export_url),
        ("run", run.url),
        ("corpus", goal.store_url),
        ("faults", describe_recoveries(run.events()) or ""),
        ("time", f"{format_seconds(sum(seconds.values()))}: {times}" if seconds else ""),
    ]
    blocks.append("\n".join(f"{name:<9}{value}" for name, value in where if value))
    blocks.append("next:\n" + "\n".join(f"  {line}" for line in next_steps(run, goal, spec)))
    return "\n" + "\n\n".join(blocks)


def table(protocol: str, rows: Sequence[Row]) -> str:
    """Accuracies beside each other, and what each is to the first."""
    (own, first), *_ = rows
    lines = [f"Linear SVM on frozen features, {protocol}: {first['num_test']:,} test shapes{_seen(first['splits'])}"]
    width = max(len(spoken(arm)) for arm, _ in rows) + 2
    for arm, record in rows:
        gain = 100 * (first["accuracy"] - record["accuracy"])
        beside = "" if record is first else f"   {own} is {abs(gain):.1f} points {'above' if gain >= 0 else 'below'}"
        lines.append(f"  {spoken(arm):<{width}}{100 * record['accuracy']:5.1f} %{beside}")
    return "\n".join(lines)


def _seen(splits: Mapping[str, Any]) -> str:
    """What the record can say of training on test shapes, so that the table promises nothing else."""
    seen = [splits[key] for key in ("shared_rows", "equal_clouds", "seen_in_training")]
    if splits["teacher_trained_on"] is not None:
        seen.append(splits["seen_by_teacher"])
    if None in seen:
        return "; nothing tells whether training saw them"
    return f"; {max(seen):,} of them were seen in training" if any(seen) else " that no training saw"


def next_steps(run: RunFolder, goal: Goal, spec: LaunchSpec) -> list[str]:
    """What a person may want now, each with its command."""
    launch = f"viewpoint launch {spec.job} --nodes {spec.layout.nodes}"
    steps = [("look at it", f"open {report_of(run)} in a browser")]
    if goal.config.student is not None:
        steps.append(("use the encoder", f"viewpoint export {run.url} encoder/"))
    if goal.makes_corpus:
        steps.append(("is it chance?", f"{launch} --set seed=1"))
        steps.append(("your own shapes", "viewpoint ingest MESHES STORE"))
        steps.append(("", f"{launch} --data STORE" + " --prepare" * (bool(goal.prerequisites))))
    return [f"{what:<17}{command}" for what, command in steps]


def seconds_of(run: RunFolder) -> dict[str, float]:
    """How long each step of the run took, by title; the last time, where it ran more than once."""
    return {event["title"]: event["seconds"] for event in run.events() if event["event"] == STEP_FINISHED}


def report_of(run: RunFolder) -> str:
    """Where the report lies."""
    return f"{run.url}/report.html"
