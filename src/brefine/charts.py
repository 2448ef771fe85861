"""Charts as inline SVG: no script, no fonts to fetch, readable in light and dark.

Every chart is a figure with a title, a legend, and its numbers as a table for those who cannot
see it or want the digits. Text from outside is escaped here.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 14, 54  # margins around the plot

#: style sheet of the charts; colours ``c0`` ... ``c4`` are told apart by colour-blind people, too
STYLE = """
:root { --c0: #0b6fb8; --c1: #d1580a; --c2: #12876a; --c3: #8a4fb3; --c4: #6b7280;
  --grid: #e4e6e9; --axis: #9aa1ab; }
@media (prefers-color-scheme: dark) { :root { --c0: #5cb3ee; --c1: #ff9a52; --c2: #46c7a2;
  --c3: #c79be8; --c4: #9aa3af; --grid: #2b3037; --axis: #5b636e; } }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); }
.charts { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); }
.charts.three { grid-template-columns: repeat(auto-fit, minmax(min(100%, 390px), 1fr)); }
.chart { padding: 1rem 1.1rem .8rem; background: var(--card); border: 1px solid var(--rule);
  border-radius: 8px; }
.chart figcaption { margin: 0 0 .6rem; font-size: .85rem; line-height: 1.4; }
.chart figcaption b { display: block; color: var(--ink); font-size: .95rem; }
.chart svg { background: none; border-radius: 0; overflow: visible; max-width: 560px;
  margin: 0 auto; }
.chart svg text { fill: var(--dim); stroke: none; font-weight: 400; font-size: 11.5px; }
.chart svg text.name { fill: var(--ink); } .chart svg text.value { font-size: 10px; }
.chart path, .chart rect, .chart line, .chart circle { vector-effect: none; stroke: none; }
.chart .grid-line { stroke: var(--grid); } .chart .axis { stroke: var(--axis); }
.chart .guide { stroke: var(--axis); stroke-dasharray: 3 4; fill: none; }
.chart path.line { stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.chart path.thin { stroke-width: 1.4; } .chart path.dash { stroke-dasharray: 6 4; }
.chart path.dots { stroke-dasharray: 1.5 4; stroke-linecap: round; }
.chart .dot, .chart .bar { fill: var(--c); } .chart .span { fill: var(--c); fill-opacity: .3; }
.chart .back { fill: var(--c4); fill-opacity: .22; }
.chart .cell { fill: var(--c0); } .chart .cell.off { fill: var(--c1); }
.chart svg text.count { fill: var(--ink); text-anchor: middle; }
.chart svg text.over { fill: var(--card); }
.keys { display: flex; flex-wrap: wrap; gap: .15rem 1rem; justify-content: center;
  margin: .3rem 0 0; font-size: .82rem; color: var(--ink); }
.keys span { display: inline-flex; align-items: center; gap: .4rem; }
.keys svg { width: 26px; height: 10px; margin: 0; flex: none; }
.chart details { margin: .5rem 0 0; font-size: .82rem; }
.chart details table { font-size: .8rem; } .chart details td, .chart details th { padding: .2rem
  .6rem; }
.chart details .wide { max-height: 22rem; overflow: auto; }
"""


@dataclass(frozen=True)
class Axis:
    """One axis of a plot.

    Attributes:
        name: what it shows.
        low: value at its beginning.
        high: value at its end.
        percent: write fractions as percent.
    """

    name: str
    low: float = 0.0
    high: float = 1.0
    percent: bool = True

    def place(self, value: float) -> float:
        """Where a value lies, 0..1."""
        return (value - self.low) / ((self.high - self.low) or 1.0)

    def text(self, value: float) -> str:
        """A value as people read it."""
        if math.isnan(value):
            return "-"
        if self.percent:
            return f"{100 * value:.4g}"
        return f"{value:.4g}"

    def ticks(self) -> list[float]:
        """Round values, about six."""
        scale = 100 if self.percent else 1
        rough = (self.high - self.low) * scale / 5
        if not rough > 0:
            return [self.low]
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(n * power for n in (1, 2, 2.5, 5, 10) if n * power >= rough * 0.999) / scale
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [step * i for i in range(first, last + 1)]


class Line(NamedTuple):
    """A line of a plot."""

    name: str
    points: Sequence[tuple[float, float]]  #: NaN leaves a gap
    style: str  #: a colour (``c0``), maybe with ``dash``, ``dots``, ``thin``
    dots: bool = False  #: a dot at each point


class Span(NamedTuple):
    """A column of a plot, from ``low`` to ``high``: a bar, or paler with a tick at ``mark``."""

    low: float
    high: float
    mark: float | None = None


def lines(
    title: str,
    note: str,
    x: Axis,
    y: Axis,
    drawn: Sequence[Line],
    *,
    guide: Sequence[tuple[float, float]] = (),
    guide_name: str = "",
    back: Sequence[tuple[float, float, float]] = (),
    back_name: str = "",
    numbers: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None,
) -> str:
    """A plot of lines.

    Args:
        title: head of the figure.
        note: what it shows, a sentence or two.
        x: the axis to the right.
        y: the axis up.
        drawn: the lines.
        guide: a dashed line behind them.
        guide_name: what it means; nothing leaves it out of the legend.
        back: gray columns behind everything: from x to x, and height 0..1 of the plot.
        back_name: what they mean.
        numbers: heads and rows of the table, if not those of the lines.
    """
    parts = [_frame(x, y)]
    for left, right, share in back:
        a, b = _x(x, left), _x(x, right)
        top = _y(Axis(""), share)
        parts.append(
            f'<rect class="back" x="{a + 0.5:.1f}" y="{top:.1f}" width="{max(b - a - 1, 0):.1f}" '
            f'height="{HEIGHT - BOTTOM - top:.1f}"/>'
        )
    if guide:
        parts.append(f'<path class="guide" d="{_path(x, y, guide)}"/>')
    for line in drawn:
        parts.append(f'<path class="line {line.style}" d="{_path(x, y, line.points)}"/>')
        if line.dots:
            parts += [
                f'<circle class="dot {line.style}" cx="{_x(x, a):.1f}" cy="{_y(y, b):.1f}" r="3"/>'
                for a, b in line.points
                if math.isfinite(b)
            ]
    keys = [(line.name, f'<path class="line {line.style}" d="M0 5h26"/>') for line in drawn]
    if guide_name:
        keys.append((guide_name, '<path class="guide" d="M0 5h26"/>'))
    if back_name:
        keys.append((back_name, '<rect class="back" x="4" width="18" height="10"/>'))

    if numbers is None:
        tables = [dict(line.points) for line in drawn]
        places = sorted({place for table in tables for place in table})
        rows = [[x.text(a), *(y.text(table.get(a, math.nan)) for table in tables)] for a in places]
        numbers = [x.name, *(line.name for line in drawn)], rows
    return _figure(title, note, "".join(parts), keys, *numbers)


def columns(
    title: str,
    note: str,
    groups: Sequence[str],
    y: Axis,
    series: Sequence[tuple[str, str, Sequence[Span | None]]],
    *,
    x_name: str = "",
    counts: Sequence[int] = (),
) -> str:
    """A plot of columns in groups: bars, or the quarters around a median.

    Args:
        title: head of the figure.
        note: what it shows.
        groups: names along the x axis.
        y: the axis up.
        series: name, colour, and a column for each group; None where there is nothing to show.
        x_name: what the groups are.
        counts: a number for each group, shown below its name.
    """
    plot = WIDTH - LEFT - RIGHT
    share = plot / max(len(groups), 1)
    parts = [_frame(Axis(x_name), y, ticks=False, drop=48 if counts else 38)]
    width = min(26.0, share * 0.72 / max(len(series), 1))
    for i, group in enumerate(groups):
        middle = LEFT + share * (i + 0.5)
        parts.append(_text(middle, HEIGHT - BOTTOM + 16, group, "name"))
        if counts:
            parts.append(_text(middle, HEIGHT - BOTTOM + 29, _short(counts[i]), "value"))
        for j, (_, style, spans) in enumerate(series):
            span = spans[i]
            if span is None or math.isnan(span.high):
                continue
            left = middle + (j - len(series) / 2) * width + 1
            top, bottom = _y(y, span.high), _y(y, span.low)
            kind = "bar" if span.mark is None else "span"
            parts.append(
                f'<rect class="{kind} {style}" x="{left:.1f}" y="{top:.1f}" width="{width - 2:.1f}"'
                f' height="{max(bottom - top, 0):.1f}"/>'
            )
            if span.mark is not None:
                parts.append(
                    f'<rect class="bar {style}" x="{left:.1f}" y="{_y(y, span.mark) - 1.5:.1f}" '
                    f'width="{width - 2:.1f}" height="3"/>'
                )
            elif width >= 18:
                text = y.text(round(span.high, 3))
                parts.append(_text(left + width / 2 - 1, top - 4, text, "value"))
    keys = [
        (name, f'<rect class="bar {style}" x="6" width="14" height="10"/>')
        for name, style, _ in series
    ]

    def cell(span: Span | None) -> str:
        if span is None or math.isnan(span.high):
            return "-"
        if span.mark is None:
            return y.text(round(span.high, 4))
        return " / ".join(y.text(round(v, 3)) for v in (span.low, span.mark, span.high))

    rows = [[group, *(cell(spans[i]) for *_, spans in series)] for i, group in enumerate(groups)]
    heads = [x_name or "group", *(name for name, *_ in series)]
    if counts:
        heads.append("number")
        rows = [[*row, str(count)] for row, count in zip(rows, counts, strict=True)]
    return _figure(title, note, "".join(parts), keys, heads, rows)


def heat(
    title: str,
    note: str,
    rows: Sequence[str],
    heads: Sequence[str],
    counts: Sequence[Sequence[int]],
    *,
    right: Sequence[tuple[int, int]] = (),
    table: tuple[Sequence[str], Sequence[Sequence[str]]] = ((), ()),
) -> str:
    """A matrix of counts; the shade of a cell is its share of the row.

    Args:
        title: head of the figure.
        note: what it shows.
        rows: their names.
        heads: names of the columns.
        counts: the cells.
        right: cells (row, column) of another colour: those that are no mistake.
        table: heads and rows of the table below.
    """
    side, letter = (44, 13) if len(rows) <= 8 else (32, 11) if len(rows) <= 16 else (24, 9)
    left = 24 + 6.2 * max((min(len(name), 22) for name in rows), default=0)
    top = 34 + 4.6 * max((min(len(name), 22) for name in heads), default=0)
    parts = []
    for j, name in enumerate(heads):
        x = left + side * (j + 0.5)
        parts.append(
            f'<text class="name" transform="translate({x:.1f} {top - 7:.1f}) rotate(-48)">'
            f"{html.escape(_clip(name))}</text>"
        )
    for i, name in enumerate(rows):
        y = top + side * i
        parts.append(
            f'<text class="name" x="{left - 7:.1f}" y="{y + side / 2 + 4:.1f}" '
            f'text-anchor="end">{html.escape(_clip(name))}</text>'
        )
        total = sum(counts[i]) or 1
        for j, count in enumerate(counts[i]):
            share = count / total
            x = left + side * j
            kind = "cell" if (i, j) in right else "cell off"
            tip = f"<title>{html.escape(f'{name} → {heads[j]}: {count}')}</title>"
            parts.append(
                f'<rect class="{kind}" x="{x + 0.5:.1f}" y="{y + 0.5:.1f}" width="{side - 1}" '
                f'height="{side - 1}" fill-opacity="{0.06 + 0.94 * share if count else 0.04:.2f}">'
                f"{tip}</rect>"
            )
            if count:
                over = "over" if share > 0.55 else ""
                parts.append(
                    f'<text class="count {over}" x="{x + side / 2:.1f}" '
                    f'y="{y + (side + letter * 0.7) / 2:.1f}" style="font-size:{letter}px">'
                    f"{_short(count)}</text>"
                )
    width, height = left + side * len(heads) + 60, top + side * len(rows) + 6
    drawing = "".join(parts)
    return _figure(title, note, drawing, [], *table, size=(width, height), wide=True)


def _figure(
    title: str,
    note: str,
    drawing: str,
    keys: Sequence[tuple[str, str]],
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    size: tuple[float, float] = (WIDTH, HEIGHT),
    wide: bool = False,
) -> str:
    legend = "".join(
        f'<span><svg viewBox="0 0 26 10" aria-hidden="true">{mark}</svg>{html.escape(name)}</span>'
        for name, mark in keys
    )
    card = style = ""
    if wide:  # as large as it is, but never too small to read
        card = f' style="max-width:{max(size[0] + 40, 480):.0f}px"'
        style = f' style="max-width:{size[0]:.0f}px;min-width:{min(size[0], 560):.0f}px"'
    return (
        f'<figure class="chart"{card}><figcaption><b>{html.escape(title)}</b>{html.escape(note)}'
        f'</figcaption><div class="wide"><svg viewBox="0 0 {size[0]:.0f} {size[1]:.0f}"{style} '
        f'role="img" aria-label="{html.escape(title)}"><title>{html.escape(title)}</title>'
        f"<desc>{html.escape(note)}</desc>{drawing}</svg></div>"
        + (f'<p class="keys">{legend}</p>' if keys else "")
        + (f"<details><summary>Numbers</summary>{table(heads, rows)}</details>" if rows else "")
        + "</figure>"
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table; the first cell of a row is its head."""
    lines = ["<tr>" + "".join(f'<th scope="col">{html.escape(h)}</th>' for h in heads) + "</tr>"]
    for first, *rest in rows:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in rest)
        lines.append(f'<tr><th scope="row">{html.escape(first)}</th>{cells}</tr>')
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _frame(x: Axis, y: Axis, *, ticks: bool = True, drop: int = 38) -> str:
    """Grid, axes, ticks and names, the x axis's ``drop`` pixels below it."""
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for value in y.ticks():
        at = _y(y, value)
        parts.append(
            f'<line class="grid-line" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>'
        )
        parts.append(
            f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{y.text(value)}</text>'
        )
    for value in x.ticks() if ticks else ():
        at = _x(x, value)
        parts.append(
            f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
        )
        parts.append(_text(at, bottom + 16, x.text(value)))
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(_text((LEFT + right) / 2, bottom + drop, x.name))
    middle = (TOP + bottom) / 2
    parts.append(
        f'<text transform="translate(11 {middle:.1f}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(y.name)}</text>"
    )
    return "".join(parts)


def _path(x: Axis, y: Axis, points: Sequence[tuple[float, float]]) -> str:
    path, pen = [], "M"
    for a, b in points:
        if not math.isfinite(b):
            pen = "M"
            continue
        path.append(f"{pen}{_x(x, a):.1f} {_y(y, b):.1f}")
        pen = "L"
    return "".join(path)


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.place(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.place(value) * (HEIGHT - BOTTOM - TOP)


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">'
        f"{html.escape(text)}</text>"
    )


def _clip(name: str) -> str:
    return name if len(name) <= 22 else f"{name[:21]}…"


def _short(count: int) -> str:
    """At most four characters."""
    for limit, divisor, letter in ((10**4, 1, ""), (10**6, 10**3, "k"), (10**9, 10**6, "M")):
        if count < limit:
            return f"{count / divisor:.0f}{letter}"
    return f"{count:.0e}"
