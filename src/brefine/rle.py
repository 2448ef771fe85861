"""Masks as run lengths down the columns: COCO's codec, checked, and its polygons drawn.

Everything here gives the pixels of pycocotools; what can be done to masks is in ``runs``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from brefine.data.faults import shorten
from brefine.data.pictures import MAX_PIXELS

if TYPE_CHECKING:
    from torch import Tensor

#: a polygon may leave the picture by this many times its longer side before it is not believed
POLYGON_REACH = 4
#: pixels; a polygon's mask is unrolled at once up to this many, left of and above it included
DENSE = 2**20


@dataclass(frozen=True)
class Runs:
    """One mask as run lengths down the columns, checked to fill its picture exactly.

    Attributes:
        counts: ``[R]`` int64, pixels of 0, of 1, of 0, ...; their sum is height * width.
        size: (height, width).
    """

    counts: NDArray[np.int64]
    size: tuple[int, int]

    def area(self) -> int:
        """Number of pixels set."""
        return int(self.counts[1::2].sum())

    def box(self) -> tuple[int, int, int, int]:
        """Tight xyxy box of the pixels set, last ones exclusive; all 0 when there is none."""
        ends = self.counts.cumsum()
        first, last = ends[0:-1:2], ends[1::2] - 1
        first, last = first[first <= last], last[first <= last]
        if not len(first):
            return 0, 0, 0, 0
        height = self.size[0]
        x1, x2 = int(first[0]) // height, int(last[-1]) // height + 1
        if np.any(first // height != last // height):  # a run goes round the bottom to the top
            return x1, 0, x2, height
        return x1, int((first % height).min()), x2, int((last % height).max()) + 1

    def window(self) -> tuple[Tensor, tuple[int, int]]:
        """The mask inside its box, uint8 ``[h, w]``, and the (x, y) of its top left pixel."""
        import torch

        pixels, origin = self.pixels()
        return torch.from_numpy(pixels), origin

    def pixels(self) -> tuple[NDArray[np.uint8], tuple[int, int]]:
        """The same as an array."""
        x1, y1, x2, y2 = self.box()
        height = self.size[0]
        # Only the columns of the box are unrolled: memory follows the object.
        ends = (self.counts.cumsum() - x1 * height).clip(0, (x2 - x1) * height)
        lengths = np.diff(ends, prepend=0)
        values = (np.arange(len(lengths)) % 2).astype(np.uint8)
        columns = np.repeat(values, lengths).reshape(x2 - x1, height)
        return np.ascontiguousarray(columns[:, y1:y2].T), (x1, y1)

    def encode(self) -> dict[str, Any]:
        """COCO's compressed RLE."""
        height, width = self.size
        counts = self.counts[:-1] if self.counts[-1] == 0 else self.counts
        rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        return {"size": [height, width], "counts": rle["counts"].decode()}


def decode(segmentation: Any, size: tuple[int, int]) -> Runs:
    """Run lengths of a COCO segmentation: polygons, compressed or uncompressed RLE.

    The pixels are those of ``pycocotools``: polygons are drawn by it; RLE is read here because
    its decoder trusts the lengths that it reads.

    Args:
        segmentation: the json's value.
        size: (height, width) of the picture.

    Raises:
        ValueError: unusable; the message says why.
    """
    if isinstance(segmentation, list):
        return _draw_polygons(segmentation, size)
    if not isinstance(segmentation, dict):
        raise ValueError("segmentation is neither polygons nor RLE")
    if segmentation.get("size") != list(size):
        said = segmentation.get("size")
        raise ValueError(f"RLE of size {shorten(said)} in a picture of [{size[0]}, {size[1]}]")
    counts = segmentation.get("counts")
    if isinstance(counts, bytes):  # as pycocotools has them
        counts = counts.decode("latin-1")
    if isinstance(counts, str):
        lengths, _ = parse_counts([counts])
    elif isinstance(counts, list) and all(type(count) is int for count in counts):
        if any(not 0 <= count <= MAX_PIXELS for count in counts):
            raise ValueError("RLE with a negative or huge count")
        lengths = np.array(counts, dtype=np.int64)
    else:
        raise ValueError("RLE counts are neither a string nor a list of whole numbers")
    total = int(lengths.sum())
    if total != size[0] * size[1] or (lengths < 0).any():
        raise ValueError(f"RLE covers {total} pixels, the picture has {size[0] * size[1]}")
    if len(lengths) % 2:  # runs come in pairs of 0 and 1 from here on
        lengths = np.append(lengths, 0)
    return Runs(lengths, size)


