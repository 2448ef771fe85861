import csv
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from brefine import cli, reproduce
from brefine.checkpoints import Checkpoints
from brefine.data import toy
from brefine.data.read import read
from brefine.methods import METHODS, create
from brefine.parts.two_stage import Detector
from brefine.recipe import Recipe
from brefine.reproduce import SMALL, TABLES, Row, Table, locate, plot, shrink, subtract
from brefine.structures import InputError
from test_train_together import free_port

RECIPES = Path(__file__).parents[1] / "recipes"
PAIR = Table(
    "A pair",
    [
        Row("Mask R-CNN", "mask_rcnn_r50_1x", (34.8, 18.7, 37.9, 47.4, 38.3)),
        Row("BRefine", "brefine_r50_1x", (37.8, 20.8, 40.9, 52.4, 40.4)),
    ],
    [(1, 0)],
)


#: a scale that runs in a moment
TINY = {
    "options": {"backbone": "test_efficientnet_gn.r160_in1k", "channels": 16},
    "detector": {
        "fpn_norm": "group",
        "box_hidden": 16,
        "mask_rois": 4,
        "detections": 5,
        "candidates": (50, 50),
        "proposals": (20, 20),
    },
    "data": {"short_side": (64,), "long_side": 80, "workers": 0},
    "train": {**SMALL["train"], "steps": 2, "batch_size": 2, "warmup_steps": 1},
}


@pytest.fixture
def tiny(monkeypatch):
    """A tiny scale, and a table of two rows."""
    monkeypatch.setattr(reproduce, "SMALL", TINY)
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
        trained.append(folder.name)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(recipe, folder, resume=resume)

    monkeypatch.setattr(reproduce, "train", counted)
    assert command(pictures, out) == 130  # stopped in the second row
    assert len(list(csv.reader((out / "pair.csv").open()))) == 2  # heads, and the first row
    assert command(pictures, out) == 0
    assert trained == ["mask_rcnn_r50_1x", "brefine_r50_1x", "brefine_r50_1x"]
    printed = capsys.readouterr()
    assert "not the paper's setting" in printed.err
    assert "2 steps of 2 and at most 4 pictures" in " ".join(printed.err.split())

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


#: one of several processes: a table of three rows, of which two are the same at small scale
PROCESS = """
import sys, time
from test_reproduce import PAIR, TINY, Row, Table, command, reproduce

rows = [PAIR.rows[0], Row("The same", "mask_rcnn_r50_2x"), PAIR.rows[1]]
reproduce.TABLES["pair"] = Table("Three rows", rows, [(2, 0)])
reproduce.SMALL, reproduce.PICTURES = TINY, (4, 2)
replacing = reproduce.replacing

def late(path):
    time.sleep(0.5 if path.parent.name == "results" else 0)  # the others must wait
    return replacing(path)

reproduce.replacing = late
sys.exit(command(*sys.argv[1:]))
"""


def test_two_processes_run_a_table_together(pictures, tmp_path):
    """Rows are trained by both, written by the first, and one that is shared is trained once."""
    out, port = tmp_path / "out", str(free_port())
    started = []
    for rank in ("0", "1"):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "here"}
        sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "2")
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        paths = {"PYTHONPATH": str(Path(__file__).parent)}
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", PROCESS, str(pictures), str(out)],
                env={**os.environ, **ranks, **sizes, **where, **paths},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        said = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], said
    assert [bool(stdout) for stdout, _ in said] == [True, False]  # the first one prints
    for name in ("mask_rcnn_r50_1x", "brefine_r50_1x"):
        result = json.loads((out / f"results/{name}.json").read_text())
        assert result["values"] == reproduce.Report.load(out / "runs" / name).as_dict()["values"]
    assert len(list(csv.reader((out / "pair.csv").open()))) == 6
    assert {path.name for path in (out / "runs").iterdir()} == {
        "mask_rcnn_r50_1x",
        "brefine_r50_1x",
    }


