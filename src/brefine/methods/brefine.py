"""BRefine (Yu et al., Sensors 2022, 22, 6499): the multistage fusion mask head.

Figure 4: a main line pools from every level at 14x14; at each stage an auxiliary line adds
detail from P2, a residual-aware module adds context, and bilinear upsampling doubles the side:
14, 28, 56. Trained with boundary region loss and Rank & Sort (section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brefine.losses import MASK_LOSSES, boundary_bce
from brefine.parts import roi
from brefine.parts.backbone import Backbone, raw_channels
from brefine.parts.boxes import CONVENTIONS, Convention
from brefine.parts.mask_head import ClassLogits, MaskLoss, again, conv1x1, conv3x3
from brefine.parts.two_stage import Detector, Truth, TwoStage
from brefine.ranges import NotNegative, Positive
from brefine.structures import InputError, Instances

GROUP = 16  # RoIs that the head learns from at once


def brefine(
    num_classes: int,
    *,
    backbone: str = "resnet50",
    channels: Positive = 256,
    stages: int = 3,
    num_convs: int = 4,
    context: bool = True,
    dilations: tuple[int, ...] = (1, 2, 3),
    residual: bool = True,
    levels: Literal["all", "p2"] = "all",
    norm: Literal["none", "group"] = "none",
    widths: tuple[int, ...] | None = None,
    detail: int = 0,
    detail_convs: int = 1,
    detail_stride: Literal[2, 4] = 4,
    early_exit: float = 0.0,
    deep_supervision: NotNegative = 0.0,
    mask_checkpoint: bool = False,
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
        widths: channels of each stage; None: ``channels`` in all. Not in the paper, like the next
            five: but for the last they make the head light.
        detail: channels of one map, convolved from P2, that all auxiliary lines pool from; 0:
            each pools P2 and convolves what it pooled, as in Figure 4.
        detail_convs: 3x3 convolutions from P2 to that map, made once a picture.
        detail_stride: of that map; 2: what the backbone has at stride 2 is added to it.
        early_exit: a RoI ends at the stage where the longer side of its box has at most this many
            pixels a cell; 0: all go through all stages.
        deep_supervision: weight in the mask loss, a mean, of the stages before the last, which
            have logits of their own in training then; the last one's is 1. 0: none.
        mask_checkpoint: the mask head learns from a few RoIs at a time, keeps nothing of them for
            the gradient, and works it out again.
        mask_loss: a name of ``losses.MASK_LOSSES``; "boundary" is eq. 2.
        boundary_weight: lambda of eq. 2.
        boundary_ratio: width of the boundary region, as a share of the label's diagonal (eq. 1).
        ranking: Rank & Sort with the three-task balance (eq. 3-6).
        detector: options of trunk, RPN and box head.

    Raises:
        InputError: an unknown backbone, stages is not 1, 2 or 3, there are no dilations, widths
            do not fit, no convolution makes the detail map, or there is none to have a stride.
    """
    if detail_stride == 2 and not detail:
        raise InputError("detail_stride is 2, but there is no map: set detail to its channels")
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
        widths=widths,
        detail=detail,
        detail_stride=detail_stride,
        early_exit=early_exit,
        deep_supervision=deep_supervision,
        checkpoint=mask_checkpoint,
        loss=loss,
        convention=CONVENTIONS[detector.convention],
        finest=detector.finest,
    )
    branch = None
    if detail:
        raw = raw_channels(backbone) if detail_stride == 2 else 0
        raw_norm = detector.fpn_norm  # the backbone's own maps need it here, too
        branch = Detail(channels, detail, detail_convs, norm=norm, raw=raw, raw_norm=raw_norm)
    return TwoStage(
        num_classes,
        head,
        backbone=backbone,
        channels=channels,
        ranking=ranking,
        detector=detector,
        branch=branch,
        raw=detail_stride == 2,
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
        widths: Sequence[int] | None = None,
        detail: int = 0,
        detail_stride: int = 4,
        early_exit: float = 0.0,
        deep_supervision: float = 0.0,
        checkpoint: bool = False,
        loss: Callable[[Tensor, Tensor], Tensor] = MASK_LOSSES["boundary"],
        convention: Convention = CONVENTIONS["detectron"],
        finest: float = 56.0,
    ) -> None:
        super().__init__()
        if stages not in (1, 2, 3):
            raise InputError(f"stages must be 1, 2 or 3 (masks of 14, 28 or 56), not {stages}")
        if context and not dilations:
            raise InputError("dilations must name at least one, or set context to false")
        widths = [channels] * stages if widths is None else list(widths)
        if len(widths) != stages or any(width < 2 or width % 2 for width in widths):
            raise InputError(f"widths must be {stages} even numbers, one a stage, not {widths}")
        if norm == "group" and any(width % 16 for width in widths) and context:
            raise InputError(f"widths must be multiples of 16 with norm: group, not {widths}")
        self.sides = [14 << stage for stage in range(stages)]
        self.output_size = self.sides[-1]
        self.num_levels = 4 if levels == "all" else 1
        self.criterion, self.convention, self.finest = loss, convention, finest
        self.shared, self.early_exit, self.checkpoint = bool(detail), early_exit, checkpoint
        self.detail_stride, self.deep_supervision = detail_stride, deep_supervision
        self.main = nn.ModuleList(ConvReLU(channels, norm=norm) for _ in range(num_convs))
        before = [channels, *widths]
        self.narrow = nn.ModuleList(
            nn.Identity() if width == previous else conv1x1(previous, width)
            for previous, width in pairwise(before)
        )
        self.auxiliary = nn.ModuleList(
            conv1x1(detail, width) if detail else ConvReLU(channels, width, norm=norm)
            for width in widths
        )
        self.context = nn.ModuleList(
            ResidualAware(width, dilations, residual=residual, norm=norm)
            if context
            else nn.Identity()
            for width in widths
        )
        # of the stages before the last
        exits = widths[:-1] if early_exit or deep_supervision else []
        self.exits = nn.ModuleList(ClassLogits(width, num_classes) for width in exits)
        self.logits = ClassLogits(widths[-1], num_classes)

    def forward(self, features: Sequence[Tensor], rois: Tensor, labels: Tensor) -> Tensor:
        """Logits ``[R, S, S]`` of the class ``labels [R]`` of RoIs ``[R, 5]``; S = 14, 28, 56.

        Masks of RoIs that end early are enlarged to S.
        """
        parts = self._stages(features, rois, labels)
        if len(parts) == 1:
            return parts[0][1]
        size = (self.output_size, self.output_size)
        # [R, S, S] of each stage
        large = [
            F.interpolate(logits[:, None], size, mode="bilinear", align_corners=False)[:, 0]
            for _, logits in parts
        ]
        if torch.compiler.is_exporting():  # all RoIs of all stages: see `_stages`
            ends = self._ends(rois)[:, None, None]
            chosen = large[0]
            for stage, each in enumerate(large[1:], 1):
                chosen = torch.where(ends == stage, each, chosen)
            return chosen
        place = torch.cat([here for here, _ in parts]).argsort()
        return torch.cat(large)[place]

    def _stages(
        self, features: Sequence[Tensor], rois: Tensor, labels: Tensor, *, deep: bool = False
    ) -> list[tuple[Tensor, Tensor]]:
        """Which RoIs end at a stage, ``[n]``, and their logits ``[n, s, s]``, stage by stage.

        Without early exits that is the last stage alone. With ``deep`` it is all RoIs that get as
        far as a stage.
        """
        strides = Backbone.strides
        n = self.num_levels
        shared = features[len(strides) if self.shared else 0]  # what Detail added, or P2
        x = roi.pool(features[:n], rois, 14, strides[:n], self.convention, finest=self.finest)
        x = _in_turn(self.main, x)
        last = len(self.sides) - 1
        here, ends = torch.arange(rois.shape[0], device=rois.device), self._ends(rois)
        done = []
        layers = zip(self.narrow, self.auxiliary, self.context, strict=True)
        for stage, (narrow, auxiliary, context) in enumerate(layers):
            x = narrow(x)
            if stage:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            side = self.sides[stage]
            detail = roi.pool([shared], rois[here], side, [self.detail_stride], self.convention)
            x = context(x + auxiliary(detail))
            if stage == last:
                done.append((here, self.logits(x, labels[here])))
            elif self.early_exit or deep:
                logits = self.exits[stage]
                # A graph's shapes must not depend on sizes of boxes: there all go all the way.
                if torch.compiler.is_exporting():
                    done.append((here, logits(x, labels)))
                    continue
                stop = ends[here] == stage
                shown = torch.ones_like(stop) if deep else stop
                done.append((here[shown], logits(x[shown], labels[here[shown]])))
                x, here = x[~stop], here[~stop]
        return done

    def _ends(self, rois: Tensor) -> Tensor:
        """Stage ``[R]`` at which each RoI ends."""
        if not self.early_exit:
            return torch.full_like(rois[:, 0], len(self.sides) - 1, dtype=torch.int64)
        longer = (rois[:, 3:] - rois[:, 1:3]).amax(1)
        needs = [longer > side * self.early_exit for side in self.sides[:-1]]
        return sum(needs, torch.zeros_like(longer)).long()

    def loss(
        self,
        features: Sequence[Tensor],
        rois: Tensor,
        labels: Tensor,
        truth: Truth,
        stage: int = 0,
    ) -> dict[str, Tensor]:
        """Mask loss of each RoI, ``[R]``, at the stage where it ends; see ``deep_supervision``.

        On a CPU a few RoIs at a time are quicker than all at once. With ``checkpoint`` no more than
        what these few need is kept for the gradient.
        """
        cut = cache(truth)  # once a side, not once a group

        def some(here: Tensor, *features: Tensor) -> Tensor:
            deep = self.deep_supervision
            parts = self._stages(features, rois[here], labels[here], deep=deep > 0)
            ends, stages = self._ends(rois[here]), range(len(self.sides))[-len(parts) :]
            places, weights, losses = [], [], []
            for stage, (place, logits) in zip(stages, parts, strict=True):
                places.append(place)
                losses.append(self.criterion(logits, cut(self.sides[stage])[here[place]]))
                weights.append(torch.where(ends[place] == stage, 1.0, deep).to(losses[-1]))
            where, weight, loss = (torch.cat(each) for each in (places, weights, losses))
            total, whole = (
                loss.new_zeros(len(here)).index_add(0, where, each)
                for each in (weight * loss, weight)
            )
            return total / whole

        every = torch.arange(rois.shape[0], device=rois.device)
        grouped = self.checkpoint or rois.device.type == "cpu"
        groups = torch.split(every, GROUP) if grouped else [every]
        losses = [again(some, here, *features, on=self.checkpoint) for here in groups]
        return {"mask": torch.cat(losses)}


