"""Many pictures predicted into one folder of results, which appears when all of it is done.

Until then the work stands beside it, in ``OUT.part``: files of single pictures, and the journal
with everything else, to which a batch is added as one line when its files are there. A run that
stopped is taken up from there. Memory holds the names of the pictures, two batches of them
decoded, and nothing else that grows: the files that hold all pictures are written from the
journal in the end.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import yaml

from brefine import __version__
from brefine.files import follow, put
from brefine.formats import FORMATS
from brefine.formats.polygons import (
    Found,
    iou,
    write_geojson,
    write_labelme,
    write_polygons,
    write_yolo,
)
from brefine.formats.rasters import write_idmap, write_masks
from brefine.formats.records import Predicted, write_coco, write_csv, write_cvat
from brefine.progress import Progress, console
from brefine.runs import clean
from brefine.sources import Item, Pixels, count, find_pictures, walk
from brefine.structures import Category, InputError
from brefine.views import PLAIN, View

#: what is written unless something else is asked for
SAVE = ("coco", "idmap", "overlay")
#: where each format is written, inside the folder of results
PLACES = {
    "coco": "predictions.json",
    "masks": "masks",
    "idmap": "idmaps",
    "polygons": "polygons",
    "labelme": "labelme",
    "yolo": "yolo",
    "cvat": "annotations.xml",
    "geojson": "geojson",
    "csv": "predictions.csv",
    "overlay": "overlays",
}
#: and what its folder holds
KINDS = {
    "masks": {".png"},
    "idmaps": {".png", ".csv"},
    "polygons": {".json"},
    "labelme": {".json"},
    "yolo": {".txt", ".yaml"},
    "geojson": {".geojson"},
    "overlays": {".png"},
}
JOURNAL, SETTINGS = "journal.jsonl", "settings.json"


class Finder(Protocol):
    """What finds the objects: ``predict.Predictor``, or ``exported.Model`` without torch.

    Attributes:
        categories: the category table.
        overall: the best threshold for all classes.
    """

    categories: list[Category]
    overall: float

    def records_of(
        self, pictures: Sequence[Pixels], ids: Sequence[int | str], *, threshold: float | None
    ) -> list[list[dict[str, Any]]]:
        """COCO results of each of several pictures, looked at as they are."""
        ...

    def records(
        self,
        picture: Pixels,
        image_id: int | str,
        *,
        threshold: float | None,
        views: Sequence[View],
        tile: int | Literal["auto"] | None,
        overlap: int | None,
    ) -> list[dict[str, Any]]:
        """COCO results of a picture; see ``Predictor.records``."""
        ...

    def describe(self) -> dict[str, Any]:
        """Everything that a prediction follows from."""
        ...


@dataclass
class Loss:
    """What the masks of one format lost against those predicted.

    Attributes:
        masks: how many were written.
        changed: how many of them draw another mask.
        total: the sum of their IoUs with the ones predicted.
        worst: the least IoU.
    """

    masks: int = 0
    changed: int = 0
    total: float = 0.0
    worst: float = 1.0

    @property
    def mean(self) -> float:
        """The mean IoU, 1 without a mask."""
        return self.total / self.masks if self.masks else 1.0

    def add(self, ious: Sequence[float]) -> None:
        """Count the masks of a picture."""
        self.masks += len(ious)
        self.changed += sum(iou < 1 for iou in ious)
        self.total += sum(ious)
        self.worst = min(self.worst, *ious, 1.0)


@dataclass
class Summary:
    """What a run did.

    Attributes:
        pictures: how many were predicted, broken ones not counted.
        objects: how many were found in them.
        broken: for each picture that could not be read, by name, the line that says why.
        losses: of each format that may lose something.
    """

    pictures: int = 0
    objects: int = 0
    broken: dict[str, str] = field(default_factory=dict)
    losses: dict[str, Loss] = field(default_factory=dict)


def predict_files(
    predictor: Finder,
    sources: Sequence[str | Path] | str | Path,
    out: Path | str,
    *,
    save: Sequence[str] = SAVE,
    threshold: float | None = None,
    tolerance: float = 0.0,
    data: Path | str | None = None,
    images: Path | str | None = None,
    skip_broken: bool = False,
    resume: bool = False,
    batch: int = 1,
    workers: int = 2,
    allow_urls: bool = False,
    every: int = 1,
    limit: int | None = None,
    views: Sequence[View] = PLAIN,
    tile: int | Literal["auto"] | None = None,
    overlap: int | None = None,
    holes: int = 0,
    islands: int | None = 0,
    disjoint: bool = False,
) -> Summary:
    """Predict pictures and write the results to a folder.

    The same arguments give the same files, byte for byte, whether the run was stopped in between
    or not.

    Args:
        predictor: the model.
        sources: one or several, see ``sources.find_pictures``.
        out: folder to write; one from an earlier call, which has ``settings.json``, is replaced
            as a whole, in the end.
        save: some of ``formats.FORMATS``.
        threshold: see ``Predictor``.
        tolerance: pixels by which outlines may leave the edges of the pixels, to have fewer
            corners; 0: masks are drawn back bit by bit.
        data: labelled set, of any format, that knows the pictures: its ids become the records'
            ``image_id``, which is else the picture's name.
        images: folder of ``data``'s pictures.
        skip_broken: name pictures that cannot be read and go on, instead of stopping.
        resume: go on with a run that stopped, if there is one. What is done is not looked at.
        batch: pictures predicted together, where they have one size for the network.
        workers: threads that decode pictures ahead; 0: none.
        allow_urls: see ``sources.find_pictures``.
        every: see ``sources.walk``.
        limit: see ``sources.walk``.
        views: see ``Predictor``; with more than one, pictures are predicted one by one.
        tile: see ``Predictor.records``; with tiles, pictures are predicted one by one.
        overlap: see ``Predictor.records``.
        holes: see ``runs.clean``.
        islands: see ``runs.clean``.
        disjoint: see ``runs.clean``.

    Raises:
        InputError: no picture, one that cannot be read (what was done before stays in
            ``OUT.part``) or that ``data`` does not know, ``out`` holds something else, or an
            unfinished run is in the way.
    """
    out = follow(out)
    sources = [sources] if isinstance(sources, str | Path) else list(sources)
    if not sources:
        raise InputError("no pictures to predict: sources is empty")
    for name, value, least in (
        ("batch", batch, 1),
        ("every", every, 1),
        ("limit", limit, 1),
        ("workers", workers, 0),
    ):
        if value is not None and value < least:
            raise InputError(f"{name}: {value} is less than {least}")
    if unknown := [name for name in save if name not in FORMATS]:
        raise InputError(f"save: {unknown[0]!r} is none of {', '.join(FORMATS)}")
    save = [name for name in FORMATS if name in save]
    _refuse_others(out)
    part = out.with_name(f"{out.name}.part")
    found = find_pictures(sources, allow_urls=allow_urls, missing=skip_broken)
    if inside := _lie_in(found, out):
        raise InputError(
            f"{out}: holds pictures to predict ({os.path.dirname(next(iter(inside.values())))}), "
            "and would be replaced: choose another folder with --out"
        )
    inside = _lie_in(found, part)  # what an unfinished run has drawn in one of the sources
    found = {name: place for name, place in found.items() if name not in inside}
    ids = {} if data is None else _match(found, data, images)
    total = count(found, every=every, limit=limit)
    asked: dict[str, Any]
    asked = {"threshold": threshold, "tolerance": tolerance, "save": save, "data": data}
    asked |= {"batch": batch, "every": every, "views": views, "tile": tile, "overlap": overlap}
    asked |= {"holes": holes, "islands": islands, "disjoint": disjoint}
    settings = {**asked, **predictor.describe(), "version": __version__}
    done = _begin(part, out, json.loads(json.dumps(settings, default=str)), resume)
    _require_same(part, done, found)
    writer = _Writer(part, out, save, predictor, tolerance)

    def look(pictures: Sequence[tuple[Item, Pixels]]) -> list[list[dict[str, Any]]]:
        """The records of each picture of a batch."""
        named = [ids.get(item.name, item.name) for item, _ in pictures]
        batch = [pixels for _, pixels in pictures]
        if tile is None and tuple(views) == PLAIN:
            return predictor.records_of(batch, named, threshold=threshold)
        options: dict[str, Any] = {"views": views, "tile": tile, "overlap": overlap}
        return [
            predictor.records(pixels, id, threshold=threshold, **options)
            for pixels, id in zip(batch, named, strict=True)
        ]

    def finish(chunk: Sequence[tuple[Item, Pixels | InputError]]) -> list[dict[str, Any]]:
        """A batch, predicted and written, as it stands in the journal."""
        entries: list[dict[str, Any]] = []
        good = []
        for item, pixels in chunk:
            if not isinstance(pixels, InputError):
                good.append((item, pixels))
                continue
            if not skip_broken:
                raise pixels
            console.print(f"skipped: {pixels}", markup=False, soft_wrap=True)
            entries.append({"name": item.name, "broken": str(pixels)})
        for (item, pixels), records in zip(good, look(good), strict=True):
            records = clean(records, holes=holes, islands=islands, disjoint=disjoint)
            size = (pixels.shape[0], pixels.shape[1])
            picture = Predicted(item.name, item.place, size, records)
            entries.append({**_entry(picture), "ious": writer.write(picture, pixels)})
        return entries

    try:
        with (
            (part / JOURNAL).open("a", encoding="utf-8") as journal,
            Progress("predict", max(0, total - len(done))) as progress,
        ):
            items = walk(found, every=every, limit=limit, done=done)
            for chunk in _batches(_ahead(items, workers, max(workers, batch)), batch):
                entries = finish(chunk)
                journal.write(json.dumps(entries) + "\n")
                journal.flush()
                done.update((entry["name"], entry.get("at", "")) for entry in entries)
                progress.advance(len(chunk))
    except BaseException as error:
        if done:
            hint = (
                f"{len(done)} of {total} pictures are done: the same command with --resume goes on"
            )
            console.print(f"{part}: {hint}", markup=False, soft_wrap=True)
        else:
            shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError):
            raise InputError(f"{part}: cannot write: {error.strerror or error}") from None
        raise
    summary = writer.finish()
    put(part, out)
    return summary


def _refuse_others(out: Path) -> None:
    """Refuse a folder that no earlier run wrote, or with anything in it that none did."""
    there = {path.name for path in out.iterdir()} if out.is_dir() else set()
    strange = there - {*PLACES.values(), SETTINGS} or (there and SETTINGS not in there)
    if strange or (out.exists() and not out.is_dir()):
        raise InputError(f"{out}: holds something else than predictions: choose another folder")
    for place in there & KINDS.keys():
        for folder, folders, files in os.walk(out / place):
            for name in files + [name for name in folders if (Path(folder) / name).is_symlink()]:
                if os.path.splitext(name)[1] not in KINDS[place]:
                    raise InputError(
                        f"{os.path.join(folder, name)}: is no prediction, and would be removed "
                        f"with those in {out}: move it, or choose another folder"
                    )


def _lie_in(found: Mapping[str, str], out: Path) -> dict[str, str]:
    """Those pictures that lie in a folder, or in one inside."""
    if not out.is_dir():
        return {}
    whole = os.path.realpath(out)
    folders = {name: os.path.dirname(os.path.abspath(place)) for name, place in found.items()}
    inside = {
        folder
        for folder in set(folders.values())
        if os.path.isdir(folder) and Path(os.path.realpath(folder)).is_relative_to(whole)
    }
    return {name: found[name] for name, folder in folders.items() if folder in inside}


def _match(
    found: Mapping[str, str], data: Path | str, images: Path | str | None
) -> dict[str, int | str]:
    """The id that a labelled set has for each picture."""
    from brefine.data.read import read  # labelled sets need torch

    pictures = read(data, images).pictures
    known = {os.path.abspath(picture.file): picture.id for picture in pictures}
    real: dict[str, int | str] = {}
    ids = {}
    for name, place in found.items():
        path = os.path.abspath(place)
        if path not in known:  # behind a link, maybe
            real = real or {os.path.realpath(path): number for path, number in known.items()}
            if (path := os.path.realpath(path)) not in real:
                raise InputError(f"{place}: {data} does not list this picture: leave it out")
        ids[name] = known[path] if path in known else real[path]
    return ids


def _require_same(part: Path, done: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Refuse to go on with a run of other pictures, though they may be named the same."""
    names = {_origin(place): os.path.splitext(name)[0] for name, place in found.items()}
    for name, place in done.items():
        stem, (own, _, frame) = os.path.splitext(name)[0], name.rpartition("_")
        own = own if frame.isdigit() and _is_frame(place) else stem
        if place and names.get(_origin(place)) != own:
            raise InputError(
                f"{part}: an unfinished run of other pictures ({name} was {place}): resume with "
                "the same, or remove it"
            )


