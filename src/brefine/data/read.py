"""Reading a labelled set of any known format, straight from disk."""

from __future__ import annotations

from pathlib import Path

from brefine.data import labelme, masks_folder, yolo
from brefine.data.coco import CocoSet, find_folder, read_json
from brefine.data.pictures import find_pair
from brefine.progress import console
from brefine.structures import InputError


def read(
    path: Path | str, images: Path | str | None = None, *, split: str = "val", quiet: bool = False
) -> CocoSet:
    """A labelled set, its format recognised by what is there.

    ============================================  ==========================================
    a json                                        COCO, or one picture of LabelMe
    a yaml; folders ``images`` and ``labels``     YOLO-seg
    folders ``images`` and ``masks``              masks as PNG
    a folder with json files                      LabelMe
    ============================================  ==========================================

    A format other than COCO is named on the console.

    Args:
        path: file or folder.
        images: folder of the pictures, if not where the format has them.
        split: entry of a YOLO yaml to read: ``train``, ``val`` or ``test``.
        quiet: name no format.

    Raises:
        InputError: not there, of no known format or of two, or broken; one line that names the
            file and the line, shape or annotation.
    """
    path = Path(path)
    folder = None if images is None else Path(images)
    if folder is not None and not folder.is_dir():
        raise InputError(f"{folder}: no such folder of pictures")
    if path.is_dir():
        kind = _recognise(path)
    elif path.suffix.lower() in (".yaml", ".yml"):
        kind = "YOLO-seg"
        if not path.is_file():
            raise InputError(f"{path}: no such file")
    else:
        content = read_json(path, packed=True)
        if "shapes" not in content or "images" in content:
            return CocoSet.from_dict(content, path, find_folder(path, images))
        kind = "LabelMe"
    if kind == "YOLO-seg":
        content = yolo.read(path, folder, split=split)
    elif kind == "masks":
        content = masks_folder.read(path, folder)
    else:
        content = labelme.read(path, folder)
    dataset = CocoSet.from_dict(content, path, Path())
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


def _recognise(path: Path) -> str:
    pairs = {"YOLO-seg": find_pair(path, "labels"), "masks": find_pair(path, "masks")}
    kinds = [kind for kind, pair in pairs.items() if pair]
    if len(kinds) > 1:
        raise InputError(f"{path}: holds both labels and masks: name the folder of one of them")
    if kinds:
        return kinds[0]
    first = min(path.rglob("*.json"), default=None)
    if first is None:
        raise InputError(
            f"{path}: no labels known: expected a json (COCO, LabelMe), a YOLO yaml, or folders "
            "images and labels (YOLO-seg) or images and masks"
        )
    if "shapes" not in read_json(first):
        raise InputError(f"{path}: holds {first.name}, which is not LabelMe's: name the COCO json")
    return "LabelMe"
