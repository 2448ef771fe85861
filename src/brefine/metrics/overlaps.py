"""How detections and labelled objects lie on each other, picture by picture.

`compare` is the only place where results meet labels. Average precision, thresholds, calibration,
kinds of errors, confusion and pictures to look at are all counted from the `Overlaps` it gives.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from brefine.data.coco import CocoSet, box_and_area
from brefine.data.faults import shorten
from brefine.metrics.boundary import Mask, band_width, boundary_band, shared_pixels
from brefine.metrics.tape import Tape
from brefine.progress import track
from brefine.rle import decode, draw_compressed
from brefine.structures import InputError

MAX_DETECTIONS = 100  # a picture and class (COCO)
MAX_FEDERATED = 300  # a picture, all classes together (LVIS)
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
    counts are not here. COCO counts the best 100 a picture and class. LVIS counts the best 300 a
    picture, and of these only classes that the picture was labelled for: with an object in it,
    or verified to be absent. Labels are 0..K-1, rows of the data set's category table.

    Take ``overlaps.of(label)`` for one class, and ``overlaps.match("mask")`` for who found whom.

    Attributes:
        picture: number of the picture in ``CocoSet.pictures``.
        size: its (height, width).
        records: ``[D]`` int64, number of each detection in the records that were compared.
        labels: ``[D]`` int64.
        scores: ``[D]`` float64, falling.
        areas: for each kind ``[D]`` float64, pixels: of the detection's box for ``box``, of its
            mask for ``mask`` and ``boundary``.
        excused: for each kind ``[D]`` bool: when this detection matches nothing it is ignored and
            not wrong. In LVIS: its class is not labelled exhaustively in this picture, or its
            box or mask is empty.
        objects: ``[G]`` int64, number of each object in ``CocoSet.annotations(picture)``.
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
    excused: Mapping[str, Flags]
    objects: Ints
    true_labels: Ints
    true_areas: Floats
    crowd: Flags
    ious: Mapping[str, Floats]
    across: bool = False

    def of(self, label: int) -> Overlaps:
        """Only the detections and the objects of one class."""
        return self.take(self.labels == label, self.true_labels == label)

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

    def take(self, found: Flags, true: Flags) -> Overlaps:
        """Only some detections (``[D]``) and objects (``[G]``)."""
        return replace(
            self,
            records=self.records[found],
            labels=self.labels[found],
            scores=self.scores[found],
            areas={kind: areas[found] for kind, areas in self.areas.items()},
            excused={kind: excused[found] for kind, excused in self.excused.items()},
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
    found = np.full((len(ious), len(ignored), len(thresholds)), -1, dtype=np.int64)
    near = ious >= thresholds.min()
    # Who has no choice takes the one object, or comes too late: no rule matters, no loop needed.
    chooses = near.sum(1) > 1
    disputed = near[chooses].any(0)
    rows, columns = np.flatnonzero(near.any(1)), np.flatnonzero(near.any(0) & ~disputed)
    enough = ious[np.ix_(rows, columns)][:, :, None] >= thresholds  # [rows, columns, T]
    first = enough & ((enough.cumsum(0) == 1) | crowd[columns, None])
    row, column, t = np.nonzero(first)
    found[rows[row], :, t] = columns[column, None]

    taken = np.zeros((len(ignored), len(thresholds), len(crowd)), dtype=bool)
    for d in np.flatnonzero(near[:, disputed].any(1)).tolist():
        # The last of equals wins, so the candidates are looked at from behind.
        candidates = np.flatnonzero(near[d])[::-1]
        values = ious[d, candidates]
        free = (values >= thresholds[:, None]) & ~taken[:, :, candidates]
        wanted = np.where(free, (values + 2 * ~ignored[:, candidates])[:, None], 0.0)
        best = wanted.argmax(2)
        hit = wanted.max(2) > 0
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
    pictures, federated = dataset.pictures[:limit], dataset.federated
    number = {picture.id: i for i, picture in enumerate(dataset.pictures)}
    table = {category.id: i for i, category in enumerate(dataset.categories)}
    found: dict[int, list[int]] = defaultdict(list)
    for i, record in enumerate(records):
        found[_picture(record, i, number)].append(i)

    names = sorted((p.id for p in pictures), key=lambda name: (isinstance(name, str), name))
    steps: Iterable[int] = [number[name] for name in names]
    for i in track(steps, "score", len(names)) if progress and names else steps:
        size = pictures[i].size
        detections = _Objects.found([(j, records[j]) for j in found[i]], table, size)
        truths = _Objects.labelled(dataset.annotations(i), table, size)
        if federated is None:
            detections = detections.take(_count_before(detections.labels) < MAX_DETECTIONS)
            yield _overlap(i, detections, truths, kinds, across)
            continue
        labelled_for = [*truths.labels.tolist(), *federated.negative[i]]
        detections = detections.take(np.arange(len(detections.labels)) < MAX_FEDERATED)
        detections = detections.take(np.isin(detections.labels, labelled_for))
        overlaps = _overlap(i, detections, truths, kinds, across)
        partly = np.isin(detections.labels, federated.not_exhaustive[i])
        excused = {kind: partly | (areas <= 0) for kind, areas in overlaps.areas.items()}
        yield replace(overlaps, excused=excused)


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


def _count_before(labels: Ints) -> Ints:
    """For each place how many equal labels come before it."""
    order = labels.argsort(kind="stable")
    ordered = labels[order]
    counts = np.empty_like(order)
    counts[order] = np.arange(len(labels)) - np.searchsorted(ordered, ordered)
    return counts


@dataclass(frozen=True)
class _Objects:
    """Detections or labelled objects of one picture, column by column."""

    numbers: Ints
    labels: Ints
    scores: Floats
    boxes: Floats  # x, y, width, height
    areas: Floats
    crowd: Flags
    rles: list[Any]
    tape: Tape
    places: Ints  # of the masks on the tape

    @classmethod
    def found(
        cls,
        records: Sequence[tuple[int, Mapping[str, Any]]],
        table: Mapping[int, int],
        size: tuple[int, int],
    ) -> _Objects:
        """Records, best score first, or one line that says what is wrong with one of them."""
        try:
            rles = [_compress(record["segmentation"], size) for _, record in records]
            tape = Tape.of(rles, size)
        except ValueError:
            for index, record in records:
                try:
                    decode(_compress(record["segmentation"], size), size)
                except ValueError as error:
                    raise InputError(
                        f"{_where(index)}: {error}; give masks at the original size"
                    ) from None
            raise
        labels, scores = [], []
        for index, record in records:
            category, score = record["category_id"], record["score"]
            if not isinstance(category, int) or category not in table:
                raise InputError(
                    f"{_where(index)}: category_id {category!r} is not in the data set"
                )
            if not isinstance(score, int | float) or not abs(score) <= sys.float_info.max:
                raise InputError(
                    f"{_where(index)}: score {shorten(repr(score))} is no finite number"
                )
            labels.append(table[category])
            scores.append(score)
        objects = cls(
            np.array([index for index, _ in records], dtype=np.int64),
            np.array(labels, dtype=np.int64),
            np.array(scores, dtype=np.float64),
            _boxes(records, tape),
            tape.areas().astype(np.float64),
            np.zeros(len(records), dtype=bool),
            rles,
            tape,
            np.arange(len(records)),
        )
        return objects.take((-objects.scores).argsort(kind="stable"))

    @classmethod
    def labelled(
        cls,
        entries: Sequence[dict[str, Any]],
        table: Mapping[int, int],
        size: tuple[int, int],
    ) -> _Objects:
        """Annotations; ``bbox`` and ``area`` are theirs where they can be used."""
        rles = [_compress(entry["segmentation"], size) for entry in entries]
        tape = Tape.of(rles, size)
        areas = tape.areas()
        places = np.flatnonzero(areas)
        entries = [entries[i] for i in places.tolist()]
        tights, pixels = tape.boxes[places].tolist(), areas[places].tolist()
        chosen = [box_and_area(*each) for each in zip(entries, tights, pixels, strict=True)]
        return cls(
            places,
            np.array([table[entry["category_id"]] for entry in entries], dtype=np.int64),
            np.ones(len(entries)),
            np.array([box for box, _ in chosen], dtype=np.float64).reshape(-1, 4),
            np.array([area for _, area in chosen], dtype=np.float64),
            np.array([bool(entry.get("iscrowd")) for entry in entries], dtype=bool),
            [rles[i] for i in places.tolist()],
            tape,
            places,
        )

    def take(self, chosen: Ints | Flags) -> _Objects:
        """Some of them, in that order."""
        order = np.arange(len(self.labels))[chosen]
        return replace(
            self,
            numbers=self.numbers[order],
            labels=self.labels[order],
            scores=self.scores[order],
            boxes=self.boxes[order],
            areas=self.areas[order],
            crowd=self.crowd[order],
            rles=[self.rles[i] for i in order.tolist()],
            places=self.places[order],
        )

    def rle(self, index: int) -> Any:
        """Compressed RLE."""
        rle = self.rles[index]
        if isinstance(rle, dict) and isinstance(rle["counts"], str):
            return rle
        return self.tape.runs(int(self.places[index])).encode()

    def band(self, index: int) -> tuple[Mask, int]:
        """The boundary band of a mask, and its pixels."""
        window, corner = self.tape.window(int(self.places[index]))
        band = boundary_band(window, band_width(self.tape.size))
        return (band, corner), int(np.count_nonzero(band))


def _where(index: int) -> str:
    return f"result {index} (the first is 0)"


def _compress(segmentation: Any, size: tuple[int, int]) -> Any:
    """Polygons as compressed RLE, and its counts as text; everything else as it is."""
    if isinstance(segmentation, list):
        segmentation = draw_compressed(segmentation, size)
    if isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), bytes):
        return segmentation | {"counts": segmentation["counts"].decode("ascii", "replace")}
    return segmentation


def _boxes(records: Sequence[tuple[int, Mapping[str, Any]]], tape: Tape) -> Floats:
    """The records' boxes ``[D, 4]``, else those around their masks; x, y, width, height."""
    boxes = []
    for place, (_, record) in enumerate(records):
        if "bbox" in record:
            boxes.append(record["bbox"])
        else:
            x1, y1, x2, y2 = tape.boxes[place].tolist()
            boxes.append([x1, y1, x2 - x1, y2 - y1])
    array = _finite(boxes, (len(boxes), 4)) if boxes else np.zeros((0, 4))
    if array is None:
        index, box = next(
            (i, b) for (i, _), b in zip(records, boxes, strict=True) if _finite(b, (4,)) is None
        )
        raise InputError(f"{_where(index)}: bbox {box!r} is not [x, y, width, height]")
    return array


