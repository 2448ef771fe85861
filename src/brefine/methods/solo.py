"""SOLO (Wang et al., ECCV 2020): no boxes; each cell of a grid has a class and a whole mask.

At every pyramid level the picture is divided into S x S cells. The cell at an object's centre says
its class, and a channel of its own says, all over the picture, which pixels are the object's.
Decoupled, channels are those of rows and columns, and a mask is the product of two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brefine.losses import MASK_LOSSES, balance_tasks, dice, weighted_mean
from brefine.parts import boxes as B
from brefine.parts.backbone import Backbone
from brefine.parts.mask_head import MaskLoss
from brefine.parts.masks import boxes_around, shrink
from brefine.parts.one_stage import Detector, focal, number, rank
from brefine.ranges import Positive
from brefine.structures import Bitmaps, Images, Instances

#: pixels a cell of the features that each level predicts from; masks have twice as many
STRIDES = (8, 8, 16, 32, 32)
Range = tuple[float, float]


def solo(
    num_classes: int,
    *,
    backbone: str = "resnet50",
    channels: Positive = 256,
    width: int = 256,
    num_convs: int = 7,
    groups: int = 32,
    grids: tuple[int, int, int, int, int] = (40, 36, 24, 16, 12),
    ranges: tuple[Range, Range, Range, Range, Range] = (
        (1, 96), (48, 192), (96, 384), (192, 768), (384, 2048)
    ),
    centre: float = 0.2,
    owner: Literal["smallest", "last"] = "smallest",
    decoupled: bool = False,
    mask_loss: MaskLoss = "dice",
    mask_weight: float = 3.0,
    score_threshold: float = 0.1,
    candidates: int = 500,
    sigma: float = 2.0,
    least_score: float = 0.05,
    ranking: bool = False,
    detector: Detector = Detector(),
) -> SOLO:  # fmt: skip
    """SOLO, or Decoupled SOLO.

    Args:
        num_classes: K.
        backbone: a timm name.
        channels: of the pyramid.
        width: of both branches.
        num_convs: 3x3 convolutions of each branch before its last one.
        groups: of the branches' GroupNorm; fewer where they do not divide ``width``.
        grids: S of each level.
        ranges: root areas of objects' boxes, in pixels, that a level learns, both ends included.
        centre: share of an object's box, around its centre of mass, whose cells are its own.
        owner: which of several objects has a cell; "last", in the order of the labels, is
            MMDetection's.
        decoupled: masks are products of two maps instead of one of S * S.
        mask_loss: a name of ``losses.MASK_LOSSES``, over the picture; "dice" is not smoothed here.
        mask_weight: of the mask loss, unless ranking.
        score_threshold: of the class, before a mask is looked at.
        candidates: masks that enter Matrix NMS, at most.
        sigma: of Matrix NMS's Gaussian.
        least_score: of objects after it.
        ranking: Rank & Sort with the balance (eq. 3-6 of BRefine), by the IoU of masks.
        detector: options of the trunk and of ranking.

    Raises:
        InputError: an unknown backbone.
    """
    trunk = Backbone(
        backbone, channels, norm=detector.norm, frozen_stages=detector.frozen_stages,
        fpn_norm=detector.fpn_norm,
    )  # fmt: skip
    head = (DecoupledMaskHead if decoupled else MaskHead)(
        channels, width, grids, num_convs=num_convs, groups=groups
    )
    classes = ClassHead(
        channels, width, num_classes, grids, num_convs=num_convs, groups=groups,
        # The focal loss starts with few objects; Rank & Sort only pushes apart.
        prior=0.5 if ranking else 0.01,
    )  # fmt: skip
    return SOLO(
        num_classes,
        trunk,
        classes,
        head,
        grids=grids,
        ranges=ranges,
        centre=centre,
        owner=owner,
        criterion=partial(dice, smooth=0.0) if mask_loss == "dice" else MASK_LOSSES[mask_loss],
        mask_weight=mask_weight,
        score_threshold=score_threshold,
        candidates=candidates,
        sigma=sigma,
        least_score=least_score,
        ranking=ranking,
        detector=detector,
    )


class Cells(NamedTuple):
    """Cells of one level that belong to an object, ``[P]`` int64 each."""

    image: Tensor
    cell: Tensor  #: row * S + column
    object: Tensor  #: within its picture


class SOLO(nn.Module):
    """The flow: pyramid, two branches, cells that learn, cells that speak."""

    def __init__(
        self,
        num_classes: int,
        trunk: Backbone,
        class_head: ClassHead,
        mask_head: MaskHead | DecoupledMaskHead,
        *,
        grids: Sequence[int],
        ranges: Sequence[Range],
        centre: float,
        owner: str,
        criterion: Callable[[Tensor, Tensor], Tensor],
        mask_weight: float,
        score_threshold: float,
        candidates: int,
        sigma: float,
        least_score: float,
        ranking: bool,
        detector: Detector,
    ) -> None:
        super().__init__()
        self.num_classes, self.grids, self.ranges = num_classes, grids, ranges
        self.centre, self.owner = centre, owner
        self.criterion, self.mask_weight = criterion, mask_weight
        self.score_threshold, self.candidates = score_threshold, candidates
        self.sigma, self.least_score = sigma, least_score
        self.ranking, self.detector = ranking, detector
        self.trunk, self.class_head, self.mask_head = trunk, class_head, mask_head

    def loss(self, images: Images, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """See ``Segmenter``."""
        pyramid = self.trunk(images)
        maps, classes = self.mask_head(pyramid), self.class_head(pyramid)
        frame = cast("tuple[int, int]", tuple(images.pixels.shape[-2:]))
        cells = self.assign(targets, frame)
        logits, place, labels, mask, quality = [], [], [], [], []
        before = 0
        for k, (one, level) in enumerate(zip(cells, classes, strict=True)):
            drawn = self.mask_head.read(k, maps[k], one.image, one.cell)
            size = drawn.shape[-2], drawn.shape[-1]
            truth = _shrink_all(targets, one, STRIDES[k] // 2, size)
            mask.append(self.criterion(drawn, truth))
            quality.append(_iou(drawn.detach() > 0, truth > 0))
            logits.append(level.flatten(2).mT.flatten(0, 1))  # [B * S * S, K]
            place.append(before + one.image * self.grids[k] ** 2 + one.cell)
            before += len(logits[-1])
            every = [target.labels for target in targets]
            start = torch.tensor([0, *(len(e) for e in every)], device=one.image.device).cumsum(0)
            labels.append(torch.cat(every)[start[one.image] + one.object])
        logit, where, each = torch.cat(logits), torch.cat(place), torch.cat(mask)
        label, delta = torch.cat(labels), self.detector.delta
        if self.ranking:
            named = rank(logit, where, label, torch.cat(quality), delta=delta)
        else:
            named = {"cls": focal(logit, where, label) / number(where, more=1)}
        score = logit.detach()[where].float().sigmoid().amax(1)
        weights = score if self.ranking else torch.ones_like(each)
        loss = weighted_mean(each, weights) * (1.0 if self.ranking else self.mask_weight)
        floor = self.detector.balance_floor
        return balance_tasks(named, [{"mask": loss}], ranking=self.ranking, floor=floor)

    @torch.no_grad()
    def assign(self, targets: Sequence[Instances], frame: tuple[int, int]) -> list[Cells]:
        """The cells of each level that learn an object."""
        found: list[list[Tensor]] = [[] for _ in self.grids]
        for i, target in enumerate(targets):
            assert target.masks is not None
            middle = _centres(target.masks)
            extent = (target.boxes[:, 2:] - target.boxes[:, :2]).cpu().double()
            root = extent.prod(1).sqrt()
            order = list(range(len(target)))
            if self.owner == "smallest":
                order = root.argsort(descending=True, stable=True).tolist()
            whole = torch.tensor([frame[1], frame[0]], dtype=torch.float64)
            for k, (side, (low, high)) in enumerate(zip(self.grids, self.ranges, strict=True)):
                owner = torch.full((side, side), -1)
                # Cells of the centre, and of the corners of the part around it, [N, 2] (x, y).
                reach = self.centre / 2 * extent
                cell = (middle / whole * side).floor()
                first = torch.maximum(((middle - reach) / whole * side).floor(), cell - 1)
                last = torch.minimum(((middle + reach) / whole * side).floor(), cell + 1)
                first, last = first.clamp(min=0), last.clamp(max=side - 1)
                for j in order:
                    if low <= root[j] <= high and middle[j].isfinite().all():
                        (x1, y1), (x2, y2) = first[j].int().tolist(), last[j].int().tolist()
                        owner[y1 : y2 + 1, x1 : x2 + 1] = j
                cells = (owner.flatten() >= 0).nonzero()[:, 0]
                found[k].append(
                    torch.stack([torch.full_like(cells, i), cells, owner.flatten()[cells]])
                )
        device = targets[0].boxes.device
        return [Cells(*torch.cat(level, 1).to(device)) for level in found]

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
        """See ``Segmenter``. Given boxes get the mask of the cell at their centre.

        Masks of objects that are detected end nowhere: the boxes are those around them.
        """
        pyramid = self.features(images) if features is None else features
        maps = self.mask_head(pyramid)
        classes = [logits.float().sigmoid() for logits in self.class_head(pyramid)]
        height, width = images.pixels.shape[-2:]
        span = classes[0].new_tensor([0, 0, width, height])
        found = []
        for i, size in enumerate(images.sizes):
            mine = [level[i] for level in classes]
            if given is None:
                labels, scores, drawn = self._detect(maps, mine, i)
                logits = drawn.logit(1e-6)
                boxes = B.clip(boxes_around(logits, span), size)
                frame = (int(size[0]), int(size[1]))
                instances = Instances(frame, boxes, labels, scores)
            else:
                instances = given[i]
                level, cell = self._locate(mine, instances, (height, width))
                logits = self._draw(maps, i, level, cell).logit(1e-6)
            spans = span.expand(len(instances), 4)
            instances = replace(instances, logits=logits, spans=spans, margin=margin)
            seen = (instances.boxes[:, 2:] > instances.boxes[:, :2]).all(1)
            found.append(instances if given is not None else instances[seen])
        return found

    def _detect(
        self, maps: Sequence[Tensor], classes: Sequence[Tensor], image: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Labels, scores and mask probabilities ``[N, h, w]`` of a picture, best first."""
        levels, cells, labels, scores = [], [], [], []
        for k, level in enumerate(classes):
            score = _peaks(level).flatten(1).mT  # [S * S, K]
            cell, label = (score > self.score_threshold).nonzero(as_tuple=True)
            levels.append(torch.full_like(cell, k))
            cells.append(cell)
            labels.append(label)
            scores.append(score[cell, label])
        score = torch.cat(scores)
        # A mask is looked at before it is known how good it is: not at any number of them.
        order = B.top(score, torch.ones_like(score, dtype=torch.bool), 4 * self.candidates)
        level, cell, label = torch.cat(levels)[order], torch.cat(cells)[order], torch.cat(labels)
        label, score = label[order], score[order]
        drawn = self._draw(maps, image, level, cell)
        inside = drawn > 0.5
        area = inside.flatten(1).sum(1)
        score = score * (drawn * inside).flatten(1).sum(1) / area.clamp(min=1)
        large = area > torch.tensor(STRIDES, device=area.device)[level]
        order = B.top(score, large, self.candidates)
        label, drawn = label[order], drawn[order]
        score = score[order] * matrix_nms(inside[order], label, self.sigma)
        order = B.top(score, score >= self.least_score, self.detector.detections)
        return label[order], score[order], drawn[order]

    def _locate(
        self, classes: Sequence[Tensor], given: Instances, frame: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Level and cell ``[N]`` of known boxes: of levels for their size the surest of the label.

        ``frame`` is the (height, width) that the grids divide.
        """
        limits = given.boxes.new_tensor(self.ranges)
        root = (given.boxes[:, 2:] - given.boxes[:, :2]).clamp(min=0).prod(1).sqrt()
        root = root.clamp(float(limits.min()), float(limits.max()))[:, None]
        fits = (root >= limits[:, 0]) & (root <= limits[:, 1])
        whole = given.boxes.new_tensor([frame[1], frame[0]])
        middle = (given.boxes[:, :2] + given.boxes[:, 2:]) / 2 / whole
        cells, scores = [], []
        for side, level in zip(self.grids, classes, strict=True):
            x, y = (middle * side).long().clamp(0, side - 1).unbind(1)
            cells.append(y * side + x)
            scores.append(level[given.labels, y, x])
        best = torch.where(fits, torch.stack(scores, 1), -1).argmax(1)
        return best, torch.stack(cells, 1).gather(1, best[:, None])[:, 0]

    def _draw(self, maps: Sequence[Tensor], image: int, level: Tensor, cell: Tensor) -> Tensor:
        """Mask probabilities ``[N, h, w]`` of cells of a picture, on the first level's grid."""
        size = self.mask_head.size(maps[0])
        drawn = maps[0].new_zeros(len(cell), *size, dtype=torch.float32)
        for k in range(len(maps)):
            here = (level == k).nonzero()[:, 0]
            if len(here):
                of = torch.full_like(here, image)
                drawn[here] = self.mask_head.draw(k, maps[k], of, cell[here], size)
        return drawn


class ClassHead(nn.Module):
    """Features shrunk to S x S cells, convolutions, and the class of each cell."""

    mmdetection = (
        (r"mask_head\.cls_convs\.(\d)\.conv\.", r"class_head.convs.\1.0."),
        (r"mask_head\.cls_convs\.(\d)\.gn\.", r"class_head.convs.\1.1."),
        (r"mask_head\.conv_cls\.", "class_head.logits."),
    )

    def __init__(
        self, channels: int, width: int, num_classes: int, grids: Sequence[int],
        *, num_convs: int, groups: int, prior: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.grids, self.class_rows = grids, {"logits": 1}
        self.convs = _stack(channels, width, num_convs, groups)
        self.logits = nn.Conv2d(width, num_classes, 3, padding=1)
        nn.init.normal_(self.logits.weight, std=0.01)
        nn.init.constant_(cast(Tensor, self.logits.bias), math.log(prior / (1 - prior)))

    def forward(self, pyramid: Sequence[Tensor]) -> list[Tensor]:
        """Logits ``[B, K, S, S]`` of each level."""
        return [
            self.logits(_run(self.convs, F.interpolate(x, (side, side), mode="bilinear")))
            for x, side in zip(_levels(pyramid), self.grids, strict=True)
        ]


class MaskHead(nn.Module):
    """Features with their coordinates, convolutions, and a mask for each cell.

    Of the last layer's S * S channels only those of cells that are asked for are computed, before
    the upsampling, which a 1x1 convolution may change places with.
    """

    mmdetection = (
        (r"mask_head\.mask_convs\.(\d)\.conv\.", r"mask_head.convs.\1.0."),
        (r"mask_head\.mask_convs\.(\d)\.gn\.", r"mask_head.convs.\1.1."),
        (r"mask_head\.conv_mask_list\.(\d)\.", r"mask_head.logits.\1."),
    )

    def __init__(
        self, channels: int, width: int, grids: Sequence[int], *, num_convs: int, groups: int
    ) -> None:
        super().__init__()
        self.convs = _stack(channels + 2, width, num_convs, groups)
        self.logits = nn.ModuleList(_last(width, side**2, 1) for side in grids)

    def forward(self, pyramid: Sequence[Tensor]) -> list[Tensor]:
        """Features ``[B, C, h, w]`` of each level."""
        return [_run(self.convs, _add_place(x, "xy")) for x in _levels(pyramid)]

    def read(self, level: int, features: Tensor, image: Tensor, cell: Tensor) -> Tensor:
        """Mask logits ``[P, 2 h, 2 w]`` of cells of a level."""
        layer = cast(nn.Conv2d, self.logits[level])
        assert layer.bias is not None
        weight, bias = layer.weight[cell, :, 0, 0], layer.bias[cell]
        drawn = [features.new_zeros(0, features[0, 0].numel())]  # image by image, in order
        drawn += [weight[image == i].to(x.dtype) @ x.flatten(1) for i, x in enumerate(features)]
        flat = torch.cat(drawn) + bias[:, None]
        logits = flat.view(-1, 1, *features.shape[2:])
        return _double(logits)[:, 0]

    def draw(
        self, level: int, features: Tensor, image: Tensor, cell: Tensor, size: tuple[int, int]
    ) -> Tensor:
        """Mask probabilities ``[P, *size]`` of cells of a level."""
        return _resize(self.read(level, features, image, cell), size)

    def size(self, features: Tensor) -> tuple[int, int]:
        """(height, width) of the masks that features give."""
        return 2 * features.shape[-2], 2 * features.shape[-1]


class DecoupledMaskHead(nn.Module):
    """A map for each column and one for each row of the grid; a mask is the product of two."""

    mmdetection = (
        (r"mask_head\.mask_convs_([xy])\.(\d)\.conv\.", r"mask_head.\1.\2.0."),
        (r"mask_head\.mask_convs_([xy])\.(\d)\.gn\.", r"mask_head.\1.\2.1."),
        (r"mask_head\.conv_mask_list_([xy])\.(\d)\.", r"mask_head.\1_logits.\2."),
    )

    def __init__(
        self, channels: int, width: int, grids: Sequence[int], *, num_convs: int, groups: int
    ) -> None:
        super().__init__()
        self.x = _stack(channels + 1, width, num_convs, groups)
        self.y = _stack(channels + 1, width, num_convs, groups)
        self.x_logits = nn.ModuleList(_last(width, side, 3) for side in grids)
        self.y_logits = nn.ModuleList(_last(width, side, 3) for side in grids)

    def forward(self, pyramid: Sequence[Tensor]) -> list[Tensor]:
        """Logits ``[B, 2 S, h, w]`` of each level: of the columns, then of the rows."""
        maps = []
        for k, level in enumerate(_levels(pyramid)):
            x = self.x_logits[k](_double(_run(self.x, _add_place(level, "x"))))
            y = self.y_logits[k](_double(_run(self.y, _add_place(level, "y"))))
            maps.append(torch.cat([x, y], 1))
        return maps

    def read(self, level: int, maps: Tensor, image: Tensor, cell: Tensor) -> Tensor:
        """Logits ``[P, h, w]`` of the products for cells of a level.

        1 / (sigmoid(x) sigmoid(y)) - 1 is the sum of three exponentials.
        """
        x, y = self._pair(maps, image, cell)
        return -torch.stack([-x, -y, -x - y]).logsumexp(0)

    def draw(
        self, level: int, maps: Tensor, image: Tensor, cell: Tensor, size: tuple[int, int]
    ) -> Tensor:
        """Mask probabilities ``[P, *size]`` of cells of a level."""
        x, y = self._pair(maps, image, cell)
        return _resize(x, size) * _resize(y, size)

    def size(self, maps: Tensor) -> tuple[int, int]:
        """(height, width) of the masks that maps give."""
        return maps.shape[-2], maps.shape[-1]

    def _pair(self, maps: Tensor, image: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        side = maps.shape[1] // 2
        return maps[image, cell % side], maps[image, side + cell // side]


def matrix_nms(masks: Tensor, labels: Tensor, sigma: float) -> Tensor:
    """What Matrix NMS multiplies scores by (SOLOv2, section 3.3, with the Gaussian), ``[N]``.

    A mask decays by its overlap with the better ones of its class, each counting as much as it is
    itself not overlapped.

    Args:
        masks: ``[N, h, w]`` bool, best score first.
        labels: ``[N]``.
        sigma: of the Gaussian.
    """
    if not len(masks):
        return masks.new_zeros(0, dtype=torch.float32)
    flat = masks.flatten(1).float()
    shared, area = flat @ flat.T, flat.sum(1)
    iou = shared / (area[:, None] + area - shared).clamp(min=1)
    iou = iou.triu(1) * (labels[:, None] == labels)
    worst = iou.amax(0)[:, None]  # of the better mask, with those above it
    return (-sigma * (iou**2 - worst**2)).exp().amin(0)


def _levels(pyramid: Sequence[Tensor]) -> list[Tensor]:
    """Features at ``STRIDES``: the finest and the coarsest level are resized."""
    first = F.interpolate(pyramid[0], scale_factor=0.5, mode="bilinear")
    last = F.interpolate(pyramid[4], pyramid[3].shape[-2:], mode="bilinear")
    return [first, *pyramid[1:4], last]


def _stack(channels: int, width: int, count: int, groups: int) -> nn.ModuleList:
    """3x3 convolutions with GroupNorm; a ReLU follows each."""
    layers = nn.ModuleList()
    for i in range(count):
        conv = nn.Conv2d(width if i else channels, width, 3, padding=1, bias=False)
        nn.init.normal_(conv.weight, std=0.01)
        layers.append(nn.Sequential(conv, nn.GroupNorm(math.gcd(groups, width), width)))
    return layers


def _last(width: int, count: int, kernel: int) -> nn.Conv2d:
    layer = nn.Conv2d(width, count, kernel, padding=kernel // 2)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(cast(Tensor, layer.bias))
    return layer


def _run(layers: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in layers:
        x = F.relu(layer(x))
    return x


def _add_place(x: Tensor, axes: str) -> Tensor:
    """Channels with the place of each pixel, -1 to 1, after those of ``x``."""
    height, width = x.shape[-2:]
    place = {
        "x": torch.linspace(-1, 1, width, device=x.device)[None].expand(height, -1),
        "y": torch.linspace(-1, 1, height, device=x.device)[:, None].expand(-1, width),
    }
    more = torch.stack([place[axis] for axis in axes]).to(x.dtype)
    return torch.cat([x, more.expand(len(x), -1, -1, -1)], 1)


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear")


def _resize(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Probabilities ``[N, *size]`` of logits ``[N, h, w]``."""
    drawn = logits.float().sigmoid()
    if drawn.shape[1:] == size:
        return drawn
    return F.interpolate(drawn[:, None], size, mode="bilinear")[:, 0]


def _peaks(scores: Tensor) -> Tensor:
    """``[K, S, S]`` with 0 for a cell that one of its neighbours above and to the left beats."""
    best = F.max_pool2d(scores, 2, stride=1, padding=1)[:, :-1, :-1]
    return torch.where(scores == best, scores, 0)


def _iou(one: Tensor, other: Tensor) -> Tensor:
    """IoU ``[N]`` of masks ``[N, h, w]``, bool."""
    both, either = (m.flatten(1).sum(1) for m in (one & other, one | other))
    return both / either.clamp(min=1)


def _centres(masks: Bitmaps) -> Tensor:
    """Centres of mass ``[N, 2]`` (x, y), float64 on the CPU; NaN for a mask without a pixel.

    Of pixels' numbers, so half a pixel before that of their centres: the authors' code has it so.
    """
    found, masks = [], masks.to("cpu")
    for window, (x, y) in zip(masks.windows, masks.origins.tolist(), strict=True):
        pixels = window.double()
        columns, rows = pixels.sum(0), pixels.sum(1)
        right = columns @ (torch.arange(len(columns)) + x).double()
        down = rows @ (torch.arange(len(rows)) + y).double()
        found.append(torch.stack([right, down]) / pixels.sum())
    return torch.stack(found) if found else torch.zeros(0, 2, dtype=torch.float64)


def _shrink_all(
    targets: Sequence[Instances], cells: Cells, factor: int, size: tuple[int, int]
) -> Tensor:
    """The masks of the objects of cells, ``[P, *size]`` float, 0 or 1."""
    truth = [torch.zeros(0, *size, device=cells.image.device)]
    for i, target in enumerate(targets):
        index, again = torch.unique(cells.object[cells.image == i], return_inverse=True)
        assert target.masks is not None
        truth.append(shrink(target.masks[index], factor, size)[again])
    return torch.cat(truth)
