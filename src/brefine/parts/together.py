"""Losses of several processes as one process would compute them for all their pictures.

Off, as in the paper: each process ranks its own samples and divides by its own counts, and the
gradients are averaged. On, samples are ranked among those of all processes, and sums are divided
by counts of all. Then every process must compute the same losses in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

_on = ContextVar("together", default=False)


@contextmanager
def switched(on: bool) -> Iterator[None]:
    """Losses inside are those of all processes together, or not."""
    before = _on.set(on and distributed.is_available() and distributed.is_initialized())
    try:
        yield
    finally:
        _on.reset(before)


def join(values: Tensor) -> Tensor:
    """``[N]`` of every process, one after the other, ``[sum of N]``; as it is when off.

    The gradient of a process's own part is multiplied by the number of processes, since the mean
    over them is taken afterwards and every one of them has the whole loss.
    """
    if not _on.get():
        return values
    joined: Tensor = _Join.apply(values.flatten())
    return joined


def mean(value: Tensor) -> Tensor:
    """The mean of a scalar over processes, detached; the scalar itself, detached, when off."""
    value = value.detach()
    if _on.get():
        value = value.clone()
        distributed.all_reduce(value)
        value /= distributed.get_world_size()
    return value


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        world, rank = distributed.get_world_size(), distributed.get_rank()
        own = torch.tensor([len(values)], device=values.device)
        counts = [torch.empty_like(own) for _ in range(world)]
        distributed.all_gather(counts, own)
        lengths = [int(count) for count in counts]
        padded = values.new_zeros(max(lengths))
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in range(world)]
        distributed.all_gather(parts, padded)
        ctx.start, ctx.length, ctx.world = sum(lengths[:rank]), len(values), world
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        own: Tensor = grad[ctx.start : ctx.start + ctx.length] * ctx.world
        return own
