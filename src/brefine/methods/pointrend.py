"""PointRend (Kirillov et al., CVPR 2020): a coarse mask, made finer where it is unsure.

Figure 3: fully connected layers predict a mask of 7x7 cells; bilinear upsampling doubles its side
again and again, and after each time a small network on single points decides anew about the cells
whose logits are nearest to 0. It sees the finest level at the point and the coarse prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brefine.losses import MASK_LOSSES
from brefine.parts.backbone import Backbone
from brefine.parts.mask_head import MaskLoss
from brefine.parts.two_stage import Detector, Truth, TwoStage
from brefine.ranges import Positive

#: how training picks points
Sampling = Literal["biased", "uniform", "grid"]


def pointrend(
    num_classes: int,
    *,
    backbone: str = "resnet50",
    channels: Positive = 256,
    hidden: int = 1024,
    point_channels: int = 256,
    point_layers: int = 3,
    subdivisions: int = 5,
    points: int = 784,
    train_points: int = 196,
    sampling: Sampling = "biased",
    mask_loss: MaskLoss = "bce",
    ranking: bool = False,
    detector: Detector = Detector(),
) -> TwoStage:
    """PointRend on Mask R-CNN's detector.

    Args:
        num_classes: K, without background.
        backbone: a timm name.
        channels: of the pyramid.
        hidden: width of the coarse head's fully connected layers.
        point_channels: width of the point head.
        point_layers: of the point head, before its logits.
        subdivisions: doublings of the side: 5 give masks of 224 cells.
        points: that are predicted anew after each doubling, at most.
        train_points: a RoI in training.
        sampling: of these: "biased", three quarters of them the least certain of three times as
            many random ones (section 3.1), "uniform", or "grid", the centres of equal cells
            (``train_points`` is then a square number).
        mask_loss: of the coarse mask, a name of ``losses.MASK_LOSSES``; points learn by BCE.
        ranking: Rank & Sort with the three-task balance (eq. 3-6 of BRefine).
        detector: options of trunk, RPN and box head.

    Raises:
        InputError: an unknown backbone.
    """
    head = PointHead(
        channels,
        num_classes,
        hidden=hidden,
        point_channels=point_channels,
        point_layers=point_layers,
        subdivisions=subdivisions,
        points=points,
        train_points=train_points,
        sampling=sampling,
        loss=MASK_LOSSES[mask_loss],
    )
    return TwoStage(
        num_classes,
        head,
        backbone=backbone,
        channels=channels,
        ranking=ranking,
        detector=detector,
    )


class PointHead(nn.Module):
    """The coarse head and the point head; arguments are those of `pointrend`."""

    side = 7  # of the coarse mask
    mmdetection: ClassVar[list[tuple[str, str]]] = [
        (r"roi_head\.mask_head\.downsample_conv\.conv\.", "mask_head.reduce."),
        (r"roi_head\.mask_head\.fcs\.(\d)\.", r"mask_head.fcs.\1."),
        (r"roi_head\.mask_head\.fc_logits\.", "mask_head.coarse."),
        (r"roi_head\.point_head\.fcs\.(\d)\.conv\.", r"mask_head.layers.\1."),
        (r"roi_head\.point_head\.fc_logits\.", "mask_head.logits."),
    ]

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        hidden: int = 1024,
        point_channels: int = 256,
        point_layers: int = 3,
        subdivisions: int = 5,
        points: int = 784,
        train_points: int = 196,
        sampling: Sampling = "biased",
        loss: Callable[[Tensor, Tensor], Tensor] = MASK_LOSSES["bce"],
    ) -> None:
        super().__init__()
        self.num_classes, self.criterion = num_classes, loss
        self.subdivisions, self.points = subdivisions, points
        self.train_points, self.sampling = train_points, sampling
        self.output_size = self.side << subdivisions
        self.numbers = points * max(channels, point_channels + num_classes)
        self.reduce = nn.Conv2d(channels, channels, 2, stride=2)
        cells = channels * self.side**2
        self.fcs = nn.ModuleList([nn.Linear(cells, hidden), nn.Linear(hidden, hidden)])
        self.coarse = nn.Linear(hidden, num_classes * self.side**2)
        widths = [channels] + [point_channels] * point_layers
        self.layers = nn.ModuleList(
            nn.Conv1d(width + num_classes, point_channels, 1) for width in widths[:-1]
        )
        self.logits = nn.Conv1d(widths[-1] + num_classes, num_classes, 1)
        layers = [f"layers.{i}" for i in range(point_layers)]
        self.class_rows = {"coarse": self.side**2, "logits": 1}
        self.class_columns = dict.fromkeys([*layers, "logits"], 1)
        for layer in (self.reduce, *self.fcs, *self.layers):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        for last in (self.coarse, self.logits):  # BCE starts at ln 2
            nn.init.normal_(last.weight, std=0.001)
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    def forward(self, features: Sequence[Tensor], rois: Tensor, labels: Tensor) -> Tensor:
        """Logits ``[R, output_size, output_size]`` of the class ``labels [R]``."""
        coarse = self.predict_coarse(features, rois)
        logits = _own(coarse, labels)
        for step in range(1, self.subdivisions + 1):
            logits = F.interpolate(logits[:, None], scale_factor=2, mode="bilinear")[:, 0]
            side = self.side << step
            if self.points >= 4 * side**2 and step < self.subdivisions:
                continue  # the next step decides about all of its cells anyhow
            flat = logits.flatten(1)
            chosen = flat.abs().topk(min(self.points, side**2), largest=False).indices
            points = (torch.stack([chosen % side, chosen // side], 2) + 0.5) / side
            decided = self.decide(features, rois, labels, points, coarse)
            logits = flat.scatter(1, chosen, decided.to(flat.dtype)).view(-1, side, side)
        return logits

    def loss(
        self,
        features: Sequence[Tensor],
        rois: Tensor,
        labels: Tensor,
        truth: Truth,
        stage: int = 0,
    ) -> dict[str, Tensor]:
        """Losses of each RoI's coarse mask and of its points, ``[R]`` each."""
        coarse = self.predict_coarse(features, rois)
        own = _own(coarse, labels)
        points = self.sample(own)
        decided = self.decide(features, rois, labels, points, coarse)
        goal = truth.at(points).to(decided.dtype)
        errors = F.binary_cross_entropy_with_logits(decided, goal, reduction="none")
        return {"mask": self.criterion(own, truth(self.side)), "point": errors.mean(1)}

    def predict_coarse(self, features: Sequence[Tensor], rois: Tensor) -> Tensor:
        """Coarse logits of all classes, ``[R, K, 7, 7]``."""
        side = 2 * self.side
        points = _grid(side, rois).expand(rois.shape[0], -1, -1)
        x = read(features[0], rois, points, Backbone.strides[0])
        x = x.transpose(1, 2).reshape(-1, x.shape[2], side, side)
        x = F.relu(self.reduce(x)).flatten(1)
        for fc in self.fcs:
            x = F.relu(fc(x))
        logits: Tensor = self.coarse(x)
        return logits.view(-1, self.num_classes, self.side, self.side)

    def decide(
        self,
        features: Sequence[Tensor],
        rois: Tensor,
        labels: Tensor,
        points: Tensor,
        coarse: Tensor,
    ) -> Tensor:
        """The point head: logits ``[R, P]`` of the own class at points ``[R, P, 2]`` in 0..1."""
        known = _read_coarse(coarse, points)  # [R, K, P]
        x = read(features[0], rois, points, Backbone.strides[0]).transpose(1, 2)
        for layer in self.layers:
            x = F.relu(layer(torch.cat([x, known], 1)))
        x = torch.cat([x, known], 1)
        assert self.logits.bias is not None
        weight, bias = self.logits.weight[labels, :, 0], self.logits.bias[labels]
        return torch.bmm(weight[:, None].to(x.dtype), x)[:, 0] + bias[:, None]

    @torch.no_grad()
    def sample(self, coarse: Tensor) -> Tensor:
        """Training points ``[R, P, 2]`` in 0..1 for coarse logits ``[R, 7, 7]``."""
        count, rows = self.train_points, len(coarse)
        if self.sampling == "grid":
            return _grid(round(count**0.5), coarse).expand(rows, -1, -1)
        if self.sampling == "uniform":
            return torch.rand(rows, count, 2, device=coarse.device)
        # k = 3 and beta = 0.75 of section 3.1, "mildly biased"
        many = torch.rand(rows, 3 * count, 2, device=coarse.device)
        doubt = _read_coarse(coarse[:, None], many)[:, 0].abs()
        chosen = doubt.topk(int(0.75 * count), largest=False).indices
        unsure = many.gather(1, chosen[..., None].expand(-1, -1, 2))
        others = torch.rand(rows, count - unsure.shape[1], 2, device=coarse.device)
        return torch.cat([unsure, others], 1)


