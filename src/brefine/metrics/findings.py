"""Everything that a report shows beside the figures, collected in one go through the pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from brefine.data.coco import CocoSet
from brefine.metrics.average_precision import Curves, Tally
from brefine.metrics.boundary import Mask
from brefine.metrics.errors import BOUNDARY, EXCUSED, FOUND, ErrorTally
from brefine.metrics.overlaps import Flags, Floats, Ints, Overlaps, compare
from brefine.metrics.profile import Profile
from brefine.progress import track
from brefine.rle import decode

EXAMPLES = 6  # of each kind of error


class Rating(NamedTuple):
    """How well one picture went, of the detections that are kept."""

    quality: float  #: mean IoU of the objects found, times F1
    weight: int  #: objects and detections
    picture: int  #: number in ``CocoSet.pictures``
    found: int
    objects: int
    kept: int
    iou: float  #: mean mask IoU of the objects found


@dataclass
class Findings:
    """Everything that the page shows beside the figures.

    Attributes:
        errors: kinds of errors, examples, confusion.
        curves: precision and recall of ``mask`` and ``boundary``.
        profile: where masks are wrong; of the detections that are kept and found their object.
        scores: ``[D]`` of all detections that count.
        right: ``[D]``, whether each found its object at mask IoU 0.5.
        hits: ``[K, 2]``: detections that are kept, and those of them that are right.
        ratings: one a picture with anything in it.
    """

    errors: ErrorTally
    curves: Mapping[str, Curves]
    profile: Profile
    scores: Floats
    right: Flags
    hits: Ints
    ratings: list[Rating]


def gather(
    records: Sequence[Mapping[str, Any]],
    thresholds: Sequence[float],
    dataset: CocoSet,
    *,
    limit: int | None = None,
    progress: bool = False,
) -> Findings:
    """Look at all detections and labels once more.

    Args:
        records: results.
        thresholds: for each label the score from which on a detection is kept.
        dataset: pictures and labels.
        limit: only the first so many pictures.
        progress: show a bar with an ETA on stderr.
    """
    classes = len(dataset.categories)
    errors, profile = ErrorTally(thresholds, EXAMPLES), Profile()
    tally = Tally(classes, ("mask", "boundary"))
    limits = np.asarray(thresholds, dtype=np.float64)
    scores, right, ratings = [np.zeros(0)], [np.zeros(0, dtype=bool)], []
    hits = np.zeros((classes, 2), dtype=np.int64)
    count = len(dataset.pictures[:limit])
    steps = compare(records, dataset, kinds=("mask", "boundary"), across=True, limit=limit)
    for overlaps in track(steps, "report", count) if progress and count else steps:
        judged = errors.add(overlaps)
        tally.add(overlaps)
        counts, hit = judged.kinds != EXCUSED, np.isin(judged.kinds, (FOUND, BOUNDARY))
        kept = counts & (overlaps.scores >= limits[overlaps.labels])
        scores.append(overlaps.scores[counts])
        right.append(hit[counts])
        hits[:, 0] += np.bincount(overlaps.labels[kept], minlength=classes)
        hits[:, 1] += np.bincount(overlaps.labels[kept & hit], minlength=classes)
        pairs = np.flatnonzero(kept & hit)
        _add_pairs(profile, overlaps, pairs, judged.objects[pairs], records, dataset)
        objects, number = int((~overlaps.crowd).sum()), int(kept.sum())
        if objects or number:
            ious = overlaps.ious["mask"][pairs, judged.objects[pairs]]
            iou = float(ious.mean()) if len(pairs) else 0.0
            quality = iou * 2 * len(pairs) / (objects + number)
            ratings.append(
                Rating(
                    quality, objects + number, overlaps.picture, len(pairs), objects, number, iou
                )
            )
    return Findings(
        errors,
        tally.curves(),
        profile,
        np.concatenate(scores),
        np.concatenate(right),
        hits,
        ratings,
    )


def _add_pairs(
    profile: Profile,
    overlaps: Overlaps,
    rows: Ints,
    columns: Ints,
    records: Sequence[Mapping[str, Any]],
    dataset: CocoSet,
) -> None:
    """Detections (rows of the overlaps) and the objects (columns) that they found."""
    labelled = dataset.annotations(overlaps.picture)
    for d, g in zip(rows.tolist(), columns.tolist(), strict=True):
        found = _window(plain(records[overlaps.records[d]]), overlaps.size)
        true = _window(labelled[overlaps.objects[g]], overlaps.size)
        ious = float(overlaps.ious["mask"][d, g]), float(overlaps.ious["boundary"][d, g])
        profile.add(found, true, overlaps.size, float(overlaps.true_areas[g]), ious)


def _window(entry: Mapping[str, Any], size: tuple[int, int]) -> Mask:
    window, corner = decode(entry["segmentation"], size).window()
    return window.numpy(), corner


def plain(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The record with counts as text; pycocotools makes bytes."""
    rle = record["segmentation"]
    if isinstance(rle, Mapping) and isinstance(rle.get("counts"), bytes):
        return {**record, "segmentation": {**rle, "counts": rle["counts"].decode("ascii")}}
    return record