@pytest.mark.usefixtures("tiny")
def test_a_stopped_table_says_how_to_go_on(pictures, tmp_path, monkeypatch, capsys):
    save = Checkpoints.save

    def interrupted(self, trainer):
        if trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        save(self, trainer)

    monkeypatch.setattr(Checkpoints, "save", interrupted)
    settings = ("--set", "train.checkpoint_every=1", "--set", "train.steps=4")
    assert command(pictures, tmp_path / "out", *settings) == 75
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "stopped by SIGINT after step 2: the same command goes on"
    monkeypatch.setattr(Checkpoints, "save", save)
    assert command(pictures, tmp_path / "out", *settings) == 0


@pytest.mark.usefixtures("tiny")
def test_mistakes_come_out_before_anything_is_trained(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "train", None)  # would be a TypeError
    where = ["--data", str(pictures), "--out", str(tmp_path / "out")]
    assert cli.main(["reproduce", "pair", "tabel6", *where, "--scale", "small"]) == 2
    assert "no table 'tabel6'" in capsys.readouterr().err
    wrong = ["--scale", "small", "--set", "train.stepz=2"]
    assert cli.main(["reproduce", "pair", *where, *wrong]) == 2
    assert "train.stepz" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # or the next set would be another than this one
    (tmp_path / "out/results").mkdir(parents=True)
    for name in ("pair.md", "pair.csv", "pair.svg"):
        (tmp_path / "out" / name).write_text("mine")
        assert cli.main(["reproduce", "pair", *where, "--scale", "small"]) == 2
        assert f"{name}: is there already, and not from this command" in capsys.readouterr().err
        assert (tmp_path / "out" / name).read_text() == "mine"
        (tmp_path / "out" / name).unlink()
    row = reproduce.TABLES["pair"].rows[0].recipe
    for content in ("", "{}", "[]"):
        (tmp_path / f"out/results/{row}.json").write_text(content)
        assert cli.main(["reproduce", "pair", *where, "--scale", "small"]) == 2
        assert f"{row}.json: damaged: remove it" in capsys.readouterr().err
    assert cli.main(["reproduce", "table1", *where]) == 2
    said = capsys.readouterr().err
    assert f"{pictures}/annotations/instances_train2017.json: not there" in said
    assert "docs/quality.md" in said
    assert cli.main(["reproduce", "table1", "--data", str(tmp_path / "no")]) == 2
    assert f"--data {tmp_path}/no: not there" in capsys.readouterr().err


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
    stored = json.loads((tmp_path / "results/row.json").read_text())
    del stored["recipe"]["model"]["options"]["detector"]["rpn_low_quality"]  # an older version's
    (tmp_path / "results/row.json").write_text(json.dumps(stored))
    assert reproduce.run("row", recipe, **places) == stored
    raised = recipe.with_settings(["model.options.detector.rpn_low_quality=0.1"])
    with pytest.raises(InputError, match=r"rpn_low_quality was 0.0 and is 0.1"):
        reproduce.run("row", raised, **places)
    (tmp_path / "results/row.json").unlink()
    before = sorted((tmp_path / "runs/row").rglob("*"))
    with pytest.raises(InputError, match=r"row: of other settings: train.lr was 0.001 and is 0.5"):
        reproduce.run("row", other, **places)
    assert sorted((tmp_path / "runs/row").rglob("*")) == before
    more = recipe.with_settings(["data.workers=2"])  # makes no difference
    assert reproduce.run("row", more, **places)["resumed"]
    (tmp_path / "results/row.json").unlink()
    moved = tmp_path / "moved"  # the same pictures in another place are no other settings
    shutil.copytree(pictures, moved / pictures.name)
    paths = [
        f"data.{key}={moved / path.relative_to(pictures.parent)}"
        for key, path in (("images", recipe.data.images), ("val_images", recipe.data.val_images))
    ]
    assert reproduce.run("row", recipe.with_settings(paths), **places)["resumed"]


