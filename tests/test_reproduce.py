import csv
import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from brefine import cli, reproduce
from brefine.data import toy
from brefine.methods import METHODS
from brefine.recipe import Recipe
from brefine.reproduce import SMALL, TABLES, Row, Table, locate, plot, shrink, subtract
from brefine.structures import InputError

RECIPES = Path(__file__).parents[1] / "recipes"
PAIR = Table(
    "A pair",
    [
        Row("Mask R-CNN", "mask_rcnn_r50_1x", (34.8, 18.7, 37.9, 47.4, 38.3)),
        Row("BRefine", "brefine_r50_1x", (37.8, 20.8, 40.9, 52.4, 40.4)),
    ],
    [(1, 0)],
)


@pytest.fixture
def tiny(monkeypatch):
    """A scale that runs in a moment, and a table of two rows."""
    detector = {"fpn_norm": "group", "box_hidden": 16, "mask_rois": 4, "detections": 5}
    options = {"backbone": "test_efficientnet_gn.r160_in1k", "channels": 16}
    data = {"short_side": (64,), "long_side": 80, "workers": 0}
    small = {
        "options": options,
        "detector": {**detector, "candidates": (50, 50), "proposals": (20, 20)},
        "data": data,
        "train": {**SMALL["train"], "steps": 2, "batch_size": 2, "warmup_steps": 1},
    }
    monkeypatch.setattr(reproduce, "SMALL", small)
    monkeypatch.setattr(reproduce, "PICTURES", (4, 2))
    monkeypatch.setitem(TABLES, "pair", PAIR)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "toy"
    toy.draw(folder, train=7, val=3, size=(64, 80), seed=3, progress=False)
    return folder


def command(pictures, out, *more):
    more = ("--set", "model.weights=none", *more)
    arguments = ["reproduce", "pair", "--data", str(pictures), "--out", str(out)]
    return cli.main([*arguments, "--scale", "small", *more])


