"""COCO instance annotations, read straight from the json; masks stay as they are until asked for.

What is unusable in one annotation costs that annotation only and is listed in ``skipped``; what
makes the whole file doubtful (no json, missing keys, ids twice) is refused.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brefine.data.faults import quote, shorten
from brefine.data.packed import Packed
from brefine.data.pictures import MAX_PIXELS
from brefine.data.transforms import resize_masks
from brefine.rle import check_polygons, decode, draw, extent_of
from brefine.structures import Bitmaps, Category, InputError, Instances

if TYPE_CHECKING:
    from brefine.data.lvis import Federated

#: a ``bbox`` is believed if no side is farther from its mask than 2 pixels and a quarter of the
#: box: drawn boxes hold thin ends that no pixel of the mask shows; corners given as sizes are off
BOX_TOLERANCE = 2.0, 0.25
#: pictures that are looked for to tell in which folder all of a json's are
FEW_NAMES = 10


@dataclass(frozen=True)
class Picture:
    """One picture of a set.

    Attributes:
        id: the json's own id.
        file: where it is (not checked before it is read).
        size: (height, width) that the json says.
    """

    id: int | str
    file: Path
    size: tuple[int, int]

    @classmethod
    def of(cls, values: Any) -> Picture:
        """From the values (id, file, height, width)."""
        return cls(values[0], Path(values[1]), (values[2], values[3]))


class CocoSet:
    """Pictures and their objects from a COCO json.

    Pictures and annotations are ``Packed``: loader processes share them.

    Args:
        annotations: the json.
        images: folder of the pictures. None: the folder ``images`` beside the json if there is
            one, else the json's own folder; also if the first pictures are there and not in
            ``images``.

    Attributes:
        path: the json.
        folder: what its pictures are named from; None: they have whole paths.
        categories: the category table, in the order of the ids: label ``i`` is row ``i``.
        pictures: in the json's order.
        skipped: one line for each annotation that cannot be used: its id and why.
        federated: what LVIS says beside masks, if the set is of LVIS and was read by ``read.read``.

    Raises:
        InputError: not there, no COCO json, a missing key or a value of the wrong type, or an
            id used twice; names file, entry and key.
    """

    path: Path
    folder: Path | None
    categories: list[Category]
    pictures: Sequence[Picture]
    skipped: list[str]
    federated: Federated | None = None

    def __init__(self, annotations: Path | str, images: Path | str | None = None) -> None:
        path = Path(annotations)
        content = read_json(path, packed=True)
        self._take(content, path, find_folder(path, images, first_names(content)))

    @classmethod
    def from_dict(cls, content: dict[str, Any], origin: Path, folder: Path | None) -> CocoSet:
        """From a COCO dict that is in memory, with the same checks.

        Args:
            content: ``images``, ``annotations`` and ``categories``.
            origin: where it was read from: becomes ``path`` and is named in messages.
            folder: what ``file_name`` is relative to; None: it is a whole path.

        Raises:
            InputError: as the constructor.
        """
        dataset = cls.__new__(cls)
        dataset._take(content, origin, folder)
        return dataset

    def _take(self, content: dict[str, Any], path: Path, folder: Path | None) -> None:
        self.path, self.folder = path, folder
        self.categories = sorted(
            Category(self._whole(entry, "id", where), self._text(entry, "name", where))
            for entry, where in self._entries(content, "categories")
        )
        pictures = [
            Picture(
                self._id(entry, "id", where),
                (folder or Path()) / self._text(entry, "file_name", where),
                (self._whole(entry, "height", where), self._whole(entry, "width", where)),
            )
            for entry, where in self._entries(content, "images")
        ]
        for picture in pictures:
            height, width = picture.size
            if min(height, width) < 1 or height * width > MAX_PIXELS:
                raise InputError(
                    f"{self.path}: picture {picture.id}: {height} x {width} pixels, expected "
                    f"1 to {MAX_PIXELS // 10**6} million: correct its height and width"
                )
        labels = {category.id: i for i, category in enumerate(self.categories)}
        index = {picture.id: i for i, picture in enumerate(pictures)}
        if len(labels) < len(self.categories):
            twice = _first_twice([category.id for category in self.categories])
            raise InputError(f"{self.path}: category id {twice} is used twice: make ids unique")
        if len(index) < len(pictures):
            twice = _first_twice([picture.id for picture in pictures])
            raise InputError(f"{self.path}: picture id {twice!r} is used twice: make ids unique")

        self.skipped = []
        self._labels = labels
        # In the file's order, and packed already where `read_json` did so.
        annotations: Packed[dict[str, Any]] = Packed(dict)
        places: list[list[int]] = [[] for _ in pictures]
        usable = set()
        for number, (entry, where) in enumerate(self._entries(content, "annotations")):
            image = self._id(entry, "image_id", where)
            category = self._whole(entry, "category_id", where)
            fault = None
            if image not in index:
                fault = f"unknown image_id {image!r}"
            elif category not in labels:
                fault = f"unknown category_id {category}"
            else:
                fault = find_fault(entry, pictures[index[image]].size)
            if fault:
                self.skipped.append(f"{where}: {fault}")
                continue
            kept = content["annotations"][number]
            if isinstance(kept, Kept):
                annotations, place = kept
            else:
                place = annotations.append(entry)
            places[index[image]].append(place)
            if not entry.get("iscrowd"):
                usable.add(index[image])
        self._usable = sorted(usable)
        self._annotations = annotations
        self._starts = np.cumsum([0, *map(len, places)])
        self._places = np.array([place for some in places for place in some], dtype=np.int64)
        self.pictures = Packed(Picture.of)
        for picture in pictures:
            self.pictures.append((picture.id, str(picture.file), *picture.size))

    def __len__(self) -> int:
        return len(self.pictures)

    def annotations(self, index: int) -> list[dict[str, Any]]:
        """The usable annotations of picture ``index``, as in the json, crowd regions included."""
        index = range(len(self))[index]
        places = self._places[self._starts[index] : self._starts[index + 1]]
        return [self._annotations[place] for place in places.tolist()]

    def counts(self) -> NDArray[np.int64]:
        """How many usable annotations each picture has, ``[N]``, crowd regions included."""
        return np.diff(self._starts)

    def usable(self) -> list[int]:
        """Pictures with at least one usable object that is not a crowd region."""
        return list(self._usable)

    def target(self, index: int, size: tuple[int, int] | None = None) -> Instances:
        """The objects of picture ``index``, crowd regions left out.

        A box is the annotation's ``bbox`` where that agrees with the mask, else the mask's own;
        the centre of every pixel of the mask lies inside. An object too thin to hold any pixel
        is left out.

        Args:
            index: of the picture.
            size: (height, width) of the frame, if not the picture's own: polygons are drawn at
                this size, RLE is resized (``transforms.resize_masks``). No object that the
                picture's own size shows disappears.
        """
        picture = self.pictures[index]
        size = size or picture.size
        scale = size[1] / picture.size[1], size[0] / picture.size[0]  # x, y
        windows: list[Tensor] = []
        boxes, labels, origins, large = [], [], [], []
        for entry in self.annotations(index):
            if entry.get("iscrowd"):
                continue
            segmentation = entry["segmentation"]
            window = None
            if isinstance(segmentation, list):
                polygons = [part for part in segmentation if len(part) >= 6]
                extent = extent_of(polygons, picture.size)
                window, origin = draw(polygons, size, scale)
            if window is None or not window.numel():
                runs = decode(segmentation, picture.size)
                extent = runs.box()
                window, origin = runs.window()
                if not window.numel():
                    continue
                large.append(len(windows))
            boxes.append(choose_box(entry, extent))
            labels.append(self._labels[entry["category_id"]])
            windows.append(window)
            origins.append(origin)
        corner = torch.tensor(origins, dtype=torch.int64).reshape(-1, 2)
        if large and size != picture.size:
            rest = Bitmaps([windows[i] for i in large], corner[large])
            resized = resize_masks(rest, picture.size, size)
            corner[large] = resized.origins
            for i, window in zip(large, resized.windows, strict=True):
                windows[i] = window
        sides = torch.tensor([window.shape[::-1] for window in windows]).reshape(-1, 2)
        box = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4) * torch.tensor(scale * 2)
        height, width = size
        box = torch.minimum(box.clamp(min=0), torch.tensor([width, height, width, height]))
        box[:, :2] = torch.minimum(box[:, :2], corner + 0.5)
        box[:, 2:] = torch.maximum(box[:, 2:], corner + sides - 0.5)
        return Instances(
            size,
            box,
            torch.tensor(labels, dtype=torch.int64),
            masks=Bitmaps(windows, corner),
        )

    def ground_truth(self) -> dict[str, Any]:
        """What COCOeval needs: a COCO dict with every mask as compressed RLE.

        ``bbox`` and ``area`` are the json's where they can be used, else the mask's; annotation
        ids count from 1 (COCOeval takes 0 for "unmatched").
        """
        annotations: list[dict[str, Any]] = []
        for index, picture in enumerate(self.pictures):
            for entry in self.annotations(index):
                runs = decode(entry["segmentation"], picture.size)
                if not runs.area():
                    continue
                box, area = box_and_area(entry, runs.box(), runs.area())
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": picture.id,
                        "category_id": entry["category_id"],
                        "bbox": box,
                        "area": area,
                        "iscrowd": int(bool(entry.get("iscrowd"))),
                        "segmentation": runs.encode(),
                    }
                )
        images = [
            {"id": p.id, "file_name": p.file.name, "height": p.size[0], "width": p.size[1]}
            for p in self.pictures
        ]
        categories = [{"id": c.id, "name": c.name} for c in self.categories]
        return {
            "info": {},
            "images": images,
            "annotations": annotations,
            "categories": categories,
        }

    def _entries(self, content: dict[str, Any], key: str) -> Iterator[tuple[dict[str, Any], str]]:
        """The entries of a list in the json, each with what to call it in messages."""
        entries = content.get(key)
        if not isinstance(entries, list):
            fault = "missing" if entries is None else "not a list"
            raise InputError(f"{self.path}: {key}: {fault}, expected COCO instance annotations")
        kind = {"categories": "category", "images": "picture", "annotations": "annotation"}[key]
        for number, entry in enumerate(entries):
            if isinstance(entry, Kept):
                entry = entry.among[entry.place]
            if not isinstance(entry, dict):
                raise InputError(f"{self.path}: {key}[{number}]: expected an object {{...}}")
            name = entry.get("id", f"number {number}")
            yield entry, f"{kind} {shorten(name)}"

    def _value(self, entry: dict[str, Any], key: str, where: str) -> Any:
        if key not in entry:
            raise InputError(f"{self.path}: {where}: {key} is missing")
        return entry[key]

    def _whole(self, entry: dict[str, Any], key: str, where: str) -> int:
        value = self._value(entry, key, where)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or abs(value) >= 2**53:
            raise InputError(
                f"{self.path}: {where}: {key} is {quote(value)}, expected a whole number"
                + (" below 2**53" if type(value) is int else "")
            )
        return value

    def _id(self, entry: dict[str, Any], key: str, where: str) -> int | str:
        value = self._value(entry, key, where)
        return value if isinstance(value, str) else self._whole(entry, key, where)

    def _text(self, entry: dict[str, Any], key: str, where: str) -> str:
        value = self._value(entry, key, where)
        if not isinstance(value, str) or not value or "\0" in value:
            raise InputError(f"{self.path}: {where}: {key} is {shorten(value)}, expected a text")
        return value


def find_folder(path: Path, images: Path | str | None, names: Sequence[str] = ()) -> Path:
    """The folder of a json's pictures: ``images``, or by the rule of ``CocoSet``.

    Args:
        path: the json.
        images: the folder, if it was given.
        names: of a few pictures: these are looked for, and decide for all.

    Raises:
        InputError: ``images`` is no folder.
    """
    if images is None:
        beside, own = path.parent / "images", path.parent
        if not beside.is_dir():
            return own
        return beside if _holds(beside, names) or not _holds(own, names) else own
    if not Path(images).is_dir():
        raise InputError(f"{images}: no such folder of pictures")
    return Path(images)


def _holds(folder: Path, names: Sequence[str]) -> bool:
    """Whether one of the files is there."""
    return any(os.path.isfile(folder / name) for name in names)


def first_names(content: dict[str, Any]) -> list[str]:
    """``file_name`` of the first pictures of a COCO dict, which need not be sound."""
    entries = content.get("images")
    some = entries[:FEW_NAMES] if isinstance(entries, list) else []
    named = [entry.get("file_name") for entry in some if isinstance(entry, dict)]
    return [name for name in named if isinstance(name, str)]


def read_json(path: Path, *, packed: bool = False) -> dict[str, Any]:
    """The object in a json file.

    Args:
        path: the file.
        packed: move each COCO annotation into a ``Packed`` as soon as it is parsed, for
            ``CocoSet``: as Python objects, those of a large set take ten times the memory.

    Raises:
        InputError: not there, no json, or no object.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text, object_hook=_keep(Packed(dict)) if packed else None)
    except FileNotFoundError:
        raise InputError(f"{path}: no such annotation file") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: no valid json: {error.msg}") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "not a json file in UTF-8"
        raise InputError(f"{path}: cannot read the annotations: {reason}") from None
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: expected COCO annotations, an object with images, annotations and categories"
        )
    return content