def test_the_tables_are_the_papers():
    """What the paper says of its own tables, and the arithmetic of its text."""
    for table in TABLES.values():
        for row in table.rows:
            assert len(row.paper) in (0, len(table.columns) - 1, len(table.columns))
            recipe = RECIPES / f"{row.recipe}.yaml"
            assert recipe.is_file()
            if row.paper:
                text = recipe.read_text()
                assert re.search(rf"mask AP {row.paper[0]}\b", text)
                assert len(row.paper) < len(table.columns) or f"box AP {row.paper[-1]}" in text
        for one, other in table.pairs:
            assert one != other
            assert max(one, other) < len(table.rows)
    for name, pairs in (("table1", 4), ("table2", 14), ("table8", 1)):
        first = {TABLES[name].rows[one].title.split(",")[0] for one, _ in TABLES[name].pairs}
        assert (first, len(TABLES[name].pairs)) == ({"BRefine"}, pairs)
    rows = TABLES["table1"].rows
    assert round(rows[1].paper[0] - rows[0].paper[0], 1) == 3.0  # "improved by 3.0 AP"
    assert round(rows[1].paper[3] - rows[0].paper[3], 1) == 5.0  # "5.0 AP for large objects"
    rows = TABLES["table5"].rows
    assert round(rows[4].paper[1] - rows[0].paper[1], 1) == 4.3  # "small-target ... by 4.3"
    rows = TABLES["table7"].rows
    assert round(rows[1].paper[0] - rows[0].paper[0], 1) == 4.2  # "improved AP by 4.2"


def test_every_recipe_of_a_row_is_in_a_table():
    named = {row.recipe for table in TABLES.values() for row in table.rows}
    heads = {path.stem: path.read_text().splitlines()[0] for path in RECIPES.glob("*.yaml")}
    paper = {name for name, head in heads.items() if "(Table" in head or "(Figure" in head}
    assert paper - named == set()
    assert {name for name in named - paper if "(caption of Table" not in heads[name]} == set()


@pytest.mark.usefixtures("tiny")
def test_rows_that_are_the_same_at_small_scale_are_trained_once(pictures, tmp_path, monkeypatch):
    rows = [Row("1x", "mask_rcnn_r50_1x"), Row("2x", "mask_rcnn_r101_2x")]
    monkeypatch.setitem(TABLES, "pair", Table("The same", rows, [(1, 0)]))
    trained = []

    def run(name, recipe, **_):
        trained.append(name)
        return {"values": {"mask/AP": 0.25}, "recipe": recipe.model_dump()}

    monkeypatch.setattr(reproduce, "run", run)
    assert command(pictures, tmp_path) == 0
    assert trained == ["mask_rcnn_r50_1x"] * 2  # the second reads the first one's result
    assert "2x - 1x,here,+0.0" in (tmp_path / "pair.csv").read_text()


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
        if key in reproduce.FULL:
            assert small.model.options["detector"][key] == getattr(Detector(), key)
        elif key not in SMALL["detector"]:
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
    assert "beside ours" in reproduce.header(PAIR, [], small=False)


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
    with pytest.raises(InputError, match="no table 'table9': choose one of table1"):
        reproduce.reproduce("table9", tmp_path, tmp_path)


@pytest.fixture(scope="module")
def study():
    """The modules of benchmarks/quality, which import each other as scripts do."""
    folder = Path(__file__).parents[1] / "benchmarks/quality"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield importlib.import_module("study"), importlib.import_module("table")


@pytest.mark.parametrize("name_of_set", ["nuclei", "nuclei_fine"])
def test_cells_of_the_study_differ_in_one_change(study, tmp_path, name_of_set):
    study, _ = study
    assert len(set(study.cells())) == len(list(study.cells()))
    data = {"train": tmp_path / "train.json", "val": tmp_path / "val.json", "images": None}
    base = {}
    for variant, (name, settings) in study.VARIANTS.items():
        if not (RECIPES / f"{name}.yaml").is_file():
            continue
        cell = study.Cell(name_of_set, variant, 1)
        recipe = study.recipe_of(cell, data, tmp_path)
        base.setdefault(name, recipe)  # methods come first, as they are
        assert recipe.train.seed == 1
        for key, value in study.DETECTORS[name_of_set].items():
            found = recipe.model.options["detector"][key]
            assert (list(found) if isinstance(value, list) else found) == value
        # same pictures, steps and schedule for all methods
        first = next(iter(base.values()))
        changed = {each.split("=")[0].split(".")[0] for each in settings}
        assert len(settings) <= 1
        for section in ("data", "train"):
            same = getattr(recipe, section) == getattr(first, section)
            assert same == (section not in changed), variant
        if settings:
            assert recipe != base[name], variant
        else:
            assert recipe.model.options["detector"] == first.model.options["detector"]


