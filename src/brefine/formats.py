"""What predictions are written as: COCO results, and one id map a picture.

Files appear whole or not at all, and replace those of an earlier run.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from brefine.data.coco import decode
from brefine.files import replacing
from brefine.structures import Category, InputError

MOST = 2**16 - 1  # objects that a 16-bit map can number


def write_coco(path: Path | str, records: Sequence[Mapping[str, Any]]) -> None:
    """Write COCO results: a JSON list, one record a line, in their order.

    Numbers are written in full, so that reading the file gives the same records.

    Args:
        path: the file to write.
        records: `parts.masks.to_records` of any number of pictures.

    Raises:
        InputError: the file cannot be written, or a score or box is no finite number.
    """
    for index, record in enumerate(records):
        if not all(map(math.isfinite, (record["score"], *record.get("bbox", ())))):
            raise InputError(f"record {index}: score or bbox is no finite number, not written")
    with replacing(path) as aside, aside.open("w", encoding="utf-8") as file:
        file.write("[")
        for index, record in enumerate(records):
            file.write(",\n" if index else "\n")
            file.write(json.dumps(record, allow_nan=False))
        file.write("\n]\n")


def write_mask_pngs(
    folder: Path | str,
    picture: str,
    records: Sequence[Mapping[str, Any]],
    size: tuple[int, int],
    categories: Sequence[Category] = (),
) -> None:
    """Write the masks of one picture as an id map, with a table of the ids.

    ``PICTURE.png`` is a 16-bit gray picture of the original size: 0 is background, k is the
    record in line k of ``PICTURE.csv``. Where masks overlap, the best score is on top (of equal
    scores the first record), so a pixel has one id; COCO results keep masks whole.

    The table has the columns id, category_id, name (empty if not in ``categories``), score,
    x, y, width, height (the box), area (pixels of the whole mask) and visible (pixels that
    carry the id).

    Args:
        folder: made if it is not there.
        picture: the picture's name; its last suffix is left out, folders in it are made inside
            ``folder``.
        records: COCO results of this picture.
        size: (height, width) of the picture.
        categories: the category table, for the names.

    Raises:
        InputError: more than 65,535 objects, a record of another size, a name that leads out
            of ``folder``, or the files cannot be written.
    """
    name = Path(picture)
    if not name.name or name.is_absolute() or ".." in name.parts:
        raise InputError(f"{picture}: the name of a picture must stay inside {folder}")
    if len(records) > MOST:
        raise InputError(
            f"{picture}: {len(records)} objects, an id map holds {MOST}: raise the "
            "threshold or write COCO results"
        )
    ids = np.zeros(size, dtype=np.uint16)
    areas = [0] * len(records)
    order = sorted(range(len(records)), key=lambda i: (records[i]["score"], -i))
    for i in order:
        try:
            window, (x, y) = decode(records[i]["segmentation"], size).window()
        except ValueError as error:
            raise InputError(f"{picture}: record {i} does not fit: {error}") from None
        inside = window.numpy().astype(bool)
        ids[y : y + inside.shape[0], x : x + inside.shape[1]][inside] = i + 1
        areas[i] = int(inside.sum())
    visible = np.bincount(ids.ravel(), minlength=len(records) + 1)[1:]
    names = {category.id: category.name for category in categories}

    stem = Path(folder) / name.parent / name.stem
    with replacing(stem.with_name(f"{name.stem}.png")) as aside:
        Image.fromarray(ids).save(aside, "PNG")
    with (
        replacing(stem.with_name(f"{name.stem}.csv")) as aside,
        aside.open("w", encoding="utf-8", newline="") as file,
    ):
        table = csv.writer(file, lineterminator="\n")
        table.writerow(
            ("id", "category_id", "name", "score", "x", "y", "width", "height", "area", "visible")
        )
        for i, record in enumerate(records):
            category = record["category_id"]
            box = record.get("bbox", ("",) * 4)
            row = (i + 1, category, names.get(category, ""), record["score"], *box)
            table.writerow((*row, areas[i], int(visible[i])))
