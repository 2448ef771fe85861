"""One system in a process of its own, which runs when it is told to: see peers.py.

    python benchmarks/peer.py "YOLO26s-seg" PICTURE THREADS

Needs the system's package and torch, and nothing of this project. Writes a line of json when it
is built, and one for every line that it reads.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

Run = Callable[[], int]


def rf_detr(picture: Path, threads: int) -> Run:
    import torch
    from rfdetr import RFDETRSegNano

    torch.set_num_threads(threads)
    model = RFDETRSegNano(pretrain_weights=None, device="cpu")
    return lambda: len(model.predict(str(picture), threshold=0.0))


def yolo(picture: Path, threads: int) -> Run:
    import torch
    from ultralytics import YOLO

    model = YOLO("yolo26s-seg.yaml")

    def run() -> int:
        torch.set_num_threads(threads)  # it sets the number itself
        (found,) = model.predict(
            str(picture), device="cpu", imgsz=640, conf=1e-9, max_det=100, verbose=False
        )
        return len(found)

    return run


#: package and builder by name
PEERS = {"RF-DETR-Seg Nano": ("rfdetr", rf_detr), "YOLO26s-seg": ("ultralytics", yolo)}


def serve(build: Callable[[], Run]) -> None:
    """Build, then run once for every line of standard input.

    Answers have ``error``, or ``cpu`` and ``wall`` seconds, ``objects`` and ``peak``, the most
    megabytes that the process ever had.
    """
    # What packages print goes to stderr; answers have the real stdout.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)

        def answer(**values: object) -> None:
            print(json.dumps(values), file=answers, flush=True)

        try:
            run = build()
            answer(objects=run())  # warms up
        except Exception as error:  # whatever a package may raise
            first = str(error).strip().partition("\n")[0]
            answer(error=f"{type(error).__name__}: {first}")
            return
        for _ in sys.stdin:
            cpu, wall = time.process_time(), time.perf_counter()
            objects = run()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            answer(cpu=cpu, wall=wall, objects=objects, peak=peak())


def peak() -> float:
    """Megabytes; 0 where nothing tells."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3


if __name__ == "__main__":
    name, picture, threads = sys.argv[1:]
    serve(lambda: PEERS[name][1](Path(picture), int(threads)))
