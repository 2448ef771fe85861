"""Quality of the masks alone: what the mask head makes of the true boxes and labels."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brefine.data.coco import CocoSet
from brefine.metrics.boundary import band_width, boundary_band, mask_iou
from brefine.metrics.overlaps import SIZES
from brefine.parts.masks import paste_all
from brefine.structures import InputError, Instances

if TYPE_CHECKING:
    from brefine.predict import Predictor
    from brefine.weights import Model

#: of one object: pixels of the true mask, mask IoU, IoU of the boundary bands alone
Quality = tuple[int, float, float]


def rows_of(dataset: CocoSet, model: Predictor | Model) -> Tensor:
    """The row in the model's table of each class of a data set, ``[K]`` int64.

    Raises:
        InputError: the model does not know a class.
    """
    rows = {category: i for i, category in enumerate(model.categories)}
    for category in dataset.categories:
        if category not in rows:
            raise InputError(
                f"{dataset.path}: category {category.id} ({category.name}) is not in the "
                "model's table: evaluate with the categories that it was trained for"
            )
    return torch.tensor([rows[c] for c in dataset.categories], dtype=torch.int64)


def ask(target: Instances, rows: Tensor) -> Instances | None:
    """The labels of a picture in the model's numbers; None where there is no object."""
    return replace(target, labels=rows[target.labels]) if len(target) else None


def measure(found: Instances, target: Instances) -> list[Quality]:
    """Compare masks predicted for true boxes with the true masks, object by object.

    Args:
        found: ``logits``, one an object of ``target``, in its frame.
        target: the true masks.
    """
    if found.logits is None or target.masks is None or found.size != target.size:
        raise ValueError("needs logits and true masks in one frame")
    width = band_width(target.size)
    masks = target.masks.to("cpu")
    measured = []
    for window, (x, y), runs in zip(
        masks.windows, masks.origins.tolist(), paste_all(found, target.size), strict=True
    ):
        pasted, origin = runs.window()
        mine, true = pasted.numpy(), window.numpy()
        whole = mask_iou((mine, origin), (true, (x, y)))
        bands = boundary_band(mine, width), boundary_band(true, width)
        edge = mask_iou((bands[0], origin), (bands[1], (x, y)))
        measured.append((int(np.count_nonzero(true)), whole, edge))
    return measured


def summarise(objects: list[Quality]) -> dict[str, float]:
    """Means over objects, ``given_boxes/{mask_iou,boundary_iou}{,_S,_M,_L}``; NaN without any."""
    table = np.array(objects, dtype=np.float64).reshape(-1, 3)
    values = {}
    for column, name in ((1, "mask_iou"), (2, "boundary_iou")):
        for size, (low, high) in SIZES.items():
            chosen: NDArray[np.float64] = table[(table[:, 0] >= low) & (table[:, 0] < high), column]
            mean = float(chosen.mean()) if len(chosen) else math.nan
            values[f"given_boxes/{name}{size}"] = mean
    return values
