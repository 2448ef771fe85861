"""RoIAlign on the CPU: `brefine.parts.roi.align` against torchvision's, forward and backward.

    python benchmarks/roi.py [--threads 2] [--rounds 7]

Prints medians of interleaved rounds in wall milliseconds, and the ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.ops import roi_align

from brefine.parts import roi
from brefine.parts.boxes import CONVENTIONS

#: name, channels, RoIs, cells a side, largest side of a RoI in pixels; P2 of a 800 x 1344 picture
CASES = [
    ("mask head, 56", 256, 100, 56, 400),
    ("mask head, 14", 256, 100, 14, 400),
    ("box head, 7", 256, 1000, 7, 112),
    ("small preset, 56", 64, 24, 56, 250),
    ("small preset, 7", 64, 400, 7, 112),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    convention = CONVENTIONS["detectron"]

    def ours(feature: Tensor, rois: Tensor, size: int) -> Tensor:
        return roi.align(feature, rois, size, 1 / 4, convention)

    def torchvisions(feature: Tensor, rois: Tensor, size: int) -> Tensor:
        return roi_align(feature, rois, size, 1 / 4, 0, True)

    print(f"{'wall ms, ' + str(options.threads) + ' threads':22}", end="")
    print(*(f"{title:>12}" for title in ("torchvision", "ours", "ratio")))
    for name, channels, count, size, largest in CASES:
        torch.manual_seed(0)
        feature = torch.randn(1, channels, 200, 336)
        side = 8 + torch.rand(count, 2) * (largest - 8)
        corner = torch.rand(count, 2) * (torch.tensor([1344.0, 800]) - side)
        rois = torch.cat([torch.zeros(count, 1), corner, corner + side], 1)
        rows = {"forward": ([], []), "and backward": ([], [])}
        for _ in range(options.rounds):
            for i, pool in enumerate((torchvisions, ours)):
                for kind, times in rows.items():
                    times[i].append(timed(pool, feature, rois, size, kind != "forward"))
        for kind, times in rows.items():
            theirs, mine = (statistics.median(values) for values in times)
            label = name if kind == "forward" else "   and backward"
            print(f"{label:22} {theirs:12.1f} {mine:12.1f} {theirs / mine:12.1f}")


def timed(
    pool: Callable[[Tensor, Tensor, int], Tensor],
    feature: Tensor,
    rois: Tensor,
    size: int,
    backward: bool,
) -> float:
    """Wall milliseconds of one call, with its backward pass on request."""
    feature = feature.detach().requires_grad_(backward)
    start = time.perf_counter()
    pooled = pool(feature, rois, size)
    if backward:
        pooled.sum().backward()
    return (time.perf_counter() - start) * 1000


if __name__ == "__main__":
    main()
