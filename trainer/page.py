"""Pure: what is known of one run or several -> one HTML page that needs no other file."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from statistics import mean, stdev
from typing import Any, Final

from datastore.progress import format_seconds
from trainer.charts import (
    ABSENT,
    Bar,
    ClassRow,
    Series,
    bars,
    class_rows,
    confusion_matrix,
    legend,
    line_panel,
    percent,
    wilson_interval,
)

RANDOM_COLOUR: Final = 5
_NUM_RUN_COLOURS: Final = 5  # the sixth is that of random weights
_NUM_CONFUSIONS_NAMED: Final = 3

Curve = tuple[Sequence[float], Sequence[float]]
"""Steps, and the value at each."""


@dataclass(frozen=True)
class Outcome:
    """One encoder's score under the run's protocol."""

    label: str  # "distilled", "distillation off", "random weights"
    accuracy: float
    class_mean_accuracy: float
    per_class_accuracy: Mapping[str, float | None]
    num_test: int


@dataclass(frozen=True)
class Check:
    """One statement about the splits. `holds` None: nothing was recorded that would tell."""

    holds: bool | None
    statement: str


@dataclass(frozen=True)
class RunFacts:
    """Everything that the page says of one run; what is not known yet is empty."""

    name: str
    job: str
    subtitle: str
    config_yaml: str
    settings: Mapping[str, Any]  # dotted keys of the config
    protocol: str | None = None
    protocol_note: str = ""
    outcomes: tuple[Outcome, ...] = ()  # the run's own first
    other_scores: tuple[tuple[str, str, float], ...] = ()  # protocol, label, accuracy
    confusion: tuple[tuple[str, ...], Sequence[Sequence[int]]] | None = None
    curves: Mapping[str, Mapping[str, Curve]] = field(default_factory=dict)  # training -> term -> curve
    ran: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    contact_sheet: bytes | None = None  # a PNG
    next_command: str = ""  # which evaluates the run; none for networks that no protocol judges


_PAGE: Final = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · Viewpoint</title>
<style>
{style}</style>
</head>
<body>
<header><p class="eyebrow">{eyebrow}</p><h1>{headline}</h1><p class="lead">{lead}</p></header>
{sections}
<footer>{made}</footer>
</body>
</html>
"""


def render(runs: Sequence[RunFacts], *, made: str) -> str:
    """The whole page; `made` says when and how, at its foot."""
    is_comparison = len(runs) > 1
    headline, lead = _comparison_headline(runs) if is_comparison else _headline(runs[0])
    sections = (
        _scores, _losses, _classes, _confusion, _corpus, _honesty, _what_ran, _times, _settings,
    )  # fmt: skip
    return _PAGE.format(
        title=escape(f"{len(runs)} runs compared" if is_comparison else runs[0].name),
        style=files("trainer").joinpath("report.css").read_text(),
        eyebrow=escape(" · ".join(_distinct(run.job if is_comparison else run.subtitle for run in runs))),
        headline=escape(headline),
        lead=lead,
        sections="\n".join(filter(None, (section(runs) for section in sections))),
        made=escape(made),
    )


def _headline(run: RunFacts) -> tuple[str, str]:
    """The one number that matters, as a sentence, and (as HTML) what it is to be held against."""
    if not run.outcomes:
        if not run.next_command:
            return f"{run.job}: {run.ran['state']}", "An image network is not evaluated by itself, but by its students."
        hint = f"Score it with <code>{escape(run.next_command)}</code>."
        return f"{run.job}: not evaluated yet", f"No evaluation is recorded for this run. {hint}"
    own, *others = run.outcomes
    headline = f"{own.label[:1].upper()}{own.label[1:]} features classify {percent(own.accuracy)} of unseen shapes"
    differences = [
        f"<strong>{_points(own.accuracy - other.accuracy)}</strong> than {escape(_described(other.label))}"
        for other in others
    ]
    held_against = f"{_joined(differences)}. " if differences else ""
    return headline, f"{held_against}{escape(run.protocol_note)}"


