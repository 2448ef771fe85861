"""Reports as tables: on the terminal and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from brefine.evaluate import Report

#: key in ``Report.values`` and head of each column of the tables
COLUMNS = {
    "mask/AP": "mask AP",
    "mask/AP50": "AP50",
    "mask/AP75": "AP75",
    "mask/AP_S": "AP small",
    "mask/AP_M": "AP medium",
    "mask/AP_L": "AP large",
    "boundary/AP": "boundary AP",
    "box/AP": "box AP",
    "given_boxes/mask_iou": "mask IoU, true boxes",
    "given_boxes/boundary_iou": "boundary IoU, true boxes",
}


def print_table(rows: Mapping[str, Report], console: Console) -> None:
    """Print reports, one row a method, in percent; the best of each column is bold."""
    keys, cells = table_cells(rows)
    # Fits 80 columns: heads broken at every space, no more than one space between columns.
    padding = (0, 1, 0, 0) if console.width >= 100 else 0
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=padding)
    table.add_column("percent", overflow="fold")
    for key in keys:
        table.add_column(COLUMNS[key].replace(" ", "\n"), justify="right", no_wrap=True)
    for name, row in cells.items():
        marked = (f"[bold]{text}[/]" if best else text for text, best in row)
        table.add_row(Text(name), *marked)
    console.print(table)


def print_classes(rows: Mapping[str, Report], console: Console) -> None:
    """Print mask, boundary and box AP of every class, in percent, a column for each method."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("percent", overflow="fold")
    table.add_column("objects", justify="right", no_wrap=True)
    kinds = [
        k for k in ("mask/AP", "boundary/AP", "box/AP") if any(k in r.values for r in rows.values())
    ]
    for kind in kinds:
        for name in rows:
            table.add_column(
                Text(COLUMNS[kind].replace(" ", "\n") + f"\n{name}"),
                justify="right",
                overflow="fold",
            )
    first = next(iter(rows.values()), None)
    for name, values in first.per_class.items() if first else ():
        cells = [_percent(rows[m].per_class[name].get(k)) for k in kinds for m in rows]
        table.add_row(Text(name), f"{values['objects']:.0f}", *cells)
    console.print(table)


def markdown(rows: Mapping[str, Report]) -> str:
    """The table of `print_table` in Markdown, ending in a line break."""
    keys, cells = table_cells(rows)
    lines = [["method", *(COLUMNS[key] for key in keys)], ["---", *("---:" for _ in keys)]]
    for name, row in cells.items():
        lines.append([name, *(f"**{text}**" if best else text for text, best in row)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def table_cells(
    rows: Mapping[str, Report],
) -> tuple[list[str], dict[str, list[tuple[str, bool]]]]:
    """What the tables show: the keys that any report has, and each report's cells.

    Returns:
        Keys of ``COLUMNS``, and by name a (text, is it the best of several) for each key.
    """
    keys = [key for key in COLUMNS if any(key in report.values for report in rows.values())]
    texts = {name: [_percent(rows[name].values.get(key)) for key in keys] for name in rows}
    cells: dict[str, list[tuple[str, bool]]] = {name: [] for name in rows}
    for i in range(len(keys)):
        column = [row[i] for row in texts.values()]
        figures = [float(text) for text in column if text != "-"]
        best = f"{max(figures):.1f}" if len(set(figures)) > 1 else None
        for name, text in zip(texts, column, strict=True):
            cells[name].append((text, text == best))
    return keys, cells


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"
