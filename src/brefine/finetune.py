"""The preset for 20 to 200 pictures of your own: a recipe chosen from the set's own statistics.

Every choice is a rule over figures of ``data.stats``, in `choose`; nothing looks at the pixels.
What cannot be known from the labels is left alone: whether top and bottom may be exchanged, or
whether frames of one video must stay together.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from brefine import weights
from brefine.checkpoints import FOLDER as CHECKPOINTS
from brefine.checkpoints import changes
from brefine.data.coco import CocoSet
from brefine.data.loader import require_pictures
from brefine.data.read import read
from brefine.data.split import split
from brefine.data.stats import CELL, STRIDE, stats
from brefine.evaluate import Report
from brefine.files import replacing
from brefine.progress import console
from brefine.recipe import Recipe, parse_yaml
from brefine.structures import InputError
from brefine.train import PREPARED, is_free, train

SPLIT, REPORT = PREPARED  # what this module leaves in a run folder

#: values that have arguments of their own, which decide more than the recipe
GIVEN = {
    "data.train": "--data",
    "data.val": "--val",
    "data.images": "--images",
    "data": "--data, --val and --images, and set the rest key by key",
}

# Sizes are pixels at the network's input; an object's size is the root of its mask's area.
SMALL, LARGE = 28, 224  # a quarter of the objects may be below: 7 and 56 cells of the features
GROWTH = 2.0  # most by which pictures are enlarged: there is no more to see
LONGEST = {False: 512, True: 800}  # short side without and with a GPU
CROP = 320
STEP = 32  # that sides are multiples of

FEWEST = 6  # pictures of which some can be held out
HELD_OUT, MOST_HELD_OUT = 0.2, 50
PASSES, STEPS = 60, (1000, 2000)  # over the pictures; and the fewest and the most steps
EVALUATIONS, PATIENCE = 10, 4  # of a whole training; without a better one before it ends
MANY = 200  # pictures from which on a set is no small one
DETECTIONS = "model.options.detector.detections"  # suits the set, whatever training starts from
RARE = 20  # times as many objects in the largest class as in the smallest


class Choice(NamedTuple):
    """One value of the recipe.

    Attributes:
        key: its path.
        value: plain.
        why: half a line.
    """

    key: str
    value: Any
    why: str


def finetune(
    data: Path | str,
    out: Path | str,
    *,
    val: Path | str | None = None,
    images: Path | str | None = None,
    settings: Sequence[str] = (),
) -> Path:
    """Choose a recipe for a labelled set, say why, and train.

    The run folder holds, beside what ``train`` writes, ``finetune.json`` (figures of the set,
    choices and reasons, and which set that was) and, if pictures were held out, ``split/`` with
    both parts. Its ``recipe.yaml`` trains the same again without this preset.

    Args:
        data: set of any format, as ``data.read.read`` takes it.
        out: run folder, new or empty.
        val: set to validate on; None: a fifth of ``data`` is held out if it has enough pictures.
        images: folder of the pictures, if not where the format has them.
        settings: values that are not to be chosen, see ``Recipe.with_settings``.

    Returns:
        The model folder to use.

    Raises:
        InputError: the set cannot be used, the run folder is in use, or a setting is wrong or
            says which set.
    """
    for setting in settings:
        if option := GIVEN.get(setting.partition("=")[0].strip()):
            raise InputError(f"--set {setting}: with --preset finetune, give {option} instead")
    out = Path(out)
    if out.exists() and not _is_free(out, [Path(p) for p in (data, val, images) if p is not None]):
        raise InputError(f"{out}: there is something already: choose another folder with --out")
    new = not out.exists()
    dataset = read(data, images, split="train")
    require_pictures(dataset)
    figures = measure(dataset)
    count = 0 if val else held_out(len(dataset))
    _, recipe = settle(figures, settings, held_out=count, validates=bool(val or count))

    shutil.rmtree(out / SPLIT, ignore_errors=True)  # of a run that ended before it began
    where: dict[str, Any] = {"train": data, "val": val, "images": images}
    if count:
        share = count / len(dataset)
        parts, folder = split(data, out / SPLIT, val=share, seed=recipe.train.seed, images=images)
        if any(not mark.get("iscrowd") for mark in parts["val"]["annotations"]):
            where = {"train": out / SPLIT / "train.json", "val": out / SPLIT / "val.json"}
            where["images"] = folder
        else:  # nothing could be measured on them
            shutil.rmtree(out / SPLIT)
            count = 0
    choices, recipe = settle(
        figures, settings, held_out=count, validates=bool(where["val"]), gpu=_has_gpu()
    )
    # Where the data is goes below what was set: somebody may have set data.val_images.
    values = recipe.model_dump()
    values["data"] |= where
    recipe = Recipe.parse(values, str(data)).with_settings(settings)
    for line in describe(figures, choices, recipe, held_out=count):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    with replacing(out / REPORT) as aside:
        listed = [choice._asdict() for choice in choices]
        content = {"statistics": figures, "held_out": count, "choices": listed}
        content["given"] = _places(out, data, val, images)
        aside.write_text(json.dumps(content, indent=1), encoding="utf-8")
    try:
        model = train(recipe, out, devices=1)  # few pictures; others would have to share the split
    except InputError:
        if {path.name for path in out.iterdir()} <= {*PREPARED}:  # before anything was learnt
            shutil.rmtree(out / SPLIT, ignore_errors=True)
            (out / REPORT).unlink()
            if new:
                out.rmdir()
        raise
    if recipe.data.val and not math.isnan(Report.load(out).values["mask/AP"]):
        threshold = weights.load(model).overall
        console.print(
            f"objects are reported from a score of {threshold:.2f} on, where F1 was best on the "
            "validation pictures",
            highlight=False,
        )
    return model


def _is_free(out: Path, inputs: Sequence[Path]) -> bool:
    """Whether a run may start in a folder: it is empty, or has what an earlier one only began.

    Args:
        out: the folder.
        inputs: files and folders of the set, none of which may be among what is removed.
    """
    if not is_free(out, begun=not any((out / CHECKPOINTS).glob("*"))):
        return False
    inside = {path.name for path in out.iterdir()} & {*PREPARED}
    if not inside:
        return True
    parts = {path.name for path in (out / SPLIT).iterdir()} if (out / SPLIT).is_dir() else set()
    try:  # a file of that name may be anybody's
        ours = "choices" in json.loads((out / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False
    split_up = (out / SPLIT).resolve()
    taken = any(path.resolve().is_relative_to(split_up) for path in inputs)
    return ours and parts <= {"train.json", "val.json"} and not taken


def require_same(
    out: Path | str,
    data: Path | str,
    *,
    val: Path | str | None = None,
    images: Path | str | None = None,
) -> None:
    """Make sure that a run that goes on is one of this set; see `finetune` for the arguments.

    What is None is not compared, nor is anything that the run folder does not tell.

    Raises:
        InputError: the run has another set, says which; or its ``finetune.json`` is damaged.
    """
    out = Path(out)
    file = out / REPORT
    try:
        earlier = json.loads(file.read_text(encoding="utf-8")).get("given", {})
    except FileNotFoundError:
        return
    except (OSError, ValueError, AttributeError):
        raise InputError(f"{file}: damaged: start a new run in another folder") from None
    for name, place in _places(out, data, val, images).items():
        if place is not None and name in earlier and earlier[name] != place:
            was = "not given" if earlier[name] is None else (out / earlier[name]).resolve()
            raise InputError(
                f"{out}: --{name} was {was} and is {(out / place).resolve()}: a resumed run must "
                "be the same run: put it back, or choose another folder with --out"
            )


def _places(
    out: Path, data: Path | str, val: Path | str | None, images: Path | str | None
) -> dict[str, str | None]:
    """Where a run's data is, as seen from its folder: both may be moved together."""

    def place(path: Path | str | None) -> str | None:
        if path is None:
            return None
        there = Path(path).resolve()
        try:
            return Path(os.path.relpath(there, out.resolve())).as_posix()
        except ValueError:  # on another drive
            return str(there)

    return {"data": place(data), "val": place(val), "images": place(images)}


