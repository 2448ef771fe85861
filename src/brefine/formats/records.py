"""Files that hold the objects of all pictures: COCO results, a table, CVAT's XML.

Each is written from an iterable, a picture or a record at a time, and appears whole or not at all.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from brefine.files import replacing
from brefine.rle import Runs, decode
from brefine.structures import Category, InputError

#: of ``write_csv``
COLUMNS = (
    "picture",
    "image_id",
    "category_id",
    "name",
    "score",
    "x",
    "y",
    "width",
    "height",
    "area",
    "picture_height",
    "picture_width",
    "counts",
)


@dataclass(frozen=True)
class Predicted:
    """What was found in one picture.

    Attributes:
        name: of the picture, see ``sources.Item``.
        place: where the picture is.
        size: (height, width).
        records: COCO results, see ``parts.masks.to_records``.
    """

    name: str
    place: str
    size: tuple[int, int]
    records: Sequence[Mapping[str, Any]]

    @cached_property
    def masks(self) -> list[Runs]:
        """The mask of each record, maybe empty.

        Raises:
            InputError: one is not right, or not of the picture's size.
        """
        found = []
        for number, record in enumerate(self.records):
            try:
                found.append(decode(record["segmentation"], self.size))
            except ValueError as error:
                message = f"{self.name}: record {number} does not fit: {error}"
                raise InputError(message) from None
        return found


def write_coco(path: Path | str, records: Iterable[Mapping[str, Any]]) -> None:
    """Write COCO results: a JSON list, one record a line, in their order.

    Numbers are written in full, so that reading the file gives the same records.

    Args:
        path: the file to write.
        records: `parts.masks.to_records` of any number of pictures.

    Raises:
        InputError: the file cannot be written, or a score or box is no finite number.
    """
    with replacing(path) as aside, aside.open("w", encoding="utf-8") as file:
        file.write("[")
        for index, record in enumerate(records):
            if not all(map(math.isfinite, (record["score"], *record.get("bbox", ())))):
                raise InputError(f"record {index}: score or bbox is no finite number, not written")
            file.write(",\n" if index else "\n")
            file.write(json.dumps(record, allow_nan=False))
        file.write("\n]\n")


def write_csv(
    path: Path | str, pictures: Iterable[Predicted], categories: Sequence[Category]
) -> None:
    r"""Write a table with a row an object.

    What a file name has that is no character is written as ``\udcff``, here and in the XML.

    Its columns are ``COLUMNS``: ``x``, ``y``, ``width`` and ``height`` are the box, ``area`` the
    mask's pixels; the picture's size and ``counts``, COCO's compressed RLE, are the mask.

    Args:
        path: the file to write.
        pictures: what was found.
        categories: the category table, for the names.
    """
    names = {category.id: category.name for category in categories}
    with (
        replacing(path) as aside,
        aside.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        for picture in pictures:
            for record, mask in zip(picture.records, picture.masks, strict=True):
                category = record["category_id"]
                head = (picture.name, record["image_id"], category, names.get(category, ""))
                box = record.get("bbox", ("",) * 4)
                counts = record["segmentation"]["counts"]
                table.writerow((*head, record["score"], *box, mask.area(), *picture.size, counts))


def write_cvat(
    path: Path | str, pictures: Iterable[Predicted], categories: Sequence[Category]
) -> None:
    """Write CVAT's XML 1.1 for images, with every mask as it is: a ``mask`` element.

    Its ``rle`` counts pixels of 0, of 1, of 0, ... along the rows of the window ``left``,
    ``top``, ``width``, ``height``. The score is an attribute named ``score``; CVAT keeps it where
    the label has an attribute of this name, and leaves it out elsewhere. Objects without a pixel
    are left out. Where masks overlap, the better score lies above.

    Args:
        path: the file to write.
        pictures: what was found.
        categories: the category table.
    """
    names = {category.id: category.name for category in categories}
    with (
        replacing(path) as aside,
        aside.open("w", encoding="utf-8", errors="backslashreplace") as file,
    ):
        file.write('<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n')
        file.write("  <version>1.1</version>\n  <meta>\n    <task>\n      <labels>\n")
        for name in names.values():
            file.write(
                f"        <label>\n          <name>{_text(name)}</name>\n          <attributes>\n"
                "            <attribute>\n              <name>score</name>\n"
                "              <mutable>False</mutable>\n"
                "              <input_type>text</input_type>\n"
                "              <default_value></default_value>\n"
                "              <values></values>\n            </attribute>\n"
                "          </attributes>\n        </label>\n"
            )
        file.write("      </labels>\n    </task>\n  </meta>\n")
        for number, picture in enumerate(pictures):
            height, width = picture.size
            name = _quote(picture.name)
            file.write(f'  <image id="{number}" name={name} width="{width}" height="{height}">\n')
            order = sorted(range(len(picture.records)), key=lambda i: picture.records[i]["score"])
            for z, i in enumerate(order):
                record, mask = picture.records[i], picture.masks[i]
                if not mask.area():
                    continue
                window, (x, y) = mask.pixels()
                rows, columns = window.shape
                file.write(
                    f'    <mask label={_quote(names[record["category_id"]])} source="auto" '
                    f'occluded="0" rle="{_count(window)}" left="{x}" top="{y}" '
                    f'width="{columns}" height="{rows}" z_order="{z}">\n'
                    f'      <attribute name="score">{record["score"]}</attribute>\n    </mask>\n'
                )
            file.write("  </image>\n")
        file.write("</annotations>\n")


def _count(window: np.ndarray[Any, Any]) -> str:
    """Lengths of the runs along the rows, those of 0 first."""
    flat = window.astype(bool).ravel()
    edges = np.flatnonzero(np.diff(flat, prepend=False)).tolist()
    bounds = [0, *edges, flat.size]
    return ", ".join(str(last - first) for first, last in pairwise(bounds))


def _text(value: str) -> str:
    """For XML, which has no way to write most control characters."""
    return escape("".join(c if c >= " " or c in "\t\n" else "_" for c in value))


def _quote(value: str) -> str:
    return quoteattr("".join(c if c >= " " else "_" for c in value))
