"""Mask heads alone, trained and judged in true boxes: what quality a head has for which time.

    python benchmarks/quality/heads.py [--data nuclei=PATH ...] [--steps 400] [--seeds 0 1 2]
        [--only HEAD ...] [--results FILE] [--tables-only]

Trunk and mask head of ``HEADS`` and ``PARTS`` learn from true boxes that are jittered, with nothing
else around them: no head has an advantage by what its detector finds. Trunk, pictures, boxes, steps
and rates are the same for all. A set's PATH holds ``train.json``, ``val.json`` (COCO) and
``images``; the toy set is drawn. Figures are means over the objects of ``val.json``, and processor
time of the mask head for 100 boxes, as `Predictor` runs it, all heads taking turns. Each run is
kept in the results file when it is there and not made again. In the end the tables of
docs/speed.md (``HEADS``) and docs/quality.md (``PARTS``) and the picture are written anew from that
file.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from study import source
from torch import Tensor, nn

from brefine import pretrained
from brefine.data import toy
from brefine.data.loader import Batch, TrainSet
from brefine.data.read import read
from brefine.evaluate import mask_quality
from brefine.files import replacing
from brefine.methods import create
from brefine.parts import roi
from brefine.parts.backbone import Backbone
from brefine.parts.inference import prepare
from brefine.parts.two_stage import Truth, TwoStage
from brefine.parts.winograd import quicken
from brefine.predict import Predictor
from brefine.progress import Progress
from brefine.recipe import DataRecipe
from brefine.structures import Images, Instances

ROOT = Path(__file__).resolve().parents[2]
BASE = {
    "backbone": "tf_efficientnet_lite0",
    "channels": 64,
    "detector": {"fpn_norm": "group", "box_hidden": 32},
}
LIGHT = {"channels": 256, "widths": (256, 128, 64), "detail": 64}
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "Mask R-CNN": ("mask_rcnn", {}),
    "full": ("brefine", {}),
    "full, 2 convs": ("brefine", {"num_convs": 2}),
    "full, shared detail": ("brefine", {"detail": 64}),
    "full, narrow": ("brefine", {"widths": (64, 48, 32)}),
    "light": ("brefine", {"widths": (64, 48, 32), "detail": 64}),
    "light, 3 detail convs": (
        "brefine",
        {"widths": (64, 48, 32), "detail": 64, "detail_convs": 3},
    ),
    "light, detail at stride 2": (
        "brefine",
        {"widths": (64, 48, 32), "detail": 64, "detail_stride": 2},
    ),
    "full, shared detail at stride 2": ("brefine", {"detail": 64, "detail_stride": 2}),
    "lighter": ("brefine", {"widths": (64, 32, 16), "detail": 32}),
    "full, early exit": ("brefine", {"early_exit": 1.0}),
    "light, early exit": ("brefine", {"widths": (64, 48, 32), "detail": 64, "early_exit": 1.0}),
    "light, GroupNorm": ("brefine", {"widths": (64, 48, 32), "detail": 64, "norm": "group"}),
    "full, 256 channels": ("brefine", {"channels": 256}),
    "light, 256 channels": ("brefine", LIGHT),
    "light, 256 channels, 2 convs": ("brefine", {**LIGHT, "num_convs": 2}),
    "light, 256 channels, 2 convs, 128 for detail": (
        "brefine",
        {**LIGHT, "num_convs": 2, "detail": 128},
    ),
    # that of the recipe brefine_light_r50_1x
    "light, 256 channels, 2 convs, 96 at last": (
        "brefine",
        {**LIGHT, "num_convs": 2, "widths": (256, 128, 96)},
    ),
    "light, 256 channels, 1 conv, 96 at last": (
        "brefine",
        {**LIGHT, "num_convs": 1, "widths": (256, 128, 96)},
    ),
}
#: the full head with one part changed, for what each is worth
PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "binary cross-entropy (boundary weight 0)": ("brefine", {"boundary_weight": 0.0}),
    "boundary weight 3": ("brefine", {"boundary_weight": 3.0}),
    "boundary ratio 0.05": ("brefine", {"boundary_ratio": 0.05}),
    "no residual-aware modules": ("brefine", {"context": False}),
    "none of their convolutions dilated": ("brefine", {"dilations": (1, 1, 1)}),
    "main line from P2 only": ("brefine", {"levels": "p2"}),
    "1 stage (14 x 14)": ("brefine", {"stages": 1}),
    "2 stages (28 x 28)": ("brefine", {"stages": 2}),
    "GroupNorm": ("brefine", {"norm": "group"}),
    "deep supervision (0.5)": ("brefine", {"deep_supervision": 0.5}),
}
SIZES = {"short_side": (256,), "long_side": 512, "flip": 0.5, "workers": 0}
MOST = 24  # boxes a batch of 2 pictures
MARKERS = "<!-- made by benchmarks/quality/heads.py -->", "<!-- end of heads -->"
WHOLE = ("Mask R-CNN", "full")  # what the table of parts begins with


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=source, action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=[*HEADS, *PARTS], default=[*HEADS, *PARTS])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=int, default=100, help="pictures to judge by")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/heads.json")
    parser.add_argument("--tables-only", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {"runs": {}, "milliseconds": {}}
    if options.results.is_file():
        results = json.loads(options.results.read_text(encoding="utf-8"))
    if others := {key.split("/")[2] for key in results["runs"]} - {str(options.steps)}:
        parser.error(f"{options.results}: has runs of {min(others)} steps: give another --results")
    if not options.tables_only:
        with tempfile.TemporaryDirectory() as place:
            toy.draw(Path(place) / "toy", train=400, val=100, seed=0)
            folders = {"toy": Path(place) / "toy"}
            folders |= dict(options.data)
            for seed in options.seeds:
                for name, folder in folders.items():
                    for head in options.only:
                        key = f"{name}/{head}/{options.steps}/{seed}"
                        if key not in results["runs"]:
                            results["runs"][key] = learn(folder, key, head, seed, options)
                            keep(results, options.results)
        results["milliseconds"] = time_heads()
        results["torch"] = torch.__version__
        keep(results, options.results)
    fill(ROOT / "docs/speed.md", table(results))
    fill(ROOT / "docs/quality.md", parts_table(results))
    with replacing(ROOT / "docs/images/heads.svg") as aside:
        aside.write_text(draw(results), encoding="utf-8")


def fill(page: Path, text: str) -> None:
    """Put a table between the markers of a page."""
    print(text)
    before, rest = page.read_text(encoding="utf-8").split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    with replacing(page) as aside:
        aside.write_text(f"{before}{MARKERS[0]}\n{text}\n{MARKERS[1]}{after}", encoding="utf-8")


def keep(results: Mapping[str, Any], file: Path) -> None:
    """Write the results."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as aside:
        aside.write_text(json.dumps(results, indent=1), encoding="utf-8")


