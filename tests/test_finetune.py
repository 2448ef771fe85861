"""The finetune preset: its rules as properties, one real run, and models inside the package."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from safetensors.torch import load_file

import brefine
from brefine import cli, pretrained, weights
from brefine.checkpoints import changes
from brefine.data.coco import CocoSet
from brefine.data.toy import CATEGORIES, draw
from brefine.finetune import (
    EVALUATIONS,
    LONGEST,
    MOST_HELD_OUT,
    Choice,
    choose,
    compose,
    describe,
    finetune,
    held_out,
    measure,
    read_start,
    require_same,
    settle,
)
from brefine.methods import create
from brefine.recipe import Recipe
from brefine.structures import InputError
from conftest import tiny_recipe

#: makes the preset's model a tiny one; its own choices of size and length would take minutes
MODEL = {
    "backbone": "test_efficientnet_gn.r160_in1k",
    "channels": 16,
    "stages": 1,
    "detector": {
        "frozen_stages": 0,
        "fpn_norm": "group",
        "box_hidden": 16,
        "candidates": (50, 50),
        "proposals": (20, 20),
        "mask_rois": 4,
        "detections": 5,
    },
}
TINY_SETTINGS = [
    "model.weights=none",
    f"model.options={json.dumps(MODEL)}",
    "data.short_side=64",
    "data.long_side=96",
    "data.workers=0",
    "train.steps=4",
    "train.validate_every=0.5",
    "train.batch_size=2",
]


def figures_of(
    *,
    pictures: int = 40,
    short: int = 256,
    size: float = 40.0,
    spread: float = 2.0,
    crowd: int = 10,
    balance: float = 1.0,
    aspect: float = 1.5,
) -> dict[str, Any]:
    """What `measure` says of a made-up set."""
    sizes = {"p5": size / spread, "p25": size, "p50": size, "p75": size * spread}
    return {
        "pictures": pictures,
        "objects": pictures * crowd,
        "aspect": {"min": 1 / aspect, "median": 1.0, "max": aspect},
        "network": {"short_side": short, "long_side": 10**6},
        "network_size": {**sizes, "p95": size * spread**2},
        "objects_a_picture": {"mean": crowd, "p95": crowd, "max": crowd},
        "imbalance": {"max_by_min": balance, "gini": 0.0},
        "classes": [{"id": 1, "name": "cell", "objects": pictures * crowd, "pictures": pictures}],
    }


def chosen(figures: dict[str, Any], **options: Any) -> dict[str, Any]:
    count = held_out(figures["pictures"])
    choices = choose(figures, held_out=count, validates=bool(count), **options)
    return {choice.key: choice.value for choice in choices}


SETS = st.fixed_dictionaries(
    {
        "pictures": st.integers(1, 3000),
        "short": st.integers(32, 6000),
        "size": st.floats(1, 2000),
        "spread": st.floats(1, 6),
        "crowd": st.integers(1, 2000),
        "balance": st.floats(1, 1000),
        "aspect": st.floats(1, 10),
    }
)


# --- rules


@settings(max_examples=40, deadline=None)
@given(values=SETS, gpu=st.booleans())
def test_choices_are_bounded(values: dict[str, Any], gpu: bool) -> None:
    figures = figures_of(**values)
    found = chosen(figures, gpu=gpu)
    # whatever is chosen is a recipe
    compose([Choice(key, value, "") for key, value in found.items()])
    sides = found["data.short_side"]
    assert 64 <= sides[-1] <= LONGEST[gpu]
    assert all(side % 32 == 0 and sides[-1] / 2 <= side <= 1.5 * sides[-1] for side in sides)
    assert max(sides) <= found["data.long_side"] <= 2 * max(LONGEST[gpu], *sides)
    assert found["model.options.stages"] in (2, 3)
    assert found["model.options.detector.anchor_scale"] in (2, 4, 8)
    assert 100 <= found["model.options.detector.detections"] <= 500
    learnt = values["pictures"] - held_out(values["pictures"])
    assert 1 <= found["train.batch_size"] <= min(4, learnt)
    assert 1000 <= found["train.steps"] <= 2000
    assert (
        ("train.patience" in found) == ("train.validate_every" in found) == (values["pictures"] > 5)
    )
    if "data.crop" in found:
        assert found["data.crop"] < sides[-1]


@settings(max_examples=40, deadline=None)
@given(values=SETS, factor=st.floats(1, 50))
def test_larger_objects_need_less_enlargement_and_more_stages(
    values: dict[str, Any], factor: float
) -> None:
    small = chosen(figures_of(**values))
    large = chosen(figures_of(**{**values, "size": values["size"] * factor}))
    assert small["data.short_side"][-1] >= large["data.short_side"][-1]
    # rounding to whole sides moves an object's size by less than a fifth
    low, high = (f["model.options.stages"] for f in (small, large))
    assert low <= high or factor < 1.6
    key = "model.options.detector.anchor_scale"
    assert small[key] <= large[key] or factor < 1.6


@settings(max_examples=40, deadline=None)
@given(values=SETS, more=st.integers(1, 500))
def test_more_pictures_are_never_trained_for_less(values: dict[str, Any], more: int) -> None:
    few = chosen(figures_of(**values))
    many = chosen(figures_of(**{**values, "pictures": values["pictures"] + more}))
    assert few["train.steps"] * few["train.batch_size"] <= (
        many["train.steps"] * many["train.batch_size"]
    )
    assert few["model.options.channels"] <= many["model.options.channels"]


@settings(max_examples=40, deadline=None)
@given(values=SETS)
def test_every_object_of_a_picture_may_be_found(values: dict[str, Any]) -> None:
    found = compose(choose(figures_of(**values), held_out=0, validates=False)).model.options[
        "detector"
    ]
    most = found["detections"] if isinstance(found, dict) else found.detections
    proposals = found["proposals"] if isinstance(found, dict) else found.proposals
    assert most >= min(500, values["crowd"])
    assert proposals[1] >= most


@given(pictures=st.integers(0, 10**6))
def test_some_pictures_are_held_out_but_most_are_learnt_from(pictures: int) -> None:
    count = held_out(pictures)
    assert held_out(pictures + 1) >= count
    assert count <= min(MOST_HELD_OUT, pictures / 3)
    assert (count == 0) == (pictures < 6)


def test_small_and_large_objects_of_pictures_of_one_size() -> None:
    nuclei = chosen(figures_of(short=256, size=9, spread=1.8, crowd=300))
    assert nuclei["data.short_side"][-1] == 512
    assert nuclei["data.crop"] == 320
    assert nuclei["model.options.stages"] == 2
    assert nuclei["model.options.detector.anchor_scale"] == 4
    assert nuclei["model.options.detector.detections"] == 400
    # 2 pixels a cell at the most, and no fewer than 28 cells
    assert chosen(figures_of(short=256, size=4, spread=1.2))["model.options.stages"] == 2
    fruits = chosen(figures_of(short=448, size=120, spread=1.5))
    assert fruits["data.short_side"][-1] == 448
    assert "data.crop" not in fruits
    assert fruits["model.options.stages"] == 3
    assert fruits["model.options.detector.anchor_scale"] == 8


def test_nothing_is_turned_upside_down_unless_asked_for() -> None:
    recipe = compose(choose(figures_of(), held_out=8, validates=True))
    assert recipe.data.flip_vertical == 0
    assert not recipe.data.rotate90
    assert recipe.with_settings(["data.rotate90=true"]).data.rotate90


def test_rare_classes_come_more_often() -> None:
    assert "data.repeat_threshold" not in chosen(figures_of(balance=19))
    assert 0 < chosen(figures_of(balance=20))["data.repeat_threshold"] <= 1


def test_a_reason_stands_beside_each_value_and_gives_way_to_what_was_said() -> None:
    figures = figures_of()
    choices, recipe = settle(figures, ["train.steps=7"], held_out=8, validates=True)
    lines = describe(figures, choices, recipe, held_out=8)
    for choice in choices:
        (line,) = [line for line in lines if line.startswith(f"  {choice.key} = ")]
        said = choice.key == "train.steps"
        assert line.endswith(": as you said" if said else choice.why)
    assert any("8 pictures held out, 32 to learn from" in line for line in lines)


@pytest.mark.parametrize(
    ("settings", "follows"),
    [
        (["train.batch_size=1"], {"train.steps": 1900, "train.validate_every": 5.938}),
        (["train.steps=4000"], {"train.steps": 4000, "train.validate_every": 50}),
        (["train.steps=null", "train.epochs=20"], {"train.validate_every": 2}),
        (["data.short_side=128"], {"model.options.stages": 2, "data.long_side": 192}),
        (["data.short_side=64"], {"model.options.detector.anchor_scale": 2}),
        (["data.crop=null"], {}),
        (["model.options.detector.detections=300"], {}),
    ],
)
def test_what_is_not_said_follows_from_what_is(
    settings: list[str], follows: dict[str, Any]
) -> None:
    choices, recipe = settle(figures_of(), settings, held_out=8, validates=True)
    found = {choice.key: choice.value for choice in choices}
    assert {key: found[key] for key in follows} == pytest.approx(follows)
    assert recipe == recipe.with_settings(settings)
    lines = describe(figures_of(), choices, recipe, held_out=8)
    for setting in settings:
        key = setting.partition("=")[0]
        assert all(line.endswith(": as you said") for line in lines if f" {key} = " in line)
    proposals = recipe.model_dump()["model"]["options"]["detector"]["proposals"]
    assert proposals[1] >= 2 * found["model.options.detector.detections"]
    assert settle(figures_of(), [], held_out=8, validates=True)[0] == choose(
        figures_of(), held_out=8, validates=True
    )


def test_long_pictures_are_not_shrunk_to_nothing() -> None:
    figures = figures_of(short=60, size=34, spread=1.2)
    figures["aspect"] = {"min": 30.0, "median": 31.7, "max": 32.0}
    choices = choose(figures, held_out=8, validates=True)
    found = {choice.key: choice for choice in choices}
    assert found["data.short_side"].value[-1] == 64
    assert found["data.long_side"].value == 2 * LONGEST[False]
    assert found["data.long_side"].why == "the longest picture is 32 : 1: short sides shrink to 32"
    assert "of the objects are above 18 pixels" in found["data.short_side"].why


def test_objects_that_stay_too_small_are_named() -> None:
    figures = figures_of(short=3000, size=9)
    choices = choose(figures, held_out=8, validates=True)
    lines = describe(figures, choices, compose(choices), held_out=8)
    assert any("cut the pictures into tiles" in line for line in lines)


def test_sizes_are_compared_with_all_pictures_at_one_size(tmp_path: Path) -> None:
    draw(tmp_path / "a", train=3, val=0, size=(64, 64), seed=0, progress=False)
    figures = measure(CocoSet(tmp_path / "a/train.json"))
    content = json.loads((tmp_path / "a/train.json").read_text())
    # The same pictures three times as large beside them: objects as large as before, in shares.
    again = [{**image, "id": image["id"] + 100} for image in content["images"]]
    for image in again:
        image["height"], image["width"] = 192, 192
    masks = []
    for entry in content["annotations"]:
        x, y, w, h = entry["bbox"]
        box = [x, y, x + w, y, x + w, y + h, x, y + h]
        one = {**entry, "segmentation": [box]}
        three = {**one, "id": entry["id"] + 1000, "image_id": entry["image_id"] + 100}
        masks += [one, {**three, "segmentation": [[3 * v for v in box]]}]
    mixed = {**content, "images": content["images"] + again, "annotations": masks}
    both = measure(CocoSet.from_dict(mixed, tmp_path / "mixed.json", tmp_path))
    alone = measure(
        CocoSet.from_dict({**content, "annotations": masks[::2]}, tmp_path / "alone.json", tmp_path)
    )
    assert both["network"]["short_side"] == 128
    for key in ("p25", "p75", "p95"):
        assert both["network_size"][key] == pytest.approx(2 * alone["network_size"][key], rel=0.05)
    assert figures["objects"] == alone["objects"]


# --- a run


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight toy pictures, and 2 more in ``val.json``."""
    folder = tmp_path_factory.mktemp("data") / "eight"
    draw(folder, train=8, val=2, size=(96, 128), seed=2, progress=False)
    return folder


