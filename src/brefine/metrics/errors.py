"""Kinds of errors, and what each of them costs.

In the spirit of TIDE (Bolya et al., ECCV 2020). Objects are found as COCO's AP at mask IoU 0.5
says. What is left over has one kind, the first that fits:

    * ``duplicate``: IoU >= 0.5 with an object of its class that a better score has taken.
    * ``classification``: IoU >= 0.5 with an object of another class.
    * ``localisation``: IoU >= 0.1 with an object of its class.
    * ``both``: IoU >= 0.1 with an object of another class.
    * ``background``: a detection with none of these.
    * ``missed``: an object that nothing found and that is in no ``classification`` or
      ``localisation`` error, each being about the object that it overlaps most.

(TIDE asks for ``localisation`` first. Here a good mask with a wrong name stays a
``classification`` error when it touches a neighbour of that name.) One kind more is ours:

    * ``boundary``: a detection that found its object, but whose Boundary IoU is below 0.5.

What a kind costs is how much AP at mask IoU 0.5 rises when errors of this kind alone are mended:

    * ``classification`` and ``localisation``: of those about one object that nothing found, the
      best score gets the right class and finds it; all others are removed.
    * ``both``, ``duplicate`` and ``background``: removed.
    * ``missed``: the objects are removed. A class without any object left has an AP of 1 if it
      has no wrong detection, else 0.
    * ``boundary``: mask AP minus Boundary AP, both at IoU 0.5.

Crowd regions, detections that match them, and detections excused by LVIS are no errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from brefine.metrics.average_precision import IGNORED, RIGHT, WRONG, precision_at_recalls
from brefine.metrics.overlaps import LOWEST, Flags, Floats, Ints, Overlaps

ERRORS = (
    "classification",
    "localisation",
    "both",
    "duplicate",
    "background",
    "missed",
    "boundary",
)
CLASSIFICATION, LOCALISATION, BOTH, DUPLICATE, BACKGROUND, MISSED, BOUNDARY = range(len(ERRORS))
FOUND, EXCUSED = -1, -2  # kinds of detections that are no errors

FAINT = 0.1  # IoU below which a detection has nothing to do with an object


class Judged(NamedTuple):
    """What became of the detections and objects of one picture."""

    kinds: NDArray[np.int8]  #: ``[D]``: of ``ERRORS``, or ``FOUND`` or ``EXCUSED``
    objects: Ints  #: ``[D]``: the object that it found or that the error is about, or -1
    missed: Flags  #: ``[G]``
    mended: Ints  #: ``[D]``: label under which it finds its object once its kind is mended, or -1


class Example(NamedTuple):
    """One error to look at."""

    weight: float  #: the higher, the better an example
    picture: int  #: number in ``CocoSet.pictures``
    record: int  #: number of the detection in the records, -1 for none
    object: int  #: number in ``CocoSet.annotations(picture)``, -1 for none
    iou: float  #: mask IoU of the two; Boundary IoU for ``boundary``


def judge(overlaps: Overlaps) -> Judged:
    """The kind of every detection and object of one picture.

    Args:
        overlaps: of kinds ``mask`` and ``boundary``, across classes.
    """
    match = overlaps.match("mask")
    found = (match >= 0) & ~np.append(overlaps.crowd, False)[match]
    free = ~overlaps.crowd
    free[match[found]] = False

    # One column more, of an object that nothing overlaps: the one an error may be about if any.
    same = overlaps.labels[:, None] == overlaps.true_labels
    ious = np.where(overlaps.crowd, 0.0, overlaps.ious["mask"])
    own = np.pad(np.where(same, ious, 0.0), ((0, 0), (0, 1)))
    other = np.pad(np.where(same, 0.0, ious), ((0, 0), (0, 1)))
    cases = {
        DUPLICATE: own.max(1) >= LOWEST,
        CLASSIFICATION: other.max(1) >= LOWEST,
        LOCALISATION: own.max(1) >= FAINT,
        BOTH: other.max(1) >= FAINT,
    }
    kinds = np.select(list(cases.values()), list(cases), BACKGROUND).astype(np.int8)
    about_own = np.isin(kinds, (DUPLICATE, LOCALISATION))
    objects = np.where(about_own, own.argmax(1), other.argmax(1))
    kinds[(match >= 0) | overlaps.excused["mask"]] = EXCUSED
    objects[np.isin(kinds, (BACKGROUND, EXCUSED))] = -1
    objects[match >= 0] = match[match >= 0]
    kinds[found] = FOUND
    outlines = overlaps.ious["boundary"][np.flatnonzero(found), match[found]]
    kinds[np.flatnonzero(found)[outlines < LOWEST]] = BOUNDARY

    missed, mended = free.copy(), np.full(len(kinds), -1)
    for kind in (CLASSIFICATION, LOCALISATION):
        errors = np.flatnonzero(kinds == kind)
        errors = errors[free[objects[errors]]]
        about, first = np.unique(objects[errors], return_index=True)
        missed[about] = False
        mended[errors[first]] = overlaps.true_labels[about]
    return Judged(kinds, objects, missed, mended)


@dataclass
class ErrorTally:
    """Collects the errors of pictures one by one, a few bytes a detection.

    The pictures' order decides between equal scores.

    Args:
        thresholds: ``[K]``, for each label the score from which on a detection is kept.
        most: examples of each kind, each from another picture.

    Attributes:
        counts: ``[2, 7]``: errors of each kind, of all detections and of those kept only.
        examples: for each kind, the best first: of detections kept only, by their score;
            missed objects by their area, boundaries by what they lack of the mask IoU.
        confusion: ``[K + 1, K + 1]``: how often an object of the row's class was found, at mask
            IoU 0.5, by a kept detection of the column's; the best score chooses first, and classes
            decide between equal IoUs only. Last row: detections that found nothing. Last
            column: objects that nothing found.
    """

    thresholds: Sequence[float]
    most: int = 6
    counts: Ints = field(init=False)
    examples: list[list[Example]] = field(init=False)
    confusion: Ints = field(init=False)
    _objects: Ints = field(init=False)  # [K]
    _missed: Ints = field(init=False)  # [K]
    _labels: list[Ints] = field(default_factory=list)
    _scores: list[Floats] = field(default_factory=list)
    _kinds: list[NDArray[np.int8]] = field(default_factory=list)
    _mended: list[Ints] = field(default_factory=list)
    _verdicts: list[NDArray[np.int8]] = field(default_factory=list)  # by boundary

    def __post_init__(self) -> None:
        classes = len(self.thresholds)
        self.counts = np.zeros((2, len(ERRORS)), dtype=np.int64)
        self.examples = [[] for _ in ERRORS]
        self.confusion = np.zeros((classes + 1, classes + 1), dtype=np.int64)
        self._objects, self._missed = np.zeros((2, classes), dtype=np.int64)

    def add(self, overlaps: Overlaps) -> Judged:
        """One more picture; of kinds ``mask`` and ``boundary``, across classes.

        Returns:
            What became of all its detections and objects.
        """
        judged = judge(overlaps)
        self._count(judged, 0)
        self._objects += np.bincount(
            overlaps.true_labels[~overlaps.crowd], minlength=len(self._objects)
        )
        self._missed += np.bincount(
            overlaps.true_labels[judged.missed], minlength=len(self._objects)
        )
        self._labels.append(overlaps.labels)
        self._scores.append(overlaps.scores)
        self._kinds.append(judged.kinds)
        self._mended.append(judged.mended)
        self._verdicts.append(_verdicts(overlaps, "boundary"))

        limits = np.asarray(self.thresholds, dtype=np.float64)
        kept = overlaps.take(overlaps.scores >= limits[overlaps.labels], overlaps.objects >= 0)
        alone = judge(kept)
        self._count(alone, 1)
        self._keep_examples(kept, alone)
        self._confuse(kept)
        return judged

    def ap50(self) -> float:
        """AP at mask IoU 0.5; NaN where there is no object."""
        return self._measure(self._verdict(), _join(self._labels), self._objects)

    def costs(self) -> dict[str, float]:
        """What each kind of ``ERRORS`` costs: AP at mask IoU 0.5, 0..1; NaN without objects."""
        labels, kinds, mended = (_join(x) for x in (self._labels, self._kinds, self._mended))
        verdict, now = self._verdict(), self.ap50()
        costs = {}
        for kind, name in enumerate(ERRORS):
            if kind == MISSED:
                value = self._measure(verdict, labels, self._objects - self._missed) - now
            elif kind == BOUNDARY:
                value = now - self._measure(_join(self._verdicts), labels, self._objects)
            else:
                mine = kinds == kind
                right = mine & (mended >= 0)
                better = np.where(right, RIGHT, np.where(mine, IGNORED, verdict))
                value = self._measure(better, np.where(right, mended, labels), self._objects) - now
            costs[name] = value
        return costs

    def _count(self, judged: Judged, row: int) -> None:
        errors = judged.kinds[judged.kinds >= 0]
        self.counts[row] += np.bincount(errors, minlength=len(ERRORS))
        self.counts[row, MISSED] += np.count_nonzero(judged.missed)

    def _keep_examples(self, overlaps: Overlaps, judged: Judged) -> None:
        candidates: list[list[Example]] = [[] for _ in ERRORS]
        for d in np.flatnonzero(judged.kinds >= 0).tolist():
            kind, about = int(judged.kinds[d]), int(judged.objects[d])
            iou = float(overlaps.ious["mask"][d, about]) if about >= 0 else 0.0
            weight = float(overlaps.scores[d])
            if kind == BOUNDARY:
                outline = float(overlaps.ious["boundary"][d, about])
                weight, iou = iou - outline, outline
            number = int(overlaps.objects[about]) if about >= 0 else -1
            record = int(overlaps.records[d])
            candidates[kind].append(Example(weight, overlaps.picture, record, number, iou))
        for g in np.flatnonzero(judged.missed).tolist():
            area, number = float(overlaps.true_areas[g]), int(overlaps.objects[g])
            candidates[MISSED].append(Example(area, overlaps.picture, -1, number, 0.0))
        for kind, mine in enumerate(candidates):
            if mine:
                best = max(mine, key=lambda example: example.weight)
                ordered = sorted([*self.examples[kind], best], key=lambda one: -one.weight)
                self.examples[kind] = ordered[: self.most]

    def _confuse(self, overlaps: Overlaps) -> None:
        same = overlaps.labels[:, None] == overlaps.true_labels
        ious = np.where(overlaps.crowd & ~same, 0.0, overlaps.ious["mask"])
        ious += 1e-9 * (same & (ious >= LOWEST))  # of one shape under two names, its own first
        match = replace(overlaps, ious={"mask": ious}).match("mask", across=True)
        hit = match >= 0
        crowd = np.append(overlaps.crowd, False)[match]
        found = hit & ~crowd
        np.add.at(self.confusion, (overlaps.true_labels[match[found]], overlaps.labels[found]), 1)
        invented = overlaps.labels[~hit & ~overlaps.excused["mask"]]
        free = ~overlaps.crowd
        free[match[found]] = False
        self.confusion[-1] += np.bincount(invented, minlength=len(self.confusion))
        self.confusion[:, -1] += np.bincount(
            overlaps.true_labels[free], minlength=len(self.confusion)
        )

    def _verdict(self) -> Ints:
        """``[N]``: whether each detection is right, wrong or ignored, by mask."""
        kinds = _join(self._kinds)
        return np.select(
            [np.isin(kinds, (FOUND, BOUNDARY)), kinds == EXCUSED], [RIGHT, IGNORED], WRONG
        )

    def _measure(self, verdict: Ints, labels: Ints, objects: Ints) -> float:
        """AP at one IoU, a mean over the classes that have an object in the labels."""
        scores = np.concatenate([*self._scores, np.zeros(0)])
        order = np.lexsort((-scores, labels))
        limits = np.searchsorted(labels[order], np.arange(len(objects) + 1))
        values = []
        for k in np.flatnonzero(self._objects).tolist():
            mine = verdict[order[limits[k] : limits[k + 1]]].astype(np.int8)
            if objects[k]:
                precision = precision_at_recalls(mine[:, None], int(objects[k]))
                values.append(float(precision.mean()))
            else:
                values.append(float(not np.any(mine == WRONG)))
        return float(np.mean(values)) if values else math.nan


def _join(parts: Sequence[NDArray[Any]]) -> Ints:
    return np.concatenate([*parts, np.zeros(0, np.int64)]).astype(np.int64)


def _verdicts(overlaps: Overlaps, kind: str) -> NDArray[np.int8]:
    """``[D]``: whether each detection is right, wrong or ignored at an IoU of 0.5."""
    match = overlaps.match(kind)
    crowd = np.append(overlaps.crowd, False)[match]
    ignored = crowd | ((match < 0) & overlaps.excused[kind])
    return np.select([ignored, match >= 0], [IGNORED, RIGHT], WRONG).astype(np.int8)
