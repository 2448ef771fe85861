"""A picture looked at several times, mirrored and at other sizes: test-time augmentation.

The views vote twice. Their boxes are joined to one list first (`fuse`); then every view's mask
head is asked about *these* boxes, and the logits, all on one grid in one box, are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from brefine.structures import InputError, Instances

if TYPE_CHECKING:
    from torch import Tensor

#: boxes of two views with a higher IoU are the same object
SAME = 0.55
#: smallest and largest scale of a view
SCALES = 0.25, 4.0


class View(NamedTuple):
    """One way to look at a picture."""

    flip: bool = False  #: left and right exchanged
    scale: float = 1.0  #: of the size that the model works at

    def turn(self, found: Instances) -> Instances:
        """Objects of this view as they are in the picture at the same size, or the reverse."""
        if not self.flip:
            return found
        import torch

        def turn(boxes: Tensor) -> Tensor:
            x1, y1, x2, y2 = boxes.unbind(1)
            return torch.stack([found.size[1] - x2, y1, found.size[1] - x1, y2], 1)

        logits = None if found.logits is None else found.logits.flip(-1)
        spans = None if found.spans is None else turn(found.spans)
        return replace(found, boxes=turn(found.boxes), logits=logits, spans=spans)


PLAIN = (View(),)


def combine(*, flip: bool = False, scales: Sequence[float] = (1.0,)) -> tuple[View, ...]:
    """Each scale, as it is and with ``flip`` mirrored, too.

    Raises:
        InputError: no scale, one twice, or one outside of ``SCALES``.
    """
    low, high = SCALES
    if not scales or len(set(scales)) < len(scales) or not all(low <= s <= high for s in scales):
        said = ", ".join(map(str, scales)) or "none"
        raise InputError(f"scales {said}: expected different numbers from {low} to {high}")
    return tuple(
        View(flipped, scale) for scale in scales for flipped in ([False, True][: 1 + flip])
    )


def fuse(found: Sequence[Instances]) -> Instances:
    """One list of objects from those of several views of a picture.

    The box with the best score takes, from each other view, the box of its class that overlaps
    most with it, if by more than ``SAME``; then the best of those left does, and so on. Boxes
    are averaged, weighted by score. The score is the mean over all views, and 0 where a view has
    no such box.

    Args:
        found: what each view found, in one frame, with scores.

    Returns:
        Boxes, labels and scores, best first; no more than the view with the most objects has.
    """
    if len(found) == 1:
        return replace(found[0], logits=None)
    import torch
    from torchvision.ops import box_iou

    scores = torch.cat([one.scores for one in found if one.scores is not None])
    boxes = torch.cat([one.boxes for one in found])
    labels = torch.cat([one.labels for one in found])
    view = torch.arange(len(found)).repeat_interleave(torch.tensor([len(one) for one in found]))
    order = scores.sort(descending=True, stable=True).indices
    scores, boxes, labels, view = scores[order], boxes[order], labels[order], view[order]
    near = box_iou(boxes, boxes)
    near = near * (labels[:, None] == labels) * (view[:, None] != view)

    free = torch.ones(len(boxes), dtype=torch.bool)
    fused_boxes, fused_scores, kept = [], [], []
    for seed in range(len(boxes)):
        if not free[seed]:
            continue
        members = [seed]
        candidates = ((near[seed] > SAME) & free).nonzero()[:, 0]
        for i in candidates[near[seed, candidates].sort(descending=True).indices].tolist():
            if all(view[i] != view[j] for j in members):
                members.append(i)
        free[members] = False
        weights = scores[members].double().clamp(min=1e-12)
        fused_boxes.append((boxes[members].double() * weights[:, None]).sum(0) / weights.sum())
        fused_scores.append(scores[members].sum() / len(found))
        kept.append(seed)
    if not kept:
        return replace(found[0], logits=None)
    score = torch.stack(fused_scores)
    most = max(len(one) for one in found)
    best = score.sort(descending=True, stable=True).indices[:most]
    return Instances(
        found[0].size,
        torch.stack(fused_boxes).to(boxes.dtype)[best],
        labels[kept][best],
        score[best],
    )
