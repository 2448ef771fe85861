"""Time and memory of Rank & Sort, against a loop over the positives and against one sort.

    python benchmarks/losses.py            the table, the profile (about two minutes)
    python benchmarks/losses.py --quick    the same on small inputs (seconds)
    python benchmarks/losses.py --step     its share of a training step of R50 brefine (minutes)

Times are CPU milliseconds of one thread, medians of rounds in which all take turns. Ours and the
sort (one ``torch.sort``) get float32 logits. The loop runs in float64, which agrees with ours to
1e-10, and in float32. Ours and the loops run forward and backward.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import brefine
from brefine import losses
from brefine.parts.two_stage import Detector
from brefine.progress import Progress
from brefine.structures import Bitmaps, Images, Instances

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from rank_sort_loop import rank_sort_loop

SIZES = [(50, 5_000), (200, 20_000), (256, 267_069), (500, 80_000), (1000, 640_000)]
QUICK = [(20, 1_000), (50, 5_000)]
#: (mean, deviation) of the positives' and the negatives' logits
SPREADS = {"untrained": ((0.0, 1.0), (0.0, 1.0)), "trained": ((1.0, 1.0), (-6.0, 2.0))}


def draw(positives: int, negatives: int, spread: str) -> tuple[Tensor, Tensor]:
    """Logits and targets, float32, in random order."""
    rng = torch.Generator().manual_seed(0)
    (mean_p, std_p), (mean_n, std_n) = SPREADS[spread]
    x, y = torch.randn(positives + negatives, generator=rng), torch.zeros(positives + negatives)
    x[:positives] = mean_p + std_p * x[:positives]
    x[positives:] = mean_n + std_n * x[positives:]
    y[:positives] = 0.5 + 0.5 * torch.rand(positives, generator=rng)
    mixed = torch.randperm(len(x), generator=rng)
    return x[mixed], y[mixed]


def forward_backward(x: Tensor, y: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    ranking, sorting = losses.rank_sort(leaf, y)
    (ranking + sorting).backward()
    return ranking.detach()


def cpu_time(call: Callable[[], Any], seconds: float) -> float:
    """Mean CPU seconds of a call, repeated until about ``seconds`` have gone by."""
    start, count = time.process_time(), 0
    while True:
        call()
        count += 1
        if (spent := time.process_time() - start) >= seconds:
            return spent / count


def compare(sizes: list[tuple[int, int]], rounds: int) -> None:
    rows = [(spread, *size) for spread in SPREADS for size in sizes]
    print(
        f"torch {torch.__version__}, one thread; logits N(mean, deviation^2) of positives and "
        f"negatives: {SPREADS}"
    )
    print(
        f"{'logits':10}{'positives':>10}{'negatives':>10}{'ours ms':>9}{'loop64 ms':>10}"
        f"{'loop32 ms':>10}{'sort ms':>9}{'loop64/ours':>12}{'loop32/ours':>12}{'ours/sort':>10}"
        f"{'input MB':>9}{'extra MB':>9}"
    )
    with Progress("rank_sort", len(rows) * rounds) as progress:
        for spread, positives, negatives in rows:
            x, y = draw(positives, negatives, spread)
            difference = forward_backward(x, y) - rank_sort_loop(x, y).ranking
            assert abs(difference) < 1e-4, f"not equal to the loop: {difference}"
            wide = x.double()
            calls = {
                "ours": lambda x=x, y=y: forward_backward(x, y),
                "loop64": lambda x=wide, y=y: rank_sort_loop(x, y),
                "loop32": lambda x=x, y=y: rank_sort_loop(x, y),
                "sort": lambda x=x: torch.sort(x),
            }
            times = defaultdict(list)
            for _ in range(rounds):
                for name, call in calls.items():
                    times[name].append(cpu_time(call, 0.05))
                progress.advance()
            ours, loop64, loop32, sort = (1e3 * median(times[name]) for name in calls)
            print(
                f"{spread:10}{positives:10}{negatives:10}{ours:9.2f}{loop64:10.1f}{loop32:10.1f}"
                f"{sort:9.2f}{loop64 / ours:12.1f}{loop32 / ours:12.1f}{ours / sort:10.2f}"
                f"{8e-6 * len(x):9.2f}{peak_memory(positives, negatives, spread):9.2f}",
                flush=True,
            )


def peak_memory(positives: int, negatives: int, spread: str) -> float:
    """MB above the input that forward and backward need, in a process of their own."""
    command = [sys.executable, __file__, "--memory", str(positives), str(negatives), spread]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_memory(positives: int, negatives: int, spread: str) -> None:
    forward_backward(*draw(20, 100, spread))
    x, y = draw(positives, negatives, spread)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the drawing
    before = resident("VmRSS")
    forward_backward(x, y)
    print((resident("VmHWM") - before) / 1e3)


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


@contextmanager
def timed(places: list[tuple[Any, str]]) -> Iterator[dict[str, float]]:
    """CPU seconds spent inside functions, by name, while the context lasts."""
    spent: dict[str, float] = defaultdict(float)

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.process_time() - start

        return call

    kept = [(owner, name, getattr(owner, name)) for owner, name in places]
    for owner, name, function in kept:
        setattr(owner, name, wrap(name, function))
    try:
        yield spent
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)


def profile(positives: int, negatives: int, repeats: int) -> None:
    """Where the time goes, a line a part."""
    windows = losses._Windows
    parts = {
        "_check_finite": "look for NaN and infinite",
        "_sort_positives": "pairs among the positives",
        "_bucketize": "bucket of each negative",
        "__init__": "its distance to the bucket's lower end; ends in order",
        "count_above": "sums over the negatives",
        "spread": "gradient of each negative",
    }
    places = [(windows if hasattr(windows, name) else losses, name) for name in parts]
    places = [(losses, name) if name == "_bucketize" else (owner, name) for owner, name in places]
    for spread in SPREADS:
        x, y = draw(positives, negatives, spread)
        forward_backward(x, y)
        with timed(places) as spent:
            forward = backward = 0.0
            for _ in range(repeats):
                leaf = x.detach().requires_grad_()
                start = time.process_time()
                ranking, sorting = losses.rank_sort(leaf, y)
                middle = time.process_time()
                (ranking + sorting).backward()
                forward += middle - start
                backward += time.process_time() - middle
        spent["__init__"] -= spent["_bucketize"]
        total = forward + backward
        print(f"\nWhere the time goes: {spread}, {positives} positives, {negatives} negatives")
        rest = forward - sum(spent.values())
        lines = [(parts[name], spent[name]) for name in parts]
        lines += [("find positives and reached negatives", rest), ("backward", backward)]
        for title, seconds in lines:
            print(f"{1e3 * seconds / repeats:9.2f} ms {seconds / total:6.1%}  {title}")


def step(height: int, width: int, batch: int, **options: Any) -> None:
    """Share of Rank & Sort and the balance in one training step, forward and backward."""
    torch.manual_seed(0)
    print(f"brefine {options}, 80 classes, {batch} pictures of {height}x{width}, 10 objects each")
    model = brefine.create("brefine", 80, **options).train()
    images = Images.stack([torch.randint(0, 256, (3, height, width)).float()] * batch)
    targets = []
    for _ in range(batch):
        corner = torch.rand(10, 2) * torch.tensor([width, height]) * 0.6
        side = (0.08 + 0.3 * torch.rand(10, 2)) * torch.tensor([width, height])
        boxes = torch.cat([corner, corner + side], 1).round()
        spans = (boxes[:, 2:] - boxes[:, :2]).int().tolist()
        windows = [torch.ones(h, w, dtype=torch.uint8) for w, h in spans]
        masks = Bitmaps(windows, boxes[:, :2].long())
        labels = torch.randint(0, 80, (10,))
        targets.append(Instances((height, width), boxes, labels, masks=masks))
    places = [(losses, "rank_sort"), (losses, "balance"), (losses._RankSort, "backward")]
    with timed(places) as spent, Progress("step", 2) as progress:
        start = time.process_time()
        named = model.loss(images, targets)
        progress.advance()
        loss = losses.total(named)
        loss.backward()
        whole = time.process_time() - start
        progress.advance()
    print("losses: " + ", ".join(f"{name} {value.item():.4f}" for name, value in named.items()))
    share = sum(spent.values())
    parts = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in spent.items())
    print(f"CPU ms: {parts}; together {1e3 * share:.1f} of {1e3 * whole:.0f} = {share / whole:.3%}")
    print(f"peak memory of the process: {resident('VmHWM') / 1e6:.1f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small inputs, seconds")
    parser.add_argument("--step", action="store_true", help="share of a training step")
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory:
        positives, negatives, spread = arguments.memory
        print_memory(int(positives), int(negatives), spread)
        return
    if arguments.step:
        if arguments.quick:
            step(128, 160, 1, backbone="resnet18", detector=Detector(mask_rois=4))
        else:
            step(800, 1333, 2, backbone="resnet50")
        return
    compare(QUICK if arguments.quick else SIZES, rounds=2 if arguments.quick else 7)
    profile(*(QUICK if arguments.quick else SIZES)[-1], repeats=2 if arguments.quick else 10)


if __name__ == "__main__":
    main()
