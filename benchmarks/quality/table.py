"""The tables of docs/quality.md and its picture, from the stored results of study.py.

    python benchmarks/quality/table.py [--results FOLDER] [--docs FILE]

Cells that were not run yet are left out, and a method without any has no row. A figure is the
mean over seeds, with the standard deviation behind it where there are several. A difference is
taken seed by seed.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from study import CHANGES, HERE, MAIN, RATES, SETS, STUDY, VARIANTS, Cell

from brefine.files import replacing
from brefine.metrics.tables import COLUMNS
from brefine.progress import clock
from brefine.reproduce import figures_of, plot, subtract
from brefine.structures import InputError

MARKERS = "<!-- study: begin -->", "<!-- study: end -->"
KEYS = [
    *("mask/AP", "mask/AP_S", "mask/AP_M", "mask/AP_L", "boundary/AP", "box/AP"),
    *("given_boxes/mask_iou", "given_boxes/boundary_iou"),
]
TITLES = {
    "mask_rcnn": "Mask R-CNN",
    "brefine": "BRefine",
    "rs_mask_rcnn": "RS Mask R-CNN",
    "multistage": "multistage, BCE",
    "light": "BRefine, light head",
}

Results = dict[Cell, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results" / STUDY)
    parser.add_argument("--docs", type=Path, default=HERE.parents[1] / "docs/quality.md")
    options = parser.parse_args()
    results = load(options.results)
    if not results:
        raise SystemExit(f"error: {options.results}: no results: run study.py first")
    text = tables(results)
    print(text)
    picture = options.docs.parent / "images/quality.svg"
    page = options.docs.read_text(encoding="utf-8")
    try:
        filled = fill(page, text, str(options.docs))
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
    with replacing(options.docs) as aside:
        aside.write_text(filled, encoding="utf-8")
    with replacing(picture) as aside:
        aside.write_text(draw(results), encoding="utf-8")


def load(folder: Path) -> Results:
    """Results by cell; files of variants that the study does not have are left out."""
    found = {}
    for file in sorted(folder.glob("*.json")):
        name, variant, seed = file.stem.split("-")
        if variant in VARIANTS:
            found[Cell(name, variant, int(seed))] = json.loads(file.read_text(encoding="utf-8"))
    return found


def fill(page: str, text: str, name: str, markers: tuple[str, str] = MARKERS) -> str:
    """A page with the text between its markers.

    Raises:
        InputError: it does not have both.
    """
    begin, end = markers
    found = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    if not found.search(page):
        raise InputError(f"{name}: no lines {begin} and {end}")
    return found.sub(lambda _: f"{begin}\n{text}\n{end}", page)


def tables(results: Results) -> str:
    """Everything that the page shows, as Markdown."""
    parts = [provenance(results), "![Methods side by side](images/quality.svg)"]
    for name in [name for name in SETS if any(cell.set == name for cell in results)]:
        parts.append(f"### {name}")
        parts.append(main_table(results, name))
        if differences := difference_table(results, name, [v for v in MAIN if v != "mask_rcnn"]):
            parts.append(f"Difference to Mask R-CNN, of the same seed:\n\n{differences}")
        if changes := difference_table(results, name, [*RATES, *CHANGES]):
            parts.append(
                f"One change at a time, difference to the method it is made in:\n\n{changes}"
            )
        if both := changed_alike(results, name):
            parts.append(f"BRefine minus Mask R-CNN, both with the same change:\n\n{both}")
    return "\n\n".join(parts)


def provenance(results: Results) -> str:
    """What the figures depend on: settings, versions, code, machine."""

    def several(values: Sequence[Any]) -> str:
        return ", ".join(sorted({str(value) for value in values}))

    each = list(results.values())
    versions = {
        name: several([one["versions"][name] for one in each])
        for name in ("brefine", "torch", "torchvision", "timm", "lightning", "python")
    }
    plain = [one for cell, one in results.items() if cell.variant in MAIN]
    recipe = plain[0]["recipe"] if plain else each[0]["recipe"]
    training, options = recipe["train"], recipe["model"]["options"]
    return (
        f"{len(each)} runs. Trunk {options['backbone']} from {recipe['model']['weights']} weights, "
        f"{options['channels']} channels, {training['steps']} steps of {training['batch_size']} "
        f"pictures, {training['optimizer']}, learning rate {training['lr']:g}, "
        f"{training['schedule']}. "
        + ", ".join(f"{name} {value}" for name, value in versions.items())
        + f"; code {several([one['commit'] for one in each])}; "
        f"{several([one['machine'] for one in each])}, "
        f"{several([one['threads'] for one in each])} thread a run."
    )


def main_table(results: Results, name: str) -> str:
    """The methods on a set: mean and standard deviation over seeds, in percent."""
    rows = []
    for variant in MAIN:
        mine = [one for cell, one in results.items() if cell[:2] == (name, variant)]
        if mine:
            found = [figures_of(one, KEYS) for one in mine]
            # of a run that was gone on with, only the time since is known
            times = [one["cpu_seconds"] for one in mine if not one["resumed"]]
            minutes = clock(statistics.mean(times)) if times else "-"
            rows.append([TITLES[variant], str(len(mine)), *summary(found), minutes])
    return markdown(["method", "seeds", *(COLUMNS[key] for key in KEYS), "CPU time"], rows)


def difference_table(results: Results, name: str, variants: Sequence[str]) -> str:
    """Variants on a set minus what they are compared with, seed by seed; empty without any."""
    rows = []
    for variant in variants:
        base = base_of(variant)
        pairs = [
            subtract(figures_of(one, KEYS), figures_of(results[cell._replace(variant=base)], KEYS))
            for cell, one in results.items()
            if cell[:2] == (name, variant) and cell._replace(variant=base) in results
        ]
        if pairs:
            title = TITLES.get(variant) or f"`{variant}`: {changed(variant)}"
            rows.append([title, str(len(pairs)), *summary(pairs, signed=True)])
    return markdown(["", "seeds", *(COLUMNS[key] for key in KEYS)], rows) if rows else ""


def changed_alike(results: Results, name: str) -> str:
    """BRefine minus Mask R-CNN where one thing was changed in both; empty without any."""
    ours = {tuple(v[1]): key for key, v in (RATES | CHANGES).items() if base_of(key) == "brefine"}
    rows = []
    for variant, (_, settings) in (RATES | CHANGES).items():
        if base_of(variant) == "mask_rcnn" and tuple(settings) in ours:
            same = ours[tuple(settings)]
            pairs = [
                subtract(figures_of(one, KEYS), figures_of(results[other], KEYS))
                for cell, one in results.items()
                if cell[:2] == (name, same) and (other := cell._replace(variant=variant)) in results
            ]
            if pairs:
                rows.append([in_words(settings), str(len(pairs)), *summary(pairs, signed=True)])
    return markdown(["", "seeds", *(COLUMNS[key] for key in KEYS)], rows) if rows else ""


def base_of(variant: str) -> str:
    """The variant that one is compared with."""
    of_brefine = VARIANTS[variant][0] == MAIN["brefine"][0]
    return "brefine" if variant not in MAIN and of_brefine else "mask_rcnn"


def changed(variant: str) -> str:
    """What a variant changes, in which method."""
    return f"{TITLES[base_of(variant)]} with {in_words(VARIANTS[variant][1])}"


def in_words(settings: Sequence[str]) -> str:
    """Settings without what they all begin with."""
    text = ", ".join(each.rpartition("model.options.")[2] for each in settings)
    return text.replace("{mask_rcnn}", "the trained Mask R-CNN")


def summary(found: Sequence[Mapping[str, float | None]], *, signed: bool = False) -> list[str]:
    """Mean and standard deviation of each figure as text; ``-`` where a run has none."""
    texts = []
    for key in KEYS:
        values = [value for each in found if (value := each[key]) is not None]
        if len(values) < len(found):
            texts.append("-")
            continue
        mean = statistics.mean(values)
        text = f"{mean:+.1f}" if signed else f"{mean:.1f}"
        texts.append(text + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""))
    return texts


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text."""
    lines = [heads, ["---", *("---:" for _ in heads[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(results: Results) -> str:
    """A dot for each run of the methods: mask and Boundary AP, and boundary IoU in true boxes."""
    shown = {key: COLUMNS[key] for key in ("mask/AP", "boundary/AP", "given_boxes/boundary_iou")}
    rows: dict[str, dict[str, list[float]]] = {}
    for name in SETS:
        for variant in MAIN:
            mine = [one for cell, one in results.items() if cell[:2] == (name, variant)]
            for title, key in ((title, key) for key, title in shown.items()):
                values = [v for one in mine if (v := figures_of(one, [key])[key]) is not None]
                if values:
                    row = rows.setdefault(f"{name}: {TITLES[variant]}", {})
                    row[title.replace(", true boxes", "")] = values
    return plot("Methods side by side, a dot a seed (percent)", rows)


if __name__ == "__main__":
    main()
