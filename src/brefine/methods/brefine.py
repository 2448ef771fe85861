"""BRefine (Yu et al., Sensors 2022, 22, 6499): the multistage fusion mask head.

Figure 4: a main line pools from every level at 14x14; at each stage an auxiliary line adds
detail from P2, a residual-aware module adds context, and bilinear upsampling doubles the side:
14, 28, 56. Trained with boundary region loss and Rank & Sort (section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from brefine.losses import MASK_LOSSES, boundary_bce
from brefine.parts import roi
from brefine.parts.backbone import Backbone
from brefine.parts.boxes import CONVENTIONS, Convention
from brefine.parts.mask_head import ClassLogits, MaskLoss, conv3x3
from brefine.parts.two_stage import Detector, Truth, TwoStage
from brefine.structures import InputError


def brefine(
    num_classes: int,
    *,
    backbone: str = "resnet50",
    channels: int = 256,
    stages: int = 3,
    num_convs: int = 4,
    context: bool = True,
    dilations: tuple[int, ...] = (1, 2, 3),
    residual: bool = True,
    levels: Literal["all", "p2"] = "all",
    norm: Literal["none", "group"] = "none",
    mask_loss: MaskLoss = "boundary",
    boundary_weight: float = 1.0,
    boundary_ratio: float = 0.02,
    ranking: bool = True,
    detector: Detector = Detector(),
) -> TwoStage:
    """BRefine; without ``ranking`` and with ``mask_loss="bce"`` it is Table 5's first row.

    Args:
        num_classes: K, without background.
        backbone: a timm name.
        channels: of the pyramid and the heads.
        stages: 1, 2 or 3: masks of 14, 28 or 56 cells a side (Table 3).
        num_convs: 3x3 convolutions of the main line (0 to 4).
        context: with the residual-aware module; Table 3 leaves it out.
        dilations: of its parallel 3x3 convolutions (Table 4).
        residual: its input is added to their sum (Table 4).
        levels: that the main line pools from (Figure 1).
        norm: GroupNorm after every 3x3 convolution of the head, or none.
        mask_loss: a name of ``losses.MASK_LOSSES``; "boundary" is eq. 2.
        boundary_weight: lambda of eq. 2.
        boundary_ratio: width of the boundary region, as a share of the label's diagonal (eq. 1).
        ranking: Rank & Sort with the three-task balance (eq. 3-6).
        detector: options of trunk, RPN and box head.

    Raises:
        InputError: an unknown backbone, or stages is not 1, 2 or 3, or there are no dilations.
    """
    loss = MASK_LOSSES[mask_loss]
    if mask_loss == "boundary":
        loss = partial(boundary_bce, weight=boundary_weight, ratio=boundary_ratio)
    head = FusionMaskHead(
        channels,
        num_classes,
        stages,
        num_convs=num_convs,
        context=context,
        dilations=dilations,
        residual=residual,
        levels=levels,
        norm=norm,
        loss=loss,
        convention=CONVENTIONS[detector.convention],
        finest=detector.finest,
    )
    return TwoStage(
        num_classes,
        head,
        backbone=backbone,
        channels=channels,
        ranking=ranking,
        detector=detector,
    )


class FusionMaskHead(nn.Module):
    """Main line, auxiliary lines and residual-aware modules (section 3.1, Figure 4)."""

    def __init__(
        self,
        channels: int,
        num_classes: int,
        stages: int = 3,
        *,
        num_convs: int = 4,
        context: bool = True,
        dilations: Sequence[int] = (1, 2, 3),
        residual: bool = True,
        levels: Literal["all", "p2"] = "all",
        norm: Literal["none", "group"] = "none",
        loss: Callable[[Tensor, Tensor], Tensor] = MASK_LOSSES["boundary"],
        convention: Convention = CONVENTIONS["detectron"],
        finest: float = 56.0,
    ) -> None:
        super().__init__()
        if stages not in (1, 2, 3):
            raise InputError(f"stages must be 1, 2 or 3 (masks of 14, 28 or 56), not {stages}")
        if context and not dilations:
            raise InputError("dilations must name at least one, or set context to false")
        self.output_size = 14 << (stages - 1)
        self.num_levels = 4 if levels == "all" else 1
        self.criterion, self.convention, self.finest = loss, convention, finest
        self.main = nn.ModuleList(ConvReLU(channels, norm=norm) for _ in range(num_convs))
        self.auxiliary = nn.ModuleList(ConvReLU(channels, norm=norm) for _ in range(stages))
        self.context = nn.ModuleList(
            ResidualAware(channels, dilations, residual=residual, norm=norm)
            if context
            else nn.Identity()
            for _ in range(stages)
        )
        self.logits = ClassLogits(channels, num_classes)

    def forward(self, features: Sequence[Tensor], rois: Tensor, labels: Tensor) -> Tensor:
        """Logits ``[R, S, S]`` of the class ``labels [R]`` of RoIs ``[R, 5]``; S = 14, 28, 56."""
        strides = Backbone.strides
        n = self.num_levels
        x = roi.pool(features[:n], rois, 14, strides[:n], self.convention, finest=self.finest)
        for conv in self.main:
            x = conv(x)
        stages = zip(self.auxiliary, self.context, strict=True)
        for stage, (auxiliary, context) in enumerate(stages):
            if stage:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            detail = roi.pool(features[:1], rois, 14 << stage, strides[:1], self.convention)
            x = context(x + auxiliary(detail))
        logits: Tensor = self.logits(x, labels)
        return logits

    def loss(
        self,
        features: Sequence[Tensor],
        rois: Tensor,
        labels: Tensor,
        truth: Truth,
        stage: int = 0,
    ) -> dict[str, Tensor]:
        """Mask loss of each RoI at the last stage, ``[R]``."""
        logits = self(features, rois, labels)
        return {"mask": self.criterion(logits, truth(self.output_size))}


class ResidualAware(nn.Module):
    """Residual-aware module (Figure 5): context at several scales beside the original detail.

    1x1 to half the channels, parallel dilated 3x3 convolutions, their sum (and the input's,
    with ``residual``), 1x1 back.
    """

    def __init__(
        self,
        channels: int,
        dilations: Sequence[int] = (1, 2, 3),
        *,
        residual: bool = True,
        norm: Literal["none", "group"] = "none",
    ) -> None:
        super().__init__()
        self.residual = residual
        self.squeeze = nn.Conv2d(channels, channels // 2, 1)
        self.branches = nn.ModuleList(
            ConvReLU(channels // 2, dilation, norm=norm) for dilation in dilations
        )
        self.expand = nn.Conv2d(channels // 2, channels, 1)
        for layer in (self.squeeze, self.expand):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        # A sum of n equal terms has about n times the variance: take it back here, so that
        # each stage hands on what it got.
        self.expand.weight.data /= (len(dilations) + residual) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        """``[R, C, S, S]`` in and out."""
        x = F.relu(self.squeeze(x), inplace=True)
        first, *others = (branch(x) for branch in self.branches)
        total = first + x if self.residual else first
        for other in others:
            total = total + other
        return F.relu(self.expand(total), inplace=True)


class ConvReLU(nn.Module):
    """3x3 convolution, GroupNorm on request, ReLU."""

    def __init__(self, channels: int, dilation: int = 1, *, norm: Literal["none", "group"]) -> None:
        super().__init__()
        self.conv = conv3x3(channels, dilation)
        self.norm = nn.GroupNorm(8, channels) if norm == "group" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``[R, C, S, S]`` in and out."""
        return F.relu(self.norm(self.conv(x)), inplace=True)
