"""What predictions are written as, and COCO's RLE read into a box-sized window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brefine.structures import InputError


def decode(rle: Mapping[str, Any]) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """The pixels of a COCO RLE, as a window around them; the inverse of `parts.masks.encode`.

    Args:
        rle: ``{"size": [H, W], "counts": ...}``; counts compressed (str or bytes) or a list.

    Returns:
        The window, uint8 ``[h, w]`` of 0 and 1, tight, maybe empty, and the (x, y) of its top
        left pixel.

    Raises:
        InputError: this is no RLE, or its runs do not fill a picture of its size.
    """
    try:
        height, width = (int(side) for side in rle["size"])
        counts = rle["counts"]
        runs = np.array(counts, dtype=np.int64) if isinstance(counts, list) else _runs(counts)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        raise InputError("the segmentation is no COCO RLE with keys 'size' and 'counts'") from None
    if runs.ndim != 1 or (runs < 0).any() or runs.sum() != height * width:
        raise InputError(f"the runs of the RLE do not fill a {height} x {width} picture")
    ends = runs.cumsum()
    starts, lengths = ends[:-1:2], runs[1::2]
    starts, lengths = starts[lengths > 0], lengths[lengths > 0]
    if not len(starts):
        return np.zeros((0, 0), dtype=np.uint8), (0, 0)
    column, row = np.divmod(starts, height)
    last = starts + lengths - 1
    left, right = int(column[0]), int(last[-1] // height) + 1
    top, bottom = 0, height
    if (last // height == column).all():  # else a run goes on from one column into the next
        top, bottom = int(row.min()), int((last % height).max()) + 1
    begin = (column - left) * (bottom - top) + row - top
    edges = np.stack([begin, begin + lengths], 1).ravel()
    area = (right - left) * (bottom - top)
    gaps = np.diff(edges, prepend=0, append=area)
    flat = np.repeat((np.arange(len(gaps)) % 2).astype(np.uint8), gaps)
    return flat.reshape(right - left, bottom - top).T, (left, top)


def _runs(text: str | bytes) -> NDArray[np.int64]:
    """Run lengths of COCO's compressed counts.

    Each number is a string of 5-bit digits, lowest first, in characters from '0' on whose bit 5
    says that more follow; from the fourth number on it is the difference to the one before last.
    """
    raw = text.encode("ascii") if isinstance(text, str) else text
    codes = np.frombuffer(raw, dtype=np.uint8).astype(np.int64) - 48
    if not len(codes):
        return codes
    ends = np.flatnonzero(codes & 32 == 0)
    if codes.min() < 0 or codes.max() > 63 or not len(ends) or ends[-1] != len(codes) - 1:
        raise ValueError("not the characters of an RLE")
    starts = np.concatenate([[0], ends[:-1] + 1])
    digits = ends - starts + 1
    if digits.max() > 10:
        raise ValueError("a run that no picture can hold")
    place = np.arange(len(codes)) - np.repeat(starts, digits)
    values = np.add.reduceat((codes & 31) << (5 * place), starts)
    values -= np.where(codes[ends] & 16, np.int64(1) << (5 * digits), 0)
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return values