def _comparison_headline(runs: Sequence[RunFacts]) -> tuple[str, str]:
    scored = [run.outcomes[0].accuracy for run in runs if run.outcomes]
    if not scored:
        return f"{len(runs)} runs, none evaluated yet", "No evaluation is recorded for these runs."
    if not _differ_only_in_seed(runs) or len(scored) < 2:
        return f"{len(runs)} runs: {percent(min(scored))} to {percent(max(scored))}", escape(runs[0].protocol_note)
    label = runs[0].outcomes[0].label
    headline = (
        f"{label[:1].upper()}{label[1:]}: {percent(mean(scored))} ± {100 * stdev(scored):.1f} over {len(scored)} seeds"
    )
    sentences = []
    for other in runs[0].outcomes[1:]:
        pairs = [
            (run.outcomes[0].accuracy - candidate.accuracy)
            for run in runs
            for candidate in run.outcomes[1:]
            if candidate.label == other.label
        ]
        sentences.append(
            f"<strong>{_points(mean(pairs))}</strong> on average than {escape(_described(other.label))} "
            f"({', '.join(f'{100 * pair:+.1f}' for pair in pairs)})"
        )
    held_against = f"{_joined(sentences)}. " if sentences else ""
    return headline, f"{held_against}{escape(runs[0].protocol_note)}"


def _scores(runs: Sequence[RunFacts]) -> str:
    groups = []
    for run in runs:
        if not run.outcomes:
            continue
        rows = [
            Bar(
                outcome.label,
                outcome.accuracy,
                percent(outcome.accuracy),
                _outcome_colour(index, outcome.label),
                wilson_interval(outcome.accuracy, outcome.num_test),
                f"{round(outcome.accuracy * outcome.num_test)} of {outcome.num_test} test shapes; "
                f"mean over classes {percent(outcome.class_mean_accuracy)}",
            )
            for index, outcome in enumerate(run.outcomes)
        ]
        chance = 1 / sum(accuracy is not None for accuracy in run.outcomes[0].per_class_accuracy.values())
        name = f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else ""
        scale = ((chance, f"chance {percent(chance)}"), (1.0, "100\u202f%"))
        groups.append(f'<div class="group">{name}{bars(rows, full=1.0, ticks=scale)}</div>')
    others = _table(
        ("run", "protocol", "encoder", "accuracy"),
        [(run.name, protocol, label, percent(score)) for run in runs for protocol, label, score in run.other_scores],
        numbers=(3,),
    )
    extra = f"<h3>Under other protocols</h3>{others}" if others else ""
    if not groups:
        return f'<section class="headline">{extra}</section>' if extra else ""
    num_test = next(run.outcomes[0].num_test for run in runs if run.outcomes)
    note = (
        f"Bars start at zero and share one scale. One test shape is {100 / num_test:.2f} points. Whiskers: the 95 % "
        f"interval of a count on {num_test:,} shapes (Wilson); they do not cover what another seed would change."
    )
    return f'<section class="headline">{"".join(groups)}<p class="note">{escape(note)}</p>{extra}</section>'


def _losses(runs: Sequence[RunFacts]) -> str:
    lines = [
        (label if len(runs) == 1 else run.name, curves)
        for run in runs
        for label, curves in (run.curves.items() if len(runs) == 1 else list(run.curves.items())[:1])
    ]
    lines = [(label, curves) for label, curves in lines if curves]
    if not lines:
        return ""
    terms = _distinct(term for _, curves in lines for term in curves)
    in_pairs = len(terms) in (1, 2, 4)
    panels = [
        line_panel(
            term.replace("_", " "),
            [
                Series(label, index % _NUM_RUN_COLOURS, *curves[term])
                for index, (label, curves) in enumerate(lines)
                if term in curves
            ],
            width=500 if in_pairs else 340,
        )
        for term in terms
    ]
    keys = legend([(label, index % _NUM_RUN_COLOURS) for index, (label, _) in enumerate(lines)])
    note = (
        "Over optimizer steps. Terms are weighted: they add up to the loss. Faint: as logged; firm: running mean over "
        "a twentieth of the run."
    )
    kind = "panels pairs" if in_pairs else "panels"
    return _section(
        "Loss, term by term", f'{keys}<div class="{kind}">{"".join(panels)}</div><p class="note">{note}</p>'
    )