def measure(dataset: CocoSet) -> dict[str, Any]:
    """``stats`` with every picture at the median short side, so that sizes can be compared.

    Raises:
        InputError: there is nothing to learn from.
    """
    if not len(dataset):
        raise InputError(f"{dataset.path}: there is no picture in it")
    short = int(np.median([min(picture.size) for picture in dataset.pictures]))
    figures = stats(dataset, short_side=short, long_side=10**6)
    if not figures["objects"]:
        raise InputError(
            f"{dataset.path}: {len(dataset)} pictures, but no object with a mask to learn from: "
            "brefine data check says what is wrong with the labels"
        )
    return figures


def held_out(pictures: int) -> int:
    """How many of so many pictures are kept to validate on; 0 if they are too few."""
    if pictures < FEWEST:
        return 0
    return min(max(2, round(HELD_OUT * pictures)), MOST_HELD_OUT)


def settle(
    figures: dict[str, Any],
    settings: Sequence[str],
    *,
    held_out: int,
    validates: bool,
    gpu: bool = False,
) -> tuple[list[Choice], Recipe]:
    """Choices and recipe for a set, with some values set: the others are chosen to suit these.

    Args:
        figures: of `measure`.
        settings: see ``Recipe.with_settings``.
        held_out: pictures of the set that are not learnt from.
        validates: whether there is a set to validate on.
        gpu: whether there is one.

    Raises:
        InputError: a setting is wrong.
    """
    start = read_start(settings)
    free = choose(figures, held_out=held_out, validates=validates, gpu=gpu, start=start)
    plain = compose(free, start)
    differ = changes(plain.model_dump(), plain.with_settings(settings).model_dump())
    said = {key: new for key, (_, new) in differ.items()}
    choices = choose(
        figures, held_out=held_out, validates=validates, gpu=gpu, said=said, start=start
    )
    return choices, compose(choices, start).with_settings(settings)


