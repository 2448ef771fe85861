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
    "mask/AP_r": "AP rare",
    "mask/AP_c": "AP common",
    "mask/AP_f": "AP freq.",
    "boundary/AP": "boundary AP",
    "box/AP": "box AP",
    "given_boxes/mask_iou": "mask IoU, true boxes",
    "given_boxes/boundary_iou": "boundary IoU, true boxes",
    "cityscapes/AP": "official AP",
    "cityscapes/AP50": "official AP50",
}
#: what a dash in a table means
NONE = "- : no such object in the set"


def print_table(rows: Mapping[str, Report], console: Console) -> None:
    """Print reports, one row a method, in percent; the best of each column is bold.

    A dash is a figure for which there is no object; what was not measured is blank.
    """
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
    if any(text == "-" for row in cells.values() for text, _ in row):
        console.print(NONE)
    for name, report in rows.items():
        if "masks/touching" in report.values:
            share = _percent(report.values["masks/touching"])
            of = f" of {name}" if len(rows) > 1 else ""
            line = f"{share} % of the masks{of} reach the edge of their RoI"
            console.print(line, soft_wrap=True, markup=False)


def print_kinds(rows: Mapping[str, Report], console: Console) -> None:
    """Print every figure of average precision and recall, in percent: a table for each report."""
    dash = False
    for name, report in rows.items():
        kinds = [kind for kind in ("mask", "boundary", "box") if f"{kind}/AP" in report.values]
        keys = [key for key in report.values if kinds and key.startswith(f"{kinds[0]}/")]
        figures = sorted((key.split("/")[1] for key in keys), key=lambda figure: figure[:2])
        title = Text(name) if len(rows) > 1 else None
        padding = (0, 1, 0, 0) if console.width >= 100 else 0
        table = Table(
            box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=padding, title=title
        )
        table.add_column("percent")
        for figure in figures:
            table.add_column(figure.replace("_", "\n"), justify="right", no_wrap=True)
        for kind in kinds:
            cells = [_percent(report.values[f"{kind}/{figure}"]) for figure in figures]
            table.add_row(kind, *cells)
            dash |= "-" in cells
        if kinds:
            console.print(table)
    if dash:
        console.print(NONE)


def print_classes(rows: Mapping[str, Report], console: Console) -> None:
    """Print the AP of every class, in percent, a column for each kind and method."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("percent", overflow="fold")
    table.add_column("objects", justify="right", no_wrap=True)
    wanted = ("mask/AP", "boundary/AP", "box/AP", "cityscapes/AP", "cityscapes/AP50")
    kinds = [key for key in wanted if any(key in report.values for report in rows.values())]
    for kind in kinds:
        for name in rows:
            table.add_column(
                Text(COLUMNS[kind].replace(" ", "\n") + f"\n{name}"),
                justify="right",
                overflow="fold",
            )
    first, dash = next(iter(rows.values()), None), False
    for name, values in first.per_class.items() if first else ():
        cells = [_percent(rows[m].per_class.get(name, {}).get(k)) for k in kinds for m in rows]
        table.add_row(Text(name), f"{values['objects']:.0f}", *cells)
        dash |= "-" in cells
    console.print(table)
    if dash:
        console.print(NONE)


def print_thresholds(rows: Mapping[str, Report], console: Console) -> None:
    """Print for each method the thresholds of its classes, what they keep, and calibration."""
    for name, report in rows.items():
        console.print(Text(name, overflow="fold"))
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("percent", overflow="fold")
        for head in ("objects", "threshold", "probability", "F1", "precision", "recall"):
            table.add_column(head, justify="right", no_wrap=True)
        objects = sum(values["objects"] for values in report.per_class.values())
        together = {"objects": objects, "threshold": report.overall, **report.values}
        classes = {**report.per_class, "one threshold for all": together}
        for title, values in classes.items():
            limit = values["threshold"]
            keys = ("threshold/F1", "threshold/precision", "threshold/recall")
            cells = [f"{values['objects']:.0f}", f"{limit:.3f}"]
            told = not math.isnan(report.values["calibration/error"])  # else no map was fitted
            cells.append(_percent(float(report.calibration(limit)) if told else None))
            table.add_row(Text(title), *cells, *(_percent(values[key]) for key in keys))
        console.print(table)
        error, mapped = (report.values[f"calibration/{k}"] for k in ("error", "error_mapped"))
        console.print(
            f"calibration error: {_percent(error)} as scored, {_percent(mapped)} with a map "
            "fitted on the other half of the pictures"
        )


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
        figures = [float(text) for text in column if text not in ("", "-")]
        best = f"{max(figures):.1f}" if len(set(figures)) > 1 else None
        for name, text in zip(texts, column, strict=True):
            cells[name].append((text, text == best))
    return keys, cells


def _percent(value: float | None) -> str:
    """Nothing for what was not measured, a dash where there is no object."""
    if value is None:
        return ""
    return "-" if math.isnan(value) else f"{100 * value:.1f}"
