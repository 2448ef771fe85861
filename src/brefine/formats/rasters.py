"""Masks as pictures: one PNG an object, or an id map of all of them with a table."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from brefine.files import replacing
from brefine.formats.records import Predicted
from brefine.rle import Runs
from brefine.structures import Category, InputError

MOST = 2**16 - 1  # objects that a 16-bit map can number


def write_masks(folder: Path, masks: Sequence[Runs], names: Sequence[str]) -> None:
    """Write a folder with a black and white PNG for each object, named by its class and number.

    Args:
        folder: made if it is not there.
        masks: object k of the list is ``NAME_000k.png``; those without a pixel are left out.
        names: the class of each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, (runs, name) in enumerate(zip(masks, names, strict=True), 1):
        if not runs.area():
            continue
        mask = np.zeros(runs.size, dtype=bool)
        window, (x, y) = runs.pixels()
        mask[y : y + window.shape[0], x : x + window.shape[1]] = window
        Image.fromarray(mask).save(folder / f"{name}_{number:04}.png", "PNG")


def write_idmap(
    folder: Path | str, picture: Predicted, categories: Sequence[Category] = ()
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
        picture: what was found; the last suffix of its name is left out, folders in the name are
            made inside ``folder``.
        categories: the category table, for the names.

    Raises:
        InputError: more than 65,535 objects, a record of another size, a name that leads out
            of ``folder``, or the files cannot be written.
    """
    name = Path(picture.name)
    if not name.name or name.is_absolute() or ".." in name.parts:
        raise InputError(f"{picture.name}: the name of a picture must stay inside {folder}")
    records = picture.records
    if len(records) > MOST:
        raise InputError(
            f"{picture.name}: {len(records)} objects, an id map holds {MOST}: raise the "
            "threshold or write COCO results"
        )
    ids = np.zeros(picture.size, dtype=np.uint16)
    for i in sorted(range(len(records)), key=lambda i: (records[i]["score"], -i)):
        window, (x, y) = picture.masks[i].pixels()
        inside = window.astype(bool)
        ids[y : y + inside.shape[0], x : x + inside.shape[1]][inside] = i + 1
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
            table.writerow((*row, picture.masks[i].area(), int(visible[i])))