@pytest.mark.usefixtures("tiny")
def test_a_table_is_trained_written_and_gone_on_with(pictures, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    trained = []
    train = reproduce.train

    def counted(recipe, folder, *, resume):
        trained.append((folder.name, resume))
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(recipe, folder, resume=resume)

    monkeypatch.setattr(reproduce, "train", counted)
    assert command(pictures, out) == 130  # stopped in the second row
    assert len(list(csv.reader((out / "pair.csv").open()))) == 2  # heads, and the first row
    assert command(pictures, out) == 0
    assert [name for name, _ in trained] == ["mask_rcnn_r50_1x", "brefine_r50_1x", "brefine_r50_1x"]
    printed = capsys.readouterr()
    assert "not the paper's setting" in printed.err

    heads, *rows = csv.reader((out / "pair.csv").open())
    assert [row[:2] for row in rows] == [
        ["Mask R-CNN", "here"],
        ["BRefine", "here"],
        ["BRefine - Mask R-CNN", "here"],
        ["BRefine - Mask R-CNN", "paper"],
    ]
    place = heads.index("mask IoU, true boxes")
    assert float(rows[2][place]) == pytest.approx(
        float(rows[1][place]) - float(rows[0][place]), abs=0.11
    )
    assert rows[3][heads.index("mask AP")] == "+3.0"
    text = (out / "pair.md").read_text()
    for absent in ("34.8", "37.8", "52.4"):  # the paper's own figures do not compare
        assert absent not in text
        assert absent not in printed.out
    ET.parse(out / "pair.svg")

    result = json.loads((out / "results/brefine_r50_1x.json").read_text())
    values = json.loads((out / "runs/brefine_r50_1x/evaluation.json").read_text())["values"]
    assert result["values"] == values
    assert float(rows[1][place]) == round(100 * values["given_boxes/mask_iou"], 1)
    assert result["recipe"]["model"]["method"] == "brefine"
    assert str(tmp_path) not in json.dumps(result)
    assert len(json.loads((out / "data/train.json").read_text())["images"]) == 4
    assert result["seconds"] > 0

    before = (out / "pair.md").read_text()
    trained.clear()
    assert command(pictures, out) == 0
    assert trained == []
    assert (out / "pair.md").read_text() == before
    capsys.readouterr()
    assert command(pictures, out, "--set", "train.lr=0.5") == 2  # not mixed with other settings
    assert "other settings" in capsys.readouterr().err
    toy.draw(tmp_path / "other", train=4, val=2, size=(64, 80), seed=4, progress=False)
    assert command(tmp_path / "other", out) == 2  # nor with other pictures
    assert "from another set" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_an_interrupted_row_goes_on_from_its_checkpoint(pictures, tmp_path, monkeypatch):
    small = reproduce._small_data(
        Recipe.load(RECIPES / "mask_rcnn_r50_1x.yaml"), pictures, tmp_path
    )
    recipe = shrink(Recipe.load(RECIPES / "mask_rcnn_r50_1x.yaml"), small)
    recipe = recipe.with_settings(["model.weights=none", "train.steps=4"])
    places = {"runs": tmp_path / "runs", "results": tmp_path / "results"}

    def broken(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reproduce.Report, "load", broken)  # after training, before the result
        with pytest.raises(KeyboardInterrupt):
            reproduce.run("row", recipe, **places)
    assert any((tmp_path / "runs/row/checkpoints").iterdir())
    other = recipe.with_settings(["train.lr=0.5"])
    assert reproduce.run("row", recipe, **places)["resumed"]
    (tmp_path / "results/row.json").unlink()
    assert not reproduce.run("row", other, **places)["resumed"]  # of other settings: from the start


def test_the_tables_are_the_papers():
    """What the paper says of its own tables, and the arithmetic of its text."""
    for table in TABLES.values():
        for row in table.rows:
            assert len(row.paper) in (0, len(table.columns))
            recipe = RECIPES / f"{row.recipe}.yaml"
            assert recipe.is_file()
            if row.paper:
                text = recipe.read_text()
                assert f"mask AP {row.paper[0]}" in text
                assert f"box AP {row.paper[-1]}" in text
        for one, other in table.pairs:
            assert one != other
            assert max(one, other) < len(table.rows)
    rows = TABLES["table1"].rows
    assert round(rows[1].paper[0] - rows[0].paper[0], 1) == 3.0  # "improved by 3.0 AP"
    assert round(rows[1].paper[3] - rows[0].paper[3], 1) == 5.0  # "5.0 AP for large objects"
    rows = TABLES["table5"].rows
    assert round(rows[4].paper[1] - rows[0].paper[1], 1) == 4.3  # "small-target ... by 4.3"
    rows = TABLES["table7"].rows
    assert round(rows[1].paper[0] - rows[0].paper[0], 1) == 4.2  # "improved AP by 4.2"


def test_every_recipe_of_a_table_is_in_one():
    named = {row.recipe for table in TABLES.values() for row in table.rows}
    paper = {
        path.stem
        for path in RECIPES.glob("*.yaml")
        if any(word in path.read_text().splitlines()[0] for word in ("Table", "Figure"))
    }
    assert paper == named


@pytest.mark.parametrize("name", sorted({r.recipe for t in TABLES.values() for r in t.rows}))
def test_rows_stay_apart_at_small_scale(name):
    recipe = Recipe.load(RECIPES / f"{name}.yaml")
    small = shrink(recipe, {"train": Path("a.json"), "val": Path("b.json")})
    changed = {"backbone", "channels", "detector"}
    options = {k: v for k, v in small.model.options.items() if k not in changed}
    assert options == {k: v for k, v in recipe.model.options.items() if k not in changed}
    assert small.model.method == recipe.model.method in METHODS
    assert (small.data.images, small.data.val_images) == (None, None)
    for key, value in recipe.model.options.get("detector", {}).items():
        if key not in SMALL["detector"]:
            assert small.model.options["detector"][key] == value


def test_data_is_found_under_its_own_name_or_as_given(tmp_path):
    recipe = Recipe.load(RECIPES / "mask_rcnn_lvis_r50_1x.yaml")
    (tmp_path / "coco").mkdir()
    found = locate(recipe, tmp_path).data
    assert found.images == tmp_path / "coco"
    assert found.train == tmp_path / "lvis_v1_train.json"
    cityscapes = Recipe.load(RECIPES / "brefine_cityscapes_r50.yaml")
    assert locate(cityscapes, tmp_path).data.train == tmp_path
    (tmp_path / "cityscapes").mkdir()
    assert locate(cityscapes, tmp_path).data.val == tmp_path / "cityscapes"


def test_at_full_scale_the_papers_figures_stand_beside_ours():
    values = {"mask/AP": 0.35, "mask/AP_S": None, "box/AP": 0.4}
    better = {"mask/AP": 0.36, "mask/AP_S": 0.1, "box/AP": 0.4}
    lines = reproduce.lines_of(PAIR, [{"values": values}, {"values": better}], small=False)
    assert [line[:2] for line in lines] == [
        ("Mask R-CNN", "here"),
        ("Mask R-CNN", "paper"),
        ("BRefine", "here"),
        ("BRefine", "paper"),
        ("BRefine - Mask R-CNN", "here"),
        ("BRefine - Mask R-CNN", "paper"),
    ]
    assert lines[1][2]["mask/AP_L"] == 47.4
    assert lines[4][2]["mask/AP"] == pytest.approx(1)
    assert lines[4][2]["mask/AP_S"] is None
    assert lines[5][2]["mask/AP_L"] == pytest.approx(5)
    assert "beside ours" in reproduce.header(PAIR, small=False)


def test_differences_are_of_what_both_have():
    assert subtract({"a": 3.0, "b": None, "c": 1.0}, {"a": 1.0, "b": 2.0}) == {"a": 2.0, "b": None}


def test_dots_lie_where_their_values_are():
    drawn = plot("AP <x>", {"a & b": {"one": [10.0, 20.0]}, "c": {"two": [15.0], "one": []}})
    root = ET.fromstring(drawn)
    dots = [e for e in root.iter() if e.tag.endswith("circle") and e.get("r") == "4.5"]
    low, high, middle = (float(dot.get("cx")) for dot in dots)
    assert middle == pytest.approx((low + high) / 2)
    assert dots[0].get("cy") == dots[1].get("cy") < dots[2].get("cy")
    assert dots[0].get("fill") == dots[1].get("fill") != dots[2].get("fill")
    assert "a & b" in "".join(root.itertext())
    ET.fromstring(plot("none", {}))
    assert math.isfinite(low)


def test_an_unknown_table_is_named(tmp_path):
    with pytest.raises(InputError, match="no table 'table2': choose one of table1"):
        reproduce.reproduce("table2", tmp_path, tmp_path)
