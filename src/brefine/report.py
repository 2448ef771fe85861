"""The page of `brefine evaluate --report`: what the figures are made of, in one HTML file.

One function for each section of it. What they show is collected by `metrics.findings`; charts are
drawn by `charts`, overlays and zooms by `draw`.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from brefine import __version__, draw
from brefine.charts import STYLE, Axis, Line, Span, columns, heat, lines
from brefine.data.coco import CocoSet
from brefine.data.loader import read_picture
from brefine.evaluate import Report
from brefine.files import replacing
from brefine.metrics.average_precision import IOUS, RECALLS, Curves, figures
from brefine.metrics.boundary import Mask
from brefine.metrics.calibration import BINS, calibration_error
from brefine.metrics.errors import BOUNDARY, ERRORS, ErrorTally, Example
from brefine.metrics.findings import Findings, Rating, gather, plain
from brefine.metrics.overlaps import SIZES, Floats, Ints
from brefine.metrics.profile import MOST, PERCENT, PIXELS, Profile, cut
from brefine.structures import InputError

SHOWN = 3  # of the best and of the worst pictures
CLASSES = 30  # in the confusion matrix
#: pixels of the longer side and bytes of a picture and of an example in the page
WIDEST, SMALL = 560, 240
MOST_BYTES, FEW_BYTES = 90_000, 24_000
SIDES = (0, 16, 32, 64, 96, 192, 384, 10**9)  # of objects: the square root of their area

#: key after ``mask/`` and the like, and what the figure means
MEANING = {
    "AP": "mean over ten IoUs, 0.50 to 0.95, and over the classes",
    "AP50": "at IoU 0.50: was the object found at all",
    "AP75": "at IoU 0.75: was it found precisely",
    "AP_S": "small objects: below 32² pixels",
    "AP_M": "medium objects: 32² to 96² pixels",
    "AP_L": "large objects: from 96² pixels on",
    "AP_r": "rare classes: in at most 10 training pictures",
    "AP_c": "common classes: in 11 to 100",
    "AP_f": "frequent classes: in more than 100",
    "AR1": "recall with one detection a picture and class",
    "AR10": "recall with at most ten",
    "AR100": "recall with at most a hundred",
    "AR300": "recall with at most 300 detections a picture",
    "AR_S": "recall of small objects",
    "AR_M": "recall of medium objects",
    "AR_L": "recall of large objects",
}

#: what is wrong with each kind of error
WRONG = {
    "classification": "good mask, wrong class: IoU of 0.5 or more with an object of another class",
    "localisation": "right class, poor mask: IoU of 0.1 to 0.5 with an object of its class",
    "both": "wrong class and poor mask: IoU of 0.1 to 0.5 with an object of another class",
    "duplicate": "an object that a better score had found already",
    "background": "nothing there: IoU below 0.1 with every object",
    "missed": "an object that nothing found, no wrong class or poor mask either",
    "boundary": "found, but the outline is off: Boundary IoU below 0.5",
}


def write(
    path: Path | str,
    name: str,
    report: Report,
    dataset: CocoSet,
    *,
    limit: int | None = None,
    progress: bool = True,
) -> None:
    """Write the page of one model or results file.

    Args:
        path: the HTML file to write.
        name: of the model or the results.
        report: its evaluation, with detections.
        dataset: pictures and labels. Where a picture cannot be read, outlines lie on gray.
        limit: only the first so many pictures, as in the evaluation.
        progress: show a bar with an ETA on stderr.

    Raises:
        InputError: the report has no figures of detections, or the file cannot be written.
    """
    if "mask/AP" not in report.values:
        raise InputError("a report is about what a model detects: measure that, too")
    found = gather(report.records, report.thresholds, dataset, limit=limit, progress=progress)
    pictures = _Pictures(dataset, report)
    sections = {
        "Summary": _summary(report, found),
        "What AP is lost to": _errors(found),
        "Curves": _curves(report, found),
        "Boundaries": _boundaries(found.profile),
        "Classes": _classes(report, found),
        "Best and worst pictures": _panels(found.ratings, pictures),
        "Examples of errors": _examples(found.errors, pictures),
    }
    count = len(dataset.pictures[:limit])
    objects = int(found.errors.confusion[:-1].sum())
    header = (
        f"<header><h1>Evaluation of {html.escape(name)}</h1>"
        f"<p>On {html.escape(str(dataset.path))}: {count:,} pictures, {objects:,} objects, "
        f"{len(dataset.categories):,} classes, {len(found.scores):,} detections. "
        "All figures are percent unless they say otherwise.</p>"
        "<nav>"
        + "".join(f'<a href="#{_anchor(title)}">{title}</a>' for title in sections)
        + "</nav></header>"
    )
    body = [header] + [
        f'<section id="{_anchor(title)}"><h2>{title}</h2>{content}</section>'
        for title, content in sections.items()
    ]
    body.append(f"<footer><p>Made by brefine {__version__}.{pictures.excuse()}</p></footer>")
    with replacing(path) as aside:
        aside.write_text(draw.page(f"Evaluation of {name}", body, STYLE + _STYLE), encoding="utf-8")


# --- sections ------------------------------------------------------------------------------------


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _summary(report: Report, found: Findings) -> str:
    kept, right = found.hits.sum(0).tolist()
    objects = int(found.errors.confusion[:-1].sum())
    precision = right / kept if kept else math.nan
    recall = right / objects if objects else math.nan
    f1 = 2 * right / (kept + objects) if objects else math.nan
    boundary = figures(found.curves["boundary"])["AP"]
    tiles = [
        ("mask AP", draw.percent(report.values["mask/AP"]), "masks, ten IoUs"),
        ("Boundary AP", draw.percent(boundary), "masks and their outlines"),
        ("mask AP50", draw.percent(report.values["mask/AP50"]), "found at all"),
        ("precision", draw.percent(precision), "right, of what is kept"),
        ("recall", draw.percent(recall), "found, of all objects"),
        ("F1", draw.percent(f1), "of the two"),
    ]
    cards = "".join(
        f'<div class="tile"><dt>{label}</dt><dd>{value}</dd><span>{note}</span></div>'
        for label, value, note in tiles
    )
    kinds = [kind for kind in ("mask", "boundary", "box") if f"{kind}/AP" in report.values]
    heads = {"mask": "mask", "boundary": "boundary", "box": "box"}
    rows = [
        "<tr><th>figure</th>" + "".join(f"<th>{heads[k]}</th>" for k in kinds) + "<th></th></tr>"
    ]
    for key, meaning in MEANING.items():
        if f"mask/{key}" in report.values:
            cells = "".join(f"<td>{_value(report.values.get(f'{k}/{key}'))}</td>" for k in kinds)
            rows.append(
                f'<tr><th scope="row">{key}</th>{cells}<td class="text">{meaning}</td></tr>'
            )
    extra = []
    if "given_boxes/mask_iou" in report.values:
        for size, words in (
            ("", "all objects"),
            ("_S", "small"),
            ("_M", "medium"),
            ("_L", "large"),
        ):
            values = [
                _value(report.values.get(f"given_boxes/{kind}{size}"))
                for kind in ("mask_iou", "boundary_iou")
            ]
            extra.append(
                f'<tr><th scope="row">{words}</th><td>{values[0]}</td><td>{values[1]}</td></tr>'
            )
    given = (
        "<div><h3>Masks in true boxes</h3><p class=note>What the mask head makes of the labelled "
        "boxes and classes: its own quality, the detector left out.</p>"
        '<table class="plain"><tr><th>mean IoU</th><th>mask</th><th>boundary</th></tr>'
        f"{''.join(extra)}</table></div>"
        if extra
        else ""
    )
    official = ""
    if "cityscapes/AP" in report.values:
        values = [_value(report.values.get(f"cityscapes/{key}")) for key in ("AP", "AP50")]
        official = (
            f"<p class=note>Official score of Cityscapes: AP {values[0]}, AP50 {values[1]}.</p>"
        )
    return (
        f'<dl class="tiles">{cards}</dl>'
        '<p class="note">Precision, recall and F1 are those of the detections kept, which score at '
        "least the threshold of their class. Right is a mask IoU of 0.5 or more.</p>"
        f'<div class="pair"><div class="wide"><table class="plain">{"".join(rows)}</table></div>'
        f"{given}</div>"
        '<p class="note"><b>boundary</b> is Boundary AP: the smaller of mask IoU and the IoU of '
        "two bands along the outlines, 2 % of the picture's diagonal wide, has to be enough. "
        "<b>-</b> means that the labels have no such object; it enters no mean.</p>"
        f"{official}"
    )


def _value(value: float | None) -> str:
    return "" if value is None else draw.percent(value)


def _errors(found: Findings) -> str:
    tally = found.errors
    costs, now = tally.costs(), tally.ap50()
    kept, every = tally.counts[1], tally.counts[0]
    most = max(int(kept.max()), 1)
    highest = max([cost for cost in costs.values() if not math.isnan(cost)], default=0.0) or 1.0
    heads = ("kind", "at thresholds", "", "at any score", "AP50 lost", "", "")
    rows = ["<tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    for i, (kind, cost) in enumerate(costs.items()):
        share = 0.0 if math.isnan(cost) else max(cost, 0.0) / highest
        rows.append(
            f'<tr><th scope="row">{kind}</th><td>{kept[i]:,}</td>{_bar(kept[i] / most, "c4")}'
            f"<td>{every[i]:,}</td><td><b>{draw.percent(cost)}</b></td>"
            f"{_bar(share, 'c1' if i == BOUNDARY else 'c0')}"
            f'<td class="text">{WRONG[kind]}</td></tr>'
        )
    mask, boundary = (figures(found.curves[kind])["AP"] for kind in ("mask", "boundary"))
    gap = "-" if math.isnan(mask) else f"{100 * (mask - boundary):.1f}"
    return (
        f'<p class="note">Mask AP at IoU 0.50 is {draw.percent(now)}. For each kind of error: how '
        "many there are, among the detections kept at the thresholds and among all, and how many "
        "points of AP50 would be gained if errors of this kind alone were mended. The points need "
        "not add up to what is missing: one mended error can uncover another.</p>"
        f'<div class="wide"><table class="plain kinds" aria-label="Kinds of errors">{"".join(rows)}'
        "</table></div>"
        '<p class="note">The last kind costs AP only where outlines count: mask AP50 less Boundary '
        f"AP50. Over all ten IoUs outlines cost <b>{gap}</b> points: mask AP {draw.percent(mask)}, "
        f"Boundary AP {draw.percent(boundary)}.</p>"
    )


def _bar(share: float, style: str) -> str:
    return f'<td class="meter"><i class="{style}" style="width:{100 * share:.1f}%"></i></td>'


def _curves(report: Report, found: Findings) -> str:
    return (
        '<div class="charts">'
        + _precision_recall(found.curves)
        + _by_iou(found.curves)
        + _calibration(report, found)
        + _by_size(report)
        + "</div>"
    )


def _precision_recall(curves: Mapping[str, Curves]) -> str:
    drawn = []
    for kind, style in (("mask", "c0"), ("boundary", "c1")):
        whole = curves[kind].precision[..., 0]  # [T, R, K]
        whole = whole[:, :, ~np.isnan(whole[0, 0])]
        for name, dash, chosen in (
            ("mean", "", slice(None)),
            ("IoU 0.75", " thin dash", slice(5, 6)),
            ("IoU 0.50", " thin dots", slice(0, 1)),
        ):
            values = whole[chosen].mean((0, 2)) if whole.shape[2] else np.full(len(RECALLS), np.nan)
            points = list(zip(RECALLS.tolist(), values.tolist(), strict=True))
            drawn.append(Line(f"{kind}, {name}", points, style + dash))
    return lines(
        "Precision and recall",
        "How much of what is detected is right, as ever lower scores are let in. The area below "
        "a line is its AP; a mean over classes.",
        Axis("recall, %"),
        Axis("precision, %"),
        drawn,
    )


def _by_iou(curves: Mapping[str, Curves]) -> str:
    drawn = []
    for kind, style in (("mask", "c0"), ("boundary", "c1")):
        values = [_mean(curves[kind].precision[t, ..., 0]) for t in range(len(IOUS))]
        points = [(round(float(iou), 2), v) for iou, v in zip(IOUS, values, strict=True)]
        drawn.append(Line("mask AP" if kind == "mask" else "Boundary AP", points, style, True))
    return lines(
        "AP at each IoU",
        "How much AP is left when masks have to be better. Between the lines: what outlines cost.",
        Axis("IoU needed", 0.5, 0.95, percent=False),
        Axis("AP, %"),
        drawn,
    )


def _mean(values: Floats) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if there.size else math.nan


def _calibration(report: Report, found: Findings) -> str:
    scores, right = found.scores, found.right
    title = "Score and truth"
    if not len(scores) or scores.min() < 0 or scores.max() > 1:
        words = "no detections" if not len(scores) else "scores outside 0..1"
        return (
            f'<figure class="chart"><figcaption><b>{title}</b>How often a detection of a score is '
            f"right: there is nothing to show, {words}.</figcaption></figure>"
        )
    bins = np.minimum((scores * BINS).astype(np.int64), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    hits = np.bincount(bins, weights=right, minlength=BINS)
    means = np.bincount(bins, weights=scores, minlength=BINS)
    some = np.flatnonzero(counts)
    points = [(round(means[b] / counts[b], 4), hits[b] / counts[b]) for b in some.tolist()]
    back = [(b / BINS, (b + 1) / BINS, 0.3 * counts[b] / counts.max()) for b in range(BINS)]
    rows = [
        [
            f"{b / BINS:.2f} to {(b + 1) / BINS:.2f}",
            f"{counts[b]:,}",
            f"{score:.3f}",
            f"{100 * y:.1f}",
        ]
        for b, (score, y) in zip(some.tolist(), points, strict=True)
    ]
    drawn = [Line("all classes", points, "c0", True)]
    error = draw.percent(calibration_error(scores, right))
    if "calibration/error_mapped" in report.values:
        error += f", and {draw.percent(report.values['calibration/error_mapped'])} once mapped"
        knots = zip(report.calibration.scores, report.calibration.probabilities, strict=True)
        drawn.append(Line("map to probabilities", [(round(x, 4), y) for x, y in knots], "c2 thin"))
    return lines(
        title,
        "How often a detection of a score is right (finds its object at mask IoU 0.5). Below the "
        f"dashed line scores are too high. Expected calibration error: {error}.",
        Axis("score", percent=False),
        Axis("right, %"),
        drawn,
        guide=[(0, 0), (1, 1)],
        guide_name="a score that is a probability",
        back=back,
        back_name="share of the detections",
        numbers=(["scores", "detections", "mean score", "right, %"], rows),
    )


def _by_size(report: Report) -> str:
    groups = {"_S": "small", "_M": "medium", "_L": "large"}
    series = []
    for kind, name, style in (
        ("mask", "mask AP", "c0"),
        ("boundary", "Boundary AP", "c1"),
        ("box", "box AP", "c4"),
    ):
        values = [report.values.get(f"{kind}/AP{size}", math.nan) for size in groups]
        if f"{kind}/AP" in report.values:
            series.append((name, style, [Span(0, v) for v in values]))
    return columns(
        "AP by the size of objects",
        "Small is below 32² pixels of the picture, large from 96² on.",
        list(groups.values()),
        Axis("AP, %"),
        series,
        x_name="size of the object",
    )


def _boundaries(profile: Profile) -> str:
    note = (
        '<p class="note">Of the detections kept that found their object: where their '
        "masks are wrong, and how good they are on objects of each size. Wrong pixels are those of "
        f"the first {MOST:,} objects of each size.</p>"
    )
    if not profile.areas:
        return f"{note}<p>No detection found an object: there is nothing to show.</p>"
    return (
        f'{note}<div class="charts three">'
        + _rings(
            profile.pixels,
            PIXELS,
            Axis("pixels from the true outline: inside (left), outside (right)", percent=False),
            "Wrong pixels by distance",
            "Share of the pixels at a distance from the true outline that are wrong: left of the "
            "middle those that the mask lacks, right of it those that it has too many.",
        )
        + _rings(
            profile.percent,
            PERCENT,
            Axis("% of the object's diagonal: inside (left), outside (right)", percent=False),
            "Wrong pixels by relative distance",
            "The same, at distances relative to the diagonal of the object's box: whether large "
            "objects are worse, or just larger.",
        )
        + _ious_by_size(profile)
        + "</div>"
    )


def _rings(counts: Ints, edges: Sequence[int], x: Axis, title: str, note: str) -> str:
    """Wrong pixels against signed distance, one line a size."""
    drawn, highest = [], 0.0
    names = {"": "all", "_S": "small", "_M": "medium", "_L": "large"}
    styles = ("c0", "c2 thin", "c3 thin", "c4 thin")
    for a, size in enumerate(SIZES):
        points = []
        for side, sign in ((0, -1), (1, 1)):
            for i, edge in enumerate(edges):
                pixels, wrong = counts[a, side, i].tolist()
                value = wrong / pixels if pixels else math.nan
                highest = max(highest, 0.0 if math.isnan(value) else value)
                points.append((sign * (edge - 0.5), value))
        drawn.append(Line(names[size], sorted(points), styles[a]))
    top = max(0.05, math.ceil(highest * 20) / 20)
    reach = float(edges[-1])
    return lines(
        title,
        note,
        Axis(x.name, -reach, reach, percent=False),
        Axis("wrong pixels, %", 0, top),
        drawn,
        guide=[(0, 0), (0, top)],
        guide_name="the true outline",
    )


def _ious_by_size(profile: Profile) -> str:
    sides = np.sqrt(np.array(profile.areas))
    groups, spans = [], {"mask": [], "boundary": []}  # type: ignore[var-annotated]
    values = {"mask": np.array(profile.mask_ious), "boundary": np.array(profile.boundary_ious)}
    counts = []
    for low, high in pairwise(SIDES):
        inside = (sides >= low) & (sides < high)
        groups.append(f"{low}–{high}" if high < SIDES[-1] else f"{low}+")
        counts.append(int(inside.sum()))
        for kind, ious in values.items():
            mine = ious[inside]
            quarters = np.quantile(mine, (0.25, 0.75, 0.5)).tolist() if len(mine) else None
            spans[kind].append(Span(*quarters) if quarters else None)
    return columns(
        "IoU by the size of objects",
        "Median, and the middle half of the objects, by the square root of the area in pixels; "
        "below it the number of objects.",
        groups,
        Axis("IoU, %"),
        [("mask IoU", "c0", spans["mask"]), ("Boundary IoU", "c1", spans["boundary"])],
        x_name="square root of the area, pixels",
        counts=counts,
    )


def _classes(report: Report, found: Findings) -> str:
    confusion = found.errors.confusion
    kinds = {
        "mask/AP": "mask AP",
        "mask/AP50": "AP50",
        "boundary/AP": "Boundary AP",
        "box/AP": "box AP",
        "cityscapes/AP": "official AP",
    }
    kinds = {key: name for key, name in kinds.items() if key in report.values}
    rows = []
    for i, (name, values) in enumerate(report.per_class.items()):
        kept, right = found.hits[i].tolist()
        objects = int(confusion[i].sum())
        cells = [_value(values.get(key)) for key in kinds]
        cells += [
            f"{report.thresholds[i]:.2f}",
            draw.percent(right / kept if kept else math.nan),
            draw.percent(right / objects if objects else math.nan),
        ]
        ap = values["mask/AP"]
        share = 0.0 if math.isnan(ap) else ap
        row = "".join(f"<td>{cell}</td>" for cell in cells[1:])
        line = (
            f'<tr><th scope="row">{html.escape(name)}</th><td>{objects:,}</td>'
            f"<td>{cells[0]}</td>{_bar(share, 'c0')}{row}</tr>"
        )
        rows.append((math.isnan(ap), -share, i, line))
    heads = [*kinds.values(), "threshold", "precision", "recall"]
    head = "".join(f"<th>{name}</th>" for name in heads[1:])
    table = f"<tr><th>class</th><th>objects</th><th>{heads[0]}</th><th></th>{head}</tr>" + "".join(
        line for *_, line in sorted(rows)
    )
    return (
        '<p class="note">From the best mask AP to the worst. Precision and recall are those of the '
        "detections that are kept at the class's threshold, at mask IoU 0.5.</p>"
        '<div class="pair"><div class="wide tall"><table class="plain" aria-label="Classes">'
        f"{table}</table></div>{_confusion(confusion, list(report.per_class))}</div>"
    )


def _confusion(counts: Ints, names: Sequence[str]) -> str:
    """The matrix, of the classes with most mistakes if there are too many."""
    right = np.diag(counts).copy()
    right[-1] = 0
    mistakes = (counts.sum(0) + counts.sum(1) - 2 * right)[:-1]
    chosen = np.arange(len(names))
    note = "Rows: what an object is. Columns: what it was taken for, by detections that are kept."
    if len(names) > CLASSES:
        chosen = np.sort(np.argsort(-mistakes, kind="stable")[:CLASSES])
        note += f" The {CLASSES} classes with most mistakes; all others are one, right or mixed up."
    labels = [names[i] for i in chosen.tolist()]
    groups = np.full(len(names) + 1, len(labels))  # where each class goes in the matrix
    groups[chosen] = np.arange(len(labels))
    if len(names) > len(labels):
        labels.append("all others")
    groups[-1] = len(labels)
    shown = np.zeros((len(labels) + 1, len(labels) + 1), dtype=np.int64)
    np.add.at(shown, (groups[:, None], groups[None]), counts)
    off = counts - np.diag(right)
    rows, columns_ = np.nonzero(off)
    order = np.argsort(-off[rows, columns_], kind="stable")[:60]
    true_names, found_names = [*names, "(nothing there)"], [*names, "(missed)"]
    listed = [
        [true_names[rows[i]], found_names[columns_[i]], f"{off[rows[i], columns_[i]]:,}"]
        for i in order.tolist()
    ]
    return heat(
        "What is taken for what",
        f"{note} Last column: objects that nothing found; last row: detections of nothing. Blue "
        "is right, orange is wrong, and the shade is the share of the row. Objects are found at "
        "mask IoU 0.5, whatever the class, best score first.",
        [*labels, "nothing there"],
        [*labels, "missed"],
        shown.tolist(),
        right=[(i, i) for i in range(len(labels))],
        table=(["the object", "taken for", "how often"], listed),
    )


# --- pictures ------------------------------------------------------------------------------------


class _Pictures:
    """Reads pictures; what cannot be read is gray."""

    def __init__(self, dataset: CocoSet, report: Report) -> None:
        self.dataset, self.report = dataset, report
        self.faults: dict[int, str] = {}
        self.label = {category.id: i for i, category in enumerate(dataset.categories)}

    def read(self, index: int) -> Tensor:
        picture = self.dataset.pictures[index]
        try:
            pixels = read_picture(picture.file)
            if tuple(pixels.shape[1:]) == tuple(picture.size):
                return pixels
            self.faults[index] = f"{picture.file} is not of the size that its label says"
        except InputError as error:
            self.faults[index] = str(error)
        return torch.full((3, *picture.size), 110, dtype=torch.uint8)

    def excuse(self) -> str:
        """A sentence about pictures that could not be read."""
        if not self.faults:
            return ""
        first = html.escape(next(iter(self.faults.values())))
        return f" {len(self.faults)} pictures could not be read and are gray: {first}."

    def name(self, record: Mapping[str, Any]) -> str:
        return self.dataset.categories[self.label[record["category_id"]]].name

    def threshold(self, record: Mapping[str, Any]) -> float:
        return self.report.thresholds[self.label[record["category_id"]]]


def _panels(ratings: Sequence[Rating], pictures: _Pictures) -> str:
    order = sorted(ratings, key=lambda rating: (rating.quality, -rating.weight))
    worst = order[: min(SHOWN, (len(order) + 1) // 2)]
    rest = sorted(order[len(worst) :], key=lambda rating: (-rating.quality, -rating.weight))
    best = rest[:SHOWN]
    chosen = {rating.picture for rating in worst + best}
    ids = {pictures.dataset.pictures[i].id: i for i in chosen}
    found: dict[int, list[Mapping[str, Any]]] = {i: [] for i in chosen}
    for record in pictures.report.records:
        number = ids.get(record["image_id"])
        if number is not None and record["score"] >= pictures.threshold(record):
            found[number].append(plain(record))
    if not chosen:
        return "<p>No picture has an object or a detection that is kept.</p>"
    parts = [
        '<p class="note">By mean mask IoU of the objects found, times F1; of the detections that '
        f"are kept.</p>{draw.legend(pictures.dataset.categories)}"
    ]
    for title, group in (("Best", best), ("Worst", worst)):
        parts.append(f"<h3 class=group>{title}</h3>" if group else "")
        for rating in group:
            picture = pictures.dataset.pictures[rating.picture]
            name = (
                f"{picture.file.name}: {rating.found} of {rating.objects} objects found, "
                f"{rating.kept - rating.found} of {rating.kept} detections wrong, "
                f"mean IoU {draw.percent(rating.iou) if rating.found else '-'}"
            )
            true = [
                entry
                for entry in pictures.dataset.annotations(rating.picture)
                if not entry.get("iscrowd")
            ]
            panel = draw.Panel(
                name, pictures.read(rating.picture), true, {"found": found[rating.picture]}
            )
            parts.append(
                draw.show(panel, pictures.dataset.categories, widest=WIDEST, most=MOST_BYTES)
            )
    return "".join(parts)


def _examples(errors: ErrorTally, pictures: _Pictures) -> str:
    parts = [
        '<p class="note">Of the detections that are kept, those with the best scores; of objects '
        "missed, the largest; of outlines that are off, those that lack most of the mask IoU.</p>"
        '<p class="legend"><span class="chip"><i class="line" style="background:'
        f'{draw.TRUE}"></i>true outline</span><span class="chip"><i class="line" '
        f'style="background:{draw.FOUND}"></i>outline found</span></p>'
    ]
    for kind, examples in zip(ERRORS, errors.examples, strict=True):
        if examples:
            cells = "".join(_example(kind, example, pictures) for example in examples)
            parts.append(
                f"<h3 class=group>{kind} <small>{WRONG[kind]}</small></h3>"
                f'<div class="examples">{cells}</div>'
            )
    if len(parts) == 1:
        parts.append("<p>There are none.</p>")
    return "".join(parts)


def _example(kind: str, example: Example, pictures: _Pictures) -> str:
    """A square of the picture with the outlines of one error, and what they are."""
    picture = pictures.dataset.pictures[example.picture]
    record = plain(pictures.report.records[example.record]) if example.record >= 0 else None
    entry = (
        pictures.dataset.annotations(example.picture)[example.object]
        if example.object >= 0
        else None
    )
    entries = [one for one in (entry, record) if one is not None]
    shapes = draw.shapes_of(entries, picture.size)
    box = _square(shapes, picture.size)
    pixels = pictures.read(example.picture).permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels[box[1] : box[3], box[0] : box[2]])
    width = min(SMALL, box[2] - box[0])
    height = max(1, round((box[3] - box[1]) * width / (box[2] - box[0])))
    paths = ""
    for shape, one in zip(shapes, entries, strict=True):
        part = Image.fromarray(cut(shape, box)).resize((width, height), Image.Resampling.NEAREST)
        path = draw.outline(np.asarray(part))
        paths += f'<path class="dark" d="{path}"/>'
        paths += f'<path class="{"true" if one is entry else "found"}" d="{path}"/>'
    words = html.escape(_words(kind, example, record, entry, pictures))
    address = draw.inline(image, widest=SMALL, most=FEW_BYTES)
    return (
        f'<figure class="zoom"><svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{words}"><image href="{address}" width="{width}" '
        f'height="{height}"/>{paths}</svg><figcaption>{words}<br>'
        f"<small>{html.escape(picture.file.name)}</small></figcaption></figure>"
    )


def _words(
    kind: str,
    example: Example,
    record: Mapping[str, Any] | None,
    entry: Mapping[str, Any] | None,
    pictures: _Pictures,
) -> str:
    said = f"{pictures.name(record)} {record['score']:.2f}" if record else ""
    true = pictures.name(entry) if entry else ""
    iou = f"IoU {draw.percent(example.iou)}"
    return {
        "classification": f"{said}, is {true}; {iou}",
        "localisation": f"{said}; {iou}",
        "both": f"{said}, near {true}; {iou}",
        "duplicate": f"{said}, again; {iou}",
        "background": said,
        "missed": f"{true}, {example.weight:,.0f} pixels",
        "boundary": f"{said}; boundary {iou}",
    }[kind]


def _square(shapes: Sequence[Mask], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A square around masks, as far as it lies in the picture; xyxy."""
    corners = [
        (x, y, x + window.shape[1], y + window.shape[0]) for window, (x, y) in shapes if window.size
    ] or [(0, 0, 1, 1)]
    x1, y1 = (min(corner[i] for corner in corners) for i in (0, 1))
    x2, y2 = (max(corner[i] for corner in corners) for i in (2, 3))
    side = max(round(1.35 * max(x2 - x1, y2 - y1)), 48)
    left = max(0, min((x1 + x2 - side) // 2, size[1] - side))
    top = max(0, min((y1 + y2 - side) // 2, size[0] - side))
    return left, top, min(left + side, size[1]), min(top + side, size[0])


_STYLE = """
header h1 { overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin-top: .9rem; font-size: .9rem; }
a { color: var(--c0); text-decoration: none; } a:hover { text-decoration: underline; }
.note { max-width: 92ch; color: var(--dim); font-size: .9rem; margin: .2rem 0 .9rem; }
.tiles { gap: .8rem; margin-bottom: .9rem; display: grid;
  grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); }
.tile { padding: .8rem 1rem; background: var(--card); border: 1px solid var(--rule);
  border-radius: 8px; }
.tile dd { font-size: 1.9rem; line-height: 1.25; font-weight: 650; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }
.tile span { color: var(--dim); font-size: .78rem; }
.pair { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; align-items: flex-start; }
.pair h3 { margin-bottom: .2rem; } .pair .note { max-width: 40ch; }
.pair > .chart { max-width: 100%; }
.plain { font-size: .9rem; } .plain th, .plain td { padding: .32rem .8rem; }
.plain td.text { text-align: left; color: var(--dim); font-size: .85rem; }
.plain td.meter { width: 110px; min-width: 80px; padding: .32rem .8rem .32rem 0; }
.meter i { display: block; height: .7rem; min-width: 1px; border-radius: 2px;
  background: var(--c); }
.kinds td:last-child { min-width: 24rem; }
.tall { max-height: 34rem; overflow: auto; margin-bottom: 1rem; }
.tall tr:first-child th { position: sticky; top: 0; background: var(--card); z-index: 1; }
.group { font-size: 1rem; margin: 1.4rem 0 .5rem; }
.group small { color: var(--dim); font-weight: 400; margin-left: .6rem; }
.panel .grid { max-width: 1120px; } .panel .grid svg { max-height: 380px; }
.examples { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); max-width: 1250px; }
.examples svg { aspect-ratio: 1; }
.examples figcaption { overflow-wrap: anywhere; }
footer { margin-top: 2.5rem; color: var(--dim); font-size: .85rem; }
"""