@pytest.fixture(scope="module")
def ran(eight: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of the preset."""
    out = tmp_path_factory.mktemp("runs") / "eight"
    assert finetune(eight / "train.json", out, settings=TINY_SETTINGS) == out / "best"
    return out


def test_a_part_is_held_out_and_the_recipe_stands_alone(ran: Path, eight: Path) -> None:
    parts = [CocoSet(ran / f"split/{part}.json", eight / "images") for part in ("train", "val")]
    names = [{picture.file.name for picture in part.pictures} for part in parts]
    every = {picture.file.name for picture in CocoSet(eight / "train.json").pictures}
    assert [len(name) for name in names] == [6, 2]
    assert names[0] | names[1] == every
    report = json.loads((ran / "finetune.json").read_text())
    assert report["statistics"]["pictures"] == 8
    assert all(choice.keys() == {*Choice._fields} for choice in report["choices"])
    recipe = Recipe.load(ran / "recipe.yaml")
    assert (recipe.train.steps, recipe.data.val) == (4, ran / "split/val.json")
    assert recipe.data.colour == 0.2
    again = brefine_train(recipe, ran.parent / "again")
    first, second = (load_file(folder / "best/model.safetensors") for folder in (ran, again))
    assert all(torch.equal(first[key], second[key]) for key in first)


def brefine_train(recipe: Recipe, out: Path) -> Path:
    from brefine.train import train

    return train(recipe, out).parent


def test_the_threshold_is_learnt_on_what_was_held_out(ran: Path) -> None:
    with (ran / "metrics.csv").open() as file:
        assert list(csv.DictReader(file))
    evaluation = json.loads((ran / "evaluation.json").read_text())
    assert evaluation["values"].keys() >= {"mask/AP", "threshold/F1"}
    assert 0 <= weights.load(ran / "best").overall <= 1


def test_training_ends_when_nothing_gets_better(
    eight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import brefine.train as training
    from brefine.evaluate import Report

    scores = iter([0.2, 0.3, 0.1, 0.3, 0.3, 0.2] + [0.1] * 100)
    steps = []

    def fake(*_: Any, **__: Any) -> Report:
        ap = next(scores)
        steps.append(ap)
        values = dict.fromkeys(("mask/AP", "mask/AP50", "box/AP", "boundary/AP"), ap)
        return Report(values, {}, [], [0.5] * len(CATEGORIES))

    monkeypatch.setattr(training, "evaluate", fake)
    settings = [*TINY_SETTINGS, "train.steps=30", "train.validate_every=0.34"]  # at each step
    finetune(eight / "train.json", tmp_path / "run", settings=settings)
    # Best at the second; the four after it are not better; one more closes the run.
    assert steps == [0.2, 0.3, 0.1, 0.3, 0.3, 0.2, 0.1]
    assert len(steps) < EVALUATIONS
    assert "training ends" in capsys.readouterr().err


def test_too_few_to_hold_any_out_is_said(tmp_path: Path, toy_set: Path, capsys: Any) -> None:
    settings = [*TINY_SETTINGS, "train.steps=1", "train.validate_every=null"]
    model = finetune(toy_set / "train.json", tmp_path / "few", settings=settings)
    assert model == tmp_path / "few/last"
    said = capsys.readouterr().err
    assert "none is held out" in said
    assert "give --val" in said
    assert not (tmp_path / "few/split").exists()
    assert "where F1 was best" not in said


def test_pictures_without_objects_are_not_held_out(
    tmp_path: Path, toy_set: Path, capsys: Any
) -> None:
    """Of six pictures with one object between them, two would be held out without any."""
    content = json.loads((toy_set / "train.json").read_text())
    (image, *_) = content["images"]
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(1, 7):
        shutil.copy(toy_set / "images" / image["file_name"], folder / f"{i}.png")
    images = [{**image, "id": i, "file_name": f"{i}.png"} for i in range(1, 7)]
    (mark, *_) = [each for each in content["annotations"] if each["image_id"] == image["id"]]
    one = {**content, "images": images, "annotations": [{**mark, "id": 1, "image_id": 1}]}
    file = tmp_path / "one.json"
    file.write_text(json.dumps(one))
    settings = [*TINY_SETTINGS, "train.steps=1", "train.validate_every=null"]
    model = finetune(file, tmp_path / "run", images=folder, settings=settings)
    assert model == tmp_path / "run/last"
    said = capsys.readouterr().err
    assert "nor are any without objects" in said
    assert "where F1 was best" not in said
    assert not (tmp_path / "run/split").exists()


def test_a_set_to_validate_on_leaves_every_picture_to_learn_from(
    tmp_path: Path, toy_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import brefine.finetune as module

    seen = []

    def stop(recipe: Recipe, out: Path, *, devices: int) -> Path:
        assert devices == 1
        seen.append(recipe)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train", stop)
    for _ in range(2):  # what a run left that ended before it began is replaced
        with pytest.raises(KeyboardInterrupt):
            finetune(toy_set / "train.json", tmp_path / "run", val=toy_set / "val.json")
    assert seen[0] == seen[1]
    assert (seen[0].data.train, seen[0].data.val) == (toy_set / "train.json", toy_set / "val.json")
    assert seen[0].train.patience


# --- mistakes


@pytest.fixture
def mistake(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line that a wrong command prints."""

    def call(*arguments: object) -> str:
        assert cli.main(["train", *map(str, arguments)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        (line,) = [line for line in err.splitlines() if line.startswith("error:")]
        return line

    return call


def test_mistakes_are_one_line(mistake: Callable[..., str], tmp_path: Path, toy_set: Path) -> None:
    preset = ("--preset", "finetune")
    content = json.loads((toy_set / "train.json").read_text())
    for name, values in (
        ("bare", {**content, "annotations": []}),
        ("empty", {**content, "annotations": [], "images": []}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    images = ("--images", toy_set / "images")
    assert "--data" in mistake(*preset)
    assert "no recipe" in mistake("x.yaml", *preset, "--data", "y")
    assert "go with --preset" in mistake("x.yaml", "--data", "y")
    assert "name a recipe" in mistake()
    assert "one process" in mistake(*preset, "--data", toy_set / "train.json", "--devices", 2)
    out = ("--out", tmp_path / "run")
    assert "no object" in mistake(*preset, "--data", tmp_path / "bare.json", *images, *out)
    assert "no picture" in mistake(*preset, "--data", tmp_path / "empty.json", *images, *out)
    assert "no such" in mistake(*preset, "--data", tmp_path / "none.json", *out)
    wrong = mistake(*preset, "--data", toy_set / "train.json", "--set", "train.speed=1", *out)
    assert "train.speed" in wrong
    for setting, option in (
        (f"data.train={toy_set / 'val.json'}", "--data"),
        (f"data.val={toy_set / 'val.json'}", "--val"),
        ("data.val=null", "--val"),
        ("data.images=images", "--images"),
        ("data={}", "--data, --val and --images"),
    ):
        wrong = mistake(*preset, "--data", toy_set / "train.json", "--set", setting, *out)
        assert wrong.startswith(f"error: --set {setting}: ")
        assert f"give {option}" in wrong
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("mine")
    assert "something already" in mistake(*preset, "--data", toy_set / "train.json", *out)
    moved = tmp_path / "moved.json"
    shutil.copy(toy_set / "train.json", moved)
    assert "no such picture" in mistake(*preset, "--data", moved, "--out", tmp_path / "other")


def test_a_run_that_is_refused_leaves_nothing(
    mistake: Callable[..., str], tmp_path: Path, eight: Path
) -> None:
    asked = ["--preset", "finetune", "--data", eight / "train.json"]
    for setting in TINY_SETTINGS:
        asked += ["--set", setting]
    asked += ["--set", "model.weights=nosuch"]
    assert "nosuch: no such file" in mistake(*asked, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    mistake(*asked, "--out", tmp_path / "run")
    assert not [*(tmp_path / "run").iterdir()]


def test_what_is_in_a_folder_already_stays(
    mistake: Callable[..., str], tmp_path: Path, eight: Path
) -> None:
    run = tmp_path / "run"
    content = json.loads((eight / "train.json").read_text())
    preset = ("--preset", "finetune", "--images", eight / "images", "--out", run, "--data")
    for name in ("split/train.json", "split/notes.txt", "finetune.json"):
        (run / name).parent.mkdir(parents=True)
        (run / name).write_text(json.dumps(content))
        assert "something already" in mistake(*preset, eight / "train.json")
        assert json.loads((run / name).read_text()) == content
        shutil.rmtree(run)


def test_a_run_that_failed_early_can_be_started_again(
    mistake: Callable[..., str], tmp_path: Path, eight: Path
) -> None:
    asked = ["--preset", "finetune", "--data", str(eight / "train.json")]
    for setting in (*TINY_SETTINGS, "train.steps=4"):
        asked += ["--set", setting]
    asked += ["--out", str(tmp_path / "run")]
    wrong = ("--set", "train.lr=1e30", "--set", "train.warmup_steps=0")
    assert "lower train.lr" in mistake(*asked, *wrong)
    assert (tmp_path / "run/finetune.json").is_file()
    inside = ("--data", tmp_path / "run/split/train.json", "--images", eight / "images")
    assert "something already" in mistake(*asked, *inside)  # would be removed with the rest
    assert cli.main(["train", *asked]) == 0


@pytest.mark.parametrize("going_on", ["--resume", "--auto-resume"])
def test_a_run_goes_on_with_its_own_set_alone(
    mistake: Callable[..., str], ran: Path, eight: Path, monkeypatch: Any, going_on: str
) -> None:
    """A finished run has nothing left to do: exit code 0 says that it was taken for the same."""
    preset = ("--preset", "finetune", "--out", ran, going_on, "--data")
    other = eight / "val.json"
    wrong = mistake(*preset, other)
    assert f"--data was {eight / 'train.json'} and is {other}: " in wrong
    assert f"and is {eight / 'none.json'}: " in mistake(*preset, eight / "none.json")
    wrong = mistake(*preset, eight / "train.json", "--val", other)
    assert f"--val was not given and is {other}: " in wrong
    wrong = mistake(*preset, eight / "train.json", "--images", eight)
    assert f"--images was not given and is {eight}: " in wrong
    monkeypatch.chdir(eight)
    assert cli.main(["train", *map(str, preset), "train.json"]) == 0


def test_what_a_run_does_not_tell_is_not_compared(tmp_path: Path) -> None:
    require_same(tmp_path, "any.json", val="v", images="i")
    (tmp_path / "finetune.json").write_text('{"statistics": {}, "choices": []}')
    require_same(tmp_path, "any.json", val="v", images="i")
    (tmp_path / "finetune.json").write_text('{"statistics"')
    with pytest.raises(InputError, match=r"finetune\.json: damaged"):
        require_same(tmp_path, "any.json")


def test_a_run_and_its_set_may_be_moved_together(tmp_path: Path) -> None:
    for folder in ("before", "after"):
        (tmp_path / folder / "run").mkdir(parents=True)
    given = {"data": "../train.json", "val": "../val.json", "images": None}
    for folder in ("before", "after"):
        (tmp_path / folder / "run/finetune.json").write_text(json.dumps({"given": given}))
    after = tmp_path / "after"
    require_same(after / "run", after / "train.json", val=after / "val.json")
    require_same(after / "run", after / "train.json")
    with pytest.raises(InputError, match=r"--val was .*after.val\.json and is .*before.val\.json"):
        require_same(after / "run", after / "train.json", val=tmp_path / "before/val.json")


# --- models inside the package


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with one small model, ``bugs``, in half precision."""
    recipe = tiny_recipe()
    model = create("brefine", len(CATEGORIES), **recipe.model.options)
    assert isinstance(model, torch.nn.Module)
    place = tmp_path / "package" / "models"
    weights.save(place / "bugs", model, recipe, CATEGORIES, overall=0.01, half=True)
    weights.save(tmp_path / "whole", model, recipe, CATEGORIES, overall=0.01)
    monkeypatch.setattr(weights, "SHIPPED", place)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return place


def test_a_shipped_model_goes_by_its_name(
    box: Path, toy_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = str(toy_set / "images/val_00000.png")
    assert cli.main(["predict", "bugs", picture, "--threshold", "0"]) == 0
    found = json.loads(Path("predictions/predictions.json").read_text())
    assert found
    assert cli.main(["info", "bugs", "--size", "96x128"]) == 0
    assert "brefine, 4 classes" in capsys.readouterr().out
    records = brefine.load("bugs").records(picture, 1, threshold=0)
    assert [record["score"] for record in records] == [record["score"] for record in found]


def test_half_precision_is_half_the_file_and_nearly_the_same_model(box: Path) -> None:
    whole = box.parents[1] / "whole"
    sizes = [(folder / weights.FILES[0]).stat().st_size for folder in (box / "bugs", whole)]
    assert sizes[0] < 0.6 * sizes[1]
    states = [weights.load(folder).segmenter.state_dict() for folder in (box / "bugs", whole)]  # type: ignore[attr-defined]
    for key, value in states[0].items():
        assert value.dtype == states[1][key].dtype
        if value.ndim > 1:
            assert torch.allclose(value, states[1][key], rtol=2**-10, atol=1e-7)
        else:
            assert torch.equal(value, states[1][key])


def test_what_is_on_disk_goes_first(box: Path) -> None:
    assert weights.locate("bugs") == box / "bugs"
    Path("bugs").mkdir()
    assert weights.locate("bugs") == Path("bugs")
    with pytest.raises(InputError, match=r"bugs: has no model\.safetensors"):
        weights.load("bugs")


def test_only_names_of_shipped_models_are_looked_up(box: Path) -> None:
    for name in ("../models/bugs", "bugs/README.md", "", ".", "bees"):
        assert weights.locate(name) == Path(name)
    with pytest.raises(InputError, match=r"bees: no such model folder.*shipped model: bugs"):
        weights.load("bees")


def test_training_may_start_from_a_shipped_model(box: Path) -> None:
    model = create("brefine", len(CATEGORIES), **tiny_recipe().model.options)
    assert isinstance(model, torch.nn.Module)
    said = pretrained.start(model, "bugs", categories=CATEGORIES)
    state = model.state_dict()
    assert f"{len(state)} of {len(state)} tensors re-used" in said


@pytest.mark.parametrize("method", ["brefine", "mask_rcnn", "yolact"])
def test_a_model_to_start_from_decides_what_its_weights_fit(method: str, tmp_path: Path) -> None:
    options = {"channels": 48, "detector": {"fpn_norm": "none", "delta": 0.3, "detections": 7}}
    values = {"model": {"method": method, "options": options}, "train": {"steps": 1, "lr": 1}}
    recipe = Recipe.parse(values, "test")
    folder = tmp_path / "model"
    folder.mkdir()
    recipe.save(folder / "recipe.yaml")
    (folder / "model.safetensors").touch()  # is not looked at
    figures, asked = figures_of(crowd=200), [f"model.weights={folder}"]
    choices, found = settle(figures, asked, held_out=8, validates=True)
    assert found.model.method == method
    free = {f"model.options.detector.{key}" for key in ("candidates", "proposals", "detections")}
    both = (r.model.every_option() for r in (recipe, found))
    differ = changes(*({"model": {"options": each}} for each in both))
    assert {"model.options.detector.detections"} <= {*differ} <= free
    assert differ["model.options.detector.detections"] == (7, 250)
    start = "as in the model that training starts from"
    lines = describe(figures, choices, found, held_out=8)
    assert f"  model.method = {method}: {start}" in lines
    assert f"  model.options.channels = 48: {start}" in lines
    assert any("stages" in line for line in lines) == (method == "brefine")
    # What is said goes first, and what hangs on it follows.
    asked += ["model.options.channels=16", "model.options.detector.detections=300"]
    choices, found = settle(figures, asked, held_out=8, validates=True)
    assert found.model.options["channels"] == 16
    assert found.model.options["detector"]["detections"] == 300
    lines = describe(figures, choices, found, held_out=8)
    assert "  model.options.channels = 16: as you said" in lines


def test_another_method_that_is_said_takes_no_options_of_the_model(box: Path) -> None:
    asked = ["model.weights=bugs", "model.method=mask_rcnn", "model.options={channels: 32}"]
    assert read_start(asked[:1]) == read_start(['model.weights="bugs"'])
    assert read_start(asked[:1])
    assert not read_start(asked)
    _, recipe = settle(figures_of(), asked, held_out=8, validates=True)
    assert (recipe.model.method, recipe.model.options) == ("mask_rcnn", {"channels": 32})


def test_the_preset_starts_from_a_shipped_model_as_a_whole(
    box: Path, eight: Path, tmp_path: Path, capsys: Any
) -> None:
    asked = [setting for setting in TINY_SETTINGS if not setting.startswith("model.")]
    asked += ["model.weights=bugs", "train.steps=1"]
    finetune(eight / "train.json", tmp_path / "run", val=eight / "val.json", settings=asked)
    count = len(load_file(box / "bugs/model.safetensors"))
    said = capsys.readouterr().err
    assert f"{count} of {count} tensors re-used" in said
    assert "not re-used" not in said


def test_a_folder_without_a_model_is_nothing_to_start_from(
    mistake: Callable[..., str], toy_set: Path, tmp_path: Path
) -> None:
    asked = ("--preset", "finetune", "--data", toy_set / "train.json", "--out", tmp_path / "run")
    wrong = mistake(*asked, "--set", f"model.weights={toy_set}")
    assert f"{toy_set}: has no model.safetensors: not a model folder" in wrong
    assert not (tmp_path / "run").exists()


def test_models_of_this_package_are_small_and_have_a_card() -> None:
    names = weights.shipped()
    assert "nuclei" in names
    for name in names:
        folder = weights.SHIPPED / name
        assert (folder / weights.FILES[0]).stat().st_size <= 16 * 2**20
        card = (folder / "README.md").read_text()
        for word in ("Licence", "Limits", "Boundary AP"):
            assert word in card
        assert weights.load(name).categories


def test_the_shipped_model_finds_nuclei() -> None:
    ys, xs = np.mgrid[:256, :256]
    centres = [(40, 50), (90, 180), (140, 70), (200, 130), (210, 220), (60, 120)]
    nuclei = [(ys - y) ** 2 + ((xs - x) / 1.3) ** 2 < 11**2 for y, x in centres]
    pixels = np.where(np.any(nuclei, axis=0), 150, 12).astype(np.uint8)
    picture = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(1.2)).convert("RGB")
    found = np.asarray(brefine.load("nuclei", "cpu")(picture).masks)
    assert len(found) == len(nuclei)
    for nucleus in nuclei:
        assert max((nucleus & mask).sum() / (nucleus | mask).sum() for mask in found) > 0.9
