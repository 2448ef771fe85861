"""Recipes: a fault gives one line with its path, good values survive a round trip."""

import copy
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import brefine.methods
from brefine.recipe import Recipe
from brefine.structures import InputError


def fake(
    num_classes: int,
    *,
    stages: int = 3,
    dilations: tuple[int, ...] = (1, 2, 3),
    mask_loss: Literal["bce", "boundary"] = "boundary",
) -> None:
    raise AssertionError("checking a recipe must not build the model")


GOOD: dict[str, Any] = {
    "model": {"method": "fake", "options": {"stages": 2, "dilations": [1, 2]}},
    "data": {"train": "a/train.json", "short_side": [640, 800]},
    "train": {"epochs": 12, "lr": 0.0075},
}


@pytest.fixture(autouse=True)
def _methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brefine.methods, "METHODS", {"fake": fake}, raising=False)


def write(tmp_path: Path, section: str = "", **changes: Any) -> Path:
    values = copy.deepcopy(GOOD)
    place = values
    for key in section.split("."):
        place = place[key] if key else place
    place.update(changes)
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_values_are_read_and_coerced(tmp_path: Path) -> None:
    recipe = Recipe.load(write(tmp_path))
    assert recipe.model.options == {"stages": 2, "dilations": (1, 2)}
    assert recipe.data.short_side == (640, 800)
    assert recipe.data.train == Path("a/train.json")
    assert recipe.train.steps is None
    assert recipe.train.milestones is None


def test_round_trip(tmp_path: Path) -> None:
    recipe = Recipe.load(write(tmp_path))
    recipe.save(tmp_path / "saved.yaml")
    assert Recipe.load(tmp_path / "saved.yaml") == recipe
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.yaml", "saved.yaml"]


@pytest.mark.parametrize(
    ("section", "change", "parts"),
    [
        ("", {"trian": {}}, ["trian: unexpected keyword (did you mean train?)"]),
        ("model", {"metod": 1}, ["model.metod: unexpected keyword"]),
        ("model", {"method": "nope"}, ["model.method: unknown method 'nope'; one of fake"]),
        ("model.options", {"stagez": 1}, ["model.options.stagez: unexpected keyword", "stages?"]),
        ("model.options", {"stages": "three"}, ["model.options.stages: "]),
        ("model.options", {"mask_loss": "bcee"}, ["model.options.mask_loss: ", "'boundary'"]),
        ("model.options", {"num_classes": 3}, ["model.options.num_classes: unexpected"]),
        ("data", {"shrt_side": 1}, ["data.shrt_side: unexpected", "short_side?"]),
        ("data", {"short_side": []}, ["data.short_side: "]),
        ("data", {"flip": 1.5}, ["data.flip: "]),
        ("train", {"lr": "fast"}, ["train.lr: "]),
        ("train", {"lr": float("nan")}, ["train.lr: "]),
        ("train", {"precision": "8"}, ["train.precision: "]),
        ("train", {"steps": 5}, ["train: give exactly one of epochs and steps"]),
        ("train", {"epochs": None}, ["train: give exactly one of epochs and steps"]),
        (
            "train",  # of a schedule in epochs, but for its length
            {"epochs": None, "steps": 90000, "milestones": [8, 11]},
            ["train: milestones are steps", "8 is within warmup_steps (500)", "or null"],
        ),
        ("train", {"zzz{}": 1}, ["train.zzz{}: unexpected keyword (known: epochs, "]),
    ],
)
def test_a_fault_is_one_line_with_its_path(
    tmp_path: Path, section: str, change: dict[str, Any], parts: list[str]
) -> None:
    path = write(tmp_path, section, **change)
    with pytest.raises(InputError) as caught:
        Recipe.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert message.count(": unexpected") <= 1


def test_every_fault_is_listed(tmp_path: Path) -> None:
    path = write(tmp_path, "train", lrr=1, lr=-1)
    with pytest.raises(InputError, match=r"train\.lrr"):
        Recipe.load(path)
    path = write(tmp_path, "train", lr=-1, seed=-1)
    with pytest.raises(InputError, match=r"train\.lr: .*; train\.seed: "):
        Recipe.load(path)


def test_missing_file_folder_and_binary(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such recipe"):
        Recipe.load(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="cannot read the recipe"):
        Recipe.load(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match="not a UTF-8 text file"):
        Recipe.load(tmp_path / "b.yaml")


def test_yaml_fault_has_its_line(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model:\n  method: [fake\ntrain: {}\n")
    with pytest.raises(InputError, match=r"r\.yaml, line 3, column \d+: no valid YAML"):
        Recipe.load(tmp_path / "r.yaml")


def test_settings(tmp_path: Path) -> None:
    recipe = Recipe.load(write(tmp_path))
    changed = recipe.with_settings(
        ["train.lr=1e-3", "model.options.mask_loss=bce", "data.short_side=256", "data.val=v.json"]
    )
    assert changed.train.lr == 1e-3
    assert changed.model.options == {"stages": 2, "dilations": (1, 2), "mask_loss": "bce"}
    assert changed.data.short_side == (256,)
    assert changed.data.val == Path("v.json")
    assert recipe.train.lr == 0.0075
    assert recipe.with_settings(["train.epochs=null", "train.steps=7"]).train.steps == 7


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ("train.lrr=1", "train.lrr: unexpected keyword (did you mean lr?)"),
        ("model.options.stagez=1", "model.options.stagez: unexpected keyword"),
        ("trainlr", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("train.lr.deep=3", "expected KEY=VALUE"),
        ("train.lr=[1", "no valid YAML"),
        ("train=3", "train: "),
        ("model.options=", "model.options: "),
    ],
)
def test_a_wrong_setting_is_one_line(tmp_path: Path, setting: str, part: str) -> None:
    recipe = Recipe.load(write(tmp_path))
    with pytest.raises(InputError) as caught:
        recipe.with_settings([setting])
    assert setting in str(caught.value)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["model", "train", "data", "lr", "method", "options", "steps"])
            | st.text(max_size=5)
            | st.integers(),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
yaml_text = st.text(alphabet=st.sampled_from("model: train{}[]&*!|>-?'\"\n\t#%@`=,0x_1.e\\"))


@settings(max_examples=300, deadline=None)
@given(plain.map(lambda value: yaml.safe_dump(value)) | yaml_text | st.binary(max_size=40))
def test_garbage_is_an_input_error(tmp_path_factory: Any, garbage: str | bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "garbage.yaml"
    path.write_bytes(garbage if isinstance(garbage, bytes) else garbage.encode())
    with pytest.raises(InputError) as caught:
        Recipe.load(path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "text", ["!!int ''", "!!timestamp x", "!!bool x", "a: 2001-99-99", "[" * 3000, "{[]: 1}"]
)
def test_scalars_that_break_the_yaml_library(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(InputError, match="no valid YAML"):
        Recipe.load(tmp_path / "r.yaml")


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["train", "data", "model"]), plain)
@example("data", {"trian": None})
def test_garbage_in_a_section(section: str, value: Any) -> None:
    values = {**GOOD, section: value}
    if section == "data" and value == {}:
        assert Recipe.parse(values, "r").data.flip == 0.5
        return
    if isinstance(value, dict) and value:  # by chance a section may be right: {"train": None}
        known = Recipe.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
        assume(not value.keys() <= known.keys())
    with pytest.raises(InputError) as caught:
        Recipe.parse(values, "r")
    assert len(str(caught.value).splitlines()) == 1
