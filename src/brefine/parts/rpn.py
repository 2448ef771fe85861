"""Region proposal network (Ren et al. 2015), trained with BCE or with Rank & Sort."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brefine import losses
from brefine.parts import boxes as B
from brefine.parts import together
from brefine.structures import Instances


class RPN(nn.Module):
    """Objectness and box deltas for three anchors a cell on every level.

    Args:
        channels: of the pyramid.
        strides: pixels a cell of each level.
        convention: see ``boxes.Convention``.
        ranking: Rank & Sort over all anchors (eq. 3-4), GIoU weighted by the scores (eq. 6);
            otherwise BCE and smooth L1 over a sample.
        delta: half width of Rank & Sort's ramp.
        samples: anchors a picture for BCE, at most half of them positive; None: all.
        candidates: best-scored anchors a level that enter NMS, (training, prediction).
        proposals: kept after NMS a picture, (training, prediction).
        scale: side of the square anchor in cells.
        low_quality: IoU from which an object's best anchors are positive if none reaches 0.7.
        delta_weights: what deltas are multiplied with, see ``boxes.encode``.
    """

    def __init__(
        self,
        channels: int,
        strides: Sequence[int],
        convention: B.Convention,
        *,
        ranking: bool = False,
        delta: float = 0.5,
        samples: int | None = 256,
        candidates: tuple[int, int] = (2000, 1000),
        proposals: tuple[int, int] = (1000, 1000),
        scale: float = 8.0,
        low_quality: float = 0.0,
        delta_weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        self.low_quality, self.delta_weights = low_quality, tuple(delta_weights)
        self.strides, self.convention = tuple(strides), convention
        self.ranking, self.delta, self.samples = ranking, delta, samples
        self.candidates, self.proposals, self.scale = candidates, proposals, scale
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness = nn.Conv2d(channels, 3, 1)
        self.deltas = nn.Conv2d(channels, 12, 1)
        for layer in (self.conv, self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(
        self, features: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Anchors ``[A_l, 4]``, logits ``[B, A_l]`` and deltas ``[B, A_l, 4]`` of every level."""
        anchors = B.anchors(
            [feature.shape[-2:] for feature in features],
            self.strides,
            features[0].device,
            scale=self.scale,
            rounded=self.convention.round_anchors,
        )
        logits, deltas = [], []
        for feature in features:
            hidden = F.relu(self.conv(feature))
            # (row, column, anchor) order, like the anchors
            logits.append(self.objectness(hidden).permute(0, 2, 3, 1).flatten(1))
            delta = self.deltas(hidden).permute(0, 2, 3, 1)
            deltas.append(delta.reshape(feature.shape[0], -1, 4))
        return anchors, logits, deltas

    @torch.no_grad()
    def propose(
        self,
        anchors: Sequence[Tensor],
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        sizes: Tensor,
        *,
        training: bool,
    ) -> list[Tensor]:
        """Proposals of each picture, ``[n, 4]``, best first, after NMS at 0.7 within a level."""
        phase = 0 if training else 1
        candidates: list[list[Tensor]] = []
        for of_level, (anchor, logit, delta) in enumerate(
            zip(anchors, logits, deltas, strict=True)
        ):
            score, index = logit.topk(min(self.candidates[phase], logit.shape[1]), 1)
            chosen_deltas = delta.gather(1, index[..., None].expand(-1, -1, 4))
            decoded = B.decode(chosen_deltas, anchor[index], self.delta_weights)
            candidates.append([decoded, score.float().sigmoid(), torch.full_like(index, of_level)])
        boxes, scores, levels = (torch.cat(parts, 1) for parts in zip(*candidates, strict=True))
        chosen = []
        for box, score, group, size in zip(boxes, scores, levels, sizes, strict=True):
            box = B.clip(box, size)
            large = (box[:, 2:] - box[:, :2] >= 1e-3).all(1)
            keep = B.nms_keep(box, score, group, 0.7) & large
            chosen.append(box[B.top(score, keep, self.proposals[phase])])
        return chosen

    def loss(
        self,
        anchors: Sequence[Tensor],
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        targets: Sequence[Instances],
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Classification losses by name, and the box loss (eq. 6 when ranking), a scalar."""
        anchor, logit, delta = (
            torch.cat(list(anchors)),
            torch.cat(list(logits), 1),
            torch.cat(list(deltas), 1),
        )
        labels, truth = [], []
        for target in targets:
            index = B.match(anchor, target.boxes, 0.7, 0.3, low_quality=self.low_quality)
            labels.append((index >= 0).long() - (index == B.BETWEEN).long())
            truth.append(_rows(target.boxes, index))
        if self.ranking:
            return self._ranking_loss(anchor, logit, delta, torch.stack(labels), torch.stack(truth))
        picked = [
            B.sample(label, self.samples, 0.5) + i * len(anchor) for i, label in enumerate(labels)
        ]
        index, label = torch.cat(picked), torch.cat(labels)
        count = together.mean(logit.new_tensor(len(index), dtype=torch.float32)).clamp(min=1)
        positive = index[label[index] > 0]
        goal = B.encode(
            torch.cat(truth)[positive], anchor[positive % len(anchor)], self.delta_weights
        )
        box = B.l1(delta.flatten(0, 1)[positive], goal, self.convention.beta) / count
        objectness = F.binary_cross_entropy_with_logits(
            logit.flatten()[index].float(), (label[index] > 0).float(), reduction="sum"
        )
        return {"rpn": objectness / count}, box

    def _ranking_loss(
        self, anchor: Tensor, logit: Tensor, delta: Tensor, label: Tensor, truth: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        image, position = (label > 0).nonzero(as_tuple=True)
        decoded = B.decode(delta[image, position], anchor[position], self.delta_weights)
        goal = truth[image, position]
        quality = label.float()
        quality[image, position] = B.paired_iou(decoded.detach(), goal).clamp(min=1e-6)
        ranking, sorting = losses.rank_sort(logit, quality, delta=self.delta)
        weight = logit.detach()[image, position].float().sigmoid()
        box = losses.weighted_mean(losses.giou(decoded, goal), weight)
        return {"rpn_rank": ranking, "rpn_sort": sorting}, box


def _rows(boxes: Tensor, index: Tensor) -> Tensor:
    """``boxes[index]``, with a unit box where the index is negative or there are no boxes."""
    unit = boxes.new_tensor([[0.0, 0.0, 1.0, 1.0]])
    return torch.cat([boxes, unit])[torch.where(index >= 0, index, len(boxes))]
