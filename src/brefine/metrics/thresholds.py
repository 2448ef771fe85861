"""From which score on to believe a detection: the threshold with the best F1.

A detection is right when it found an object of its class at mask IoU 0.5, by the matching of
`Overlaps`. F1 is ``2 right / (kept + objects)``.

A class of few objects has no reliable threshold of its own: the score that happened to be best for
three objects is mostly chance. So each class is given ``BORROWED`` objects of the average class
beside its own: with n objects its threshold has the best F1 of

    right + w right', kept + w kept', objects + w objects',    w = BORROWED / objects'

where ' are the counts of all classes together. A class without objects thus gets the threshold of
all classes, one with hundreds its own, and nothing jumps between the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from brefine.metrics.overlaps import Flags, Floats, Ints, Overlaps

BORROWED = 10  # objects
GRID = 200  # scores of all classes that are tried for each class beside the scores of its own


class Hits(NamedTuple):
    """Detections that count, of any number of pictures, and whether they are right.

    Attributes:
        pictures: ``[D]``, the picture's number.
        labels: ``[D]``.
        scores: ``[D]``.
        right: ``[D]`` bool.
        true_labels: ``[G]``, of the objects that count.
    """

    pictures: Ints
    labels: Ints
    scores: Floats
    right: Flags
    true_labels: Ints

    @classmethod
    def of(cls, overlaps: Overlaps) -> Hits:
        """One picture's. What lies in a crowd region or is excused is left out."""
        match = overlaps.match("mask")
        right = match >= 0
        in_crowd = np.append(overlaps.crowd, False)[match]
        counts = np.where(right, ~in_crowd, ~overlaps.excused["mask"])
        return cls(
            np.full(np.count_nonzero(counts), overlaps.picture, dtype=np.int64),
            overlaps.labels[counts],
            overlaps.scores[counts],
            right[counts],
            overlaps.true_labels[~overlaps.crowd],
        )

    @classmethod
    def join(cls, parts: Iterable[Hits]) -> Hits:
        """Those of all pictures."""
        whole, flags = np.zeros(0, np.int64), np.zeros(0, np.bool_)
        nothing = cls(whole, whole, np.zeros(0), flags, whole)
        return cls(*map(np.concatenate, zip(nothing, *parts, strict=True)))


def quality(scores: Floats, right: Flags, objects: int, threshold: float) -> dict[str, float]:
    """How good those detections are that score at least the threshold.

    Returns:
        ``F1``, ``precision`` (NaN where nothing is kept) and ``recall``, fractions 0..1; all NaN
        where there is no object.
    """
    kept = scores >= threshold
    found, count = int(right[kept].sum()), int(kept.sum())
    if not objects:
        return dict.fromkeys(("F1", "precision", "recall"), math.nan)
    return {
        "F1": 2 * found / (count + objects),
        "precision": found / count if count else math.nan,
        "recall": found / objects,
    }


def choose(hits: Hits, classes: int) -> tuple[list[float], float]:
    """Thresholds that keep detections which score at least as much.

    Of several scores that are best the highest is taken. Where no detection is right it is 0.5.

    Args:
        hits: of a validation set.
        classes: K.

    Returns:
        One for each label, and the one that is best when all classes share it.
    """
    objects = np.bincount(hits.true_labels, minlength=classes)
    every = _Counts.of(hits.scores, hits.right, len(hits.true_labels))
    everywhere = np.unique(hits.scores)
    overall = _best(everywhere, every)
    if len(everywhere) > GRID:
        everywhere = np.quantile(hits.scores, np.linspace(0, 1, GRID), method="nearest")
    share = BORROWED / every.objects if every.objects else 0.0
    order = hits.labels.argsort(kind="stable")
    limits = np.searchsorted(hits.labels[order], np.arange(classes + 1)).tolist()
    thresholds = []
    for k, count in enumerate(objects.tolist()):
        mine = order[limits[k] : limits[k + 1]]
        own = _Counts.of(hits.scores[mine], hits.right[mine], count)
        if count == every.objects or not count:  # alone, or unknown
            thresholds.append(overall)
        else:
            candidates = np.union1d(own.scores, everywhere)
            thresholds.append(_best(candidates, own, every, share))
    return thresholds, overall


class _Counts(NamedTuple):
    """Detections by rising score, and how many of the best ``[0 .. D]`` are right."""

    scores: Floats
    right: Ints
    objects: int

    @classmethod
    def of(cls, scores: Floats, right: Flags, objects: int) -> _Counts:
        order = (-scores).argsort(kind="stable")
        return cls(scores[order[::-1]], np.append(0, right[order].cumsum()), objects)

    def above(self, candidates: Floats) -> tuple[Ints, Ints]:
        """How many detections a candidate keeps, and how many of these are right."""
        kept = len(self.scores) - np.searchsorted(self.scores, candidates)
        return kept, self.right[kept]


def _best(candidates: Floats, own: _Counts, every: _Counts | None = None, w: float = 0.0) -> float:
    """The candidate (rising) with the best F1, see the top of this file."""
    kept, right = own.above(candidates)
    parts: NDArray[np.float64] = np.stack([right, kept + own.objects]).astype(np.float64)
    if every is not None:
        kept, right = every.above(candidates)
        parts += w * np.stack([right, kept + every.objects])
    f1 = 2 * parts[0] / np.maximum(parts[1], 1e-9)
    if not len(f1) or f1.max() <= 0:
        return 0.5
    # Sums in another order differ in the last bits: that must not decide between equals.
    return float(candidates[np.flatnonzero(f1 >= f1.max() - 1e-12)[-1]])
