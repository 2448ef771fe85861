"""From mask logits to COCO results: `brefine` against torchvision's pasting and pycocotools.

    python benchmarks/predict.py [--rounds 3] [--threads 1] [--tables-only]

First 100 masks of 56 x 56 logits at 640 x 480 and at 4000 x 3000: `torchvision`'s
`paste_masks_in_image`, thresholded, and `pycocotools`' `encode`, against `to_records`. Rounds are
interleaved; CPU milliseconds are medians. The peak of memory is that of a process that does
nothing else, above what it takes with everything imported and the logits made.

Then what ours costs for 1 to 1,000 objects of up to 400 pixels in pictures of 1, 12 and 100
megapixels, and for 100 objects of growing size.
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch.nn import functional
from torchvision.models.detection.roi_heads import paste_masks_in_image

from brefine.parts.masks import to_records
from brefine.structures import Category, Instances

SIDE = 56
CATEGORIES = [Category(1, "object")]
Size = tuple[int, int]
#: (height, width), smallest and largest side of a box
SMALL: tuple[Size, float, float] = ((480, 640), 16, 250)
LARGE: tuple[Size, float, float] = ((3000, 4000), 100, 1500)
MEGAPIXELS: dict[str, Size] = {"1": (870, 1150), "12": (3000, 4000), "100": (10_000, 10_000)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tables-only", action="store_true", help="leave the comparison out")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)  # system, case: a child process
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        name, case = options.peak
        print(measure_peak(SYSTEMS[name], draw(100, *CASES[case])))
        return
    if not options.tables_only:
        compare(options.rounds)
    tabulate(options.rounds)


def draw(count: int, size: Size, smallest: float, largest: float) -> Instances:
    """Objects with wavy outlines in boxes of these sides, anywhere in a picture."""
    random = torch.Generator().manual_seed(0)
    sides = torch.rand(count, 2, generator=random) * (largest - smallest) + smallest
    corners = torch.rand(count, 2, generator=random) * (torch.tensor(size[::-1]) - sides)
    step = (torch.arange(SIDE) + 0.5) / SIDE - 0.5
    noise = functional.interpolate(
        torch.randn(count, 1, 7, 7, generator=random), size=SIDE, mode="bicubic"
    )
    logits = 40 * (0.18 - step[:, None] ** 2 - step**2) + noise[:, 0]
    boxes = torch.cat([corners, corners + sides], 1)
    labels, scores = torch.zeros(count, dtype=torch.int64), torch.linspace(1, 0, count)
    return Instances(size, boxes, labels, scores, logits=logits)


def ours(found: Instances) -> list[Any]:
    return [record["segmentation"] for record in to_records(found, 1, CATEGORIES, found.size)]


def theirs(found: Instances) -> list[Any]:
    assert found.logits is not None
    masks = paste_masks_in_image(found.logits.sigmoid()[:, None], found.boxes, found.size)
    return [coco_mask.encode(np.asfortranarray(mask[0].numpy() > 0.5)) for mask in masks]


SYSTEMS: dict[str, Callable[[Instances], list[Any]]] = {
    "torchvision + pycocotools": theirs,
    "brefine": ours,
}
CASES = {"640 x 480": SMALL, "4000 x 3000": LARGE}


def compare(rounds: int) -> None:
    """Time and peak memory of both, and how much their masks agree."""
    print(f"100 masks, {SIDE} x {SIDE} logits; CPU ms, median of {rounds}; peak MB above imports")
    # First, since a process starts with the peak of its parent.
    command = [sys.executable, __file__, "--threads", str(torch.get_num_threads()), "--peak"]
    peak_of = {
        (name, case): float(subprocess.check_output([*command, name, case]))
        for case in CASES
        for name in SYSTEMS
    }
    for case, (size, smallest, largest) in CASES.items():
        found = draw(100, size, smallest, largest)
        times: dict[str, list[float]] = {name: [] for name in SYSTEMS}
        masks = {}
        for _ in range(rounds):
            for name, run in SYSTEMS.items():
                start = time.process_time()
                masks[name] = run(found)
                times[name].append(1000 * (time.process_time() - start))
        medians = [statistics.median(values) for values in times.values()]
        peaks = [peak_of[name, case] for name in SYSTEMS]
        for name, median, peak in zip(SYSTEMS, medians, peaks, strict=True):
            print(f"{case:12} {name:26} {median:10.1f} ms {peak:10.1f} MB")
        pairs = zip(*masks.values(), strict=True)
        ious = [coco_mask.iou([one], [other], [0])[0, 0] for one, other in pairs]
        print(
            f"{case:12} {medians[0] / medians[1]:.0f} times as fast, 1/"
            f"{peaks[0] / max(peaks[1], 1):.0f} of the memory; mean IoU {np.mean(ious):.4f}"
        )


def measure_peak(run: Callable[[Instances], list[Any]], found: Instances) -> float:
    """MB by which the memory of this process rises above what it has ever been before."""
    run(draw(1, (64, 64), 16, 32))  # what the first call loads is not the masks'
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(found)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def tabulate(rounds: int) -> None:
    """What ours costs by picture, by number of objects and by their size."""
    counts = (1, 10, 100, 1000)
    print("\nobjects of 16 to 400 pixels; CPU ms, median")
    print(f"{'megapixels':>12}", *(f"{count:>8,}" for count in counts))
    for name, size in MEGAPIXELS.items():
        row = [timed(draw(count, size, 16, 400), rounds) for count in counts]
        print(f"{name:>12}", *(f"{value:8.1f}" for value in row))
    print("\n100 objects in 100 megapixels, by side of their boxes in pixels; CPU ms, median")
    sides = (50, 200, 800, 3200, 9000)
    print(f"{'side':>12}", *(f"{side:>8,}" for side in sides))
    row = [timed(draw(100, MEGAPIXELS["100"], side, side), rounds) for side in sides]
    print(f"{'':>12}", *(f"{value:8.1f}" for value in row))


def timed(found: Instances, rounds: int) -> float:
    values = []
    ours(found)
    for _ in range(2 * rounds + 1):
        start = time.process_time()
        ours(found)
        values.append(1000 * (time.process_time() - start))
    return statistics.median(values)


if __name__ == "__main__":
    main()
