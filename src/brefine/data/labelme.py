"""LabelMe: one json a picture, with polygons, rectangles and circles."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from brefine.data.coco import read_json
from brefine.data.faults import Doubt, Place, Report, refuse, reporting, shorten
from brefine.data.pictures import (
    CLASSES,
    MAX_PIXELS,
    SUFFIXES,
    measure,
    number_names,
    read_names,
    watch,
)
from brefine.structures import InputError

#: pixels by which a circle's polygon may leave the circle
CIRCLE_ERROR = 0.02
_SIZE = "height", "width"


def read(path: Path, images: Path | None = None, *, report: Report = refuse) -> dict[str, Any]:
    """A LabelMe set as a COCO dict.

    Category ids are 1, 2, ... in the sorted order of the labels that occur, or of the
    ``classes.txt`` in the folder or beside it. Shapes of one label and ``group_id`` are one
    object. ``imageData`` is not looked at. A picture without a json does not belong to the set.

    Args:
        path: a folder, searched with the folders inside, or one json.
        images: what ``imagePath`` is relative to, instead of the json's own folder.
        report: what to do with a broken json, shape or picture.

    Returns:
        ``images`` (ids are paths inside the folder), ``annotations`` with polygons,
        ``categories`` and ``info``: the ``places`` of the annotations, in their order, and the
        ``doubts``.

    Raises:
        InputError: no json there; with ``refuse``, anything broken. Names the file and the index
            of the shape.
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*.json") if p.is_file())
    top = path.parent if path.is_file() else path
    if not files:
        raise InputError(f"{path}: no json files there")
    given = read_names(top, top.absolute().parent, report=report)
    entries: dict[str, dict[str, Any]] = {}
    labels: list[str] = []
    annotations: list[dict[str, Any]] = []
    places: list[Place] = []
    for name, file in watch({file.relative_to(top).as_posix(): file for file in files}):
        content: dict[str, Any] | None = None
        with reporting(report, "bad-json", file):
            content = read_json(file)
        if content is None:
            continue
        objects = _objects_of(content, file, given, report)
        picture = _picture_of(content, file, images, report)
        if picture is None:
            continue
        key = os.path.relpath(picture, images or top).replace(os.sep, "/")
        if key in entries:
            message = f"imagePath: {picture.name} has labels in another json, too"
            report("same-labels", file, None, message)
            continue
        entry = _measure(content, file, picture, key, report)
        if entry is None:
            continue
        entries[key] = entry
        for number, label, polygons in objects:
            labels.append(label)
            where = f"shape {number} of {name}"
            annotations.append({"id": where, "image_id": key, "segmentation": polygons})
            places.append((file, number, f"shapes[{number}]"))
    ids = number_names(labels, given, path)
    for annotation, label in zip(annotations, labels, strict=True):
        annotation["category_id"] = ids[label]
    doubts: list[Doubt] = []
    known = {Path(entry["file_name"]) for entry in entries.values()}
    others = sorted(p for p in top.absolute().rglob("*") if p.suffix.lower() in SUFFIXES)
    if path.is_dir() and (others := [p for p in others if p not in known]):
        message = f"{len(others)} pictures have no json, and are not used, first: {others[0].name}"
        doubts.append(("unlabelled-pictures", path, None, message))
    return {
        "info": {"places": places, "doubts": doubts},
        "images": list(entries.values()),
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
    }


def _picture_of(
    content: dict[str, Any], file: Path, images: Path | None, report: Report
) -> Path | None:
    said = content.get("imagePath")
    if not isinstance(said, str) or not said or "\0" in said:
        kind = "wrong-type" if "imagePath" in content else "missing-key"
        report(kind, file, None, "imagePath: expected the name of the picture")
        return None
    # Written on Windows, it has backslashes.
    place = (images or file.parent) / said.replace("\\", "/")
    return Path(os.path.normpath(place.absolute()))


