"""Boundary-preserving Mask R-CNN (Cheng et al., ECCV 2020): masks that learn beside their edges.

Figure 3: a second branch reads P2 on a finer grid, takes in what the mask's convolutions made, and
predicts the object's edge; its features go back into the mask. Edges learn by cross-entropy and
Dice, since they are few.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from brefine.losses import MASK_LOSSES, bce_dice
from brefine.methods.mask_rcnn import FCNMaskHead
from brefine.parts import roi
from brefine.parts.backbone import Backbone
from brefine.parts.boxes import CONVENTIONS, Convention
from brefine.parts.mask_head import ClassLogits, MaskLoss, conv3x3
from brefine.parts.two_stage import Detector, Truth, TwoStage
from brefine.ranges import Positive


def bmask(
    num_classes: int,
    *,
    backbone: str = "resnet50",
    channels: Positive = 256,
    num_convs: int = 4,
    edge_convs: int = 2,
    edge_weight: float = 1.0,
    mask_loss: MaskLoss = "bce",
    ranking: bool = False,
    detector: Detector = Detector(),
) -> TwoStage:
    """Boundary-preserving Mask R-CNN.

    Args:
        num_classes: K, without background.
        backbone: a timm name.
        channels: of the pyramid and the heads.
        num_convs: 3x3 convolutions of the mask, before the branches meet.
        edge_convs: 3x3 convolutions of the edge, after they met.
        edge_weight: of the edge loss.
        mask_loss: a name of ``losses.MASK_LOSSES``.
        ranking: Rank & Sort with the three-task balance (eq. 3-6 of BRefine).
        detector: options of trunk, RPN and box head.

    Raises:
        InputError: an unknown backbone.
    """
    head = EdgeMaskHead(
        channels,
        num_classes,
        num_convs=num_convs,
        edge_convs=edge_convs,
        edge_weight=edge_weight,
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


class EdgeMaskHead(FCNMaskHead):
    """Mask R-CNN's head, with layers of the same names, and the edge's beside it."""

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        num_convs: int = 4,
        edge_convs: int = 2,
        edge_weight: float = 1.0,
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
        self.edge_weight = edge_weight
        self.edge_pool = roi.Pooling(Backbone.strides[:1], convention)
        self.shrink = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.to_edge, self.to_mask = (nn.Conv2d(channels, channels, 1) for _ in range(2))
        self.edge_convs = nn.ModuleList(conv3x3(channels) for _ in range(edge_convs))
        self.fuse = conv3x3(channels)
        self.edge_upsample = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.edge_logits = ClassLogits(channels, num_classes)
        for layer in (self.shrink, self.to_edge, self.to_mask, self.edge_upsample):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        for meeting in (self.to_edge, self.to_mask, self.shrink):
            meeting.weight.data *= 0.5**0.5  # two are added: the sum keeps the variance

    def forward(self, features: Sequence[Tensor], rois: Tensor, labels: Tensor) -> Tensor:
        """Logits ``[R, 28, 28]`` of the class ``labels [R]``."""
        return self.finish(self.meet(features, rois)[0], labels)

    def meet(self, features: Sequence[Tensor], rois: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``[R, C, 14, 14]`` of the mask and of the edge, each knowing of the other."""
        mask = self.convolve(self.pool(features, rois, self.input_size))
        edge = F.relu(self.shrink(self.edge_pool(features, rois, 2 * self.input_size)))
        edge = edge + F.relu(self.to_edge(mask))
        for conv in self.edge_convs:
            edge = F.relu(conv(edge))
        mask = F.relu(self.fuse(mask + F.relu(self.to_mask(edge))))
        return mask, edge

    def loss(
        self,
        features: Sequence[Tensor],
        rois: Tensor,
        labels: Tensor,
        truth: Truth,
        stage: int = 0,
    ) -> dict[str, Tensor]:
        """Losses of each RoI's mask and edge, ``[R]`` each."""
        mask, edge = self.meet(features, rois)
        masks = truth(self.output_size)
        logits = self.edge_logits(F.relu(self.edge_upsample(edge)), labels)
        return {
            "mask": self.criterion(self.finish(mask, labels), masks),
            "edge": self.edge_weight * bce_dice(logits, edges(masks)),
        }


def edges(masks: Tensor) -> Tensor:
    """The pixels of masks that have one outside among their eight neighbours.

    That is where the Laplacian is positive. Beyond the grid all is outside, so that an object that
    is cut off has an edge along the cut.

    Args:
        masks: ``[N, H, W]`` float, 0 or 1; values between count as the nearer one.
    """
    inside = (masks > 0.5).float()
    outside = F.pad(1 - inside, (1, 1, 1, 1), value=1.0)
    return inside * F.max_pool2d(outside[:, None], 3, stride=1)[:, 0]
