"""The methods: one dict of names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import ValidationError, validate_call

from brefine.methods.blendmask import blendmask
from brefine.methods.bmask import bmask
from brefine.methods.brefine import brefine
from brefine.methods.cascade import cascade
from brefine.methods.htc import htc
from brefine.methods.mask_rcnn import mask_rcnn
from brefine.methods.mask_scoring import mask_scoring
from brefine.methods.pointrend import pointrend
from brefine.methods.solo import solo
from brefine.methods.yolact import yolact
from brefine.recipe import describe
from brefine.structures import InputError, Segmenter

METHODS: dict[str, Callable[..., Segmenter]] = {
    "mask_rcnn": mask_rcnn,
    "brefine": brefine,
    "pointrend": pointrend,
    "mask_scoring": mask_scoring,
    "cascade": cascade,
    "htc": htc,
    "solo": solo,
    "yolact": yolact,
    "bmask": bmask,
    "blendmask": blendmask,
}


def create(name: str, num_classes: int, **options: Any) -> Segmenter:
    """Build a method with random weights.

    Args:
        name: a key of ``METHODS``.
        num_classes: K, without background.
        options: arguments of the method's builder.

    Raises:
        InputError: no such method, or a wrong argument.
    """
    if name not in METHODS:
        raise InputError(f"no method {name!r}: choose one of {', '.join(sorted(METHODS))}")
    if num_classes < 1:
        raise InputError(f"{name}: num_classes is {num_classes}: give 1 or more")
    # From a recipe, options are plain YAML values: the signature says what they become.
    try:
        return validate_call(METHODS[name])(num_classes, **options)
    except ValidationError as error:
        raise InputError(f"{name}: {describe(error)}") from None
