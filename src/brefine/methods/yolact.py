"""YOLACT (Bolya et al., ICCV 2019): masks as sums of prototypes of the whole picture.

Figure 2: one branch draws 32 prototypes of the picture, without knowing of objects; beside class
and box, each anchor predicts how much of every prototype its object's mask has. The sum is cut at
the box. Fast NMS lets boxes that are themselves suppressed suppress others, which needs no loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou

from brefine.losses import MASK_LOSSES, balance_tasks, giou, weighted_mean
from brefine.parts import boxes as B
from brefine.parts.backbone import Backbone
from brefine.parts.mask_head import MaskLoss, conv3x3
from brefine.parts.masks import shrink
from brefine.parts.one_stage import Detector, number, rank
from brefine.ranges import Positive
from brefine.structures import Images, Instances

DELTA_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
ANCHORS = 3  # a cell
STRIDE = 4  # pixels a cell of the prototypes


def yolact(
    num_classes: int,
    *,
    backbone: str = "resnet50",
    channels: Positive = 256,
    width: int = 256,
    prototypes: int = 32,
    prototype_width: int = 256,
    top_from_c5: bool = False,
    anchor_scale: float = 3.0,
    mask_loss: MaskLoss = "bce",
    mask_weight: float = 6.125,
    box_weight: float = 1.5,
    masks: int | None = 100,
    score_threshold: float = 0.05,
    nms: float = 0.5,
    candidates: int = 1000,
    per_class: int = 200,
    ranking: bool = False,
    detector: Detector = Detector(),
) -> YOLACT:
    """YOLACT.

    Args:
        num_classes: K.
        backbone: a timm name.
        channels: of the pyramid.
        width: of the head for boxes.
        prototypes: how many there are.
        prototype_width: of the convolutions that draw them.
        top_from_c5: levels above P5 start from the backbone, as MMDetection's do, not from P5.
        anchor_scale: side of the square anchor in cells of its level.
        mask_loss: a name of ``losses.MASK_LOSSES``, over the object's box, by its area.
        mask_weight: of the mask loss, unless ranking.
        box_weight: of the box loss, unless ranking.
        masks: that a picture's anchors learn, at most, at random; None: all.
        score_threshold: of detections.
        nms: IoU threshold of Fast NMS.
        candidates: anchors a level that enter it.
        per_class: of these for each class.
        ranking: Rank & Sort with the three-task balance (eq. 3-6 of BRefine).
        detector: options of the trunk and of ranking.

    Raises:
        InputError: an unknown backbone.
    """
    trunk = Backbone(
        backbone,
        channels,
        norm=detector.norm,
        frozen_stages=detector.frozen_stages,
        fpn_norm=detector.fpn_norm,
        top="c5" if top_from_c5 else "p5",
        upsample="bilinear",
    )
    return YOLACT(
        num_classes,
        trunk,
        Head(channels, width, num_classes, prototypes, background=not ranking),
        Prototypes(channels, prototype_width, prototypes),
        Semantic(channels, num_classes),
        anchor_scale=anchor_scale,
        mask_loss=mask_loss,
        mask_weight=mask_weight,
        box_weight=box_weight,
        masks=masks,
        score_threshold=score_threshold,
        nms=nms,
        candidates=candidates,
        per_class=per_class,
        ranking=ranking,
        detector=detector,
    )


class Said(NamedTuple):
    """What all anchors say; A of them, level by level, then row, column, shape."""

    logits: Tensor  #: [B, A, K (+ 1)]
    deltas: Tensor  #: [B, A, 4]
    shares: Tensor  #: [B, A, P] of the prototypes, -1..1
    levels: list[int]  #: anchors of each level


class YOLACT(nn.Module):
    """The flow: pyramid, heads, prototypes, and masks made of both."""

    def __init__(
        self,
        num_classes: int,
        trunk: Backbone,
        box_head: Head,
        mask_head: Prototypes,
        semantic: Semantic,
        *,
        anchor_scale: float,
        mask_loss: MaskLoss,
        mask_weight: float,
        box_weight: float,
        masks: int | None,
        score_threshold: float,
        nms: float,
        candidates: int,
        per_class: int,
        ranking: bool,
        detector: Detector,
    ) -> None:
        super().__init__()
        self.num_classes, self.anchor_scale = num_classes, anchor_scale
        self.mask_loss, self.mask_weight, self.box_weight = mask_loss, mask_weight, box_weight
        self.masks, self.score_threshold, self.nms = masks, score_threshold, nms
        self.candidates, self.per_class = candidates, per_class
        self.ranking, self.detector = ranking, detector
        self.strides = trunk.strides
        self.trunk, self.box_head, self.mask_head = trunk, box_head, mask_head
        self.semantic = semantic

    def loss(self, images: Images, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """See ``Segmenter``."""
        pyramid = self.trunk(images)
        said, drawn = self.box_head(pyramid), self.mask_head(pyramid)
        anchors = self.anchors(pyramid)
        index = torch.stack([match(anchors, target.boxes) for target in targets])  # [B, A]
        image, place = (index >= 0).nonzero(as_tuple=True)
        chosen = index[image, place]
        start = [0, *(len(target) for target in targets)]
        offset = torch.tensor(start, device=index.device).cumsum(0)[image] + chosen
        label = torch.cat([target.labels for target in targets])[offset]
        goal = torch.cat([target.boxes for target in targets])[offset]
        delta = said.deltas[image, place]
        count = number(image)
        learnt, which = self.learn_masks(said, drawn, targets, (image, place, chosen), goal)
        semantic = self.semantic.loss(self.semantic(pyramid), targets)
        if not self.ranking:
            encoded = B.encode(goal, anchors[place], DELTA_WEIGHTS)
            box = self.box_weight * B.l1(delta, encoded, 1.0) / count
            mask = self.mask_weight * learnt.sum() / number(learnt)
            named = {"cls": mine(said.logits, index, image, place, label) / count}
            return named | {"box": box, "mask": mask, "semantic": semantic}
        decoded = B.decode(delta, anchors[place], DELTA_WEIGHTS)
        rows = image * len(anchors) + place
        logits = said.logits.flatten(0, 1)
        named = rank(
            logits, rows, label, B.paired_iou(decoded.detach(), goal), delta=self.detector.delta,
            ignored=index.flatten() == B.BETWEEN,
        )  # fmt: skip
        score = logits.detach()[rows].float().sigmoid().amax(1)
        box = weighted_mean(giou(decoded, goal), score)
        mask = weighted_mean(learnt, score[which])
        floor = self.detector.balance_floor
        named = balance_tasks(named, [{"box": box}, {"mask": mask}], ranking=True, floor=floor)
        return named | {"semantic": semantic}

    def learn_masks(
        self,
        said: Said,
        drawn: Tensor,
        targets: Sequence[Instances],
        positive: tuple[Tensor, Tensor, Tensor],
        boxes: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The mask loss of anchors, ``[Q]``, and which of the positives they are.

        ``positive`` are image, anchor and object; ``boxes [P, 4]`` are the objects'.
        """
        image, place, chosen = positive
        values, which = [], []
        for i, target in enumerate(targets):
            here = (image == i).nonzero()[:, 0]
            if self.masks is not None and len(here) > self.masks:
                pick = torch.randperm(len(here), device=here.device)[: self.masks]
                here = here[pick.sort().values]
            size = cast("tuple[int, int]", tuple(drawn.shape[-2:]))
            logits = combine(drawn[i], said.shares[i, place[here]])
            assert target.masks is not None
            truth = shrink(target.masks, STRIDE, size, least=3)[chosen[here]]
            values.append(cut_loss(self.mask_loss, logits, truth, boxes[here] / STRIDE))
            which.append(here)
        return torch.cat(values), torch.cat(which)

    def anchors(self, pyramid: Sequence[Tensor]) -> Tensor:
        """``[A, 4]`` around the cells' centres."""
        shapes = [level.shape[-2:] for level in pyramid]
        scale, device = self.anchor_scale, pyramid[0].device
        return torch.cat(B.anchors(shapes, self.strides, device, scale=scale, offset=0.5))

    def features(self, images: Images) -> Sequence[Tensor]:
        """See ``Segmenter``: the pyramid."""
        pyramid: Sequence[Tensor] = self.trunk(images)
        return pyramid

    def predict(
        self,
        images: Images,
        given: Sequence[Instances] | None = None,
        *,
        features: Sequence[Tensor] | None = None,
        margin: float = 0.0,
    ) -> list[Instances]:
        """See ``Segmenter``. Given boxes get the mask of the anchor that suits box and label best.

        That is by the product of its score and of the IoU of its own box.
        """
        pyramid = self.features(images) if features is None else features
        said, drawn, anchors = (
            self.box_head(pyramid),
            self.mask_head(pyramid),
            self.anchors(pyramid),
        )
        logits = said.logits.float()
        scores = logits.sigmoid() if self.ranking else logits.softmax(2)[:, :, :-1]
        span = anchors.new_tensor([0, 0, drawn.shape[-1] * STRIDE, drawn.shape[-2] * STRIDE])
        found = []
        for i, size in enumerate(images.sizes):
            boxes = B.clip(B.decode(said.deltas[i], anchors, DELTA_WEIGHTS), size)
            if given is None:
                place, label, score = self.detect(boxes, scores[i], said.levels)
                frame = (int(size[0]), int(size[1]))
                instances = Instances(frame, boxes[place], label, score)
            else:
                instances = given[i]
                fit = box_iou(instances.boxes, boxes) * scores[i].T[instances.labels]
                place = fit.argmax(1)
            masks = combine(drawn[i], said.shares[i, place]).float()
            spans = span.expand(len(instances), 4)
            found.append(replace(instances, logits=masks, spans=spans, margin=margin))
        return found

    def detect(
        self, boxes: Tensor, scores: Tensor, levels: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Anchors, labels and scores of the objects of a picture, best first, by Fast NMS."""
        best = torch.split(scores.amax(1), list(levels))
        starts = torch.tensor([0, *levels]).cumsum(0).tolist()
        place = torch.cat(
            [
                level.topk(min(self.candidates, len(level))).indices + start
                for level, start in zip(best, starts, strict=False)
            ]
        )
        score, order = scores[place].T.sort(dim=1, descending=True, stable=True)  # [K, n]
        score, place = score[:, : self.per_class], place[order[:, : self.per_class]]
        overlap = torch.stack([box_iou(box, box).triu(1).amax(0) for box in boxes[place]])
        size = boxes[place][..., 2:] - boxes[place][..., :2]
        keep = (overlap <= self.nms) & (score > self.score_threshold) & (size > 0).all(2)
        label, rank = keep.nonzero(as_tuple=True)
        score, place = score[label, rank], place[label, rank]
        every = torch.ones_like(score, dtype=torch.bool)
        order = B.top(score, every, self.detector.detections)
        return place[order], label[order], score[order]


class Head(nn.Module):
    """One 3x3 convolution for all, then class, box and shares of the prototypes.

    Rows of classes come class by class, three anchors each, the background last.
    """

    mmdetection = (
        (r"neck\.fpn_convs\.3\.conv\.", "trunk.fpn.extra_blocks.p6."),
        (r"neck\.fpn_convs\.4\.conv\.", "trunk.fpn.extra_blocks.p7."),
        (r"bbox_head\.head_convs\.0\.conv\.", "box_head.conv."),
        (r"bbox_head\.conv_cls\.", "box_head.classes.", lambda v: _by_class(v)),
        (r"bbox_head\.conv_reg\.", "box_head.deltas."),
        (r"bbox_head\.conv_coeff\.", "box_head.shares."),
    )

    def __init__(
        self, channels: int, width: int, num_classes: int, prototypes: int, *, background: bool
    ) -> None:
        super().__init__()
        self.class_rows = {"classes": ANCHORS}
        self.conv = conv3x3(channels, width)
        self.classes = nn.Conv2d(width, (num_classes + background) * ANCHORS, 3, padding=1)
        self.deltas = nn.Conv2d(width, 4 * ANCHORS, 3, padding=1)
        self.shares = nn.Conv2d(width, prototypes * ANCHORS, 3, padding=1)
        for layer in (self.classes, self.deltas, self.shares):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(cast(Tensor, layer.bias))

    def forward(self, pyramid: Sequence[Tensor]) -> Said:
        """See ``Said``."""
        parts: list[list[Tensor]] = [[], [], []]
        for level in pyramid:
            x = F.relu(self.conv(level))
            # [B, C, 3, h, w] of classes, [B, 3, C, h, w] of the others
            for part, values in zip(
                parts,
                (
                    self.classes(x).unflatten(1, (-1, ANCHORS)).permute(0, 3, 4, 2, 1),
                    self.deltas(x).unflatten(1, (ANCHORS, -1)).permute(0, 3, 4, 1, 2),
                    self.shares(x).unflatten(1, (ANCHORS, -1)).permute(0, 3, 4, 1, 2),
                ),
                strict=True,
            ):
                part.append(values.flatten(1, 3))
        logits, deltas, shares = (torch.cat(part, 1) for part in parts)
        return Said(logits, deltas, shares.tanh(), [part.shape[1] for part in parts[0]])


class Prototypes(nn.Module):
    """The finest level through three convolutions, doubled, two more: maps of stride 4."""

    mmdetection = (
        (r"mask_head\.protonet\.([024])\.", lambda m: f"mask_head.convs.{int(m[1]) // 2}."),
        (r"mask_head\.protonet\.8\.", "mask_head.fine."),
        (r"mask_head\.protonet\.10\.", "mask_head.last."),
    )

    def __init__(self, channels: int, width: int, prototypes: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv3x3(channels if i == 0 else width, width) for i in range(3))
        self.fine = conv3x3(width)
        self.last = nn.Conv2d(width, prototypes, 1)
        # Sums of many start near 0, BCE near ln 2.
        nn.init.xavier_uniform_(self.last.weight, 0.1)
        nn.init.zeros_(cast(Tensor, self.last.bias))

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        """``[B, P, h, w]``, >= 0."""
        x = pyramid[0]
        for conv in self.convs:
            x = F.relu(conv(x))
        x = F.relu(self.fine(F.interpolate(x, scale_factor=2, mode="bilinear")))
        return F.relu(self.last(x))


class Semantic(nn.Module):
    """Classes of pixels, for training alone: a 1x1 convolution on the finest level."""

    training_only = True
    mmdetection = (
        # MMDetection's channels are one to the left: that of its class 0 is the last one.
        (r"mask_head\.segm_branch\.segm_conv\.", "semantic.logits.", lambda v: v.roll(1, 0)),
    )

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.class_rows = {"logits": 1}
        self.logits = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.logits.weight, std=0.01)
        nn.init.zeros_(cast(Tensor, self.logits.bias))

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        """Logits ``[B, K, h, w]``."""
        logits: Tensor = self.logits(pyramid[0])
        return logits

    def loss(self, logits: Tensor, targets: Sequence[Instances]) -> Tensor:
        """Cross-entropy of all classes, summed over them, a mean over pixels."""
        goal = torch.zeros_like(logits, dtype=torch.float32)
        size = cast("tuple[int, int]", tuple(logits.shape[-2:]))
        for one, target in zip(goal, targets, strict=True):
            assert target.masks is not None
            masks = shrink(target.masks, 2 * STRIDE, size, least=3)
            one.scatter_reduce_(0, target.labels[:, None, None].expand_as(masks), masks, "amax")
        return F.binary_cross_entropy_with_logits(logits.float(), goal) * logits.shape[1]


@torch.no_grad()
def match(anchors: Tensor, truth: Tensor) -> Tensor:
    """The object of each anchor, ``[A]``, as ``boxes.match`` gives it, at IoUs of 0.5 and 0.4.

    Each object also takes the anchor that overlaps most with it, from others that overlap less.
    """
    index = B.match(anchors, truth, 0.5, 0.4)
    if len(truth):
        most, best = box_iou(truth, anchors).max(1)
        order = most.argsort()
        rank = order.argsort()
        taken = rank.new_full(index.shape, -1).scatter_reduce(0, best, rank, "amax")
        index = torch.where(taken >= 0, order[taken], index)
    return index


def mine(logits: Tensor, index: Tensor, image: Tensor, place: Tensor, label: Tensor) -> Tensor:
    """Softmax loss of the positives and of the three times as many hardest negatives, a sum.

    Args:
        logits: ``[B, A, K + 1]``.
        index: ``[B, A]``, see `match`.
        image: ``[P]`` of the positives.
        place: ``[P]`` their anchors.
        label: ``[P]`` their classes.
    """
    goal = torch.full_like(index, logits.shape[2] - 1)
    goal[image, place] = label
    loss = F.cross_entropy(logits.float().mT, goal, reduction="none")
    total = loss[image, place].sum() + 0 * loss.sum()  # a gradient, even of no object
    for one, value in zip(index, loss, strict=True):
        negative = value[one == B.BELOW]
        count = min(3 * int((one >= 0).sum()), len(negative))
        total = total + negative.topk(count).values.sum()
    return total


def combine(drawn: Tensor, shares: Tensor) -> Tensor:
    """Mask logits ``[N, h, w]`` from prototypes ``[P, h, w]`` and shares ``[N, P]``."""
    return (shares.to(drawn.dtype) @ drawn.flatten(1)).view(-1, *drawn.shape[1:])


def cut_loss(name: MaskLoss, logits: Tensor, truth: Tensor, boxes: Tensor) -> Tensor:
    """A mask loss inside of boxes, ``[N]``: sums over pixels are divided by the box's area.

    Args:
        name: of ``losses.MASK_LOSSES``.
        logits: ``[N, h, w]``.
        truth: ``[N, h, w]``, 0 or 1.
        boxes: ``[N, 4]`` in cells; a cell more on each side counts.
    """
    height, width = logits.shape[1:]
    x, y = (torch.arange(side, device=boxes.device) for side in (width, height))
    x1, y1, x2, y2 = boxes[:, :, None].unbind(1)
    inside = ((y >= y1 - 1) & (y < y2 + 1))[:, :, None] & ((x >= x1 - 1) & (x < x2 + 1))[:, None]
    logits = logits.float().masked_fill(~inside, -30.0)
    truth = truth * inside
    scale = height * width / (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-3).prod(1)
    value = logits.new_zeros(len(logits))
    for part in name.split("+"):
        loss = MASK_LOSSES[part](logits, truth)
        value = value + (loss if part == "dice" else loss * scale)  # Dice is by area already
    return value


def _by_class(value: Tensor) -> Tensor:
    """Rows in the order class, anchor from rows in the order anchor, class."""
    by_anchor = value.view(ANCHORS, -1, *value.shape[1:])
    return by_anchor.transpose(0, 1).flatten(0, 1)
