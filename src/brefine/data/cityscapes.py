"""Cityscapes gtFine: id maps of 16 bits, or the polygons that they were drawn from.

``leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png`` belongs to
``gtFine/SPLIT/CITY/NAME_gtFine_instanceIds.png``: class id * 1000 + number for one object, the
class id alone for a region without objects, which for the classes below is a group too dense to
tell apart. Without this file, ``NAME_gtFine_polygons.json`` is drawn, later polygons over earlier
ones.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from brefine.data.coco import read_json
from brefine.data.faults import Doubt, Place, Report, refuse, reporting, shorten
from brefine.data.masks_folder import read_mask, split_ids
from brefine.data.pictures import by_name, list_pictures, measure, watch
from brefine.rle import POLYGON_REACH
from brefine.structures import InputError

PICTURES, LABELS = "leftImg8bit", "gtFine"
#: names of the ids 0, 1, 2, ...; there is also "license plate", -1, which is never drawn
NAMES = (
    *("unlabeled", "ego vehicle", "rectification border", "out of roi", "static", "dynamic"),
    *("ground", "road", "sidewalk", "parking", "rail track", "building", "wall", "fence"),
    *("guard rail", "bridge", "tunnel", "pole", "polegroup", "traffic light", "traffic sign"),
    *("vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "caravan"),
    *("trailer", "train", "motorcycle", "bicycle"),
)
_IDS = {name: number for number, name in enumerate(NAMES)} | {"license plate": -1}
#: ids whose objects are told apart, and those of them that are evaluated
WITH_OBJECTS = range(_IDS["person"], len(NAMES))
CATEGORIES = {n: NAMES[n] for n in WITH_OBJECTS if NAMES[n] not in ("caravan", "trailer")}


def recognise(path: Path) -> bool:
    """Whether a folder is one of Cityscapes: its root, ``gtFine``, or a split in there."""
    return root_of(path) is not None


def read(
    path: Path, images: Path | None = None, *, split: str = "val", report: Report = refuse
) -> dict[str, Any]:
    """A split of Cityscapes as a COCO dict.

    The category ids are the official ones of the 8 evaluated classes. Groups are crowd regions;
    everything else, caravans and trailers too, is background.

    Args:
        path: the folder that holds ``leftImg8bit`` and ``gtFine``, one of those two, or a split in
            one of them, which then says the split.
        images: folder of the split's pictures, with the cities inside, instead of
            ``leftImg8bit/SPLIT``.
        split: folder to read: ``train`` or ``val``.
        report: what to do with a faulty picture or polygon.

    Returns:
        ``images`` (ids are paths inside the folder of pictures), ``annotations`` with RLE,
        ``categories``, and ``info``: the number of ``unused`` label files, the ``places`` of the
        annotations, in their order, and the ``doubts``.

    Raises:
        InputError: a folder is missing; with ``refuse``, too: the first fault.
    """
    pictures, labels = _find_folders(path, images, split)
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    places: list[Place] = []
    used = set()
    for name, file in watch(by_name(list_pictures(pictures), pictures, report)):
        base = labels / Path(name).parent / file.stem.removesuffix(f"_{PICTURES}")
        ids = base.with_name(f"{base.name}_{LABELS}_instanceIds.png")
        polygons = base.with_name(f"{base.name}_{LABELS}_polygons.json")
        used |= {ids, polygons}
        if (size := measure(file, name, report)) is None:
            continue
        if ids.is_file():
            source, values = ids, read_mask(ids, size, report)
        elif polygons.is_file():
            source, values = polygons, _draw(polygons, size, report)
        else:
            report("no-labels", file, name, f"has no labels, expected {ids}, or its polygons.json")
            continue
        if values is None:
            continue
        place = {"id": name, "file_name": str(file.absolute())}
        entries.append(place | {"height": size[0], "width": size[1]})
        for value, runs in split_ids(values):
            category = value // 1000 if value >= 1000 else value
            if category in CATEGORIES:
                annotations.append(
                    {
                        "id": f"value {value} of {source.name}",
                        "image_id": name,
                        "category_id": category,
                        "iscrowd": int(value < 1000),
                        "segmentation": runs.encode(),
                    }
                )
                places.append((source, value, f"value {value}"))
            elif category not in (WITH_OBJECTS if value >= 1000 else range(len(NAMES))):
                expected = "expected a class id to 33, or 24000 to 33999 for an object"
                report("unknown-category", source, value, f"value {value}: {expected}")
    files = [p for end in ("instanceIds.png", "polygons.json") for p in labels.rglob(f"*_{end}")]
    unused = [file for file in sorted(files) if file not in used]
    doubts: list[Doubt] = [
        ("unused-labels", file, None, "no picture has its name") for file in unused
    ]
    return {
        "info": {"unused": len(unused), "places": places, "doubts": doubts},
        "images": entries,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in CATEGORIES.items()],
    }


def root_of(path: Path) -> tuple[Path, str | None] | None:
    """The folder that holds both folders, and the split that ``path`` names."""
    if any((path / name).is_dir() for name in (LABELS, PICTURES)):
        return path, None
    path = path.absolute()
    if path.name in (LABELS, PICTURES):
        return path.parent, None
    if path.parent.name in (LABELS, PICTURES):
        return path.parent.parent, path.name
    return None


def _find_folders(path: Path, images: Path | None, split: str) -> tuple[Path, Path]:
    """The folders of a split's pictures and labels.

    Raises:
        InputError: one is not there.
    """
    found = root_of(path)
    if found is None:
        raise InputError(f"{path}: holds no folders {PICTURES} and {LABELS}")
    root, named = found
    for name, package in ((LABELS, "gtFine_trainvaltest.zip"), (PICTURES, "leftImg8bit_*.zip")):
        if not (root / name).is_dir() and not (name == PICTURES and images):
            raise InputError(f"{root}: no folder {name}: unpack {package} there")
    labels = root / LABELS / (named or split)
    pictures = images or root / PICTURES / (named or split)
    for folder in (labels, pictures):
        if not folder.is_dir():
            there = sorted(p.name for p in folder.parent.iterdir() if p.is_dir())
            raise InputError(f"{folder}: no such folder, there are: {', '.join(there) or 'none'}")
    return pictures, labels


def _draw(file: Path, size: tuple[int, int], report: Report) -> NDArray[Any] | None:
    """The id map of a ``polygons.json``, ``[H, W]``; None if the file is of no use.

    Every polygon covers those before it, whatever its class; a label that ends in ``group`` is
    drawn with the class id alone.
    """
    content = None
    with reporting(report, "bad-json", file):
        content = read_json(file)
    if content is None:
        return None
    for key in ("imgHeight", "imgWidth", "objects"):
        if key not in content:
            report("missing-key", file, None, f"{key} is missing")
            return None
    said = (content["imgHeight"], content["imgWidth"])
    if said != size:
        text = f"imgHeight and imgWidth are {shorten(said[0])} and {shorten(said[1])}"
        report("wrong-size", file, None, f"{text}, but its picture has {size[0]} x {size[1]}")
        return None
    if not isinstance(content["objects"], list):
        message = f"objects is {shorten(content['objects'])}, expected a list"
        report("wrong-type", file, None, message)
        return None
    image = Image.new("I", (size[1], size[0]))
    drawer = ImageDraw.Draw(image)
    counts: Counter[int] = Counter()
    for index, entry in enumerate(content["objects"]):
        where = f"objects[{index}]"
        if not isinstance(entry, dict):
            report("wrong-type", file, index, f"{where} is {shorten(entry)}, expected an object")
            continue
        if entry.get("deleted"):
            continue
        missing = next((key for key in ("label", "polygon") if key not in entry), None)
        if missing:
            report("missing-key", file, index, f"{where}: {missing} is missing")
            continue
        label = str(entry["label"])
        group = label not in _IDS and label.endswith("group")
        value = _IDS.get(label.removesuffix("group") if group else label)
        if value is None:
            message = f"{where}: label {shorten(label)} is none of Cityscapes'"
            report("unknown-category", file, index, message)
            continue
        if fault := _find_fault(entry["polygon"], size):
            report(fault[0], file, index, f"{where}: {fault[1]}")
            continue
        if value in WITH_OBJECTS and not group:
            counts[value] += 1
            value = value * 1000 + counts[value] - 1
        if value >= 0:
            drawer.polygon([tuple(point) for point in entry["polygon"]], fill=value)
    return np.asarray(image)


def _find_fault(polygon: Any, size: tuple[int, int]) -> tuple[str, str] | None:
    """Kind and message of what is wrong with a polygon."""
    if not isinstance(polygon, list):
        return "bad-polygon", "polygon is no list of points [x, y]"
    for point in polygon:
        if not isinstance(point, list) or len(point) != 2:
            return "bad-polygon", f"polygon: {shorten(point)} is no point [x, y]"
        for number in point:
            if type(number) not in (int, float) or number != number:
                return "bad-polygon", f"polygon: coordinate {shorten(number)} is no number"
            if abs(number) > POLYGON_REACH * max(size):
                return "bad-polygon", f"polygon: coordinate {shorten(number)} lies far outside"
    if len(polygon) < 3:
        return "few-points", f"a polygon of {len(polygon)} points, expected 3 or more"
    return None
