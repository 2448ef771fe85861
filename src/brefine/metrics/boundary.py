"""Masks in windows: how they overlap, and the bands along their outlines (Boundary IoU)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

BAND = 0.02  # width of the boundary band, of the picture's diagonal

Mask = tuple[NDArray[np.uint8], tuple[int, int]]  # window [h, w] and (x, y) of its corner


def band_width(size: tuple[int, int]) -> int:
    """Width in pixels of the boundary band in a picture of ``size`` (height, width)."""
    return max(1, round(BAND * math.hypot(*size)))


def boundary_band(window: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """The part of a mask within ``width`` pixels of its outline.

    A pixel is inner, not of the band, when the square of side ``2 * width + 1`` around it lies
    in the mask. Outside the window there is no mask, so neither padding nor the picture is
    needed, and the picture's border counts as outline.

    Args:
        window: ``[h, w]`` of 0 and 1, all of the mask.
        width: in pixels, at least 1.

    Returns:
        ``[h, w]`` of 0 and 1; the window itself where all of it is band.
    """
    side = 2 * width + 1
    if min(window.shape) < side:
        return window
    band = np.copy(window)  # in the window's own memory order
    inner, length = window, 1  # inner[y, x]: the `length` pixels from here on are all set
    while length < side:
        step = min(length, side - length)
        inner = inner[:-step] & inner[step:]
        length += step
    length = 1
    while length < side:
        step = min(length, side - length)
        inner = inner[:, :-step] & inner[:, step:]
        length += step
    band[width:-width, width:-width] ^= inner
    return band


def mask_iou(one: Mask, other: Mask) -> float:
    """IoU of two masks, each a window ``[h, w]`` of 0 and 1 at (x, y); 0 if both are empty."""
    shared = shared_pixels(one, other)
    union = np.count_nonzero(one[0]) + np.count_nonzero(other[0]) - shared
    return shared / union if union else 0.0


def shared_pixels(one: Mask, other: Mask) -> int:
    """Number of pixels that are in both masks."""
    (a, (ax, ay)), (b, (bx, by)) = one, other
    x1, y1 = max(ax, bx), max(ay, by)
    x2 = max(min(ax + a.shape[1], bx + b.shape[1]), x1)
    y2 = max(min(ay + a.shape[0], by + b.shape[0]), y1)
    part = a[y1 - ay : y2 - ay, x1 - ax : x2 - ax] & b[y1 - by : y2 - by, x1 - bx : x2 - bx]
    return int(np.count_nonzero(part))
