"""Mask Scoring R-CNN (Huang et al., CVPR 2019): a head that predicts how good each mask is.

Figure 3: beside Mask R-CNN's head, the MaskIoU head looks at the pooled features together with the
predicted mask and predicts their IoU with the true one. Scores are multiplied with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brefine.losses import MASK_LOSSES
from brefine.methods.mask_rcnn import FCNMaskHead
from brefine.parts import together
from brefine.parts.boxes import CONVENTIONS, Convention
from brefine.parts.mask_head import MaskLoss, conv3x3
from brefine.parts.two_stage import Detector, Truth, TwoStage
from brefine.ranges import Positive


def mask_scoring(
    num_classes: int,
    *,
    backbone: str = "resnet50",
    channels: Positive = 256,
    num_convs: int = 4,
    iou_hidden: int = 1024,
    iou_weight: float = 1.0,
    binarize: float = 0.0,
    mask_loss: MaskLoss = "bce",
    ranking: bool = False,
    detector: Detector = Detector(),
) -> TwoStage:
    """Mask Scoring R-CNN.

    Args:
        num_classes: K, without background.
        backbone: a timm name.
        channels: of the pyramid and the heads.
        num_convs: 3x3 convolutions of the mask head.
        iou_hidden: width of the MaskIoU head's fully connected layers.
        iou_weight: of the MaskIoU head's loss.
        binarize: logit above which a cell counts as predicted when the true IoU is worked out; 0
            is a probability of one half, as in the paper, MMDetection has 0.5.
        mask_loss: a name of ``losses.MASK_LOSSES``.
        ranking: Rank & Sort with the three-task balance (eq. 3-6 of BRefine).
        detector: options of trunk, RPN and box head.

    Raises:
        InputError: an unknown backbone.
    """
    head = ScoredMaskHead(
        channels,
        num_classes,
        num_convs=num_convs,
        iou_hidden=iou_hidden,
        iou_weight=iou_weight,
        binarize=binarize,
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


class ScoredMaskHead(FCNMaskHead):
    """Mask R-CNN's head, with layers of the same names, and the MaskIoU head beside it."""

    mmdetection: ClassVar[list[tuple[str, str]]] = [
        (r"roi_head\.mask_iou_head\.convs\.(\d)\.", r"mask_head.iou.convs.\1."),
        (r"roi_head\.mask_iou_head\.fcs\.(\d)\.", r"mask_head.iou.fcs.\1."),
        (r"roi_head\.mask_iou_head\.fc_mask_iou\.", "mask_head.iou.ious."),
    ]

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        num_convs: int = 4,
        iou_hidden: int = 1024,
        iou_weight: float = 1.0,
        binarize: float = 0.0,
        loss: Callable[[Tensor, Tensor], Tensor] = MASK_LOSSES["bce"],
        convention: Convention = CONVENTIONS["detectron"],
        finest: float = 56.0,
    ) -> None:
        super().__init__(
            channels,
            num_classes,
            num_convs=num_convs,
            loss=loss,
            convention=convention,
            finest=finest,
        )
        self.iou_weight, self.binarize = iou_weight, binarize
        self.iou = IoUHead(channels, num_classes, iou_hidden)

    def quality(
        self, features: Sequence[Tensor], rois: Tensor, labels: Tensor, logits: Tensor
    ) -> Tensor:
        """Predicted IoU ``[R]`` of masks ``[R, 28, 28]`` with the true ones."""
        judged: Tensor = self.iou(self.pool(features, rois, self.input_size), logits, labels)
        return judged

    def loss(
        self,
        features: Sequence[Tensor],
        rois: Tensor,
        labels: Tensor,
        truth: Truth,
        stage: int = 0,
    ) -> dict[str, Tensor]:
        """Losses of each RoI's mask and of its predicted IoU, ``[R]`` each."""
        pooled = self.pool(features, rois, self.input_size)
        logits = self.finish(self.convolve(pooled), labels)
        masks = truth(self.output_size)
        goal = self.true_iou(logits, masks, truth.share())
        # The head learns from masks, not masks from the head.
        error = 0.5 * (self.iou(pooled, logits.detach(), labels).float() - goal) ** 2
        some = goal > 0
        # Where nothing is right there is nothing to learn; the mean is over the others.
        every = together.mean(error.new_tensor(len(some)))
        learnt = together.mean(some.sum().to(error))
        weight = self.iou_weight * some * (every / learnt.clamp(min=1e-7))
        return {"mask": self.criterion(logits, masks), "mask_iou": error * weight}

    @torch.no_grad()
    def true_iou(self, logits: Tensor, masks: Tensor, share: Tensor) -> Tensor:
        """IoU ``[R]`` of each predicted mask with the whole object.

        Args:
            logits: ``[R, S, S]``.
            masks: ``[R, S, S]``, the true masks inside the RoIs.
            share: ``[R]`` of each object inside its RoI; the rest counts as missed.
        """
        predicted = (logits > self.binarize).float()
        overlap = (predicted * masks).sum((1, 2))
        whole = masks.sum((1, 2)) / (share + 1e-7)
        return overlap / (predicted.sum((1, 2)) + whole - overlap).clamp(min=1e-7)


class IoUHead(nn.Module):
    """Features and a mask beside them: four convolutions, the last of stride 2, three layers."""

    class_rows: ClassVar[dict[str, int]] = {"ious": 1}

    def __init__(self, channels: int, num_classes: int, hidden: int = 1024) -> None:
        super().__init__()
        first = nn.Conv2d(channels + 1, channels, 3, padding=1)
        last = nn.Conv2d(channels, channels, 3, padding=1, stride=2)
        for conv in (first, last):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        self.convs = nn.ModuleList([first, conv3x3(channels), conv3x3(channels), last])
        self.fcs = nn.ModuleList([nn.Linear(channels * 49, hidden), nn.Linear(hidden, hidden)])
        self.ious = nn.Linear(hidden, num_classes)
        for fc in self.fcs:
            nn.init.kaiming_uniform_(fc.weight, a=1)  # type: ignore[arg-type]
            nn.init.zeros_(fc.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.ious.weight, std=0.01)
        nn.init.constant_(self.ious.bias, 0.5)  # before anything is learnt, scores stay in order

    def forward(self, pooled: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """IoU ``[R]`` from features ``[R, C, 14, 14]`` and logits ``[R, 28, 28]``."""
        mask = F.max_pool2d(logits.sigmoid()[:, None], 2)
        x = torch.cat([pooled, mask.to(pooled.dtype)], 1)
        for conv in self.convs:
            x = F.relu(conv(x))
        x = x.flatten(1)
        for fc in self.fcs:
            x = F.relu(fc(x))
        ious: Tensor = self.ious(x).gather(1, labels[:, None])[:, 0]
        return ious
