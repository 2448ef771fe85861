"""Every fault of a labelled set in one pass, before training meets the first of them.

Nothing stops the search and nothing is written. What training would refuse or skip is an error,
and decided by the very functions that training uses; what it would take but is likely a mistake
is a warning; a note is neither.

A COCO json is taken apart here; the readers of all other formats report what is wrong with files,
lines and shapes, and return a COCO dict, which then goes the same way.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from brefine.data.coco import Kept, find_folder, first_names
from brefine.data.faults import KINDS, Fault, Id, Place, Report, collect, quote, reason_of, shorten
from brefine.data.geometry import Tell, check_geometry
from brefine.data.looks import Listed, Look, compare, look_at
from brefine.data.pictures import MAX_PIXELS
from brefine.data.read import YAML, read_as, recognise
from brefine.progress import track
from brefine.structures import InputError

#: a class with fewer usable objects is named
FEW_OBJECTS = 10


def check(
    path: Path | str,
    images: Path | str | None = None,
    *,
    split: str = "train",
    against: Path | str | None = None,
    against_images: Path | str | None = None,
    progress: bool = True,
) -> list[Fault]:
    """Find every fault of a labelled set of any format; never raises for what is wrong with it.

    Every picture is decoded once. Thumbnails of all pictures stay in memory (2 KB each).

    Args:
        path: the set, as in ``read.read``.
        images: folder of its pictures; None: where the format has them.
        split: what to look at of a format that holds several, as in ``read.read``.
        against: a second set, or the same, of which ``val`` is then taken: its classes and its
            pictures are checked, too, and compared with the first's. Its annotations are not;
            check it by itself.
        against_images: folder of the second set's pictures; None: as ``images``.
        progress: whether to show progress on stderr.

    Returns:
        The faults in the order of ``KINDS``, and of the set within a kind.
    """
    faults: list[Fault] = []
    report = collect(faults)
    first = _read_set(Path(path), images, split, report)
    looks = [_look_at(first, report, progress)]
    _check_annotations(first, report, progress)
    if against is not None:
        found: list[Fault] = []
        second = _read_set(Path(against), against_images or images, "val", collect(found))
        known = set(faults)
        faults += [fault for fault in found if fault not in known]  # of files that both share
        _compare_classes(first, second, report)
        looks.append(_look_at(second, report, progress))
    compare(looks, report, progress=progress)
    order = {kind: place for place, kind in enumerate(KINDS)}
    return sorted(faults, key=lambda fault: order[fault.kind])


# ------------------------------------------------------------------------------------ the set


@dataclass
class _Set:
    """What can be made out of a set.

    Attributes:
        path: where it is.
        name: what to call it.
        categories: names by id; None: there is no table.
        pictures: None: there is no list.
        annotations: likewise, as they are.
        places: of the annotations, in their order; None: they are named by their ids.
        sizes: of pictures by id: the labels', or where they say none the picture's own.
    """

    path: Path
    name: str
    categories: dict[int, str | None] | None = None
    pictures: list[Listed] | None = None
    annotations: list[Any] | None = None
    places: list[Place] | None = None
    sizes: dict[int | str, tuple[int, int] | None] = field(default_factory=dict)


def _read_set(path: Path, images: Path | str | None, split: str, report: Report) -> _Set:
    found = _Set(path, str(path))
    try:
        kind, content = recognise(path)
    except InputError as error:
        folder = path.is_dir() or path.suffix.lower() in YAML
        fault = "unknown-format" if folder else "bad-json"
        report(fault, path, None, reason_of(error, path))
        return found
    folder_found = images is None or Path(images).is_dir()
    if not folder_found:
        report("missing-folder", Path(images or ""), None, "no such folder of pictures")
    if kind == "COCO":
        top = find_folder(path, images if folder_found else None, first_names(content))
    elif not folder_found:
        return found
    else:
        top = Path()
        try:
            given = None if images is None else Path(images)
            content = read_as(kind, path, given, split=split, content=content, report=report)
        except InputError as error:
            report("bad-set", path, None, reason_of(error, path))
            return found
        if kind in ("Cityscapes", "Pascal VOC") or path.suffix.lower() in YAML:
            found.name += f" ({split})"
        if kind != "LVIS":
            found.places = content["info"].get("places")
            for doubt in content["info"].get("doubts", ()):
                report(*doubt)
    found.categories = _read_categories(content, path, report)
    found.pictures = _read_pictures(found, content, top, report)
    found.annotations = _read_list(content, "annotations", path, report)
    if not folder_found:
        found.pictures = None if found.pictures is None else []
    return found


def _read_list(content: dict[str, Any], key: str, path: Path, report: Report) -> list[Any] | None:
    entries = content.get(key)
    if isinstance(entries, list):
        return entries
    if entries is None:
        report("missing-key", path, None, f"{key} is missing")
    else:
        report("wrong-type", path, None, f"{key} is {shorten(entries)}, no list")
    return None


def _name_entries(
    entries: Iterable[Any], key: str, noun: str, path: Path, report: Report
) -> Iterator[tuple[int, dict[str, Any], str]]:
    """The objects of a list of the json, each with its place in it and what to call it."""
    for number, entry in enumerate(entries):
        if isinstance(entry, Kept):
            entry = entry.among[entry.place]
        if isinstance(entry, dict):
            yield number, entry, f"{noun} {shorten(entry.get('id', f'number {number}'))}"
        else:
            message = f"{key}[{number}] is {shorten(entry)}, expected an object {{...}}"
            report("wrong-type", path, None, message)


def _read_categories(
    content: dict[str, Any], path: Path, report: Report
) -> dict[int, str | None] | None:
    entries = _read_list(content, "categories", path, report)
    if entries is None:
        return None
    table: dict[int, str | None] = {}
    owners: dict[str, int] = {}
    for _, entry, where in _name_entries(entries, "categories", "category", path, report):
        reader = _Reader(entry, where, path, report)
        number, name = reader.whole("id"), reader.text("name")
        if number is None:
            continue
        if number in table:
            message = f"{where}: the id is used twice, {shorten(table[number])} and {shorten(name)}"
            report("duplicate-category-id", path, number, message)
            continue
        table[number] = name
        if name is not None and owners.setdefault(name.strip().casefold(), number) != number:
            other = owners[name.strip().casefold()]
            message = f"{where}: named {shorten(name)}, as is category {other}"
            report("duplicate-name", path, number, message)
    return table


def _read_pictures(
    found: _Set, content: dict[str, Any], folder: Path, report: Report
) -> list[Listed] | None:
    entries = _read_list(content, "images", found.path, report)
    if entries is None:
        return None
    pictures = []
    for _, entry, where in _name_entries(entries, "images", "picture", found.path, report):
        reader = _Reader(entry, where, found.path, report)
        key, name = reader.id("id"), reader.text("file_name")
        height, width = reader.whole("height"), reader.whole("width")
        size = None
        if height is not None and width is not None:
            if min(height, width) < 1 or height * width > MAX_PIXELS:
                limit = f"expected 1 to {MAX_PIXELS // 10**6} million"
                message = f"{where}: {height} x {width} pixels (height x width), {limit}"
                report("bad-size", found.path, key, message)
            else:
                size = height, width
        if key is not None and key in found.sizes:
            message = f"{where}: the id is used twice, now for {shorten(name)}"
            report("duplicate-picture-id", found.path, key, message)
        elif key is not None:
            found.sizes[key] = size
        file = None if name is None else folder / name
        pictures.append(Listed(key, where, file, size, entry.get("measured") is True))
    return pictures


def _look_at(found: _Set, report: Report, progress: bool) -> list[Look]:
    """Look at the pictures; the sizes that the labels do not say become the pictures' own."""
    looks = look_at(found.pictures or [], found.name, report, progress=progress)
    for look in looks:
        if look.picture.id is not None and found.sizes.get(look.picture.id) is None:
            found.sizes[look.picture.id] = look.size
    return looks


