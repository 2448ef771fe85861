"""A training step of BRefine over that of torchvision's Mask R-CNN, on a CPU.

    python benchmarks/train_step.py [--short-side 400 800] [--threads 2] [--rounds 3]
        [--batch 2] [--rois 200] [--option mask_checkpoint=true ...]

Loss, its gradients and a step of SGD, on the same pictures, objects and RoIs: 1,000 proposals a
picture are put in the place of what the RPNs propose, so that mask heads learn from ``--rois`` a
batch, and box heads from all proposals. Both keep norms and the first stage frozen. All take turns.
``--option`` adds BRefine with other options of the model, and may be given more than once; the word
``plain`` among them leaves convolutions as they are in PyTorch.

Where the time goes is measured apart: gradients of RPN, boxes and masks are worked out one after
the other as far as the pyramid, then the trunk's. Peaks of memory are those of processes that do
nothing else. Figures go to benchmarks/results/train_step.json, and from there to docs/speed.md.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import box_iou

from brefine import losses, speed
from brefine.data.pictures import network_size
from brefine.methods import create
from brefine.parts import roi, two_stage
from brefine.parts.winograd import quicken
from brefine.progress import Progress
from brefine.recipe import Recipe
from brefine.speed import Place
from brefine.structures import Bitmaps, Images, InputError, Instances
from page import (
    describe_machine,
    print_machine,
    read_results,
    table,
    write_results,
    write_tables,
)

ROOT = Path(__file__).parents[1]
SIZE = (480, 640)  # of the pictures, before they are resized
OBJECTS = 10  # in a picture
PROPOSALS = 1000  # for a picture
CLASSES = 80
PLAIN = "plain"  # convolutions


class Way(NamedTuple):
    """A system that learns.

    Attributes:
        step: of training; gives the losses.
        rois: that the last step's heads learnt from, by head.
    """

    step: Callable[[], dict[str, Tensor]]
    rois: dict[str, int]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short-side", type=int, nargs="+", default=[400, 800])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rois", type=int, default=200, help="of the mask head, in a batch")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes/brefine_r50_1x.yaml")
    parser.add_argument(
        "--option", nargs="+", action="append", default=[], metavar="KEY=VALUE", help="see above"
    )
    parser.add_argument("--tables-only", action="store_true", help="write the page, no more")
    parser.add_argument("--skip-peaks", action="store_true", help="no peaks of memory")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/train_step.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/speed.md")
    parser.add_argument("--peak", help=argparse.SUPPRESS)  # a way: in a process of its own
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.peak is not None:
        print(peak(options))
        return
    if not options.tables_only:
        measure(options)
    write_tables(options.page, "train_step", tables(read_results(options.results)))
    print(options.page)


def measure(options: argparse.Namespace) -> None:
    """All sizes, each kept as soon as it is there."""
    results = {"cases": {}} | read_results(options.results) | {"machine": describe_machine()}
    variants: list[list[str]] = [[], *options.option]
    try:
        for settings in variants:
            build(options.recipe, settings)  # a mistake is told before hours have gone by
    except InputError as error:
        raise SystemExit(str(error)) from None
    turns = len(options.short_side) * (len(variants) + 2) * (options.rounds + 1)
    with Progress("steps", turns) as bar:
        for side in options.short_side:
            scene = Scene(side, options.batch, options.rois)
            systems = {"torchvision": theirs(scene, options.recipe)}
            for settings in variants:
                systems[_name(settings)] = ours(build(options.recipe, settings), scene)
            model = build(options.recipe, [])
            ways, parts = take_turns(systems, model, scene, options.rounds, bar)
            del systems, model
            if not options.skip_peaks:
                for way in ways:
                    ways[way]["peak"] = _peak_of(way, side, options)
            key = f"{side}/{options.batch}/{options.rois}/{options.threads}"
            results["cases"][key] = {"rounds": options.rounds, "ways": ways, "parts": parts}
            write_results(options.results, results)


def take_turns(
    systems: dict[str, Way], model: Any, scene: Scene, rounds: int, bar: Progress
) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Medians of whole steps by way, and CPU seconds of the parts of BRefine's."""
    times: dict[str, list[tuple[float, ...]]] = {way: [] for way in systems}
    apart: list[dict[str, tuple[float, ...]]] = []
    found = {}
    for number in range(rounds + 1):
        for way, system in systems.items():
            timer = speed.Timer()
            found[way] = system.step()
            if number:  # the first warms up
                times[way].append(timer())
            bar.advance(figures=f"{scene.size}: {way}")
        if number:
            apart.append(split(model, scene))
        bar.advance(figures=f"{scene.size}: parts")
    medians = {
        way: [statistics.median(each) for each in zip(*taken, strict=True)]
        for way, taken in times.items()
    }
    base = medians["torchvision"]
    ways = {
        way: {
            "cpu": cpu,
            "wall": wall,
            "cpu_ratio": cpu / base[0],
            "wall_ratio": wall / base[1],
            "rois": systems[way].rois,
            "losses": {name: value.item() for name, value in found[way].items()},
        }
        for way, (cpu, wall) in medians.items()
    }
    return ways, {part: statistics.median(each[part][0] for each in apart) for part in apart[0]}


