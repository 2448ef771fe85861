"""What a model costs: parameters and multiply-adds (MACs) of every part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from brefine.data.read import read
from brefine.exported import is_exported
from brefine.methods import METHODS, create
from brefine.parts.backbone import Backbone
from brefine.parts.two_stage import TwoStage
from brefine.recipe import Recipe
from brefine.structures import Images, InputError, Segmenter
from brefine.weights import load, locate


class Part(NamedTuple):
    """One line of the table.

    Attributes:
        name: of the part; parts of a part are indented.
        parameters: numbers it has learnt, norms included.
        macs: multiply-adds of one use.
        uses: a picture: 1, or the number of RoIs.
    """

    name: str
    parameters: int
    macs: int
    uses: int


def describe(
    target: str,
    settings: Sequence[str] = (),
    *,
    num_classes: int = 80,
    size: tuple[int, int] = (800, 1333),
    proposals: int = 1000,
    detections: int = 100,
) -> tuple[list[Part], str]:
    """Parts of a model folder, a recipe or a method by name, and a title.

    Args:
        target: path or name.
        settings: changes to a recipe or a method's defaults, see ``Recipe.with_settings``.
        num_classes: K, where neither a model nor the recipe's training set tells.
        size: (height, width) of the picture at the network's input.
        proposals: RoIs of the box head.
        detections: RoIs of the mask head.

    Raises:
        InputError: no such thing, or a wrong setting.
    """
    recipe, model, num_classes = build(target, settings, num_classes)
    title = (
        f"{recipe.model.method}, {num_classes} classes, {size[0]} x {size[1]} pixels, "
        f"{proposals} proposals, {detections} detections"
    )
    if isinstance(model, TwoStage):
        return count(model, size, proposals=proposals, detections=detections), title
    return count_dense(cast(nn.Module, model), size), title.rpartition(f", {proposals}")[0]


def build(
    target: str, settings: Sequence[str] = (), num_classes: int = 80
) -> tuple[Recipe, Segmenter, int]:
    """A model folder, or a recipe or a method by name with random weights; arguments as above.

    Returns:
        The recipe, the model, and how many classes it has.

    Raises:
        InputError: no such thing, or a wrong setting.
    """
    path = locate(target)
    if is_exported(path):
        raise InputError(f"{target}: an exported file has no parts: name its model folder")
    if path.is_dir():
        if settings:
            raise InputError(f"{path}: a trained model cannot be changed: leave out --set")
        loaded = load(path)
        return loaded.recipe, loaded.segmenter, len(loaded.categories)
    if target in METHODS and not path.exists():
        values = {"model": {"method": target}, "train": {"steps": 1, "lr": 0.01}}
        recipe = Recipe.parse(values, target)
    else:
        recipe = Recipe.load(path)
    recipe = recipe.with_settings(settings)
    if recipe.data.train and recipe.data.train.exists():
        labelled = read(recipe.data.train, recipe.data.images, split="train", quiet=True)
        num_classes = len(labelled.categories)
    return recipe, create(recipe.model.method, num_classes, **recipe.model.options), num_classes


@torch.no_grad()
def count(
    model: TwoStage, size: tuple[int, int], *, proposals: int = 1000, detections: int = 100
) -> list[Part]:
    """Count parameters and MACs of a two-stage model's parts.

    Convolutions and matrix products are counted, as prediction runs them; RoIAlign,
    interpolation, norms and ReLU are not, nor is NMS. The trunk runs on meta tensors and the
    heads on one RoI, so this takes seconds at any size. The model's trunk and RPN are moved to
    the meta device: the model cannot be used afterwards.

    Args:
        model: any; its weights do not matter.
        size: (height, width) of the picture at the network's input, before padding.
        proposals: RoIs of the box head.
        detections: RoIs of the mask head.
    """
    model.eval()
    channels = model.rpn.conv.in_channels
    levels = [torch.zeros(1, channels, 8, 8) for _ in Backbone.strides]
    if model.branch is not None:
        raw = [torch.zeros(1, model.trunk.raw, 16, 16)] if model.trunk.raw else []
        levels.append(model.branch([*levels, *raw])[0])
    roi = torch.tensor([[0.0, 0, 0, 32, 32]])
    box_head = cast(nn.Module, model.box_head)
    box = _macs(box_head, levels, roi)
    label = torch.zeros(1, dtype=torch.int64)
    mask = _macs(model.mask_head, levels, roi, label)

    model.trunk.to("meta")
    model.rpn.to("meta")
    height, width = (-(-side // 32) * 32 for side in size)
    pixels = torch.zeros(1, 3, height, width, device="meta")
    images = Images(pixels, torch.tensor([size], device="meta"))
    trunk = _macs(model.trunk, images)
    features = [torch.zeros_like(feature) for feature in model.trunk(images)]
    levels = features[: len(Backbone.strides)]
    branch = []
    if model.branch is not None:
        model.branch.to("meta")
        branch = _parts("branch", model.branch, _macs(model.branch, features), 1)
    return [
        *_parts("trunk", model.trunk, trunk, 1),
        *_parts("rpn", model.rpn, _macs(model.rpn, levels), 1),
        *branch,
        *_parts("box_head", box_head, box, proposals),
        *_parts("mask_head", model.mask_head, mask, detections),
    ]


@torch.no_grad()
def count_dense(model: nn.Module, size: tuple[int, int]) -> list[Part]:
    """Count parameters and MACs of a one-stage model's parts, as `count` does.

    Each part but the trunk is called with the pyramid, unless it is ``training_only``. What is
    worked out for single objects, a product of matrices at most, is not counted.

    Args:
        model: any; it cannot be used afterwards.
        size: (height, width) of the picture at the network's input, before padding.
    """
    trunk = model.eval().to("meta").trunk
    assert isinstance(trunk, Backbone)
    height, width = (-(-side // 32) * 32 for side in size)
    pixels = torch.zeros(1, 3, height, width, device="meta")
    images = Images(pixels, torch.tensor([size], device="meta"))
    parts = _parts("trunk", trunk, _macs(trunk, images), 1)
    levels = [torch.zeros_like(level) for level in trunk(images)]
    for name, part in model.named_children():
        if part is not trunk:
            uses = 0 if getattr(part, "training_only", False) else 1
            parts += _parts(name, part, _macs(part, levels), uses)
    return parts


def _macs(module: nn.Module, *inputs: Any) -> dict[str, int]:
    """MACs of one call by the path of the module in ``module``; "" is all of it."""
    with FlopCounterMode(display=False) as counter:
        made = module(*inputs)
        judge = getattr(module, "quality", None)  # of a mask head, of its masks
        if judge is not None:
            judge(*inputs, made)
    totals: dict[str, int] = {}
    for path, operations in counter.get_flop_counts().items():
        own = "" if path == "Global" else path.partition(".")[2]
        if path == "Global" or own:
            totals[own] = sum(operations.values()) // 2
    return totals


def _parts(name: str, module: nn.Module, macs: dict[str, int], uses: int) -> list[Part]:
    """A part, and below it its children."""
    rows = [Part(name, _size(module), macs[""], uses)]
    for key, child in module.named_children():
        # A list of modules is never called itself: the calls of its members count.
        inside = [path for path in macs if path == key or path.startswith(f"{key}.")]
        calls = [path for path in inside if not any(path.startswith(f"{p}.") for p in inside)]
        if size := _size(child):
            rows.append(Part(f"  {key}", size, sum(macs[path] for path in calls), uses))
    return rows


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def print_parts(parts: Sequence[Part], title: str, console: Console) -> None:
    """Print the table; totals count each part once, not its children."""
    console.print(title)
    table = Table()
    table.add_column("part", no_wrap=True)
    for head in ("parameters", "GMAC each", "times", "GMAC a picture"):
        table.add_column(head, justify="right")
    for part in parts:
        table.add_row(
            part.name,
            f"{part.parameters:,}",
            f"{part.macs / 1e9:.3f}",
            f"{part.uses}",
            f"{part.macs * part.uses / 1e9:.1f}",
        )
    whole = [part for part in parts if not part.name.startswith(" ")]
    macs = sum(part.macs * part.uses for part in whole)
    table.add_section()
    parameters = sum(part.parameters for part in whole)
    table.add_row("all", f"{parameters:,}", "", "", f"{macs / 1e9:.1f}")
    console.print(table)
