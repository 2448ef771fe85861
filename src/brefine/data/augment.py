"""What training changes in a picture at random, beyond its size.

Geometry lies in ``transforms``; what is here decides what to draw, mixes pictures and colours,
and checks what a user's own function makes. Everything random comes from the generator given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from brefine.data.transforms import crop, cut, flip, tighten, transpose
from brefine.recipe import DataRecipe
from brefine.structures import Bitmaps, InputError, Instances

#: a user's own step: picture ``[3, H, W]`` uint8, labels, generator -> the first two, changed
Transform = Callable[[Tensor, Instances, np.random.Generator], tuple[Tensor, Instances]]

#: luma of RGB, ITU-R BT.601
LUMA = (0.299, 0.587, 0.114)
#: standard deviation in pixels of the soft edge of pasted objects
EDGE = 1.0


def choose_sides(recipe: DataRecipe, random: np.random.Generator) -> tuple[int, int]:
    """Short and largest long side to resize a picture to.

    With ``jitter`` its long side becomes a random multiple of ``crop``, else its short side one
    of ``short_side``.
    """
    if recipe.jitter is None:
        return int(random.choice(recipe.short_side)), recipe.long_side
    assert recipe.crop is not None
    long = max(1, round(random.uniform(*recipe.jitter) * recipe.crop))
    return long, long


def place(
    picture: Tensor, target: Instances, recipe: DataRecipe, random: np.random.Generator
) -> tuple[Tensor, Instances]:
    """A picture and its labels flipped, turned and cropped as the recipe says.

    With ``crop`` the result is a square of that side: a random part of a picture that is larger,
    a smaller one at a random place on grey.
    """
    across = random.random() < recipe.flip
    down = random.random() < recipe.flip_vertical
    quarters = int(random.integers(4)) if recipe.rotate90 else 0
    # A quarter turn exchanges x and y and flips once; two of them flip both ways.
    across, down = across != (quarters in (1, 2)), down != (quarters in (2, 3))
    if quarters % 2:
        picture, target = transpose(picture, target)
    if across:
        picture, target = flip(picture, target)
    if down:
        picture, target = flip(picture, target, vertical=True)
    if recipe.crop is None:
        return picture, target
    return crop_randomly(picture, target, (recipe.crop, recipe.crop), random)


def crop_randomly(
    picture: Tensor, target: Instances, size: tuple[int, int], random: np.random.Generator
) -> tuple[Tensor, Instances]:
    """A random part of the picture, of ``size``; all of it, on grey, where it is smaller."""
    if target.size == size:
        return picture, target
    room = [old - new for old, new in zip(target.size, size, strict=True)]
    y, x = (int(random.integers(min(0, r), max(0, r), endpoint=True)) for r in room)
    return crop(picture, target, (x, y), size)


def paste(
    picture: Tensor, target: Instances, source: Tensor, objects: Instances, *, blend: bool = False
) -> tuple[Tensor, Instances]:
    """Objects of another picture in front of those of this one, at the same place.

    Hidden pixels are taken from the masks of what lies behind, by the rules of
    ``transforms.cut``.

    Args:
        picture: ``[3, H, W]`` uint8.
        target: its labels, with masks.
        source: ``[3, H, W]`` uint8, another picture of the same size.
        objects: those of ``source`` to paste.
        blend: fade the pasted objects in over the pixels around their outlines; masks stay.
    """
    assert target.masks is not None
    assert objects.masks is not None
    hidden = torch.zeros(target.size, dtype=torch.uint8)
    for window, there in _regions(objects.masks):
        hidden[there] |= window
    if blend:
        picture = _blend(picture, source, hidden)
    else:
        picture = torch.where(hidden.bool(), source, picture)
    windows = []
    for window, there in _regions(target.masks):
        over = hidden[there]
        windows.append(window & (1 - over) if (window & over).any() else window)
    behind = cut(target, Bitmaps(windows, target.masks.origins), target.size)
    assert behind.masks is not None
    masks = Bitmaps(
        behind.masks.windows + objects.masks.windows,
        torch.cat([behind.masks.origins, objects.masks.origins]),
    )
    labels = torch.cat([behind.labels, objects.labels])
    boxes = torch.cat([behind.boxes, objects.boxes])
    return picture, Instances(target.size, boxes, labels, masks=masks)


def _regions(masks: Bitmaps) -> list[tuple[Tensor, tuple[slice, slice]]]:
    """Each window with the rows and columns of the frame that it covers."""
    return [
        (window, (slice(y, y + window.shape[0]), slice(x, x + window.shape[1])))
        for window, (x, y) in zip(masks.windows, masks.origins.tolist(), strict=True)
    ]


def _blend(picture: Tensor, source: Tensor, mask: Tensor) -> Tensor:
    """``source`` where a mask ``[H, W]`` is set, fading over at its outline (a Gaussian)."""
    from torchvision.transforms.v2 import functional as vision  # not loaded for nothing

    inside, (x, y) = tighten(mask)
    if not inside.numel():
        return picture
    reach = math.ceil(3 * EDGE)
    rows = slice(max(y - reach, 0), y + inside.shape[0] + reach)
    columns = slice(max(x - reach, 0), x + inside.shape[1] + reach)
    taps, sigmas = [2 * reach + 1] * 2, [EDGE] * 2
    # Bordered by what lies there anyway, so that it may be smaller than the kernel.
    alpha = functional.pad(mask[rows, columns][None, None].float(), [reach] * 4, mode="replicate")
    alpha = vision.gaussian_blur(alpha, taps, sigmas)[0, :, reach:-reach, reach:-reach]
    below, above = picture[:, rows, columns].float(), source[:, rows, columns].float()
    picture = picture.clone()
    picture[:, rows, columns] = torch.lerp(below, above, alpha).round_().to(torch.uint8)
    return picture


def choose(objects: Instances, random: np.random.Generator) -> Instances:
    """A random subset, at least one if there is one; every number is as likely."""
    if not len(objects):
        return objects
    count = int(random.integers(1, len(objects), endpoint=True))
    chosen = random.choice(len(objects), count, replace=False)
    return objects[torch.from_numpy(np.sort(chosen))]


def shift_colours(picture: Tensor, strength: float, random: np.random.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue changed at random.

    The first three are multiplied by factors from ``1 - strength`` to ``1 + strength``: distance
    from black, from the mean luma, from the pixel's luma. Hue is turned about the grey axis by up
    to ``strength`` quarters of a full turn. All of it is one affine map of the colours, clipped at
    the end: step by step, torchvision's ``ColorJitter`` takes many times as long.

    Args:
        picture: ``[3, H, W]`` uint8.
        strength: 0..1.
        random: where the four numbers come from.

    Returns:
        ``[3, H, W]`` uint8.
    """
    brightness, contrast, saturation, turn = random.uniform(-strength, strength, 4).tolist()
    brightness, contrast, saturation = 1 + brightness, 1 + contrast, 1 + saturation
    return adjust_colours(picture, brightness, contrast, saturation, turn / 4)


