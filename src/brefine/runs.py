"""What can be done to masks as runs of pixels: cut, join, compare, clean; none is ever drawn.

Time and memory follow the number of runs, about one for each column that a mask covers, and not
the size of the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brefine.rle import Runs, decode

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]
COLUMNS = 2**12  # of pixels, pasted together: what they need fits a CPU's cache
Box = tuple[int, int, int, int]  # xyxy pixels, last ones exclusive


def of_intervals(starts: Ints, stops: Ints, size: tuple[int, int]) -> Runs:
    """A mask from the pixels ``starts[i] .. stops[i]`` (exclusive), counted down the columns.

    Args:
        starts: ``[n]``, rising.
        stops: ``[n]``, each above its start and at most the next start, which it is joined to
            when equal.
        size: (height, width).
    """
    joined = stops[:-1] == starts[1:]
    if joined.any():
        starts, stops = starts[np.append(True, ~joined)], stops[np.append(~joined, True)]
    edges = np.stack([starts, stops], 1).ravel()
    total = size[0] * size[1]
    counts = np.diff(edges, prepend=0)
    if not len(edges) or edges[-1] < total:
        counts = np.append(counts, [total - (edges[-1] if len(edges) else 0), 0])
    return Runs(counts, size)


def intervals(runs: Runs) -> tuple[Ints, Ints]:
    """The pixels set as ``starts [n]`` and ``stops [n]``, counted down the columns, none empty."""
    ends = runs.counts.cumsum()
    starts, stops = ends[0::2], ends[1::2]
    some = stops > starts
    return starts[some], stops[some]


def spans(runs: Runs) -> tuple[Ints, Ints, Ints]:
    """The pixels set, column by column: ``x``, ``top`` and ``bottom`` (exclusive), ``[n]`` each."""
    starts, stops = intervals(runs)
    height = runs.size[0]
    first, last = starts // height, (stops - 1) // height
    several = last - first + 1
    begin = several.cumsum() - several
    x = first.repeat(several) + np.arange(int(several.sum())) - begin.repeat(several)
    corner = x * height
    top = np.maximum(starts.repeat(several) - corner, 0)
    bottom = np.minimum(stops.repeat(several) - corner, height)
    return x, top, bottom


def of_spans(x: Ints, top: Ints, bottom: Ints, size: tuple[int, int]) -> Runs:
    """The inverse of ``spans``, for spans in rising order, none empty."""
    return of_intervals(x * size[0] + top, x * size[0] + bottom, size)


def of_window(window: NDArray[Any], origin: tuple[int, int], size: tuple[int, int]) -> Runs:
    """A mask from a window ``[h, w]``, bool or 0/1, whose top left pixel is (x, y) ``origin``."""
    columns = np.zeros((window.shape[1], window.shape[0] + 2), dtype=bool)
    columns[:, 1:-1] = window.T
    # Every column starts and ends with 0 here, so its changes are start, end, start, end ...
    column, row = np.nonzero(columns[:, 1:] != columns[:, :-1])
    edges = (column + origin[0]) * size[0] + row + origin[1]
    return of_intervals(edges[0::2], edges[1::2], size)


def cut(runs: Runs, box: Box) -> Runs:
    """The part of a mask inside a box, in the same frame."""
    x1, y1, x2, y2 = box
    x, top, bottom = spans(runs)
    top, bottom = np.maximum(top, y1), np.minimum(bottom, y2)
    keep = (x >= x1) & (x < x2) & (top < bottom)
    return of_spans(x[keep], top[keep], bottom[keep], runs.size)


def move(runs: Runs, by: tuple[int, int], size: tuple[int, int]) -> Runs:
    """A mask moved by (x, y) pixels into a frame of (height, width), where it must have room."""
    x, top, bottom = spans(runs)
    return of_spans(x + by[0], top + by[1], bottom + by[1], size)


def union(masks: Sequence[Runs]) -> Runs:
    """The pixels that are in any of at least one mask, all of one size."""
    return _sweep(masks, [1] * len(masks), lambda level: level > 0)


def intersect(one: Runs, other: Runs) -> Runs:
    """The pixels that are in both masks."""
    return _sweep([one, other], [1, 1], lambda level: level == 2)


def subtract(one: Runs, others: Sequence[Runs]) -> Runs:
    """The pixels of a mask that are in none of the others."""
    own = len(others) + 1
    return _sweep([one, *others], [own, *[1] * len(others)], lambda level: level == own)


def _sweep(masks: Sequence[Runs], weights: Sequence[int], wanted: Callable[[Ints], Flags]) -> Runs:
    """The pixels where the sum of the weights of the masks that hold them is ``wanted``, not 0."""
    pairs = [intervals(mask) for mask in masks]
    edges = np.concatenate([edge for pair in pairs for edge in pair])
    steps = np.array(weights, dtype=np.int64)[:, None] * (1, -1)
    steps = steps.ravel().repeat([len(edge) for pair in pairs for edge in pair])
    order = edges.argsort(kind="stable")
    edges, level = edges[order], steps[order].cumsum()
    last = np.append(edges[1:] != edges[:-1], True)[: len(edges)]
    edges, inside = edges[last], wanted(level[last])
    changes = edges[inside != np.append(False, inside[:-1])[: len(inside)]]
    return of_intervals(changes[0::2], changes[1::2], masks[0].size)


def label_parts(
    x: Ints, top: Ints, bottom: Ints, height: int, *, corners: bool
) -> tuple[Ints, Ints]:
    """The connected parts of a mask.

    Args:
        x: ``[n]``, see ``spans``, with ``top`` and ``bottom``.
        top: ``[n]``.
        bottom: ``[n]``.
        height: of the frame.
        corners: whether pixels that touch at a corner belong together (8 neighbours) or need
            an edge in common (4 neighbours).

    Returns:
        ``[n]``, the part of each span, 0..P-1, numbered from the left; ``[P]``, their areas.
    """
    # Spans of one column are in order, so those that touch a span of the column before are in a row
    stride = height + 2
    start, stop = x * stride + top, x * stride + bottom
    beside = (x + 1) * stride
    low = stop.searchsorted(beside + top, "left" if corners else "right")
    high = start.searchsorted(beside + bottom, "right" if corners else "left")
    several = np.maximum(high - low, 0)
    one = np.arange(len(x)).repeat(several)
    begin = several.cumsum() - several
    other = np.arange(len(one)) + (low - begin).repeat(several)
    root = unite(one, other, len(x))
    _, part = np.unique(root, return_inverse=True)
    return part, np.bincount(part, bottom - top).astype(np.int64)


def unite(one: Ints, other: Ints, count: int) -> Ints:
    """Union-find: the lowest number in the set of each of 0..count-1, given pairs to unite.

    All roots that have a lower neighbour are hung below it at once; a few rounds are enough.
    """
    root = np.arange(count)
    while True:
        a, b = root[one], root[other]
        if np.array_equal(a, b):
            return root
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(root, above := root[root]):
            root = above


def fill_holes(runs: Runs, area: int) -> Runs:
    """Fill the holes that have less than ``area`` pixels.

    A hole is background whose pixels share edges and that the mask encloses; what is open to the
    border of the picture is none.
    """
    x1, y1, x2, y2 = runs.box()
    if area < 2 or x2 - x1 < 3 or y2 - y1 < 3:
        return runs
    whole = np.arange(x1, x2) * runs.size[0]
    frame = of_intervals(whole + y1, whole + y2, runs.size)
    x, top, bottom = spans(subtract(frame, [runs]))
    if not len(x):
        return runs
    part, areas = label_parts(x, top, bottom, runs.size[0], corners=False)
    fill = areas < area
    fill[part[(x == x1) | (x == x2 - 1) | (top == y1) | (bottom == y2)]] = False
    chosen = fill[part]
    return union([runs, of_spans(x[chosen], top[chosen], bottom[chosen], runs.size)])


def drop_islands(runs: Runs, area: int | None = None) -> Runs:
    """Drop the parts of a mask that have less than ``area`` pixels; None: all but the largest.

    Pixels that touch at a corner are of one part. The largest part always stays, of equal ones
    the leftmost, so that no object disappears.
    """
    x, top, bottom = spans(runs)
    if not len(x):
        return runs
    part, areas = label_parts(x, top, bottom, runs.size[0], corners=True)
    keep = np.zeros(len(areas), dtype=bool) if area is None else areas >= area
    keep[areas.argmax()] = True
    if keep.all():
        return runs
    chosen = keep[part]
    return of_spans(x[chosen], top[chosen], bottom[chosen], runs.size)


def separate(masks: Sequence[Runs]) -> list[Runs]:
    """Masks of one picture without common pixels: each loses what is in one before it.

    Args:
        masks: N of one size, the one that keeps its pixels first.

    Returns:
        N masks, maybe empty.
    """
    boxes = np.array([mask.box() for mask in masks], dtype=np.int64).reshape(-1, 4)
    result = []
    for i, mask in enumerate(masks):
        before = (boxes[:i, :2] < boxes[i, 2:]).all(1) & (boxes[:i, 2:] > boxes[i, :2]).all(1)
        others = [masks[j] for j in np.flatnonzero(before).tolist()]
        result.append(subtract(mask, others) if others else mask)
    return result


def clean(
    records: Sequence[Mapping[str, Any]],
    *,
    holes: int = 0,
    islands: int | None = 0,
    disjoint: bool = False,
) -> list[dict[str, Any]]:
    """Clean the masks of COCO results: holes, then islands, then overlaps.

    Args:
        records: in any order, of one picture or of several (``image_id``); they are not changed.
        holes: fill holes of less than this many pixels.
        islands: drop parts of less than this many pixels; None: all but the largest part.
        disjoint: no pixel in two masks: the higher score has it, of equal scores the first
            record, whatever the classes. What is below a better mask may fall into parts:
            islands are dropped again.

    Returns:
        The records in their order, with new masks and else as they were (``bbox`` stays what was
        detected), without those that ``disjoint`` left no pixel.

    Raises:
        ValueError: a record's mask is not right, or not of the size of the picture's others.
    """
    if not records or (holes < 2 and islands is not None and islands < 2 and not disjoint):
        return [dict(record) for record in records]
    if not all(isinstance(record["segmentation"], dict) for record in records):
        raise ValueError("polygons do not say how large their picture is: give RLE")
    pictures: dict[Any, list[int]] = {}
    for i, record in enumerate(records):
        pictures.setdefault(record.get("image_id"), []).append(i)
    firsts = [records[pictures[record.get("image_id")][0]] for record in records]
    masks = [
        decode(record["segmentation"], tuple(first["segmentation"]["size"]))
        for record, first in zip(records, firsts, strict=True)
    ]
    masks = [fill_holes(mask, holes) for mask in masks]
    if islands is None or islands > 1:
        masks = [drop_islands(mask, islands) for mask in masks]
    emptied: set[int] = set()
    for members in pictures.values() if disjoint else ():
        order = sorted(members, key=lambda i: -records[i]["score"])
        apart = separate([masks[i] for i in order])
        for i, mask in zip(order, apart, strict=True):
            if not mask.area() and masks[i].area():
                emptied.add(i)
            masks[i] = mask if islands == 0 else drop_islands(mask, islands)
    return [
        {**record, "segmentation": mask.encode()}
        for i, (record, mask) in enumerate(zip(records, masks, strict=True))
        if i not in emptied
    ]


def paste(
    logits: NDArray[np.float32],
    boxes: NDArray[np.float64],
    size: tuple[int, int],
    spans: NDArray[np.float64] | None = None,
) -> list[Runs]:
    """The masks of objects in their picture, from the logits of their RoIs.

    Logits are read bilinearly at the pixel centres inside the box and compared with 0 last, so
    an outline has no stairs of the RoI's grid. Between the centres of the outer cells and the
    edge of the box, the logits of the outer cells go on (``align_corners=False``, border
    replicated); outside of the box there is no mask.

    No pixel is computed but where an outline passes: along a column of pixels the logits are h
    numbers joined by straight lines, and their zeros are where runs begin and end. Time and
    memory follow the width of the boxes times h.

    Args:
        logits: ``[N, h, w]`` on grids that span the boxes.
        boxes: ``[N, 4]`` xyxy pixels of the picture.
        size: (height, width) of the picture.
        spans: ``[N, 4]`` what the grids span instead, if it is not the boxes.

    Returns:
        N masks, maybe empty.
    """
    count, side, wide = logits.shape
    # By columns, then rows; what a half precision network could not hold stays a number.
    grid = np.nan_to_num(logits.swapaxes(1, 2), nan=-1.0, posinf=1e30, neginf=-1e30)
    table = np.ascontiguousarray(grid).reshape(count * wide, side)
    corners = boxes if spans is None else spans
    limit = np.array([size[1], size[0]])
    centres = np.ceil(boxes.reshape(-1, 2, 2) - 0.5).clip(0, limit).astype(np.int64)
    first, last = centres[:, 0], np.maximum(centres[:, 0], centres[:, 1])
    cell = np.maximum(corners[:, 2:] - corners[:, :2], 1e-6) / (wide, side)  # pixels, x and y

    ends = (last - first)[:, 0].cumsum()
    parts = []
    for begin in range(0, int(ends[-1]) if count else 0, COLUMNS):
        column = np.arange(begin, min(begin + COLUMNS, int(ends[-1])))
        owner = ends.searchsorted(column, "right")
        x = column - ends[owner] + last[owner, 0]
        place = ((x + 0.5 - corners[owner, 0]) / cell[owner, 0] - 0.5).clip(0, wide - 1)
        low = place.astype(np.int64)
        share = (place - low).astype(np.float32)[:, None]
        row = owner * wide + low
        upper = table[np.where(low + 1 < wide, row + 1, row)]
        values = table[row] * (1 - share) + upper * share  # [columns, h]

        inside = np.zeros((len(column), side + 2), dtype=bool)
        np.greater(values, 0, out=inside[:, 1:-1])
        where, knot = np.nonzero(inside[:, 1:] != inside[:, :-1])  # in turn a start and a stop
        one = values[where, np.maximum(knot - 1, 0)].astype(np.float64)
        other = values[where, np.minimum(knot, side - 1)]
        between = (knot > 0) & (knot < side)
        zero = knot - 1 + one / np.where(between, one - other, 1)
        owner, x = owner[where], x[where]
        y = corners[owner, 1] + (zero + 0.5) * cell[owner, 1] - 0.5
        y[0::2], y[1::2] = np.floor(y[0::2]) + 1, np.ceil(y[1::2])
        y = np.where(between, y, np.where(knot > 0, last[owner, 1], first[owner, 1]))
        y = y.clip(first[owner, 1], last[owner, 1]).astype(np.int64)
        some = y[0::2] < y[1::2]  # a column may pass between two pixel centres
        parts.append((owner[0::2][some], x[0::2][some], y[0::2][some], y[1::2][some]))
    if not parts:
        return [of_intervals(ends[:0], ends[:0], size)] * count
    owner, x, top, bottom = (np.concatenate(part) for part in zip(*parts, strict=True))
    bounds = owner.searchsorted(np.arange(count + 1)).tolist()
    return [of_spans(x[i:j], top[i:j], bottom[i:j], size) for i, j in pairwise(bounds)]
