"""Prediction by PyTorch, onnxruntime and OpenVINO: the same network on the same picture.

    python benchmarks/export.py [--models RECIPE|FOLDER ...] [--threads 1] [--rounds 7]

Models with random weights are exported, checked and timed from the picture at its size for the
network to boxes and mask logits, with as many objects as they may find. All ways take turns. What
is measured is added to benchmarks/results/export.json, and the table of docs/export.md is made of
all that is there.

``eager`` is the model as it is trained, ``PyTorch`` as ``brefine predict`` runs it, with folded
norms and Winograd's convolutions.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from brefine import weights
from brefine.data.pictures import network_size
from brefine.export import export
from brefine.exported import FORMATS, Session
from brefine.methods import create
from brefine.parts.inference import prepare
from brefine.progress import track
from brefine.recipe import Recipe
from brefine.structures import Category, Images
from page import (
    describe_machine,
    print_machine,
    read_results,
    table,
    write_results,
    write_tables,
)
from speed import settle

ROOT = Path(__file__).parent.parent
MODELS = ["brefine_lite0", "brefine_light_lite0", "brefine_light_r50_1x", "brefine_r50_1x"]
WAYS = ("eager", "PyTorch", "onnxruntime", "OpenVINO")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--short-side", type=int, default=400)
    parser.add_argument("--classes", type=int, default=4)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/export.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/export.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = read_results(options.results)
    results["machine"] = describe_machine()
    with tempfile.TemporaryDirectory() as place:
        for name in options.models:
            folder = Path(name)
            if not folder.is_dir():
                folder = Path(place) / name
                save(folder, name, options.classes)
            found = measure(folder, Path(place), options)
            key = f"{folder.name} {options.short_side} px {options.threads} threads"
            results.setdefault("models", {})[key] = found
            write_results(options.results, results)
            print(key, found, flush=True)
    write_tables(options.page, "export", make_table(results))


def make_table(results: dict[str, Any]) -> str:
    """The times of all models that were ever measured."""
    rows = []
    for key, found in results["models"].items():
        eager = found["seconds"]["eager"]
        ratios = [f"{found['seconds'][way] / eager:.2f}" for way in WAYS[1:]]
        rows.append(
            [
                f"`{key.split()[0]}`",
                key.partition(" ")[2],
                str(found["objects"]),
                f"{eager:.2f} s",
                *ratios,
                f"{found['box']:.5f}",
                f"{found['iou']:.5f}",
            ]
        )
    head = ["model", "", "objects", "eager", *WAYS[1:], "boxes, px", "mask IoU"]
    return f"\n{print_machine(results['machine'])}{table(head, rows)}"


def save(folder: Path, name: str, classes: int) -> None:
    """A model folder of a recipe with random weights."""
    torch.manual_seed(0)
    recipe = Recipe.load(ROOT / f"recipes/{name}.yaml")
    model: Any = create(recipe.model.method, classes, **recipe.model.options)
    settle(model)
    table = [Category(i, str(i)) for i in range(1, classes + 1)]
    weights.save(folder, model.eval(), recipe, table)


def measure(folder: Path, place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Objects, median seconds of every way, and what the check of the files said at worst."""
    size = network_size((480, 640), options.short_side, 1333)
    torch.manual_seed(0)
    picture = nn.functional.interpolate(torch.rand(1, 3, 12, 16) * 255, size=size)[0]
    images = Images.stack([picture.to(torch.uint8)])
    inputs = images.pixels.numpy(), images.sizes.numpy(), 0.0

    def by_torch(model: Any) -> Callable[[], int]:
        model.box_head.score_threshold = 0.0

        def run() -> int:
            with torch.inference_mode():
                return len(model.predict(images)[0])

        return run

    plain, prepared = (weights.load(folder).segmenter for _ in range(2))
    ways = [by_torch(plain), by_torch(prepare(prepared))]
    parities, sizes = [], {}
    for format, suffix in FORMATS.items():
        file = place / f"{folder.name}{suffix}"
        parities.append(export(folder, file, format))
        whole = [file, file.with_suffix(".bin")] if format == "openvino" else [file]
        sizes[format] = round(sum(each.stat().st_size for each in whole) / 1e6, 1)
        session = Session(file, threads=options.threads)
        ways.append(lambda session=session: len(session(*inputs)[0]))
    clock = time.process_time if options.threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    objects = {way() for way in ways}
    for _ in track(range(options.rounds), "rounds", options.rounds):
        for name, way in zip(WAYS, ways, strict=True):
            start = clock()
            way()
            times[name].append(clock() - start)
    return {
        "objects": max(objects),
        "seconds": {way: round(statistics.median(each), 4) for way, each in times.items()},
        "megabytes": sizes,
        "box": max(parity.box for parity in parities),
        "iou": min(parity.iou for parity in parities),
        "score": max(parity.score for parity in parities),
    }


if __name__ == "__main__":
    main()