def adjust_colours(
    picture: Tensor, brightness: float, contrast: float, saturation: float, turn: float
) -> Tensor:
    """The map of ``shift_colours``: three factors, and the ``turn`` of hue in full turns."""
    pixels = picture.reshape(3, -1).float()
    luma = torch.tensor([LUMA])
    one, grey = torch.eye(3), torch.full((3, 3), 1 / 3)
    across = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    angle = 2 * math.pi * turn
    rotate = math.cos(angle) * (one - grey) + grey + math.sin(angle) * across
    saturate = saturation * one + (1 - saturation) * luma.expand(3, 3)
    matrix = brightness * contrast * rotate @ saturate
    offset = brightness * (1 - contrast) * (luma @ pixels.mean(1, keepdim=True))
    # Grey stays grey in the last two, so the offset of contrast passes through them.
    changed = torch.addmm(offset.expand(3, 1), matrix, pixels)
    return changed.round_().clamp_(0, 255).to(torch.uint8).view(picture.shape)


def call(
    transform: Transform,
    picture: Tensor,
    target: Instances,
    random: np.random.Generator,
    num_classes: int,
) -> tuple[Tensor, Instances]:
    """What a user's own function makes of a picture, checked.

    Boxes are those of the masks it returns; objects whose masks it emptied are left out.

    Raises:
        InputError: the result cannot be trained on; names the function and what is wrong.
    """
    result = transform(picture, target, random)
    if fault := _find_fault(result, num_classes):
        name = getattr(transform, "__qualname__", type(transform).__qualname__)
        raise InputError(f"transform {transform.__module__}.{name}: {fault}")
    pixels, labels = result
    assert labels.masks is not None
    windows, origins = [], []
    for window, (x, y) in zip(labels.masks.windows, labels.masks.origins.tolist(), strict=True):
        window, (left, top) = tighten(window)
        windows.append(window)
        origins.append((x + left, y + top))
    masks = Bitmaps(windows, torch.tensor(origins, dtype=torch.int64).reshape(-1, 2))
    some = torch.tensor([window.numel() > 0 for window in windows], dtype=torch.bool)
    return pixels, Instances(labels.size, masks.boxes(), labels.labels, masks=masks)[some]