@pytest.mark.parametrize("given", ["nuclei", "nuclei=", "=data", "="])
def test_a_source_without_name_or_path_is_named(study, given, monkeypatch, capsys):
    study, _ = study
    monkeypatch.setattr("sys.argv", ["study.py", "--data", given, "--list"])
    with pytest.raises(SystemExit, match="2"):
        study.main()
    assert f"{given!r} is not NAME=PATH" in capsys.readouterr().err


@pytest.mark.parametrize("only", ["nuclei", "sets=toy", "set=", "set=nucli"])
def test_a_cell_that_there_is_not_is_told(study, only, monkeypatch, capsys):
    study, _ = study
    monkeypatch.setattr("sys.argv", ["study.py", "--only", only, "--list"])
    with pytest.raises(SystemExit) as end:
        study.main()
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "expected set=, variant=, seed=" in said or "no such cell" in said


def test_one_class_is_made_of_a_set(study):
    study, _ = study
    content = {
        "images": [{"id": 1}, {"id": 2}, {"id": 3}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 9},
            {"id": 2, "image_id": 2, "category_id": 4, "iscrowd": 1},
            {"id": 3, "image_id": 1, "category_id": 4, "iscrowd": 1},
            {"id": 4, "image_id": 3, "category_id": 4},
        ],
        "categories": [{"id": 4, "name": "person"}, {"id": 9, "name": "dog"}],
    }
    person = study.one_class(content, "person")
    assert [image["id"] for image in person["images"]] == [3]
    assert person["annotations"] == [{"id": 4, "image_id": 3, "category_id": 1}]
    everything = study.one_class(content, "object")
    assert [image["id"] for image in everything["images"]] == [1, 3]
    assert [each["id"] for each in everything["annotations"]] == [1, 3, 4]
    assert {each["category_id"] for each in everything["annotations"]} == {1}
    some = study.one_class(content, "object", 1)
    assert [image["id"] for image in some["images"]] == [1]
    assert [each["id"] for each in some["annotations"]] == [1, 3]


def test_all_methods_learn_from_the_same_and_fill_the_page(study, tmp_path, monkeypatch, capsys):
    script = importlib.import_module("all_methods")
    assert {method for _, method, _ in script.VARIANTS.values()} == set(METHODS)
    recipes = {name: script.recipe_of(name, 3, tmp_path) for name in script.VARIANTS}
    for recipe in recipes.values():
        create(recipe.model.method, 4, **recipe.model.options)
        assert (recipe.data, recipe.train) == (
            recipes["mask_rcnn"].data,
            recipes["mask_rcnn"].train,
        )
    monkeypatch.setattr(script, "PICTURES", (4, 2))
    monkeypatch.setattr(script, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(script, "TRAIN", {**script.TRAIN, "steps": 1})
    monkeypatch.setattr(script, "ROUNDS", 1)
    (tmp_path / "docs/images").mkdir(parents=True)
    begin, end = script.MARKERS
    (tmp_path / "docs/methods.md").write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    arguments = ["all_methods.py", "--work", str(tmp_path / "work"), "--only", "mask_rcnn,solo"]
    arguments += ["--results", str(tmp_path / "results")]
    monkeypatch.setattr("sys.argv", [*arguments, "--seeds", "0"])
    script.main()
    page = (tmp_path / "docs/methods.md").read_text()
    assert page.startswith(f"before\n{begin}\n2 runs, ")
    assert page.endswith(f"\n{end}\nafter\n")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[2:]] == ["| Mask R-CNN", "| SOLO"]
    assert rows[2][-2].startswith("1.00 (")
    with Image.open(tmp_path / "docs/images/methods.png") as picture:
        tile = picture.width // script.COLUMN
        assert np.asarray(picture)[:tile, :tile].std() > 10
    before = sorted((tmp_path / "results").iterdir())
    stamps = [file.stat().st_mtime_ns for file in before]
    monkeypatch.setattr("sys.argv", [*arguments, "--seeds", "0", "--train"])
    script.main()  # all is there
    assert [file.stat().st_mtime_ns for file in before] == stamps
    # elsewhere, without the models, nothing is lost
    drawn = (tmp_path / "docs/images/methods.png").read_bytes()
    shutil.rmtree(tmp_path / "work")
    monkeypatch.setattr("sys.argv", [*arguments, "--seeds", "0"])
    script.main()
    assert "no model of mask_rcnn, solo: times and picture stay" in capsys.readouterr().err
    assert (tmp_path / "docs/methods.md").read_text() == page
    assert (tmp_path / "docs/images/methods.png").read_bytes() == drawn
    monkeypatch.setattr("sys.argv", ["all_methods.py", "--only", "maskrcnn"])
    with pytest.raises(SystemExit, match="error: maskrcnn: choose of mask_rcnn, "):
        script.main()


