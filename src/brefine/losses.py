"""Every loss as a pure function: mask losses, GIoU, Rank & Sort and the balance between them.

Equation numbers are those of BRefine (Yu et al., Sensors 2022, 22, 6499). Rank & Sort itself is
Oksuz et al., "Rank & Sort Loss for Object Detection and Instance Segmentation", ICCV 2021.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from brefine.parts import together
from brefine.structures import InputError


def rank_sort(logits: Tensor, targets: Tensor, *, delta: float = 0.5) -> tuple[Tensor, Tensor]:
    r"""Rank & Sort loss (eq. 3 and 4): positives above negatives, and in the order of their IoU.

    With the step :math:`H(x_{ij}) = \mathrm{clamp}((x_j - x_i) / 2\delta + 1/2, 0, 1)`, which
    counts a sample against itself with 1/2, and with P, N the positives and negatives:

    .. math::
        \mathrm{ranking} &= \frac{1}{|P|} \sum_{i \in P}
            \frac{\sum_{j \in N} H(x_{ij})}{\sum_{j \in P \cup N} H(x_{ij})} \\
        \mathrm{sorting} &= \frac{1}{|P|} \sum_{i \in P} \left(
            \frac{\sum_{j \in P} H(x_{ij}) (1 - y_j)}{\sum_{j \in P} H(x_{ij})} -
            \frac{\sum_{j \in P} H(x_{ij}) [y_j \ge y_i] (1 - y_j)}
                 {\sum_{j \in P} H(x_{ij}) [y_j \ge y_i]} \right)

    The gradients are the authors' identity updates, not derivatives of these fractions: positive
    i is pushed up by its error, and the samples that cause the error (negatives above it;
    positives above it with a smaller IoU) are pushed down by the same amount in all, shared out
    in proportion to H. Both gradients therefore sum to 0.

    Time is O(N log P + P^2), memory O(N + P); inside, everything is float64.

    Args:
        logits: raw scores, any shape, any floating type.
        targets: the same shape; in (0, 1] a positive with this IoU, 0 a negative, below 0
            (by convention -1) ignored.
        delta: half width of the ramp in logits, >= 0. At 0 it is the hard step
            ``x_j >= x_i``, which counts a sample against itself with 1.

    Returns:
        (ranking, sorting): two scalars of the type of ``logits``, in [0, 1). Their gradients are
        separate and may be weighted at will. Without positives both are 0 with zero gradients.

    Raises:
        InputError: shapes differ, a logit that is not ignored is NaN or infinite, a target is NaN
            or above 1, or ``delta`` is negative.
    """
    if logits.shape != targets.shape:
        raise InputError(
            f"rank_sort: logits are {tuple(logits.shape)} and targets {tuple(targets.shape)}: "
            "give one target a logit"
        )
    if not (0 <= delta < math.inf):
        raise InputError(f"rank_sort: delta is {delta}, expected a finite number >= 0")
    ranking, sorting = _RankSort.apply(together.join(logits), together.join(targets), delta)
    return ranking, sorting


class _RankSort(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, delta: float) -> tuple[Tensor, Tensor]:
        ctx.shape, ctx.dtype = logits.shape, logits.dtype
        x, y = logits.reshape(-1), targets.reshape(-1)
        _check_finite(x, y)
        positive = (y > 0).nonzero()[:, 0]
        iou, order = y.index_select(0, positive).double().sort()
        positive = positive[order]
        score = x.index_select(0, positive).double()
        low = score.amin() - delta if len(score) else math.inf
        negative = ((y == 0) & (x >= low)).nonzero()[:, 0]  # the others lie below every ramp

        rank, sorting, sorting_grad = _sort_positives(score, iou, delta)
        windows = _Windows(x.index_select(0, negative).double(), score, delta)
        false = windows.count_above()
        rank += false
        ranking = false / rank
        share = 1 / max(len(score), 1)
        down = windows.spread(share / rank)
        ctx.save_for_backward(positive, negative, ranking * -share, down, sorting_grad * share)
        # Not in 16 bits: a loss scaler multiplies them by numbers that these do not have.
        dtype = torch.promote_types(x.dtype, torch.float32)
        return (ranking.sum() * share).to(dtype), (sorting.sum() * share).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ranking: Tensor, sorting: Tensor) -> tuple[Tensor, None, None]:
        positive, negative, up, down, order = ctx.saved_tensors
        grad = up.new_zeros(ctx.shape.numel(), dtype=ctx.dtype)
        grad.scatter_(0, positive, (ranking * up + sorting * order).to(ctx.dtype))
        grad.scatter_(0, negative, (ranking * down).to(ctx.dtype))
        return grad.reshape(ctx.shape), None, None


def _check_finite(x: Tensor, y: Tensor) -> None:
    """Two cheap reductions for the usual case; looks closer only when one of them is suspicious."""
    if len(x) == 0:
        return
    top = y.amax().item()
    if not top <= 1 + 1e-4:
        raise InputError(f"rank_sort: a target is {top}, expected an IoU of at most 1")
    least, most = x.aminmax()
    if not math.isfinite((most - least).item()):
        bad = int((~x.isfinite() & (y >= 0)).sum())
        if bad:
            raise InputError(
                f"rank_sort: {bad} of {len(x)} logits are NaN or infinite: training has diverged, "
                "lower the learning rate or clip gradients"
            )


def _sort_positives(x: Tensor, y: Tensor, delta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Rank of each positive among the positives, its sorting error, and |P| times its gradient.

    ``y`` ascends, so that who is wrongly above i stands in front of i.
    """
    count = len(x)
    weights = torch.stack([torch.ones_like(y), 1 - y])
    rank, error, grad = torch.empty_like(x), torch.empty_like(x), torch.zeros_like(x)
    rows = max(1, 2**17 // max(count, 1))  # 1 MB of pairs at a time stays in the cache
    pairs = x.new_empty(min(rows, count), count)
    for start in range(0, count, rows):
        end = min(start + rows, count)
        # H of every positive (columns) against those of this part (rows), times 2 delta
        step = torch.sub(x, x[start:end, None], out=pairs[: end - start])
        step = step.clamp_(-delta, delta).add_(delta) if delta > 0 else (step >= 0).double()
        all_above = weights @ step.T
        wrong = step[:, :end]
        equal = int(torch.searchsorted(y, y[start]))  # in front of it every IoU is smaller
        wrong[:, equal:].masked_fill_(y[equal:end] >= y[start:end, None], 0)
        wrongly_above = weights[:, :end] @ wrong.T
        number, total = all_above
        right_number, right_total = all_above - wrongly_above
        wrong_number = wrongly_above[0]
        excess = (total / number - right_total / right_number).clamp_(min=0)
        rank[start:end] = number
        error[start:end] = torch.where(wrong_number > 0, excess, 0)
        grad[:end] += torch.where(wrong_number > 0, excess / wrong_number, 0) @ wrong
    return rank / (2 * delta) if delta > 0 else rank, error, grad - error


class _Windows:
    r"""The negatives among the ends of the positives' windows :math:`[x_i - \delta, x_i + \delta]`.

    H is the share of the window of i that lies below x_j. So the sum of H over the negatives is
    the mean, over the window, of how many negatives lie above; and between two ends of windows
    (a bucket) both this integral and a sum of H over the positives are linear in x.
    """

    def __init__(self, x: Tensor, positives: Tensor, delta: float) -> None:
        count = len(positives)
        # stable: a window without width (delta 0) starts before it ends
        self.ends, self.order = torch.cat([positives - delta, positives + delta]).sort(stable=True)
        self.first, self.last = self.order.argsort().tensor_split(2)
        self.width = self.ends[self.last] - self.ends[self.first]
        # bucket b lies between end b - 1 and end b; gap is 0 where no window is open
        self.open = torch.where(self.order < count, 1, -1).cumsum(0)[:-1] > 0
        self.gap = self.ends.diff() * self.open
        self.bucket = _bucketize(x, self.ends)
        below = torch.cat([self.ends[:1], self.ends])
        self.excess = x - below.index_select(0, self.bucket)

    def count_above(self) -> Tensor:
        """For each positive: the sum of H over the negatives."""
        size = len(self.ends) + 1
        number = torch.bincount(self.bucket, minlength=size).double()
        excess = torch.bincount(self.bucket, self.excess, minlength=size)
        above = _sum_from_the_top(number)[1:]
        area = above[1:] * self.gap + excess[1:-1] * self.open
        # summed from the top, so that few negatives high up are not lost among many below
        area = _sum_from_the_top(F.pad(area, (0, 1)))
        integral = area[self.first] - area[self.last]
        return torch.where(self.width > 0, integral / self.width, above[self.first])

    def spread(self, weights: Tensor) -> Tensor:
        """For each negative: the sum over the positives of weight * H."""
        rise = torch.where(self.width > 0, weights / self.width, 0)
        jump = torch.where(self.width > 0, 0, weights)
        slope = torch.cat([rise, -rise])[self.order].cumsum(0)[:-1] * self.open
        level = torch.cat([jump, torch.zeros_like(jump)])[self.order]
        level[1:] += slope * self.gap
        level = F.pad(level.cumsum(0), (1, 0)).index_select(0, self.bucket)
        slope = F.pad(slope, (1, 1)).index_select(0, self.bucket)
        return level.addcmul_(slope, self.excess)


def _sum_from_the_top(values: Tensor) -> Tensor:
    return values.flip(0).cumsum(0).flip(0)


def _bucketize(x: Tensor, ends: Tensor) -> Tensor:
    """``torch.bucketize(x, ends, right=True)`` in int32, about 5 times as fast for many x.

    A uniform grid is laid over the ends. Finding the cell of a number is monotonic, rounding
    included, so only what shares its cell with an end has to be searched.
    """
    first, last = (ends[0].item(), ends[-1].item()) if len(x) > 10_000 else (0.0, 0.0)
    if last - first < 1e-30 or max(-first, last) > 1e30:  # no grid, or beyond float32
        return torch.bucketize(x, ends, right=True, out_int32=True)
    cells = min(64 * len(ends), len(x) // 2)

    def cell(values: Tensor) -> Tensor:
        scaled = (values.float() - first).mul_(cells / (last - first))
        return scaled.clamp_(0, cells + 1).int()

    ends_inside = torch.bincount(cell(ends), minlength=cells + 2)
    table = torch.where(ends_inside > 0, -1, ends_inside.cumsum(0)).int()
    bucket = table.index_select(0, cell(x))
    search = (bucket < 0).nonzero()[:, 0]
    found = torch.bucketize(x.index_select(0, search), ends, right=True, out_int32=True)
    return bucket.scatter_(0, search, found)


def _check_masks(logits: Tensor, masks: Tensor) -> None:
    if logits.ndim != 3 or logits.shape != masks.shape:
        raise InputError(
            f"mask loss: logits are {tuple(logits.shape)} and masks {tuple(masks.shape)}: "
            "both must be [N, H, W]"
        )


def _pixel_bce(logits: Tensor, masks: Tensor) -> Tensor:
    _check_masks(logits, masks)
    return F.binary_cross_entropy_with_logits(logits, masks.to(logits.dtype), reduction="none")


def bce(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy of each RoI, the mean over its pixels: Mask R-CNN's mask loss.

    Args:
        logits: ``[N, H, W]``.
        masks: ``[N, H, W]`` true masks, 0 or 1 (soft values between are legal), any type.

    Returns:
        ``[N]``, >= 0; ``[0]`` for no RoIs.

    Raises:
        InputError: the shapes differ or are not ``[N, H, W]``.
    """
    return _pixel_bce(logits, masks).mean((1, 2))


def boundary_region(masks: Tensor, ratio: float = 0.02) -> Tensor:
    """The inner band along each object's boundary (eq. 1): the mask minus the eroded mask.

    Erosion is by a 3x3 window, ``max(1, round(ratio * diagonal))`` times, the diagonal being that
    of the grid in cells: 1, 1 and 2 times at 14, 28 and 56. The border is replicated, so an object
    that the proposal cuts off has no boundary along the cut.

    Args:
        masks: ``[N, H, W]``, 0 or 1 (soft values give the grey erosion), any type.
        ratio: width of the band as a share of the diagonal, >= 0.

    Returns:
        ``[N, H, W]`` of the type of ``masks``: 1 in the band, else 0. Empty and full masks have
        no band; an object thinner than twice the band is all band.

    Raises:
        InputError: ``masks`` is not ``[N, H, W]`` or ``ratio`` is negative.
    """
    if masks.ndim != 3 or not ratio >= 0:
        shape = tuple(masks.shape)
        raise InputError(f"boundary_region: masks are {shape}, ratio {ratio}; want [N, H, W], >= 0")
    times = max(1, round(ratio * math.hypot(*masks.shape[1:])))
    outside = 1 - masks[:, None].float()
    # n erosions by 3x3 are one by 2n+1; max_pool2d pads with -inf, which replicates the border.
    grown = F.max_pool2d(outside, 2 * times + 1, stride=1, padding=times)
    return (grown - outside)[:, 0].to(masks.dtype)


def boundary_bce(
    logits: Tensor, masks: Tensor, *, weight: float = 1.0, ratio: float = 0.02
) -> Tensor:
    """Cross-entropy that counts the boundary region more (eq. 2): mean of (1 + weight B) CE.

    Args:
        logits: ``[N, H, W]``.
        masks: ``[N, H, W]`` true masks, 0 or 1, any type.
        weight: what a pixel of the band counts on top of 1; 0 gives ``bce``.
        ratio: width of the band, see ``boundary_region``.

    Returns:
        ``[N]``: one value a RoI, the mean over its pixels.

    Raises:
        InputError: the shapes differ or are not ``[N, H, W]``.
    """
    pixels = _pixel_bce(logits, masks)
    return (pixels * (1 + weight * boundary_region(masks, ratio))).mean((1, 2))


def dice(logits: Tensor, masks: Tensor, *, smooth: float = 1.0) -> Tensor:
    r"""Dice loss of each RoI, :math:`1 - (2 \sum p g + s) / (\sum p^2 + \sum g^2 + s)`.

    p is the sigmoid of the logit, g the mask; s = 1 keeps an empty mask smooth (Milletari et al.,
    "V-Net", 3DV 2016).

    Args:
        logits: ``[N, H, W]``.
        masks: ``[N, H, W]`` true masks, 0 or 1, any type.
        smooth: s, >= 0.

    Returns:
        ``[N]`` in [0, 1).

    Raises:
        InputError: the shapes differ or are not ``[N, H, W]``.
    """
    _check_masks(logits, masks)
    p, g = logits.sigmoid(), masks.to(logits.dtype)
    wide = torch.promote_types(p.dtype, torch.float32)  # float16 cannot count a large mask
    overlap = (p * g).sum((1, 2), dtype=wide)
    total = (p * p + g * g).sum((1, 2), dtype=wide)
    return (1 - (2 * overlap + smooth) / (total + smooth).clamp(min=1e-6)).to(logits.dtype)


def focal(logits: Tensor, masks: Tensor, *, gamma: float = 2.0, alpha: float = 0.25) -> Tensor:
    r"""Focal loss of each RoI, the mean over its pixels of :math:`\alpha_t (1 - p_t)^\gamma CE`.

    :math:`p_t` is the probability given to the true class of the pixel, :math:`\alpha_t` is
    ``alpha`` inside the object and ``1 - alpha`` outside (Lin et al., ICCV 2017).

    Args:
        logits: ``[N, H, W]``.
        masks: ``[N, H, W]`` true masks, 0 or 1, any type.
        gamma: how fast easy pixels lose weight, >= 0; 0 leaves only ``alpha``.
        alpha: weight of object pixels, 0..1.

    Returns:
        ``[N]``, >= 0.

    Raises:
        InputError: the shapes differ or are not ``[N, H, W]``.
    """
    pixels = _pixel_bce(logits, masks)
    p, g = logits.sigmoid(), masks.to(logits.dtype)
    wrong = p + g - 2 * p * g
    return ((alpha * g + (1 - alpha) * (1 - g)) * wrong**gamma * pixels).mean((1, 2))


def bce_dice(logits: Tensor, masks: Tensor) -> Tensor:
    """``bce`` plus ``dice``, ``[N]``; arguments and errors as there."""
    return bce(logits, masks) + dice(logits, masks)


#: The mask losses by the name a recipe uses; each maps (logits, masks) to one value a RoI.
MASK_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bce": bce,
    "dice": dice,
    "focal": focal,
    "bce+dice": bce_dice,
    "boundary": boundary_bce,
}


def giou(boxes: Tensor, targets: Tensor) -> Tensor:
    """GIoU loss of each pair, 1 - GIoU (Rezatofighi et al., CVPR 2019; the L_GIoU of eq. 6).

    GIoU = IoU - (hull - union) / hull, with the areas of the union and of the smallest box around
    both. A box with x2 < x1 or y2 < y1 counts as empty.

    Args:
        boxes: ``[N, 4]`` xyxy.
        targets: ``[N, 4]`` xyxy in the same frame.

    Returns:
        ``[N]`` in [0, 2]. Value and gradients are finite for boxes without area too; two such
        boxes in the same point give 1.

    Raises:
        InputError: the shapes differ or are not ``[N, 4]``.
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4 or boxes.shape != targets.shape:
        shapes = f"{tuple(boxes.shape)} and {tuple(targets.shape)}"
        raise InputError(f"giou: boxes and targets are {shapes}: both must be [N, 4]")
    dtype = torch.promote_types(boxes.dtype, torch.float32)  # float16 cannot hold an area
    boxes, targets = boxes.to(dtype), targets.to(dtype)

    def area(top_left: Tensor, bottom_right: Tensor) -> Tensor:
        width, height = (bottom_right - top_left).clamp(min=0).unbind(1)
        return width * height

    (a1, a2), (b1, b2) = boxes.tensor_split(2, 1), targets.tensor_split(2, 1)
    overlap = area(torch.maximum(a1, b1), torch.minimum(a2, b2))
    union = area(a1, a2) + area(b1, b2) - overlap
    hull = area(torch.minimum(a1, b1), torch.maximum(a2, b2))
    return 1 - overlap / union.clamp(min=1e-7) + (hull - union) / hull.clamp(min=1e-7)


def balance_tasks(
    classes: Mapping[str, Tensor],
    tasks: Sequence[Mapping[str, Tensor]],
    *,
    ranking: bool,
    floor: float = 0.0,
    weight: float = 1.0,
    prefix: str = "",
) -> dict[str, Tensor]:
    """All losses of a classification and of the tasks beside it, by name.

    Args:
        classes: classification losses.
        tasks: losses by name of each other task.
        ranking: `balance` the sum of each task with the sum of ``classes``: it then has the
            task's first name, and ``raw_`` losses say what is learnt.
        floor: see `balance`.
        weight: of all, but the raw ones.
        prefix: of all names.
    """
    named = dict(classes)
    raw: dict[str, Tensor] = {}
    whole = torch.stack(list(classes.values())).sum()
    for task in tasks:
        if ranking:
            # balanced losses always read L_RS, so the raw ones tell what is learnt
            raw |= {f"raw_{prefix}{name}": value.detach() for name, value in task.items()}
            loss = torch.stack(list(task.values())).sum()
            task = {next(iter(task)): balance(whole, loss, floor=floor)}
        named |= task
    return {prefix + name: weight * value for name, value in named.items()} | raw


def total(named: Mapping[str, Tensor]) -> Tensor:
    """What training minimises: the sum of a model's named losses, without ``raw_`` ones.

    Args:
        named: scalars, such as a Segmenter's ``loss`` returns.
    """
    return torch.stack([v.float() for k, v in named.items() if not k.startswith("raw_")]).sum()


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """Mean weighted by classification scores (eq. 6): sum of w l / sum of w.

    Args:
        losses: ``[N]``.
        weights: ``[N]``, >= 0; no gradient flows into them.

    Returns:
        A scalar. Without samples, or with weights that are all 0, it is 0 and its gradients are 0.

    Raises:
        InputError: the shapes differ.
    """
    if losses.shape != weights.shape:
        shapes = f"{tuple(losses.shape)} and {tuple(weights.shape)}"
        raise InputError(f"weighted_mean: losses and weights are {shapes}: they must agree")
    weights = weights.detach().to(torch.promote_types(losses.dtype, torch.float32))
    return (losses * (weights / together.mean(weights.sum()).clamp(min=1e-12))).sum()


def balance(ranking: Tensor, loss: Tensor, *, floor: float = 0.0) -> Tensor:
    """``loss`` scaled to the value of the ranking loss (eq. 5): lambda L with lambda = L_RS / L.

    lambda is a constant to the gradient. The value returned is that of ``ranking``, so log the
    raw loss as well. As ranking is learnt lambda goes to 0 and with it the gradient of ``loss``;
    ``floor`` keeps it alive (0 in the paper).

    Args:
        ranking: scalar, L_RS of the same task, >= 0; detached here.
        loss: scalar, >= 0.
        floor: the least value to scale to.

    Returns:
        A scalar. Below 1e-6 ``loss`` is divided by 1e-6 instead of itself, so 0 stays 0 and
        nothing becomes infinite.
    """
    dtype = torch.promote_types(loss.dtype, torch.float32)  # 1 / 1e-6 overflows float16
    scale = ranking.detach().to(dtype).clamp(min=floor)
    return scale / together.mean(loss.to(dtype)).clamp(min=1e-6) * loss
