"""Pictures from files, and batches to train on.

Every picture becomes RGB with 8 bits by these rules: the EXIF orientation is applied; grey is
repeated; a palette is looked up; transparent parts show white; CMYK is converted as Pillow does;
16-bit grey is taken as 0..65535 and divided by 257; of several frames the first is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from brefine.data.coco import CocoSet
from brefine.data.pictures import open_picture
from brefine.data.transforms import flip, resize
from brefine.recipe import DataRecipe
from brefine.structures import Bitmaps, Images, InputError, Instances

Batch = tuple[Images, list[Instances]]


def read_picture(path: Path | str) -> Tensor:
    """A picture file as RGB, upright.

    Returns:
        ``[3, H, W]`` uint8.

    Raises:
        InputError: not there, no picture, damaged, too large, or of a kind without a known
            range of values (floats); names the file.
    """
    with open_picture(path) as image:
        return to_tensor(image)


def to_tensor(image: Image.Image) -> Tensor:
    """A Pillow picture as upright RGB, by the rules at the top of this module.

    Returns:
        ``[3, H, W]`` uint8.

    Raises:
        InputError: its values have no known range (floats, 32-bit integers above 65535).
    """
    upright: Image.Image = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):
        grey = np.asarray(upright).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise InputError("grey values outside of 0..65535: convert it to 8 or 16 bits")
        pixels = np.repeat(((grey + 128) // 257).astype(np.uint8)[:, :, None], 3, axis=2)
    elif upright.mode == "F":
        raise InputError("floating-point values: convert it to 8 or 16 bits")
    else:
        if upright.has_transparency_data:
            upright = upright.convert("RGBA")
            white = Image.new("RGBA", upright.size, "white")
            upright = Image.alpha_composite(white, upright)
        pixels = np.array(upright.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


class TrainSet(Dataset[tuple[Tensor, Instances]]):
    """Pictures to train on, at a random size and randomly flipped.

    What is random follows from (seed, epoch, index) alone: neither the number of workers nor
    the order matters. An item is asked for by ``(epoch, index)``, as ``EpochSampler`` does, or by
    ``index`` in the epoch of ``set_epoch``; the key carries the epoch because workers that
    persist keep their own copy of this object.

    Args:
        dataset: pictures and labels; pictures without objects are kept.
        recipe: sizes and flip.
        seed: of everything random.
    """

    def __init__(self, dataset: CocoSet, recipe: DataRecipe, seed: int) -> None:
        self.dataset, self.recipe, self.seed = dataset, recipe, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch of items asked for by a plain index."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Instances]:
        epoch, index = key if isinstance(key, tuple) else (self.epoch, key)
        picture = read_labelled(self.dataset, index)
        random = np.random.default_rng((self.seed, epoch, index))
        short = int(random.choice(self.recipe.short_side))
        flipped = random.random() < self.recipe.flip
        pixels, target = resize(picture, self.dataset.target(index), short, self.recipe.long_side)
        if flipped:
            pixels, target = flip(pixels, target)
        assert target is not None
        return pixels, target


def read_labelled(dataset: CocoSet, index: int) -> Tensor:
    """Picture ``index`` of a set, checked to have the size that its labels were made for.

    Returns:
        ``[3, H, W]`` uint8.

    Raises:
        InputError: as ``read_picture``, or another size than the json says.
    """
    picture = dataset.pictures[index]
    pixels = read_picture(picture.file)
    height, width = pixels.shape[1:]
    if (height, width) != picture.size:
        turned = (width, height) == picture.size
        hint = "was it labelled before it was turned upright?" if turned else "correct the json"
        raise InputError(
            f"{picture.file}: {height} x {width} pixels (height x width), but {dataset.path} says "
            f"{picture.size[0]} x {picture.size[1]} for picture {picture.id}: {hint}"
        )
    return pixels


class EpochSampler(Sampler[tuple[int, int]]):
    """Every picture once an epoch, in an order that follows from (seed, epoch).

    Yields ``(epoch, index)``. Lightning's Trainer calls ``set_epoch`` before each epoch, so a
    resumed run goes on where it was; without it each pass is the next epoch.

    Args:
        size: number of pictures.
        seed: of the order.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        self.epoch += 1
        order = np.random.default_rng((self.seed, epoch)).permutation(self.size)
        return ((epoch, int(index)) for index in order)


