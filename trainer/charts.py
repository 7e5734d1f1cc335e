"""Pure: numbers in, marks for a page out. Colours are the page's, by class name: light, dark and print agree."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from math import ceil, floor, log10, sqrt
from typing import Final

ABSENT: Final = "\N{EN DASH}"
"""What stands where there is no number."""

NUM_COLOURS: Final = 6
"""Series beyond these repeat the colours; the page defines `--series-0` to `--series-5`."""

_MAX_POINTS: Final = 240  # of one line: more would be finer than a pixel
_MOST_COUNTED_CLASSES: Final = 24  # of a confusion matrix that carries figures
_CONFIDENCE_95: Final = 1.96
_SHOWN_SHARE: Final = 0.995  # of the values of a line, from below


@dataclass(frozen=True)
class Bar:
    """One horizontal bar of a group that shares a scale."""

    label: str
    value: float
    text: str  # what stands at its end
    colour: int
    interval: tuple[float, float] | None = None
    hint: str = ""


@dataclass(frozen=True)
class Series:
    """One line: `values` over `steps`."""

    label: str
    colour: int
    steps: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True)
class ClassRow:
    """One class: a bar for the first value, a mark for each of the others. None: the class has no test shape."""

    label: str
    note: str
    values: Sequence[float | None]


def wilson_interval(accuracy: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share counted on so many shapes; unlike the normal one it stays inside 0 and 1."""
    z = _CONFIDENCE_95
    centre = (accuracy + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * sqrt(accuracy * (1 - accuracy) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def bars(rows: Sequence[Bar], *, full: float, ticks: Sequence[tuple[float, str]] = (), kind: str = "") -> str:
    """Bars from zero on one scale that ends at `full`, with marks for `ticks` through all of them."""
    lines = [f'<div class="bars {kind}">']
    for row in rows:
        hint = f' title="{escape(row.hint)}"' if row.hint else ""
        lines.append(
            f'<div class="bar"{hint}><span class="bar-label">{escape(row.label)}</span><span class="track">'
            f'<span class="fill c{row.colour % NUM_COLOURS}" style="width:{_percent(row.value, full)}"></span>'
        )
        if row.interval is not None:
            low, high = row.interval
            lines.append(
                f'<span class="whisker" style="left:{_percent(low, full)};width:{_percent(high - low, full)}"></span>'
            )
        lines += [f'<span class="tick" style="left:{_percent(at, full)}"></span>' for at, _ in ticks]
        lines.append(f'</span><span class="bar-value">{escape(row.text)}</span></div>')
    if ticks:
        marks = "".join(
            f'<span class="tick-label" style="left:{_percent(at, full)}">{escape(text)}</span>' for at, text in ticks
        )
        lines.append(f'<div class="bar axis"><span></span><span class="track">{marks}</span><span></span></div>')
    lines.append("</div>")
    return "".join(lines)


def class_rows(rows: Sequence[ClassRow], colours: Sequence[int]) -> str:
    """One line a class, all on a scale from 0 to 1."""
    lines = ['<div class="classes">']
    for row in rows:
        first, *others = row.values
        marks = "".join(
            f'<span class="mark c{colour % NUM_COLOURS}" style="left:{_percent(value, 1)}"></span>'
            for value, colour in zip(others, colours[1:], strict=True)
            if value is not None
        )
        fill = (
            ""
            if first is None
            else (f'<span class="fill c{colours[0] % NUM_COLOURS}" style="width:{_percent(first, 1)}"></span>')
        )
        lines.append(
            f'<div class="bar"><span class="bar-label">{escape(row.label)} <small>{escape(row.note)}</small></span>'
            f'<span class="track">{fill}{marks}</span><span class="bar-value">{percent(first)}</span></div>'
        )
    lines.append("</div>")
    return "".join(lines)


def legend(labels: Sequence[tuple[str, int]]) -> str:
    """What the colours mean."""
    keys = "".join(
        f'<span class="key"><span class="swatch c{colour % NUM_COLOURS}"></span>{escape(label)}</span>'
        for label, colour in labels
    )
    return f'<div class="legend">{keys}</div>'


def line_panel(title: str, series: Sequence[Series], *, width: int = 340, height: int = 190) -> str:
    """One small chart over steps: each series as it was logged, faint, and its running mean, firm."""
    left, right, top, bottom = 44, 10, 28, 30
    drawn = [_thinned(line) for line in series if len(line.steps)]
    last_step = max((line.steps[-1] for line in drawn), default=1.0) or 1.0
    # the first steps of a run tower over the rest: the scale follows nearly all values, and lines leave through the top
    values = sorted(value for line in drawn for value in line.values) or [0.0]
    largest = values[min(len(values) - 1, int(_SHOWN_SHARE * len(values)))]
    y_ticks = nice_ticks(min(values[0], 0.0), max(largest, 0.0))

    def x_of(step: float) -> float:
        return left + (width - left - right) * step / last_step

    def y_of(value: float) -> float:
        share = (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return height - bottom - (height - top - bottom) * min(share, 1.04)

    def points(line: Series, values: Sequence[float]) -> str:
        return " ".join(f"{x_of(step):.1f},{y_of(value):.1f}" for step, value in zip(line.steps, values, strict=True))

    parts = [
        f'<svg class="panel" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)} over steps">',
        f'<text class="panel-title" x="{left}" y="16">{escape(title)}</text>',
    ]
    for tick in y_ticks:
        y = y_of(tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="axis-text end" x="{left - 6}" y="{y + 3.5:.1f}">{tick:g}</text>')
    for tick in nice_ticks(0.0, last_step):
        if tick <= last_step:
            anchor = "end" if x_of(tick) > width - right - 12 else "middle"
            y = height - bottom + 15
            parts.append(f'<text class="axis-text {anchor}" x="{x_of(tick):.1f}" y="{y}">{tick:,.0f}</text>')
    for line in drawn:
        colour = f"c{line.colour % NUM_COLOURS}"
        parts.append(f'<polyline class="raw {colour}" points="{points(line, line.values)}"/>')
        firm = points(line, running_mean(line.values))
        parts.append(f'<polyline class="mean {colour}" points="{firm}"><title>{escape(line.label)}</title></polyline>')
    parts.append("</svg>")
    return "".join(parts)


def confusion_matrix(class_names: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """Rows are true classes, columns predicted ones, shade is the share of the row; few classes carry their counts."""
    size = len(class_names)
    cell = 27 if size <= _MOST_COUNTED_CLASSES else 15
    longest = max(len(name) for name in class_names)
    margin = 14 + round(6.2 * longest)
    side = margin + cell * size
    parts = [
        f'<svg class="matrix" viewBox="0 0 {side + 24} {side + 4}" style="max-width:{side + 24}px" role="img" '
        f'aria-label="confusion matrix of {size} classes">'
    ]
    for index, name in enumerate(class_names):
        middle = margin + cell * (index + 0.5)
        parts.append(f'<text class="axis-text end" x="{margin - 8}" y="{middle + 4:.1f}">{escape(name)}</text>')
        parts.append(
            f'<text class="axis-text" transform="translate({middle + 4:.1f} {margin - 8}) rotate(-90)">'
            f"{escape(name)}</text>"
        )
    for row, (name, line) in enumerate(zip(class_names, counts, strict=True)):
        total = sum(line)
        for column, count in enumerate(line):
            x, y = margin + cell * column, margin + cell * row
            share = count / total if total else 0.0
            kind = "right" if row == column else "wrong"
            parts.append(f'<rect class="cell" x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}"/>')
            if not count:
                continue
            parts.append(
                f'<rect class="{kind}" x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}" '
                f'fill-opacity="{0.12 + 0.88 * share:.3f}"><title>{escape(name)} taken for '
                f"{escape(class_names[column])}: {count} of {total}</title></rect>"
            )
            if size <= _MOST_COUNTED_CLASSES:
                shade = " strong" if share > 0.5 else ""
                parts.append(
                    f'<text class="count{shade}" x="{x + (cell - 1) / 2}" y="{y + cell / 2 + 3.5}">{count}</text>'
                )
    parts.append("</svg>")
    return "".join(parts)


def running_mean(values: Sequence[float]) -> list[float]:
    """The mean of each value and its neighbours, over a twentieth of the line."""
    reach = max(1, len(values) // 40)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    smooth = []
    for index in range(len(values)):
        low, high = max(0, index - reach), min(len(values), index + reach + 1)
        smooth.append((sums[high] - sums[low]) / (high - low))
    return smooth


def nice_ticks(low: float, high: float) -> list[float]:
    """A few round numbers, evenly apart, from at most `low` to at least `high`; zero lies between the two."""
    rough = (high - low) / 4 or 0.25
    decade = 10.0 ** floor(log10(rough))
    step = next(factor * decade for factor in (1, 2, 2.5, 5, 10) if factor * decade >= rough * (1 - 1e-9))
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return [float(f"{index * step:.10g}") for index in range(first, max(last, first + 1) + 1)]


def percent(share: float | None) -> str:
    """`78.9 %`, with spaces that do not break; a dash where there is nothing."""
    return ABSENT if share is None else f"{100 * share:.1f}\u202f%"


def _thinned(line: Series) -> Series:
    """The line as means of so many equal runs of points."""
    count = len(line.steps)
    if count <= _MAX_POINTS:
        return line
    edges = [round(index * count / _MAX_POINTS) for index in range(_MAX_POINTS + 1)]
    spans = list(pairwise(edges))
    steps = [line.steps[high - 1] for _, high in spans]
    return Series(line.label, line.colour, steps, [sum(line.values[a:b]) / (b - a) for a, b in spans])


def _percent(value: float, full: float) -> str:
    return f"{100 * min(max(value / full, 0.0), 1.0):.2f}%"