def read_start(settings: Sequence[str]) -> dict[str, Any] | None:
    """Method and all options of the model that training starts from.

    None if it starts from something else, or is to be of another method.

    Args:
        settings: of which ``model.weights`` and ``model.method`` count; see
            ``Recipe.with_settings``.

    Raises:
        InputError: it is a folder, but not of a model.
    """
    said = {}
    for setting in settings:
        key, _, text = setting.partition("=")
        said[key.strip()] = str(parse_yaml(text, f"--set {setting}"))
    source = said.get("model.weights", "none")
    if source in ("none", "imagenet") or not weights.locate(source).is_dir():
        return None
    model = weights.read_recipe(source).model
    if said.get("model.method", model.method) != model.method:
        return None
    return {"method": model.method, "options": model.every_option()}


def choose(
    figures: dict[str, Any],
    *,
    held_out: int,
    validates: bool,
    gpu: bool = False,
    said: Mapping[str, Any] | None = None,
    start: Mapping[str, Any] | None = None,
) -> list[Choice]:
    """The recipe for a set, value by value.

    Args:
        figures: of `measure`.
        held_out: pictures of them that are not learnt from.
        validates: whether there is a set to validate on.
        gpu: whether there is one.
        said: values that are not to be chosen, by path; others follow from them.
        start: of `read_start`: its values are not chosen either, but what is said goes first.
    """
    said = said or {}
    known = {key: value for key, (_, value) in changes({}, {"model": start or {}}).items()}
    known.pop(DETECTIONS, None)

    def own(key: str, value: Any) -> Any:
        """What was said, or else is known of the model, or else the choice."""
        there = said.get(key)
        there = known.get(key) if there is None else there
        return value if there is None else there

    pictures = figures["pictures"] - held_out
    small, typical, big = (figures["network_size"][key] for key in ("p25", "p75", "p95"))
    short = figures["network"]["short_side"]

    scale = min(GROWTH, max(min(1.0, LARGE / small), SMALL / small))
    side = min(_whole(scale * short), LONGEST[gpu])
    sides = tuple(dict.fromkeys([_whole(0.75 * side), _whole(1.25 * side), side]))
    sides = own("data.short_side", sides)
    side = sides[-1]
    aspect = max(figures["aspect"]["max"], 1 / figures["aspect"]["min"])
    most = max(2 * max(sides), 2 * LONGEST[gpu])
    longest = own("data.long_side", min(_whole(max(sides) * aspect), most))
    scale = scale_of(figures, side, longest)
    small, typical, big = small * scale, typical * scale, big * scale
    crop = CROP if 4 * side >= 5 * CROP and 3 * big <= CROP else None
    crop = said.get("data.crop", crop)

    # not 1, whose masks nothing refines, however small objects are
    stages = own("model.options.stages", 3 if typical > CELL * 28 else 2)
    anchor = 2.0 ** min(3, max(1, round(math.log2(small / STRIDE))))
    anchor = own("model.options.detector.anchor_scale", anchor)
    most = math.ceil(1.25 * figures["objects_a_picture"]["max"] / 50) * 50
    detections = own(DETECTIONS, min(500, max(100, most)))
    channels = own("model.options.channels", 64 if pictures < MANY else 96)

    batch = min(4 if (crop or side) <= CROP else 2, pictures)
    if said.get("train.batch_size") != "auto":  # that is measured later
        batch = own("train.batch_size", batch)
    low, high = STEPS
    steps = min(high, max(low, round(PASSES * pictures / batch / 50) * 50))
    epoch = math.ceil(pictures / batch)
    steps = own("train.steps", math.ceil((said.get("train.epochs") or 0) * epoch) or steps)

    chosen = [
        Choice(
            "data.short_side",
            sides,
            f"three quarters of the objects are above {small:.0f} pixels then, and pictures of "
            f"{short} pixels are {_times(scale)}",
        ),
        Choice(
            "data.long_side",
            longest,
            f"the longest picture is {aspect:.2g} : 1"
            + (f": short sides shrink to {scale * short:.0f}" if scale * short < side - 1 else ""),
        ),
        Choice(
            "model.options.backbone",
            own("model.options.backbone", "tf_efficientnet_lite0"),
            "small enough for any machine, and its weights come in a package",
        ),
        Choice(
            "model.options.channels",
            channels,
            f"{pictures} pictures to learn from, {MANY} are many",
        ),
        Choice(
            "model.options.stages",
            stages,
            f"a cell of a {14 << (stages - 1)} x {14 << (stages - 1)} mask covers "
            f"{typical / (14 << (stages - 1)):.1f} pixels of an object of {typical:.0f}, larger "
            "than three quarters",
        ),
        Choice(
            "model.options.detector.anchor_scale",
            anchor,
            f"the smallest anchor is {anchor * STRIDE:.0f} pixels, small objects are {small:.0f}",
        ),
        Choice(
            DETECTIONS,
            detections,
            f"there are up to {figures['objects_a_picture']['max']} objects a picture",
        ),
    ]
    if crop:
        chosen.append(
            Choice("data.crop", crop, f"large objects are {big:.0f} pixels: parts are enough")
        )
    if pictures < MANY:
        chosen.append(Choice("data.colour", 0.2, "few pictures: light and stain will vary more"))
    if figures["imbalance"]["max_by_min"] >= RARE:
        shares = [e["pictures"] / figures["pictures"] for e in figures["classes"] if e["pictures"]]
        share = float(f"{np.median(shares):.1g}")
        chosen.append(Choice("data.repeat_threshold", share, "some classes are rare"))
    passes = steps * batch / pictures
    chosen += [
        Choice("train.batch_size", batch, f"pictures of {crop or side} pixels at a time"),
        Choice("train.steps", steps, f"{passes:.0f} passes over {pictures} pictures"),
    ]
    if validates:
        chosen += [
            Choice(
                "train.validate_every",
                round(steps / EVALUATIONS / epoch, 3),
                f"epochs: {EVALUATIONS} evaluations, the best model is kept",
            ),
            Choice(
                "train.patience",
                PATIENCE,
                f"training ends when {PATIENCE} evaluations found nothing better",
            ),
        ]
    if start:  # another method may have other options
        there = {*known, DETECTIONS}
        chosen = [e for e in chosen if e.key in there or not e.key.startswith("model.")]
        chosen.insert(0, Choice("model.method", start["method"], ""))
    reasons = dict.fromkeys(known, "as in the model that training starts from")
    reasons |= dict.fromkeys(said, "as you said")
    return [one._replace(why=reasons.get(one.key, one.why)) for one in chosen]


