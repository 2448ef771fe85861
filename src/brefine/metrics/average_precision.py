"""COCO's average precision and recall, counted from overlaps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from brefine.metrics.overlaps import LOWEST, SIZES, Flags, Floats, Ints, Overlaps, assign

#: the IoUs that AP is a mean over, and the recalls at which precision is read
IOUS = np.linspace(LOWEST, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
#: detections a picture and class that average recall allows, for COCO and for LVIS
MOST, MOST_FEDERATED = (1, 10, 100), (300,)

WRONG, RIGHT, IGNORED = 0, 1, 2


@dataclass(frozen=True)
class Curves:
    """Precision and recall of one kind of overlap; NaN where a class has no object of the size.

    Attributes:
        precision: ``[T, R, K, A]``: at each IoU of ``IOUS``, recall of ``RECALLS``, class and
            size of ``SIZES``.
        recall: ``[T, K, A, M]``: the highest recall, with at most ``most[m]`` detections a
            picture and class.
        most: M numbers, rising.
    """

    precision: Floats
    recall: Floats
    most: Sequence[int] = MOST


@dataclass
class Tally:
    """Collects pictures one by one, a few bytes a detection, and gives the curves at the end.

    The pictures' order decides between equal scores.

    Args:
        classes: K.
        kinds: some of ``KINDS``.
        most: see ``Curves``.
    """

    classes: int
    kinds: Sequence[str]
    most: Sequence[int] = MOST
    objects: Ints = field(init=False)  # [K, A]
    _labels: list[Ints] = field(default_factory=list)
    _ranks: list[Ints] = field(default_factory=list)
    _scores: list[Floats] = field(default_factory=list)
    _verdicts: dict[str, list[NDArray[np.int8]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.objects = np.zeros((self.classes, len(SIZES)), dtype=np.int64)
        self._verdicts = {kind: [] for kind in self.kinds}

    def add(self, overlaps: Overlaps) -> None:
        """One more picture."""
        ignored = outside(overlaps.true_areas) | overlaps.crowd
        np.add.at(self.objects, overlaps.true_labels, ~ignored.T)
        self._labels.append(overlaps.labels)
        self._ranks.append(overlaps.ranks())
        self._scores.append(overlaps.scores)
        for kind in self.kinds:
            self._verdicts[kind].append(judge(overlaps, kind, ignored))

    def curves(self) -> dict[str, Curves]:
        """Precision and recall of every kind."""
        if not self._labels:
            self._labels, self._ranks = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
            self._scores = [np.zeros(0)]
            empty = np.zeros((0, len(SIZES), len(IOUS)), np.int8)
            self._verdicts = {kind: [empty] for kind in self.kinds}
        labels, ranks = np.concatenate(self._labels), np.concatenate(self._ranks)
        scores = np.concatenate(self._scores)
        # By class, then by score; equal scores stay in the order of the pictures.
        order = np.lexsort((-scores, labels))
        labels, ranks = labels[order], ranks[order]
        limits = np.searchsorted(labels, np.arange(self.classes + 1))
        curves = {}
        for kind, parts in self._verdicts.items():
            verdicts = np.concatenate(parts)[order]
            shape = len(IOUS), len(RECALLS), self.classes, len(SIZES)
            precision = np.full(shape, math.nan)
            recall = np.full((len(IOUS), self.classes, len(SIZES), len(self.most)), math.nan)
            for k in range(self.classes):
                here = slice(limits[k], limits[k + 1])
                for a, count in enumerate(self.objects[k].tolist()):
                    if count:
                        right = verdicts[here, a] == RIGHT
                        precision[:, :, k, a] = precision_at_recalls(verdicts[here, a], count)
                        for m, most in enumerate(self.most):
                            recall[:, k, a, m] = right[ranks[here] < most].sum(0) / count
            curves[kind] = Curves(precision, recall, self.most)
        return curves


def figures(curves: Curves, classes: Flags | slice = slice(None)) -> dict[str, float]:
    """Named figures, 0..1, means over the classes chosen; NaN where none has an object.

    Returns:
        ``AP``, ``AP50``, ``AP75``, ``AP_S``, ``AP_M``, ``AP_L``; ``AR1``, ``AR10``, ``AR100``
        (or what ``most`` says), ``AR_S``, ``AR_M``, ``AR_L``.
    """
    precision, recall = curves.precision[:, :, classes], curves.recall[:, classes]
    whole = precision[..., 0]
    values = {"AP": _mean(whole), "AP50": _mean(whole[0]), "AP75": _mean(whole[5])}
    for a, size in enumerate(SIZES):
        if size:
            values[f"AP{size}"] = _mean(precision[..., a])
    for m, most in enumerate(curves.most):
        values[f"AR{most}"] = _mean(recall[:, :, 0, m])
    for a, size in enumerate(SIZES):
        if size:
            values[f"AR{size}"] = _mean(recall[:, :, a, -1])
    return values


def _mean(values: Floats) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if there.size else math.nan


def outside(areas: Floats) -> Flags:
    """``[A, N]``: whether an area is not of each of ``SIZES``."""
    limits = np.array(list(SIZES.values()))[:, :, None]
    return (areas < limits[:, 0]) | (areas > limits[:, 1])


def judge(overlaps: Overlaps, kind: str, ignored: Flags) -> NDArray[np.int8]:
    """``[D, A, T]``: whether each detection is right, wrong, or ignored.

    Args:
        overlaps: of one picture.
        kind: which overlap.
        ignored: ``[A, G]``, objects that do not count.
    """
    same = overlaps.labels[:, None] == overlaps.true_labels
    ious = np.where(same, overlaps.ious[kind], 0.0) if overlaps.across else overlaps.ious[kind]
    found = assign(ious, IOUS, ignored, overlaps.crowd)
    verdicts = np.where(found >= 0, RIGHT, WRONG).astype(np.int8)
    d, a, t = np.nonzero(found >= 0)
    verdicts[d, a, t] = np.where(ignored[a, found[d, a, t]], IGNORED, RIGHT)
    excused = (outside(overlaps.areas[kind]) | overlaps.excused[kind]).T[:, :, None]
    verdicts[(found < 0) & excused] = IGNORED
    return verdicts


def precision_at_recalls(verdicts: NDArray[np.int8], count: int) -> Floats:
    """Precision ``[T, R]`` of one class and size from verdicts ``[N, T]``, best score first."""
    right = np.cumsum(verdicts == RIGHT, axis=0, dtype=np.float64)
    wrong = np.cumsum(verdicts == WRONG, axis=0, dtype=np.float64)
    precision = right / np.maximum(wrong + right, 1.0)
    # From the right: the best precision at this recall or a higher one; 0 beyond the highest.
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    precision = np.concatenate([precision, np.zeros((1, verdicts.shape[1]))])
    recall = right / count
    return np.stack(
        [precision[np.searchsorted(recall[:, t], RECALLS), t] for t in range(verdicts.shape[1])]
    )
