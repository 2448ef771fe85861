"""HTC, Hybrid Task Cascade (Chen et al., CVPR 2019): a cascade whose masks know of each other.

Figure 2 (d): at each stage the mask head looks at the boxes just refined, and at what the mask head
of the stage before made of them. A semantic segmentation branch adds context to all heads, if the
training set says what is in every pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brefine.losses import MASK_LOSSES
from brefine.methods.cascade import STAGES, CascadeBoxHead, Classify, average
from brefine.methods.mask_rcnn import FCNMaskHead
from brefine.parts import roi
from brefine.parts.backbone import Backbone
from brefine.parts.boxes import CONVENTIONS
from brefine.parts.mask_head import MaskLoss, conv1x1, conv3x3
from brefine.parts.two_stage import Detector, Truth, TwoStage
from brefine.ranges import Positive
from brefine.structures import InputError, Instances

LEVEL = 1  # of the pyramid: the semantic map has its stride, 8
UNKNOWN = 255  # in a map of classes: a pixel that nobody labelled


def htc(
    num_classes: int,
    *,
    backbone: str = "resnet50",
    channels: Positive = 256,
    num_convs: int = 4,
    semantic_classes: int = 0,
    semantic_convs: int = 4,
    semantic_weight: float = 0.2,
    masks: Literal["average", "last"] = "average",
    classify: Classify = "own",
    mask_loss: MaskLoss = "bce",
    ranking: bool = False,
    detector: Detector = Detector(),
) -> TwoStage:
    """Hybrid Task Cascade.

    Args:
        num_classes: K, without background.
        backbone: a timm name.
        channels: of the pyramid and the heads.
        num_convs: 3x3 convolutions of each mask head.
        semantic_classes: of the maps that ``data.semantic`` names; 0: there is no branch.
        semantic_convs: 3x3 convolutions of the branch.
        semantic_weight: of the branch's loss.
        masks: the "average" of all stages' probabilities (the paper), or those of the "last"
            stage alone (MMDetection 3).
        classify: see `cascade`.
        mask_loss: a name of ``losses.MASK_LOSSES``.
        ranking: Rank & Sort with the three-task balance (eq. 3-6 of BRefine), at each stage.
        detector: options of trunk, RPN and box heads.

    Raises:
        InputError: an unknown backbone.
    """
    pool: roi.Pool = roi.Pooling(
        Backbone.strides[:4], CONVENTIONS[detector.convention], detector.finest
    )
    branch = None
    if semantic_classes:
        branch = SemanticBranch(channels, semantic_classes, semantic_convs, semantic_weight)
        pool = WithSemantic(pool, roi.Pooling((8,), CONVENTIONS[detector.convention]))
    heads = [
        FCNMaskHead(
            channels, num_classes, num_convs=num_convs, loss=MASK_LOSSES[mask_loss], pool=pool
        )
        for _ in STAGES
    ]
    boxes = CascadeBoxHead(
        channels,
        num_classes,
        ranking,
        detector,
        classify=classify,
        interleaved=True,
        pool=pool,
    )
    return TwoStage(
        num_classes,
        ChainedMaskHead(channels, heads, masks),
        backbone=backbone,
        channels=channels,
        ranking=ranking,
        detector=detector,
        boxes=boxes,
        branch=branch,
    )


class ChainedMaskHead(nn.Module):
    """A mask head a stage; each gets what the convolutions of the one before made of the RoI."""

    mmdetection: ClassVar[list[tuple[str, str]]] = [
        (
            rf"roi_head\.mask_head\.stages\.{stage}\.conv_res\.conv\.",
            f"mask_head.links.{stage - 1}.",
        )
        for stage in (1, 2)
    ]

    def __init__(
        self, channels: int, heads: Sequence[FCNMaskHead], masks: Literal["average", "last"]
    ) -> None:
        super().__init__()
        self.output_size, self.masks = heads[0].output_size, masks
        self.stages = nn.ModuleList(heads)
        self.links = nn.ModuleList(conv1x1(channels, channels) for _ in heads[1:])

    def forward(self, features: Sequence[Tensor], rois: Tensor, labels: Tensor) -> Tensor:
        """Logits ``[R, S, S]`` of the mean probability, or of the last stage."""
        made = self.chain(features, rois, len(self.stages))
        if self.masks == "last":
            return self._finish(made, len(self.stages) - 1, labels)
        return average([self._finish(made, stage, labels) for stage in range(len(made))])

    def loss(
        self,
        features: Sequence[Tensor],
        rois: Tensor,
        labels: Tensor,
        truth: Truth,
        stage: int = 0,
    ) -> dict[str, Tensor]:
        """Mask loss ``[R]`` of one stage, through the stages before it."""
        logits = self._finish(self.chain(features, rois, stage + 1), stage, labels)
        criterion = cast(FCNMaskHead, self.stages[stage]).criterion
        return {"mask": criterion(logits, truth(self.output_size))}

    def chain(self, features: Sequence[Tensor], rois: Tensor, count: int) -> list[Tensor]:
        """What the convolutions of the first ``count`` stages give, ``[R, C, 14, 14]`` each."""
        heads = [cast(FCNMaskHead, head) for head in self.stages]
        pooled = heads[0].pool(features, rois, heads[0].input_size)
        made = [heads[0].convolve(pooled)]
        for link, head in zip(self.links, heads[1:count], strict=False):
            made.append(head.convolve(pooled + F.relu(link(made[-1]))))
        return made

    def _finish(self, made: Sequence[Tensor], stage: int, labels: Tensor) -> Tensor:
        return cast(FCNMaskHead, self.stages[stage]).finish(made[stage], labels)


@dataclass(frozen=True)
class WithSemantic:
    """RoI features with those of the semantic map, the last of the features, added.

    Attributes:
        pyramid: how the levels are read.
        semantic: how the map is read, always at 14 x 14 cells.
    """

    pyramid: roi.Pool
    semantic: roi.Pooling

    def __call__(self, features: Sequence[Tensor], rois: Tensor, size: int) -> Tensor:
        """``[R, C, size, size]``."""
        context = self.semantic(features[-1:], rois, 14)
        if size != 14:
            context = F.adaptive_avg_pool2d(context, size)
        return self.pyramid(features, rois, size) + context


class SemanticBranch(nn.Module):
    """Semantic segmentation from all levels: what is in each cell of stride 8 (Figure 3).

    Args:
        channels: of the pyramid.
        num_classes: of the maps.
        num_convs: 3x3 convolutions.
        weight: of its loss.
    """

    mmdetection: ClassVar[list[tuple[str, str]]] = [
        (r"roi_head\.semantic_head\.lateral_convs\.(\d)\.conv\.", r"branch.lateral.\1."),
        (r"roi_head\.semantic_head\.convs\.(\d)\.conv\.", r"branch.convs.\1."),
        (r"roi_head\.semantic_head\.conv_embedding\.conv\.", "branch.embedding."),
        (r"roi_head\.semantic_head\.conv_logits\.", "branch.logits."),
    ]

    def __init__(
        self, channels: int, num_classes: int, num_convs: int = 4, weight: float = 0.2
    ) -> None:
        super().__init__()
        self.weight = weight
        self.lateral = nn.ModuleList(conv1x1(channels, channels) for _ in Backbone.strides)
        # A sum of n equal terms has n times the variance: take it back here.
        for conv in self.lateral:
            cast(Tensor, conv.weight).data /= len(self.lateral) ** 0.5
        self.convs = nn.ModuleList(conv3x3(channels) for _ in range(num_convs))
        self.embedding = conv1x1(channels, channels)
        self.logits = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.logits.weight, std=0.01)
        nn.init.zeros_(self.logits.bias)  # type: ignore[arg-type]

    def forward(self, pyramid: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Features ``[B, C, h, w]`` for the heads and class logits ``[B, classes, h, w]``."""
        size = pyramid[LEVEL].shape[-2:]
        total = F.relu(self.lateral[LEVEL](pyramid[LEVEL]))
        for level, (lateral, feature) in enumerate(zip(self.lateral, pyramid, strict=True)):
            if level != LEVEL:
                resized = F.interpolate(feature, size, mode="bilinear", align_corners=True)
                total = total + F.relu(lateral(resized))
        for conv in self.convs:
            total = F.relu(conv(total))
        return F.relu(self.embedding(total)), self.logits(total)

    def loss(self, output: Tensor, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Cross-entropy, the mean over all cells; unknown ones cost nothing but count."""
        classes, height, width = output.shape[1:]
        truth = torch.full_like(output[:, 0], UNKNOWN, dtype=torch.int64)
        stride = Backbone.strides[LEVEL]
        for row, target in zip(truth, targets, strict=True):
            if target.semantic is None:
                raise InputError(
                    "semantic_classes is set, but a picture has no map of classes: name the "
                    "folder of maps in data.semantic, or set model.options.semantic_classes=0"
                )
            # The top left pixel of each cell, as MMDetection resizes maps.
            small = target.semantic[::stride, ::stride][:height, :width]
            row[: small.shape[0], : small.shape[1]] = small
        known = truth[truth != UNKNOWN]
        if len(known) and int(known.max()) >= classes:
            raise InputError(
                f"a map has class {int(known.max())}, model.options.semantic_classes is {classes}: "
                "set it to at least one more than the highest class"
            )
        errors = F.cross_entropy(output.float(), truth, ignore_index=UNKNOWN, reduction="sum")
        return {"semantic": self.weight * errors / truth.numel()}
