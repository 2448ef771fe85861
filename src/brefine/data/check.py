"""Every fault of a COCO set in one pass, before training meets the first of them.

Nothing stops the search and nothing is written. What training would refuse or skip is an error,
and decided by the very functions that training uses; what it would take but is likely a mistake
is a warning; a note is neither.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from brefine.data.coco import (
    _check_polygons,
    _choose_box,
    _find_fault,
    _number,
    _short,
    decode,
    find_folder,
    read_json,
)
from brefine.data.loader import to_tensor
from brefine.data.pictures import MAX_PIXELS, open_picture
from brefine.progress import track
from brefine.structures import InputError

T = TypeVar("T")
Severity = Literal["error", "warning", "note"]
Id = int | str | None

#: a class with fewer usable objects is named
FEW_OBJECTS = 10
#: pixels that a box or a polygon may leave the picture by: drawing tools round
FRAME_SLACK = 2.0
#: side of the grey thumbnails that pictures are compared by, and the correlation of two of them
#: from which pictures are called alike: two frames of one scene reach 0.98, photographs of
#: different scenes 0.87
THUMBNAIL = 24
ALIKE = 0.95
#: grey levels; thumbnails that vary less show nothing to compare
FLAT = 2.0
#: EXIF orientations that leave height and width as they are (half a turn, mirrored)
SAME_SIZE = (2, 3, 4)

#: what there is to find, most serious first: severity and what to do
KINDS: dict[str, tuple[Severity, str]] = {
    # the json: training refuses the file
    "bad-json": ("error", "write the file again; it must be COCO instance annotations in UTF-8"),
    "missing-key": ("error", "add the key"),
    "wrong-type": ("error", "correct the value"),
    "bad-size": (
        "error",
        f"correct height and width; cut pictures above {MAX_PIXELS // 10**6} Mpixel into tiles",
    ),
    "duplicate-category-id": ("error", "give every class an id of its own"),
    "duplicate-picture-id": ("error", "give every picture an id of its own"),
    "class-mismatch": ("error", "use one table of ids and names in training and validation"),
    # pictures: training stops there
    "missing-folder": ("error", "give the folder of the pictures as --images"),
    "missing-picture": ("error", "correct file_name, or give the folder as --images"),
    "unreadable-picture": ("error", "save the picture again, or take it out of the set"),
    "wrong-size": ("error", "correct the json, or find the picture that was labelled"),
    "swapped-size": ("error", "exchange height and width in the json"),
    "turned-picture": (
        "error",
        "turn the labels with the picture, or remove the EXIF orientation if they fit without it",
    ),
    "leaked-picture": ("error", "take it out of one of the two sets: scores would be too good"),
    # annotations: training skips them
    "unknown-picture": ("error", "correct image_id, or add the picture to images"),
    "unknown-category": ("error", "correct category_id, or add the class to categories"),
    "no-mask": ("error", "draw an outline: a box alone is not enough here"),
    "bad-crowd": ("error", "set iscrowd to 0 or 1"),
    "bad-polygon": ("error", "write polygons as lists of numbers x, y, x, y ... in pixels"),
    "few-points": ("error", "draw at least 3 points"),
    "bad-rle": ("error", "encode the mask again, at the picture's height and width"),
    "empty-mask": ("error", "remove the annotation, or draw its outline"),
    "outside-mask": ("error", "check the units (pixels?) and which picture it belongs to"),
    "no-objects": ("error", "there is nothing to learn from: correct the faults above"),
    # training takes these
    "sliver": ("warning", "remove it, or draw it wider: it takes part in nothing"),
    "corner-box": ("warning", "write bbox as x, y, width, height; training uses the mask's box"),
    "box-mismatch": ("warning", "see which is right; training uses the mask's box"),
    "empty-box": ("warning", "correct bbox; training uses the mask's box"),
    "bad-box": ("warning", "write bbox as 4 finite numbers; training uses the mask's box"),
    "outside-box": ("warning", "clip bbox to the picture; training does"),
    "clipped-mask": ("warning", "clip the polygon to the picture; training does"),
    "self-crossing": ("warning", "draw the outline again: where it overlaps itself it is a hole"),
    "empty-part": ("warning", "remove the part: it covers nothing"),
    "crowd-polygons": ("warning", "see that it is a crowd region and no object: those are RLE"),
    "bad-area": ("warning", "correct area: it decides whether an object counts as small or large"),
    "duplicate-annotation-id": ("warning", "make ids unique: other tools lose one of the two"),
    "bad-id": ("warning", "give every annotation an id, a whole number"),
    "duplicate-object": ("warning", "remove one: the same object counts twice"),
    "duplicate-name": ("warning", "merge the classes, or rename one"),
    "orientation": ("warning", "look whether the labels fit the picture as a viewer shows it"),
    "duplicate-picture": ("warning", "keep one; merge their labels if these differ"),
    "near-leak": ("warning", "look at both; take one out if they show the same"),
    "near-duplicate": ("warning", "look at both; keep one if they show the same"),
    "empty-class": ("warning", "label some, or take the class out of categories"),
    "rare-class": ("warning", "label more: so few teach and measure next to nothing"),
    "pictures-without-objects": ("note", "fine if nothing is there; they are used as background"),
}


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        severity: ``error``: training refuses or skips it; ``warning``: likely a mistake;
            ``note``: worth knowing.
        kind: a key of ``KINDS``.
        file: the json or the picture it is in.
        id: the json's id of the annotation, picture or category; None where there is none.
        message: what is wrong, one line that starts with what it is about.
        advice: what to do.
    """

    severity: Severity
    kind: str
    file: str
    id: Id
    message: str
    advice: str


