"""RoI pooling from a feature pyramid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from brefine.parts.boxes import Convention


def rows(boxes: Sequence[Tensor]) -> Tensor:
    """RoIs ``[R, 5]`` (image index, xyxy) from one ``[n, 4]`` a picture."""
    parts = [
        torch.cat([torch.full_like(box[:, :1], float(i)), box], 1) for i, box in enumerate(boxes)
    ]
    return torch.cat(parts)


def limits(rois: Tensor, sizes: Tensor) -> Tensor:
    """(width, height, width, height) ``[R, 4]`` of each RoI's picture; ``sizes [B, 2]`` (h, w)."""
    return sizes.flip(1).repeat(1, 2).to(rois)[rois[:, 0].long()]


def level(rois: Tensor, levels: int, finest: float = 56.0) -> Tensor:
    """Pyramid level ``[R]`` of each RoI by its size (FPN paper, eq. 1).

    Args:
        rois: ``[R, 5]``.
        levels: how many there are; the last takes everything larger.
        finest: RoIs whose root area is below twice this go to the finest level, 0.
    """
    side = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).clamp(min=0).sqrt()
    return (side / finest + 1e-6).log2().floor().clamp(0, levels - 1).long()


def pool(
    features: Sequence[Tensor],
    rois: Tensor,
    size: int,
    strides: Sequence[int],
    convention: Convention,
    *,
    finest: float = 56.0,
) -> Tensor:
    """RoIAlign, each RoI from the level that fits its size.

    Args:
        features: levels ``[B, C, h, w]``; give a single one to pool everything from it.
        rois: ``[R, 5]`` (image index, xyxy pixels).
        size: cells a side.
        strides: pixels a cell of each level.
        convention: alignment and sampling.
        finest: see ``level``.

    Returns:
        ``[R, C, size, size]``.
    """

    def read(feature: Tensor, stride: int, chosen: Tensor) -> Tensor:
        # Half precision knows pixels beyond 256 only to the nearest 2: it must not hold boxes.
        exact = torch.promote_types(feature.dtype, torch.float32)
        pooled = align(feature.to(exact), chosen.to(exact), size, 1 / stride, convention)
        return pooled.to(feature.dtype)

    if len(features) == 1:
        return read(features[0], strides[0], rois)
    of = level(rois, len(features), finest)
    here = of == torch.arange(len(features), device=of.device)[:, None]  # [levels, R]
    parts = [
        read(feature, stride, rois[mine.nonzero()[:, 0]])
        for feature, stride, mine in zip(features, strides, here, strict=True)
    ]
    # Counted level by level: where in the parts each RoI is. Of its shape export knows that it
    # is that of the RoIs, which it would not of the parts'.
    place = here.flatten().cumsum(0).view(here.shape).gather(0, of[None])[0] - 1
    return torch.cat(parts)[place]


#: ``(features, rois, size)`` to ``[R, C, size, size]``: how a head reads the pyramid
Pool = Callable[[Sequence[Tensor], Tensor, int], Tensor]


@dataclass(frozen=True)
class Pooling:
    """`pool` from the first levels of a pyramid, by rules that stay the same.

    Attributes:
        strides: of the levels that are read.
        convention: see `pool`.
        finest: see `level`.
    """

    strides: Sequence[int]
    convention: Convention
    finest: float = 56.0

    def __call__(self, features: Sequence[Tensor], rois: Tensor, size: int) -> Tensor:
        """``[R, C, size, size]``."""
        levels = features[: len(self.strides)]
        return pool(levels, rois, size, self.strides, self.convention, finest=self.finest)


def align(feature: Tensor, rois: Tensor, size: int, scale: float, convention: Convention) -> Tensor:
    """RoIAlign from one level: torchvision's, with a kernel of our own on CPUs.

    torchvision's CPU kernel uses one thread and works the taps of a cell out anew for every
    channel. Here they are worked out once, and each cell is a weighted sum of few rows of the
    feature map seen as a table ``[B * h * w, C]``.

    Args:
        feature: ``[B, C, h, w]``, float32 or float64.
        rois: ``[R, 5]`` (image index, xyxy pixels).
        size: S, cells a side.
        scale: 1 / stride.
        convention: alignment and sampling.

    Returns:
        ``[R, C, S, S]``, on a CPU in the channels-last format.
    """
    ratio, aligned = convention.sampling_ratio, convention.aligned
    plain = feature.device.type != "cpu" or torch.compiler.is_compiling()
    # a fixed number of points may leave pixels between them
    if plain or ratio > 0 or not len(rois):
        pooled: Tensor = roi_align(feature, rois, size, scale, ratio, aligned)
        return pooled
    channels, height, width = feature.shape[1:]
    # contiguous: of a single picture the reshape is a view with the channels far apart
    table = feature.permute(0, 2, 3, 1).reshape(-1, channels).contiguous()
    # [R, 2] (x, y): where the first cell starts, and how long a cell is, in pixels of the level
    start, stop = (rois[:, 1:] * scale - (0.5 if aligned else 0.0)).reshape(-1, 2, 2).unbind(1)
    cell = (stop - start if aligned else (stop - start).clamp(min=1)) / size
    count = cell.ceil().clamp(min=0)  # points a cell
    most = count.amax(1).clamp(min=1).long()
    parts, chosen = [], []
    for samples in sorted(set(most.tolist())):  # RoIs with as many taps are done together
        here = (most == samples).nonzero()[:, 0]
        (x, x_weight), (y, y_weight) = (
            _taps(start[here, i], cell[here, i], count[here, i], samples, size, limit)
            for i, limit in ((0, width), (1, height))
        )
        row = (rois[here, 0].int()[:, None, None] * height + y) * width
        index = row[:, :, None, :, None] + x[:, None, :, None, :]
        weight = y_weight[:, :, None, :, None] * x_weight[:, None, :, None, :]
        bags = len(here) * size * size
        cells = F.embedding_bag(
            index.reshape(bags, -1), table, per_sample_weights=weight.reshape(bags, -1), mode="sum"
        )
        parts.append(cells.view(len(here), size, size, channels))
        chosen.append(here)
    return torch.cat(parts)[torch.cat(chosen).argsort()].permute(0, 3, 1, 2)


def _taps(
    start: Tensor, cell: Tensor, count: Tensor, samples: int, size: int, limit: int
) -> tuple[Tensor, Tensor]:
    """The pixels that each cell reads along one axis, and their weights.

    ``samples`` points at most one pixel apart lie between ``samples + 1`` neighbouring pixels.

    Args:
        start: ``[R]`` where the first cell starts.
        cell: ``[R]`` length of a cell.
        count: ``[R]`` points a cell, at most ``samples``.
        samples: see above.
        size: S.
        limit: pixels there are; points more than one outside read nothing.

    Returns:
        Pixels, int32, and weights, both ``[R, S, samples + 1]``.
    """
    step = torch.arange(samples)
    between = cell / count.clamp(min=1)
    points = (start[:, None] + torch.arange(size) * cell[:, None])[:, :, None] + (
        (step + 0.5) * between[:, None]
    )[:, None]  # [R, S, samples]
    used = (step < count[:, None])[:, None] & (points >= -1) & (points <= limit)
    points = points.clamp(0, limit - 1)
    pixels = points[:, :, :1].floor() + torch.arange(samples + 1)
    near = (1 - (points[:, :, :, None] - pixels[:, :, None]).abs()).clamp(min=0)
    weights = (near * used[:, :, :, None]).sum(2) / count.clamp(min=1)[:, None, None]
    return pixels.clamp(max=limit - 1).int(), weights
