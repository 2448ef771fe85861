"""The flow of every two-stage method: trunk, RPN, box head, mask head, and their losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn

from brefine import losses
from brefine.parts import roi
from brefine.parts.backbone import Backbone
from brefine.parts.box_head import BoxHead
from brefine.parts.boxes import CONVENTIONS, enlarge
from brefine.parts.masks import crop
from brefine.parts.rpn import RPN
from brefine.structures import Images, Instances

#: gives the true masks of the RoIs at a side of S cells: ``[R, S, S]`` float
Truth = Callable[[int], Tensor]

CHUNK = 2**22  # numbers a layer of the mask head makes at once in prediction: fits a CPU's cache


class MaskHead(Protocol):
    """A mask head receives the whole pyramid and the boxes, and pools for itself.

    Attributes:
        output_size: S, the side of its logits.
    """

    output_size: int

    def __call__(self, features: Sequence[Tensor], rois: Tensor, labels: Tensor) -> Tensor:
        """Logits ``[R, S, S]`` of the class ``labels [R]`` of RoIs ``[R, 5]``."""
        ...

    def loss(
        self, features: Sequence[Tensor], rois: Tensor, labels: Tensor, truth: Truth
    ) -> Tensor:
        """One loss a RoI, ``[R]``; TwoStage averages them (eq. 6)."""
        ...


@dataclass(frozen=True)
class Detector:
    """Options of the trunk, RPN and box head, the same for every two-stage method.

    Attributes:
        norm: see ``Backbone``.
        frozen_stages: see ``Backbone``.
        fpn_norm: see ``Backbone``.
        convention: numerical rules of ``boxes.CONVENTIONS``.
        finest: RoIs whose root area is below twice this many pixels use P2.
        delta: half width of Rank & Sort's ramp.
        balance_floor: least value of the ranking loss in eq. 5's ratio; above 0, box and mask
            gradients stay alive when the ranking loss goes to 0 on small data.
        rpn_weight: of the whole RPN term when ranking (the paper's w; inside L^1, as printed,
            the balance would cancel it).
        rpn_samples: anchors a picture for the unranked RPN loss; None: all.
        candidates: anchors a level that enter the RPN's NMS, (training, prediction).
        proposals: kept a picture, (training, prediction).
        roi_samples: RoIs a picture for the unranked box loss; None: all.
        add_truth: objects' own boxes join the proposals in training.
        box_hidden: width of the box head.
        mask_rois: positives a batch that the mask head learns from; None: all.
        score_threshold: of detections.
        nms: IoU threshold of detections.
        detections: most kept a picture.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  a typo in a recipe must not pass

    norm: Literal["frozen", "batch"] = "frozen"
    frozen_stages: int = 1
    fpn_norm: Literal["none", "group"] = "none"
    convention: Literal["detectron", "torchvision"] = "detectron"
    finest: float = 56.0
    delta: float = 0.5
    balance_floor: float = 0.0
    rpn_weight: float = 0.2
    rpn_samples: int | None = 256
    candidates: tuple[int, int] = (2000, 1000)
    proposals: tuple[int, int] = (1000, 1000)
    roi_samples: int | None = 512
    add_truth: bool = True
    box_hidden: int = 1024
    mask_rois: int | None = 200
    score_threshold: float = 0.05
    nms: float = 0.5
    detections: int = 100


