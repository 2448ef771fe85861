import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brefine.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Line,
    Span,
    columns,
    heat,
    lines,
    table,
)

NASTY = '<script>alert("&")</script>'


class Shapes(HTMLParser):
    """Elements of a chart with their attributes, and all text outside tags."""

    def __init__(self, text):
        super().__init__()
        self.shapes, self.text, self.open = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.shapes.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.shapes.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def of(self, tag, kind):
        return [a for t, a in self.shapes if t == tag and kind in a.get("class", "").split()]


@given(
    st.floats(-1e6, 1e6),
    st.floats(1e-6, 1e6),
    st.booleans(),
)
def test_ticks_are_round_few_and_inside(low, length, percent):
    length = max(length, 1e-6 * abs(low))  # below that, rounding blurs what is round
    axis = Axis("x", low, low + length, percent)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 12
    step = ticks[1] - ticks[0] if len(ticks) > 1 else None
    slack = 1e-6 * max(abs(low), length)
    assert all(axis.low - slack <= tick <= axis.high + slack for tick in ticks)
    if step:
        digits = f"{step * (100 if percent else 1):.3e}"
        assert digits[:5] in ("1.000", "2.000", "2.500", "5.000")


def test_an_axis_of_no_length_has_a_tick():
    assert Axis("x", 3, 3).ticks() == [3]
    assert Axis("x", 3, 3).place(3) == 0


def test_lines_lie_where_their_values_are():
    points = [(0.0, 0.0), (0.5, 1.0), (0.6, math.nan), (1.0, 0.25)]
    chart = Shapes(
        lines(NASTY, "n", Axis("x", 0, 1), Axis("y", 0, 1), [Line("a", points, "c0", True)])
    )
    (path,) = (a["d"] for t, a in chart.shapes if t == "path" and a["d"].startswith(f"M{LEFT}"))
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    bottom = HEIGHT - BOTTOM
    assert path == (
        f"M{LEFT:.1f} {bottom:.1f}L{LEFT + width / 2:.1f} {TOP:.1f}"
        f"M{WIDTH - RIGHT:.1f} {bottom - height / 4:.1f}"
    )
    assert len(chart.of("circle", "dot")) == 3
    cells = [text for text in chart.text if re.fullmatch(r"[\d.-]+", text)]
    assert cells[-8:] == ["0", "0", "50", "100", "60", "-", "100", "25"]
    assert NASTY in chart.text


def test_columns_are_as_high_as_their_values():
    series = [
        ("bar", "c0", [Span(0, 0.5), None, Span(0, math.nan)]),
        ("half", "c1", [Span(0.25, 0.75, 0.5), Span(0, 0, 0), None]),
    ]
    chart = Shapes(columns("t", "n", ["a", NASTY, "c"], Axis("y"), series, counts=[5, 60, 70000]))
    height = HEIGHT - TOP - BOTTOM
    bars = [a for a in chart.of("rect", "c0") if float(a["x"]) >= LEFT]
    assert [float(a["height"]) for a in bars] == [height / 2]
    (span, flat) = chart.of("rect", "span")
    assert float(span["height"]) == pytest.approx(height / 2, abs=0.1)
    assert float(span["y"]) == pytest.approx(TOP + height / 4, abs=0.1)
    assert float(flat["height"]) == 0
    assert {"5", "60", "70k", "25 / 50 / 75", NASTY} <= set(chart.text)
    assert "nan" not in "".join(chart.text)


def test_heat_shades_are_shares_of_the_row():
    counts = [[3, 1, 0], [0, 0, 0], [0, 5, 15000]]
    chart = Shapes(heat("t", "n", ["a", "b", NASTY], ["a", "b", "c" * 50], counts, right=[(0, 0)]))
    cells = chart.of("rect", "cell")
    assert len(cells) == 9
    assert [a["class"] == "cell" for a in cells] == [True] + [False] * 8
    shades = [float(a["fill-opacity"]) for a in cells]
    assert shades[0] == pytest.approx(0.06 + 0.94 * 0.75, abs=0.006)
    assert shades[0] > shades[1] > shades[2] == shades[3] == min(shades)
    assert shades[8] == 1
    assert [chart.text.count(n) for n in ("3", "1", "5", "15k", "0")] == [1, 1, 1, 1, 0]
    assert "c" * 21 + "…" in chart.text
    Shapes(heat("t", "n", [], [], []))


def test_tables_escape():
    text = table(["a", NASTY], [[NASTY, "1"]])
    assert "<script" not in text
    assert Shapes(text).text == ["a", NASTY, NASTY, "1"]
