"""RoI pooling from a feature pyramid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align

from brefine.parts.boxes import Convention


def rows(boxes: Sequence[Tensor]) -> Tensor:
    """RoIs ``[R, 5]`` (image index, xyxy) from one ``[n, 4]`` a picture."""
    parts = [
        torch.cat([torch.full_like(box[:, :1], float(i)), box], 1) for i, box in enumerate(boxes)
    ]
    return torch.cat(parts)


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

    def align(feature: Tensor, stride: int, chosen: Tensor) -> Tensor:
        ratio, aligned = convention.sampling_ratio, convention.aligned
        # Half precision knows pixels beyond 256 only to the nearest 2: it must not hold boxes.
        exact = torch.promote_types(feature.dtype, torch.float32)
        pooled: Tensor = roi_align(
            feature.to(exact), chosen.to(exact), size, 1 / stride, ratio, aligned
        )
        return pooled.to(feature.dtype)

    if len(features) == 1:
        return align(features[0], strides[0], rois)
    of = level(rois, len(features), finest)
    if torch.compiler.is_exporting():  # sizes that depend on data do not export: take all levels
        every = torch.stack([align(f, s, rois) for f, s in zip(features, strides, strict=True)])
        return every[of, torch.arange(len(rois), device=rois.device)]
    chosen = [(of == i).nonzero()[:, 0] for i in range(len(features))]
    parts = [align(f, s, rois[c]) for f, s, c in zip(features, strides, chosen, strict=True)]
    back = torch.cat(chosen).argsort()
    return torch.cat(parts)[back]
