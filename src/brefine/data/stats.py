"""What a labelled set is like, in figures, and what they suggest for training.

No picture is opened: everything comes from the labels' run lengths.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from brefine.data.coco import CocoSet
from brefine.data.convert import objects_of
from brefine.data.pictures import network_size
from brefine.outlines import trace
from brefine.progress import track
from brefine.rle import Runs

STRIDE = 4  # pixels of the network's input that a cell of the mask head's finest features covers
CELLS = (14, 28, 56)  # of the mask head's stages
CELL = 2  # pixels of the network's input that a cell of a 28 x 28 mask may cover
FEW = 10  # objects; a class with fewer is named
DETECTIONS = 100  # most that a model gives for a picture, by default
PERCENTILES = (5, 25, 50, 75, 95)
SHOWN = 20  # classes in the table


class _Object(NamedTuple):
    """One row of the table that everything is counted from; lengths in pixels."""

    picture: int
    label: int
    area: int
    x1: int
    y1: int
    x2: int
    y2: int
    parts: int
    holes: int


def stats(dataset: CocoSet, *, short_side: int = 800, long_side: int = 1333) -> dict[str, Any]:
    """Count and measure a labelled set.

    Args:
        dataset: pictures and labels.
        short_side: pixels of the short side at the network's input.
        long_side: most pixels of the long side there.

    Returns:
        Plain values, as they go into json. Shares are 0..1, of the objects unless said
        otherwise; sizes are the square roots of the masks' areas. ``too_small`` has, for each
        number of cells, the share of objects whose box is shorter on both sides at the network's
        input than ``STRIDE`` times that number: such a box does not fill them with features.
        ``advice`` is a list of lines.
    """
    rows: list[_Object] = []
    crowds = empties = labelled = shared = 0
    total = len(dataset)
    indices: Iterable[int] = range(total)
    for index in track(indices, "measuring", total) if total >= 1000 else indices:
        objects, crowd, empty = objects_of(dataset, index)
        crowds, empties = crowds + crowd, empties + empty
        for kind, runs in objects:
            rows.append(_Object(index, kind, runs.area(), *runs.box(), *_count_parts(runs)))
        once, twice = _cover([runs for _, runs in objects])
        labelled, shared = labelled + once, shared + twice

    table = np.array(rows, dtype=np.int64).reshape(-1, len(_Object._fields))
    picture, label, area, x1, y1, x2, y2, parts, holes = table.T
    sizes = np.array([p.size for p in dataset.pictures], dtype=np.int64).reshape(-1, 2)
    scale = np.array(
        [network_size(p.size, short_side, long_side)[0] / p.size[0] for p in dataset.pictures]
    )
    side = np.maximum(x2 - x1, y2 - y1) * scale[picture]
    border = (x1 == 0) | (y1 == 0) | (x2 == sizes[picture, 1]) | (y2 == sizes[picture, 0])
    a_picture = np.bincount(picture, minlength=total)
    a_class = np.bincount(label, minlength=len(dataset.categories))
    seen = np.unique(np.stack([label, picture], 1), axis=0)[:, 0]
    on_pictures = np.bincount(seen, minlength=len(dataset.categories))
    some = a_class[a_class > 0]
    figures: dict[str, Any] = {
        "pictures": total,
        "without_objects": int((a_picture == 0).sum()),
        "height": _spread(sizes[:, 0]),
        "width": _spread(sizes[:, 1]),
        "aspect": _spread(sizes[:, 1] / sizes[:, 0]),
        "network": {"short_side": short_side, "long_side": long_side, "scale": _spread(scale)},
        "objects": len(rows),
        "crowd_regions": crowds,
        "without_pixels": empties,
        "unusable": len(dataset.skipped),
        "objects_a_picture": {
            "mean": float(a_picture.mean()) if total else 0.0,
            "p95": float(np.percentile(a_picture, 95)) if total else 0.0,
            "max": int(a_picture.max(initial=0)),
        },
        "overlap_of_labelled_pixels": shared / labelled if labelled else 0.0,
        "classes": [
            {"id": c.id, "name": c.name, "objects": int(n), "pictures": int(p)}
            for c, n, p in zip(dataset.categories, a_class, on_pictures, strict=True)
        ],
        "imbalance": {
            "max_by_min": float(some.max() / some.min()) if len(some) else 1.0,
            "gini": gini(some),
        },
        "size": _percentiles(np.sqrt(area)),
        "network_size": _percentiles(np.sqrt(area) * scale[picture]),
        "too_small": {str(cells): _share(side < cells * STRIDE) for cells in CELLS},
        "at_border": _share(border),
        "several_parts": _share(parts > 1),
        "with_holes": _share(holes > 0),
    }
    return {**figures, "advice": advise(figures)}


def advise(figures: dict[str, Any]) -> list[str]:
    """What the figures suggest, one line each, the most pressing first.

    Args:
        figures: of ``stats``.
    """
    if not figures["objects"]:
        return ["there is no object to learn from"]
    lines = []
    short = figures["network"]["short_side"]
    typical = figures["network_size"]["p75"]
    if typical <= CELL * 28:
        lines.append(
            f"three quarters of the objects are below {typical:.0f} pixels at short side {short}: "
            "masks of 56 cells bring little: raise data.short_side, or set model.options.stages=2"
        )
    scale = figures["network"]["scale"]["median"]
    if scale < 0.5:
        lines.append(
            f"pictures are shrunk {1 / scale:.1f} times: raise data.short_side, or cut the "
            "pictures into tiles"
        )
    most = figures["objects_a_picture"]["max"]
    if most > DETECTIONS:
        lines.append(
            f"up to {most} objects a picture: raise model.options.detector.detections above "
            f"{DETECTIONS}"
        )
    counts = [(entry["name"], entry["objects"]) for entry in figures["classes"]]
    for text, names in (
        ("no object: add pictures, or leave it out", [n for n, c in counts if not c]),
        ("few objects", [f"{n} ({c})" for n, c in counts if 0 < c < FEW]),
    ):
        if names:
            kind = f"{len(names)} classes have" if len(names) > 1 else "a class has"
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            lines.append(f"{kind} {text}: {shown}")
    if figures["imbalance"]["max_by_min"] >= 20:
        shares = [e["pictures"] / figures["pictures"] for e in figures["classes"] if e["pictures"]]
        middle = float(f"{np.median(shares):.1g}")
        lines.append(
            f"the largest class has {figures['imbalance']['max_by_min']:.0f} times the objects of "
            f"the smallest: data.repeat_threshold={middle:g} shows pictures with classes that are "
            "on a smaller share of the pictures more often"
        )
    if figures["without_objects"] > figures["pictures"] / 2:
        share = figures["without_objects"] / figures["pictures"]
        lines.append(f"{share:.0%} of the pictures have no object: are their labels missing?")
    return lines


def gini(counts: ArrayLike) -> float:
    """Gini coefficient of counts: 0 if all are alike, near 1 if one class has nearly all."""
    ordered = np.sort(np.asarray(counts, dtype=np.float64))
    if not ordered.sum():
        return 0.0
    rank = np.arange(1, len(ordered) + 1)
    return float((2 * rank - len(ordered) - 1) @ ordered / (len(ordered) * ordered.sum()))


def _count_parts(runs: Runs) -> tuple[int, int]:
    """Parts (joined at corners, too) and holes of a mask that holds a pixel."""
    ends = runs.counts.cumsum()
    start, stop = ends[0:-1:2], ends[1::2]
    start, stop = start[start < stop], stop[start < stop]
    height = runs.size[0]
    column = start // height
    top, bottom = start - column * height, stop - column * height
    # Most masks have one run in each column, each touching the next one: one part, no hole.
    if (
        (bottom <= height).all()
        and (np.diff(column) == 1).all()
        and (top[1:] <= bottom[:-1]).all()
        and (top[:-1] <= bottom[1:]).all()
    ):
        return 1, 0
    parts = trace(runs.window()[0].numpy())
    return len(parts), sum(len(part) - 1 for part in parts)


def _cover(masks: Sequence[Runs]) -> tuple[int, int]:
    """Pixels of a picture under at least one of the masks, and under at least two."""
    if not masks:
        return 0, 0
    ends = [runs.counts.cumsum() for runs in masks]
    places = np.concatenate([end[parity::2] for parity in (0, 1) for end in ends])
    steps = np.ones(len(places), dtype=np.int64)
    steps[len(steps) // 2 :] = -1
    order = np.argsort(places, kind="stable")
    depth, length = steps[order].cumsum()[:-1], np.diff(places[order])
    return int(length[depth > 0].sum()), int(length[depth > 1].sum())


def _share(condition: NDArray[np.bool_]) -> float:
    return float(condition.mean()) if len(condition) else 0.0


def _spread(values: NDArray[Any]) -> dict[str, float]:
    if not len(values):
        return dict.fromkeys(("min", "median", "max"), 0.0)
    return {
        "min": float(values.min()),
        "median": float(np.median(values)),
        "max": float(values.max()),
    }


def _percentiles(values: NDArray[Any]) -> dict[str, float]:
    found = np.percentile(values, PERCENTILES) if len(values) else [0.0] * len(PERCENTILES)
    return {f"p{p}": float(value) for p, value in zip(PERCENTILES, found, strict=True)}


def print_stats(figures: dict[str, Any], console: Console) -> None:
    """The figures of ``stats`` as tables, and its advice."""
    table = Table(show_header=False)
    for name, value in _lines(figures):
        table.add_row(name, value)
    console.print(table)
    classes = sorted(figures["classes"], key=lambda entry: -entry["objects"])
    half = SHOWN // 2
    cut = len(classes) > SHOWN
    table = Table("class", "objects", "pictures")
    for column in table.columns[1:]:
        column.justify = "right"
    for entry in [*classes[:half], None, *classes[-half:]] if cut else classes:
        if entry is None:
            table.add_row(f"... {len(classes) - SHOWN} more ...", "", "")
        else:
            table.add_row(Text(entry["name"]), f"{entry['objects']:,}", f"{entry['pictures']:,}")
    console.print(table)
    for line in figures["advice"]:
        console.print(f"- {line}", markup=False, highlight=False, soft_wrap=True)


def _lines(figures: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """Name and text of each figure."""

    def spread(key: str, digits: int = 0) -> str:
        low, middle, high = figures[key].values()
        return f"{low:.{digits}f} to {high:.{digits}f}, median {middle:.{digits}f}"

    def percentiles(key: str) -> str:
        return " / ".join(f"{value:.0f}" for value in figures[key].values())

    network, crowding = figures["network"], figures["objects_a_picture"]
    yield "pictures", f"{figures['pictures']:,}, {figures['without_objects']:,} without objects"
    yield "height", spread("height")
    yield "width", spread("width")
    yield "width / height", spread("aspect", 2)
    yield "objects", f"{figures['objects']:,}"
    for key in ("crowd_regions", "without_pixels", "unusable"):
        if figures[key]:
            yield key.replace("_", " "), f"{figures[key]:,}"
    mean, high, most = crowding["mean"], crowding["p95"], crowding["max"]
    yield "objects a picture", f"{mean:.1f} on average, 95 % up to {high:.0f}, at most {most}"
    yield "labelled pixels under two objects", f"{figures['overlap_of_labelled_pixels']:.2%}"
    imbalance = figures["imbalance"]
    yield (
        "imbalance of the classes",
        f"largest / smallest {imbalance['max_by_min']:.0f}, Gini {imbalance['gini']:.2f}",
    )
    ranks = " / ".join(map(str, PERCENTILES))
    yield f"size in pixels, {ranks} %", percentiles("size")
    yield f"size at the network, {ranks} %", percentiles("network_size")
    yield "network's input", f"short side {network['short_side']}, long {network['long_side']}"
    for cells, share in figures["too_small"].items():
        yield f"box below {cells} cells ({int(cells) * STRIDE} pixels) there", f"{share:.0%}"
    yield "at the picture's border", f"{figures['at_border']:.0%}"
    yield "of several parts", f"{figures['several_parts']:.1%}"
    yield "with holes", f"{figures['with_holes']:.1%}"
