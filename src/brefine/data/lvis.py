"""LVIS v1: COCO's json with 1203 classes, of which each picture was labelled for a few only.

A picture says which classes were looked for and not found (``neg_category_ids``) and of which
not every object is drawn (``not_exhaustive_category_ids``). A detection of any other class that
has no label there is neither right nor wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from brefine.data.coco import FEW_NAMES, find_folder, read_json
from brefine.data.faults import Id, Report, quote, refuse, shorten
from brefine.structures import Category

#: rare: on 1 to 10 training pictures; common: on 11 to 100; frequent: on more
FREQUENCIES = ("r", "c", "f")
#: the two lists of a picture
_LISTS = ("neg_category_ids", "not_exhaustive_category_ids")


@dataclass(frozen=True)
class Federated:
    """What LVIS says beside masks, for its evaluation and for sampling.

    Attributes:
        frequency: ``r``, ``c`` or ``f`` of each label, in the order of the category table.
        negative: labels that are known to be absent, ascending, of each picture in order.
        not_exhaustive: labels of which some objects are not drawn, likewise.
    """

    frequency: tuple[str, ...]
    negative: tuple[tuple[int, ...], ...]
    not_exhaustive: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, content: dict[str, Any], categories: Sequence[Category]) -> Federated:
        """From what ``read`` returned without a fault.

        Args:
            content: the COCO dict.
            categories: the category table made of it.
        """
        labels = {category.id: label for label, category in enumerate(categories)}
        frequency = {entry["id"]: entry["frequency"] for entry in content["categories"]}

        def known(key: str) -> tuple[tuple[int, ...], ...]:
            return tuple(
                tuple(sorted({labels[number] for number in picture[key]}))
                for picture in content["images"]
            )

        ordered = tuple(frequency[category.id] for category in categories)
        return cls(ordered, *map(known, _LISTS))


def recognise(content: dict[str, Any]) -> bool:
    """Whether a json is LVIS: classes with a frequency, or pictures with absent classes."""
    return any("frequency" in entry for entry in _dicts(content, "categories")) or any(
        _LISTS[0] in entry for entry in _dicts(content, "images")
    )


def read(
    path: Path,
    images: Path | None = None,
    *,
    content: dict[str, Any] | None = None,
    report: Report = refuse,
) -> dict[str, Any]:
    """An LVIS json as a COCO dict; its annotations are not looked at, nor copied.

    The file of a picture is named by the last two parts of ``coco_url``
    (``val2017/000000397133.jpg``), else by ``file_name``, and lies in the folder of pictures with
    or without the folder in front. Where it is not there, the first of these places is taken.

    Args:
        path: the json.
        images: folder of the pictures; None: as ``coco.find_folder`` says.
        content: the json, if it was read already.
        report: what to do with a fault. Only what LVIS adds to COCO is checked here; ``CocoSet``
            checks the rest.

    Returns:
        The json's own dict (``content`` itself): ``file_name`` of each picture is its place, and
        ``info`` is empty. A faulty ``frequency`` or list stays as it is.

    Raises:
        InputError: with ``refuse``: the first fault; names file, entry and key.
    """
    if content is None:
        content = read_json(path, packed=True)
    some = islice(_dicts(content, "images"), FEW_NAMES)
    folder = find_folder(path, images, [name for entry in some for name in _names(entry)])
    for key in ("categories", "images"):
        entries = content.get(key)
        for place, entry in enumerate(entries if isinstance(entries, list) else ()):
            if isinstance(entry, tuple):  # `read_json` took it for one
                report("wrong-type", path, None, f"{key}[{place}] is an annotation")
    known = {entry["id"] for entry in _dicts(content, "categories") if _is_number(entry.get("id"))}
    for entry in _dicts(content, "categories"):
        where, frequency = f"category {shorten(entry.get('id'))}", entry.get("frequency")
        if "frequency" not in entry:
            report("missing-key", path, _id(entry), f"{where}: frequency is missing")
        elif frequency not in FREQUENCIES:
            message = f"{where}: frequency is {shorten(frequency)}, expected r, c or f"
            report("bad-frequency", path, _id(entry), message)
    for entry in _dicts(content, "images"):
        where = f"picture {shorten(entry.get('id'))}"
        for key in _LISTS:
            said = entry.get(key)
            if key not in entry:
                report("missing-key", path, _id(entry), f"{where}: {key} is missing")
            elif not isinstance(said, list):
                message = f"{where}: {key} is {shorten(said)}, expected a list of category ids"
                report("wrong-type", path, _id(entry), message)
            elif strange := [n for n in said if not (_is_number(n) and n in known)]:
                message = f"{where}: {key}: no category has the id {quote(strange[0])}"
                report("unknown-category", path, _id(entry), message)
        places = [folder / name for name in _names(entry)]
        if places:
            found = next((place for place in places if place.is_file()), places[0])
            entry["file_name"] = str(found)
        elif "file_name" not in entry:
            report("missing-key", path, _id(entry), f"{where}: coco_url is missing")
    content["info"] = {}
    return content


def _dicts(content: dict[str, Any], key: str) -> Iterable[dict[str, Any]]:
    """The objects of a list; none if it is no list, which ``CocoSet`` refuses."""
    entries = content.get(key)
    return (e for e in entries if isinstance(e, dict)) if isinstance(entries, list) else ()


def _names(entry: dict[str, Any]) -> Iterable[str]:
    """Where a picture may be in its folder, most likely first."""
    for key in ("coco_url", "file_name"):
        said = entry.get(key)
        if isinstance(said, str) and "\0" not in said and (parts := PurePosixPath(said).parts):
            yield "/".join(parts[-2:]) if key == "coco_url" else said
            yield parts[-1]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _id(entry: dict[str, Any]) -> Id:
    number = entry.get("id")
    return number if isinstance(number, int | str) else None
