"""The finetune preset against the plain defaults, on few pictures.

    python benchmarks/quality/finetune.py --data TRAIN.json --test TEST.json [--counts 20 60 200]
        [--seeds 0] [--only VARIANT ...] [--work FOLDER] [--table]

For each number of pictures and seed, that many are drawn from TRAIN.json. ``defaults`` is
recipes/brefine_lite0.yaml as it is, on all of them; ``preset`` is what `brefine train --preset
finetune` does with them, which holds some out by itself; the other ``VARIANTS`` are the preset with
something set by hand, and run when --only names them. All are measured on TEST.json, which none
sees. One json a run goes to benchmarks/quality/results/finetune; runs that have one are skipped,
and interrupted ones go on from their checkpoint; a finished run's folder is removed. Then the table
in docs/finetune.md is made anew from all jsons; --table does only that. One thread, of one class.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from counts import count

from brefine.data.coco import find_folder
from brefine.data.read import read
from brefine.evaluate import evaluate
from brefine.files import replacing
from brefine.finetune import finetune
from brefine.predict import Predictor
from brefine.recipe import Recipe
from brefine.train import LOG_EVERY, train

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/quality/results/finetune"
DOCS = ROOT / "docs/finetune.md"
MARKERS = "<!-- finetune: begin -->", "<!-- finetune: end -->"
ONE_STAGE = "model.options.stages=1"  # what the preset once chose for objects as small as nuclei
LITE2 = "model.options.backbone=tf_efficientnet_lite2"
COPY_PASTE = "data.copy_paste=0.5"
MARGIN = "model.options.detector.mask_margin"
#: what the preset once chose for 20 pictures, batches of 4 and of 2, and for 60
STEPS = (400, 500, 700)
#: what is set by hand in the preset; None is the recipe as it is
VARIANTS: dict[str, list[str] | None] = {
    "defaults": None,
    "preset": [],
    "turned": ["data.rotate90=true", "data.flip_vertical=0.5"],
    "copy_paste": [COPY_PASTE],
    "lite2": [LITE2],
    "longest": ["train.steps=2000"],
    "margin": [f"{MARGIN}=0.2"],
    "short_400": ["train.steps=400", f"{MARGIN}=0.2"],
    "short_500": ["train.steps=500", f"{MARGIN}=0.2"],
    "short_400_narrow": ["train.steps=400", f"{MARGIN}=0.1"],
}
for _steps in STEPS:
    _earlier = [f"train.steps={_steps}"]
    VARIANTS |= {
        f"earlier_{_steps}": _earlier,
        f"earlier_{_steps}_lite2": [*_earlier, LITE2],
        f"earlier_{_steps}_one_stage": [*_earlier, ONE_STAGE],
        f"earlier_{_steps}_one_stage_copy_paste": [*_earlier, ONE_STAGE, COPY_PASTE],
        f"earlier_{_steps}_one_stage_lite2": [*_earlier, ONE_STAGE, LITE2],
    }
#: columns: title, key
COLUMNS = {
    "mask AP": "mask/AP",
    "mask AP50": "mask/AP50",
    "boundary AP": "boundary/AP",
    "box AP": "box/AP",
    "F1 as delivered": "F1",
}
#: and points more than the preset has on the same pictures, with the same seeds
AGAINST = {"mask AP to the preset's": "mask/AP", "boundary AP to the preset's": "boundary/AP"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="COCO json to draw pictures from")
    parser.add_argument("--test", type=Path, help="COCO json to measure on")
    parser.add_argument("--counts", type=int, nargs="+", default=[20, 60, 200])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=["defaults", "preset"])
    parser.add_argument("--work", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.table:
        if not (options.data and options.test):
            parser.error("give --data and --test, or --table")
        for seed in options.seeds:
            for pictures in options.counts:
                for variant in options.only:
                    run(options, pictures, seed, variant)
    write_table([json.loads(path.read_text()) for path in sorted(options.results.glob("*.json"))])


def run(options: argparse.Namespace, pictures: int, seed: int, variant: str) -> None:
    """One training and its figures, unless they are there."""
    name = f"{options.data.resolve().parent.name}-{pictures}-{variant}-{seed}"
    result = options.results / f"{name}.json"
    if result.is_file():
        return
    print(f"== {name}", flush=True)
    data = draw(options.data, options.work / f"{name}.json", pictures, seed)
    images = find_folder(options.data, None)
    out = options.work / name
    began = time.process_time()
    resumed = (out / "recipe.yaml").is_file()
    if resumed:
        model = train(Recipe.load(out / "recipe.yaml"), out, resume="auto")
    else:
        shutil.rmtree(out, ignore_errors=True)
        settings = [f"train.seed={seed}", "data.workers=0"]
        by_hand = VARIANTS[variant]
        if by_hand is not None:
            model = finetune(data, out, images=images, settings=[*settings, *by_hand])
        else:
            recipe = Recipe.load(ROOT / "recipes/brefine_lite0.yaml")
            where = [f"data.train={data}", "data.val=null", f"data.images={images}"]
            model = train(recipe.with_settings([*where, *settings]), out)
    seconds = time.process_time() - began
    predictor = Predictor.load(model)
    test = read(options.test)
    report = evaluate(predictor, test)
    kept = [r for r in report.records if r["score"] >= predictor.overall]
    rows = (out / "metrics.csv").read_text().splitlines()
    at = rows[0].split(",").index("step")
    last = max(int(row.split(",")[at]) for row in rows[1:])
    recipe = Recipe.load(out / "recipe.yaml")
    choices = out / "finetune.json"
    found = {
        "set": options.data.resolve().parent.name,
        "pictures": pictures,
        "variant": variant,
        "seed": seed,
        "values": {**report.as_dict()["values"], **count(kept, test)},
        "threshold": predictor.overall,
        "test_pictures": len(test),
        "steps": min(recipe.train.steps or 0, last + LOG_EVERY),  # to the next row, if ended early
        "training_cpu_seconds": None if resumed else round(seconds, 1),
        "recipe": recipe.model_dump(mode="json", exclude={"data"}),
        "choices": json.loads(choices.read_text())["choices"] if choices.is_file() else None,
        "versions": {n: version(n) for n in ("brefine", "torch", "torchvision", "timm")},
        "python": platform.python_version(),
        "commit": commit(),
    }
    with replacing(result) as aside:
        aside.write_text(json.dumps(found, indent=1), encoding="utf-8")
    shutil.rmtree(out)  # or a run after a change of the preset's rules would find this model


def draw(source: Path, target: Path, pictures: int, seed: int) -> Path:
    """A json with so many pictures of another; those of a seed grow with the number."""
    content = json.loads(source.read_text(encoding="utf-8"))
    images = sorted(content["images"], key=lambda image: str(image["file_name"]))
    random.Random(seed).shuffle(images)
    content["images"] = images[:pictures]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    with replacing(target) as aside:
        aside.write_text(json.dumps(content), encoding="utf-8")
    return target


def commit() -> str:
    """Of the code that runs."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def write_table(results: Iterable[dict[str, Any]]) -> None:
    """Means over seeds, into the documentation."""
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for found in results:
        if found["variant"] not in VARIANTS:
            continue  # of another version of this script
        groups.setdefault((found["set"], found["pictures"], found["variant"]), []).append(found)
    titles = ["set", "pictures", "", *COLUMNS, *AGAINST, "steps", "CPU minutes", "seeds"]
    lines = [
        "| " + " | ".join(titles) + " |",
        "|---|---:|---|" + "---:|" * (len(titles) - 3),
    ]
    for (name, pictures, variant), runs in sorted(groups.items(), key=place):
        by_hand = ", ".join(re.sub(r"[\w.]+\.(?=\w+=)", "", one) for one in VARIANTS[variant] or [])
        cells = [name, str(pictures), f"preset, `{by_hand}`" if by_hand else variant]
        cells += [
            f"{100 * mean(one['values'][key] for one in runs):.1f}" for key in COLUMNS.values()
        ]
        preset = {one["seed"]: one for one in groups.get((name, pictures, "preset"), [])}
        pairs = [(one, preset[one["seed"]]) for one in runs if one["seed"] in preset]
        for key in AGAINST.values():
            points = [100 * (one["values"][key] - other["values"][key]) for one, other in pairs]
            cells.append(f"{mean(points):+.1f}" if points and variant != "preset" else "-")
        minutes = [s / 60 for one in runs if (s := one["training_cpu_seconds"]) is not None]
        cells.append(f"{mean(one['steps'] for one in runs):.0f}")
        cells += [f"{mean(minutes):.0f}" if minutes else "-", str(len(runs))]
        lines.append("| " + " | ".join(cells) + " |")
    table = "\n".join(lines) if groups else "No run is stored yet."
    text = DOCS.read_text(encoding="utf-8")
    start, end = (re.escape(marker) for marker in MARKERS)
    inside = f"{MARKERS[0]}\n{table}\n{MARKERS[1]}"
    text = re.sub(f"{start}.*{end}", lambda _: inside, text, flags=re.DOTALL)
    with replacing(DOCS) as aside:
        aside.write_text(text, encoding="utf-8")
    print(table)


def place(group: tuple[tuple[str, int, str], Any]) -> tuple[str, int, int]:
    """Where a row stands: by set, pictures, and variant as they are listed."""
    (name, pictures, variant), _ = group
    return name, pictures, list(VARIANTS).index(variant)


def mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


if __name__ == "__main__":
    main()