class Scene:
    """Pictures, their objects, and what is proposed in them.

    Args:
        short_side: pixels.
        batch: pictures.
        rois: that overlap an object by half or more, in the batch, objects included.
    """

    def __init__(self, short_side: int, batch: int, rois: int) -> None:
        if rois % batch or not OBJECTS <= rois // batch <= PROPOSALS + OBJECTS:
            raise SystemExit(f"--rois {rois}: expected {OBJECTS} or more for each of the pictures")
        self.size = height, width = network_size(SIZE, short_side, 10 * short_side)
        random = torch.Generator().manual_seed(0)
        pixels = (torch.rand(3, height, width, generator=random) * 255 for _ in range(batch))
        self.pictures = list(pixels)
        self.targets, self.proposals = [], []
        for _ in range(batch):
            boxes = speed.Forced.draw(self.size, 1, OBJECTS, CLASSES).boxes.round()
            boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 8)
            spans = (boxes[:, 2:] - boxes[:, :2]).int().tolist()
            windows = [ellipse(h, w) for w, h in spans]
            labels = torch.randint(0, CLASSES, (OBJECTS,), generator=random)
            masks = Bitmaps(windows, boxes[:, :2].long())
            self.targets.append(Instances(self.size, boxes, labels, masks=masks))
            near = rois // batch - OBJECTS
            self.proposals.append(propose(boxes, self.size, near, PROPOSALS - near, random))

    def __len__(self) -> int:
        return len(self.pictures)


def ellipse(height: int, width: int) -> Tensor:
    """``[height, width]`` uint8."""
    y, x = ((torch.arange(side) + 0.5) / side * 2 - 1 for side in (height, width))
    return (y[:, None] ** 2 + x**2 <= 1).to(torch.uint8)


def propose(
    boxes: Tensor, size: tuple[int, int], near: int, far: int, random: torch.Generator
) -> Tensor:
    """Boxes that overlap an object well, and others that overlap none by half."""
    chosen = boxes[torch.arange(near) % len(boxes)]
    sides = (chosen[:, 2:] - chosen[:, :2]).repeat(1, 2)
    close = chosen + sides * (torch.rand(near, 4, generator=random) - 0.5) * 0.1
    others = speed.Forced.draw(size, 4 * far + 1, 1, 1).proposals
    others = others[box_iou(others, boxes).amax(1) < 0.45][:far]
    return torch.cat([close, others])


# --- the systems


