"""Masks as outlines, one file a picture: YOLO-seg, LabelMe, rings as json, GeoJSON.

With a tolerance of 0 the outlines run along the edges of the pixels and are the masks, bit by bit;
what a larger one, or YOLO's six digits, changes is found by drawing what was written, as
pycocotools draws. Objects without a pixel have no outline and are left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from brefine.formats.records import Predicted
from brefine.outlines import Ring, join, polygons, simple_parts
from brefine.rle import Runs, decode
from brefine.structures import Category

#: label and mask of one object
Object = tuple[int, Runs]
#: what a reader will find of each object of a picture; None: nothing
Found = list[Runs | None]


def write_yolo(
    file: Path, size: tuple[int, int], objects: Sequence[Object], tolerance: float
) -> Found:
    """The labels of one picture: a line an object, its parts and holes tied into one polygon."""
    lines, found = [], Found()
    for label, runs in objects:
        if not runs.area():
            found.append(None)
            continue
        window, origin = runs.pixels()
        outline = join(polygons(window, origin, tolerance)).ravel()
        sides = np.tile(size[::-1], len(outline) // 2)
        words = [f"{share:.6g}" for share in outline / sides]
        lines.append(" ".join([str(label), *words]))
        read_back = [float(word) * side for word, side in zip(words, sides.tolist(), strict=True)]
        found.append(_draw([read_back], size))
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return found


def write_labelme(
    file: Path,
    picture: str,
    size: tuple[int, int],
    objects: Sequence[Object],
    classes: Sequence[str],
    tolerance: float,
    scores: Sequence[float] | None = None,
) -> Found:
    """The labels of one picture: parts as polygons of one ``group_id``, holes tied in.

    Args:
        file: the file to write.
        picture: its ``imagePath``.
        size: (height, width).
        objects: labels and masks.
        classes: name of each label.
        tolerance: see ``outlines.simplify``.
        scores: of each object, if it has one: written as ``score`` of its shapes.
    """
    shapes, found = [], Found()
    for number, (label, runs) in enumerate(objects, 1):
        if not runs.area():
            found.append(None)
            continue
        window, origin = runs.pixels()
        parts = polygons(window, origin, tolerance)
        score = {} if scores is None else {"score": scores[number - 1]}
        shapes += [
            {
                "label": classes[label],
                "points": part.tolist(),
                "group_id": number if len(parts) > 1 else None,
                "shape_type": "polygon",
                "flags": {},
                **score,
            }
            for part in parts
        ]
        found.append(_draw([part.ravel().tolist() for part in parts], size))
    content: dict[str, Any] = {
        "version": "5.0.0",
        "flags": {},
        "shapes": shapes,
        "imagePath": Path(picture).as_posix(),
        "imageData": None,
        "imageHeight": size[0],
        "imageWidth": size[1],
    }
    file.write_text(json.dumps(content), encoding="utf-8")
    return found


def write_polygons(
    file: Path, picture: Predicted, categories: Sequence[Category], tolerance: float
) -> Found:
    """What was found in one picture, masks as rings of corners ``[x, y]``, y down.

    ``picture``, ``height``, ``width``, ``tolerance`` and ``objects``: for each ``image_id``,
    ``category_id``, ``name``, ``score``, ``bbox`` (x, y, width, height) and ``polygons``, one a
    part: its outline, then its holes.
    """
    objects, found = [], Found()
    for record, name, runs in _named(picture, categories):
        parts = _parts(runs, tolerance)
        found.append(_draw_parts(parts, picture.size))
        kept = {key: record[key] for key in ("image_id", "category_id", "score", "bbox")}
        polygon = [[ring.tolist() for ring in part] for part in parts]
        objects += [{**kept, "name": name, "polygons": polygon}] if parts else []
    height, width = picture.size
    content = {"picture": picture.name, "height": height, "width": width, "tolerance": tolerance}
    file.write_text(json.dumps({**content, "objects": objects}), encoding="utf-8")
    return found


def write_geojson(
    file: Path, picture: Predicted, categories: Sequence[Category], tolerance: float
) -> Found:
    """What was found in one picture, as a FeatureCollection in its pixels, x right and y down.

    A feature is a Polygon or, of several parts, a MultiPolygon, with the properties ``class``,
    ``category_id``, ``image_id`` and ``score``. With a tolerance of 0 the geometries are valid by
    the rules of OGC: no ring touches itself, pixels that only touch at a corner are two parts.
    """
    features, found = [], Found()
    for record, name, runs in _named(picture, categories):
        parts = _parts(runs, tolerance)
        found.append(_draw_parts(parts, picture.size))
        rings = [[np.concatenate([r, r[:1]]).tolist() for r in part] for part in parts]
        if not rings:
            continue
        many = len(rings) > 1
        kind, coordinates = ("MultiPolygon", rings) if many else ("Polygon", rings[0])
        said = {key: record[key] for key in ("category_id", "image_id", "score")}
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": kind, "coordinates": coordinates},
                "properties": {"class": name, **said},
            }
        )
    content = {"type": "FeatureCollection", "features": features}
    file.write_text(json.dumps(content), encoding="utf-8")
    return found


def iou(one: Runs, other: Runs) -> float:
    """The IoU of two masks of one size, 0..1."""
    if one is other or np.array_equal(one.counts, other.counts):
        return 1.0
    return float(coco_mask.iou([one.encode()], [other.encode()], [0])[0, 0])


def _named(picture: Predicted, categories: Sequence[Category]) -> list[tuple[Any, str, Runs]]:
    """Each record with the name of its class and its mask."""
    names = {category.id: category.name for category in categories}
    return [
        (record, names[record["category_id"]], runs)
        for record, runs in zip(picture.records, picture.masks, strict=True)
    ]


def _parts(runs: Runs, tolerance: float) -> list[list[Ring]]:
    window, origin = runs.pixels()
    return simple_parts(window, origin, tolerance)


def _draw_parts(parts: list[list[Ring]], size: tuple[int, int]) -> Runs | None:
    return _draw([join(part).ravel().tolist() for part in parts], size) if parts else None


def _draw(outlines: list[list[float]], size: tuple[int, int]) -> Runs | None:
    runs = decode(outlines, size)
    return runs if runs.area() else None
