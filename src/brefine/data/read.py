"""Reading a labelled set of any known format, straight from disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from brefine.data import cityscapes, labelme, lvis, masks_folder, voc, yolo
from brefine.data.coco import CocoSet, find_folder, first_names, read_json
from brefine.data.faults import Report, refuse
from brefine.data.pictures import find_pair
from brefine.progress import console
from brefine.structures import InputError

YAML = (".yaml", ".yml")


def read(
    path: Path | str, images: Path | str | None = None, *, split: str = "val", quiet: bool = False
) -> CocoSet:
    """A labelled set, its format recognised by what is there.

    ============================================  ==========================================
    a json                                        COCO, LVIS, or one picture of LabelMe
    folders ``leftImg8bit`` and ``gtFine``        Cityscapes
    ``JPEGImages`` and ``SegmentationObject``     Pascal VOC
    a yaml; folders ``images`` and ``labels``     YOLO-seg
    folders ``images`` and ``masks``              masks as PNG
    a folder with json files                      LabelMe
    ============================================  ==========================================

    A format other than COCO is named on the console, and what had to be left out.

    Args:
        path: file or folder.
        images: folder of the pictures, if not where the format has them.
        split: what to read of Cityscapes, Pascal VOC or a YOLO yaml: ``train`` or ``val``.
        quiet: say nothing.

    Raises:
        InputError: not there, of no known format or of two, or broken; one line that names the
            file and the line, shape or annotation.
    """
    path = Path(path)
    folder = None if images is None else Path(images)
    if folder is not None and not folder.is_dir():
        raise InputError(f"{folder}: no such folder of pictures")
    kind, content = recognise(path)
    if kind == "COCO":
        folder = find_folder(path, images, first_names(content))
        dataset = CocoSet.from_dict(content, path, folder)
        if dataset.skipped and not quiet:
            line = f"{len(dataset.skipped)} annotations cannot be used and are left out, first: "
            console.print(f"{path}: {line}{dataset.skipped[0]}", markup=False, soft_wrap=True)
        return dataset
    content = read_as(kind, path, folder, split=split, content=content)
    dataset = CocoSet.from_dict(content, path, None)
    if kind == "LVIS":
        dataset.federated = lvis.Federated.of(content, dataset.categories)
    if not quiet:
        line = f"{path}: {kind}, {len(dataset)} pictures, {len(dataset.categories)} classes"
        if unlabelled := content["info"].get("unlabelled"):
            line += f", {unlabelled} pictures without labels"
        if unused := content["info"].get("unused"):
            line += f", {unused} label files without a picture"
        if dataset.skipped:
            line += f", {len(dataset.skipped)} unusable, first: {dataset.skipped[0]}"
        console.print(line, markup=False, soft_wrap=True)
    return dataset


def recognise(path: Path) -> tuple[str, dict[str, Any]]:
    """The name of a set's format and, where that took reading a json, its content (else ``{}``).

    Raises:
        InputError: not there, of no known format or of two.
    """
    if path.is_dir():
        return _recognise(path), {}
    if path.suffix.lower() in YAML:
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        return "YOLO-seg", {}
    content = read_json(path, packed=True)
    return _recognise_json(content, path), content


def read_as(
    kind: str,
    path: Path,
    images: Path | None,
    *,
    split: str,
    content: dict[str, Any],
    report: Report = refuse,
) -> dict[str, Any]:
    """A set of any format but COCO as a COCO dict.

    Args:
        kind: its format, by ``recognise``.
        path: file or folder.
        images: folder of the pictures, if not where the format has them.
        split: as in ``read``.
        content: by ``recognise``.
        report: what to do with a fault.

    Raises:
        InputError: nothing can be read; with ``refuse``, anything broken.
    """
    if kind == "LVIS":
        return lvis.read(path, images, content=content, report=report)
    if kind == "Cityscapes":
        return cityscapes.read(path, images, split=split, report=report)
    if kind == "Pascal VOC":
        return voc.read(path, images, split=split, report=report)
    if kind == "YOLO-seg":
        return yolo.read(path, images, split=split, report=report)
    if kind == "masks":
        return masks_folder.read(path, images, report=report)
    return labelme.read(path, images, report=report)


def _recognise_json(content: dict[str, Any], path: Path) -> str:
    if "objects" in content and "imgHeight" in content:
        root = f"{cityscapes.PICTURES} and {cityscapes.LABELS}"
        raise InputError(f"{path}: one picture of Cityscapes: name the folder that holds {root}")
    if "shapes" in content and "images" not in content:
        return "LabelMe"
    return "LVIS" if lvis.recognise(content) else "COCO"


def _recognise(path: Path) -> str:
    if cityscapes.recognise(path):
        return "Cityscapes"
    if voc.recognise(path):
        return "Pascal VOC"
    pairs = {"YOLO-seg": find_pair(path, "labels"), "masks": find_pair(path, "masks")}
    kinds = [kind for kind, pair in pairs.items() if pair]
    if len(kinds) > 1:
        raise InputError(f"{path}: holds both labels and masks: name the folder of one of them")
    if kinds:
        return kinds[0]
    files = sorted(path.rglob("*.json"))
    if not files:
        raise InputError(
            f"{path}: no labels known: expected a json (COCO, LVIS, LabelMe), a YOLO yaml, or "
            "folders images and labels (YOLO-seg), images and masks, leftImg8bit and gtFine "
            "(Cityscapes), or JPEGImages and SegmentationObject (Pascal VOC)"
        )
    for file in files:
        try:
            content = read_json(file)
        except InputError:
            continue  # the reader will name it
        if "shapes" not in content:
            said = "which is not LabelMe's: name the COCO json"
            raise InputError(f"{path}: holds {file.name}, {said}")
        break
    return "LabelMe"