def build(recipe: Path, settings: Sequence[str]) -> Any:
    """BRefine with random weights; it learns from all RoIs that it is given."""
    all_rois = ["model.options.detector.mask_rois=null"]
    changes = [f"model.options.{setting}" for setting in settings if setting != PLAIN]
    chosen = Recipe.load(recipe).with_settings([*all_rois, *changes])
    torch.manual_seed(0)
    model = _create(chosen).train()
    if PLAIN in settings:
        return model.to(memory_format=torch.channels_last)
    return quicken(model)  # as `train` does


def _create(recipe: Recipe) -> Any:
    return create(recipe.model.method, CLASSES, **recipe.model.options)


def optimizer(model: Any) -> torch.optim.Optimizer:
    """SGD that leaves the weights where they are, so that all steps are alike."""
    trainable = [each for each in model.parameters() if each.requires_grad]
    return torch.optim.SGD(trainable, lr=0.0, momentum=0.9)


def ours(model: Any, scene: Scene) -> Way:
    """One of our models."""
    images, descent, rois = Images.stack(scene.pictures), optimizer(model), {}
    model.rpn.propose = lambda *inputs, **options: scene.proposals
    box_loss, mask_loss = model.box_head.loss, model.mask_head.loss

    def learn_boxes(chosen: Any, *inputs: Any) -> Any:
        rois["boxes"] = len(chosen.rows)
        return box_loss(chosen, *inputs)

    def learn_masks(features: Any, rows: Tensor, *inputs: Any) -> Any:
        rois["masks"] = len(rows)
        return mask_loss(features, rows, *inputs)

    model.box_head.loss, model.mask_head.loss = learn_boxes, learn_masks

    def step() -> dict[str, Tensor]:
        descent.zero_grad(set_to_none=True)
        named: dict[str, Tensor] = model.loss(images, scene.targets)
        losses.total(named).backward()
        descent.step()
        return named

    return Way(step, rois)


def theirs(scene: Scene, recipe: Path) -> Way:
    """Mask R-CNN of torchvision on the recipe's trunk, as frozen as ours."""
    torch.manual_seed(0)
    trunk = _create(Recipe.load(recipe)).trunk
    backbone: Any = speed.Pyramid(trunk)
    if trunk.name.startswith("resnet50"):
        backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=3)
    model = MaskRCNN(
        backbone,
        CLASSES + 1,
        min_size=min(scene.size),
        max_size=max(scene.size),
        box_batch_size_per_image=4 * (PROPOSALS + OBJECTS),  # all proposals are learnt from
    ).train()
    for module in backbone.body.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    descent, rois = optimizer(model), {}
    model.rpn.filter_proposals = lambda *inputs: (scene.proposals, [])
    heads = model.roi_heads
    for name, pool in (("boxes", heads.box_roi_pool), ("masks", heads.mask_roi_pool)):
        pool.register_forward_pre_hook(
            lambda _, inputs, name=name: rois.update({name: sum(map(len, inputs[1]))})
        )
    pictures = [picture / 255 for picture in scene.pictures]
    targets = []
    for target in scene.targets:
        assert target.masks is not None
        masks = target.masks.dense(scene.size)
        targets.append({"boxes": target.boxes, "labels": target.labels + 1, "masks": masks})

    def step() -> dict[str, Tensor]:
        descent.zero_grad(set_to_none=True)
        named: dict[str, Tensor] = model(pictures, targets)
        losses.total(named).backward()
        descent.step()
        return named

    return Way(step, rois)


# --- its parts


