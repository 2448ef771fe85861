"""``train.batch_size: auto``: how many pictures a process fit, measured before training starts.

A throw-away model learns from the heaviest batches that the set can give: its pictures with the
most objects, at the largest size of the recipe. The bytes that a step takes are a straight line
over the number of pictures; the largest power of two that the line lets fit is taken. A power of
two, because it halves without a remainder into ``train.accumulate`` on a smaller machine, and
because what it leaves over is room for what a line does not know.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Sampler

from brefine import pretrained
from brefine.data.augment import Transform
from brefine.data.coco import CocoSet
from brefine.data.loader import Batch, train_loader
from brefine.data.pictures import network_size
from brefine.guards import explain_memory, is_memory
from brefine.losses import total
from brefine.methods import create
from brefine.parts.two_stage import TwoStage
from brefine.parts.winograd import quicken
from brefine.progress import console
from brefine.recipe import DataRecipe, Recipe
from brefine.speed import Peak
from brefine.structures import Images, InputError, Instances
from brefine.train import freeze

MOST = {"cuda": 64, "cpu": 16}  # pictures; a CPU is busy with a few, more bring no speed
SHARE = {"cuda": 0.85, "cpu": 0.7}  # of the free memory; a CPU's is also that of other programs
STRIDE = 32  # pixels that sides are padded to a multiple of
NEAR = 10  # proposals around each object: what an RPN finds that has learnt


class Fit(NamedTuple):
    """What fits.

    Attributes:
        size: pictures, a power of two; 0: not even one fits.
        base: bytes of a step without pictures, by the line.
        each: bytes of a picture, by the line.
    """

    size: int
    base: float
    each: float


def resolve(recipe: Recipe, dataset: CocoSet, transform: Transform | None = None) -> Recipe:
    """The recipe with a number in place of ``train.batch_size: auto``; says why that one.

    No random state outside changes, so what follows is what it would be with the number given.

    Args:
        recipe: of the run; one with a number is returned as it is.
        dataset: what it learns from.
        transform: see ``TrainSet``.

    Raises:
        InputError: a single picture does not fit, memory cannot be measured on this system, or
            as ``train_loader``.
    """
    if recipe.train.batch_size != "auto":
        return recipe
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    most = min(MOST[kind], len(dataset))
    devices = [torch.cuda.current_device()] if kind == "cuda" else []
    lone = recipe.with_settings(["train.batch_size=1"])
    steps = None
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(recipe.train.seed)
            steps = Steps(lone, dataset, most, torch.device(kind), transform)
            steps.run(1)  # the first one loads libraries, and leaves gradients, as every step does
            free = free_memory(kind)
            limit = SHARE[kind] * free - steps.state
            found = fit(steps.measure, limit, most, confirm=kind == "cuda")
    except (RuntimeError, MemoryError) as error:
        if not is_memory(error):
            raise
        *sizes, objects = steps.shape if steps else (0, 0, 0)
        raise InputError(_too_large(lone, sizes, objects)) from None
    *sizes, objects = steps.shape
    taken = found.base + found.each * max(1, found.size) + steps.state
    figures = (
        f"{_bytes(taken)} of {_bytes(free)} free (at most {SHARE[kind]:.0%}), "
        f"{_bytes(found.each)} a picture"
    )
    del steps
    gc.collect()
    if kind == "cuda":
        torch.cuda.empty_cache()
    if not found.size:
        raise InputError(f"{_too_large(lone, sizes, objects)}; it takes {figures}")
    line = f"train.batch_size = {found.size}: {figures}"
    if 2 * found.size > most:
        capped = most == MOST[kind]
        line += f"; {most} is the most on a {kind.upper()}" if capped else f"; of {most} in the set"
    if recipe.train.lr_reference_batch is None:
        line += f"; train.lr stays {recipe.train.lr:g}, as train.lr_reference_batch is not set"
    console.print(line, soft_wrap=True, markup=False)
    return recipe.with_settings([f"train.batch_size={found.size}"])


def fit(measure: Callable[[int], float], limit: float, most: int, *, confirm: bool = False) -> Fit:
    """The largest power of two that fits, by a line through what 1, 2 and 4 pictures take.

    No more pictures are measured than are known to fit: 2 if twice the bytes of one do, 4 if the
    line says so. The line lies above all that was measured.

    Args:
        measure: bytes that a step with so many pictures takes; infinite: more than there are.
        limit: bytes that it may take.
        most: pictures.
        confirm: run what was chosen and halve it until it fits.

    Raises:
        MemoryError: ``measure`` says that not even one can be run.
    """
    taken: dict[int, float] = {}
    base, each = 0.0, 0.0
    for count in (1, 2, 4):
        if count > most or (taken and base + each * count > limit):
            break
        if math.isinf(bytes_taken := measure(count)):
            most = count - 1
            break
        taken[count] = bytes_taken
        base, each = _line(taken)
    if not taken:
        raise MemoryError  # told as any other that comes while measuring
    size = 0
    while max(1, 2 * size) <= most and base + each * max(1, 2 * size) <= limit:
        size = max(1, 2 * size)
    while confirm and size > max(taken) and measure(size) > limit:
        size //= 2
    return Fit(size, base, each)


def _line(taken: dict[int, float]) -> tuple[float, float]:
    """Base and slope of the best line, lifted above all points; of one point: through zero."""
    if len(taken) == 1:
        return 0.0, taken[1]
    count, value = np.array(list(taken)), np.array(list(taken.values()))
    each = max(0.0, float(np.polyfit(count, value, 1)[0]))
    return float((value - each * count).max()), each


class Steps:
    """Steps of training with a model of its own, as heavy as they come.

    Args:
        recipe: of the run, with a number in ``train.batch_size``.
        dataset: pictures and labels.
        most: pictures of a step.
        device: to run on.
        transform: see ``TrainSet``.

    Attributes:
        state: bytes that training keeps beside weights and gradients: the optimiser's, and an
            average of the weights.
        shape: height and width of the last batch, with padding, and objects in it.

    Raises:
        InputError: as ``train_loader``, ``pretrained.start`` and ``train.freeze``.
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: CocoSet,
        most: int,
        device: torch.device,
        transform: Transform | None = None,
    ) -> None:
        self.device, self.precision = device, recipe.train.precision
        self.shape = (0, 0, 0)
        self.frames = None if transform else frames(dataset, recipe.data)
        self.waiting = heaviest(dataset, recipe, most, transform)
        self.items: list[Batch] = []
        model = create(recipe.model.method, len(dataset.categories), **recipe.model.options)
        assert isinstance(model, nn.Module)
        pretrained.start(model, recipe.model.weights, categories=dataset.categories)
        freeze(model, recipe.train.freeze)
        self.model: Any = quicken(model).to(device).train()  # as it will learn
        self.targets: list[Instances] = []
        if isinstance(model, TwoStage):
            self._teach(model)
        learning = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        words = 2 if recipe.train.optimizer == "adamw" else int(recipe.train.momentum > 0)
        copies = sum(v.nbytes for v in model.state_dict().values()) if recipe.train.ema else 0
        self.state = words * learning + copies

    def _teach(self, model: TwoStage) -> None:
        """Let the RPN propose boxes around the objects, as it will when it has learnt.

        Mask heads learn from such boxes only: of an RPN that knows nothing they would get few,
        and a run would end out of memory when it is at its best.
        """
        own, most = model.rpn.propose, model.detector.proposals[0]

        def propose(*args: Any, **kwargs: Any) -> list[Tensor]:
            proposed = []
            for boxes, target in zip(own(*args, **kwargs), self.targets, strict=True):
                near = target.boxes.repeat(NEAR, 1)
                sides = (near[:, 2:] - near[:, :2]).repeat(1, 2)
                near = near + 0.1 * (torch.rand_like(near) - 0.5) * sides
                proposed.append(torch.cat([near.to(boxes), boxes])[:most])
            return proposed

        model.rpn.propose = propose  # type: ignore[method-assign]

    def measure(self, count: int) -> float:
        """Bytes by which the process, or what is held on the GPU, grows in a step at most.

        Weights and gradients are there before. Infinite: there are not that many on the GPU.

        Args:
            count: pictures.

        Raises:
            InputError: memory cannot be measured on this system.
        """
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            try:
                self.run(count)
            except torch.OutOfMemoryError:
                return math.inf
            return float(torch.cuda.max_memory_allocated() - before)
        peak = Peak()
        self.run(count)
        grown = peak()
        if not grown:
            raise InputError(
                "train.batch_size: auto: this system does not tell how much memory a step takes: "
                "give a number"
            )
        return grown[0]

    def run(self, count: int) -> None:
        """Forward and backward with the heaviest pictures, in the order of Lightning's loop."""
        images, targets = self._batch(count)
        self.targets = targets
        with _precision(self.precision, self.device.type):
            named: dict[str, Tensor] = self.model.loss(images, targets)
            loss = total(named)
        self.model.zero_grad()  # the gradients of the step before are there until now
        loss.backward()  # type: ignore[no-untyped-call]

    def _batch(self, count: int) -> tuple[Images, list[Instances]]:
        while len(self.items) < count:
            self.items.append(next(self.waiting))
        chosen = self.items[:count]
        images = Images.stack([images.pixels[0] for images, _ in chosen])
        targets = [target for _, (target,) in chosen]
        pixels = images.pixels
        if self.frames:
            old, new = pixels.shape[-2:], self.frames[count > 1]
            down, right = (max(0, b - a) for a, b in zip(old, new, strict=True))
            pixels = functional.pad(pixels, (0, right, 0, down))
        sizes = torch.cat([images.sizes for images, _ in chosen])
        height, width = pixels.shape[-2:]
        self.shape = height, width, sum(len(target) for target in targets)
        moved = [target.to(self.device) for target in targets]
        return Images(pixels, sizes).to(self.device), moved


