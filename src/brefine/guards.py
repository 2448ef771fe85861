"""What goes wrong in training, told in words: where, with which pictures, and what to do."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from brefine.data.coco import CocoSet
from brefine.data.samplers import EpochSampler
from brefine.files import replacing
from brefine.progress import console, track
from brefine.recipe import Recipe
from brefine.structures import Images, InputError, Instances

FAULTS = "faults"  # folder of a run
PATIENCE = 20  # steps in a row that may be skipped
EXPLODED = 100.0  # times the usual gradient norm
SETTLED = 20  # steps after which there is something usual

Batch = tuple[Images, Sequence[Instances]]


class LossGuard:
    """Names and saves the batch whose loss or gradients are not finite; stops, or skips the step.

    Args:
        run: the run folder.
        dataset: to name the pictures of a batch.
        sampler: that chose them.
        skip: go on with the next batch; at most ``PATIENCE`` times in a row.
    """

    def __init__(self, run: Path, dataset: CocoSet, sampler: Any, *, skip: bool) -> None:
        self.run, self.dataset, self.sampler, self.skip = run, dataset, sampler, skip
        self.row = 0  # steps skipped since the last good one

    def __deepcopy__(self, memo: Any) -> LossGuard:
        """Itself: averaging weights copies the learner, but not the data set with it."""
        return self

    def passed(self) -> None:
        """A step was as it should be."""
        self.row = 0

    def report(self, batch: Batch, place: tuple[int, int, int], step: int, fault: str) -> None:
        """A step was not.

        Args:
            batch: of this process.
            place: epoch, number of the batch in it, number of the process.
            step: of the optimiser.
            fault: what was wrong.

        Raises:
            InputError: unless it is to be skipped; names the pictures and where they are saved.
        """
        files = self.names(place, len(batch[0]))
        folder = self.run / FAULTS / f"step_{step:08}_process_{place[2]}"
        save_batch(folder, batch, files, fault)
        self.row += 1
        line = f"step {step}: {fault} in {', '.join(files)} (saved in {folder})"
        if self.skip and self.row <= PATIENCE:
            console.print(f"{line}: skipped", soft_wrap=True, markup=False)
            return
        often = f"; {self.row} steps in a row" if self.row > PATIENCE else ""
        raise InputError(
            f"{line}{often}: lower train.lr, lengthen train.warmup_steps or set train.clip_norm; "
            "if the pictures are to blame, train.on_fault=skip passes them over"
        )

    def names(self, place: tuple[int, int, int], size: int) -> list[str]:
        """Files of a batch's pictures; only our own sampler can tell."""
        if not isinstance(self.sampler, EpochSampler):
            return ["a batch of your own sampler"]
        epoch, number, rank = place
        keys = self.sampler.share(epoch, rank)[number * size : (number + 1) * size]
        return [str(self.dataset.pictures[index].file) for index, _ in keys.tolist()]


