"""Outlines of masks as polygons that draw the same mask again.

An outline runs along the edges between pixels, so its corners are whole numbers. COCO's
rasteriser (pycocotools) sets the pixels whose centres lie inside, by the even-odd rule: it draws
such an outline back bit by bit. A hole or a part can be joined to another outline by a bridge of
no width: walked to and fro, it crosses every column twice at the same place, which cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ring = NDArray[np.float64]  # [n, 2] corners (x, y); the last one is joined to the first

#: corners of a ring that a bridge may start from
_BRIDGEHEADS = 16
#: pixels a side of the cells in which corners are looked up
_CELL = 16


def polygons(
    window: NDArray[Any], origin: tuple[int, int] = (0, 0), tolerance: float = 0.0
) -> list[Ring]:
    """A mask as polygons: one for each part, with its holes tied in by bridges of no width.

    Drawn together by pycocotools, they are the mask again, bit by bit, if ``tolerance`` is 0.

    Args:
        window: ``[h, w]``, bool or 0/1.
        origin: (x, y) of its top left pixel.
        tolerance: pixels by which an outline may leave the edges of the pixels; see ``simplify``.

    Returns:
        ``[n, 2]`` (x, y) each; none for an empty mask.
    """
    return [join([simplify(ring, tolerance) for ring in part]) for part in trace(window, origin)]


def simple_parts(
    window: NDArray[Any], origin: tuple[int, int] = (0, 0), tolerance: float = 0.0
) -> list[list[Ring]]:
    """The parts of a mask as polygons with holes that are valid by the rules of OGC.

    No ring passes a corner twice, rings of a part at most touch, and its inside is in one piece.
    With a tolerance rings may come to cross.

    Args:
        window: ``[h, w]``, bool or 0/1.
        origin: (x, y) of its top left pixel.
        tolerance: see ``simplify``.

    Returns:
        As ``trace``; pixels that touch at a corner only are of different parts.
    """
    parts = []
    for part in trace(window, origin, corners=False):
        rings = [simple for ring in part for simple in _untie(ring)]
        # Of a tied outline one ring runs around all others, which are holes.
        rings.sort(key=lambda ring: _area(ring) < 0)
        parts.append([simplify(ring, tolerance) for ring in rings])
    return parts


def _untie(ring: Ring) -> list[Ring]:
    """A ring cut where it passes a corner again."""
    rings: list[list[tuple[float, ...]]] = []
    walk: list[tuple[float, ...]] = []
    at: dict[tuple[float, ...], int] = {}
    for corner in map(tuple, ring.tolist()):
        if corner in at:
            first = at[corner]
            rings.append(walk[first:])
            for passed in walk[first:]:
                del at[passed]
            del walk[first:]
        at[corner] = len(walk)
        walk.append(corner)
    return [np.array(each) for each in (walk, *rings)]


def _area(ring: Ring) -> float:
    """Twice the area inside, positive for an outline and negative for a hole."""
    x, y = ring.T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1))


def trace(
    window: NDArray[Any], origin: tuple[int, int] = (0, 0), *, corners: bool = True
) -> list[list[Ring]]:
    """The parts of a mask, each as its outline and the outlines of its holes.

    Time follows the window's pixels and the corners.

    Args:
        window: ``[h, w]``, bool or 0/1.
        origin: (x, y) of its top left pixel.
        corners: whether pixels that touch at a corner belong together and those of a hole must
            share an edge, or the other way round.

    Returns:
        One list a part, from the top: the outer ring, clockwise on the screen, then its holes,
        anticlockwise. Rings have corners only, at least 4.
    """
    inside = np.pad(np.asarray(window, dtype=bool), 1).astype(np.int8)
    width = inside.shape[1] - 1  # of the lattice of corners
    # The mask lies to the right of the walk: along its top to the right, down its right side.
    ys, lefts, rights, begins = _stretches(np.diff(inside[:, 1:-1], axis=0))
    h_start = ys * width + np.where(begins, lefts, rights)
    h_end = ys * width + np.where(begins, rights, lefts)
    xs, tops, bottoms, up = _stretches(np.diff(inside[1:-1], axis=1).T)
    v_start = np.where(up, bottoms, tops) * width + xs
    v_end = np.where(up, tops, bottoms) * width + xs
    # One stretch ends where the next one starts. Where pixels touch at a corner there are two of
    # each; the second key sends the walk across to the other pixel, or back round its own.
    after_h, after_v = np.empty_like(ys), np.empty_like(xs)
    after_h[np.lexsort((begins == corners, h_end))] = np.lexsort((up, v_start))
    after_v[np.lexsort((up != corners, v_end))] = np.lexsort((begins, h_start))

    walks: list[list[int]] = []
    ring_of = [-1] * len(ys)
    following = after_v[after_h].tolist()
    for first in range(len(ys)):
        step, walk = first, []
        while ring_of[step] < 0:
            ring_of[step] = len(walks)
            walk.append(step)
            step = following[step]
        if walk:
            walks.append(walk)
    ends = np.stack([h_start, h_end], 1)
    rings = []
    for walk in walks:
        y, x = np.divmod(ends[walk].ravel(), width)
        rings.append(np.stack([x, y], 1) + np.array(origin, dtype=np.float64))

    # A walk starts at its highest stretch: the top of an outer ring, or the top of a hole, where
    # the mask ends. Left of that the mask goes on to the edge of its part or of a hole above.
    holder = list(range(len(walks)))
    holes = [ring for ring, walk in enumerate(walks) if not begins[walk[0]]]
    if holes:
        edges = np.full((inside.shape[0] - 2, width), -1)
        ring_of_v = np.empty_like(xs)
        ring_of_v[after_h] = ring_of
        for x, y1, y2, ring in zip(xs, tops, bottoms, ring_of_v, strict=True):
            edges[y1:y2, x] = ring
        for ring in holes:
            highest = walks[ring][0]
            row = edges[ys[highest], : lefts[highest]]
            holder[ring] = holder[int(row[row >= 0][-1])]
    parts: dict[int, list[Ring]] = {}
    for ring, outer in enumerate(holder):
        parts.setdefault(outer, []).append(rings[ring])
    return list(parts.values())


def _stretches(
    edges: NDArray[np.int8],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Runs of 1 and of -1 along the rows: row, first, last + 1, and whether of 1; in order."""
    flat = np.pad(edges, ((0, 0), (0, 1))).ravel()  # no run goes on in the next row
    cuts = np.flatnonzero(np.diff(flat, prepend=0))
    value = flat[cuts]
    # A run lasts to the next change of value, whatever comes then.
    some = np.flatnonzero(value)
    row, first = np.divmod(cuts[some], edges.shape[1] + 1)
    length = cuts[some + 1] - cuts[some] if len(some) else cuts[some]
    return row, first, first + length, value[some] > 0