def check(
    annotations: Path | str,
    images: Path | str | None = None,
    *,
    against: Path | str | None = None,
    against_images: Path | str | None = None,
    progress: bool = True,
) -> list[Fault]:
    """Find every fault of a COCO set; never raises for what is wrong with it.

    Every picture is decoded once. Thumbnails of all pictures stay in memory (2 KB each).

    Args:
        annotations: the json.
        images: folder of its pictures; None: as ``CocoSet`` finds it.
        against: json of a second split: its classes and its pictures are checked, too, and
            compared with the first's. Its annotations are not; check it by itself.
        against_images: folder of the second split's pictures; None: as ``images``.
        progress: whether to show progress on stderr.

    Returns:
        The faults in the order of ``KINDS``, and of the file within a kind.
    """
    faults: list[Fault] = []
    first = _read_set(Path(annotations), images, faults)
    looks = [_check_pictures(first, faults, progress)]
    _check_annotations(first, faults, progress)
    if against is not None:
        second = _read_set(Path(against), against_images or images, faults)
        _compare_classes(first, second, faults)
        looks.append(_check_pictures(second, faults, progress))
    _compare_pictures(looks, faults)
    order = {kind: place for place, kind in enumerate(KINDS)}
    return sorted(faults, key=lambda fault: order[fault.kind])


def exit_code(faults: Sequence[Fault], *, strict: bool = False) -> int:
    """2 with errors, 1 with warnings if ``strict``, else 0."""
    severities = {fault.severity for fault in faults}
    return 2 if "error" in severities else int(strict and "warning" in severities)


def summarise(faults: Sequence[Fault]) -> str:
    """``2 errors, 1 warning``, or ``no faults``."""
    counts = Counter(fault.severity for fault in faults)
    names: tuple[Severity, ...] = ("error", "warning", "note")
    parts = [f"{n} {name}{'s' * (n != 1)}" for name in names if (n := counts[name])]
    return ", ".join(parts) or "no faults"


