"""LabelMe: one json a picture, with polygons, rectangles and circles."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from brefine.data.coco import read_json
from brefine.data.pictures import MAX_PIXELS, number_names, read_names, upright_size, watch
from brefine.structures import InputError

#: pixels by which a circle's polygon may leave the circle
CIRCLE_ERROR = 0.02


def read(path: Path, images: Path | None = None) -> dict[str, Any]:
    """A LabelMe set as a COCO dict.

    Category ids are 1, 2, ... in the sorted order of the labels that occur, or of the
    ``classes.txt`` in the folder or beside it. Shapes of one label and ``group_id`` are one
    object. ``imageData`` is not looked at. A picture without a json does not belong to the set.

    Args:
        path: a folder, searched with the folders inside, or one json.
        images: what ``imagePath`` is relative to, instead of the json's own folder.

    Returns:
        ``images`` (ids are paths inside the folder), ``annotations`` with polygons,
        ``categories`` and ``info``.

    Raises:
        InputError: anything broken; names the file and the index of the shape.
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*.json") if p.is_file())
    top = path.parent if path.is_file() else path
    if not files:
        raise InputError(f"{path}: no json files there")
    entries: dict[str, dict[str, Any]] = {}
    objects: list[tuple[str, str, str, list[list[float]]]] = []
    for name, file in watch({file.relative_to(top).as_posix(): file for file in files}):
        content = read_json(file)
        picture = _picture_of(content, file, images)
        key = os.path.relpath(picture, images or top).replace(os.sep, "/")
        if key in entries:
            raise InputError(f"{file}: imagePath: {picture.name} has labels in another json")
        height, width = _size_of(content, file, picture)
        entries[key] = {"id": key, "file_name": str(picture), "height": height, "width": width}
        for number, label, polygons in _objects_of(content, file):
            objects.append((f"shape {number} of {name}", key, label, polygons))
    names = read_names(top, top.absolute().parent)
    ids = number_names((label for _, _, label, _ in objects), names, path)
    return {
        "info": {},
        "images": list(entries.values()),
        "annotations": [
            {"id": where, "image_id": key, "category_id": ids[label], "segmentation": polygons}
            for where, key, label, polygons in objects
        ],
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
    }


def _picture_of(content: dict[str, Any], file: Path, images: Path | None) -> Path:
    said = content.get("imagePath")
    if not isinstance(said, str) or not said or "\0" in said:
        raise InputError(f"{file}: imagePath: expected the name of the picture")
    # Written on Windows, it has backslashes.
    place = (images or file.parent) / said.replace("\\", "/")
    return Path(os.path.normpath(place.absolute()))


def _size_of(content: dict[str, Any], file: Path, picture: Path) -> tuple[int, int]:
    """(height, width) that the json says, else the picture's."""
    said = [content.get(key) for key in ("imageHeight", "imageWidth")]
    if said == [None, None]:
        return upright_size(picture)
    height, width = said
    if type(height) is not int or type(width) is not int or min(height, width) < 1:
        raise InputError(f"{file}: imageHeight and imageWidth: expected whole numbers from 1")
    if height * width > MAX_PIXELS:
        raise InputError(f"{file}: imageHeight and imageWidth: {height} x {width} is too large")
    return height, width


def _objects_of(content: dict[str, Any], file: Path) -> list[tuple[int, str, list[list[float]]]]:
    """Index of the first shape, label and polygons of each object."""
    shapes = content.get("shapes")
    if not isinstance(shapes, list):
        raise InputError(f"{file}: shapes: expected a list: this is no LabelMe json")
    objects: dict[Any, tuple[int, str, list[list[float]]]] = {}
    for number, shape in enumerate(shapes):
        try:
            if not isinstance(shape, dict):
                raise ValueError("expected an object {...}")
            label, group = shape.get("label"), shape.get("group_id")
            if not isinstance(label, str) or not label.strip():
                raise ValueError("label: expected a text")
            if group is not None and not isinstance(group, int | str):
                raise ValueError("group_id: expected a whole number or null")
            polygon = _outline(shape)
        except ValueError as error:
            raise InputError(f"{file}: shapes[{number}]: {error}") from None
        label = label.strip()
        key = (label, group) if group is not None else number
        objects.setdefault(key, (number, label, []))[2].append(polygon)
    return list(objects.values())


def _outline(shape: dict[str, Any]) -> list[float]:
    """A shape as one polygon, x, y, x, y ...

    Raises:
        ValueError: says what is wrong with it.
    """
    kind = shape.get("shape_type") or "polygon"
    points = shape.get("points")
    if kind not in ("polygon", "rectangle", "circle"):
        raise ValueError(f"shape_type {kind!r}: expected polygon, rectangle or circle")
    if not isinstance(points, list):
        raise ValueError("points: expected a list of [x, y]")
    for point in points:
        if not isinstance(point, list) or len(point) != 2:
            raise ValueError("points: expected a list of [x, y]")
        for value in point:
            if type(value) not in (int, float) or not abs(value) < 1e9:
                raise ValueError("points: a coordinate is not a finite number")
    if kind == "circle":
        if len(points) != 2:
            raise ValueError(f"a circle of {len(points)} points, expected its centre and one on it")
        (x, y), (x2, y2) = points
        radius = math.hypot(x2 - x, y2 - y)
        if radius == 0:
            raise ValueError("a circle of radius 0: remove it")
        corners = math.ceil(math.pi * math.sqrt(radius / (2 * CIRCLE_ERROR)))
        corners = min(max(corners, 16), 1000)
        angles = [2 * math.pi * i / corners for i in range(corners)]
        return [v for a in angles for v in (x + radius * math.cos(a), y + radius * math.sin(a))]
    if kind == "rectangle" and len(points) == 2:
        (x1, y1), (x2, y2) = points
        points = [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    elif kind == "rectangle" and len(points) != 4:
        raise ValueError(f"a rectangle of {len(points)} points, expected two opposite corners")
    if len(points) < 3:
        raise ValueError(f"a polygon of {len(points)} points, expected 3 or more")
    return [float(value) for point in points for value in point]