def scale_of(figures: dict[str, Any], short_side: int, long_side: int) -> float:
    """How many times as large as a picture of the usual shape the network sees it.

    Args:
        figures: of `measure`.
        short_side: pixels of the network's pictures, unless
        long_side: is the tighter limit.
    """
    shape = max(figures["aspect"]["median"], 1 / figures["aspect"]["median"])
    return float(min(short_side, long_side / shape) / figures["network"]["short_side"])


#: what no figure of a set decides: the recipe ``brefine_lite0``, and averaged weights
FIXED: dict[str, Any] = {
    "model": {
        "method": "brefine",
        "options": {
            "detector": {
                "fpn_norm": "group",
                "box_hidden": 256,
                "mask_rois": 24,
                "balance_floor": 0.2,
            }
        },
        "weights": "imagenet",
    },
    "train": {
        "optimizer": "adamw",
        "lr": 1e-3,
        "warmup_steps": 50,
        "schedule": "cosine",
        "clip_norm": 5.0,
        "ema": 0.99,
    },
}


def compose(choices: Sequence[Choice], start: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe that the choices make, without data, with the model of `read_start` if given."""
    model = {**start, "weights": "none"} if start else FIXED["model"]
    values: dict[str, Any] = json.loads(json.dumps({"data": {}, **FIXED, "model": model}))  # a copy
    for key, value, _ in choices:
        *sections, name = key.split(".")
        place = values
        for section in sections:
            place = place[section]
        place[name] = value
    detector = values["model"]["options"]["detector"]
    most = detector["detections"]
    # Twice as many proposals as objects that may be there, and twice as many candidates.
    if not start or "proposals" in detector:
        detector["proposals"] = (max(300, most), max(200, 2 * most))
        detector["candidates"] = (max(500, 2 * most), max(300, 2 * most))
    return Recipe.parse(values, "finetune")


def describe(
    figures: dict[str, Any], choices: Sequence[Choice], recipe: Recipe, *, held_out: int
) -> list[str]:
    """What is known, and each choice with its reason, one line each."""
    pictures, classes = figures["pictures"], len(figures["classes"])
    lines = [
        f"{pictures} pictures, {figures['objects']} objects, {classes} "
        f"class{'es' if classes > 1 else ''}"
    ]
    if held_out:
        lines.append(
            f"  validation: {held_out} pictures held out, {pictures - held_out} to learn from: "
            f"{recipe.data.val}; pictures of one place or video on both sides flatter the "
            "figures: give --val then"
        )
    elif recipe.data.val:
        lines.append(f"  validation: {recipe.data.val}")
    else:
        lines.append(
            f"  validation: none: of fewer than {FEWEST} pictures none is held out, nor are any "
            "without objects. So nothing is known of how good the model will be, the last one is "
            "kept, and objects are reported from a score of 0.5 on; give --val to change that"
        )
    values = recipe.model_dump()
    for key, value, why in choices:
        final: Any = values
        for part in key.split("."):  # what was set may have another form than what was chosen
            final = final.get(part) if isinstance(final, dict) else None
        shown = _show(final)
        lines.append(f"  {key} = {shown}: {why if shown == _show(value) else 'as you said'}")
    smallest = figures["network_size"]["p25"]
    smallest *= scale_of(figures, recipe.data.short_side[-1], recipe.data.long_side)
    if smallest < 2 * STRIDE:
        lines.append(
            f"  a quarter of the objects stay below {smallest:.0f} pixels, two cells of the "
            "features: cut the pictures into tiles"
        )
    few = [entry["name"] for entry in figures["classes"] if entry["objects"] < 10]
    if few:
        more = f" and {len(few) - 5} more" if len(few) > 5 else ""
        lines.append(f"  fewer than 10 objects to learn from: {', '.join(few[:5])}{more}")
    return lines


def _has_gpu() -> bool:
    return torch.cuda.is_available()


def _whole(side: float) -> int:
    """The multiple of STEP nearest to a side, at least two of it."""
    return max(2, round(side / STEP)) * STEP


def _times(scale: float) -> str:
    if scale == 1:
        return "kept as they are"
    return f"enlarged {scale:.2g} times" if scale > 1 else f"shrunk {1 / scale:.2g} times"


def _show(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else f"{value}"
