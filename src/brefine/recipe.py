"""A recipe says everything that a training run depends on: model, data, training.

A recipe is a flat YAML file; unknown keys, wrong types and impossible values are refused with
the path of the key. Paths in it are relative to the folder the command runs in.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import typing
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from brefine.files import replacing
from brefine.ranges import Positive, Probability, Scale
from brefine.structures import InputError


def _one_or_more(value: Any) -> Any:
    """``800`` means ``[800]``."""
    return [value] if isinstance(value, int | float | str) else value


def _number_or_auto(value: Any) -> Any:
    """One line for whatever is neither; a union would tell two."""
    if value == "auto":
        return value
    try:
        return TypeAdapter(Positive).validate_python(value)
    except ValidationError:
        raise ValueError(f"expected a whole number above 0, or auto, not {value!r}") from None


Sides = Annotated[tuple[Positive, ...], BeforeValidator(_one_or_more), Field(min_length=1)]
BatchSize = Annotated[Positive | Literal["auto"], BeforeValidator(_number_or_auto)]
Milestones = Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_one_or_more)]


class Section(BaseModel):
    """A frozen part of a recipe that knows its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        return _refuse_unknown(data, list(cls.model_fields))


def _refuse_unknown(data: Any, known: Sequence[str]) -> Any:
    """``data``, if it is no dict with other keys than those that are known."""
    unknown = [key for key in data if key not in known] if isinstance(data, dict) else []
    if not unknown:
        return data
    errors: list[InitErrorDetails] = []
    for key in unknown:
        near = difflib.get_close_matches(str(key), known, 1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        text = f"unexpected keyword ({hint})".replace("{", "{{").replace("}", "}}")
        reason = PydanticCustomError("unexpected_keyword", text)
        errors.append(InitErrorDetails(type=reason, loc=(str(key),), input=data[key]))
    raise ValidationError.from_exception_data("section", errors)


def options_of(build: Callable[..., Any]) -> type[Section]:
    """The keyword arguments of a method's builder as a Section, so that a recipe is checked."""
    hints = typing.get_type_hints(build, include_extras=True)
    for name, hint in hints.items():
        if dataclasses.is_dataclass(hint):
            known = [field.name for field in dataclasses.fields(hint)]
            hints[name] = Annotated[hint, BeforeValidator(partial(_refuse_unknown, known=known))]
    fields: dict[str, Any] = {
        name: (hints[name], ... if option.default is option.empty else option.default)
        for name, option in inspect.signature(build).parameters.items()
        if option.kind is option.KEYWORD_ONLY
    }
    return create_model("Options", __base__=Section, **fields)


class ModelRecipe(Section):
    """Which method, with which options, started from which weights.

    Attributes:
        method: a name in ``brefine.METHODS``.
        options: keyword arguments of the method's builder; only those that differ from its
            defaults.
        weights: ``none``; ``imagenet`` (backbone only); a model folder; or a file with
            torchvision's Mask R-CNN state dict (.pth or .safetensors).
    """

    method: str
    options: dict[str, Any] = {}
    weights: str = "none"

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        from brefine.methods import METHODS

        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}; one of {', '.join(METHODS)}")
        return method

    @field_validator("options")
    @classmethod
    def _known_options(cls, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        from brefine.methods import METHODS

        if "method" not in info.data:  # refused above: one fault, one line
            return options
        checked = options_of(METHODS[info.data["method"]]).model_validate(options)
        return checked.model_dump(exclude_unset=True)

    def every_option(self) -> dict[str, Any]:
        """``options``, defaults included."""
        from brefine.methods import METHODS

        return options_of(METHODS[self.method]).model_validate(self.options).model_dump()


class DataRecipe(Section):
    """Which pictures, in which order, and how training changes them (``docs/data.md``).

    Attributes:
        train: labelled set to learn from: COCO json or any format of ``data/read.py``.
        val: the same to evaluate on.
        images: folder of the pictures; None: where the format has them (COCO: the json's
            ``images`` folder, else its own).
        val_images: the same for ``val``; None: as ``images``.
        short_side: pixels; one is drawn for each picture in training, the last one is used in
            evaluation and prediction.
        long_side: pixels; a longer side is never made.
        crop: side in pixels of the square that every training picture is cropped or padded to;
            None: pictures keep their shape.
        jitter: smallest and largest multiple of ``crop`` that the long side of a training picture
            becomes, in place of ``short_side`` and ``long_side``; None: those.
        flip: probability of a left-right flip in training.
        flip_vertical: the same for top and bottom.
        rotate90: turn training pictures by 0, 1, 2 or 3 quarters.
        copy_paste: probability that objects of another training picture are pasted in.
        copy_paste_blend: with soft edges.
        colour: largest change of brightness, contrast, saturation and hue in training; 0: none.
        group_by_aspect: make batches of wide or of high pictures only: less padding.
        repeat_threshold: share of the pictures below which a class is rare, and its pictures come
            more often (LVIS: 0.001); None: all pictures come alike.
        repeats: passes over the training set that make up an epoch.
        semantic: folder of maps for training, for methods that learn from them: a grey or palette
            PNG for each picture, of its name and size, with the class of each pixel (255: unknown).
        workers: loader processes.
    """

    train: Path | None = None
    val: Path | None = None
    images: Path | None = None
    val_images: Path | None = None
    short_side: Sides = (800,)
    long_side: Positive = 1333
    crop: Positive | None = None
    jitter: tuple[Scale, Scale] | None = None
    flip: Probability = 0.5
    flip_vertical: Probability = 0
    rotate90: bool = False
    copy_paste: Probability = 0
    copy_paste_blend: bool = False
    colour: Probability = 0
    group_by_aspect: bool = True
    repeat_threshold: float | None = Field(default=None, gt=0, le=1)
    repeats: Positive = 1
    semantic: Path | None = None
    workers: int = Field(default=2, ge=0)

    @field_validator("semantic")
    @classmethod
    def _fits_pasting(cls, semantic: Path | None, info: ValidationInfo) -> Path | None:
        if semantic and info.data.get("copy_paste"):
            raise ValueError("pasted objects are in no map: leave out copy_paste")
        return semantic

    @field_validator("jitter")
    @classmethod
    def _fits_crop(
        cls, jitter: tuple[float, float] | None, info: ValidationInfo
    ) -> tuple[float, float] | None:
        if jitter is None:
            return None
        if jitter[0] > jitter[1]:
            raise ValueError(f"the smaller multiple comes first, not {list(jitter)}")
        if info.data.get("crop", 0) is None:  # 0: refused above
            raise ValueError("needs crop, the side of the square that it is a multiple of")
        return jitter


class TrainRecipe(Section):
    """How to train. Exactly one of ``epochs`` and ``steps`` is given.

    Attributes:
        epochs: passes over the training set.
        steps: optimiser steps.
        batch_size: pictures per process; ``auto``: as many as fit, see ``brefine.batch_size``;
            the run folder's recipe holds the number.
        accumulate: batches whose gradients are added up for a step.
        optimizer: ``sgd`` or ``adamw``.
        lr: peak learning rate.
        lr_reference_batch: if set, ``lr`` is scaled by devices * batch_size * accumulate / this.
        weight_decay: of the optimiser.
        momentum: of SGD.
        warmup_steps: the rate rises linearly over this many steps.
        schedule: ``steps`` (times ``gamma`` at each milestone) or ``cosine``.
        milestones: in epochs or steps, whichever was given; None: at two thirds and eleven
            twelfths of the training (epochs 8 and 11 of 12).
        gamma: factor at a milestone.
        on_fault: what to do when a loss is not finite: ``stop``, or ``skip`` the batch.
        layer_decay: factor of the learning rate from each block of the trunk to the one before;
            None: all learn alike.
        freeze: patterns of parameters that do not learn, such as ``trunk.body.*``.
        clip_norm: largest gradient norm; None: no clipping.
        rank_together: with several processes, rank the samples of all of them and divide losses
            by counts of all, as one process with a larger batch would (``docs/distributed.md``).
        precision: of the numbers: 32 bits, or 16 where that does no harm (mixed).
        seed: of everything random.
        deterministic: the same weights bit for bit from the same seed on the same machine, with
            any number of workers; on a GPU only where there are such kernels, which are slower.
        validate_every: epochs between evaluations; None: at the end only.
        patience: evaluations without a better mask AP, once that is above 0, after which training
            ends; None: never.
        checkpoint_every: steps between checkpoints; None: an epoch, at most 1000.
        keep_checkpoints: how many of the last are kept, beside that of the best evaluation.
        ema: decay of the moving average of the weights, which is then what is evaluated and
            kept; None: no average.
        loggers: beside ``metrics.csv``.
        previews: pictures of the validation set that are drawn at each evaluation.
    """

    epochs: float | None = Field(default=None, gt=0)
    steps: int | None = Field(default=None, gt=0, strict=True)
    batch_size: BatchSize = 2
    accumulate: Positive = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(gt=0)
    lr_reference_batch: Positive | None = None
    weight_decay: float = Field(default=1e-4, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    warmup_steps: int = Field(default=500, ge=0)
    schedule: Literal["steps", "cosine"] = "steps"
    milestones: Milestones | None = None
    gamma: float = Field(default=0.1, gt=0)
    on_fault: Literal["stop", "skip"] = "stop"
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    freeze: tuple[str, ...] = ()
    clip_norm: float | None = Field(default=None, gt=0)
    rank_together: bool = False
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = "32-true"
    seed: int = Field(default=0, ge=0, lt=2**32)
    deterministic: bool = False
    validate_every: float | None = Field(default=None, gt=0)
    patience: Positive | None = None
    checkpoint_every: Positive | None = None
    keep_checkpoints: Positive = 2
    ema: float | None = Field(default=None, gt=0, lt=1)
    loggers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    previews: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps (set the other to null)")
        return self

    @model_validator(mode="after")
    def _milestones_are_of_the_length(self) -> Self:
        first = min(self.milestones or (math.inf,))
        if self.steps and self.schedule == "steps" and first < min(self.warmup_steps, self.steps):
            raise ValueError(
                f"milestones are steps where steps is given, and {first:g} is within warmup_steps "
                f"({self.warmup_steps}): give later ones, or null for two thirds and eleven "
                "twelfths"
            )
        return self

    @property
    def pictures(self) -> int:
        """``batch_size`` where it must be a number.

        Raises:
            InputError: it is ``auto``.
        """
        if self.batch_size == "auto":
            raise InputError("train.batch_size: auto is for brefine train: give a number here")
        return self.batch_size


class Recipe(Section):
    """Everything that a training run depends on."""

    model: ModelRecipe
    data: DataRecipe = DataRecipe()
    train: TrainRecipe

    @classmethod
    def parse(cls, values: Any, origin: str) -> Recipe:
        """Check plain values, as read from YAML.

        Args:
            values: nested dict.
            origin: where they come from, for the message.

        Raises:
            InputError: names the origin and the path of every wrong key.
        """
        if not isinstance(values, dict):
            raise InputError(f"{origin}: expected the sections model, data and train")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise InputError(f"{origin}: {describe(error)}") from None

    @classmethod
    def load(cls, path: Path | str) -> Recipe:
        """Read a YAML file.

        Raises:
            InputError: no such file, no YAML, or a wrong key or value; with file and key path.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise InputError(f"{path}: no such recipe") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "not a UTF-8 text file"
            raise InputError(f"{path}: cannot read the recipe: {reason}") from None
        return cls.parse(parse_yaml(text, str(path)), str(path))

    def save(self, path: Path | str) -> None:
        """Write every value, defaults included, as YAML; an old file is replaced at once."""
        values = self.model_dump(mode="json")
        with replacing(path) as aside:
            aside.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")

    def with_settings(self, settings: Sequence[str]) -> Recipe:
        """The recipe with some values replaced.

        Args:
            settings: ``"train.lr=0.01"``: path of the key, then its value as YAML.

        Raises:
            InputError: not of that form, an unknown key or an impossible value.
        """
        values = self.model_dump()
        for setting in settings:
            path, equals, text = setting.partition("=")
            *sections, key = path.strip().split(".")
            place: Any = values
            for section in sections:
                place = place.setdefault(section, {}) if isinstance(place, dict) else None
            if not equals or not key or not isinstance(place, dict):
                raise InputError(f"--set {setting}: expected KEY=VALUE, such as train.lr=0.01")
            place[key] = parse_yaml(text, f"--set {setting}")
        try:
            return self.parse(values, "")
        except InputError as error:
            fault = str(error).removeprefix(": ")
            blamed = [each for each in settings if each.partition("=")[0].strip() in fault]
            raise InputError(f"--set {' '.join(blamed or settings)}: {fault}") from None


def describe(error: ValidationError) -> str:
    """What pydantic found, on one line: ``path.of.key: what is wrong; ...``."""
    faults = []
    for fault in error.errors(include_url=False, include_context=False):
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "literal_error":  # the one message that leaves out what it got
            message += f", not {fault['input']!r}"
        path = ".".join(str(key) for key in fault["loc"])
        faults.append(" ".join(f"{path}: {message}".split()))
    return "; ".join(faults)


def parse_yaml(text: str, origin: str) -> Any:
    """YAML to plain values.

    Raises:
        InputError: no YAML: one line with ``origin``, line and column.
    """
    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InputError(f"{origin}{where}: no valid YAML: {error.problem}") from None
    except Exception:
        # Malformed scalars leave PyYAML as IndexError, KeyError, ValueError, RecursionError...
        raise InputError(f"{origin}: no valid YAML") from None
