"""How good a model is: COCO's box and mask AP, Boundary AP, and mask quality given true boxes.

Everything is measured at the pictures' original size, on RLE and in box-sized windows, so memory
follows the number of objects and not the size of the pictures. Rules that decide figures:

    * AP is COCO's, as pycocotools computes it: mean over IoU 0.50, 0.55 ... 0.95 and 101 recall
      levels, at most 100 detections a picture and class, crowd regions ignored.
    * The size of a detection is its own: box area for box AP, mask area for mask and Boundary
      AP. A labelled object's size is its annotation's ``area``. Small is below 32², medium
      below 96² pixels.
    * Boundary AP (Cheng et al., CVPR 2021) takes the smaller of mask IoU and the IoU of the
      boundary bands. A band is what of the mask lies within d pixels of its outline, d being
      2 % of the picture's diagonal, rounded, at least 1; the picture's border is outline too.
    * A figure for which there is no object is NaN, printed as ``-``, and enters no mean.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from brefine.data.coco import CocoSet, decode
from brefine.files import replacing
from brefine.parts.masks import paste
from brefine.progress import track
from brefine.structures import Category, InputError

if TYPE_CHECKING:
    from brefine.predict import Predictor

MAX_DETECTIONS = 100  # a picture and class
BAND = 0.02  # width of the boundary band, of the picture's diagonal
SIZES = {"": (0.0, 1e10), "_S": (0.0, 32.0**2), "_M": (32.0**2, 96.0**2), "_L": (96.0**2, 1e10)}

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

KINDS = ("box", "mask", "boundary")
Overlaps = dict[tuple[int, int], NDArray[np.float64]]
Ranked = dict[tuple[int, int], list["_Object"]]
Mask = tuple[NDArray[np.uint8], tuple[int, int]]  # window [h, w] and (x, y) of its corner


@dataclass(frozen=True)
class Report:
    """What an evaluation found.

    Attributes:
        values: fractions 0..1, NaN where there is no object: ``{kind}/AP``, ``AP50``, ``AP75``,
            ``AP_S``, ``AP_M``, ``AP_L`` for the kinds ``box``, ``mask`` and ``boundary``, and
            ``given_boxes/{mask_iou,boundary_iou}`` with ``_S``, ``_M``, ``_L``. Kinds that
            were not asked for are absent.
        per_class: the same AP keys for each class name, ``threshold`` and ``objects``.
        records: the COCO results evaluated.
        thresholds: per label the score with the best F1 at mask IoU 0.5, to keep detections
            that score at least this; 0.5 for a class without objects or true detections.
    """

    values: dict[str, float]
    per_class: dict[str, dict[str, float]]
    records: list[dict[str, Any]]
    thresholds: list[float]

    def as_dict(self) -> dict[str, Any]:
        """Everything but the records, ready for JSON: NaN becomes None."""

        def plain(values: Mapping[str, float]) -> dict[str, float | None]:
            return {key: None if math.isnan(v) else v for key, v in values.items()}

        return {
            "values": plain(self.values),
            "per_class": {name: plain(values) for name, values in self.per_class.items()},
            "thresholds": self.thresholds,
        }

    def save(self, folder: Path) -> None:
        """Write ``evaluation.json`` and ``predictions.json`` (the records) into a folder."""
        for name, value in (("evaluation", self.as_dict()), ("predictions", self.records)):
            with replacing(folder / f"{name}.json") as aside:
                aside.write_text(json.dumps(value), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Report:
        """Read what ``save`` wrote."""
        figures = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        records = json.loads((folder / "predictions.json").read_text(encoding="utf-8"))

        def whole(values: Mapping[str, float | None]) -> dict[str, float]:
            return {key: math.nan if v is None else v for key, v in values.items()}

        per_class = {name: whole(values) for name, values in figures["per_class"].items()}
        return cls(whole(figures["values"]), per_class, records, figures["thresholds"])


def evaluate(
    predictor: Predictor,
    dataset: CocoSet,
    *,
    given_boxes: bool = True,
    boundary: bool = True,
    progress: bool = True,
    limit: int | None = None,
) -> Report:
    """Run a model over a data set and score it.

    Args:
        predictor: the model; its thresholds are not used, every detection counts.
        dataset: pictures and labels.
        given_boxes: also measure the masks it makes for the true boxes (`mask_quality`).
        boundary: also compute Boundary AP.
        progress: show a bar with an ETA on stderr.
        limit: only the first so many pictures.

    Detections of classes that the data set does not know are left out.

    Raises:
        InputError: the model does not know a class of the data set, or a picture cannot be
            read or is not of the size its label says.
    """
    quality = _Quality(predictor, dataset)
    known = {category.id for category in dataset.categories}
    records: list[dict[str, Any]] = []
    for index in _pictures(dataset, limit, "evaluate" if progress else None):
        picture = dataset.pictures[index]
        found = predictor.records(picture.file, picture.id, threshold=0.0)
        records += [record for record in found if record["category_id"] in known]
        if given_boxes:
            quality.add(index)
    report = _score(records, dataset, boundary=boundary, progress=progress, limit=limit)
    if given_boxes:
        report.values.update(quality.values())
    return report


def evaluate_records(
    records: Iterable[Mapping[str, Any]],
    dataset: CocoSet,
    *,
    boundary: bool = True,
    progress: bool = False,
) -> Report:
    """Score COCO results, of this or any other system.

    Args:
        records: results with ``image_id``, ``category_id``, ``score``, ``segmentation`` (RLE)
            and maybe ``bbox``; without it the box around the mask is taken.
        dataset: pictures and labels.
        boundary: also compute Boundary AP.
        progress: show a bar with an ETA on stderr.

    Raises:
        InputError: a record is not right; names its number and the key.
    """
    return _score(records, dataset, boundary=boundary, progress=progress, limit=None)


def mask_quality(
    predictor: Predictor, dataset: CocoSet, *, progress: bool = True, limit: int | None = None
) -> dict[str, float]:
    """Quality of the masks alone: what the mask head makes of the true boxes and labels.

    Args:
        predictor: the model.
        dataset: pictures and labels; crowd regions do not take part.
        progress: show a bar with an ETA on stderr.
        limit: only the first so many pictures.

    Returns:
        ``given_boxes/mask_iou`` and ``given_boxes/boundary_iou``, means over objects, 0..1;
        with ``_S``, ``_M``, ``_L`` for objects of that size (pixels of the true mask); NaN
        where there is no object. Boundary IoU is that of the bands alone.

    Raises:
        InputError: as in `evaluate`.
    """
    quality = _Quality(predictor, dataset)
    for index in _pictures(dataset, limit, "masks in true boxes" if progress else None):
        quality.add(index)
    return quality.values()


def band_width(size: tuple[int, int]) -> int:
    """Width in pixels of the boundary band in a picture of ``size`` (height, width)."""
    return max(1, round(BAND * math.hypot(*size)))


def boundary_band(window: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """The part of a mask within ``width`` pixels of its outline.

    A pixel is inner, not of the band, when the square of side ``2 * width + 1`` around it lies
    in the mask. Outside the window there is no mask, so neither padding nor the picture is
    needed, and the picture's border counts as outline.

    Args:
        window: ``[h, w]`` of 0 and 1, all of the mask.
        width: in pixels, at least 1.

    Returns:
        ``[h, w]`` of 0 and 1.
    """
    side = 2 * width + 1
    band = window.copy()
    if min(window.shape) < side:
        return band
    inner, length = window, 1  # inner[y, x]: the `length` pixels from here on are all set
    while length < side:
        step = min(length, side - length)
        inner = inner[:-step] & inner[step:]
        length += step
    length = 1
    while length < side:
        step = min(length, side - length)
        inner = inner[:, :-step] & inner[:, step:]
        length += step
    band[width:-width, width:-width] ^= inner
    return band


def mask_iou(one: Mask, other: Mask) -> float:
    """IoU of two masks, each a window ``[h, w]`` of 0 and 1 at (x, y); 0 if both are empty."""
    (a, (ax, ay)), (b, (bx, by)) = one, other
    x1, y1 = max(ax, bx), max(ay, by)
    x2 = max(min(ax + a.shape[1], bx + b.shape[1]), x1)
    y2 = max(min(ay + a.shape[0], by + b.shape[0]), y1)
    shared = np.count_nonzero(
        a[y1 - ay : y2 - ay, x1 - ax : x2 - ax] & b[y1 - by : y2 - by, x1 - bx : x2 - bx]
    )
    union = np.count_nonzero(a) + np.count_nonzero(b) - shared
    return shared / union if union else 0.0


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


def _pictures(dataset: CocoSet, limit: int | None, title: str | None) -> Iterable[int]:
    count = len(dataset) if limit is None else min(limit, len(dataset))
    return track(range(count), title, count) if title and count else range(count)


class _Quality:
    """Sums up mask and boundary IoU of the masks that a model makes for the true boxes."""

    def __init__(self, predictor: Predictor, dataset: CocoSet) -> None:
        self.predictor, self.dataset = predictor, dataset
        self.areas: list[int] = []
        self.ious: list[tuple[float, float]] = []
        rows = {category: i for i, category in enumerate(predictor.categories)}
        for category in dataset.categories:
            if category not in rows:
                raise InputError(
                    f"{dataset.path}: category {category.id} ({category.name}) is not in the "
                    "model's table: evaluate with the categories that it was trained for"
                )
        self.labels = torch.tensor([rows[c] for c in dataset.categories], dtype=torch.int64)

    def add(self, index: int) -> None:
        """Compare each mask of a picture with the true one."""
        target = self.dataset.target(index)
        if not len(target):
            return
        asked = replace(target, labels=self.labels[target.labels])
        found = self.predictor.given(self.dataset.pictures[index].file, asked)
        if found.logits is None or target.masks is None or found.size != target.size:
            raise ValueError("needs logits and true masks in one frame")
        width = band_width(target.size)
        masks = target.masks.to("cpu")
        logits, boxes = found.logits.cpu(), found.boxes.cpu()
        for window, corner, logit, box in zip(
            masks.windows, masks.origins.tolist(), logits, boxes, strict=True
        ):
            pasted, origin = paste(logit, box, target.size)
            mine, true = pasted.numpy().astype(np.uint8), window.numpy()
            place = (corner[0], corner[1])
            whole = mask_iou((mine, origin), (true, place))
            bands = boundary_band(mine, width), boundary_band(true, width)
            self.areas.append(int(np.count_nonzero(true)))
            self.ious.append((whole, mask_iou((bands[0], origin), (bands[1], place))))

    def values(self) -> dict[str, float]:
        areas, ious = np.array(self.areas), np.array(self.ious).reshape(-1, 2)
        values = {}
        for i, name in enumerate(("mask_iou", "boundary_iou")):
            for size, (low, high) in SIZES.items():
                chosen = ious[(areas >= low) & (areas < high), i] if len(ious) else ious
                values[f"given_boxes/{name}{size}"] = _mean(chosen)
        return values


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if values.size else math.nan


@dataclass
class _Object:
    """A labelled or detected object in our numbers: 0, 1, ... for pictures and classes."""

    id: int  # from 1: COCO takes 0 for "not matched"
    picture: int
    label: int
    box: list[float]  # x, y, width, height
    area: float  # of a label: the annotation's; of a detection: the mask's
    rle: dict[str, Any]
    crowd: int = 0
    score: float = 1.0


def _score(
    records: Iterable[Mapping[str, Any]],
    dataset: CocoSet,
    *,
    boundary: bool,
    progress: bool,
    limit: int | None,
) -> Report:
    categories = dataset.categories
    label = {category.id: i for i, category in enumerate(categories)}
    # COCO goes through pictures by id, which decides between equal scores.
    pictures = sorted(dataset.pictures[:limit], key=lambda p: (isinstance(p.id, str), p.id))
    number = {picture.id: i for i, picture in enumerate(pictures)}

    truths: list[_Object] = []
    for entry in dataset.ground_truth()["annotations"]:
        if entry["image_id"] in number:
            truths.append(
                _Object(
                    len(truths) + 1,
                    number[entry["image_id"]],
                    label[entry["category_id"]],
                    entry["bbox"],
                    entry["area"],
                    entry["segmentation"],
                    crowd=int(bool(entry.get("iscrowd"))),
                )
            )
    given = [dict(record) for record in records]
    indices: dict[int, list[int]] = defaultdict(list)
    for index, record in enumerate(given):
        indices[_picture(record, index, number)].append(index)

    labelled = _by_class(truths)
    found: list[_Object] = []
    overlaps: dict[str, Overlaps] = {kind: {} for kind in KINDS if boundary or kind != "boundary"}
    ranked: Ranked = {}
    steps = sorted(indices)
    for picture in track(steps, "score", len(steps)) if progress and steps else steps:
        size = pictures[picture].size
        here = [_detection(given[i], i, picture, label, size) for i in indices[picture]]
        found += here
        for pair, objects in _by_class(here).items():
            objects.sort(key=lambda found: -found.score)  # stable, as COCO's
            ranked[pair] = objects[:MAX_DETECTIONS]
            if pair in labelled:
                both = labelled[pair], ranked[pair]
                for kind, value in _overlap(*both, size, boundary).items():
                    overlaps[kind][pair] = value

    values: dict[str, float] = {}
    names = _names(categories)
    per_class: dict[str, dict[str, float]] = {name: {} for name in names}
    for kind, ious in overlaps.items():
        precision = _precision(kind, len(pictures), len(categories), truths, found, ious)
        values.update(_figures(kind, precision))
        for i, name in enumerate(names):
            per_class[name].update(_figures(kind, precision[:, :, i : i + 1]))

    count = Counter(true.label for true in truths if not true.crowd)
    thresholds = _thresholds(len(categories), count, labelled, ranked, overlaps["mask"])
    for i, name in enumerate(names):
        per_class[name].update(threshold=thresholds[i], objects=count[i])
    return Report(values, per_class, given, thresholds)


def _names(categories: Sequence[Category]) -> list[str]:
    """Class names; one that is there twice gets its id."""
    count = Counter(category.name for category in categories)
    return [c.name if count[c.name] == 1 else f"{c.name} ({c.id})" for c in categories]


def _by_class(objects: Iterable[_Object]) -> Ranked:
    groups: Ranked = defaultdict(list)
    for one in objects:
        groups[one.picture, one.label].append(one)
    return groups


def _picture(record: Mapping[str, Any], index: int, number: Mapping[int | str, int]) -> int:
    """The picture a result belongs to."""
    for key in ("image_id", "category_id", "score", "segmentation"):
        if key not in record:
            raise InputError(f"result {index} (the first is 0): key {key!r} is missing")
    image = record["image_id"]
    if not isinstance(image, int | str) or image not in number:
        raise InputError(
            f"result {index} (the first is 0): image_id {image!r} is not in the data set"
        )
    return number[image]


def _detection(
    record: Mapping[str, Any],
    index: int,
    picture: int,
    label: Mapping[int, int],
    size: tuple[int, int],
) -> _Object:
    """A result in our numbers, or one line that says what is wrong with it."""
    where = f"result {index} (the first is 0)"
    category, score, rle = record["category_id"], record["score"], record["segmentation"]
    if not isinstance(category, int) or category not in label:
        raise InputError(f"{where}: category_id {category!r} is not in the data set")
    if not isinstance(score, int | float) or not math.isfinite(score):
        raise InputError(f"{where}: score {score!r} is no finite number")
    if isinstance(rle, dict) and isinstance(rle.get("counts"), bytes):
        rle = rle | {"counts": rle["counts"].decode("ascii", "replace")}
    try:
        runs = decode(rle, size)
    except ValueError as error:
        raise InputError(f"{where}: {error}; give masks at the original size") from None
    if not isinstance(rle, dict) or not isinstance(rle["counts"], str):
        rle = runs.encode()
    x1, y1, x2, y2 = runs.box()
    box = record.get("bbox", [x1, y1, x2 - x1, y2 - y1])
    try:
        box = [float(value) for value in box]
    except (TypeError, ValueError):
        box = []
    if len(box) != 4 or not all(map(math.isfinite, box)):
        raise InputError(f"{where}: bbox {record['bbox']!r} is not [x, y, width, height]")
    area = float(runs.area())
    return _Object(index + 1, picture, label[category], box, area, rle, score=float(score))


def _overlap(
    truths: list[_Object], found: list[_Object], size: tuple[int, int], boundary: bool
) -> dict[str, NDArray[np.float64]]:
    """Box, mask and boundary overlap ``[D, G]`` of the objects of one picture and class."""
    crowd = [true.crowd for true in truths]
    boxes = [np.array([one.box for one in side]) for side in (found, truths)]
    masks = [[one.rle for one in side] for side in (found, truths)]
    ious = {"box": coco_mask.iou(*boxes, crowd), "mask": coco_mask.iou(*masks, crowd)}
    if boundary:
        ious["boundary"] = smaller = ious["mask"].copy()
        # What overlaps less than the lowest threshold cannot match, whatever its band is.
        near = (smaller >= 0.5) & (np.array(crowd) == 0)
        width = band_width(size)
        true_bands = {j: _band(truths[j], size, width) for j in near.any(0).nonzero()[0]}
        for i in near.any(1).nonzero()[0]:
            band = _band(found[i], size, width)
            for j in near[i].nonzero()[0]:
                smaller[i, j] = min(smaller[i, j], mask_iou(band, true_bands[j]))
    return ious


def _band(one: _Object, size: tuple[int, int], width: int) -> Mask:
    window, origin = decode(one.rle, size).window()
    return boundary_band(window.numpy(), width), origin


def _precision(
    kind: str,
    pictures: int,
    classes: int,
    truths: list[_Object],
    found: list[_Object],
    overlaps: Overlaps,
) -> NDArray[np.float64]:
    """COCO's precision ``[IoU, recall, class, size]``; -1 where there is no object."""
    if not pictures or not classes:
        return np.full((10, 101, classes, len(SIZES)), -1.0)
    tables = []
    for objects in (truths, found):
        table = COCO()
        table.dataset = {
            "images": [{"id": i} for i in range(pictures)],
            "categories": [{"id": i} for i in range(classes)],
            "annotations": [
                {
                    "id": one.id,
                    "image_id": one.picture,
                    "category_id": one.label,
                    "score": one.score,
                    "iscrowd": one.crowd,
                    "area": one.box[2] * one.box[3]
                    if kind == "box" and objects is found
                    else one.area,
                }
                for one in objects
            ],
        }
        table.createIndex()
        tables.append(table)
    # Boxes and masks alike: the overlaps are ours, the library matches and accumulates.
    matching = COCOeval_faster(*tables, iouType="bbox", print_function=lambda *_: None)
    matching.computeIoU = lambda image, label: overlaps.get((image, label), [])
    matching.params.maxDets = [MAX_DETECTIONS]
    matching.evaluate()
    matching.accumulate()
    precision: NDArray[np.float64] = matching.eval["precision"][..., 0]
    return precision


