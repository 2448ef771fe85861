"""BlendMask (Chen et al., CVPR 2020): few maps of the picture, blended by each object's attention.

Figure 2: a bottom module draws four bases of the picture; beside its class and box, each place of
an FCOS detector (Tian et al., ICCV 2019) predicts attention: for each base a map of 14 x 14 weights
over its box. The bases are pooled at the box, and their weighted sum is the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import gcd
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou

from brefine.losses import MASK_LOSSES, balance_tasks, giou, weighted_mean
from brefine.parts import boxes as B
from brefine.parts import roi
from brefine.parts.backbone import Backbone
from brefine.parts.mask_head import MaskLoss, conv3x3
from brefine.parts.masks import shrink
from brefine.parts.one_stage import Detector, focal, number, rank
from brefine.parts.two_stage import Truth
from brefine.ranges import Positive
from brefine.structures import Images, Instances

STRIDE = 4  # pixels a cell of the bases
RADIUS = 1.5  # cells around an object's centre that are its own
CONVENTION = B.CONVENTIONS["detectron"]


def blendmask(
    num_classes: int,
    *,
    backbone: str = "resnet50",
    channels: Positive = 256,
    num_convs: int = 4,
    groups: int = 32,
    bases: int = 4,
    base_width: int = 128,
    attention: int = 14,
    output_size: int = 56,
    ranges: tuple[float, float, float, float] = (64, 128, 256, 512),
    mask_loss: MaskLoss = "bce",
    masks: int | None = 500,
    semantic_weight: float = 0.3,
    score_threshold: float = 0.05,
    nms: float = 0.6,
    candidates: int = 1000,
    ranking: bool = False,
    detector: Detector = Detector(),
) -> BlendMask:
    """BlendMask.

    Args:
        num_classes: K.
        backbone: a timm name.
        channels: of the pyramid and of the detector's towers.
        num_convs: 3x3 convolutions of a tower.
        groups: of GroupNorm; fewer where they do not divide the width.
        bases: how many maps there are.
        base_width: of the convolutions that draw them.
        attention: cells a side of an attention map.
        output_size: cells a side of a mask.
        ranges: longest side, from a place to the sides of its box, in pixels, up to which each
            level but the last is for.
        mask_loss: a name of ``losses.MASK_LOSSES``.
        masks: that a picture's places learn, at most, at random; None: all.
        semantic_weight: of the loss of classes of pixels.
        score_threshold: of detections.
        nms: IoU threshold of detections.
        candidates: places a level that enter NMS.
        ranking: Rank & Sort with the three-task balance (eq. 3-6 of BRefine), without centerness.
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
        top="p5",
        top_relu=True,
    )
    return BlendMask(
        num_classes,
        trunk,
        Towers(channels, num_classes, bases * attention**2, num_convs, groups, ranking=ranking),
        Bases(channels, base_width, bases, groups),
        Semantic(channels, base_width, num_classes, groups),
        output_size=output_size,
        ranges=ranges,
        mask_loss=mask_loss,
        masks=masks,
        semantic_weight=semantic_weight,
        score_threshold=score_threshold,
        nms=nms,
        candidates=candidates,
        ranking=ranking,
        detector=detector,
    )


class Said(NamedTuple):
    """What all places say; M of them, level by level, row by row."""

    logits: Tensor  #: [B, M, K]
    reach: Tensor  #: [B, M, 4] cells from the place to the left, top, right and bottom, >= 0
    centre: Tensor | None  #: [B, M] logits of how central the place is
    attention: Tensor  #: [B, M, bases * cells]


class Places(NamedTuple):
    """Where the cells of all levels are, ``[M]`` each."""

    point: Tensor  #: [M, 2] (x, y) pixels
    stride: Tensor
    level: Tensor