def _measure(
    content: dict[str, Any], file: Path, picture: Path, key: str, report: Report
) -> dict[str, Any] | None:
    """The COCO entry of a picture, with the size that the json says, else its own."""
    entry = {"id": key, "file_name": str(picture)}
    said = [content.get(name) for name in ("imageHeight", "imageWidth")]
    if said == [None, None]:
        size = measure(picture, key, report)
        return None if size is None else entry | dict(zip(_SIZE, size, strict=True), measured=True)
    height, width = said
    if type(height) is not int or type(width) is not int or min(height, width) < 1:
        message = f"imageHeight and imageWidth: expected whole numbers from 1, not {shorten(said)}"
        report("wrong-type", file, None, message)
    elif height * width > MAX_PIXELS:
        message = f"imageHeight and imageWidth: {shorten(height)} x {shorten(width)} is too large"
        report("bad-size", file, None, message)
    else:
        return entry | {"height": height, "width": width}
    return None


def _objects_of(
    content: dict[str, Any], file: Path, given: list[str] | None, report: Report
) -> list[tuple[int, str, list[list[float]]]]:
    """Index of the first shape, label and polygons of each object."""
    shapes = content.get("shapes")
    if not isinstance(shapes, list):
        kind = "wrong-type" if "shapes" in content else "missing-key"
        report(kind, file, None, "shapes: expected a list: this is no LabelMe json")
        return []
    objects: dict[Any, tuple[int, str, list[list[float]]]] = {}
    for number, shape in enumerate(shapes):

        def tell(kind: str, message: str, number: int = number) -> None:
            report(kind, file, number, f"shapes[{number}]: {message}")

        if not isinstance(shape, dict):
            tell("wrong-type", f"{shorten(shape)}, expected an object {{...}}")
            continue
        label, group = shape.get("label"), shape.get("group_id")
        polygon = _outline(shape, tell)
        if not isinstance(label, str) or not label.strip():
            tell("wrong-type", "label: expected a text")
        elif group is not None and not isinstance(group, int | str):
            tell("wrong-type", "group_id: expected a whole number or null")
        elif given is not None and label.strip() not in given:
            tell("unknown-category", f"class {shorten(label.strip())} is not in {CLASSES}")
        elif polygon is not None:
            label = label.strip()
            key = (label, group) if group is not None else number
            objects.setdefault(key, (number, label, []))[2].append(polygon)
    return list(objects.values())


def _outline(shape: dict[str, Any], tell: Callable[[str, str], None]) -> list[float] | None:
    """A shape as one polygon, x, y, x, y ...; None where something is wrong, and ``tell`` knows."""
    kind = shape.get("shape_type") or "polygon"
    points = shape.get("points")
    if fault := _find_fault(kind, points):
        tell(*fault)
        return None
    assert isinstance(points, list)
    if kind == "circle":
        (x, y), (x2, y2) = points
        radius = math.hypot(x2 - x, y2 - y)
        corners = math.ceil(math.pi * math.sqrt(radius / (2 * CIRCLE_ERROR)))
        corners = min(max(corners, 16), 1000)
        angles = [2 * math.pi * i / corners for i in range(corners)]
        return [v for a in angles for v in (x + radius * math.cos(a), y + radius * math.sin(a))]
    if kind == "rectangle" and len(points) == 2:
        (x1, y1), (x2, y2) = points
        points = [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    return [float(value) for point in points for value in point]


def _find_fault(kind: Any, points: Any) -> tuple[str, str] | None:
    """Kind and message of what is wrong with a shape of this type."""
    if kind not in ("polygon", "rectangle", "circle"):
        said = repr(kind) if isinstance(kind, str) else shorten(kind)
        return "bad-shape", f"shape_type {said[:40]}: expected polygon, rectangle or circle"
    if not isinstance(points, list):
        return "wrong-type", "points: expected a list of [x, y]"
    for point in points:
        if not isinstance(point, list) or len(point) != 2:
            return "wrong-type", "points: expected a list of [x, y]"
        for value in point:
            if type(value) not in (int, float) or not abs(value) < 1e9:
                return "bad-polygon", "points: a coordinate is not a finite number"
    if kind == "circle":
        if len(points) != 2:
            expected = "expected its centre and one on it"
            return "bad-shape", f"a circle of {len(points)} points, {expected}"
        if points[0] == points[1]:
            return "bad-shape", "a circle of radius 0: remove it"
    elif kind == "rectangle":
        if len(points) not in (2, 4):
            expected = "expected two opposite corners"
            return "bad-shape", f"a rectangle of {len(points)} points, {expected}"
    elif len(points) < 3:
        return "few-points", f"a polygon of {len(points)} points, expected 3 or more"
    return None
