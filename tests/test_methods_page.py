"""What docs/methods.md tells people to type works, and its pictures are those that are drawn."""

import re
import shutil
from pathlib import Path
from runpy import run_path

import pytest
import torch

from brefine.methods import create
from brefine.recipe import Recipe
from conftest import TINY

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "methods.md").read_text()


def test_a_checkpoint_becomes_a_model_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy_set: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    coco = tmp_path / "data/coco/annotations"
    coco.mkdir(parents=True)
    shutil.copy(toy_set / "val.json", coco / "instances_val2017.json")
    (tmp_path / "recipes").mkdir()
    recipe = Recipe.load(ROOT / "recipes/cascade_r50_1x.yaml")
    settings = [f"model.options.{key}={value!r}" for key, value in TINY.items()]
    recipe.with_settings(settings).save(tmp_path / "recipes/cascade_r50_1x.yaml")
    small = create("cascade", 4, **TINY)
    # names are mapped in test_against_mmdetection.py; here one part is enough
    state = {
        key.replace("box_head.stages.", "roi_head.bbox_head.")
        .replace("fc1", "shared_fcs.0")
        .replace("fc2", "shared_fcs.1")
        .replace("classes", "fc_cls")
        .replace("deltas", "fc_reg"): value
        for key, value in small.state_dict().items()  # type: ignore[attr-defined]
        if key.startswith("box_head.")
    }
    torch.save(state, "cascade_mask_rcnn_r50_fpn_1x_coco.pth")
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    Path("snippet.py").write_text(snippet)
    names = run_path("snippet.py")
    assert Path("models/cascade/model.safetensors").is_file()
    found = names["model"].state_dict()["box_head.stages.2.fc1.weight"]
    assert torch.equal(found, state["roi_head.bbox_head.2.shared_fcs.0.weight"])


def test_figures_are_those_that_are_drawn(tmp_path: Path) -> None:
    names = run_path(str(ROOT / "docs" / "draw_methods.py"))
    pictures = re.findall(r"\]\(images/(method_\w+)\.svg\)", PAGE)
    drawn = {name for name in names if f"method_{name}" in pictures}
    assert {f"method_{name}" for name in drawn} == set(pictures)
    for name in drawn:
        names[name].__globals__["OUT"] = tmp_path
        names[name]()
        file = f"method_{name}.svg"
        shipped = (ROOT / "docs" / "images" / file).read_text()
        assert (tmp_path / file).read_text() == shipped