def _is_frame(place: str) -> bool:
    return place.rpartition(": frame ")[2].isdigit()


def _origin(place: str) -> str:
    """The file of a picture or a frame, from wherever one looks; another place as it is."""
    file = place.rpartition(": frame ")[0] if _is_frame(place) else place
    return os.path.realpath(file) if os.path.exists(file) else file


def _begin(part: Path, out: Path, settings: dict[str, Any], resume: bool) -> dict[str, str]:
    """Make the folder of an unfinished run, or take it up: names and places of what is done.

    Broken pictures are done, too, without a place: looking at them again would change what is
    predicted together with what, and so the last digits.
    """
    journal = part / JOURNAL
    done: dict[str, str] = {}
    if journal.is_file():
        whole = 0
        with journal.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):  # the last one may be cut short
                    try:
                        names = {entry["name"]: entry.get("at", "") for entry in json.loads(line)}
                    except (ValueError, TypeError, KeyError, AttributeError):
                        raise InputError(f"{journal}: is damaged: remove {part}") from None
                    whole += len(line)
                    done.update(names)
        if done and not resume:
            raise InputError(
                f"{part}: an unfinished run with {len(done)} pictures done: go on with --resume, "
                "or remove it"
            )
        if done:
            try:
                before = dict(json.loads((part / SETTINGS).read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):
                raise InputError(f"{part / SETTINGS}: is damaged: remove {part}") from None
            for key in {**before, **settings}:
                if before.get(key) != settings.get(key):
                    raise InputError(
                        f"{part}: an unfinished run with another {key} ({before.get(key)}, not "
                        f"{settings.get(key)}): resume with the same, or remove it"
                    )
            os.truncate(journal, whole)
            return done
    if part.exists() and not (part / SETTINGS).is_file():
        raise InputError(f"{part}: is in the way, and no unfinished run: remove it")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        (part / SETTINGS).write_text(json.dumps(settings), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{out}: cannot write: {error.strerror or error}") from None
    return done


def _ahead(
    items: Iterable[Item], workers: int, room: int
) -> Iterator[tuple[Item, Pixels | InputError]]:
    """Items with their pixels, or why there are none; ``room`` of them wait decoded."""
    if not workers:
        yield from ((item, _read(item)) for item in items)
        return
    pool = ThreadPoolExecutor(workers)
    waiting: deque[tuple[Item, Future[Pixels | InputError]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(_read, item)))
            if len(waiting) > room:
                item, future = waiting.popleft()
                yield item, future.result()
        while waiting:
            item, future = waiting.popleft()
            yield item, future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _read(item: Item) -> Pixels | InputError:
    try:
        return item.read()
    except InputError as error:
        return error


def _batches(
    items: Iterator[tuple[Item, Pixels | InputError]], size: int
) -> Iterator[list[tuple[Item, Pixels | InputError]]]:
    while chunk := list(islice(items, size)):
        yield chunk


def _entry(picture: Predicted) -> dict[str, Any]:
    """A picture's line in the journal."""
    return {
        "name": picture.name,
        "place": picture.place,
        "at": os.path.abspath(picture.place)
        if os.path.exists(_origin(picture.place))
        else picture.place,
        "size": picture.size,
        "records": picture.records,
    }


class _Writer:
    """Writes what was asked for: of single pictures at once, of all from the journal."""

    def __init__(
        self, part: Path, out: Path, save: Sequence[str], predictor: Finder, tolerance: float
    ) -> None:
        self.part, self.out, self.save = part, out, save
        self.categories, self.tolerance = predictor.categories, tolerance
        self.names = [category.name for category in self.categories]
        self.labels = {category.id: label for label, category in enumerate(self.categories)}

    def write(self, picture: Predicted, pixels: Pixels) -> dict[str, list[float]]:
        """The files of one picture; the IoUs of their masks with those predicted."""
        labels = [self.labels[record["category_id"]] for record in picture.records]
        objects = list(zip(labels, picture.masks, strict=True))
        ious = {}
        for name in self.save:
            after: Found | None = None
            if name == "masks":
                plain = [self.names[label].replace("/", "_") for label in labels]
                write_masks(self._file(name, picture, ""), picture.masks, plain)
            elif name == "idmap":
                write_idmap(self.part / PLACES[name], picture, self.categories)
            elif name == "overlay":
                self._draw(self._file(name, picture, ".png"), picture, pixels)
            elif name == "yolo":
                file = self._file("yolo", picture, ".txt", "labels")
                after = write_yolo(file, picture.size, objects, self.tolerance)
            elif name == "labelme":
                file = self._file(name, picture, ".json")
                place = self._place(picture, file)
                scores = [record["score"] for record in picture.records]
                after = write_labelme(
                    file, place, picture.size, objects, self.names, self.tolerance, scores
                )
            elif name in ("polygons", "geojson"):
                write = write_polygons if name == "polygons" else write_geojson
                suffix = ".json" if name == "polygons" else ".geojson"
                file = self._file(name, picture, suffix)
                after = write(file, picture, self.categories, self.tolerance)
            if after is not None:
                ious[name] = [
                    0.0 if drawn is None else iou(mask, drawn)
                    for mask, drawn in zip(picture.masks, after, strict=True)
                    if mask.area()
                ]
        return ious

    def _file(self, name: str, picture: Predicted, suffix: str, inside: str = "") -> Path:
        file = (self.part / PLACES[name] / inside / picture.name).with_suffix(suffix)
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def _place(self, picture: Predicted, file: Path) -> str:
        """The picture as seen from its file of labels, where that will be."""
        if not os.path.isfile(picture.place):
            return picture.name
        folder = (self.out / file.relative_to(self.part)).parent
        return os.path.relpath(picture.place, folder)

    def _draw(self, file: Path, picture: Predicted, pixels: Pixels) -> None:
        from brefine.draw import overlay  # brings evaluation along: too much for a start

        overlay(pixels, picture.records, self.categories).save(file)

    def finish(self) -> Summary:
        """The files of all pictures, from the journal, which is then removed."""
        summary = Summary()
        for entry in self._entries():
            if "broken" in entry:
                summary.broken[entry["name"]] = entry["broken"]
                continue
            summary.pictures += 1
            summary.objects += len(entry["records"])
            for name, ious in entry["ious"].items():
                summary.losses.setdefault(name, Loss()).add(ious)
        whole: dict[str, Callable[[Path], None]] = {
            "coco": lambda file: write_coco(file, self._records()),
            "csv": lambda file: write_csv(file, self._pictures(), self.categories),
            "cvat": lambda file: write_cvat(file, self._pictures(), self.categories),
            "yolo": self._write_classes,
        }
        for name in self.save:
            place = self.part / PLACES[name]
            if name in whole:
                whole[name](place)
            else:
                place.mkdir(exist_ok=True)
        (self.part / JOURNAL).unlink()
        return summary

    def _write_classes(self, folder: Path) -> None:
        (folder / "labels").mkdir(parents=True, exist_ok=True)
        content = {"train": "images", "val": "images", "names": dict(enumerate(self.names))}
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        (folder / "data.yaml").write_text(text, encoding="utf-8")

    def _entries(self) -> Iterator[dict[str, Any]]:
        with (self.part / JOURNAL).open(encoding="utf-8") as journal:
            for line in journal:
                yield from json.loads(line)

    def _pictures(self) -> Iterator[Predicted]:
        for entry in self._entries():
            if "broken" not in entry:
                height, width = entry["size"]
                yield Predicted(entry["name"], entry["place"], (height, width), entry["records"])

    def _records(self) -> Iterator[dict[str, Any]]:
        for picture in self._pictures():
            yield from map(dict, picture.records)


def print_summary(summary: Summary) -> None:
    """What was done, lost and left out, for people."""
    say = partial(console.print, markup=False, soft_wrap=True, highlight=False)
    say(f"{summary.pictures} pictures, {summary.objects} objects")
    for name, loss in summary.losses.items():
        if loss.changed:
            say(
                f"{name}: {loss.changed} of {loss.masks} masks changed: IoU with those predicted "
                f"{loss.mean:.4f} on average, {loss.worst:.4f} at worst"
            )
    if summary.broken:
        say(f"{len(summary.broken)} pictures are broken and were skipped:")
        for line in summary.broken.values():
            say(f"  {line}")