def _finite(value: Any, shape: tuple[int, ...]) -> Floats | None:
    """Nested lists as an array of finite numbers, or None if they are something else."""
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    return array if array.shape == shape and np.isfinite(array).all() else None


def _overlap(
    picture: int,
    found: _Objects,
    true: _Objects,
    kinds: Sequence[str],
    across: bool,
) -> Overlaps:
    """The overlaps of one picture."""
    pairs = (found.labels[:, None] == true.labels) | across
    ious = {}
    if "box" in kinds:
        ious["box"] = np.zeros(pairs.shape)
        if pairs.any():
            ious["box"] = coco_mask.iou(found.boxes, true.boxes, true.crowd) * pairs
    if "mask" in kinds or "boundary" in kinds:
        ious["mask"] = _mask_ious(found, true, pairs)
    if "boundary" in kinds:
        ious["boundary"] = _boundary_ious(found, true, ious["mask"])
    areas = dict.fromkeys(ious, found.areas)
    if "box" in kinds:
        areas["box"] = found.boxes[:, 2] * found.boxes[:, 3]
    return Overlaps(
        picture,
        found.tape.size,
        found.numbers,
        found.labels,
        found.scores,
        areas,
        dict.fromkeys(areas, np.zeros(len(found.labels), dtype=bool)),
        true.numbers,
        true.labels,
        true.areas,
        true.crowd,
        ious,
        across,
    )


