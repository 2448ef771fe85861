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
from brefine.parts.box_head import DELTA_WEIGHTS, Boxes, BoxHead, Round, detect
from brefine.parts.boxes import CONVENTIONS, Convention, enlarge
from brefine.parts.masks import bound, crop, read_points, share_inside
from brefine.parts.rpn import RPN
from brefine.ranges import STRICT, NotNegative, Positive, Probability, Scale, Stages
from brefine.structures import Bitmaps, Images, Instances

CHUNK = 2**22  # numbers a layer of the mask head makes at once in prediction: fits a CPU's cache


@dataclass(frozen=True)
class Truth:
    """The true masks of RoIs, cut out as a mask head wants them.

    Attributes:
        rows: ``[R, 5]`` RoIs.
        index: ``[R]`` int64, each RoI's object within its picture.
        targets: labels of each picture.
        convention: see ``boxes.Convention``.
    """

    rows: Tensor
    index: Tensor
    targets: Sequence[Instances]
    convention: Convention

    def __call__(self, side: int) -> Tensor:
        """``[R, side, side]`` float, on a grid that spans the RoIs."""
        aligned, soft = self.convention.aligned, self.convention.soft_masks
        return self._fill(
            self.rows.new_zeros(len(self.rows), side, side),
            lambda target, masks, here: crop(
                masks,
                self.rows[here, 1:],
                self.index[here],
                side,
                target.size,
                aligned=aligned,
                soft=soft,
            ),
        )

    def at(self, points: Tensor) -> Tensor:
        """``[R, P]`` in 0..1 at points ``[R, P, 2]`` (x, y) in 0..1 of each RoI."""
        corner, size = self.rows[:, None, 1:3], self.rows[:, None, 3:] - self.rows[:, None, 1:3]
        place = corner + points * size
        return self._fill(
            points.new_zeros(points.shape[:2]),
            lambda target, masks, here: read_points(masks, place[here], self.index[here]),
        )

    def share(self) -> Tensor:
        """``[R]``, the share of each object's pixels that lies inside its RoI."""
        return self._fill(
            self.rows.new_zeros(len(self.rows)),
            lambda target, masks, here: share_inside(
                masks, self.rows[here, 1:], self.index[here], target.size
            ),
        )

    @torch.no_grad()
    def _fill(self, result: Tensor, read: Callable[[Instances, Bitmaps, Tensor], Tensor]) -> Tensor:
        """``result`` with the rows of each picture that has masks filled by ``read``."""
        for i, target in enumerate(self.targets):
            here = (self.rows[:, 0] == i).nonzero()[:, 0]
            if len(here) and target.masks is not None:
                result[here] = read(target, target.masks, here)
        return result


class MaskHead(Protocol):
    """A mask head receives the whole pyramid and the boxes, and pools for itself.

    It may have ``quality(features, rois, labels, logits)``: how good these masks are, ``[R]``;
    scores of detections are multiplied with it.

    Attributes:
        output_size: S, the side of its logits.
        numbers: optional, that its widest layer makes of one RoI; else C x S x S. Prediction
            takes as many RoIs at a time as a CPU's cache holds.
    """

    output_size: int

    def __call__(self, features: Sequence[Tensor], rois: Tensor, labels: Tensor) -> Tensor:
        """Logits ``[R, S, S]`` of the class ``labels [R]`` of RoIs ``[R, 5]``."""
        ...

    def loss(
        self,
        features: Sequence[Tensor],
        rois: Tensor,
        labels: Tensor,
        truth: Truth,
        stage: int = 0,
    ) -> dict[str, Tensor]:
        """Losses by name, one value a RoI, ``[R]``; TwoStage averages them (eq. 6).

        ``stage`` counts the rounds of the box head; there is more than one only in a cascade.
        """
        ...