class Kept(NamedTuple):
    """An annotation of a json that was packed while the json was parsed."""

    among: Packed[dict[str, Any]]
    place: int


def _keep(annotations: Packed[dict[str, Any]]) -> Callable[[dict[str, Any]], Any]:
    """A hook for the json parser that moves every annotation into ``annotations``."""

    def keep(entry: dict[str, Any]) -> dict[str, Any] | Kept:
        if "image_id" not in entry or "segmentation" not in entry:
            return entry
        try:
            return Kept(annotations, annotations.append(entry))
        except ValueError:  # an annotation inside of an annotation
            return Kept(annotations, annotations.append(_plain(entry)))

    return keep


def _plain(value: Any) -> Any:
    """A json value without the annotations inside, where no sound json has any."""
    if isinstance(value, Kept):
        return None
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def find_fault(entry: dict[str, Any], size: tuple[int, int]) -> str | None:
    """Why an annotation cannot be used, or None.

    RLE and small or outlying polygons are drawn to see whether a pixel remains; drawing all of a
    large set would take minutes.
    """
    segmentation = entry.get("segmentation")
    if segmentation is None:
        return "no segmentation"
    crowd = entry.get("iscrowd", 0)
    if crowd not in (0, 1):
        return f"iscrowd is {quote(crowd)}, expected 0 or 1"
    try:
        if isinstance(segmentation, list):
            height, width = size
            for points in check_polygons(segmentation, size):
                x, y = points[0::2], points[1::2]
                doubled = x @ np.roll(y, -1) - y @ np.roll(x, -1)
                inside = x.min() >= 0 and y.min() >= 0 and x.max() <= width and y.max() <= height
                if abs(doubled) > 8 and inside:
                    return None
        if not decode(segmentation, size).area():
            return "the mask holds no pixel of the picture"
    except ValueError as error:
        return str(error)
    return None


