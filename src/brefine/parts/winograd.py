"""3x3 convolutions by Winograd's F(4x4, 3x3) on a CPU: 4 times fewer multiplications.

Each tile of 4 x 4 results needs 6 x 6 inputs: 36 products a pair of channels instead of 144. Sums
and products around them are matrices too; they do not depend on the number of channels, so that
many channels make it worth while. A dilated convolution is one of the pixels that are ``dilation``
apart, for each of the places where these may start.

Gradients go the same way back: the transposes of the three matrices, and two products of tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

#: tiles that are worked on at once: about as many as are quickest from 128 to 512 channels
GROUP = 256
CHANNELS = 128  # from which it is quicker

#: pixels of a tile's input that are of the next tile but so many, the first of them, how many
_OVERLAPS = ((0, 0, 4), (1, 4, 2))


#: at which polynomials are multiplied, and at infinity. Those of Lavin and Gray (CVPR 2016), 0, 1,
#: -1, 2, -2, round to twice the error, five times at worst. See Barabasz et al., "Error analysis
#: and improving the accuracy of Winograd convolution for deep neural networks" (TOMS 2020).
POINTS = (0.0, 11 / 16, -11 / 16, 23 / 16, -23 / 16)


def _polynomial(roots: Sequence[float]) -> list[float]:
    """Coefficients of the product of all (x - root), of x^0 first."""
    found = [1.0]
    for root in roots:
        found = [up - root * same for up, same in zip([0.0, *found], [*found, 0.0], strict=True)]
    return found


def _matrices(points: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Toom and Cook's, float64: ``[6, 6]`` of inputs, ``[6, 3]`` of kernels, ``[4, 6]`` of results.

    Rows of the first two, and columns of the last, are points; the last one is infinity.
    """
    inputs, kernels, results = [], [], []
    for i, point in enumerate(points):
        others = [*points[:i], *points[i + 1 :]]
        scale = prod(point - other for other in others)
        inputs.append([*_polynomial(others), 0.0])
        kernels.append([point**power / scale for power in range(3)])
        results.append([point**power for power in range(4)])
    inputs.append(_polynomial(points))
    kernels.append([0.0, 0.0, 1.0])
    results.append([0.0, 0.0, 0.0, 1.0])
    into, kernel, out = (
        torch.tensor(rows, dtype=torch.float64) for rows in (inputs, kernels, results)
    )
    return into, kernel, out.T.contiguous()


#: along a side of a tile, of a kernel and of a tile of products: [6, 6], [6, 3], [4, 6]
INPUT, KERNEL, OUTPUT = _matrices(POINTS)


def suits(module: nn.Module) -> bool:
    """Whether a module is a 3x3 convolution that becomes quicker."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (3, 3)
        and module.stride == (1, 1)
        and module.dilation[0] == module.dilation[1]
        and module.padding == module.dilation
        and module.padding_mode == "zeros"
        and module.groups == 1
        and min(module.in_channels, module.out_channels) >= CHANNELS
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
    )


def fits(x: Tensor, dilation: int) -> bool:
    """Whether tiles do not stick out of ``x`` too far to be worth while."""
    height, width = x.shape[2:]
    rows, columns = _count(x, dilation)
    return 16 * dilation**2 * rows * columns <= 1.6 * height * width


def transform(weight: Tensor) -> Tensor:
    """A kernel ``[out, C, 3, 3]`` as it is multiplied with tiles, ``[36, C, out]``."""
    out, channels = weight.shape[:2]
    return _along_both(KERNEL.to(weight), weight.permute(2, 3, 1, 0)).view(36, channels, out)


def convolve(x: Tensor, products: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """``[B, C, h, w]`` to ``[B, out, h, w]`` in the channels-last format, without gradients.

    Args:
        x: any layout; channels-last is quickest.
        products: of `transform`.
        bias: ``[out]``.
        dilation: and padding.
    """
    (batch, channels, height, width), d, count = x.shape, dilation, products.shape[2]
    rows, columns = _count(x, d)
    into, out = INPUT.to(x), OUTPUT.to(x)
    windows = _windows(x, d)
    result = x.new_empty(batch, rows, 4, d, columns, 4, d, count)
    for pictures, lines in _groups(batch, rows, columns, d):
        tiles = windows[:, :, pictures, lines]
        size = tiles.shape[2:7]
        tiles = _along_both(into, tiles).view(36, -1, channels)
        tiles = _along_both(out, torch.bmm(tiles, products))
        # [4, 4, B, rows, d, columns, d, out] to result's order
        tiles = tiles.view(4, 4, *size, count).permute(2, 3, 0, 4, 5, 1, 6, 7)
        result[pictures, lines] = tiles
    inside = result.view(batch, 4 * d * rows, 4 * d * columns, count)[:, :height, :width]
    found = torch.empty(
        (batch, count, height, width), dtype=x.dtype, memory_format=torch.channels_last
    )
    torch.add(inside, 0 if bias is None else bias, out=found.permute(0, 2, 3, 1))
    return found  # no view, so that what follows may change it in place


class Winograd(nn.Module):
    """A 3x3 convolution for prediction, whose kernel is transformed once.

    Args:
        conv: what it stands for; see `suits`.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv, self.dilation = conv, conv.dilation[0]
        products = transform(conv.weight.detach().double()).to(conv.weight)
        self.register_buffer("weight", products)

    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, h, w]`` to ``[B, out, h, w]`` in the channels-last format."""
        if not fits(x, self.dilation):
            return cast(Tensor, self.conv(x))
        return convolve(x, self.weight, self.conv.bias, self.dilation)


class TrainedConv(nn.Conv2d):
    """A 3x3 convolution that learns: see `quicken`. Same names, same state."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if (
            self.training
            and input.device.type == "cpu"
            and input.dtype == weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and fits(input, self.dilation[0])
        ):
            found = Convolution.apply(input, weight, bias, self.dilation[0])
        else:
            found = super()._conv_forward(input, weight, bias)
        return cast(Tensor, found)


