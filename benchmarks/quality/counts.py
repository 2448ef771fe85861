"""Objects found, missed and made up at one threshold, as the Data Science Bowl counted them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from brefine.data.coco import CocoSet
from brefine.parts.masks import to_records

LEVELS = np.arange(0.5, 1.0, 0.05)


def count(records: Iterable[Mapping[str, Any]], dataset: CocoSet) -> dict[str, float]:
    """What is left of detections above a threshold, compared with the labels.

    Args:
        records: COCO results, of one class, only those to be reported.
        dataset: pictures and labels, without crowd regions.

    Returns:
        ``F1`` and ``accuracy`` (right / (right + made up + missed)) of all objects together at
        mask IoU 0.5, and ``bowl``: the mean over pictures of the mean accuracy at IoU 0.50,
        0.55 ... 0.95.
    """
    of_picture: dict[Any, list[Mapping[str, Any]]] = {}
    for record in records:
        of_picture.setdefault(record["image_id"], []).append(record)
    right = wrong = missed = 0
    scores = []
    for index, picture in enumerate(dataset.pictures):
        found = sorted(of_picture.get(picture.id, []), key=lambda record: -record["score"])
        truth = to_records(dataset.target(index), picture.id, dataset.categories, picture.size)
        hits = _match([r["segmentation"] for r in found], [r["segmentation"] for r in truth])
        right += int(hits[0])
        wrong += len(found) - int(hits[0])
        missed += len(truth) - int(hits[0])
        union = len(found) + len(truth) - hits
        scores.append(float((hits / np.maximum(union, 1)).mean()) if len(found + truth) else 1.0)
    return {
        "F1": 2 * right / max(1, 2 * right + wrong + missed),
        "accuracy": right / max(1, right + wrong + missed),
        "bowl": float(np.mean(scores)),
    }


def _match(found: list[Any], truth: list[Any]) -> np.ndarray:
    """How many detections, best first, find an object of their own, at each level."""
    if not found or not truth:
        return np.zeros(len(LEVELS))
    iou = coco_mask.iou(found, truth, [0] * len(truth))
    hits = np.zeros(len(LEVELS))
    for at, level in enumerate(LEVELS):
        left = iou.copy()
        for row in left:
            best = int(row.argmax())
            if row[best] >= level:
                hits[at] += 1
                left[:, best] = 0
    return hits
