"""Every recipe that ships is checked: it parses, builds its model, and its header says how to."""

import itertools
import json
import math
import shutil
from inspect import signature
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from torch import nn

from brefine.data import toy
from brefine.data.loader import train_loader
from brefine.data.read import read
from brefine.methods import METHODS, create
from brefine.parts.two_stage import TwoStage
from brefine.recipe import Recipe
from brefine.reproduce import locate
from brefine.train import Learner
from conftest import TINY
from test_cityscapes import write as write_cityscapes

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


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Toy pictures where the recipes look for theirs: COCO 2017, LVIS v1, Cityscapes, and plain."""
    folder = tmp_path_factory.mktemp("recipes") / "data"
    toy.draw(folder, train=3, val=1, size=(64, 96), seed=2, progress=False)
    labels = json.loads((folder / "train.json").read_text())
    for name in ("train2017", "val2017"):
        shutil.copytree(folder / "images", folder / "coco" / name)
        annotations = folder / "coco/annotations"
        annotations.mkdir(exist_ok=True)
        (annotations / f"instances_{name}.json").write_text(json.dumps(labels))
    for image in labels["images"]:
        url = f"http://images.cocodataset.org/train2017/{image.pop('file_name')}"
        image |= {"coco_url": url, "neg_category_ids": [], "not_exhaustive_category_ids": []}
    for entry in labels["categories"]:
        entry |= {"frequency": "rfc"[entry["id"] % 3], "image_count": 1, "instance_count": 2}
    (folder / "lvis").mkdir()
    for name in ("train", "val"):
        (folder / f"lvis/lvis_v1_{name}.json").write_text(json.dumps(labels))
        write_cityscapes(folder / "cityscapes", splits=(name,), pictures=2)
    return folder


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_on_data_of_its_layout(path: Path, data: Path) -> None:
    """Two steps with everything the recipe says but a small trunk, pictures and heads."""
    recipe = locate(Recipe.load(path), data)
    values = recipe.model_dump()
    options = values["model"]["options"]
    tiny = {**TINY["detector"], "candidates": (50, 50), "proposals": (20, 20), "mask_rois": 4}
    known = vars(signature(METHODS[recipe.model.method]).parameters["detector"].default)
    tiny = {name: value for name, value in tiny.items() if name in known}
    options |= TINY | {"detector": {**options.get("detector", {}), **tiny}}
    values["data"] |= {"short_side": (64,), "long_side": 128, "workers": 0}
    recipe = Recipe.parse(values, path.stem)
    assert recipe.data.train is not None
    assert recipe.data.val is not None
    dataset = read(recipe.data.train, recipe.data.images, split="train", quiet=True)
    held_out = read(recipe.data.val, recipe.data.val_images or recipe.data.images, quiet=True)
    assert held_out.categories == dataset.categories
    assert all(picture.file.is_file() for picture in held_out.pictures)

    loader = train_loader(dataset, recipe.data, batch_size=recipe.train.batch_size, seed=0)
    model = cast(
        nn.Module,
        create(recipe.model.method, len(dataset.categories), **recipe.model.options),
    )
    learner = Learner(model, recipe.train, steps=2, epoch=len(loader), devices=1)
    optimizer = learner.configure_optimizers()["optimizer"]
    before = {name: value.clone() for name, value in model.named_parameters()}
    losses = []
    for step, batch in zip(range(2), itertools.cycle(loader), strict=False):
        loss = learner.training_step(batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(map(math.isfinite, losses))
    moved = {name.split(".")[0] for name, value in model.named_parameters()
             if not torch.equal(value, before[name])}  # fmt: skip
    assert {name for name, _ in model.named_children()} <= moved