def result(**values):
    figures = {"mask/AP": 0.5, "mask/AP_S": None, "mask/AP_M": 0.4, "mask/AP_L": 0.6,
               "boundary/AP": 0.3, "box/AP": 0.5, "given_boxes/mask_iou": 0.8,
               "given_boxes/boundary_iou": 0.7}  # fmt: skip
    figures |= {key.replace("__", "/"): value for key, value in values.items()}
    recipe = {
        "model": {"options": {"backbone": "b", "channels": 1}, "weights": "none"},
        "train": {"steps": 1, "batch_size": 1, "optimizer": "o", "lr": 1.0, "schedule": "s"},
    }
    names = ("brefine", "torch", "torchvision", "timm", "lightning", "python")
    facts = {"versions": dict.fromkeys(names, "1"), "commit": "abc", "machine": "m", "threads": 1}
    return {"values": figures, "recipe": recipe, **facts, "cpu_seconds": 60, "resumed": False}


def test_the_tables_of_the_study_are_made_of_its_results(study, tmp_path):
    study, table = study
    folder = tmp_path / "results"
    folder.mkdir()
    cells = {
        "toy-mask_rcnn-0": result(),
        "toy-mask_rcnn-1": result(mask__AP=0.52),
        "toy-brefine-0": result(mask__AP=0.53),
        "toy-brefine-1": result(mask__AP=0.53),
        "toy-brefine-2": result(mask__AP=0.8),  # without a partner: in no difference
        "toy-floor_0-0": result(mask__AP=0.51),
        "toy-no_such_variant-0": result(mask__AP=0.99),
    }
    for name, content in cells.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    results = table.load(folder)
    assert len(results) == 6
    lines = [line.split(" | ") for line in table.tables(results).splitlines() if "|" in line]
    rows = [[cell.strip("| ") for cell in line] for line in lines]
    by_title = {row[0]: row for row in rows[:4]}
    assert by_title["Mask R-CNN"][1:4] == ["2", "51.0 ± 1.4", "-"]
    assert by_title["BRefine"][1:3] == ["3", "62.0 ± 15.6"]
    assert by_title["BRefine"][-1] == "1:00"
    (difference,) = [row for row in rows[4:] if row[0] == "BRefine"]
    assert difference[1:3] == ["2", "+2.0 ± 1.4"]
    (change,) = [row for row in rows if row[0].startswith("`floor_0`")]
    assert change[1:3] == ["1", "-2.0"]
    assert "detector.balance_floor=0.0" in change[0]
    ET.fromstring(table.draw(results))
    page = f"before\n{table.MARKERS[0]}\nold\n{table.MARKERS[1]}\nafter\n"
    filled = table.fill(page, "new \\1", "page")
    assert filled == page.replace("old", "new \\1")
    with pytest.raises(InputError, match="no lines"):
        table.fill("nothing", "new", "page")


