"""Every method exports, and the file finds what the model finds; or it says why not."""

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from brefine import pretrained, weights
from brefine.data.toy import CATEGORIES
from brefine.export import export
from brefine.methods import METHODS, create
from brefine.recipe import Recipe
from brefine.structures import InputError
from test_export import OPTIONS

#: what makes a method small, or why it cannot be exported
SMALL: dict[str, Any] = {
    "pointrend": {"hidden": 32, "point_channels": 16, "subdivisions": 3},
    # what it says of masks puts RoIs beyond boxes in another order, too
    "mask_scoring": {"iou_hidden": 32, "detector": {**OPTIONS["detector"], "mask_margin": 0.1}},
    "htc": {"semantic_classes": 3},
    # a light head; test_export.py looks closer at the full one
    "brefine": {"widths": (16, 16, 8), "detail": 8, "detail_stride": 2, "early_exit": 1.0},
}
ELSEWHERE = {"mask_rcnn"}  # in test_export.py
#: methods of one stage cannot be exported; what makes them small
ONE_STAGE: dict[str, Any] = {
    "solo": {"width": 16, "groups": 4, "num_convs": 1},
    "yolact": {"width": 16, "prototype_width": 16},
    "blendmask": {"num_convs": 1, "groups": 4, "base_width": 16},
}


def save(method: str, folder: Path) -> None:
    """A model folder whose scores and masks differ: the last layers have large weights."""
    torch.manual_seed(1)
    recipe = Recipe.parse(
        {
            "model": {"method": method, "options": {**OPTIONS, **SMALL.get(method, {})}},
            "data": {"short_side": 96, "long_side": 128},
            "train": {"steps": 1, "lr": 0.001},
        },
        "tiny",
    )
    model: Any = create(method, len(CATEGORIES), **recipe.model.options)
    model.rpn.objectness.weight.data *= 20
    model.rpn.deltas.weight.data *= 3
    for path, layer in model.named_modules():
        if path.startswith("box_head") and path.endswith(".deltas"):
            layer.weight.data *= 100
        elif path in pretrained.class_layers(model, "rows"):
            layer.weight.data *= 0.3 / layer.weight.std()
    weights.save(folder, model, recipe, CATEGORIES)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - ELSEWHERE - ONE_STAGE.keys()))
def test_exports(method: str, tmp_path: Path) -> None:
    save(method, tmp_path / "model")
    parity = export(tmp_path / "model", tmp_path / "model.onnx")
    assert parity.good
    assert parity.objects > 100
    model = onnx.load(tmp_path / "model.onnx")
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert said["method"] == method
    assert json.loads(said["short_side"]) == 96


@pytest.mark.parametrize("method", sorted(ONE_STAGE))
def test_says_why_a_method_is_not_exported(method: str, tmp_path: Path) -> None:
    options = {"backbone": "test_resnet", "channels": 16, **ONE_STAGE[method]}
    recipe = Recipe.parse(
        {"model": {"method": method, "options": options}, "train": {"steps": 1, "lr": 0.001}}, "x"
    )
    model: Any = create(method, len(CATEGORIES), **recipe.model.options)
    weights.save(tmp_path / "model", model, recipe, CATEGORIES)
    with pytest.raises(InputError, match=f"{method} cannot be exported, because"):
        export(tmp_path / "model", tmp_path / "model.onnx")
    assert weights.load(tmp_path / "model").segmenter.num_classes == len(CATEGORIES)