def simplify(ring: Ring, tolerance: float) -> Ring:
    """A ring with fewer corners, none of the old ones farther than ``tolerance`` from it.

    Douglas and Peucker's rule, from the two corners farthest apart as seen from the first one.
    A ring that would become a line stays as it is.

    Args:
        ring: ``[n, 2]``.
        tolerance: pixels; 0 keeps the ring.
    """
    if tolerance <= 0 or len(ring) < 4:
        return ring
    far = int(((ring - ring[0]) ** 2).sum(1).argmax())
    closed = np.concatenate([ring, ring[:1]])
    keep = np.zeros(len(closed), dtype=bool)
    keep[[0, far]] = True
    pieces = [(0, far), (far, len(ring))]
    while pieces:
        first, last = pieces.pop()
        if last - first < 2:
            continue
        between = closed[first + 1 : last] - closed[first]
        chord = closed[last] - closed[first]
        share = (between @ chord / max(chord @ chord, 1e-12)).clip(0, 1)
        distance = np.hypot(*(between - share[:, None] * chord).T)
        worst = int(distance.argmax())
        if distance[worst] > tolerance:
            middle = first + 1 + worst
            keep[middle] = True
            pieces += [(first, middle), (middle, last)]
    fewer = ring[keep[:-1]]
    return fewer if len(fewer) > 2 else ring


def join(rings: Sequence[Ring]) -> Ring:
    """Several rings as one, tied by bridges of no width, each from a corner to a near corner.

    Drawn by the even-odd rule, it covers what an odd number of the rings cover: parts that lie
    apart, and outlines without their holes.

    Args:
        rings: at least one.
    """
    joined = _tie(rings) if len(rings) > 1 else rings[0]
    # Where rings touch, a bridge has no length; a corner twice in a row says nothing.
    moved: NDArray[np.bool_] = (joined != np.roll(joined, 1, axis=0)).any(1)
    return joined[moved]


def _tie(rings: Sequence[Ring]) -> Ring:
    lengths = [len(ring) for ring in rings]
    corners, owner = np.concatenate(rings), np.repeat(np.arange(len(rings)), lengths)
    begins = np.cumsum([0, *lengths])
    heads = np.zeros(len(rings), dtype=np.int64)
    bridges: list[list[tuple[int, int]]] = [[] for _ in rings]  # from a ring's corner to a ring
    grid = _Grid(corners)
    for i, ring in enumerate(rings[1:], 1):
        there = grid.near(ring[0], int(begins[i]))
        tried = np.arange(0, len(ring), 1 + len(ring) // _BRIDGEHEADS)
        distance = ((ring[tried, None] - corners[there]) ** 2).sum(2)
        head, here = np.unravel_index(int(distance.argmin()), distance.shape)
        heads[i] = tried[head]
        other = owner[there[here]]
        corner = int(there[here] - begins[other] - heads[other]) % lengths[other]
        bridges[other].append((corner, i))
    # Walk around the first ring; at a bridge around the other one, and back over the bridge.
    pieces, tour = [], rings[0]
    walks = [(tour, sorted(bridges[0], reverse=True), 0)]
    while walks:
        tour, left, start = walks.pop()
        if not left:
            pieces.append(tour[start:])
            continue
        stop, i = left.pop()
        pieces.append(tour[start : stop + 1])
        walks.append((tour, left, stop))
        around = np.roll(rings[i], -heads[i], axis=0)
        walks.append((np.concatenate([around, around[:1]]), sorted(bridges[i], reverse=True), 0))
    return np.concatenate(pieces)


class _Grid:
    """Points ``[n, 2]`` by the square cell that they lie in, to find those that are near."""

    def __init__(self, points: Ring) -> None:
        self.origin = points.min(0)
        columns, rows = ((points - self.origin) // _CELL).astype(np.int64).T
        self.height, self.width = int(rows.max()) + 1, int(columns.max()) + 1
        cells = rows * self.width + columns
        self.order = np.argsort(cells, kind="stable")
        every = np.arange(self.height * self.width + 1)
        self.first = np.searchsorted(cells[self.order], every)

    def near(self, point: Ring, before: int) -> NDArray[np.int64]:
        """Those of the first ``before`` points in the smallest square of cells that has any."""
        column, row = ((point - self.origin) // _CELL).astype(int).tolist()
        reach = 1
        while True:
            left, right = max(0, column - reach), min(self.width, column + reach + 1)
            starts = [
                y * self.width
                for y in range(max(0, row - reach), min(self.height, row + reach + 1))
            ]
            cells = [self.order[self.first[y + left] : self.first[y + right]] for y in starts]
            found = np.concatenate(cells)
            found = found[found < before]
            if len(found):
                return found
            reach *= 2
