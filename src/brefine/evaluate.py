"""How good a model is: box, mask and Boundary AP, and mask quality given true boxes.

Everything is measured at the pictures' original size, on RLE and in box-sized windows, so memory
follows the number of objects and not the size of the pictures. Rules that decide figures:

    * AP is COCO's, as pycocotools computes it: mean over IoU 0.50, 0.55 ... 0.95 and 101 recall
      levels, at most 100 detections a picture and class, crowd regions ignored.
    * The size of a detection is its own: box area for box AP, mask area for mask and Boundary
      AP. A labelled object's size is its annotation's ``area``. Small is below 32², medium
      below 96² pixels.
    * Boundary AP (Cheng et al., CVPR 2021) takes the smaller of mask IoU and the IoU of the
      boundary bands. A band is what of the mask lies within d pixels of its outline, d being
      2 % of the picture's diagonal, rounded, at least 1; the picture's border is outline too.
    * LVIS (`CocoSet.federated`) has its own rules: at most 300 detections a picture, only
      classes that the picture was labelled for, and a detection of a class that is not labelled
      exhaustively is never wrong. ``AP_r``, ``AP_c`` and ``AP_f`` are means over the rare,
      common and frequent classes.
    * A figure for which there is no object is NaN, printed as ``-``, and enters no mean.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from brefine.data.coco import CocoSet
from brefine.data.loader import check_size
from brefine.data.lvis import FREQUENCIES
from brefine.files import replacing
from brefine.formats.records import write_coco
from brefine.metrics import cityscapes
from brefine.metrics.average_precision import MOST, MOST_FEDERATED, Tally, figures
from brefine.metrics.calibration import IDENTITY, Calibration, calibration_error, cross_fitted, fit
from brefine.metrics.mask_quality import Quality, ask, measure, rows_of, summarise
from brefine.metrics.overlaps import KINDS, compare
from brefine.metrics.shards import gather, is_first, share, tell
from brefine.metrics.thresholds import Hits, choose, quality
from brefine.parts.masks import to_records, touching
from brefine.progress import track
from brefine.structures import Category, InputError

if TYPE_CHECKING:
    from brefine.predict import Predictor


class Seen(NamedTuple):
    """What a model made of one picture."""

    records: list[dict[str, Any]] = []  # noqa: RUF012  COCO results; never written to
    objects: list[Quality] = []  # noqa: RUF012  how good the masks in true boxes are
    touching: list[bool] = []  # noqa: RUF012  for each detection: does its mask reach its RoI's edge?


@dataclass(frozen=True)
class Report:
    """What an evaluation found.

    Attributes:
        values: fractions 0..1, NaN where there is no object: ``{kind}/AP``, ``AP50``, ``AP75``,
            ``AP_S``, ``AP_M``, ``AP_L``, ``AR1``, ``AR10``, ``AR100``, ``AR_S``, ``AR_M``,
            ``AR_L`` for the kinds ``box``, ``mask`` and ``boundary``, and
            ``given_boxes/{mask_iou,boundary_iou}`` with ``_S``, ``_M``, ``_L``. Kinds that
            were not asked for are absent. LVIS has ``AP_r``, ``AP_c``, ``AP_f``, too, and
            ``AR300`` instead of the other three. Also ``threshold/{F1,precision,recall}`` at
            ``overall``, and ``calibration/error`` of the scores as they are and
            ``calibration/error_mapped`` of probabilities that maps give which were fitted on the
            other half of the pictures.
        per_class: the same keys for each class name, without ``calibration``; and ``threshold``,
            at which ``threshold/F1`` and its like are, and ``objects``.
        records: the COCO results evaluated.
        thresholds: per label the score from which on to keep detections, see
            ``metrics.thresholds``.
        overall: the same for all labels together.
        calibration: from the records' scores to probabilities.
    """

    values: dict[str, float]
    per_class: dict[str, dict[str, float]]
    records: list[dict[str, Any]]
    thresholds: list[float]
    overall: float = 0.5
    calibration: Calibration = IDENTITY

    def scoring(self) -> dict[str, Any]:
        """What a model folder keeps: arguments of `weights.save` and `weights.store`.

        Thresholds become probabilities, which is what `predict` compares them with.
        """
        return {
            "thresholds": self.calibration(self.thresholds).tolist(),
            "overall": float(self.calibration(self.overall)),
            "calibration": self.calibration,
            "scores": self.values,
        }

    def as_dict(self) -> dict[str, Any]:
        """Everything but the records, ready for JSON: NaN becomes None."""

        def plain(values: Mapping[str, float]) -> dict[str, float | None]:
            return {key: None if math.isnan(v) else v for key, v in values.items()}

        return {
            "values": plain(self.values),
            "per_class": {name: plain(values) for name, values in self.per_class.items()},
            "thresholds": self.thresholds,
            "overall": self.overall,
            "calibration": self.calibration.as_dict(),
        }

    def save(self, folder: Path) -> None:
        """Write ``evaluation.json`` and ``predictions.json`` (the records) into a folder."""
        with replacing(folder / "evaluation.json") as aside:
            aside.write_text(json.dumps(self.as_dict()), encoding="utf-8")
        write_coco(folder / "predictions.json", self.records)

    @classmethod
    def load(cls, folder: Path) -> Report:
        """Read what ``save`` wrote."""
        figures = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        records = json.loads((folder / "predictions.json").read_text(encoding="utf-8"))

        def whole(values: Mapping[str, float | None]) -> dict[str, float]:
            return {key: math.nan if v is None else v for key, v in values.items()}

        per_class = {name: whole(values) for name, values in figures["per_class"].items()}
        return cls(
            whole(figures["values"]),
            per_class,
            records,
            figures["thresholds"],
            figures["overall"],
            Calibration.parse(figures["calibration"]),
        )


def evaluate(
    predictor: Predictor,
    dataset: CocoSet,
    *,
    given_boxes: bool = True,
    boundary: bool = True,
    progress: bool = True,
    limit: int | None = None,
) -> Report:
    """Run a model over a data set and score it.

    Args:
        predictor: the model; its thresholds are not used, every detection counts.
        dataset: pictures and labels.
        given_boxes: also measure the masks it makes for the true boxes (`mask_quality`).
        boundary: also compute Boundary AP.
        progress: show a bar with an ETA on stderr.
        limit: only the first so many pictures.

    Detections of classes that the data set does not know are left out. Under torch.distributed
    every process must call this: each looks at its share of the pictures, the first scores what
    all have found, and all get the report that one process would have got; but the records, which
    may be gigabytes, only the first.

    Raises:
        InputError: the model does not know a class of the data set, or a picture cannot be
            read or is not of the size its label says.
    """
    seen = look(predictor, dataset, given_boxes=given_boxes, progress=progress, limit=limit)
    if not is_first():
        return tell(Report({}, {}, [], []))
    found = [record for each in seen for record in each.records]
    report = _score(found, dataset, boundary=boundary, progress=progress, limit=limit)
    if given_boxes:
        report.values.update(summarise([one for each in seen for one in each.objects]))
    edge = [one for each in seen for one in each.touching]
    report.values["masks/touching"] = sum(edge) / len(edge) if edge else math.nan
    tell(replace(report, records=[]))
    return report


def look(
    predictor: Predictor,
    dataset: CocoSet,
    *,
    given_boxes: bool = True,
    progress: bool = True,
    limit: int | None = None,
) -> list[Seen]:
    """What a model finds in each picture, in the first process; arguments as in `evaluate`.

    Raises:
        InputError: as there.
    """
    rows = rows_of(dataset, predictor)
    known = {category.id for category in dataset.categories}

    def look_at(index: int) -> Seen:
        picture = dataset.pictures[index]
        asked = ask(dataset.target(index), rows) if given_boxes else None
        if asked:
            found, filled = predictor.both(picture.file, asked)
        else:
            found = predictor.detect(picture.file, threshold=0.0)
        check_size(dataset, index, found.size)
        records = to_records(found, picture.id, predictor.categories, found.size)
        edge = touching(found, records).tolist()
        records = [record for record in records if record["category_id"] in known]
        objects = measure(filled, asked) if asked else []
        return Seen(records, objects, edge)

    return _run(look_at, dataset, limit, "evaluate" if progress else None)


def evaluate_records(
    records: Iterable[Mapping[str, Any]],
    dataset: CocoSet,
    *,
    boundary: bool = True,
    progress: bool = False,
    limit: int | None = None,
) -> Report:
    """Score COCO results, of this or any other system.

    Args:
        records: results with ``image_id``, ``category_id``, ``score``, ``segmentation`` (RLE)
            and maybe ``bbox``; without it the box around the mask is taken.
        dataset: pictures and labels.
        boundary: also compute Boundary AP.
        progress: show a bar with an ETA on stderr.
        limit: only the first so many pictures.

    Raises:
        InputError: a record is not right; names its number and the key.
    """
    return _score(records, dataset, boundary=boundary, progress=progress, limit=limit)


def mask_quality(
    predictor: Predictor, dataset: CocoSet, *, progress: bool = True, limit: int | None = None
) -> dict[str, float]:
    """Quality of the masks alone: what the mask head makes of the true boxes and labels.

    Args:
        predictor: the model.
        dataset: pictures and labels; crowd regions do not take part.
        progress: show a bar with an ETA on stderr.
        limit: only the first so many pictures.

    Returns:
        ``given_boxes/mask_iou`` and ``given_boxes/boundary_iou``, means over objects, 0..1;
        with ``_S``, ``_M``, ``_L`` for objects of that size (pixels of the true mask); NaN
        where there is no object. Boundary IoU is that of the bands alone.

    Raises:
        InputError: as in `evaluate`.
    """
    rows = rows_of(dataset, predictor)

    def look(index: int) -> Seen:
        asked = ask(dataset.target(index), rows)
        if not asked:
            return Seen()
        filled = predictor.given(dataset.pictures[index].file, asked)
        return Seen(objects=measure(filled, asked))

    seen = _run(look, dataset, limit, "masks in true boxes" if progress else None)
    return tell(summarise([one for each in seen for one in each.objects]))


def evaluate_paths(
    paths: Sequence[Path],
    dataset: CocoSet,
    *,
    detected: bool = True,
    given_boxes: bool = True,
    boundary: bool = True,
    official: bool = False,
    store: bool = False,
    limit: int | None = None,
) -> dict[str, Report]:
    """A report for each model folder and each file of COCO results (json), by its path.

    Args:
        paths: folders and files.
        dataset: pictures and labels.
        detected: average precision.
        given_boxes: of models, also the quality of the masks in true boxes.
        boundary: also compute Boundary AP.
        official: also compute the official score of Cityscapes.
        store: write thresholds and calibration, as learnt from this set, into the model folders.
        limit: only the first so many pictures.

    Raises:
        InputError: no model, no results, or as in `evaluate` and `evaluate_records`. What cannot
            be read is told before anything is computed.
    """
    from brefine.predict import Predictor
    from brefine.weights import locate

    opened = {str(path): open_path(path) for path in paths}
    for name, source in opened.items():
        if store and not (detected and isinstance(source, Predictor)):
            raise InputError(f"{name}: only what a model detects says which thresholds to store")
        if store and isinstance(source, Predictor):
            if source.exported:
                raise InputError(f"{name}: an exported file can store nothing: name a folder")
            if not Path(name).exists():
                raise InputError(
                    f"{name}: comes with the package, where nothing is stored: copy "
                    f"{locate(name)} and name the copy"
                )
            if not os.access(name, os.W_OK):
                raise InputError(f"{name}: cannot write there: copy the folder and name the copy")
            source.calibration = IDENTITY  # the new one is of the scores as the model gives them
    labels = cityscapes.find_labels(dataset, limit) if official and detected else []
    reports = {}
    for name, source in opened.items():
        if isinstance(source, Predictor) and detected:
            reports[name] = evaluate(
                source, dataset, given_boxes=given_boxes, boundary=boundary, limit=limit
            )
        elif isinstance(source, Predictor):
            reports[name] = Report(mask_quality(source, dataset, limit=limit), {}, [], [])
        elif not detected:
            raise InputError(f"{name}: results have no masks for true boxes: name a model folder")
        else:
            try:
                reports[name] = evaluate_records(
                    source, dataset, boundary=boundary, progress=True, limit=limit
                )
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
        if labels:
            found = reports[name].records
            scores = tell(cityscapes.score(found, dataset, labels) if is_first() else {})
            reports[name].values.update(scores.pop(""))
            for label, of_class in scores.items():
                reports[name].per_class[label].update(of_class)
        if store and isinstance(source, Predictor) and is_first():
            _store(Path(name), source, dataset, reports[name])
    return reports


def _store(folder: Path, predictor: Predictor, dataset: CocoSet, report: Report) -> None:
    """Write into a model folder what a report says of its scores."""
    from brefine import weights

    learnt = report.scoring()
    by_class = dict(zip(dataset.categories, learnt["thresholds"], strict=True))
    learnt["thresholds"] = [by_class.get(c, learnt["overall"]) for c in predictor.categories]
    weights.store(folder, **learnt)


def open_path(path: Path) -> Predictor | list[dict[str, Any]]:
    """A model folder or an exported file, or the COCO results in a file."""
    from brefine.exported import is_exported
    from brefine.predict import Predictor

    if is_exported(path) or (path.suffix.lower() != ".json" and not path.is_file()):
        return Predictor.load(path)
    try:
        records = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: no COCO results, which are a json: {error}") from None
    if not isinstance(records, list) or not all(isinstance(entry, dict) for entry in records):
        raise InputError(f"{path}: COCO results are a list of objects, this is something else")
    return records


def _run(
    look: Callable[[int], Seen], dataset: CocoSet, limit: int | None, title: str | None
) -> list[Seen]:
    """What there is to see in each picture, in order, for the first of the processes at work."""
    mine = share(range(len(dataset))[:limit])
    steps = track(mine, title, len(mine)) if title and mine and is_first() else mine
    seen, fault = {}, None
    try:
        for index in steps:
            seen[index] = look(index)
    except InputError as error:
        fault = error
    return list(gather(seen, fault).values())


def _score(
    records: Iterable[Mapping[str, Any]],
    dataset: CocoSet,
    *,
    boundary: bool,
    progress: bool,
    limit: int | None,
) -> Report:
    kinds = KINDS if boundary else ("box", "mask")
    given = [dict(record) for record in records]
    federated = dataset.federated
    tally = Tally(len(dataset.categories), kinds, MOST_FEDERATED if federated else MOST)
    frequency = np.array(federated.frequency if federated else [])
    parts: list[Hits] = []
    shown = progress and is_first()
    for overlaps in compare(given, dataset, kinds=kinds, limit=limit, progress=shown):
        tally.add(overlaps)
        parts.append(Hits.of(overlaps))

    names = _names(dataset.categories)
    values: dict[str, float] = {}
    per_class: dict[str, dict[str, float]] = {name: {} for name in names}
    for kind, curves in tally.curves().items():
        values.update({f"{kind}/{key}": value for key, value in figures(curves).items()})
        for letter in FREQUENCIES if federated else ():
            values[f"{kind}/AP_{letter}"] = figures(curves, frequency == letter)["AP"]
        for i, name in enumerate(names):
            of_class = figures(curves, slice(i, i + 1))
            per_class[name].update({f"{kind}/{key}": value for key, value in of_class.items()})
    hits = Hits.join(parts)
    thresholds, overall = choose(hits, len(names))
    counts = tally.objects[:, 0].tolist()
    at_best = quality(hits.scores, hits.right, sum(counts), overall)
    values |= {f"threshold/{key}": value for key, value in at_best.items()}
    for i, name in enumerate(names):
        mine = hits.labels == i
        at_best = quality(hits.scores[mine], hits.right[mine], counts[i], thresholds[i])
        per_class[name] |= {f"threshold/{key}": value for key, value in at_best.items()}
        per_class[name].update(threshold=thresholds[i], objects=counts[i])
    told = {"error": hits.scores, "error_mapped": cross_fitted(hits)}
    for key, scores in told.items():
        error = calibration_error(scores, hits.right) if sum(counts) else math.nan
        values[f"calibration/{key}"] = error
    return Report(values, per_class, given, thresholds, overall, fit(hits.scores, hits.right))


def _names(categories: Sequence[Category]) -> list[str]:
    """Class names; one that is there twice gets its id."""
    count = Counter(category.name for category in categories)
    return [c.name if count[c.name] == 1 else f"{c.name} ({c.id})" for c in categories]