def quicken(model: nn.Module) -> nn.Module:
    """Make a model's training quicker; what it learns stays the same.

    Its weights get the channels-last format, which convolutions hand on: a step takes CPUs less
    time with it, and tensor cores want it. 3x3 convolutions of many channels (`suits`) become
    `TrainedConv`, whose results and gradients differ by about 1e-5 of their largest; on other
    devices, in other types and in evaluation they are the plain ones.

    Args:
        model: changed in place.

    Returns:
        The same model.
    """
    for module in model.modules():
        if type(module) is nn.Conv2d and suits(module):
            module.__class__ = TrainedConv
    return model.to(memory_format=torch.channels_last)


class Convolution(torch.autograd.Function):
    """`convolve` with its gradient: of ``x [B, C, h, w]``, weight ``[out, C, 3, 3]`` and bias.

    Nothing but the arguments is kept for the gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
        """``[B, out, h, w]``."""
        ctx.save_for_backward(x, weight)
        ctx.dilation = dilation
        return convolve(x, transform(weight), bias, dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of the result ``[B, out, h, w]`` to those of the arguments."""
        (x, weight), d = ctx.saved_tensors, ctx.dilation
        wanted = ctx.needs_input_grad
        batch, channels, height, width = x.shape
        count = weight.shape[0]
        rows, columns = _count(x, d)
        into, kernel, out = (matrix.to(x) for matrix in (INPUT, KERNEL, OUTPUT))
        windows = _windows(x, d) if wanted[1] else None
        products = transform(weight).transpose(1, 2) if wanted[0] else None
        above = x.new_zeros(batch, 4 * d * rows, 4 * d * columns, count)
        above[:, :height, :width] = gradient.permute(0, 2, 3, 1)
        above = above.view(batch, rows, 4, d, columns, 4, d, count)
        above = above.permute(2, 5, 0, 1, 3, 4, 6, 7)  # to the order of windows
        of_products = x.new_zeros(36, channels, count)
        below = x.new_zeros(batch, rows + 1, 4, d, columns + 1, 4, d, channels)
        for pictures, lines in _groups(batch, rows, columns, d):
            tiles = above[:, :, pictures, lines]
            size = tiles.shape[2:7]
            tiles = _along_both(out.T, tiles).view(36, -1, count)
            if windows is not None:
                inputs = _along_both(into, windows[:, :, pictures, lines])
                of_products.baddbmm_(inputs.view(36, -1, channels).transpose(1, 2), tiles)
            if products is not None:
                tiles = _along_both(into.T, torch.bmm(tiles, products))
                tiles = tiles.view(6, 6, *size, channels).permute(2, 3, 0, 4, 5, 1, 6, 7)
                for (i, top, high), (j, left, wide) in product(_OVERLAPS, _OVERLAPS):
                    place = slice(lines.start + i, lines.stop + i)
                    part = below[pictures, place, :high, :, j : columns + j, :wide]
                    part += tiles[:, :, top : top + high, :, :, left : left + wide]
        of_x = of_weight = of_bias = None
        if wanted[0]:
            found = below.view(batch, 4 * d * (rows + 1), 4 * d * (columns + 1), channels)
            of_x = found[:, d : d + height, d : d + width].permute(0, 3, 1, 2)
        if wanted[1]:
            flat = _along_both(kernel.T, of_products)
            of_weight = flat.view(3, 3, channels, count).permute(3, 2, 0, 1)
        if wanted[2]:
            of_bias = gradient.sum((0, 2, 3))
        return of_x, of_weight, of_bias, None


def _along_both(matrix: Tensor, tiles: Tensor) -> Tensor:
    """A matrix ``[m, k]`` along both sides of tiles ``[k, k, ...]``: ``[m, m, n]``.

    One side after the other takes a third of the products that both at once would.

    Args:
        matrix: of `INPUT`, `KERNEL`, `OUTPUT`, or a transpose of these.
        tiles: contiguous or not; ``[k * k, ...]`` will do.
    """
    count, side = matrix.shape
    rows = matrix @ tiles.reshape(side, -1)
    return torch.matmul(matrix, rows.view(count, side, -1))


def _count(x: Tensor, dilation: int) -> tuple[int, int]:
    """Rows and columns of tiles, for each place where they may start."""
    height, width = x.shape[2:]
    return -(-height // (4 * dilation)), -(-width // (4 * dilation))


def _windows(x: Tensor, d: int) -> Tensor:
    """What each tile of results needs: ``[6, 6, B, rows, d, columns, d, C]``, a view of a copy."""
    batch, channels, height, width = x.shape
    rows, columns = _count(x, d)
    padded = x.new_zeros(batch, (4 * rows + 2) * d, (4 * columns + 2) * d, channels)
    padded[:, d : d + height, d : d + width] = x.permute(0, 2, 3, 1)
    padded = padded.view(batch, 4 * rows + 2, d, 4 * columns + 2, d, channels)
    return padded.unfold(1, 6, 4).unfold(3, 6, 4).permute(6, 7, 0, 1, 2, 3, 4, 5)


def _groups(batch: int, rows: int, columns: int, d: int) -> Iterator[tuple[slice, slice]]:
    """Pictures and rows of tiles that are worked on at once."""
    step = max(1, GROUP // (d * d * columns))  # rows of tiles at once
    many = max(1, step // rows)  # pictures at once
    for i in range(0, batch, many):
        for j in range(0, rows, step):
            yield slice(i, min(i + many, batch)), slice(j, min(j + step, rows))
