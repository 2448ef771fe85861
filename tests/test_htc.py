"""HTC's semantic branch: its loss, and the maps it learns from on their way through the loader."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from brefine.data.coco import CocoSet
from brefine.data.loader import TrainSet, train_loader
from brefine.methods import create
from brefine.methods.htc import SemanticBranch
from brefine.recipe import DataRecipe, Recipe
from brefine.structures import Images, InputError, Instances
from conftest import TINY


def labelled(semantic: torch.Tensor | None) -> Instances:
    size = (32, 40) if semantic is None else tuple(semantic.shape)
    empty = torch.zeros(0, dtype=torch.int64)
    return Instances(size, torch.zeros(0, 4), empty, semantic=semantic)


def test_loss_is_cross_entropy_of_known_cells_over_all_cells() -> None:
    branch = SemanticBranch(8, 3, weight=0.5)
    logits = torch.randn(2, 3, 4, 5)
    first = torch.randint(3, (32, 40), dtype=torch.uint8)
    first[8, 16] = 255
    second = torch.randint(3, (20, 24), dtype=torch.uint8)  # 3 x 3 cells, the others are padding
    total = 0.0
    for image, truth in ((0, first), (1, second)):
        for y in range(-(-truth.shape[0] // 8)):
            for x in range(-(-truth.shape[1] // 8)):
                if truth[8 * y, 8 * x] < 255:
                    chances = logits[image, :, y, x].softmax(0)
                    total -= float(chances[int(truth[8 * y, 8 * x])].log())
    loss = branch.loss(logits, [labelled(first), labelled(second)])
    assert loss["semantic"].item() == pytest.approx(0.5 * total / (2 * 20), rel=1e-5)


@pytest.mark.parametrize(
    ("semantic", "words"),
    [(None, "data.semantic"), (torch.full((32, 40), 3, dtype=torch.uint8), "has class 3")],
)
def test_maps_that_do_not_fit_the_branch(semantic: torch.Tensor | None, words: str) -> None:
    with pytest.raises(InputError, match=words):
        SemanticBranch(8, 3).loss(torch.zeros(1, 3, 4, 5), [labelled(semantic)])


@pytest.fixture
def maps(toy_set: Path, tmp_path: Path) -> Path:
    """Maps of the toy set: 2 where an object is, 0 elsewhere; one is a palette PNG."""
    dataset = CocoSet(toy_set / "train.json")
    for index, picture in enumerate(dataset.pictures):
        target = dataset.target(index)
        assert target.masks is not None
        inside = target.masks.dense(target.size).amax(0) * 2
        image = Image.fromarray(inside.numpy())
        if index == 0:
            image = image.convert("P", palette=Image.Palette.WEB)
            image.putdata(inside.flatten().tolist())
        image.save(tmp_path / f"{picture.file.stem}.png")
    return tmp_path


def recipe(maps: Path, **options: Any) -> DataRecipe:
    base = {"semantic": maps, "short_side": 64, "long_side": 90, "workers": 0}
    return DataRecipe.model_validate({**base, **options})


def test_maps_go_where_masks_go(toy_set: Path, maps: Path) -> None:
    options = {"flip": 0.5, "flip_vertical": 0.5, "rotate90": True, "crop": 110, "short_side": 96,
               "long_side": 128}  # fmt: skip
    data = TrainSet(CocoSet(toy_set / "train.json"), recipe(maps, **options), seed=0)
    for key in [(epoch, index) for epoch in range(3) for index in range(len(data))]:
        picture, target = data[key]
        assert picture.shape == (3, 110, 110)
        semantic = target.semantic
        assert semantic is not None
        assert semantic.dtype == torch.uint8
        assert set(semantic.unique().tolist()) <= {0, 2, 255}
        outside = semantic == 255
        assert outside.any()
        assert (picture[:, outside] == 128).all()  # the grey around a small picture
        assert target.masks is not None
        inside = target.masks.dense(target.size).amax(0).bool()
        assert torch.equal(inside, semantic == 2)
        assert inside.any()


def test_pictures_of_one_name_have_maps_of_their_own(toy_set: Path, tmp_path: Path) -> None:
    content = json.loads((toy_set / "train.json").read_text())
    content["images"] = content["images"][:3]
    for name, value, image in zip(("a/1", "b/1", "a/2"), (1, 2, 3), content["images"], strict=True):
        file = tmp_path / "images" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(toy_set / "images" / image["file_name"], file)
        image["file_name"] = f"{name}.png"
        place = tmp_path / "maps" / (f"{name}.png" if value < 3 else "2.png")  # one name: no folder
        place.parent.mkdir(parents=True, exist_ok=True)
        size = image["width"], image["height"]
        Image.new("L", size, value).save(place)
    content["annotations"] = []
    (tmp_path / "train.json").write_text(json.dumps(content))
    data = TrainSet(CocoSet(tmp_path / "train.json"), recipe(tmp_path / "maps"), seed=0)
    found = [data[index][1].semantic for index in range(3)]
    assert [s.unique().tolist() for s in found if s is not None] == [[1], [2], [3]]
    (tmp_path / "maps/a/1.png").rename(tmp_path / "maps/1.png")  # of which of the two?
    with pytest.raises(InputError, match=r"maps/a/1\.png: no such picture"):
        data[0]


def test_batches_carry_maps_and_the_branch_learns(toy_set: Path, maps: Path) -> None:
    dataset = CocoSet(toy_set / "train.json")
    loader = train_loader(dataset, recipe(maps), batch_size=2, seed=0)
    images, targets = next(iter(loader))
    assert all(target.semantic.shape == target.size for target in targets)
    model: Any = create("htc", len(dataset.categories), semantic_classes=3, **TINY)
    losses = model.loss(images, targets)
    assert losses["semantic"].item() == pytest.approx(0.2 * np.log(3), rel=0.15)
    sum(v for k, v in losses.items() if not k.startswith("raw_")).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.branch.parameters())
    assert model.branch.lateral[4].weight.grad.any()
    with torch.inference_mode():
        assert len(model.eval().features(Images(images.pixels, images.sizes))) == 6


def test_the_branch_changes_what_heads_see() -> None:
    torch.manual_seed(0)
    model: Any = create("htc", 3, semantic_classes=3, **TINY).eval()
    features = [torch.randn(1, 16, 64 // s, 64 // s) for s in (4, 8, 16, 32, 64)]
    context, _ = model.branch(features)
    rows = torch.tensor([[0.0, 8, 8, 40, 48]])
    pool = model.box_head.stages[0].pool
    plain, both = pool([*features, 0 * context], rows, 7), pool([*features, context], rows, 7)
    wide = pool([*[0 * f for f in features], context], rows, 14)
    torch.testing.assert_close(both - plain, functional.adaptive_avg_pool2d(wide, 7))
    assert (both - plain).abs().mean() > 0.01


def test_wrong_maps_are_named(toy_set: Path, maps: Path) -> None:
    dataset = CocoSet(toy_set / "train.json")
    first = maps / f"{dataset.pictures[0].file.stem}.png"
    data = TrainSet(dataset, recipe(maps), seed=0)
    Image.new("L", (5, 7)).save(first)
    with pytest.raises(InputError, match=rf"{first.name}: 7 x 5 pixels"):
        data[0]
    Image.new("RGB", (128, 96)).save(first)
    with pytest.raises(InputError, match=rf"{first.name}: mode RGB"):
        data[0]
    first.unlink()
    with pytest.raises(InputError, match=first.name):
        data[0]
    with pytest.raises(InputError, match="copy_paste"):
        Recipe.parse(
            {"model": {"method": "htc"}, "train": {"steps": 1, "lr": 0.1},
             "data": {"copy_paste": 0.5, "semantic": "maps"}}, "r"
        )  # fmt: skip
    with pytest.raises(InputError, match="transform of your own"):
        train_loader(dataset, recipe(maps), batch_size=1, seed=0, transform=lambda *a: a[:2])
