"""How good masks of S x S cells are that are right in each cell: training targets, pasted.

    python benchmarks/quality/grid.py [--data nuclei=PATH] [--data coco=PATH] [--docs FILE]

No model: each true mask is cut to S x S in its true box as a mask head's target is, pasted back
as a prediction is, and compared with itself: the figures of a head that learnt its targets
exactly. (Values between 0 and 1 can place an edge within a cell, so it is no strict limit.) For
scale, so is the true mask without the pixels along its outline, which is a pixel off. The sets
are those to test on of study.py. The table in docs/quality.md is written anew when all are there;
nothing is stored.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from study import HERE, SETS, available, prepare, source
from table import fill

from brefine.data.coco import CocoSet
from brefine.data.pictures import network_size
from brefine.data.read import read
from brefine.files import replacing
from brefine.metrics.boundary import band_width, boundary_band, mask_iou
from brefine.metrics.mask_quality import Quality, measure, summarise
from brefine.parts.masks import crop
from brefine.progress import Progress
from brefine.structures import InputError

SIDES = (14, 28, 56, 112)
MARKERS = "<!-- grid: begin -->", "<!-- grid: end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=source, action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--docs", type=Path, default=HERE.parents[1] / "docs/quality.md")
    options = parser.parse_args()
    try:
        write(dict(options.data), options.docs)
    except InputError as error:
        parser.error(str(error))


def write(sources: dict[str, Path], docs: Path) -> None:
    """Print the table, and put it into the page if no set is left out.

    Raises:
        InputError: a PATH or the page does not hold what it must.
    """
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for name in SETS:
            if not available(name, sources):
                print(f"{name}: left out: no --data for it")
                continue
            data = prepare(name, sources, Path(place))
            sides = SETS[name]["short_side"][-1], SETS[name]["long_side"]
            rows.append(line(name, read(data["val"], data["images"]), sides))
    heads = ["set", "median side, px", "boundary IoU at 14", *map(str, SIDES[1:])]
    heads += ["large objects at 14", *map(str, SIDES[1:]), "a pixel off"]
    cells = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    table = "\n".join(f"| {' | '.join(each)} |" for each in cells)
    print(table)
    if len(rows) < len(SETS):
        print(f"{docs}: left as it is")
        return
    page = fill(docs.read_text(encoding="utf-8"), table, str(docs), MARKERS)
    with replacing(docs) as aside:
        aside.write_text(page, encoding="utf-8")


def line(name: str, dataset: CocoSet, limits: tuple[int, int]) -> list[str]:
    """Cells of a set: sides of boxes in pictures of ``limits`` (short, long side), and ceilings."""
    sides: list[float] = []
    for index, picture in enumerate(dataset.pictures):
        x1, y1, x2, y2 = dataset.target(index).boxes.T
        scale = network_size(picture.size, *limits)[0] / picture.size[0]
        sides += (scale * ((x2 - x1) * (y2 - y1)).sqrt()).tolist()
    found = [ceiling(dataset, side) for side in SIDES]
    keys = "given_boxes/boundary_iou", "given_boxes/boundary_iou_L"
    figures = [f"{100 * each[key]:.1f}" for key in keys for each in found]
    figures.append(f"{100 * summarise(thinner(dataset))[keys[0]]:.1f}")
    return [name, f"{statistics.median(sides):.0f}", *figures]


def ceiling(dataset: CocoSet, side: int) -> dict[str, float]:
    """As `evaluate.mask_quality`, of masks that are the targets of a head of ``side`` cells."""
    objects = []
    with Progress(f"{dataset.path.parent.name}, {side} x {side}", len(dataset)) as progress:
        for index in range(len(dataset)):
            target = dataset.target(index)
            if len(target) and target.masks is not None:
                every = torch.arange(len(target))
                cut = crop(target.masks, target.boxes, every, side, target.size)
                objects += measure(replace(target, logits=cut - 0.5), target)
            progress.advance(1)
    return summarise(objects)


def thinner(dataset: CocoSet) -> list[Quality]:
    """As `measure`, of masks that lack the pixels along their outline."""
    objects = []
    for index in range(len(dataset)):
        target = dataset.target(index)
        width = band_width(target.size)
        for window in target.masks.windows if target.masks is not None else []:
            true = window.numpy().astype(np.uint8)
            wide = np.pad(true, 1)
            mine = true & wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
            bands = [(boundary_band(each, width), (0, 0)) for each in (mine, true)]
            whole = mask_iou((mine, (0, 0)), (true, (0, 0)))
            objects.append((int(true.sum()), whole, mask_iou(bands[0], bands[1])))
    return objects


if __name__ == "__main__":
    main()