def print_faults(faults: Sequence[Fault], console: Console, *, examples: int | None = 3) -> None:
    """A table with one row a kind, and a summary line.

    Args:
        faults: of ``check``.
        console: where to print.
        examples: how many of each kind to show; None: all.
    """
    table = Table("", "fault", "what and where, and what to do", show_lines=True)
    table.columns[0].justify = "right"
    colours = {"error": "red", "warning": "yellow", "note": "cyan"}
    for kind, (severity, _) in KINDS.items():
        found = [fault for fault in faults if fault.kind == kind]
        if not found:
            continue
        lines = Text()
        for fault in found[:examples]:
            lines.append(f"{Path(fault.file).name}: {fault.message}\n")
        if examples is not None and len(found) > examples:
            lines.append(f"and {len(found) - examples} more\n", "dim")
        lines.append(f"-> {found[0].advice}", "italic")
        name = Text(f"{kind}\n").append(severity, colours[severity])
        table.add_row(str(len(found)), name, lines)
    if table.rows:
        console.print(table)
    console.print(summarise(faults), highlight=False)


# ----------------------------------------------------------------------------------- the json


@dataclass(frozen=True)
class _Picture:
    """One entry of images; None: what the json does not say in a usable way."""

    id: int | str | None
    where: str
    file: Path | None
    size: tuple[int, int] | None


@dataclass
class _Set:
    """What can be made out of a json. ``categories``, ``pictures``, ``entries``: None if absent.

    ``sizes`` of pictures by id: the json's, or where it says none the picture's own.
    """

    path: Path
    categories: dict[int, str | None] | None = None
    pictures: list[_Picture] | None = None
    entries: list[tuple[dict[str, Any], str]] | None = None
    sizes: dict[int | str, tuple[int, int] | None] = field(default_factory=dict)
    folder_found: bool = True


def _add(faults: list[Fault], kind: str, file: Path, id: Id, message: str) -> None:
    severity, advice = KINDS[kind]
    # Half a surrogate pair is legal in json, but cannot be printed.
    texts = [text.encode("utf-8", "replace").decode() for text in (str(file), message)]
    if isinstance(id, str):
        id = id.encode("utf-8", "replace").decode()
    faults.append(Fault(severity, kind, texts[0], id, " ".join(texts[1].split()), advice))


def _read_set(path: Path, images: Path | str | None, faults: list[Fault]) -> _Set:
    found = _Set(path)
    try:
        content = read_json(path)
    except InputError as error:
        _add(faults, "bad-json", path, None, str(error).removeprefix(str(path)).lstrip(":, "))
        return found
    try:
        folder = find_folder(path, images)
    except InputError:
        folder, found.folder_found = Path(images or ""), False
        _add(faults, "missing-folder", folder, None, "no such folder of pictures")
    found.categories = _read_categories(found, content, faults)
    found.pictures = _read_pictures(found, content, folder, faults)
    found.entries = _read_entries(found, content, "annotations", "annotation", faults)
    return found


def _read_entries(
    found: _Set, content: dict[str, Any], key: str, noun: str, faults: list[Fault]
) -> list[tuple[dict[str, Any], str]] | None:
    """The objects of one list of the json, each with what to call it."""
    entries = content.get(key)
    if entries is None:
        _add(faults, "missing-key", found.path, None, f"{key} is missing")
        return None
    if not isinstance(entries, list):
        _add(faults, "wrong-type", found.path, None, f"{key} is {_short(entries)}, no list")
        return None
    named = []
    for number, entry in enumerate(entries):
        if isinstance(entry, dict):
            named.append((entry, f"{noun} {_short(entry.get('id', f'number {number}'))}"))
        else:
            message = f"{key}[{number}] is {_short(entry)}, expected an object {{...}}"
            _add(faults, "wrong-type", found.path, None, message)
    return named


def _read_categories(
    found: _Set, content: dict[str, Any], faults: list[Fault]
) -> dict[int, str | None] | None:
    entries = _read_entries(found, content, "categories", "category", faults)
    if entries is None:
        return None
    table: dict[int, str | None] = {}
    owners: dict[str, int] = {}
    for entry, where in entries:
        reader = _Reader(entry, where, found.path, faults)
        number, name = reader.whole("id"), reader.text("name")
        if number is None:
            continue
        if number in table:
            message = f"{where}: the id is used twice, {_short(table[number])} and {_short(name)}"
            _add(faults, "duplicate-category-id", found.path, number, message)
            continue
        table[number] = name
        if name is not None and owners.setdefault(name.strip().casefold(), number) != number:
            other = owners[name.strip().casefold()]
            message = f"{where}: named {_short(name)}, as is category {other}"
            _add(faults, "duplicate-name", found.path, number, message)
    return table


