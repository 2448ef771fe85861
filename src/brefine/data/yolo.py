"""YOLO-seg: a data yaml or folders of pictures and of text files, one polygon a line.

A line is ``class x1 y1 x2 y2 ...`` with coordinates as shares of the upright picture's width and
height. Parts joined by a bridge of no width stay one polygon; drawn, the bridge has no pixels.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from brefine.data.pictures import (
    CLASSES,
    by_name,
    find_pair,
    list_pictures,
    read_lines,
    read_names,
    refuse_splits,
    swap,
    upright_size,
    watch,
)
from brefine.recipe import parse_yaml
from brefine.structures import InputError

#: shares of the picture by which a point may lie outside; more are pixels, not shares
OUTSIDE = 0.1


def read(path: Path, images: Path | None = None, *, split: str = "val") -> dict[str, Any]:
    """A YOLO-seg set as a COCO dict.

    Category ids are the class indices. Names come from the yaml, for a folder from the
    ``classes.txt`` or ``data.yaml`` in it or beside it, else an index is its own name. A picture
    without a label file has no objects.

    Args:
        path: a data yaml, or a folder; see ``pictures.find_pair``.
        images: folder of the pictures, instead of ``images``; not with a yaml.
        split: which entry of the yaml to read.

    Returns:
        ``images`` (ids are paths inside the folder of pictures), ``annotations`` with polygons,
        ``categories`` and ``info`` with the numbers of ``unlabelled`` pictures and,
        for a folder, ``unused`` label files.

    Raises:
        InputError: anything broken; names file and line.
    """
    names: dict[int, str] | None
    unused = 0
    if path.is_file():
        if images is not None:
            raise InputError(f"{path}: names its own pictures: leave out the folder {images}")
        names, pictures = _read_yaml(path, split)
        labels = {name: _label_of(file) for name, file in pictures.items()}
    else:
        pair = find_pair(path, "labels")
        if pair is None:
            raise InputError(f"{path}: holds no folders images and labels")
        folder, beside = images or pair[0], pair[1]
        refuse_splits(folder)
        pictures = by_name(list_pictures(folder), folder)
        labels = {name: (beside / name).with_suffix(".txt") for name in pictures}
        unused = len({p for p in beside.rglob("*.txt") if p.name != CLASSES} - {*labels.values()})
        names = _find_names(folder, beside, path)
    unlabelled = sum(not file.is_file() for file in labels.values())
    if unlabelled == len(pictures):
        first = next(iter(labels.values()))
        raise InputError(f"{path}: no picture has a label file, the first would be {first}")
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    largest = -1
    for name, file in watch(pictures):
        size = upright_size(file)
        place = str(file.absolute())
        entries.append({"id": name, "file_name": place, "height": size[0], "width": size[1]})
        if not labels[name].is_file():
            continue
        for number, line in enumerate(read_lines(labels[name]), 1):
            if not line.strip():
                continue
            try:
                index, polygon = _parse(line, size)
                if names is not None and index not in names:
                    known = f"{min(names)} to {max(names)}"
                    raise ValueError(f"class {index}, but the names are those of {known}")
            except ValueError as error:
                raise InputError(f"{labels[name]}, line {number}: {error}") from None
            largest = max(largest, index)
            annotations.append(
                {
                    "id": f"line {number} of {labels[name].name}",
                    "image_id": name,
                    "category_id": index,
                    "segmentation": [polygon],
                }
            )
    if names is None:
        names = {index: str(index) for index in range(largest + 1)}
    return {
        "info": {"unlabelled": unlabelled, "unused": unused},
        "images": entries,
        "annotations": annotations,
        "categories": [{"id": index, "name": name} for index, name in names.items()],
    }


def _parse(line: str, size: tuple[int, int]) -> tuple[int, list[float]]:
    """Class index and polygon in pixels of one line.

    Raises:
        ValueError: says what is wrong with it.
    """
    words = line.split()
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        raise ValueError("expected numbers: class x1 y1 x2 y2 ...") from None
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError("a number is not finite")
    index, shares = numbers[0], numbers[1:]
    if not index.is_integer() or not 0 <= index < 10**6:
        raise ValueError(f"class {words[0]}, expected a whole number from 0")
    if len(shares) == 4:
        raise ValueError("a box without a polygon: masks are needed, export the set as YOLO-seg")
    if len(shares) % 2 or len(shares) < 6:
        points = "an odd number of" if len(shares) % 2 else str(len(shares))
        raise ValueError(f"{points} coordinates, expected x1 y1 x2 y2 ... of 3 or more points")
    if min(shares) < -OUTSIDE or max(shares) > 1 + OUTSIDE:
        off = next(word for word in words[1:] if not -OUTSIDE <= float(word) <= 1 + OUTSIDE)
        raise ValueError(f"coordinate {off}, expected shares of width and height, 0 to 1")
    height, width = size
    scaled = [share * (height if i % 2 else width) for i, share in enumerate(shares)]
    return int(index), scaled


def _load_yaml(path: Path) -> dict[str, Any]:
    text = "\n".join(read_lines(path))
    content = parse_yaml(text, str(path))
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a YOLO data yaml with names, train and val")
    return content


def _read_yaml(path: Path, split: str) -> tuple[dict[int, str], dict[str, Path]]:
    """Class names by index, and the pictures of a split by name."""
    content = _load_yaml(path)
    names = _names_of(content, path)
    said = content.get(split)
    listed = said if isinstance(said, list) else [said]
    sources = [source for source in listed if isinstance(source, str) and source]
    if not sources or len(sources) < len(listed):
        raise InputError(f"{path}: {split}: expected a folder of pictures, a list of them (.txt)")
    root = path.parent
    if (inside := content.get("path")) is not None:
        if not isinstance(inside, str):
            raise InputError(f"{path}: path: expected a folder")
        root = root / inside if (root / inside).is_dir() else Path(inside)
    found: list[Path] = []
    folders: list[Path] = []
    for source in sources:
        # Exported yamls often say ../train/images and mean train/images beside themselves.
        places = [root / source, path.parent / source, path.parent / source.removeprefix("../")]
        place = next((place for place in places if place.exists()), None)
        if place is None:
            raise InputError(f"{path}: {split}: {places[0]}: no such folder or list of pictures")
        if place.is_dir():
            refuse_splits(place)
            found += list_pictures(place)
            folders.append(place)
        else:
            found += _read_list(place, root)
            folders.append(root)
    return names, by_name(list(dict.fromkeys(found)), folders[0] if len(folders) == 1 else root)


def _read_list(path: Path, root: Path) -> list[Path]:
    """The pictures that a text file lists, relative to itself or to the set's folder."""
    found = []
    for number, line in enumerate(read_lines(path), 1):
        if not (text := line.strip()):
            continue
        places = [path.parent / text, root / text]
        place = next((place for place in places if place.is_file()), None)
        if place is None:
            raise InputError(f"{path}, line {number}: {text}: no such picture")
        found.append(Path(os.path.normpath(place)))
    if not found:
        raise InputError(f"{path}: lists no picture")
    return found


