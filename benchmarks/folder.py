"""Peak memory and speed of ``brefine predict`` by the number of pictures in a folder.

A tiny untrained model looks at small pictures of noise and keeps all it finds, so that what grows
with their number would show. Each row is a process of its own.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def measure(folder: Path, save: str, batch: int) -> None:
    import torch

    from brefine.data.toy import CATEGORIES
    from brefine.jobs import predict_files
    from brefine.methods import create
    from brefine.predict import Predictor

    torch.set_num_threads(1)
    torch.manual_seed(0)
    detector = {"box_hidden": 32, "detections": 10, "norm": "batch", "frozen_stages": 0}
    options = {"backbone": "lcnet_035", "channels": 16, "detector": detector}
    model = create("brefine", len(CATEGORIES), **options)
    predictor = Predictor(model, CATEGORIES, short_side=96, long_side=128, device="cpu")  # type: ignore[arg-type]
    predictor.several(
        [torch.zeros(3, 96, 128, dtype=torch.uint8)] * batch
    )  # what a first run takes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        names = save.split(",")
        summary = predict_files(
            predictor, [folder], Path(out) / "out", save=names, threshold=0, batch=batch
        )
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{summary.pictures:8}{summary.objects:9}{before / 1024:12.0f}{after / 1024:12.0f}"
        f"{summary.pictures / seconds:12.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[30, 300, 3000])
    parser.add_argument("--save", default="coco,csv,cvat")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        measure(arguments.folder, arguments.save, arguments.batch)
        return
    from PIL import Image

    print("pictures  objects  MB at start  MB at most  pictures/s")
    random = np.random.default_rng(0)
    for count in arguments.counts:
        with tempfile.TemporaryDirectory() as folder:
            for number in range(count):
                pixels = random.integers(0, 256, (96, 128, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(Path(folder) / f"{number:06}.png")
            command = [sys.executable, __file__, "--folder", folder]
            command += ["--save", arguments.save, "--batch", str(arguments.batch)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            print(done.stdout, end="", flush=True)


if __name__ == "__main__":
    main()
