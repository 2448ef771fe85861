"""How detections and labelled objects lie on each other, picture by picture.

`compare` is the only place where results meet labels. Average precision, thresholds, calibration,
kinds of errors, confusion and pictures to look at are all counted from the `Overlaps` it gives.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from brefine.data.coco import CocoSet, Picture, Runs, decode
from brefine.metrics.boundary import Mask, band_width, boundary_band, mask_iou
from brefine.progress import track
from brefine.structures import InputError

MAX_DETECTIONS = 100  # a picture and class
KINDS = ("box", "mask", "boundary")
LOWEST = 0.5  # the lowest IoU that any figure asks for
#: lowest and highest area in pixels of the objects that a figure is about
SIZES = {"": (0.0, 1e10), "_S": (0.0, 32.0**2), "_M": (32.0**2, 96.0**2), "_L": (96.0**2, 1e10)}

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Overlaps:
    """The detections and the labelled objects of one picture, and how they overlap.

    There are D detections of all classes together, best score first, equal scores in the order
    of the records; and G labelled objects in the order of the labels. Detections that no figure
    counts are not here: those beyond the limit of the protocol (COCO: the best 100 a picture and
    class). Labels are 0..K-1, rows of the data set's category table.

    Take ``overlaps.of(label)`` for one class, and ``overlaps.match("mask")`` for who found whom.

    Attributes:
        picture: number of the picture in ``CocoSet.pictures``.
        size: its (height, width).
        records: ``[D]`` int64, number of each detection in the records that were compared.
        labels: ``[D]`` int64.
        scores: ``[D]`` float64, falling.
        areas: for each kind ``[D]`` float64, pixels: of the detection's box for ``box``, of its
            mask for ``mask`` and ``boundary``.
        excused: ``[D]`` bool: when this detection matches nothing it is ignored and not wrong,
            because its class is not labelled exhaustively in this picture (LVIS).
        objects: ``[G]`` int64, number of each object in ``CocoSet.ground_truth()``'s annotations.
        true_labels: ``[G]`` int64.
        true_areas: ``[G]`` float64, pixels, as the annotation says (alike for every kind).
        crowd: ``[G]`` bool: a region that takes any number of detections and is no object.
        ious: for each kind ``[D, G]`` float64, 0..1. With a crowd region, the share of the
            *detection* that lies inside. ``boundary`` is Boundary IoU, the smaller of mask IoU
            and the IoU of the bands; where mask IoU is below 0.5 or the object is a crowd region
            it is the mask IoU. Between different classes all are 0, unless ``across``.
        across: whether ``ious`` are there between different classes, too.
    """

    picture: int
    size: tuple[int, int]
    records: Ints
    labels: Ints
    scores: Floats
    areas: Mapping[str, Floats]
    excused: Flags
    objects: Ints
    true_labels: Ints
    true_areas: Floats
    crowd: Flags
    ious: Mapping[str, Floats]
    across: bool = False

    def of(self, label: int) -> Overlaps:
        """Only the detections and the objects of one class."""
        return self._take(self.labels == label, self.true_labels == label)

    def ranks(self) -> Ints:
        """``[D]``: how many detections of its own class are before each one."""
        return _count_before(self.labels)

    def match(self, kind: str, iou: float = LOWEST, *, across: bool = False) -> Ints:
        """Which object each detection found, as COCO decides: best score chooses first.

        A detection takes the object with the highest IoU that nobody has taken; a crowd region
        only where there is none, and any number of detections may share it.

        Args:
            kind: ``box``, ``mask`` or ``boundary``.
            iou: at least this, 0.5 or more.
            across: whatever the classes (the overlaps must have been computed across classes).

        Returns:
            ``[D]``: 0..G-1, or -1 for nothing.
        """
        if across and not self.across:
            raise ValueError("these overlaps are between equal classes only")
        ious = self.ious[kind]
        if self.across and not across:
            ious = np.where(self.labels[:, None] == self.true_labels, ious, 0.0)
        return assign(ious, np.array([iou]), self.crowd[None], self.crowd)[:, 0, 0]

    def _take(self, found: Flags, true: Flags) -> Overlaps:
        return replace(
            self,
            records=self.records[found],
            labels=self.labels[found],
            scores=self.scores[found],
            areas={kind: areas[found] for kind, areas in self.areas.items()},
            excused=self.excused[found],
            objects=self.objects[true],
            true_labels=self.true_labels[true],
            true_areas=self.true_areas[true],
            crowd=self.crowd[true],
            ious={kind: ious[np.ix_(found, true)] for kind, ious in self.ious.items()},
        )


def assign(ious: Floats, thresholds: Floats, ignored: Flags, crowd: Flags) -> Ints:
    """Match detections to objects in one picture under several rules at once, as COCO does.

    Detections choose in their order. Each takes, of the objects that overlap enough and are
    still free, one that is not ignored before one that is, then the highest IoU, then the last.

    Args:
        ious: ``[D, G]``; 0 where the classes differ.
        thresholds: ``[T]``, IoU needed.
        ignored: ``[A, G]``, objects that do not count under rule ``a`` (crowd, another size).
        crowd: ``[G]``, objects that stay free.

    Returns:
        ``[D, A, T]`` int64, the object or -1.
    """
    count = len(ious)
    found = np.full((count, len(ignored), len(thresholds)), -1, dtype=np.int64)
    taken = np.zeros((len(ignored), len(thresholds), len(crowd)), dtype=bool)
    near = ious >= thresholds.min()
    for d in np.flatnonzero(near.any(1)).tolist():
        # The last of equals wins, so the candidates are looked at from behind.
        candidates = np.flatnonzero(near[d])[::-1]
        values = ious[d, candidates]
        free = (values >= thresholds[:, None]) & ~taken[:, :, candidates]
        wanted = np.where(free, (values + 2 * ~ignored[:, candidates])[:, None], 0.0)
        best = wanted.argmax(2)
        hit = np.take_along_axis(wanted, best[:, :, None], 2)[:, :, 0] > 0
        chosen = candidates[best]
        found[d] = np.where(hit, chosen, -1)
        a, t = np.nonzero(hit & ~crowd[chosen])
        taken[a, t, chosen[a, t]] = True
    return found


def compare(
    records: Sequence[Mapping[str, Any]],
    dataset: CocoSet,
    *,
    kinds: Sequence[str] = KINDS,
    across: bool = False,
    limit: int | None = None,
    progress: bool = False,
) -> Iterator[Overlaps]:
    """Overlaps of COCO results with the labels, one picture at a time.

    Every picture of the set comes, also one without records, in the order of the ids, which is
    how COCO decides between equal scores.

    Args:
        records: results, in any order; checked here.
        dataset: pictures and labels.
        kinds: some of ``KINDS``.
        across: also between different classes (for kinds of errors, confusion).
        limit: only the first so many pictures of the set.
        progress: show a bar with an ETA on stderr.

    Raises:
        InputError: a record is not right; names its number and the key.
    """
    pictures = dataset.pictures[:limit]
    number = {picture.id: i for i, picture in enumerate(pictures)}
    labels = {category.id: i for i, category in enumerate(dataset.categories)}
    truths: dict[int, list[tuple[int, Mapping[str, Any]]]] = defaultdict(list)
    for i, entry in enumerate(dataset.ground_truth()["annotations"]):
        if entry["image_id"] in number:
            truths[number[entry["image_id"]]].append((i, entry))
    found: dict[int, list[int]] = defaultdict(list)
    for i, record in enumerate(records):
        found[_picture(record, i, number)].append(i)

    order = sorted(number, key=lambda name: (isinstance(name, str), name))
    steps: Iterable[int] = [number[name] for name in order]
    for i in track(steps, "score", len(order)) if progress and order else steps:
        here = [(j, records[j]) for j in found[i]]
        yield _overlap(i, pictures[i], here, truths[i], labels, kinds, across)


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


def _overlap(
    index: int,
    picture: Picture,
    records: Sequence[tuple[int, Mapping[str, Any]]],
    truths: Sequence[tuple[int, Mapping[str, Any]]],
    table: Mapping[int, int],
    kinds: Sequence[str],
    across: bool,
) -> Overlaps:
    """The overlaps of one picture."""
    found = [_Detection.read(record, i, table, picture.size) for i, record in records]
    found.sort(key=lambda one: -one.score)  # stable, as COCO's
    ranks = _count_before(np.array([one.label for one in found], dtype=np.int64))
    found = [one for one, rank in zip(found, ranks.tolist(), strict=True) if rank < MAX_DETECTIONS]
    labels = np.array([one.label for one in found], dtype=np.int64)
    boxes = np.array([one.box for one in found]).reshape(-1, 4)
    true_labels = np.array([table[true["category_id"]] for _, true in truths], dtype=np.int64)
    true_boxes = np.array([true["bbox"] for _, true in truths], dtype=np.float64).reshape(-1, 4)
    crowd = np.array([bool(true.get("iscrowd")) for _, true in truths], dtype=bool)
    ious: dict[str, Floats] = {}
    pairs = (labels[:, None] == true_labels) | across
    if "box" in kinds:
        ious["box"] = np.zeros(pairs.shape)
        if pairs.any():
            ious["box"] = coco_mask.iou(boxes, true_boxes, crowd) * pairs
    if "mask" in kinds or "boundary" in kinds:
        mask = _mask_ious(found, [true["segmentation"] for _, true in truths], crowd, pairs)
        if "mask" in kinds:
            ious["mask"] = mask
        if "boundary" in kinds:
            true_masks = [decode(true["segmentation"], picture.size) for _, true in truths]
            ious["boundary"] = _boundary_ious(found, true_masks, crowd, mask, picture.size)
    area = np.array([one.runs.area() for one in found], dtype=np.float64)
    areas = {kind: area if kind != "box" else boxes[:, 2] * boxes[:, 3] for kind in kinds}
    return Overlaps(
        index,
        picture.size,
        np.array([one.record for one in found], dtype=np.int64),
        labels,
        np.array([one.score for one in found], dtype=np.float64),
        areas,
        np.zeros(len(found), dtype=bool),
        np.array([i for i, _ in truths], dtype=np.int64),
        true_labels,
        np.array([true["area"] for _, true in truths], dtype=np.float64),
        crowd,
        ious,
        across,
    )


def _count_before(labels: Ints) -> Ints:
    """For each place how many equal labels come before it."""
    order = labels.argsort(kind="stable")
    sorted_labels = labels[order]
    first = np.searchsorted(sorted_labels, sorted_labels)
    counts = np.empty_like(order)
    counts[order] = np.arange(len(labels)) - first
    return counts


@dataclass(frozen=True)
class _Detection:
    """One record, checked."""

    record: int
    label: int
    score: float
    box: list[float]  # x, y, width, height
    runs: Runs
    rle: dict[str, Any]

    @classmethod
    def read(
        cls, record: Mapping[str, Any], index: int, table: Mapping[int, int], size: tuple[int, int]
    ) -> _Detection:
        """A record, or one line that says what is wrong with it."""
        where = f"result {index} (the first is 0)"
        category, score, rle = record["category_id"], record["score"], record["segmentation"]
        if not isinstance(category, int) or category not in table:
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
        box = record.get("bbox", ())
        if "bbox" not in record:
            x1, y1, x2, y2 = runs.box()
            box = [x1, y1, x2 - x1, y2 - y1]
        try:
            box = [float(value) for value in box]
        except (TypeError, ValueError):
            box = []
        if len(box) != 4 or not all(map(math.isfinite, box)):
            raise InputError(f"{where}: bbox {record['bbox']!r} is not [x, y, width, height]")
        return cls(index, table[category], float(score), box, runs, rle)


def _mask_ious(
    found: Sequence[_Detection], truths: Sequence[Any], crowd: Flags, pairs: Flags
) -> Floats:
    """Mask IoU ``[D, G]`` of the pairs asked for, 0 for the others."""
    ious = np.zeros(pairs.shape)
    rows = np.flatnonzero(pairs.any(1))
    for columns in {row.tobytes(): np.flatnonzero(row) for row in pairs[rows]}.values():
        alike = rows[pairs[rows][:, columns].all(1)]
        ious[np.ix_(alike, columns)] = coco_mask.iou(
            [found[i].rle for i in alike.tolist()],
            [truths[j] for j in columns.tolist()],
            crowd[columns],
        )
    return ious


def _boundary_ious(
    found: Sequence[_Detection],
    truths: Sequence[Runs],
    crowd: Flags,
    masks: Floats,
    size: tuple[int, int],
) -> Floats:
    """Boundary IoU ``[D, G]`` from mask IoU, where that is high enough for it to matter."""
    smaller = masks.copy()
    near = (masks >= LOWEST) & ~crowd
    width = band_width(size)
    true_bands = {j: _band(truths[j], width) for j in np.flatnonzero(near.any(0)).tolist()}
    for i in np.flatnonzero(near.any(1)).tolist():
        band = _band(found[i].runs, width)
        for j in np.flatnonzero(near[i]).tolist():
            smaller[i, j] = min(smaller[i, j], mask_iou(band, true_bands[j]))
    return smaller


def _band(runs: Runs, width: int) -> Mask:
    window, origin = runs.window()
    return boundary_band(window.numpy(), width), origin
