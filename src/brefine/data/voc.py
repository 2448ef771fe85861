"""Pascal VOC: one id map of 8 bits for the objects of a picture, one for their classes.

``ImageSets/Segmentation/SPLIT.txt`` lists the pictures of a split by name. The palette indices
of ``SegmentationObject/NAME.png`` are 0 for background, 1, 2, ... for one object each and 255 for
void: the seam around objects and what is too small or unclear. ``SegmentationClass/NAME.png``
holds 0, the class ids 1 to 20, and 255.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brefine.data.faults import Place, Report, refuse
from brefine.data.masks_folder import read_mask, split_ids
from brefine.data.pictures import SUFFIXES, measure, read_lines, watch
from brefine.structures import InputError

PICTURES, OBJECTS, CLASSES = "JPEGImages", "SegmentationObject", "SegmentationClass"
LISTS = Path("ImageSets", "Segmentation")
#: names of the ids 1, 2, ...
NAMES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
VOID = 255


def recognise(path: Path) -> bool:
    """Whether a folder is one of Pascal VOC: of a year, or around it."""
    return bool(_roots_of(path))


def read(
    path: Path, images: Path | None = None, *, split: str = "val", report: Report = refuse
) -> dict[str, Any]:
    """A split of Pascal VOC as a COCO dict.

    The class of an object is the most frequent one of its pixels in ``SegmentationClass``. Void
    belongs to no object.

    Args:
        path: a folder such as ``VOC2012``, or the ``VOCdevkit`` around it, or the folder around
            that.
        images: folder of the pictures, instead of ``JPEGImages``.
        split: which list to read: ``train`` or ``val``.
        report: what to do with a faulty picture or object.

    Returns:
        ``images`` (ids are file names), ``annotations`` with RLE, ``categories`` and
        ``info`` with the ``places`` of the annotations, in their order.

    Raises:
        InputError: a folder or the list is missing; with ``refuse``, too: the first fault.
    """
    root = _find_root(path, images)
    folder = images or root / PICTURES
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    places: list[Place] = []
    for name, file in watch(_read_list(root / LISTS / f"{split}.txt", folder, report)):
        if (size := measure(file, name, report)) is None:
            continue
        sources = [(root / kind / name).with_suffix(".png") for kind in (OBJECTS, CLASSES)]
        if missing := next((source for source in sources if not source.is_file()), None):
            report("no-labels", file, name, f"has no {missing.parent.name}, expected {missing}")
            continue
        objects, classes = (read_mask(source, size, report) for source in sources)
        if objects is None or classes is None:
            continue
        place = {"id": name, "file_name": str(file.absolute())}
        entries.append(place | {"height": size[0], "width": size[1]})
        category = _most_frequent(objects, classes)
        for value, runs in split_ids(objects):
            if value == VOID:
                continue
            if not 1 <= category[value] <= len(NAMES):
                seen = f"most of its pixels are {category[value]} in {CLASSES}"
                message = f"value {value}: {seen}, expected a class id, 1 to {len(NAMES)}"
                report("unknown-category", sources[0], value, message)
                continue
            annotations.append(
                {
                    "id": f"value {value} of {sources[0].name}",
                    "image_id": name,
                    "category_id": category[value],
                    "segmentation": runs.encode(),
                }
            )
            places.append((sources[0], value, f"value {value}"))
    return {
        "info": {"places": places},
        "images": entries,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in enumerate(NAMES, 1)],
    }


def _roots_of(path: Path) -> list[Path]:
    """The folders of years that ``path`` is or holds."""
    around = [path, *sorted(path.glob("VOC20??")), *sorted(path.glob("VOCdevkit/VOC20??"))]
    return [p for p in around if any((p / name).is_dir() for name in (PICTURES, OBJECTS))]


def _find_root(path: Path, images: Path | None) -> Path:
    """The folder of one year, complete.

    Raises:
        InputError: a folder is missing, or there are several years.
    """
    roots = _roots_of(path)
    if len(roots) > 1:
        years = " and ".join(root.name for root in roots)
        raise InputError(f"{path}: holds {years}: name one, such as {roots[-1]}")
    if not roots:
        raise InputError(f"{path}: holds no folders {PICTURES} and {OBJECTS}")
    for name in (OBJECTS, CLASSES, *(() if images else (PICTURES,))):
        if not (roots[0] / name).is_dir():
            hint = ": boxes (Annotations) are not enough" if name == OBJECTS else ""
            raise InputError(f"{roots[0]}: no folder {name}{hint}")
    return roots[0]


def _read_list(file: Path, folder: Path, report: Report) -> dict[str, Path]:
    """The pictures that a list names, by file name.

    Raises:
        InputError: it cannot be read or names none.
    """
    if not file.is_file():
        there = ", ".join(sorted(p.name for p in file.parent.glob("*.txt"))) or "none"
        raise InputError(f"{file}: no such list of pictures, there are: {there}")
    found: dict[str, Path] = {}
    empty = True
    for number, line in enumerate(read_lines(file), 1):
        if not (name := line.strip()):
            continue
        empty = False
        places = [f"{name}{suffix}" for suffix in SUFFIXES]
        place = next((place for place in places if (folder / place).is_file()), None)
        if place is None:
            message = f"line {number}: {places[0]} is not in {folder}"
            report("missing-picture", file, number, message)
        elif place in found:
            report("duplicate-picture-id", file, number, f"line {number}: {name} is listed twice")
        else:
            found[place] = folder / place
    if empty:
        raise InputError(f"{file}: lists no picture")
    return found


def _most_frequent(objects: NDArray[Any], classes: NDArray[Any]) -> list[int]:
    """The most frequent class value of each object value; the lower one of two as frequent."""
    values = int(objects.max()) + 1
    pairs = objects.astype(np.int64) * 256 + np.minimum(classes, 255)
    table = np.bincount(pairs.reshape(-1), minlength=values * 256).reshape(values, 256)
    most: list[int] = table.argmax(1).tolist()
    return most