def _read_pictures(
    found: _Set, content: dict[str, Any], folder: Path, faults: list[Fault]
) -> list[_Picture] | None:
    entries = _read_entries(found, content, "images", "picture", faults)
    if entries is None:
        return None
    pictures = []
    for entry, where in entries:
        reader = _Reader(entry, where, found.path, faults)
        key, name = reader.id("id"), reader.text("file_name")
        height, width = reader.whole("height"), reader.whole("width")
        size = None
        if height is not None and width is not None:
            if min(height, width) < 1 or height * width > MAX_PIXELS:
                message = f"{where}: {height} x {width} pixels (height x width)"
                _add(faults, "bad-size", found.path, key, message)
            else:
                size = height, width
        if key is not None and key in found.sizes:
            message = f"{where}: the id is used twice, now for {_short(name)}"
            _add(faults, "duplicate-picture-id", found.path, key, message)
        elif key is not None:
            found.sizes[key] = size
        pictures.append(_Picture(key, where, None if name is None else folder / name, size))
    return pictures


@dataclass(frozen=True)
class _Reader:
    """Values of one entry by the rules of ``CocoSet``; None and a fault where it would refuse."""

    entry: dict[str, Any]
    where: str
    path: Path
    faults: list[Fault]

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
            message = f"{self.where}: {key} is {_short(self.entry[key])}, expected {expected}"
            _add(self.faults, "wrong-type", self.path, own, message)
        else:
            _add(self.faults, "missing-key", self.path, own, f"{self.where}: {key} is missing")


def _as_whole(value: Any) -> int | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and abs(value) < 2**53 else None


def _as_id(value: Any) -> int | str | None:
    return value if isinstance(value, str) else _as_whole(value)


# -------------------------------------------------------------------------------- annotations


def _check_annotations(found: _Set, faults: list[Fault], progress: bool) -> None:
    """What is wrong with each annotation, and with their number."""
    if found.entries is None:
        return
    ids: set[int | str] = set()
    masks: dict[bytes, str] = {}
    counts: Counter[int] = Counter()
    peopled: set[int | str] = set()
    for entry, where in _steps(found.entries, "check annotations", progress):
        reader = _Reader(entry, where, found.path, faults)
        own = _as_id(entry.get("id"))
        if own is None:
            said = f"is {_short(entry['id'])}" if "id" in entry else "is missing"
            _add(faults, "bad-id", found.path, None, f"{where}: id {said}")
        elif own in ids:
            _add(faults, "duplicate-annotation-id", found.path, own, f"{where}: id used twice")
        else:
            ids.add(own)
        picture, category = reader.id("image_id"), reader.whole("category_id")
        known = True
        if picture is not None and found.pictures is not None and picture not in found.sizes:
            message = f"{where}: unknown image_id {_short(picture)}"
            _add(faults, "unknown-picture", found.path, own, message)
            known = False
        classes = found.categories
        if category is not None and classes is not None and category not in classes:
            message = f"{where}: unknown category_id {category}"
            _add(faults, "unknown-category", found.path, own, message)
            known = False
        size = None if picture is None else found.sizes.get(picture)
        drawn = _check_geometry(entry, where, size, found.path, faults)
        if not drawn or not known or picture is None or category is None:
            continue
        if entry.get("iscrowd"):
            continue
        counts[category] += 1
        peopled.add(picture)
        key = json.dumps([picture, category, entry["segmentation"]], sort_keys=True)
        digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
        if digest in masks:
            message = f"{where}: the same class and mask as {masks[digest]}"
            _add(faults, "duplicate-object", found.path, own, message)
        masks.setdefault(digest, where)
    if not counts:
        message = f"none of {len(found.entries)} annotations is an object to train on"
        _add(faults, "no-objects", found.path, None, message)
        return
    for number, name in (found.categories or {}).items():
        label = f"category {number} ({_short(name)})"
        if not counts[number]:
            _add(faults, "empty-class", found.path, number, f"{label}: no object")
        elif counts[number] < FEW_OBJECTS:
            message = f"{label}: only {counts[number]} object{'s' * (counts[number] > 1)}"
            _add(faults, "rare-class", found.path, number, message)
    empty = len(found.sizes) - len(peopled & found.sizes.keys())
    if empty:
        message = f"{empty} of {len(found.sizes)} pictures have no object"
        _add(faults, "pictures-without-objects", found.path, None, message)


