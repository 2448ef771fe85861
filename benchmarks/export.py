"""Prediction by PyTorch, onnxruntime and OpenVINO: the same network on the same picture.

    python benchmarks/export.py [--model lite0|r50|FOLDER ...] [--threads 2] [--rounds 7]

Models with random weights are exported, checked and timed from the picture at its size for the
network to boxes and mask logits, with all detections that they may have. Prints the check, medians
of interleaved rounds in wall milliseconds, and the ratio to PyTorch's eager mode.
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

from brefine import weights
from brefine.data.pictures import network_size
from brefine.export import export
from brefine.exported import FORMATS, Session
from brefine.methods import create
from brefine.recipe import Recipe
from brefine.structures import Category, Images

RECIPES = Path(__file__).parent.parent / "recipes"
MODELS = {
    "lite0": ["mask_rcnn_lite0", "brefine_lite0"],
    "r50": ["mask_rcnn_r50_1x", "brefine_r50_1x"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["lite0", "r50"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--short-side", type=int, default=400)
    parser.add_argument("--classes", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = [name for model in options.model for name in MODELS.get(model, [model])]
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for name in names:
            folder = Path(name)
            if not folder.is_dir():
                folder = Path(place) / name
                save(folder, name, options.classes)
            rows.append((folder.name, *measure(folder, Path(place), options)))
    titles = ("PyTorch", *FORMATS)
    print(f"\n{f'wall ms, {options.threads} threads, {options.short_side} px':34}", end="")
    print(*(f"{title:>12}" for title in ("objects", *titles, "ratio", "ratio")))
    for name, count, times in rows:
        medians = [statistics.median(each) for each in times]
        print(f"{name:34}{count:12}", *(f"{each:12.0f}" for each in medians), end=" ")
        print(*(f"{each / medians[0]:12.2f}" for each in medians[1:]))


def save(folder: Path, name: str, classes: int) -> None:
    """A model folder of a recipe with random weights."""
    torch.manual_seed(0)
    recipe = Recipe.load(RECIPES / f"{name}.yaml")
    model: Any = create(recipe.model.method, classes, **recipe.model.options)
    # Random weights: without statistics of their own, what norms hand on grows with depth.
    model.trunk.body.train()
    for norm in model.trunk.body.modules():
        if isinstance(norm, torch.nn.modules.batchnorm._BatchNorm):
            norm.train()
            norm.momentum = None
    with torch.no_grad():
        for _ in range(3):
            model.trunk.body(torch.randn(2, 3, 256, 256))
    # Boxes and scores that differ, so that which come first is no matter of the last digit.
    for layer, scale in (
        (model.rpn.objectness, 20),
        (model.rpn.deltas, 3),
        (model.box_head.classes, 10),
        (model.box_head.deltas, 100),
    ):
        layer.weight.data *= scale
    table = [Category(i, str(i)) for i in range(1, classes + 1)]
    weights.save(folder, model.eval(), recipe, table)


def measure(
    folder: Path, place: Path, options: argparse.Namespace
) -> tuple[int, list[list[float]]]:
    """Detections, and the times of PyTorch and of each format."""
    model: Any = weights.load(folder).segmenter
    model.box_head.score_threshold = 0.0
    size = network_size((480, 640), options.short_side, 1333)
    torch.manual_seed(0)
    picture = torch.nn.functional.interpolate(torch.rand(1, 3, 12, 16) * 255, size=size)[0]
    images = Images.stack([picture.to(torch.uint8)])
    inputs = images.pixels.numpy(), images.sizes.numpy(), 0.0

    def eager() -> int:
        with torch.inference_mode():
            return len(model.predict(images)[0])

    ways: list[Callable[[], int]] = [eager]
    for format, suffix in FORMATS.items():
        start = time.perf_counter()
        file = place / f"{folder.name}{suffix}"
        parity = export(folder, file, format)
        print(f"{file.name}: {parity}; {time.perf_counter() - start:.0f} s", flush=True)
        session = Session(file, threads=options.threads)
        ways.append(lambda session=session: len(session(*inputs)[0]))
    times: list[list[float]] = [[] for _ in ways]
    counts = {way() for way in ways}
    for _ in range(options.rounds):
        for way, each in zip(ways, times, strict=True):
            start = time.perf_counter()
            way()
            each.append((time.perf_counter() - start) * 1000)
    return max(counts), times


if __name__ == "__main__":
    main()
