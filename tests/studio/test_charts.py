"""Charts: inside their frame, gaps broken, every text escaped."""

import itertools
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.studio.charts import (
    difference_chart,
    level,
    level_chart,
    line_chart,
    nice_ticks,
    number,
    percent,
    points,
    share_chart,
)
from tutelage.studio.figures import Curve, Measure, Series, ShareBar

finite = st.floats(-1e6, 1e6, allow_nan=False)
share = st.none() | st.floats(0, 1)
difference = st.none() | st.floats(-1, 1)


def curve(*series, share=False, limit=None, ticks=None, units=None):
    count = len(series[0].values)
    ticks = ticks or tuple(str(i + 1) for i in range(count))
    units = units or ("u",) * count
    return Curve("Title", "Note", "step", "value", share, ticks, units, series, limit, count, True)


def inside(svg):
    """Every coordinate lies within the view box; returns the parsed picture."""
    root = ET.fromstring(svg)  # noqa: S314
    width, height = (float(x) for x in root.get("viewBox").split()[2:])
    for element in root.iter():
        for name in ("x", "x1", "x2", "cx"):
            assert -0.1 <= float(element.get(name, 0)) <= width + 0.1, (element.tag, name)
        for name in ("y", "y1", "y2", "cy"):
            assert -0.1 <= float(element.get(name, 0)) <= height + 0.1, (element.tag, name)
    assert root.get("role") == "img"
    assert root.get("aria-label")
    return root


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (0, "0"), (0.8371, "0.837"), (-1.5, "−1.50"), (1234.5, "1,234"), (2e-5, "2.0e−05")],
)
def test_numbers_have_three_digits_and_a_real_minus(value, shown):
    assert number(value) == shown


def test_shares_and_differences():
    assert percent(0.5) == "50.0%"
    assert percent(0.5, 0) == "50%"
    assert percent(None) == points(None) == "–"
    assert points(-0.651) == "−65.1"
    assert points(0.08) == "+8.0"
    assert points(-0.0001) == "0.0"
    assert (level(0.256), level(0.256, digits=0), level(None, share=False)) == ("25.6%", "26%", "–")
    # A reward is no share: neither percent nor points.
    assert (level(-0.174, share=False), level(-0.001, share=False)) == ("−0.17", "0.00")
    assert (points(0.336, share=False), points(-0.001, share=False)) == ("+0.34", "0.00")


@given(finite, finite)
def test_ticks_are_round_rise_evenly_and_span_the_values(a, b):
    low, high = min(a, b), max(a, b)
    ticks = nice_ticks(low, high)
    steps = [y - x for x, y in itertools.pairwise(ticks)]
    assert 2 <= len(ticks) <= 12
    assert min(steps) > 0
    assert max(steps) - min(steps) <= 1e-6 * max(abs(ticks[0]), abs(ticks[-1]), steps[0])
    slack = 1e-6 * max(abs(low), abs(high), 1e-6)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack


@given(st.lists(st.none() | finite, min_size=1, max_size=40).filter(lambda v: any(x is not None for x in v)))
def test_a_line_stays_in_its_frame_and_breaks_at_gaps(values):
    root = inside(line_chart(curve(Series("a", tuple(values)), limit=0.5)))
    path = next(p.get("d") for p in root.iter("path"))
    runs = sum(v is not None and (i == 0 or values[i - 1] is None) for i, v in enumerate(values))
    assert path.count("M") == runs
    assert len(re.findall("[ML]", path)) == sum(v is not None for v in values)


def test_positive_values_are_drawn_from_zero():
    root = inside(line_chart(curve(Series("a", (0.98, 1.0)))))
    assert "0" in [t.text for t in root.iter("text")]


def test_a_new_unit_is_marked():
    units = ("round-1", "round-1", "round-2", "round-2")
    root = inside(line_chart(curve(Series("a", (1.0, 2.0, 3.0, 4.0)), units=units)))
    assert sum(line.get("class") == "cut" for line in root.iter("line")) == 1


@given(st.lists(st.tuples(share, share, difference, difference), min_size=1, max_size=6))
def test_measures_stay_in_their_frame(rows):
    found = [Measure("s", "honest", before, after, low, high, 3) for before, after, low, high in rows]
    levels = inside(level_chart(found))
    known = sum(m.before is not None for m in found) + sum(m.after is not None for m in found)
    assert len(list(levels.iter("circle"))) == known
    inside(difference_chart(found))


def test_shape_tells_what_colour_tells():
    rows = [
        Measure("s", "correct_answerable", 0.2, 0.5, 0.2, 0.4, 9),
        Measure("s", "correct_answerable", 0.5, 0.2, -0.4, -0.2, 9),
        Measure("s", "correct_answerable", 0.5, 0.4, -0.2, 0.1, 9),
    ]
    root = inside(difference_chart(rows))
    marks = [(e.tag, e.get("class")) for e in root.iter() if "mark" in e.get("class", "")]
    assert marks == [("circle", "mark better"), ("path", "mark worse"), ("circle", "mark unclear")]


def test_difference_of_rewards_has_their_unit():
    root = inside(difference_chart([Measure("s", "reward", -0.17, 0.17, 0.23, 0.44, 310)]))
    assert root.get("aria-label") == "Differences. Reward: +0.34, 95% from +0.23 to +0.44"
    texts = [e.text for e in root.iter("text")]
    assert "after − before" in texts
    assert "+0.2" in texts  # a tick


@given(st.lists(st.integers(0, 500), min_size=4, max_size=4))
def test_bars_add_up_to_their_whole_width(counts):
    names = ("correct", "abstained", "asked_back", "wrong")
    kept = tuple((n, c) for n, c in zip(names, counts, strict=True) if c)
    root = inside(share_chart([ShareBar("answerable", "start", "before", sum(counts), kept)]))
    rects = list(root.iter("rect"))
    assert [r.find("title").text.split(":")[1].split()[0] for r in rects] == [str(c) for _, c in kept]
    if rects:
        assert float(rects[-1].get("x")) + float(rects[-1].get("width")) <= 300


def test_names_from_outside_are_escaped():
    evil = '"><script>alert(1)</script>'
    for svg in (
        line_chart(curve(Series(evil, (1.0,)), ticks=(evil,), units=(evil,))),
        level_chart([Measure("s", evil, 0.1, 0.2, 0.0, 0.1, 3)]),
        difference_chart([Measure("s", evil, 0.1, 0.2, 0.0, 0.1, 3)]),
        share_chart([ShareBar(evil, evil, evil, 1, ((evil, 1),))]),
    ):
        root = inside(svg)
        assert "script" not in {e.tag for e in root.iter()}
        assert "<script" not in str(svg)
