"""Exported models whose convolutions compute in 8 bits: OpenVINO's, by NNCF after training.

What that costs is measured before the file is kept: average precision of the file with floats and
of the one with integers on the same labelled pictures, and the time that each takes.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brefine import weights
from brefine.data.coco import CocoSet
from brefine.data.loader import require_pictures
from brefine.evaluate import evaluate
from brefine.export import Parity, beside, check_name, export, move, quiet, save_ir
from brefine.exported import Array, Session, needs, openvino_core, prepare
from brefine.metrics.mask_quality import rows_of
from brefine.predict import Predictor
from brefine.progress import track
from brefine.sources import find_pictures, walk
from brefine.structures import InputError

MOST = 100  # pictures to calibrate on
TIMED = 10  # pictures that both files are timed on, in turns
FIGURES = {"mask/AP": "mask AP", "boundary/AP": "boundary AP", "box/AP": "box AP"}


@dataclass(frozen=True)
class Cost:
    """What 8 bits cost, and what they save.

    Attributes:
        calibrated: pictures that the ranges of values were learnt from.
        tested: pictures that the figures are from.
        before: figures of the file with floats, 0..1, by the keys of ``evaluate.Report``.
        after: the same of the one with integers.
        time: what it takes, as a share of what the other takes; median over pictures.
    """

    calibrated: int
    tested: int
    before: dict[str, float]
    after: dict[str, float]
    time: float

    def __str__(self) -> str:
        figures = ", ".join(
            f"{title} {100 * self.before[key]:.1f} -> {100 * self.after[key]:.1f}"
            for key, title in FIGURES.items()
        )
        return (
            f"{figures} on {self.tested} pictures, in {self.time:.2f} of the time; calibrated on "
            f"{self.calibrated} pictures"
        )


def export_int8(
    folder: Path | str,
    out: Path | str,
    pictures: Sequence[Path | str],
    dataset: CocoSet,
    *,
    limit: int | None = None,
) -> tuple[Parity, Cost]:
    """Write a model folder as OpenVINO's files with 8 bits, and say what these cost.

    Args:
        folder: the model.
        out: the file, ``.xml``; a ``.bin`` is written beside it.
        pictures: what to calibrate on, see ``sources.find_pictures``: pictures like those that
            the model will see, best those that it learnt from. ``MOST``, evenly spread, are used.
        dataset: other pictures, labelled, to measure the cost on.
        limit: only the first so many of them.

    Returns:
        How far the file with floats, which is made first, is from the model, and the cost.

    Raises:
        InputError: see ``export``; NNCF is not installed, the set has no objects or classes that
            the model does not know, or the model finds nothing in the pictures to calibrate on.
    """
    out = Path(out)
    check_name(out, "openvino")
    if find_spec("nncf") is None:
        raise needs("nncf", "int8")
    found = find_pictures(pictures)
    require_pictures(dataset, limit)
    rows_of(dataset, weights.load(folder))  # before minutes of exporting
    if not any(index < (limit or len(dataset)) for index in dataset.usable()):
        raise InputError(f"{dataset.path}: no object in the pictures to measure the cost on")
    with beside(out) as place:
        parity = export(folder, place / "float.xml", "openvino")
        plain = Session(place / "float.xml", torch.get_num_threads())
        batches = _choose(plain, found)
        model = _quantise(plain.path, batches)
        files = save_ir(model, place / "model.xml", plain.metadata)
        short = Session(files[0], torch.get_num_threads())
        cost = Cost(
            calibrated=len(batches),
            tested=len(dataset) if limit is None else min(limit, len(dataset)),
            before=_figures(plain.path, dataset, limit),
            after=_figures(short.path, dataset, limit),
            time=_compare_times(plain, short, batches[:TIMED]),
        )
        save_ir(model, files[0], {**plain.metadata, "int8": json.dumps(asdict(cost))})
        move(files, out)
    return parity, cost


def _choose(session: Session, found: dict[str, str]) -> list[list[Array]]:
    """Inputs of the network for pictures in which it finds something, for its mask head, too."""
    step = -(-len(found) // MOST)
    items = walk(dict(islice(found.items(), 0, None, step)), limit=MOST)
    least = np.array([session.least], dtype=np.float32)
    batches = []
    for item in track(items, "calibrate", -(-len(found) // step)):
        inputs = prepare(item.read(), session)
        if len(session(*inputs, session.least)[0]):
            batches.append([*inputs, least])
    if not batches:
        raise InputError(
            f"{next(iter(found.values()))}: the model finds nothing in the pictures to calibrate "
            "on: name others"
        )
    return batches


def _quantise(file: Path, batches: Sequence[list[Array]]) -> Any:
    """OpenVINO's model in 8 bits."""
    import nncf

    with redirect_stdout(sys.stderr), quiet():  # where all progress goes
        model = openvino_core().read_model(file)
        exact = nncf.IgnoredScope(names=_coordinates(model))
        data = nncf.Dataset(batches)
        return nncf.quantize(model, data, subset_size=len(batches), ignored_scope=exact)


def _coordinates(model: Any) -> list[str]:
    """Operations that stay exact: those that do not compute maps ``[B, C, h, w]``, nor layers.

    They compute boxes and what follows from them. Over a picture's width of 400 pixels 8 bits are
    steps of 1.6, which ends masks and boxes where they should not.
    """
    weighted = {"Convolution", "GroupConvolution", "MatMul"}
    sources = {"Constant", "Parameter", "Result"}
    return [
        each.get_friendly_name()
        for each in model.get_ops()
        if each.get_type_name() not in weighted | sources
        and any(output.get_partial_shape().rank != 4 for output in each.outputs())
    ]


def _figures(file: Path, dataset: CocoSet, limit: int | None) -> dict[str, float]:
    values = evaluate(Predictor.load(file, "cpu"), dataset, given_boxes=False, limit=limit).values
    return {key: values[key] for key in FIGURES}


def _compare_times(one: Session, other: Session, batches: Sequence[list[Array]]) -> float:
    """Time of the other as a share of that of the first."""
    shares = []
    for pixels, sizes, _ in batches:
        took = []
        for session in (one, other):
            session(pixels, sizes, session.least)  # the first run of a shape plans it
            start = time.perf_counter()
            session(pixels, sizes, session.least)
            took.append(time.perf_counter() - start)
        shares.append(took[1] / took[0])
    return statistics.median(shares)
