"""YOLO-seg: a data yaml or folders of pictures and of text files, one polygon a line.

A line is ``class x1 y1 x2 y2 ...`` with coordinates as shares of the upright picture's width and
height. Parts joined by a bridge of no width stay one polygon; drawn, the bridge has no pixels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brefine.data.faults import Doubt, Place, Report, refuse, reporting
from brefine.data.pictures import (
    CLASSES,
    MISSING,
    by_name,
    find_pair,
    list_pictures,
    measure,
    read_lines,
    read_names,
    refuse_splits,
    swap,
    watch,
)
from brefine.recipe import parse_yaml
from brefine.structures import InputError

#: shares of the picture by which a point may lie outside; and from which on they must be pixels
OUTSIDE, PIXELS = 0.1, 2.0
#: a class index from here on is a mistake
MAX_CLASSES = 10**5


@dataclass(frozen=True)
class _Files:
    """What belongs to a set.

    Attributes:
        pictures: by their names.
        labels: by the same names; not all of them exist.
        whole: folders in which every text file is a label.
        tables: files with class names, the first of which counts.
    """

    pictures: dict[str, Path]
    labels: dict[str, Path]
    whole: list[Path]
    tables: list[Path]


def read(
    path: Path, images: Path | None = None, *, split: str = "val", report: Report = refuse
) -> dict[str, Any]:
    """A YOLO-seg set as a COCO dict.

    Category ids are the class indices. Names come from the yaml, for a folder from the
    ``classes.txt`` or ``data.yaml`` in it or beside it, else an index is its own name. A picture
    without a label file has no objects.

    Args:
        path: a data yaml, or a folder; see ``pictures.find_pair``.
        images: folder of the pictures, instead of ``images``; not with a yaml.
        split: which entry of the yaml to read.
        report: what to do with a broken picture, line or file of labels or names.

    Returns:
        ``images`` (ids are paths inside the folder of pictures), ``annotations`` with polygons,
        ``categories`` and ``info``: the numbers of ``unlabelled`` pictures and ``unused`` label
        files, the ``places`` of the annotations, in their order, and the ``doubts``.

    Raises:
        InputError: nothing can be read; with ``refuse``, anything broken. Names file and line.
    """
    if path.is_file():
        if images is not None:
            raise InputError(f"{path}: names its own pictures: leave out the folder {images}")
        files = _find_by_yaml(path, split, report)
    else:
        files = _find_in_folders(path, images, report)
    names: dict[int, str] | None = None
    if files.tables:
        with reporting(report, "bad-names", files.tables[0]):
            names = _read_table(files.tables[0])
    labelled = {file for file in files.labels.values() if file.is_file()}
    unlabelled = [name for name, file in files.labels.items() if file not in labelled]
    if not labelled:
        first = next(iter(files.labels.values()))
        report("no-labels", path, None, f"no picture has a label file, the first would be {first}")
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    places: list[Place] = []
    used: set[int] = set()
    for name, file in watch(files.pictures):
        size = measure(file, name, report)
        if size is not None:
            place = {"id": name, "file_name": str(file.absolute()), "measured": True}
            entries.append(place | {"height": size[0], "width": size[1]})
        label = files.labels[name]
        for number, index, shares in _read_label(label, report) if label in labelled else ():
            used.add(index)
            if names is not None and index not in names:
                known = f"the names are those of {min(names)} to {max(names)}"
                message = f"line {number}: class {index}, but {known}"
                report("unknown-category", label, number, message)
            elif size is not None:
                polygon = [share * size[1 - i % 2] for i, share in enumerate(shares)]
                annotations.append(
                    {
                        "id": f"line {number} of {label.name}",
                        "image_id": name,
                        "category_id": index,
                        "segmentation": [polygon],
                    }
                )
                places.append((label, number, f"line {number}"))
    if names is None:
        names = {index: str(index) for index in range(max(used, default=-1) + 1)}
    elif used - names.keys() and all(index - 1 in names for index in used):
        message = f"classes {min(used)} to {max(used)} are used, names begin with {min(names)}"
        report("shifted-ids", path, None, f"{message}: class ids shifted by one")
    unused = sorted({p for f in files.whole for p in f.rglob("*.txt") if p.name != CLASSES})
    unused = [file for file in unused if file not in labelled]
    doubts: list[Doubt] = [
        ("unused-labels", file, None, "no picture has its name") for file in unused
    ]
    if labelled and unlabelled:
        message = f"{len(unlabelled)} of {len(files.labels)} pictures have no label file, first: "
        doubts.append(("unlabelled-pictures", path, None, message + unlabelled[0]))
    if not files.tables:
        message = "no classes.txt or data.yaml: classes are called 0, 1, ..."
        doubts.append(("no-names", path, None, message))
    doubts += _compare_tables(names, files.tables)
    return {
        "info": {
            "unlabelled": len(unlabelled),
            "unused": len(unused),
            "places": places,
            "doubts": doubts,
        },
        "images": entries,
        "annotations": annotations,
        "categories": [{"id": index, "name": name} for index, name in names.items()],
    }


def _read_label(path: Path, report: Report) -> Iterator[tuple[int, int, list[float]]]:
    """Line number, class index and polygon, in shares, of each good line."""
    lines: list[str] = []
    with reporting(report, "bad-label-file", path):
        lines = read_lines(path)
    for number, line in enumerate(lines, 1):
        if not (words := line.split()):
            continue
        numbers = [_number(word) for word in words]
        if fault := _find_fault(words, numbers):
            report(fault[0], path, number, f"line {number}: {fault[1]}")
        else:
            yield number, int(numbers[0]), numbers[1:]


def _number(word: str) -> float:
    """Infinite if it is none."""
    try:
        return float(word)
    except ValueError:
        return math.inf


def _find_fault(words: list[str], numbers: list[float]) -> tuple[str, str] | None:
    """Kind and message of what is wrong with a line."""
    off = next((w for w, n in zip(words, numbers, strict=True) if not math.isfinite(n)), None)
    if off is not None:
        return "bad-line", f"{off[:40]!r} is no finite number, expected class x1 y1 x2 y2 ..."
    index, shares = numbers[0], numbers[1:]
    if not index.is_integer() or not 0 <= index < MAX_CLASSES:
        return "bad-line", f"class {words[0]}, expected a whole number from 0"
    if len(shares) == 4:
        need = "masks are needed, export the set as YOLO-seg"
        return "no-mask", f"a box without a polygon: {need}"
    if len(shares) % 2:
        return "bad-line", "an odd number of coordinates, expected x1 y1 x2 y2 ..."
    if len(shares) < 6:
        return "few-points", f"{len(shares)} coordinates, expected 3 or more points x1 y1 x2 y2 ..."
    if min(shares) < -OUTSIDE or max(shares) > 1 + OUTSIDE:
        kind = "pixel-coordinates" if max(shares) >= PIXELS else "outside-mask"
        off = next(word for word in words[1:] if not -OUTSIDE <= float(word) <= 1 + OUTSIDE)
        return kind, f"coordinate {off[:40]}, expected shares of width and height, 0 to 1"
    return None


def _find_in_folders(path: Path, images: Path | None, report: Report) -> _Files:
    pair = find_pair(path, "labels")
    if pair is None:
        raise InputError(f"{path}: holds no folders images and labels")
    folder, beside = images or pair[0], pair[1]
    refuse_splits(folder)
    pictures = by_name(list_pictures(folder), folder, report)
    labels = {name: (beside / name).with_suffix(".txt") for name in pictures}
    # Names lie beside the labels, or above the pictures up to beside ``path``.
    top = path.absolute().parent
    near = [place for place in folder.absolute().parents if place.is_relative_to(top)]
    near += [place for place in (path.absolute(), top) if place not in near]
    tables = _find_tables([beside.absolute(), *near])
    taken = {file.absolute() for file in labels.values()}  # of a picture called classes.png
    return _Files(pictures, labels, [beside], [file for file in tables if file not in taken])


def _find_tables(folders: Iterable[Path]) -> list[Path]:
    """Files with class names, each once, those called ``classes.txt`` first."""
    folders = list(dict.fromkeys(folders))
    places = [folder / CLASSES for folder in folders]
    places += [folder / name for folder in folders for name in ("data.yaml", "data.yml")]
    return [place for place in places if place.is_file()]


def _read_table(path: Path) -> dict[int, str]:
    """Class names by index from a ``classes.txt`` or a yaml.

    Raises:
        InputError: it holds none, or a broken one.
    """
    if path.suffix == ".txt":
        return dict(enumerate(read_names(path.parent) or []))
    return _names_of(_load_yaml(path), path)


def _compare_tables(names: dict[int, str], tables: list[Path]) -> Iterator[Doubt]:
    """What other files with names say otherwise; broken ones say nothing."""
    for file in tables[1:]:
        try:
            other = _read_table(file)
        except InputError:
            continue
        if other != names:
            index = min(i for i in {*names, *other} if names.get(i) != other.get(i))
            mine, theirs = (repr(t[index]) if index in t else "none" for t in (names, other))
            message = f"class {index} is {theirs}, but {mine} in {tables[0]}"
            yield "names-disagree", file, index, message


def _load_yaml(path: Path) -> dict[str, Any]:
    text = "\n".join(read_lines(path))
    content = parse_yaml(text, str(path))
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a YOLO data yaml with names, train and val")
    return content


def _find_by_yaml(path: Path, split: str, report: Report) -> _Files:
    content = _load_yaml(path)
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
    whole: list[Path] = []
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
            whole += [swap(place, "images", "labels")] if "images" in place.parts else []
        else:
            found += _read_list(place, root, report)
            folders.append(root)
    top = folders[0] if len(folders) == 1 else root
    pictures = by_name(list(dict.fromkeys(found)), top, report)
    labels = {name: _label_of(file) for name, file in pictures.items()}
    near = _find_tables(place.absolute() for place in (root, path.parent, *whole))
    taken = {path.absolute(), *(file.absolute() for file in labels.values())}
    return _Files(pictures, labels, whole, [path, *(file for file in near if file not in taken)])


def _read_list(path: Path, root: Path, report: Report) -> list[Path]:
    """The pictures that a text file lists, relative to itself or to the set's folder."""
    found = []
    for number, line in enumerate(read_lines(path), 1):
        if not (text := line.strip()):
            continue
        places = [path.parent / text, root / text]
        place = next((place for place in places if place.is_file()), None)
        if place is None:
            message = f"line {number}: {text}: {MISSING}"
            report("missing-picture", path, number, message)
        else:
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


def _label_of(picture: Path) -> Path:
    """``.../labels/x.txt`` for ``.../images/x.jpg``; beside the picture without such a folder."""
    return swap(picture.parent, "images", "labels") / f"{picture.stem}.txt"
