"""What the one-stage methods share: options, and how dense predictions become one list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from brefine import losses
from brefine.parts import together
from brefine.ranges import STRICT, NotNegative, Positive, Stages


@dataclass(frozen=True)
class Detector:
    """Options of the trunk and of ranking, the same for every one-stage method.

    Attributes:
        norm: see ``Backbone``.
        frozen_stages: see ``Backbone``.
        fpn_norm: see ``Backbone``.
        delta: half width of Rank & Sort's ramp.
        balance_floor: least value of the ranking loss in eq. 5's ratio; see the two-stage one.
        detections: most kept a picture.
    """

    __pydantic_config__ = STRICT

    norm: Literal["frozen", "batch"] = "frozen"
    frozen_stages: Stages = 1
    fpn_norm: Literal["none", "group"] = "none"
    delta: NotNegative = 0.5
    balance_floor: NotNegative = 0.0
    detections: Positive = 100


def number(rows: Tensor, *, more: int = 0) -> Tensor:
    """N of ``rows [N]`` and ``more``, at least 1, to divide by; see ``parts.together``."""
    count = torch.tensor(float(len(rows) + more), device=rows.device)
    return together.mean(count).clamp(min=1)


def focal(logits: Tensor, place: Tensor, labels: Tensor) -> Tensor:
    """The focal loss of sigmoid class logits, a sum (Lin et al. 2017, gamma 2, alpha 0.25).

    Args:
        logits: ``[M, K]``, of all cells of a batch.
        place: ``[P]`` rows of the cells that belong to an object.
        labels: ``[P]`` their classes.
    """
    goal = torch.zeros_like(logits, dtype=torch.float32)
    goal[place, labels] = 1
    loss: Tensor = sigmoid_focal_loss(logits.float(), goal, 0.25, 2.0, "sum")
    return loss


def rank(
    logits: Tensor,
    place: Tensor,
    labels: Tensor,
    quality: Tensor,
    *,
    delta: float,
    ignored: Tensor | None = None,
) -> dict[str, Tensor]:
    """Rank & Sort losses of sigmoid class logits by name (eq. 3-4).

    Args:
        logits: ``[M, K]``, of all cells of a batch.
        place: ``[P]`` rows of the cells that belong to an object.
        labels: ``[P]`` their classes.
        quality: ``[P]`` IoU of what they predict.
        delta: half width of the ramp.
        ignored: ``[M]`` bool, rows that are neither positive nor negative.
    """
    goal = torch.zeros_like(logits, dtype=torch.float32)
    if ignored is not None:
        goal[ignored] = -1
    goal[place, labels] = quality.float().clamp(min=1e-6)
    ranking, sorting = losses.rank_sort(logits, goal, delta=delta)
    return {"cls_rank": ranking, "cls_sort": sorting}