def read(feature: Tensor, rois: Tensor, points: Tensor, stride: int) -> Tensor:
    """Features at points of RoIs, bilinear, zeros outside of the map.

    Args:
        feature: ``[B, C, h, w]``.
        rois: ``[R, 5]`` (image index, xyxy pixels).
        points: ``[R, P, 2]`` (x, y), 0..1 of the RoI.
        stride: pixels a cell.

    Returns:
        ``[R, P, C]``.
    """
    channels, height, width = feature.shape[1:]
    corner, size = rois[:, None, 1:3], rois[:, None, 3:] - rois[:, None, 1:3]
    place = (corner + points * size) / stride - 0.5
    low = place.floor()
    share = place - low
    x, y = torch.stack([low, low + 1], 3).long().unbind(2)  # [R, P, 2] each
    inside_x, inside_y = (x >= 0) & (x < width), (y >= 0) & (y < height)
    x_weight, y_weight = torch.stack([1 - share, share], 3).unbind(2)
    x_weight, y_weight = x_weight * inside_x, y_weight * inside_y
    row = rois[:, :1, None].long() * height + y.clamp(0, height - 1)
    index = row[..., None] * width + x.clamp(0, width - 1)[:, :, None]  # [R, P, 2, 2]
    weight = y_weight[..., None] * x_weight[:, :, None]
    table = feature.permute(0, 2, 3, 1).reshape(-1, channels).contiguous()
    if torch.compiler.is_exporting():
        return (table[index.flatten(2)] * weight.flatten(2)[..., None]).sum(2)
    weight = weight.to(table.dtype).reshape(-1, 4)
    cells = F.embedding_bag(index.reshape(-1, 4), table, per_sample_weights=weight, mode="sum")
    return cells.view(*points.shape[:2], channels)


def _read_coarse(coarse: Tensor, points: Tensor) -> Tensor:
    """Logits ``[R, K, S, S]`` at points ``[R, P, 2]`` in 0..1: ``[R, K, P]``, zeros outside."""
    where = points[:, None].to(coarse.dtype) * 2 - 1
    return F.grid_sample(coarse, where, align_corners=False)[:, :, 0]


def _grid(side: int, like: Tensor) -> Tensor:
    """Centres of ``side * side`` equal cells, row by row: ``[1, P, 2]`` (x, y) in 0..1."""
    line = (torch.arange(side, device=like.device) + 0.5) / side
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x, y], 2).flatten(0, 1)[None]


def _own(logits: Tensor, labels: Tensor) -> Tensor:
    """``[R, S, S]`` of the class ``labels [R]`` from ``[R, K, S, S]``."""
    index = labels[:, None, None, None].expand(-1, 1, *logits.shape[2:])
    return logits.gather(1, index)[:, 0]