def box_and_area(
    entry: dict[str, Any], tight: tuple[int, int, int, int], pixels: int
) -> tuple[list[float], float]:
    """What evaluation takes: the json's ``bbox`` and ``area`` if usable, else the mask's.

    Args:
        entry: the annotation.
        tight: xyxy box of its mask.
        pixels: area of its mask.

    Returns:
        The box as x, y, width, height, and the area.
    """
    x1, y1, x2, y2 = choose_box(entry, tight)
    area = as_number(entry.get("area"))
    return [x1, y1, x2 - x1, y2 - y1], area if area and area > 0 else float(pixels)


def choose_box(
    entry: dict[str, Any], tight: tuple[float, float, float, float]
) -> tuple[float, float, float, float]:
    """The annotation's ``bbox`` as xyxy where it agrees with the mask, else the mask's box."""
    given = entry.get("bbox")
    x1, y1, x2, y2 = tight
    if isinstance(given, list) and len(given) == 4:
        x, y, w, h = (as_number(value) for value in given)
        if x is not None and y is not None and w is not None and h is not None and w > 0 < h:
            pixels, share = BOX_TOLERANCE
            across, down = pixels + share * w, pixels + share * h
            fits = abs(x - x1) <= across and abs(x + w - x2) <= across
            if fits and abs(y - y1) <= down and abs(y + h - y2) <= down:
                return x, y, x + w, y + h
    return float(x1), float(y1), float(x2), float(y2)


def as_number(value: Any) -> float | None:
    """A finite number, or None."""
    if type(value) not in (int, float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _first_twice(values: Sequence[Any]) -> Any:
    seen = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None