def _names_of(content: dict[str, Any], path: Path) -> dict[int, str]:
    names = content.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names:
        raise InputError(f"{path}: names: expected a list of class names, or index: name")
    for index, name in names.items():
        if type(index) is not int or index < 0:
            raise InputError(f"{path}: names: index {index!r}, expected a whole number from 0")
        if not isinstance(name, str | int | float) or not str(name):
            raise InputError(f"{path}: names: class {index} has no name")
    return {index: str(name) for index, name in names.items()}


def _find_names(folder: Path, labels: Path, path: Path) -> dict[int, str] | None:
    """Names for a folder: beside the labels, or above the pictures up to beside ``path``."""
    top = path.absolute().parent
    near = [place for place in folder.absolute().parents if place.is_relative_to(top)]
    near += [place for place in (path.absolute(), top) if place not in near]
    if (names := read_names(labels, *near)) is not None:
        return dict(enumerate(names))
    for place in near:
        for file in (place / "data.yaml", place / "data.yml"):
            if file.is_file():
                return _names_of(_load_yaml(file), file)
    return None


def _label_of(picture: Path) -> Path:
    """``.../labels/x.txt`` for ``.../images/x.jpg``; beside the picture without such a folder."""
    return swap(picture.parent, "images", "labels") / f"{picture.stem}.txt"