#: words in what ``coco.py`` says of an unusable annotation, and what that is called here; what
#: else it says is of damaged RLE or polygons
_REASONS = (
    ("no segmentation", "no-mask"),
    ("empty segmentation", "no-mask"),
    ("iscrowd", "bad-crowd"),
    ("3 points", "few-points"),
    ("far outside", "outside-mask"),
    ("no pixel", "empty-mask"),
)


def _check_geometry(
    entry: dict[str, Any],
    where: str,
    size: tuple[int, int] | None,
    path: Path,
    faults: list[Fault],
) -> bool:
    """Mask, box and area of one annotation; True if a mask remains (or none can be drawn here)."""
    own = _as_id(entry.get("id"))
    reason = None if size is None else _find_fault(entry, size)
    if size is None or reason is not None:
        if reason is not None:
            other = "bad-rle" if isinstance(entry.get("segmentation"), dict) else "bad-polygon"
            kind = next((kind for words, kind in _REASONS if words in reason), other)
            if kind == "empty-mask" and size and _is_outside(entry["segmentation"], size):
                kind, reason = "outside-mask", "the mask lies outside of the picture"
            _add(faults, kind, path, own, f"{where}: {reason}")
        _check_box(entry, where, None, size, path, faults)
        _check_area(entry, where, None, path, faults)
        return reason is None
    segmentation = entry["segmentation"]
    runs = decode(segmentation, size)
    pixels = runs.area()
    if not pixels:
        _add(faults, "sliver", path, own, f"{where}: too thin to hold a pixel of the picture")
    elif isinstance(segmentation, list):
        _check_outline(segmentation, where, own, size, path, faults)
    if isinstance(segmentation, list) and entry.get("iscrowd"):
        _add(faults, "crowd-polygons", path, own, f"{where}: a crowd region drawn as polygons")
    _check_box(entry, where, runs.box() if pixels else None, size, path, faults)
    _check_area(entry, where, pixels or None, path, faults)
    return pixels > 0


def _is_outside(segmentation: Any, size: tuple[int, int]) -> bool:
    """Whether these are polygons of which none touches the picture."""
    height, width = size
    if not isinstance(segmentation, list):
        return False
    for points in _check_polygons(segmentation, size):
        x, y = points[0::2], points[1::2]
        if x.max() >= 0 and y.max() >= 0 and x.min() <= width and y.min() <= height:
            return False
    return True


def _check_outline(
    polygons: list[Any],
    where: str,
    own: Id,
    size: tuple[int, int],
    path: Path,
    faults: list[Fault],
) -> None:
    """Parts without area, sides that cross, points outside: each said once an annotation."""
    height, width = size
    empty, outside = [], 0.0
    crossing: tuple[int, tuple[int, int]] | None = None
    for part, polygon in enumerate(polygons):
        points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
        if len(points) < 3:
            empty.append(part)
            continue
        x, y = points.T
        outside = max(outside, -x.min(), -y.min(), x.max() - width, y.max() - height)
        sides = _find_crossing(points)
        if sides is not None:
            crossing = crossing or (part, sides)
        elif abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) < 1e-6 * max(size):
            empty.append(part)
    if empty:
        count = f"{len(empty)} of {len(polygons)} polygons cover nothing"
        _add(faults, "empty-part", path, own, f"{where}: {count}, first: segmentation[{empty[0]}]")
    if crossing:
        part, (a, b) = crossing
        message = f"{where}: segmentation[{part}]: side {a} crosses side {b}"
        _add(faults, "self-crossing", path, own, message)
    if outside > FRAME_SLACK:
        message = f"{where}: polygons leave the picture by {outside:.1f} pixels"
        _add(faults, "clipped-mask", path, own, message)


