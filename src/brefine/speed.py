"""What each part of a prediction costs, beside torchvision's Mask R-CNN on the same trunk.

Both look at one picture, with the same proposals and detections put in the place of what they
find: their heads then have the same work, whatever the weights are.
"""

from __future__ import annotations

import ctypes
import io
import operator
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import detection

from brefine import predict
from brefine.data.pictures import network_size
from brefine.info import build
from brefine.methods.mask_rcnn import FCNMaskHead
from brefine.parts import masks, roi, two_stage
from brefine.parts.backbone import Backbone
from brefine.parts.inference import prepare
from brefine.parts.two_stage import TwoStage
from brefine.predict import Predictor
from brefine.progress import track
from brefine.sources import Picture, as_pixels
from brefine.structures import Category, InputError, Instances

NAMES = ("brefine", "torchvision")  # of the two systems in a profile

#: seconds of the processor, seconds on the clock
Seconds = tuple[float, ...]


class Meter:
    """Books what is used up to the part that runs.

    While a part runs inside another one, the other's meter stands still, so that all parts
    together are the whole.

    Args:
        lap: numbers that were used since it was called last.
        join: of two numbers of one part: their sum, or the larger.

    Attributes:
        parts: numbers by the name of the part, in the order in which parts ended first.
    """

    def __init__(
        self,
        lap: Callable[[], tuple[float, ...]],
        join: Callable[[float, float], float] = operator.add,
    ) -> None:
        self.lap, self.join = lap, join
        self.parts: dict[str, tuple[float, ...]] = {}
        self._running: list[_Running] = []

    def watch(
        self,
        function: Callable[..., Any],
        name: str | Callable[[Any], str],
        group: str | None = None,
    ) -> Callable[..., Any]:
        """The same function, metered.

        Args:
            function: any.
            name: of its part, or a name by what it returned.
            group: goes before the names of it and of what runs inside; None: that of what it runs
                inside of.
        """

        def call(*args: Any, **kwargs: Any) -> Any:
            self._book()
            outside = self._running[-1].group if self._running else ""
            mine = _Running(outside if group is None else group)
            self._running.append(mine)
            try:
                result = function(*args, **kwargs)
            finally:
                self._book()
                self._running.pop()
            title = f"{mine.group} {name if isinstance(name, str) else name(result)}".strip()
            self.parts[title] = self._joined(self.parts.get(title, ()), mine.used)
            return result

        return call

    def _book(self) -> None:
        used = self.lap()
        if self._running:
            self._running[-1].used = self._joined(self._running[-1].used, used)

    def _joined(self, one: tuple[float, ...], other: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(map(self.join, one, other)) if one else other


@dataclass
class _Running:
    group: str
    used: tuple[float, ...] = ()


class Place(NamedTuple):
    """A function that a meter watches, where it is looked up when it is called.

    Attributes:
        owner: a module, or an object.
        attribute: of the owner.
        name: see ``Meter.watch``.
        group: see ``Meter.watch``.
        change: what is returned instead of the result.
    """

    owner: Any
    attribute: str
    name: str | Callable[[Any], str]
    group: str | None = None
    change: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class System:
    """Something that predicts.

    Attributes:
        run: from a picture to COCO's RLE; what it calls is watched by the meter.
        places: its parts.
    """

    run: Callable[[Meter], list[Any]]
    places: Sequence[Place]

    def __call__(self, meter: Meter) -> list[Any]:
        """The RLE of every detection; the meter knows what they took."""
        with torch.inference_mode(), watched(meter, self.places):
            found: list[Any] = meter.watch(self.run, "other")(meter)
        return found


@contextmanager
def watched(meter: Meter, places: Sequence[Place]) -> Iterator[None]:
    """Put metered functions in their places for as long as the block lasts."""
    before = []
    try:
        for place in places:
            own = vars(place.owner).get(place.attribute)
            before.append((place, own))
            watched = meter.watch(getattr(place.owner, place.attribute), place.name, place.group)
            setattr(place.owner, place.attribute, _changed(watched, place.change))
        yield
    finally:
        for place, own in reversed(before):
            if own is None:  # the class has it
                delattr(place.owner, place.attribute)
            else:
                setattr(place.owner, place.attribute, own)


def _changed(function: Callable[..., Any], change: Callable[[Any], Any] | None) -> Any:
    if change is None:
        return function
    return lambda *args, **kwargs: change(function(*args, **kwargs))


@dataclass(frozen=True)
class Forced:
    """What a system is told to have found, in pixels of the network's input.

    Attributes:
        size: (height, width) of that input.
        proposals: ``[P, 4]``.
        boxes: ``[N, 4]``; N is at most P.
        labels: ``[N]``.
    """

    size: tuple[int, int]
    proposals: Tensor
    boxes: Tensor
    labels: Tensor

    @classmethod
    def draw(
        cls, size: tuple[int, int], proposals: int, detections: int, num_classes: int
    ) -> Forced:
        """Boxes anywhere, their sides 16 pixels to 0.6 of the picture's, evenly by logarithm.

        In a picture that small, all are 0.6 of its sides long.
        """
        random = torch.Generator().manual_seed(0)
        most = torch.tensor([size[1], size[0]])

        def boxes(count: int) -> Tensor:
            low, high = (0.6 * most).clamp(max=16), 0.6 * most
            sides = low * (high / low) ** torch.rand(count, 2, generator=random)
            corners = torch.rand(count, 2, generator=random) * (most - sides).clamp(min=0)
            return torch.cat([corners, corners + sides], 1)

        labels = torch.randint(num_classes, (detections,), generator=random)
        return cls(size, boxes(proposals), boxes(detections), labels)


def ours(predictor: Predictor, picture: Picture, forced: Forced) -> System:
    """A predictor of a two-stage model and its parts.

    Args:
        predictor: on a CPU.
        picture: see ``sources.as_pixels``.
        forced: what it finds; its size is that of the picture for the network.
    """
    model = cast(Any, predictor.model)
    count = len(forced.boxes)
    found = Instances(forced.size, forced.boxes, forced.labels, torch.linspace(1, 0.9, count))

    def scored(result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        scores = torch.zeros_like(result[0])
        scores[torch.arange(count), forced.labels] = torch.linspace(1, 0.9, count)
        return scores, result[1]

    def run(meter: Meter) -> list[Any]:
        pixels = meter.watch(as_pixels, "read")(picture)
        seen = predictor.detect(pixels, threshold=0.0)
        records = meter.watch(masks.to_records, "encode")
        return [each["segmentation"] for each in records(seen, 0, predictor.categories, seen.size)]

    branch = [] if model.branch is None else [Place(model.branch, "forward", "branch")]
    places = [
        Place(predict, "resize", "resize"),
        Place(model.trunk, "forward", "normalise"),
        Place(model.trunk.body, "forward", "trunk"),
        Place(model.trunk.fpn, "forward", "FPN"),
        *branch,
        Place(model.rpn, "forward", "RPN"),
        Place(model.rpn, "propose", "proposals", change=lambda _: [forced.proposals]),
        Place(two_stage, "detect", "detections", change=lambda _: [found]),
        Place(model.box_head, "score", "head", "box", scored),
        Place(roi, "pool", _by_side("RoIAlign")),
        Place(model.mask_head, "forward", "other", "mask"),
        *_layer_places(model.mask_head),
        Place(masks, "paste", "paste"),
    ]
    return System(run, places)


def _layer_places(head: nn.Module, stage: str = "") -> list[Place]:
    """The layers of a mask head, by the side that they work at; of a cascade, stage by stage."""
    places: list[Place] = []
    for name, child in head.named_children():
        layers = child if isinstance(child, nn.ModuleList) else [child]
        for number, layer in enumerate(layers, 1):
            if isinstance(layer, FCNMaskHead):
                places += _layer_places(layer, f"stage {number} ")
            elif not isinstance(layer, nn.Identity):
                places.append(Place(layer, "forward", _by_side(stage + name)))
    return places


def _by_side(name: str) -> Callable[[Any], str]:
    def title(result: Any) -> str:
        square = isinstance(result, Tensor) and result.ndim > 2
        square = square and result.shape[-1] == result.shape[-2]
        return f"{name} {result.shape[-1]}" if square else name

    return title


def reference(
    trunk: Backbone, num_classes: int, short_side: int, long_side: int, proposals: int
) -> Any:
    """The Mask R-CNN of torchvision, with random weights: its own R50-FPN, or our trunk otherwise.

    Args:
        trunk: whose kind is taken.
        num_classes: without background.
        short_side: pixels that its short side is resized to, unless
        long_side: the long side would then exceed this.
        proposals: that it keeps.
    """
    options: dict[str, Any] = {
        "min_size": short_side,
        "max_size": long_side,
        "rpn_post_nms_top_n_test": proposals,
    }
    channels = trunk.fpn.inner_blocks[0][0].out_channels
    if trunk.name.partition(".")[0] == "resnet50" and channels == 256:
        return detection.maskrcnn_resnet50_fpn(
            weights=None, weights_backbone=None, num_classes=num_classes + 1, **options
        ).eval()
    norm: Any = "group" if len(trunk.fpn.inner_blocks[0]) > 1 else "none"
    pyramid = Pyramid(Backbone(trunk.name, channels, frozen_stages=0, fpn_norm=norm))
    return detection.MaskRCNN(pyramid, num_classes + 1, **options).eval()


class Pyramid(nn.Module):
    """Our trunk as torchvision wants it: normalised pixels in, named levels out."""

    def __init__(self, trunk: Backbone) -> None:
        super().__init__()
        self.body, self.fpn = trunk.body, trunk.fpn
        self.out_channels = trunk.fpn.inner_blocks[0][0].out_channels

    def forward(self, x: Tensor) -> Any:
        """``[B, 3, H, W]`` to five levels by name."""
        levels = self.body(x)
        return self.fpn(OrderedDict((str(i), level) for i, level in enumerate(levels)))


def torchvisions(model: Any, picture: Picture, forced: Forced) -> System:
    """The Mask R-CNN of torchvision and its parts; arguments as in `ours`."""
    count, heads = len(forced.boxes), model.roi_heads
    scores = torch.linspace(1, 0.9, count)

    def scored(result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        logits = torch.full_like(result[0], -10.0)
        logits[count:, 0] = 10.0
        logits[torch.arange(count), forced.labels + 1] = 10.0
        return logits, result[1]

    def run(meter: Meter) -> list[Any]:
        pixels = meter.watch(lambda: as_pixels(picture).float() / 255, "read")()
        found = model([pixels])[0]["masks"]
        return cast("list[Any]", meter.watch(encode, "encode")(found))

    def encode(found: Tensor) -> list[Any]:
        dense = (found[:, 0] > 0.5).numpy().astype(np.uint8)
        return [coco_mask.encode(np.asfortranarray(mask)) for mask in dense]

    places = [
        Place(model.transform, "forward", "resize"),
        Place(model.backbone.body, "forward", "trunk"),
        Place(model.backbone.fpn, "forward", "FPN"),
        Place(model.rpn, "forward", "proposals"),
        Place(model.rpn.head, "forward", "RPN"),
        Place(model.rpn.anchor_generator, "forward", "RPN"),
        Place(
            model.rpn,
            "filter_proposals",
            "proposals",
            change=lambda _: ([forced.proposals], [torch.ones(len(forced.proposals))]),
        ),
        Place(heads, "forward", "other", "mask"),
        Place(heads.box_roi_pool, "forward", _by_side("RoIAlign"), "box"),
        Place(heads.box_head, "forward", "head", "box"),
        Place(heads.box_predictor, "forward", "head", "box", scored),
        Place(
            heads,
            "postprocess_detections",
            "detections",
            "",
            lambda _: ([forced.boxes], [scores], [forced.labels + 1]),
        ),
        Place(heads.mask_roi_pool, "forward", _by_side("RoIAlign")),
        Place(heads.mask_head, "forward", _by_side("convs")),
        Place(heads.mask_predictor.conv5_mask, "forward", _by_side("upsample")),
        Place(heads.mask_predictor.mask_fcn_logits, "forward", _by_side("logits")),
        Place(model.transform, "postprocess", "paste"),
    ]
    return System(run, places)


class Timer:
    """Processor seconds of all threads, and seconds on the clock, since the last call."""

    def __init__(self) -> None:
        self.last = time.process_time(), time.perf_counter()

    def __call__(self) -> tuple[float, ...]:
        """Both."""
        before, self.last = self.last, (time.process_time(), time.perf_counter())
        return self.last[0] - before[0], self.last[1] - before[1]


class Peak:
    """Bytes by which this process was ever larger than at first, since the last call.

    Linux only; elsewhere, and where the peak may not be reset, there are no numbers.
    """

    def __init__(self) -> None:
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)  # what was freed must not hide what is taken
        self.start = resident("VmRSS")
        self()

    def __call__(self) -> tuple[float, ...]:
        """One number, or none."""
        try:
            peak = resident("VmHWM")
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return ()
        return (max(0.0, peak - self.start),)


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in bytes; 0 where nothing tells."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith(field)), 0.0)


class Cost(NamedTuple):
    """What a part took: medians of the rounds.

    Attributes:
        cpu: seconds of the processor, of all threads.
        wall: seconds on the clock.
        macs: multiply-adds of convolutions and matrix products, as they were run.
        peak: bytes by which the process was larger than before the picture; None: unknown.
    """

    cpu: float
    wall: float
    macs: int
    peak: int | None


@dataclass(frozen=True)
class Report:
    """A profile.

    Attributes:
        model: what was profiled.
        picture: (height, width).
        network: (height, width) at the network's input.
        proposals: RoIs of the box heads.
        detections: RoIs of the mask heads.
        threads: of torch.
        rounds: that the medians are of.
        whole: cost of a picture by system.
        parts: the same by system and part; they add up to the whole, but for medians.
    """

    model: str
    picture: tuple[int, int]
    network: tuple[int, int]
    proposals: int
    detections: int
    threads: int
    rounds: int
    whole: dict[str, Cost]
    parts: dict[str, dict[str, Cost]]

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        values = asdict(self)
        values["whole"] = {name: cost._asdict() for name, cost in self.whole.items()}
        values["parts"] = {
            name: {part: cost._asdict() for part, cost in parts.items()}
            for name, parts in self.parts.items()
        }
        mine, theirs = (self.whole[name] for name in NAMES)
        return values | {"ratio": {"cpu": mine.cpu / theirs.cpu, "wall": mine.wall / theirs.wall}}


def profile(
    target: str,
    settings: Sequence[str] = (),
    *,
    picture: Path | None = None,
    num_classes: int = 80,
    detections: int = 100,
    short_side: int | None = None,
    threads: int | None = None,
    rounds: int = 3,
) -> Report:
    """Time the parts of a model and of torchvision's Mask R-CNN on the same trunk, in turns.

    Args:
        target: a model folder, a recipe or a method's name; the last two get random weights.
        settings: see ``info.build``.
        picture: to look at; None: a drawn one of 480 x 640.
        num_classes: see ``info.build``.
        detections: RoIs of the mask heads.
        short_side: pixels the picture's short side is resized to; None: the recipe's. The limit
            of the long side grows alike.
        threads: of torch; None: as many as it takes by itself.
        rounds: that medians are taken of.

    Raises:
        InputError: no such model or picture, an exported file, no two-stage model, or it has
            fewer proposals than ``detections``.
    """
    looked_at: Picture = draw_picture() if picture is None else picture
    size = _size(as_pixels(looked_at))
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        predictor, theirs = open_pair(target, settings, num_classes, short_side)
        network = network_size(size, predictor.short_side, predictor.long_side)
        proposals = cast(TwoStage, predictor.model).detector.proposals[1]
        if detections > proposals:
            raise InputError(
                f"--detections {detections}: {target} looks at {proposals} proposals only"
            )
        forced = Forced.draw(network, proposals, detections, predictor.model.num_classes)
        pair = ours(predictor, looked_at, forced), torchvisions(theirs, looked_at, forced)
        costs = measure(dict(zip(NAMES, pair, strict=True)), rounds)
        whole = {name: cost for name, (cost, _) in costs.items()}
        parts = {name: each for name, (_, each) in costs.items()}
        threads = torch.get_num_threads()
        return Report(target, size, network, proposals, detections, threads, rounds, whole, parts)
    finally:
        torch.set_num_threads(before)


def _size(pixels: Tensor) -> tuple[int, int]:
    return pixels.shape[1], pixels.shape[2]


def draw_picture(size: tuple[int, int] = (480, 640)) -> bytes:
    """A JPEG of (height, width) with smooth colours."""
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    content = io.BytesIO()
    small.resize(size[::-1], Image.Resampling.BICUBIC).save(content, "JPEG", quality=90)
    return content.getvalue()


def open_pair(
    target: str, settings: Sequence[str], num_classes: int, short_side: int | None
) -> tuple[Predictor, Any]:
    """A model as `profile` names it, ready for a CPU, and torchvision's on the same trunk."""
    recipe, segmenter, num_classes = build(target, settings, num_classes)
    if not isinstance(segmenter, TwoStage):
        raise InputError(f"{target}: only two-stage models can be profiled")
    short, long = recipe.data.short_side[-1], recipe.data.long_side
    if short_side:
        short, long = short_side, max(1, round(long * short_side / short))
    proposals = segmenter.detector.proposals[1]
    theirs = reference(segmenter.trunk, num_classes, short, long, proposals)
    table = [Category(label + 1, str(label)) for label in range(num_classes)]
    predictor = Predictor(prepare(segmenter), table, short_side=short, long_side=long, device="cpu")
    return predictor, theirs


def measure(systems: Mapping[str, System], rounds: int) -> dict[str, tuple[Cost, dict[str, Cost]]]:
    """Cost of the whole and of its parts, by system; they take turns.

    Before the rounds each runs twice: to count multiply-adds, and to look at memory.
    """
    macs, peaks = {}, {}
    times: dict[str, list[tuple[Seconds, dict[str, Seconds]]]] = {name: [] for name in systems}
    turns = [(kind, name) for kind in ("macs", "peak", *["time"] * rounds) for name in systems]
    for kind, name in track(turns, "profile", len(turns)):
        if kind == "macs":
            macs[name] = count_macs(systems[name])
        elif kind == "peak":
            meter = Meter(Peak(), max)
            systems[name](meter)
            peaks[name] = meter.parts
        else:
            meter, timer = Meter(Timer()), Timer()
            systems[name](meter)
            times[name].append((timer(), meter.parts))
    costs = {}
    for name, taken in times.items():
        parts = {
            part: _cost([each[part] for _, each in taken], macs[name][part], peaks[name][part])
            for part in macs[name]
        }
        highest = max(peaks[name].values())
        whole = _cost([each for each, _ in taken], sum(macs[name].values()), highest)
        costs[name] = whole, parts
    return costs


def _cost(times: Sequence[Seconds], macs: int, peak: tuple[float, ...]) -> Cost:
    cpu, wall = (statistics.median(each) for each in zip(*times, strict=True))
    return Cost(cpu, wall, macs, int(peak[0]) if peak else None)


def count_macs(system: System) -> dict[str, int]:
    """Multiply-adds of one picture by part: convolutions and matrix products, as they are run."""
    with FlopCounterMode(display=False) as counter:
        before = 0

        def lap() -> tuple[float, ...]:
            nonlocal before
            last, before = before, counter.get_total_flops()
            return ((before - last) // 2,)

        meter = Meter(lap)
        system(meter)
    return {part: int(used[0]) for part, used in meter.parts.items()}


def print_profile(report: Report, console: Console) -> None:
    """Print the table: a line a part, in the order in which they run."""
    (height, width), network = report.picture, report.network
    console.print(
        f"{report.model}: {height} x {width} pixels, {network[0]} x {network[1]} for the network, "
        f"{report.proposals} proposals, {report.detections} detections; "
        f"{report.threads} threads, medians of {report.rounds}",
        markup=False,
    )
    mine, theirs = (report.parts[name] for name in NAMES)
    order, previous = list(mine), None
    for part in theirs:
        if part not in order:
            order.insert(order.index(previous) + 1 if previous else 0, part)
        previous = part
    table = Table(box=SIMPLE, padding=(0, 0), pad_edge=False)
    table.add_column("\npart", no_wrap=True)
    for head in ("\nCPU ms", "\nshare", "\nGMAC", "peak\nMB"):
        table.add_column(head, justify="right")
    for head in ("theirs\nCPU ms", "\nGMAC", "peak\nMB"):
        table.add_column(head, justify="right", style="dim")
    for part in order:
        cells = [_cells(report.parts[name].get(part), report.whole[name]) for name in NAMES]
        table.add_row(part, *cells[0], cells[1][0], *cells[1][2:])
    table.add_section()
    cells = [_cells(report.whole[name], report.whole[name]) for name in NAMES]
    table.add_row("all", *cells[0], cells[1][0], *cells[1][2:])
    console.print(table)
    ratio = report.as_dict()["ratio"]
    wall = " and ".join(f"{name} {1e3 * report.whole[name].wall:.0f}" for name in NAMES)
    console.print(
        f"brefine / torchvision's Mask R-CNN: {ratio['cpu']:.2f} by CPU seconds, "
        f"{ratio['wall']:.2f} by the clock ({wall} ms)"
    )


def _cells(cost: Cost | None, whole: Cost) -> list[str]:
    if cost is None:
        return [""] * 4
    return [
        f"{1e3 * cost.cpu:.1f}" if cost.cpu < 0.1 else f"{1e3 * cost.cpu:.0f}",
        f"{cost.cpu / whole.cpu:.1%}",
        f"{cost.macs / 1e9:.2f}" if cost.macs else "",
        "?" if cost.peak is None else f"{cost.peak / 1e6:.0f}",
    ]
