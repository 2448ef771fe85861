"""Pictures too large to be looked at as a whole: tiles, and objects that seams cut made whole.

Any detector can look at the tiles. What it finds in each comes back as COCO results, and `merge`
makes the results of the picture of them, on runs alone. Two results of neighbouring tiles are one
object when they have the same class and agree about the band of pixels that both tiles show:

    * their masks inside the band have an IoU of at least ``SAME``; each has at most one partner
      in the other tile, the best pairs first. Objects that merely touch share no pixel.
    * or one without such a partner is cut off by the edge of its own tile inside the band, and
      ``INSIDE`` of what it has there is in the other: a fragment that the other tile sees better.

Where the other one is seen whole there, the fragment is dropped, whatever the two classes: the end
of an object alone is easily taken for something else.

An object seen whole by some tile (it ends before the inner edges) is taken from the tile where it
is farthest from them. Of an object that no tile sees whole, each pixel is decided by the tile in
whose core it lies; the cores share out the picture in the middle of the bands. The score is the
best of the parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from brefine.rle import Runs, decode
from brefine.runs import Box, Flags, Ints, cut, intersect, move, union, unite
from brefine.structures import InputError

SAME = 0.5
INSIDE = 0.75
#: a mask may end before the edge that cuts it by this share of the overlap
EDGE = 1 / 16
#: a picture that would be shrunk by more than this is tiled automatically
SHRINK = 4
#: share of a tile that overlaps with the next one, if nothing else is asked for
OVERLAP = 1 / 8


@dataclass(frozen=True)
class Grid:
    """Tiles that cover a picture.

    Attributes:
        size: (height, width) of the picture.
        tiles: xyxy pixels, all of one size, row by row.
        cores: the part of the picture that each tile decides; they cover it without overlapping.
        edge: pixels; a mask that ends closer to an inner edge of its tile may be cut there.
    """

    size: tuple[int, int]
    tiles: list[Box]
    cores: list[Box]
    edge: int = 1


def lay(size: tuple[int, int], tile: int | None, overlap: int | None = None) -> Grid:
    """Cover a picture with as few tiles as their overlap allows, evenly.

    Args:
        size: (height, width) of the picture.
        tile: side of the tiles in pixels of the picture; a shorter side of the picture is not
            divided. None: one tile, the picture.
        overlap: pixels that neighbours share, at least; None: an eighth of the tile. Objects
            that are smaller are whole in some tile.

    Raises:
        InputError: the overlap is not from 1 pixel to half of a tile.
    """
    if tile is None:  # nothing overlaps
        tile, overlap = max(2, *size), None
    if overlap is None:
        overlap = max(1, round(tile * OVERLAP))
    if not 1 <= overlap <= tile / 2:
        raise InputError(
            f"tiles of {tile} pixels that overlap by {overlap}: the overlap must be at least 1 "
            "pixel and at most half of a tile"
        )
    rows, columns = (_divide(side, tile, overlap) for side in size)
    return Grid(
        size,
        [(x1, y1, x2, y2) for (y1, y2), _ in rows for (x1, x2), _ in columns],
        [(x1, y1, x2, y2) for _, (y1, y2) in rows for _, (x1, x2) in columns],
        max(1, round(overlap * EDGE)),
    )


def choose_tile(size: tuple[int, int], short: int, long: int) -> int | None:
    """The side of tiles for a picture much larger than what a network was trained at.

    A picture whose sides would have to shrink by more than ``SHRINK`` is cut into tiles that the
    network sees pixel by pixel; None: no tiles.

    Args:
        size: (height, width) of the picture.
        short: pixels its short side is resized to, unless
        long: the long side would then exceed this.
    """
    shrink = max(min(size) / short, max(size) / long)
    return short if shrink > SHRINK else None


def _divide(side: int, tile: int, overlap: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """First and last pixel (exclusive) of each tile along one side, and of its core."""
    if side <= tile:
        return [((0, side), (0, side))]
    count = math.ceil((side - overlap) / (tile - overlap))
    starts = np.linspace(0, side - tile, count).round().astype(int).tolist()
    seams = [(left + tile + right) // 2 for left, right in pairwise(starts)]
    cores = zip([0, *seams], [*seams, side], strict=True)
    return [((start, start + tile), core) for start, core in zip(starts, cores, strict=True)]


@dataclass(frozen=True)
class _Part:
    """What a tile shows of an object, in the frame of the picture."""

    tile: int
    record: Mapping[str, Any]
    mask: Runs
    box: Box  # of the mask
    room: float  # pixels between the mask and the inner edges of its tile


def merge(found: Sequence[Sequence[Mapping[str, Any]]], grid: Grid) -> list[dict[str, Any]]:
    """The objects of a picture from what was found in its tiles.

    Args:
        found: for each tile of the grid COCO results in the tile's own frame, with ``score`` and
            maybe ``bbox``.
        grid: the tiles.

    Returns:
        Results in the picture's frame, best score first, those without a pixel left out. With
        one tile only, its results as they are.

    Raises:
        ValueError: a mask is not right, or not of its tile's size.
    """
    if len(grid.tiles) == 1:
        return [dict(record) for record in found[0]]
    parts: list[_Part] = []
    of_tile: list[list[int]] = []
    for tile, records in enumerate(found):
        begin = len(parts)
        parts += [part for record in records if (part := _place(record, tile, grid))]
        of_tile.append(list(range(begin, len(parts))))

    pairs: list[tuple[int, int]] = []
    dropped: set[int] = set()
    tiles = np.array(grid.tiles)
    for one in range(len(tiles)):
        near = one + 1 + np.flatnonzero(_overlap(tiles[one + 1 :], grid.tiles[one]))
        for other in near.tolist():
            same, fragments = _match(parts, of_tile[one], of_tile[other], grid)
            pairs += same
            dropped |= fragments
    dropped -= {i for pair in pairs for i in pair}  # a third tile has the same
    sides = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    root = unite(sides[:, 0], sides[:, 1], len(parts))
    groups: dict[int, list[_Part]] = {}
    for i, group in enumerate(root.tolist()):
        if i not in dropped:
            groups.setdefault(group, []).append(parts[i])
    merged = [_resolve(group, grid) for group in groups.values()]
    return sorted(merged, key=lambda record: -record["score"])


def _place(record: Mapping[str, Any], tile: int, grid: Grid) -> _Part | None:
    """A result of a tile in the picture, or None if it has no pixel."""
    x1, y1, x2, y2 = grid.tiles[tile]
    mask = move(decode(record["segmentation"], (y2 - y1, x2 - x1)), (x1, y1), grid.size)
    if not mask.area():
        return None
    if "bbox" in record:
        x, y, width, height = record["bbox"]
        record = {**record, "bbox": [x + x1, y + y1, width, height]}
    box = mask.box()
    return _Part(tile, record, mask, box, _room(box, tile, grid))


def _room(box: Box, tile: int, grid: Grid) -> float:
    """Pixels between a box and the inner edges of its tile."""
    x1, y1, x2, y2 = grid.tiles[tile]
    height, width = grid.size
    return min(
        box[0] - x1 if x1 > 0 else math.inf,
        box[1] - y1 if y1 > 0 else math.inf,
        x2 - box[2] if x2 < width else math.inf,
        y2 - box[3] if y2 < height else math.inf,
    )


def _match(
    parts: Sequence[_Part], ones: Sequence[int], others: Sequence[int], grid: Grid
) -> tuple[list[tuple[int, int]], set[int]]:
    """Pairs of parts of two tiles that are the same object, and fragments to drop."""
    if not ones or not others:
        return [], set()
    band = _shared(*(grid.tiles[parts[side[0]].tile] for side in (ones, others)))
    shown = {}
    for i in (*ones, *others):
        if _overlap(np.array([parts[i].box]), band)[0]:
            inside = cut(parts[i].mask, band)
            if inside.area():
                shown[i] = inside
    ones, others = ([i for i in side if i in shown] for side in (ones, others))
    boxes = np.array([shown[i].box() for i in others]).reshape(-1, 4)
    shared: dict[tuple[int, int], int] = {}
    for i in ones:
        for k in np.flatnonzero(_overlap(boxes, shown[i].box())).tolist():
            j = others[k]
            shared[i, j] = intersect(shown[i], shown[j]).area()

    area = {i: mask.area() for i, mask in shown.items()}
    score = {i: parts[i].record["score"] for i in shown}
    iou = {
        (i, j): both / (area[i] + area[j] - both)
        for (i, j), both in shared.items()
        if parts[i].record["category_id"] == parts[j].record["category_id"]
    }
    matched: set[int] = set()
    pairs = []
    for i, j in sorted(iou, key=lambda pair: (-iou[pair], -score[pair[0]] - score[pair[1]])):
        if iou[i, j] >= SAME and i not in matched and j not in matched:
            matched |= {i, j}
            pairs.append((i, j))
    dropped = set()
    for i in shown:
        if i in matched or _room(shown[i].box(), parts[i].tile, grid) >= grid.edge:
            continue
        around = [pair for pair in shared if i in pair and shared[pair] >= INSIDE * area[i]]
        if any(parts[sum(pair) - i].room >= grid.edge for pair in around):
            dropped.add(i)
        elif alike := [pair for pair in around if pair in iou]:
            pairs.append(max(alike, key=lambda pair: shared[pair]))
    return pairs, dropped


def _resolve(parts: Sequence[_Part], grid: Grid) -> dict[str, Any]:
    """One result from the parts of one object."""
    best = max(parts, key=lambda part: part.record["score"])
    whole = [part for part in parts if part.room >= grid.edge]
    if whole or len(parts) == 1:
        chosen = max(whole or parts, key=lambda part: (part.room, part.record["score"]))
        record, mask = {**chosen.record, "score": best.record["score"]}, chosen.mask
    else:
        seen = {part.tile for part in parts}
        cores = np.array(grid.cores)
        pieces = []
        for part in parts:
            # A tile that found nothing of the object does not decide: its neighbours do.
            for k in np.flatnonzero(_overlap(cores, part.box)).tolist():
                if k == part.tile or k not in seen:
                    pieces.append(cut(part.mask, grid.cores[k]))
        record, mask = dict(best.record), union(pieces)
        if "bbox" in record:
            boxes = np.array([part.record["bbox"] for part in parts])
            low, high = boxes[:, :2].min(0), (boxes[:, :2] + boxes[:, 2:]).max(0)
            record["bbox"] = [*low.tolist(), *(high - low).tolist()]
    return {**record, "segmentation": mask.encode()}


def _overlap(boxes: Ints, box: Box) -> Flags:
    """Which of ``boxes [N, 4]`` share pixels with a box."""
    x1, y1, x2, y2 = boxes.T
    flags: Flags = (x1 < box[2]) & (y1 < box[3]) & (x2 > box[0]) & (y2 > box[1])
    return flags


def _shared(one: Box, other: Box) -> Box:
    """The pixels that are in both of two boxes."""
    return (
        max(one[0], other[0]),
        max(one[1], other[1]),
        min(one[2], other[2]),
        min(one[3], other[3]),
    )
