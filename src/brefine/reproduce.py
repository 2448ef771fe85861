"""The paper's tables, run: rows are recipes, trained and evaluated one after the other.

A row's result is one json: its figures, what it was trained with and how long it took. A row that
has one is not run again, and one that was interrupted goes on from its checkpoint.

``TABLES`` holds the paper's own figures, to be shown beside ours. At small scale, with a small
trunk, fewer pictures and fewer steps, they would not compare: there only differences between rows
are shown.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from html import escape
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table as RichTable
from torch import distributed

from brefine import processes
from brefine.checkpoints import changes
from brefine.data.convert import coco_content, name_pictures
from brefine.data.read import read
from brefine.evaluate import Report
from brefine.files import replacing
from brefine.methods import METHODS
from brefine.metrics.tables import COLUMNS
from brefine.progress import console
from brefine.recipe import Recipe
from brefine.structures import InputError, Stopped
from brefine.train import train

Result = dict[str, Any]
Figures = Mapping[str, float | None]  # percent, by key of ``metrics.tables.COLUMNS``


class Row(NamedTuple):
    """A row of a table: a recipe, and the figures that the paper prints: all, the first or none."""

    title: str
    recipe: str
    paper: tuple[float, ...] = ()


class Table(NamedTuple):
    """A table of the paper.

    Attributes:
        title: what it shows.
        rows: in the paper's order.
        pairs: differences of interest, as numbers of rows: the first minus the second.
        columns: of the rows' figures.
    """

    title: str
    rows: Sequence[Row]
    pairs: Sequence[tuple[int, int]]
    columns: Sequence[str] = ("mask/AP", "mask/AP_S", "mask/AP_M", "mask/AP_L", "box/AP")


_FULL = (37.8, 20.8, 40.9, 52.4, 40.4)  # BRefine, R50, 1x: in five of the tables
_RS = (37.3, 20.5, 40.2, 51.4, 39.9)
TABLES = {
    "table1": Table(
        "Table 1: BRefine and Mask R-CNN on COCO",
        [
            Row("Mask R-CNN, R50, 1x", "mask_rcnn_r50_1x", (34.8, 18.7, 37.9, 47.4, 38.3)),
            Row("BRefine, R50, 1x", "brefine_r50_1x", _FULL),
            Row("Mask R-CNN, R50, 2x", "mask_rcnn_r50_2x", (35.5, 18.9, 38.9, 48.5, 38.8)),
            Row("BRefine, R50, 2x", "brefine_r50_2x", (38.4, 21.3, 41.7, 53.4, 40.9)),
            Row("Mask R-CNN, R101, 1x", "mask_rcnn_r101_1x", (36.2, 19.1, 40.0, 49.5, 40.1)),
            Row("BRefine, R101, 1x", "brefine_r101_1x", (39.1, 21.6, 43.1, 54.6, 42.2)),
            Row("Mask R-CNN, R101, 2x", "mask_rcnn_r101_2x", (36.7, 19.6, 40.6, 51.5, 40.2)),
            Row("BRefine, R101, 2x", "brefine_r101_2x", (39.6, 21.9, 43.7, 56.4, 42.5)),
        ],
        [(1, 0), (3, 2), (5, 4), (7, 6)],
    ),
    "table2": Table(
        "Table 2: other methods on COCO, those that are here",
        [
            Row("Mask R-CNN, R50", "mask_rcnn_r50_1x", (34.8, 18.7, 37.9, 47.4, 38.3)),
            Row("Mask Scoring, R50", "mask_scoring_r50_1x", (36.0, 18.5, 39.1, 49.9, 38.1)),
            Row("HTC, R50", "htc_r50_1x", (37.3, 19.4, 40.2, 51.3, 41.9)),
            Row("Cascade Mask R-CNN, R50", "cascade_r50_1x", (35.9, 19.4, 38.6, 49.5, 41.2)),
            Row("PointRend, R50", "pointrend_r50_1x", (36.2, 19.9, 39.2, 48.7, 38.4)),
            Row("YOLACT, R50", "yolact_r50", (28.9, 11.3, 32.5, 43.4, 31.2)),
            Row("SOLO, R50", "solo_r50_1x", (33.1, 12.2, 36.1, 50.8)),
            Row("BMask, R50", "bmask_r50_1x", (36.1, 19.1, 40.8, 50.9)),
            Row("BlendMask, R50", "blendmask_r50_1x", (34.5, 18.2, 36.4, 47.0)),
            Row("BRefine, R50", "brefine_r50_1x", _FULL),
            Row("Mask R-CNN, R101", "mask_rcnn_r101_1x", (36.2, 19.1, 40.0, 49.5, 40.1)),
            Row("Mask Scoring, R101", "mask_scoring_r101_1x", (37.7, 19.8, 41.4, 52.3, 40.4)),
            Row("HTC, R101", "htc_r101_1x", (39.6, 21.3, 42.9, 55.0, 44.8)),
            Row("Cascade Mask R-CNN, R101", "cascade_r101_1x", (37.3, 19.7, 40.6, 51.5, 42.9)),
            Row("YOLACT, R101", "yolact_r101", (30.4, 12.0, 33.9, 46.2, 33.1)),
            Row("BRefine, R101", "brefine_r101_1x", (39.1, 21.6, 43.1, 54.6, 42.2)),
        ],
        [*((9, other) for other in range(9)), *((15, other) for other in range(10, 15))],
    ),
    "table3": Table(
        "Table 3: stages of the mask head",
        [
            Row("1 stage", "brefine_stages1_r50_1x", (36.5, 19.8, 38.4, 48.1, 39.9)),
            Row("2 stages", "brefine_stages2_r50_1x", (37.0, 20.2, 39.5, 49.8, 40.1)),
            Row("3 stages", "brefine_stages3_r50_1x", _FULL),
        ],
        [(1, 0), (2, 0)],
    ),
    "table4": Table(
        "Table 4: the residual-aware module",
        [
            Row("1 convolution", "brefine_context1_r50_1x", (36.2, 19.4, 38.4, 49.1, 39.8)),
            Row("2 convolutions", "brefine_context2_r50_1x", (36.7, 19.8, 39.2, 50.2, 40.0)),
            Row("3 convolutions", "brefine_context3_r50_1x", (37.1, 20.2, 39.9, 51.1, 40.2)),
            Row("3 convolutions + residual", "brefine_r50_1x", _FULL),
        ],
        [(1, 0), (2, 0), (3, 0)],
    ),
    "table5": Table(
        "Table 5: ranking and mask losses",
        [
            Row("Multistage", "multistage_r50_1x", (35.4, 16.2, 38.0, 52.0, 38.6)),
            Row("Dice", "multistage_dice_r50_1x", (35.7, 16.5, 38.7, 51.7, 38.7)),
            Row("Focal", "multistage_focal_r50_1x", (35.8, 16.7, 38.9, 51.9, 38.7)),
            Row("CE + Dice", "multistage_ce_dice_r50_1x", (36.0, 16.9, 38.9, 51.8, 38.9)),
            Row("RS + multistage", "multistage_rs_r50_1x", _RS),
            Row("RS Mask R-CNN", "rs_mask_rcnn_r50_1x"),
        ],
        [(1, 0), (2, 0), (3, 0), (4, 0), (4, 5)],
    ),
    "table6": Table(
        "Table 6: boundary region loss",
        [
            Row("Multistage RS", "multistage_rs_r50_1x", _RS),
            Row("BRefine", "brefine_r50_1x", _FULL),
        ],
        [(1, 0)],
    ),
    "table7": Table(
        "Table 7: LVIS v1",
        [
            Row("Mask R-CNN", "mask_rcnn_lvis_r50_1x", (21.7, 9.6, 20.9, 27.9, 22.5)),
            Row("BRefine", "brefine_lvis_r50_1x", (25.9, 18.2, 25.2, 30.8, 26.5)),
        ],
        [(1, 0)],
        ("mask/AP", "mask/AP_r", "mask/AP_c", "mask/AP_f", "box/AP"),
    ),
    "table8": Table(
        "Table 8: Cityscapes",
        [
            Row("Mask R-CNN", "mask_rcnn_cityscapes_r50", (36.5, 12.7, 33.2, 57.2, 40.9)),
            Row("BRefine", "brefine_cityscapes_r50", (40.0, 14.1, 37.3, 63.9, 44.3)),
        ],
        [(1, 0)],
    ),
    "figure1": Table(
        "Figure 1: the mask head pools from P2 alone, or from all levels",
        [
            Row("P2, R50", "mask_rcnn_p2_r50_1x"),
            Row("all levels, R50", "mask_rcnn_r50_1x"),
            Row("P2, R101", "mask_rcnn_p2_r101_1x"),
            Row("all levels, R101", "mask_rcnn_r101_1x"),
        ],
        [(0, 1), (2, 3)],
    ),
    "figure2": Table(
        "Figure 2: cells into and out of Mask R-CNN's mask head",
        [
            Row("14-14", "mask_rcnn_14_14_r50_1x"),
            Row("14-28", "mask_rcnn_r50_1x"),
            Row("28-28", "mask_rcnn_28_28_r50_1x"),
            Row("28-56", "mask_rcnn_28_56_r50_1x"),
        ],
        [(0, 1), (2, 1), (3, 1)],
    ),
}
#: folders that the recipes look for in ``data``
SETS = ("coco", "lvis", "cityscapes")
#: shown as well, for which the paper has no figures
MORE = ("boundary/AP", "given_boxes/mask_iou", "given_boxes/boundary_iou")

#: options of the paper's recipes that small scale leaves out: what they do there has not been
#: measured, and stored results are without them
FULL = ("rpn_low_quality", "rpn_delta_weights")
#: a trunk, heads and schedule for a machine without a GPU; the same for every method
SMALL: dict[str, dict[str, Any]] = {
    "options": {"backbone": "tf_efficientnet_lite0", "channels": 64},
    "detector": {
        "frozen_stages": 2,
        "fpn_norm": "group",
        "box_hidden": 256,
        "candidates": (500, 300),
        "proposals": (200, 100),
        "mask_rois": 24,
        # Ranking losses go to 0 on small data, and the paper's balance takes the masks along.
        "balance_floor": 0.2,
    },
    "data": {"short_side": (224, 288, 256), "long_side": 384, "workers": 0},
    "train": {
        "epochs": None,
        "steps": 600,
        "batch_size": 2,
        "optimizer": "adamw",
        "lr": 1e-3,
        "lr_reference_batch": None,
        "weight_decay": 0.01,
        "warmup_steps": 50,
        "schedule": "cosine",
        "milestones": (8, 11),  # of no use to cosine: alike, so that equal rows are seen to be
        "clip_norm": 5.0,
        "validate_every": None,
    },
}
#: pictures to learn from and to test on at small scale, at most
PICTURES = (400, 100)


def reproduce(
    name: str, data: Path, out: Path, *, small: bool = False, settings: Sequence[str] = ()
) -> None:
    """Run the rows of a table that have no result yet, and write and print the table.

    Several processes (GPUs, machines) train each row together; the first one writes and prints.

    Args:
        name: a key of ``TABLES``.
        data: the folder that holds ``coco``, ``lvis`` or ``cityscapes``, or that one itself; at
            small scale also a folder with ``train.json`` and ``val.json``, or any that `read`
            takes.
        out: gets ``NAME.md``, ``.csv`` and ``.svg``, ``results`` and ``runs``. Tables may share
            it, and then share the rows that they have in common.
        small: a small trunk, fewer pictures and steps (``SMALL``, ``PICTURES``).
        settings: as `Recipe.with_settings`, for every row.

    Raises:
        InputError: as `recipes_of`, ``out`` has rows of other settings or a table of somebody
            else, or as ``train``.
        Stopped: by a signal, or because another process has gone: the same call goes on.
    """
    recipes = recipes_of(name, data, out, small=small, settings=settings)
    table, first = TABLES[name], processes.is_first()
    _require_own(table, out / name)
    results: list[Result] = []
    for row, recipe in zip(table.rows, recipes, strict=True):
        console.rule(f"{name}, row {len(results) + 1} of {len(recipes)}: {row.title}")
        # At small scale rows may be the same: then one of them is trained.
        same = table.rows[recipes.index(recipe)].recipe
        results.append(run(same, recipe, runs=out / "runs", results=out / "results"))
        if first:
            write(table, results, out / name, small=small)
    if first:
        print_rows(table, results, small=small)


def find_table(name: str) -> Table:
    """A table of ``TABLES``.

    Raises:
        InputError: there is none of that name.
    """
    if name not in TABLES:
        raise InputError(f"no table {name!r}: choose one of {', '.join(TABLES)}")
    return TABLES[name]


def recipes_of(
    name: str, data: Path, out: Path, *, small: bool = False, settings: Sequence[str] = ()
) -> list[Recipe]:
    """The recipes of a table's rows, whose data is there; arguments as `reproduce`'s.

    At small scale the pictures are chosen here: their labels are written to ``out/data``.

    Raises:
        InputError: no such table, the data is not there, or a setting is wrong.
    """
    table = find_table(name)
    if not data.exists():
        raise InputError(f"--data {data}: not there")
    recipes = [Recipe.load(recipes_folder() / f"{row.recipe}.yaml") for row in table.rows]
    if small:
        for recipe in recipes:  # mistakes come out before anything is written
            shrink(recipe, {}).with_settings(settings)
        sections = _small_data(recipes[0], data, out)
        recipes = [shrink(recipe, sections) for recipe in recipes]
    else:
        recipes = [locate(recipe, data) for recipe in recipes]
    recipes = [recipe.with_settings(settings) for recipe in recipes]
    if any(recipe.train.batch_size == "auto" for recipe in recipes):
        raise InputError("train.batch_size: auto: rows would differ by machine: give a number")
    for recipe in recipes:
        given = recipe.data
        for path in (given.train, given.val, given.images, given.val_images):
            if path is not None and not path.exists():
                raise InputError(
                    f"{path}: not there: --data must hold {' or '.join(SETS)}, or be one of these "
                    f"itself, laid out as docs/quality.md says; {name} needs it"
                )
    return recipes


def recipes_folder() -> Path:
    """Where the recipes are: inside the installed package, or at the top of its repository."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"