def save_batch(folder: Path, batch: Batch, files: Sequence[str], fault: str) -> None:
    """Write pictures as the model got them, and their boxes and labels, into a new folder."""
    images, targets = batch
    about: dict[str, Any] = {"fault": fault, "pictures": []}
    with replacing(folder) as aside:
        aside.mkdir()
        for i, (pixels, (height, width)) in enumerate(
            zip(images.pixels, images.sizes.tolist(), strict=True)
        ):
            shown = pixels[:, :height, :width].clamp(0, 255).to("cpu", torch.uint8)
            Image.fromarray(shown.permute(1, 2, 0).numpy()).save(aside / f"{i}.png")
            boxes, labels = targets[i].boxes.tolist(), targets[i].labels.tolist()
            name = files[i] if i < len(files) else ""
            about["pictures"].append({"file": name, "boxes": boxes, "labels": labels})
        (aside / "batch.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


class GradientGuard:
    """Says when gradients are far larger than usual, which often is the beginning of the end."""

    def __init__(self) -> None:
        self.usual: list[float] = []  # norms of the last steps
        self.silent_until = 0

    def look(self, model: nn.Module, step: int, clip: float | None) -> float:
        """The norm of all gradients; told when it is much more than the median of late."""
        norms = {
            name: norm
            for name, part in model.named_children()
            if (norm := gradient_norm(part)) is not None
        }
        total = math.sqrt(sum(norm**2 for norm in norms.values()))
        if not math.isfinite(total):
            return total
        usual = float(np.median(self.usual)) if len(self.usual) >= SETTLED else math.inf
        if total > EXPLODED * usual and step >= self.silent_until:
            worst = max(norms, key=lambda name: norms[name])
            advice = "they are clipped" if clip else "set train.clip_norm or lower train.lr"
            console.print(
                f"step {step}: gradients are {total / usual:.0f} times as large as usual, most of "
                f"all those of {worst}: {advice}",
                soft_wrap=True,
                markup=False,
            )
            self.silent_until = step + 100
        self.usual = [*self.usual[-99:], total]
        return total


def gradient_norm(part: nn.Module) -> float | None:
    """Norm of all gradients of a module; None if it has none."""
    grads = [p.grad for p in part.parameters() if p.grad is not None]
    if not grads:
        return None
    return float(torch.stack(torch._foreach_norm(grads)).float().norm())


def find_missing(dataset: CocoSet) -> list[str]:
    """Names of the classes that no object in the set has: a model cannot learn them."""
    missing = {category.id: category.name for category in dataset.categories}
    for index in track(range(len(dataset)), "count classes", len(dataset)):
        if not missing:
            break
        for entry in dataset.annotations(index):
            if not entry.get("iscrowd"):
                missing.pop(entry["category_id"], None)
    return list(missing.values())


def explain_zero(values: dict[str, float], records: Sequence[Any], recipe: Recipe) -> str | None:
    """The likeliest causes when a model finds nothing right though it should have warmed up.

    Args:
        values: of the evaluation, see ``Report``.
        records: what was detected.
        recipe: of the run.

    Returns:
        A line; None if it does find something, or there is nothing to find.
    """
    if values["mask/AP50"] != 0:  # or NaN
        return None
    train = recipe.train
    if not records:
        cause = (
            f"nothing is detected at all: train.lr {train.lr:g} may be too high (do losses fall in "
            "metrics.csv?) or far too low, or it is early yet"
        )
    elif values["box/AP50"] > 0:
        cause = (
            "boxes are right and masks are not: outlines may not belong to their boxes "
            "(brefine data preview shows labels), or the mask loss does not fall in metrics.csv"
        )
    else:
        cause = (
            f"there are {len(records)} detections, none of them in place: training and validation "
            "labels may differ (brefine data check --against), their classes be in another order, "
            f"or train.lr {train.lr:g} be too high; or it is early yet"
        )
    return f"mask AP50 is 0 after the warm-up: {cause}"


def explain_memory(recipe: Recipe, sizes: Sequence[int], objects: int) -> str:
    """What to lower, with numbers, when memory ran out.

    Args:
        recipe: of the run.
        sizes: height and width of the batch, with padding; 0 if there was none yet.
        objects: in the batch.
    """
    data, train = recipe.data, recipe.train
    rois = recipe.model.options.get("detector", {}).get("mask_rois", 200)
    advice = []
    if train.pictures > 1:
        half = train.pictures // 2
        more = math.ceil(train.pictures / half) * train.accumulate
        advice.append(
            f"train.batch_size={half} with train.accumulate={more} (the same step, less memory)"
        )
    if data.crop:
        advice.append(f"data.crop={data.crop * 3 // 4} (44 % fewer pixels)")
    else:
        long, short = data.long_side * 3 // 4, [side * 3 // 4 for side in data.short_side]
        advice.append(f"data.long_side={long} and data.short_side={short} (44 % fewer pixels)")
    if rois and rois > 16:
        advice.append(f"model.options.detector.mask_rois={rois // 2} (now {rois})")
    if torch.cuda.is_available() and train.precision == "32-true":
        advice.append("train.precision=bf16-mixed")
    if not recipe.model.options.get("mask_checkpoint"):
        advice.append("model.options.mask_checkpoint=true")
    what = f"{train.pictures} picture{'s' if train.pictures > 1 else ''} a process"
    if all(sizes):
        what += f" of {sizes[0]} x {sizes[1]} with {objects} objects"
    return f"out of memory with {what}: set {'; or '.join(advice)}"


def is_memory(error: BaseException) -> bool:
    """Whether an error says that there is no more memory."""
    text = str(error).lower()
    words = ("out of memory", "can't allocate memory", "cannot allocate memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in text for word in words)
    )


def worst(named: dict[str, Tensor]) -> str:
    """Losses by name and value, those that are not finite first."""
    values = {name: float(value.detach()) for name, value in named.items()}
    order = sorted(values, key=lambda name: math.isfinite(values[name]))
    return ", ".join(f"{name} {values[name]:.3g}" for name in order)
