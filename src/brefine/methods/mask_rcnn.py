"""Mask R-CNN (He et al. 2017): the FCN mask head, and the contract to copy from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from brefine.losses import MASK_LOSSES
from brefine.parts import roi
from brefine.parts.backbone import Backbone
from brefine.parts.boxes import CONVENTIONS, Convention
from brefine.parts.mask_head import ClassLogits, MaskLoss, again, conv3x3
from brefine.parts.two_stage import Detector, Truth, TwoStage
from brefine.ranges import Positive
from brefine.structures import InputError


def mask_rcnn(
    num_classes: int,
    *,
    backbone: str = "resnet50",
    channels: Positive = 256,
    num_convs: int = 4,
    input_size: int = 14,
    output_size: int = 28,
    levels: Literal["all", "p2"] = "all",
    mask_loss: MaskLoss = "bce",
    mask_checkpoint: bool = False,
    ranking: bool = False,
    detector: Detector = Detector(),
) -> TwoStage:
    """Mask R-CNN; with ``ranking`` it is RS Mask R-CNN (Table 5's caption).

    Args:
        num_classes: K, without background.
        backbone: a timm name.
        channels: of the pyramid and the heads.
        num_convs: 3x3 convolutions of the mask head.
        input_size: cells a side that RoIAlign gives the mask head (Figure 2).
        output_size: cells a side of the mask: input_size times 1, 2, 4 ... (Figure 2).
        levels: pyramid levels that the mask head pools from (Figure 1).
        mask_loss: a name of ``losses.MASK_LOSSES``.
        mask_checkpoint: the mask head keeps little for its gradient and works it out again.
        ranking: Rank & Sort with the three-task balance (eq. 3-6).
        detector: options of trunk, RPN and box head.

    Raises:
        InputError: an unknown backbone, or output_size is no power-of-two multiple of input_size.
    """
    head = FCNMaskHead(
        channels,
        num_classes,
        num_convs=num_convs,
        input_size=input_size,
        output_size=output_size,
        levels=levels,
        checkpoint=mask_checkpoint,
        loss=MASK_LOSSES[mask_loss],
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


class FCNMaskHead(nn.Module):
    """RoIAlign, 3x3 convolutions, a 2x2 deconvolution for each doubling, 1x1 logits."""

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        num_convs: int = 4,
        input_size: int = 14,
        output_size: int = 28,
        levels: Literal["all", "p2"] = "all",
        checkpoint: bool = False,
        loss: Callable[[Tensor, Tensor], Tensor] = MASK_LOSSES["bce"],
        convention: Convention = CONVENTIONS["detectron"],
        finest: float = 56.0,
        pool: roi.Pool | None = None,
    ) -> None:
        super().__init__()
        doublings = (output_size // input_size).bit_length() - 1
        if input_size << doublings != output_size:
            raise InputError(
                f"output_size {output_size} must be input_size {input_size} times 1, 2, 4, ..."
            )
        self.input_size, self.output_size = input_size, output_size
        strides = Backbone.strides[: 4 if levels == "all" else 1]
        self.pool = pool or roi.Pooling(strides, convention, finest)
        self.criterion, self.checkpoint = loss, checkpoint
        self.convs = nn.ModuleList(conv3x3(channels) for _ in range(num_convs))
        upsample = [nn.ConvTranspose2d(channels, channels, 2, stride=2) for _ in range(doublings)]
        for layer in upsample:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            # One tap feeds each output cell, so what torch calls fan out is 4 times too many.
            layer.weight.data *= 2
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.upsample = nn.ModuleList(upsample)
        self.logits = ClassLogits(channels, num_classes)

    def forward(self, features: Sequence[Tensor], rois: Tensor, labels: Tensor) -> Tensor:
        """Logits ``[R, output_size, output_size]`` of the class ``labels [R]``."""
        x = again(self.convolve, self.pool(features, rois, self.input_size), on=self.checkpoint)
        return again(self.finish, x, labels, on=self.checkpoint)

    def convolve(self, x: Tensor) -> Tensor:
        """The 3x3 convolutions, ``[R, C, input_size, input_size]`` in and out."""
        for conv in self.convs:
            x = F.relu(conv(x), inplace=True)
        return x

    def finish(self, x: Tensor, labels: Tensor) -> Tensor:
        """Logits from what `convolve` gives."""
        for deconv in self.upsample:
            x = F.relu(deconv(x), inplace=True)
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
        """Mask loss of each RoI, ``[R]``."""
        logits = self(features, rois, labels)
        return {"mask": self.criterion(logits, truth(self.output_size))}
