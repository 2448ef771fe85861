"""The demo: toy pictures, Mask R-CNN and BRefine trained alike, one table and one page."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from brefine import draw
from brefine.data import toy
from brefine.data.coco import CocoSet
from brefine.data.loader import read_picture
from brefine.evaluate import Report
from brefine.files import replacing
from brefine.metrics.tables import markdown, print_table
from brefine.parts.masks import to_records
from brefine.progress import console
from brefine.recipe import Recipe
from brefine.structures import InputError
from brefine.train import train

METHODS = {"mask_rcnn": "Mask R-CNN", "brefine": "BRefine"}
PAGE = "report.html"
MARK = "demo.txt"  # a folder with it was made by the demo, and is replaced by the next one
SAID = "Made by brefine demo; the next one replaces this folder.\n"  # in it
SHOWN = 8  # pictures in the report page
PICTURES = (300, 50)  # to learn from, to test on

#: everything that both runs share; sized for a few minutes on two cores
MODEL: dict[str, Any] = {
    "weights": "imagenet",
    "options": {
        "backbone": "tf_efficientnet_lite0",
        "channels": 64,
        "detector": {
            "frozen_stages": 1,
            "fpn_norm": "group",
            "box_hidden": 256,
            "candidates": (500, 300),
            "proposals": (200, 100),
            "mask_rois": 12,
            "detections": 50,
        },
    },
}
DATA: dict[str, Any] = {"short_side": 256, "long_side": 320, "workers": 0}
TRAIN: dict[str, Any] = {
    "steps": 200,
    "batch_size": 2,
    "optimizer": "adamw",
    "lr": 1e-3,
    "weight_decay": 0.01,
    "warmup_steps": 20,
    "schedule": "cosine",
    "clip_norm": 5.0,
}


def run(out: Path | str, *, seed: int = 0, steps: int | None = None) -> None:
    """Draw a toy set, train both methods on it, evaluate both, and write a report.

    The two runs differ in nothing but the method: trunk, data, order, steps and rates agree.

    Args:
        out: a folder; holds ``toy/``, a run folder for each method, ``results.md`` and
            ``report.html`` in the end. An earlier demo, which ``demo.txt`` tells, is replaced.
        seed: of the pictures and both runs.
        steps: of each run, if not the demo's own number.

    Raises:
        InputError: the folder holds something other than an earlier demo.
    """
    out = Path(out)
    there = {path.name for path in out.iterdir()} if out.is_dir() else set()
    ours = (out / MARK).is_file() and (out / MARK).read_text(errors="replace") == SAID
    if (out.exists() and not out.is_dir()) or there - _made() or (there and not ours):
        raise InputError(f"{out}: there is something already: choose another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    for name in _made() - {MARK}:
        if (out / name).is_dir() and not (out / name).is_symlink():
            shutil.rmtree(out / name)
        else:
            (out / name).unlink(missing_ok=True)
    (out / MARK).write_text(SAID)
    count, held_out = PICTURES
    toy.draw(out / "toy", train=count, val=held_out, seed=seed)
    length = {} if steps is None else {"steps": steps}
    for method in METHODS:
        recipe = {
            "model": {"method": method, **MODEL},
            "data": {**DATA, "train": out / "toy/train.json", "val": out / "toy/val.json"},
            "train": {**TRAIN, **length, "seed": seed},
        }
        train(Recipe.parse(recipe, "demo"), out / method)
    reports = {title: Report.load(out / method) for method, title in METHODS.items()}
    print_table(reports, console)
    with replacing(out / "results.md") as aside:
        aside.write_text(markdown(reports), encoding="utf-8")
    _write_page(out, reports, seed)
    console.print(f"pictures side by side: {out / PAGE}", soft_wrap=True)


def _made() -> set[str]:
    """Names of everything that the demo makes."""
    return {"toy", *METHODS, "results.md", PAGE, MARK}


def _write_page(out: Path, reports: dict[str, Report], seed: int) -> None:
    """The report page, with the first pictures of the validation set."""
    dataset = CocoSet(out / "toy/val.json")
    panels = []
    for index, picture in enumerate(dataset.pictures[:SHOWN]):
        found = {
            title: [
                record
                for record in report.records
                if record["image_id"] == picture.id
                and record["score"] >= report.thresholds[_label(dataset, record)]
            ]
            for title, report in reports.items()
        }
        label = to_records(dataset.target(index), picture.id, dataset.categories, picture.size)
        panels.append(draw.Panel(picture.file.name, read_picture(picture.file), label, found))
    recipe = Recipe.load(out / "brefine/recipe.yaml")
    options = recipe.model.options
    settings = {
        "trunk": f"{options['backbone']}, FPN of {options['channels']} channels",
        "start": f"{recipe.model.weights} weights",
        "training": f"{recipe.train.steps} steps of {recipe.train.batch_size} pictures",
        "pictures": f"{len(CocoSet(out / 'toy/train.json'))} to learn from, {len(dataset)} to test",
        "short side": f"{recipe.data.short_side[-1]} pixels",
        "seed": seed,
    }
    draw.report(
        out / PAGE,
        "BRefine beside Mask R-CNN",
        reports,
        panels,
        dataset.categories,
        settings=settings,
        intro="Both methods learnt from the same toy pictures, in the same order, for the same "
        "number of steps, from the same trunk. These are pictures that neither has seen.",
    )


def _label(dataset: CocoSet, record: dict[str, Any]) -> int:
    return [category.id for category in dataset.categories].index(record["category_id"])