def parse_counts(texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """COCO's compressed counts: signed base-32 digits, lowest first, with differences.

    A character minus 48 has five bits of value and one (32) that says "more follows"; the last
    one's bit 16 is the sign. From the fourth on, a number is added to the one before the last.

    Args:
        texts: N counts.

    Returns:
        The numbers of all, one after the other, and ``[N + 1]``, where those of each begin. They
        come in pairs: where their number is odd, a 0 is added.

    Raises:
        ValueError: one is damaged.
    """
    # A character below 48 becomes a digit above 63.
    digits = np.frombuffer("".join(texts).encode(), dtype=np.uint8) - np.uint8(48)
    stops = np.cumsum([len(text) for text in texts])
    last = digits < 32
    if not all(texts) or stops[-1] != len(digits) or digits.max() > 63 or not last[stops - 1].all():
        raise ValueError("RLE counts are damaged")
    ends = last.nonzero()[0]
    lengths = ends - np.concatenate([[-1], ends[:-1]])
    longest = int(lengths.max())
    if longest > 7:  # seven digits hold every 32-bit number
        raise ValueError("RLE counts are damaged")
    highest = digits[ends].astype(np.int64)
    values = highest - ((highest & 16) << 1)
    for place in range(1, longest):  # downwards from the highest digit
        more = (lengths > place).nonzero()[0]
        values[more] = (values[more] << 5) | (digits[ends[more] - place] & 31)

    numbers = ends.searchsorted(stops)
    numbers[1:] -= numbers[:-1].copy()
    odd = numbers & 1
    first = np.concatenate([[0], (numbers + odd).cumsum()])
    counts = np.zeros(first[-1], dtype=np.int64)
    counts[np.arange(len(values)) + (odd.cumsum() - odd).repeat(numbers)] = values
    start, pairs = first[:-1], (numbers + odd) // 2
    initial = counts[start]
    counts[start] = 0
    for parity in (0, 1):  # sums over every other number, from its own text on
        sums = counts[parity::2].cumsum()
        before = sums[start // 2] - counts[start + parity]
        counts[parity::2] = sums - before.repeat(pairs)
    counts[start] = initial
    counts[first[1:][odd == 1] - 1] = 0
    return counts, first


def _draw_polygons(polygons: Sequence[Any], size: tuple[int, int]) -> Runs:
    """The union of polygons, as pycocotools draws them."""
    return _runs(draw_compressed(polygons, size), size)


def draw_compressed(polygons: Sequence[Any], size: tuple[int, int]) -> dict[str, Any]:
    """The union of polygons as compressed RLE, its counts bytes, as pycocotools draws them.

    Raises:
        ValueError: no polygon, or one that pycocotools could not draw.
    """
    checked = [points.tolist() for points in check_polygons(polygons, size)]
    rle: dict[str, Any] = coco_mask.merge(coco_mask.frPyObjects(checked, *size))
    return rle


def _runs(rle: dict[str, Any], size: tuple[int, int]) -> Runs:
    """Run lengths of what pycocotools made."""
    lengths, _ = parse_counts([rle["counts"].decode()])
    return Runs(lengths, size)


def draw(
    polygons: Sequence[Sequence[float]],
    size: tuple[int, int],
    scale: tuple[float, float] = (1.0, 1.0),
) -> tuple[Tensor, tuple[int, int]]:
    """The union of polygons in a window around them: the pixels of ``decode``, faster.

    Args:
        polygons: each x, y, x, y ..., of at least 3 points.
        size: (height, width) of the frame.
        scale: of x and of y, from the polygons' coordinates to the frame's.

    Returns:
        uint8 ``[h, w]``, tight, maybe empty, and the (x, y) of its top left pixel.
    """
    import torch

    height, width = size
    if scale != (1.0, 1.0):
        scales = itertools.cycle(scale)
        polygons = [[v * s for v, s in zip(part, scales, strict=False)] for part in polygons]
    x1, y1, x2, y2 = extent_of(polygons, size)
    right, bottom = min(int(x2) + 2, width), min(int(y2) + 2, height)
    rles = coco_mask.frPyObjects(polygons, bottom, right)
    rle = rles[0] if len(rles) == 1 else coco_mask.merge(rles)
    if bottom * right > DENSE:
        return _runs(rle, (bottom, right)).window()
    window = coco_mask.decode(rle)
    # pycocotools rounds to fifths of a pixel: nothing is farther out than that.
    left, top = max(min(int(x1) - 1, right), 0), max(min(int(y1) - 1, bottom), 0)
    while left < right and not window[top:, left].any():
        left += 1
    while left < right and not window[top:, right - 1].any():
        right -= 1
    while top < bottom and not window[top, left:right].any():
        top += 1
    while top < bottom and not window[bottom - 1, left:right].any():
        bottom -= 1
    tight = np.ascontiguousarray(window[top:bottom, left:right])
    return torch.from_numpy(tight), (left, top)


def extent_of(
    polygons: Sequence[Sequence[float]], size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """The xyxy box of polygons, cut to a picture of ``size``."""
    height, width = size
    x1 = min(min(part[0::2]) for part in polygons)
    y1 = min(min(part[1::2]) for part in polygons)
    x2 = max(max(part[0::2]) for part in polygons)
    y2 = max(max(part[1::2]) for part in polygons)
    w, h = float(width), float(height)
    return min(max(x1, 0.0), w), min(max(y1, 0.0), h), min(max(x2, 0.0), w), min(max(y2, 0.0), h)


def check_polygons(polygons: Sequence[Any], size: tuple[int, int]) -> list[NDArray[np.float64]]:
    """Each polygon as a flat array of x, y, x, y ...

    Parts of one or two points, which many tools leave behind, cover nothing and are left out.

    Raises:
        ValueError: no polygon, or one that pycocotools could not draw.
    """
    if not polygons:
        raise ValueError("empty segmentation")
    reach = POLYGON_REACH * max(size)
    checked = []
    for polygon in polygons:
        try:
            points = np.array(polygon)
            if points.dtype.kind not in "iuf":  # numpy would read text, too
                raise ValueError
            points = points.astype(np.float64)
        except (TypeError, ValueError, OverflowError):
            raise ValueError("a polygon is not a list of numbers") from None
        if points.ndim != 1 or len(points) % 2 or not isinstance(polygon, list):
            raise ValueError("a polygon is not a flat list x, y, x, y ...")
        if not np.isfinite(points).all():
            raise ValueError("a polygon has a coordinate that is not finite")
        if len(points) < 6:
            continue
        if np.abs(points).max() > reach:  # drawing takes memory by the length of the outline
            raise ValueError("a polygon lies far outside of its picture")
        checked.append(points)
    if not checked:
        raise ValueError("no polygon with at least 3 points")
    return checked
