"""Pictures from files, and batches to train on.

Every picture becomes RGB with 8 bits by these rules: the EXIF orientation is applied; grey is
repeated; a palette is looked up; transparent parts show white; CMYK is converted as Pillow does;
16-bit grey is taken as 0..65535 and divided by 257; of several frames the first is taken.
"""

from __future__ import annotations

import os
import re
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Sampler

from brefine.data.augment import (
    Transform,
    call,
    choose,
    choose_sides,
    crop_randomly,
    paste,
    place,
    shift_colours,
)
from brefine.data.coco import CocoSet, Picture
from brefine.data.pictures import open_picture, read_rgb
from brefine.data.samplers import EpochSampler, aspect_groups, repeat_factors
from brefine.data.transforms import resize
from brefine.recipe import DataRecipe
from brefine.structures import Bitmaps, Images, InputError, Instances

Batch = tuple[Images, list[Instances]]

UNKNOWN = 255  # in a map of classes: nobody said what is there


def read_picture(path: Path | str, content: bytes | None = None) -> Tensor:
    """A picture file as RGB, upright.

    Args:
        path: the file.
        content: what is in it, where that is here already; ``path`` is then only its name.

    Returns:
        ``[3, H, W]`` uint8.

    Raises:
        InputError: not there, no picture, damaged, too large, or of a kind without a known
            range of values (floats); names the file.
    """
    # Left in Pillow's order of bytes, which resizing is fastest with.
    return torch.from_numpy(read_rgb(path, content)).permute(2, 0, 1)


