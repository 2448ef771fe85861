"""Rank & Sort as its equations read: one positive after the other.

The yardstick of the tests and of the benchmark. It is vectorised over the samples and looks only
at negatives that some ramp reaches, so its time is what a loop over positives has to cost.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Result(NamedTuple):
    """Both losses, and the gradient of each with respect to the logits."""

    ranking: Tensor
    sorting: Tensor
    ranking_grad: Tensor
    sorting_grad: Tensor


def rank_sort_loop(logits: Tensor, targets: Tensor, delta: float = 0.5) -> Result:
    """Equations 3 and 4 with the identity update, in the type of ``logits``."""

    def above(others: Tensor, score: Tensor) -> Tensor:
        """H: how far each of the others stands above the score."""
        if delta == 0:
            return (others >= score).to(others.dtype)
        return ((others - score) / (2 * delta) + 0.5).clamp_(0, 1)

    logits = logits.detach()
    ranking_grad, sorting_grad = torch.zeros_like(logits), torch.zeros_like(logits)
    positive = targets > 0
    score, iou = logits[positive], targets[positive].to(logits.dtype)
    if len(score) == 0:
        return Result(logits.new_zeros(()), logits.new_zeros(()), ranking_grad, sorting_grad)
    reached = (targets == 0) & (logits >= score.min() - delta)
    negatives = logits[reached]

    ranking_error, sorting_error = torch.zeros_like(score), torch.zeros_like(score)
    rank_up, sort_grad = torch.zeros_like(score), torch.zeros_like(score)
    rank_down = torch.zeros_like(negatives)
    for i in range(len(score)):
        h_positive, h_negative = above(score, score[i]), above(negatives, score[i])
        false, rank = h_negative.sum(), h_positive.sum()
        ranking_error[i] = false / (rank + false)
        if false > 0:
            rank_up[i] -= ranking_error[i]
            rank_down += h_negative * (ranking_error[i] / false)

        better = iou >= iou[i]
        h_right, h_wrong = h_positive * better, h_positive * ~better
        current = (h_positive * (1 - iou)).sum() / rank
        target = (h_right * (1 - iou)).sum() / h_right.sum()
        if h_wrong.sum() > 0:
            sorting_error[i] = current - target
            sort_grad[i] -= sorting_error[i]
            sort_grad += h_wrong * (sorting_error[i] / h_wrong.sum())
    ranking_grad[positive], ranking_grad[reached] = rank_up / len(score), rank_down / len(score)
    sorting_grad[positive] = sort_grad / len(score)
    return Result(ranking_error.mean(), sorting_error.mean(), ranking_grad, sorting_grad)