def _find_crossing(points: NDArray[np.float64]) -> tuple[int, int] | None:
    """Two sides of a closed polygon ``[n, 2]`` that properly cross, or None; touching is not."""
    n = len(points)
    if n < 4:
        return None
    points = points - points.mean(axis=0)
    steps = np.roll(points, -1, axis=0) - points
    noise = 1e-9 * max(1.0, float(np.abs(points).max()) ** 2)  # of rounding: that is touching
    rows = max(1, 1_000_000 // n)
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        # [rows, n]: on which side of line i point j lies, then point i and i + 1 of line j
        away = points[None] - points[part, None]
        of_points = _cross(steps[part, None], away)
        of_next = of_points + _cross(steps[part, None], steps[None])
        of_start = -_cross(steps[None], away)
        of_end = of_start + _cross(steps[None], steps[part, None])
        found = np.argwhere(
            (np.minimum(of_points, of_next) < -noise)
            & (np.maximum(of_points, of_next) > noise)
            & (np.minimum(of_start, of_end) < -noise)
            & (np.maximum(of_start, of_end) > noise)
        )
        gaps = np.abs(found[:, 0] + start - found[:, 1])
        found = found[(gaps > 1) & (gaps < n - 1)]  # neighbours share a point
        if len(found):
            i, j = sorted((int(found[0][0]) + start, int(found[0][1])))
            return i, j
    return None


def _cross(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    product: NDArray[np.float64] = a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]
    return product


def _check_box(
    entry: dict[str, Any],
    where: str,
    tight: tuple[int, int, int, int] | None,
    size: tuple[int, int] | None,
    path: Path,
    faults: list[Fault],
) -> None:
    """One fault at most, the likeliest: a box in the wrong convention is wrong in other ways."""
    own = _as_id(entry.get("id"))
    given = entry.get("bbox")
    if given is None:
        return
    values = [_number(value) for value in given] if isinstance(given, list) else []
    numbers = [value for value in values if value is not None]
    if len(values) != 4 or len(numbers) != 4:
        message = f"{where}: bbox is {_short(given)}, expected 4 finite numbers"
        _add(faults, "bad-box", path, own, message)
        return
    x, y, w, h = numbers
    box = x, y, x + w, y + h
    agrees = w > 0 and h > 0 and (tight is None or _choose_box(entry, tight) == box)
    corners = x, y, x + (w - x), y + (h - y)
    said = f"bbox {_short(given)}"
    if not agrees and tight is not None and w > x and h > y:
        turned = {"bbox": [x, y, w - x, h - y]}
        if _choose_box(turned, tight) == corners:
            message = f"{where}: {said} fits the mask if read as corners x1, y1, x2, y2"
            _add(faults, "corner-box", path, own, message)
            return
    if w <= 0 or h <= 0:
        _add(faults, "empty-box", path, own, f"{where}: {said} has no area")
    elif not agrees and tight is not None:
        x1, y1, x2, y2 = tight
        mask = f"[{x1}, {y1}, {x2 - x1}, {y2 - y1}]"
        _add(faults, "box-mismatch", path, own, f"{where}: {said}, but the mask's is {mask}")
    elif size is not None:
        outside = max(-x, -y, box[2] - size[1], box[3] - size[0])
        if outside > FRAME_SLACK:
            message = f"{where}: {said} leaves the picture by {outside:.1f} pixels"
            _add(faults, "outside-box", path, own, message)


def _check_area(
    entry: dict[str, Any], where: str, pixels: int | None, path: Path, faults: list[Fault]
) -> None:
    """``area`` against the mask's: by more than a factor of 2, and 16 pixels, is no rounding."""
    given = entry.get("area")
    if given is None:
        return
    area = _number(given)
    own = _as_id(entry.get("id"))
    said = f"{where}: area is {_short(given)}"
    if area is None or area <= 0:
        _add(faults, "bad-area", path, own, f"{said}, expected a number above 0")
    elif pixels is not None and abs(area - pixels) > max(16.0, min(area, pixels)):
        _add(faults, "bad-area", path, own, f"{said}, but the mask has {pixels} pixels")


# ----------------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class _Look:
    """What a readable picture is recognised by: its pixels' digest, a thumbnail, its shape."""

    picture: _Picture
    file: Path
    json: Path
    digest: bytes
    thumbnail: NDArray[np.float32] | None  # [THUMBNAIL ** 2], mean 0, length 1; None: flat
    aspect: float  # log(width / height)


def _check_pictures(found: _Set, faults: list[Fault], progress: bool) -> list[_Look]:
    """Read every picture, compare its size with the json's; what the readable ones look like."""
    looks: list[_Look] = []
    if not found.pictures or not found.folder_found:
        return looks
    for picture in _steps(found.pictures, f"check {found.path.name}", progress):
        if picture.file is None:
            continue
        where = f"{picture.where} ({_short(picture.file.name)})"
        try:
            with open_picture(picture.file) as image:
                stored, orientation = (image.height, image.width), image.getexif().get(0x0112, 1)
                pixels = to_tensor(image).permute(1, 2, 0).numpy()
        except InputError as error:
            reason = str(error).removeprefix(f"{picture.file}: ")
            kind = "missing-picture" if reason == "no such picture" else "unreadable-picture"
            if kind == "missing-picture":
                reason = f"no such picture: {picture.file}{_find_elsewhere(picture.file)}"
            _add(faults, kind, picture.file, picture.id, f"{where}: {reason}")
            continue
        height, width = pixels.shape[:2]
        _check_size(picture, where, (height, width), stored, orientation, faults)
        if picture.id is not None and found.sizes.get(picture.id) is None:
            found.sizes[picture.id] = height, width
        grey = Image.fromarray(pixels).convert("L")
        small = grey.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX, reducing_gap=None)
        thumbnail = np.asarray(small, dtype=np.float32).flatten()
        thumbnail -= thumbnail.mean()
        flat = float(thumbnail.std()) < FLAT
        looks.append(
            _Look(
                picture,
                picture.file,
                found.path,
                hashlib.blake2b(pixels.tobytes() + f"{width}".encode(), digest_size=16).digest(),
                None if flat else thumbnail / np.linalg.norm(thumbnail),
                math.log(width / height),
            )
        )
    return looks