def _in_turn(layers: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


class Detail(nn.Module):
    """3x3 convolutions of P2 for the auxiliary lines of all RoIs: added to the pyramid.

    Args:
        channels: of P2.
        out: of the map.
        count: convolutions.
        norm: see `brefine`.
        raw: channels of the backbone's own map at stride 2, which is added if there are any; the
            convolutions after the first have this stride then.
        raw_norm: of its convolution.

    Raises:
        InputError: there is no convolution.
    """

    def __init__(
        self,
        channels: int,
        out: int,
        count: int,
        *,
        norm: Literal["none", "group"],
        raw: int = 0,
        raw_norm: Literal["none", "group"] = "none",
    ) -> None:
        super().__init__()
        if count < 1:
            raise InputError(f"detail_convs must be 1 or more, not {count}")
        self.conv = ConvReLU(channels, out, norm=norm)
        self.raw = ConvReLU(raw, out, norm=raw_norm) if raw else None
        self.more = nn.ModuleList(ConvReLU(out, norm=norm) for _ in range(count - 1))

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """``[B, out, h, w]`` at P2's stride or 2; the second has no use."""
        x = self.conv(features[0])
        if self.raw is not None:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = x + self.raw(features[-1])
        detail: Tensor = _in_turn(self.more, x)
        return detail, detail

    def loss(self, output: Tensor, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """None of its own."""
        return {}


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
            ConvReLU(channels // 2, dilation=dilation, norm=norm) for dilation in dilations
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

    def __init__(
        self,
        channels: int,
        out: int | None = None,
        *,
        dilation: int = 1,
        norm: Literal["none", "group"],
    ) -> None:
        super().__init__()
        out = channels if out is None else out
        self.conv = conv3x3(channels, out, dilation)
        self.norm = nn.GroupNorm(8, out) if norm == "group" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``[R, C, S, S]`` to ``[R, out, S, S]``."""
        return F.relu(self.norm(self.conv(x)), inplace=True)