@dataclass(frozen=True)
class _Reader:
    """Values of one entry by the rules of ``CocoSet``; None and a fault where it would refuse."""

    entry: dict[str, Any]
    where: str
    path: Path
    report: Report

    def whole(self, key: str) -> int | None:
        value = _as_whole(self.entry.get(key))
        if value is None:
            self._refuse(key, "a whole number")
        return value

    def id(self, key: str) -> int | str | None:
        value = _as_id(self.entry.get(key))
        if value is None:
            self._refuse(key, "a whole number or a text")
        return value

    def text(self, key: str) -> str | None:
        value = self.entry.get(key)
        if isinstance(value, str) and value and "\0" not in value:
            return value
        self._refuse(key, "a text")
        return None

    def _refuse(self, key: str, expected: str) -> None:
        own = _as_id(self.entry.get("id"))
        if key in self.entry:
            message = f"{self.where}: {key} is {quote(self.entry[key])}, expected {expected}"
            self.report("wrong-type", self.path, own, message)
        else:
            self.report("missing-key", self.path, own, f"{self.where}: {key} is missing")


def _as_whole(value: Any) -> int | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and abs(value) < 2**53 else None


def _as_id(value: Any) -> int | str | None:
    return value if isinstance(value, str) else _as_whole(value)


# -------------------------------------------------------------------------------- annotations


