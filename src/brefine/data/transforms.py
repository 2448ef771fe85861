"""Geometry of a picture together with its objects."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from brefine.data.pictures import network_size
from brefine.structures import Bitmaps, Instances

#: an object of which a smaller share of its pixels is left, by a crop or below pasted objects, is
#: dropped
VISIBLE = 0.1
#: what lies outside of a picture, in a crop that reaches beyond it: about the mean of photographs
GREY = 128


def resize(
    picture: Tensor, target: Instances | None, short: int, long: int
) -> tuple[Tensor, Instances | None]:
    """Resize a picture and its objects to ``network_size``.

    Args:
        picture: ``[3, H, W]`` uint8.
        target: labels in the picture's frame, or None.
        short: pixels of the short side.
        long: largest number of pixels of the long side.

    Returns:
        Picture (antialiased bilinear) and labels. Boxes are scaled and hold the centres of all
        pixels of their masks.
    """
    old = (int(picture.shape[1]), int(picture.shape[2]))
    size = network_size(old, short, long)
    if size == old:
        return picture, target
    picture = functional.interpolate(picture[None], size=size, mode="bilinear", antialias=True)[0]
    if target is None:
        return picture, None
    scale = torch.tensor([size[1] / old[1], size[0] / old[0]]).repeat(2)
    boxes = target.boxes * scale
    masks = None
    if target.masks is not None:
        masks = resize_masks(target.masks, old, size)
        shapes = torch.tensor([window.shape[::-1] for window in masks.windows]).reshape(-1, 2)
        some = (shapes > 0).all(1, keepdim=True)
        tight = torch.cat([masks.origins, masks.origins + shapes], 1)  # windows are tight
        low = torch.minimum(boxes[:, :2], tight[:, :2] + 0.5)
        high = torch.maximum(boxes[:, 2:], tight[:, 2:] - 0.5)
        boxes = torch.where(some, torch.cat([low, high], 1), boxes)
    return picture, Instances(size, boxes, target.labels, target.scores, masks)


def resize_masks(masks: Bitmaps, old: tuple[int, int], new: tuple[int, int]) -> Bitmaps:
    """Masks of a frame of size ``old`` in the same frame at size ``new``.

    A pixel is set where the dense mask, resized with antialiased bilinear weights, reaches 0.5;
    computed in each window alone. An object so thin that nothing reaches 0.5 keeps as many of
    its best covered pixels as its area says, at least one: no object disappears. Windows come
    back tight.
    """
    windows, origins = [], []
    y_taps, x_taps = _taps(old[0], new[0]), _taps(old[1], new[1])
    for window, (x, y) in zip(masks.windows, masks.origins.tolist(), strict=True):
        top, pixels = _resize_rows(window.float(), y, old[0] / new[0], y_taps)
        left, pixels = _resize_rows(pixels.mT.contiguous(), x, old[1] / new[1], x_taps)
        pixels = pixels.mT
        # A straight edge may run exactly along 0.5: rounding must not make it ragged.
        inside = pixels >= 0.5 - 1e-5
        if not inside.any() and window.any():
            area = float(window.sum()) * new[0] * new[1] / (old[0] * old[1])
            best = pixels.flatten().topk(min(max(1, round(area)), pixels.numel())).indices
            inside = torch.zeros(pixels.numel(), dtype=torch.bool).scatter_(0, best, True)
            inside = inside.view(pixels.shape)
        tight, (x1, y1) = tighten(inside)
        windows.append(tight.to(torch.uint8).contiguous())
        origins.append((left + x1, top + y1))
    return Bitmaps(windows, torch.tensor(origins, dtype=torch.int64).reshape(-1, 2))


def _taps(old: int, new: int) -> tuple[Tensor, Tensor]:
    """What each row of a frame resized from ``old`` to ``new`` rows is made of.

    Row ``i`` is an average with a triangle's weights around ``(i + 0.5) * old / new``, whose half
    width is one row, or one row of the result if that is wider; cut at the frame's border.

    Returns:
        Old rows (maybe outside of the frame, then of weight 0) and weights, ``[new, taps]``.
    """
    scale = old / new
    support = max(scale, 1.0)
    centre = (torch.arange(new)[:, None] + 0.5) * scale
    index = (centre - support).floor().long() + torch.arange(math.ceil(2 * support) + 1)
    weight = (1 - (index + 0.5 - centre).abs() / support).clamp(min=0)
    weight = torch.where((index >= 0) & (index < old), weight, 0)
    return index, weight / weight.sum(1, keepdim=True)


def _resize_rows(
    pixels: Tensor, first: int, scale: float, taps: tuple[Tensor, Tensor]
) -> tuple[int, Tensor]:
    """Resize rows ``first ..`` of a frame, the rest of which is 0.

    Returns:
        The first row of the result that can differ from 0, and the rows from there on.
    """
    last, support = first + len(pixels), max(scale, 1.0)
    start = max(math.floor((first - support) / scale), 0)
    stop = min(math.ceil((last + support) / scale), len(taps[0]))
    if not pixels.numel():
        return start, pixels.new_zeros(0, pixels.shape[1])
    index, weight = taps[0][start:stop], taps[1][start:stop]
    weight = torch.where((index >= first) & (index < last), weight, 0)
    index = (index - first).clamp(0, len(pixels) - 1)
    return start, functional.embedding_bag(index, pixels, per_sample_weights=weight, mode="sum")


def flip(picture: Tensor, target: Instances, *, vertical: bool = False) -> tuple[Tensor, Instances]:
    """Picture ``[3, H, W]`` and labels, left and right exchanged, or top and bottom."""
    axis = 1 if vertical else 0  # of x, y
    side = target.size[1 - axis]
    boxes = target.boxes.clone()
    boxes[:, axis::2] = side - target.boxes[:, [axis + 2, axis]]
    masks = target.masks
    if masks is not None:
        origins = masks.origins.clone()
        sides = [window.shape[1 - axis] for window in masks.windows]
        origins[:, axis] = side - origins[:, axis] - torch.tensor(sides, dtype=torch.int64)
        masks = Bitmaps([window.flip(-1 - axis) for window in masks.windows], origins)
    labels = Instances(target.size, boxes, target.labels, target.scores, masks)
    return picture.flip(-1 - axis), labels


def transpose(picture: Tensor, target: Instances) -> tuple[Tensor, Instances]:
    """Picture ``[3, H, W]`` and labels, x and y exchanged; a flip makes a quarter turn of it."""
    masks = target.masks
    if masks is not None:
        masks = Bitmaps([window.mT for window in masks.windows], masks.origins.flip(1))
    size, boxes = target.size[::-1], target.boxes[:, [1, 0, 3, 2]]
    return picture.mT, Instances(size, boxes, target.labels, target.scores, masks)


def crop(
    picture: Tensor, target: Instances, origin: tuple[int, int], size: tuple[int, int]
) -> tuple[Tensor, Instances]:
    """What a frame of ``size`` shows whose top left pixel is pixel ``origin`` of the picture.

    Args:
        picture: ``[C, H, W]`` uint8.
        target: labels with masks in the picture's frame.
        origin: (x, y), may be negative: beyond the picture the frame is grey.
        size: (height, width).

    Returns:
        Picture and labels, by the rules of ``cut``.
    """
    (x, y), (height, width) = origin, size
    x1, x2 = (min(max(edge, 0), picture.shape[2]) for edge in (x, x + width))
    y1, y2 = (min(max(edge, 0), picture.shape[1]) for edge in (y, y + height))
    pixels = picture[:, y1:y2, x1:x2]
    if pixels.shape[1:] != size:
        frame = picture.new_full((len(picture), height, width), GREY)
        if pixels.numel():
            frame[:, y1 - y : y2 - y, x1 - x : x2 - x] = pixels
        pixels = frame
    assert target.masks is not None
    windows, origins = [], []
    for window, (left, top) in zip(
        target.masks.windows, target.masks.origins.tolist(), strict=True
    ):
        rows = slice(max(y1 - top, 0), max(y2 - top, 0))
        columns = slice(max(x1 - left, 0), max(x2 - left, 0))
        part = window[rows, columns]
        windows.append(window if part.shape == window.shape else part)
        origins.append((max(left, x1) - x, max(top, y1) - y))
    masks = Bitmaps(windows, torch.tensor(origins, dtype=torch.int64).reshape(-1, 2))
    return pixels, cut(target, masks, size)


def cut(target: Instances, masks: Bitmaps, size: tuple[int, int]) -> Instances:
    """The objects whose masks were cut down to ``masks``.

    An object of which less than ``VISIBLE`` of its pixels is left is dropped. Boxes are the tight
    boxes of what is left of the masks, in every object.

    Args:
        target: labels before, with masks.
        masks: of the same objects, in their new frame; a window that is the same tensor as
            before was not cut.
        size: of the new frame.
    """
    assert target.masks is not None
    keep, windows, origins = [], [], []
    for index, (old, new) in enumerate(zip(target.masks.windows, masks.windows, strict=True)):
        x, y = masks.origins[index].tolist()
        if new is not old:
            before, after = int(old.sum()), int(new.sum())
            if after < max(1, VISIBLE * before):
                continue
            new, (left, top) = tighten(new)
            x, y = x + left, y + top
        keep.append(index)
        windows.append(new)
        origins.append((x, y))
    left_over = Bitmaps(windows, torch.tensor(origins, dtype=torch.int64).reshape(-1, 2))
    return Instances(size, left_over.boxes(), target.labels[keep], masks=left_over)


def tighten(window: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """A mask ``[h, w]`` cut to the box of its pixels, and the (x, y) of that box in it."""
    ys, xs = window.any(1).nonzero()[:, 0], window.any(0).nonzero()[:, 0]
    if not len(ys):
        return window[:0, :0], (0, 0)
    y1, y2, x1, x2 = int(ys[0]), int(ys[-1]) + 1, int(xs[0]), int(xs[-1]) + 1
    return window[y1:y2, x1:x2], (x1, y1)