def collate(items: Sequence[tuple[Tensor, Instances]]) -> Batch:
    """Pictures and labels as one batch."""
    return Images.stack([picture for picture, _ in items]), [target for _, target in items]


def train_loader(
    dataset: CocoSet,
    recipe: DataRecipe,
    *,
    batch_size: int,
    seed: int,
    sampler: Sampler[tuple[int, int]] | None = None,
) -> DataLoader[Any]:
    """Batches ``(Images, list[Instances])`` to train on.

    Args:
        dataset: pictures and labels.
        recipe: sizes, flip, number of workers.
        batch_size: pictures a batch; a last batch with fewer is left out unless it is the only
            one.
        seed: of order, sizes and flips.
        sampler: yields ``(epoch, index)``; None: all pictures, shuffled.

    Raises:
        InputError: no usable annotation, or pictures that are not there; names the file.
    """
    if not dataset.usable():
        fault = f"{dataset.path}: no usable annotation to train on"
        if dataset.skipped:
            fault += f" ({len(dataset.skipped)} unusable, first: {dataset.skipped[0]})"
        raise InputError(fault)
    missing = [picture.file for picture in dataset.pictures if not picture.file.is_file()]
    if missing:
        raise InputError(
            f"{missing[0]}: no such picture, and {len(missing) - 1} more of {len(dataset)} in "
            f"{dataset.path}: give the folder they are in as images"
        )
    if sampler is None:
        sampler = EpochSampler(len(dataset), seed)
    return _Loader(
        TrainSet(dataset, recipe, seed),
        batch_size=batch_size,
        sampler=sampler,
        num_workers=recipe.workers,
        persistent_workers=recipe.workers > 0,
        drop_last=len(sampler) >= batch_size,  # type: ignore[arg-type]
        collate_fn=_pack,
    )


class _Loader(DataLoader[Any]):
    """Unpacks what the workers packed, and brings their InputError back as the one line it was."""

    def __iter__(self) -> Any:
        try:
            for packed in super().__iter__():
                yield _unpack(packed)
        except InputError as error:
            # From a worker it comes with the worker's traceback, our line last.
            line = str(error).strip().splitlines()[-1]
            raise InputError(line.removeprefix(f"{InputError.__module__}.InputError: ")) from None


def _pack(items: Sequence[tuple[Tensor, Instances]]) -> tuple[Any, ...]:
    """A batch in six tensors.

    Between processes each tensor takes an open file: a batch with thousands of masks would
    exhaust them.
    """
    images, targets = collate(items)
    masks = [target.masks for target in targets if target.masks is not None]
    windows = [window for bitmaps in masks for window in bitmaps.windows]
    return (
        images,
        [target.size for target in targets],
        [len(target) for target in targets],
        torch.cat([target.boxes for target in targets]),
        torch.cat([target.labels for target in targets]),
        torch.cat([bitmaps.origins for bitmaps in masks]),
        [tuple(window.shape) for window in windows],
        torch.cat([window.flatten() for window in windows] or [torch.zeros(0, dtype=torch.uint8)]),
    )


def _unpack(packed: tuple[Any, ...]) -> Batch:
    images, sizes, counts, boxes, labels, origins, shapes, pixels = packed
    flat = pixels.split([height * width for height, width in shapes])
    windows = [piece.view(shape) for piece, shape in zip(flat, shapes, strict=True)]
    targets, start = [], 0
    for size, count in zip(sizes, counts, strict=True):
        part = slice(start, start + count)
        masks = Bitmaps(windows[part], origins[part])
        targets.append(Instances(size, boxes[part], labels[part], masks=masks))
        start += count
    return images, targets
