"""The trunk: any timm backbone with a feature pyramid on top."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any, Literal, cast

import timm
import torch
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from brefine.structures import Images, InputError


class Backbone(nn.Module):
    """Normalisation, a timm backbone and an FPN: pictures in, five levels out.

    Args:
        name: a timm model that has features at strides 4, 8, 16 and 32.
        channels: of every pyramid level.
        norm: "frozen" keeps BatchNorm's statistics and scales as loaded (for pretrained
            weights and small batches); "batch" trains them (from scratch).
        frozen_stages: 0 trains all; 1 freezes the stem and the stride-4 stage; up to 4.
        fpn_norm: "group" puts GroupNorm after every FPN convolution: for trunks whose raw
            features are far from unit variance.
        stride_in_1x1: a ResNet's bottlenecks halve the sides in their first convolution, as
            Caffe's do, not in the 3x3 one: for weights of such a trunk.

    Raises:
        InputError: timm has no such model, or it lacks one of the strides, or it has no strides
            to move.
    """

    strides = (4, 8, 16, 32, 64)
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        channels: int,
        *,
        norm: Literal["frozen", "batch"] = "frozen",
        frozen_stages: int = 1,
        fpn_norm: Literal["none", "group"] = "none",
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.norm = name, norm
        self.body = _features(name)
        if stride_in_1x1:
            _move_strides(self.body, name)
        info = self.body.feature_info
        self.fpn = FeaturePyramidNetwork(
            info.channels(),
            channels,
            extra_blocks=LastLevelMaxPool(),
            norm_layer=partial(nn.GroupNorm, 8) if fpn_norm == "group" else None,
        )
        config = timm.get_pretrained_cfg(name)
        mean = config.mean if config else timm.data.IMAGENET_DEFAULT_MEAN
        std = config.std if config else timm.data.IMAGENET_DEFAULT_STD
        for key, value in (("mean", mean), ("std", std)):
            self.register_buffer(key, torch.tensor(value).reshape(3, 1, 1) * 255, persistent=False)
        if frozen_stages:
            self._freeze(info.module_name()[frozen_stages - 1])
        self.train()

    def _freeze(self, last: str) -> None:
        """Freeze every parameter up to the end of the module ``last`` (in order of use)."""
        names = [name for name, _ in self.body.named_parameters()]
        # timm flattens "blocks.1" to "blocks_1" in some feature networks
        inside = [n.startswith((f"{last}.", f"{last.replace('.', '_')}.")) for n in names]
        end = len(names) - inside[::-1].index(True)
        for parameter in list(self.body.parameters())[:end]:
            parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> Backbone:
        """Like any module's, but frozen norms stay in evaluation mode."""
        super().train(mode)
        if self.norm == "frozen":
            for module in self.body.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval().requires_grad_(False)
        return self

    def forward(self, images: Images) -> list[Tensor]:
        """Pyramid levels P2..P6, ``[B, channels, H / s, W / s]`` for s in ``strides``."""
        height, width = images.pixels.shape[-2:]
        sizes = images.sizes[:, :, None, None]
        ys = torch.arange(height, device=sizes.device)[:, None] < sizes[:, 0]
        xs = torch.arange(width, device=sizes.device) < sizes[:, 1]
        pixels = (images.pixels.to(self.mean.dtype) - self.mean) / self.std
        # Zero after normalisation, so that padding looks like the mean picture.
        pixels = pixels * (ys & xs)[:, None].to(pixels.dtype)
        if pixels.device.type == "cpu" and not torch.is_grad_enabled():
            # CPU kernels are quicker in this format, and RoIAlign reads it as a table of pixels.
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        features = self.body(pixels)
        levels = self.fpn(OrderedDict((str(i), f) for i, f in enumerate(features)))
        return list(cast("dict[str, Tensor]", levels).values())


def _move_strides(body: nn.Module, name: str) -> None:
    """Strides of a ResNet's bottlenecks from the 3x3 convolutions to the 1x1 before them."""
    moved = False
    for block in body.modules():
        first, second = getattr(block, "conv1", None), getattr(block, "conv2", None)
        if not isinstance(first, nn.Conv2d) or not isinstance(second, nn.Conv2d):
            continue
        if first.kernel_size == (1, 1) and first.stride == (1, 1) and second.stride != (1, 1):
            first.stride, second.stride, moved = second.stride, (1, 1), True
    if not moved:
        raise InputError(f"stride_in_1x1: backbone {name!r} has no bottlenecks with strides")


def _features(name: str) -> Any:
    """The bare timm feature network with strides 4, 8, 16, 32 and random weights."""
    try:
        probe: Any = timm.create_model(name, features_only=True, pretrained=False)
    except RuntimeError as error:
        known = ", ".join(timm.list_models(f"*{name[:6]}*")[:5]) or "see timm.list_models()"
        raise InputError(f"no timm backbone {name!r} with features; similar: {known}") from error
    reductions = probe.feature_info.reduction()
    missing = [s for s in (4, 8, 16, 32) if s not in reductions]
    if missing:
        raise InputError(
            f"backbone {name!r} has features at strides {reductions}, but {missing} is missing: "
            "choose one with strides 4, 8, 16 and 32"
        )
    indices = tuple(
        max(i for i, reduction in enumerate(reductions) if reduction == s) for s in (4, 8, 16, 32)
    )
    return timm.create_model(name, features_only=True, pretrained=False, out_indices=indices)
