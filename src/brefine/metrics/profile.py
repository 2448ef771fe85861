"""Where along an outline masks are wrong, and how masks do on objects of each size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from brefine.metrics.boundary import Mask
from brefine.metrics.overlaps import SIZES, Ints

PIXELS = tuple(range(1, 17))  # distances from the true outline
PERCENT = tuple(range(1, 11))  # the same, of the diagonal of the object's box
MOST = 1000  # objects of each size whose pixels are looked at: enough, and the time is bounded

Window = NDArray[np.bool_]


@dataclass
class Profile:
    """Counts wrong pixels of masks by their distance from the true outline.

    A pixel's distance is how many times the region it lies in (the object, or what is outside)
    can be eroded with a 3 x 3 square until it goes, as in Boundary IoU; 1 is at the outline. The
    picture's border is no outline here: nobody can be wrong beyond it.

    Attributes:
        pixels: ``[4, 2, 16, 2]``: by size of ``SIZES``; inside and outside; at distance
            ``PIXELS[i]``: number of pixels and of wrong ones.
        percent: ``[4, 2, 10, 2]``: the same, at a distance of at most ``PERCENT[i]`` percent of
            the diagonal of the object's box, and more than the percent before.
        seen: ``[4]``, objects whose pixels were counted: the first ``MOST`` of each size.
        areas: of each object, true pixels.
        mask_ious: of each object.
        boundary_ious: of each object.
    """

    pixels: Ints = field(init=False)
    percent: Ints = field(init=False)
    seen: Ints = field(init=False)
    areas: list[float] = field(default_factory=list)
    mask_ious: list[float] = field(default_factory=list)
    boundary_ious: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pixels = np.zeros((len(SIZES), 2, len(PIXELS), 2), dtype=np.int64)
        self.seen = np.zeros(len(SIZES), dtype=np.int64)
        self.percent = np.zeros((len(SIZES), 2, len(PERCENT), 2), dtype=np.int64)

    def add(
        self, found: Mask, true: Mask, size: tuple[int, int], area: float, ious: tuple[float, float]
    ) -> None:
        """One object and the mask that found it.

        Args:
            found: the mask.
            true: the object's; not empty.
            size: (height, width) of the picture.
            area: of the object in pixels, as its label says.
            ious: mask IoU and Boundary IoU of the two.
        """
        self.areas.append(area)
        self.mask_ious.append(ious[0])
        self.boundary_ious.append(ious[1])
        sizes = [a for a, (low, high) in enumerate(SIZES.values()) if low <= area < high]
        if self.seen[sizes[-1]] == MOST:
            return
        self.seen[sizes] += 1
        scale = float(np.hypot(*true[0].shape))
        shares = [int(scale * percent / 100) for percent in PERCENT]
        reach = max(PIXELS[-1], shares[-1])
        (x1, y1), (height, width) = true[1], true[0].shape
        left, top = max(x1 - reach, 0), max(y1 - reach, 0)
        right, bottom = min(x1 + width + reach, size[1]), min(y1 + height + reach, size[0])
        box = left, top, right, bottom
        truth, mine = cut(true, box), cut(found, box)
        wrong = truth ^ mine
        for side, region in enumerate((truth, ~truth)):
            self.pixels[sizes, side] += peel(region, wrong, PIXELS)
            self.percent[sizes, side] += peel(region, wrong, shares)


def peel(region: Window, wrong: Window, depths: Sequence[int]) -> Ints:
    """Pixels, and wrong ones of them, in the rings that lie along the edge of a region.

    Args:
        region: ``[h, w]``; beyond the window it goes on.
        wrong: ``[h, w]``.
        depths: rising; ring ``i`` is deeper than ``depths[i - 1]`` and at most ``depths[i]``.

    Returns:
        ``[len(depths), 2]``.
    """
    counts, depth = [], 0
    left = np.count_nonzero(region), np.count_nonzero(region & wrong)
    for next_depth in depths:
        region = erode(region, next_depth - depth)
        rest = np.count_nonzero(region), np.count_nonzero(region & wrong)
        counts.append((left[0] - rest[0], left[1] - rest[1]))
        left, depth = rest, next_depth
    return np.array(counts, dtype=np.int64)


def erode(region: Window, depth: int) -> Window:
    """Pixels around which the square of side ``2 * depth + 1`` lies in the region or outside."""
    for axis in (0, 1) if depth else ():
        region = region.swapaxes(0, axis)
        line = np.ones((len(region) + 2 * depth, region.shape[1]), dtype=bool)
        line[depth : depth + len(region)] = region
        # The number of pixels looked at doubles from step to step.
        length = 1
        while length < 2 * depth + 1:
            step = min(length, 2 * depth + 1 - length)
            line = line[:-step] & line[step:]
            length += step
        region = line.swapaxes(0, axis)
    return region


def cut(mask: Mask, box: tuple[int, int, int, int]) -> Window:
    """A mask inside a box (xyxy) of the picture, ``[h, w]``."""
    window, (x, y) = mask
    left, top, right, bottom = box
    result = np.zeros((bottom - top, right - left), dtype=bool)
    x1, y1 = max(x, left), max(y, top)
    x2, y2 = min(x + window.shape[1], right), min(y + window.shape[0], bottom)
    if x1 < x2 and y1 < y2:
        result[y1 - top : y2 - top, x1 - left : x2 - left] = window[
            y1 - y : y2 - y, x1 - x : x2 - x
        ]
    return result
