"""Boxes: anchors, deltas, overlap, matching, and NMS with a fixed-length result.

Boxes are xyxy float32 pixels throughout (see ``structures``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou, nms

MANY = 10_000  # boxes from which NMS goes group by group: one call compares all with all
MAX_LOG_SCALE = math.log(1000 / 16)  # a box grows at most 62.5 times: exp cannot overflow
BETWEEN, BELOW = -2, -1  # match(): neither positive nor negative; negative


@dataclass(frozen=True)
class Convention:
    """Small numerical rules in which code bases differ; weights belong to one set of them.

    Attributes:
        aligned: RoIAlign subtracts half a cell, so that cell centres coincide.
        sampling_ratio: RoIAlign samples a bin and axis; 0: as many as cells in the bin.
        round_anchors: base anchors rounded to whole pixels.
        beta: smooth L1 turns from square to linear here; 0 is plain L1.
        soft_masks: mask targets keep values between 0 and 1 instead of >= 0.5.
    """

    aligned: bool
    sampling_ratio: int
    round_anchors: bool
    beta: float
    soft_masks: bool


CONVENTIONS = {
    "detectron": Convention(True, 0, False, 0.0, False),  # Detectron2 and MMDetection
    "torchvision": Convention(False, 2, True, 1 / 9, True),
}


def anchors(
    shapes: Sequence[Sequence[int]],
    strides: Sequence[int],
    device: torch.device,
    *,
    scale: float = 8.0,
    ratios: Sequence[float] = (0.5, 1.0, 2.0),
    rounded: bool = False,
    offset: float = 0.0,
) -> list[Tensor]:
    """Anchors of every pyramid level, centred on the top left corner of each cell.

    Args:
        shapes: (height, width) of each level.
        strides: pixels a cell of each level.
        device: where to make them.
        scale: side of the square anchor in cells.
        ratios: height / width.
        rounded: round the base anchors (torchvision).
        offset: centres farther to the right and down by this share of a cell.

    Returns:
        One ``[h * w * len(ratios), 4]`` a level; order: row, column, ratio.
    """
    root = torch.tensor(ratios, device=device).sqrt()
    levels = []
    for (height, width), stride in zip(shapes, strides, strict=True):
        half_w, half_h = stride * scale / root / 2, stride * scale * root / 2
        base = torch.stack([-half_w, -half_h, half_w, half_h], 1)
        base = base.round() if rounded else base
        ys = (torch.arange(height, device=device, dtype=torch.float32) + offset) * stride
        xs = (torch.arange(width, device=device, dtype=torch.float32) + offset) * stride
        y, x = torch.meshgrid(ys, xs, indexing="ij")
        centres = torch.stack([x, y, x, y], -1).reshape(-1, 1, 4)
        levels.append((centres + base).reshape(-1, 4))
    return levels


def encode(boxes: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    """Deltas ``[N, 4]`` (dx, dy, dw, dh) that take ``anchors`` to ``boxes``, times ``weights``."""
    a_size, size = anchors[:, 2:] - anchors[:, :2], boxes[:, 2:] - boxes[:, :2]
    a_centre, centre = (anchors[:, :2] + anchors[:, 2:]) / 2, (boxes[:, :2] + boxes[:, 2:]) / 2
    tiny = torch.finfo(a_size.dtype).tiny
    a_size, size = a_size.clamp(min=tiny), size.clamp(min=tiny)
    deltas = torch.cat([(centre - a_centre) / a_size, (size / a_size).log()], 1)
    return deltas * deltas.new_tensor(weights)


def decode(deltas: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    """Boxes ``[..., 4]`` from deltas ``[..., 4]`` and anchors of a shape that broadcasts."""
    deltas = deltas.float() / deltas.new_tensor(weights, dtype=torch.float32)
    size = anchors[..., 2:] - anchors[..., :2]
    centre = anchors[..., :2] + size / 2 + deltas[..., :2] * size
    half = deltas[..., 2:].clamp(max=MAX_LOG_SCALE).exp() * size / 2
    return torch.cat([centre - half, centre + half], -1)


def clip(boxes: Tensor, size: Tensor) -> Tensor:
    """Boxes ``[..., 4]`` cut to a frame; ``size``, ``[..., 2]``, is (height, width)."""
    side = size.flip(-1).to(boxes)
    return torch.minimum(boxes.clamp(min=0), torch.cat([side, side], -1))


def enlarge(boxes: Tensor, margin: float) -> Tensor:
    """Boxes ``[N, 4]`` that reach farther by ``margin`` of their sides, on every side."""
    if not margin:
        return boxes
    reach = (boxes[:, 2:] - boxes[:, :2]) * margin
    return torch.cat([boxes[:, :2] - reach, boxes[:, 2:] + reach], 1)


def paired_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU ``[N]`` of row i of ``boxes`` with row i of ``others``, both ``[N, 4]``."""
    low = torch.maximum(boxes[:, :2], others[:, :2])
    high = torch.minimum(boxes[:, 2:], others[:, 2:])
    shared = (high - low).clamp(min=0).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (others[:, 2:] - others[:, :2]).prod(1)
    return shared / (areas - shared).clamp(min=1e-9)


