"""What is wrong with the mask, the box and the area of one annotation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brefine.data.coco import as_number, choose_box, find_fault
from brefine.data.faults import shorten
from brefine.rle import check_polygons, decode

#: ``tell(kind, message)``: what is wrong with the annotation
Tell = Callable[[str, str], None]

#: pixels that a box or a polygon may leave the picture by: drawing tools round
FRAME_SLACK = 2.0

#: sides in a row for which those in their reach are looked up
ROWS = 256

#: words in what ``coco.py`` says of an unusable annotation, and what that is called here; what
#: else it says is of damaged RLE or polygons
_REASONS = (
    ("no segmentation", "no-mask"),
    ("empty segmentation", "no-mask"),
    ("iscrowd", "bad-crowd"),
    ("3 points", "few-points"),
    ("far outside", "outside-mask"),
    ("no pixel", "empty-mask"),
)


def check_geometry(entry: dict[str, Any], size: tuple[int, int] | None, tell: Tell) -> bool:
    """Check mask, box and area of one annotation.

    Args:
        entry: of a COCO json.
        size: (height, width) of its picture; None: not known.
        tell: is called with every fault.

    Returns:
        Whether a mask remains (or cannot be drawn for want of a size).
    """
    reason = None if size is None else find_fault(entry, size)
    if size is None or reason is not None:
        if reason is not None:
            other = "bad-rle" if isinstance(entry.get("segmentation"), dict) else "bad-polygon"
            kind = next((kind for words, kind in _REASONS if words in reason), other)
            if kind == "empty-mask" and size and _is_outside(entry["segmentation"], size):
                kind, reason = "outside-mask", "the mask lies outside of the picture"
            tell(kind, reason)
        _check_box(entry, None, size, tell)
        _check_area(entry, None, tell)
        return reason is None
    segmentation = entry["segmentation"]
    runs = decode(segmentation, size)
    pixels = runs.area()
    if not pixels:
        tell("sliver", "too thin to hold a pixel of the picture")
    elif isinstance(segmentation, list):
        _check_outline(segmentation, size, tell)
    if isinstance(segmentation, list) and entry.get("iscrowd"):
        tell("crowd-polygons", "a crowd region drawn as polygons")
    _check_box(entry, runs.box() if pixels else None, size, tell)
    _check_area(entry, pixels or None, tell)
    return pixels > 0


def _is_outside(segmentation: Any, size: tuple[int, int]) -> bool:
    """Whether these are polygons of which none touches the picture."""
    height, width = size
    if not isinstance(segmentation, list):
        return False
    for points in check_polygons(segmentation, size):
        x, y = points[0::2], points[1::2]
        if x.max() >= 0 and y.max() >= 0 and x.min() <= width and y.min() <= height:
            return False
    return True


def _check_outline(polygons: list[Any], size: tuple[int, int], tell: Tell) -> None:
    """Parts without area, sides that cross, points outside: each said once an annotation."""
    height, width = size
    empty, outside = [], 0.0
    crossing: tuple[int, tuple[int, int]] | None = None
    for part, polygon in enumerate(polygons):
        points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
        if len(points) < 3:
            empty.append(part)
            continue
        x, y = points.T
        outside = max(outside, -x.min(), -y.min(), x.max() - width, y.max() - height)
        sides = find_crossing(points)
        if sides is not None:
            crossing = crossing or (part, sides)
        elif abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) < 1e-6 * max(size):
            empty.append(part)
    if empty:
        count = f"{len(empty)} of {len(polygons)} polygons cover nothing"
        tell("empty-part", f"{count}, first: segmentation[{empty[0]}]")
    if crossing:
        part, (a, b) = crossing
        tell("self-crossing", f"segmentation[{part}]: side {a} crosses side {b}")
    if outside > FRAME_SLACK:
        tell("clipped-mask", f"polygons leave the picture by {outside:.1f} pixels")


def find_crossing(points: NDArray[np.float64]) -> tuple[int, int] | None:
    """Two sides of a closed polygon ``[n, 2]`` that properly cross, or None; touching is not.

    Sides that are gone along there and back do not count: such bridges between parts, or to a
    hole, have no pixels.
    """
    n = len(points)
    if n < 4:
        return None
    points = points - points.mean(axis=0)
    steps = np.roll(points, -1, axis=0) - points
    found = _find_pair(points, steps, np.arange(n), n)
    if found is not None:
        sides = [
            (*a, *b) for a, b in zip(points.tolist(), np.roll(points, -1, 0).tolist(), strict=True)
        ]
        counts = Counter(sides)
        once = [
            i for i, (a, b, c, d) in enumerate(sides) if counts[a, b, c, d] > counts[c, d, a, b]
        ]
        if len(once) < n:
            found = _find_pair(points[once], steps[once], np.array(once), n)
    return found


def _find_pair(
    points: NDArray[np.float64],
    steps: NDArray[np.float64],
    sides: NDArray[np.int64],
    total: int,
) -> tuple[int, int] | None:
    """Two of the ``sides`` of ``total`` that cross; they start at ``points``, ``steps`` long."""
    n = len(sides)
    noise = 1e-9 * max(1.0, float(np.abs(points).max(initial=0)) ** 2)  # rounding: that is touching
    low, high = np.minimum(points, points + steps), np.maximum(points, points + steps)
    starts = np.arange(0, n, ROWS)
    lows, highs = np.minimum.reduceat(low, starts), np.maximum.reduceat(high, starts)
    for start, least, most in zip(starts.tolist(), lows, highs, strict=True):
        # Sides in a row lie near each other: most others are out of their reach.
        there = starts[((lows <= most) & (highs >= least)).all(1)]
        columns = (there[:, None] + np.arange(ROWS)).ravel()
        columns = columns[columns < n]
        columns = columns[((low[columns] <= most) & (high[columns] >= least)).all(1)]
        others, paths = points[columns], steps[columns]
        rows = max(1, 1_000_000 // max(len(columns), 1))
        for first in range(start, min(start + ROWS, n), rows):
            part = slice(first, min(first + rows, start + ROWS))
            # [rows, columns]: on which side of line i point j lies, then point i and i + 1 of j
            away = others[None] - points[part, None]
            of_points = _cross(steps[part, None], away)
            of_next = of_points + _cross(steps[part, None], paths[None])
            of_start = -_cross(paths[None], away)
            of_end = of_start + _cross(paths[None], steps[part, None])
            found = np.argwhere(
                (np.minimum(of_points, of_next) < -noise)
                & (np.maximum(of_points, of_next) > noise)
                & (np.minimum(of_start, of_end) < -noise)
                & (np.maximum(of_start, of_end) > noise)
            )
            # Neighbours share a point: what they seem to cross by is rounding.
            mine, theirs = sides[found[:, 0] + first], sides[columns[found[:, 1]]]
            pairs = np.sort(np.stack([mine, theirs], 1), 1)
            gaps = pairs[:, 1] - pairs[:, 0]
            pairs = pairs[(gaps > 1) & (gaps < total - 1)]
            if len(pairs):
                return int(pairs[0, 0]), int(pairs[0, 1])
    return None


def _cross(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    product: NDArray[np.float64] = a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]
    return product


def _check_box(
    entry: dict[str, Any],
    tight: tuple[int, int, int, int] | None,
    size: tuple[int, int] | None,
    tell: Tell,
) -> None:
    """One fault at most, the likeliest: a box in the wrong convention is wrong in other ways."""
    given = entry.get("bbox")
    if given is None:
        return
    values = [as_number(value) for value in given] if isinstance(given, list) else []
    numbers = [value for value in values if value is not None]
    if len(values) != 4 or len(numbers) != 4:
        tell("bad-box", f"bbox is {shorten(given)}, expected 4 finite numbers")
        return
    x, y, w, h = numbers
    box = x, y, x + w, y + h
    agrees = w > 0 and h > 0 and (tight is None or choose_box(entry, tight) == box)
    corners = x, y, x + (w - x), y + (h - y)
    said = f"bbox {shorten(given)}"
    if not agrees and tight is not None and w > x and h > y:
        turned = {"bbox": [x, y, w - x, h - y]}
        if choose_box(turned, tight) == corners:
            tell("corner-box", f"{said} fits the mask if read as corners x1, y1, x2, y2")
            return
    if w <= 0 or h <= 0:
        tell("empty-box", f"{said} has no area")
    elif not agrees and tight is not None:
        x1, y1, x2, y2 = tight
        mask = f"[{x1}, {y1}, {x2 - x1}, {y2 - y1}]"
        tell("box-mismatch", f"{said}, but the mask's is {mask}")
    elif size is not None:
        outside = max(-x, -y, box[2] - size[1], box[3] - size[0])
        if outside > FRAME_SLACK:
            tell("outside-box", f"{said} leaves the picture by {outside:.1f} pixels")


def _check_area(entry: dict[str, Any], pixels: int | None, tell: Tell) -> None:
    """``area`` against the mask's: by more than a factor of 2, and 16 pixels, is no rounding."""
    given = entry.get("area")
    if given is None:
        return
    area = as_number(given)
    said = f"area is {shorten(given)}"
    if area is None or area <= 0:
        tell("bad-area", f"{said}, expected a number above 0")
    elif pixels is not None and abs(area - pixels) > max(16.0, min(area, pixels)):
        tell("bad-area", f"{said}, but the mask has {pixels} pixels")