def _find_fault(result: Any, num_classes: int) -> str | None:
    """Why what a user's function returned cannot be used, or None."""
    if not isinstance(result, tuple) or len(result) != 2:
        return f"returned {_describe(result)}, expected a tuple (picture, Instances)"
    picture, target = result
    if (
        not isinstance(picture, Tensor)
        or (picture.dtype, picture.ndim) != (torch.uint8, 3)
        or picture.shape[0] != 3
        or not picture.numel()
    ):
        return f"returned {_describe(picture)} as the picture, expected uint8 [3, H, W]"
    if not isinstance(target, Instances):
        return f"returned {_describe(target)} as the labels, expected Instances"
    size = tuple(picture.shape[1:])
    if tuple(target.size) != size:
        return f"labels of size {tuple(target.size)} with a picture of size {size}"
    labels, masks = target.labels, target.masks
    if not isinstance(labels, Tensor) or (labels.dtype, labels.ndim) != (torch.int64, 1):
        return f"returned {_describe(labels)} as labels, expected int64 [N]"
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        return f"a label is not in 0..{num_classes - 1}"
    if not isinstance(masks, Bitmaps):
        return f"returned {_describe(masks)} as masks, expected Bitmaps"
    if len(masks) != len(labels):
        return f"{len(masks)} masks for {len(labels)} labels"
    origins = masks.origins
    if not isinstance(origins, Tensor) or origins.dtype != torch.int64:
        return f"returned {_describe(origins)} as origins of the masks, expected int64 [N, 2]"
    if origins.shape != (len(masks), 2):
        return f"origins of shape {list(origins.shape)} for {len(masks)} masks"
    for index, (window, (x, y)) in enumerate(zip(masks.windows, origins.tolist(), strict=True)):
        if not isinstance(window, Tensor) or (window.dtype, window.ndim) != (torch.uint8, 2):
            return f"mask {index} is {_describe(window)}, expected uint8 [h, w]"
        if window.numel() and int(window.max()) > 1:
            return f"mask {index} holds {int(window.max())}, expected 0 and 1"
        if min(x, y) < 0 or y + window.shape[0] > size[0] or x + window.shape[1] > size[1]:
            return f"mask {index} reaches outside of its picture"
    return None


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"tuple of {len(value)}" if isinstance(value, tuple) else type(value).__name__
