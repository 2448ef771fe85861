"""Every method on the demo's pictures, with the demo's trunk and budget.

    python benchmarks/quality/all_methods.py [--seeds 0,1,2] [--only NAME,NAME] [--work FOLDER]
        [--results FOLDER]
    python benchmarks/quality/all_methods.py --table

Trains each method once a seed as ``brefine demo`` trains its two; runs that are finished are left
alone and interrupted ones go on, so stop it and start it as you like. Each run leaves a json in
``results/toy``; with ``--results`` and another folder all are run anew. In the end, or with
``--table`` at once, docs/methods.md gets the table. If the models of the lowest seed are all in the
work folder they take turns to predict the same pictures, which gives ``costs.json``, and draw
docs/images/methods.png, every method's outlines of the same objects; else both stay as they are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco
from study import HERE, describe_commit
from table import fill, markdown

from brefine.data import toy
from brefine.data.coco import CocoSet
from brefine.data.loader import read_picture
from brefine.demo import DATA, MODEL, PICTURES, TRAIN
from brefine.files import replacing
from brefine.methods import METHODS
from brefine.metrics.tables import COLUMNS
from brefine.parts.masks import to_records
from brefine.predict import Predictor
from brefine.progress import Progress, console
from brefine.recipe import Recipe
from brefine.reproduce import figures_of, known_to, run
from brefine.structures import InputError

RESULTS = HERE / "results" / "toy"
DOCS = HERE.parents[1] / "docs"
MARKERS = "<!-- table of benchmarks/quality/all_methods.py -->", "<!-- end of this table -->"
KEYS = ["mask/AP", "mask/AP50", "mask/AP_L", "boundary/AP", "box/AP"]
KEYS += ["given_boxes/mask_iou", "given_boxes/boundary_iou"]
PAPER = {"ranking": True, "mask_loss": "boundary"}  # what BRefine learns with

#: Title, method and its options beside the demo's. Widths shrink as the pyramid's does, from 256
#: channels to 64; sizes in pixels as pictures do: short sides are 256 instead of 800 or 550.
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mask_rcnn": ("Mask R-CNN", "mask_rcnn", {}),
    "brefine": ("BRefine", "brefine", {}),
    "pointrend": ("PointRend", "pointrend", {"hidden": 256, "point_channels": 64}),
    "mask_scoring": ("Mask Scoring R-CNN", "mask_scoring", {"iou_hidden": 256}),
    "cascade": ("Cascade Mask R-CNN", "cascade", {}),
    "htc": ("HTC", "htc", {}),
    "bmask": ("BMask R-CNN", "bmask", {}),
    "yolact": ("YOLACT", "yolact", {"width": 64, "prototype_width": 64, "anchor_scale": 1.5}),
    "solo": (
        "SOLO",
        "solo",
        {
            "width": 64,
            "groups": 8,
            "ranges": [[1, 31], [15, 61], [31, 123], [61, 246], [123, 655]],
        },
    ),
    "blendmask": (
        "BlendMask",
        "blendmask",
        {"groups": 8, "base_width": 32, "ranges": [20, 41, 82, 164]},
    ),
    "mask_rcnn_paper": ("Mask R-CNN, BRefine's losses", "mask_rcnn", PAPER),
    "pointrend_paper": (
        "PointRend, BRefine's losses",
        "pointrend",
        {"hidden": 256, "point_channels": 64, **PAPER},
    ),
    "htc_paper": ("HTC, BRefine's losses", "htc", PAPER),
}
ROUNDS, TIMED = 3, 20  # rounds over so many pictures to time
OBJECTS, TILE, COLUMN = 3, 150, 6  # objects in the picture, side of a tile, tiles in a row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="", metavar="NAME,NAME")
    parser.add_argument("--work", type=Path, default=Path("runs/toy_methods"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="from the runs that are there")
    parser.add_argument("--train", action="store_true", help="train alone, no table")
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    names = options.only.split(",") if options.only else list(VARIANTS)
    if unknown := set(names) - set(VARIANTS):
        raise SystemExit(f"error: {', '.join(sorted(unknown))}: choose of {', '.join(VARIANTS)}")
    try:
        if not options.table:
            for seed in seeds:
                for name in names:
                    console.rule(f"{name}, seed {seed}")
                    learn(name, seed, options.work, options.results)
        if not options.train:
            write(options.work, options.results, min(seeds))
    except InputError as error:
        raise SystemExit(f"error: {error}") from None


def learn(name: str, seed: int, work: Path, results: Path) -> None:
    """One run, unless its result is there."""
    if (results / f"{name}-{seed}.json").is_file():
        return
    recipe = recipe_of(name, seed, prepare(work, seed))
    run(f"{name}-{seed}", recipe, runs=work / "runs", results=results, commit=describe_commit())


def recipe_of(name: str, seed: int, folder: Path) -> Recipe:
    """The demo's recipe with a variant's method and options."""
    _, method, changes = VARIANTS[name]
    detector = known_to(method, MODEL["options"]["detector"])
    options = {**MODEL["options"], "detector": detector, **changes}
    return Recipe.parse(
        {
            "model": {"method": method, "weights": MODEL["weights"], "options": options},
            "data": {**DATA, "train": folder / "train.json", "val": folder / "val.json"},
            "train": {**TRAIN, "seed": seed},
        },
        name,
    )


def prepare(work: Path, seed: int) -> Path:
    """The demo's pictures of a seed."""
    folder = work / f"toy-{seed}"
    if not (folder / "val.json").is_file():
        toy.draw(folder, train=PICTURES[0], val=PICTURES[1], seed=seed)
    return folder


def write(work: Path, folder: Path, seed: int) -> None:
    """The table, of what there is in ``folder``, and the picture if ``work`` has the models."""
    results: dict[str, list[dict[str, Any]]] = {}
    for name in VARIANTS:
        files = sorted(folder.glob(f"{name}-[0-9]*.json"))
        results[name] = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    if not any(results.values()):
        raise InputError(f"{folder}: no results: run without --table")
    ready = [name for name in VARIANTS if (folder / f"{name}-{seed}.json").is_file()]
    models = {name: work / "runs" / f"{name}-{seed}" / "best" for name in ready}
    stored, costs = folder / "costs.json", {}
    if absent := [name for name, model in models.items() if not model.is_dir()]:
        line = f"{work}: no model of {', '.join(absent)}: times and picture stay"
        console.print(line, soft_wrap=True, markup=False)
        if stored.is_file():
            costs = json.loads(stored.read_text(encoding="utf-8"))
    else:
        dataset = CocoSet(prepare(work, seed) / "val.json")
        predictors = {name: Predictor.load(model, "cpu") for name, model in models.items()}
        costs = measure(predictors, [p.file for p in dataset.pictures[:TIMED]])
        with replacing(stored) as aside:
            aside.write_text(json.dumps(costs, indent=1) + "\n", encoding="utf-8")
        plain = {name: each for name, each in predictors.items() if name in METHODS}
        with replacing(DOCS / "images" / "methods.png") as aside:
            draw(plain, dataset).save(aside, "PNG", optimize=True)
    text = table(results, costs)
    print(text)
    page = DOCS / "methods.md"
    with replacing(page) as aside:
        old = page.read_text(encoding="utf-8")
        aside.write_text(fill(old, text, str(page), MARKERS), encoding="utf-8")


def measure(
    predictors: Mapping[str, Predictor], files: Sequence[Path]
) -> dict[str, tuple[float, float]]:
    """CPU seconds of a picture in one thread, from the file to RLE, and objects found: medians."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in predictors}
    counts: dict[str, list[int]] = {name: [] for name in predictors}
    with Progress("timing", ROUNDS * len(files)) as progress:
        for _ in range(ROUNDS):
            for number, file in enumerate(files):
                for name, predictor in predictors.items():
                    begun = time.process_time()
                    found = predictor.records(read_picture(file), number, threshold=0.0)
                    times[name].append(time.process_time() - begun)
                    counts[name].append(len(found))
                progress.advance()
    torch.set_num_threads(threads)
    return {
        name: (statistics.median(times[name]), statistics.median(counts[name]))
        for name in predictors
    }


def table(
    results: Mapping[str, Sequence[Mapping[str, Any]]], costs: Mapping[str, tuple[float, float]]
) -> str:
    """Markdown: means over seeds with standard deviations, and time beside Mask R-CNN's."""
    rows = []
    for name, (title, *_) in VARIANTS.items():
        if not results[name]:
            continue
        cells = [title, str(len(results[name]))]
        for key in KEYS:
            each = [figures_of(one, [key])[key] for one in results[name]]
            found = [value for value in each if value is not None]
            spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.1f}{spread}" if found else "-")
        if name in costs and "mask_rcnn" in costs:
            (mine, count), (other, _) = costs[name], costs["mask_rcnn"]
            cells += [f"{mine / other:.2f} ({mine * 1000:.0f} ms)", f"{count:.0f}"]
        else:
            cells += ["-", "-"]
        rows.append(cells)
    heads = ["method", "seeds", *(COLUMNS[key] for key in KEYS)]
    every = [one for each in results.values() for one in each]
    versions = {name: every[0]["versions"][name] for name in ("brefine", "torch", "timm")}
    minutes = sum(one["cpu_seconds"] for one in every) / 60
    return (
        f"{len(every)} runs, {minutes:.0f} minutes of one core; "
        f"{', '.join(f'{name} {value}' for name, value in versions.items())}.\n\n"
        + markdown([*heads, "time a picture", "objects"], rows)
    )


def draw(predictors: Mapping[str, Predictor], dataset: CocoSet) -> Image.Image:
    """For each of some objects: the picture, the label, and each method's mask in the true box.

    White is the true outline, orange is what a mask has too much, blue what it lacks; the number is
    the mask's IoU in percent.
    """
    tiles: list[Image.Image | None] = []
    for index, i in choose(dataset):
        target, picture = dataset.target(index), dataset.pictures[index]
        pixels = read_picture(picture.file)
        label = to_records(target, 0, dataset.categories, picture.size)
        true = coco.decode(label[i]["segmentation"]).astype(bool)
        crop = around(true)
        array = pixels.permute(1, 2, 0).numpy()
        tiles.append(whole(array, crop))
        tiles.append(zoom(array, true, true, crop, "label"))
        for name, predictor in predictors.items():
            given = predictor.given(picture.file, target)
            record = to_records(given, 0, dataset.categories, picture.size)[i]
            mask = coco.decode(record["segmentation"]).astype(bool)
            share = (mask & true).sum() / (mask | true).sum()
            tiles.append(zoom(array, true, mask, crop, f"{VARIANTS[name][0]}  {100 * share:.0f}"))
        tiles.extend([None] * (-len(tiles) % COLUMN))
    high = TILE + 18
    sheet = Image.new("RGB", (COLUMN * (TILE + 4), len(tiles) // COLUMN * high), "white")
    for number, tile in enumerate(tiles):
        if tile is not None:
            sheet.paste(tile, (number % COLUMN * (TILE + 4), number // COLUMN * high))
    return sheet


def choose(dataset: CocoSet) -> list[tuple[int, int]]:
    """(picture, object) of the largest objects, each of another category and picture."""
    objects = []
    for index in range(len(dataset.pictures)):
        target = dataset.target(index)
        windows = target.masks.windows if target.masks else []
        for i, (window, label) in enumerate(zip(windows, target.labels.tolist(), strict=True)):
            objects.append((int(window.sum()), index, i, label))
    chosen: dict[int, tuple[int, int]] = {}
    for _, index, i, label in sorted(objects, reverse=True):
        if label not in chosen and index not in {picture for picture, _ in chosen.values()}:
            chosen[label] = index, i
    return list(chosen.values())[:OBJECTS]


def around(mask: NDArray[np.bool_]) -> tuple[int, int, int]:
    """(x, y, side) of a square in the picture with an object and some pixels around it."""
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    side = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 9
    side = min(side, *mask.shape)
    x, y = (columns[0] + columns[-1] - side) // 2, (rows[0] + rows[-1] - side) // 2
    return max(0, min(x, mask.shape[1] - side)), max(0, min(y, mask.shape[0] - side)), side


def whole(picture: NDArray[np.uint8], crop: tuple[int, int, int]) -> Image.Image:
    """A tile of the picture with a square around what the others show."""
    image = Image.fromarray(picture)
    x, y, side = crop
    ImageDraw.Draw(image).rectangle((x, y, x + side, y + side), outline="white", width=2)
    image.thumbnail((TILE, TILE))
    return caption(image, "input")


def zoom(
    picture: NDArray[np.uint8],
    true: NDArray[np.bool_],
    found: NDArray[np.bool_],
    crop: tuple[int, int, int],
    text: str,
) -> Image.Image:
    """A tile of a crop with the true outline in white, wrong pixels in orange and blue."""
    x, y, side = crop
    window = slice(y, y + side), slice(x, x + side)
    pixels = picture[window].astype(float)
    for wrong, shade in ((found & ~true, (255, 122, 26)), (true & ~found, (0, 114, 255))):
        pixels[wrong[window]] = 0.25 * pixels[wrong[window]] + 0.75 * np.array(shade)
    image = Image.fromarray(pixels.round().astype(np.uint8)).resize((TILE, TILE), Image.NEAREST)
    large = np.asarray(Image.fromarray(true[window]).resize((TILE, TILE), Image.NEAREST))
    edge = np.zeros_like(large)
    edge[1:] |= large[1:] != large[:-1]
    edge[:, 1:] |= large[:, 1:] != large[:, :-1]
    array = np.array(image)
    array[edge] = 255
    return caption(Image.fromarray(array), text)


def caption(image: Image.Image, text: str) -> Image.Image:
    """An image with a line of text below it."""
    tile = Image.new("RGB", (TILE, TILE + 14), "white")
    tile.paste(image, (0, 0))
    font = ImageFont.load_default(10)
    ImageDraw.Draw(tile).text((1, TILE + 1), text, fill="black", font=font)
    return tile


if __name__ == "__main__":
    main()