def split(model: Any, scene: Scene) -> dict[str, tuple[float, ...]]:
    """CPU and clock seconds of the parts of a step, forward and backward."""
    images = Images.stack(scene.pictures)
    model.rpn.propose = lambda *inputs, **options: scene.proposals
    model.zero_grad(set_to_none=True)
    pyramid: list[tuple[Tensor, Tensor]] = []

    def cut(levels: list[Tensor]) -> list[Tensor]:
        pyramid.extend((level, level.detach().requires_grad_()) for level in levels)
        return [leaf for _, leaf in pyramid]

    head = model.mask_head
    places = [
        Place(model.trunk, "forward", "trunk forward", change=cut),
        Place(model.rpn, "forward", "forward", "RPN"),
        Place(model.rpn, "loss", "losses", "RPN"),
        Place(model.box_head, "rounds", "forward and losses", "boxes"),
        Place(head, "loss", "forward", "masks"),
        Place(roi, "pool", "RoIAlign"),
        Place(two_stage.Truth, "__call__", "targets"),
        Place(head, "criterion", "loss"),
        Place(losses, "rank_sort", "Rank & Sort"),
        Place(losses._RankSort, "backward", "Rank & Sort backward"),
    ]
    meter = speed.Meter(speed.Timer())
    with speed.watched(meter, places):

        def step() -> None:
            named = model.loss(images, scene.targets)
            real = {name: value for name, value in named.items() if not name.startswith("raw_")}
            groups: dict[str, list[Tensor]] = {"RPN": [], "boxes": [], "masks": []}
            for name, value in real.items():
                part = "RPN" if name.startswith("rpn") else "masks" if "mask" in name else "boxes"
                groups[part].append(value)
            for part, values in groups.items():
                whole = torch.stack(values).sum()
                # balanced losses share the graph of the ranking loss
                meter.watch(whole.backward, "backward", part)(retain_graph=True)
            levels = [(level, leaf.grad) for level, leaf in pyramid if leaf.grad is not None]
            back = meter.watch(torch.autograd.backward, "trunk backward")
            back(*map(list, zip(*levels, strict=True)))

        meter.watch(step, "other")()
    return meter.parts


# --- memory


def _name(settings: Sequence[str]) -> str:
    return ", ".join(["brefine", *settings])


def _peak_of(way: str, side: int, options: argparse.Namespace) -> float:
    """Megabytes, from a process that does nothing else."""
    command = [sys.executable, __file__, "--peak", way, "--short-side", str(side)]
    for key in ("threads", "batch", "rois", "recipe"):
        command += [f"--{key}", str(getattr(options, key))]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(found.stdout.split()[-1])


def peak(options: argparse.Namespace) -> float:
    """Megabytes by which this process grows: model, gradients, momentum, one step."""
    scene = Scene(options.short_side[0], options.batch, options.rois)
    before = speed.resident("VmRSS")
    if options.peak == "torchvision":
        system = theirs(scene, options.recipe)
    else:
        system = ours(build(options.recipe, options.peak.split(", ")[1:]), scene)
    system.step()
    return (speed.resident("VmHWM") - before) / 1e6


# --- results


def tables(results: dict[str, Any]) -> str:
    """Markdown."""
    if not results:
        return ""
    text = "\n" + print_machine(results["machine"])
    for key, case in results["cases"].items():
        side, batch, rois, threads = key.split("/")
        text += (
            f"Short side {side}, {batch} pictures, {rois} RoIs with masks, {threads} threads, "
            f"medians of {case['rounds']} rounds:\n\n"
        )
        rows = [
            [
                way,
                f"{record['cpu']:.2f}",
                f"{record['cpu_ratio']:.2f}",
                f"{record['wall']:.2f}",
                f"{record['wall_ratio']:.2f}",
                f"{record['peak']:.0f}" if "peak" in record else "",
                f"{record['rois']['boxes']}",
                f"{record['rois']['masks']}",
            ]
            for way, record in case["ways"].items()
        ]
        head = ["step", "CPU s", "ratio", "clock s", "ratio", "peak MB", "RoIs", "with masks"]
        text += table(head, rows)
        whole = sum(case["parts"].values())
        rows = [
            [part, f"{1e3 * seconds:.1f}", f"{seconds / whole:.2%}"]
            for part, seconds in sorted(case["parts"].items(), key=lambda each: -each[1])
        ]
        text += table(["part of BRefine's step", "CPU ms", "share"], rows)
    return text


if __name__ == "__main__":
    main()