class TwoStage(nn.Module):
    """Mask R-CNN's flow with any mask head.

    With ``ranking`` the losses are BR and S (eq. 5): each task's box and mask loss is scaled to
    the size of its Rank & Sort loss. Without, they are Mask R-CNN's own.

    Args:
        num_classes: K.
        mask_head: see ``MaskHead``.
        backbone: a timm name.
        channels: of the pyramid.
        ranking: see above.
        detector: everything else.
    """

    def __init__(
        self,
        num_classes: int,
        mask_head: nn.Module,
        *,
        backbone: str,
        channels: int,
        ranking: bool,
        detector: Detector,
    ) -> None:
        super().__init__()
        self.num_classes, self.ranking, self.detector = num_classes, ranking, detector
        convention = CONVENTIONS[detector.convention]
        self.convention = convention
        self.trunk = Backbone(
            backbone,
            channels,
            norm=detector.norm,
            frozen_stages=detector.frozen_stages,
            fpn_norm=detector.fpn_norm,
        )
        self.rpn = RPN(
            channels,
            self.trunk.strides,
            convention,
            ranking=ranking,
            delta=detector.delta,
            samples=detector.rpn_samples,
            candidates=detector.candidates,
            proposals=detector.proposals,
        )
        self.box_head = BoxHead(
            channels,
            num_classes,
            self.trunk.strides[:4],
            convention,
            ranking=ranking,
            delta=detector.delta,
            samples=detector.roi_samples,
            hidden=detector.box_hidden,
            finest=detector.finest,
            add_truth=detector.add_truth,
            score_threshold=detector.score_threshold,
            nms=detector.nms,
            detections=detector.detections,
        )
        self.mask_head = mask_head

    def loss(self, images: Images, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Named losses, to be summed; names with ``raw_`` are detached and for the log.

        Args:
            images: the batch.
            targets: boxes, labels and masks of each picture; none is legal.
        """
        features = self.trunk(images)
        proposed: tuple[list[Tensor], list[Tensor], list[Tensor]] = self.rpn(features)
        rpn_named, rpn_box = self.rpn.loss(*proposed, targets)
        proposals = self.rpn.propose(*proposed, images.sizes, training=True)
        rois = self.box_head.sample(proposals, targets)
        cls_named, box, scores = self.box_head.loss(features, rois)
        positive = self._mask_rois(rois.labels)
        mask = cast(MaskHead, self.mask_head).loss(
            features,
            rois.rows[positive],
            rois.labels[positive],
            lambda side: self._truth(rois.rows[positive], rois.index[positive], targets, side),
        )
        if not self.ranking:
            mask = losses.weighted_mean(mask, torch.ones_like(mask))
            return {**rpn_named, "rpn_box": rpn_box, **cls_named, "box": box, "mask": mask}
        mask = losses.weighted_mean(mask, scores[positive])
        floor, weight = self.detector.balance_floor, self.detector.rpn_weight
        rpn_ranking = sum(rpn_named.values(), rpn_box.new_zeros(()))
        ranking = sum(cls_named.values(), box.new_zeros(()))
        return {
            **{name: weight * value for name, value in rpn_named.items()},
            "rpn_box": weight * losses.balance(rpn_ranking, rpn_box, floor=floor),
            **cls_named,
            "box": losses.balance(ranking, box, floor=floor),
            "mask": losses.balance(ranking, mask, floor=floor),
            # balanced losses always read L_RS, so the raw ones tell what is learnt
            "raw_rpn_box": rpn_box.detach(),
            "raw_box": box.detach(),
            "raw_mask": mask.detach(),
        }

    def features(self, images: Images) -> Sequence[Tensor]:
        """The pyramid, to predict from it more than once."""
        features: Sequence[Tensor] = self.trunk(images)
        return features

    def predict(
        self,
        images: Images,
        given: Sequence[Instances] | None = None,
        *,
        features: Sequence[Tensor] | None = None,
        margin: float = 0.0,
    ) -> list[Instances]:
        """Objects of each picture with mask logits of their class, best score first.

        Args:
            images: the batch.
            given: boxes and labels to predict masks for, instead of detecting.
            features: of this batch, by `features`, if they are there already.
            margin: share of a box's sides by which the RoI of its mask is larger, on every side.
        """
        features = self.trunk(images) if features is None else features
        if given is None:
            proposed: tuple[list[Tensor], list[Tensor], list[Tensor]] = self.rpn(features)
            proposals = self.rpn.propose(*proposed, images.sizes, training=False)
            given = self.box_head.detect(features, proposals, images.sizes)
        rows = roi.rows([enlarge(instances.boxes, margin) for instances in given])
        labels = torch.cat([instances.labels for instances in given])
        logits = self._masks(features, rows, labels)
        parts = torch.split(logits, [len(instances) for instances in given])
        return [
            replace(inst, logits=part, margin=margin)
            for inst, part in zip(given, parts, strict=True)
        ]

    def _masks(self, features: Sequence[Tensor], rows: Tensor, labels: Tensor) -> Tensor:
        """Mask logits ``[R, S, S]``, a few RoIs at a time."""
        side = cast(MaskHead, self.mask_head).output_size
        cells = CHUNK if rows.device.type == "cpu" else 64 * CHUNK
        count = max(1, cells // (features[0].shape[1] * side * side))
        if torch.compiler.is_exporting():
            count = max(1, len(rows))
        parts = zip(torch.split(rows, count), torch.split(labels, count), strict=True)
        return torch.cat([self.mask_head(features, row, label) for row, label in parts])

    def _mask_rois(self, labels: Tensor) -> Tensor:
        """Positives for the mask head: at most ``mask_rois``, at random, in order.

        In order, so that each RoI keeps its own weight of eq. 6.
        """
        positive = (labels < self.num_classes).nonzero()[:, 0]
        most = self.detector.mask_rois
        if most is None or len(positive) <= most:
            return positive
        pick = torch.randperm(len(positive), device=positive.device)[:most]
        return positive[pick.sort().values]

    @torch.no_grad()
    def _truth(
        self, rows: Tensor, index: Tensor, targets: Sequence[Instances], side: int
    ) -> Tensor:
        """True masks ``[R, side, side]`` of RoIs ``[R, 5]``; ``index [R]`` is the object."""
        truth = rows.new_zeros(len(rows), side, side)
        for i, target in enumerate(targets):
            here = (rows[:, 0] == i).nonzero()[:, 0]
            if len(here) and target.masks is not None:
                truth[here] = crop(
                    target.masks,
                    rows[here, 1:],
                    index[here],
                    side,
                    target.size,
                    aligned=self.convention.aligned,
                    soft=self.convention.soft_masks,
                )
        return truth