class BlendMask(nn.Module):
    """The flow: pyramid, towers, bases, and masks blended of both."""

    def __init__(
        self,
        num_classes: int,
        trunk: Backbone,
        box_head: Towers,
        mask_head: Bases,
        semantic: Semantic,
        *,
        output_size: int,
        ranges: Sequence[float],
        mask_loss: MaskLoss,
        masks: int | None,
        semantic_weight: float,
        score_threshold: float,
        nms: float,
        candidates: int,
        ranking: bool,
        detector: Detector,
    ) -> None:
        super().__init__()
        self.num_classes, self.output_size, self.ranges = num_classes, output_size, ranges
        self.criterion, self.masks = MASK_LOSSES[mask_loss], masks
        self.semantic_weight = semantic_weight
        self.score_threshold, self.nms, self.candidates = score_threshold, nms, candidates
        self.ranking, self.detector = ranking, detector
        self.strides = trunk.strides
        self.trunk, self.box_head, self.mask_head = trunk, box_head, mask_head
        self.semantic = semantic

    def loss(self, images: Images, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """See ``Segmenter``."""
        pyramid = self.trunk(images)
        said, drawn, places = self.box_head(pyramid), self.mask_head(pyramid), self.places(pyramid)
        index = torch.stack([assign(places, target.boxes, self.ranges) for target in targets])
        image, place = (index >= 0).nonzero(as_tuple=True)
        start = [0, *(len(target) for target in targets)]
        offset = torch.tensor(start, device=index.device).cumsum(0)
        chosen = offset[image] + index[image, place]  # among the objects of all pictures
        label = torch.cat([target.labels for target in targets])[chosen]
        goal = torch.cat([target.boxes for target in targets])[chosen]
        box = decode(places.point[place], said.reach[image, place], places.stride[place])
        logits, rows = said.logits.flatten(0, 1), image * index.shape[1] + place
        picked = self._pick(image)
        mask = self.mask_losses(
            drawn, targets, said.attention[image, place][picked], chosen[picked]
        )
        semantic = self.semantic_weight * self.semantic.loss(self.semantic(pyramid), targets)
        if said.centre is None:
            quality = B.paired_iou(box.detach(), goal)
            named = rank(logits, rows, label, quality, delta=self.detector.delta)
            weight = logits.detach()[rows].float().sigmoid().amax(1)
            named = balance_tasks(
                named,
                [
                    {"box": weighted_mean(giou(box, goal), weight)},
                    {"mask": weighted_mean(mask, weight[picked])},
                ],
                ranking=True,
                floor=self.detector.balance_floor,
            )
            return named | {"semantic": semantic}
        count = number(rows)
        central = centerness(places.point[place], goal)
        centre = F.binary_cross_entropy_with_logits(
            said.centre[image, place].float(), central, reduction="sum"
        )
        return {
            "cls": focal(logits, rows, label) / count,
            "centre": centre / count,
            "box": weighted_mean(giou(box, goal), central),
            "mask": weighted_mean(mask, central[picked]),
            "semantic": semantic,
        }

    def mask_losses(
        self, drawn: Tensor, targets: Sequence[Instances], attention: Tensor, chosen: Tensor
    ) -> Tensor:
        """The mask loss ``[P]`` of places with attention ``[P, ...]`` for the objects chosen.

        Masks are learnt in the objects' true boxes; ``chosen`` counts objects of all pictures.
        """
        rows = roi.rows([target.boxes for target in targets])
        count = [len(target) for target in targets]
        every = torch.cat([torch.arange(n, device=rows.device) for n in count])
        used, again = torch.unique(chosen, return_inverse=True)
        truth = Truth(rows[used], every[used], targets, CONVENTION)(self.output_size)
        pooled = self.pool(drawn, rows[used])
        return self.criterion(blend(pooled[again], attention), truth[again])

    def _pick(self, image: Tensor) -> Tensor:
        """At most ``masks`` places of each picture, at random, in order."""
        if self.masks is None:
            return torch.arange(len(image), device=image.device)
        chosen = []
        for i in torch.unique_consecutive(image).tolist():
            here = (image == i).nonzero()[:, 0]
            pick = torch.randperm(len(here), device=here.device)[: self.masks]
            chosen.append(here[pick.sort().values])
        return torch.cat(chosen) if chosen else image

    def pool(self, drawn: Tensor, rows: Tensor) -> Tensor:
        """Bases ``[R, bases, S, S]`` in RoIs ``[R, 5]``."""
        return roi.pool([drawn], rows, self.output_size, (STRIDE,), CONVENTION)

    def places(self, pyramid: Sequence[Tensor]) -> Places:
        """The middle of each cell of each level."""
        device = pyramid[0].device
        points, strides, levels = [], [], []
        for k, (level, stride) in enumerate(zip(pyramid, self.strides, strict=True)):
            ys, xs = ((torch.arange(n, device=device) + 0.5) * stride for n in level.shape[-2:])
            y, x = torch.meshgrid(ys, xs, indexing="ij")
            points.append(torch.stack([x, y], 2).flatten(0, 1))
            strides.append(torch.full((len(points[-1]),), float(stride), device=device))
            levels.append(torch.full((len(points[-1]),), k, device=device))
        return Places(torch.cat(points), torch.cat(strides), torch.cat(levels))

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
        """See ``Segmenter``. Given boxes get the attention that suits box and label best.

        That is of the place with the best product of score and of the IoU of its own box.
        """
        pyramid = self.features(images) if features is None else features
        said, drawn, places = self.box_head(pyramid), self.mask_head(pyramid), self.places(pyramid)
        scores = said.logits.float().sigmoid()
        if said.centre is not None:
            scores = scores * said.centre.float().sigmoid()[..., None]
        found = []
        for i, size in enumerate(images.sizes):
            boxes = B.clip(decode(places.point, said.reach[i], places.stride), size)
            if given is None:
                place, label, score = self.detect(boxes, scores[i], places.level)
                frame = (int(size[0]), int(size[1]))
                instances = Instances(frame, boxes[place], label, score)
            else:
                instances = given[i]
                fit = box_iou(instances.boxes, boxes) * scores[i].T[instances.labels]
                place = fit.argmax(1)
            rows = roi.rows([B.enlarge(instances.boxes, margin)])
            pooled = self.pool(drawn[i : i + 1], rows)
            logits = blend(pooled, said.attention[i, place], margin)
            found.append(replace(instances, logits=logits, margin=margin))
        return found

    def detect(self, boxes: Tensor, scores: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Places, labels and scores of the objects of a picture, best first."""
        chosen = []
        for k in range(len(self.strides)):
            here = (level == k).nonzero()[:, 0]
            flat = torch.where(scores[here] > self.score_threshold, scores[here], 0).flatten()
            best, order = flat.topk(min(self.candidates, len(flat)))
            order = order[best > 0]
            chosen.append(torch.stack([here[order // self.num_classes], order % self.num_classes]))
        place, label = torch.cat(chosen, 1)
        score = scores[place, label]
        if self.box_head.centre is not None:
            score = score.sqrt()  # of two probabilities: again like one
        some = (boxes[place, 2:] > boxes[place, :2]).all(1)
        keep = B.nms_keep(boxes[place], score, label, self.nms) & some
        order = B.top(score, keep, self.detector.detections)
        return place[order], label[order], score[order]


class Towers(nn.Module):
    """FCOS's two towers: classes; boxes, how central a place is, and attention."""

    def __init__(
        self,
        channels: int,
        num_classes: int,
        attention: int,
        num_convs: int,
        groups: int,
        *,
        ranking: bool,
    ) -> None:
        super().__init__()
        self.class_rows = {"classes": 1}
        self.class_convs, self.box_convs = (
            nn.ModuleList(_block(channels, channels, groups) for _ in range(num_convs))
            for _ in range(2)
        )
        self.classes = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.reach = nn.Conv2d(channels, 4, 3, padding=1)
        self.centre = None if ranking else nn.Conv2d(channels, 1, 3, padding=1)
        self.attention = nn.Conv2d(channels, attention, 3, padding=1)
        for layer in (self.classes, self.reach, self.centre, self.attention):
            if layer is not None:
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(cast(Tensor, layer.bias))
        # The focal loss starts with few objects, 0.01 of each class; Rank & Sort only pushes
        # apart. Boxes start with two cells a side: a ReLU of less than 0 would not learn.
        nn.init.constant_(cast(Tensor, self.classes.bias), 0.0 if ranking else -4.595)
        nn.init.ones_(cast(Tensor, self.reach.bias))

    def forward(self, pyramid: Sequence[Tensor]) -> Said:
        """See ``Said``."""
        parts: list[list[Tensor]] = [[], [], [], []]
        for level in pyramid:
            one = other = level
            for conv in self.class_convs:
                one = F.relu(conv(one))
            for conv in self.box_convs:
                other = F.relu(conv(other))
            parts[0].append(_rows(self.classes(one)))
            parts[1].append(_rows(F.relu(self.reach(other))))
            if self.centre is not None:
                parts[2].append(_rows(self.centre(other)))
            parts[3].append(_rows(self.attention(other)))
        logits, reach, centre, attention = (torch.cat(p, 1) if p else None for p in parts)
        assert logits is not None
        assert reach is not None
        assert attention is not None
        return Said(logits, reach, None if centre is None else centre[..., 0], attention)


class Bases(nn.Module):
    """The bottom module: P3 to P5 refined and summed, three convolutions, doubled, two more."""

    def __init__(self, channels: int, width: int, count: int, groups: int) -> None:
        super().__init__()
        self.refine = nn.ModuleList(_block(channels, width, groups) for _ in range(3))
        self.convs = nn.ModuleList(_block(width, width, groups) for _ in range(3))
        self.fine = _block(width, width, groups)
        self.last = nn.Conv2d(width, count, 1)
        nn.init.normal_(self.last.weight, std=0.01)
        nn.init.zeros_(cast(Tensor, self.last.bias))

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        """``[B, bases, h, w]`` of stride 4."""
        x = F.relu(self.refine[0](pyramid[0]))
        for layer, level in zip(list(self.refine)[1:], pyramid[1:3], strict=True):
            x = x + F.interpolate(F.relu(layer(level)), x.shape[-2:], mode="bilinear")
        for layer in self.convs:
            x = F.relu(layer(x))
        x = F.relu(self.fine(F.interpolate(x, scale_factor=2, mode="bilinear")))
        drawn: Tensor = self.last(x)
        return drawn


class Semantic(nn.Module):
    """Classes of pixels from P3, the last one background, for training alone."""

    training_only = True

    def __init__(self, channels: int, width: int, num_classes: int, groups: int) -> None:
        super().__init__()
        self.class_rows = {"logits": 1}
        self.convs = nn.ModuleList(
            _block(width if i else channels, width, groups) for i in range(2)
        )
        self.logits = nn.Conv2d(width, num_classes + 1, 1)
        nn.init.normal_(self.logits.weight, std=0.01)
        nn.init.zeros_(cast(Tensor, self.logits.bias))

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        """Logits ``[B, K + 1, h, w]``."""
        x = pyramid[0]
        for conv in self.convs:
            x = F.relu(conv(x))
        logits: Tensor = self.logits(x)
        return logits

    def loss(self, logits: Tensor, targets: Sequence[Instances]) -> Tensor:
        """Cross-entropy, a mean over pixels; of objects that overlap the smallest counts."""
        size = cast("tuple[int, int]", tuple(logits.shape[-2:]))
        goal = torch.full_like(logits[:, 0], logits.shape[1] - 1, dtype=torch.int64)
        for one, target in zip(goal, targets, strict=True):
            assert target.masks is not None
            order = target.masks.areas().argsort(descending=True, stable=True).to(one.device)
            masks = shrink(target.masks[order], 2 * STRIDE, size)
            for mask, label in zip(masks, target.labels[order], strict=True):
                one[mask > 0] = label
        return F.cross_entropy(logits.float(), goal)


@torch.no_grad()
def assign(places: Places, boxes: Tensor, ranges: Sequence[float]) -> Tensor:
    """The object of each place, ``[M]``, -1 for none; of several the smallest.

    A place belongs to an object around whose box's centre it lies, inside of the box, if its level
    is the one for the longest way from it to a side.

    Args:
        places: see there.
        boxes: ``[G, 4]``.
        ranges: see ``blendmask``.
    """
    index = torch.full_like(places.level, -1)
    if not len(boxes):
        return index
    limits = boxes.new_tensor([-1.0, *ranges, torch.inf])
    low, high = limits[places.level], limits[places.level + 1]
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    smallest = torch.full_like(places.stride, torch.inf)
    for i in range(len(boxes)):  # one by one: all places x all objects would be large
        reach = torch.cat([places.point - boxes[i, :2], boxes[i, 2:] - places.point], 1)
        far = (places.point - middle[i]).abs().amax(1)
        longest = reach.amax(1)
        own = (reach.amin(1) > 0) & (far < RADIUS * places.stride)
        own &= (longest >= low) & (longest <= high)
        area = (boxes[i, 2:] - boxes[i, :2]).prod()
        own &= area < smallest
        index[own] = i
        smallest[own] = area
    return index


def decode(point: Tensor, reach: Tensor, stride: Tensor) -> Tensor:
    """Boxes ``[N, 4]`` from places ``[N, 2]`` and cells ``[N, 4]`` from there to each side."""
    way = reach.float() * stride[:, None]
    return torch.cat([point - way[:, :2], point + way[:, 2:]], 1)


def centerness(point: Tensor, boxes: Tensor) -> Tensor:
    """How central a place in a box is, ``[N]``: 1 in the middle, 0 at a side (FCOS, eq. 3)."""
    before, after = point - boxes[:, :2], boxes[:, 2:] - point
    return (torch.minimum(before, after) / torch.maximum(before, after)).prod(1).sqrt()


def blend(pooled: Tensor, attention: Tensor, margin: float = 0.0) -> Tensor:
    """Mask logits ``[N, S, S]``: bases weighted by attention, which sums to 1 at each cell.

    Args:
        pooled: ``[N, bases, S, S]``, on a grid that spans the box and its margin.
        attention: ``[N, bases * cells]``, on a grid that spans the box.
        margin: share of a box's sides by which the first grid is larger, on every side; there
            the outer cells' attention goes on.
    """
    count, bases, side = pooled.shape[:3]
    cells = round((attention.shape[1] / bases) ** 0.5)
    line = (torch.arange(side, device=pooled.device) + 0.5) / side
    line = (line * (1 + 2 * margin) - margin) * 2 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    grid = torch.stack([x, y], 2).expand(count, -1, -1, -1)
    maps = attention.float().reshape(count, bases, cells, cells)
    weight = F.grid_sample(maps, grid.float(), padding_mode="border", align_corners=False)
    return (pooled * weight.softmax(1).to(pooled.dtype)).sum(1)


def _block(channels: int, width: int, groups: int) -> nn.Sequential:
    """A 3x3 convolution and GroupNorm, of fewer groups where they do not divide the width.

    Two channels a group at least: a level of a small picture may be a single cell.
    """
    norm = nn.GroupNorm(gcd(groups, max(1, width // 2)), width)
    return nn.Sequential(conv3x3(channels, width), norm)


def _rows(x: Tensor) -> Tensor:
    """``[B, h * w, C]``."""
    return x.flatten(2).mT
