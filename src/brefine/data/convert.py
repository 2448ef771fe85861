"""One labelled set written in another format, and what the masks lose by it.

===========  ===================================================  ================================
``coco``     ``labels.json``, ``images/``                         holds everything
``yolo``     ``data.yaml``, ``images/``, ``labels/*.txt``         no crowd regions
``labelme``  ``*.json`` beside the pictures, ``classes.txt``      no crowd regions
``masks``    ``images/``, ``masks/*/CLASS_*.png``, classes.txt    no crowd regions
``masks``    of one class: ``images/``, ``masks/*.png`` id maps   no crowd regions, no overlaps
===========  ===================================================  ================================

Parts and holes survive everywhere: outlines are tied together by bridges that have no pixels
(``brefine.outlines``). Losses are measured on what was written, as a reader will draw it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from brefine.data.coco import CocoSet, Picture, find_folder, read_json
from brefine.data.loader import check_size, require_pictures
from brefine.data.masks_folder import OBJECT, split_ids
from brefine.data.pictures import CLASSES, SUFFIXES, by_name, upright_size
from brefine.data.read import YAML, read
from brefine.files import replacing, require_empty
from brefine.formats.polygons import Found, Object, iou, write_labelme, write_yolo
from brefine.formats.rasters import MOST, write_masks
from brefine.progress import console, track
from brefine.rle import Runs, decode
from brefine.structures import InputError

FORMATS = ("coco", "yolo", "masks", "labelme")
WORST = 10  # pictures in the table


@dataclass(frozen=True)
class Loss:
    """What the masks of one picture lost.

    Attributes:
        picture: its name.
        objects: crowd regions not counted.
        changed: objects with another mask than before, lost ones included.
        lost: objects without any pixel left.
        mean_iou: of the masks before and after; 1 for no object.
        worst_iou: the least of them.
        crowd: crowd regions that were left out.
        empty: objects that held no pixel before; left out, not counted.
    """

    picture: str
    objects: int
    changed: int
    lost: int
    mean_iou: float
    worst_iou: float
    crowd: int
    empty: int


@dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
        losses: one for each picture, in the order of the set.
        notes: what else there is to know about what was written, one line each.
    """

    losses: list[Loss]
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Totals, notes and every picture, for json."""
        objects = sum(loss.objects for loss in self.losses)
        total = sum(loss.mean_iou * loss.objects for loss in self.losses)
        return {
            "pictures": len(self.losses),
            "objects": objects,
            "changed": sum(loss.changed for loss in self.losses),
            "lost": sum(loss.lost for loss in self.losses),
            "crowd": sum(loss.crowd for loss in self.losses),
            "empty": sum(loss.empty for loss in self.losses),
            "mean_iou": total / objects if objects else 1.0,
            "worst_iou": min((loss.worst_iou for loss in self.losses), default=1.0),
            "notes": self.notes,
            "files": [asdict(loss) for loss in self.losses],
        }


def convert(
    path: Path | str,
    out: Path | str,
    to: str,
    *,
    images: Path | str | None = None,
    split: str = "train",
    pictures: str = "copy",
    tolerance: float = 0.0,
) -> Conversion:
    """Write a labelled set in another format.

    Args:
        path: a set of any format, as ``data.read.read`` takes it.
        out: new or empty folder.
        to: one of ``FORMATS``.
        images: folder of the pictures, if not where the format has them.
        split: what to read of a set that has parts.
        pictures: ``copy`` them, ``link`` to them, or ``none``: labels only.
        tolerance: pixels by which polygons may leave the edges of the pixels, to have fewer
            corners; 0: masks are drawn back bit by bit.

    Raises:
        InputError: ``out`` has content, a picture is missing, or names do not fit the format.
    """
    out = Path(out)
    require_empty(out)
    if tolerance and to in ("coco", "masks"):
        raise InputError(f"--tolerance {tolerance:g}: {to} has no polygons to draw: leave it out")
    dataset = read(path, images, split=split)
    folder, names = name_pictures(dataset, images, as_written=to == "coco")
    _check_names(dataset, folder, names, to)
    if pictures != "none":
        require_pictures(dataset)
    if to != "coco":  # whose readers go by the picture
        for index in _each(dataset, "looking at sizes"):
            if (file := dataset.pictures[index].file).is_file():
                check_size(dataset, index, upright_size(file))
    notes = _name_losses(dataset, to)
    with replacing(out) as aside:
        aside.mkdir()
        if to == "coco":
            content = coco_content(dataset, names)
            (aside / "labels.json").write_text(json.dumps(content), encoding="utf-8")
        losses = []
        write = _writer(dataset, aside, out, to, pictures, tolerance)
        for index in _each(dataset, "converting"):
            picture, name = dataset.pictures[index], names[index]
            objects, crowd, empty = objects_of(dataset, index)
            found = write(picture, name, objects)
            if to == "coco":
                crowd = empty = 0
            losses.append(Loss(name, *_compare(objects, found), crowd, empty))
            if pictures != "none":
                _place(picture.file, aside / ("" if to == "labelme" else "images") / name, pictures)
        _write_classes(dataset, aside, to)
    return Conversion(losses, notes)


def _each(dataset: CocoSet, title: str) -> Iterable[int]:
    """The indices of the pictures, with progress where there are many."""
    total = len(dataset)
    return track(range(total), title, total) if total >= 100 else range(total)


def objects_of(dataset: CocoSet, index: int) -> tuple[list[Object], int, int]:
    """The objects of a picture, the number of its crowd regions, and of objects without pixels."""
    labels = {category.id: label for label, category in enumerate(dataset.categories)}
    size = dataset.pictures[index].size
    entries = dataset.annotations(index)
    drawn = [
        (labels[entry["category_id"]], decode(entry["segmentation"], size))
        for entry in entries
        if not entry.get("iscrowd")
    ]
    objects = [(label, runs) for label, runs in drawn if runs.area()]
    return objects, len(entries) - len(drawn), len(drawn) - len(objects)


def name_pictures(
    dataset: CocoSet, images: Path | str | None, *, as_written: bool
) -> tuple[Path, list[str]]:
    """A folder that holds all pictures of a set, and their paths inside.

    Args:
        dataset: pictures and labels.
        images: folder of the pictures, as given to ``read``.
        as_written: prefer the folder by which a json names its pictures to the deepest one that
            holds them all.

    Raises:
        InputError: two entries name the same file.
    """
    files = [Path(os.path.normpath(picture.file.absolute())) for picture in dataset.pictures]
    parents = {str(file.parent) for file in files}
    folder = Path(os.path.commonpath(parents)) if parents else Path()
    if as_written and dataset.path.is_file():
        written = dataset.folder or find_folder(dataset.path, images)
        written = Path(os.path.normpath(written.absolute()))
        folder = written if folder.is_relative_to(written) else folder
    names = [file.relative_to(folder).as_posix() for file in files]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{dataset.path}: names the picture {twice} twice: merge the two entries")
    return folder, names


def coco_content(dataset: CocoSet, names: Sequence[str]) -> dict[str, Any]:
    """A set as a COCO dict: usable annotations, crowd regions included.

    What a COCO or LVIS json says beyond that (info, licences, supercategories, LVIS's lists) is
    kept, and so are all ids and segmentations. Other formats have no numbers for ids: pictures
    and annotations are counted from 1. Missing areas and boxes are the mask's.

    Args:
        dataset: pictures and labels.
        names: ``file_name`` of each picture.
    """
    is_json = dataset.path.is_file() and dataset.path.suffix.lower() not in YAML
    old = read_json(dataset.path, packed=True) if is_json else {}
    old = old if "images" in old and "annotations" in old else {}
    images = []
    for number, (picture, name) in enumerate(zip(dataset.pictures, names, strict=True)):
        height, width = picture.size
        entry = {"id": picture.id if old else number + 1, "file_name": name}
        said = old["images"][number] if old else {}
        images.append({**said, **entry, "height": height, "width": width})
    annotations: list[dict[str, Any]] = []
    for index, image in enumerate(images):
        for entry in dataset.annotations(index):
            measured: dict[str, Any] = {"iscrowd": 0}
            if "area" not in entry or "bbox" not in entry:
                runs = decode(entry["segmentation"], dataset.pictures[index].size)
                x1, y1, x2, y2 = runs.box()
                measured |= {"area": runs.area(), "bbox": [x1, y1, x2 - x1, y2 - y1]}
            annotations.append({**measured, **entry, "image_id": image["id"]})
    ids = [entry.get("id") for entry in annotations]
    kept = old and all(type(each) in (int, str) for each in ids)
    if not kept or len(set(ids)) < len(ids):
        if old and any(each is not None for each in ids):
            text = "ids of annotations become 1, 2, ...: some are missing or there twice"
            console.print(f"{dataset.path}: {text}", markup=False, soft_wrap=True)
        for number, entry in enumerate(annotations, 1):
            entry["id"] = number
    categories: list[Any] = [category._asdict() for category in dataset.categories]
    return {
        "info": {},
        **old,
        "images": images,
        "annotations": annotations,
        "categories": old.get("categories", categories),
    }


def _check_names(dataset: CocoSet, folder: Path, names: Sequence[str], to: str) -> None:
    """Refuse what a reader of the format would not understand."""
    if to == "coco":
        return
    by_name([folder / name for name in names], folder)
    for name in names:
        *inside, last = Path(name).parts
        if Path(last).suffix.lower() not in SUFFIXES:
            known = " ".join(SUFFIXES)
            raise InputError(f"{folder / name}: its suffix is not one of {known}: rename it")
        if to == "labelme" and "\\" in name:  # its readers take that for a folder
            raise InputError(f"{folder / name}: labelme cannot name this picture: rename it")
        if taken := [part for part in inside if part in ("images", "labels", "masks")]:
            raise InputError(
                f"{folder / name}: a folder inside must not be named {taken[0]}: rename it"
            )
    classes = [category.name for category in dataset.categories]
    if not classes:
        raise InputError(f"{dataset.path}: has no categories: nothing to convert")
    if to == "masks" and len(classes) == 1:  # where a folder x is the objects of a picture x.png
        own = {Path(name).with_suffix("") for name in names}
        for name in names:
            if clash := next((part for part in Path(name).parents if part in own), None):
                raise InputError(
                    f"{folder / name}: its folder has the name of the picture {clash}: rename one"
                )
    elif to == "masks":  # where a folder x holds the objects of a picture x.png, as CLASS_0001.png
        own = {Path(name).with_suffix("") for name in names}
        for name in names:
            kind, _, number = Path(name).stem.rpartition("_")
            if kind in classes and number.isdigit() and Path(name).parent in own:
                raise InputError(
                    f"{folder / name}: is named as a mask of the picture {Path(name).parent} would "
                    "be: rename it"
                )
    for name in classes:
        if name != name.strip() or len(name.splitlines()) > 1 or (to == "masks" and "/" in name):
            raise InputError(f"{dataset.path}: category {name!r}: {to} cannot hold this name")
        if classes.count(name) > 1 and to != "yolo":
            raise InputError(f"{dataset.path}: two categories are named {name!r}: rename one")


def _name_losses(dataset: CocoSet, to: str) -> list[str]:
    """What the format cannot hold, whatever the masks are, and what it holds twice."""
    if to == "coco":
        return []
    numbering = "0, 1, ... in the order of the ids" if to == "yolo" else "by the sorted names"
    notes = [f"category ids become {numbering}; ids of pictures and annotations are lost"]
    if to == "yolo":
        notes.append(
            "data.yaml names the same pictures as train and as val, since YOLO needs both: give "
            "others to validate on (brefine data split)"
        )
    if to == "masks" and len(dataset.categories) == 1:
        if (name := dataset.categories[0].name) != OBJECT:
            notes.append(f"the class {name!r} becomes {OBJECT!r}: id maps have no class names")
        notes.append("where objects overlap, the pixels are the smaller one's")
    if getattr(dataset, "federated", None) is not None:
        notes.append("LVIS's frequencies, absent and not exhaustive classes are lost")
    return notes


def _writer(
    dataset: CocoSet, aside: Path, out: Path, to: str, pictures: str, tolerance: float
) -> Callable[[Picture, str, list[Object]], Sequence[Runs | None]]:
    """The function that writes the labels of one picture."""
    classes = [category.name for category in dataset.categories]

    def keep(picture: Picture, name: str, objects: list[Object]) -> list[Runs]:
        return [runs for _, runs in objects]

    def yolo(picture: Picture, name: str, objects: list[Object]) -> Found:
        file = _make_parent((aside / "labels" / name).with_suffix(".txt"))
        return write_yolo(file, picture.size, objects, tolerance)

    def labelme(picture: Picture, name: str, objects: list[Object]) -> Found:
        file = _make_parent((aside / name).with_suffix(".json"))
        place = Path(name).name
        if pictures == "none":
            # ".." leads from where a folder is, not from where a link to it is
            held, own = map(os.path.realpath, (picture.file.parent, (out / name).parent))
            place = os.path.join(os.path.relpath(held, own), picture.file.name)
        return write_labelme(file, place, picture.size, objects, classes, tolerance)

    def masks(picture: Picture, name: str, objects: list[Object]) -> Sequence[Runs | None]:
        stem = _make_parent((aside / "masks" / name).with_suffix(""))
        if len(classes) > 1:
            found = keep(picture, name, objects)
            write_masks(stem, found, [classes[label] for label, _ in objects])
            return found
        return write_id_map(stem.with_name(f"{stem.name}.png"), picture.size, objects)

    writers: dict[str, Callable[[Picture, str, list[Object]], Sequence[Runs | None]]]
    writers = {"coco": keep, "yolo": yolo, "labelme": labelme, "masks": masks}
    return writers[to]


def write_id_map(file: Path, size: tuple[int, int], objects: Sequence[Object]) -> Found:
    """One PNG of 8 or 16 bits, object k of the list as k; smaller objects lie on top.

    Raises:
        InputError: more objects than 16 bits count.
    """
    if len(objects) > MOST:
        raise InputError(f"{file.name}: {len(objects)} objects, an id map holds {MOST}")
    ids = np.zeros(size, dtype=np.uint8 if len(objects) < 256 else np.uint16)
    for i in sorted(range(len(objects)), key=lambda i: -objects[i][1].area()):
        window, (x, y) = objects[i][1].window()
        inside = window.numpy().astype(bool)
        ids[y : y + inside.shape[0], x : x + inside.shape[1]][inside] = i + 1
    Image.fromarray(ids).save(file, "PNG")
    visible = dict(split_ids(ids))
    return [visible.get(i + 1) for i in range(len(objects))]


def _write_classes(dataset: CocoSet, aside: Path, to: str) -> None:
    """Which classes there are, so that a class without objects is not forgotten."""
    names = [category.name for category in dataset.categories]
    if to == "yolo":
        content: dict[str, Any] = {
            "train": "images",
            "val": "images",
            "names": dict(enumerate(names)),
        }
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        (aside / "data.yaml").write_text(text, encoding="utf-8")
    elif to == "labelme" or (to == "masks" and len(names) > 1):
        (aside / CLASSES).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def _compare(
    objects: list[Object], found: Sequence[Runs | None]
) -> tuple[int, int, int, float, float]:
    """The fields ``objects`` to ``worst_iou`` of ``Loss``."""
    ious = [
        0.0 if after is None else iou(before, after)
        for (_, before), after in zip(objects, found, strict=True)
    ]
    changed, lost = sum(iou < 1 for iou in ious), sum(after is None for after in found)
    mean = sum(ious) / len(ious) if ious else 1.0
    return len(ious), changed, lost, mean, min(ious, default=1.0)


def _place(file: Path, target: Path, how: str) -> None:
    _make_parent(target)
    if how == "link":
        target.symlink_to(file.absolute())
    else:
        shutil.copyfile(file, target)


def _make_parent(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def print_conversion(conversion: Conversion, console: Console) -> None:
    """The totals, what was lost, and the pictures that lost most."""
    totals = conversion.as_dict()
    for note in conversion.notes:
        console.print(note, markup=False, soft_wrap=True)
    for key, what in (("crowd", "crowd regions"), ("empty", "objects without a pixel")):
        if totals[key]:
            console.print(f"{totals[key]} {what} cannot be held and are left out", highlight=False)
    count = f"{totals['pictures']} pictures, {totals['objects']} objects"
    if not totals["changed"]:
        console.print(f"{count}: every mask is kept bit by bit", highlight=False)
        return
    console.print(
        f"{count}: {totals['changed']} masks changed, {totals['lost']} of them lost; "
        f"IoU with the old ones {totals['mean_iou']:.4f} on average, {totals['worst_iou']:.4f} "
        "at worst",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("picture", "objects", "changed", "lost", "mean IoU", "worst IoU", "crowd")
    for column in table.columns[1:]:
        column.justify = "right"
    changed = [loss for loss in conversion.losses if loss.changed]
    for loss in sorted(changed, key=lambda loss: (loss.mean_iou, loss.worst_iou))[:WORST]:
        counts = (str(loss.objects), str(loss.changed), str(loss.lost))
        figures = (f"{loss.mean_iou:.4f}", f"{loss.worst_iou:.4f}", str(loss.crowd))
        table.add_row(Text(loss.picture), *counts, *figures)
    console.print(table)
    if len(changed) > WORST:
        console.print(f"and {len(changed) - WORST} more pictures: --json names all")