def _classes(runs: Sequence[RunFacts]) -> str:
    if len(runs) == 1:
        compared = [
            (outcome.label, outcome, _outcome_colour(i, outcome.label)) for i, outcome in enumerate(runs[0].outcomes)
        ]
    else:
        compared = [(run.name, run.outcomes[0], i % _NUM_RUN_COLOURS) for i, run in enumerate(runs) if run.outcomes]
    if not compared:
        return ""
    first = compared[0][1]
    support = _support(runs)
    names = sorted(first.per_class_accuracy, key=lambda name: (-(first.per_class_accuracy[name] or 0.0), name))
    rows = [
        ClassRow(
            name,
            str(support.get(name, "")),
            [outcome.per_class_accuracy.get(name) for _, outcome, _ in compared],
        )
        for name in names
    ]
    keys = legend([(label, colour) for label, _, colour in compared])
    note = "Bar: the first of the legend; marks: the others. Small figures: test shapes of the class."
    body = f'{keys}{class_rows(rows, [colour for _, _, colour in compared])}<p class="note">{note}</p>'
    return _section("Accuracy by class", body)


def _confusion(runs: Sequence[RunFacts]) -> str:
    if len(runs) != 1 or runs[0].confusion is None:
        return ""
    names, counts = runs[0].confusion
    mistakes = sorted(
        (
            (count, names[i], names[j])
            for i, row in enumerate(counts)
            for j, count in enumerate(row)
            if i != j and count
        ),
        key=lambda mistake: (-mistake[0], mistake[1:]),
    )
    repeated = [f"{true} for {wrong} ({count})" for count, true, wrong in mistakes[:_NUM_CONFUSIONS_NAMED] if count > 1]
    finding = f"Most often: {', '.join(repeated)}." if repeated else "No mistake occurs more than once."
    sentence = f"Rows: what it is; columns: what it was taken for. {finding}"
    body = f'<div class="scroll">{confusion_matrix(names, counts)}</div><p class="note">{escape(sentence)}</p>'
    return _section(f"What {runs[0].outcomes[0].label} features confuse" if runs[0].outcomes else "Confusion", body)


def _corpus(runs: Sequence[RunFacts]) -> str:
    sheet = next((run.contact_sheet for run in runs if run.contact_sheet is not None), None)
    figure = ""
    if sheet is not None:
        encoded = base64.b64encode(sheet).decode()
        figure = (
            f'<figure><img alt="rendered views of some shapes of the corpus" src="data:image/png;base64,{encoded}">'
            "<figcaption>Some shapes of the corpus, as the teacher sees them.</figcaption></figure>"
        )
    facts = _facts(runs, [run.data for run in runs])
    return _section("The data", figure + facts) if figure or facts else ""


def _honesty(runs: Sequence[RunFacts]) -> str:
    blocks = []
    for checks in dict.fromkeys(run.checks for run in runs if run.checks):
        items = "".join(
            f'<li><span class="{kind}">{mark}</span><span>{escape(check.statement)}</span></li>'
            for check in checks
            for kind, mark in [_MARKS[check.holds]]
        )
        names = ", ".join(run.name for run in runs if run.checks == checks)
        heading = f"<h3>{escape(names)}</h3>" if len(runs) > 1 else ""
        blocks.append(f'{heading}<ul class="checks">{items}</ul>')
    if not blocks:
        return ""
    note = '<p class="note">Computed from the store and the records, not declared.</p>'
    return _section("Honest splits", "".join(blocks) + note)


