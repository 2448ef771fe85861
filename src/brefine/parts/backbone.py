"""The trunk: any timm backbone with a feature pyramid on top."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any, Literal, cast

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops.feature_pyramid_network import (
    ExtraFPNBlock,
    FeaturePyramidNetwork,
    LastLevelMaxPool,
)

from brefine.structures import Images, InputError

GROUPS = 8  # of GroupNorm
STRIDES = (4, 8, 16, 32)  # of what a pyramid is made of


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
        top: "pool" gives levels P2..P6, the last one every second pixel of P5; "p5" and "c5"
            give P3..P7, the last two by 3x3 convolutions of stride 2, from P5, or from what the
            backbone has there.
        top_relu: a ReLU between these two.
        upsample: how a level is enlarged to be added to the one below.
        raw: what the backbone itself has at stride 2 comes after the levels.

    Attributes:
        strides: of the levels.
        raw: channels of that map; 0 if it is not there.

    Raises:
        InputError: timm has no such model, or it lacks one of the strides, or it has no strides
            to move, or too few stages to freeze; channels do not fit GroupNorm.
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
        top: Literal["pool", "p5", "c5"] = "pool",
        top_relu: bool = False,
        upsample: Literal["nearest", "bilinear"] = "nearest",
        raw: bool = False,
    ) -> None:
        super().__init__()
        if fpn_norm == "group" and channels % GROUPS:
            raise InputError(
                f"channels is {channels}: give a multiple of {GROUPS} with fpn_norm: group"
            )
        self.name, self.norm = name, norm
        self.body = _features(name, (2, *STRIDES) if raw else STRIDES)
        if stride_in_1x1:
            _move_strides(self.body, name)
        info = self.body.feature_info
        stages, widths = info.module_name(), info.channels()
        self.raw = 0
        if raw:
            stages, (self.raw, *widths) = stages[1:], widths
        extra: ExtraFPNBlock = LastLevelMaxPool()
        if top != "pool":
            self.strides = (8, 16, 32, 64, 128)
            widths = widths[1:]
            extra = Top(None if top == "p5" else widths[-1], channels, relu=top_relu)
        self.fpn = Pyramid(
            widths,
            channels,
            extra_blocks=extra,
            norm_layer=partial(nn.GroupNorm, GROUPS) if fpn_norm == "group" else None,
        )
        self.fpn.mode = upsample
        config = timm.get_pretrained_cfg(name)
        mean = config.mean if config else timm.data.IMAGENET_DEFAULT_MEAN
        std = config.std if config else timm.data.IMAGENET_DEFAULT_STD
        for key, value in (("mean", mean), ("std", std)):
            self.register_buffer(key, torch.tensor(value).reshape(3, 1, 1) * 255, persistent=False)
        if frozen_stages > len(stages):
            raise InputError(f"frozen_stages is {frozen_stages}: {name} has {len(stages)} stages")
        if frozen_stages:
            self._freeze(stages[frozen_stages - 1])
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
        """Like any module's, but frozen norms, and those of frozen stages, stay in evaluation."""
        super().train(mode)
        for module in self.body.modules():
            if not isinstance(module, nn.modules.batchnorm._BatchNorm):
                continue
            if self.norm == "frozen" or (module.affine and not module.weight.requires_grad):
                module.eval().requires_grad_(False)
        return self

    def forward(self, images: Images) -> list[Tensor]:
        """Five pyramid levels ``[B, channels, H / s, W / s]`` for s in ``strides``.

        Then ``[B, C, H / 2, W / 2]`` of the backbone, with ``raw``.
        """
        height, width = images.pixels.shape[-2:]
        sizes = images.sizes[:, :, None, None]
        ys = torch.arange(height, device=sizes.device)[:, None] < sizes[:, 0]
        xs = torch.arange(width, device=sizes.device) < sizes[:, 1]
        pixels = (images.pixels.to(self.mean.dtype) - self.mean) / self.std
        # Zero after normalisation, so that padding looks like the mean picture.
        pixels = pixels * (ys & xs)[:, None].to(pixels.dtype)
        exporting = torch.compiler.is_exporting()
        if pixels.device.type == "cpu" and not torch.is_grad_enabled() and not exporting:
            # CPU kernels are quicker in this format, and RoIAlign reads it as a table of pixels.
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        found = self.body(pixels)
        features = found[-len(self.fpn.inner_blocks) :]
        levels = self.fpn(OrderedDict((str(i), f) for i, f in enumerate(features)))
        raw = found[:1] if self.raw else []
        return [*cast("dict[str, Tensor]", levels).values(), *raw]


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


class Pyramid(FeaturePyramidNetwork):  # type: ignore[misc]  # torchvision has no types
    """torchvision's, but with a choice of how levels are enlarged.

    Attributes:
        mode: of the enlargement.
    """

    mode = "nearest"

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """Levels by name, from the backbone's features by name, the finest first."""
        features = list(x.values())
        inner = self.get_result_from_inner_blocks(features[-1], -1)
        levels = [self.get_result_from_layer_blocks(inner, -1)]
        for i in reversed(range(len(features) - 1)):
            side = self.get_result_from_inner_blocks(features[i], i)
            inner = side + functional.interpolate(inner, size=side.shape[-2:], mode=self.mode)
            levels.insert(0, self.get_result_from_layer_blocks(inner, i))
        names = list(x)
        if self.extra_blocks is not None:
            levels, names = self.extra_blocks(levels, features, names)
        return OrderedDict(zip(names, levels, strict=True))


class Top(ExtraFPNBlock):  # type: ignore[misc]
    """Two levels above P5, each a 3x3 convolution of stride 2.

    Args:
        width: channels of the backbone's last features, which they start from; None: from P5.
        channels: of the pyramid.
        relu: between the two.
    """

    def __init__(self, width: int | None, channels: int, *, relu: bool) -> None:
        super().__init__()
        self.from_pyramid, self.relu = width is None, relu
        self.p6 = nn.Conv2d(width or channels, channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        for layer in (self.p6, self.p7):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(cast(Tensor, layer.bias))

    def forward(
        self, results: list[Tensor], x: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        """Two levels and names more."""
        p6 = self.p6(results[-1] if self.from_pyramid else x[-1])
        p7 = self.p7(functional.relu(p6) if self.relu else p6)
        return [*results, p6, p7], [*names, "p6", "p7"]


def raw_channels(name: str) -> int:
    """Channels that a backbone has at stride 2.

    Raises:
        InputError: timm has no such model, or it has nothing there.
    """
    return int(_features(name, (2, *STRIDES)).feature_info.channels()[0])


def _features(name: str, strides: tuple[int, ...]) -> Any:
    """The bare timm feature network with these strides and random weights."""
    try:
        probe: Any = timm.create_model(name, features_only=True, pretrained=False)
    except RuntimeError as error:
        known = ", ".join(timm.list_models(f"*{name[:6]}*")[:5]) or "see timm.list_models()"
        raise InputError(f"no timm backbone {name!r} with features; similar: {known}") from error
    reductions = probe.feature_info.reduction()
    missing = [s for s in strides if s not in reductions]
    if missing:
        *most, last = map(str, strides)
        raise InputError(
            f"backbone {name!r} has features at strides {reductions}, but {missing} is missing: "
            f"choose one with strides {', '.join(most)} and {last}"
        )
    indices = tuple(
        max(i for i, reduction in enumerate(reductions) if reduction == s) for s in strides
    )
    return timm.create_model(name, features_only=True, pretrained=False, out_indices=indices)
