"""Model folders: what was saved comes back, and misfits are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from brefine import weights
from brefine.data.toy import CATEGORIES
from brefine.methods import create
from brefine.structures import Images, InputError
from conftest import TINY, tiny_recipe


def build(method: str = "brefine", num_classes: int = 4, **options: Any) -> nn.Module:
    model = create(method, num_classes, **{**TINY, **options})
    assert isinstance(model, nn.Module)
    return model


@pytest.mark.parametrize("method", ["mask_rcnn", "brefine"])
def test_round_trip_gives_the_same_predictions(tmp_path: Path, method: str) -> None:
    model = build(method)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "running" in name:  # buffers have to travel, too
                value.uniform_(0.5, 1.5)
    recipe = tiny_recipe(method)
    weights.save(tmp_path / "m", model, recipe, CATEGORIES, thresholds=[0.1, 0.2, 0.3, 0.4])
    loaded = weights.load(tmp_path / "m")
    assert loaded.recipe == recipe
    assert loaded.categories == CATEGORIES
    assert loaded.thresholds == [0.1, 0.2, 0.3, 0.4]
    images = Images.stack([torch.randint(256, (3, 70, 90), dtype=torch.uint8)])
    with torch.no_grad():
        (before,), (after,) = model.eval().predict(images), loaded.segmenter.predict(images)  # type: ignore[operator]
    assert len(before)
    assert torch.equal(before.boxes, after.boxes)
    assert torch.equal(before.scores, after.scores)
    assert torch.equal(before.logits, after.logits)


def test_folder_is_complete_and_readable_without_brefine(tiny_model: Path) -> None:
    assert sorted(path.name for path in tiny_model.iterdir()) == sorted(weights.FILES)
    with safe_open(tiny_model / "model.safetensors", framework="np") as file:
        header = file.metadata()
    assert header["format"] == "brefine"
    assert json.loads(header["categories"])[1] == {"id": 7, "name": "cloud"}
    assert json.loads(header["thresholds"]) == [0.1, 0.2, 0.3, 0.4]
    card = (tiny_model / "README.md").read_text()
    assert "| 1 | 7 | cloud | 0.200 |" in card
    assert f'brefine.load("{tiny_model.name}")' in card


def test_card_shows_scores_and_absent_ones(tmp_path: Path) -> None:
    scores = {"mask/AP": 0.4321, "mask/AP_L": float("nan")}
    weights.save(tmp_path / "m", build(), tiny_recipe(), CATEGORIES, scores=scores)
    card = (tmp_path / "m" / "README.md").read_text()
    assert "| mask/AP | 0.4321 |" in card
    assert "| mask/AP_L | - |" in card
    assert "nan" not in card


def test_saving_replaces_a_model_but_nothing_else(tmp_path: Path) -> None:
    weights.save(tmp_path / "m", build(), tiny_recipe(), CATEGORIES)
    (tmp_path / "m" / "notes.txt").write_text("mine")
    (tmp_path / "m" / "more").mkdir()
    (tmp_path / "m" / "more" / "a.txt").write_text("mine, too")
    (tmp_path / "m" / "README.md").write_text("older")
    weights.save(tmp_path / "m", build(), tiny_recipe(), CATEGORIES)
    made = sorted(path.name for path in (tmp_path / "m").iterdir())
    assert made == sorted([*weights.FILES, "more", "notes.txt"])
    assert (tmp_path / "m" / "more" / "a.txt").read_text() == "mine, too"
    assert "older" not in (tmp_path / "m" / "README.md").read_text()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(InputError, match="something else than a model"):
        weights.save(tmp_path / "photos", build(), tiny_recipe(), CATEGORIES)
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["a.jpg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "photos"]


def test_failing_save_leaves_the_old_model(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_model, tmp_path / "m")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "_card", fail)
    with pytest.raises(InputError, match="No space left"):
        weights.save(tmp_path / "m", build(), tiny_recipe(), CATEGORIES)
    assert weights.load(tmp_path / "m").thresholds == [0.1, 0.2, 0.3, 0.4]
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_model_may_be_read_by_whoever_may_read_the_rest(tiny_model: Path) -> None:
    assert len({path.stat().st_mode for path in tiny_model.iterdir()}) == 1


Damage = Callable[[Path], Any]


def rewrite(change: Callable[[dict[str, Tensor], dict[str, str]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        state = load_file(path)
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        change(state, header)
        save_file(state, path, header)

    return damage


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def claim_much(folder: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}})
    raw = len(header).to_bytes(8, "little") + header.encode()
    (folder / "model.safetensors").write_bytes(raw)


def other_recipe(**options: Any) -> Damage:
    def damage(folder: Path) -> None:
        recipe = tiny_recipe(model={"options": {**TINY, **options}})
        (folder / "recipe.yaml").unlink()
        recipe.save(folder / "recipe.yaml")

    return damage


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda f: shutil.rmtree(f), ["no such model folder"]),
        (lambda f: (f / "model.safetensors").unlink(), ["has no model.safetensors"]),
        (lambda f: (f / "recipe.yaml").unlink(), ["has no recipe.yaml"]),
        (lambda f: (f / "recipe.yaml").write_text("model: ["), ["recipe.yaml", "no valid YAML"]),
        (lambda f: (f / "model.safetensors").write_bytes(b""), ["model.safetensors: damaged"]),
        (lambda f: (f / "model.safetensors").write_text("hello, hello"), ["damaged"]),
        (cut, ["model.safetensors: damaged"]),
        (claim_much, ["model.safetensors: damaged"]),
        (rewrite(lambda s, h: h.clear()), ["not written by brefine"]),
        (rewrite(lambda s, h: h.update(format="pt")), ["not written by brefine"]),
        (rewrite(lambda s, h: h.update(categories="[{}]")), ["categories or thresholds"]),
        (rewrite(lambda s, h: h.update(categories="[]")), ["0 categories"]),
        (rewrite(lambda s, h: h.update(thresholds="[0.5]")), ["one finite threshold a category"]),
        (rewrite(lambda s, h: h.update(thresholds="[1, 1, 1, NaN]")), ["finite threshold"]),
        (rewrite(lambda s, h: h.update(thresholds="7")), ["thresholds are damaged"]),
        (
            rewrite(lambda s, h: s.pop("rpn.conv.bias")),
            ["rpn.conv.bias: the recipe's model has [16], the file nothing"],
        ),
        (
            rewrite(lambda s, h: s.update(extra=torch.zeros(2))),
            ["extra: the recipe's model has nothing, the file [2]"],
        ),
        (
            rewrite(lambda s, h: s.update({"rpn.conv.bias": torch.zeros(17)})),
            ["rpn.conv.bias: the recipe's model has [16], the file [17]"],
        ),
        (other_recipe(stages=2), ["mask_head.auxiliary.2.conv.", "more)"]),
        (other_recipe(channels=1 << 20), ["does not fit recipe.yaml"]),
    ],
)
def test_damage_is_one_line_that_names_the_file(
    tmp_path: Path, tiny_model: Path, damage: Damage, parts: list[str]
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_model, folder)
    damage(folder)
    with pytest.raises(InputError) as caught:
        weights.load(folder)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_run_folder_is_told_apart(tmp_path: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "run" / "best")
    with pytest.raises(InputError, match=r"did you mean .*run/best\?"):
        weights.load(tmp_path / "run")
    with pytest.raises(InputError, match="a folder, not a file"):
        weights.load(tiny_model / "model.safetensors")