def match(
    boxes: Tensor,
    truth: Tensor,
    positive: float,
    negative: float,
    *,
    low_quality: float | None = None,
) -> Tensor:
    """The object that each box belongs to.

    Args:
        boxes: ``[N, 4]`` anchors or proposals.
        truth: ``[G, 4]`` objects; G may be 0.
        positive: IoU from which a box is positive.
        negative: IoU below which it is negative.
        low_quality: also the boxes that reach an object's best IoU (ties included), each
            for its own best object, if that is above 0 and at least this; None: none of them.

    Returns:
        ``[N]`` int64: index into ``truth``, or ``BELOW``, or ``BETWEEN``.
    """
    best = boxes.new_full((len(boxes),), -1.0)
    index = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    forced = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    # 300 objects x 267,000 anchors would be 320 MB at once, so objects go in chunks.
    step = max(1, 2**24 // max(1, len(boxes)))
    for start in range(0, len(truth), step):
        overlap = box_iou(truth[start : start + step], boxes)
        value, chosen = overlap.max(0)
        better = value > best
        best = torch.where(better, value, best)
        index = torch.where(better, chosen + start, index)
        if low_quality is not None:
            most = overlap.amax(1, keepdim=True)
            forced |= ((overlap == most) & (most > 0) & (most >= low_quality)).any(0)
    matched = torch.where(best >= positive, index, BETWEEN)
    matched = torch.where(best < negative, BELOW, matched)
    return torch.where(forced, index, matched)


def sample(labels: Tensor, count: int | None, fraction: float) -> Tensor:
    """Random indices, at most ``fraction`` of them positive, positives first.

    Args:
        labels: ``[N]``, > 0 positive, 0 negative, < 0 ignored.
        count: how many in all; None takes every positive and negative.
        fraction: share that positives may have.
    """
    chosen = [(labels > 0).nonzero()[:, 0], (labels == 0).nonzero()[:, 0]]
    if count is not None:
        for i, room in enumerate((int(count * fraction), count)):
            pool, room = chosen[i], room - (len(chosen[0]) if i else 0)
            if len(pool) > room:
                pick = torch.randperm(len(pool), device=pool.device)[:room]
                chosen[i] = pool[pick.sort().values]
    return torch.cat(chosen)


def nms_keep(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """Non-maximum suppression within groups, as a mask of the input's length.

    A fixed-length mask followed by ``topk`` keeps the graph's shapes static, so that it exports.

    Args:
        boxes: ``[N, 4]``.
        scores: ``[N]``.
        groups: ``[N]`` int64, e.g. level or label; boxes of two groups never suppress.
        threshold: IoU above which the lower score goes.

    Returns:
        ``[N]`` bool.
    """
    keep = torch.zeros_like(scores, dtype=torch.bool)
    if len(boxes) == 0:
        return keep
    if len(boxes) > MANY and not torch.compiler.is_exporting():
        order = groups.argsort(stable=True)
        counts = groups.bincount()
        for rows in torch.split(order, counts[counts > 0].tolist()):
            kept = nms(boxes[rows].double(), scores[rows].double(), threshold)
            keep[rows[kept]] = True
        return keep
    # Each group is moved to a place of its own, so one call serves all groups. In 64 bits: the
    # thousandth place is so far away that 32 would round boxes to eighths of a pixel.
    boxes = boxes.double()
    offsets = groups[:, None] * (boxes.max() - boxes.min() + 1)
    keep[nms(boxes + offsets, scores.double(), threshold)] = True
    return keep


def top(scores: Tensor, keep: Tensor, count: int) -> Tensor:
    """Indices of at most ``count`` kept rows, best score first; ties in the input's order."""
    order = torch.where(keep, scores, -torch.inf).sort(descending=True, stable=True).indices
    order = order[:count]
    return order[keep[order]]


def l1(deltas: Tensor, goal: Tensor, beta: float) -> Tensor:
    """Smooth L1 that turns linear at ``beta`` (plain L1 when 0), summed over everything."""
    return F.smooth_l1_loss(deltas.float(), goal, beta=beta, reduction="sum")