def _find_elsewhere(file: Path) -> str:
    """A hint where a missing picture may be."""
    if "\\" in file.name:
        return " (a path in Windows' manner: write / for \\)"
    try:
        for other in file.parent.iterdir() if file.parent.is_dir() else ():
            if other.name.casefold() == file.name.casefold() or other.stem == file.stem:
                return f" (there is {other.name})"
    except (OSError, ValueError):
        pass
    return ""


def _check_size(
    picture: _Picture,
    where: str,
    upright: tuple[int, int],
    stored: tuple[int, int],
    orientation: Any,
    faults: list[Fault],
) -> None:
    """The picture's size, as it is shown and as it is stored, against the json's."""
    said = picture.size
    if said is None or picture.file is None:
        return
    shown = f"{upright[0]} x {upright[1]} pixels (height x width)"
    text = f"{where}: {shown}, the json says {said[0]} x {said[1]}"
    turned = upright == stored[::-1] and orientation in range(5, 9)
    if said == upright:
        # Orientations that keep height and width leave open which way the labels were made.
        if orientation in SAME_SIZE or (turned and upright[0] == upright[1]):
            message = (
                f"{where}: has EXIF orientation {orientation}; the size fits with and without it"
            )
            _add(faults, "orientation", picture.file, picture.id, message)
    elif turned and said == stored:
        message = f"{text}: that fits the pixels as stored, before EXIF orientation {orientation}"
        _add(faults, "turned-picture", picture.file, picture.id, message)
    elif said == upright[::-1]:
        _add(faults, "swapped-size", picture.file, picture.id, f"{text}: exchanged")
    else:
        tried = f" (neither with nor without EXIF orientation {orientation})" * turned
        _add(faults, "wrong-size", picture.file, picture.id, text + tried)


