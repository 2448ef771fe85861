"""Evaluation: `brefine.evaluate` against pycocotools and faster-coco-eval, in one run.

    python benchmarks/evaluate.py [--pictures 500] [--classes 80] [--rounds 3] [--slow 50]

Drawn pictures of 640 x 480 with 8 objects and 100 detections each. Every system starts from the
same COCO dicts in memory and includes its own indexing; rounds are interleaved, medians of CPU
seconds are printed, and the figures of all must agree. faster-coco-eval's Boundary AP is so slow
that it is timed on the first ``--slow`` pictures, and scaled.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faster_coco_eval
import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from brefine.data.coco import CocoSet
from brefine.metrics.average_precision import Tally
from brefine.metrics.average_precision import figures as average
from brefine.metrics.overlaps import compare

SIZE = (480, 640)
OBJECTS, DETECTIONS = 8, 100
KEYS = (
    *("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L"),
    *("AR1", "AR10", "AR100", "AR_S", "AR_M", "AR_L"),
)

Records = list[dict[str, Any]]
Figures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slow", type=int, default=50)
    options = parser.parse_args()
    truth, records = draw(options.pictures, options.classes)
    few = [entry["id"] for entry in truth["images"][: options.slow]]
    few_truth, few_records = cut(truth, records, few)

    systems: dict[str, Callable[[], Figures]] = {
        "pycocotools: box": lambda: with_pycocotools(truth, records, "bbox"),
        "pycocotools: mask": lambda: with_pycocotools(truth, records, "segm"),
        "faster-coco-eval: box": lambda: with_faster(truth, records, "bbox"),
        "faster-coco-eval: mask": lambda: with_faster(truth, records, "segm"),
        "ours: box and mask": lambda: ours(truth, records, ("box", "mask")),
        "ours: mask": lambda: ours(truth, records, ("mask",)),
        "ours: boundary": lambda: ours(truth, records, ("boundary",)),
        "ours: all three": lambda: ours(truth, records, ("box", "mask", "boundary")),
    }
    times: dict[str, list[float]] = {name: [] for name in systems}
    figures: dict[str, Figures] = {}
    for _ in range(options.rounds):
        for name, run in systems.items():
            gc.collect()  # what the one before has left
            start = time.process_time()
            figures[name] = run()
            times[name].append(time.process_time() - start)
    start = time.process_time()
    slow = with_faster(few_truth, few_records, "boundary")
    scaled = (time.process_time() - start) * options.pictures / options.slow

    medians = {name: statistics.median(values) for name, values in times.items()}
    print(
        f"{options.pictures} pictures x {DETECTIONS} detections x {OBJECTS} objects, "
        f"{options.classes} classes; median of {options.rounds}, CPU seconds"
    )
    for name, seconds in medians.items():
        print(f"{name:40} {seconds:8.2f}")
    print(f"{f'faster-coco-eval: boundary ({options.slow}, scaled)':40} {scaled:8.2f}")
    theirs = medians["pycocotools: box"] + medians["pycocotools: mask"]
    print(f"box and mask against pycocotools: {theirs / medians['ours: box and mask']:.1f} times")
    print(f"boundary AP: {medians['ours: boundary'] / medians['ours: mask']:.1f} times mask AP")

    expected = figures["pycocotools: box"] | figures["pycocotools: mask"]
    for name in ("faster-coco-eval: box", "faster-coco-eval: mask", "ours: box and mask"):
        print(f"{name}: differs by {difference(figures[name], expected):.1e} from pycocotools")
    boundary = ours(few_truth, few_records, ("boundary",))
    print(f"boundary: differs by {difference(slow, boundary):.1e} from faster-coco-eval")


def draw(pictures: int, classes: int) -> tuple[dict[str, Any], Records]:
    """Blobs as labels; as detections, about four noisy copies of each and blobs elsewhere."""
    random = np.random.default_rng(0)
    truth: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": k + 1, "name": f"class {k}"} for k in range(classes)],
    }
    records: Records = []
    for image in range(1, pictures + 1):
        entry = {"id": image, "file_name": f"{image}.png", "height": SIZE[0], "width": SIZE[1]}
        truth["images"].append(entry)
        outlines = []
        for _ in range(OBJECTS):
            outlines.append((blob(random), int(random.integers(classes)) + 1))
            mask = rasterise(outlines[-1][0])
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": image,
                    "category_id": outlines[-1][1],
                    "segmentation": mask,
                    "bbox": coco_mask.toBbox(mask).tolist(),
                    "area": float(coco_mask.area(mask)),
                    "iscrowd": 0,
                }
            )
        for number in range(DETECTIONS):
            outline, category = blob(random), int(random.integers(classes)) + 1
            if number < 4 * OBJECTS:
                outline, category = outlines[number % OBJECTS]
                centre = outline.mean(0)
                noise = random.normal(0, 0.04, (len(outline), 1))
                outline = centre + (outline - centre) * (1 + noise) + random.normal(0, 3, 2)
            mask = rasterise(outline)
            records.append(
                {
                    "image_id": image,
                    "category_id": category,
                    "score": round(float(random.random()), 3),
                    "bbox": coco_mask.toBbox(mask).tolist(),
                    "segmentation": mask,
                }
            )
    return truth, records


def blob(random: np.random.Generator) -> np.ndarray:
    """The outline ``[64, 2]`` of a wavy shape 16 to 300 pixels wide."""
    angle = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    radius = np.exp(random.uniform(np.log(8), np.log(150)))
    for waves in (2, 3, 5, 9):
        radius = radius * (1 + 0.3 / waves * np.sin(waves * angle + random.uniform(0, 6)))
    centre = random.uniform((0, 0), SIZE[::-1])
    return centre + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)


def rasterise(outline: np.ndarray) -> dict[str, Any]:
    [rle] = coco_mask.frPyObjects([outline.ravel().tolist()], *SIZE)
    return {"size": list(SIZE), "counts": rle["counts"].decode()}


def cut(truth: dict[str, Any], records: Records, ids: list[int]) -> tuple[dict[str, Any], Records]:
    """A set of some pictures only."""
    chosen = set(ids)
    part = truth | {
        "images": [entry for entry in truth["images"] if entry["id"] in chosen],
        "annotations": [entry for entry in truth["annotations"] if entry["image_id"] in chosen],
    }
    return part, [record for record in records if record["image_id"] in chosen]


def with_pycocotools(truth: dict[str, Any], records: Records, kind: str) -> Figures:
    # Detections have the size of their mask in mask AP only if the results have no boxes.
    drop = "bbox" if kind == "segm" else "segmentation"
    records = [{k: v for k, v in record.items() if k != drop} for record in records]
    with contextlib.redirect_stdout(io.StringIO()):
        table = COCO()
        table.dataset = copy.deepcopy(truth)
        table.createIndex()
        result = COCOeval(table, table.loadRes(records), kind)
        result.evaluate()
        result.accumulate()
        result.summarize()
    return named(result.stats, {"bbox": "box", "segm": "mask"}[kind])


def with_faster(truth: dict[str, Any], records: Records, kind: str) -> Figures:
    drop = "segmentation" if kind == "bbox" else "bbox"
    records = [{k: v for k, v in record.items() if k != drop} for record in records]
    extra = {"boundary_dilation_ratio": 0.02} if kind == "boundary" else {}
    table = faster_coco_eval.COCO(copy.deepcopy(truth))
    found = table.loadRes(copy.deepcopy(records))
    result = faster_coco_eval.COCOeval_faster(
        table, found, kind, print_function=lambda *_: None, **extra
    )
    result.evaluate()
    result.accumulate()
    result.summarize()
    return named(result.stats, {"bbox": "box", "segm": "mask"}.get(kind, kind))


def ours(truth: dict[str, Any], records: Records, kinds: tuple[str, ...]) -> Figures:
    dataset = CocoSet.from_dict(truth, Path("labels.json"), Path("."))
    tally = Tally(len(dataset.categories), kinds)
    for overlaps in compare(records, dataset, kinds=kinds):
        tally.add(overlaps)
    return {
        f"{kind}/{key}": value
        for kind, curves in tally.curves().items()
        for key, value in average(curves).items()
    }


def named(stats: np.ndarray, kind: str) -> Figures:
    return {f"{kind}/{key}": float(value) for key, value in zip(KEYS, stats[:12], strict=True)}


def difference(one: Figures, other: Figures) -> float:
    """The largest of any figure that both have; NaN here is -1 there."""
    shared = one.keys() & other.keys()
    assert len(shared) in (len(KEYS), 2 * len(KEYS))
    pairs = [[-1 if figure != figure else figure for figure in (one[k], other[k])] for k in shared]
    return max(abs(mine - theirs) for mine, theirs in pairs)


if __name__ == "__main__":
    main()
