"""Masks as PNG files beside the pictures: an id map a picture, or one file an object.

``images/NAME.jpg`` belongs to ``masks/NAME.png``, a PNG with one channel of 8 or 16 bits (or a
palette, whose indices count): 0 is background, every other value one object. Or to the folder
``masks/NAME``, in which each PNG is one object: all pixels that are not 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brefine.data.coco import Runs
from brefine.data.pictures import (
    by_name,
    find_pair,
    list_pictures,
    number_names,
    open_picture,
    read_names,
    refuse_splits,
    upright_size,
    watch,
)
from brefine.structures import InputError

#: class of an object whose file does not name one
OBJECT = "object"
#: what Pillow calls one channel of 1, 8 or 16 bits, palettes and, in older releases, 16 bits
_MODES = ("1", "L", "P", "I;16", "I;16B", "I")


def read(path: Path, images: Path | None = None) -> dict[str, Any]:
    """A folder of masks as a COCO dict.

    The class of an object of its own file is the part of the file's name before the last
    underscore (``cell_03.png`` is a cell); of all others it is ``object``. Category ids are
    1, 2, ... in the sorted order of the names that occur, or of the ``classes.txt`` in the folder
    or beside it. A picture without masks has no objects.

    Args:
        path: a folder; see ``pictures.find_pair``.
        images: folder of the pictures, instead of ``images``.

    Returns:
        ``images`` (ids are paths inside the folder of pictures), ``annotations`` with RLE,
        ``categories`` and ``info`` with the numbers of
        ``unlabelled`` pictures and ``unused`` files of masks.

    Raises:
        InputError: anything broken; names the file.
    """
    pair = find_pair(path, "masks")
    if pair is None:
        raise InputError(f"{path}: holds no folders images and masks")
    folder, masks = images or pair[0], pair[1]
    refuse_splits(folder)
    pictures = by_name(list_pictures(folder), folder)
    entries: list[dict[str, Any]] = []
    objects: list[tuple[str, str, str, Runs]] = []
    unlabelled, used = 0, set()
    for name, file in watch(pictures):
        height, width = size = upright_size(file)
        entries.append(
            {"id": name, "file_name": str(file.absolute()), "height": height, "width": width}
        )
        inside = (masks / name).with_suffix("")
        whole = inside.with_name(f"{inside.name}.png")
        if inside.is_dir() and whole.is_file():
            raise InputError(f"{whole}: there is a folder {inside.name}, too: remove one of them")
        used |= {whole, inside}
        if whole.is_file():
            for number, runs in split_ids(_read_mask(whole, size)):
                objects.append((f"id {number} of {whole.name}", name, OBJECT, runs))
        elif inside.is_dir():
            for part in sorted(p for p in inside.iterdir() if p.suffix.lower() == ".png"):
                found = list(split_ids(_read_mask(part, size) != 0))
                runs = found[0][1] if found else Runs(np.array([height * width, 0]), size)
                label = part.stem.rpartition("_")[0] or OBJECT
                objects.append((f"{part.name} of {inside.name}", name, label, runs))
        else:
            unlabelled += 1
    if unlabelled == len(pictures):
        first = masks / next(iter(pictures))
        raise InputError(
            f"{path}: no picture has masks, the first would be {first.with_suffix('.png')}"
        )
    unused = sum(not used & {file, file.parent} for file in masks.rglob("*.png"))
    top = masks.absolute().parent
    given = read_names(top, top.parent)
    labels = [label for _, _, label, _ in objects]
    ids = number_names(labels or ([] if given else [OBJECT]), given, path)
    return {
        "info": {"unlabelled": unlabelled, "unused": unused},
        "images": entries,
        "annotations": [
            {
                "id": where,
                "image_id": name,
                "category_id": ids[label],
                "segmentation": runs.encode(),
            }
            for where, name, label, runs in objects
        ],
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
    }


def split_ids(ids: NDArray[Any]) -> Iterator[tuple[int, Runs]]:
    """Each object of an id map, in the order of the ids.

    Time follows the pixels and the runs, not pixels times objects.

    Args:
        ids: ``[H, W]``, whole numbers or bool; 0 is background.
    """
    column = ids.T.reshape(-1)  # run lengths go down the columns
    starts = np.flatnonzero(np.diff(column, prepend=column[:1])).astype(np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), starts])
    ends = np.append(starts[1:], len(column))
    values = column[starts].astype(np.int64)
    order = np.argsort(values, kind="stable")
    order = order[values[order] != 0]
    starts, ends, values = starts[order], ends[order], values[order]
    if not len(values):
        return
    cuts = np.flatnonzero(np.diff(values, prepend=-1))
    for first, last in zip(cuts, np.append(cuts[1:], len(values)), strict=True):
        bounds = np.stack([starts[first:last], ends[first:last]], 1).reshape(-1)
        counts = np.diff(bounds, prepend=0, append=len(column))
        # Runs come in pairs of 0 and 1; the last one of 0 has none.
        yield int(values[first]), Runs(np.append(counts, 0), (ids.shape[0], ids.shape[1]))


def _read_mask(path: Path, size: tuple[int, int]) -> NDArray[Any]:
    """The values of a mask, ``[H, W]``."""
    with open_picture(path) as image:
        mode, (width, height) = image.mode, image.size
        usable = mode in _MODES and (height, width) == size
        values = np.asarray(image) if usable else None
    if mode not in _MODES:
        raise InputError(f"{path}: has colours ({mode}), expected one channel of 8 or 16 bits")
    if values is None:
        hint = ": was it drawn before the picture was turned upright?" if width != height else ""
        raise InputError(
            f"{path}: {height} x {width} pixels (height x width), but its picture has "
            f"{size[0]} x {size[1]}{hint if (width, height) == size else ''}"
        )
    return values
