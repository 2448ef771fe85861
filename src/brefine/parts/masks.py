"""Masks between RoI and picture: labels cut to an RoI, logits pasted back, COCO's RLE.

Everything here works in box-sized windows: no dense ``[N, H, W]`` array exists on any path, so
the cost follows the objects' own area and not the size of the picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional

from brefine.structures import Bitmaps, Category, Instances

CHUNK = 64  # RoIs cropped together, padded to one width


@torch.no_grad()
def crop(
    masks: Bitmaps,
    boxes: Tensor,
    index: Tensor,
    size: int,
    frame: tuple[int, int],
    *,
    aligned: bool = True,
    sampling_ratio: int = 0,
    soft: bool = False,
) -> Tensor:
    """Cut masks to RoIs: the targets of a mask head.

    The value is what ``torchvision.ops.roi_align`` gives on the dense masks at scale 1. Its
    samples lie on a grid, so rows are averaged first (a few for each of the S cells) and columns
    after, in a small matrix product.

    Args:
        masks: N masks in a frame.
        boxes: ``[P, 4]`` RoIs, xyxy pixels of that frame.
        index: ``[P]`` int64, which mask each RoI is cut from.
        size: S, the side of the result.
        frame: (height, width); samples up to one pixel outside take the border's value.
        aligned: RoIAlign's half-pixel shift; without it a RoI is at least 1 pixel wide.
        sampling_ratio: samples a cell and axis; 0 takes one for every pixel of the cell.
        soft: keep RoIAlign's averages instead of thresholding them at 0.5.

    Returns:
        ``[P, S, S]`` float32, 0 or 1 (0..1 if ``soft``), on the device of ``boxes``.
    """
    boxes = boxes.float()
    device = boxes.device
    result = boxes.new_zeros(len(boxes), size, size)
    if not len(boxes):
        return result
    # The part of each window that an RoI can see, as [P, 2] (x, y) pixels of the frame.
    origins = masks.origins.to(device)[index]
    extents = torch.tensor([w.shape[::-1] for w in masks.windows], device=device)[index]
    corners = boxes.reshape(-1, 2, 2)
    first = torch.minimum((corners.amin(1).floor() - 1).long().clamp(min=0), origins + extents)
    first = torch.maximum(first, origins)
    last = torch.minimum((corners.amax(1).ceil() + 2).long().clamp(min=0), origins + extents)
    lengths = (last - first).clamp(min=0)
    cuts = torch.cat([index[:, None], first - origins, lengths], 1).tolist()

    options = (size, aligned, sampling_ratio)
    for chunk in torch.split(lengths[:, 0].argsort(), CHUNK):  # like widths share a chunk
        heights = lengths[chunk, 1]
        tops = heights.cumsum(0) - heights
        width, height = int(lengths[chunk, 0].max()), int(heights.sum())
        pixels = boxes.new_zeros(height + 1, width + 1)  # the last row and column stay blank
        for i, top in zip(chunk.tolist(), tops.tolist(), strict=True):
            mask, x, y, w, h = cuts[i]
            pixels[top : top + h, :w] = masks.windows[mask][y : y + h, x : x + w]
        x_taps, y_taps = (
            _taps(boxes[chunk, axis::2], first[chunk, axis], last[chunk, axis], limit, *options)
            for axis, limit in ((0, frame[1]), (1, frame[0]))
        )
        row = torch.where(y_taps[0] < 0, height, y_taps[0] + tops[:, None, None])
        rows = functional.embedding_bag(
            row.flatten(0, 1), pixels, per_sample_weights=y_taps[1].flatten(0, 1), mode="sum"
        )
        columns = boxes.new_zeros(len(chunk), size, width + 1)
        columns.scatter_add_(2, torch.where(x_taps[0] < 0, width, x_taps[0]), x_taps[1])
        with torch.autocast(device.type, enabled=False):  # float32, whatever the training is in
            result[chunk] = rows.view(len(chunk), size, -1) @ columns.mT
    return result if soft else (result >= 0.5).float()


def _taps(
    sides: Tensor,
    first: Tensor,
    last: Tensor,
    limit: int,
    size: int,
    aligned: bool,
    sampling_ratio: int,
) -> tuple[Tensor, Tensor]:
    """Which pixels of ``first .. last`` the cells of RoIs read along one axis, and their weights.

    The arithmetic follows RoIAlign's float32 kernel step by step, so that the number of samples
    and the cut at the border come out the same.

    Returns:
        Pixel numbers from ``first`` on, -1 for none, and weights, both ``[C, size, taps]``.
    """
    start, stop = (sides - 0.5 if aligned else sides).unbind(1)
    extent = stop - start if aligned else (stop - start).clamp(min=1)
    cell = extent / size
    count = cell.ceil().clamp(min=0)
    if sampling_ratio > 0:
        count = torch.full_like(cell, sampling_ratio)
    share = 1 / count.clamp(min=1)
    step = torch.arange(int(count.max()), device=sides.device)
    cells = torch.arange(size, device=sides.device)
    samples = (start[:, None] + cells * cell[:, None])[:, :, None] + (
        (step + 0.5) * (cell * share)[:, None]
    )[:, None]  # [C, size, samples]
    used = (step < count[:, None])[:, None] & (samples >= -1) & (samples <= limit)
    samples = samples.clamp(0, limit - 1)
    low = samples.floor()
    upper = samples - low
    weights = torch.cat([1 - upper, upper], 2) * share[:, None, None]
    index = torch.cat([low, low + 1], 2).long()
    seen = (index >= first[:, None, None]) & (index < last[:, None, None]) & used.repeat(1, 1, 2)
    return torch.where(seen, index - first[:, None, None], -1), weights


@torch.no_grad()
def paste(logits: Tensor, box: Tensor, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """The mask of one object in its picture, as a window no larger than its box.

    Logits are read bilinearly (``align_corners=False``, border replicated) at the pixel centres
    inside the box and compared with 0 last, so the outline has no stairs of the RoI's grid.

    Args:
        logits: ``[S, S]`` on a grid that spans the box.
        box: ``[4]`` xyxy pixels of the picture.
        size: (height, width) of the picture.

    Returns:
        The window, bool ``[h, w]``, maybe empty, and the (x, y) of its top left pixel.
    """
    x1, y1, x2, y2 = box.tolist()
    x, columns = _paste_weights(x1, x2, size[1], logits)
    y, rows = _paste_weights(y1, y2, size[0], logits)
    return (rows @ logits.float() @ columns.mT) > 0, (x, y)


def _paste_weights(start: float, stop: float, limit: int, logits: Tensor) -> tuple[int, Tensor]:
    """First pixel whose centre lies in [start, stop), and ``[n, S]`` bilinear weights."""
    first = min(max(math.ceil(start - 0.5), 0), limit)
    last = min(max(math.ceil(stop - 0.5), first), limit)
    cells = torch.arange(len(logits), device=logits.device)
    centres = torch.arange(first, last, device=logits.device) + 0.5
    position = (centres - start) * (len(logits) / max(stop - start, 1e-6)) - 0.5
    position = position.clamp(0, len(logits) - 1)
    return first, (1 - (position[:, None] - cells).abs()).clamp(min=0)


def encode(
    window: Tensor | NDArray[Any], origin: tuple[int, int], size: tuple[int, int]
) -> dict[str, Any]:
    """COCO's compressed RLE of a mask that is nonzero only inside a window.

    Args:
        window: ``[h, w]`` bool or 0/1, inside the picture; may be empty.
        origin: (x, y) of the window's top left pixel.
        size: (height, width) of the picture.

    Returns:
        ``{"size": [H, W], "counts": str}``, the same as ``pycocotools.mask.encode`` on the
        dense mask.
    """
    pixels = window.cpu().numpy() if isinstance(window, Tensor) else window
    height, width = size
    columns = np.zeros((pixels.shape[1], pixels.shape[0] + 2), dtype=bool)
    columns[:, 1:-1] = pixels.T
    # Every column starts and ends with 0 here, so its changes are start, end, start, end ...
    column, row = np.nonzero(columns[:, 1:] != columns[:, :-1])
    edges = (column + origin[0]) * height + row + origin[1]
    # Runs that go on from one column into the next one (window as high as the picture) are one.
    joined = np.flatnonzero(edges[1:-1:2] == edges[2::2]) * 2 + 1
    edges = np.delete(edges, np.concatenate([joined, joined + 1]))
    counts = np.diff(edges, prepend=0, append=height * width)
    if len(counts) > 1 and counts[-1] == 0:
        counts = counts[:-1]
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode()}


def to_records(
    instances: Instances,
    image_id: int | str,
    categories: Sequence[Category],
    size: tuple[int, int],
) -> list[dict[str, Any]]:
    """COCO results of one picture, in pixels of that picture.

    Args:
        instances: objects with ``logits``, in a frame of any size; or labels with ``masks``,
            in a frame of ``size``.
        image_id: the picture's id.
        categories: the category table; label ``i`` is row ``i``.
        size: (height, width) of the original picture.

    Returns:
        One record an object, in their order: ``image_id``, ``category_id``, ``score`` (1 for
        labels), ``bbox`` (x, y, width, height) and ``segmentation`` (RLE, maybe empty).
    """
    instances = instances.to("cpu")
    scale_y, scale_x = size[0] / instances.size[0], size[1] / instances.size[1]
    boxes = instances.boxes.double() * torch.tensor([scale_x, scale_y, scale_x, scale_y])
    scores = [1.0] * len(boxes) if instances.scores is None else instances.scores.tolist()
    records = []
    for i, (box, label, score) in enumerate(
        zip(boxes, instances.labels.tolist(), scores, strict=True)
    ):
        if instances.logits is not None:
            window, origin = paste(instances.logits[i], box, size)
        elif instances.masks is not None and instances.size == size:
            x, y = instances.masks.origins[i].tolist()
            window, origin = instances.masks.windows[i], (x, y)
        else:
            raise ValueError("to_records needs logits, or masks in a frame of the picture's size")
        x1, y1, x2, y2 = box.tolist()
        records.append(
            {
                "image_id": image_id,
                "category_id": categories[label].id,
                "score": score,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "segmentation": encode(window, origin, size),
            }
        )
    return records
