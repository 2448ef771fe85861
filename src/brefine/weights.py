"""Weights: a model is a folder.

A model folder holds ``model.safetensors`` (with the category table, the thresholds and the map
from scores to probabilities in its header), ``recipe.yaml`` and ``README.md`` (the card). Nothing
here ever unpickles objects.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
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

SHIPPED = Path(__file__).parent / "models"  # that come with the package, by name

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
    half: bool = False,
) -> None:
    """Write a model folder; an older one in its place is replaced when the new one is whole.

    What else is in that folder stays in it.

    Args:
        folder: where to; other folders with content are left alone.
        model: as built from ``recipe.model``.
        recipe: goes into the folder.
        categories: one row a label.
        thresholds: one a label, 0..1, of calibrated scores; None: ``overall``.
        overall: one for all labels.
        calibration: from scores to probabilities.
        scores: figures for the card, by name.
        half: store matrices in half precision, which halves the file; `load` gives float32.

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
    if half:  # but no statistics of norms, whose range is wide, and which are few
        state |= {k: v.half() for k, v in state.items() if v.is_floating_point() and v.ndim > 1}
    with replacing(folder) as aside:
        aside.mkdir()
        # As any file is written: the library's own writer has another kind of error, and mode 0600.
        (aside / FILES[0]).write_bytes(serialise(state, header))
        recipe.save(aside / FILES[1])
        card = _card(folder.name, recipe, categories, thresholds, overall, scores or {})
        (aside / FILES[2]).write_text(card, encoding="utf-8")
        for path in folder.iterdir() if folder.exists() else ():
            if path.is_dir() and not path.is_symlink():
                shutil.copytree(path, aside / path.name, symlinks=True)
            elif path.name not in FILES:
                shutil.copy2(path, aside / path.name, follow_symlinks=False)


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
    with opened(weights) as file:
        header = file.metadata()
        categories = read_header(header, weights)[0]
        state = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    header |= describe_scores(thresholds, overall, calibration)
    with replacing(weights) as aside:
        aside.write_bytes(serialise(state, header))
    card = _card(folder.name, recipe, categories, thresholds, overall, scores)
    with replacing(folder / FILES[2]) as aside:
        aside.write_text(card, encoding="utf-8")


def shipped() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{FILES[0]}"))


def locate(folder: Path | str) -> Path:
    """A model folder as it is named, or the model of that name that comes with the package.

    What is on disk goes first, so a new model never changes what a path means.
    """
    path = Path(folder)
    return path if path.exists() or str(path) not in shipped() else SHIPPED / path


def load(folder: Path | str, device: torch.device | str = "cpu") -> Model:
    """Read a model folder, or a model that comes with the package.

    Names and shapes are compared with what the recipe builds before any memory is taken.

    Raises:
        InputError: a file is missing, damaged, or does not fit the recipe; says which and how.
    """
    folder = locate(folder)
    weights = _model_file(folder)
    recipe = Recipe.load(folder / FILES[1])
    with opened(weights) as file:
        categories, thresholds, overall, calibration = read_header(file.metadata(), weights)
        build = recipe.model.method, len(categories)
        with torch.device("meta"):
            expected = cast(nn.Module, create(*build, **recipe.model.options)).state_dict()
        _check_fits(file, expected, weights)
        model = cast(nn.Module, create(*build, **recipe.model.options))
        state = {key: file.get_tensor(key) for key in expected}
        for key, value in state.items():
            if value.is_floating_point() and not value.isfinite().all():
                raise InputError(
                    f"{weights}: {key} holds numbers that are not finite: the training diverged"
                )
        model.load_state_dict(state)
    segmenter = cast(Segmenter, model.to(device).eval())
    return Model(segmenter, recipe, categories, thresholds, overall, calibration)


def read_recipe(folder: Path | str) -> Recipe:
    """The recipe of a model folder, or of a model that comes with the package.

    Raises:
        InputError: no model folder, or a faulty recipe.
    """
    return Recipe.load(_model_file(locate(folder)).parent / FILES[1])


def _model_file(folder: Path) -> Path:
    """The weights inside a model folder that has all its files."""
    if not folder.is_dir():
        what = "no such model folder" if not folder.exists() else "a model is a folder, not a file"
        known = f", or a shipped model: {', '.join(shipped())}" if shipped() else ""
        raise InputError(f"{folder}: {what}: name one with {FILES[0]} and {FILES[1]}{known}")
    for name in FILES[:2]:
        if not (folder / name).is_file():
            runs = [name for name in ("best", "last") if (folder / name / FILES[0]).is_file()]
            hint = f": did you mean {folder / runs[0]}?" if runs else ": not a model folder"
            raise InputError(f"{folder}: has no {name}{hint}")
    return folder / FILES[0]


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, open; whatever is wrong with it becomes one line.

    Raises:
        InputError: no such file, or a damaged one.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: damaged, or no safetensors file ({reason})") from None


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
