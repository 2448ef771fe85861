"""Models and results side by side, and what the pictures allow to say about their difference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from brefine.data.coco import CocoSet
from brefine.data.lvis import FREQUENCIES
from brefine.evaluate import look, open_path
from brefine.metrics import overlaps
from brefine.metrics.bootstrap import Difference, Sample, draw, interval
from brefine.metrics.mask_quality import Quality
from brefine.metrics.overlaps import KINDS, Floats, Ints
from brefine.predict import Predictor
from brefine.structures import InputError

#: the figures compared, and how they are called
FIGURES = {
    "mask/AP": "mask AP",
    "mask/AP50": "mask AP50",
    "mask/AP75": "mask AP75",
    "mask/AP_S": "mask AP small",
    "mask/AP_M": "mask AP medium",
    "mask/AP_L": "mask AP large",
    "mask/AP_r": "mask AP rare",
    "mask/AP_c": "mask AP common",
    "mask/AP_f": "mask AP frequent",
    "boundary/AP": "boundary AP",
    "box/AP": "box AP",
    "given_boxes/mask_iou": "mask IoU *",
    "given_boxes/boundary_iou": "boundary IoU *",
}


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        names: the systems; the first one is what the others are compared with.
        figures: for each system its differences by key of ``FIGURES``; absent where it or the
            first one has no such figure.
        pictures: how many there were.
        resamples: how often that many were drawn.
        seed: of the draws.
    """

    names: list[str]
    figures: list[dict[str, Difference]]
    pictures: int
    resamples: int
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: fractions 0..1, NaN becomes None."""

        def plain(found: Difference) -> dict[str, Any]:
            row = {**found._asdict(), "verdict": found.verdict}
            return {
                key: None if isinstance(value, float) and math.isnan(value) else value
                for key, value in row.items()
            }

        systems = [
            {"name": name, "figures": {key: plain(found) for key, found in figures.items()}}
            for name, figures in zip(self.names, self.figures, strict=True)
        ]
        about = {"pictures": self.pictures, "resamples": self.resamples, "seed": self.seed}
        return {**about, "systems": systems}


@dataclass(frozen=True)
class _Measured:
    """One system: its figures, how they vary, and what they rest on, by key of ``FIGURES``."""

    values: Mapping[str, float]
    draws: Mapping[str, Floats]
    pictures: Mapping[str, int]


def compare(
    paths: Sequence[Path],
    dataset: CocoSet,
    *,
    boundary: bool = True,
    resamples: int = 1000,
    seed: int = 0,
    limit: int | None = None,
) -> Comparison:
    """Compare model folders and files of COCO results (json) with the first of them.

    Args:
        paths: two or more.
        dataset: pictures and labels.
        boundary: also compute Boundary AP.
        resamples: draws of as many pictures, with replacement, the same for every system.
        seed: of the draws.
        limit: only the first so many pictures.

    Raises:
        InputError: no model, no results, or as in `evaluate.evaluate_paths`. What cannot be read
            is told before anything is computed.
    """
    sources = [open_path(path) for path in paths]
    pictures = len(dataset.pictures[:limit])
    counts = draw(pictures, resamples, seed)
    measured = []
    for path, source in zip(paths, sources, strict=True):
        try:
            measured.append(_measure(source, dataset, counts, boundary=boundary, limit=limit))
        except InputError as error:
            if isinstance(source, Predictor):
                raise
            raise InputError(f"{path}: {error}") from None
    first = measured[0]
    figures = []
    for system in measured:
        shared = [key for key in FIGURES if key in system.values and key in first.values]
        figures.append(
            {
                key: Difference(
                    system.values[key],
                    system.values[key] - first.values[key],
                    *interval(system.draws[key], first.draws[key]),
                    system.pictures[key],
                )
                for key in shared
            }
        )
    return Comparison([str(path) for path in paths], figures, pictures, resamples, seed)


def _measure(
    source: Predictor | list[dict[str, Any]],
    dataset: CocoSet,
    counts: Ints,
    *,
    boundary: bool,
    limit: int | None,
) -> _Measured:
    """Figures of one system on the whole set and on each draw."""
    weights = np.concatenate([np.ones((len(counts), 1), np.int64), counts], axis=1)
    found: dict[str, Floats] = {}
    pictures: dict[str, int] = {}
    records = source
    if isinstance(source, Predictor):
        seen = look(source, dataset, given_boxes=not source.exported, limit=limit)
        records = [record for each in seen for record in each.records]
        found = _resample_quality([each.objects for each in seen], weights)
        pictures = dict.fromkeys(found, sum(bool(each.objects) for each in seen))
    assert isinstance(records, list)
    federated = dataset.federated
    frequency = np.array(federated.frequency if federated else [])
    groups = {name: frequency == name for name in FREQUENCIES} if federated else {}
    kinds = KINDS if boundary else ("box", "mask")
    sample = Sample(len(dataset.categories), kinds, groups)
    for each in overlaps.compare(records, dataset, kinds=kinds, limit=limit, progress=True):
        sample.add(each)
    found |= sample.figures(weights, "draw")
    holding = sample.holding()
    pictures |= {key: holding.get(key.split("/")[1], holding["AP"]) for key in found if "AP" in key}
    return _Measured(
        {key: float(values[0]) for key, values in found.items()},
        {key: values[1:] for key, values in found.items()},
        pictures,
    )


def _resample_quality(objects: Sequence[Sequence[Quality]], weights: Ints) -> dict[str, Floats]:
    """Means over the objects of weighted pictures, ``[B]`` each; NaN where there is none."""
    sums = np.array([np.sum(np.reshape(each, (-1, 3)), 0) for each in objects]).reshape(-1, 3)
    number = np.array([len(each) for each in objects])
    with np.errstate(invalid="ignore"):
        mean = (sums[:, 1:].T @ weights) / (number @ weights)
    return {"given_boxes/mask_iou": mean[0], "given_boxes/boundary_iou": mean[1]}


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print a table for each system but the first, in percent; fits 80 columns."""
    first, name = comparison.figures[0], comparison.names[0]
    for title, figures in zip(comparison.names[1:], comparison.figures[1:], strict=True):
        console.print(Text(f"A  {name}\nB  {title}\n", overflow="fold"))
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for head in ("percent", "A", "B", "B - A", "95 % interval", "", "pictures"):
            left = head in ("percent", "")
            table.add_column(head, justify="left" if left else "right", no_wrap=True)
        for key, found in figures.items():
            table.add_row(
                FIGURES[key],
                _percent(first[key].value),
                _percent(found.value),
                _percent(found.difference, "+"),
                f"{_percent(found.low, '+')} to {_percent(found.high, '+')}",
                found.verdict,
                str(found.pictures),
            )
        console.print(table)
        if any("*" in FIGURES[key] for key in figures):
            console.print("* of the masks alone, in true boxes")
        console.print()
    console.print(
        f"{comparison.pictures} pictures; intervals from {comparison.resamples} draws of as many "
        f"with replacement, seed {comparison.seed}. They say how far other pictures could change "
        "the difference, not how far another training would."
    )


def _percent(value: float, sign: str = "") -> str:
    return "-" if math.isnan(value) else f"{100 * value:{sign}.1f}"