@pytest.mark.usefixtures("tiny")
def test_the_study_runs_a_cell_once_and_its_table_is_filled_in(
    study, tmp_path, monkeypatch, capsys
):
    study, table = study
    monkeypatch.setattr(study, "TOY", (4, 2))
    monkeypatch.setitem(study.SETS, "toy", {"short_side": (64,), "long_side": 80})
    monkeypatch.setitem(study.VARIANTS, "mask_rcnn", ("mask_rcnn_r50_1x", ["model.weights=none"]))
    places = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    only = "set=toy,variant=mask_rcnn,seed=0"
    monkeypatch.setattr("sys.argv", ["study.py", "--only", only, *places])
    assert study.main() == 0
    file = tmp_path / "results/toy-mask_rcnn-0.json"
    assert {path.name for path in (tmp_path / "results").iterdir()} == {file.name}
    left = {path.name for path in (tmp_path / "work/runs/toy-mask_rcnn-0").iterdir()}
    assert "best" in left  # what `warm` starts from
    assert not {"last", "checkpoints"} & left
    content = file.read_text()
    assert study.main() == 0
    assert file.read_text() == content
    monkeypatch.setattr("sys.argv", ["study.py", "--list", "--only", "set=toy", *places])
    capsys.readouterr()
    study.main()
    listed = capsys.readouterr().out.splitlines()
    assert "toy-mask_rcnn-0  done" in listed
    assert "toy-brefine-0" in listed

    page = tmp_path / "docs/quality.md"
    page.parent.mkdir()
    page.write_text("\n".join(table.MARKERS))
    arguments = ["--results", str(tmp_path / "results"), "--docs", str(page)]
    monkeypatch.setattr("sys.argv", ["table.py", *arguments])
    table.main()
    assert "| Mask R-CNN | 1 |" in page.read_text()
    ET.parse(page.parent / "images/quality.svg")


def test_finer_grids_hold_masks_better(study, tmp_path, monkeypatch, capsys):
    grid = importlib.import_module("grid")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{grid.MARKERS[0]}\n{grid.MARKERS[1]}\nafter\n")
    monkeypatch.setattr(study[0].toy, "draw", partial(study[0].toy.draw, size=(96, 128)))
    monkeypatch.setattr(study[0], "TOY", (1, 3))
    monkeypatch.setattr("sys.argv", ["grid.py", "--docs", str(page)])
    before = page.read_text()
    grid.main()
    assert "nuclei: left out" in capsys.readouterr().out
    assert page.read_text() == before  # rows of other sets are not lost
    monkeypatch.setattr(grid, "SETS", {"toy": grid.SETS["toy"]})
    grid.main()
    (row,) = [line for line in page.read_text().splitlines() if line.startswith("| toy")]
    name, side, *ceilings = row.strip("| ").split(" | ")
    # the short side of 96 becomes 256, unless the long one of 128 would be more than 384
    assert name == "toy"
    assert 10 < int(side) < 256
    found = [float(value) for value in ceilings[:4]]
    assert found == sorted(found)
    assert 50 < found[0] < found[2] < 100


def test_a_pixel_off_is_a_mask_without_its_outline(study, tmp_path):
    grid = importlib.import_module("grid")
    box = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 80.0}
    box |= {"bbox": [5, 6, 10, 8], "segmentation": [[5, 6, 15, 6, 15, 14, 5, 14]]}
    content = {"images": [{"id": 1, "file_name": "a.png", "height": 40, "width": 50}]}
    content |= {"annotations": [box], "categories": [{"id": 1, "name": "box"}]}
    Image.new("RGB", (50, 40)).save(tmp_path / "a.png")
    (tmp_path / "set.json").write_text(json.dumps(content))
    ((area, whole, edge),) = grid.thinner(read(tmp_path / "set.json", tmp_path))
    assert area == 80
    assert whole == 8 * 6 / 80
    assert edge == 0  # outlines of one pixel, side by side


@pytest.mark.parametrize("script", ["study", "grid"])
@pytest.mark.parametrize("name", ["nuclei", "coco"])
def test_a_folder_that_is_not_there_is_named(study, script, name, tmp_path, monkeypatch, capsys):
    module = importlib.import_module(script)
    folder = tmp_path / "nowhere"
    more = {
        "study": ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")],
        "grid": ["--docs", str(tmp_path / "page.md")],
    }
    monkeypatch.setattr("sys.argv", [script, "--data", f"{name}={folder}", *more[script]])
    with pytest.raises(SystemExit, match="2"):
        module.main()
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{folder}/train.json is not there" in error