def build(head: str, classes: int) -> TwoStage:
    """A model with this mask head and ImageNet's trunk."""
    method, more = (HEADS | PARTS)[head]
    model = create(method, classes, **{**BASE, **more})
    assert isinstance(model, TwoStage)
    return model


def learn(
    folder: Path, key: str, head: str, seed: int, options: argparse.Namespace
) -> dict[str, float]:
    """Train a head, and measure its masks in true boxes."""
    train, val = (read(folder / f"{split}.json", folder / "images") for split in ("train", "val"))
    torch.manual_seed(seed)
    model = quicken(build(head, len(train.categories)))
    pretrained.start(model, "imagenet")
    learnt = [*model.trunk.parameters(), *model.mask_head.parameters()]
    if model.branch is not None:
        learnt += model.branch.parameters()
    learnt = [p for p in learnt if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, 1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / options.steps)),
    )
    data = DataRecipe(train=folder / "train.json", **SIZES)
    model.train()
    start, losses = time.process_time(), []
    with Progress(key, options.steps) as progress:
        for images, targets in batches(TrainSet(train, data, seed), options.steps, seed):
            loss = mask_loss(model, images, targets)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(learnt, 5.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            progress.advance(1, f"loss {statistics.mean(losses[-20:]):.3f}")
    seconds = time.process_time() - start
    predictor = Predictor(
        prepare(model), train.categories, short_side=256, long_side=512, device="cpu"
    )
    found = mask_quality(predictor, val, limit=options.limit)
    return {**found, "train_seconds": seconds}


def batches(pictures: TrainSet, steps: int, seed: int) -> Iterator[Batch]:
    """Two pictures with objects at a time, in an order that follows from the seed."""
    random = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        chosen: list[tuple[Tensor, Instances]] = []
        while len(chosen) < 2:
            order = order or torch.randperm(len(pictures), generator=random).tolist()
            picture, target = pictures[order.pop()]
            if len(target):
                chosen.append((picture, target))
        yield Images.stack([p for p, _ in chosen]), [t for _, t in chosen]


def mask_loss(model: TwoStage, images: Images, targets: Sequence[Instances]) -> Tensor:
    """The head's loss in jittered true boxes; the same ones for every head."""
    rows = roi.rows([target.boxes for target in targets])
    labels = torch.cat([target.labels for target in targets])
    index = torch.cat([torch.arange(len(target)) for target in targets])
    random = torch.Generator().manual_seed(int(rows.sum()) % 2**31)
    some = torch.randperm(len(rows), generator=random)[:MOST].sort().values
    rows, labels, index = rows[some], labels[some], index[some]
    size = (rows[:, 3:] - rows[:, 1:3]).repeat(1, 2)
    rows[:, 1:] += 0.1 * size * (2 * torch.rand(size.shape, generator=random) - 1)
    features = model.features(images)
    truth = Truth(rows, index, targets, model.convention)
    head: Any = model.mask_head
    total: Tensor = torch.stack(
        [v.mean() for v in head.loss(features, rows, labels, truth).values()]
    ).sum()
    return total


def time_heads(rounds: int = 7) -> dict[str, float]:
    """Processor milliseconds of each head for 100 boxes of 8 to 128 pixels, and its branch."""
    torch.manual_seed(0)
    images = Images.stack([torch.rand(3, 256, 320) * 255])
    side = 8 * 16 ** torch.rand(100, 2)
    corner = torch.rand(100, 2) * (torch.tensor([320.0, 256]) - side)
    given = [Instances((256, 320), torch.cat([corner, corner + side], 1), torch.zeros(100).long())]
    models = {name: prepare(build(name, 4)).eval() for name in HEADS}
    times: dict[str, list[float]] = {name: [] for name in HEADS}
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for name, model in models.items():
                levels = model.trunk(images)
                start = time.process_time()
                if model.branch is not None:
                    levels = [*levels[: len(Backbone.strides)], model.branch(levels)[0]]
                model.predict(images, given, features=levels)
                if turn:
                    times[name].append((time.process_time() - start) * 1000)
    return {name: round(statistics.median(found), 1) for name, found in times.items()}


def gathered(results: Mapping[str, Any]) -> dict[tuple[str, str], list[dict[str, float]]]:
    """Runs of a set and a head."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for key, run in results["runs"].items():
        name, head, _, _ = key.split("/")
        found.setdefault((name, head), []).append(run)
    return found


def table(results: Mapping[str, Any]) -> str:
    """Markdown: a row a head, boundary IoU and mask IoU in true boxes on each set."""
    found = gathered(results)
    sets = list(dict.fromkeys(name for name, _ in found))
    timed = results["milliseconds"]
    counts = sorted({len(runs) for (_, head), runs in found.items() if head in HEADS})
    heads = ["head", "ms / 100 boxes", *(f"{name}: boundary IoU | mask IoU" for name in sets)]
    lines = [" | ".join(heads), " | ".join(["---"] + ["---:"] * (1 + 2 * len(sets)))]
    for head in HEADS:
        if not any((name, head) in found for name in sets):
            continue
        cells = [head, f"{results['milliseconds'][head]:.0f}" if head in timed else "-"]
        for name in sets:
            for key in ("boundary_iou", "mask_iou"):
                cells.append(spread([r[f"given_boxes/{key}"] for r in found.get((name, head), [])]))
        lines.append(" | ".join(cells))
    seeds = " or ".join(map(str, counts))
    rows = "\n".join(f"| {line} |" for line in lines)
    title = f"Percent, mean and range over seeds ({seeds} each)."
    return f"{title}\n\n{rows}\n\n![heads](images/heads.svg)"


def parts_table(results: Mapping[str, Any]) -> str:
    """Markdown: what a change of one part does to the full head, by size of the object."""
    found = gathered(results)
    columns = [f"boundary_iou{size}" for size in ("", "_S", "_M", "_L")] + ["mask_iou"]
    titles = ["boundary IoU", "small", "medium", "large", "mask IoU"]
    lines = [" | ".join(["set", "head", "seeds", *titles]), "---|---|" + "---:|" * 5 + "---:"]
    for name in dict.fromkeys(name for name, _ in found):
        for head in (*WHOLE, *PARTS):
            if runs := found.get((name, head)):
                values = [spread([r[f"given_boxes/{key}"] for r in runs]) for key in columns]
                lines.append(" | ".join([name, head, str(len(runs)), *values]))
    return "\n".join(f"| {line} |" for line in lines)


def spread(values: Sequence[float]) -> str:
    """Mean in percent, and the range where there is one."""
    if not values:
        return "-"
    mean = 100 * statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.1f}"
    return f"{mean:.1f} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def draw(results: Mapping[str, Any]) -> str:
    """A picture for each set: boundary IoU over time, a numbered dot a head."""
    found = gathered(results)
    sets = list(dict.fromkeys(name for name, _ in found))
    timed = [head for head in HEADS if head in results["milliseconds"]]
    shown = [head for head in timed if any((name, head) in found for name in sets)]
    half = -(-len(shown) // 2)
    parts = [
        f'<text x="{40 + 360 * (i // half)}" y="{335 + 17 * (i % half)}">{i + 1}: {escape(head)}'
        "</text>"
        for i, head in enumerate(shown)
    ]
    for i, name in enumerate(sets):
        points = {
            head: (
                results["milliseconds"][head],
                100 * statistics.mean(r["given_boxes/boundary_iou"] for r in found[name, head]),
            )
            for head in shown
            if (name, head) in found
        }
        numbers = {head: shown.index(head) + 1 for head in points}
        parts.append(panel(name, points, numbers, 40 + 360 * i))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {40 + 360 * max(2, len(sets))} '
        f'{340 + 17 * half}">'
        "<style>text{font:11px sans-serif;fill:#30363d}.t{font-weight:bold;font-size:13px}"
        ".n{fill:#fff;font-size:9px;text-anchor:middle}"
        "</style><rect width='100%' height='100%' fill='#fff'/>" + "".join(parts) + "</svg>\n"
    )


def panel(
    name: str,
    points: Mapping[str, tuple[float, float]],
    numbers: Mapping[str, int],
    left: float,
) -> str:
    """Axes and dots of a set."""
    width, top, height = 290, 40, 230
    times = [math.log10(x) for x, _ in points.values()]
    least, most = min(times) - 0.1, max(times) + 0.1
    values = [y for _, y in points.values()]
    low, high = math.floor(min(values) - 0.5), math.ceil(max(values) + 0.5)

    def at(x: float, y: float) -> tuple[float, float]:
        return left + width * (math.log10(x) - least) / (most - least), top + height * (
            1 - (y - low) / (high - low)
        )

    parts = [f'<text class="t" x="{left}" y="24">{escape(name)}: boundary IoU, true boxes</text>']
    for value in range(low, high + 1, max(1, (high - low) // 6)):
        y = at(1, value)[1]
        parts.append(f'<path d="M{left} {y:.0f}h{width}" stroke="#d8dbe0"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.0f}" text-anchor="end">{value}</text>')
    ticks = [k * 10**power for power in range(1, 6) for k in (1, 2, 5)]
    for tick in (tick for tick in ticks if least <= math.log10(tick) <= most):
        x = at(tick, low)[0]
        parts.append(
            f'<text x="{x:.0f}" y="{top + height + 16}" text-anchor="middle">{tick}</text>'
        )
    parts.append(
        f'<text x="{left + width / 2}" y="{top + height + 34}" text-anchor="middle">'
        "CPU ms for 100 boxes</text>"
    )
    best = -math.inf
    for head, (x, y) in sorted(points.items(), key=lambda item: item[1]):
        px, py = at(x, y)
        colour = "#0b6fb8" if y > best else "#9aa1ab"  # nothing quicker is as good
        best = max(best, y)
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="7" fill="{colour}"/>')
        parts.append(f'<text class="n" x="{px:.1f}" y="{py + 3:.1f}">{numbers[head]}</text>')
    return "".join(parts)


if __name__ == "__main__":
    sys.exit(main())
