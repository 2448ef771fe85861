"""Weights of every method: saved and read back, handed on to other classes, trained and judged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from brefine import pretrained, weights
from brefine.data.toy import CATEGORIES
from brefine.methods import METHODS, create
from brefine.structures import Category, Images
from brefine.train import train
from conftest import TINY, tiny_recipe

#: test_pretrained.py and test_train.py look at these
ELSEWHERE = {"mask_rcnn", "brefine"}
#: with a trunk, an RPN and heads
TWO_STAGE = [
    name for name in ("pointrend", "mask_scoring", "cascade", "htc", "bmask") if name in METHODS
]


def build(method: str, num_classes: int) -> nn.Module:
    model = create(method, num_classes, **TINY)
    assert isinstance(model, nn.Module)
    for path in pretrained.class_layers(model, "rows"):
        # what starts at 0 would hide what is lost
        bias: Any = model.get_submodule(path).bias
        bias.data.normal_(std=0.1)
    return model


def save(folder: Path, method: str, model: nn.Module, names: str) -> list[Category]:
    categories = [Category(i, name) for i, name in enumerate(names)]
    weights.save(folder, model, tiny_recipe(method), categories)
    return categories


@pytest.mark.parametrize("method", TWO_STAGE)
def test_a_folder_gives_the_same_predictions_and_starts(method: str, tmp_path: Path) -> None:
    model = build(method, 3).eval()
    categories = save(tmp_path / "model", method, model, "abc")
    images = Images.stack([torch.rand(3, 64, 96) * 255])
    loaded: Any = weights.load(tmp_path / "model").segmenter
    with torch.inference_mode():
        (one,), (other,) = model.predict(images), loaded.predict(images)  # type: ignore[operator]
    assert len(one) > 0
    assert torch.equal(one.scores, other.scores)
    assert torch.equal(one.logits, other.logits)
    fresh = build(method, 3)
    report = pretrained.start(fresh, tmp_path / "model", categories=categories)
    assert "not re-used" not in report
    state = fresh.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("method", TWO_STAGE)
def test_rows_follow_the_names_of_classes(method: str, tmp_path: Path) -> None:
    source = build(method, 3)
    save(tmp_path / "model", method, source, "abc")
    model = build(method, 2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = pretrained.start(
        model, tmp_path / "model", categories=[Category(0, "c"), Category(1, "new")]
    )
    assert "classes: 1 of 2 re-used by name; at random: new" in report
    assert "not re-used" not in report
    state, theirs = model.state_dict(), source.state_dict()
    rows, columns = (pretrained.class_layers(model, kind) for kind in ("rows", "columns"))
    assert len(rows) >= 3
    for layer, count in rows.items():
        key = f"{layer}.bias"
        assert torch.equal(state[key][:count], theirs[key][2 * count : 3 * count])
        assert torch.equal(state[key][count : 2 * count], before[key][count : 2 * count])
    for layer in columns.keys() - rows.keys():
        new, old = state[f"{layer}.weight"], theirs[f"{layer}.weight"]
        assert torch.equal(new[:, :-2], old[:, :-3])
        assert torch.equal(new[:, -2], old[:, -1])  # of "c"
        assert torch.equal(new[:, -1], before[f"{layer}.weight"][:, -1])


@pytest.mark.parametrize("method", TWO_STAGE)
def test_mask_rcnn_hands_on_what_is_alike(method: str, tmp_path: Path) -> None:
    source = build("mask_rcnn", 3)
    categories = save(tmp_path / "model", "mask_rcnn", source, "abc")
    model = build(method, 3)
    pretrained.start(model, tmp_path / "model", categories=categories)
    state, theirs = model.state_dict(), source.state_dict()
    # layers that fit as a whole
    layers = {key.rpartition(".")[0] for key in state.keys() & theirs.keys()}
    groups = [[key for key in state if key.rpartition(".")[0] == layer] for layer in layers]
    shared = [
        key
        for group in groups
        for key in group
        if all(k in theirs and state[k].shape == theirs[k].shape for k in group)
    ]
    assert {"trunk", "rpn"} <= {key.partition(".")[0] for key in shared}
    assert all(torch.equal(state[key], theirs[key]) for key in shared)


@pytest.mark.parametrize("method", TWO_STAGE)
def test_trains_and_is_evaluated_like_any_other(method: str, tmp_path: Path, toy_set: Path) -> None:
    data = {"train": str(toy_set / "train.json"), "val": str(toy_set / "val.json")}
    best = train(tiny_recipe(method, data=data), tmp_path / "run")
    assert weights.load(best).categories == CATEGORIES
    values = json.loads((tmp_path / "run" / "evaluation.json").read_text())["values"]
    assert 0 <= values["mask/AP"] <= 1
    assert 0 <= values["given_boxes/boundary_iou"] <= 1
    logged = (tmp_path / "run" / "metrics.csv").read_text()
    assert "grad_mask_head" in logged
