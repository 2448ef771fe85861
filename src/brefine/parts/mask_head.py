"""Layers that mask heads share."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

#: names of ``losses.MASK_LOSSES``
MaskLoss = Literal["bce", "dice", "focal", "bce+dice", "boundary"]


class ClassLogits(nn.Conv2d):
    """1x1 convolution to K masks of which only each RoI's own class is computed.

    With 80 classes at 56x56 that is 1/80 of the work and memory; the result is the same.
    """

    class_rows: ClassVar[dict[str, int]] = {"": 1}  # see ``pretrained.class_layers``

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(channels, num_classes, 1)
        # Small logits: BCE starts at ln 2 and the trunk is not shaken by the first steps.
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        """Logits ``[R, S, S]`` of ``labels [R]`` from features ``[R, C, S, S]``."""
        assert self.bias is not None
        weight, bias = self.weight[labels, :, 0, 0], self.bias[labels]
        mixed = torch.bmm(weight[:, None].to(x.dtype), x.flatten(2))
        return mixed.reshape(x.shape[0], *x.shape[2:]) + bias[:, None, None]


def again(block: Callable[..., Tensor], *inputs: Tensor, on: bool) -> Tensor:
    """What a block gives; ``on``: its inner results are worked out again for the gradient.

    They are then not kept until it is taken: less memory for more time, the same gradients.
    """
    if not (on and torch.is_grad_enabled()) or torch.compiler.is_exporting():
        return block(*inputs)
    output: Tensor = checkpoint(block, *inputs, use_reentrant=False)
    return output


def conv3x3(channels: int, out: int | None = None, dilation: int = 1) -> nn.Conv2d:
    """3x3 convolution, Kaiming fan-in: a ReLU after it keeps the variance.

    ``out`` channels, or as many as there are.
    """
    conv = nn.Conv2d(channels, out or channels, 3, padding=dilation, dilation=dilation)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def conv1x1(channels: int, out: int) -> nn.Conv2d:
    """1x1 convolution with nothing after it: it keeps the second moment."""
    conv = nn.Conv2d(channels, out, 1)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv
