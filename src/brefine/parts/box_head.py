"""Box head: two fully connected layers, then classes and class-specific boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brefine import losses
from brefine.parts import boxes as B
from brefine.parts import roi, together
from brefine.structures import Instances

DELTA_WEIGHTS = (10.0, 10.0, 5.0, 5.0)


@dataclass(frozen=True)
class RoIs:
    """Proposals of a batch with what they should become.

    Attributes:
        rows: ``[R, 5]`` (image index, xyxy pixels).
        labels: ``[R]`` int64, K for background.
        index: ``[R]`` int64, the object within its picture; arbitrary for background.
        truth: ``[R, 4]`` box of that object.
        source: ``[R]`` int64, which of all proposals it was; -1 for an object's own box.
    """

    rows: Tensor
    labels: Tensor
    index: Tensor
    truth: Tensor
    source: Tensor


class Round(NamedTuple):
    """What a box head learnt, and from what the mask head learns beside it.

    Attributes:
        classes: classification losses by name.
        box: the box loss.
        rois: that the mask head learns from.
        scores: ``[R]`` of these RoIs, detached; eq. 6 weighs the box and mask losses with them.
        weight: of all losses of this round.
    """

    classes: dict[str, Tensor]
    box: Tensor
    rois: RoIs
    scores: Tensor
    weight: float = 1.0


class Boxes(Protocol):
    """What TwoStage wants of a box head; see ``BoxHead``."""

    num_classes: int
    score_threshold: float
    nms: float
    detections: int

    def rounds(
        self, features: Sequence[Tensor], proposals: Sequence[Tensor], targets: Sequence[Instances]
    ) -> Sequence[Round]:
        """Losses, round by round: a cascade has several."""
        ...

    def score(
        self, features: Sequence[Tensor], rows: Tensor, limits: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scores ``[R, K]`` and boxes ``[R, K, 4]`` of RoIs ``[R, 5]``.

        ``limits [R, 4]`` are (width, height, width, height) of each RoI's picture.
        """
        ...