_MARKS: Final = {True: ("holds", "✓"), False: ("fails", "✗"), None: ("open", "?")}


def _what_ran(runs: Sequence[RunFacts]) -> str:
    facts = _facts(runs, [run.ran for run in runs])
    return _section("What ran", facts) if facts else ""


def _times(runs: Sequence[RunFacts]) -> str:
    timed = [run for run in runs if run.stage_seconds]
    if not timed:
        return ""
    longest = max(seconds for run in timed for seconds in run.stage_seconds.values())
    blocks = []
    for index, run in enumerate(timed):
        total = format_seconds(sum(run.stage_seconds.values()))
        rows = [
            Bar(stage, seconds, format_seconds(seconds), index % _NUM_RUN_COLOURS)
            for stage, seconds in run.stage_seconds.items()
        ]
        name = f"{escape(run.name)}, " if len(runs) > 1 else ""
        blocks.append(
            f'<div class="group"><p class="muted">{name}{total} in all</p>{bars(rows, full=longest, kind="slim")}</div>'
        )
    return _section("Where the time went", "".join(blocks))


def _settings(runs: Sequence[RunFacts]) -> str:
    differences = ""
    if len(runs) > 1:
        keys = _distinct(key for run in runs for key in run.settings)
        rows = [
            (key, *(str(run.settings.get(key, ABSENT)) for run in runs))
            for key in keys
            if len({str(run.settings.get(key)) for run in runs}) > 1
        ]
        differences = _table(("setting", *(run.name for run in runs)), rows) or "<p>The settings are the same.</p>"
    texts = "".join(
        f"<details><summary>config.yaml of {escape(run.name)}</summary><pre>{escape(run.config_yaml)}</pre></details>"
        for run in runs
    )
    if len(runs) == 1:
        return _section("Settings", texts, kind="folded")  # folded, and so not printed
    return _section("Settings that differ", differences + texts)


def _facts(runs: Sequence[RunFacts], columns: Sequence[Mapping[str, str]]) -> str:
    """What all runs share as a grid, and below it a table, a column a run, of what differs."""
    keys = _distinct(key for column in columns for key in column)
    shared = {key: columns[0][key] for key in keys if len({column.get(key) for column in columns}) == 1}
    items = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in shared.items())
    grid = f'<dl class="facts">{items}</dl>' if items else ""
    rows = [(key, *(column.get(key, ABSENT) for column in columns)) for key in keys if key not in shared]
    return grid + _table(("", *(run.name for run in runs)), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    """A table, or nothing where there is no row."""
    if not rows:
        return ""

    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=number' if index in numbers else ''}>{escape(cell)}</{tag}>"
            for index, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{line(head, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


def _section(title: str, body: str, *, kind: str = "") -> str:
    return f'<section class="{kind}"><h2>{escape(title)}</h2>{body}</section>'


def _support(runs: Sequence[RunFacts]) -> dict[str, int]:
    """Test shapes by class."""
    for run in runs:
        if run.confusion is not None:
            return {name: sum(row) for name, row in zip(*run.confusion, strict=True)}
    return {}


def _outcome_colour(index: int, label: str) -> int:
    return RANDOM_COLOUR if label == "random weights" else index % _NUM_RUN_COLOURS


def _described(label: str) -> str:
    """An arm's label inside a sentence that begins with the run's own."""
    if label == "random weights":
        return "the same network with random weights"
    return f"the same recipe with {label}"


def _points(difference: float) -> str:
    return f"{abs(100 * difference):.1f} points {'more' if difference >= 0 else 'less'}"


def _differ_only_in_seed(runs: Sequence[RunFacts]) -> bool:
    """Whether the runs repeat one recipe under other seeds."""
    ignored = {"seed", "data.store_url"}
    settings = [{key: value for key, value in run.settings.items() if key not in ignored} for run in runs]
    return all(other == settings[0] for other in settings) and len({run.settings.get("seed") for run in runs}) == len(
        runs
    )


def _joined(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