def heaviest(
    dataset: CocoSet, recipe: Recipe, most: int, transform: Transform | None = None
) -> Iterator[Batch]:
    """The pictures with the most objects, one by one, as large as training makes them.

    Args:
        dataset: pictures and labels.
        recipe: of the run.
        most: so many of them.
        transform: see ``TrainSet``.

    Raises:
        InputError: as ``train_loader``.
    """
    data = recipe.data
    sides: dict[str, Any] = {"short_side": (max(data.short_side),)}
    if data.crop:  # the frame is that of the crop, which should hold as many objects as it can
        sides = {"short_side": (min(data.short_side),)}
        if data.jitter:
            scale = min(max(1.0, data.jitter[0]), data.jitter[1])
            sides["jitter"] = scale, scale
    sure = {"copy_paste": float(data.copy_paste > 0), "workers": 0}
    counts = dataset.counts()
    order = np.argsort(-counts, kind="stable")[:most]
    loader = train_loader(
        dataset,
        data.model_copy(update=sides | sure),
        batch_size=1,
        seed=recipe.train.seed,
        sampler=cast("Sampler[Any]", [(0, int(index)) for index in order]),
        transform=transform,
    )
    return iter(loader)


def frames(dataset: CocoSet, data: DataRecipe) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) of the largest batch of one picture, and of several, with padding.

    The batches at the end of an epoch mix high and wide pictures, whatever
    ``data.group_by_aspect`` says.
    """
    if data.crop:
        side = _padded(data.crop)
        return (side, side), (side, side)
    short, long = max(data.short_side), data.long_side
    sizes = {network_size(picture.size, short, long) for picture in dataset.pictures}
    if data.rotate90:
        sizes |= {(width, height) for height, width in sizes}
    padded = {(_padded(height), _padded(width)) for height, width in sizes}
    alone = max(padded, key=lambda size: size[0] * size[1])
    return alone, (max(height for height, _ in padded), max(width for _, width in padded))


def _padded(side: int) -> int:
    return -(-side // STRIDE) * STRIDE


def _precision(name: str, kind: str) -> AbstractContextManager[Any]:
    """What Lightning does for a mixed ``train.precision``."""
    if not name.endswith("-mixed"):
        return nullcontext()
    return torch.autocast(kind, torch.bfloat16 if name.startswith("bf16") else torch.float16)


def free_memory(kind: str, root: Path | str = "/") -> float:
    """Bytes that this process can still take.

    On a CPU the least of what the system has available and what the limits of the process's
    control groups (containers, batch systems) leave; the cache of files counts as free.

    Args:
        kind: ``cuda`` or ``cpu``.
        root: where ``proc`` and ``sys`` are.

    Raises:
        InputError: this system does not tell.
    """
    if kind == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return float(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())
    root = Path(root)
    available = _fields(root / "proc/meminfo").get("MemAvailable:")
    if available is None:
        raise InputError(
            "train.batch_size: auto: this system does not tell how much memory is free: give a "
            "number"
        )
    least = 1024.0 * available
    for folder, limit, usage, cache in _groups(root):
        most, used = _number(folder / limit), _number(folder / usage)
        if most is not None and used is not None:
            cached = _fields(folder / "memory.stat").get(cache, 0)
            least = min(least, max(0.0, most - max(0, used - cached)))
    return least


def _groups(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Folders of the control groups that this process is in, with names of what they hold."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        if kinds:  # the first version of control groups: a tree for each kind
            top /= "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if not kinds or "memory" in kinds.split(","):
            # Inside of a container the path may be that of the host: the top is there always.
            inside = top / path.strip("/")
            for folder in (inside, *inside.parents):
                if folder.is_relative_to(top):
                    yield folder, *names


def _number(path: Path) -> int | None:
    """What a file of one number says; None: there is none, or ``max``."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _fields(path: Path) -> dict[str, int]:
    """The lines ``name number ...`` of a file; of one that is not there, none."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdecimal()}


def _too_large(recipe: Recipe, sizes: list[int], objects: int) -> str:
    advice = explain_memory(recipe, sizes, objects)
    return f"train.batch_size: auto: not even one fits: {advice}"


def _bytes(value: float) -> str:
    """``1.9 GB`` or ``220 MB``."""
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"
