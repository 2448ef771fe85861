"""Every recipe that ships is checked: it parses, builds its model, and its header says how to."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from torch import nn

from brefine.methods import create
from brefine.parts.two_stage import TwoStage
from brefine.recipe import Recipe

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))


def test_there_are_recipes() -> None:
    names = {path.stem for path in RECIPES}
    assert {"brefine_r50_1x", "mask_rcnn_r50_1x", "brefine_lite0", "mask_rcnn_lite0"} <= names
    assert all(path in RECIPES for path in FOLDER.iterdir())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 25
    assert all(len(line) <= 100 for line in lines)
    header = [line for line in lines if line.startswith("#")]
    assert lines[: len(header)] == header
    assert any(f"brefine train recipes/{path.name}" in line for line in header)
    for word in ("Hardware:", "Expected:"):
        assert any(word in line for line in header), word

    recipe = Recipe.load(path)
    assert recipe.data.train is not None
    assert recipe.data.val is not None
    with torch.device("meta"):
        model = cast(TwoStage, create(recipe.model.method, 5, **recipe.model.options))
    assert isinstance(model, nn.Module)
    assert model.num_classes == 5
    assert model.trunk.name == recipe.model.options["backbone"]
    if recipe.train.schedule == "steps":
        length = recipe.train.epochs or recipe.train.steps
        assert length is not None
        assert max(recipe.train.milestones) < length


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_values_that_are_defaults_are_left_out(path: Path) -> None:
    recipe = Recipe.load(path)
    written: dict[str, Any] = yaml.safe_load(path.read_text())
    for name in ("data", "train"):
        section = getattr(recipe, name)
        for key in written[name]:
            default = type(section).model_fields[key].default
            allowed = {"batch_size", "milestones"}  # worth saying beside lr and epochs
            assert key in allowed or getattr(section, key) != default, f"{name}.{key}"


@pytest.mark.parametrize("pair", [("brefine_r50_1x", "mask_rcnn_r50_1x"),
                                  ("brefine_lite0", "mask_rcnn_lite0")])  # fmt: skip
def test_what_is_compared_differs_in_the_method_alone(pair: tuple[str, str]) -> None:
    one, other = (Recipe.load(FOLDER / f"{name}.yaml") for name in pair)
    assert one.data == other.data
    assert one.train == other.train
    assert one.model.weights == other.model.weights
    assert one.model.method != other.model.method
    for key in ("backbone", "channels"):
        assert one.model.options.get(key) == other.model.options.get(key)
