"""The masks of one picture, decoded together: many times as fast as one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brefine.metrics.boundary import Mask
from brefine.rle import Runs, decode, parse_counts

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Tape:
    """N masks of a picture of H x W pixels as one row of run lengths.

    Mask ``i`` takes the pixels ``[i * H * W, (i + 1) * H * W)`` of the tape, down the columns,
    and an even number of runs: of 0, of 1, of 0, ... A pixel's place modulo H is thus its row.

    Attributes:
        counts: ``[R]``, every length.
        first: ``[N + 1]``, the run that each mask begins with, and R.
        size: (height, width).
    """

    counts: Ints
    first: Ints
    size: tuple[int, int]

    @classmethod
    def of(cls, segmentations: Sequence[Any], size: tuple[int, int]) -> Tape:
        """From COCO segmentations: polygons, compressed or uncompressed RLE.

        Raises:
            ValueError: one is not usable, see ``coco.decode``; which one, it does not say.
        """
        tape = cls._parse(segmentations, size)
        if tape is None:
            runs = [decode(segmentation, size).counts for segmentation in segmentations]
            first = np.cumsum([0, *map(len, runs)])
            tape = cls(np.concatenate([*runs, np.zeros(0, np.int64)]), first, size)
        return tape

    @classmethod
    def _parse(cls, segmentations: Sequence[Any], size: tuple[int, int]) -> Tape | None:
        """From compressed RLE only; None if there is anything else or any fault."""
        shape, texts = list(size), []
        for segmentation in segmentations:
            if not isinstance(segmentation, Mapping) or segmentation.get("size") != shape:
                return None
            counts = segmentation.get("counts")
            if not isinstance(counts, str):
                return None
            texts.append(counts)
        if not texts:
            return None
        try:
            counts, first = parse_counts(texts)
        except ValueError:
            return None
        if counts.min() < 0 or np.any(np.add.reduceat(counts, first[:-1]) != size[0] * size[1]):
            return None
        return cls(counts, first, size)

    def __len__(self) -> int:
        return len(self.first) - 1

    def areas(self) -> Ints:
        """``[N]``, pixels set."""
        if not len(self):
            return np.zeros(0, np.int64)
        return np.add.reduceat(self.counts[1::2], self.first[:-1] // 2)

    @cached_property
    def _ends(self) -> tuple[Ints, Ints]:
        """``[R / 2]`` each: where the runs of 1 begin and stop on the tape."""
        ends = self.counts.cumsum()
        return ends[0::2], ends[1::2]

    @cached_property
    def boxes(self) -> Ints:
        """``[N, 4]``: tight xyxy boxes of the pixels set; all 0 where there is none."""
        height, width = self.size
        boxes = np.zeros((len(self), 4), dtype=np.int64)
        some = np.flatnonzero(self.areas())
        if not len(some):
            return boxes
        begin, stop = self._ends
        there = stop > begin
        column, row = np.divmod(begin, height)
        last_column, last_row = np.divmod(stop - 1, height)
        turns = there & (column != last_column)  # round the bottom to the top of another column
        row, last_row = np.where(turns, 0, row), np.where(turns, height - 1, last_row)
        first = self.first[some] // 2
        ends = self.first[some + 1] // 2
        bounds = np.stack([first, ends], 1).ravel()

        def extreme(reduce: np.ufunc, values: Ints, blank: int) -> Ints:
            values = np.append(np.where(there, values, blank), blank)
            result: Ints = reduce.reduceat(values, bounds)[::2]
            return result

        beyond = len(self) * width
        left = some * width
        boxes[some, 0] = extreme(np.minimum, column, beyond) - left
        boxes[some, 1] = extreme(np.minimum, row, height)
        boxes[some, 2] = extreme(np.maximum, last_column, -1) + 1 - left
        boxes[some, 3] = extreme(np.maximum, last_row, -1) + 1
        return boxes

    def window(self, index: int) -> Mask:
        """One mask inside its box."""
        x1, y1, x2, y2 = self.boxes[index].tolist()
        height, width = self.size
        here = slice(self.first[index] // 2, self.first[index + 1] // 2)
        begin, stop = self._ends[0][here], self._ends[1][here]
        there = stop > begin
        begin, stop = begin[there], stop[there]
        # Cut out of the tape: only columns of the box, of these only its rows, if it has fewer.
        start = begin - (index * width + x1) * height
        if y2 - y1 < height:
            start -= start // height * (height - (y2 - y1)) + y1
        ends = np.empty(2 * len(start) + 2, dtype=np.int64)
        ends[0], ends[1:-1:2], ends[2:-1:2] = 0, start, start + (stop - begin)
        ends[-1] = (x2 - x1) * (y2 - y1)
        values = (np.arange(len(ends) - 1) & 1).astype(np.uint8)
        return values.repeat(ends[1:] - ends[:-1]).reshape(x2 - x1, y2 - y1).T, (x1, y1)

    def runs(self, index: int) -> Runs:
        """One mask as run lengths."""
        return Runs(self.counts[self.first[index] : self.first[index + 1]], self.size)