class Branch(Protocol):
    """A part beside the RPN that adds one map to the pyramid, for the heads to pool from."""

    def __call__(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The map ``[B, C, h, w]``, and what its own loss is of; see `Backbone` for features."""
        ...

    def loss(self, output: Tensor, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Its own losses by name, scalars."""
        ...


@dataclass(frozen=True)
class Detector:
    """Options of the trunk, RPN and box head, the same for every two-stage method.

    Attributes:
        norm: see ``Backbone``.
        frozen_stages: see ``Backbone``.
        fpn_norm: see ``Backbone``.
        stride_in_1x1: see ``Backbone``.
        convention: numerical rules of ``boxes.CONVENTIONS``.
        finest: RoIs whose root area is below twice this many pixels use P2.
        delta: half width of Rank & Sort's ramp.
        balance_floor: least value of the ranking loss in eq. 5's ratio; above 0, box and mask
            gradients stay alive when the ranking loss goes to 0 on small data.
        rpn_weight: of the whole RPN term when ranking (the paper's w; inside L^1, as printed,
            the balance would cancel it).
        rpn_samples: anchors a picture for the unranked RPN loss; None: all.
        rpn_low_quality: IoU from which an object's best anchors are positive if none reaches
            0.7. At 0, as in Detectron2 and torchvision, a tiny object makes dozens of anchors
            positive that hardly touch it; MMDetection has 0.3.
        rpn_delta_weights: of the RPN's box deltas; Rank & Sort's authors have (10, 10, 5, 5).
        anchor_scale: side of the square anchor in cells of its level.
        candidates: anchors a level that enter the RPN's NMS, (training, prediction).
        proposals: kept a picture, (training, prediction).
        roi_samples: RoIs a picture for the unranked box loss; None: all.
        add_truth: objects' own boxes join the proposals in training.
        box_hidden: width of the box head.
        mask_rois: positives a batch that the mask head learns from; None: all.
        mask_margin: share of a box's sides by which the RoI of its mask is larger, on every side,
            in training, too; a detection's box is then the one around its mask. 0: RoIs are boxes
            and detections have those of the box head, as in the paper.
        score_threshold: of detections.
        nms: IoU threshold of detections.
        detections: most kept a picture.
    """

    __pydantic_config__ = STRICT

    norm: Literal["frozen", "batch"] = "frozen"
    frozen_stages: Stages = 1
    fpn_norm: Literal["none", "group"] = "none"
    stride_in_1x1: bool = False
    convention: Literal["detectron", "torchvision"] = "detectron"
    finest: Scale = 56.0
    delta: NotNegative = 0.5
    balance_floor: NotNegative = 0.0
    rpn_weight: NotNegative = 0.2
    rpn_samples: Positive | None = 256
    rpn_low_quality: Probability = 0.0
    rpn_delta_weights: tuple[Scale, Scale, Scale, Scale] = (1.0, 1.0, 1.0, 1.0)
    anchor_scale: Scale = 8.0
    candidates: tuple[Positive, Positive] = (2000, 1000)
    proposals: tuple[Positive, Positive] = (1000, 1000)
    roi_samples: Positive | None = 512
    add_truth: bool = True
    box_hidden: Positive = 1024
    mask_rois: Positive | None = 200
    mask_margin: Probability = 0.0
    score_threshold: Probability = 0.05
    nms: Probability = 0.5
    detections: Positive = 100


def box_head(
    channels: int,
    num_classes: int,
    ranking: bool,
    detector: Detector,
    *,
    agnostic: bool = False,
    delta_weights: Sequence[float] = DELTA_WEIGHTS,
    iou: float = 0.5,
    beta: float | None = None,
    pool: roi.Pool | None = None,
) -> BoxHead:
    """A box head with a detector's options; the other arguments are those of ``BoxHead``."""
    return BoxHead(
        channels,
        num_classes,
        Backbone.strides[:4],
        CONVENTIONS[detector.convention],
        ranking=ranking,
        delta=detector.delta,
        samples=detector.roi_samples,
        hidden=detector.box_hidden,
        finest=detector.finest,
        add_truth=detector.add_truth,
        agnostic=agnostic,
        delta_weights=delta_weights,
        iou=iou,
        beta=beta,
        pool=pool,
        score_threshold=detector.score_threshold,
        nms=detector.nms,
        detections=detector.detections,
    )


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
        boxes: a box head, see ``Boxes``; None: the one of `box_head`.
        branch: see ``Branch``.
        raw: the branch is given what the backbone has at stride 2, too.
    """

    box_head: Boxes

    def __init__(
        self,
        num_classes: int,
        mask_head: nn.Module,
        *,
        backbone: str,
        channels: int,
        ranking: bool,
        detector: Detector,
        boxes: Boxes | None = None,
        branch: nn.Module | None = None,
        raw: bool = False,
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
            stride_in_1x1=detector.stride_in_1x1,
            raw=raw,
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
            scale=detector.anchor_scale,
            low_quality=detector.rpn_low_quality,
            delta_weights=detector.rpn_delta_weights,
        )
        self.branch = branch
        self.box_head = boxes or box_head(channels, num_classes, ranking, detector)
        self.mask_head = mask_head

    def loss(self, images: Images, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Named losses, to be summed; names with ``raw_`` are detached and for the log.

        Args:
            images: the batch.
            targets: boxes, labels and masks of each picture; none is legal.
        """
        features: Sequence[Tensor] = self.trunk(images)
        pyramid = features[: len(Backbone.strides)]
        proposed: tuple[list[Tensor], list[Tensor], list[Tensor]] = self.rpn(pyramid)
        rpn_named, rpn_box = self.rpn.loss(*proposed, targets)
        weight = self.detector.rpn_weight if self.ranking else 1.0
        named = self._balance(rpn_named, [{"rpn_box": rpn_box}], weight)
        if self.branch is not None:
            branch = cast(Branch, self.branch)
            more, output = branch(features)
            features = [*pyramid, more]
            named |= branch.loss(output, targets)
        proposals = self.rpn.propose(*proposed, images.sizes, training=True)
        rounds = self.box_head.rounds(features, proposals, targets)
        for stage, each in enumerate(rounds):
            tasks = [{"box": each.box}, self._learn_masks(features, each, targets, stage)]
            prefix = f"stage{stage}_" if len(rounds) > 1 else ""
            named |= self._balance(each.classes, tasks, each.weight, prefix)
        return named

    def _learn_masks(
        self, features: Sequence[Tensor], each: Round, targets: Sequence[Instances], stage: int
    ) -> dict[str, Tensor]:
        """Mask losses of a round by name, scalars."""
        positive = self._mask_rois(each.rois.labels)
        rows, labels = each.rois.rows[positive], each.rois.labels[positive]
        rows = torch.cat([rows[:, :1], enlarge(rows[:, 1:], self.detector.mask_margin)], 1)
        truth = Truth(rows, each.rois.index[positive], targets, self.convention)
        learnt = cast(MaskHead, self.mask_head).loss(features, rows, labels, truth, stage)
        weights = each.scores[positive] if self.ranking else rows.new_ones(len(rows))
        return {name: losses.weighted_mean(value, weights) for name, value in learnt.items()}

    def _balance(
        self,
        classes: dict[str, Tensor],
        tasks: Sequence[dict[str, Tensor]],
        weight: float = 1.0,
        prefix: str = "",
    ) -> dict[str, Tensor]:
        """Losses by name; when ranking, each task is scaled by eq. 5 and has its first name."""
        floor = self.detector.balance_floor
        return losses.balance_tasks(
            classes, tasks, ranking=self.ranking, floor=floor, weight=weight, prefix=prefix
        )

    def features(self, images: Images) -> Sequence[Tensor]:
        """The pyramid and what the branch adds, to predict from it more than once."""
        features: Sequence[Tensor] = self.trunk(images)
        if self.branch is None:
            return features
        return [*features[: len(Backbone.strides)], self.branch(features)[0]]

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
            margin: share of a box's sides by which the RoI of its mask is larger, on every side, on
                top of the detector's ``mask_margin``.
        """
        features = self.features(images) if features is None else features
        asked = given is not None
        if given is None:
            pyramid = features[: len(Backbone.strides)]
            proposed: tuple[list[Tensor], list[Tensor], list[Tensor]] = self.rpn(pyramid)
            proposals = self.rpn.propose(*proposed, images.sizes, training=False)
            given = detect(self.box_head, features, proposals, images.sizes)
        own = self.detector.mask_margin
        rows = roi.rows([enlarge(instances.boxes, own + margin) for instances in given])
        labels = torch.cat([instances.labels for instances in given])
        logits = self._masks(features, rows, labels)
        quality = None if asked else self.quality(features, rows, labels, logits)
        counts, found, start = [len(instances) for instances in given], [], 0
        for instances, count, size in zip(given, counts, images.sizes, strict=True):
            mine = slice(start, start + count)
            spans, boxes = rows[mine, 1:], instances.boxes
            if own and not asked:
                boxes = bound(boxes, logits[mine], spans, size)
            found.append(
                replace(
                    instances,
                    boxes=boxes,
                    logits=logits[mine],
                    margin=margin,
                    spans=spans if own else None,
                )
            )
            if quality is not None and instances.scores is not None:
                scores = (instances.scores * quality[mine]).clamp(0, 1)
                best = scores.sort(descending=True, stable=True).indices
                found[-1] = replace(found[-1], scores=scores)[best]
            start += count
        return found

    def quality(
        self, features: Sequence[Tensor], rows: Tensor, labels: Tensor, logits: Tensor
    ) -> Tensor | None:
        """What the mask head says of its masks, ``[R]``; None: it says nothing."""
        judge = getattr(self.mask_head, "quality", None)
        if judge is None:
            return None
        judged: Tensor = judge(features, rows, labels, logits).float()
        return judged

    def _masks(self, features: Sequence[Tensor], rows: Tensor, labels: Tensor) -> Tensor:
        """Mask logits ``[R, S, S]``, a few RoIs at a time."""
        side = cast(MaskHead, self.mask_head).output_size
        numbers = getattr(self.mask_head, "numbers", features[0].shape[1] * side * side)
        cells = CHUNK if rows.device.type == "cpu" else 64 * CHUNK
        count = max(1, cells // numbers)
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
