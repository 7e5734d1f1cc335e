"""Charts must not lie: zero is zero, scales are shared, nothing is dropped."""

import math
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.charts import (
    Bar,
    ClassRow,
    Series,
    bars,
    class_rows,
    confusion_matrix,
    line_panel,
    nice_ticks,
    percent,
    running_mean,
    wilson_interval,
)


def widths(markup: str) -> list[float]:
    return [float(found) for found in re.findall(r'class="fill[^"]*" style="width:([\d.]+)%"', markup)]


def test_bars_begin_at_zero_and_share_one_scale() -> None:
    rows = [Bar("a", 0.8, "80", 0), Bar("b", 0.4, "40", 1), Bar("c", 0.0, "0", 2)]
    assert widths(bars(rows, full=1.0)) == [80.0, 40.0, 0.0]
    assert widths(bars([Bar("a", 30, "30 s", 0), Bar("b", 60, "1 min", 0)], full=60)) == [50.0, 100.0]


def test_an_interval_lies_around_its_bar() -> None:
    markup = bars([Bar("a", 0.5, "50", 0, interval=(0.4, 0.65))], full=1.0)
    assert 'class="whisker" style="left:40.00%;width:25.00%"' in markup


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),
    [(0.5, 100, 0.4038, 0.5962), (0.0, 10, 0.0, 0.2775), (1.0, 128, 0.9709, 1.0), (0.9, 10, 0.5958, 0.9821)],
)
def test_wilson_s_interval_has_its_published_values(share: float, count: int, low: float, high: float) -> None:
    assert wilson_interval(share, count) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


@given(st.floats(-1e6, 0), st.floats(1e-9, 1e6))
def test_ticks_are_few_evenly_apart_and_cover_the_values(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 8 and 0 in ticks
    slack = 1e-6 * (high - low)
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack
    gaps = {round((after - before) / (ticks[1] - ticks[0]), 6) for before, after in pairwise(ticks)}
    assert gaps == {1.0}


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.25, 0.5, 0.75, 1]), (0, 320, [0, 100, 200, 300, 400]), (-0.9, 0, [-1, -0.75, -0.5, -0.25, 0])],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert nice_ticks(low, high) == expected


def polylines(markup: str) -> list[list[tuple[float, float]]]:
    root = ElementTree.fromstring(markup)
    return [
        [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]  # type: ignore[misc]
        for line in root.iter("polyline")
    ]


def test_a_line_panel_draws_every_series_twice_inside_its_frame() -> None:
    steps = list(range(1, 2001))
    markup = line_panel(
        "loss", [Series("a", 0, steps, [1 / step for step in steps]), Series("b", 1, steps[:3], [0.5, 0.4, 0.3])]
    )
    lines = polylines(markup)
    assert len(lines) == 4
    assert len(lines[0]) <= 240, "no more points than can be told apart"
    assert all(0 <= x <= 340 and 0 <= y <= 160.1 for line in lines for x, y in line)
    assert lines[0][-1][0] == pytest.approx(330), "the last step is at the right end"


def test_a_line_panel_takes_negative_flat_and_single_values() -> None:
    for values in ([-0.5, -0.9], [0.0, 0.0], [2.0]):
        lines = polylines(line_panel("cosine", [Series("a", 0, list(range(1, len(values) + 1)), values)]))
        assert all(20 <= y <= 161 for line in lines for _, y in line)
    assert polylines(line_panel("nothing", [Series("a", 0, [], [])])) == []


def test_a_higher_value_is_drawn_higher() -> None:
    (raw, _) = polylines(line_panel("loss", [Series("a", 0, [1, 2, 3], [3.0, 1.0, 2.0])]))
    heights = [-y for _, y in raw]
    assert heights[0] > heights[2] > heights[1]


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=300))
def test_a_running_mean_stays_between_the_extremes_and_keeps_constants(values: list[float]) -> None:
    smooth = running_mean(values)
    assert len(smooth) == len(values)
    assert min(values) - 1e-6 <= min(smooth) and max(smooth) <= max(values) + 1e-6
    assert all(math.isclose(value, 5.0) for value in running_mean([5.0] * len(values)))


def test_a_class_without_test_shapes_has_a_dash_and_no_bar() -> None:
    markup = class_rows([ClassRow("chair", "8", [None, 0.5]), ClassRow("table", "4", [0.25, None])], [0, 1])
    assert widths(markup) == [25.0]
    assert markup.count('class="mark') == 1
    assert "\N{EN DASH}" in markup and percent(0.25) in markup


def test_a_confusion_matrix_holds_every_count() -> None:
    counts = [[5, 1], [0, 0]]
    root = ElementTree.fromstring(confusion_matrix(["chair", "table"], counts))
    assert [text.text for text in root.iter("text") if "count" in text.attrib.get("class", "")] == ["5", "1"]
    assert [title.text for title in root.iter("title")] == [
        "chair taken for chair: 5 of 6",
        "chair taken for table: 1 of 6",
    ]


def test_a_large_confusion_matrix_is_shade_alone() -> None:
    names = [f"class {index}" for index in range(40)]
    root = ElementTree.fromstring(confusion_matrix(names, [[1] * 40 for _ in names]))
    assert sum(1 for _ in root.iter("title")) == 1600
    assert not [text for text in root.iter("text") if "count" in text.attrib.get("class", "")]


def test_names_are_escaped() -> None:
    hostile = '<script>alert("x")</script>'
    pieces = [
        bars([Bar(hostile, 1, hostile, 0, hint=hostile)], full=1, ticks=((1.0, hostile),)),
        class_rows([ClassRow(hostile, hostile, [1.0])], [0]),
        line_panel(hostile, [Series(hostile, 0, [1], [1.0])]),
        confusion_matrix([hostile], [[1]]),
    ]
    assert not any("<script" in piece or 'alert("' in piece for piece in pieces)