def locate(recipe: Recipe, data: Path) -> Recipe:
    """A recipe whose ``data/coco``, ``data/lvis`` or ``data/cityscapes`` is elsewhere.

    Args:
        recipe: with paths as shipped.
        data: takes the place of ``data``, or of the folder inside if it holds no such folder.
    """
    values = recipe.model_dump()
    for key in ("train", "val", "images", "val_images"):
        if values["data"][key] is not None:
            _, name, *rest = values["data"][key].parts
            inside = name not in SETS or (data / name).is_dir()
            root = data / name if inside else data
            values["data"][key] = root.joinpath(*rest)
    return Recipe.parse(values, str(data))


def _small_data(recipe: Recipe, data: Path, out: Path) -> dict[str, Any]:
    """Paths of a data section at small scale: some pictures of the set, in ``out/data``."""
    given = locate(recipe, data).data
    places: dict[str, tuple[Path, Path | None]] = {"train": (data, None), "val": (data, None)}
    if (data / "train.json").is_file():
        places = {split: (data / f"{split}.json", None) for split in places}
    elif given.train is not None and given.val is not None and given.train.exists():
        places = {
            "train": (given.train, given.images),
            "val": (given.val, given.val_images or given.images),
        }
    paths: dict[str, Any] = {}
    for (split, (path, images)), most in zip(places.items(), PICTURES, strict=True):
        file = out / "data" / f"{split}.json"
        dataset = read(path, images, split=split, quiet=True)
        folder, names = name_pictures(dataset, images, as_written=True)
        content = coco_content(dataset, names)
        count = min(most, len(dataset))
        chosen = [content["images"][i * len(dataset) // count] for i in range(count)]
        shown = {image["id"] for image in chosen}
        marks = [each for each in content["annotations"] if each["image_id"] in shown]
        text = json.dumps({**content, "images": chosen, "annotations": marks})
        if file.is_file() and file.read_text(encoding="utf-8") != text:
            raise InputError(f"{file}: from another set than {path}: choose another --out")
        with replacing(file) as aside:
            aside.write_text(text, encoding="utf-8")
        paths |= {split: file, "images" if split == "train" else "val_images": folder}
    return paths


def shrink(recipe: Recipe, data: Mapping[str, Any]) -> Recipe:
    """A recipe as it is with a small trunk, few steps and other data.

    Args:
        recipe: its method and the options that ``SMALL`` does not name stay.
        data: paths, and values of the data section that differ from ``SMALL``.
    """
    values = recipe.model_dump()
    options = values["model"]["options"]
    small = known_to(recipe.model.method, SMALL["detector"])
    detector = {**dict(options.get("detector", {})), **small}
    for key in FULL:
        detector.pop(key, None)
    options.update(SMALL["options"], detector=detector)
    paths = dict.fromkeys(("train", "val", "images", "val_images"))
    values["data"].update({**paths, **SMALL["data"], **data})
    values["train"].update(SMALL["train"])
    return Recipe.parse(values, "small scale")


def known_to(method: str, detector: Mapping[str, Any]) -> dict[str, Any]:
    """Of options of a detector those that a method's has; one-stage methods have fewer."""
    known = signature(METHODS[method]).parameters["detector"].default
    return {key: value for key, value in detector.items() if hasattr(known, key)}


def run(
    name: str, recipe: Recipe, *, runs: Path, results: Path, commit: str | None = None
) -> Result:
    """Train and evaluate a row, or read the result that it has.

    Args:
        name: of the row.
        recipe: data included; ``data.val`` is what it is evaluated on.
        runs: the run folder is made in here, or gone on with.
        results: folder of the ``NAME.json`` with ``values`` (fractions, see ``Report``),
            ``recipe``, ``versions``, ``seconds`` and so on.
        commit: of the code, to be written down.

    Raises:
        InputError: the result or the run folder is there, but of another recipe; or as ``train``.
    """
    file, folder = results / f"{name}.json", runs / name
    settings = _settings(recipe)
    if file.is_file():
        try:
            result: Result = json.loads(file.read_text(encoding="utf-8"))
            before, _ = result["recipe"], result["values"]
        except (ValueError, TypeError, KeyError):
            raise InputError(f"{file}: damaged: remove it, and the row is run again") from None
        # parsed, so that an option which is younger than the result has its default in both
        _require_same(_settings(Recipe.parse(before, str(file))), settings, file)
        return result
    begun = folder / "recipe.yaml"
    if begun.is_file():
        _require_same(_settings(Recipe.load(begun)), settings, folder)
    resumed = any((folder / "checkpoints").glob("step_*"))
    wall, cpu = time.monotonic(), time.process_time()
    try:
        train(recipe, folder, resume="auto")
    except Stopped as stopped:
        said = str(stopped).replace(processes.GO_ON, "the same command goes on")
        raise Stopped(said) from None
    values = Report.load(folder).values
    result = {
        "name": name,
        "values": {key: None if math.isnan(value) else value for key, value in values.items()},
        "recipe": settings,
        "versions": json.loads((folder / "versions.json").read_text(encoding="utf-8")),
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "seconds": round(time.monotonic() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "resumed": resumed,  # then the seconds are those since
    }
    if processes.is_first():
        with replacing(file) as aside:
            aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if distributed.is_initialized():
        distributed.barrier()  # or others would not find the result that another row shares
    return result


def _require_same(was: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    """Refuse a result or run of another recipe; the number of workers may differ."""
    differ = changes(was, now)
    differ.pop("data.workers", None)
    for key, (old, new) in differ.items():
        raise InputError(
            f"{where}: of other settings: {key} was {old} and is {new}: remove it, or choose "
            "another folder"
        )


def _settings(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain values, without paths: those are of one machine."""
    values: dict[str, Any] = recipe.model_dump(mode="json")
    for key in ("train", "val", "images", "val_images"):
        path = values["data"].pop(key)
        if path is not None and key in ("train", "val"):
            values["data"][key] = "/".join(Path(path).parts[-2:])
    if recipe.model.weights not in ("none", "imagenet"):
        values["model"]["weights"] = "/".join(Path(recipe.model.weights).parts[-2:])
    return values


def figures_of(result: Result, keys: Sequence[str]) -> dict[str, float | None]:
    """Figures of a result in percent; None where there is no object."""
    found = {key: result["values"].get(key) for key in keys}
    return {key: None if value is None else 100 * value for key, value in found.items()}


def lines_of(
    table: Table, results: Sequence[Result], *, small: bool
) -> list[tuple[str, str, Figures]]:
    """The lines of a table so far: title, ``here`` or ``paper``, figures in percent.

    Rows first, then their differences. At small scale the paper's rows are left out.
    """
    keys = [*table.columns, *MORE]
    ours = [figures_of(result, keys) for result in results]
    paper: list[Figures] = [dict(zip(table.columns, row.paper, strict=False)) for row in table.rows]
    lines: list[tuple[str, str, Figures]] = []
    for row, mine, printed in zip(table.rows, ours, paper, strict=False):
        lines.append((row.title, "here", mine))
        if printed and not small:
            lines.append((row.title, "paper", printed))
    for one, other in table.pairs:
        if max(one, other) >= len(ours):
            continue
        title = f"{table.rows[one].title} - {table.rows[other].title}"
        lines.append((title, "here", subtract(ours[one], ours[other])))
        if paper[one] and paper[other]:
            lines.append((title, "paper", subtract(paper[one], paper[other])))
    return lines


def subtract(one: Figures, other: Figures) -> dict[str, float | None]:
    """Differences of the figures that both have; None where one is None."""
    found: dict[str, float | None] = {}
    for key in one.keys() & other.keys():
        a, b = one[key], other[key]
        found[key] = None if a is None or b is None else a - b
    return found


def header(table: Table, results: Sequence[Result], *, small: bool) -> str:
    """What the reader of a table has to know."""
    if not small:
        return f"{table.title}. Percent; lines of the paper beside ours."
    recipe = results[0]["recipe"]
    trunk, training = recipe["model"]["options"]["backbone"], recipe["train"]
    long = f"{training['steps']} steps" if training["steps"] else f"{training['epochs']} epochs"
    return (
        f"{table.title}, at small scale: not the paper's setting. Every row has the trunk {trunk}, "
        f"{long} of {training['batch_size']} and at most {PICTURES[0]} "
        "pictures, so that rows which the paper tells apart by trunk or schedule are one and the "
        "same here. Of the paper only differences between rows are shown, and those are of its own "
        "scale. Percent."
    )


def _cell(value: float | None, signed: bool) -> str:
    return "-" if value is None else f"{value:+.1f}" if signed else f"{value:.1f}"


def _cells(table: Table, results: Sequence[Result], *, small: bool) -> list[list[str]]:
    """The table as text, heads first."""
    keys = [*table.columns, *MORE]
    text = [["row", "from", *(COLUMNS[key] for key in keys)]]
    for title, source, figures in lines_of(table, results, small=small):
        signed = " - " in title
        values = [_cell(figures[key], signed) if key in figures else "" for key in keys]
        text.append([title, source, *values])
    return text


def print_rows(table: Table, results: Sequence[Result], *, small: bool) -> None:
    """Print the table to stdout, and what it means to stderr."""
    console.print(header(table, results, small=small), markup=False)
    heads, *rows = _cells(table, results, small=small)
    grid = RichTable(box=None, pad_edge=False)
    for i, head in enumerate(heads):
        grid.add_column(head.replace(" ", "\n"), justify="right" if i > 1 else "left")
    for row in rows:
        grid.add_row(*row)
    Console().print(grid)


def _require_own(table: Table, stem: Path) -> None:
    """Refuse to replace files that are none of `write`."""
    marks = {".md": table.title, ".csv": "row,from,", ".svg": "<svg "}
    for suffix, mark in marks.items():
        file = stem.with_suffix(suffix)
        if file.exists() and not file.read_text("utf-8", errors="replace").startswith(mark):
            raise InputError(f"{file}: is there already, and not from this command: move it")


def write(table: Table, results: Sequence[Result], stem: Path, *, small: bool) -> None:
    """Write ``STEM.md``, ``STEM.csv`` and ``STEM.svg``; earlier ones are replaced."""
    heads, *rows = _cells(table, results, small=small)
    lines = [heads, ["---", "---", *("---:" for _ in heads[2:])], *rows]
    marked = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    sheet = io.StringIO()
    csv.writer(sheet, lineterminator="\n").writerows([heads, *rows])
    dots: dict[str, dict[str, list[float]]] = {}
    for title, source, figures in lines_of(table, results, small=small):
        if " - " not in title and (value := figures["mask/AP"]) is not None:
            dots.setdefault(title, {})[source] = [value]
    texts = {
        ".md": f"{header(table, results, small=small)}\n\n{marked}",
        ".csv": sheet.getvalue(),
        ".svg": plot(f"{table.title}: mask AP", dots),
    }
    for suffix, text in texts.items():
        with replacing(stem.with_suffix(suffix)) as aside:
            aside.write_text(text, encoding="utf-8")


COLOURS = ("#0b6fb8", "#d1580a", "#12876a", "#8a4fb3")


def plot(title: str, rows: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """A picture (SVG) with a line for each row and a dot for each value.

    Args:
        title: its head.
        rows: by name, values by the name of their series, which has a colour.
    """
    values = [value for row in rows.values() for series in row.values() for value in series]
    low, high = (math.floor(min(values)), math.ceil(max(values))) if values else (0, 1)
    high = max(high, low + 1)
    step = max(1, math.ceil((high - low) / 8))
    left, width, top, side = 240, 420, 56, 24
    bottom = top + side * len(rows)
    names = list(dict.fromkeys(name for row in rows.values() for name in row))

    def x(value: float) -> float:
        return left + width * (value - low) / (high - low)

    parts = [f'<text x="12" y="22" class="title">{escape(title)}</text>']
    for i, name in enumerate(names):
        colour = COLOURS[i % len(COLOURS)]
        parts.append(f'<circle cx="{left + 110 * i}" cy="38" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{left + 110 * i + 9}" y="42">{escape(name)}</text>')
    for tick in range(low, high + 1, step):
        parts.append(f'<path d="M{x(tick):.1f} {top}V{bottom}" stroke="#d8dbe0"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{bottom + 16}" class="tick">{tick}</text>')
    for i, (row, series) in enumerate(rows.items()):
        y = top + side * (i + 0.5)
        parts.append(f'<text x="{left - 10}" y="{y + 4}" class="name">{escape(row)}</text>')
        parts.append(f'<path d="M{left} {y}H{left + width}" stroke="#eceef1"/>')
        for name, found in series.items():
            colour = COLOURS[names.index(name) % len(COLOURS)]
            parts += [
                f'<circle cx="{x(value):.1f}" cy="{y}" r="4.5" fill="{colour}" fill-opacity=".75"/>'
                for value in found
            ]
    size = f"{left + width + 24} {bottom + 28}"
    style = (
        "text{font:12px sans-serif;fill:#30363d}.title{font-size:14px;font-weight:bold}"
        ".name{text-anchor:end}.tick{text-anchor:middle}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img">'
        f"<title>{escape(title)}</title><style>{style}</style>"
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )
