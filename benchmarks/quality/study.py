"""The small-scale study: methods side by side on sets that two cores can train on.

    python benchmarks/quality/study.py --data nuclei=PATH --data coco=PATH [--list]
        [--only set=nuclei,variant=brefine,seed=0] [--work FOLDER] [--results FOLDER]

A cell is a set, a variant and a seed. All cells share trunk, pictures, steps and schedule; a
variant differs from its method in what ``VARIANTS`` says. Finished cells are left alone and
interrupted ones go on from their checkpoint, so stop it and start it as you like. Each cell
leaves one json in the folder of results, from which ``table.py`` makes the tables.

A set's PATH holds ``train.json`` and ``val.json`` (COCO) and ``images``. Sets without a PATH and
methods without a recipe are left out, and the toy set is drawn. From ``coco`` come two sets: its
people, and all its objects as one class. ``nuclei_fine`` is ``nuclei`` at twice the resolution.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from brefine.data import toy
from brefine.files import replacing
from brefine.progress import console
from brefine.recipe import Recipe
from brefine.reproduce import run, shrink
from brefine.structures import InputError, Stopped

HERE = Path(__file__).resolve().parent
RECIPES = HERE.parents[1] / "recipes"
STUDY = "small"  # name of the folder of results

#: what differs between sets: the resolution, which follows the size of the objects
SETS: dict[str, dict[str, Any]] = {
    "nuclei": {"short_side": (272, 368, 320), "long_side": 480, "flip_vertical": 0.5},
    "toy": {"short_side": (224, 288, 256), "long_side": 384},
    "person": {"short_side": (272, 368, 320), "long_side": 448},
    "object": {"short_side": (272, 368, 320), "long_side": 448},
    # nuclei at twice the resolution; parts of the old size are learnt from
    "nuclei_fine": {
        "short_side": (544, 736, 640),
        "long_side": 960,
        "crop": 320,
        "flip_vertical": 0.5,
    },
}
#: NAME of the --data that a set is made of; the toy set is drawn
SOURCES = {"nuclei": "nuclei", "nuclei_fine": "nuclei", "person": "coco", "object": "coco"}
_CROWDED = {"candidates": [500, 1000], "proposals": [200, 400], "detections": 300}
#: and what the detector needs: nuclei are smaller than other objects, and there are up to 250
DETECTORS: dict[str, dict[str, Any]] = {
    "nuclei": {"anchor_scale": 4, **_CROWDED},
    "nuclei_fine": {"anchor_scale": 8, **_CROWDED},
}
TOY = (400, 100)  # pictures to learn from, to test on
MOST = 100  # photographs to test on

#: recipe, and what is changed in it
MAIN: dict[str, tuple[str, list[str]]] = {
    "mask_rcnn": ("mask_rcnn_r50_1x", []),
    "brefine": ("brefine_r50_1x", []),
    "rs_mask_rcnn": ("rs_mask_rcnn_r50_1x", []),
    "multistage": ("multistage_r50_1x", []),
    "light": ("brefine_light_lite0", []),
}
RATES: dict[str, tuple[str, list[str]]] = {
    f"{name}_lr{factor}": (MAIN[name][0], [f"train.lr={rate}"])
    for name in ("mask_rcnn", "brefine")
    for factor, rate in (("_half", 0.0005), ("_double", 0.002))
}
_BREFINE, _MASK_RCNN = MAIN["brefine"][0], MAIN["mask_rcnn"][0]
_DETECTOR = "model.options.detector"
#: one change each, to learn where a difference comes from
CHANGES: dict[str, tuple[str, list[str]]] = {
    "no_ranking": (_BREFINE, ["model.options.ranking=false"]),
    "floor_0": (_BREFINE, [f"{_DETECTOR}.balance_floor=0.0"]),
    "floor_1": (_BREFINE, [f"{_DETECTOR}.balance_floor=1.0"]),
    "boundary_0": (_BREFINE, ["model.options.boundary_weight=0.0"]),
    "boundary_3": (_BREFINE, ["model.options.boundary_weight=3.0"]),
    "wide_boundary": (_BREFINE, ["model.options.boundary_ratio=0.05"]),
    "p2": (_BREFINE, ["model.options.levels=p2"]),
    "group_norm": (_BREFINE, ["model.options.norm=group"]),
    "two_stages": (_BREFINE, ["model.options.stages=2"]),
    "deep": (_BREFINE, ["model.options.deep_supervision=0.5"]),
    "mask_rois_48": (_BREFINE, [f"{_DETECTOR}.mask_rois=48"]),
    "mask_margin": (_BREFINE, [f"{_DETECTOR}.mask_margin=0.1"]),
    "copy_paste": (_BREFINE, ["data.copy_paste=0.5"]),
    "warm": (_BREFINE, ["model.weights={mask_rcnn}"]),
    "low_quality": (_BREFINE, [f"{_DETECTOR}.rpn_low_quality=0.3"]),
    "rpn_deltas": (_BREFINE, [f"{_DETECTOR}.rpn_delta_weights=[10,10,5,5]"]),
    "long": (_BREFINE, ["train.steps=1200"]),
    "lite2": (_BREFINE, ["model.options.backbone=tf_efficientnet_lite2"]),
    "mask_rcnn_mask_rois_48": (_MASK_RCNN, [f"{_DETECTOR}.mask_rois=48"]),
    "mask_rcnn_mask_margin": (_MASK_RCNN, [f"{_DETECTOR}.mask_margin=0.1"]),
    "mask_rcnn_copy_paste": (_MASK_RCNN, ["data.copy_paste=0.5"]),
    "mask_rcnn_warm": (_MASK_RCNN, ["model.weights={mask_rcnn}"]),
    "mask_rcnn_low_quality": (_MASK_RCNN, [f"{_DETECTOR}.rpn_low_quality=0.3"]),
    "mask_rcnn_long": (_MASK_RCNN, ["train.steps=1200"]),
    "mask_rcnn_lite2": (_MASK_RCNN, ["model.options.backbone=tf_efficientnet_lite2"]),
}
VARIANTS = MAIN | RATES | CHANGES


class Cell(NamedTuple):
    """One training run and its evaluation."""

    set: str
    variant: str
    seed: int

    def __str__(self) -> str:
        return f"{self.set}-{self.variant}-{self.seed}"


def cells() -> Iterator[Cell]:
    """In the order in which they are worth having."""
    for seed in (0, 1, 2):
        for name in SETS:
            yield from (Cell(name, variant, seed) for variant in MAIN)
        if not seed:
            yield from (Cell(name, variant, 0) for name in SETS for variant in RATES)
    yield from (Cell(name, variant, 0) for name in SETS for variant in CHANGES)
    for seed in (1, 2):  # half the rate is better for both on photographs
        for name in ("person", "object"):
            yield from (Cell(name, variant, seed) for variant in RATES if variant.endswith("half"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=source, action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--only", type=wish, default={}, metavar="set=,variant=,seed=")
    parser.add_argument("--list", action="store_true", help="say which cells there are, and stop")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/study"), help="sets and run folders"
    )
    parser.add_argument("--results", type=Path, default=HERE / "results" / STUDY)
    options = parser.parse_args()
    sources = dict(options.data)
    chosen = [cell for cell in cells() if _matches(cell, options.only) and _can_run(cell, sources)]
    if not chosen:
        parser.error("no such cell, or no --data for it: --list says which there are")
    todo = [cell for cell in chosen if not (options.results / f"{cell}.json").is_file()]
    if options.list:
        for cell in chosen:
            print(f"{cell}{'' if cell in todo else '  done'}")
        return 0
    try:
        sets = {
            name: prepare(name, sources, options.work / "sets") for name in {c.set for c in todo}
        }
    except InputError as error:
        parser.error(str(error))
    commit = describe_commit()
    failed = []
    for number, cell in enumerate(todo, 1):
        console.rule(f"cell {number} of {len(todo)}: {cell}")
        try:
            run_cell(cell, sets[cell.set], options.work / "runs", options.results, commit)
        except InputError as error:
            console.print(f"{cell} failed: {error}", markup=False, soft_wrap=True)
            failed.append(str(cell))
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            return 75
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def source(text: str) -> tuple[str, Path]:
    """``NAME=PATH`` of the command line.

    Raises:
        argparse.ArgumentTypeError: it is not of that form.
    """
    name, sign, path = text.partition("=")
    if not (name and sign and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH, like nuclei=data/nuclei")
    return name, Path(path)


def wish(text: str) -> dict[str, str]:
    """``set=NAME,variant=NAME,seed=N`` of the command line, each or none of them.

    Raises:
        argparse.ArgumentTypeError: another key, or no such form.
    """
    pairs = dict(part.partition("=")[::2] for part in text.split(","))
    for key, value in pairs.items():
        if key not in Cell._fields or not value:
            raise argparse.ArgumentTypeError(f"{text!r}: expected {'=, '.join(Cell._fields)}=")
    return pairs


def run_cell(cell: Cell, data: dict[str, Any], runs: Path, results: Path, commit: str) -> None:
    """Train, evaluate, write the json, and keep of the run folder what others may start from."""
    recipe = recipe_of(cell, data, runs)
    run(str(cell), recipe, runs=runs, results=results, commit=commit)
    shutil.rmtree(runs / str(cell) / "last", ignore_errors=True)
    shutil.rmtree(runs / str(cell) / "checkpoints", ignore_errors=True)


def recipe_of(cell: Cell, data: dict[str, Any], runs: Path) -> Recipe:
    """The recipe of a cell on a set."""
    name, settings = VARIANTS[cell.variant]
    small = shrink(Recipe.load(RECIPES / f"{name}.yaml"), {**SETS[cell.set], **data})
    earlier = runs / str(cell._replace(variant="mask_rcnn")) / "best"
    return small.with_settings(
        [
            f"train.seed={cell.seed}",
            *(f"{_DETECTOR}.{key}={value}" for key, value in DETECTORS.get(cell.set, {}).items()),
            *(each.format(mask_rcnn=earlier) for each in settings),
        ]
    )


def available(name: str, sources: dict[str, Path]) -> bool:
    """Whether a set is drawn, or there is a PATH for it."""
    return name == "toy" or SOURCES[name] in sources


def prepare(name: str, sources: dict[str, Path], work: Path) -> dict[str, Any]:
    """The json files of a set, drawn or derived in ``work`` if need be, as a data section.

    Raises:
        InputError: a PATH does not hold what it must.
    """
    for path in sources.values():
        for part in ("train.json", "val.json", "images"):
            if not (path / part).exists():
                raise InputError(f"{path / part} is not there: --data needs {part} in {path}")
    folder = work / name
    if name == "toy":
        if not (folder / "train.json").is_file():
            toy.draw(folder, train=TOY[0], val=TOY[1], seed=0)
        source = folder
    elif SOURCES[name] == "nuclei":
        source = folder = sources["nuclei"]
    else:
        source = sources["coco"]
        for split in ("train", "val"):
            content = json.loads((source / f"{split}.json").read_text(encoding="utf-8"))
            content = one_class(content, name, most=MOST if split == "val" else None)
            with replacing(folder / f"{split}.json") as aside:
                aside.write_text(json.dumps(content), encoding="utf-8")
    return {
        "train": folder / "train.json",
        "val": folder / "val.json",
        "images": source / "images",
    }


def one_class(content: dict[str, Any], name: str, most: int | None = None) -> dict[str, Any]:
    """A COCO json with one class: all objects, or those of the class ``name``.

    Of pictures, those with at least one such object stay, the first ``most`` of them.
    """
    known = {category["id"]: category["name"] for category in content["categories"]}
    kept = [
        {**each, "category_id": 1}
        for each in content["annotations"]
        if name == "object" or known[each["category_id"]] == name
    ]
    shown = {each["image_id"] for each in kept if not each.get("iscrowd")}
    pictures = [picture for picture in content["images"] if picture["id"] in shown][:most]
    shown = {picture["id"] for picture in pictures}
    return {
        "images": pictures,
        "annotations": [each for each in kept if each["image_id"] in shown],
        "categories": [{"id": 1, "name": name}],
    }


def _matches(cell: Cell, wanted: dict[str, str]) -> bool:
    return all(str(getattr(cell, key)) == value for key, value in wanted.items())


def _can_run(cell: Cell, sources: dict[str, Path]) -> bool:
    if not (RECIPES / f"{VARIANTS[cell.variant][0]}.yaml").is_file():
        return False
    return available(cell.set, sources)


def describe_commit() -> str:
    """Of the code that runs, marked if it was changed since; pages and results are no code."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(HERE.parents[1]), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    code = ["src", "recipes", ":(glob)benchmarks/**/*.py"]
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *code)
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("-dirty" if changed else "")


if __name__ == "__main__":
    sys.exit(main())
