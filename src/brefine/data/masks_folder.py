"""Masks as PNG files beside the pictures: an id map a picture, or one file an object.

``images/NAME.jpg`` belongs to ``masks/NAME.png`` (or ``.PNG``), with one channel of 8 or 16 bits
(or a palette, whose indices count): 0 is background, every other value one object. Or to the folder
``masks/NAME``, in which each PNG is one object: all pixels that are not 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brefine.data.faults import Doubt, Place, Report, refuse, reporting
from brefine.data.pictures import (
    CLASSES,
    SUFFIXES,
    by_name,
    find_pair,
    list_pictures,
    measure,
    number_names,
    open_picture,
    read_names,
    refuse_splits,
    watch,
)
from brefine.rle import Runs
from brefine.structures import InputError

#: class of an object whose file does not name one
OBJECT = "object"
#: what Pillow calls one channel of 1, 8 or 16 bits, palettes and, in older releases, 16 bits
_MODES = ("1", "L", "P", "I;16", "I;16B", "I")


@dataclass(frozen=True)
class _Object:
    """One object of the picture named ``picture``; ``value``: in an id map."""

    file: Path
    value: int | None
    picture: str
    label: str
    runs: Runs

    def words(self) -> str:
        """What to call it in the file."""
        return "mask" if self.value is None else f"value {self.value}"

    def name(self, masks: Path) -> str:
        """What to call it in the folder of all masks."""
        file = self.file.relative_to(masks).as_posix()
        return file if self.value is None else f"value {self.value} of {file}"


def read(path: Path, images: Path | None = None, *, report: Report = refuse) -> dict[str, Any]:
    """A folder of masks as a COCO dict.

    The class of an object of its own file is the part of the file's name before the last
    underscore (``cell_03.png`` is a cell); of all others it is ``object``. Category ids are
    1, 2, ... in the sorted order of the names that occur, or of the ``classes.txt`` in the folder
    or beside it. A picture without masks has no objects.

    Args:
        path: a folder; see ``pictures.find_pair``.
        images: folder of the pictures, instead of ``images``.
        report: what to do with a broken picture or mask, or an unknown class.

    Returns:
        ``images`` (ids are paths inside the folder of pictures), ``annotations`` with RLE,
        ``categories`` and ``info``: the numbers of ``unlabelled`` pictures and ``unused`` files
        of masks, the ``places`` of the annotations, in their order, and the ``doubts``.

    Raises:
        InputError: nothing can be read; with ``refuse``, anything broken. Names the file.
    """
    pair = find_pair(path, "masks")
    if pair is None:
        raise InputError(f"{path}: holds no folders images and masks")
    folder, masks = images or pair[0], pair[1]
    refuse_splits(folder)
    pictures = by_name(list_pictures(folder), folder, report)
    top = masks.absolute().parent
    given = read_names(top, top.parent, report=report)
    files = {file for file in masks.rglob("*") if file.suffix.lower() in SUFFIXES}
    maps = {file.with_suffix(""): file for file in sorted(files) if file.suffix.lower() == ".png"}
    others: dict[Path, list[Path]] = {}  # that are none, by the picture they would be of
    for file in sorted(files - set(maps.values())):
        if file.suffix.lower() != ".png":
            for owner in (file.with_suffix(""), file.parent):
                others.setdefault(owner, []).append(file)
    entries: list[dict[str, Any]] = []
    objects: list[_Object] = []
    unlabelled: list[str] = []
    used: set[Path] = set()
    for name, file in watch(pictures):
        size = measure(file, name, report)
        if size is not None:
            place = {"id": name, "file_name": str(file.absolute())}
            entries.append(place | {"height": size[0], "width": size[1]})
        inside = (masks / name).with_suffix("")
        whole = maps.get(inside, inside.with_name(f"{inside.name}.png"))
        used |= {whole, inside}
        for other in others.get(inside, ()):
            if inside.is_dir() == (other.parent == inside) and not whole.is_file():
                report("unreadable-mask", other, None, "masks are PNG files, and this is none")
                used.add(other)
        if inside.is_dir() and whole.is_file():
            message = f"there is a folder {inside.name}, too: remove one of them"
            report("same-labels", whole, None, message)
        elif not inside.is_dir() and not whole.is_file():
            unlabelled.append(name)
        elif size is not None:
            objects += _read_objects(name, whole, inside, size, given, report)
    if len(unlabelled) == len(pictures):
        first = (masks / next(iter(pictures))).with_suffix(".png")
        report("no-labels", path, None, f"no picture has masks, the first would be {first}")
    labels = {found.label for found in objects}
    ids = number_names(labels or ([] if given else [OBJECT]), given, path)
    unused = sorted(file for file in files if not used & {file, file.parent})
    doubts: list[Doubt] = [
        ("unused-labels", file, None, "no picture has its name") for file in unused
    ]
    if 0 < len(unlabelled) < len(pictures):
        message = f"{len(unlabelled)} of {len(pictures)} pictures have no mask, first: "
        doubts.append(("unlabelled-pictures", path, None, message + unlabelled[0]))
    doubts += _doubt_values(objects, path)
    places: list[Place] = [(found.file, found.value, found.words()) for found in objects]
    return {
        "info": {
            "unlabelled": len(unlabelled),
            "unused": len(unused),
            "places": places,
            "doubts": doubts,
        },
        "images": entries,
        "annotations": [
            {
                "id": found.name(masks),
                "image_id": found.picture,
                "category_id": ids[found.label],
                "segmentation": found.runs.encode(),
            }
            for found in objects
        ],
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
    }


def _read_objects(
    picture: str,
    whole: Path,
    inside: Path,
    size: tuple[int, int],
    given: list[str] | None,
    report: Report,
) -> Iterator[_Object]:
    """The objects of a picture: of its id map ``whole``, else of the files in ``inside``."""
    maps = [whole] if whole.is_file() else sorted(inside.iterdir())
    for file in (file for file in maps if file.suffix.lower() == ".png"):
        values = read_mask(file, size, report)
        label = OBJECT if file == whole else file.stem.rpartition("_")[0] or OBJECT
        if given is not None and label not in given:
            message = f"class {label!r} is not in {CLASSES}: add it there"
            report("unknown-category", file, None, message)
        elif values is None:
            pass
        elif file == whole:
            for value, runs in split_ids(values):
                yield _Object(file, value, picture, label, runs)
        else:
            empty = Runs(np.array([size[0] * size[1], 0]), size)
            found = dict(split_ids(values != 0))
            yield _Object(file, None, picture, label, found.get(1, empty))


def _doubt_values(objects: list[_Object], path: Path) -> Iterator[Doubt]:
    """Whether the id maps look like black and white masks of several objects each."""
    maps = {found.file: found for found in objects if found.value is not None}
    if len(maps) < 2 or len(maps) < len(objects) or len({f.value for f in maps.values()}) > 1:
        return
    windows = [found.runs.window()[0] for found in maps.values()]
    apart = sum(not (window.any(0).all() and window.any(1).all()) for window in windows)
    if apart > len(maps) / 2:
        value = next(iter(maps.values())).value
        message = f"each of {len(maps)} id maps has the one value {value}: one object a picture,"
        yield "one-object-masks", path, None, f"{message} though in {apart} its parts lie apart"


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
        # Runs come in pairs of 0 and 1; a last one of 0 has none, or no pixel either.
        counts = np.append(counts, 0) if counts[-1] else counts[:-1]
        yield int(values[first]), Runs(counts, (ids.shape[0], ids.shape[1]))


def read_mask(path: Path, size: tuple[int, int], report: Report = refuse) -> NDArray[Any] | None:
    """The values of a mask, ``[H, W]``; what makes it useless is reported, and None returned.

    Args:
        path: an image with one channel.
        size: (height, width) of its picture.
        report: what to do with a fault.
    """
    values = fault = None
    with reporting(report, "unreadable-mask", path), open_picture(path) as image:
        fault = _find_fault(image.mode, (image.height, image.width), size)
        if fault is None:
            values = np.asarray(image)
    if fault is not None:
        report(fault[0], path, None, fault[1])
    return values


def _find_fault(mode: str, own: tuple[int, int], size: tuple[int, int]) -> tuple[str, str] | None:
    """Kind and message of what is wrong with a mask of size ``own``."""
    if mode not in _MODES:
        return "colour-mask", f"has colours ({mode}), expected one channel of 8 or 16 bits"
    if own == size:
        return None
    message = f"{own[0]} x {own[1]} pixels (height x width), but its picture has "
    message += f"{size[0]} x {size[1]}"
    if own == size[::-1]:
        return "turned-mask", f"{message}: was it drawn before the picture was turned upright?"
    return "wrong-mask-size", message