def _check_annotations(found: _Set, report: Report, progress: bool) -> None:
    """What is wrong with each annotation, and with their number."""
    if found.annotations is None:
        return
    ids: set[int | str] = set()
    masks: dict[bytes, str] = {}
    used: set[int] = set()
    counts: Counter[int] = Counter()
    peopled: set[int | str] = set()
    entries: Iterable[Any] = found.annotations
    if progress and found.annotations:
        entries = track(entries, "check annotations", len(found.annotations))
    named = _name_entries(entries, "annotations", "annotation", found.path, report)
    for number, entry, where in named:
        file, own = found.path, _as_id(entry.get("id"))
        if found.places is not None:
            file, own, where = found.places[number]
        tell = _teller(report, file, own, where)
        if found.places is None:
            _check_id(entry, own, ids, tell)
        reader = _Reader(entry, where, file, report)
        picture, category = reader.id("image_id"), reader.whole("category_id")
        known = True
        if picture is not None and found.pictures is not None and picture not in found.sizes:
            tell("unknown-picture", f"unknown image_id {shorten(repr(picture))}")
            known = False
        if category is not None and found.categories is not None:
            used.add(category)
            if category not in found.categories:
                tell("unknown-category", f"unknown category_id {category}")
                known = False
        size = None if picture is None else found.sizes.get(picture)
        drawn = check_geometry(entry, size, tell)
        if not drawn or not known or picture is None or category is None:
            continue
        if entry.get("iscrowd"):
            continue
        counts[category] += 1
        peopled.add(picture)
        key = json.dumps([picture, category, entry.get("segmentation")], sort_keys=True)
        digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
        if digest in masks:
            tell("duplicate-object", f"the same class and mask as {masks[digest]}")
        masks.setdefault(digest, where)
    _check_shift(used, found, report)
    _check_counts(counts, len(peopled & found.sizes.keys()), found, report)


def _teller(report: Report, file: Path, id: Id, where: str) -> Tell:
    return lambda kind, message: report(kind, file, id, f"{where}: {message}")


def _check_id(entry: dict[str, Any], own: Id, ids: set[int | str], tell: Tell) -> None:
    if own is None:
        tell("bad-id", f"id is {shorten(entry['id'])}" if "id" in entry else "id is missing")
    elif own in ids:
        tell("duplicate-annotation-id", "id used twice")
    else:
        ids.add(own)


def _check_shift(used: set[int], found: _Set, report: Report) -> None:
    """Whether unknown classes would all be known if ids were counted from another number."""
    known = (found.categories or {}).keys()
    for shift in (1, -1):
        if used - known and {number - shift for number in used} <= known:
            message = f"annotations have classes {min(used)} to {max(used)}, the table"
            message += f" {min(known)} to {max(known)}: ids shifted by one"
            report("shifted-ids", found.path, None, message)


def _check_counts(counts: Counter[int], peopled: int, found: _Set, report: Report) -> None:
    """Classes and pictures with few objects or none."""
    if not counts:
        message = f"none of {len(found.annotations or [])} annotations is an object to train on"
        report("no-objects", found.path, None, message)
        return
    for number, name in (found.categories or {}).items():
        label = f"category {number} ({shorten(name)})"
        if not counts[number]:
            report("empty-class", found.path, number, f"{label}: no object")
        elif counts[number] < FEW_OBJECTS:
            message = f"{label}: only {counts[number]} object{'s' * (counts[number] > 1)}"
            report("rare-class", found.path, number, message)
    if empty := len(found.sizes) - peopled:
        message = f"{empty} of {len(found.sizes)} pictures have no object"
        report("pictures-without-objects", found.path, None, message)


# --------------------------------------------------------------------- one split and the other


def _compare_classes(first: _Set, second: _Set, report: Report) -> None:
    if first.categories is None or second.categories is None:
        return
    here, there = first.categories, second.categories
    origin = first.name if first.path.name == second.path.name else first.path.name
    names = {name: number for number, name in here.items() if name is not None}
    others = {name: number for number, name in there.items() if name is not None}
    common = names.keys() & others.keys()
    if common and {others[name] - names[name] for name in common} in ({1}, {-1}):
        name = min(common, key=lambda name: names[name])
        message = f"{shorten(name)} is category {others[name]}, but {names[name]} in {origin}"
        message += f": ids shifted by one, of {len(common)} classes"
        report("class-mismatch", second.path, None, message)
        here, there = (
            {number: name for number, name in table.items() if name not in common}
            for table in (here, there)
        )
    for number in sorted(here.keys() | there.keys()):
        mine, other = here.get(number), there.get(number)
        if number in here and number in there:
            if mine is None or other is None or mine == other:
                continue
            message = f"{shorten(other)}, but {shorten(mine)} in {origin}"
        elif number in here:
            message = f"{shorten(mine)} is in {origin} only"
        else:
            elsewhere = f", where {shorten(other)} is {names[other]}" if other in names else ""
            message = f"{shorten(other)} is not in {origin}{elsewhere}"
        report("class-mismatch", second.path, number, f"category {number}: {message}")
