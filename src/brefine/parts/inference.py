"""The same model in fewer operations, for prediction on a CPU."""

from __future__ import annotations

import copy
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from brefine.parts.backbone import Backbone

#: tiles that are worked on at once: what they need fits a core's cache
GROUP = 128

# Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (CVPR 2016): F(4, 3).
_INPUT = [
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
]
_KERNEL = [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]  # / 24
_OUTPUT = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]


def prepare(model: nn.Module) -> nn.Module:
    """Make a model's prediction on a CPU quicker; what it predicts stays the same.

    Norms of the trunk are folded into the convolutions before them, 3x3 convolutions of many
    channels get Winograd's form, and the others hand on the channels-last layout that RoIAlign and
    Winograd's work in. Features differ by about 1e-5 of their largest.

    Args:
        model: changed in place. It can no longer be trained, and its state has other names.

    Returns:
        The same model.
    """
    for module in model.modules():
        if isinstance(module, Backbone):
            module.body = fold(module.body)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if Winograd.suits(child):
                setattr(module, name, Winograd(cast(nn.Conv2d, child)))
    return model.to(memory_format=torch.channels_last)


@torch.no_grad()
def fold(body: nn.Module) -> nn.Module:
    """A trunk without the norms that follow a convolution: the same features.

    A norm is taken to follow the convolution that stands before it in its module. This is not so
    in every network: the trunk is returned as it was if a random picture has other features.
    """
    folded = copy.deepcopy(body).eval()
    _fold(folded)
    generator = torch.Generator().manual_seed(0)  # of its own: a seeded run stays as it is
    picture = torch.randn(1, 3, 64, 64, generator=generator).to(next(body.parameters()))
    pairs = zip(body.eval()(picture), folded(picture), strict=True)
    same = all(torch.allclose(a, b, 1e-3, 1e-4 * float(a.abs().amax())) for a, b in pairs)
    return folded if same else body


def _fold(module: nn.Module) -> None:
    before: tuple[str, nn.Module] | None = None
    for name, child in list(module.named_children()):
        if (
            isinstance(child, nn.BatchNorm2d)
            and before is not None
            and isinstance(before[1], nn.Conv2d)
            and before[1].out_channels == child.num_features
        ):
            setattr(module, before[0], fuse_conv_bn_eval(before[1], child))
            # timm's norms may hold an activation
            setattr(module, name, getattr(child, "act", nn.Identity()))
        else:
            _fold(child)
        before = name, child


class Winograd(nn.Module):
    """A 3x3 convolution by Winograd's F(4x4, 3x3): 4 times fewer multiplications.

    Each tile of 4 x 4 results needs 6 x 6 inputs: 36 products a pair of channels instead of 144.
    Sums and products around them are matrices too; they do not depend on the number of channels,
    so that many channels make it worth while. A dilated convolution is one of the pixels that are
    ``dilation`` apart, for each of the places where these may start.

    Args:
        conv: what it stands for; see `suits`.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv, self.dilation = conv, conv.dilation[0]
        into, kernel, out = (
            torch.tensor(rows, dtype=torch.float64) for rows in (_INPUT, _KERNEL, _OUTPUT)
        )
        kernel = kernel / 24
        weight = conv.weight.detach()
        products = torch.einsum("xa,yb,oiab->xyio", kernel, kernel, weight.double())
        # [36, C, out], [36, 36], [16, 36]
        self.register_buffer("weight", products.flatten(0, 1).to(weight))
        self.register_buffer("into", torch.kron(into, into).to(weight))
        self.register_buffer("out", torch.kron(out, out).to(weight))

    weight: Tensor
    into: Tensor
    out: Tensor

    @staticmethod
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
            and min(module.in_channels, module.out_channels) >= 128
            and module.weight.device.type == "cpu"
            and module.weight.dtype == torch.float32
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, h, w]`` to ``[B, out, h, w]`` in the channels-last format."""
        batch, channels, height, width = x.shape
        d, count = self.dilation, self.weight.shape[2]
        rows, columns = -(-height // (4 * d)), -(-width // (4 * d))  # tiles, per start
        if 16 * d * d * rows * columns > 1.6 * height * width:  # tiles that stick out too far
            return cast(Tensor, self.conv(x))
        right, below = 4 * d * columns - width + d, 4 * d * rows - height + d
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, d, right, d, below))
        padded = padded.view(batch, 4 * rows + 2, d, 4 * columns + 2, d, channels)
        # [6, 6, B, rows, d, columns, d, C]
        windows = padded.unfold(1, 6, 4).unfold(3, 6, 4).permute(6, 7, 0, 1, 2, 3, 4, 5)
        result = x.new_empty(batch, rows, 4, d, columns, 4, d, count)
        step = max(1, GROUP // (d * d * columns))  # rows of tiles at once
        many = max(1, step // rows)  # pictures at once
        for i in range(0, batch, many):
            for j in range(0, rows, step):
                tiles = windows[:, :, i : i + many, j : j + step]
                size = tiles.shape[2:7]
                tiles = (self.into @ tiles.reshape(36, -1)).view(36, -1, channels)
                tiles = self.out @ torch.bmm(tiles, self.weight).view(36, -1)
                # [4, 4, B, rows, d, columns, d, out] to result's order
                tiles = tiles.view(4, 4, *size, count).permute(2, 3, 0, 4, 5, 1, 6, 7)
                result[i : i + many, j : j + step] = tiles
        found = result.view(batch, 4 * d * rows, 4 * d * columns, count)[:, :height, :width]
        found = found.contiguous() if self.conv.bias is None else found + self.conv.bias
        return found.permute(0, 3, 1, 2)
