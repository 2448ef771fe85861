"""Cascade Mask R-CNN (Cai and Vasconcelos, TPAMI 2019): three box heads in turn, each stricter.

Figure 3 (d): each head refines the boxes of the one before and learns from them, matched with
objects at an IoU of 0.5, 0.6 and 0.7. Each stage has a mask head of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from brefine.losses import MASK_LOSSES
from brefine.methods.mask_rcnn import FCNMaskHead
from brefine.parts import roi
from brefine.parts.box_head import BoxHead, RoIs, Round
from brefine.parts.boxes import CONVENTIONS
from brefine.parts.mask_head import MaskLoss
from brefine.parts.two_stage import Detector, Truth, TwoStage, box_head
from brefine.ranges import Positive
from brefine.structures import Instances

#: of each stage: IoU from which a box is an object's, standard deviations of the deltas of
#: position and size, weight of its losses
STAGES = ((0.5, 0.1, 0.2, 1.0), (0.6, 0.05, 0.1, 0.5), (0.7, 0.033, 0.067, 0.25))

#: at which boxes the classifiers of all stages, whose logits are averaged, look in prediction
Classify = Literal["last", "own"]


def cascade(
    num_classes: int,
    *,
    backbone: str = "resnet50",
    channels: Positive = 256,
    num_convs: int = 4,
    classify: Classify = "last",
    mask_loss: MaskLoss = "bce",
    ranking: bool = False,
    detector: Detector = Detector(),
) -> TwoStage:
    """Cascade Mask R-CNN.

    Args:
        num_classes: K, without background.
        backbone: a timm name.
        channels: of the pyramid and the heads.
        num_convs: 3x3 convolutions of each mask head.
        classify: in prediction all three classifiers look at the boxes that enter the "last"
            stage (the paper's "1~3"), or each at those of its "own" (MMDetection).
        mask_loss: a name of ``losses.MASK_LOSSES``.
        ranking: Rank & Sort with the three-task balance (eq. 3-6 of BRefine), at each stage.
        detector: options of trunk, RPN and box heads.

    Raises:
        InputError: an unknown backbone.
    """
    heads = [
        FCNMaskHead(
            channels,
            num_classes,
            num_convs=num_convs,
            loss=MASK_LOSSES[mask_loss],
            convention=CONVENTIONS[detector.convention],
            finest=detector.finest,
        )
        for _ in STAGES
    ]
    return TwoStage(
        num_classes,
        CascadeMaskHead(heads),
        backbone=backbone,
        channels=channels,
        ranking=ranking,
        detector=detector,
        boxes=CascadeBoxHead(channels, num_classes, ranking, detector, classify=classify),
    )


class CascadeBoxHead(nn.Module):
    """Box heads in turn, with one box for all classes; see ``box_head.Boxes``.

    Args:
        channels: of the pyramid.
        num_classes: K.
        ranking: see ``BoxHead``.
        detector: options of each head.
        classify: see `cascade`.
        interleaved: masks learn from the boxes that a stage hands on, not from those it got.
        pool: see ``BoxHead``.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        ranking: bool,
        detector: Detector,
        *,
        classify: Classify = "last",
        interleaved: bool = False,
        pool: roi.Pool | None = None,
    ) -> None:
        super().__init__()
        self.num_classes, self.classify, self.interleaved = num_classes, classify, interleaved
        self.score_threshold, self.nms = detector.score_threshold, detector.nms
        self.detections = detector.detections
        self.stages = nn.ModuleList(
            box_head(
                channels,
                num_classes,
                ranking,
                detector,
                agnostic=True,
                delta_weights=(1 / place, 1 / place, 1 / size, 1 / size),
                iou=iou,
                beta=1.0,
                pool=pool,
            )
            for iou, place, size, _ in STAGES
        )

    def rounds(
        self, features: Sequence[Tensor], proposals: Sequence[Tensor], targets: Sequence[Instances]
    ) -> list[Round]:
        """Losses of each stage, whose proposals are the boxes of the one before."""
        found = []
        sizes = torch.tensor([target.size for target in targets], device=proposals[0].device)
        for module, (_, _, _, weight) in zip(self.stages, STAGES, strict=True):
            head = cast(BoxHead, module)
            rois = head.sample(proposals, targets)
            logits, deltas = head(features, rois.rows)
            classes, box, scores = head.loss(rois, logits, deltas)
            limits = roi.limits(rois.rows, sizes)
            boxes = head.refine(rois.rows, deltas.detach(), limits)[:, 0]
            # Objects' own boxes would only be refined to themselves; each stage gets them anew.
            found_here = rois.source >= 0
            mine = [found_here & (rois.rows[:, 0] == i) for i in range(len(targets))]
            proposals = [boxes[chosen] for chosen in mine]
            if self.interleaved:
                before = torch.cat([scores[chosen] for chosen in mine])
                rois = head.sample(proposals, targets)
                scores = _scores(rois, before)
            found.append(Round(classes, box, rois, scores, weight))
        return found

    def score(
        self, features: Sequence[Tensor], rows: Tensor, limits: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scores ``[R, K]`` of all stages together, and boxes ``[R, K, 4]`` of the last."""
        heads = [cast(BoxHead, module) for module in self.stages]
        own, boxes = [], rows[:, None, 1:]
        for head in heads:
            rows = torch.cat([rows[:, :1], boxes[:, 0]], 1)
            logits, deltas = head(features, rows)
            own.append(logits)
            boxes = head.refine(rows, deltas, limits)
        if self.classify == "last":
            own[:-1] = [head(features, rows)[0] for head in heads[:-1]]
        score = head.probability(torch.stack(own).mean(0))
        return score, boxes.expand(-1, self.num_classes, -1)

    def forward(self, features: Sequence[Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
        """`score` in a picture without an end."""
        return self.score(features, rows, torch.full_like(rows[:, 1:], torch.inf))


def _scores(rois: RoIs, before: Tensor) -> Tensor:
    """Scores ``[R]`` of RoIs from those of the proposals they were; 1 for objects' own boxes."""
    return torch.cat([before, before.new_ones(1)])[rois.source]  # the source of those is -1


class CascadeMaskHead(nn.Module):
    """A mask head a stage; in prediction all look at the last boxes and are averaged."""

    def __init__(self, heads: Sequence[FCNMaskHead]) -> None:
        super().__init__()
        self.output_size = heads[0].output_size
        self.stages = nn.ModuleList(heads)

    def forward(self, features: Sequence[Tensor], rois: Tensor, labels: Tensor) -> Tensor:
        """Logits ``[R, S, S]`` of the mean probability."""
        heads = [cast(FCNMaskHead, head) for head in self.stages]
        pooled = heads[0].pool(features, rois, heads[0].input_size)
        return average([head.finish(head.convolve(pooled), labels) for head in heads])

    def loss(
        self,
        features: Sequence[Tensor],
        rois: Tensor,
        labels: Tensor,
        truth: Truth,
        stage: int = 0,
    ) -> dict[str, Tensor]:
        """Mask loss ``[R]`` of one stage's head."""
        return cast(FCNMaskHead, self.stages[stage]).loss(features, rois, labels, truth)


def average(logits: Sequence[Tensor]) -> Tensor:
    """The logits of the mean of the probabilities that some logits mean, all of one shape."""
    mean = torch.stack(list(logits)).float().sigmoid().mean(0)
    return mean.logit(eps=1e-6).to(logits[0].dtype)