def _mask_ious(found: _Objects, true: _Objects, pairs: Flags) -> Floats:
    """Mask IoU ``[D, G]`` of the pairs asked for, 0 for the others."""
    ious = np.zeros(pairs.shape)
    rows = np.flatnonzero(pairs.any(1))
    # Equal rows of pairs (a class, or everything) are one call.
    for pattern in {pairs[row].tobytes(): row for row in rows.tolist()}.values():
        columns = np.flatnonzero(pairs[pattern])
        alike = rows[pairs[rows, columns[0]]]
        ious[np.ix_(alike, columns)] = coco_mask.iou(
            [found.rle(i) for i in alike.tolist()],
            [true.rle(j) for j in columns.tolist()],
            true.crowd[columns],
        )
    return ious


def _boundary_ious(found: _Objects, true: _Objects, masks: Floats) -> Floats:
    """Boundary IoU ``[D, G]`` from mask IoU, where that is high enough for it to matter."""
    smaller = masks.copy()
    near = (masks >= LOWEST) & ~true.crowd
    true_bands = {j: true.band(j) for j in np.flatnonzero(near.any(0)).tolist()}
    for i in np.flatnonzero(near.any(1)).tolist():
        band, area = found.band(i)
        for j in np.flatnonzero(near[i]).tolist():
            true_band, true_area = true_bands[j]
            shared = shared_pixels(band, true_band)
            smaller[i, j] = min(smaller[i, j], shared / (area + true_area - shared))
    return smaller