# --------------------------------------------------------------------- one split and the other


def _compare_classes(first: _Set, second: _Set, faults: list[Fault]) -> None:
    if first.categories is None or second.categories is None:
        return
    here, there = first.categories, second.categories
    names = {name: number for number, name in here.items() if name is not None}
    for number in sorted(here.keys() | there.keys()):
        mine, other = here.get(number), there.get(number)
        if number in here and number in there:
            if mine is None or other is None or mine == other:
                continue
            message = f"{_short(other)}, but {_short(mine)} in {first.path.name}"
        elif number in here:
            message = f"{_short(mine)} is in {first.path.name} only"
        else:
            elsewhere = f", where {_short(other)} is {names[other]}" if other in names else ""
            message = f"{_short(other)} is not in {first.path.name}{elsewhere}"
        _add(faults, "class-mismatch", second.path, number, f"category {number}: {message}")


def _compare_pictures(looks: Sequence[Sequence[_Look]], faults: list[Fault]) -> None:
    """Pictures that are the same or alike, inside each set and across the two.

    Each picture is named once a set that it has a twin in: the first one there.
    """
    unique: list[list[_Look]] = []
    for group in looks:
        firsts: dict[bytes, _Look] = {}
        for look in group:
            if look.digest in firsts:
                _name_pair(look, firsts[look.digest], "duplicate-picture", faults)
            else:
                firsts[look.digest] = look
        unique.append(list(firsts.values()))
    for group in unique:
        for look, other in _alike(group, group, earlier=True):
            _name_pair(look, other, "near-duplicate", faults)
    if len(unique) == 2:
        theirs = {look.digest: look for look in unique[1]}
        for look in unique[0]:
            if look.digest in theirs:
                _name_pair(look, theirs[look.digest], "leaked-picture", faults)
        rest = [look for look in unique[0] if look.digest not in theirs]
        for look, other in _alike(rest, unique[1], earlier=False):
            _name_pair(look, other, "near-leak", faults)


def _name_pair(look: _Look, other: _Look, kind: str, faults: list[Fault]) -> None:
    same = "looks like" if kind.startswith("near") else "has the same pixels as"
    if look.file == other.file:
        same = "is the same file as"
    place = "" if look.json == other.json else f" of {other.json}"
    message = f"{look.picture.where} ({look.file.name}) {same} {other.picture.where}"
    message += f" ({other.file.name}){place}"
    _add(faults, kind, look.file, look.picture.id, message)


def _alike(
    looks: Sequence[_Look], others: Sequence[_Look], *, earlier: bool
) -> Iterator[tuple[_Look, _Look]]:
    """Each of ``looks`` with the likest of ``others`` (of those before it, if ``earlier``)."""
    looks = [look for look in looks if look.thumbnail is not None]
    others = [look for look in others if look.thumbnail is not None]
    if not looks or not others:
        return
    columns = np.stack([look.thumbnail for look in others if look.thumbnail is not None])
    aspects = np.array([look.aspect for look in others])
    for start in range(0, len(looks), 256):
        block = looks[start : start + 256]
        rows = np.stack([look.thumbnail for look in block if look.thumbnail is not None])
        scores = rows @ columns.T
        scores[np.abs(aspects - np.array([[look.aspect] for look in block])) > 0.05] = 0
        if earlier:
            scores = np.tril(scores, start - 1)
        for look, score in zip(block, scores, strict=True):
            best = int(score.argmax())
            if score[best] >= ALIKE:
                yield look, others[best]


def _steps(items: Sequence[T], title: str, progress: bool) -> Iterable[T]:
    return track(items, title, len(items)) if progress and items else items
