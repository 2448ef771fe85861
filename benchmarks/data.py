"""The training loader against torchvision's own pipeline: pictures a second, and memory.

    python benchmarks/data.py [--data LABELS.json --images FOLDER] [--rounds 3] [--short-side 800]

Theirs is what torchvision's detection references use: `CocoDetection` wrapped for v2, flip,
shortest size, sanitised boxes. Both pad to batches of 2. Every figure comes from a process of its
own; the two take turns; medians of the rounds. Memory is the largest sum over the process and its
workers of PSS (pages that n processes share count 1/n each; Linux only), and "without libraries"
what of it is no file: torch's own code is the same for both. It is measured on a set of 100,000
drawn annotations, too. Without `--data` the speed is measured on a toy set of 640 x 480 pixels.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SYSTEMS = ("torchvision", "brefine")
BATCH = 2
#: of the large set: pictures, objects in each, points of each outline
LARGE = 4000, 25, 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="COCO json; default: a toy set")
    parser.add_argument("--images", type=Path, help="folder of its pictures")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short-side", type=int, default=800)
    parser.add_argument("--child", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        make = torchvisions if options.child == "torchvision" else ours
        loader = make(options.data, options.images, options.short_side, options.workers)
        run(loader)
        return
    print(f"{'':54}{'torchvision':>12}{'brefine':>12}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as folder:
        labels, images = options.data, options.images
        if labels is None:
            from brefine.data.toy import draw

            draw(Path(folder) / "toy", train=100, val=0, size=(480, 640), seed=0)
            labels = Path(folder) / "toy" / "train.json"
        images = images or labels.parent / "images"
        for workers in (0, 2):
            compare(f"{labels.stem}, {workers} workers", labels, images, workers, options)
        large = Path(folder) / "large"
        draw_large(large)
        options.short_side = 64  # the annotations matter here, not the pixels
        compare("100,000 annotations, 2 workers", large / "train.json", large, 2, options)


def compare(
    title: str, labels: Path, images: Path, workers: int, options: argparse.Namespace
) -> None:
    """Print medians of both systems on one set."""
    speeds: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    peaks: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    owns: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    for _ in range(options.rounds):
        for system in SYSTEMS:
            command = [sys.executable, __file__, "--child", system, "--workers", str(workers)]
            command += ["--data", str(labels), "--images", str(images)]
            command += ["--short-side", str(options.short_side)]
            child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            peak = [0, 0]
            while child.poll() is None:
                parts = [pss(process) for process in family(child.pid)]
                peak = [max(peak[i], sum(part[i] for part in parts)) for i in (0, 1)]
                time.sleep(0.1)
            assert child.stdout is not None
            output = child.stdout.read()
            if child.returncode:
                raise SystemExit(f"{system} failed")
            speeds[system].append(json.loads(output)["speed"])
            peaks[system].append(peak[0] / 2**20)
            owns[system].append(peak[1] / 2**20)
    rows = [("pictures/s", speeds, 1), ("peak MB", peaks, 0), ("MB without libraries", owns, 0)]
    for unit, values, digits in rows:
        theirs, mine = (statistics.median(values[system]) for system in SYSTEMS)
        row = f"{theirs:12.{digits}f}{mine:12.{digits}f}{mine / theirs:8.2f}"
        print(f"{title}: {unit}".ljust(54) + row, flush=True)


def family(process: int) -> list[int]:
    """A process and its descendants."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    return [process] + [one for child in children for one in family(int(child))]


def pss(process: int) -> tuple[int, int]:
    """Bytes of a process, shared pages counted in part: all, and those that are of no file."""
    sizes = dict.fromkeys(("Pss", "Pss_Anon", "Pss_Shmem"), 0)
    try:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]:
            name, _, value = line.partition(":")
            if name in sizes:
                sizes[name] = int(value.split()[0]) * 1024
    except OSError:
        pass
    return sizes["Pss"], sizes["Pss_Anon"] + sizes["Pss_Shmem"]


def run(loader: Any) -> None:
    """Go through a loader twice, the first time to warm up, and print pictures a second."""
    count = 0
    for epoch in range(2):
        if epoch:
            start = time.perf_counter()
        for pictures, _ in loader:
            count += len(pictures) * epoch
    print(json.dumps({"speed": count / (time.perf_counter() - start)}))


def ours(labels: Path, images: Path, short: int, workers: int) -> Any:
    """Our loader."""
    import torch

    from brefine.data.loader import train_loader
    from brefine.data.read import read
    from brefine.recipe import DataRecipe

    torch.set_num_threads(1)
    recipe = DataRecipe(short_side=short, long_side=round(short * 5 / 3), workers=workers)
    return train_loader(read(labels, images), recipe, batch_size=BATCH, seed=0)


def torchvisions(labels: Path, images: Path, short: int, workers: int) -> Any:
    """What torchvision's references build, with the same sizes and padding."""
    import contextlib

    import torch
    from torch.utils.data import DataLoader, Subset
    from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
    from torchvision.transforms import v2

    torch.set_num_threads(1)
    transforms = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomShortestSize(short, round(short * 5 / 3)),
            v2.ClampBoundingBoxes(),
            v2.SanitizeBoundingBoxes(),
            v2.ToPureTensor(),
        ]
    )
    with contextlib.redirect_stdout(None):
        dataset = CocoDetection(str(images), str(labels), transforms=transforms)
    keys = ["boxes", "labels", "masks"]
    # As the references do: pictures without objects are left out (v2 cannot wrap them).
    kept = [
        i
        for i, image in enumerate(dataset.ids)
        if any(entry["bbox"][2] > 0 for entry in dataset.coco.imgToAnns[image])
    ]
    wrapped = wrap_dataset_for_transforms_v2(dataset, target_keys=keys)
    return DataLoader(
        Subset(wrapped, kept),
        batch_size=BATCH,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=pad,
    )


def pad(items: Any) -> Any:
    """A batch, padded as ours are."""
    from brefine.structures import Images

    return Images.stack([picture for picture, _ in items]), [target for _, target in items]


def draw_large(folder: Path) -> None:
    """Few small pictures, named often, and very many outlines."""
    import numpy as np
    from PIL import Image

    pictures, objects, points = LARGE
    height, width = 120, 160
    random = np.random.default_rng(0)
    folder.mkdir()
    for i in range(20):
        pixels = random.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(folder / f"{i}.jpg")
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    angles = np.linspace(0, 2 * math.pi, points, endpoint=False)
    for i in range(pictures):
        images.append({"id": i, "file_name": f"{i % 20}.jpg", "height": height, "width": width})
        for _ in range(objects):
            radii = random.uniform(8, 20, points)
            x, y = random.uniform(20, width - 20), random.uniform(20, height - 20)
            outline = np.stack([x + radii * np.cos(angles), y + radii * np.sin(angles)], 1)
            low, high = outline.min(0), outline.max(0)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": int(random.integers(1, 81)),
                    "bbox": [*low.tolist(), *(high - low).tolist()],
                    "area": float(radii.mean() ** 2 * math.pi),
                    "iscrowd": 0,
                    "segmentation": [outline.round(2).ravel().tolist()],
                }
            )
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, 81)],
    }
    (folder / "train.json").write_text(json.dumps(content))


if __name__ == "__main__":
    main()