class TrainSet(Dataset[tuple[Tensor, Instances]]):
    """Pictures to train on, changed at random as the recipe says.

    What is random follows from (seed, epoch, index, copy) alone: neither the number of workers
    nor the order matters. An item is asked for by that key without the seed, as ``EpochSampler``
    does, or by ``index`` in the epoch of ``set_epoch``; the key carries the epoch because workers
    that persist keep their own copy of this object.

    Args:
        dataset: pictures and labels; pictures without objects are kept.
        recipe: sizes and augmentation.
        seed: of everything random.
        transform: a last step of the user's own: it is given picture ``[3, H, W]`` uint8, labels
            and generator, and returns the first two, changed. Boxes are recomputed from masks.
            Workers must be able to import it where processes are spawned, not forked.
    """

    def __init__(
        self,
        dataset: CocoSet,
        recipe: DataRecipe,
        seed: int,
        transform: Transform | None = None,
    ) -> None:
        self.dataset, self.recipe, self.seed, self.transform = dataset, recipe, seed, transform
        self.sources = np.array(dataset.usable() if recipe.copy_paste else [], dtype=np.int64)
        self.epoch = 0
        self.top, self.shared = Path(), frozenset[str]()
        if recipe.semantic is not None and len(dataset):
            files = [picture.file for picture in dataset.pictures]
            self.top = Path(os.path.commonpath([file.parent for file in files]))
            stems = Counter(file.stem for file in files)
            self.shared = frozenset(stem for stem, count in stems.items() if count > 1)

    def set_epoch(self, epoch: int) -> None:
        """The epoch of items asked for by a plain index."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, ...]) -> tuple[Tensor, Instances]:
        epoch, index, copy = (*key, 0)[:3] if isinstance(key, tuple) else (self.epoch, key, 0)
        random = np.random.default_rng((self.seed, epoch, index, copy))
        picture, target = self._view(index, random)
        if self.recipe.copy_paste and random.random() < self.recipe.copy_paste:
            picture, target = self._paste(picture, target, index, random)
        if self.recipe.colour:
            picture = shift_colours(picture, self.recipe.colour, random)
        if self.transform is not None:
            try:
                classes = len(self.dataset.categories)
                picture, target = call(self.transform, picture, target, random, classes)
            except InputError as error:
                raise InputError(f"{self.dataset.pictures[index].file}: {error}") from None
        return picture, target

    def _view(self, index: int, random: np.random.Generator) -> tuple[Tensor, Instances]:
        picture = read_labelled(self.dataset, index)
        picture, _ = resize(picture, None, *choose_sides(self.recipe, random))
        height, width = picture.shape[1:]
        # Drawn at this size: faster than at the picture's own, and outlines stay as sharp.
        target = self.dataset.target(index, (height, width))
        if self.recipe.semantic is None:
            return place(picture, target, self.recipe, random)
        # Two more channels go the picture's way: the map, and where a crop reaches beyond it.
        labelled = self.dataset.pictures[index]
        classes = read_map(self._map_of(labelled.file), labelled.size)
        small = functional.interpolate(classes[None, None], (height, width), mode="nearest")[0]
        picture = torch.cat([picture, small, torch.zeros_like(small)])
        picture, target = place(picture, target, self.recipe, random)
        semantic = torch.where(picture[4] == 0, picture[3], UNKNOWN)
        return picture[:3], replace(target, semantic=semantic)

    def _map_of(self, file: Path) -> Path:
        """The map of a picture: in the same folder as the picture, or else beside the others.

        Pictures of several folders that have one name have a map each.
        """
        assert self.recipe.semantic is not None
        own = (self.recipe.semantic / file.relative_to(self.top)).with_suffix(".png")
        if file.stem in self.shared or own.is_file():
            return own
        return self.recipe.semantic / f"{file.stem}.png"

    def _paste(
        self, picture: Tensor, target: Instances, index: int, random: np.random.Generator
    ) -> tuple[Tensor, Instances]:
        """Some objects of another picture, drawn as this one was, in front."""
        others = self.sources[self.sources != index]
        if not len(others):
            return picture, target
        source, objects = self._view(int(random.choice(others)), random)
        source, objects = crop_randomly(source, objects, target.size, random)
        objects = choose(objects, random)
        return paste(picture, target, source, objects, blend=self.recipe.copy_paste_blend)


def read_labelled(dataset: CocoSet, index: int) -> Tensor:
    """Picture ``index`` of a set, checked to have the size that its labels were made for.

    Returns:
        ``[3, H, W]`` uint8.

    Raises:
        InputError: as ``read_picture``, or another size than the json says.
    """
    picture = dataset.pictures[index]
    pixels = read_picture(picture.file)
    check_size(dataset, index, (pixels.shape[1], pixels.shape[2]))
    return pixels


def require_pictures(dataset: CocoSet, limit: int | None = None) -> None:
    """Make sure that every picture is there, or every one of the first ``limit``.

    Raises:
        InputError: names the first that is not.
    """
    pictures = dataset.pictures[:limit]
    missing = [picture.file for picture in pictures if not picture.file.is_file()]
    if missing:
        raise InputError(
            f"{missing[0]}: no such picture, and {len(missing) - 1} more of {len(dataset)} in "
            f"{dataset.path}: give the folder they are in as images"
        )


def count_shared(dataset: CocoSet, others: CocoSet) -> int:
    """How many pictures of ``dataset`` are files that ``others`` has, too; links are followed.

    No picture is opened; one that is not there is in no other set.
    """

    def identify(picture: Picture) -> tuple[int, int] | None:
        try:
            found = os.stat(picture.file)
        except (OSError, ValueError):
            return None
        return found.st_dev, found.st_ino

    known = {identify(picture) for picture in others.pictures} - {None}
    return sum(identify(picture) in known for picture in dataset.pictures)


def check_size(dataset: CocoSet, index: int, size: tuple[int, int]) -> None:
    """Make sure that a picture has the size that its label says.

    Args:
        dataset: pictures and labels.
        index: of the picture.
        size: (height, width) that it has.

    Raises:
        InputError: another one; names the picture and both.
    """
    picture, (height, width) = dataset.pictures[index], size
    if size != picture.size:
        turned = (width, height) == picture.size
        hint = "was it labelled before it was turned upright?" if turned else "correct the json"
        raise InputError(
            f"{picture.file}: {height} x {width} pixels (height x width), but {dataset.path} says "
            f"{picture.size[0]} x {picture.size[1]} for picture {picture.id}: {hint}"
        )


def read_map(path: Path, size: tuple[int, int]) -> Tensor:
    """The class of each pixel, ``[H, W]`` uint8, from a grey or palette PNG.

    Raises:
        InputError: not there, no picture, in colour, or not of ``size`` (height, width).
    """
    with open_picture(path) as image:
        if image.mode not in ("L", "P"):
            raise InputError(f"{path}: mode {image.mode}, expected classes as grey or palette PNG")
        classes = torch.from_numpy(np.array(image))
    if classes.shape != size:
        raise InputError(
            f"{path}: {classes.shape[0]} x {classes.shape[1]} pixels (height x width), but its "
            f"picture has {size[0]} x {size[1]}"
        )
    return classes


def collate(items: Sequence[tuple[Tensor, Instances]]) -> Batch:
    """Pictures and labels as one batch."""
    return Images.stack([picture for picture, _ in items]), [target for _, target in items]


def train_loader(
    dataset: CocoSet,
    recipe: DataRecipe,
    *,
    batch_size: int,
    seed: int,
    sampler: Sampler[Any] | None = None,
    processes: int = 1,
    transform: Transform | None = None,
) -> DataLoader[Any]:
    """Batches ``(Images, list[Instances])`` to train on.

    Its length is the number of steps an epoch. Its state (``state_dict``) is how many batches of
    the epoch it gave; with it the next pass goes on there.

    Args:
        dataset: pictures and labels.
        recipe: sizes, augmentation, order, number of workers.
        batch_size: pictures a batch and process; always full, see ``EpochSampler``.
        seed: of everything random.
        sampler: yields ``(epoch, index)`` or ``(epoch, index, copy)``; a last batch with fewer
            is left out unless it is the only one. None: what the recipe says.
        processes: how many share the pictures of an epoch.
        transform: as in ``TrainSet``.

    Raises:
        InputError: no usable annotation, or pictures that are not there; names the file.
    """
    if not dataset.usable():
        fault = f"{dataset.path}: no usable annotation to train on"
        if dataset.skipped:
            fault += f" ({len(dataset.skipped)} unusable, first: {dataset.skipped[0]})"
        raise InputError(fault)
    require_pictures(dataset)
    if recipe.semantic is not None and transform is not None:
        raise InputError("data.semantic: maps do not go through a transform of your own")
    if sampler is None:
        threshold = recipe.repeat_threshold
        sampler = EpochSampler(
            len(dataset),
            seed,
            batch_size=batch_size,
            processes=processes,
            groups=aspect_groups(dataset) if recipe.group_by_aspect else None,
            factors=None if threshold is None else repeat_factors(dataset, threshold),
            repeats=recipe.repeats,
        )
    return _Loader(
        TrainSet(dataset, recipe, seed, transform),
        batch_size=batch_size,
        sampler=sampler,
        num_workers=recipe.workers,
        persistent_workers=recipe.workers > 0,
        drop_last=len(sampler) >= batch_size,  # type: ignore[arg-type]
        collate_fn=_pack,
        worker_init_fn=_ignore_signals,
    )


def _ignore_signals(worker: int) -> None:
    """A signal to all processes of a run must not take its workers away before it has saved."""
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM)):
        signal.signal(number, signal.SIG_IGN)


class _Loader(DataLoader[Any]):
    """Unpacks what the workers packed, and brings their InputError back as the one line it was."""

    given = start = 0  # batches of the epoch: given so far, left out at the start of the next pass

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"batches": self.given % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """What a resumed run needs."""
        self.start = state["batches"]

    def __iter__(self) -> Any:
        # A generator: the sampler is asked at the first batch, when Lightning has set the epoch.
        self.given = 0
        if isinstance(self.sampler, EpochSampler):
            self.sampler.skip(self.start)
            self.given, self.start = self.start, 0
        try:
            for packed in super().__iter__():
                self.given += 1
                yield _unpack(packed)
        except InputError as error:
            # From a worker it comes with the worker's traceback, our line last.
            line = str(error).strip().splitlines()[-1]
            error.__traceback__ = None  # it holds the workers, which then end late
            raise InputError(line.removeprefix(f"{InputError.__module__}.InputError: ")) from None
        except RuntimeError as error:
            found = re.search(r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\) (.*)", str(error))
            if not found:
                raise
            error.__traceback__ = None
            raise InputError(
                f"a loader process ({found[1]}) {found[2].strip()}: killed by somebody, or by the "
                "system for want of memory: lower data.workers, and see the system's log"
            ) from None


def _pack(items: Sequence[tuple[Tensor, Instances]]) -> tuple[Any, ...]:
    """A batch in seven tensors.

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
        [None if target.semantic is None else target.semantic.shape for target in targets],
        torch.cat(
            [target.semantic.flatten() for target in targets if target.semantic is not None]
            or [torch.zeros(0, dtype=torch.uint8)]
        ),
    )


def _unpack(packed: tuple[Any, ...]) -> Batch:
    images, sizes, counts, boxes, labels, origins, shapes, pixels, maps, classes = packed
    flat = pixels.split([height * width for height, width in shapes])
    windows = [piece.view(shape) for piece, shape in zip(flat, shapes, strict=True)]
    targets, start = [], 0
    for size, count in zip(sizes, counts, strict=True):
        part = slice(start, start + count)
        masks = Bitmaps(windows[part], origins[part])
        targets.append(Instances(size, boxes[part], labels[part], masks=masks))
        start += count
    if None not in maps:
        each = classes.split([height * width for height, width in maps])
        pairs = zip(targets, each, maps, strict=True)
        targets = [replace(target, semantic=flat.view(size)) for target, flat, size in pairs]
    return images, targets