class BoxHead(nn.Module):
    """Classes and boxes of RoIs.

    Args:
        channels: of the pyramid.
        num_classes: K.
        strides: of the four levels that are pooled from.
        convention: see ``boxes.Convention``.
        ranking: sigmoid over K classes with Rank & Sort over all proposals (eq. 3-4) and GIoU
            weighted by the scores (eq. 6); otherwise softmax over K + 1 classes, background
            last, and smooth L1, over a sample.
        delta: half width of Rank & Sort's ramp.
        samples: RoIs a picture for softmax, a quarter of them positive at most; None: all.
        hidden: width of the two fully connected layers.
        finest: see ``roi.level``.
        add_truth: the objects' own boxes join the proposals in training.
        agnostic: one box for all classes instead of one for each.
        delta_weights: that deltas are multiplied with, see ``boxes.encode``.
        iou: from which a proposal is an object's.
        beta: where smooth L1 turns linear; None: the convention's.
        pool: ``(features, rois, size)`` to ``[R, C, size, size]``; None: RoIAlign from the level
            that fits.
        score_threshold: detections at or below it are dropped.
        nms: IoU threshold of the class-wise NMS.
        detections: kept a picture.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        strides: Sequence[int],
        convention: B.Convention,
        *,
        ranking: bool = False,
        delta: float = 0.5,
        samples: int | None = 512,
        hidden: int = 1024,
        finest: float = 56.0,
        add_truth: bool = True,
        agnostic: bool = False,
        delta_weights: Sequence[float] = DELTA_WEIGHTS,
        iou: float = 0.5,
        beta: float | None = None,
        pool: roi.Pool | None = None,
        score_threshold: float = 0.05,
        nms: float = 0.5,
        detections: int = 100,
    ) -> None:
        super().__init__()
        self.num_classes, self.strides, self.convention = num_classes, tuple(strides), convention
        self.ranking, self.delta, self.samples = ranking, delta, samples
        self.add_truth, self.iou = add_truth, iou
        self.delta_weights = tuple(delta_weights)
        self.beta = convention.beta if beta is None else beta
        self.pool = pool or roi.Pooling(self.strides, convention, finest)
        self.score_threshold, self.nms, self.detections = score_threshold, nms, detections
        self.fc1 = nn.Linear(channels * 49, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.classes = nn.Linear(hidden, num_classes if ranking else num_classes + 1)
        self.deltas = nn.Linear(hidden, 4 if agnostic else num_classes * 4)
        self.class_rows = {"classes": 1} if agnostic else {"classes": 1, "deltas": 4}
        for layer, std in ((self.classes, 0.01), (self.deltas, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        for layer in (self.fc1, self.fc2):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Sequence[Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits ``[R, K (+ 1)]`` and deltas ``[R, K or 1, 4]`` of RoIs ``[R, 5]``."""
        pooled = self.pool(features, rows, 7)
        hidden = F.relu(self.fc2(F.relu(self.fc1(pooled.flatten(1)))))
        deltas: Tensor = self.deltas(hidden)
        return self.classes(hidden), deltas.view(-1, self.deltas.out_features // 4, 4)

    @torch.no_grad()
    def sample(self, proposals: Sequence[Tensor], targets: Sequence[Instances]) -> RoIs:
        """Match proposals with objects; take all (ranking) or a sample of them."""
        boxes, labels, index, truth, source = [], [], [], [], []
        before = 0
        for proposal, target in zip(proposals, targets, strict=True):
            box = torch.cat([proposal, target.boxes]) if self.add_truth else proposal
            place = torch.arange(len(box), device=box.device)
            place = torch.where(place < len(proposal), place + before, -1)
            before += len(proposal)
            match = B.match(box, target.boxes, self.iou, self.iou)
            if not self.ranking:
                chosen = B.sample((match >= 0).long(), self.samples, 0.25)
                box, match, place = box[chosen], match[chosen], place[chosen]
            # One extra row stands for background, so pictures without objects need no branch.
            background = target.labels.new_tensor([self.num_classes])
            slot = torch.where(match >= 0, match, len(target))
            boxes.append(box)
            labels.append(torch.cat([target.labels, background])[slot])
            truth.append(torch.cat([target.boxes, box.new_tensor([[0.0, 0, 1, 1]])])[slot])
            index.append(match)
            source.append(place)
        return RoIs(
            roi.rows(boxes),
            torch.cat(labels),
            torch.cat(index),
            torch.cat(truth),
            torch.cat(source),
        )

    def rounds(
        self, features: Sequence[Tensor], proposals: Sequence[Tensor], targets: Sequence[Instances]
    ) -> list[Round]:
        """See ``Boxes``: the only one there is."""
        rois = self.sample(proposals, targets)
        named, box, scores = self.loss(rois, *self(features, rois.rows))
        return [Round(named, box, rois, scores)]

    def loss(
        self, rois: RoIs, logits: Tensor, deltas: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Classification losses by name, the box loss, and each RoI's score ``[R]``, detached.

        The score is the best class's; eq. 6 weighs the box and mask losses with it. ``logits``
        and ``deltas`` are what `forward` gives for the RoIs.
        """
        positive = (rois.labels < self.num_classes).nonzero()[:, 0]
        label, anchor, goal = rois.labels[positive], rois.rows[positive, 1:], rois.truth[positive]
        delta = deltas[positive, label if deltas.shape[1] > 1 else 0]
        if not self.ranking:
            cls = F.cross_entropy(logits.float(), rois.labels, reduction="sum")
            encoded = B.encode(goal, anchor, self.delta_weights)
            box = B.l1(delta, encoded, self.beta)
            count = together.mean(rois.rows.new_tensor(len(rois.rows))).clamp(min=1)
            score = logits.detach().float().softmax(1)[:, :-1].amax(1)
            return {"cls": cls / count}, box / count, score
        decoded = B.decode(delta, anchor, self.delta_weights)
        quality = torch.zeros_like(logits, dtype=torch.float32)
        quality[positive, label] = B.paired_iou(decoded.detach(), goal).clamp(min=1e-6)
        ranking, sorting = losses.rank_sort(logits, quality, delta=self.delta)
        score = logits.detach().float().sigmoid().amax(1)
        box = losses.weighted_mean(losses.giou(decoded, goal), score[positive])
        return {"cls_rank": ranking, "cls_sort": sorting}, box, score

    def score(
        self, features: Sequence[Tensor], rows: Tensor, limits: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See ``Boxes``."""
        logits, deltas = self(features, rows)
        boxes = self.refine(rows, deltas, limits)
        return self.probability(logits), boxes.expand(-1, self.num_classes, -1)

    def probability(self, logits: Tensor) -> Tensor:
        """Scores ``[R, K]`` from class logits."""
        logits = logits.float()
        return logits.sigmoid() if self.ranking else logits.softmax(1)[:, :-1]

    def refine(self, rows: Tensor, deltas: Tensor, limits: Tensor) -> Tensor:
        """Boxes ``[R, K or 1, 4]`` inside their pictures; ``limits`` as in `score`."""
        boxes = B.decode(deltas, rows[:, None, 1:], self.delta_weights)
        return torch.minimum(boxes.clamp(min=0), limits[:, None])


def detect(
    head: Boxes, features: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Tensor
) -> list[Instances]:
    """Detections of each picture after class-wise NMS, best first."""
    rows = roi.rows(proposals)
    scores, boxes = head.score(features, rows, roi.limits(rows, sizes))
    counts = [len(proposal) for proposal in proposals]
    found = []
    for box, score, size in zip(
        torch.split(boxes, counts), torch.split(scores, counts), sizes, strict=True
    ):
        box = box.flatten(0, 1)
        label = torch.arange(head.num_classes, device=box.device).repeat(len(score))
        score = score.flatten()
        good = (score > head.score_threshold) & (box[:, 2:] - box[:, :2] >= 1e-2).all(1)
        # NMS is quadratic: drop what cannot win
        box, label, score, good = box[good], label[good], score[good], good[good]
        order = B.top(score, B.nms_keep(box, score, label, head.nms) & good, head.detections)
        frame = (int(size[0]), int(size[1]))
        found.append(Instances(frame, box[order], label[order], score[order]))
    return found
