"""Masks between RoI and picture: labels cut to an RoI, logits pasted back, COCO's RLE.

Labels are cut in windows, and logits become runs without a pixel being drawn: no dense
``[N, H, W]`` array exists on any path, so the cost follows the objects and not the picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from brefine import runs
from brefine.parts.boxes import clip, enlarge
from brefine.rle import Runs, decode
from brefine.runs import of_window
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


@torch.no_grad()
def shrink(masks: Bitmaps, factor: int, size: tuple[int, int], *, least: int = 2) -> Tensor:
    """Masks on a grid of fewer cells, by the four pixels around each cell's centre.

    That is what bilinear resizing gives, compared with a threshold.

    Args:
        masks: N masks.
        factor: pixels a cell, an even number.
        size: (height, width) of the grid, which starts where the picture does.
        least: of four pixels that must be set: 2 is at least a half of them, 3 is more.

    Returns:
        ``[N, *size]`` float, 0 or 1.
    """
    count = torch.zeros(len(masks), *size, device=masks.origins.device)
    for drawn, window, (x, y) in zip(count, masks.windows, masks.origins.tolist(), strict=True):
        for dy in (factor // 2 - 1, factor // 2):
            for dx in (factor // 2 - 1, factor // 2):
                top, left = max(0, -(-(y - dy) // factor)), max(0, -(-(x - dx) // factor))
                part = window[top * factor + dy - y :: factor, left * factor + dx - x :: factor]
                part = part[: size[0] - top, : size[1] - left]
                drawn[top : top + part.shape[0], left : left + part.shape[1]] += part
    return (count >= least).float()


@torch.no_grad()
def read_points(masks: Bitmaps, points: Tensor, index: Tensor) -> Tensor:
    """Masks read bilinearly at points, zeros outside.

    Args:
        masks: N masks in a frame.
        points: ``[R, P, 2]`` (x, y) in pixels of that frame.
        index: ``[R]`` int64, which mask each row of points is read from.

    Returns:
        ``[R, P]`` float32, 0..1.
    """
    # All windows in one line of pixels, behind a zero for what lies outside of them.
    line = torch.cat([points.new_zeros(1), *(w.flatten().to(points) for w in masks.windows)])
    sizes = torch.tensor([w.shape[::-1] for w in masks.windows], device=points.device)
    sizes = sizes.reshape(-1, 2)
    starts = (sizes.prod(1).cumsum(0) - sizes.prod(1) + 1)[index, None]
    place = points - 0.5 - masks.origins.to(points)[index, None]
    low = place.floor()
    share = place - low
    size = sizes[index, None]
    value = points.new_zeros(points.shape[:2])
    for x, y in ((0, 0), (1, 0), (0, 1), (1, 1)):
        pixel = low.long() + torch.tensor([x, y], device=points.device)
        inside = ((pixel >= 0) & (pixel < size)).all(2)
        at = torch.where(inside, starts + pixel[..., 1] * size[..., 0] + pixel[..., 0], 0)
        weight = (share[..., 0] if x else 1 - share[..., 0]) * (
            share[..., 1] if y else 1 - share[..., 1]
        )
        value += line[at] * weight
    return value


@torch.no_grad()
def share_inside(masks: Bitmaps, boxes: Tensor, index: Tensor, frame: tuple[int, int]) -> Tensor:
    """The share of a mask's pixels that lies inside a box, ``[R]``.

    Args:
        masks: N masks in a frame.
        boxes: ``[R, 4]`` xyxy pixels of that frame; cut to it, then to whole pixels.
        index: ``[R]`` int64, which mask each box is compared with.
        frame: (height, width).
    """
    limit = torch.tensor([frame[1], frame[0]] * 2, device=boxes.device)
    low, high = torch.minimum(boxes.clamp(min=0), limit).long().view(-1, 2, 2).unbind(1)
    high = torch.maximum(high, low + 1)
    origin = masks.origins.to(boxes.device)[index]
    cuts = torch.cat([low - origin, high - origin], 1).clamp(min=0).tolist()
    pairs = zip(index.tolist(), cuts, strict=True)
    inside = Bitmaps([masks.windows[i][y1:y2, x1:x2] for i, (x1, y1, x2, y2) in pairs], origin)
    areas = masks.areas().to(boxes.device)[index].clamp(min=1)
    return (inside.areas().to(boxes.device) / areas).to(boxes)


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
def paste(
    logits: Tensor, boxes: Tensor, size: tuple[int, int], spans: Tensor | None = None
) -> list[Runs]:
    """The masks of objects in their picture, as runs: ``runs.paste`` of tensors.

    Args:
        logits: ``[N, h, w]`` on grids that span the boxes.
        boxes: ``[N, 4]`` xyxy pixels of the picture.
        size: (height, width) of the picture.
        spans: ``[N, 4]`` what the grids span instead, if it is not the boxes.
    """
    grid = logits.float().cpu().numpy()
    other = None if spans is None else spans.double().cpu().numpy()
    return runs.paste(grid, boxes.double().cpu().numpy(), size, other)


@torch.no_grad()
def boxes_around(logits: Tensor, spans: Tensor) -> Tensor:
    """The boxes that hold just what `paste` makes of logits.

    Bilinear logits are above 0 somewhere along a line only if they are so on a row of the grid,
    so the outermost zeros on its rows and columns are the sides. Beyond the outer cells' centres
    their logits go on to the edge of the span.

    Args:
        logits: ``[N, h, w]``.
        spans: ``[4]`` xyxy pixels, what they all span, or ``[N, 4]``, what each does.

    Returns:
        ``[N, 4]`` xyxy pixels, zeros where no logit is above 0.
    """
    sides = []
    for axis in (2, 1):  # x, y
        length = logits.shape[axis]
        lines = logits.movedim(axis, 2).float()
        inside = lines > 0
        # The zero between neighbours, in cells from the left: one of them is above it.
        near, far = lines[..., :-1], lines[..., 1:]
        cross = inside[..., 1:] != inside[..., :-1]
        place = torch.arange(length - 1, device=lines.device) + 0.5
        place = place + torch.where(cross, near / torch.where(cross, near - far, 1), 0)
        rises, falls = cross & inside[..., 1:], cross & inside[..., :-1]
        low = torch.where(rises, place, length).flatten(1)
        high = torch.where(falls, place, 0).flatten(1)
        low = torch.cat([low, torch.where(inside[..., 0], 0.0, length)], 1).amin(1)
        high = torch.cat([high, torch.where(inside[..., -1], float(length), 0)], 1).amax(1)
        start, stop = spans[..., 2 - axis], spans[..., 4 - axis]
        cell = (stop - start) / length
        sides.append(torch.stack([low * cell + start, high * cell + start], 1))
    x, y = sides
    boxes = torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1)
    return torch.where((logits > 0).flatten(1).any(1)[:, None], boxes, 0)


def bound(boxes: Tensor, logits: Tensor, spans: Tensor, size: Tensor) -> Tensor:
    """Boxes ``[N, 4]`` around masks, cut to the picture; where there is no mask, those given.

    Args:
        boxes: ``[N, 4]`` xyxy pixels.
        logits: ``[N, h, w]``.
        spans: ``[N, 4]`` xyxy pixels, what the logits span.
        size: ``[2]`` or ``[N, 2]``, (height, width) of the picture.
    """
    around = clip(boxes_around(logits, spans), size)
    drawn = (around[:, 2:] > around[:, :2]).all(1, keepdim=True)
    return torch.where(drawn, around, boxes)


@torch.no_grad()
def on_boxes(instances: Instances, side: int) -> Tensor:
    """Logits ``[N, side, side]`` that span the boxes and their margin, read from wider ones."""
    assert instances.logits is not None
    assert instances.spans is not None
    corners, spans = enlarge(instances.boxes, instances.margin), instances.spans
    cells = (torch.arange(side, device=corners.device) + 0.5) / side
    x, y = (
        (corners[:, i : i + 1] - spans[:, i : i + 1])
        / (spans[:, i + 2 : i + 3] - spans[:, i : i + 1])
        + cells * ((corners[:, i + 2] - corners[:, i]) / (spans[:, i + 2] - spans[:, i]))[:, None]
        for i in (0, 1)
    )
    place = torch.stack([x[:, None].expand(-1, side, -1), y[..., None].expand(-1, -1, side)], 3)
    read = functional.grid_sample(
        instances.logits[:, None], place.to(instances.logits) * 2 - 1, padding_mode="border",
        align_corners=False,
    )  # fmt: skip
    return read[:, 0]


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
    return of_window(pixels, origin, size).encode()


def paste_all(instances: Instances, size: tuple[int, int]) -> list[Runs]:
    """The masks of what a model found, or of labels.

    Args:
        instances: objects with ``logits``, in a frame of any size; or labels with ``masks``, in a
            frame of ``size``.
        size: (height, width) of the original picture.

    Returns:
        One mask an object, maybe empty, in a frame of ``size``.
    """
    if instances.logits is not None:
        rois = enlarge(_scaled_boxes(instances, size), instances.margin)
        spans = instances.spans
        if spans is not None:
            spans = _scaled_boxes(replace(instances, boxes=spans), size)
        return paste(instances.logits, rois, size, spans)
    if instances.masks is None or instances.size != size:
        raise ValueError("needs logits, or masks in a frame of the picture's size")
    origins = instances.masks.origins.tolist()
    return [
        of_window(window.cpu().numpy(), (x, y), size)
        for window, (x, y) in zip(instances.masks.windows, origins, strict=True)
    ]


def to_records(
    instances: Instances,
    image_id: int | str,
    categories: Sequence[Category],
    size: tuple[int, int],
) -> list[dict[str, Any]]:
    """COCO results of one picture, in pixels of that picture.

    Args:
        instances: see ``paste_all``.
        image_id: the picture's id.
        categories: the category table; label ``i`` is row ``i``.
        size: (height, width) of the original picture.

    Returns:
        One record an object, in their order: ``image_id``, ``category_id``, ``score`` (1 for
        labels), ``bbox`` (x, y, width, height) and ``segmentation`` (RLE, maybe empty).
    """
    boxes = _scaled_boxes(instances, size).tolist()
    scores = [1.0] * len(boxes) if instances.scores is None else instances.scores.tolist()
    masks = paste_all(instances, size)
    return [
        {
            "image_id": image_id,
            "category_id": categories[label].id,
            "score": score,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "segmentation": mask.encode(),
        }
        for (x1, y1, x2, y2), label, score, mask in zip(
            boxes, instances.labels.tolist(), scores, masks, strict=True
        )
    ]


def touching(instances: Instances, records: Sequence[Mapping[str, Any]]) -> Tensor:
    """Which masks reach the edge of the RoI that they were predicted in: they may be cut there.

    The RoI is the box with its margin, or what the logits span (``Instances.spans``). A side of
    it that lies outside of the picture or on its border does not count. With tight boxes and no
    ``margin`` every good mask reaches the edge: that is what a tight box is. With a margin, a mask
    that does is cut off, or the box was far too small.

    Args:
        instances: objects with ``logits``, in the frame of their picture.
        records: `to_records` of them, in that frame.

    Returns:
        ``[N]`` bool.
    """
    size = instances.size
    rois = enlarge(_scaled_boxes(instances, size), instances.margin)
    if instances.spans is not None:
        rois = instances.spans.cpu().double()
    found = [decode(record["segmentation"], size).box() for record in records]
    masks = torch.tensor(found).reshape(-1, 4)
    limit = torch.tensor([size[1], size[0]])
    ends = (rois.view(-1, 2, 2) - 0.5).ceil().clamp(min=0).minimum(limit).long().flatten(1)
    near = torch.cat([masks[:, :2] <= ends[:, :2], masks[:, 2:] >= ends[:, 2:]], 1)
    inner = torch.cat([ends[:, :2] > 0, ends[:, 2:] < limit], 1)
    return (near & inner).any(1) & (masks[:, 2] > masks[:, 0])


def _scaled_boxes(instances: Instances, size: tuple[int, int]) -> Tensor:
    """Boxes ``[N, 4]`` float64 in a frame of another (height, width), on the CPU."""
    y, x = size[0] / instances.size[0], size[1] / instances.size[1]
    return instances.boxes.cpu().double() * torch.tensor([x, y, x, y], dtype=torch.float64)
