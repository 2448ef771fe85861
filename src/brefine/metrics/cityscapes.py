"""The official score of Cityscapes, computed by the package cityscapesscripts (an extra).

It differs from COCO's: no limit of detections, objects below 100 pixels ignored as groups and void
are, IoU of a detection with every object alone, and the area under the whole curve.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from brefine.data.cityscapes import LABELS, PICTURES, root_of
from brefine.data.coco import CocoSet
from brefine.progress import track
from brefine.rle import decode
from brefine.structures import InputError


def find_labels(dataset: CocoSet, limit: int | None = None) -> list[Path]:
    """The official label file of each picture.

    Args:
        dataset: read from the official folders.
        limit: only the first so many pictures.

    Raises:
        InputError: the package is not installed, this is another set, or a file is missing.
    """
    _evaluator()
    root = root_of(dataset.path)
    if root is None:
        raise InputError(f"{dataset.path}: not Cityscapes: leave out --official")
    folder = root[0] / LABELS / (root[1] or "val")
    files = []
    for picture in dataset.pictures[:limit]:
        name = Path(str(picture.id))
        stem = name.stem.removesuffix(f"_{PICTURES}")
        files.append(folder / name.parent / f"{stem}_{LABELS}_instanceIds.png")
        if not files[-1].is_file():
            raise InputError(
                f"{files[-1]}: no such file, but the official score needs it: leave out --official"
            )
    return files


def score(
    records: Sequence[Mapping[str, Any]], dataset: CocoSet, labels: Sequence[Path]
) -> dict[str, dict[str, float]]:
    """AP and AP50 by the official evaluator.

    Args:
        records: COCO results that `evaluate_records` has accepted.
        dataset: what they are about.
        labels: by `find_labels`.

    Returns:
        For each class name, and for ``""``, the mean: ``cityscapes/AP`` and ``cityscapes/AP50``,
        0..1; NaN for a class without objects.
    """
    evaluator = _evaluator()
    by_picture: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        by_picture[record["image_id"]].append(record)
    with tempfile.TemporaryDirectory() as folder:
        results = []
        pairs = list(zip(dataset.pictures, labels, strict=False))
        for number, (picture, _) in enumerate(track(pairs, "official", len(pairs))):
            place = Path(folder).resolve() / str(number)
            _write(by_picture[picture.id], picture.size, place)
            results.append(str(place / "results.txt"))
        # Its own driver would write files into the current folder and the package's.
        options = copy.copy(evaluator.args)
        options.quiet, options.predictionPath = True, str(Path(folder).resolve())
        evaluator.setInstanceLabels(options)
        files = [str(path) for path in labels]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # means of nothing
            truth = evaluator.instances2dict(files)
            matches = evaluator.matchGtWithPreds(results, files, truth, options)
            figures = evaluator.computeAverages(
                evaluator.evaluateMatches(matches, options), options
            )
    scores = {"": _named(figures["allAp"], figures["allAp50%"])}
    for name, of_class in figures["classes"].items():
        scores[name] = _named(of_class["ap"], of_class["ap50%"])
    return scores


def _named(ap: Any, ap50: Any) -> dict[str, float]:
    return {"cityscapes/AP": float(ap), "cityscapes/AP50": float(ap50)}


def _evaluator() -> ModuleType:
    """The package's module, also with a numpy that has dropped what it calls.

    Raises:
        InputError: not installed.
    """
    try:
        from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as evaluator
    except ImportError:
        raise InputError(
            "the official score of Cityscapes needs cityscapesscripts: "
            "pip install 'brefine[cityscapes]'"
        ) from None
    if not hasattr(evaluator.np, "in1d"):  # gone from numpy 2.4
        evaluator.np = SimpleNamespace(**vars(np), in1d=np.isin)
    module: ModuleType = evaluator
    return module


def _write(records: Sequence[Mapping[str, Any]], size: tuple[int, int], place: Path) -> None:
    """The results of a picture in the official form: a list, and a mask for each."""
    place.mkdir()
    lines = []
    for number, record in enumerate(records):
        window, (x, y) = decode(record["segmentation"], size).window()
        mask = np.zeros(size, dtype=np.uint8)
        mask[y : y + window.shape[0], x : x + window.shape[1]] = 255 * window.numpy()
        Image.fromarray(mask).save(place / f"{number}.png", compress_level=1)
        lines.append(f"{number}.png {record['category_id']} {record['score']!r}\n")
    (place / "results.txt").write_text("".join(lines), encoding="utf-8")