def _figures(kind: str, precision: NDArray[np.float64]) -> dict[str, float]:
    """AP figures of COCO's precision ``[IoU, recall, class, size]``."""

    def mean(values: NDArray[np.float64]) -> float:
        return _mean(values[values > -1])

    whole = precision[..., 0]
    figures = {"AP": mean(whole), "AP50": mean(whole[0]), "AP75": mean(whole[5])}
    for i, size in enumerate(SIZES):
        figures[f"AP{size}"] = mean(precision[..., i])
    return {f"{kind}/{name}": value for name, value in figures.items()}


def _thresholds(
    classes: int, count: Mapping[int, int], labelled: Ranked, ranked: Ranked, overlaps: Overlaps
) -> list[float]:
    """Per label the score with the best F1 at mask IoU 0.5; the highest score if several are."""
    pooled: dict[int, list[tuple[float, bool]]] = defaultdict(list)
    for pair, objects in ranked.items():
        ious = overlaps.get(pair, np.zeros((len(objects), 0)))
        crowd = np.array([true.crowd for true in labelled.get(pair, [])], dtype=bool)
        free = ~crowd
        for one, row in zip(objects, ious, strict=True):
            match = np.where(free, row, 0.0)
            if len(row) and match.max() >= 0.5:
                free[match.argmax()] = False
                pooled[one.label].append((one.score, True))
            elif not (row[crowd] >= 0.5).any():
                pooled[one.label].append((one.score, False))
    thresholds = []
    for label in range(classes):
        threshold, best, right = 0.5, 0.0, 0
        scores = sorted(pooled[label], reverse=True)
        for i, (score, hit) in enumerate(scores):
            right += hit
            last = i + 1 == len(scores) or scores[i + 1][0] < score
            f1 = 2 * right / (i + 1 + count.get(label, 0))
            if last and f1 > best:
                threshold, best = score, f1
        thresholds.append(threshold)
    return thresholds
