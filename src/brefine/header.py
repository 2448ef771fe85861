"""What a model's file says about itself: its classes, and what its scores mean.

A model folder keeps it in the header of its weights, an exported model in its metadata. Nothing
here needs torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path

from brefine.metrics.calibration import IDENTITY, Calibration
from brefine.structures import Category, InputError


def describe_classes(categories: Sequence[Category]) -> dict[str, str]:
    """The part of a file's metadata that names the classes."""
    return {"categories": json.dumps([category._asdict() for category in categories])}


def describe_scores(
    thresholds: Sequence[float], overall: float, calibration: Calibration
) -> dict[str, str]:
    """The part of a file's metadata that says what scores mean."""
    return {
        "thresholds": json.dumps(list(thresholds)),
        "overall": json.dumps(overall),
        "calibration": json.dumps(calibration.as_dict()),
    }


def limits(thresholds: Sequence[float], threshold: float | None) -> list[float]:
    """The score from which each class is reported.

    Args:
        thresholds: the model's own.
        threshold: one for all instead of them.

    Raises:
        InputError: it is no share, 0..1.
    """
    if threshold is None:
        return list(thresholds)
    if not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise InputError(f"threshold {threshold}: expected a score, 0 to 1")
    return [threshold] * len(thresholds)


def read_header(
    header: Mapping[str, str] | None, path: Path
) -> tuple[list[Category], list[float], float, Calibration]:
    """Category table, thresholds and calibration from a file's metadata.

    Files of before calibration have neither an overall threshold nor a map.

    Raises:
        InputError: the file is not of this library, or its metadata is damaged.
    """
    if not header or header.get("format") != "brefine":
        raise InputError(f"{path}: not written by brefine: its header has no format brefine")
    try:
        rows = json.loads(header["categories"])
        categories = [Category(int(row["id"]), str(row["name"])) for row in rows]
        thresholds = [float(value) for value in json.loads(header["thresholds"])]
        overall = float(json.loads(header.get("overall", "0.5")))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: its header's categories or thresholds are damaged") from error
    finite = all(map(isfinite, [*thresholds, overall]))
    if not categories or len(categories) != len(thresholds) or not finite:
        raise InputError(
            f"{path}: its header has {len(categories)} categories and thresholds {thresholds}: "
            "expected one finite threshold a category"
        )
    try:
        knots = header.get("calibration")
        calibration = IDENTITY if knots is None else Calibration.parse(json.loads(knots))
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: its header's calibration is damaged: {error}") from error
    return categories, thresholds, overall, calibration
