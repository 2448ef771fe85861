"""Weights of one-stage methods: handed on by names, read from MMDetection's; training from them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from brefine import pretrained, weights
from brefine.methods import create
from brefine.recipe import Recipe
from brefine.structures import Category, Images
from brefine.train import train
from conftest import tiny_recipe

SMALL: dict[str, dict[str, Any]] = {
    "solo": {"width": 8, "groups": 2, "num_convs": 1, "grids": (6, 5, 4, 3, 2)},
    "yolact": {"width": 8, "prototypes": 4, "prototype_width": 8, "top_from_c5": True},
}
IN_MMDETECTION = [*SMALL, "decoupled"]
SMALL["blendmask"] = {"num_convs": 1, "groups": 2, "base_width": 8, "attention": 4}
METHODS = [*SMALL, "decoupled"]
#: our names to MMDetection's, the other way round than the methods have them
THEIRS = [
    (r"^trunk\.body\.", "backbone."),
    (r"^trunk\.fpn\.inner_blocks\.(\d)\.0\.", r"neck.lateral_convs.\1.conv."),
    (r"^trunk\.fpn\.layer_blocks\.(\d)\.0\.", r"neck.fpn_convs.\1.conv."),
    (r"^trunk\.fpn\.extra_blocks\.p6\.", "neck.fpn_convs.3.conv."),
    (r"^trunk\.fpn\.extra_blocks\.p7\.", "neck.fpn_convs.4.conv."),
    (r"^class_head\.convs\.(\d)\.0\.", r"mask_head.cls_convs.\1.conv."),
    (r"^class_head\.convs\.(\d)\.1\.", r"mask_head.cls_convs.\1.gn."),
    (r"^class_head\.logits\.", "mask_head.conv_cls."),
    (r"^mask_head\.convs\.(\d)\.0\.", r"mask_head.mask_convs.\1.conv."),
    (r"^mask_head\.convs\.(\d)\.1\.", r"mask_head.mask_convs.\1.gn."),
    (r"^mask_head\.logits\.", "mask_head.conv_mask_list."),
    (r"^mask_head\.([xy])\.(\d)\.0\.", r"mask_head.mask_convs_\1.\2.conv."),
    (r"^mask_head\.([xy])\.(\d)\.1\.", r"mask_head.mask_convs_\1.\2.gn."),
    (r"^mask_head\.([xy])_logits\.", r"mask_head.conv_mask_list_\1."),
    (r"^box_head\.conv\.", "bbox_head.head_convs.0.conv."),
    (r"^box_head\.classes\.", "bbox_head.conv_cls."),
    (r"^box_head\.deltas\.", "bbox_head.conv_reg."),
    (r"^box_head\.shares\.", "bbox_head.conv_coeff."),
    (r"^mask_head\.convs\.0\.", "mask_head.protonet.0."),
    (r"^mask_head\.convs\.1\.", "mask_head.protonet.2."),
    (r"^mask_head\.convs\.2\.", "mask_head.protonet.4."),
    (r"^mask_head\.fine\.", "mask_head.protonet.8."),
    (r"^mask_head\.last\.", "mask_head.protonet.10."),
    (r"^semantic\.logits\.", "mask_head.segm_branch.segm_conv."),
]


def recipe(name: str, **sections: Any) -> Recipe:
    method = "solo" if name == "decoupled" else name
    options = SMALL[method] | ({"decoupled": True} if name == "decoupled" else {})
    values = tiny_recipe("mask_rcnn", **sections).model_dump()
    model = values["model"]
    keep = {key: model["options"][key] for key in ("backbone", "channels")}
    values["model"] = {**model, "method": method, "options": {**keep, **options}}
    return Recipe.parse(values, name)


def build(name: str, num_classes: int, **options: Any) -> nn.Module:
    about = recipe(name).model
    model = create(about.method, num_classes, **{**about.options, **options})
    assert isinstance(model, nn.Module)
    for path in pretrained.class_layers(model, "rows"):
        bias: Any = model.get_submodule(path).bias
        bias.data.normal_(std=0.1)  # what starts at one value would hide what is lost
    return model


def theirs(model: nn.Module) -> dict[str, Tensor]:
    """The state as MMDetection would have it."""
    state = {}
    for key, value in model.state_dict().items():
        name = key
        for pattern, other in THEIRS:
            name, found = re.subn(pattern, other, key)
            if found:
                break
        if key.startswith("box_head.classes."):  # [anchor, class] there
            value = value.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
        if key.startswith("semantic."):
            value = value.roll(-1, 0)
        state[name] = value
    return state


@pytest.mark.parametrize("name", METHODS)
def test_rows_follow_the_names_of_classes(name: str, tmp_path: Path) -> None:
    source = build(name, 3)
    table = [Category(i, letter) for i, letter in enumerate("abc")]
    weights.save(tmp_path / "model", source, recipe(name), table)
    loaded: Any = weights.load(tmp_path / "model").segmenter
    images = Images.stack([torch.rand(3, 64, 96) * 255])
    with torch.inference_mode():
        (one,), (other,) = source.eval().predict(images), loaded.predict(images)  # type: ignore
    assert torch.equal(one.logits, other.logits)
    model = build(name, 2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    asked = [Category(0, "c"), Category(1, "new")]
    report = pretrained.start(model, tmp_path / "model", categories=asked)
    assert "classes: 1 of 2 re-used by name; at random: new" in report
    assert "not re-used" not in report
    check_rows(model, before, source)


def check_rows(model: nn.Module, before: dict[str, Tensor], source: nn.Module) -> None:
    """Class 0 of two is class 2 of three; class 1 stayed."""
    state, old = model.state_dict(), source.state_dict()
    rows = pretrained.class_layers(model, "rows")
    assert rows
    for layer, count in rows.items():
        for end in ("weight", "bias"):
            key = f"{layer}.{end}"
            assert torch.equal(state[key][:count], old[key][2 * count : 3 * count])
            assert torch.equal(state[key][count : 2 * count], before[key][count : 2 * count])
    others = {key for key in state if key.rpartition(".")[0] not in rows}
    assert all(torch.equal(state[key], old[key]) for key in others)


@pytest.mark.parametrize("name", IN_MMDETECTION)
def test_a_checkpoint_of_mmdetection_is_read_by_names(name: str, tmp_path: Path) -> None:
    source = build(name, 3)
    state = theirs(source)
    assert not any(key in state for key in source.state_dict())
    meta = {"dataset_meta": {"classes": ("a", "b", "c")}}
    torch.save({"meta": meta, "state_dict": state}, tmp_path / "epoch_12.pth")
    model = build(name, 2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    asked = [Category(0, "c"), Category(1, "new")]
    report = pretrained.start(model, tmp_path / "epoch_12.pth", categories=asked)
    assert "not re-used" not in report
    assert "without a place" not in report
    check_rows(model, before, source)


def test_softmax_rows_of_three_anchors_become_log_odds(tmp_path: Path) -> None:
    source = build("yolact", 3)
    table = [Category(i, letter) for i, letter in enumerate("abc")]
    weights.save(tmp_path / "model", source, recipe("yolact"), table)
    model = build("yolact", 3, ranking=True)
    pretrained.start(model, tmp_path / "model", categories=table)
    bias = source.state_dict()["box_head.classes.bias"].view(4, 3)
    assert torch.equal(model.state_dict()["box_head.classes.bias"].view(3, 3), bias[:3] - bias[3])


@pytest.mark.parametrize("name", METHODS)
def test_trains_and_is_evaluated_like_any_other(name: str, tmp_path: Path, toy_set: Path) -> None:
    data = {"train": str(toy_set / "train.json"), "val": str(toy_set / "val.json")}
    best = train(recipe(name, data=data), tmp_path / "run")
    assert weights.load(best).recipe.model.method == recipe(name).model.method
    values = json.loads((tmp_path / "run" / "evaluation.json").read_text())["values"]
    assert 0 <= values["given_boxes/boundary_iou"] <= 1
    logged = (tmp_path / "run" / "metrics.csv").read_text()
    assert "grad_mask_head" in logged
